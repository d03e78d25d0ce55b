//! Who should have an identity.

use crate::core::spiffe::ServiceAccount;

pub mod folder;
pub mod manifests;
mod tally;
mod yaml;

/// Something that knows who should have an identity, and hears of it when that changes.
pub trait Source: Send {
    /// Waits for the next change. The first one tells everything there is, even if that is nothing. Cancel safe.
    fn next(&mut self) -> impl Future<Output = Change> + Send;
}

/// What is different since the last time, so that one changed file is work for its accounts alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Accounts that were not there.
    pub added: Vec<ServiceAccount>,
    /// Accounts that were there.
    pub removed: Vec<ServiceAccount>,
    /// False while a part of the source has never been readable since the start: accounts that were delivered by an
    /// earlier run but are named nowhere may belong to that part, so they are to be left alone.
    pub settled: bool,
}
