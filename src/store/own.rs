//! The authority that Mica makes for itself: a folder that appears whole by one rename, and is never made twice.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::core::authority_files::{self, CA_CERT, CA_KEY, CERT_CHAIN};
use crate::core::bundle::TrustBundle;
use crate::core::certificate::Certificate;
use crate::core::issuer::{self, Issuer};
use crate::core::key::KeyKind;
use crate::core::lifetime::Lifetime;
use crate::core::profile::{Organization, Profile};
use crate::core::spiffe::TrustDomain;
use crate::sys::dir::{Access, Dir};
use crate::sys::{clock, keys};

use super::{AuthorityStore, Error, FOLDER, MAX_FILE, ROOTS, pin};

/// Ten years, as Istio's self-signed root since 1.1.8.
const LIFETIME: Lifetime = Lifetime::from_secs(10 * 365 * 86_400);

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
        let key = keys::generate(KeyKind::P256)?;
        let signing = key.signing()?;
        let organization: Organization =
            trust_domain.as_str().parse().unwrap_or_else(|_| Organization::default());
        let profile = Profile::Root { organization: &organization, trust_domain };
        let root = issuer::root(&signing, &profile, LIFETIME, clock::now(), keys::serial_number()?)?;
        let root = Certificate::from_der(root.der()).map_err(issuer::Error::from)?;
        let bundle = TrustBundle::new([root.clone()])
            .map_err(|fault| Error::Bundle { path: self.data.path().join(ROOTS), fault })?;
        let issuer = Issuer::new(Arc::new(signing), std::slice::from_ref(&root), bundle, trust_domain)?;
        let pem = root.to_pem();
        self.data.replace_dir(FOLDER, Access::mode(0o700), |folder| {
            for (name, text) in [(CA_CERT, pem.as_str()), (CERT_CHAIN, &pem), (ROOTS, &pem)] {
                folder.write_new_synced(name, text.as_bytes(), Access::mode(0o644))?;
            }
            let pem = key.to_pem();
            folder.write_new_synced(CA_KEY, pem.as_bytes(), Access::mode(0o600))?;
            Ok::<_, Error>(())
        })?;
        Ok(issuer)
    }
}

impl AuthorityStore for OwnStore {
    fn load(&mut self, trust_domain: &TrustDomain) -> Result<Issuer, Error> {
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
