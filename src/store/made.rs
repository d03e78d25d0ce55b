//! A root that Mica makes.

use std::sync::Arc;

use crate::core::bundle::TrustBundle;
use crate::core::certificate::Certificate;
use crate::core::issuer::{self, Issuer};
use crate::core::key::{KeyKind, PrivateKey};
use crate::core::lifetime::Lifetime;
use crate::core::profile::{Organization, Profile};
use crate::core::spiffe::TrustDomain;
use crate::sys::{clock, keys};

use super::{Error, ROOTS};

/// Ten years, as Istio's self-signed root since 1.1.8.
const LIFETIME: Lifetime = Lifetime::from_secs(10 * 365 * 86_400);

/// A new root, which nobody knows before it is kept.
pub struct Made {
    /// The issuer that it is.
    pub issuer: Issuer,
    /// Its key.
    pub key: PrivateKey,
    /// Its certificate, PEM.
    pub root_pem: String,
}

impl Made {
    /// Makes one.
    pub fn new(trust_domain: &TrustDomain) -> Result<Self, Error> {
        let organization: Organization =
            trust_domain.as_str().parse().unwrap_or_else(|_| Organization::default());
        Self::of(trust_domain, &organization, LIFETIME)
    }

    /// Makes one of this organization, for so long.
    pub fn of(
        trust_domain: &TrustDomain,
        organization: &Organization,
        lifetime: Lifetime,
    ) -> Result<Self, Error> {
        let key = keys::generate(KeyKind::P256)?;
        let signing = key.signing()?;
        let profile = Profile::Root { organization, trust_domain };
        let root = issuer::root(&signing, &profile, lifetime, clock::now(), keys::serial_number()?)?;
        let root = Certificate::from_der(root.der()).map_err(issuer::Error::from)?;
        let bundle =
            TrustBundle::new([root.clone()]).map_err(|fault| Error::Bundle { path: ROOTS.into(), fault })?;
        let issuer = Issuer::new(Arc::new(signing), std::slice::from_ref(&root), bundle, trust_domain)?;
        Ok(Self { issuer, key, root_pem: root.to_pem() })
    }
}
