//! An authority that the user brings: a folder of Istio's plug-in files, or of a TLS secret, read again when it changes.

use std::path::PathBuf;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::core::authority_files;
use crate::core::issuer::Issuer;
use crate::core::spiffe::TrustDomain;
use crate::sys::dir::{Access, Dir};
use crate::sys::files;
use crate::sys::watch::Watcher;

use super::{AuthorityStore, Error, FOLDER, MAX_FILE, ROOTS, pin};

/// Files of a set are copied one after the other; this long after the last change they are read.
const SETTLE: Duration = Duration::from_millis(300);
/// A folder that is away, or that cannot be watched, is looked at this often.
const LOOK: Duration = Duration::from_secs(5);

/// An authority in a folder of the user's.
pub struct BroughtStore {
    data: Dir,
    folder: PathBuf,
    passphrase: Option<Zeroizing<Vec<u8>>>,
    watcher: Option<Watcher<()>>,
}

impl BroughtStore {
    /// Takes the data folder, whose lock the caller holds and in which the root is remembered, and the user's folder.
    pub fn new(data: Dir, folder: PathBuf, passphrase: Option<Zeroizing<Vec<u8>>>) -> Self {
        Self { data, folder, passphrase, watcher: None }
    }

    fn watch(&self) -> Option<Watcher<()>> {
        let mut watcher = Watcher::new().ok()?;
        watcher.watch(&self.folder, ()).ok()?;
        Some(watcher)
    }
}

impl AuthorityStore for BroughtStore {
    fn load(&mut self, trust_domain: &TrustDomain) -> Result<Issuer, Error> {
        // Before the files are read, so that a change in between is seen.
        self.watcher = self.watch();
        let files = files::read_named(&self.folder, &authority_files::NAMES, MAX_FILE as u64)?;
        let passphrase = self.passphrase.as_ref().map(|p| p.as_slice());
        let issuer = authority_files::issuer(&files, passphrase, trust_domain)
            .map_err(|fault| Error::Brought { folder: self.folder.clone(), fault })?;
        match pin::folder(&self.data)? {
            Some(memory) => {
                let known = pin::known(&self.data, &memory)?;
                if !known.same_roots(issuer.bundle()) {
                    return Err(Error::ChangedRoot {
                        known: pin::fingerprints(&known),
                        brought: pin::fingerprints(issuer.bundle()),
                        folder: self.folder.clone(),
                        data: self.data.path().to_owned(),
                    });
                }
            }
            None => {
                let pem = issuer.bundle().pem().clone();
                self.data.replace_dir(FOLDER, Access::mode(0o700), |folder| {
                    folder.write_new_synced(ROOTS, pem.as_bytes(), Access::mode(0o644))?;
                    Ok::<_, Error>(())
                })?;
            }
        }
        pin::publish(&self.data, issuer.bundle())?;
        Ok(issuer)
    }

    async fn changed(&mut self) {
        match &mut self.watcher {
            Some(watcher) => {
                watcher.next().await;
                while tokio::time::timeout(SETTLE, watcher.next()).await.is_ok() {}
            }
            None => tokio::time::sleep(LOOK).await,
        }
    }
}
