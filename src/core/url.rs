//! Where public keys are fetched from, and spans are sent to.

use core::net::IpAddr;
use std::fmt;
use std::str::FromStr;

use http::Uri;

use super::inspect::one_line;
use super::spiffe::shortened;

/// Why an address is not one that keys are fetched from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a URL.
    #[error("{0:?} is no URL: {1}")]
    Form(String, String),
    /// Whoever is on the way could answer.
    #[error("{0:?} is not https; plain http is taken from this machine alone (127.0.0.1, [::1], localhost)")]
    Plain(String),
    /// A password, or a host that looks like another.
    #[error("{0:?} names a user before the host, which mica never sends; leave that out")]
    User(String),
    /// Parts that no server sees.
    #[error("{0:?} has a fragment; leave what follows the # out")]
    Fragment(String),
}

/// A URL of the scheme https, or http on this machine.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Url {
    text: String,
    uri: Uri,
}

impl Url {
    /// Whether it is on this machine.
    pub fn is_local(&self) -> bool {
        is_local(&self.uri)
    }

    /// As HTTP libraries take it.
    pub fn uri(&self) -> &Uri {
        &self.uri
    }

    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The document that says where an issuer's keys are (OpenID Connect Discovery 1.0, 4.1).
    pub fn discovery(&self) -> Result<Self, Error> {
        format!("{}/.well-known/openid-configuration", self.text.trim_end_matches('/')).parse()
    }
}

impl FromStr for Url {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (uri, is_tls) = parsed(text)?;
        if !is_tls && !is_local(&uri) {
            return Err(Error::Plain(one_line(&shortened(text))));
        }
        Ok(Self { text: text.to_owned(), uri })
    }
}

/// Where spans are sent: a URL of the scheme https, or http on any machine, since they hold no secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Collector(Url);

impl Collector {
    /// `path` is the one that collectors have by default, for a URL that names none.
    pub fn new(text: &str, path: &str) -> Result<Self, Error> {
        let (uri, _) = parsed(text).map_err(|fault| match fault {
            Error::Plain(text) => Error::Form(text, "it begins with neither https:// nor http://".to_owned()),
            fault => fault,
        })?;
        if uri.path() != "/" || uri.query().is_some() {
            return Ok(Self(Url { text: text.to_owned(), uri }));
        }
        let text = format!("{}{path}", text.trim_end_matches('/'));
        let uri =
            text.parse().map_err(|e: http::uri::InvalidUri| Error::Form(text.clone(), e.to_string()))?;
        Ok(Self(Url { text, uri }))
    }

    /// All of it.
    pub fn url(&self) -> &Url {
        &self.0
    }
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// And whether it is https.
fn parsed(text: &str) -> Result<(Uri, bool), Error> {
    let written = || one_line(&shortened(text));
    if text.contains('#') {
        return Err(Error::Fragment(written()));
    }
    let uri: Uri = text.parse().map_err(|e: http::uri::InvalidUri| Error::Form(written(), e.to_string()))?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(Error::Form(written(), "it does not begin with https://".to_owned()));
    };
    if authority.as_str().contains('@') {
        return Err(Error::User(written()));
    }
    if authority.host().is_empty() {
        return Err(Error::Form(written(), "it has no host".to_owned()));
    }
    // The parser passes over what follows the bracket of an address.
    let port = authority.port().map(|port| format!(":{port}")).unwrap_or_default();
    if format!("{}{port}", authority.host()) != authority.as_str() {
        return Err(Error::Form(written(), "its host is neither a name nor an address".to_owned()));
    }
    match scheme {
        "https" => Ok((uri, true)),
        "http" => Ok((uri, false)),
        _ => Err(Error::Plain(written())),
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

fn is_local(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default();
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_this_machine_alone() {
        for (text, local) in [
            ("https://example.org", false),
            ("https://example.org:8443/keys?x=y", false),
            ("https://127.0.0.1/keys", true),
            ("http://127.0.0.1:1/keys", true),
            ("http://127.9.9.9/", true),
            ("http://[::1]:80/keys", true),
            ("http://localhost/keys", true),
            ("HTTP://LOCALHOST/keys", true),
        ] {
            let url: Url = text.parse().unwrap();
            assert_eq!((url.is_local(), url.as_str()), (local, text));
        }
        for text in [
            "http://example.org",
            "http://127.0.0.1.example.org/",
            "http://localhost.example.org/",
            "http://[::2]/",
            "http://[::1].example.org/",
            "http://[::1]example.org:80/",
            "http://0.0.0.0/",
            "http://2130706433/",
            "http://10.0.0.1/",
            "http://169.254.169.254/latest/meta-data",
            "ftp://127.0.0.1/",
            "file:///etc/passwd",
            "unix:///run/x",
        ] {
            assert!(matches!(text.parse::<Url>(), Err(Error::Plain(_) | Error::Form(..))), "{text}");
        }
        for text in ["https://127.0.0.1@example.org/", "http://localhost:80@example.org/", "https://a:b@c/"] {
            assert!(matches!(text.parse::<Url>(), Err(Error::User(_))), "{text}");
        }
        for text in
            ["", "keys.json", "/etc/keys.json", "https://", "https:///x", "https://a b/", "https://a/\n"]
        {
            assert!(text.parse::<Url>().is_err(), "{text:?}");
        }
        assert!(matches!("https://a/#b".parse::<Url>(), Err(Error::Fragment(_))));
    }

    #[test]
    fn a_collector_may_be_anywhere() {
        let url =
            |text: &str| Collector::new(text, "/v1/traces").map(|collector| collector.url().to_string());
        for (text, full) in [
            ("http://otel:4318", "http://otel:4318/v1/traces"),
            ("https://otel/", "https://otel/v1/traces"),
            ("http://10.0.0.1:1/other", "http://10.0.0.1:1/other"),
            ("http://[::1]:1/?a=b", "http://[::1]:1/?a=b"),
        ] {
            assert_eq!(url(text).unwrap(), full);
        }
        for text in ["otel:4318", "grpc://otel", "http://a:b@otel", "http://otel/#a", "http://", ""] {
            assert!(url(text).is_err(), "{text}");
        }
    }

    #[test]
    fn discovery_is_below_the_issuer() {
        for issuer in ["https://example.org/realms/a", "https://example.org/realms/a/"] {
            let url = issuer.parse::<Url>().unwrap().discovery().unwrap();
            assert_eq!(url.as_str(), "https://example.org/realms/a/.well-known/openid-configuration");
        }
    }
}
