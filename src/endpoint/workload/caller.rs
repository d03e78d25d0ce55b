//! Who is at the other end of a stream, and what it may have now.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tonic::{Code, Extensions, Status};

use crate::agent::{Bundles, Consumer, Svid, Watched};
use crate::attest::Entitled;
use crate::core::bundle::TrustBundle;
use crate::core::certificate::Certificate;
use crate::endpoint::Endpoint;
use crate::sys::clock;

/// A caller is attested again this often while its stream lives, besides when something may have changed.
const AGAIN: Duration = Duration::from_secs(60);
/// An attestation holds for what is sent at the same time.
const FRESH: Duration = Duration::from_millis(500);

pub(super) const NO_BUNDLES: &str = "the authority has not told of its bundles yet; try again";

pub(super) struct Caller {
    endpoint: Endpoint,
    extensions: Extensions,
    entitled: Vec<Entitled>,
    attested: Instant,
    changes: watch::Receiver<()>,
    bundles: watch::Receiver<Option<Arc<Bundles>>>,
    /// One for each of the entitled, as soon as they are asked for.
    watched: Vec<Watched>,
    consumer: Option<Consumer>,
    /// The certificates that it was sent before, by serial number, if that is traced.
    traced: Option<BTreeSet<String>>,
    begun: Instant,
    has_waited: bool,
}

/// An identity, with what there is for it.
pub(super) struct Identity<'a> {
    pub(super) entitled: &'a Entitled,
    /// None as long as there is nothing that peers would take.
    pub(super) svid: Option<Arc<Svid>>,
}

impl Caller {
    pub(super) async fn new(endpoint: &Endpoint, extensions: &Extensions) -> Result<Self, Status> {
        // What changes while it is attested is not missed.
        let changes = endpoint.attestor.changes();
        let entitled = endpoint.entitled(extensions).await?;
        let consumer = entitled.first().map(|first| endpoint.agent.holders.join(&first.id));
        Ok(Self {
            bundles: endpoint.agent.held.bundles(),
            endpoint: endpoint.clone(),
            extensions: extensions.clone(),
            entitled,
            attested: Instant::now(),
            changes,
            watched: Vec::new(),
            consumer,
            traced: None,
            begun: Instant::now(),
            has_waited: false,
        })
    }

    /// All its identities, the default one first, each with a hint of its own or with none.
    pub(super) fn identities(&mut self) -> Vec<Identity<'_>> {
        let held = &self.endpoint.agent.held;
        if self.watched.len() != self.entitled.len() {
            self.watched = self.entitled.iter().map(|it| held.watch(&it.id)).collect();
        }
        let now = clock::now();
        let all = self.entitled.iter().zip(&mut self.watched);
        all.map(|(entitled, watched)| {
            let svid = watched.borrow_and_update().clone().filter(|svid| svid.not_after() > now);
            self.has_waited |= svid.is_none();
            Identity { entitled, svid }
        })
        .collect()
    }

    pub(super) fn bundles(&mut self) -> Option<Arc<Bundles>> {
        self.bundles.borrow_and_update().clone()
    }

    /// That it was sent what X509-SVIDs are verified with.
    pub(super) fn was_given(&self, bundles: &Bundles) {
        let Some(consumer) = &self.consumer else { return };
        for (domain, authorities) in &bundles.domains {
            if let Some(x509) = &authorities.x509 {
                consumer.given(domain, x509.digest());
            }
        }
    }

    /// A span for each certificate that it had not been sent before.
    pub(super) fn trace(&mut self, method: &'static str) {
        let agent = self.endpoint.agent.clone();
        if !agent.tracer.is_on() {
            return;
        }
        let all = self.watched.iter().filter_map(|watched| watched.borrow().clone());
        let all: Vec<_> = all.map(|svid| (svid.chain[0].serial_text(), svid)).collect();
        let begun = self.begun;
        for (_, svid) in all.iter().filter(|(serial, _)| !self.has_traced(serial)) {
            let was_awaited = self.traced.is_some() || self.has_waited;
            let mut span = agent.delivery(svid, was_awaited);
            span.is_answer("SpiffeWorkloadAPI", method);
            if self.traced.is_none() {
                span.since(begun);
            }
        }
        self.traced = Some(all.into_iter().map(|(serial, _)| serial).collect());
    }

    fn has_traced(&self, serial: &String) -> bool {
        self.traced.as_ref().is_some_and(|traced| traced.contains(serial))
    }

    /// Attests it again, unless that was just done. As long as that cannot be done, what was found before holds: the
    /// process is the same one.
    pub(super) async fn attest(&mut self) -> Result<(), Status> {
        if self.attested.elapsed() < FRESH && !self.changes.has_changed().unwrap_or(true) {
            return Ok(());
        }
        self.changes.mark_unchanged();
        match self.endpoint.entitled(&self.extensions).await {
            Ok(entitled) if entitled != self.entitled => {
                self.entitled = entitled;
                self.watched.clear();
            }
            Ok(_) => {}
            Err(status) if status.code() == Code::Unavailable => {}
            Err(status) => return Err(status),
        }
        self.attested = Instant::now();
        Ok(())
    }

    /// Waits until there may be something else, or it has to be attested again.
    pub(super) async fn changed(&mut self) {
        let now = clock::now();
        // What ends must not be shown any longer.
        let ends = self.watched.iter().filter_map(|watched| Some(watched.borrow().as_ref()?.not_after()));
        let ends =
            ends.filter_map(|end| Duration::try_from(end - now).ok()).filter(|left| !left.is_zero()).min();
        let wait = ends.map_or(AGAIN, |left| left + Duration::from_millis(1)).min(AGAIN);
        let Self { bundles, changes, watched, .. } = self;
        let ended = {
            let mut bundles = Box::pin(bundles.changed());
            let mut changes = Box::pin(changes.changed());
            let mut svids: Vec<_> = watched.iter_mut().map(|svid| Box::pin(svid.changed())).collect();
            let mut wait = Box::pin(sleep(wait));
            poll_fn(|cx| {
                for svid in &mut svids {
                    if let Poll::Ready(changed) = svid.as_mut().poll(cx) {
                        return Poll::Ready(changed.is_err());
                    }
                }
                let woken = bundles.as_mut().poll(cx).is_ready()
                    || changes.as_mut().poll(cx).is_ready()
                    || wait.as_mut().poll(cx).is_ready();
                if woken { Poll::Ready(false) } else { Poll::Pending }
            })
            .await
        };
        // An identity that was ended is followed anew, if the caller may still have it.
        if ended {
            self.watched.clear();
            self.attested -= FRESH;
        }
    }
}

/// Hints of one response are unique (SPIFFE Workload API 5.2.1): of several that are the same, the first one stays.
#[derive(Default)]
pub(super) struct Hints(BTreeSet<String>);

impl Hints {
    pub(super) fn of(&mut self, entitled: &Entitled) -> String {
        match &entitled.hint {
            Some(hint) if self.0.insert(hint.clone()) => hint.clone(),
            _ => String::new(),
        }
    }
}

/// DER, one behind the other.
pub(super) fn ders<'a>(all: impl IntoIterator<Item = &'a Certificate>) -> Vec<u8> {
    all.into_iter().flat_map(Certificate::der).copied().collect()
}

pub(super) fn roots(bundle: &TrustBundle) -> Vec<u8> {
    ders(bundle.roots())
}
