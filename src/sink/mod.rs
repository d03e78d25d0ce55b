//! Where certificates are put. A sink knows which places it made itself, and touches no others.

pub mod folder;

use std::future::Future;
use std::path::PathBuf;

use time::OffsetDateTime;

use crate::core::plan::CertificateSet;
use crate::core::spiffe::ServiceAccount;
use crate::sys::dir;

/// A place for certificates.
pub trait Sink: Send + Sync + 'static {
    /// So many pieces of work may be under way at once. One blocks its thread.
    const AT_ONCE: usize = 1;
    /// So many accounts are one piece of work, announced together.
    const TOGETHER: usize = 1_024;
    /// Whether all that is there is told of without being asked, so that what was not told of is not there.
    const TELLS: bool = false;

    /// What this sink has recorded as delivered by itself.
    fn recorded(&self) -> Vec<ServiceAccount>;

    /// Says which accounts are about to be published, so that they can be recorded together, which is much cheaper
    /// than one by one. Publishing what was not announced works just as well.
    fn announce(&self, accounts: &[ServiceAccount]) -> impl Future<Output = Result<(), Error>> + Send {
        let _ = accounts;
        std::future::ready(Ok(()))
    }

    /// What is there for an account.
    fn read(&self, account: &ServiceAccount) -> impl Future<Output = Result<Found, Error>> + Send;

    /// Puts a set in the place of what is there: readers see the old one or the new one, whole. Cures everything that
    /// [`Sink::read`] tells of, but what is foreign.
    fn publish(
        &self,
        account: &ServiceAccount,
        set: &CertificateSet,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// The same where there is nothing yet, as far as is known.
    fn create(
        &self,
        account: &ServiceAccount,
        set: &CertificateSet,
    ) -> impl Future<Output = Result<(), Error>> + Send {
        self.publish(account, set)
    }

    /// Marks what is there as this sink's own, and changes nothing else.
    fn mark(&self, account: &ServiceAccount) -> impl Future<Output = Result<(), Error>> + Send {
        let _ = account;
        std::future::ready(Ok(()))
    }

    /// Takes away what this sink delivered for an account, and nothing else.
    fn remove(&self, account: &ServiceAccount) -> impl Future<Output = Result<(), Error>> + Send;

    /// Waits until something was changed by others, and tells for which accounts; to be read next. Cancel safe.
    fn disturbed(&self) -> impl Future<Output = Vec<ServiceAccount>> + Send {
        std::future::pending()
    }
}

/// What a sink found for an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Absent,
    /// Something that this sink did not make, and why it is held for that. It is left alone.
    Foreign(String),
    /// Ours, but not a whole readable set: what is wrong with it.
    Damaged(String),
    /// Ours, of an account that lives and is not to be served any more: it is left until its leaf expires, then.
    Released(OffsetDateTime),
    /// A whole set.
    Set(FoundSet),
}

/// A whole set, as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundSet {
    /// What it says.
    pub set: CertificateSet,
    /// A mode, owner or group that is not the configured one, in words. Publishing the same set again cures it.
    pub loose: Option<String>,
    /// Whether it has the marks of this sink's own.
    pub marked: bool,
}

/// Why something could not be delivered, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system said no.
    #[error(transparent)]
    Dir(#[from] dir::Error),
    /// Not ours to change.
    #[error("{account} is not delivered: {why}; move that away, and mica delivers at once")]
    Foreign {
        /// For whom.
        account: ServiceAccount,
        /// What stands in the way.
        why: String,
    },
    /// What was to be changed is not what it was a moment ago.
    #[error("it was changed by others meanwhile")]
    Changed,
    /// Nothing can be written there any more, and what is there goes by itself.
    #[error("its namespace is being deleted")]
    Ending,
    /// The API server did not do it.
    #[error("{doing} failed: {fault}")]
    Api {
        /// What was asked of it.
        doing: &'static str,
        /// What came of it.
        fault: String,
    },
    /// A folder with foreign contents has the name of one of our files.
    #[error("{} is a folder with something in it, where mica puts a link; move it away", path.display())]
    Obstructed {
        /// The folder.
        path: PathBuf,
    },
    /// A file system knows no such long names.
    #[error(
        "{account} cannot be delivered: the folder name istio.{} has {} bytes and a file system takes 255; shorten the account's name",
        account.name(), account.name().len() + 6
    )]
    LongName {
        /// For whom.
        account: ServiceAccount,
    },
    /// Keys that everyone may change or nobody may read.
    #[error(
        "files cannot be delivered with mode {0:04o}; give one of 0400 to 0644 that lets the owner read, and others never write"
    )]
    Mode(u32),
    /// What would be delivered now would be nobody's after a restart.
    #[error("nothing is delivered while the data folder {} is gone, with the record of what is delivered", .0.display())]
    NoRecord(PathBuf),
    /// The record of our folders is not as we write it.
    #[error(
        "line {line} of {} is {text:?}, which mica did not write, so it cannot know which folders are its own; take that line out, or remove the file and all folders that mica delivered", path.display()
    )]
    Record {
        /// The record.
        path: PathBuf,
        /// Counted from one.
        line: usize,
        /// What is there, shortened.
        text: String,
    },
}
