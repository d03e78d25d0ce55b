//! CSRs. Web asks with its good certificate; what it sends is what an attacker in its place would.

use mica::core::pem;

use super::forge::{
    BASIC_CONSTRAINTS, CHALLENGE_PASSWORD, Csr, DNS, EMAIL, EXTENDED_KEY_USAGE, IP, KEY_USAGE, SAN, UNKNOWN,
    URI, asking, attribute, common_name, csr, extension, names, openssl_csr, requests, sequence, tlv,
};
use super::{Answer, DB, Expected, Own, Row, Stage, TOO_LARGE, WEB, invalid, unauthenticated};
use crate::serve::mtls;
use tonic::Code;

const MALFORMED: Expected = invalid("CSR_MALFORMED");
const KEY: Expected = invalid("KEY_REFUSED");
const SIGNATURE: Expected = invalid("CSR_SIGNATURE");

#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    // What the others differ from.
    ("a CSR made by hand", |s| s.csr(csr(|_| ())), Own(WEB)),

    // Proof that the key is the caller's.
    ("a CSR whose signature is empty", |s| s.csr(changed(|der| unsigned(der, &[0]))), SIGNATURE),
    ("a CSR without the signature's element", |s| s.csr(changed(|der| unsigned(der, &[]))), MALFORMED),
    ("a CSR signed with another key", |s| s.csr(csr(|c| c.spki = Csr::new().spki)), SIGNATURE),
    ("a CSR changed after it was signed", |s| s.csr(changed(|der| replace(der, b"/sa/web", b"/sa/wea"))), SIGNATURE),
    ("a CSR signed with SHA-1", |s| s.csr(openssl_csr("-sha1", RSA)), MALFORMED),
    ("a CSR that says RSA of an ECDSA signature", |s| s.csr(csr(|c| c.algorithm = RSA_SHA256.to_owned())), MALFORMED),
    ("a CSR whose signature algorithm is not known", |s| s.csr(csr(|c| c.algorithm = sequence(&[tlv(6, UNKNOWN)]))), MALFORMED),

    // Keys.
    ("an RSA key of 2048 bits, which is good", |s| s.csr(openssl_csr("-sha256", RSA)), Own(WEB)),
    ("an RSA key of 1024 bits", |s| s.csr(openssl_csr("-sha256", &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"])), KEY),
    ("an RSA key with the exponent 3", |s| s.csr(openssl_csr("-sha256", &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-pkeyopt", "rsa_keygen_pubexp:3"])), KEY),
    ("an RSA key of 32,768 bits", |s| s.csr(csr(|c| c.spki = rsa(&[0xff; 4_096], &[1, 0, 1]))), KEY),
    ("an RSA key with an exponent of 1,000 bytes", |s| s.csr(csr(|c| c.spki = rsa(&[0xff; 256], &[0x7f; 1_000]))), KEY),
    ("an RSA key whose modulus is negative", |s| s.csr(csr(|c| c.spki = rsa_raw(&[0xff; 256], &[1, 0, 1]))), KEY),
    ("a key on P-224", |s| s.csr(openssl_csr("-sha256", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-224"])), KEY),
    ("a key on P-521", |s| s.csr(openssl_csr("-sha256", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"])), KEY),
    ("a key on secp256k1", |s| s.csr(openssl_csr("-sha256", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"])), KEY),
    ("a key on a curve of its own parameters", |s| s.csr(openssl_csr("-sha256", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-pkeyopt", "ec_param_enc:explicit"])), KEY),
    ("a key of Ed448", |s| s.csr(openssl_csr("-sha256", &["-algorithm", "ED448"])), KEY),
    ("a key of DSA", |s| s.csr(openssl_csr("-sha256", &["DSA"])), KEY),
    ("a point that is on no curve", |s| s.csr(csr(|c| c.spki.iter_mut().skip(27).for_each(|b| *b = 1))), SIGNATURE),
    ("the point at infinity", |s| s.csr(csr(|c| point(c, &[0]))), KEY),
    ("a compressed point", |s| s.csr(csr(|c| point(c, &[2; 33]))), KEY),
    ("a point of one byte too many", |s| s.csr(csr(|c| point(c, &[4; 66]))), KEY),

    // Names and rights that are not the caller's.
    ("a CSR that names nobody", |s| s.csr(asking(&[])), Own(WEB)),
    ("a CSR without any attribute", |s| s.csr(csr(|c| c.attributes.clear())), Own(WEB)),
    ("a CSR for another identity", |s| s.csr(mtls::csr(DB)), Own(WEB)),
    ("a CSR for another trust domain", |s| s.csr(mtls::csr("spiffe://example.org/ns/shop/sa/web")), Own(WEB)),
    ("a CSR for the trust domain itself", |s| s.csr(mtls::csr("spiffe://cluster.local")), Own(WEB)),
    ("a CSR for a path that leads to another identity", |s| s.csr(asking(&[names(&[(URI, b"spiffe://cluster.local/ns/shop/sa/web/../db")])])), Own(WEB)),
    ("a CSR with a common name and an organization's", |s| s.csr(csr(|c| c.subject = common_name(b"db"))), Own(WEB)),
    ("a CSR with a common name of 10,000 bytes", |s| s.csr(csr(|c| c.subject = common_name(&[b'a'; 10_000]))), Own(WEB)),
    ("a CSR for Mica's own DNS name", |s| s.csr(asking(&[names(&[(DNS, b"istiod.istio-system.svc")])])), Own(WEB)),
    ("a CSR for a wildcard", |s| s.csr(asking(&[names(&[(DNS, b"*")])])), Own(WEB)),
    // Names below one label of shop.svc are granted here, so these are not.
    ("a CSR for names that are nearly those that policy grants", |s| s.csr(asking(&[names(&[(DNS, b"a.b.shop.svc"), (DNS, b"*.shop.svc"), (DNS, b".shop.svc"), (DNS, b"shop.svc"), (DNS, b"ashop.svc"), (DNS, b"a.shop.svc.evil"), (DNS, b"evil\0.shop.svc"), (DNS, b"a b.shop.svc")])])), Own(WEB)),
    ("a CSR for an address", |s| s.csr(asking(&[names(&[(IP, &[127, 0, 0, 1])])])), Own(WEB)),
    ("a CSR for an address of seven bytes", |s| s.csr(asking(&[names(&[(IP, &[1; 7])])])), Own(WEB)),
    ("a CSR for a mail address", |s| s.csr(asking(&[names(&[(EMAIL, b"root@example.org")])])), Own(WEB)),
    ("a CSR for two URIs", |s| s.csr(asking(&[names(&[(URI, WEB.as_bytes()), (URI, DB.as_bytes())])])), invalid("CSR_URIS")),
    ("a CSR for the same URI twice", |s| s.csr(asking(&[names(&[(URI, WEB.as_bytes()), (URI, WEB.as_bytes())])])), invalid("CSR_URIS")),
    ("a CSR with two URIs in two extensions", |s| s.csr(asking(&[names(&[(URI, WEB.as_bytes())]), names(&[(URI, DB.as_bytes())])])), invalid("CSR_URIS")),
    ("a CSR with two requests for extensions", |s| s.csr(csr(|c| c.attributes.push(requests(&[names(&[(URI, DB.as_bytes())])])))), MALFORMED),
    ("a CSR with two values in its request for extensions", |s| s.csr(csr(|c| c.attributes = vec![two_values()])), MALFORMED),
    ("a CSR that asks for CA:TRUE", |s| s.csr(asking(&[extension(BASIC_CONSTRAINTS, true, &ca())])), invalid("CSR_CA")),
    ("a CSR that asks for CA:TRUE in the second place", |s| s.csr(asking(&[extension(BASIC_CONSTRAINTS, true, &sequence(&[])), extension(BASIC_CONSTRAINTS, true, &ca())])), invalid("CSR_CA")),
    ("a CSR that asks for CA:TRUE by a BER 1", |s| s.csr(asking(&[extension(BASIC_CONSTRAINTS, true, &sequence(&[tlv(1, &[1])]))])), invalid("CSR_CA")),
    ("a CSR that asks to sign certificates", |s| s.csr(asking(&[extension(KEY_USAGE, true, &[3, 2, 1, 6])])), Own(WEB)),
    ("a CSR that asks for every purpose", |s| s.csr(asking(&[extension(EXTENDED_KEY_USAGE, false, &sequence(&[tlv(6, &[0x55, 0x1d, 0x25, 0])]))])), Own(WEB)),
    ("a CSR that asks for no purpose", |s| s.csr(asking(&[extension(EXTENDED_KEY_USAGE, false, &sequence(&[]))])), Own(WEB)),
    ("a CSR that asks for a critical extension nobody knows", |s| s.csr(asking(&[extension(UNKNOWN, true, &[5, 0])])), Own(WEB)),
    ("a CSR that says when its holder last proved itself", |s| s.csr(asking(&[extension(PROVED_AT_DER, false, b"\x18\x0f20990101000000Z")])), Own(WEB)),
    ("a CSR with a challengePassword", |s| s.csr(csr(|c| c.attributes.push(attribute(CHALLENGE_PASSWORD, &[tlv(0x0c, b"secret")])))), Own(WEB)),

    // Names that readers take for different ones.
    ("a URI with a NUL", |s| s.csr(asking(&[names(&[(URI, b"spiffe://cluster.local/ns/shop/sa/db\0.web")])])), Own(WEB)),
    ("a DNS name with a NUL", |s| s.csr(asking(&[names(&[(DNS, b"web\0.example.org")])])), Own(WEB)),
    ("a common name with a NUL", |s| s.csr(csr(|c| c.subject = common_name(b"db\0web"))), Own(WEB)),
    ("a URI with a new line of the log", |s| s.csr(asking(&[names(&[(URI, b"spiffe://x\n{\"level\":\"ERROR\"}")])])), Own(WEB)),
    ("a URI that is not ASCII", |s| s.csr(asking(&[names(&[(URI, b"spiffe://cluster.local/\xff\xfe")])])), Own(WEB)),
    ("names that cannot be read", |s| s.csr(asking(&[extension(SAN, false, &[0x30, 0x7f])])), MALFORMED),
    ("names that are no list", |s| s.csr(asking(&[extension(SAN, false, &[5, 0])])), MALFORMED),
    ("no name in a list of names", |s| s.csr(asking(&[names(&[])])), Own(WEB)),
    ("3,000 names", |s| s.csr(asking(&[names(&[(DNS, b"a".as_slice()); 3_000])])), Own(WEB)),
    ("10,000 names", |s| s.csr(asking(&[names(&[(DNS, b"a".as_slice()); 10_000])])), MALFORMED),

    // DER that is none.
    ("a version of 1, which says nothing", |s| s.csr(csr(|c| c.version = vec![2, 1, 1])), Own(WEB)),
    ("a negative version", |s| s.csr(csr(|c| c.version = vec![2, 1, 0xff])), MALFORMED),
    ("a version of 100 bytes", |s| s.csr(csr(|c| c.version = tlv(2, &[1; 100]))), MALFORMED),
    ("bytes behind the CSR", |s| s.csr(changed(|der| [der, b"more".to_vec()].concat())), MALFORMED),
    ("an element behind the signature", |s| s.csr(changed(|der| { let at = header(&der); sequence(&[der[at..].to_vec(), vec![5, 0]]) })), MALFORMED),
    ("an element behind the attributes", |s| s.csr(csr(|c| c.behind = tlv(0xa1, &[5, 0]))), MALFORMED),
    ("an attribute behind the attributes", |s| s.csr(csr(|c| c.behind = requests(&[names(&[(URI, DB.as_bytes())])]))), MALFORMED),
    ("an element before the attributes", |s| s.csr(csr(|c| c.spki.extend(tlv(0xa1, &[5, 0])))), MALFORMED),
    ("a length of 2^32 - 1", |s| s.csr(changed(|der| [&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff], &der[header(&der)..]].concat())), MALFORMED),
    ("an indefinite length", |s| s.csr(changed(|der| [&[0x30, 0x80], &der[header(&der)..], &[0, 0]].concat())), MALFORMED),
    ("a length of more bytes than it needs", |s| s.csr(changed(|der| [&[0x30, 0x83, 0], &der[2..]].concat())), MALFORMED),
    ("lists in lists, 2,000 deep", |s| s.csr(pem::encode(pem::CSR, &(0..2_000).fold(Vec::new(), |inner, _| tlv(0x30, &inner)))), MALFORMED),
    ("names in names, 2,000 deep", |s| s.csr(asking(&[extension(SAN, false, &(0..2_000).fold(vec![5, 0], |inner, _| tlv(0xa4, &inner)))])), MALFORMED),

    // Texts that are no PEM of one CSR.
    ("an empty text", |s| s.csr(""), MALFORMED),
    ("a text that is no PEM", |s| s.csr("please"), MALFORMED),
    ("DER in base64 without its frame", |s| s.csr(bare(&mtls::csr(WEB))), MALFORMED),
    ("PEM without an end", |s| s.csr(mtls::csr(WEB).replace("END", "")), MALFORMED),
    ("PEM that is no base64", |s| s.csr("-----BEGIN CERTIFICATE REQUEST-----\n!!!!\n-----END CERTIFICATE REQUEST-----\n"), MALFORMED),
    ("PEM with nothing in it", |s| s.csr("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"), MALFORMED),
    ("PEM of a NUL", |s| s.csr(mtls::csr(WEB).replace("\n", "\0\n")), MALFORMED),
    ("two CSRs", |s| s.csr(mtls::csr(WEB) + &mtls::csr(WEB)), MALFORMED),
    ("ten CSRs", |s| s.csr(mtls::csr(WEB).repeat(10)), MALFORMED),
    ("a CSR and a certificate", |s| s.csr(mtls::csr(WEB) + &s.place.root_pem()), MALFORMED),
    ("a certificate", |s| s.csr(s.place.root_pem()), MALFORMED),
    ("a private key", private_key, MALFORMED),
    ("a CSR of 20 kB", |s| s.csr(csr(|c| c.attributes.push(attribute(UNKNOWN, &[tlv(4, &[0; 20_000])])))), MALFORMED),
    ("a text of 60 kB", |s| s.csr("a".repeat(60_000)), MALFORMED),
    ("a text of 60 kB of new lines", |s| s.csr("\n".repeat(60_000)), MALFORMED),
    ("beginnings of PEM, 60 kB of them", |s| s.csr("-----BEGIN CERTIFICATE REQUEST-----\n".repeat(1_650)), MALFORMED),
    ("a CSR of 1 MB", |s| s.csr(csr(|c| c.attributes.push(attribute(UNKNOWN, &[tlv(4, &[0; 700_000])])))), TOO_LARGE),
    ("a CSR of 4 MB", |s| s.csr("a".repeat(4_000_000)), TOO_LARGE),
    // Others' tools write PEM like this, and it is the same CSR.
    ("a CSR with a text around it", |s| s.csr(format!("Certificate Request:\r\n{}\r\nbye", mtls::csr(WEB))), Own(WEB)),
];

/// By the call of Istio 0.2, where a CSR has to name the caller and nobody else.
#[rustfmt::skip]
pub(super) const HANDLE_CSR: &[Row] = &[
    ("HandleCSR for oneself", |s| s.handle(Some(&s.web), mtls::csr(WEB)), Own(WEB)),
    ("HandleCSR without a credential", |s| s.handle(None, mtls::csr(WEB)), unauthenticated("NO_CREDENTIAL")),
    ("HandleCSR for another identity", |s| s.handle(Some(&s.web), mtls::csr(DB)), denied("CSR_IDENTITY")),
    ("HandleCSR for an identity in upper case", |s| s.handle(Some(&s.web), asking(&[names(&[(URI, WEB.to_uppercase().as_bytes())])])), denied("CSR_IDENTITY")),
    ("HandleCSR for oneself and a DNS name", |s| s.handle(Some(&s.web), asking(&[names(&[(URI, WEB.as_bytes()), (DNS, b"a")])])), denied("CSR_IDENTITY")),
    ("HandleCSR for oneself and an address", |s| s.handle(Some(&s.web), asking(&[names(&[(URI, WEB.as_bytes()), (IP, &[127, 0, 0, 1])])])), denied("CSR_IDENTITY")),
    ("HandleCSR for nobody", |s| s.handle(Some(&s.web), asking(&[])), invalid("CSR_NAMES")),
    ("HandleCSR for a common name alone", |s| s.handle(Some(&s.web), csr(|c| (c.subject, c.attributes) = (common_name(b"web"), Vec::new()))), invalid("CSR_NAMES")),
    ("HandleCSR for two URIs", |s| s.handle(Some(&s.web), asking(&[names(&[(URI, WEB.as_bytes()), (URI, DB.as_bytes())])])), invalid("CSR_URIS")),
    ("HandleCSR for CA:TRUE", |s| s.handle(Some(&s.web), asking(&[names(&[(URI, WEB.as_bytes())]), extension(BASIC_CONSTRAINTS, true, &ca())])), invalid("CSR_CA")),
    ("HandleCSR with DER", |s| s.handle(Some(&s.web), Csr::new().der()), MALFORMED),
    ("HandleCSR with nothing", |s| s.handle(Some(&s.web), ""), MALFORMED),
    ("HandleCSR with 1 MB", |s| s.handle(Some(&s.web), vec![0; 1_000_000]), TOO_LARGE),
];

const fn denied(reason: &'static str) -> Expected {
    Expected::Refused(Code::PermissionDenied, reason)
}

const RSA: &[&str] = &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"];
const RSA_SHA256: &[u8] =
    &[0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b, 0x05, 0x00];
const RSA_ENCRYPTION: &[u8] =
    &[0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00];

/// Of Mica's own extension.
const PROVED_AT_DER: &[u8] = &[
    0x2a, 0x86, 0x48, 0x86, 0xf7, 0x14, 0x01, 0xbe, 0x40, 0x93, 0x7a, 0x82, 0x8f, 0x03, 0x82, 0x8c, 0x61,
    0x82, 0x8d, 0x54, 0x81, 0x8d, 0x7d, 0x82, 0xfd, 0x4d, 0x85, 0xe7, 0xbf, 0x08, 0x82, 0x8d, 0xd8, 0x18,
];

/// Basic constraints that say CA:TRUE.
fn ca() -> Vec<u8> {
    sequence(&[tlv(1, &[0xff])])
}

/// A good CSR whose DER is changed after it was signed.
fn changed(change: fn(Vec<u8>) -> Vec<u8>) -> String {
    pem::encode(pem::CSR, &change(Csr::new().der()))
}

fn replace(mut der: Vec<u8>, old: &[u8], new: &[u8]) -> Vec<u8> {
    let at = der.windows(old.len()).position(|window| window == old).unwrap();
    der[at..at + old.len()].copy_from_slice(new);
    der
}

/// With this for the contents of the signature, or without one.
fn unsigned(der: Vec<u8>, signature: &[u8]) -> Vec<u8> {
    let (outer, info) = (header(&der), element(&der[header(&der)..]));
    let algorithm = element(&der[outer + info..]);
    let signature = if signature.is_empty() { Vec::new() } else { tlv(3, signature) };
    sequence(&[der[outer..outer + info + algorithm].to_owned(), signature])
}

/// How many bytes stand before the contents of a DER value.
fn header(der: &[u8]) -> usize {
    if der[1] < 0x80 { 2 } else { 2 + usize::from(der[1] & 0x7f) }
}

/// How many bytes a DER value has.
fn element(der: &[u8]) -> usize {
    let header = header(der);
    let length = match header {
        2 => usize::from(der[1]),
        _ => der[2..header].iter().fold(0, |length, byte| length << 8 | usize::from(*byte)),
    };
    header + length
}

/// An RSA key of a modulus and an exponent, both positive.
pub(super) fn rsa(modulus: &[u8], exponent: &[u8]) -> Vec<u8> {
    rsa_raw(&[&[0], modulus].concat(), exponent)
}

fn rsa_raw(modulus: &[u8], exponent: &[u8]) -> Vec<u8> {
    let key = sequence(&[tlv(2, modulus), tlv(2, exponent)]);
    sequence(&[RSA_ENCRYPTION.to_owned(), tlv(3, &[&[0], &key[..]].concat())])
}

/// Other bytes for the point of a P-256 key.
fn point(csr: &mut Csr, point: &[u8]) {
    let algorithm = csr.spki[2..23].to_vec();
    csr.spki = sequence(&[algorithm, tlv(3, &[&[0], point].concat())]);
}

fn two_values() -> Vec<u8> {
    let list = |id: &str| sequence(&[names(&[(URI, id.as_bytes())])]);
    attribute(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x0e], &[list(WEB), list(DB)])
}

fn bare(text: &str) -> String {
    text.lines().filter(|line| !line.starts_with('-')).collect()
}

/// What is sent by mistake is not repeated anywhere.
fn private_key(stage: &Stage) -> Answer {
    let key = mica::sys::keys::generate(mica::core::key::KeyKind::P256).unwrap();
    let text = key.to_pem().to_string();
    stage.is_secret(text.lines().nth(1).unwrap());
    stage.csr(text)
}
