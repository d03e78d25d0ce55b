//! The header `x-forwarded-client-cert`, as Envoy writes it: what a proxy says of its client's certificate.

use std::borrow::Cow;

/// Longer ones are refused before they are read.
const MAX: usize = 16 * 1024;
/// What Envoy writes; anything else is not understood, and so not believed.
const KEYS: [&str; 7] = ["By", "Hash", "Cert", "Chain", "Subject", "URI", "DNS"];

/// Why a header is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too long to be read.
    #[error("the x-forwarded-client-cert header of {0} bytes is longer than {MAX}")]
    TooLong(usize),
    /// Several proxies in a row, of which only the last one is known.
    #[error(
        "the x-forwarded-client-cert header has several elements; only one is believed, so set the proxy to SANITIZE_SET"
    )]
    Elements,
    /// Not key=value.
    #[error("the x-forwarded-client-cert header is not of the form Key=value;Key=value")]
    Form,
    /// A key that is not known.
    #[error("the x-forwarded-client-cert header has the key {0:?}, which is unknown")]
    Key(String),
    /// X509-SVID 2: exactly one.
    #[error("the x-forwarded-client-cert header has {0} URIs; a workload has exactly one")]
    Uris(usize),
}

/// The client's URI: the one value of the one element.
pub fn client_uri(header: &str) -> Result<String, Error> {
    if header.len() > MAX {
        return Err(Error::TooLong(header.len()));
    }
    let mut uris = Vec::new();
    let mut rest = header;
    loop {
        let (key, after) = rest.split_once('=').ok_or(Error::Form)?;
        let (value, end, after) = value(after)?;
        let Some(key) = KEYS.iter().find(|known| known.eq_ignore_ascii_case(key.trim())) else {
            return Err(Error::Key(super::spiffe::shortened(key.trim())));
        };
        if *key == "URI" {
            uris.push(value);
        }
        match end {
            None => break,
            Some(',') => return Err(Error::Elements),
            Some(_) => rest = after,
        }
    }
    match &mut uris[..] {
        [uri] => Ok(std::mem::take(uri).into_owned()),
        uris => Err(Error::Uris(uris.len())),
    }
}

/// A value, what ends it (`;`, `,` or nothing), and what follows.
fn value(text: &str) -> Result<(Cow<'_, str>, Option<char>, &str), Error> {
    let (value, rest) = match text.strip_prefix('"') {
        None => {
            let end = text.find([';', ',']).unwrap_or(text.len());
            if text[..end].contains('"') {
                return Err(Error::Form);
            }
            (Cow::Borrowed(&text[..end]), &text[end..])
        }
        Some(quoted) => {
            let mut value = String::new();
            let mut characters = quoted.char_indices();
            let end = loop {
                match characters.next().ok_or(Error::Form)? {
                    (at, '"') => break at + 1,
                    (_, '\\') => value.push(characters.next().ok_or(Error::Form)?.1),
                    (_, other) => value.push(other),
                }
            };
            (Cow::Owned(value), &quoted[end..])
        }
    };
    let mut rest = rest.chars();
    match rest.next() {
        None => Ok((value, None, "")),
        Some(end @ (';' | ',')) => Ok((value, Some(end), rest.as_str())),
        Some(_) => Err(Error::Form),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

    #[test]
    fn what_envoy_writes_is_read() {
        for header in [
            format!("URI={WEB}"),
            format!("By=spiffe://cluster.local/ns/a/sa/gateway;Hash=0123abcd;Subject=\"\";URI={WEB}"),
            format!("Hash=0123;Subject=\"CN=a\\\"b,O=c;URI=x\";URI={WEB};DNS=a.example;DNS=b.example"),
            format!("by=a;uri=\"{WEB}\""),
        ] {
            assert_eq!(client_uri(&header).as_deref(), Ok(WEB), "{header}");
        }
    }

    #[test]
    fn nothing_else_is() {
        let two = format!("URI={WEB},URI={WEB}");
        let later = format!("Hash=0,URI={WEB}");
        let twice = format!("URI={WEB};URI={WEB}");
        let long = format!("Cert=\"{}\";URI={WEB}", "a".repeat(MAX));
        for (header, wanted) in [
            ("", Error::Form),
            (WEB, Error::Form),
            ("URI", Error::Form),
            ("URI=\"spiffe://a", Error::Form),
            ("URI=\"a\"b", Error::Form),
            ("URI=a\"b", Error::Form),
            ("URI=a;", Error::Form),
            ("Hash=0", Error::Uris(0)),
            ("URL=a;URI=b", Error::Key("URL".to_owned())),
            (&two, Error::Elements),
            (&later, Error::Elements),
            (&twice, Error::Uris(2)),
            (&long, Error::TooLong(long.len())),
        ] {
            assert_eq!(client_uri(header), Err(wanted), "{header}");
        }
    }
}
