//! JWT-SVIDs as those judge them who are shown one (JWT-SVID.md).

use serde_json::Value;
use time::OffsetDateTime;

use super::jwks::{Algorithm, KeySet};
use super::{Fault, Token, json, shown};
use crate::core::spiffe::{SpiffeId, TrustDomain};

/// One that is good.
pub struct JwtSvid {
    /// Whose it is.
    pub id: SpiffeId,
    /// The first second at which it is not good any more.
    pub expires: OffsetDateTime,
    claims: json::Object,
}

impl JwtSvid {
    /// All that it says.
    pub fn claims(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.claims.iter().map(|(name, value)| (name.as_str(), value))
    }
}

impl std::fmt::Debug for JwtSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JWT-SVID of {} until {}", self.id, self.expires)
    }
}

/// Judges one that was shown to this audience: form, algorithm, audience, times, and the signature, with the keys of the
/// trust domain of its subject and of no other. `keys` has them as a JWK Set.
pub fn validate<'k>(
    text: &str,
    audience: &str,
    keys: impl FnOnce(&TrustDomain) -> Option<&'k str>,
    now: OffsetDateTime,
) -> Result<JwtSvid, Fault> {
    let token = Token::read_as(text, judge)?;
    let id = SpiffeId::parse(super::text(&token.claims, "sub", "sub")?.ok_or(Fault::Missing("sub"))?)?;
    let domain = id.trust_domain();
    let set = keys(domain).ok_or_else(|| Fault::TrustDomain(domain.to_string()))?;
    let set = KeySet::of_jwt_svids(set.as_bytes()).map_err(|fault| Fault::Keys(domain.to_string(), fault))?;
    let claims = set.verify(token)?;
    let expires = claims.check(audience, now)?;
    Ok(JwtSvid { id, expires, claims: claims.0 })
}

/// 2: three members and no others, and of their values few.
fn judge(header: &json::Object) -> Result<(), Fault> {
    if let Some(other) = header.keys().find(|name| !["alg", "kid", "typ"].contains(&name.as_str())) {
        return Err(Fault::Header(format!(
            "it has {}, and only alg, kid and typ are allowed",
            super::cut(other)
        )));
    }
    match header.get("typ") {
        None => {}
        Some(Value::String(kind)) if ["JWT", "JOSE"].contains(&kind.as_str()) => {}
        Some(other) => return Err(Fault::Header(format!("its typ is {}, not \"JWT\"", shown(other)))),
    }
    // 2.1 has no EdDSA.
    match header.get("alg") {
        Some(Value::String(name)) if name == Algorithm::EdDSA.as_str() => {
            Err(Fault::Algorithm(shown(&header["alg"])))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use serde_json::json;
    use time::macros::datetime;

    use super::*;
    use crate::core::jwt_svid::{Audience, Claims, token};
    use crate::core::key::{JwsKey, KeyKind};
    use crate::core::published::{JwtAuthority, Published};
    use crate::sys::keys;

    const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);
    const ID: &str = "spiffe://example.org/ns/a/sa/b";

    fn key() -> (JwsKey, String) {
        let key = keys::generate(KeyKind::P256).unwrap();
        let set = Published { jwt: vec![JwtAuthority::es256("k", key.public())], ..Published::default() };
        (key.jws().unwrap(), set.jwks())
    }

    fn made(key: &JwsKey) -> String {
        let id = SpiffeId::parse(ID).unwrap();
        let audience = Audience::new(vec!["one".to_owned(), "two".to_owned()], id.trust_domain()).unwrap();
        let claims =
            Claims { id: &id, audience: &audience, now: NOW, lifetime: "5m".parse().unwrap(), jti: "j" };
        token(key, "k", &claims).unwrap()
    }

    fn signed(key: &JwsKey, header: &Value, claims: &Value) -> String {
        let encoded = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let message =
            format!("{}.{}", encoded(header.to_string().as_bytes()), encoded(claims.to_string().as_bytes()));
        format!("{message}.{}", encoded(&key.sign(message.as_bytes()).unwrap()))
    }

    #[test]
    fn ours_are_good_for_their_audience_until_they_expire() {
        let (key, set) = key();
        let text = made(&key);
        let judge = |audience: &str, at| validate(&text, audience, |_| Some(&*set), at);
        let good = judge("two", NOW + time::Duration::seconds(299)).unwrap();
        assert_eq!((good.id.as_str(), good.expires), (ID, NOW + time::Duration::minutes(5)));
        let names: Vec<_> = good.claims().map(|(name, _)| name).collect();
        assert_eq!(names, ["aud", "exp", "iat", "jti", "sub"]);
        assert!(matches!(judge("three", NOW), Err(Fault::Audience { .. })));
        assert!(matches!(judge("one", NOW + time::Duration::minutes(5)), Err(Fault::Expired(_))));
    }

    #[test]
    fn a_trust_domain_speaks_for_itself_alone() {
        let ((key, set), (_, other)) = (key(), key());
        let text = made(&key);
        let asked = |known: &TrustDomain| {
            assert_eq!(known.as_str(), "example.org");
            Some(&*other)
        };
        assert!(matches!(validate(&text, "one", asked, NOW), Err(Fault::Signature)));
        assert!(matches!(validate(&text, "one", |_| None, NOW), Err(Fault::TrustDomain(_))));
        for bad in
            [set.replace("jwt-svid", "x509-svid"), set.replace("jwt-svid", "sig"), set.replace("kid", "kit")]
        {
            assert!(matches!(validate(&text, "one", |_| Some(&*bad), NOW), Err(Fault::Keys(..))), "{bad}");
        }
    }

    #[test]
    fn headers_and_claims_that_are_not_the_standards_are_refused() {
        let (key, set) = key();
        let header = json!({"alg": "ES256", "kid": "k", "typ": "JWT"});
        let claims = json!({"aud": ["one"], "exp": NOW.unix_timestamp() + 60, "sub": ID});
        let judge = |header: &Value, claims: &Value| {
            validate(&signed(&key, header, claims), "one", |_| Some(&*set), NOW)
        };
        judge(&header, &claims).unwrap();
        for (name, value) in [("typ", json!("JOSE")), ("typ", Value::Null), ("kid", Value::Null)] {
            let mut header = header.clone();
            match value {
                Value::Null => drop(header.as_object_mut().unwrap().remove(name)),
                value => header[name] = value,
            }
            judge(&header, &claims).unwrap();
        }
        for (name, value) in [
            ("typ", json!("at+jwt")),
            ("typ", json!("jwt")),
            ("alg", json!("none")),
            ("alg", json!("HS256")),
            ("alg", json!("EdDSA")),
            ("alg", json!("es256")),
            ("jku", json!("https://example.org/keys")),
            ("crit", json!([])),
            ("cty", json!("JWT")),
        ] {
            let mut header = header.clone();
            header[name] = value.clone();
            assert!(judge(&header, &claims).is_err(), "{name} {value}");
        }
        for (name, value) in [
            ("sub", Value::Null),
            ("sub", json!("web")),
            ("sub", json!("https://example.org")),
            ("aud", Value::Null),
            ("aud", json!([])),
            ("exp", Value::Null),
            ("exp", json!("9999999999")),
            ("nbf", json!(NOW.unix_timestamp() + 120)),
        ] {
            let mut claims = claims.clone();
            match value.clone() {
                Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
                value => claims[name] = value,
            }
            assert!(judge(&header, &claims).is_err(), "{name} {value}");
        }
    }
}
