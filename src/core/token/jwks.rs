//! A token issuer's public keys: JWK Sets (RFC 7517), and the signatures that they verify (RFC 7518, RFC 8037).

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey};
use serde_json::Value;

use super::{Claims, Fault, Token, cut, json, shown};

/// The longest set that is read.
pub const MAX: usize = 256 * 1024;
/// The most keys that a set may have.
const MAX_KEYS: usize = 64;
/// Members of a JWK that make it a secret (RFC 7518 6.2.2, 6.3.2, 6.4.1).
pub(in crate::core) const SECRETS: [&str; 8] = ["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

/// Why a set of keys is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too long.
    #[error("it has {0} bytes, and at most {MAX} are read")]
    Length(usize),
    /// Not a JWK Set.
    #[error("it is no JWK Set: {0}")]
    Form(String),
    /// Too many.
    #[error("it has {0} keys, and at most {MAX_KEYS} are taken")]
    TooMany(usize),
    /// Somebody has published a secret.
    #[error(
        "its key {kid} has the member {member:?}, which is secret: whoever has read this set can make tokens; replace that key at the issuer"
    )]
    Secret {
        /// Which.
        kid: String,
        /// By which it is known.
        member: &'static str,
    },
    /// Nothing to verify with.
    #[error("it has no key that verifies tokens{}", because(.0))]
    Empty(Vec<String>),
}

macro_rules! algorithms {
    ($($name:ident),+) => {
        /// The asymmetric algorithms. There are no others here, so none can be chosen by a token.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[expect(missing_docs, reason = "RFC 7518 3.1 and RFC 8037 3.1 say what they are")]
        pub enum Algorithm {
            $($name,)+
        }

        impl Algorithm {
            const ALL: &[Self] = &[$(Self::$name,)+];

            /// As a header gives it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }
        }
    };
}

algorithms!(ES256, ES384, EdDSA, RS256, RS384, RS512, PS256, PS384, PS512);

impl Algorithm {
    /// By name, which is told from others by case.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|it| it.as_str() == name)
    }

    pub(super) fn names() -> String {
        Self::ALL.iter().map(|it| it.as_str()).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The public keys of one issuer.
#[derive(Clone, PartialEq, Eq)]
pub struct KeySet {
    keys: Vec<Key>,
    passed_over: Vec<String>,
}

#[derive(Clone, PartialEq, Eq)]
struct Key {
    kid: Option<String>,
    /// The only one it is for, if the set says so.
    algorithm: Option<Algorithm>,
    public: Public,
}

#[derive(Clone, PartialEq, Eq)]
enum Public {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// A point in uncompressed form.
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

impl KeySet {
    /// Reads a set. Keys of other kinds, for other uses or too weak to prove anything are passed over, as RFC 7517 5 wants
    /// it; a set in which a secret stands is refused whole.
    pub fn from_json(text: &[u8]) -> Result<Self, Error> {
        Self::read(text, |jwk| match jwk.get("use") {
            None => Ok(()),
            Some(Value::String(purpose)) if purpose == "sig" => Ok(()),
            Some(other) => Err(format!("is for the use {}", shown(other))),
        })
    }

    /// Reads the keys of a trust domain's bundle that its JWT-SVIDs are signed with (JWT-SVID 6.2): those of other uses
    /// prove nothing here.
    pub fn of_svids(text: &[u8]) -> Result<Self, Error> {
        Self::read(text, |jwk| match (jwk.get("use"), jwk.get("kid")) {
            (Some(Value::String(purpose)), Some(Value::String(_))) if purpose == "jwt-svid" => Ok(()),
            (Some(Value::String(purpose)), _) if purpose == "jwt-svid" => Err("has no kid".to_owned()),
            (Some(other), _) => Err(format!("is for the use {}", shown(other))),
            (None, _) => Err("is for no use".to_owned()),
        })
    }

    fn read(text: &[u8], is_for: impl Fn(&json::Object) -> Result<(), String>) -> Result<Self, Error> {
        if text.len() > MAX {
            return Err(Error::Length(text.len()));
        }
        let set = json::object(text).map_err(Error::Form)?;
        let Some(Value::Array(members)) = set.get("keys") else {
            return Err(Error::Form("it has no list of keys".to_owned()));
        };
        if members.len() > MAX_KEYS {
            return Err(Error::TooMany(members.len()));
        }
        let mut found = Self { keys: Vec::new(), passed_over: Vec::new() };
        for (index, member) in members.iter().enumerate() {
            let Value::Object(jwk) = member else {
                return Err(Error::Form(format!("its key {} is no object", index + 1)));
            };
            let called = match jwk.get("kid") {
                Some(kid) => shown(kid),
                None => (index + 1).to_string(),
            };
            if let Some(member) = SECRETS.into_iter().find(|secret| jwk.contains_key(*secret)) {
                return Err(Error::Secret { kid: called, member });
            }
            match is_for(jwk).and_then(|()| key(jwk)) {
                Ok(key) => found.keys.push(key),
                Err(why) => found.passed_over.push(format!("{called} {why}")),
            }
        }
        if found.keys.is_empty() {
            return Err(Error::Empty(found.passed_over));
        }
        Ok(found)
    }

    /// How many keys verify tokens.
    pub fn count(&self) -> usize {
        self.keys.len()
    }

    /// Which keys were passed over, and why.
    pub fn passed_over(&self) -> &[String] {
        &self.passed_over
    }

    /// Whether there is a key that a token may be signed with.
    pub fn knows(&self, token: &Token<'_>) -> bool {
        self.keys.iter().any(|key| match &token.kid {
            Some(kid) => key.kid.as_ref() == Some(kid),
            None => key.fits(token.algorithm),
        })
    }

    /// Believes a token that one of the keys has signed.
    pub fn verify(&self, token: Token<'_>) -> Result<Claims, Fault> {
        let fits = |key: &&Key| key.fits(token.algorithm);
        let candidates: Vec<&Key> = match &token.kid {
            Some(kid) => {
                let named: Vec<_> = self.keys.iter().filter(|key| key.kid.as_ref() == Some(kid)).collect();
                let Some(first) = named.first() else { return Err(Fault::KeyUnknown(cut(kid))) };
                let of = first.purpose();
                let fitting: Vec<_> = named.into_iter().filter(fits).collect();
                if fitting.is_empty() {
                    return Err(Fault::AlgorithmOfKey { algorithm: token.algorithm, kid: cut(kid), of });
                }
                fitting
            }
            // Nothing is tried out: there is one that it can be, or it is refused.
            None => match &self.keys.iter().filter(fits).collect::<Vec<_>>()[..] {
                [one] => vec![*one],
                several => return Err(Fault::KeyUnnamed(several.len(), token.algorithm)),
            },
        };
        let message = token.message.as_bytes();
        if candidates.iter().any(|key| key.public.has_signed(token.algorithm, message, &token.signature)) {
            Ok(Claims(token.claims))
        } else {
            Err(Fault::Signature)
        }
    }
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.keys.len())
    }
}

impl Key {
    fn fits(&self, algorithm: Algorithm) -> bool {
        self.algorithm.is_none_or(|only| only == algorithm) && self.public.algorithms().contains(&algorithm)
    }

    fn purpose(&self) -> String {
        match self.algorithm {
            Some(only) => format!("for {only}"),
            None => {
                let names: Vec<_> = self.public.algorithms().iter().map(|it| it.as_str()).collect();
                format!("for {}", names.join(", "))
            }
        }
    }
}

impl Public {
    fn algorithms(&self) -> &'static [Algorithm] {
        use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
        match self {
            Self::Rsa { .. } => &[RS256, RS384, RS512, PS256, PS384, PS512],
            Self::P256(_) => &[ES256],
            Self::P384(_) => &[ES384],
            Self::Ed25519(_) => &[EdDSA],
        }
    }

    fn has_signed(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
        let verified = match (self, algorithm) {
            (Self::Rsa { n, e }, RS256 | RS384 | RS512 | PS256 | PS384 | PS512) => {
                let parameters = match algorithm {
                    RS256 => &signature::RSA_PKCS1_2048_8192_SHA256,
                    RS384 => &signature::RSA_PKCS1_2048_8192_SHA384,
                    RS512 => &signature::RSA_PKCS1_2048_8192_SHA512,
                    PS256 => &signature::RSA_PSS_2048_8192_SHA256,
                    PS384 => &signature::RSA_PSS_2048_8192_SHA384,
                    _ => &signature::RSA_PSS_2048_8192_SHA512,
                };
                RsaPublicKeyComponents { n, e }.verify(parameters, message, signature)
            }
            (Self::P256(point), ES256) => {
                UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point).verify(message, signature)
            }
            (Self::P384(point), ES384) => {
                UnparsedPublicKey::new(&signature::ECDSA_P384_SHA384_FIXED, point).verify(message, signature)
            }
            (Self::Ed25519(key), EdDSA) => {
                UnparsedPublicKey::new(&signature::ED25519, key).verify(message, signature)
            }
            _ => return false,
        };
        verified.is_ok()
    }
}

/// A key, or why it verifies nothing.
fn key(jwk: &json::Object) -> Result<Key, String> {
    let text = |name: &str| jwk.get(name).and_then(Value::as_str);
    match jwk.get("key_ops") {
        None => {}
        Some(Value::Array(operations)) if operations.iter().any(|it| it == "verify") => {}
        Some(_) => return Err("is not for verifying".to_owned()),
    }
    let public = match (text("kty"), text("crv")) {
        (Some("RSA"), _) => rsa(jwk)?,
        (Some("EC"), Some("P-256")) => Public::P256(point(jwk, 32)?),
        (Some("EC"), Some("P-384")) => Public::P384(point(jwk, 48)?),
        (Some("OKP"), Some("Ed25519")) => Public::Ed25519(bytes(jwk, "x", Some(32))?),
        (Some(kind), Some(curve)) => return Err(format!("is of the kind {}, {}", cut(kind), cut(curve))),
        (Some(kind), None) => return Err(format!("is of the kind {}", cut(kind))),
        (None, _) => return Err("has no kty".to_owned()),
    };
    let algorithm = match jwk.get("alg") {
        None => None,
        Some(value) => Some(
            value
                .as_str()
                .and_then(Algorithm::named)
                .filter(|it| public.algorithms().contains(it))
                .ok_or_else(|| format!("is for {}, which does not fit it", shown(value)))?,
        ),
    };
    let kid = match jwk.get("kid") {
        None => None,
        Some(Value::String(kid)) => Some(kid.clone()),
        Some(_) => return Err("has a kid that is no text".to_owned()),
    };
    Ok(Key { kid, algorithm, public })
}

fn rsa(jwk: &json::Object) -> Result<Public, String> {
    let (n, e) = (bytes(jwk, "n", None)?, bytes(jwk, "e", None)?);
    // RFC 7518 2: Base64urlUInt has no leading zeros, and ring takes none either.
    if n.first() == Some(&0) || e.first() == Some(&0) {
        return Err("has a number with leading zeros".to_owned());
    }
    let bits = n.len() * 8 - n.first().map_or(0, |first| first.leading_zeros() as usize);
    if !(2048..=8192).contains(&bits) {
        return Err(format!("is an RSA key of {bits} bits; 2048 to 8192 are taken"));
    }
    // ring's own bound is below 2^33.
    let exponent = (e.len() <= 5).then(|| e.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte)));
    match exponent {
        Some(exponent) if (65_537..1 << 33).contains(&exponent) && exponent % 2 == 1 => {}
        Some(exponent) => return Err(format!("is an RSA key with the exponent {exponent}; 65537 is usual")),
        None => return Err(format!("is an RSA key with an exponent of {} bytes", e.len())),
    }
    Ok(Public::Rsa { n, e })
}

fn point(jwk: &json::Object, length: usize) -> Result<Vec<u8>, String> {
    let mut point = vec![4];
    point.extend(bytes(jwk, "x", Some(length))?);
    point.extend(bytes(jwk, "y", Some(length))?);
    Ok(point)
}

fn bytes(jwk: &json::Object, name: &str, length: Option<usize>) -> Result<Vec<u8>, String> {
    jwk.get(name)
        .and_then(Value::as_str)
        .and_then(|text| URL_SAFE_NO_PAD.decode(text).ok())
        .filter(|bytes| length.is_none_or(|length| bytes.len() == length))
        .ok_or_else(|| format!("has no {name:?} of base64url and the right length"))
}

fn because(why: &[String]) -> String {
    const SHOWN: usize = 3;
    let mut text = String::new();
    for (index, why) in why.iter().take(SHOWN).enumerate() {
        text.push_str(if index == 0 { ": key " } else { "; key " });
        text.push_str(why);
    }
    if why.len() > SHOWN {
        text.push_str(&format!("; and {} more", why.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set(keys: Value) -> Result<KeySet, Error> {
        KeySet::from_json(json!({ "keys": keys }).to_string().as_bytes())
    }

    fn zeros(count: usize) -> String {
        // Not a number with leading zeros.
        let mut bytes = vec![0; count];
        bytes[0] = 0x80;
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn sound() -> Value {
        json!({"kty": "RSA", "n": zeros(256), "e": "AQAB", "kid": "good"})
    }

    fn rsa_with(name: &str, value: Value) -> Value {
        let mut key = sound();
        key[name] = value;
        key
    }

    #[test]
    fn keys_that_prove_nothing_are_passed_over_and_the_others_stay() {
        for (key, why) in [
            (json!({"kty": "oct"}), "kind oct"),
            (json!({"kty": "EC", "crv": "P-521", "x": zeros(66), "y": zeros(66)}), "P-521"),
            (json!({"kty": "EC", "crv": "secp256k1", "x": zeros(32), "y": zeros(32)}), "secp256k1"),
            (json!({"kty": "OKP", "crv": "X25519", "x": zeros(32)}), "X25519"),
            (json!({"kty": "EC", "crv": "P-256", "x": zeros(32)}), "\"y\""),
            (json!({"kty": "EC", "crv": "P-256", "x": zeros(32), "y": zeros(31)}), "\"y\""),
            (json!({"kty": "OKP", "crv": "Ed25519", "x": zeros(33)}), "\"x\""),
            (json!({"kty": 1}), "no kty"),
            (json!({}), "no kty"),
            (rsa_with("use", json!("enc")), "\"enc\""),
            (rsa_with("use", json!(["sig"])), "use"),
            (rsa_with("key_ops", json!(["sign"])), "not for verifying"),
            (rsa_with("alg", json!("HS256")), "HS256"),
            (rsa_with("alg", json!("ES256")), "ES256"),
            (rsa_with("alg", json!("RSA-OAEP")), "RSA-OAEP"),
            (rsa_with("kid", json!(7)), "no text"),
            (rsa_with("n", json!(zeros(255))), "2040 bits"),
            (rsa_with("n", json!(zeros(128))), "1024 bits"),
            (rsa_with("n", json!(zeros(1025))), "8200 bits"),
            (rsa_with("n", json!(URL_SAFE_NO_PAD.encode([0; 257]))), "leading zeros"),
            (rsa_with("n", json!("")), "0 bits"),
            (rsa_with("n", json!("a=")), "\"n\""),
            (rsa_with("e", json!("Aw")), "exponent 3"),
            (rsa_with("e", json!("AQAA")), "exponent 65536"),
            (rsa_with("e", json!("AAEAAQ")), "leading zeros"),
            (rsa_with("e", json!("AgAAAAE")), "exponent"),
            (rsa_with("e", json!("AQAAAAAAAAAB")), "9 bytes"),
        ] {
            let taken = set(json!([key, sound()])).unwrap();
            assert_eq!(taken.count(), 1, "{key}");
            assert!(taken.passed_over()[0].contains(why), "{key}: {:?}", taken.passed_over());
            let alone = set(json!([key])).unwrap_err();
            assert!(matches!(&alone, Error::Empty(_)), "{key}: {alone}");
        }
    }

    #[test]
    fn a_set_that_gives_a_secret_away_is_refused_whole() {
        for name in SECRETS {
            let fault = set(json!([sound(), rsa_with(name, json!("AQAB"))])).unwrap_err();
            assert_eq!(fault, Error::Secret { kid: "\"good\"".to_owned(), member: name });
        }
        let symmetric = set(json!([sound(), {"kty": "oct", "k": "c2VjcmV0", "kid": "h"}])).unwrap_err();
        assert!(!symmetric.to_string().contains("c2VjcmV0"), "{symmetric}");
        assert!(matches!(symmetric, Error::Secret { .. }));
    }

    #[test]
    fn what_is_no_set_is_refused() {
        for text in
            ["", "[]", "{}", r#"{"keys":{}}"#, r#"{"keys":[1]}"#, r#"{"keys":[],"keys":[]}"#, "<html>"]
        {
            assert!(matches!(KeySet::from_json(text.as_bytes()), Err(Error::Form(_))), "{text}");
        }
        assert_eq!(set(json!([])).unwrap_err(), Error::Empty(Vec::new()));
        assert_eq!(set(Value::Array(vec![sound(); 65])).unwrap_err(), Error::TooMany(65));
        assert_eq!(KeySet::from_json(&vec![b' '; MAX + 1]).unwrap_err(), Error::Length(MAX + 1));
        let twice = r#"{"keys":[{"kty":"RSA","kty":"EC"}]}"#;
        assert!(KeySet::from_json(twice.as_bytes()).unwrap_err().to_string().contains("stands twice"));
    }
}
