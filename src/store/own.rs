//! The authority that Mica makes for itself: a folder that appears whole by one rename, and is never made twice.

use std::collections::BTreeMap;

use crate::core::authority_files::{self, CA_CERT, CA_KEY, CERT_CHAIN};
use crate::core::issuer::{self, Issuer};
use crate::core::spiffe::TrustDomain;
use crate::sys::dir::{Access, Dir};

use super::{AuthorityStore, Error, FOLDER, MAX_FILE, Made, ROOTS, pin};

/// An authority in the data folder.
pub struct OwnStore {
    data: Dir,
}

impl OwnStore {
    /// Takes the data folder, whose lock the caller holds.
    pub fn new(data: Dir) -> Self {
        Self { data }
    }

    fn read(&self, folder: &Dir, trust_domain: &TrustDomain) -> Result<Issuer, Error> {
        let mode = folder.stat_self()?.mode();
        if mode & 0o077 != 0 {
            return Err(Error::Exposed { path: folder.path().to_owned(), mode, wanted: 0o700 });
        }
        let mut files = BTreeMap::new();
        for name in [CA_CERT, CA_KEY, CERT_CHAIN, ROOTS] {
            match folder.read(name, MAX_FILE) {
                Ok((bytes, facts)) => {
                    if name == CA_KEY && facts.mode() & 0o077 != 0 {
                        let path = folder.path().join(name);
                        return Err(Error::Exposed { path, mode: facts.mode(), wanted: 0o600 });
                    }
                    files.insert(name.to_owned(), bytes.into());
                }
                Err(e) if e.is_absent() => {}
                Err(e) => return Err(e.into()),
            }
        }
        let unfit = |fault: String| Error::Unfit { folder: folder.path().to_owned(), fault };
        if files.len() == 1 && files.contains_key(ROOTS) {
            return Err(unfit(
                "it remembers the root of an authority that was brought; give --authority again".to_owned(),
            ));
        }
        authority_files::issuer(&files, None, trust_domain).map_err(|e| match &e {
            authority_files::Error::Issuer { fault, .. }
                if matches!(**fault, issuer::Error::TrustDomain { .. }) =>
            {
                unfit(e.to_string())
            }
            _ => pin::state(&self.data, e),
        })
    }

    fn make(&self, trust_domain: &TrustDomain) -> Result<Issuer, Error> {
        let Made { issuer, key, root_pem } = Made::new(trust_domain)?;
        self.data.replace_dir(FOLDER, Access::mode(0o700), |folder| {
            for name in [CA_CERT, CERT_CHAIN, ROOTS] {
                folder.write_new_synced(name, root_pem.as_bytes(), Access::mode(0o644))?;
            }
            folder.write_new_synced(CA_KEY, key.to_pem().as_bytes(), Access::mode(0o600))?;
            Ok::<_, Error>(())
        })?;
        Ok(issuer)
    }
}

impl AuthorityStore for OwnStore {
    async fn load(&mut self, trust_domain: &TrustDomain) -> Result<Issuer, Error> {
        let issuer = match pin::folder(&self.data)? {
            Some(folder) => self.read(&folder, trust_domain)?,
            None => self.make(trust_domain)?,
        };
        pin::publish(&self.data, issuer.bundle())?;
        Ok(issuer)
    }

    /// Nobody else writes here.
    async fn changed(&mut self) {
        std::future::pending().await
    }
}
