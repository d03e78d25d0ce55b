//! An authority that the user brings: a folder of Istio's plug-in files, or of a TLS secret, read again when it changes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use zeroize::Zeroizing;

use crate::core::authority_files;
use crate::core::bundle::TrustBundle;
use crate::core::issuer::Issuer;
use crate::core::spiffe::TrustDomain;
use crate::sys::dir::{Access, Dir};
use crate::sys::files;
use crate::sys::watch::Watcher;

use super::{AuthorityStore, Error, FOLDER, MAX_FILE, ROOTS, pin};

/// Files of a set are copied one after the other; this long after the last change they are read,
const SETTLE: Duration = Duration::from_millis(300);
/// but no later than this after the first.
const PATIENCE: Duration = Duration::from_secs(2);
/// What no event tells of, such as a folder behind a link that now leads elsewhere, is looked for this often.
const LOOK: Duration = Duration::from_secs(3);

type Files = BTreeMap<String, Zeroizing<Vec<u8>>>;

/// An authority in a folder of the user's.
pub struct BroughtStore {
    data: Dir,
    folder: PathBuf,
    passphrase: Option<Zeroizing<Vec<u8>>>,
    watcher: Option<Watcher<()>>,
    /// As last read; the error in words.
    files: Option<Result<Files, String>>,
    /// What this process has issued below, whatever becomes of the data folder.
    known: Option<TrustBundle>,
}

impl BroughtStore {
    /// Takes the data folder, whose lock the caller holds and in which the root is remembered, and the user's folder.
    pub fn new(data: Dir, folder: PathBuf, passphrase: Option<Zeroizing<Vec<u8>>>) -> Self {
        Self { data, folder, passphrase, watcher: None, files: None, known: None }
    }

    fn read(&self) -> Result<Files, files::Error> {
        files::read_named(&self.folder, &authority_files::NAMES, MAX_FILE as u64)
    }

    fn check_root(&self, known: &TrustBundle, issuer: &Issuer) -> Result<(), Error> {
        if known.same_roots(issuer.bundle()) {
            return Ok(());
        }
        Err(Error::ChangedRoot {
            known: pin::fingerprints(known),
            brought: pin::fingerprints(issuer.bundle()),
            folder: self.folder.clone(),
            data: self.data.path().to_owned(),
        })
    }

    fn watch(&self) -> Option<Watcher<()>> {
        let mut watcher = Watcher::new().ok()?;
        watcher.watch(&self.folder, ()).ok()?;
        Some(watcher)
    }
}

impl AuthorityStore for BroughtStore {
    async fn load(&mut self, trust_domain: &TrustDomain) -> Result<Issuer, Error> {
        // Before the files are read, so that a change in between is seen.
        self.watcher = self.watch();
        let files = self.read();
        self.files = Some(files.as_ref().map(Clone::clone).map_err(ToString::to_string));
        let files = files?;
        let passphrase = self.passphrase.as_ref().map(|p| p.as_slice());
        let issuer = authority_files::issuer(&files, passphrase, trust_domain)
            .map_err(|fault| Error::Brought { folder: self.folder.clone(), fault })?;
        if let Some(known) = &self.known {
            self.check_root(known, &issuer)?;
        }
        match pin::folder(&self.data)? {
            Some(memory) => self.check_root(&pin::known(&self.data, &memory)?, &issuer)?,
            None => {
                let pem = issuer.bundle().pem().clone();
                self.data.replace_dir(FOLDER, Access::mode(0o700), |folder| {
                    folder.write_new_synced(ROOTS, pem.as_bytes(), Access::mode(0o644))?;
                    Ok::<_, Error>(())
                })?;
            }
        }
        pin::publish(&self.data, issuer.bundle())?;
        self.known = Some(TrustBundle::clone(issuer.bundle()));
        Ok(issuer)
    }

    async fn changed(&mut self) {
        loop {
            match &mut self.watcher {
                Some(watcher) => {
                    if timeout(LOOK, watcher.next()).await.is_ok() {
                        let quiet = async { while timeout(SETTLE, watcher.next()).await.is_ok() {} };
                        // An error means that it never was.
                        let _ = timeout(PATIENCE, quiet).await;
                    }
                }
                None => sleep(LOOK).await,
            }
            if self.files != Some(self.read().map_err(|fault| fault.to_string())) {
                return;
            }
        }
    }
}
