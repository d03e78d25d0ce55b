//! An authority that the user brings: a folder of Istio's plug-in files, or of a TLS secret, or such files wherever they
//! are; read again when they change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
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

use super::{AuthorityStore, Error, FOLDER, MAX_FILE, Memory, ROOTS, pin};

/// Files of a set are copied one after the other; this long after the last change they are read,
const SETTLE: Duration = Duration::from_millis(300);
/// but no later than this after the first.
const PATIENCE: Duration = Duration::from_secs(2);
/// What no event tells of, such as a folder behind a link that now leads elsewhere, is looked for this often.
const LOOK: Duration = Duration::from_secs(3);

type Files = BTreeMap<String, Zeroizing<Vec<u8>>>;

/// Where the user has an authority.
#[derive(Clone, Debug)]
pub enum Place {
    /// In a folder, whose names say what they are.
    Folder(PathBuf),
    /// In files of any names, each with the one that it has in a folder.
    Files(Vec<(&'static str, PathBuf)>),
}

/// An authority that is the user's.
pub struct BroughtStore {
    data: Dir,
    place: Place,
    passphrase: Option<Zeroizing<Vec<u8>>>,
    memory: Option<Box<dyn Memory>>,
    watcher: Option<Watcher<()>>,
    /// As last read; the error in words.
    files: Option<Result<Files, String>>,
    /// What this process has issued below, whatever becomes of the data folder.
    known: Option<TrustBundle>,
}

impl BroughtStore {
    /// Takes the data folder, whose lock the caller holds and in which the root is remembered, and the user's place.
    pub fn new(data: Dir, place: Place, passphrase: Option<Zeroizing<Vec<u8>>>) -> Self {
        Self { data, place, passphrase, memory: None, watcher: None, files: None, known: None }
    }

    /// With another who remembers the root.
    pub fn remembered_by(self, memory: Box<dyn Memory>) -> Self {
        Self { memory: Some(memory), ..self }
    }

    fn check_root(&self, known: &TrustBundle, issuer: &Issuer) -> Result<(), Error> {
        if known.same_roots(issuer.bundle()) {
            return Ok(());
        }
        Err(Error::ChangedRoot {
            known: pin::fingerprints(known),
            brought: pin::fingerprints(issuer.bundle()),
            folder: self.place.path(),
            data: self.data.path().to_owned(),
        })
    }

    fn watch(&self) -> Option<Watcher<()>> {
        let mut watcher = Watcher::new().ok()?;
        for folder in self.place.folders() {
            watcher.watch(folder, ()).ok()?;
        }
        Some(watcher)
    }
}

impl AuthorityStore for BroughtStore {
    async fn load(&mut self, trust_domain: &TrustDomain) -> Result<Issuer, Error> {
        // Before the files are read, so that a change in between is seen.
        self.watcher = self.watch();
        let files = self.place.read();
        self.files = Some(files.as_ref().map(Clone::clone).map_err(ToString::to_string));
        let files = files?;
        let passphrase = self.passphrase.as_ref().map(|p| p.as_slice());
        let issuer = authority_files::issuer(&files, passphrase, trust_domain)
            .map_err(|fault| Error::Brought { folder: self.place.path(), fault })?;
        if let Some(known) = &self.known {
            self.check_root(known, &issuer)?;
        }
        let folder = pin::folder(&self.data)?;
        if let Some(folder) = &folder {
            self.check_root(&pin::known(&self.data, folder)?, &issuer)?;
        }
        pin::check_published(&self.data, issuer.bundle())?;
        // Before this folder remembers what others refuse. Below these roots this process may already issue.
        if let Some(memory) = self.memory.as_mut().filter(|_| self.known.is_none()) {
            memory.agree(issuer.bundle(), &self.place.path()).await?;
        }
        if folder.is_none() {
            let pem = issuer.bundle().pem().clone();
            self.data.replace_dir(FOLDER, Access::mode(0o700), |folder| {
                folder.write_new_synced(ROOTS, pem.as_bytes(), Access::mode(0o644))?;
                Ok::<_, Error>(())
            })?;
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
            if self.files != Some(self.place.read().map_err(|fault| fault.to_string())) {
                return;
            }
        }
    }
}

impl Place {
    fn read(&self) -> Result<Files, files::Error> {
        let files = match self {
            Self::Folder(folder) => {
                return files::read_named(folder, &authority_files::NAMES, MAX_FILE as u64);
            }
            Self::Files(files) => files,
        };
        let mut read = Files::new();
        for folder in self.folders() {
            // Those of one folder together, so that they are of one set where it is swapped as a whole.
            let here: Vec<_> = files.iter().filter(|(_, path)| folder_of(path) == folder).collect();
            let names: Vec<_> =
                here.iter().filter_map(|(_, path)| path.file_name().and_then(|name| name.to_str())).collect();
            let found = files::read_named(folder, &names, MAX_FILE as u64)?;
            for (name, path) in here {
                let file = path.file_name().and_then(|file| file.to_str()).unwrap_or_default();
                let bytes = found.get(file).cloned().ok_or_else(|| files::Error::Io {
                    path: path.clone(),
                    source: std::io::ErrorKind::NotFound.into(),
                })?;
                read.insert((*name).to_owned(), bytes);
            }
        }
        // The root's own CA has none above it.
        read.entry(authority_files::CERT_CHAIN.to_owned()).or_default();
        Ok(read)
    }

    fn folders(&self) -> Vec<&Path> {
        match self {
            Self::Folder(folder) => vec![folder],
            Self::Files(files) => {
                let mut folders: Vec<_> = files.iter().map(|(_, path)| folder_of(path)).collect();
                folders.sort_unstable();
                folders.dedup();
                folders
            }
        }
    }

    /// How errors name it.
    fn path(&self) -> PathBuf {
        match self {
            Self::Folder(folder) => folder.clone(),
            Self::Files(files) => {
                let named: Vec<_> =
                    files.iter().map(|(name, path)| format!("{} (as {name})", path.display())).collect();
                named.join(", ").into()
            }
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
