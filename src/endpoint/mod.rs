//! The Workload Endpoint: what the agent serves on its Unix socket (SPIFFE_Workload_Endpoint.md), to processes that it
//! knows by their peer credentials.

pub mod sds;

use std::sync::Arc;

use tonic::{Extensions, Status};

use crate::agent::Agent;
use crate::attest::{Attestor, Entitled, Refused};
use crate::sys::peer::Process;

/// What all services of the socket share.
#[derive(Clone)]
pub struct Endpoint {
    /// What is held.
    pub agent: Arc<Agent>,
    /// Who may have it.
    pub attestor: Arc<dyn Attestor>,
}

impl Endpoint {
    /// Whom the caller of a request is. Asked for each request and again while a stream lives.
    pub async fn entitled(&self, extensions: &Extensions) -> Result<Vec<Entitled>, Status> {
        let caller = extensions
            .get::<Process>()
            .ok_or_else(|| Status::internal("the connection does not say who is at its other end"))?;
        self.attestor.attest(caller).await.map_err(|refused| {
            tracing::warn!(pid = caller.pid, uid = caller.uid, why = %refused, "caller refused");
            match refused {
                // Whoever has no identity learns no more than that.
                Refused::Unknown(_) => Status::permission_denied("no identity issued"),
                Refused::Unavailable(_) => {
                    Status::unavailable("the caller cannot be attested now; try again")
                }
            }
        })
    }
}
