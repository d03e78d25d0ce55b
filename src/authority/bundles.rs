//! What those hear who follow the bundles.

use std::collections::BTreeMap;
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
    /// What was issued before should be renewed soon.
    pub renew_issued_before: Option<OffsetDateTime>,
}

impl Authority {
    /// The bundles, as they change.
    pub fn bundles(&self) -> Receiver<Arc<Bundles>> {
        self.bundles.subscribe()
    }

    /// Takes the bundle of another trust domain in place of the one before, or takes it away.
    pub fn federate(&self, trust_domain: &TrustDomain, bundle: Option<Arc<Published>>) {
        self.bundles.send_if_modified(|bundles| {
            if bundles.federated.get(trust_domain) == bundle.as_ref() {
                return false;
            }
            let mut changed = Bundles::clone(bundles);
            match bundle {
                Some(bundle) => changed.federated.insert(trust_domain.clone(), bundle),
                None => changed.federated.remove(trust_domain),
            };
            *bundles = Arc::new(changed);
            true
        });
    }
}
