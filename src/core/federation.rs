//! Other trust domains: where their bundles come from, and which of two is the newer (SPIFFE_Federation.md).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::published::Published;
use super::spiffe::{SpiffeId, TrustDomain};
use super::url::Url;

/// The longest file that is read.
pub const MAX: usize = 256 * 1024;
/// The longest bundle that is fetched.
pub const MAX_BUNDLE: usize = 1024 * 1024;
/// More trust domains than these are refused.
const MAX_DOMAINS: usize = 256;
/// Without a hint a bundle is fetched this often (4.1),
pub const DEFAULT: Duration = Duration::from_secs(300);
/// and whatever the hint, not more often,
pub const SHORTEST: Duration = Duration::from_secs(10);
/// nor more seldom.
pub const LONGEST: Duration = Duration::from_secs(86_400);

/// Why a file is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not YAML, or not of the shape.
    #[error("{0}")]
    Form(String),
    /// One of the trust domains.
    #[error("trust domain {name:?}: {fault}")]
    Domain {
        /// Which.
        name: String,
        /// What is wrong, and what to do.
        fault: String,
    },
}

/// One that is federated with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Foreign {
    /// Where its bundle is.
    pub url: Url,
    /// How whoever is there is known.
    pub profile: Profile,
}

/// How a bundle endpoint is known (5.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// As any web server.
    Web {
        /// PEM; the system's trust roots if there is none.
        roots: Option<PathBuf>,
    },
    /// By its X509-SVID.
    Spiffe {
        /// Whom that has to name.
        endpoint: SpiffeId,
        /// The first bundle of that one's trust domain: SPIFFE JSON, or PEM.
        bundle: PathBuf,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    trust_domains: BTreeMap<String, Said>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    url: String,
    profile: String,
    #[serde(default)]
    roots: Option<PathBuf>,
    #[serde(default)]
    endpoint: Option<String>,
    #[serde(default)]
    bundle: Option<PathBuf>,
}

/// Reads a file, as `docs/federation.md` has it, for an authority of this trust domain.
pub fn read(text: &[u8], own: &TrustDomain) -> Result<BTreeMap<TrustDomain, Foreign>, Error> {
    let form = |fault: String| Error::Form(fault);
    if text.len() > MAX {
        return Err(form(format!("it has {} bytes, and at most {MAX} are read", text.len())));
    }
    let text = std::str::from_utf8(text).map_err(|_| form("it is not UTF-8 text".to_owned()))?;
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: 16, max_documents: 1, max_aliases: 0, max_anchors: 0 },
        with_snippet: false,
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        merge_keys: serde_saphyr::options::MergeKeyPolicy::Error,
        strict_booleans: true,
        reject_unsupported_tags: true,
    };
    let file: Option<File> = serde_saphyr::from_str_with_options(text, options)
        .map_err(|fault| form(fault.without_snippet().to_string()))?;
    let file = file.ok_or_else(|| form("it is empty; write `trust_domains: {}` for none".to_owned()))?;
    if file.trust_domains.len() > MAX_DOMAINS {
        return Err(form(format!("it names more than {MAX_DOMAINS} trust domains")));
    }
    let domains = file.trust_domains.into_iter().map(|(name, said)| {
        let judged = TrustDomain::parse(&name).map_err(|fault| fault.to_string()).and_then(|domain| {
            if domain == *own {
                return Err("it is this authority's own, whose bundle comes from nowhere else".to_owned());
            }
            Ok((domain, said.judge()?))
        });
        judged.map_err(|fault| Error::Domain { name, fault })
    });
    domains.collect()
}

impl Said {
    fn judge(self) -> Result<Foreign, String> {
        let url: Url = self.url.parse().map_err(|fault: super::url::Error| fault.to_string())?;
        if url.uri().scheme_str() != Some("https") {
            return Err(format!("the url {url} is not https, which a bundle endpoint has to be"));
        }
        let profile = match (&*self.profile, self.roots, self.endpoint, self.bundle) {
            ("https_web", roots, None, None) => Profile::Web { roots },
            ("https_web", ..) => return Err("with https_web there is neither endpoint nor bundle".to_owned()),
            ("https_spiffe", None, Some(endpoint), Some(bundle)) => {
                let endpoint = SpiffeId::parse_workload(&endpoint).map_err(|fault| fault.to_string())?;
                Profile::Spiffe { endpoint, bundle }
            }
            ("https_spiffe", ..) => {
                return Err(
                    "https_spiffe needs endpoint, the SPIFFE ID there, and bundle, a file with the first bundle of that one's trust domain, and takes no roots"
                        .to_owned(),
                );
            }
            _ => return Err("its profile is neither https_web nor https_spiffe".to_owned()),
        };
        Ok(Foreign { url, profile })
    }
}

/// What a fetched bundle is, beside the one that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The newer one.
    Newer,
    /// The same.
    Same,
    /// An older one, or another one with the same number: what is held stays.
    Older,
}

/// Compares two of one trust domain (4.2). Without a number the one that was fetched later is the newer.
pub fn compare(held: Option<&Published>, fetched: &Published) -> Next {
    let Some(held) = held else { return Next::Newer };
    let same = held == fetched;
    match (held.sequence, fetched.sequence) {
        _ if same => Next::Same,
        (Some(held), Some(fetched)) if fetched <= held => Next::Older,
        _ => Next::Newer,
    }
}

/// How long after one look the next one comes.
pub fn refresh(bundle: Option<&Published>) -> Duration {
    let hint = bundle.and_then(|bundle| bundle.refresh_hint).filter(|hint| *hint > 0);
    hint.map_or(DEFAULT, Duration::from_secs).clamp(SHORTEST, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> TrustDomain {
        TrustDomain::parse("cluster.local").unwrap()
    }

    #[test]
    fn a_file_says_where_each_bundle_is_and_how_its_server_is_known() {
        let text = "trust_domains:\n  a.org: {url: 'https://a.org:8443/b', profile: https_web}\n  \
                    b.org:\n    url: https://b.org/\n    profile: https_spiffe\n    \
                    endpoint: spiffe://c.org/mica/bundle-endpoint\n    bundle: c.json\n";
        let read = read(text.as_bytes(), &own()).unwrap();
        let of = |name: &str| read[&TrustDomain::parse(name).unwrap()].clone();
        assert_eq!(of("a.org").profile, Profile::Web { roots: None });
        let Profile::Spiffe { endpoint, bundle } = of("b.org").profile else { panic!("{read:?}") };
        assert_eq!((endpoint.trust_domain().as_str(), bundle), ("c.org", "c.json".into()));
        assert!(self::read(b"trust_domains: {}", &own()).unwrap().is_empty());
    }

    #[test]
    fn what_could_be_misunderstood_is_refused() {
        let of = |domain: &str, said: &str| {
            read(format!("trust_domains: {{{domain}: {{{said}}}}}").as_bytes(), &own())
        };
        of("a.org", "url: 'https://a/', profile: https_web").unwrap();
        for (domain, said) in [
            ("cluster.local", "url: 'https://a/', profile: https_web"),
            ("A.org", "url: 'https://a/', profile: https_web"),
            ("'spiffe://a.org'", "url: 'https://a/', profile: https_web"),
            ("a.org", "url: 'http://a/', profile: https_web"),
            ("a.org", "url: 'http://localhost/', profile: https_web"),
            ("a.org", "url: 'https://u:p@a/', profile: https_web"),
            ("a.org", "url: 'https://a/'"),
            ("a.org", "url: 'https://a/', profile: web"),
            ("a.org", "url: 'https://a/', profile: https_web, bundle: x"),
            ("a.org", "url: 'https://a/', profile: https_spiffe"),
            ("a.org", "url: 'https://a/', profile: https_spiffe, endpoint: 'spiffe://a.org/x'"),
            ("a.org", "url: 'https://a/', profile: https_spiffe, endpoint: 'spiffe://a.org', bundle: x"),
            (
                "a.org",
                "url: 'https://a/', profile: https_spiffe, endpoint: 'spiffe://a.org/x', bundle: x, roots: y",
            ),
            ("a.org", "url: 'https://a/', profile: https_web, other: 1"),
        ] {
            assert!(of(domain, said).is_err(), "{domain} {said}");
        }
        for text in ["", "{}", "a", "trust_domains: {a: &x {url: 'https://a/', profile: https_web}, b: *x}"] {
            assert!(read(text.as_bytes(), &own()).is_err(), "{text}");
        }
        let twice = "trust_domains:\n  a: {url: 'https://a/', profile: https_web}\n  a: {url: 'https://b/', profile: https_web}\n";
        assert!(read(twice.as_bytes(), &own()).is_err());
    }

    #[test]
    fn an_older_number_is_not_taken() {
        let of = |sequence, refresh_hint| Published { sequence, refresh_hint, ..Published::default() };
        for (held, fetched, next) in [
            (None, of(Some(1), None), Next::Newer),
            (Some(of(Some(2), None)), of(Some(1), None), Next::Older),
            (Some(of(Some(2), None)), of(Some(2), Some(1)), Next::Older),
            (Some(of(Some(2), None)), of(Some(2), None), Next::Same),
            (Some(of(Some(2), None)), of(Some(3), None), Next::Newer),
            (Some(of(Some(2), None)), of(None, None), Next::Newer),
            (Some(of(None, None)), of(None, Some(1)), Next::Newer),
        ] {
            assert_eq!(compare(held.as_ref(), &fetched), next, "{held:?} {fetched:?}");
        }
        let hint = |seconds| refresh(Some(&of(None, Some(seconds)))).as_secs();
        assert_eq!(
            (refresh(None).as_secs(), hint(0), hint(1), hint(60), hint(u64::MAX)),
            (300, 300, 10, 60, 86_400)
        );
    }
}
