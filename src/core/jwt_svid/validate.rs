//! Whether a JWT-SVID is one, for somebody (JWT-SVID.md 4): signed by its own trust domain, for that audience, now.

use time::OffsetDateTime;

use crate::core::spiffe::{self, SpiffeId, TrustDomain};
use crate::core::token::jwks::{self, KeySet};
use crate::core::token::{Claims, Fault, Token};

/// Why it is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The token.
    #[error(transparent)]
    Token(#[from] Fault),
    /// Its subject.
    #[error("the token's sub is no SPIFFE ID of a workload: {0}")]
    Subject(#[from] spiffe::Error),
    /// Of a trust domain that nothing is known of.
    #[error("the token is of the trust domain {0}, and there are no keys for JWT-SVIDs of that one here")]
    TrustDomain(TrustDomain),
    /// The keys of its trust domain.
    #[error("the keys of the trust domain {domain} cannot be used: {fault}")]
    Keys {
        /// Which.
        domain: TrustDomain,
        /// What is wrong with them.
        fault: jwks::Error,
    },
}

/// Whose it is, and all that it says. `keys` gives the JWK Set of a trust domain.
pub fn validate<'a>(
    token: &str,
    audience: &str,
    now: OffsetDateTime,
    keys: impl Fn(&TrustDomain) -> Option<&'a str>,
) -> Result<(SpiffeId, Claims), Error> {
    let token = Token::read_svid(token)?;
    let id = SpiffeId::parse_workload(token.claimed_subject()?)?;
    let domain = id.trust_domain();
    let jwks = keys(domain).ok_or_else(|| Error::TrustDomain(domain.clone()))?;
    let keys =
        KeySet::of_svids(jwks.as_bytes()).map_err(|fault| Error::Keys { domain: domain.clone(), fault })?;
    let claims = keys.verify(token)?;
    claims.check(audience, now)?;
    Ok((id, claims))
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
    use serde_json::{Value, json};

    use super::*;
    use crate::core::jwt_svid::encoded;

    const NOW: i64 = 1_800_000_000;

    struct Signer {
        key: EcdsaKeyPair,
        random: SystemRandom,
    }

    impl Signer {
        #[expect(clippy::disallowed_methods, reason = "a key for this test alone")]
        fn new() -> Self {
            let random = SystemRandom::new();
            let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
            let key = EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random).unwrap();
            Self { key, random }
        }

        fn jwk(&self) -> Value {
            let point = self.key.public_key().as_ref();
            let (x, y) = (encoded(&point[1..33]), encoded(&point[33..]));
            json!({"kty": "EC", "crv": "P-256", "kid": "one", "use": "jwt-svid", "x": x, "y": y})
        }

        fn token(&self, header: &Value, claims: &Value) -> String {
            let message = format!("{}.{}", encoded(header.to_string()), encoded(claims.to_string()));
            let signature = self.key.sign(&self.random, message.as_bytes()).unwrap();
            format!("{message}.{}", encoded(signature))
        }
    }

    fn header() -> Value {
        json!({"alg": "ES256", "kid": "one", "typ": "JWT"})
    }

    fn claims() -> Value {
        json!({"sub": "spiffe://example.org/a", "aud": ["b", "c"], "exp": NOW + 300, "more": {"x": [1]}})
    }

    fn with(mut value: Value, name: &str, member: Value) -> Value {
        match member {
            Value::Null => drop(value.as_object_mut().unwrap().remove(name)),
            member => value[name] = member,
        }
        value
    }

    fn judged(signer: &Signer, token: &str, jwk: Value) -> Result<String, String> {
        let jwks = json!({ "keys": [jwk] }).to_string();
        let now = OffsetDateTime::from_unix_timestamp(NOW).unwrap();
        let own = TrustDomain::parse("example.org").unwrap();
        let _ = signer;
        validate(token, "b", now, |domain| (*domain == own).then_some(jwks.as_str()))
            .map(|(id, claims)| format!("{id} {}", claims.members()["more"]))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_sound_one_says_whose_it_is_and_what() {
        let signer = Signer::new();
        for header in [
            header(),
            with(header(), "kid", Value::Null),
            with(header(), "typ", Value::Null),
            with(header(), "typ", json!("JOSE")),
        ] {
            let token = signer.token(&header, &claims());
            let judged = judged(&signer, &token, signer.jwk());
            assert_eq!(judged.unwrap(), "spiffe://example.org/a {\"x\":[1]}", "{header}");
        }
        let one = signer.token(&header(), &with(claims(), "aud", json!("b")));
        assert!(judged(&signer, &one, signer.jwk()).is_ok());
    }

    #[test]
    fn whatever_is_wrong_with_it_is_told() {
        let signer = Signer::new();
        for (name, member, why) in [
            ("alg", json!("HS256"), "algorithm"),
            ("alg", json!("none"), "algorithm"),
            ("alg", json!("EdDSA"), "algorithm"),
            ("alg", json!("es256"), "algorithm"),
            ("alg", json!("RS256"), "is for ES256"),
            ("alg", Value::Null, "no alg"),
            ("kid", json!("two"), "no key"),
            ("kid", json!(1), "not a text"),
            ("typ", json!("jwt"), "typ"),
            ("typ", json!("at+jwt"), "typ"),
            ("typ", json!(1), "typ"),
            ("cty", json!("JWT"), "cty"),
            ("jku", json!("https://example.org"), "jku"),
            ("jwk", signer.jwk(), "jwk"),
            ("x5c", json!([]), "x5c"),
            ("crit", json!(["exp"]), "crit"),
        ] {
            let token = signer.token(&with(header(), name, member.clone()), &claims());
            let fault = judged(&signer, &token, signer.jwk()).unwrap_err();
            assert!(fault.contains(why), "{name} {member}: {fault}");
        }
        for (name, member, why) in [
            ("sub", Value::Null, "no sub"),
            ("sub", json!("a"), "SPIFFE ID"),
            ("sub", json!("spiffe://example.org"), "SPIFFE ID"),
            ("sub", json!("spiffe://example.com/a"), "trust domain example.com"),
            ("sub", json!(["spiffe://example.org/a"]), "sub"),
            ("aud", Value::Null, "no aud"),
            ("aud", json!([]), "aud"),
            ("aud", json!(["c"]), "not for \"b\""),
            ("aud", json!("B"), "not for \"b\""),
            ("aud", json!(["b", 1]), "aud"),
            ("exp", Value::Null, "no exp"),
            ("exp", json!(NOW), "expired"),
            ("exp", json!("1900000000"), "exp"),
            ("nbf", json!(NOW + 61), "not valid before"),
            ("nbf", json!("soon"), "nbf"),
            ("iat", json!(NOW + 61), "issued"),
        ] {
            let token = signer.token(&header(), &with(claims(), name, member.clone()));
            let fault = judged(&signer, &token, signer.jwk()).unwrap_err();
            assert!(fault.contains(why), "{name} {member}: {fault}");
        }
        let token = signer.token(&header(), &claims());
        let foreign = Signer::new();
        assert!(judged(&signer, &token, foreign.jwk()).unwrap_err().contains("signature"));
        for (name, member) in [
            ("use", json!("x509-svid")),
            ("use", json!("sig")),
            ("use", json!("wit-svid")),
            ("use", Value::Null),
            ("kid", Value::Null),
        ] {
            let fault = judged(&signer, &token, with(signer.jwk(), name, member.clone())).unwrap_err();
            assert!(fault.contains("no key"), "{name} {member}: {fault}");
        }
        let json = json!({"payload": "e30", "signatures": []}).to_string();
        assert!(judged(&signer, &json, signer.jwk()).is_err());
        assert!(judged(&signer, "", signer.jwk()).is_err());
    }

    #[test]
    fn a_trust_domain_speaks_for_itself_alone() {
        let (ours, theirs) = (Signer::new(), Signer::new());
        let set = |signer: &Signer| json!({"keys": [signer.jwk()]}).to_string();
        let (our_set, their_set) = (set(&ours), set(&theirs));
        let now = OffsetDateTime::from_unix_timestamp(NOW).unwrap();
        let judged = |signer: &Signer, sub: &str| {
            let token = signer.token(&header(), &with(claims(), "sub", json!(sub)));
            validate(&token, "b", now, |domain| match domain.as_str() {
                "example.org" => Some(our_set.as_str()),
                "example.com" => Some(their_set.as_str()),
                _ => None,
            })
            .map(|(id, _)| id.to_string())
        };
        assert!(judged(&ours, "spiffe://example.org/a").is_ok());
        assert!(judged(&theirs, "spiffe://example.com/a").is_ok());
        // Each has a key of the same name.
        assert_eq!(judged(&theirs, "spiffe://example.org/a"), Err(Error::Token(Fault::Signature)));
        assert_eq!(judged(&ours, "spiffe://example.com/a"), Err(Error::Token(Fault::Signature)));
        assert!(matches!(judged(&ours, "spiffe://example.net/a"), Err(Error::TrustDomain(_))));
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a key for this test alone")]
    fn a_signature_that_would_fit_does_not_save_an_algorithm_that_no_svid_has() {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let key = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
        let header = with(header(), "alg", json!("EdDSA"));
        let message = format!("{}.{}", encoded(header.to_string()), encoded(claims().to_string()));
        let token = format!("{message}.{}", encoded(key.sign(message.as_bytes())));
        let x = encoded(key.public_key().as_ref());
        let jwk = json!({"kty": "OKP", "crv": "Ed25519", "kid": "one", "use": "jwt-svid", "x": x});
        assert!(judged(&Signer::new(), &token, jwk).unwrap_err().contains("EdDSA"));
    }
}
