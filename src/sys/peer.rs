//! The process at the other end of a Unix socket.

use std::sync::Arc;

use rustix::fd::OwnedFd;

/// A process as the kernel knew it when it connected. Its number is its own only as long as it lives, which its handle
/// tells.
#[derive(Clone, Debug)]
pub struct Process {
    /// In the agent's PID namespace.
    pub pid: u32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// A pidfd.
    pub handle: Arc<OwnedFd>,
}
