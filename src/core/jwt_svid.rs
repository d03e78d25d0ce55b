//! JWT-SVIDs (JWT-SVID.md): the tokens by which a workload is known where no certificate can be shown.

pub mod validate;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::json;
use time::OffsetDateTime;

use super::key::{self, JwsKey};
use super::lifetime::Lifetime;
use super::refusal::{Reason, Refusal};
use super::spiffe::{SpiffeId, TrustDomain, shortened};

/// How long one is good, unless a policy says otherwise.
pub const LIFETIME: Lifetime = Lifetime::from_secs(300);
/// No policy says more: a token that is stolen is good for whoever has it, and nothing takes it back.
pub const LONGEST: Lifetime = Lifetime::from_secs(3_600);
/// One is what the standard recommends (3.2).
const MAX_AUDIENCES: usize = 16;
/// A SPIFFE ID, or a URL.
const MAX_AUDIENCE: usize = 2_048;
/// All of them together.
const MAX_ALL: usize = 4_096;

/// Whom a token is for: at least one, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audience(Vec<String>);

impl Audience {
    /// Takes what was asked for. The whole trust domain is no audience: everybody in it could go on with the token (3.2).
    pub fn new(asked: Vec<String>, own: &TrustDomain) -> Result<Self, Refusal> {
        let refused = |sentence: String| Err(Refusal::new(Reason::AudienceRefused, sentence));
        if asked.is_empty() {
            return refused("no audience was asked for; name whom the token is for".to_owned());
        }
        if asked.len() > MAX_AUDIENCES || asked.iter().map(String::len).sum::<usize>() > MAX_ALL {
            return refused(format!(
                "more than {MAX_AUDIENCES} audiences or {MAX_ALL} bytes of them were asked for; ask for a token for each"
            ));
        }
        let mut kept: Vec<String> = Vec::new();
        for audience in asked {
            if audience.trim().is_empty()
                || audience.len() > MAX_AUDIENCE
                || audience.contains(char::is_control)
            {
                return refused(format!(
                    "the audience {:?} is empty, longer than {MAX_AUDIENCE} bytes, or has control characters",
                    shortened(&audience)
                ));
            }
            if audience.trim_end_matches('/') == own.id().as_str() {
                return refused(format!(
                    "the audience {audience:?} is the whole trust domain; name the one service that the token is for"
                ));
            }
            if !kept.contains(&audience) {
                kept.push(audience);
            }
        }
        Ok(Self(kept))
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// What a token says.
#[derive(Clone, Copy, Debug)]
pub struct Claims<'a> {
    /// Whose it is.
    pub id: &'a SpiffeId,
    /// Whom it is for.
    pub audience: &'a Audience,
    /// When it is issued.
    pub now: OffsetDateTime,
    /// How long it is good.
    pub lifetime: Lifetime,
    /// Its own name, for logs on both sides.
    pub jti: &'a str,
}

impl Claims<'_> {
    /// The first second at which it is not good any more.
    pub fn expires(&self) -> OffsetDateTime {
        let whole = self.now.replace_nanosecond(0).unwrap_or(self.now);
        whole + Duration::from_secs(self.lifetime.duration().as_secs())
    }
}

/// Signs a token, in the compact form (2.2: no header but these three).
pub fn token(key: &JwsKey, kid: &str, claims: &Claims<'_>) -> Result<String, key::Error> {
    let header = json!({"alg": "ES256", "kid": kid, "typ": "JWT"});
    let payload = json!({
        "aud": claims.audience.0,
        "exp": claims.expires().unix_timestamp(),
        "iat": claims.now.unix_timestamp(),
        "jti": claims.jti,
        "sub": claims.id.as_str(),
    });
    let message = format!("{}.{}", encoded(header.to_string()), encoded(payload.to_string()));
    let signature = key.sign(message.as_bytes())?;
    Ok(format!("{message}.{}", encoded(signature)))
}

/// Base64url without padding, as JOSE has it.
pub(super) fn encoded(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A token's name, of random bytes.
pub fn jti(random: [u8; 16]) -> String {
    encoded(random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn audiences_are_bounded_and_name_no_whole_trust_domain() {
        let own = TrustDomain::parse("cluster.local").unwrap();
        let of = |asked: &[&str]| Audience::new(asked.iter().map(|one| (*one).to_owned()).collect(), &own);
        assert_eq!(of(&["a", "b", "a"]).unwrap().count(), 2);
        let other = ["spiffe://cluster.local/ns/a/sa/b", "spiffe://example.org"];
        assert_eq!(of(&other).unwrap().count(), 2);
        for bad in [
            &[][..],
            &[""],
            &["a", " "],
            &["a\n"],
            &["spiffe://cluster.local"],
            &["spiffe://cluster.local/"],
            &[&"a".repeat(2_049)],
            &["a"; 17],
            &[&"a".repeat(2_048), &"b".repeat(2_048), "c"],
        ] {
            assert_eq!(of(bad).unwrap_err().reason, Reason::AudienceRefused, "{bad:?}");
        }
    }
}
