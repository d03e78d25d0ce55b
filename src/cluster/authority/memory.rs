//! The cluster as the memory of roots that are brought in files.

use std::path::Path;
use std::sync::Arc;

use super::home::Home;
use super::{AuthorityError, Failure, MARKER, Tries};
use crate::cluster::Cluster;
use crate::cluster::events::{EventReason, Events, Severity};
use crate::core::bundle::TrustBundle;
use crate::store::{Agreed, Memory, fingerprints};

/// The ConfigMap `mica-authority`.
pub struct ClusterMemory {
    home: Home,
    tellings: Arc<Events>,
}

impl ClusterMemory {
    /// That of Mica's own namespace.
    pub fn new(cluster: &Cluster, tellings: Arc<Events>) -> Self {
        Self { home: Home::new(cluster), tellings }
    }

    async fn attempt(&self, brought: &TrustBundle, place: &Path) -> Result<(), Failure> {
        let Some(marker) = self.home.get("configmaps", MARKER).await? else {
            return self.home.mark(brought).await;
        };
        let known = self.home.roots_of(&marker)?;
        if known.same_roots(brought) {
            return Ok(());
        }
        Err(AuthorityError::ChangedRoot {
            witness: self.home.marker(),
            known: fingerprints(&known),
            place: place.display().to_string(),
            brought: fingerprints(brought),
        }
        .into())
    }
}

impl Memory for ClusterMemory {
    fn agree<'a>(&'a mut self, brought: &'a TrustBundle, place: &'a Path) -> Agreed<'a> {
        Box::pin(async move {
            let mut tries = Tries::default();
            loop {
                match self.attempt(brought, place).await {
                    Ok(()) => return Ok(()),
                    Err(Failure::Later(fault)) => tries.after(&fault).await,
                    Err(Failure::Final(error)) => {
                        let marker = self.home.reference("ConfigMap", MARKER);
                        let reason = EventReason::AuthorityUnusable;
                        self.tellings.tell(&marker, Severity::Warning, reason, error.to_string());
                        self.tellings.flush().await;
                        return Err(error);
                    }
                }
            }
        })
    }
}
