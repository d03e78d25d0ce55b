//! What is in certificates, chains, CSRs, keys, bundles and Kubernetes Secrets, and what is wrong with them, in words
//! and as data. Key material never comes out.

mod judge;
mod read;

use std::fmt;

use serde::Serialize;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::lifetime::shown;

/// Something to be looked at.
pub struct Input {
    /// The folder it was found in, if a folder was given. Files of one folder are judged together, and so are all files
    /// that were given by name.
    pub folder: Option<String>,
    /// Its name, without the folder.
    pub name: String,
    /// What it holds.
    pub bytes: Zeroizing<Vec<u8>>,
}

/// Why something cannot be looked at.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{source_name}: {fault}")]
pub struct Error {
    source_name: String,
    fault: String,
}

/// All that was found.
#[derive(Debug, Serialize)]
pub struct Inspection {
    /// The time that it was judged at.
    #[serde(with = "time::serde::rfc3339")]
    pub at: OffsetDateTime,
    /// Whether nothing is wrong.
    pub sound: bool,
    /// What was found, in the order it was given.
    pub items: Vec<Item>,
    /// What is wrong with several taken together.
    pub problems: Vec<String>,
    /// What was not looked at, and why.
    pub notes: Vec<String>,
}

/// One thing that was found.
#[derive(Debug, Serialize)]
pub struct Item {
    /// Where.
    pub source: String,
    /// The how manyeth of its kind there, from 1.
    pub number: usize,
    /// What it is.
    #[serde(flatten)]
    pub facts: Facts,
    /// What is wrong with it.
    pub problems: Vec<String>,
}

/// What a thing is.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Facts {
    /// A certificate.
    Certificate(Box<CertificateFacts>),
    /// A CSR.
    Csr(Box<CsrFacts>),
    /// A private key.
    PrivateKey(KeyFacts),
    /// A public key.
    PublicKey(KeyFacts),
    /// A trust bundle as SPIFFE JSON, whose roots follow as certificates.
    Bundle(BundleFacts),
}

/// What a certificate says.
#[derive(Debug, Serialize)]
pub struct CertificateFacts {
    /// `workload`, `intermediate` or `root`.
    pub role: &'static str,
    /// The SPIFFE ID, if it has exactly one sound one.
    pub spiffe_id: Option<String>,
    /// Every URI.
    pub uris: Vec<String>,
    /// DNS names.
    pub dns: Vec<String>,
    /// Other names.
    pub other_names: Vec<String>,
    /// The subject, empty if it has none.
    pub subject: String,
    /// The issuer.
    pub issuer: String,
    /// Hexadecimal.
    pub serial: String,
    /// The first second.
    #[serde(with = "time::serde::rfc3339")]
    pub not_before: OffsetDateTime,
    /// The last second.
    #[serde(with = "time::serde::rfc3339")]
    pub not_after: OffsetDateTime,
    /// Until it expires; negative if it has.
    pub expires_in_seconds: i64,
    /// `valid`, `expired` or `not_yet_valid`.
    pub state: &'static str,
    /// The same in words.
    #[serde(skip)]
    pub time: String,
    /// The kind of its key.
    pub key: String,
    /// SHA-256 of its public key, hexadecimal.
    pub public_key_sha256: String,
    /// How it is signed.
    pub signature: String,
    /// cA.
    pub ca: bool,
    /// pathLenConstraint.
    pub path_length: Option<u32>,
    /// Key usages.
    pub key_usage: Vec<&'static str>,
    /// Extended key usages.
    pub extended_key_usage: Vec<String>,
    /// Subject key identifier, hexadecimal.
    pub key_identifier: Option<String>,
    /// Authority key identifier, hexadecimal.
    pub authority_identifier: Option<String>,
    /// SHA-256 of the certificate, hexadecimal.
    pub sha256: String,
}

/// What a CSR says.
#[derive(Debug, Serialize)]
pub struct CsrFacts {
    /// The subject, empty if it has none.
    pub subject: String,
    /// The URIs it asks for.
    pub uris: Vec<String>,
    /// The DNS names it asks for.
    pub dns: Vec<String>,
    /// Other names it asks for.
    pub other_names: Vec<String>,
    /// Whether it asks to be a CA.
    pub ca: bool,
    /// The kind of its key.
    pub key: String,
    /// SHA-256 of its public key, hexadecimal.
    pub public_key_sha256: String,
    /// How it is signed.
    pub signature: String,
}

/// What is known of a key.
#[derive(Debug, Serialize)]
pub struct KeyFacts {
    /// Its kind, unless it is protected.
    pub key: Option<String>,
    /// SHA-256 of its public key, hexadecimal.
    pub public_key_sha256: Option<String>,
    /// Whether a passphrase protects it.
    pub protected: bool,
    /// The certificates and CSRs it belongs to.
    pub belongs_to: Vec<String>,
}

/// What a SPIFFE bundle says besides its roots.
#[derive(Debug, Serialize)]
pub struct BundleFacts {
    /// Its trust domain, in a map of bundles.
    pub trust_domain: Option<String>,
    /// `spiffe_sequence`.
    pub sequence: Option<u64>,
    /// `spiffe_refresh_hint`, in seconds.
    pub refresh_hint: Option<u64>,
    /// How many roots it holds.
    pub roots: usize,
    /// How many keys were passed over, since they are for something else.
    pub passed_over: usize,
}

/// Looks at everything. Fails only if something cannot be read; a passphrase is tried on every key that needs one.
pub fn inspect(
    inputs: &[Input],
    passphrase: Option<&[u8]>,
    now: OffsetDateTime,
) -> Result<Inspection, Error> {
    let reading = read::read(inputs)?;
    Ok(judge::judge(&reading, passphrase, now))
}

/// How far a moment is from now, in the one unit that says most.
pub fn distance(seconds: i64) -> String {
    const MINUTE: u64 = 60;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    let seconds = seconds.unsigned_abs();
    let rounded = |unit: u64| (seconds + unit / 2) / unit;
    match seconds {
        0..100 => format!("{seconds} s"),
        _ if seconds < 100 * MINUTE => format!("{} min", rounded(MINUTE)),
        _ if seconds < 48 * HOUR => format!("{} h", rounded(HOUR)),
        _ if seconds < 730 * DAY => format!("{} d", rounded(DAY)),
        _ => format!("{} years", rounded(365 * DAY)),
    }
}

/// Foreign text on one line: what would move a terminal's cursor, colour it or turn its text around is written out.
pub fn one_line(text: &str) -> String {
    let turns =
        |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || turns(c) || matches!(c, '\u{2028}' | '\u{2029}') {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (item, number) in self.items.iter().zip(0..) {
            if number > 0 {
                writeln!(f)?;
            }
            if let Some(earlier) = self.same_before(number) {
                writeln!(f, "{}: the same as {}", one_line(&item.source), one_line(&earlier.source))?;
                continue;
            }
            let (what, lines) = item.facts.lines();
            writeln!(f, "{}: {what}", one_line(&item.source))?;
            for (label, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
                writeln!(f, "  {label:<12} {}", one_line(value))?;
            }
            for problem in &item.problems {
                writeln!(f, "  {:<12} {}", "wrong", one_line(problem))?;
            }
        }
        if !self.problems.is_empty() || !self.notes.is_empty() {
            writeln!(f)?;
        }
        for problem in &self.problems {
            writeln!(f, "wrong: {}", one_line(problem))?;
        }
        for note in &self.notes {
            writeln!(f, "note: {}", one_line(note))?;
        }
        let wrong = self.problems.len() + self.items.iter().map(|item| item.problems.len()).sum::<usize>();
        match wrong {
            0 => writeln!(f, "\nnothing is wrong with it"),
            1 => writeln!(f, "\n1 thing is wrong with it"),
            n => writeln!(f, "\n{n} things are wrong with it"),
        }
    }
}

impl Inspection {
    /// The files of a CA repeat its certificates; once is enough for a reader.
    fn same_before(&self, number: usize) -> Option<&Item> {
        let fingerprint = |item: &Item| match &item.facts {
            Facts::Certificate(facts) => Some(facts.sha256.clone()),
            _ => None,
        };
        let sought = fingerprint(&self.items[number])?;
        self.items[..number].iter().find(|item| fingerprint(item).as_ref() == Some(&sought))
    }
}

impl Facts {
    /// What it is, and what there is to say about it.
    fn lines(&self) -> (String, Vec<(&'static str, String)>) {
        match self {
            Self::Certificate(facts) => (facts.title(), facts.lines()),
            Self::Csr(facts) => (
                if facts.ca { "CSR of a CA".to_owned() } else { "CSR".to_owned() },
                vec![
                    ("asks for", facts.uris.join(", ")),
                    ("dns", facts.dns.join(", ")),
                    ("other names", facts.other_names.join(", ")),
                    ("subject", facts.subject.clone()),
                    ("key", facts.key.clone()),
                    ("public key", sha256(&facts.public_key_sha256)),
                    ("signature", facts.signature.clone()),
                ],
            ),
            Self::PrivateKey(facts) => {
                let title = match &facts.key {
                    Some(key) => format!("private key, {key}"),
                    None => "private key".to_owned(),
                };
                (title, facts.lines())
            }
            Self::PublicKey(facts) => {
                (format!("public key, {}", facts.key.as_deref().unwrap_or_default()), facts.lines())
            }
            Self::Bundle(facts) => {
                let title = match &facts.trust_domain {
                    Some(domain) => format!("SPIFFE bundle of {domain}"),
                    None => "SPIFFE bundle".to_owned(),
                };
                let number = |n: Option<u64>| n.map(|n| n.to_string()).unwrap_or_default();
                let hint = facts.refresh_hint.map(|s| format!("{s} s")).unwrap_or_default();
                let over = match facts.passed_over {
                    0 => String::new(),
                    n => format!("{n} keys for other uses"),
                };
                (
                    title,
                    vec![
                        ("roots", facts.roots.to_string()),
                        ("sequence", number(facts.sequence)),
                        ("refresh", hint),
                        ("passed over", over),
                    ],
                )
            }
        }
    }
}

impl CertificateFacts {
    fn title(&self) -> String {
        match (self.role, &self.spiffe_id) {
            ("workload", Some(id)) => format!("certificate of {id}"),
            ("workload", None) => "certificate".to_owned(),
            ("root", _) => "root certificate".to_owned(),
            _ => "CA certificate".to_owned(),
        }
    }

    fn lines(&self) -> Vec<(&'static str, String)> {
        let uris = match (&self.spiffe_id, self.role) {
            (Some(_), "workload") => String::new(),
            (Some(id), _) => id.clone(),
            (None, _) => self.uris.join(", "),
        };
        let path = match (self.ca, self.path_length) {
            (false, _) => String::new(),
            (true, None) => "yes, of any path length".to_owned(),
            (true, Some(length)) => format!("yes, of path length {length}"),
        };
        vec![
            ("uri", uris),
            ("dns", self.dns.join(", ")),
            ("other names", self.other_names.join(", ")),
            ("valid", format!("{} to {}, {}", shown(self.not_before), shown(self.not_after), self.time)),
            ("subject", self.subject.clone()),
            ("issuer", self.issuer.clone()),
            ("serial", self.serial.clone()),
            ("key", self.key.clone()),
            ("signature", self.signature.clone()),
            ("ca", path),
            ("usage", self.key_usage.join(", ")),
            ("purposes", self.extended_key_usage.join(", ")),
            ("fingerprint", sha256(&self.sha256)),
        ]
    }
}

impl KeyFacts {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let protected = if self.protected { "by a passphrase" } else { "" };
        vec![
            ("protected", protected.to_owned()),
            ("public key", self.public_key_sha256.as_deref().map(sha256).unwrap_or_default()),
            ("belongs to", self.belongs_to.join(", ")),
        ]
    }
}

/// Empty for what could not be read.
fn sha256(hexadecimal: &str) -> String {
    if hexadecimal.is_empty() { String::new() } else { format!("sha256 {hexadecimal}") }
}

#[cfg(test)]
mod tests;
