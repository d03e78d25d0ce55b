//! Keys: the kinds that Mica knows, public keys as certificates carry them, private keys as files carry them.
//!
//! The allow-list is [`KeyKind`]; a key of any other kind or size cannot be expressed.

use std::fmt;

use pkcs8::der::Decode as _;
use ring::rand::SystemRandom;
use ring::signature::{
    self, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RsaKeyPair, UnparsedPublicKey, VerificationAlgorithm,
};
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::SubjectPublicKeyInfo;
use zeroize::Zeroizing;

use super::der::{self, Writer};
use super::pem;

/// Why a key cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not on the allow-list.
    #[error("{0} is not allowed; use p256, p384, ed25519, or rsa of 2048, 3072 or 4096 bits")]
    Kind(String),
    /// A modulus that is too small or odd in size.
    #[error("an RSA key of {0} bits is not allowed; use 2048, 3072 or 4096")]
    RsaSize(usize),
    /// A small exponent.
    #[error("an RSA key with the exponent {0} is not allowed; use 65537")]
    RsaExponent(String),
    /// Not a SubjectPublicKeyInfo.
    #[error("the public key is malformed: {0}")]
    Public(&'static str),
    /// Not a private key.
    #[error("the private key is malformed or its parts do not belong together: {0}")]
    Private(String),
    /// A key without its public half, and no certificate to take it from.
    #[error("the private key carries no public key; write it anew with `openssl pkcs8 -topk8 -nocrypt`")]
    NoPublic,
    /// A passphrase is needed.
    #[error("the private key is protected by a passphrase; give it with --passphrase-file")]
    Locked,
    /// A wrong passphrase, or an unknown encryption.
    #[error(
        "the private key cannot be decrypted: the passphrase is wrong or its encryption is not PBES2 ({0})"
    )]
    Unlock(String),
    /// Old OpenSSL encryption.
    #[error(
        "the private key is protected in OpenSSL's old way (DEK-Info), which is weak; convert it with `openssl pkcs8 -topk8`"
    )]
    OldEncryption,
    /// The text holds no key or several.
    #[error("expected one private key, found {0}")]
    Count(usize),
    /// The text is no PEM.
    #[error(transparent)]
    Pem(#[from] pem::Error),
    /// The key would not sign.
    #[error("signing failed: {0}")]
    Sign(String),
}

/// The kinds of keys that Mica signs with and signs for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeyKind {
    /// ECDSA on NIST P-256: the default.
    P256,
    /// ECDSA on NIST P-384.
    P384,
    /// Ed25519 (RFC 8410).
    Ed25519,
    /// RSA, 2048 bits; brought by users, never made here.
    Rsa2048,
    /// RSA, 3072 bits.
    Rsa3072,
    /// RSA, 4096 bits.
    Rsa4096,
}

impl KeyKind {
    /// The name in flags and reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::P256 => "p256",
            Self::P384 => "p384",
            Self::Ed25519 => "ed25519",
            Self::Rsa2048 => "rsa2048",
            Self::Rsa3072 => "rsa3072",
            Self::Rsa4096 => "rsa4096",
        }
    }

    /// The AlgorithmIdentifier of the signatures that a key of this kind makes on certificates (RFC 5758, RFC 8410,
    /// RFC 4055).
    pub fn signature_algorithm(self) -> &'static [u8] {
        match self {
            Self::P256 => ECDSA_SHA256,
            Self::P384 => ECDSA_SHA384,
            Self::Ed25519 => ED25519,
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => RSA_SHA256,
        }
    }

    /// The start of the SubjectPublicKeyInfo of a kind whose length never varies, up to the key's own bytes.
    fn fixed_spki(self) -> Option<(&'static [u8], usize)> {
        match self {
            Self::P256 => Some((P256_SPKI, 65)),
            Self::P384 => Some((P384_SPKI, 97)),
            Self::Ed25519 => Some((ED25519_SPKI, 32)),
            Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096 => None,
        }
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A public key that is on the allow-list.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicKey {
    kind: KeyKind,
    spki: Vec<u8>,
}

impl PublicKey {
    /// Reads a whole SubjectPublicKeyInfo (RFC 5280 4.1.2.7), which is kept byte for byte.
    pub fn from_spki(spki: &[u8]) -> Result<Self, Error> {
        for kind in [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519] {
            let Some((prefix, length)) = kind.fixed_spki() else { continue };
            if let Some(key) = spki.strip_prefix(prefix) {
                if key.len() != length {
                    return Err(Error::Public("its length does not fit its curve"));
                }
                if kind != KeyKind::Ed25519 && key[0] != 4 {
                    return Err(Error::Public("the point is not in uncompressed form"));
                }
                return Ok(Self { kind, spki: spki.to_owned() });
            }
        }
        let (rest, parsed) =
            SubjectPublicKeyInfo::from_der(spki).map_err(|_| Error::Public("not a SubjectPublicKeyInfo"))?;
        if !rest.is_empty() {
            return Err(Error::Public("bytes follow it"));
        }
        if parsed.algorithm.algorithm.as_bytes() != RSA_ENCRYPTION {
            return Err(Error::Kind(algorithm_name(&parsed)));
        }
        if canonical_rsa(&parsed.subject_public_key.data) != spki {
            return Err(Error::Public("not in the one form that RFC 3279 2.3.1 gives RSA keys"));
        }
        let (rest, rsa) = x509_parser::public_key::RSAPublicKey::from_der(&parsed.subject_public_key.data)
            .map_err(|_| Error::Public("not an RSAPublicKey"))?;
        if !rest.is_empty() {
            return Err(Error::Public("bytes follow the RSAPublicKey"));
        }
        if rsa.modulus.first().is_some_and(|first| first & 0x80 != 0) {
            return Err(Error::Public("its modulus is a negative number"));
        }
        Ok(Self { kind: rsa_kind(rsa.modulus, rsa.exponent)?, spki: spki.to_owned() })
    }

    /// From the bytes of an uncompressed point or an Ed25519 key.
    fn from_fixed(kind: KeyKind, key: &[u8]) -> Result<Self, Error> {
        let (prefix, length) = kind.fixed_spki().ok_or(Error::Public("not of a fixed length"))?;
        if key.len() != length {
            return Err(Error::Public("its length does not fit its curve"));
        }
        Ok(Self { kind, spki: [prefix, key].concat() })
    }

    fn from_rsa(public: &[u8]) -> Result<Self, Error> {
        Self::from_spki(&canonical_rsa(public))
    }

    /// Its kind.
    pub fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The SubjectPublicKeyInfo.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// The contents of the BIT STRING: a point, an Ed25519 key, or an RSAPublicKey.
    pub fn bits(&self) -> &[u8] {
        match self.kind.fixed_spki() {
            Some((prefix, _)) => &self.spki[prefix.len()..],
            // Checked when it was read.
            None => SubjectPublicKeyInfo::from_der(&self.spki)
                .map(|(_, spki)| {
                    let at = self.spki.len() - spki.subject_public_key.data.len();
                    &self.spki[at..]
                })
                .unwrap_or_default(),
        }
    }

    /// The key identifier: the leftmost 160 bits of the SHA-256 of the key's bits (RFC 7093 2, method 1).
    pub fn identifier(&self) -> [u8; 20] {
        let digest = ring::digest::digest(&ring::digest::SHA256, self.bits());
        let mut identifier = [0; 20];
        identifier.copy_from_slice(&digest.as_ref()[..20]);
        identifier
    }

    /// Checks a signature made with the algorithm that `algorithm` (a whole AlgorithmIdentifier) names, which has to
    /// be on the allow-list and fit the key.
    pub fn verify(&self, algorithm: &[u8], message: &[u8], signature: &[u8]) -> Result<(), SignatureFault> {
        use KeyKind::{Ed25519, P256, P384, Rsa2048, Rsa3072, Rsa4096};
        let verification: &dyn VerificationAlgorithm = match (self.kind, algorithm) {
            (P256, ECDSA_SHA256) => &signature::ECDSA_P256_SHA256_ASN1,
            (P256, ECDSA_SHA384) => &signature::ECDSA_P256_SHA384_ASN1,
            (P384, ECDSA_SHA256) => &signature::ECDSA_P384_SHA256_ASN1,
            (P384, ECDSA_SHA384) => &signature::ECDSA_P384_SHA384_ASN1,
            (Ed25519, ED25519) => &signature::ED25519,
            (Rsa2048 | Rsa3072 | Rsa4096, RSA_SHA256) => &signature::RSA_PKCS1_2048_8192_SHA256,
            (Rsa2048 | Rsa3072 | Rsa4096, RSA_SHA384) => &signature::RSA_PKCS1_2048_8192_SHA384,
            (Rsa2048 | Rsa3072 | Rsa4096, RSA_SHA512) => &signature::RSA_PKCS1_2048_8192_SHA512,
            _ => return Err(SignatureFault::Algorithm),
        };
        UnparsedPublicKey::new(verification, self.bits())
            .verify(message, signature)
            .map_err(|_| SignatureFault::Wrong)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} key", self.kind)
    }
}

/// Why a signature does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignatureFault {
    /// Its algorithm is not on the allow-list, or not one for this key.
    Algorithm,
    /// It was not made with this key over this message.
    Wrong,
}

/// A private key as data: its PKCS#8, wiped when dropped. [`SigningKey`] is one that can sign; making one costs as
/// much as a signature, which a leaf's key never needs.
pub struct PrivateKey {
    public: PublicKey,
    pkcs8: Zeroizing<Vec<u8>>,
}

impl PrivateKey {
    /// Takes the PKCS#8 that ring makes, whose layout is fixed, without proving it again.
    pub fn from_generated(kind: KeyKind, pkcs8: &[u8]) -> Result<Self, Error> {
        let malformed = || Error::Private("not as ring makes it".to_owned());
        let (public_at, pkcs8) = match kind {
            KeyKind::P256 | KeyKind::P384 => {
                let length = if kind == KeyKind::P256 { 65 } else { 97 };
                (pkcs8.len().checked_sub(length), Zeroizing::new(pkcs8.to_owned()))
            }
            // ring writes PKCS#8 version 2, which OpenSSL before 3.4 cannot read, and puts the public key last.
            KeyKind::Ed25519 => {
                let seed = pkcs8.get(16..48).ok_or_else(malformed)?;
                return Self::ed25519(seed, pkcs8.get(pkcs8.len() - 32..).ok_or_else(malformed)?);
            }
            KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => return Err(malformed()),
        };
        let public = pkcs8.get(public_at.ok_or_else(malformed)?..).ok_or_else(malformed)?;
        Ok(Self { public: PublicKey::from_fixed(kind, public)?, pkcs8 })
    }

    /// Reads the one private key of a PEM text: PKCS#8 (also encrypted, PBES2), PKCS#1 or SEC1. `public` stands in
    /// for the public half where an EC key lacks it, and has to fit.
    pub fn from_pem(
        text: &[u8],
        passphrase: Option<&[u8]>,
        public: Option<&PublicKey>,
    ) -> Result<Self, Error> {
        let blocks = pem::blocks(text)?;
        let keys: Vec<_> = blocks.iter().filter(|block| block.label.ends_with("PRIVATE KEY")).collect();
        let [block] = keys[..] else {
            return Err(Error::Count(keys.len()));
        };
        if block.headers {
            return Err(Error::OldEncryption);
        }
        match block.label.as_str() {
            pem::PRIVATE_KEY => Self::from_pkcs8(&block.der, public),
            "EC PRIVATE KEY" => Self::from_sec1(&block.der, None, public),
            "RSA PRIVATE KEY" => Self::from_pkcs1(&block.der),
            pem::ENCRYPTED_PRIVATE_KEY => {
                let passphrase = passphrase.ok_or(Error::Locked)?;
                let locked = pkcs8::EncryptedPrivateKeyInfoRef::from_der(&block.der)
                    .map_err(|e| Error::Unlock(e.to_string()))?;
                let opened = locked.decrypt(passphrase).map_err(|e| Error::Unlock(e.to_string()))?;
                Self::from_pkcs8(opened.as_bytes(), public)
            }
            other => Err(Error::Kind(format!("a {other}"))),
        }
    }

    /// Reads PKCS#8 (RFC 5958).
    pub fn from_pkcs8(der: &[u8], public: Option<&PublicKey>) -> Result<Self, Error> {
        let info = pkcs8::PrivateKeyInfoRef::from_der(der).map_err(|e| Error::Private(e.to_string()))?;
        let key = info.private_key.as_bytes();
        match info.algorithm.oid.to_string().as_str() {
            "1.2.840.10045.2.1" => {
                let curve = info
                    .algorithm
                    .parameters
                    .and_then(|any| any.decode_as::<pkcs8::ObjectIdentifier>().ok())
                    .ok_or_else(|| Error::Kind("an EC key without a named curve".to_owned()))?;
                Self::from_sec1(key, Some(ec_kind(&curve.to_string())?), public)
            }
            "1.3.101.112" => {
                let seed = key
                    .strip_prefix(&[der::OCTET_STRING, 32])
                    .ok_or_else(|| Error::Private("not an Ed25519 seed".to_owned()))?;
                let pair = Ed25519KeyPair::from_seed_unchecked(seed).map_err(rejected)?;
                Self::ed25519(seed, pair.public_key().as_ref())
            }
            "1.2.840.113549.1.1.1" => Self::from_pkcs1(key),
            other => Err(Error::Kind(format!("a private key of the algorithm {other}"))),
        }
    }

    fn from_pkcs1(der: &[u8]) -> Result<Self, Error> {
        let (_, private) = x509_parser::der_parser::ber::parse_ber_sequence(der)
            .map_err(|_| Error::Private("not an RSAPrivateKey".to_owned()))?;
        // ring would only say that it is too small; a user should hear the number.
        if let Some(Ok(modulus)) = private.as_sequence().ok().and_then(|s| s.get(1)).map(|m| m.as_slice()) {
            rsa_bits(modulus)?;
        }
        let pair = RsaKeyPair::from_der(der).map_err(rejected)?;
        let public = PublicKey::from_rsa(pair.public_key().as_ref())?;
        let mut pkcs8 = Writer::with_capacity(der.len() + 32);
        pkcs8.sequence(|w| {
            w.unsigned(0);
            w.raw(RSA_ALGORITHM);
            w.primitive(der::OCTET_STRING, der);
        });
        Ok(Self { public, pkcs8: Zeroizing::new(pkcs8.finish()) })
    }

    /// SEC1 (RFC 5915); the curve is in it or given by the PKCS#8 around it.
    fn from_sec1(der: &[u8], curve: Option<KeyKind>, public: Option<&PublicKey>) -> Result<Self, Error> {
        let malformed = |_| Error::Private("not an ECPrivateKey".to_owned());
        let key = pkcs8_sec1::EcPrivateKey::from_der(der).map_err(malformed)?;
        let kind = match (curve, key.curve) {
            (Some(kind), _) => kind,
            (None, Some(curve)) => ec_kind(&curve.to_string())?,
            (None, None) => return Err(Error::Kind("an EC key without a named curve".to_owned())),
        };
        let point = match (key.public, public) {
            (Some(point), _) => point,
            (None, Some(public)) if public.kind() == kind => public.bits(),
            (None, Some(_)) => {
                return Err(Error::Private("it is of another kind than the certificate's".to_owned()));
            }
            (None, None) => return Err(Error::NoPublic),
        };
        let algorithm = ecdsa(kind)?;
        EcdsaKeyPair::from_private_key_and_public_key(algorithm, key.scalar, point, &nonces())
            .map_err(rejected)?;
        let public = PublicKey::from_fixed(kind, point)?;
        let spki_algorithm = if kind == KeyKind::P256 { P256_ALGORITHM } else { P384_ALGORITHM };
        let mut sec1 = Writer::with_capacity(160);
        sec1.sequence(|w| {
            w.unsigned(1);
            w.primitive(der::OCTET_STRING, key.scalar);
            w.nested(der::explicit(1), |w| w.bits(point));
        });
        let sec1 = Zeroizing::new(sec1.finish());
        let mut pkcs8 = Writer::with_capacity(256);
        pkcs8.sequence(|w| {
            w.unsigned(0);
            w.raw(spki_algorithm);
            w.primitive(der::OCTET_STRING, &sec1);
        });
        Ok(Self { public, pkcs8: Zeroizing::new(pkcs8.finish()) })
    }

    fn ed25519(seed: &[u8], public: &[u8]) -> Result<Self, Error> {
        let mut pkcs8 = Writer::with_capacity(48);
        pkcs8.sequence(|w| {
            w.unsigned(0);
            w.raw(ED25519);
            w.nested(der::OCTET_STRING, |w| w.primitive(der::OCTET_STRING, seed));
        });
        Ok(Self {
            public: PublicKey::from_fixed(KeyKind::Ed25519, public)?,
            pkcs8: Zeroizing::new(pkcs8.finish()),
        })
    }

    /// The public half.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// PKCS#8.
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// PKCS#8 as PEM.
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(pem::encode(pem::PRIVATE_KEY, &self.pkcs8))
    }

    /// PKCS#8 as PEM, encrypted with AES-256-CBC under PBKDF2 of HMAC-SHA-256 (PBES2, RFC 8018).
    pub fn to_encrypted_pem(&self, passphrase: &[u8], salt: [u8; 16], iv: [u8; 16]) -> Result<String, Error> {
        /// OWASP's recommendation for PBKDF2-HMAC-SHA-256 as of 2023.
        const ROUNDS: u32 = 600_000;
        let failed = |e: &dyn fmt::Display| Error::Private(e.to_string());
        let parameters = pkcs8::pkcs5::pbes2::Parameters::generate_pbkdf2_sha256_aes256cbc(ROUNDS, &salt, iv)
            .map_err(|e| failed(&e))?;
        let info = pkcs8::PrivateKeyInfoRef::from_der(&self.pkcs8).map_err(|e| failed(&e))?;
        let locked = info.encrypt_with_params(parameters, passphrase).map_err(|e| failed(&e))?;
        Ok(pem::encode(pem::ENCRYPTED_PRIVATE_KEY, locked.as_bytes()))
    }

    /// A key that signs, after ring has proved that its halves belong together.
    pub fn signing(&self) -> Result<SigningKey, Error> {
        let pair = match self.public.kind {
            KeyKind::P256 | KeyKind::P384 => Pair::Ecdsa(
                EcdsaKeyPair::from_pkcs8(ecdsa(self.public.kind)?, &self.pkcs8, &nonces())
                    .map_err(rejected)?,
            ),
            KeyKind::Ed25519 => {
                Pair::Ed25519(Ed25519KeyPair::from_pkcs8_maybe_unchecked(&self.pkcs8).map_err(rejected)?)
            }
            KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => {
                Pair::Rsa(Box::new(RsaKeyPair::from_pkcs8(&self.pkcs8).map_err(rejected)?))
            }
        };
        Ok(SigningKey { public: self.public.clone(), pair })
    }

    /// A key that signs as JWS wants it (ES256, RFC 7518 3.4). Of P-256 alone.
    pub fn jws(&self) -> Result<JwsKey, Error> {
        if self.public.kind != KeyKind::P256 {
            return Err(Error::Kind(format!("a {} key for ES256", self.public.kind)));
        }
        let algorithm = &signature::ECDSA_P256_SHA256_FIXED_SIGNING;
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, &self.pkcs8, &nonces()).map_err(rejected)?;
        Ok(JwsKey(pair))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "private {:?}", self.public)
    }
}

/// A P-256 key in memory that signs tokens: two numbers of 32 bytes, not DER.
pub struct JwsKey(EcdsaKeyPair);

impl JwsKey {
    /// Signs a message.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let signature = self.0.sign(&nonces(), message);
        Ok(signature.map_err(|_| Error::Sign("ring refused".to_owned()))?.as_ref().to_owned())
    }
}

impl fmt::Debug for JwsKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("signing p256 key for tokens")
    }
}

/// What an issuer signs with: a key in memory, or later one in a token that only signs.
pub trait IssuerKey: Send + Sync {
    /// Its public half, whose kind also says how it signs ([`KeyKind::signature_algorithm`]).
    fn public(&self) -> &PublicKey;
    /// Signs a message. May be slow.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error>;
}

/// A private key in memory that is ready to sign.
pub struct SigningKey {
    public: PublicKey,
    pair: Pair,
}

enum Pair {
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Rsa(Box<RsaKeyPair>),
}

impl IssuerKey for SigningKey {
    fn public(&self) -> &PublicKey {
        &self.public
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let failed = |_| Error::Sign("ring refused".to_owned());
        match &self.pair {
            Pair::Ecdsa(pair) => Ok(pair.sign(&nonces(), message).map_err(failed)?.as_ref().to_owned()),
            Pair::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_owned()),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(&signature::RSA_PKCS1_SHA256, &nonces(), message, &mut signature)
                    .map_err(failed)?;
                Ok(signature)
            }
        }
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "signing {:?}", self.public)
    }
}

impl rcgen::PublicKeyData for SigningKey {
    fn der_bytes(&self) -> &[u8] {
        self.public.bits()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        match self.public.kind {
            KeyKind::P256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            KeyKind::P384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            KeyKind::Ed25519 => &rcgen::PKCS_ED25519,
            KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

impl rcgen::SigningKey for SigningKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        IssuerKey::sign(self, message).map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

/// ring draws the nonce of each signature itself and insists on being handed this.
#[expect(clippy::disallowed_methods, reason = "no decision depends on it, and ring takes nothing else")]
fn nonces() -> SystemRandom {
    SystemRandom::new()
}

fn ecdsa(kind: KeyKind) -> Result<&'static signature::EcdsaSigningAlgorithm, Error> {
    match kind {
        KeyKind::P256 => Ok(&signature::ECDSA_P256_SHA256_ASN1_SIGNING),
        KeyKind::P384 => Ok(&signature::ECDSA_P384_SHA384_ASN1_SIGNING),
        other => Err(Error::Kind(other.to_string())),
    }
}

fn ec_kind(curve: &str) -> Result<KeyKind, Error> {
    match curve {
        "1.2.840.10045.3.1.7" => Ok(KeyKind::P256),
        "1.3.132.0.34" => Ok(KeyKind::P384),
        other => Err(Error::Kind(format!("an EC key on the curve {}", curve_name(other)))),
    }
}

fn curve_name(oid: &str) -> &str {
    match oid {
        "1.3.132.0.33" => "P-224",
        "1.3.132.0.35" => "P-521",
        "1.3.132.0.10" => "secp256k1",
        other => other,
    }
}

fn rsa_bits(modulus: &[u8]) -> Result<KeyKind, Error> {
    match bit_length(modulus) {
        2048 => Ok(KeyKind::Rsa2048),
        3072 => Ok(KeyKind::Rsa3072),
        4096 => Ok(KeyKind::Rsa4096),
        other => Err(Error::RsaSize(other)),
    }
}

fn bit_length(big_endian: &[u8]) -> usize {
    let start = big_endian.iter().position(|b| *b != 0).unwrap_or(big_endian.len());
    let digits = &big_endian[start..];
    digits.len() * 8 - digits.first().map_or(0, |b| b.leading_zeros() as usize)
}

fn rsa_kind(modulus: &[u8], exponent: &[u8]) -> Result<KeyKind, Error> {
    let kind = rsa_bits(modulus)?;
    // F4 is what everyone uses; a larger one only slows verification down (peers' certificate CPU exhaustion).
    let exponent = exponent.iter().skip_while(|b| **b == 0).copied().collect::<Vec<_>>();
    if exponent != [1, 0, 1] {
        let shown = match exponent.len() {
            0..=8 => exponent.iter().fold(0u64, |value, b| value << 8 | u64::from(*b)).to_string(),
            length => format!("of {length} bytes"),
        };
        return Err(Error::RsaExponent(shown));
    }
    Ok(kind)
}

fn canonical_rsa(public: &[u8]) -> Vec<u8> {
    let mut spki = Writer::with_capacity(public.len() + 32);
    spki.sequence(|w| {
        w.raw(RSA_ALGORITHM);
        w.bits(public);
    });
    spki.finish()
}

fn rejected(reason: ring::error::KeyRejected) -> Error {
    Error::Private(reason.to_string())
}

/// What to call a key that is not on the allow-list.
pub(crate) fn name_of(spki: &[u8]) -> String {
    let Ok((_, parsed)) = SubjectPublicKeyInfo::from_der(spki) else { return "unreadable".to_owned() };
    let name = match x509_parser::public_key::RSAPublicKey::from_der(&parsed.subject_public_key.data) {
        Ok((_, rsa)) if parsed.algorithm.algorithm.as_bytes() == RSA_ENCRYPTION => {
            format!("rsa, {} bits", bit_length(rsa.modulus))
        }
        _ => algorithm_name(&parsed),
    };
    name.strip_prefix("an ").or_else(|| name.strip_prefix("a ")).unwrap_or(&name).to_owned()
}

fn algorithm_name(spki: &SubjectPublicKeyInfo<'_>) -> String {
    let oid = spki.algorithm.algorithm.to_id_string();
    match oid.as_str() {
        "1.2.840.10045.2.1" => {
            let curve = spki.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
            match curve {
                Some(curve) => format!("an EC key on the curve {}", curve_name(&curve.to_id_string())),
                None => "an EC key without a named curve".to_owned(),
            }
        }
        "1.2.840.113549.1.1.10" => "an RSA-PSS key".to_owned(),
        "1.2.840.10040.4.1" => "a DSA key".to_owned(),
        "1.3.101.113" => "an Ed448 key".to_owned(),
        other => format!("a key of the algorithm {other}"),
    }
}

/// SEC1's ECPrivateKey, which pkcs8 leaves to another crate.
mod pkcs8_sec1 {
    use pkcs8::der::asn1::{BitStringRef, OctetStringRef};
    use pkcs8::der::{self, Decode, Reader as _, SliceReader, TagMode, TagNumber};

    pub(super) struct EcPrivateKey<'a> {
        pub(super) scalar: &'a [u8],
        pub(super) curve: Option<pkcs8::ObjectIdentifier>,
        pub(super) public: Option<&'a [u8]>,
    }

    impl<'a> EcPrivateKey<'a> {
        pub(super) fn from_der(bytes: &'a [u8]) -> Result<Self, der::Error> {
            let mut reader = SliceReader::new(bytes)?;
            let key = reader.sequence(|r: &mut SliceReader<'a>| {
                if u8::decode(r)? != 1 {
                    return Err(der::Error::from(der::ErrorKind::Failed));
                }
                let scalar = <&OctetStringRef>::decode(r)?.as_bytes();
                let curve = r.context_specific(TagNumber(0), TagMode::Explicit)?;
                let public: Option<BitStringRef<'a>> = r.context_specific(TagNumber(1), TagMode::Explicit)?;
                Ok::<_, der::Error>(Self { scalar, curve, public: public.and_then(|bits| bits.as_bytes()) })
            })?;
            reader.finish()?;
            Ok(key)
        }
    }
}

const P256_ALGORITHM: &[u8] = &[
    0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07,
];
const P384_ALGORITHM: &[u8] = &[
    0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00,
    0x22,
];
const P256_SPKI: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const P384_SPKI: &[u8] = &[
    0x30, 0x76, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81,
    0x04, 0x00, 0x22, 0x03, 0x62, 0x00,
];
const ED25519_SPKI: &[u8] = &[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// The contents of the OID rsaEncryption.
const RSA_ENCRYPTION: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01];
const RSA_ALGORITHM: &[u8] =
    &[0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];

const ECDSA_SHA256: &[u8] = &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
const ECDSA_SHA384: &[u8] = &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03];
const ED25519: &[u8] = &[0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70];
const RSA_SHA256: &[u8] =
    &[0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b, 0x05, 0x00];
const RSA_SHA384: &[u8] =
    &[0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0c, 0x05, 0x00];
const RSA_SHA512: &[u8] =
    &[0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0d, 0x05, 0x00];
