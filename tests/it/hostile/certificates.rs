//! Client certificates. Those that lead to Mica's root were signed with its own key, which nobody has: each shows what
//! Mica would do if its CA had been talked into one, and none asks for more than its own name.

use rcgen::{BasicConstraints, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use time::{Duration, OffsetDateTime};

use super::forge::{Ca, self_signed, tlv, uri};
use tonic::Code;

use super::{Answer, Ask, Cut, DB, Expected, Identity, Own, Row, Stage, WEB, unauthenticated};

const MALFORMED: Expected = unauthenticated("CERTIFICATE_MALFORMED");
const FOREIGN: Expected = unauthenticated("CERTIFICATE_FOREIGN");

#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    ("no certificate and no token", |s| s.send(Ask { identity: None, ..s.ask() }), unauthenticated("NO_CREDENTIAL")),

    // What the others differ from.
    ("a certificate made by hand", |s| s.by(s.ca.leaf(|_| ())), Own(WEB)),
    ("a certificate below an intermediate", |s| s.by(s.ca.intermediate(|_| ()).leaf(|_| ())), Own(WEB)),
    ("a certificate below three intermediates", |s| s.by(s.ca.intermediate(|_| ()).intermediate(|_| ()).intermediate(|_| ()).leaf(|_| ())), Own(WEB)),

    // Time.
    ("a certificate that has expired", |s| s.by(s.ca.leaf(|p| p.not_after = OffsetDateTime::now_utc() - Duration::seconds(2))), unauthenticated("CERTIFICATE_EXPIRED")),
    ("a certificate that is not yet valid", |s| s.by(s.ca.leaf(|p| p.not_before = OffsetDateTime::now_utc() + Duration::MINUTE)), unauthenticated("CERTIFICATE_NOT_YET_VALID")),
    ("a certificate that ends before it begins", |s| s.by(s.ca.leaf(|p| (p.not_before, p.not_after) = (p.not_after, p.not_before))), unauthenticated("CERTIFICATE_NOT_YET_VALID")),
    ("a certificate below an intermediate that has expired", |s| s.by(s.ca.intermediate(|p| p.not_after = OffsetDateTime::now_utc() - Duration::seconds(2)).leaf(|_| ())), unauthenticated("CERTIFICATE_EXPIRED")),

    // Whose it is.
    ("a certificate of another trust domain", |s| s.by(s.ca.leaf(|p| p.subject_alt_names = vec![uri("spiffe://example.org/ns/shop/sa/web")])), FOREIGN),
    ("a certificate of a trust domain in upper case", |s| s.by(s.ca.leaf(|p| p.subject_alt_names = vec![uri("spiffe://CLUSTER.LOCAL/ns/shop/sa/web")])), MALFORMED),
    ("a certificate with two URIs", |s| s.by(s.ca.leaf(|p| p.subject_alt_names.push(uri(DB)))), MALFORMED),
    ("a certificate with the same URI twice", |s| s.by(s.ca.leaf(|p| p.subject_alt_names.push(uri(WEB)))), MALFORMED),
    ("a certificate without a URI", |s| s.by(s.ca.leaf(|p| p.subject_alt_names.clear())), MALFORMED),
    ("a certificate that names web in its common name alone", |s| s.by(s.ca.leaf(|p| { p.subject_alt_names.clear(); p.distinguished_name.push(DnType::CommonName, WEB) })), MALFORMED),
    ("a certificate with a DNS name beside its URI", |s| s.by(s.ca.leaf(|p| p.subject_alt_names.push(rcgen::SanType::DnsName("db.shop.svc".try_into().unwrap())))), Own(WEB)),
    ("a certificate of the trust domain itself", |s| named(s, "spiffe://cluster.local"), MALFORMED),
    ("a certificate whose path is no service account's", |s| named(s, "spiffe://cluster.local/workload/web"), MALFORMED),
    ("a certificate whose path goes on behind the account", |s| named(s, "spiffe://cluster.local/ns/shop/sa/web/x"), MALFORMED),
    ("a certificate whose path goes up", |s| named(s, "spiffe://cluster.local/ns/shop/sa/../sa/web"), MALFORMED),
    ("a certificate whose path is encoded", |s| named(s, "spiffe://cluster.local/ns/shop/sa/%77eb"), MALFORMED),
    ("a certificate whose account is in upper case", |s| named(s, "spiffe://cluster.local/ns/shop/sa/WEB"), MALFORMED),
    ("a certificate with a query behind its path", |s| named(s, "spiffe://cluster.local/ns/shop/sa/web?x"), MALFORMED),
    ("a certificate of an account that never was", |s| named(s, "spiffe://cluster.local/ns/shop/sa/nobody"), unauthenticated("ACCOUNT_GONE")),
    ("a certificate of an account that was removed", |s| s.by(s.gone.clone()), unauthenticated("ACCOUNT_GONE")),

    ("a certificate of an account that policy denies", |s| named(s, "spiffe://cluster.local/ns/shop/sa/denied"), Expected::Refused(Code::PermissionDenied, "IDENTITY_DENIED")),
    ("a certificate that was renewed for 31 days without a token", |s| s.by(s.ca.proved_at(&ago(Duration::days(31)))), unauthenticated("RENEWED_TOO_LONG")),
    ("a certificate that was renewed for 29 days", |s| s.by(s.ca.proved_at(&ago(Duration::days(29)))), Own(WEB)),

    // What it is for.
    ("a certificate of a CA", |s| s.by(s.ca.leaf(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))), MALFORMED),
    ("the certificate of an intermediate, in its own name", |s| s.by(s.ca.intermediate(|_| ()).itself()), MALFORMED),
    ("a certificate that may sign certificates", |s| s.by(s.ca.leaf(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign))), MALFORMED),
    ("a certificate without a key usage", |s| s.by(s.ca.leaf(|p| p.key_usages.clear())), MALFORMED),
    ("a certificate that may not sign", |s| s.by(s.ca.leaf(|p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment])), MALFORMED),
    // X509-SVID 4.4 lets it be left out.
    ("a certificate without an extended key usage", |s| s.by(s.ca.leaf(|p| p.extended_key_usages.clear())), Own(WEB)),
    ("a certificate for servers alone", |s| s.by(s.ca.leaf(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth])), MALFORMED),
    ("a certificate for signing code", |s| s.by(s.ca.leaf(|p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning])), MALFORMED),
    ("a certificate with a critical extension that nobody knows", |s| s.by(s.ca.leaf(|p| p.custom_extensions.push(unknown(10, true)))), Cut),
    ("a certificate with an extension of 60 kB", |s| s.by(s.ca.leaf(|p| p.custom_extensions.push(unknown(60_000, false)))), Own(WEB)),
    ("a certificate with an extension twice", |s| s.by(s.ca.leaf(|p| p.custom_extensions = vec![unknown(10, false), unknown(10, false)])), MALFORMED),
    ("a certificate whose last proof cannot be read", |s| s.by(s.ca.proved_at(b"\x18\x0fnever, honestly")), MALFORMED),

    // Who signed it.
    ("a certificate signed with its own key", |s| s.by(self_signed()), FOREIGN),
    ("a certificate of a CA with Mica's name and another key", |s| s.by(Ca::pretended(&s.place).leaf(|_| ())), FOREIGN),
    ("the same, with Mica's root sent behind it", |s| s.by(with(Ca::pretended(&s.place).leaf(|_| ()), roots(s))), FOREIGN),
    ("a certificate signed with a workload's key", |s| s.by(s.ca.intermediate(|p| { p.is_ca = IsCa::ExplicitNoCa; p.key_usages = vec![KeyUsagePurpose::DigitalSignature] }).leaf(|_| ())), FOREIGN),
    ("a certificate below an intermediate that may not sign", |s| s.by(s.ca.intermediate(|p| p.key_usages = vec![KeyUsagePurpose::CrlSign]).leaf(|_| ())), FOREIGN),
    ("a certificate below an intermediate without a key usage", |s| s.by(s.ca.intermediate(|p| p.key_usages.clear()).leaf(|_| ())), FOREIGN),
    ("a certificate below an intermediate that is no CA", |s| s.by(s.ca.intermediate(|p| p.is_ca = IsCa::NoCa).leaf(|_| ())), FOREIGN),
    ("a certificate deeper than its intermediate allows", |s| s.by(s.ca.intermediate(|p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0))).intermediate(|_| ()).leaf(|_| ())), FOREIGN),
    ("a certificate without the intermediate above it", |s| s.by(first(s.ca.intermediate(|_| ()).leaf(|_| ()), 1)), FOREIGN),
    ("a certificate changed after it was signed", |s| s.by(tampered(s.ca.leaf(|_| ()))), FOREIGN),

    // How much of it there is.
    ("ten certificates", |s| s.by(with(s.ca.leaf(|_| ()), vec![s.web.chain[0].clone(); 9])), MALFORMED),
    ("a thousand certificates, 60 kB of them", |s| s.by(with(s.ca.leaf(|_| ()), vec![CertificateDer::from(vec![0x30, 0]); 1_000])), MALFORMED),
    ("eight certificates that have nothing to do with one another", |s| s.by(with(s.ca.leaf(|_| ()), (0..7).map(|_| self_signed().chain.remove(0)).collect())), Own(WEB)),
    ("eight certificates, 60 kB of them", |s| s.by(with(s.ca.leaf(|_| ()), vec![s.ca.leaf(|p| p.custom_extensions.push(unknown(8_000, false))).chain[0].clone(); 7])), Own(WEB)),
    ("a certificate that cannot be read behind a good one", |s| s.by(with(s.web.clone(), vec![CertificateDer::from(vec![0; 100])])), MALFORMED),
    ("a certificate that cannot be read", |s| s.by(Identity { chain: vec![CertificateDer::from(vec![0x30, 0])], ..s.web.clone() }), Cut),
    ("a certificate without its key", |s| s.by(Identity { key: self_signed().key, ..s.web.clone() }), Cut),
    ("the certificate of db with the key of web", |s| s.by(Identity { chain: s.db.chain.clone(), ..s.web.clone() }), Cut),
];

/// With a certificate of Mica's for this URI.
fn named(stage: &Stage, id: &str) -> Answer {
    stage.by(stage.ca.leaf(|params| params.subject_alt_names = vec![uri(id)]))
}

fn with(mut identity: Identity, more: Vec<CertificateDer<'static>>) -> Identity {
    identity.chain.extend(more);
    identity
}

fn first(mut identity: Identity, count: usize) -> Identity {
    identity.chain.truncate(count);
    identity
}

fn roots(stage: &Stage) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(stage.place.root_pem().as_bytes()).map(Result::unwrap).collect()
}

fn unknown(length: usize, critical: bool) -> CustomExtension {
    let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4, 5], vec![0; length]);
    extension.set_criticality(critical);
    extension
}

fn tampered(mut identity: Identity) -> Identity {
    let mut der = identity.chain[0].to_vec();
    let at = der.windows(7).position(|window| window == b"/sa/web").unwrap();
    der[at + 4..at + 7].copy_from_slice(b"wea");
    identity.chain[0] = der.into();
    identity
}

/// A moment of the past, as a GeneralizedTime.
fn ago(before: Duration) -> Vec<u8> {
    let format = time::macros::format_description!("[year][month][day][hour][minute][second]Z");
    tlv(0x18, (OffsetDateTime::now_utc() - before).format(format).unwrap().as_bytes())
}
