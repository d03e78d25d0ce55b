//! What those hear who follow the bundles.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use time::OffsetDateTime;
use tokio::sync::watch::Receiver;

use super::Authority;
use crate::core::published::Published;
use crate::core::spiffe::TrustDomain;

/// All bundles, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Bundles {
    /// The authority's own; none until it has a number.
    pub own: Option<Arc<Published>>,
    /// Those of other trust domains.
    pub federated: BTreeMap<TrustDomain, Arc<Published>>,
    /// Trust domains whose bundle is wanted, and not known yet.
    pub awaited: BTreeSet<TrustDomain>,
    /// What was issued before should be renewed soon.
    pub renew_issued_before: Option<OffsetDateTime>,
}

impl Authority {
    /// The bundles, as they change.
    pub fn bundles(&self) -> Receiver<Arc<Bundles>> {
        self.bundles.subscribe()
    }

    /// Takes the bundle of another trust domain in place of the one before. None is one that is not known yet.
    pub fn federate(&self, trust_domain: &TrustDomain, bundle: Option<Arc<Published>>) {
        self.change(trust_domain, bundle.is_none(), bundle);
    }

    /// Takes the bundle of another trust domain away.
    pub fn give_up(&self, trust_domain: &TrustDomain) {
        self.change(trust_domain, false, None);
    }

    fn change(&self, trust_domain: &TrustDomain, awaited: bool, bundle: Option<Arc<Published>>) {
        self.bundles.send_if_modified(|bundles| {
            let is_awaited = bundles.awaited.contains(trust_domain);
            if bundles.federated.get(trust_domain) == bundle.as_ref() && is_awaited == awaited {
                return false;
            }
            let mut changed = Bundles::clone(bundles);
            changed.federated.remove(trust_domain);
            changed.awaited.remove(trust_domain);
            match bundle {
                Some(bundle) => drop(changed.federated.insert(trust_domain.clone(), bundle)),
                None if awaited => drop(changed.awaited.insert(trust_domain.clone())),
                None => {}
            }
            *bundles = Arc::new(changed);
            true
        });
    }
}
