//! An X.509 certificate (RFC 5280) as read, and the rules of X509-SVID that it keeps or breaks.

use std::fmt;

use pkcs8::der::Decode as _;
use pkcs8::der::asn1::GeneralizedTime;
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer as _;
use x509_parser::time::ASN1Time;
use x509_parser::x509::{X509Name, X509Version};

use super::key::{self, PublicKey};
use super::lifetime::Validity;
use super::pem;
use super::profile::PROVED_AT;
use super::spiffe::{self, SpiffeId};

/// Longer certificates are refused before they are parsed.
pub const MAX: usize = 64 * 1024;
/// More in one text are refused.
pub const MAX_COUNT: usize = 1_000;

/// Why bytes are no certificate, or a text no certificates.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too long to be parsed.
    #[error("the certificate of {0} bytes is longer than {MAX}")]
    TooLong(usize),
    /// More than anyone needs.
    #[error("{0} certificates are more than {MAX_COUNT}")]
    TooMany(usize),
    /// The DER is broken.
    #[error("the certificate is not X.509 DER: {0}")]
    Der(String),
    /// Bytes behind it.
    #[error("{0} bytes follow the certificate")]
    Trailing(usize),
    /// An extension that is there twice or cannot be read.
    #[error("the certificate's extensions cannot be read: {0}")]
    Extensions(String),
    /// The PEM is broken.
    #[error(transparent)]
    Pem(#[from] pem::Error),
    /// A block of another kind.
    #[error("expected certificates only, found a {label} at line {line}")]
    Label {
        /// What stands there.
        label: String,
        /// Where, from 1.
        line: usize,
    },
    /// One of several certificates.
    #[error("certificate {number}: {fault}")]
    InText {
        /// Which, from 1.
        number: usize,
        /// What is wrong with it.
        fault: Box<Error>,
    },
}

/// A serial number: 127 random bits, so that it is positive, unique and at most 16 bytes (RFC 5280 4.1.2.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SerialNumber([u8; 16]);

impl SerialNumber {
    /// From 128 random bits, of which the first is dropped.
    pub fn from_random(mut bytes: [u8; 16]) -> Self {
        bytes[0] &= 0x7f;
        // Zero is not positive; the odds are those of a broken generator.
        if bytes == [0; 16] {
            bytes[15] = 1;
        }
        Self(bytes)
    }

    /// Big-endian.
    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for SerialNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(trimmed(&self.0)))
    }
}

impl fmt::Debug for SerialNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A certificate that was read, with what Mica asks of one.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    der: Vec<u8>,
    /// Big-endian, without leading zeros.
    pub serial: Vec<u8>,
    /// The subject's DER.
    pub subject: Vec<u8>,
    /// The issuer's DER.
    pub issuer: Vec<u8>,
    /// When it is valid.
    pub validity: Validity,
    /// The whole SubjectPublicKeyInfo.
    pub spki: Vec<u8>,
    /// cA of the basic constraints; false without them.
    pub is_ca: bool,
    /// pathLenConstraint.
    pub path_length: Option<u32>,
    /// The key usage, if it has one.
    pub usage: Option<Usage>,
    /// The extended key usage, if it has one.
    pub extended: Option<ExtendedUsage>,
    /// URIs of the subject alternative name.
    pub uris: Vec<String>,
    /// DNS names of the subject alternative name.
    pub dns: Vec<String>,
    /// Other names of the subject alternative name, as text.
    pub other_names: Vec<String>,
    /// Whether the subject alternative name is critical.
    pub names_critical: bool,
    /// The subject key identifier.
    pub key_identifier: Option<Vec<u8>>,
    /// The authority key identifier's key identifier.
    pub authority_identifier: Option<Vec<u8>>,
    /// Mica's own extension: when the holder last proved itself by something other than a certificate. Without it that
    /// was when the certificate was issued.
    pub proved_at: Option<OffsetDateTime>,
}

/// The key usages that X509-SVID speaks of (4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Whether the extension is critical.
    pub critical: bool,
    /// digitalSignature.
    pub digital_signature: bool,
    /// keyCertSign.
    pub cert_sign: bool,
    /// cRLSign.
    pub crl_sign: bool,
}

/// The extended key usages that X509-SVID speaks of (4.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedUsage {
    /// serverAuth.
    pub server: bool,
    /// clientAuth.
    pub client: bool,
}

impl Certificate {
    /// Reads one certificate.
    pub fn from_der(der: &[u8]) -> Result<Self, Error> {
        if der.len() > MAX {
            return Err(Error::TooLong(der.len()));
        }
        let (rest, parsed) = X509Certificate::from_der(der).map_err(|e| Error::Der(e.to_string()))?;
        if !rest.is_empty() {
            return Err(Error::Trailing(rest.len()));
        }
        let tbs = &parsed.tbs_certificate;
        let mut certificate = Self {
            der: der.to_owned(),
            serial: trimmed(tbs.raw_serial()).to_owned(),
            subject: tbs.subject.as_raw().to_owned(),
            issuer: tbs.issuer.as_raw().to_owned(),
            validity: validity_of(&parsed)?,
            spki: tbs.subject_pki.raw.to_owned(),
            is_ca: false,
            path_length: None,
            usage: None,
            extended: None,
            uris: Vec::new(),
            dns: Vec::new(),
            other_names: Vec::new(),
            names_critical: false,
            key_identifier: None,
            authority_identifier: None,
            proved_at: None,
        };
        if tbs.version != X509Version::V3 && !tbs.extensions().is_empty() {
            return Err(Error::Extensions("it has some, and is not version 3".to_owned()));
        }
        let mut identifiers: Vec<_> =
            tbs.extensions().iter().map(|extension| extension.oid.as_bytes()).collect();
        identifiers.sort_unstable();
        if identifiers.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::Extensions("one of them is there twice".to_owned()));
        }
        for extension in tbs.extensions() {
            certificate.take(extension.critical, extension.parsed_extension())?;
            if extension.oid.as_bytes() == PROVED_AT {
                let moment = generalized_time(extension.value).ok_or_else(|| {
                    Error::Extensions("when its holder last proved itself cannot be read".to_owned())
                })?;
                certificate.proved_at = Some(moment);
            }
        }
        Ok(certificate)
    }

    fn take(&mut self, critical: bool, extension: &ParsedExtension<'_>) -> Result<(), Error> {
        match extension {
            ParsedExtension::BasicConstraints(constraints) => {
                self.is_ca = constraints.ca;
                self.path_length = constraints.path_len_constraint;
            }
            ParsedExtension::KeyUsage(usage) => {
                self.usage = Some(Usage {
                    critical,
                    digital_signature: usage.digital_signature(),
                    cert_sign: usage.key_cert_sign(),
                    crl_sign: usage.crl_sign(),
                });
            }
            ParsedExtension::ExtendedKeyUsage(usage) => {
                self.extended = Some(ExtendedUsage {
                    server: usage.server_auth || usage.any,
                    client: usage.client_auth || usage.any,
                });
            }
            ParsedExtension::SubjectAlternativeName(san) => {
                self.names_critical = critical;
                for name in &san.general_names {
                    match name {
                        GeneralName::URI(uri) => self.uris.push((*uri).to_owned()),
                        GeneralName::DNSName(name) => self.dns.push((*name).to_owned()),
                        GeneralName::IPAddress(bytes) => self.other_names.push(address(bytes)),
                        other => self.other_names.push(other.to_string()),
                    }
                }
            }
            ParsedExtension::SubjectKeyIdentifier(identifier) => {
                self.key_identifier = Some(identifier.0.to_owned());
            }
            ParsedExtension::AuthorityKeyIdentifier(identifier) => {
                self.authority_identifier = identifier.key_identifier.as_ref().map(|k| k.0.to_owned());
            }
            ParsedExtension::ParseError { error } => return Err(Error::Extensions(error.to_string())),
            _ => {}
        }
        Ok(())
    }

    /// Reads a text of certificates and nothing else; none is an error.
    pub fn all_from_pem(text: &[u8]) -> Result<Vec<Self>, Error> {
        let blocks = pem::blocks(text)?;
        if blocks.is_empty() {
            return Err(pem::Error::Empty(pem::CERTIFICATE).into());
        }
        if blocks.len() > MAX_COUNT {
            return Err(Error::TooMany(blocks.len()));
        }
        blocks
            .into_iter()
            .zip(1..)
            .map(|(block, number)| {
                if block.label != pem::CERTIFICATE {
                    return Err(Error::Label { label: block.label, line: block.line });
                }
                Self::from_der(&block.der).map_err(|fault| Error::InText { number, fault: Box::new(fault) })
            })
            .collect()
    }

    /// The whole certificate.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// As PEM.
    pub fn to_pem(&self) -> String {
        pem::encode(pem::CERTIFICATE, &self.der)
    }

    /// Its key, if it is on the allow-list.
    pub fn key(&self) -> Result<PublicKey, key::Error> {
        PublicKey::from_spki(&self.spki)
    }

    /// The subject as text, empty if it has none.
    pub fn subject_text(&self) -> String {
        name_text(&self.subject)
    }

    /// The issuer as text.
    pub fn issuer_text(&self) -> String {
        name_text(&self.issuer)
    }

    /// Whether it says that it was issued by itself.
    pub fn is_self_issued(&self) -> bool {
        self.subject == self.issuer
    }

    /// The one SPIFFE ID in it (X509-SVID 2).
    pub fn spiffe_id(&self) -> Result<SpiffeId, Fault> {
        match &self.uris[..] {
            [] => Err(Fault::NoUri),
            [uri] => SpiffeId::parse(uri).map_err(Fault::Id),
            several => Err(Fault::Uris(several.len())),
        }
    }

    /// The SHA-256 of the certificate, as browsers and `openssl x509 -fingerprint -sha256` know it.
    pub fn fingerprint(&self) -> String {
        hex(ring::digest::digest(&ring::digest::SHA256, &self.der).as_ref())
    }

    /// The serial number, as hexadecimal digits.
    pub fn serial_text(&self) -> String {
        hex(&self.serial)
    }

    /// The rules of X509-SVID that it breaks as a workload's certificate (5.2 and what it refers to).
    pub fn leaf_faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        match self.spiffe_id() {
            Ok(id) if id.path().is_empty() => faults.push(Fault::NoPath(id)),
            Ok(_) => {}
            Err(fault) => faults.push(fault),
        }
        if self.is_ca {
            faults.push(Fault::LeafCa);
        }
        match self.usage {
            None => faults.push(Fault::NoUsage),
            Some(usage) => {
                if !usage.critical {
                    faults.push(Fault::UsageNotCritical);
                }
                if !usage.digital_signature {
                    faults.push(Fault::NoDigitalSignature);
                }
                if usage.cert_sign {
                    faults.push(Fault::LeafCertSign);
                }
                if usage.crl_sign {
                    faults.push(Fault::LeafCrlSign);
                }
            }
        }
        if self.extended.is_some_and(|usage| !usage.server || !usage.client) {
            faults.push(Fault::ExtendedUsage);
        }
        if self.subject == EMPTY_NAME && !self.names_critical {
            faults.push(Fault::NamesNotCritical);
        }
        faults
    }

    /// The rules of X509-SVID that it breaks as a signing certificate. Roots of others often carry no SPIFFE ID, which
    /// the standard only advises against.
    pub fn signing_faults(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        if !self.is_ca {
            faults.push(Fault::NotCa);
        }
        match self.usage {
            None => faults.push(Fault::NoUsage),
            Some(usage) if !usage.cert_sign => faults.push(Fault::NoCertSign),
            Some(usage) if !usage.critical => faults.push(Fault::UsageNotCritical),
            Some(_) => {}
        }
        if !self.uris.is_empty() {
            match self.spiffe_id() {
                Ok(id) if !id.path().is_empty() => faults.push(Fault::SigningPath(id)),
                Ok(_) => {}
                Err(fault) => faults.push(fault),
            }
        }
        faults
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "certificate {}", self.serial_text())
    }
}

/// A rule of X509-SVID that a certificate breaks; the section stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// 2.
    #[error("it has no URI in its subject alternative name, so it names no workload [X509-SVID 2]")]
    NoUri,
    /// 2.
    #[error("it has {0} URIs in its subject alternative name; exactly one is allowed [X509-SVID 2]")]
    Uris(usize),
    /// SPIFFE-ID 2.
    #[error("its URI is no SPIFFE ID: {0} [X509-SVID 2]")]
    Id(spiffe::Error),
    /// 3.1.
    #[error("its SPIFFE ID {0} has no path, so it names a trust domain and not a workload [X509-SVID 3.1]")]
    NoPath(SpiffeId),
    /// 3.1.
    #[error("its subject is empty and its subject alternative name is not critical [X509-SVID 3.1]")]
    NamesNotCritical,
    /// 3.2.
    #[error("it signs certificates and its SPIFFE ID {0} has a path [X509-SVID 3.2]")]
    SigningPath(SpiffeId),
    /// 4.1.
    #[error("it is a CA's (CA:TRUE), which a workload's must not be [X509-SVID 4.1]")]
    LeafCa,
    /// 4.1.
    #[error("it is not a CA's (CA:TRUE is missing) [X509-SVID 4.1]")]
    NotCa,
    /// 4.3.
    #[error("it has no key usage [X509-SVID 4.3]")]
    NoUsage,
    /// 4.3.
    #[error("its key usage is not critical [X509-SVID 4.3]")]
    UsageNotCritical,
    /// 4.3.
    #[error("its key usage lacks digitalSignature [X509-SVID 4.3]")]
    NoDigitalSignature,
    /// 4.3.
    #[error("its key usage lacks keyCertSign [X509-SVID 4.3]")]
    NoCertSign,
    /// 4.3.
    #[error("its key usage has keyCertSign, which a workload's must not have [X509-SVID 4.3]")]
    LeafCertSign,
    /// 4.3.
    #[error("its key usage has cRLSign, which a workload's must not have [X509-SVID 4.3]")]
    LeafCrlSign,
    /// 4.4.
    #[error("its extended key usage does not have both serverAuth and clientAuth [X509-SVID 4.4]")]
    ExtendedUsage,
}

/// A Name without any part.
pub(crate) const EMPTY_NAME: &[u8] = &[0x30, 0x00];

/// Reads a DER GeneralizedTime of whole seconds in UTC.
pub(crate) fn generalized_time(der: &[u8]) -> Option<OffsetDateTime> {
    let since = GeneralizedTime::from_der(der).ok()?.to_unix_duration();
    OffsetDateTime::UNIX_EPOCH.checked_add(since.try_into().ok()?)
}

pub(crate) fn validity_of(parsed: &X509Certificate<'_>) -> Result<Validity, Error> {
    let moment = |at: ASN1Time| {
        OffsetDateTime::from_unix_timestamp(at.timestamp()).map_err(|e| Error::Der(e.to_string()))
    };
    Ok(Validity {
        not_before: moment(parsed.validity.not_before)?,
        not_after: moment(parsed.validity.not_after)?,
    })
}

pub(crate) fn trimmed(big_endian: &[u8]) -> &[u8] {
    let start = big_endian.iter().position(|b| *b != 0).unwrap_or(big_endian.len().saturating_sub(1));
    &big_endian[start..]
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(2 * bytes.len());
    for digit in bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]) {
        text.push(char::from(DIGITS[usize::from(digit)]));
    }
    text
}

fn name_text(der: &[u8]) -> String {
    X509Name::from_der(der).map(|(_, name)| name.to_string()).unwrap_or_default()
}

fn address(bytes: &[u8]) -> String {
    match (<[u8; 4]>::try_from(bytes), <[u8; 16]>::try_from(bytes)) {
        (Ok(v4), _) => ::core::net::IpAddr::from(v4).to_string(),
        (_, Ok(v6)) => ::core::net::IpAddr::from(v6).to_string(),
        _ => format!("an address of {} bytes", bytes.len()),
    }
}
