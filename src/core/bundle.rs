//! Trust bundles (SPIFFE_Trust_Domain_and_Bundle.md): the roots of one trust domain, as PEM and as SPIFFE JSON.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::certificate::{self, Certificate};
use super::key::KeyKind;
use super::spiffe::{self, TrustDomain};

/// Longer JSON is refused before it is parsed.
pub const MAX: usize = 4 * 1024 * 1024;

/// Why bytes are no trust bundle.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No root at all; whoever used it would trust nobody.
    #[error("the trust bundle holds no root")]
    Empty,
    /// Something that is no CA certificate.
    #[error(
        "certificate {number} of the trust bundle (serial {serial}) is no CA's; a bundle holds roots only"
    )]
    NotCa {
        /// Which, from 1.
        number: usize,
        /// Its serial number.
        serial: String,
    },
    /// A certificate cannot be read.
    #[error("the trust bundle: {0}")]
    Certificate(#[from] certificate::Error),
    /// Too long to be parsed.
    #[error("the trust bundle of {0} bytes is longer than {MAX}")]
    TooLong(usize),
    /// Not JSON, or not of the shape.
    #[error("the trust bundle is not SPIFFE JSON: {0}")]
    Json(String),
    /// One of the keys.
    #[error("key {number} of the trust bundle: {fault}")]
    Key {
        /// Which, from 1.
        number: usize,
        /// What is wrong with it.
        fault: String,
    },
    /// A root's key kind cannot be written as a JWK.
    #[error("root {serial} cannot be written as a JWK: {fault}")]
    Jwk {
        /// Its serial number.
        serial: String,
        /// Why.
        fault: String,
    },
    /// The name of a trust domain in a map of bundles.
    #[error(transparent)]
    TrustDomain(#[from] spiffe::Error),
}

/// The roots of one trust domain, never empty, without repetition, in the order they came in.
#[derive(Clone, PartialEq, Eq)]
pub struct TrustBundle {
    roots: Vec<Certificate>,
    pem: Arc<str>,
    /// `spiffe_sequence`.
    pub sequence: Option<u64>,
    /// `spiffe_refresh_hint`, in seconds.
    pub refresh_hint: Option<u64>,
}

impl TrustBundle {
    /// Takes roots; repeated ones count once.
    pub fn new(roots: impl IntoIterator<Item = Certificate>) -> Result<Self, Error> {
        let mut kept: Vec<Certificate> = Vec::new();
        for (root, number) in roots.into_iter().zip(1..) {
            if !root.is_ca {
                return Err(Error::NotCa { number, serial: root.serial_text() });
            }
            if !kept.contains(&root) {
                kept.push(root);
            }
        }
        if kept.is_empty() {
            return Err(Error::Empty);
        }
        let pem = kept.iter().map(Certificate::to_pem).collect::<String>().into();
        Ok(Self { roots: kept, pem, sequence: None, refresh_hint: None })
    }

    /// Reads roots as PEM.
    pub fn from_pem(text: &[u8]) -> Result<Self, Error> {
        Self::new(Certificate::all_from_pem(text)?)
    }

    /// The same, but what is known word for word is not read again. A number that was known with it is not in the text.
    pub fn from_pem_or_known(text: &str, known: Option<&Self>) -> Result<Self, Error> {
        match known.filter(|known| *known.pem == *text) {
            Some(known) => Ok(Self { sequence: None, refresh_hint: None, ..known.clone() }),
            None => Self::from_pem(text.as_bytes()),
        }
    }

    /// Reads the JWK Set of one trust domain. Keys of other uses, of unknown kinds or without a certificate are passed
    /// over (4.1.3, X509-SVID 6.2); a set without an X.509 key is [`Error::Empty`].
    pub fn from_json(text: &[u8]) -> Result<Self, Error> {
        if text.len() > MAX {
            return Err(Error::TooLong(text.len()));
        }
        let document: Document = serde_json::from_slice(text).map_err(|e| Error::Json(e.to_string()))?;
        document.into_bundle()
    }

    /// The roots.
    pub fn roots(&self) -> &[Certificate] {
        &self.roots
    }

    /// The roots as PEM, made once.
    pub fn pem(&self) -> &Arc<str> {
        &self.pem
    }

    /// Both sets of roots, this one's first. The sequence is left to whoever publishes.
    pub fn merged(&self, other: &Self) -> Result<Self, Error> {
        Self::new(self.roots.iter().chain(&other.roots).cloned())
    }

    /// Whether both trust the same, in whatever order.
    pub fn same_roots(&self, other: &Self) -> bool {
        self.roots.len() == other.roots.len() && self.roots.iter().all(|root| other.roots.contains(root))
    }

    /// Tells bundles apart whatever the order of their roots: SHA-256 of the roots, each as DER, in ascending order.
    pub fn digest(&self) -> [u8; 32] {
        let mut roots: Vec<&[u8]> = self.roots.iter().map(Certificate::der).collect();
        roots.sort_unstable();
        let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
        roots.iter().for_each(|root| digest.update(root));
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.finish().as_ref());
        bytes
    }

    /// The JWK Set: `use` x509-svid, no `kid`, one certificate each (X509-SVID 6.1).
    pub fn to_json(&self) -> Result<String, Error> {
        let keys = self.roots.iter().map(jwk).collect::<Result<Vec<_>, _>>()?;
        let document =
            Written { keys, spiffe_sequence: self.sequence, spiffe_refresh_hint: self.refresh_hint };
        serde_json::to_string_pretty(&document).map_err(|e| Error::Json(e.to_string()))
    }
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.roots).finish()
    }
}

/// Reads a map of bundles (5.1): one for each trust domain, none twice, whose refresh hints do not count.
pub fn map_from_json(text: &[u8]) -> Result<BTreeMap<TrustDomain, TrustBundle>, Error> {
    #[derive(Deserialize)]
    struct Map {
        trust_domains: Unique<Document>,
    }
    if text.len() > MAX {
        return Err(Error::TooLong(text.len()));
    }
    let map: Map = serde_json::from_slice(text).map_err(|e| Error::Json(e.to_string()))?;
    map.trust_domains
        .0
        .into_iter()
        .map(|(name, document)| {
            let mut bundle = document.into_bundle()?;
            bundle.refresh_hint = None;
            Ok((TrustDomain::parse(&name)?, bundle))
        })
        .collect()
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
    #[serde(default)]
    spiffe_sequence: Option<u64>,
    #[serde(default)]
    spiffe_refresh_hint: Option<u64>,
}

impl Document {
    fn into_bundle(self) -> Result<TrustBundle, Error> {
        let mut roots = Vec::new();
        for (key, number) in self.keys.iter().zip(1..) {
            roots.extend(root(key).map_err(|fault| Error::Key { number, fault })?);
        }
        let mut bundle = TrustBundle::new(roots)?;
        bundle.sequence = self.spiffe_sequence;
        bundle.refresh_hint = self.spiffe_refresh_hint;
        Ok(bundle)
    }
}

pub(super) fn root(key: &serde_json::Value) -> Result<Option<Certificate>, String> {
    let text = |name: &str| key.get(name).and_then(serde_json::Value::as_str);
    if text("use") != Some("x509-svid") || !matches!(text("kty"), Some("EC" | "RSA" | "OKP")) {
        return Ok(None);
    }
    let Some(first) = key.get("x5c").and_then(|x5c| x5c.get(0)) else { return Ok(None) };
    let encoded = first.as_str().ok_or("x5c holds something that is no text")?;
    let der =
        STANDARD.decode(encoded).map_err(|_| "x5c is not base64 (the standard alphabet, with padding)")?;
    Certificate::from_der(&der).map(Some).map_err(|e| e.to_string())
}

#[derive(Serialize)]
struct Written {
    keys: Vec<Jwk>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_sequence: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_refresh_hint: Option<u64>,
}

#[derive(Serialize)]
pub(super) struct Jwk {
    #[serde(rename = "use")]
    usage: &'static str,
    #[serde(flatten)]
    parameters: BTreeMap<&'static str, String>,
    x5c: [String; 1],
}

pub(super) fn jwk(root: &Certificate) -> Result<Jwk, Error> {
    let refused = |fault: String| Error::Jwk { serial: root.serial_text(), fault };
    let key = root.key().map_err(|e| refused(e.to_string()))?;
    let encoded = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let bits = key.bits();
    let parameters = match key.kind() {
        KeyKind::P256 | KeyKind::P384 => {
            let (x, y) = bits[1..].split_at((bits.len() - 1) / 2);
            let curve = if key.kind() == KeyKind::P256 { "P-256" } else { "P-384" };
            BTreeMap::from([
                ("kty", "EC".to_owned()),
                ("crv", curve.to_owned()),
                ("x", encoded(x)),
                ("y", encoded(y)),
            ])
        }
        KeyKind::Ed25519 => {
            BTreeMap::from([("kty", "OKP".to_owned()), ("crv", "Ed25519".to_owned()), ("x", encoded(bits))])
        }
        KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => {
            use x509_parser::prelude::FromDer as _;
            let (_, rsa) =
                x509_parser::public_key::RSAPublicKey::from_der(bits).map_err(|e| refused(e.to_string()))?;
            BTreeMap::from([
                ("kty", "RSA".to_owned()),
                ("n", encoded(certificate::trimmed(rsa.modulus))),
                ("e", encoded(certificate::trimmed(rsa.exponent))),
            ])
        }
    };
    Ok(Jwk { usage: "x509-svid", parameters, x5c: [STANDARD.encode(root.der())] })
}

/// A JSON object whose names may not repeat (6.3); serde's own maps would keep the last one in silence.
struct Unique<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Unique<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object whose names are unique")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, T>()? {
                    if entries.insert(name.clone(), value).is_some() {
                        return Err(de::Error::custom(format!("{name:?} is there twice")));
                    }
                }
                Ok(Unique(entries))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}
