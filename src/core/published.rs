//! What a trust domain publishes: what its X509-SVIDs are verified with, what its JWT-SVIDs are, and a number that grows
//! with each change (SPIFFE_Trust_Domain_and_Bundle.md).

use std::fmt;

use ring::digest::{SHA256, digest};
use serde_json::{Map, Value, json};

use super::bundle::{self, Error};
use super::certificate::Certificate;
use super::key::PublicKey;

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

impl Published {
    /// The JWT keys alone, as a JWK Set; empty if there is none.
    pub fn jwks(&self) -> String {
        if self.jwt.is_empty() {
            return String::new();
        }
        let keys: Vec<_> = self.jwt.iter().map(|key| &key.jwk).collect();
        json!({ "keys": keys }).to_string()
    }

    /// All of it, as the SPIFFE bundle endpoint serves it.
    pub fn to_json(&self) -> Result<String, Error> {
        let failed = |e: serde_json::Error| Error::Json(e.to_string());
        let mut keys = Vec::new();
        for root in &self.x509 {
            keys.push(serde_json::to_value(bundle::jwk(root)?).map_err(failed)?);
        }
        keys.extend(self.jwt.iter().map(|key| Value::Object(key.jwk.clone())));
        let mut document = json!({ "keys": keys });
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
