//! Where the authority's key, certificates and roots are kept, and what is remembered of them.

mod brought;
mod keyring;
mod made;
mod own;
mod pin;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;

pub use brought::{BroughtStore, Place};
pub use keyring::FolderKeyring;
pub use made::Made;
pub use own::OwnStore;
pub use pin::fingerprints;

use crate::core::authority_files;
use crate::core::bundle::{self, TrustBundle};
use crate::core::issuer::{self, Issuer};
use crate::core::keyring::Keyring;
use crate::core::spiffe::TrustDomain;
use crate::sys::{dir, files, keys, watch};

/// Where an issuer comes from.
pub trait AuthorityStore: Send {
    /// Reads the issuer, and makes one where that is this store's to do and there never was one. An issuer of other
    /// roots than those known before is refused.
    fn load(&mut self, trust_domain: &TrustDomain) -> impl Future<Output = Result<Issuer, Error>> + Send;

    /// Waits until loading anew may give something else. May be dropped and called again.
    fn changed(&mut self) -> impl Future<Output = ()> + Send;
}

/// What remembers roots beside the data folder, which may be empty at every start.
pub trait Memory: Send {
    /// Compares roots, which come from a place, with those known before, and remembers them where there were none. Waits
    /// for as long as that cannot be asked.
    fn agree<'a>(&'a mut self, brought: &'a TrustBundle, place: &'a Path) -> Agreed<'a>;
}

/// Whether roots may be issued below.
pub type Agreed<'a> = Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>>;

/// Where the keys of JWT-SVIDs are kept, with the number of the bundle that they are published in.
pub trait KeyringStore: Send {
    /// What is kept; none if there is nothing, or nothing that can be used.
    fn read(&mut self) -> impl Future<Output = Result<Option<Keyring>, String>> + Send;

    /// Keeps another in place of what was read last. False if somebody else has done so meanwhile.
    fn write(&mut self, keyring: &Keyring) -> impl Future<Output = Result<bool, String>> + Send;

    /// Whether it is for this process to change what is kept. What is not there may be made by anyone.
    fn leads(&self) -> bool;

    /// What the bundle is numbered from, if that is kept elsewhere and grows whenever somebody begins to lead: then what is
    /// read afterwards has a greater number, or this one. None if the numbers kept here are all there is.
    fn numbered_from(&self) -> impl Future<Output = Result<Option<u64>, String>> + Send;
}

/// Why there is no issuer. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data folder cannot be used.
    #[error(transparent)]
    Dir(#[from] dir::Error),
    /// A file that the user named cannot be read.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The brought folder cannot be watched.
    #[error(transparent)]
    Watch(#[from] watch::Error),
    /// The state is there and cannot be used.
    #[error(
        "the authority in {folder} cannot be used: {fault}; restore that folder from a backup, or, to begin anew with another root, move the whole data folder {data} and the delivered folders away: every identity is then issued again"
    )]
    State {
        /// The authority's folder.
        folder: PathBuf,
        /// The data folder.
        data: PathBuf,
        /// What is wrong with it.
        fault: String,
    },
    /// The state is sound, and this start does not fit it.
    #[error("the authority in {folder}: {fault}")]
    Unfit {
        /// The authority's folder.
        folder: PathBuf,
        /// What does not fit, and what would.
        fault: String,
    },
    /// The brought authority cannot be used.
    #[error("the authority in {folder}: {fault}")]
    Brought {
        /// The folder that was named.
        folder: PathBuf,
        /// What is wrong with it.
        fault: authority_files::Error,
    },
    /// Others may read the key.
    #[error(
        "{path} has the mode {mode:04o}, so others may use the authority's key; make it {wanted:04o} with chmod"
    )]
    Exposed {
        /// Which.
        path: PathBuf,
        /// As found.
        mode: u32,
        /// As it should be.
        wanted: u32,
    },
    /// There was an authority, and it is gone.
    #[error(
        "{folder} is gone, but {evidence} shows that this data folder had an authority; restore {folder} from a backup, or, to begin anew with another root, move the whole data folder {data} and the delivered folders away: every identity is then issued again"
    )]
    Lost {
        /// The data folder.
        data: PathBuf,
        /// The authority's folder.
        folder: PathBuf,
        /// What shows it.
        evidence: PathBuf,
    },
    /// Another root.
    #[error(
        "the root has changed: this data folder has known {known}, and {folder} now brings {brought}; workloads that trust the old root would refuse the new one. Bring a CA below the old root, or give another --data-dir, or, to switch at once, move the whole data folder {data} and the delivered folders away: every identity is then issued again"
    )]
    ChangedRoot {
        /// Fingerprints of the roots known.
        known: String,
        /// Fingerprints of the roots brought.
        brought: String,
        /// Where the new one comes from.
        folder: PathBuf,
        /// The data folder.
        data: PathBuf,
    },
    /// It is kept in a place of which other rooms know.
    #[error(transparent)]
    Elsewhere(Box<dyn std::error::Error + Send + Sync>),
    /// A new root could not be made.
    #[error(transparent)]
    Keys(#[from] keys::Error),
    /// A new root could not be made.
    #[error(transparent)]
    Key(#[from] crate::core::key::Error),
    /// A new root could not be made.
    #[error(transparent)]
    Issuer(#[from] issuer::Error),
    /// Roots that cannot be read.
    #[error("{path}: {fault}")]
    Bundle {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        fault: bundle::Error,
    },
}

impl Error {
    /// Whether the user can mend it by what was typed or brought, as opposed to a fault of the machine.
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::Keys(_) | Self::Key(_) | Self::Issuer(_))
    }
}

/// The longest file that is read from an authority's folder.
pub const MAX_FILE: usize = 1024 * 1024;
/// The authority's folder within the data folder.
pub const FOLDER: &str = "authority";
/// The roots, within the data folder and within the authority's.
pub const ROOTS: &str = authority_files::ROOT_CERT;
