//! Which identities the process at the other end of the agent's socket may have.

mod own_user;
mod pods;
mod workloads_file;

pub use own_user::OwnUser;
pub use pods::{OfPods, Pod, Pods};
pub use workloads_file::WorkloadsFile;

use tokio::sync::watch;

use crate::core::spiffe::SpiffeId;
use crate::sys::peer::Process;

/// Says whom a process is.
#[tonic::async_trait]
pub trait Attestor: Send + Sync + 'static {
    /// The identities that a living process is entitled to, its default first; never none.
    async fn attest(&self, caller: &Process) -> Result<Vec<Entitled>, Refused>;

    /// Tells when an answer may have become another one, for streams, which then ask again.
    fn changes(&self) -> watch::Receiver<()>;
}

/// An identity that a process may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entitled {
    /// Which.
    pub id: SpiffeId,
    /// How the workload is to use it, where it has several (SPIFFE Workload API 5.2.1).
    pub hint: Option<String>,
}

/// Why a process is told nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It has no identity here; why, for the log.
    #[error("{0}")]
    Unknown(String),
    /// Whether it has one cannot be found out now; why, for the log.
    #[error("{0}")]
    Unavailable(String),
}
