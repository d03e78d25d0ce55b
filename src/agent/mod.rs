//! The agent: keeps the certificates of workloads fresh, beside them or once per node.

mod ask;
pub mod files;
pub mod held;
pub mod holders;
mod keep;
mod metrics;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};

pub use ask::{Asker, Authority, Credentials, Error, Wish};
pub use held::{Authorities, Bundles, Held, Svid, Watched};
pub use holders::{Consumer, Holders};
pub use keep::keep;

use crate::core::spiffe::SpiffeId;
use crate::proto::mica::v1::CreateJwtSvidResponse;
use crate::trace::{Span, Tracer};
use metrics::Metrics;

/// Which identities are to be had, and with what.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// The one that the agent's own credentials are for, and what is known of it; none if it is not wanted itself.
    pub own: Option<Option<SpiffeId>>,
    /// What the agent itself shows. Whoever is not named here is asked for with it, by impersonation.
    pub credentials: Credentials,
    /// Identities with credentials of their own.
    pub others: BTreeMap<SpiffeId, Credentials>,
}

/// What the parts of a running agent share.
pub struct Agent {
    /// What it holds.
    pub held: Held,
    /// Which bundles its consumers hold.
    pub holders: Arc<Holders>,
    /// Of what it does.
    pub tracer: Tracer,
    asker: Asker,
    wishes: Wishes,
    own: watch::Sender<Option<SpiffeId>>,
    metrics: Metrics,
    /// The authority tells of its bundles as they change, so that what is held of them is what peers hold.
    bundles_live: AtomicBool,
}

impl Agent {
    /// Holds nothing yet. What is wanted comes out of the channel, which [`keep()`] empties.
    pub fn new(asker: Asker, wishes: Wishes) -> (Self, mpsc::UnboundedReceiver<SpiffeId>) {
        let (held, wanted) = Held::new();
        let own = watch::Sender::new(wishes.own.clone().flatten());
        let agent = Self {
            held,
            holders: Arc::default(),
            tracer: Tracer::default(),
            asker,
            wishes,
            own,
            metrics: Metrics::default(),
            bundles_live: AtomicBool::new(false),
        };
        (agent, wanted)
    }

    /// The agent's own identity: none until it is known, which may take its first certificate.
    pub fn own(&self) -> watch::Receiver<Option<SpiffeId>> {
        self.own.subscribe()
    }

    /// Has the authority sign a JWT-SVID for an identity that the caller is entitled to.
    pub async fn jwt(&self, id: &SpiffeId, audience: &[String]) -> Result<CreateJwtSvidResponse, Error> {
        // Whose the agent's own credentials are decides whether it asks for itself or for another.
        if self.wishes.own.is_some() && !self.wishes.others.contains_key(id) {
            let _ = self.own().wait_for(Option::is_some).await;
        }
        let held = self.held.current(id).flatten();
        let mut span = self.tracer.begin("token");
        span.set("mica.identity", id);
        let answer = self.asker.jwt(&self.wish(id), held.as_deref(), audience, &span).await;
        if let Err(error) = &answer {
            span.fail(error.reason());
        }
        answer
    }

    /// A span for handing a certificate over: a part of what it was obtained in if it was waited for, else a trace of its
    /// own.
    pub fn delivery(&self, svid: &Svid, was_awaited: bool) -> Span {
        if !self.tracer.is_on() {
            return Span::default();
        }
        let mut span = self.tracer.follow(svid.trace.filter(|_| was_awaited), "deliver");
        span.set("mica.identity", &svid.id);
        span.set("mica.serial", svid.chain[0].serial_text());
        span
    }

    /// Says whom the agent turned out to be, which what it holds from before tells.
    pub fn is(&self, id: &SpiffeId) {
        self.own.send_replace(Some(id.clone()));
    }

    /// Adds the agent's metrics.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        self.metrics.register(registry, self);
    }

    /// How an identity is asked for.
    fn wish(&self, id: &SpiffeId) -> Wish {
        let (impersonated, credentials) = match self.wishes.others.get(id) {
            Some(credentials) => (false, credentials),
            None => (
                self.wishes.own.is_none() || self.own.borrow().as_ref() != Some(id),
                &self.wishes.credentials,
            ),
        };
        Wish { id: Some(id.clone()), impersonated, credentials: credentials.clone() }
    }

    /// How the agent itself is asked for, whoever it is.
    fn own_wish(&self) -> Wish {
        Wish {
            id: self.own.borrow().clone(),
            impersonated: false,
            credentials: self.wishes.credentials.clone(),
        }
    }
}
