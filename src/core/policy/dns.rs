//! Which DNS names a policy grants.

use std::fmt;

use crate::core::profile::DnsName;
use crate::core::spiffe::{ServiceAccount, shortened};

/// DNS names by their labels: `*` is any one label, `{namespace}` and `{account}` stand for the caller's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern(String);

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Error {
    #[error(
        "DNS pattern {0:?} is not made of labels of a-z, 0-9, '-', {{namespace}} and {{account}}, with * as a whole label, such as *.{{namespace}}.svc"
    )]
    Labels(String),
    #[error("DNS pattern {0:?} would grant names under any domain; its last label has to be a name")]
    Open(String),
    #[error(
        "DNS pattern {0:?} has two placeholders in one label, so that different accounts could have the same name; put a dot between them"
    )]
    Ambiguous(String),
}

const PLACEHOLDERS: [&str; 2] = ["{namespace}", "{account}"];

impl std::str::FromStr for Pattern {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.split('.').next_back() == Some("*") {
            return Err(Error::Open(shortened(text)));
        }
        // No character could part them that is not allowed in both: a-b/c and a/b-c would be the same.
        if text.split('.').any(|label| label.matches('{').count() > 1) {
            return Err(Error::Ambiguous(shortened(text)));
        }
        // What is left must be a name with the shortest that can stand in the holes.
        let mut filled = text.to_owned();
        for placeholder in PLACEHOLDERS {
            filled = filled.replace(placeholder, "x");
        }
        let filled: Vec<&str> =
            filled.split('.').map(|label| if label == "*" { "x" } else { label }).collect();
        let filled = filled.join(".");
        if filled.bytes().any(|b| b.is_ascii_uppercase()) || filled.parse::<DnsName>().is_err() {
            return Err(Error::Labels(shortened(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Pattern {
    /// Whether it grants a name to an account. Case does not count (RFC 4343).
    pub(super) fn grants(&self, name: &DnsName, account: &ServiceAccount) -> bool {
        let (mut wanted, mut given) = (self.0.split('.'), name.as_str().split('.'));
        loop {
            match (wanted.next(), given.next()) {
                (Some("*"), Some(_)) => {}
                (Some(label), Some(given)) if fits(label, given, account) => {}
                (None, None) => return true,
                _ => return false,
            }
        }
    }
}

/// One label of a pattern against one of a name, so that an account called `web.prod` never reaches into a namespace
/// called `prod`.
fn fits(label: &str, given: &str, account: &ServiceAccount) -> bool {
    let Some(open) = label.find('{') else { return label.eq_ignore_ascii_case(given) };
    let (head, rest) = label.split_at(open);
    let [(namespace, own_namespace), (name, own_name)] =
        [(PLACEHOLDERS[0], account.namespace()), (PLACEHOLDERS[1], account.name())];
    let (own, rest) = match (rest.strip_prefix(namespace), rest.strip_prefix(name)) {
        (Some(rest), _) => (own_namespace, rest),
        (_, Some(rest)) => (own_name, rest),
        // No pattern holds any other brace.
        _ => return false,
    };
    let begins = |text: &str, start: &str| {
        text.get(..start.len()).is_some_and(|text| text.eq_ignore_ascii_case(start))
    };
    begins(given, head)
        && begins(&given[head.len()..], own)
        && fits(rest, &given[head.len() + own.len()..], account)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_grants_label_by_label() {
        let account = ServiceAccount::new("shop", "web").unwrap();
        let dotted = ServiceAccount::new("shop", "web.prod").unwrap();
        #[rustfmt::skip]
        let table: &[(&str, &[&str], &[&str])] = &[
            ("*.{namespace}.svc", &["web.shop.svc", "a-b.shop.svc", "WEB.Shop.SVC"],
             &["shop.svc", ".shop.svc", "a.b.shop.svc", "web.prod.svc", "web.shop.svc.cluster.local", "web.xshop.svc", "svc"]),
            ("{account}.{namespace}.svc", &["web.shop.svc"], &["api.shop.svc", "web.api.svc", "webx.shop.svc"]),
            ("{account}-x.{namespace}.example.org", &["web-x.shop.example.org"], &["web-.shop.example.org", "web.shop.example.org"]),
            ("x{namespace}y.z{account}", &["xshopy.zweb"], &["xshop.zweb", "shopy.zweb", "x"]),
            ("a.example.org", &["a.example.org"], &["b.example.org", "a.example.org.evil.org", "a.example"]),
            ("*.*.{namespace}.svc", &["pod-0.web.shop.svc"], &["web.shop.svc", "a.b.c.shop.svc"]),
            ("localhost", &["localhost"], &["local"]),
        ];
        for (pattern, granted, refused) in table {
            let pattern: Pattern = pattern.parse().unwrap();
            for name in *granted {
                assert!(pattern.grants(&name.parse().unwrap(), &account), "{pattern} {name}");
            }
            for name in *refused {
                let granted = name.parse().is_ok_and(|name| pattern.grants(&name, &account));
                assert!(!granted, "{pattern} {name}");
            }
        }
        let pattern: Pattern = "{account}.svc".parse().unwrap();
        assert!(!pattern.grants(&"web.prod.svc".parse().unwrap(), &dotted));
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for text in ["*", "a.*", "*.*"] {
            assert!(matches!(text.parse::<Pattern>(), Err(Error::Open(_))), "{text:?}");
        }
        for text in
            ["{namespace}-{account}.b", "{account}{namespace}.b", "a.{account}{account}", "{{namespace}}.b"]
        {
            assert!(matches!(text.parse::<Pattern>(), Err(Error::Ambiguous(_))), "{text:?}");
        }
        for text in [
            "",
            ".",
            "a..b",
            "a.b.",
            "*a.b",
            "a*.b",
            "**.b",
            "{name}.b",
            "{namespace.b",
            "namespace}.b",
            "A.b",
            "a b.c",
            "-a.b",
            "a_b.c",
            "ä.b",
            "spiffe://a/b",
        ] {
            assert!(matches!(text.parse::<Pattern>(), Err(Error::Labels(_))), "{text:?}");
        }
    }
}
