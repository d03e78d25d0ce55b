//! Who is at the other end of a stream, and what there is for it now.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tonic::{Code, Extensions, Status};

use super::Shared;
use super::resource::{Made, Name};
use crate::agent::{Agent, Bundles, Consumer, Watched};
use crate::attest::Entitled;
use crate::core::spiffe::SpiffeId;
use crate::endpoint::Endpoint;

/// A caller is attested again this often while its stream lives, when answers may have changed, and before each
/// certificate.
const AGAIN: Duration = Duration::from_secs(60);
/// And this often as long as that cannot be done.
const SOON: Duration = Duration::from_secs(1);
/// An attestation holds for what is sent at the same time.
const FRESH: Duration = Duration::from_secs(1);

pub(super) struct Caller {
    endpoint: Endpoint,
    shared: Arc<Shared>,
    extensions: Extensions,
    /// None as long as it could not be found out.
    entitled: Option<Vec<Entitled>>,
    attested: Instant,
    changes: watch::Receiver<()>,
    bundles: watch::Receiver<Option<Arc<Bundles>>>,
    svids: BTreeMap<SpiffeId, Watched>,
}

/// What there is for a name.
pub(super) enum There {
    Ready(Arc<Made>),
    /// It is being obtained.
    Waiting,
    /// There is no such trust domain here.
    Absent,
    /// It is somebody else's.
    Forbidden,
}

impl Caller {
    pub(super) async fn new(
        endpoint: &Endpoint,
        shared: &Arc<Shared>,
        extensions: &Extensions,
    ) -> Result<Self, Status> {
        let mut caller = Self {
            changes: endpoint.attestor.changes(),
            bundles: endpoint.agent.held.bundles(),
            endpoint: endpoint.clone(),
            shared: shared.clone(),
            extensions: extensions.clone(),
            entitled: None,
            attested: Instant::now(),
            svids: BTreeMap::new(),
        };
        caller.attest().await?;
        Ok(caller)
    }

    /// Its first identity.
    pub(super) fn id(&self) -> Option<&SpiffeId> {
        self.entitled.as_ref()?.first().map(|entitled| &entitled.id)
    }

    /// It among those of whom it is known which bundles they hold.
    pub(super) fn join(&self) -> Option<Consumer> {
        Some(self.endpoint.agent.holders.join(self.id()?))
    }

    /// Attests it again. As long as that cannot be done, what was found before holds: the process is the same one.
    pub(super) async fn attest(&mut self) -> Result<(), Status> {
        match self.endpoint.entitled(&self.extensions).await {
            Ok(entitled) => self.entitled = Some(entitled),
            Err(status) if status.code() == Code::Unavailable => {}
            Err(status) => return Err(status),
        }
        self.attested = Instant::now();
        Ok(())
    }

    pub(super) fn agent(&self) -> &Arc<Agent> {
        &self.endpoint.agent
    }

    pub(super) fn is_fresh(&self) -> bool {
        self.attested.elapsed() < FRESH
    }

    pub(super) fn is_known(&self) -> bool {
        self.entitled.is_some()
    }

    /// Has obtained what the names need, and nothing else.
    pub(super) fn follow<'a>(&mut self, names: impl Iterator<Item = &'a Name>) {
        let ids: Vec<SpiffeId> = names.filter_map(|name| self.identity(name).cloned()).collect();
        self.svids.retain(|id, _| ids.contains(id));
        for id in ids {
            let held = &self.endpoint.agent.held;
            self.svids.entry(id).or_insert_with_key(|id| held.watch(id));
        }
    }

    pub(super) fn has(&mut self, text: &str, name: &Name) -> There {
        if !self.is_known() {
            return There::Waiting;
        }
        let shelf = &self.shared.shelf;
        if let Name::Default | Name::Workload(_) = name {
            let Some(id) = self.identity(name).cloned() else { return There::Forbidden };
            let held = self.svids.get_mut(&id).and_then(|svid| svid.borrow_and_update().clone());
            return held.map_or(There::Waiting, |svid| There::Ready(shelf.certificate(text, &svid)));
        }
        let Some(bundles) = self.bundles.borrow_and_update().clone() else { return There::Waiting };
        let made = match name {
            Name::Domain(domain) => shelf.bundle(text, domain, &bundles),
            Name::All => shelf.all(text, &bundles),
            _ => shelf.bundle(text, &bundles.own, &bundles),
        };
        made.map_or(There::Absent, There::Ready)
    }

    /// Waits until there may be something else, or it has to be attested again, which it is then.
    pub(super) async fn changed(&mut self) -> Result<(), Status> {
        let again = self.attested + if self.is_known() { AGAIN } else { SOON };
        let why = {
            let mut bundles = pin!(self.bundles.changed());
            let mut changes = pin!(self.changes.changed());
            let mut again = pin!(sleep_until(again));
            let changed = |(id, svid): (&SpiffeId, _)| (id.clone(), Box::pin(Watched::changed(svid)));
            let mut svids: Vec<_> = self.svids.iter_mut().map(changed).collect();
            poll_fn(|context| {
                for (id, svid) in &mut svids {
                    if let Poll::Ready(changed) = svid.as_mut().poll(context) {
                        return Poll::Ready(changed.map_or_else(|_| Why::Ended(id.clone()), |()| Why::Other));
                    }
                }
                if bundles.as_mut().poll(context).is_ready() {
                    return Poll::Ready(Why::Other);
                }
                // Whoever does not tell of changes any more is asked from time to time.
                if matches!(changes.as_mut().poll(context), Poll::Ready(Ok(()))) {
                    return Poll::Ready(Why::Attest);
                }
                again.as_mut().poll(context).map(|()| Why::Attest)
            })
            .await
        };
        match why {
            Why::Other => Ok(()),
            Why::Attest => self.attest().await,
            Why::Ended(id) => {
                self.svids.remove(&id);
                self.attest().await
            }
        }
    }

    /// Whose certificate a name stands for; none if it is not the caller's.
    fn identity(&self, name: &Name) -> Option<&SpiffeId> {
        match name {
            Name::Default => self.id(),
            Name::Workload(id) => self.entitled.iter().flatten().map(|own| &own.id).find(|own| *own == id),
            Name::Roots | Name::Domain(_) | Name::All => None,
        }
    }
}

enum Why {
    /// An identity is not kept any more.
    Ended(SpiffeId),
    Attest,
    Other,
}
