//! PKCS#10 (RFC 2986): what a stranger sends. Only its public key goes on; the names it asks for are shown to those
//! who decide, and never signed because they were asked for. Reading and checking is done here; rcgen writes those that
//! Mica asks others with, and never reads one.

use pkcs8::ObjectIdentifier;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyUsagePurpose, SanType};
use x509_parser::extensions::{GeneralName, ParsedExtension, X509Extension};
use x509_parser::oid_registry::OID_PKCS9_EXTENSION_REQUEST;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Name;

use super::certificate::EMPTY_NAME;
use super::der::{self, Signed, Value, Values};
use super::key::{self, IssuerKey as _, PublicKey, SignatureFault, SigningKey};
use super::pem;
use super::profile::{DnsName, Organization, ca_name};
use super::refusal::{Reason, Refusal};
use super::spiffe::{SpiffeId, TrustDomain};

/// A CSR of an RSA-4096 key with a hundred names fits; anything longer is refused before it is parsed.
pub const MAX: usize = 16 * 1024;

/// Why a CSR is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too long to be parsed.
    #[error("the CSR of {0} bytes is longer than {MAX}")]
    TooLong(usize),
    /// The PEM is broken.
    #[error("the CSR is not PEM: {0}")]
    Pem(#[from] pem::Error),
    /// None or several.
    #[error("expected one CSR, found {0}")]
    Count(usize),
    /// Another kind of PEM.
    #[error("expected a CERTIFICATE REQUEST, found a {0}")]
    Label(String),
    /// The DER is broken.
    #[error("the CSR is not PKCS#10 DER, or bytes follow it")]
    Der,
    /// The key is not on the allow-list.
    #[error("the CSR's key: {0}")]
    Key(#[from] key::Error),
    /// The signature algorithm is not on the allow-list.
    #[error(
        "the CSR is signed with {0}; allowed are ECDSA and RSA PKCS#1 with SHA-256 or SHA-384, RSA with SHA-512, and Ed25519"
    )]
    SignatureAlgorithm(String),
    /// The requester does not hold the key.
    #[error(
        "the CSR's signature does not fit its key: the requester has not shown that it holds the private key"
    )]
    Signature,
    /// An extension that cannot be read.
    #[error("the CSR asks for an extension that cannot be read ({0})")]
    Extension(String),
    /// It wants to be a CA.
    #[error("the CSR asks to be a CA (CA:TRUE)")]
    Ca,
    /// A CSR of our own that rcgen refuses.
    #[error("the CSR was not made: {0}")]
    Make(String),
    /// X509-SVID 2.
    #[error("the CSR asks for {0} URIs; a SPIFFE certificate has exactly one")]
    Uris(usize),
}

impl From<Error> for Refusal {
    fn from(fault: Error) -> Self {
        let reason = match &fault {
            Error::Signature => Reason::CsrSignature,
            Error::Ca => Reason::CsrCa,
            Error::Uris(_) => Reason::CsrUris,
            Error::Key(_) => Reason::KeyRefused,
            _ => Reason::CsrMalformed,
        };
        Self::new(reason, fault.to_string())
    }
}

/// A CSR whose key is allowed and whose requester holds it. There is no other way to make one.
#[derive(Clone, Debug)]
pub struct CheckedCsr {
    key: PublicKey,
    requested: Requested,
}

/// The names that a CSR asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requested {
    /// The URI, which may be anything.
    pub uri: Option<String>,
    /// DNS names.
    pub dns: Vec<String>,
    /// Whatever else stands in its subject alternative name.
    pub others: Vec<String>,
    /// The subject as text, empty if it has none.
    pub subject: String,
}

impl CheckedCsr {
    /// Reads a PEM text with exactly one CSR.
    pub fn from_pem(text: &[u8]) -> Result<Self, Error> {
        if text.len() > 2 * MAX {
            return Err(Error::TooLong(text.len()));
        }
        let blocks = pem::blocks(text)?;
        let [block] = &blocks[..] else {
            return Err(if blocks.is_empty() {
                pem::Error::Empty(pem::CSR).into()
            } else {
                Error::Count(blocks.len())
            });
        };
        // The second name is what old Netscape tools, and some Windows ones still, write.
        if block.label != pem::CSR && block.label != "NEW CERTIFICATE REQUEST" {
            return Err(Error::Label(block.label.clone()));
        }
        Self::from_der(&block.der)
    }

    /// Reads DER.
    pub fn from_der(der: &[u8]) -> Result<Self, Error> {
        if der.len() > MAX {
            return Err(Error::TooLong(der.len()));
        }
        let claims = Claims::of(der)?;
        let Signed { body, algorithm, signature } = claims.signed;
        let key = PublicKey::from_spki(claims.spki)?;
        key.verify(algorithm.whole, body.whole, signature).map_err(|fault| match fault {
            SignatureFault::Algorithm => Error::SignatureAlgorithm(claims.algorithm()),
            SignatureFault::Wrong => Error::Signature,
        })?;
        let Names { subject, ca, mut uris, dns, others } = claims.names()?;
        if ca {
            return Err(Error::Ca);
        }
        if uris.len() > 1 {
            return Err(Error::Uris(uris.len()));
        }
        Ok(Self { key, requested: Requested { uri: uris.pop(), dns, others, subject } })
    }

    /// The key to be certified.
    pub fn key(&self) -> &PublicKey {
        &self.key
    }

    /// What was asked for, to be compared or shown.
    pub fn requested(&self) -> &Requested {
        &self.requested
    }
}

/// Makes the CSR of a workload, as DER: an empty subject, its SPIFFE ID and its DNS names.
pub fn workload(key: &SigningKey, id: &SpiffeId, dns: &[DnsName]) -> Result<Vec<u8>, Error> {
    let mut names = vec![SanType::URI(ia5(id.as_str())?)];
    for name in dns {
        names.push(SanType::DnsName(ia5(name.as_str())?));
    }
    made(key, names, DistinguishedName::new(), IsCa::NoCa, vec![KeyUsagePurpose::DigitalSignature])
}

/// Makes a CSR that names nobody, as DER: for an authority that knows whose it is without being told.
pub fn nameless(key: &SigningKey) -> Result<Vec<u8>, Error> {
    made(key, Vec::new(), DistinguishedName::new(), IsCa::NoCa, Vec::new())
}

/// Makes the CSR of an intermediate for a root of somebody else's, as DER. It asks for path length 0.
pub fn intermediate(
    key: &SigningKey,
    organization: &Organization,
    trust_domain: &TrustDomain,
) -> Result<Vec<u8>, Error> {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, organization.as_str());
    subject.push(DnType::CommonName, ca_name("intermediate", key.public()));
    let names = vec![SanType::URI(ia5(trust_domain.id().as_str())?)];
    let ca = IsCa::Ca(BasicConstraints::Constrained(0));
    made(key, names, subject, ca, vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign])
}

fn made(
    key: &SigningKey,
    names: Vec<SanType>,
    subject: DistinguishedName,
    ca: IsCa,
    usages: Vec<KeyUsagePurpose>,
) -> Result<Vec<u8>, Error> {
    // Its default names a subject of rcgen's own.
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = subject;
    parameters.subject_alt_names = names;
    parameters.is_ca = ca;
    parameters.key_usages = usages;
    let csr = parameters.serialize_request(key).map_err(|e| Error::Make(e.to_string()))?;
    Ok(csr.der().to_vec())
}

fn ia5(text: &str) -> Result<rcgen::string::Ia5String, Error> {
    text.try_into().map_err(|_| Error::Make(format!("{text:?} is not ASCII")))
}

/// The parts of a CSR, of which nothing is proven: CertificationRequest, RFC 2986 4.
pub(crate) struct Claims<'a> {
    signed: Signed<'a>,
    subject: &'a [u8],
    /// The whole SubjectPublicKeyInfo.
    pub(crate) spki: &'a [u8],
    attributes: &'a [u8],
}

/// What a CSR asks for.
#[derive(Default)]
pub(crate) struct Names {
    /// As text, empty if it has none.
    pub(crate) subject: String,
    /// cA of the basic constraints.
    pub(crate) ca: bool,
    /// URIs of the subject alternative name.
    pub(crate) uris: Vec<String>,
    /// DNS names of it.
    pub(crate) dns: Vec<String>,
    /// Whatever else stands there.
    pub(crate) others: Vec<String>,
}

impl<'a> Claims<'a> {
    pub(crate) fn of(der: &'a [u8]) -> Result<Self, Error> {
        let signed = Signed::of(der).ok_or(Error::Der)?;
        let (subject, spki, attributes) = parts_of(signed.body.contents).ok_or(Error::Der)?;
        Ok(Self { signed, subject, spki, attributes })
    }

    pub(crate) fn names(&self) -> Result<Names, Error> {
        let mut names = Names { subject: text_of(self.subject)?, ..Names::default() };
        for extension in requested_extensions(self.attributes)? {
            let strange = || Error::Extension("RFC 5280 4.1 has none of its form".to_owned());
            let value = der::Extension::of(extension).ok_or_else(strange)?.value;
            let (_, extension) = X509Extension::from_der(extension.whole).map_err(|_| strange())?;
            match extension.parsed_extension() {
                // Behind what the parser has read.
                ParsedExtension::BasicConstraints(_) | ParsedExtension::SubjectAlternativeName(_)
                    if der::sequence(value).is_none() =>
                {
                    return Err(strange());
                }
                ParsedExtension::BasicConstraints(constraints) => names.ca |= constraints.ca,
                ParsedExtension::SubjectAlternativeName(san) => {
                    for name in &san.general_names {
                        match name {
                            GeneralName::URI(uri) => names.uris.push((*uri).to_owned()),
                            GeneralName::DNSName(name) => names.dns.push((*name).to_owned()),
                            other => names.others.push(other.to_string()),
                        }
                    }
                }
                ParsedExtension::ParseError { error } => return Err(Error::Extension(error.to_string())),
                _ => {}
            }
        }
        Ok(names)
    }

    /// The OID of what it is signed with.
    pub(crate) fn algorithm(&self) -> String {
        let oid = Values::of(self.signed.algorithm.contents).one(der::OID);
        oid.and_then(|oid| ObjectIdentifier::from_bytes(oid.contents).ok())
            .map_or_else(|| "an algorithm without a name".to_owned(), |oid| oid.to_string())
    }
}

/// Subject, key and attributes of a CertificationRequestInfo, RFC 2986 4.1.
fn parts_of(info: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let mut parts = Values::of(info);
    // Version 0 is the only one there is, and some write another.
    let [0..0x80] = parts.one(der::INTEGER)?.contents else { return None };
    let (subject, spki) = (parts.one(der::SEQUENCE)?.whole, parts.one(der::SEQUENCE)?.whole);
    let attributes = parts.one(der::explicit(0))?.contents;
    parts.is_over().then_some((subject, spki, attributes))
}

/// PKCS#9 5.4.2 has one request for extensions, of one value. A reader that looks at the first alone would not see what a
/// second one asks for.
fn requested_extensions(attributes: &[u8]) -> Result<Vec<Value<'_>>, Error> {
    let mut requests = Vec::new();
    let mut attributes = Values::of(attributes);
    for attribute in attributes.by_ref() {
        let mut parts = Values::of(attribute.contents);
        let (Some(oid), Some(values)) = (parts.one(der::OID), parts.one(der::SET)) else {
            return Err(Error::Der);
        };
        if attribute.tag != der::SEQUENCE || !parts.is_over() {
            return Err(Error::Der);
        }
        if oid.contents == OID_PKCS9_EXTENSION_REQUEST.as_bytes() {
            // RFC 2986 4.1 has no attribute without a value.
            let values = der::all(values.contents).filter(|values| !values.is_empty());
            requests.extend(values.ok_or(Error::Der)?);
        }
    }
    if !attributes.is_over() {
        return Err(Error::Der);
    }
    match requests[..] {
        [] => Ok(Vec::new()),
        [extensions] if extensions.tag == der::SEQUENCE => der::all(extensions.contents).ok_or(Error::Der),
        [_] => Err(Error::Der),
        _ => Err(Error::Extension("it has several requests for extensions".to_owned())),
    }
}

/// RFC 2253's text of a Name; empty of an empty one.
fn text_of(name: &[u8]) -> Result<String, Error> {
    if name == EMPTY_NAME {
        return Ok(String::new());
    }
    X509Name::from_der(name).map(|(_, name)| name.to_string()).map_err(|_| Error::Der)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::key::KeyKind;
    use crate::sys::keys;

    #[test]
    fn a_csr_of_ours_passes_the_check_and_asks_for_what_it_should() {
        let id = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/b").unwrap();
        for kind in [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519] {
            let key = keys::generate(kind).unwrap();
            let der = workload(&key.signing().unwrap(), &id, &["b.a.svc".parse().unwrap()]).unwrap();
            let csr = CheckedCsr::from_der(&der).unwrap();
            assert_eq!(csr.key(), key.public());
            let asked = Requested {
                uri: Some(id.to_string()),
                dns: vec!["b.a.svc".to_owned()],
                ..Requested::default()
            };
            assert_eq!(*csr.requested(), asked);
        }
    }

    #[test]
    fn a_nameless_csr_asks_for_nothing() {
        let key = keys::generate(KeyKind::P256).unwrap();
        let csr = CheckedCsr::from_der(&nameless(&key.signing().unwrap()).unwrap()).unwrap();
        assert_eq!((csr.key(), csr.requested()), (key.public(), &Requested::default()));
    }

    #[test]
    fn the_csr_of_an_intermediate_is_none_for_a_workload() {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let trust_domain = TrustDomain::parse("cluster.local").unwrap();
        let der = intermediate(&key, &"example".parse().unwrap(), &trust_domain).unwrap();
        assert!(matches!(CheckedCsr::from_der(&der), Err(Error::Ca)));
    }

    #[test]
    fn a_second_request_for_extensions_is_refused() {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.subject_alt_names = vec![SanType::URI(ia5("spiffe://cluster.local/a").unwrap())];
        // A SET of one empty list of extensions.
        let second = rcgen::Attribute { oid: &[1, 2, 840, 113549, 1, 9, 14], values: vec![0x31, 2, 0x30, 0] };
        let csr = parameters.serialize_request_with_attributes(&key, vec![second]).unwrap();
        assert!(matches!(CheckedCsr::from_der(csr.der()), Err(Error::Extension(_))));
    }

    #[test]
    fn attributes_that_cannot_be_read_are_not_passed_over() {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let requested = |values: &[u8]| {
            let request = rcgen::Attribute { oid: &[1, 2, 840, 113549, 1, 9, 14], values: values.to_vec() };
            let mut parameters = CertificateParams::default();
            parameters.distinguished_name = DistinguishedName::new();
            let csr = parameters.serialize_request_with_attributes(&key, vec![request]).unwrap();
            CheckedCsr::from_der(csr.der()).map(|csr| csr.requested().clone())
        };
        assert_eq!(requested(&[0x31, 2, 0x30, 0]), Ok(Requested::default()));
        // Nothing, a SEQUENCE in place of the SET, a number in place of the list, a list with something behind it, one
        // that is longer than its SET.
        for values in [
            &[0x31, 0][..],
            &[0x30, 2, 0x30, 0],
            &[0x31, 3, 2, 1, 1],
            &[0x31, 3, 0x30, 0, 0],
            &[0x31, 2, 0x30, 1],
        ] {
            assert_eq!(requested(values), Err(Error::Der), "{values:?}");
        }
        // A number in place of an extension, and one with something behind its value.
        let nothing = [6, 1, 0x2a, 4, 0];
        let no_ca = [6, 3, 0x55, 0x1d, 19, 4, 2, 0x30, 0];
        let no_ca_and_one = [6, 3, 0x55, 0x1d, 19, 4, 7, 0x30, 0, 0x30, 3, 1, 1, 0xff];
        let extension = |parts: &[u8], rest: &[u8]| {
            let mut values = der::Writer::with_capacity(32);
            values.nested(der::SET, |w| {
                w.sequence(|w| w.sequence(|w| w.raw(&[parts, rest].concat())));
            });
            values.finish()
        };
        assert_eq!(requested(&extension(&nothing, &[])), Ok(Requested::default()));
        assert_eq!(requested(&extension(&no_ca, &[])), Ok(Requested::default()));
        for values in [
            &[0x31, 5, 0x30, 3, 2, 1, 1][..],
            &extension(&nothing, &[5, 0]),
            &extension(&nothing, &[5]),
            &extension(&no_ca_and_one, &[]),
        ] {
            assert!(matches!(requested(values), Err(Error::Extension(_))), "{values:?}");
        }
    }

    #[test]
    fn nothing_stands_behind_the_parts_of_a_csr() {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let der = workload(&key, &SpiffeId::parse("spiffe://cluster.local/a").unwrap(), &[]).unwrap();
        // A NULL more, and the length of the whole, which takes one byte or two behind its own.
        let mut longer = [&der[..], &[5, 0]].concat();
        let last = usize::from(1 + (der[1] & 0x7f));
        longer[last] += 2;
        assert!(CheckedCsr::from_der(&der).is_ok());
        assert!(matches!(CheckedCsr::from_der(&longer), Err(Error::Der)));
    }

    #[test]
    fn a_csr_that_was_changed_is_refused() {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let id = SpiffeId::parse("spiffe://cluster.local/ns/a/sa/b").unwrap();
        let mut der = workload(&key, &id, &[]).unwrap();
        let at = der.windows(4).position(|w| w == b"sa/b").unwrap();
        der[at + 3] = b'c';
        assert!(matches!(CheckedCsr::from_der(&der), Err(Error::Signature)));
    }
}
