//! PKCS#10 (RFC 2986): what a stranger sends. Only its public key goes on; the names it asks for are shown to those
//! who decide, and never signed because they were asked for. Reading and checking is done here; rcgen writes those that
//! Mica asks others with, and never reads one.

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyUsagePurpose, SanType};
use x509_parser::asn1_rs::Any;
use x509_parser::certification_request::{X509CertificationRequest, X509CertificationRequestInfo};
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::der_parser::ber::parse_ber_set;
use x509_parser::extensions::{GeneralName, ParsedExtension, X509Extension};
use x509_parser::prelude::FromDer as _;

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
        let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|_| Error::Der)?;
        if !rest.is_empty() {
            return Err(Error::Der);
        }
        let info = &csr.certification_request_info;
        // The parser passes over what stands behind the last part that it knows.
        if !has_parts(der, 3) || !has_parts(info.raw, 4) {
            return Err(Error::Der);
        }
        let key = PublicKey::from_spki(info.subject_pki.raw)?;
        let algorithm = algorithm_after(der, info.raw).ok_or(Error::Der)?;
        key.verify(algorithm, info.raw, &csr.signature_value.data).map_err(|fault| match fault {
            SignatureFault::Algorithm => {
                Error::SignatureAlgorithm(csr.signature_algorithm.algorithm.to_id_string())
            }
            SignatureFault::Wrong => Error::Signature,
        })?;
        let mut requested = Requested { subject: info.subject.to_string(), ..Requested::default() };
        let mut uris = 0;
        for extension in requested_extensions(info)? {
            match extension.parsed_extension() {
                ParsedExtension::BasicConstraints(constraints) if constraints.ca => return Err(Error::Ca),
                ParsedExtension::SubjectAlternativeName(san) => {
                    for name in &san.general_names {
                        match name {
                            GeneralName::URI(uri) => {
                                uris += 1;
                                requested.uri = Some((*uri).to_owned());
                            }
                            GeneralName::DNSName(name) => requested.dns.push((*name).to_owned()),
                            other => requested.others.push(other.to_string()),
                        }
                    }
                }
                ParsedExtension::ParseError { error } => return Err(Error::Extension(error.to_string())),
                _ => {}
            }
        }
        if uris > 1 {
            return Err(Error::Uris(uris));
        }
        Ok(Self { key, requested })
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

/// PKCS#9 5.4.2 has one request for extensions, of one value. The parser looks at the first alone, so that a second one
/// could hide what it asks for from us and show it to another reader.
fn requested_extensions<'a>(
    info: &'a X509CertificationRequestInfo<'_>,
) -> Result<&'a [X509Extension<'a>], Error> {
    let mut found: &[X509Extension<'_>] = &[];
    let mut count = 0;
    for attribute in info.iter_attributes() {
        if let ParsedCriAttribute::ExtensionRequest(request) = attribute.parsed_attribute() {
            let (_, values) = parse_ber_set(attribute.value).map_err(|_| Error::Der)?;
            count += values.as_set().map_or(0, Vec::len);
            found = &request.extensions;
        }
    }
    if count > 1 {
        return Err(Error::Extension("it has several requests for extensions".to_owned()));
    }
    Ok(found)
}

/// Whether a DER value is made of so many others, to its last byte.
fn has_parts(der: &[u8], wanted: usize) -> bool {
    let Ok((_, whole)) = Any::from_der(der) else { return false };
    let mut rest = whole.data;
    for _ in 0..wanted {
        let Ok((behind, _)) = Any::from_der(rest) else { return false };
        rest = behind;
    }
    rest.is_empty()
}

/// The AlgorithmIdentifier stands between the signed part and the signature; the parser gives only its pieces.
pub(crate) fn algorithm_after<'a>(der: &'a [u8], info: &[u8]) -> Option<&'a [u8]> {
    let start = info.as_ptr() as usize - der.as_ptr() as usize + info.len();
    let rest = der.get(start..)?;
    let length = usize::from(*rest.get(1).filter(|length| **length < 0x80)?);
    rest.get(..2 + length)
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
    fn nothing_stands_behind_the_parts_of_a_csr() {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let der = workload(&key, &SpiffeId::parse("spiffe://cluster.local/a").unwrap(), &[]).unwrap();
        assert!(has_parts(&der, 3) && !has_parts(&der, 2) && !has_parts(&der, 4));
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
