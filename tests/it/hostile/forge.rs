//! What an attacker makes by hand: CSRs of any bytes with a sound signature, and certificates signed with Mica's own key.

use std::fs;
use std::process::Command;
use std::sync::Arc;

use mica::core::certificate::Certificate;
use mica::core::pem;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};

use super::{Identity, WEB};
use crate::fixtures::run;
use crate::parts;
use crate::serve::Place;

const P256_SPKI: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const ECDSA_SHA256: &[u8] = &[0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
const EXTENSION_REQUEST: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x0e];
pub(super) const CHALLENGE_PASSWORD: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x07];
pub(super) const SAN: &[u8] = &[0x55, 0x1d, 0x11];
pub(super) const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
pub(super) const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
pub(super) const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];
/// Nobody's.
pub(super) const UNKNOWN: &[u8] = &[0x2a, 0x03, 0x04, 0x05];

/// Mica's own extension: when the holder of a certificate last proved itself otherwise.
pub(super) const PROVED_AT: &str =
    "1.2.840.113556.1.8000.2554.34691.34401.34516.18173.48845.12181384.4418584";

/// General names, by their tags.
pub(super) const EMAIL: u8 = 0x81;
pub(super) const DNS: u8 = 0x82;
pub(super) const URI: u8 = 0x86;
pub(super) const IP: u8 = 0x87;

/// One DER value.
pub(super) fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = match content.len() {
        short @ 0..0x80 => vec![short as u8],
        byte @ 0x80..0x100 => vec![0x81, byte as u8],
        two @ 0x100..0x1_0000 => vec![0x82, (two >> 8) as u8, two as u8],
        three => vec![0x83, (three >> 16) as u8, (three >> 8) as u8, three as u8],
    };
    [&[tag], &length[..], content].concat()
}

pub(super) fn sequence(parts: &[Vec<u8>]) -> Vec<u8> {
    tlv(0x30, &parts.concat())
}

pub(super) fn extension(oid: &[u8], critical: bool, value: &[u8]) -> Vec<u8> {
    let critical = if critical { vec![1, 1, 0xff] } else { Vec::new() };
    sequence(&[tlv(6, oid), critical, tlv(4, value)])
}

/// A subject alternative name as an extension.
pub(super) fn names(names: &[(u8, &[u8])]) -> Vec<u8> {
    let names: Vec<_> = names.iter().map(|(tag, name)| tlv(*tag, name)).collect();
    extension(SAN, false, &sequence(&names))
}

/// The attribute with which a CSR asks for extensions.
pub(super) fn requests(extensions: &[Vec<u8>]) -> Vec<u8> {
    attribute(EXTENSION_REQUEST, &[sequence(extensions)])
}

pub(super) fn attribute(oid: &[u8], values: &[Vec<u8>]) -> Vec<u8> {
    sequence(&[tlv(6, oid), tlv(0x31, &values.concat())])
}

/// A subject of one common name.
pub(super) fn common_name(name: &[u8]) -> Vec<u8> {
    sequence(&[tlv(0x31, &sequence(&[tlv(6, &[0x55, 0x04, 0x03]), tlv(0x0c, name)]))])
}

/// A CSR before it is signed, with a key of its own: web's, without any fault.
pub(super) struct Csr {
    key: EcdsaKeyPair,
    /// The version's INTEGER.
    pub(super) version: Vec<u8>,
    pub(super) subject: Vec<u8>,
    pub(super) spki: Vec<u8>,
    pub(super) attributes: Vec<Vec<u8>>,
    /// What stands behind the attributes.
    pub(super) behind: Vec<u8>,
    /// The AlgorithmIdentifier of its signature.
    pub(super) algorithm: Vec<u8>,
}

impl Csr {
    pub(super) fn new() -> Self {
        let key = key();
        let spki = [P256_SPKI, key.public_key().as_ref()].concat();
        Self {
            key,
            version: vec![2, 1, 0],
            subject: sequence(&[]),
            spki,
            attributes: vec![requests(&[names(&[(URI, WEB.as_bytes())])])],
            behind: Vec::new(),
            algorithm: ECDSA_SHA256.to_owned(),
        }
    }

    /// As DER, with a signature of its own key.
    pub(super) fn der(&self) -> Vec<u8> {
        let attributes = tlv(0xa0, &self.attributes.concat());
        let parts = [&self.version, &self.subject, &self.spki, &attributes, &self.behind];
        let info = sequence(&parts.map(Vec::clone));
        let signature = self.key.sign(&SystemRandom::new(), &info).unwrap();
        let signature = tlv(3, &[&[0], signature.as_ref()].concat());
        sequence(&[info, self.algorithm.clone(), signature])
    }

    pub(super) fn pem(&self) -> String {
        pem::encode(pem::CSR, &self.der())
    }
}

/// A CSR with something changed before it is signed.
pub(super) fn csr(change: impl FnOnce(&mut Csr)) -> String {
    let mut csr = Csr::new();
    change(&mut csr);
    csr.pem()
}

/// A CSR that asks for these extensions, and nothing else.
pub(super) fn asking(extensions: &[Vec<u8>]) -> String {
    csr(|csr| csr.attributes = vec![requests(extensions)])
}

fn key() -> EcdsaKeyPair {
    let random = SystemRandom::new();
    let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
    EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref(), &random).unwrap()
}

/// A CSR of OpenSSL's for web, with a key that `openssl genpkey` makes of these arguments.
pub(super) fn openssl_csr(digest: &str, key: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let openssl = |arguments: &[&str], more: &[&str]| {
        let mut command: Command = parts::openssl();
        run(command.current_dir(folder.path()).args(arguments).args(more))
    };
    // Only the old command makes keys of DSA's parameters in one go.
    if key == ["DSA"] {
        openssl(&["dsaparam", "-genkey", "-out", "key", "1024"], &[]);
    } else {
        openssl(&["genpkey", "-out", "key"], key);
    }
    fs::write(folder.path().join("cnf"), "[req]\ndistinguished_name=name\nprompt=no\n[name]\n").unwrap();
    openssl(
        &["req", "-new", digest, "-config", "cnf", "-subj", "/", "-key", "key", "-addext"],
        &[&format!("subjectAltName=critical,URI:{WEB}")],
    )
}

/// A CA, its key in our hands.
pub(super) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// Itself and what is above it, but for the root.
    above: Vec<CertificateDer<'static>>,
}

/// What rcgen is told to do differently.
pub(super) type Change = fn(&mut CertificateParams);

impl Ca {
    /// Mica's own root.
    pub(super) fn of_mica(place: &Place) -> Self {
        let root = Certificate::all_from_pem(place.root_pem().as_bytes()).unwrap().remove(0);
        let key = fs::read(place.data().join("authority/ca-key.pem")).unwrap();
        let key = pem::blocks(&key).unwrap().remove(0).der;
        let key = KeyPair::try_from(&key[..]).unwrap();
        Self { issuer: Issuer::new(of_subject(&root), key), above: Vec::new() }
    }

    /// Somebody else's, of the same name as Mica's root.
    pub(super) fn pretended(place: &Place) -> Self {
        let root = Certificate::all_from_pem(place.root_pem().as_bytes()).unwrap().remove(0);
        Self { issuer: Issuer::new(of_subject(&root), key_pair()), above: Vec::new() }
    }

    /// An intermediate below this one.
    pub(super) fn intermediate(&self, change: Change) -> Self {
        let key = key_pair();
        let mut params = CertificateParams::default();
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now - Duration::MINUTE, now + Duration::DAY);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "intermediate");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        change(&mut params);
        let made = params.signed_by(&key, &self.issuer).unwrap();
        let above = std::iter::once(made.der().clone()).chain(self.above.clone()).collect();
        Self { issuer: Issuer::new(params, key), above }
    }

    /// Web's certificate, without any fault before it is changed.
    pub(super) fn leaf(&self, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let key = key_pair();
        let mut params = leaf();
        change(&mut params);
        let made = params.signed_by(&key, &self.issuer).unwrap();
        let chain = std::iter::once(made.der().clone()).chain(self.above.clone()).collect();
        Identity { chain, key: private(&key) }
    }

    /// Web's certificate with this for Mica's own extension, which says when its holder last proved itself.
    pub(super) fn proved_at(&self, value: &[u8]) -> Identity {
        let arcs: Vec<u64> = PROVED_AT.split('.').map(|arc| arc.parse().unwrap()).collect();
        self.leaf(|params| {
            params.custom_extensions.push(CustomExtension::from_oid_content(&arcs, value.to_owned()));
        })
    }

    /// This CA's own certificate and key.
    pub(super) fn itself(&self) -> Identity {
        Identity { chain: self.above.clone(), key: private(self.issuer.key()) }
    }
}

/// Web's certificate, signed with its own key.
pub(super) fn self_signed() -> Identity {
    let key = key_pair();
    let made = leaf().self_signed(&key).unwrap();
    Identity { chain: vec![made.der().clone()], key: private(&key) }
}

pub(super) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn leaf() -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - Duration::MINUTE, now + Duration::HOUR);
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![uri(WEB)];
    params
}

fn key_pair() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap()
}

fn private(key: &KeyPair) -> Arc<PrivateKeyDer<'static>> {
    Arc::new(PrivatePkcs8KeyDer::from(key.serialize_der()).into())
}

/// Parameters that name an issuer as its certificate does.
fn of_subject(certificate: &Certificate) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate.der()).unwrap();
    let subject = &parsed.tbs_certificate.subject;
    for (kind, mut values) in [
        (DnType::OrganizationName, subject.iter_organization().collect::<Vec<_>>()),
        (DnType::CommonName, subject.iter_common_name().collect()),
    ] {
        params.distinguished_name.push(kind, values.remove(0).as_str().unwrap());
    }
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}
