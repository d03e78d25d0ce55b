//! SPIFFE IDs and trust domains (SPIFFE-ID.md) and the service accounts that Mica names with them.
//!
//! Nothing is normalised: an input is taken byte for byte or refused, because two spellings of one identity are
//! how identities get impersonated.

use std::fmt;
use std::sync::Arc;

/// The longest trust domain, in bytes (SPIFFE-ID 2.3, the host of RFC 3986).
pub const MAX_TRUST_DOMAIN: usize = 255;
/// The longest SPIFFE ID, in bytes, scheme included (SPIFFE-ID 2.3).
pub const MAX_ID: usize = 2048;

const SCHEME: &str = "spiffe://";

/// Why a text is no SPIFFE ID, trust domain or service account.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// SPIFFE-ID 2.
    #[error("SPIFFE ID {0:?} does not begin with \"spiffe://\" in lower case")]
    Scheme(String),
    /// SPIFFE-ID 2.1.
    #[error("the trust domain is empty; give a name such as cluster.local")]
    EmptyTrustDomain,
    /// SPIFFE-ID 2.3.
    #[error("trust domain of {0} bytes is longer than {MAX_TRUST_DOMAIN}")]
    LongTrustDomain(usize),
    /// SPIFFE-ID 2.1: no upper case, port, user, percent-encoding.
    #[error("trust domain {name:?} holds {found:?}; only a-z, 0-9, '.', '-' and '_' are allowed")]
    TrustDomainCharacter {
        /// The refused name, shortened.
        name: String,
        /// The first character that is not allowed.
        found: char,
    },
    /// SPIFFE-ID 2.3.
    #[error("SPIFFE ID of {0} bytes is longer than {MAX_ID}")]
    LongId(usize),
    /// SPIFFE-ID 2.2: no query, fragment, percent-encoding.
    #[error(
        "the path of SPIFFE ID {id:?} holds {found:?}; only a-z, A-Z, 0-9, '.', '-', '_' and '/' are allowed"
    )]
    PathCharacter {
        /// The refused ID, shortened.
        id: String,
        /// The first character that is not allowed.
        found: char,
    },
    /// SPIFFE-ID 2.2: empty, `.` or `..` segments and a trailing slash.
    #[error(
        "the path of SPIFFE ID {id:?} has the segment {segment:?}; empty, \".\" and \"..\" are not allowed"
    )]
    PathSegment {
        /// The refused ID, shortened.
        id: String,
        /// The refused segment.
        segment: String,
    },
    /// X509-SVID 3.1: a workload has a path.
    #[error(
        "SPIFFE ID {0:?} names a trust domain, not a workload; add a path such as /ns/default/sa/default"
    )]
    NoPath(String),
    /// Kubernetes: a namespace is a DNS label (RFC 1123).
    #[error(
        "namespace {0:?} is no Kubernetes name: 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
    )]
    Namespace(String),
    /// Kubernetes: a service account is a DNS subdomain (RFC 1123).
    #[error(
        "service account {0:?} is no Kubernetes name: 1 to 253 of a-z, 0-9, '-' and '.', each part beginning and ending with a letter or digit"
    )]
    AccountName(String),
}

/// The name of a trust domain: `cluster.local`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Takes a bare name; a `spiffe://` before it is refused here and taken by [`SpiffeId::parse`].
    pub fn parse(name: &str) -> Result<Self, Error> {
        if name.is_empty() {
            return Err(Error::EmptyTrustDomain);
        }
        if let Some(found) = name.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_')) {
            return Err(Error::TrustDomainCharacter { name: shortened(name), found });
        }
        if name.len() > MAX_TRUST_DOMAIN {
            return Err(Error::LongTrustDomain(name.len()));
        }
        Ok(Self(name.into()))
    }

    /// The bare name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it can be a part of the name of an object of Kubernetes.
    pub fn is_dns_subdomain(&self) -> bool {
        is_dns_subdomain(&self.0)
    }

    /// The SPIFFE ID of the trust domain itself, which is what a CA certificate carries (SPIFFE-ID 3.1).
    pub fn id(&self) -> SpiffeId {
        SpiffeId { text: format!("{SCHEME}{}", self.0).into(), trust_domain: self.clone() }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl std::str::FromStr for TrustDomain {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::parse(name)
    }
}

/// A SPIFFE ID: `spiffe://cluster.local/ns/default/sa/web`, or a trust domain's with no path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Arc<str>,
    trust_domain: TrustDomain,
}

impl SpiffeId {
    /// Reads an ID with or without a path.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if text.len() > MAX_ID {
            return Err(Error::LongId(text.len()));
        }
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| Error::Scheme(shortened(text)))?;
        let (domain, path) = match rest.find('/') {
            Some(slash) => (&rest[..slash], &rest[slash..]),
            None => (rest, ""),
        };
        let trust_domain = TrustDomain::parse(domain)?;
        if let Some(found) =
            path.chars().find(|c| !matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_' | '/'))
        {
            return Err(Error::PathCharacter { id: shortened(text), found });
        }
        if let Some(segment) = path.split('/').skip(1).find(|segment| matches!(*segment, "" | "." | "..")) {
            return Err(Error::PathSegment { id: shortened(text), segment: segment.to_owned() });
        }
        Ok(Self { text: text.into(), trust_domain })
    }

    /// Reads the ID of a workload, which has a path (X509-SVID 3.1).
    pub fn parse_workload(text: &str) -> Result<Self, Error> {
        let id = Self::parse(text)?;
        if id.path().is_empty() {
            return Err(Error::NoPath(shortened(text)));
        }
        Ok(id)
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path with its leading slash; empty for a trust domain's own ID.
    pub fn path(&self) -> &str {
        &self.text[SCHEME.len() + self.trust_domain.0.len()..]
    }

    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl std::str::FromStr for SpiffeId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text)
    }
}

/// Whether a namespace of Kubernetes can have a name.
pub fn is_namespace(name: &str) -> bool {
    is_dns_label(name)
}

/// A Kubernetes service account. One allocation, shared by all clones: a running Mica holds each in several maps.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceAccount(Arc<str>);

impl ServiceAccount {
    /// Takes names as Kubernetes would. Both always fit a SPIFFE ID.
    pub fn new(namespace: &str, name: &str) -> Result<Self, Error> {
        if !is_dns_label(namespace) {
            return Err(Error::Namespace(shortened(namespace)));
        }
        if !is_dns_subdomain(name) {
            return Err(Error::AccountName(shortened(name)));
        }
        Ok(Self([namespace, "/", name].concat().into()))
    }

    /// The account that an ID of the form `/ns/<namespace>/sa/<account>` names.
    pub fn of(id: &SpiffeId) -> Option<Self> {
        let (namespace, name) = id.path().strip_prefix("/ns/")?.split_once("/sa/")?;
        Self::new(namespace, name).ok()
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// The account's name within its namespace.
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, name)| name)
    }

    /// `spiffe://<trust domain>/ns/<namespace>/sa/<account>`.
    pub fn spiffe_id(&self, trust_domain: &TrustDomain) -> SpiffeId {
        let text = [SCHEME, trust_domain.as_str(), "/ns/", self.namespace(), "/sa/", self.name()].concat();
        SpiffeId { text: text.into(), trust_domain: trust_domain.clone() }
    }
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Kubernetes lets one part of a subdomain be as long as the whole.
fn is_dns_part(part: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    part.as_bytes().first().is_some_and(alphanumeric)
        && part.as_bytes().last().is_some_and(alphanumeric)
        && part.bytes().all(|b| alphanumeric(&b) || b == b'-')
}

/// What the names of most Kubernetes objects are.
pub fn is_dns_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_part)
}

fn is_dns_label(label: &str) -> bool {
    label.len() <= 63 && is_dns_part(label)
}

/// Error texts show foreign input, so they bound it.
pub(crate) fn shortened(text: &str) -> String {
    const SHOWN: usize = 96;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_in_a_trust_domain_is_judged_by_the_charset() {
        for byte in 0..=255u8 {
            let name = format!("a{}b", char::from(byte));
            let allowed = matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
            assert_eq!(TrustDomain::parse(&name).is_ok(), allowed, "{name:?}");
        }
    }

    #[test]
    fn every_byte_in_a_path_is_judged_by_the_charset() {
        for byte in 0..=255u8 {
            let id = format!("spiffe://td/a{}b", char::from(byte));
            let allowed = byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'/');
            assert_eq!(SpiffeId::parse(&id).is_ok(), allowed, "{id:?}");
        }
    }

    #[test]
    fn an_account_names_its_id_and_back() {
        let domain = TrustDomain::parse("cluster.local").unwrap();
        let account = ServiceAccount::new("default", "web.v1").unwrap();
        let id = account.spiffe_id(&domain);
        assert_eq!(id.as_str(), "spiffe://cluster.local/ns/default/sa/web.v1");
        assert_eq!(id, SpiffeId::parse(id.as_str()).unwrap());
        assert_eq!(ServiceAccount::of(&id), Some(account));
    }

    #[test]
    fn names_that_kubernetes_refuses_are_refused() {
        for namespace in ["", "-a", "a-", "A", "a.b", "a/b", "..", &"a".repeat(64)] {
            assert!(ServiceAccount::new(namespace, "x").is_err(), "{namespace:?}");
        }
        for name in ["", ".", "..", "a..b", "-a", "a-.b", "A", "a/b", "a_b", "ä", &"a".repeat(254)] {
            assert!(ServiceAccount::new("x", name).is_err(), "{name:?}");
        }
        assert!(ServiceAccount::new(&"a".repeat(63), &"a".repeat(253)).is_ok());
    }
}
