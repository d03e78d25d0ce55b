//! Who should have an identity.

pub mod manifests;
mod yaml;

use std::future::Future;

use crate::core::spiffe::ServiceAccount;

/// What changed in a source. Deltas, so that one changed file is work for its accounts alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Accounts that should have an identity from now on.
    pub added: Vec<ServiceAccount>,
    /// Accounts that should no longer have one.
    pub removed: Vec<ServiceAccount>,
    /// False while a part of the source has never been readable since the start: accounts that were delivered and are
    /// named nowhere may belong to that part, so nothing is removed on its account.
    pub settled: bool,
}

/// Says who should have an identity.
pub trait Source: Send {
    /// Waits for the next change; the first is everything there is. Cancel safe.
    fn next(&mut self) -> impl Future<Output = Change> + Send;
}
