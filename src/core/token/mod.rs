//! Tokens: JWTs (RFC 7519) in the compact form of a JWS (RFC 7515), and what their claims say.
//!
//! A [`Token`] is taken apart and not believed. A [`KeySet`](jwks::KeySet) makes [`Claims`] of it, once its signature
//! fits, out of the very bytes that were read the first time. A claim that is there and has the wrong form is a refusal,
//! never the same as one that is not there.

pub(super) mod json;
pub mod jwks;
pub mod trial;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;
use time::{Duration, OffsetDateTime};

use super::caller::{Bound, Object};
use super::inspect::one_line;
use super::refusal::{Reason, Refusal};
use super::spiffe::{self, ServiceAccount, shortened};
use jwks::Algorithm;

/// The longest token that is looked at. Those of Kubernetes have about 1,200 bytes.
pub const MAX: usize = 8 * 1024;
/// By how much the issuer's clock may be ahead of ours, for `nbf` and `iat`. `exp` gets nothing: who renews in time never
/// needs it, and every second there is one more for a stolen token.
const LEEWAY: Duration = Duration::seconds(60);

/// Why a token is refused. The caller may hear all of it: it is about the caller's own token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Too long.
    #[error("the token has {0} bytes, and at most {MAX} are looked at")]
    Length(usize),
    /// Not the compact form.
    #[error("the token is no JWT: a JWT has 3 parts between dots, and this has {0}")]
    Parts(usize),
    /// A part of other bytes.
    #[error("the token is no JWT: its {0} is not base64url without padding")]
    Base64(&'static str),
    /// A part that is no sound JSON object.
    #[error("the token's {part} cannot be read: {fault}")]
    Json {
        /// Which.
        part: &'static str,
        /// What is wrong with it.
        fault: String,
    },
    /// A member of the header.
    #[error("the token's header: {0}")]
    Header(String),
    /// An algorithm that is not taken from anyone.
    #[error("the token's algorithm is {0}, and none but {names} are taken", names = Algorithm::names())]
    Algorithm(String),
    /// An algorithm that is not the key's.
    #[error("the token's algorithm is {algorithm}, and the issuer's key {kid:?} is {of}")]
    AlgorithmOfKey {
        /// What the token says.
        algorithm: Algorithm,
        /// Which key.
        kid: String,
        /// What that one is for.
        of: String,
    },
    /// No such key.
    #[error("the issuer has no key {0:?}, which the token says it is signed with")]
    KeyUnknown(String),
    /// Several keys may be meant.
    #[error("the token does not say which key it is signed with, and the issuer has {0} for {1}")]
    KeyUnnamed(usize, Algorithm),
    /// Not signed by the key.
    #[error("the token's signature does not fit the issuer's key")]
    Signature,
    /// A claim of the wrong form.
    #[error("the token's {claim} is {found}, not {wanted}")]
    Claim {
        /// Which.
        claim: &'static str,
        /// What it is.
        found: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A claim that has to be there.
    #[error("the token has no {0}")]
    Missing(&'static str),
    /// For somebody else.
    #[error("the token is for {found}, not for {wanted:?}")]
    Audience {
        /// Whom it is for.
        found: String,
        /// Who is here.
        wanted: String,
    },
    /// No longer good.
    #[error("the token expired at {}", super::lifetime::shown(*.0))]
    Expired(OffsetDateTime),
    /// Not good yet.
    #[error("the token is not valid before {}", super::lifetime::shown(*.0))]
    NotYetValid(OffsetDateTime),
    /// Issued in the future.
    #[error("the token says that it was issued at {}, which is still to come", super::lifetime::shown(*.0))]
    IssuedLater(OffsetDateTime),
    /// Nobody's.
    #[error("the token's sub is {0}, not system:serviceaccount:<namespace>:<name>")]
    Subject(String),
    /// Somebody with an impossible name.
    #[error("the token's sub: {0}")]
    Name(#[from] spiffe::Error),
    /// Two that differ.
    #[error("the token's sub is {sub}, and its kubernetes.io claim is of {claim}")]
    SubjectsDiffer {
        /// One.
        sub: String,
        /// The other.
        claim: String,
    },
}

impl Fault {
    /// The stable reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Length(_)
            | Self::Parts(_)
            | Self::Base64(_)
            | Self::Json { .. }
            | Self::Header(_)
            | Self::Subject(_)
            | Self::Name(_)
            | Self::SubjectsDiffer { .. } => Reason::TokenMalformed,
            Self::Algorithm(_) | Self::AlgorithmOfKey { .. } => Reason::TokenAlgorithm,
            Self::KeyUnknown(_) | Self::KeyUnnamed(..) => Reason::TokenKeyUnknown,
            Self::Signature => Reason::TokenSignature,
            Self::Audience { .. } => Reason::TokenAudience,
            Self::Expired(_) => Reason::TokenExpired,
            Self::NotYetValid(_) | Self::IssuedLater(_) => Reason::TokenNotYetValid,
            Self::Claim { claim, .. } | Self::Missing(claim) => match *claim {
                "iss" => Reason::TokenIssuer,
                "aud" => Reason::TokenAudience,
                "exp" => Reason::TokenExpired,
                _ => Reason::TokenMalformed,
            },
        }
    }
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::new(fault.reason(), fault.to_string())
    }
}

/// A token that was taken apart. Nothing in it is believed.
pub struct Token<'a> {
    algorithm: Algorithm,
    kid: Option<String>,
    /// What is signed: header and claims as they came.
    message: &'a str,
    claims: json::Object,
    signature: Vec<u8>,
}

impl<'a> Token<'a> {
    /// Takes a token apart.
    pub fn read(text: &'a str) -> Result<Self, Fault> {
        Self::apart(text, |header| match header.get("typ") {
            None => Ok(()),
            Some(Value::String(kind)) if ["jwt", "at+jwt"].iter().any(|it| kind.eq_ignore_ascii_case(it)) => {
                Ok(())
            }
            Some(other) => Err(Fault::Header(format!("its typ is {}, not \"JWT\"", shown(other)))),
        })
    }

    /// Takes a JWT-SVID apart, which has fewer algorithms and no other members in its header (JWT-SVID 2).
    pub fn read_svid(text: &'a str) -> Result<Self, Fault> {
        let token = Self::apart(text, |header| {
            if let Some(other) = header.keys().find(|name| !["alg", "kid", "typ"].contains(&name.as_str())) {
                let other = cut(&format!("{other:?}"));
                return Err(Fault::Header(format!(
                    "it has {other}, and a JWT-SVID's has alg, kid and typ alone"
                )));
            }
            match header.get("typ") {
                None => Ok(()),
                Some(Value::String(kind)) if kind == "JWT" || kind == "JOSE" => Ok(()),
                Some(other) => {
                    Err(Fault::Header(format!("its typ is {}, not \"JWT\" or \"JOSE\"", shown(other))))
                }
            }
        })?;
        match token.algorithm {
            Algorithm::EdDSA => Err(Fault::Algorithm("\"EdDSA\", which no JWT-SVID has".to_owned())),
            _ => Ok(token),
        }
    }

    fn apart(text: &'a str, judge: impl Fn(&json::Object) -> Result<(), Fault>) -> Result<Self, Fault> {
        if text.len() > MAX {
            return Err(Fault::Length(text.len()));
        }
        let parts = text.split('.').count();
        let (Some((message, signature)), 3) = (text.rsplit_once('.'), parts) else {
            return Err(Fault::Parts(parts));
        };
        let (header, claims) = message.split_once('.').unwrap_or_default();
        let mut header = object("header", header)?;
        let signature = decoded("signature", signature)?;
        if header.contains_key("crit") {
            let fault = "it has crit, and mica knows none of the extensions that crit could name";
            return Err(Fault::Header(fault.to_owned()));
        }
        judge(&header)?;
        let kid = match header.remove("kid") {
            None => None,
            Some(Value::String(kid)) => Some(kid),
            Some(other) => return Err(Fault::Header(format!("its kid is {}, not a text", shown(&other)))),
        };
        let algorithm = match header.get("alg") {
            None => return Err(Fault::Header("it has no alg".to_owned())),
            Some(value) => {
                value.as_str().and_then(Algorithm::named).ok_or_else(|| Fault::Algorithm(shown(value)))?
            }
        };
        Ok(Self { algorithm, kid, message, claims: object("claims", claims)?, signature })
    }

    /// Whose it is, as it says itself: good for nothing but choosing the keys that it is then verified with.
    pub fn claimed_subject(&self) -> Result<&str, Fault> {
        text(&self.claims, "sub", "sub")?.ok_or(Fault::Missing("sub"))
    }

    /// Of which service account it is, as it says itself: good for nothing but being held against an answer to it.
    pub fn claimed_account(&self) -> Result<ServiceAccount, Fault> {
        account(self.claimed_subject()?)
    }

    /// Who issued it, as it says itself: good for nothing but choosing the keys that it is then verified with.
    pub fn issuer(&self) -> Result<&str, Fault> {
        text(&self.claims, "iss", "iss")?.ok_or(Fault::Missing("iss"))
    }
}

impl std::fmt::Debug for Token<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a {} token", self.algorithm)
    }
}

/// What a token says whose signature fits. Made by [`KeySet::verify`](jwks::KeySet::verify) alone.
pub struct Claims(json::Object);

/// Of whom a service account token is, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Whose it is.
    pub account: ServiceAccount,
    /// What it is bound to.
    pub bound: Bound,
    /// That it is bound to something whose life only the API server can tell: a Secret, or a node without a pod.
    pub bound_elsewhere: Option<&'static str>,
}

impl Claims {
    /// Checks audience and times; says until when it is good.
    pub fn check(&self, audience: &str, now: OffsetDateTime) -> Result<OffsetDateTime, Fault> {
        self.for_audience(audience)?;
        let expires = self.time("exp", f64::floor)?.ok_or(Fault::Missing("exp"))?;
        if now >= expires {
            return Err(Fault::Expired(expires));
        }
        if let Some(begins) = self.time("nbf", f64::ceil)?
            && now + LEEWAY < begins
        {
            return Err(Fault::NotYetValid(begins));
        }
        if let Some(issued) = self.time("iat", f64::floor)?
            && now + LEEWAY < issued
        {
            return Err(Fault::IssuedLater(issued));
        }
        Ok(expires)
    }

    /// All of them.
    pub fn members(&self) -> &serde_json::Map<String, Value> {
        &self.0
    }

    /// `sub`, of any form.
    pub fn subject(&self) -> Result<&str, Fault> {
        text(&self.0, "sub", "sub")?.filter(|sub| !sub.is_empty()).ok_or(Fault::Missing("sub"))
    }

    /// Reads the token as one of a Kubernetes service account.
    pub fn service_account(&self) -> Result<Subject, Fault> {
        let sub = self.subject()?;
        let account = account(sub)?;
        let (namespace, name) = (account.namespace(), account.name());
        let mut subject =
            Subject { account: account.clone(), bound: Bound::default(), bound_elsewhere: None };
        let Some(claim) = self.0.get("kubernetes.io") else { return Ok(subject) };
        let claim = members(claim, "kubernetes.io")?;
        let of = named(claim, "serviceaccount", "kubernetes.io.serviceaccount")?
            .ok_or(Fault::Missing("kubernetes.io.serviceaccount"))?;
        let within = text(claim, "namespace", "kubernetes.io.namespace")?
            .ok_or(Fault::Missing("kubernetes.io.namespace"))?;
        if (within, of.name) != (namespace, name) {
            let claim = cut(&format!("system:serviceaccount:{within}:{}", of.name));
            return Err(Fault::SubjectsDiffer { sub: cut(sub), claim });
        }
        subject.bound.account_uid = of.uid.map(str::to_owned);
        subject.bound.pod = named(claim, "pod", "kubernetes.io.pod")?
            .map(|pod| pod.object().ok_or(Fault::Missing("kubernetes.io.pod.uid")))
            .transpose()?;
        let node = named(claim, "node", "kubernetes.io.node")?;
        // The API server leaves the UID out while it does not know the node: then it proves nothing.
        subject.bound.node = node.as_ref().and_then(Named::object);
        if claim.contains_key("secret") {
            subject.bound_elsewhere = Some("a Secret");
        } else if node.is_some() && subject.bound.pod.is_none() {
            subject.bound_elsewhere = Some("a node");
        }
        Ok(subject)
    }

    fn for_audience(&self, wanted: &str) -> Result<(), Fault> {
        let found = self.0.get("aud").ok_or(Fault::Missing("aud"))?;
        let one = [found.clone()];
        let all = match found {
            Value::String(_) => &one[..],
            Value::Array(all) => all,
            _ => &[],
        };
        if all.is_empty() || !all.iter().all(Value::is_string) {
            let wanted = "a text or a list of texts";
            return Err(Fault::Claim { claim: "aud", found: shown(found), wanted });
        }
        if all.iter().any(|audience| audience == wanted) {
            Ok(())
        } else {
            Err(Fault::Audience { found: shown(found), wanted: wanted.to_owned() })
        }
    }

    /// A NumericDate (RFC 7519 2): seconds since 1970, perhaps with a fraction, not after the year 9999.
    fn time(&self, claim: &'static str, round: fn(f64) -> f64) -> Result<Option<OffsetDateTime>, Fault> {
        let Some(value) = self.0.get(claim) else { return Ok(None) };
        let wanted = "a number of seconds since 1970";
        let refused = || Fault::Claim { claim, found: shown(value), wanted };
        let seconds = match value {
            Value::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(seconds), _) => seconds,
                // `as` keeps to the bounds, which the next line then refuses.
                (None, Some(seconds)) => round(seconds) as i64,
                (None, None) => return Err(refused()),
            },
            _ => return Err(refused()),
        };
        if seconds < 0 {
            return Err(refused());
        }
        OffsetDateTime::from_unix_timestamp(seconds).map(Some).map_err(|_| refused())
    }
}

impl std::fmt::Debug for Claims {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("claims of a token")
    }
}

/// A Kubernetes object as a claim names it.
struct Named<'a> {
    name: &'a str,
    uid: Option<&'a str>,
}

impl Named<'_> {
    fn object(&self) -> Option<Object> {
        Some(Object { name: self.name.to_owned(), uid: self.uid?.to_owned() })
    }
}

fn account(sub: &str) -> Result<ServiceAccount, Fault> {
    let (namespace, name) = sub
        .strip_prefix("system:serviceaccount:")
        .and_then(|names| names.split_once(':'))
        .filter(|(_, name)| !name.contains(':'))
        .ok_or_else(|| Fault::Subject(cut(sub)))?;
    Ok(ServiceAccount::new(namespace, name)?)
}

fn named<'a>(within: &'a json::Object, name: &str, claim: &'static str) -> Result<Option<Named<'a>>, Fault> {
    /// Those of Kubernetes have 36 bytes.
    const LONGEST_UID: usize = 253;
    let Some(value) = within.get(name) else { return Ok(None) };
    let members = members(value, claim)?;
    let name = text(members, "name", claim)?.ok_or(Fault::Missing(claim))?;
    let uid = text(members, "uid", claim)?;
    // A name becomes part of a path when the API server is asked about it.
    if !spiffe::is_dns_subdomain(name) || uid.is_some_and(|uid| !(1..=LONGEST_UID).contains(&uid.len())) {
        let wanted = "an object with a Kubernetes name and a UID of 1 to 253 bytes";
        return Err(Fault::Claim { claim, found: shown(value), wanted });
    }
    Ok(Some(Named { name, uid }))
}

fn members<'a>(value: &'a Value, claim: &'static str) -> Result<&'a json::Object, Fault> {
    value.as_object().ok_or_else(|| Fault::Claim { claim, found: shown(value), wanted: "an object" })
}

fn text<'a>(within: &'a json::Object, name: &str, claim: &'static str) -> Result<Option<&'a str>, Fault> {
    match within.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(Fault::Claim { claim, found: shown(other), wanted: "a text" }),
    }
}

fn object(part: &'static str, text: &str) -> Result<json::Object, Fault> {
    json::object(&decoded(part, text)?).map_err(|fault| Fault::Json { part, fault })
}

fn decoded(part: &'static str, text: &str) -> Result<Vec<u8>, Fault> {
    if text.is_empty() {
        return Err(Fault::Base64(part));
    }
    URL_SAFE_NO_PAD.decode(text).map_err(|_| Fault::Base64(part))
}

/// A foreign value, as JSON in one line of bounded length.
fn shown(value: &Value) -> String {
    cut(&value.to_string())
}

fn cut(text: &str) -> String {
    one_line(&shortened(text))
}

#[cfg(test)]
mod tests;
