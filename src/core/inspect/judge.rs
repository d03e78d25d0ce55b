//! What things say, and what is wrong with them, alone and together.

use std::collections::BTreeMap;

use ring::digest::{SHA256, digest};
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Version;

use super::read::{Found, Reading, Set, Thing};
use super::{CertificateFacts, CsrFacts, Facts, Inspection, Item, KeyFacts, distance};
use crate::core::authority_files::{self, CA_CERT, ROOT_CERT};
use crate::core::bundle::TrustBundle;
use crate::core::certificate::{Certificate, hex};
use crate::core::chain;
use crate::core::csr::{self, CheckedCsr, Claims, Names};
use crate::core::key::{self, PrivateKey, PublicKey, SignatureFault};
use crate::core::spiffe::TrustDomain;

pub(super) fn judge(reading: &Reading, passphrase: Option<&[u8]>, now: OffsetDateTime) -> Inspection {
    let mut items = Vec::new();
    let mut problems = Vec::new();
    let mut notes = reading.notes.clone();
    let titles = titles(&reading.found);
    for (found, title) in reading.found.iter().zip(&titles) {
        let beside: Vec<_> =
            reading.found.iter().zip(&titles).filter(|(other, _)| other.set == found.set).collect();
        let (facts, problems) = match &found.thing {
            Thing::Certificate(certificate) => certificate_facts(certificate, now),
            Thing::Csr(der) => csr_facts(der),
            Thing::PrivateKey(text) => key_facts(text, passphrase, &beside),
            Thing::OldPrivateKey => {
                let facts =
                    KeyFacts { key: None, public_key_sha256: None, protected: true, belongs_to: Vec::new() };
                (Facts::PrivateKey(facts), vec![key::Error::OldEncryption.to_string()])
            }
            Thing::PublicKey(spki) => {
                let facts = KeyFacts {
                    key: Some(key_name(spki)),
                    public_key_sha256: Some(sha256(spki)),
                    protected: false,
                    belongs_to: owners(spki, &beside),
                };
                (Facts::PublicKey(facts), key_problem(spki))
            }
            Thing::Bundle(facts, problems) => {
                let facts = super::BundleFacts { trust_domain: facts.trust_domain.clone(), ..*facts };
                (Facts::Bundle(facts), problems.clone())
            }
        };
        items.push(Item { source: title.0.clone(), number: title.1, facts, problems });
    }
    for (set, index) in reading.sets.iter().zip(0..) {
        let within: Vec<_> =
            reading.found.iter().zip(&titles).filter(|(found, _)| found.set == index).collect();
        judge_set(set, &within, passphrase, now, &mut problems, &mut notes);
    }
    let sound = problems.is_empty() && items.iter().all(|item: &Item| item.problems.is_empty());
    let at = now.replace_nanosecond(0).unwrap_or(now);
    Inspection { at, sound, items, problems, notes }
}

/// What each thing is called: its source, with a number where there are several of its kind.
fn titles(found: &[Found]) -> Vec<(String, usize)> {
    let kind = |thing: &Thing| match thing {
        Thing::Certificate(_) => "certificate",
        Thing::Csr(_) => "CSR",
        Thing::PrivateKey(_) | Thing::OldPrivateKey => "key",
        Thing::PublicKey(_) => "public key",
        Thing::Bundle(..) => "bundle",
    };
    let same =
        |a: &Found, b: &Found| a.set == b.set && a.source == b.source && kind(&a.thing) == kind(&b.thing);
    found
        .iter()
        .zip(0..)
        .map(|(one, index)| {
            let number = found[..index].iter().filter(|other| same(one, other)).count() + 1;
            let count = found.iter().filter(|other| same(one, other)).count();
            let title = match count {
                1 => one.source.clone(),
                _ => format!("{}, {} {number}", one.source, kind(&one.thing)),
            };
            (title, number)
        })
        .collect()
}

type Beside<'a> = (&'a Found, &'a (String, usize));

fn certificate_facts(certificate: &Certificate, now: OffsetDateTime) -> (Facts, Vec<String>) {
    let mut problems = Vec::new();
    let validity = certificate.validity;
    let until = |at: OffsetDateTime| (at - now).whole_seconds();
    let (state, time) = if validity.contains(now) {
        ("valid", format!("expires in {}", distance(until(validity.not_after))))
    } else if now < validity.not_before {
        let time = format!("begins in {}", distance(until(validity.not_before)));
        problems.push(format!("it is not yet valid: it {time}; check this machine's clock and the issuer's"));
        ("not_yet_valid", time)
    } else {
        let time = format!("expired {} ago", distance(until(validity.not_after)));
        problems.push(format!("it {time}; have it issued anew"));
        ("expired", time)
    };
    if validity.not_after < validity.not_before {
        problems.push("it ends before it begins".to_owned());
    }
    let signs = certificate.is_ca || certificate.usage.is_some_and(|usage| usage.cert_sign);
    let faults = if signs { certificate.signing_faults() } else { certificate.leaf_faults() };
    problems.extend(faults.iter().map(ToString::to_string));
    problems.extend(key_problem(&certificate.spki));
    let role = match (signs, certificate.is_self_issued()) {
        (false, _) => "workload",
        (true, false) => "intermediate",
        (true, true) => "root",
    };
    let mut facts = CertificateFacts {
        role,
        spiffe_id: certificate.spiffe_id().ok().map(|id| id.to_string()),
        uris: certificate.uris.clone(),
        dns: certificate.dns.clone(),
        other_names: certificate.other_names.clone(),
        subject: certificate.subject_text(),
        issuer: certificate.issuer_text(),
        serial: certificate.serial_text(),
        not_before: validity.not_before,
        not_after: validity.not_after,
        expires_in_seconds: until(validity.not_after),
        state,
        time,
        key: key_name(&certificate.spki),
        public_key_sha256: sha256(&certificate.spki),
        signature: String::new(),
        ca: certificate.is_ca,
        path_length: certificate.path_length,
        key_usage: Vec::new(),
        extended_key_usage: Vec::new(),
        key_identifier: certificate.key_identifier.as_deref().map(hex),
        authority_identifier: certificate.authority_identifier.as_deref().map(hex),
        sha256: certificate.fingerprint(),
    };
    if signs && certificate.key_identifier.is_none() {
        problems.push(
            "it has no subject key identifier, by which its leaves would find it [RFC 5280 4.2.1.2]"
                .to_owned(),
        );
    }
    // Was read before; what follows is beyond what the rest of Mica asks.
    if let Ok((_, parsed)) = X509Certificate::from_der(certificate.der()) {
        let (name, weak) = signature_name(&parsed.signature_algorithm.algorithm.to_id_string());
        facts.signature = name;
        // Nobody checks a root's signature on itself.
        if let Some(weak) = weak
            && !certificate.is_self_issued()
        {
            problems.push(format!("it is signed with {weak}, which can be forged; have it issued anew"));
        }
        if parsed.version() != X509Version::V3 {
            problems.push("it is not X.509 version 3, so it can say nothing about itself".to_owned());
        }
        let serial = parsed.raw_serial();
        if serial.first().is_some_and(|b| b & 0x80 != 0) || certificate.serial == [0] {
            problems.push("its serial number is not positive [RFC 5280 4.1.2.2]".to_owned());
        } else if serial.len() > 20 {
            problems.push("its serial number is longer than 20 bytes [RFC 5280 4.1.2.2]".to_owned());
        }
        for extension in parsed.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::KeyUsage(usage) => {
                    facts.key_usage = (0..KEY_USAGES.len())
                        .filter(|bit| usage.flags >> bit & 1 != 0)
                        .map(|bit| KEY_USAGES[bit])
                        .collect();
                }
                ParsedExtension::ExtendedKeyUsage(usage) => facts.extended_key_usage = purposes(usage),
                ParsedExtension::BasicConstraints(_)
                | ParsedExtension::SubjectAlternativeName(_)
                | ParsedExtension::NameConstraints(_) => {}
                _ if extension.critical => problems.push(format!(
                    "its extension {} is critical, so verifiers that do not know it refuse the certificate",
                    extension.oid.to_id_string()
                )),
                _ => {}
            }
        }
    }
    if certificate.is_self_issued()
        && let Ok(key) = certificate.key()
        && is_signed_by(certificate, &key) == Some(false)
    {
        problems.push("it says that it was issued by itself, and its key did not sign it".to_owned());
    }
    (Facts::Certificate(Box::new(facts)), problems)
}

const KEY_USAGES: [&str; 9] = [
    "digitalSignature",
    "nonRepudiation",
    "keyEncipherment",
    "dataEncipherment",
    "keyAgreement",
    "keyCertSign",
    "cRLSign",
    "encipherOnly",
    "decipherOnly",
];

fn purposes(usage: &x509_parser::extensions::ExtendedKeyUsage<'_>) -> Vec<String> {
    [
        (usage.any, "anyExtendedKeyUsage"),
        (usage.server_auth, "serverAuth"),
        (usage.client_auth, "clientAuth"),
        (usage.code_signing, "codeSigning"),
        (usage.email_protection, "emailProtection"),
        (usage.time_stamping, "timeStamping"),
        (usage.ocsp_signing, "OCSPSigning"),
    ]
    .into_iter()
    .filter(|(has, _)| *has)
    .map(|(_, name)| name.to_owned())
    .chain(usage.other.iter().map(|oid| oid.to_id_string()))
    .collect()
}

fn csr_facts(der: &[u8]) -> (Facts, Vec<String>) {
    let mut facts = CsrFacts {
        subject: String::new(),
        uris: Vec::new(),
        dns: Vec::new(),
        other_names: Vec::new(),
        ca: false,
        key: String::new(),
        public_key_sha256: String::new(),
        signature: String::new(),
    };
    let mut problems = Vec::new();
    if let Ok(claims) = Claims::of(der) {
        facts.key = key_name(claims.spki);
        facts.public_key_sha256 = sha256(claims.spki);
        facts.signature = signature_name(&claims.algorithm()).0;
        let Names { subject, ca, uris, dns, others } = claims.names().unwrap_or_default();
        (facts.subject, facts.ca, facts.uris, facts.dns, facts.other_names) =
            (subject, ca, uris, dns, others);
    }
    match CheckedCsr::from_der(der) {
        // That is what the CSR of an intermediate is for; only `sign` refuses it.
        Ok(_) | Err(csr::Error::Ca) => {}
        Err(fault) => problems.push(fault.to_string()),
    }
    (Facts::Csr(Box::new(facts)), problems)
}

fn key_facts(text: &str, passphrase: Option<&[u8]>, beside: &[Beside<'_>]) -> (Facts, Vec<String>) {
    let mut facts = KeyFacts { key: None, public_key_sha256: None, protected: false, belongs_to: Vec::new() };
    facts.protected = text.contains("ENCRYPTED PRIVATE KEY");
    let mut problems = Vec::new();
    match open(text, passphrase, beside) {
        Ok(key) => {
            let spki = key.public().spki();
            facts.key = Some(key_name(spki));
            facts.public_key_sha256 = Some(sha256(spki));
            facts.belongs_to = owners(spki, beside);
            let certified =
                beside.iter().any(|(other, _)| matches!(other.thing, Thing::Certificate(_) | Thing::Csr(_)));
            if facts.belongs_to.is_empty() && certified {
                problems.push("it belongs to none of the certificates beside it".to_owned());
            }
        }
        // Not wrong, only closed; said below.
        Err(key::Error::Locked) => {}
        Err(fault) => problems.push(fault.to_string()),
    }
    (Facts::PrivateKey(facts), problems)
}

/// An EC key without its public half is tried with those of the certificates beside it.
fn open(text: &str, passphrase: Option<&[u8]>, beside: &[Beside<'_>]) -> Result<PrivateKey, key::Error> {
    let alone = PrivateKey::from_pem(text.as_bytes(), passphrase, None);
    if !matches!(alone, Err(key::Error::NoPublic)) {
        return alone;
    }
    beside
        .iter()
        .filter_map(|(other, _)| match &other.thing {
            Thing::Certificate(certificate) => certificate.key().ok(),
            _ => None,
        })
        .find_map(|public| PrivateKey::from_pem(text.as_bytes(), passphrase, Some(&public)).ok())
        .map_or(alone, Ok)
}

fn owners(spki: &[u8], beside: &[Beside<'_>]) -> Vec<String> {
    beside
        .iter()
        .filter(|(other, _)| match &other.thing {
            Thing::Certificate(certificate) => certificate.spki == spki,
            Thing::Csr(der) => Claims::of(der).is_ok_and(|claims| claims.spki == spki),
            _ => false,
        })
        .map(|(_, title)| title.0.clone())
        .collect()
}

fn judge_set(
    set: &Set,
    found: &[Beside<'_>],
    passphrase: Option<&[u8]>,
    now: OffsetDateTime,
    problems: &mut Vec<String>,
    notes: &mut Vec<String>,
) {
    let before = problems.len();
    let certificates: Vec<(&str, &Certificate, &str)> = found
        .iter()
        .filter_map(|(found, title)| match &found.thing {
            Thing::Certificate(certificate) => Some((found.file.as_str(), &**certificate, title.0.as_str())),
            _ => None,
        })
        .collect();
    for (found, title) in found {
        if let Thing::PrivateKey(text) = &found.thing
            && passphrase.is_none()
            && text.contains("ENCRYPTED PRIVATE KEY")
        {
            notes.push(format!("{} was not looked into; open it with --passphrase-file", title.0));
        }
    }
    let mut files: Vec<&str> = certificates.iter().map(|(file, ..)| *file).collect();
    files.dedup();
    for file in files {
        let chain: Vec<_> = certificates.iter().filter(|(other, ..)| *other == file).copied().collect();
        judge_chain(&chain, &certificates, problems, notes);
    }
    if problems.len() > before || set.name.is_none() {
        return;
    }
    // Only what is named as delivered folders and Secrets name it says what is meant to lead where.
    let of = |names: [&str; 2]| -> Vec<Certificate> {
        certificates.iter().filter(|(file, ..)| names.contains(file)).map(|(_, c, _)| (*c).clone()).collect()
    };
    let (chain, roots) = (of(["cert-chain.pem", "tls.crt"]), of([ROOT_CERT, "ca.crt"]));
    let ca = of([CA_CERT, "tls.crt"]).first().filter(|ca| ca.is_ca).cloned();
    if let Some(ca) = ca {
        let files: BTreeMap<_, _> = set.files.iter().cloned().collect();
        let domain = ca.spiffe_id().map(|id| id.trust_domain().clone());
        let domain = domain.or_else(|_| TrustDomain::parse("cluster.local"));
        // Istio's own self-signed CA keeps its root in ca-cert.pem alone.
        let whole = authority_files::NAMES
            .iter()
            .filter(|name| files.contains_key(**name))
            .all(|name| *name == authority_files::CERT_CHAIN || !files[*name].trim_ascii().is_empty());
        if let (Ok(domain), true) = (domain, whole) {
            match authority_files::issuer(&files, passphrase, &domain) {
                Ok(_) | Err(authority_files::Error::Key { fault: key::Error::Locked, .. }) => {}
                Err(fault) => problems.push(fault.to_string()),
            }
        }
    } else if let (false, Ok(roots)) = (chain.is_empty(), TrustBundle::new(roots)) {
        let faults = chain::verify(&chain, &roots, None, now).err().unwrap_or_default();
        // Times and rules stand at the certificates themselves.
        for fault in faults.into_iter().filter(|fault| matches!(fault, chain::Fault::Path(_))) {
            problems.push(fault.to_string());
        }
    }
}

/// The certificates of one file: in order, complete as far as the files beside it can tell, and no root too many.
fn judge_chain(
    chain: &[(&str, &Certificate, &str)],
    beside: &[(&str, &Certificate, &str)],
    problems: &mut Vec<String>,
    notes: &mut Vec<String>,
) {
    let Some((_, first, _)) = chain.first() else { return };
    // A file that begins with a root is a bundle, whose order says nothing.
    if first.is_self_issued() {
        return;
    }
    for pair in chain.windows(2) {
        let [(_, below, below_title), (_, above, above_title)] = pair else { continue };
        if below.is_self_issued() {
            problems.push(format!("{above_title} stands behind a root, which ends a chain"));
        } else if below.issuer != above.subject {
            let wanted = chain.iter().find(|(_, other, _)| other.subject == below.issuer);
            problems.push(match wanted {
                Some((_, _, title)) => format!(
                    "the order is wrong: {below_title} was issued by {title}, and {above_title} stands behind it"
                ),
                None => format!(
                    "{below_title} was issued by {:?}, and {above_title} behind it is {:?}: an intermediate is missing or wrong",
                    below.issuer_text(),
                    above.subject_text()
                ),
            });
        } else if above.key().is_ok_and(|key| is_signed_by(below, &key) == Some(false)) {
            problems.push(format!(
                "{below_title} names {above_title} as its issuer, but was not signed with its key; is it an older one of the same name?"
            ));
        }
    }
    if !first.is_ca
        && let Some((_, _, title)) = chain.iter().find(|(_, other, _)| other.is_self_issued())
    {
        problems.push(format!("{title} is the root, which peers have already; leave it out of the chain"));
    }
    let Some((_, last, title)) = chain.last() else { return };
    let issuer_is_there = || beside.iter().any(|(_, other, _)| other.subject == last.issuer);
    if !last.is_self_issued() && !issuer_is_there() {
        let issuer = last.issuer_text();
        if beside.iter().any(|(_, other, _)| other.is_self_issued() && other.is_ca) {
            problems.push(format!(
                "{title} was issued by {issuer:?}, which is not here: an intermediate is missing, or the root is another's"
            ));
        } else {
            notes.push(format!(
                "{title} was issued by {issuer:?}, which is not here; `mica verify` checks it against a root"
            ));
        }
    }
}

/// Whether a key signed a certificate; unknown where the algorithm is.
fn is_signed_by(certificate: &Certificate, key: &PublicKey) -> Option<bool> {
    let (_, parsed) = X509Certificate::from_der(certificate.der()).ok()?;
    let tbs: &[u8] = parsed.tbs_certificate.as_ref();
    match key.verify(algorithm_behind(certificate.der(), tbs)?, tbs, &parsed.signature_value.data) {
        Ok(()) => Some(true),
        Err(SignatureFault::Wrong) => Some(false),
        Err(SignatureFault::Algorithm) => None,
    }
}

/// The AlgorithmIdentifier stands between the signed part and the signature; the parser gives only its pieces.
fn algorithm_behind<'a>(der: &'a [u8], tbs: &[u8]) -> Option<&'a [u8]> {
    let start = tbs.as_ptr() as usize - der.as_ptr() as usize + tbs.len();
    let rest = der.get(start..)?;
    let length = usize::from(*rest.get(1).filter(|length| **length < 0x80)?);
    rest.get(..2 + length)
}

fn key_name(spki: &[u8]) -> String {
    match PublicKey::from_spki(spki) {
        Ok(key) => key.kind().to_string(),
        Err(_) => key::name_of(spki),
    }
}

fn key_problem(spki: &[u8]) -> Vec<String> {
    PublicKey::from_spki(spki).err().map(|fault| format!("its key: {fault}")).into_iter().collect()
}

/// A signature algorithm's name, and what is weak about it.
fn signature_name(oid: &str) -> (String, Option<&'static str>) {
    let (name, weak) = match oid {
        "1.2.840.113549.1.1.4" => ("RSA with MD5", Some("MD5")),
        "1.2.840.113549.1.1.5" => ("RSA with SHA-1", Some("SHA-1")),
        "1.2.840.113549.1.1.11" => ("RSA with SHA-256", None),
        "1.2.840.113549.1.1.12" => ("RSA with SHA-384", None),
        "1.2.840.113549.1.1.13" => ("RSA with SHA-512", None),
        "1.2.840.113549.1.1.10" => ("RSA-PSS", None),
        "1.2.840.10045.4.1" => ("ECDSA with SHA-1", Some("SHA-1")),
        "1.2.840.10045.4.3.2" => ("ECDSA with SHA-256", None),
        "1.2.840.10045.4.3.3" => ("ECDSA with SHA-384", None),
        "1.2.840.10045.4.3.4" => ("ECDSA with SHA-512", None),
        "1.2.840.10040.4.3" => ("DSA with SHA-1", Some("SHA-1")),
        "1.3.101.112" => ("Ed25519", None),
        "1.3.101.113" => ("Ed448", None),
        other => (other, None),
    };
    (name.to_owned(), weak)
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}
