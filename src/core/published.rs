//! What a trust domain publishes: what its X509-SVIDs are verified with, what its JWT-SVIDs are, and a number that grows
//! with each change (SPIFFE_Trust_Domain_and_Bundle.md).

use std::fmt;

use ring::digest::{SHA256, digest};
use serde_json::{Map, Value};

use super::bundle::{self, Error, TrustBundle};
use super::certificate::Certificate;
use super::key::PublicKey;
use super::spiffe::shortened;
use super::token::json;
use super::token::jwks::SECRETS;

/// Of one trust domain. Never merged with another's.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Published {
    /// What chains of its X509-SVIDs lead to. None means that none of them is trusted.
    pub x509: Vec<Certificate>,
    /// What its JWT-SVIDs are signed with. None means that none of them is trusted.
    pub jwt: Vec<JwtAuthority>,
    /// `spiffe_sequence`.
    pub sequence: Option<u64>,
    /// `spiffe_refresh_hint`, in seconds.
    pub refresh_hint: Option<u64>,
}

/// A public key of use jwt-svid.
#[derive(Clone, PartialEq, Eq)]
pub struct JwtAuthority {
    kid: String,
    jwk: Map<String, Value>,
}

impl JwtAuthority {
    /// Of a P-256 key.
    pub fn es256(kid: &str, key: &PublicKey) -> Self {
        // Uncompressed: a 4, and two numbers of 32 bytes.
        let (x, y) = key.bits().get(1..).unwrap_or_default().split_at(key.bits().len() / 2);
        let text = |text: &str| Value::String(text.to_owned());
        let members = [
            ("crv", text("P-256")),
            ("kid", text(kid)),
            ("kty", text("EC")),
            ("use", text(JWT_SVID)),
            ("x", Value::String(super::jwt_svid::encoded(x))),
            ("y", Value::String(super::jwt_svid::encoded(y))),
        ];
        let jwk = members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self { kid: kid.to_owned(), jwk }
    }

    /// None for keys of other uses and kinds.
    fn read(jwk: &Map<String, Value>) -> Result<Option<Self>, String> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        if text("use") != Some(JWT_SVID) || !matches!(text("kty"), Some("EC" | "RSA")) {
            return Ok(None);
        }
        let kid = text("kid").filter(|kid| !kid.is_empty()).ok_or("it has no kid")?.to_owned();
        let members = jwk.iter().filter(|(name, _)| MEMBERS.contains(&name.as_str()));
        let jwk = members.map(|(name, value)| (name.clone(), value.clone())).collect();
        Ok(Some(Self { kid, jwk }))
    }

    /// What tokens call it.
    pub fn kid(&self) -> &str {
        &self.kid
    }
}

impl fmt::Debug for JwtAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {:?}", self.kid)
    }
}

const JWT_SVID: &str = "jwt-svid";
/// What a public key consists of (RFC 7518 6.2, 6.3); nothing else is passed on.
const MEMBERS: [&str; 9] = ["alg", "crv", "e", "kid", "kty", "n", "use", "x", "y"];
/// More keys than these are refused.
const MAX_KEYS: usize = 256;

impl Published {
    /// Reads what another trust domain publishes. Keys of other uses and of unknown kinds are passed over (4.1.3), whatever
    /// else is wrong refuses all of it. No key at all is something that may be published: nobody there is trusted then.
    pub fn from_json(text: &[u8]) -> Result<Self, Error> {
        if text.len() > bundle::MAX {
            return Err(Error::TooLong(text.len()));
        }
        let document = json::object(text).map_err(Error::Json)?;
        let malformed = |what: &str| Error::Json(what.to_owned());
        let Some(Value::Array(keys)) = document.get("keys") else {
            return Err(malformed("it has no list of keys"));
        };
        if keys.len() > MAX_KEYS {
            return Err(Error::Json(format!("it has {} keys, and at most {MAX_KEYS} are taken", keys.len())));
        }
        let number = |name: &str| match document.get(name) {
            None => Ok(None),
            Some(value) => {
                value.as_u64().map(Some).ok_or_else(|| Error::Json(format!("its {name} is no whole number")))
            }
        };
        let mut read = Self {
            sequence: number("spiffe_sequence")?,
            refresh_hint: number("spiffe_refresh_hint")?,
            ..Self::default()
        };
        for (key, number) in keys.iter().zip(1..) {
            let refused = |fault: String| Error::Key { number, fault };
            let Value::Object(jwk) = key else { continue };
            if let Some(secret) = SECRETS.into_iter().find(|secret| jwk.contains_key(*secret)) {
                return Err(refused(format!("it has the member {secret:?}, which is secret")));
            }
            if let Some(root) = bundle::root(key).map_err(refused)? {
                if !root.is_ca {
                    return Err(Error::NotCa { number, serial: root.serial_text() });
                }
                if read.x509.contains(&root) {
                    return Err(refused("it is there twice".to_owned()));
                }
                read.x509.push(root);
            } else if let Some(key) = JwtAuthority::read(jwk).map_err(refused)? {
                if read.jwt.iter().any(|other| other.kid == key.kid) {
                    return Err(refused(format!("another one has the kid {:?}, too", shortened(&key.kid))));
                }
                read.jwt.push(key);
            }
        }
        Ok(read)
    }

    /// The roots, for what takes no empty bundle.
    pub fn roots(&self) -> Result<TrustBundle, Error> {
        TrustBundle::new(self.x509.iter().cloned())
    }

    /// The JWT keys alone, as a JWK Set; empty if there is none.
    pub fn jwks(&self) -> String {
        if self.jwt.is_empty() {
            return String::new();
        }
        let keys: Vec<_> = self.jwt.iter().map(|key| &key.jwk).collect();
        serde_json::json!({ "keys": keys }).to_string()
    }

    /// All of it, as the SPIFFE bundle endpoint serves it.
    pub fn to_json(&self) -> Result<String, Error> {
        let failed = |e: serde_json::Error| Error::Json(e.to_string());
        let mut keys = Vec::new();
        for root in &self.x509 {
            keys.push(serde_json::to_value(bundle::jwk(root)?).map_err(failed)?);
        }
        keys.extend(self.jwt.iter().map(|key| Value::Object(key.jwk.clone())));
        let mut document = serde_json::json!({ "keys": keys });
        for (name, number) in [("spiffe_sequence", self.sequence), ("spiffe_refresh_hint", self.refresh_hint)]
        {
            if let Some(number) = number {
                document[name] = number.into();
            }
        }
        serde_json::to_string_pretty(&document).map_err(failed)
    }

    /// Tells contents apart, whatever the order of the keys, the number and the hint.
    pub fn content(&self) -> String {
        let mut parts: Vec<_> = self.x509.iter().map(|root| digest(&SHA256, root.der())).collect();
        let keys = self.jwt.iter().map(|key| Value::Object(key.jwk.clone()).to_string());
        parts.extend(keys.map(|key| digest(&SHA256, key.as_bytes())));
        let mut parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
        parts.sort_unstable();
        hex(digest(&SHA256, &parts.concat()).as_ref())
    }

    /// What a consumer's X.509 part is known by: SHA-256 of the certificates, each as DER, in ascending order.
    pub fn x509_digest(&self) -> [u8; 32] {
        let mut ders: Vec<&[u8]> = self.x509.iter().map(Certificate::der).collect();
        ders.sort_unstable();
        let mut all = [0; 32];
        all.copy_from_slice(digest(&SHA256, &ders.concat()).as_ref());
        all
    }
}

impl fmt::Debug for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { x509, jwt, sequence, refresh_hint } = self;
        write!(f, "{} roots, {jwt:?}, sequence {sequence:?}, refresh hint {refresh_hint:?}", x509.len())
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
