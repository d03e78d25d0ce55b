//! The resources: what can be asked for, and what is sent for it. Each version is encoded once, and all streams share its
//! bytes, which are overwritten when the last of them lets go.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use prost::Message as _;
use prost::bytes::Bytes;
use zeroize::{Zeroize as _, Zeroizing};

use crate::agent::holders::Digest;
use crate::agent::{Bundles, Svid};
use crate::core::certificate::{Certificate, hex};
use crate::core::spiffe::{self, SpiffeId, TrustDomain};
use crate::proto::xds::envoy::config::core::v3::data_source::Specifier;
use crate::proto::xds::envoy::config::core::v3::{DataSource, TypedExtensionConfig};
use crate::proto::xds::envoy::extensions::transport_sockets::tls::v3::spiffe_cert_validator_config::TrustDomain as Trusted;
use crate::proto::xds::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, SpiffeCertValidatorConfig, TlsCertificate, secret,
};
use crate::proto::xds::google::protobuf::Any;

/// Of every resource here.
pub(super) const TYPE_URL: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
const VALIDATOR: &str = "envoy.tls.cert_validator.spiffe";
const VALIDATOR_URL: &str =
    "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig";

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// The certificate of the caller's first identity.
    Default,
    /// The certificate of one identity.
    Workload(SpiffeId),
    /// The roots of the agent's trust domain.
    Roots,
    /// The roots of one trust domain.
    Domain(TrustDomain),
    /// The roots of all trust domains, each for its own.
    All,
}

impl Name {
    pub(super) const DEFAULT: &'static str = "default";
    pub(super) const ROOTS: &'static str = "ROOTCA";

    pub(super) fn parse(name: &str) -> Result<Self, spiffe::Error> {
        Ok(match name {
            Self::DEFAULT => Self::Default,
            Self::ROOTS => Self::Roots,
            "ALL" => Self::All,
            _ => {
                let id = SpiffeId::parse(name)?;
                match id.path() {
                    "" => Self::Domain(id.trust_domain().clone()),
                    _ => Self::Workload(id),
                }
            }
        })
    }
}

/// One version of a resource.
pub(super) struct Made {
    /// Follows from the content alone, so that it is the same after a restart: of a certificate its fingerprint, of a
    /// bundle its digest.
    pub(super) version: String,
    /// For metrics.
    pub(super) kind: &'static str,
    /// The bundles that whoever takes it holds.
    pub(super) holds: Vec<(TrustDomain, Digest)>,
    any: Bytes,
    /// Keeps the place in memory that the shelf knows this by.
    of: Source,
}

impl Made {
    pub(super) fn any(&self) -> Any {
        Any { type_url: TYPE_URL.to_owned(), value: self.any.clone() }
    }

    /// The certificate, if it is one.
    pub(super) fn svid(&self) -> Option<&Arc<Svid>> {
        match &self.of {
            Source::Svid { held } => Some(held),
            Source::Bundles { .. } => None,
        }
    }

    pub(super) fn is_certificate(&self) -> bool {
        self.kind == CERTIFICATE
    }
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.version)
    }
}

const CERTIFICATE: &str = "certificate";
const BUNDLE: &str = "bundle";
const BUNDLES: &str = "bundles";

enum Source {
    Svid { held: Arc<Svid> },
    Bundles { _held: Arc<Bundles> },
}

/// What has been made of what is held now, by where that is in memory and the name it was made for.
#[derive(Default)]
pub(super) struct Shelf {
    made: Mutex<HashMap<(usize, String), Weak<Made>>>,
}

impl Shelf {
    pub(super) fn certificate(&self, name: &str, svid: &Arc<Svid>) -> Arc<Made> {
        self.of(Arc::as_ptr(svid) as usize, name, || {
            let chain = svid.chain.iter().map(Certificate::to_pem).collect::<String>();
            let mut key = svid.key.to_pem();
            let certificate = TlsCertificate {
                certificate_chain: inline(chain.into_bytes()),
                private_key: inline(std::mem::take(&mut *key).into_bytes()),
            };
            Made {
                version: svid.chain[0].fingerprint(),
                kind: CERTIFICATE,
                holds: Vec::new(),
                any: encoded(name, secret::Type::TlsCertificate(certificate)),
                of: Source::Svid { held: svid.clone() },
            }
        })
    }

    /// None if nothing of that trust domain is trusted.
    pub(super) fn bundle(
        &self,
        name: &str,
        domain: &TrustDomain,
        bundles: &Arc<Bundles>,
    ) -> Option<Arc<Made>> {
        let roots = bundles.domains.get(domain)?.x509.as_ref()?;
        Some(self.of(Arc::as_ptr(bundles) as usize, name, || {
            let digest = roots.digest();
            let context = CertificateValidationContext {
                trusted_ca: inline(roots.pem().as_bytes().to_vec()),
                custom_validator_config: None,
            };
            Made {
                version: hex(&digest),
                kind: BUNDLE,
                holds: vec![(domain.clone(), digest)],
                any: encoded(name, secret::Type::ValidationContext(context)),
                of: Source::Bundles { _held: bundles.clone() },
            }
        }))
    }

    /// None if nothing is trusted: a validator of nothing is none that Envoy takes.
    pub(super) fn all(&self, name: &str, bundles: &Arc<Bundles>) -> Option<Arc<Made>> {
        let domains = bundles.domains.iter().filter_map(|(domain, held)| Some((domain, held.x509.as_ref()?)));
        let domains: Vec<_> = domains.collect();
        if domains.is_empty() {
            return None;
        }
        Some(self.of(Arc::as_ptr(bundles) as usize, name, || {
            let trusted = |(domain, roots): &(&TrustDomain, &crate::core::bundle::TrustBundle)| Trusted {
                name: domain.to_string(),
                trust_bundle: inline(roots.pem().as_bytes().to_vec()),
            };
            let validator =
                SpiffeCertValidatorConfig { trust_domains: domains.iter().map(trusted).collect() };
            let config = Any { type_url: VALIDATOR_URL.to_owned(), value: validator.encode_to_vec().into() };
            let context = CertificateValidationContext {
                trusted_ca: None,
                custom_validator_config: Some(TypedExtensionConfig {
                    name: VALIDATOR.to_owned(),
                    typed_config: Some(config),
                }),
            };
            let holds: Vec<_> =
                domains.iter().map(|(domain, roots)| ((*domain).clone(), roots.digest())).collect();
            let lines = holds.iter().map(|(domain, digest)| format!("{domain}={}\n", hex(digest)));
            Made {
                version: sha256(&lines.collect::<String>()),
                kind: BUNDLES,
                any: encoded(name, secret::Type::ValidationContext(context)),
                holds,
                of: Source::Bundles { _held: bundles.clone() },
            }
        }))
    }

    fn of(&self, place: usize, name: &str, make: impl FnOnce() -> Made) -> Arc<Made> {
        let mut shelf = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (place, name.to_owned());
        if let Some(made) = shelf.get(&key).and_then(Weak::upgrade) {
            return made;
        }
        if shelf.len() == shelf.capacity() {
            shelf.retain(|_, made| made.strong_count() > 0);
        }
        let made = Arc::new(make());
        shelf.insert(key, Arc::downgrade(&made));
        made
    }
}

/// The version of several resources together, by their names. Of a single one it is readable.
pub(super) fn version(all: &[(String, Arc<Made>)]) -> String {
    let lines: Vec<String> = all.iter().map(|(name, made)| format!("{name}={}", made.version)).collect();
    match &lines[..] {
        [single] => single.clone(),
        several => sha256(&several.join("\n")),
    }
}

fn sha256(text: &str) -> String {
    hex(ring::digest::digest(&ring::digest::SHA256, text.as_bytes()).as_ref())
}

fn inline(bytes: Vec<u8>) -> Option<DataSource> {
    Some(DataSource { specifier: Some(Specifier::InlineBytes(bytes)) })
}

fn encoded(name: &str, resource: secret::Type) -> Bytes {
    let mut secret = Secret { name: name.to_owned(), r#type: Some(resource) };
    // Of the whole size at once: a vector that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(secret.encoded_len()));
    // It has the room, and nothing else can go wrong.
    let _ = secret.encode(&mut *bytes);
    if let Some(secret::Type::TlsCertificate(certificate)) = &mut secret.r#type
        && let Some(Specifier::InlineBytes(key)) =
            certificate.private_key.as_mut().and_then(|source| source.specifier.as_mut())
    {
        key.zeroize();
    }
    Bytes::from_owner(bytes)
}

impl fmt::Debug for Any {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes", self.type_url, self.value.len())
    }
}

impl fmt::Debug for DataSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.specifier, f)
    }
}

impl fmt::Debug for Specifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Filename(name) => write!(f, "file {name:?}"),
            Self::InlineBytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Self::InlineString(text) => write!(f, "{} bytes", text.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bundle::TrustBundle;
    use crate::core::issuer;
    use crate::core::key::KeyKind;
    use crate::core::profile::Profile;
    use crate::sys::{clock, keys};

    fn bundles(domain: &TrustDomain) -> Arc<Bundles> {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let organization = "test".parse().unwrap();
        let profile = Profile::Root { organization: &organization, trust_domain: domain };
        let serial = keys::serial_number().unwrap();
        let root = issuer::root(&key, &profile, "1d".parse().unwrap(), clock::now(), serial).unwrap();
        let root = Certificate::from_der(root.der()).unwrap();
        Arc::new(Bundles::new(domain.clone(), TrustBundle::new([root]).unwrap()))
    }

    #[test]
    fn each_version_is_made_once_and_forgotten_with_its_last_holder() {
        let (shelf, domain) = (Shelf::default(), TrustDomain::parse("example.org").unwrap());
        let (first, second) = (bundles(&domain), bundles(&domain));
        let made = shelf.bundle("ROOTCA", &domain, &first).unwrap();
        let again = shelf.bundle("ROOTCA", &domain, &first).unwrap();
        assert_eq!(made.any().value.as_ptr(), again.any().value.as_ptr());
        let other = shelf.bundle("spiffe://example.org", &domain, &first).unwrap();
        assert_eq!(made.version, other.version);
        assert_ne!(made.any().value, other.any().value);
        assert_ne!(made.version, shelf.bundle("ROOTCA", &domain, &second).unwrap().version);
        let version = made.version.clone();
        drop((made, again, other));
        for number in 0..1000 {
            drop(shelf.bundle(&number.to_string(), &domain, &second));
        }
        assert!(shelf.made.lock().unwrap().len() < 100);
        assert_eq!(shelf.bundle("ROOTCA", &domain, &first).unwrap().version, version);
    }

    #[test]
    fn a_version_of_several_is_of_their_names_too() {
        let (shelf, domain) = (Shelf::default(), TrustDomain::parse("example.org").unwrap());
        let held = bundles(&domain);
        let of = |name: &str| (name.to_owned(), shelf.bundle(name, &domain, &held).unwrap());
        let all = [of("a"), of("b")];
        assert_eq!(version(&all), version(&[of("a"), of("b")]));
        assert_ne!(version(&all), version(&[of("a"), of("c")]));
        assert_ne!(version(&all[..1]), version(&[of("b")]));
        assert_eq!(version(&all[..1]), format!("a={}", all[0].1.version));
    }

    #[test]
    fn names_are_those_of_the_contract_and_spiffe_ids() {
        for (name, meaning) in [("default", Name::Default), ("ROOTCA", Name::Roots), ("ALL", Name::All)] {
            assert_eq!(Name::parse(name), Ok(meaning));
        }
        let domain = TrustDomain::parse("example.org").unwrap();
        assert_eq!(Name::parse("spiffe://example.org"), Ok(Name::Domain(domain)));
        let id = SpiffeId::parse("spiffe://example.org/a").unwrap();
        assert_eq!(Name::parse("spiffe://example.org/a"), Ok(Name::Workload(id)));
        for name in
            ["", "Default", "rootca", "all", "spiffe://example.org/", "SPIFFE://example.org", "file-root:x"]
        {
            assert!(Name::parse(name).is_err(), "{name}");
        }
    }
}
