//! PEM (RFC 7468): text blocks around DER. Text between blocks is passed over, as OpenSSL does; a block that is
//! broken is an error and never skipped, since a bundle that silently loses a root is worse than none.

use std::io::BufRead as _;
use std::ops::Deref;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

/// Longer input is refused before it is looked at.
pub const MAX: usize = 4 * 1024 * 1024;
/// What the longest key takes as base64.
const LONGEST_KEY: usize = 4 * 1024;

/// The label of a certificate.
pub const CERTIFICATE: &str = "CERTIFICATE";
/// The label of a CSR.
pub const CSR: &str = "CERTIFICATE REQUEST";
/// The label of a PKCS#8 key.
pub const PRIVATE_KEY: &str = "PRIVATE KEY";
/// The label of an encrypted PKCS#8 key.
pub const ENCRYPTED_PRIVATE_KEY: &str = "ENCRYPTED PRIVATE KEY";

/// Why a text is no PEM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too long to be looked at.
    #[error("input of {0} bytes is longer than {MAX}")]
    TooLong(usize),
    /// Nothing in it.
    #[error("no PEM block found; expected a line \"-----BEGIN {0}-----\"")]
    Empty(&'static str),
    /// A block without its end.
    #[error("the {label} block that begins at line {line} has no end; the file may be cut off")]
    NoEnd {
        /// What the block says it is.
        label: String,
        /// Where it begins, from 1.
        line: usize,
    },
    /// An end that does not match.
    #[error("the {label} block that begins at line {line} ends as another kind, at line {end}")]
    OtherEnd {
        /// What the block says it is.
        label: String,
        /// Where it begins, from 1.
        line: usize,
        /// Where the wrong end stands, from 1.
        end: usize,
    },
    /// Contents that are no base64.
    #[error("the {label} block that begins at line {line} is not base64")]
    NotBase64 {
        /// What the block says it is.
        label: String,
        /// Where it begins, from 1.
        line: usize,
    },
}

/// One PEM block.
#[derive(Clone, PartialEq, Eq)]
pub struct Block {
    /// What stands behind BEGIN.
    pub label: String,
    /// The contents.
    pub der: Contents,
    /// Where it begins, from 1.
    pub line: usize,
    /// RFC 1421 headers such as `DEK-Info`, which old OpenSSL keys carry when a passphrase protects them.
    pub headers: bool,
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at line {}, {} bytes", self.label, self.line, self.der.len())
    }
}

/// What a block holds. A private key is wiped; to wipe what need not be takes as long as to read it.
#[derive(Clone, PartialEq, Eq)]
pub enum Contents {
    /// A private key, or something else that has it in its label.
    Secret(Zeroizing<Vec<u8>>),
    /// Anything else.
    Public(Vec<u8>),
}

impl Contents {
    fn of(label: &str, bytes: Vec<u8>) -> Self {
        if label.contains("PRIVATE") { Self::Secret(Zeroizing::new(bytes)) } else { Self::Public(bytes) }
    }

    fn add(&mut self, more: &[u8]) {
        match self {
            Self::Secret(bytes) => bytes.extend_from_slice(more),
            Self::Public(bytes) => bytes.extend_from_slice(more),
        }
    }
}

impl Deref for Contents {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Secret(bytes) => bytes,
            Self::Public(bytes) => bytes,
        }
    }
}

/// All blocks of a text, in order; none is no error.
pub fn blocks(text: &[u8]) -> Result<Vec<Block>, Error> {
    if text.len() > MAX {
        return Err(Error::TooLong(text.len()));
    }
    let mut found = Vec::new();
    let mut lines = lines(text).map(<[u8]>::trim_ascii).zip(1..);
    while let Some((line, at)) = lines.next() {
        let Some(label) = boundary(line, b"-----BEGIN ") else { continue };
        let label = String::from_utf8_lossy(label).into_owned();
        // Room for any key: what grows leaves copies behind.
        let mut body = Contents::of(&label, Vec::with_capacity(text.len().min(LONGEST_KEY)));
        let mut headers = false;
        loop {
            let Some((line, end)) = lines.next() else {
                return Err(Error::NoEnd { label, line: at });
            };
            if boundary(line, b"-----BEGIN ").is_some() {
                return Err(Error::NoEnd { label, line: at });
            }
            if let Some(other) = boundary(line, b"-----END ") {
                if other != label.as_bytes() {
                    return Err(Error::OtherEnd { label, line: at, end });
                }
                break;
            }
            if line.contains(&b':') {
                headers = true;
            } else {
                body.add(line);
            }
        }
        let der = STANDARD.decode(&*body).map_err(|_| Error::NotBase64 { label: label.clone(), line: at })?;
        let der = Contents::of(&label, der);
        found.push(Block { label, der, line: at, headers });
    }
    Ok(found)
}

/// One block as text, lines of 64, ending in a newline.
pub fn encode(label: &str, der: &[u8]) -> String {
    let mut text = String::new();
    encode_into(&mut text, label, der);
    text
}

/// Appends one block.
pub fn encode_into(text: &mut String, label: &str, der: &[u8]) {
    const LINE: usize = 48;
    text.reserve(der.len() * 4 / 3 + der.len() / LINE + 2 * label.len() + 40);
    for part in ["-----BEGIN ", label, "-----\n"] {
        text.push_str(part);
    }
    for line in der.chunks(LINE) {
        STANDARD.encode_string(line, text);
        text.push('\n');
    }
    for part in ["-----END ", label, "-----\n"] {
        text.push_str(part);
    }
}

/// Lines as they stand. The library looks for the end of one at many bytes at a time.
fn lines(mut text: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let line = text;
        let length = text.skip_until(b'\n').ok().filter(|length| *length > 0)?;
        Some(&line[..length])
    })
}

fn boundary<'a>(line: &'a [u8], start: &[u8]) -> Option<&'a [u8]> {
    line.strip_prefix(start)?.strip_suffix(b"-----")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_read_back() {
        for length in [0, 1, 47, 48, 49, 500] {
            let der = vec![0xa5; length];
            let text = encode("X", &der);
            assert!(text.lines().all(|line| line.len() <= 64));
            let read = blocks(format!("subject=x\n{text}\r\n{}", text.replace('\n', "\r\n")).as_bytes());
            let read = read.unwrap();
            assert_eq!(read.len(), 2);
            assert!(read.iter().all(|block| *block.der == der && block.label == "X" && !block.headers));
            assert_eq!(
                blocks(text.trim_end().as_bytes()),
                blocks(text.as_bytes()),
                "without its last newline"
            );
        }
        assert_eq!(blocks(b""), Ok(Vec::new()));
    }

    #[test]
    fn private_keys_are_wiped() {
        let secret = |label| {
            let read = blocks(encode(label, b"abc").as_bytes()).unwrap();
            matches!(read[0].der, Contents::Secret(_))
        };
        for label in [PRIVATE_KEY, ENCRYPTED_PRIVATE_KEY, "EC PRIVATE KEY", "RSA PRIVATE KEY"] {
            assert!(secret(label), "{label}");
        }
        for label in [CERTIFICATE, CSR, "PUBLIC KEY"] {
            assert!(!secret(label), "{label}");
        }
    }

    #[test]
    fn a_broken_block_is_never_skipped() {
        let good = encode("CERTIFICATE", b"abc");
        let cut = &good[..good.len() - 10];
        let label = || "CERTIFICATE".to_owned();
        assert_eq!(blocks(cut.as_bytes()), Err(Error::NoEnd { label: label(), line: 1 }));
        assert_eq!(
            blocks(format!("{cut}\n{good}").as_bytes()),
            Err(Error::NoEnd { label: label(), line: 1 })
        );
        assert_eq!(
            blocks(good.replace("END CERTIFICATE", "END X").as_bytes()),
            Err(Error::OtherEnd { label: label(), line: 1, end: 3 })
        );
        assert_eq!(
            blocks(good.replace("YWJj", "YW_j").as_bytes()),
            Err(Error::NotBase64 { label: label(), line: 1 })
        );
        assert_eq!(blocks(&vec![b'a'; MAX + 1]), Err(Error::TooLong(MAX + 1)));
    }
}
