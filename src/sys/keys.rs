//! Randomness: keys and serial numbers.

use ring::rand::{SecureRandom as _, SystemRandom};
use ring::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
};

use crate::core::certificate::SerialNumber;
use crate::core::key::{KeyKind, PrivateKey};

/// Why no key was made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// ring makes no RSA keys.
    #[error(
        "mica makes no {0} keys; use p256, p384 or ed25519, or bring an RSA key made with `openssl genpkey`"
    )]
    Rsa(KeyKind),
    /// The system gave no randomness.
    #[error("the operating system gave no randomness")]
    Randomness,
    /// A key that cannot be read back.
    #[error(transparent)]
    Key(#[from] crate::core::key::Error),
}

/// Makes a private key.
pub fn generate(kind: KeyKind) -> Result<PrivateKey, Error> {
    let random = SystemRandom::new();
    let pkcs8 = match kind {
        KeyKind::P256 => EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random),
        KeyKind::P384 => EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, &random),
        KeyKind::Ed25519 => Ed25519KeyPair::generate_pkcs8(&random),
        KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => return Err(Error::Rsa(kind)),
    };
    let pkcs8 = pkcs8.map_err(|_| Error::Randomness)?;
    Ok(PrivateKey::from_generated(kind, pkcs8.as_ref())?)
}

/// Draws a serial number.
pub fn serial_number() -> Result<SerialNumber, Error> {
    random_bytes().map(SerialNumber::from_random)
}

/// Draws bytes, for salts and the like.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| Error::Randomness)?;
    Ok(bytes)
}
