//! Tokens of an issuer of Mica's own, for trials.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;
use time::OffsetDateTime;

use crate::core::key::{self, IssuerKey, KeyKind, PublicKey};
use crate::core::lifetime::Lifetime;
use crate::core::spiffe::ServiceAccount;

/// The issuer's name; of a top-level domain that nobody can have (RFC 6761 6.4).
pub const ISSUER: &str = "https://trial.mica.invalid";
/// The kind of its key, whose signatures have the one form everywhere.
pub const KEY_KIND: KeyKind = KeyKind::Ed25519;

/// A token for an account, good from now on.
pub fn token(
    key: &dyn IssuerKey,
    account: &ServiceAccount,
    audience: &str,
    now: OffsetDateTime,
    lifetime: Lifetime,
    id: [u8; 16],
) -> Result<String, key::Error> {
    let issued = now.unix_timestamp();
    let header = json!({"alg": "EdDSA", "kid": kid(key.public()), "typ": "JWT"});
    let claims = json!({
        "aud": [audience],
        "exp": issued.saturating_add_unsigned(lifetime.duration().as_secs()),
        "iat": issued,
        "iss": ISSUER,
        "jti": encoded(id),
        "kubernetes.io": {
            "namespace": account.namespace(),
            "serviceaccount": {"name": account.name()},
        },
        "nbf": issued,
        "sub": format!("system:serviceaccount:{}:{}", account.namespace(), account.name()),
    });
    let message = format!("{}.{}", encoded(header.to_string()), encoded(claims.to_string()));
    let signature = key.sign(message.as_bytes())?;
    Ok(format!("{message}.{}", encoded(signature)))
}

/// What verifies them: a JWK Set with the one key.
pub fn jwks(key: &PublicKey) -> String {
    let jwk = json!({
        "kty": "OKP",
        "crv": "Ed25519",
        "alg": "EdDSA",
        "use": "sig",
        "kid": kid(key),
        "x": encoded(key.bits()),
    });
    format!("{:#}\n", json!({ "keys": [jwk] }))
}

fn kid(key: &PublicKey) -> String {
    encoded(key.identifier())
}

fn encoded(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}
