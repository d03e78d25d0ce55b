//! What went wrong in other authorities and in what they are made of, each as the request that would find it here.
//! `docs/security-lessons.md` has the whole list, with those that tests elsewhere hold.

use std::fs;
use std::path::Path;

use rcgen::{CustomExtension, SanType};
use rustls::pki_types::CertificateDer;
use serde_json::json;
use tonic::Code;

use super::forge::{
    BASIC_CONSTRAINTS, Csr, DNS, EXTENDED_KEY_USAGE, URI, asking, common_name, csr, extension, names,
    self_signed, sequence, tlv, uri,
};
use super::{
    Answer, Ask, Cut, DB, Expected, Own, Row, Stage, TOO_LARGE, WEB, invalid, tokens, unauthenticated, wire,
};
use crate::serve::mtls;

#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    // The identity came from the CSR.
    ("spire_cve_2021_27098_the_csr_names_another_identity", |s| s.csr(mtls::csr(DB)), Own(WEB)),
    ("spire_0_7_a_csr_chooses_its_subject", |s| s.csr(csr(|c| c.subject = common_name(b"db"))), Own(WEB)),
    ("consul_cve_2022_40716_a_csr_with_two_uris", |s| s.csr(asking(&[names(&[(URI, WEB.as_bytes()), (URI, DB.as_bytes())])])), invalid("CSR_URIS")),
    ("consul_cve_2022_40716_a_certificate_with_two_uris", |s| s.by(s.ca.leaf(|p| p.subject_alt_names.push(uri(DB)))), unauthenticated("CERTIFICATE_MALFORMED")),
    ("linkerd_a_csr_without_proof_of_possession", |s| s.csr(csr(|c| c.spki = Csr::new().spki)), invalid("CSR_SIGNATURE")),
    ("linkerd_serial_numbers_count_up", serials, Own(WEB)),

    // Spellings of one identity.
    ("spire_cve_2021_27099_a_path_is_normalised", |s| s.by(s.ca.leaf(|p| p.subject_alt_names = vec![uri("spiffe://cluster.local/ns/shop/sa/x/../web")])), unauthenticated("CERTIFICATE_MALFORMED")),
    ("spire_cve_2021_27099_a_path_is_decoded", |s| s.by(s.ca.leaf(|p| p.subject_alt_names = vec![uri("spiffe://cluster.local/ns/shop/sa/%77eb")])), unauthenticated("CERTIFICATE_MALFORMED")),
    ("spire_0_8_a_token_whose_names_are_a_path", |s| tokens::of(s, "system:serviceaccount:shop:../shop/db"), unauthenticated("TOKEN_MALFORMED")),
    ("envoy_cve_2022_21656_a_uri_in_the_place_of_a_dns_name", |s| s.by(s.ca.leaf(|p| p.subject_alt_names = vec![SanType::DnsName(WEB.try_into().unwrap())])), unauthenticated("CERTIFICATE_MALFORMED")),
    ("envoy_cve_2022_21657_a_certificate_for_another_purpose", |s| s.by(s.ca.leaf(|p| p.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::EmailProtection])), unauthenticated("CERTIFICATE_MALFORMED")),

    // What was verified was not what was used.
    ("spire_1_15_1_a_good_certificate_beside_the_one_that_signed", beside, unauthenticated("CERTIFICATE_FOREIGN")),
    ("spire_1_14_6_a_claim_twice_of_which_the_other_is_read", |s| tokens::text(s, &tokens::claims_of(json!({})).replacen('{', r#"{"sub":"system:serviceaccount:shop:db","#, 1)), unauthenticated("TOKEN_MALFORMED")),
    ("spire_1_12_3_a_token_without_expiry", |s| tokens::raw_claims(s, |c| { c.remove("exp"); }), unauthenticated("TOKEN_EXPIRED")),
    ("jsonwebtoken_cve_2026_25537_an_expiry_that_is_a_text", |s| tokens::claims(s, json!({"exp": "4102444800"})), unauthenticated("TOKEN_EXPIRED")),
    ("jsonwebtoken_cve_2026_25537_a_beginning_that_is_a_text", |s| tokens::claims(s, json!({"nbf": "4102444800"})), unauthenticated("TOKEN_MALFORMED")),
    ("linkerd_another_audience_when_the_first_fails", |s| tokens::claims(s, json!({"aud": ["https://kubernetes.default.svc.cluster.local"]})), unauthenticated("TOKEN_AUDIENCE")),

    // A way past the check.
    ("consul_cve_2023_3518_a_bad_token_beside_a_good_certificate", |s| s.both(&s.web, "Bearer x.y.z"), unauthenticated("TOKEN_MALFORMED")),
    ("consul_cve_2023_3518_a_token_of_another_issuer_with_a_key_of_this_one", |s| tokens::claims(s, json!({"iss": "https://other.example.org"})), unauthenticated("TOKEN_ISSUER")),
    ("istio_cve_2022_39388_whoever_reaches_localhost_is_believed", |s| tokens::said(s, None, &[&format!("URI={DB}")]), unauthenticated("FORWARDER_UNKNOWN")),
    ("istio_cve_2022_39388_localhost_needs_a_credential_too", |s| s.headed(&[]), unauthenticated("NO_CREDENTIAL")),
    ("istio_cve_2026_31837_a_token_of_a_key_that_every_copy_holds", |s| tokens::claims(s, json!({"iss": mica::core::token::trial::ISSUER})), unauthenticated("TOKEN_ISSUER")),
    ("istio_cve_2026_41413_an_address_of_keys_in_the_token", tokens::address_of_keys, unauthenticated("TOKEN_SIGNATURE")),
    ("spire_1_14_2_an_address_of_the_callers_is_asked", tokens::address_of_keys, unauthenticated("TOKEN_SIGNATURE")),
    ("csi_driver_spiffe_a_nodes_helper_asks_for_any_identity", |s| s.impersonating(DB), unauthenticated("IMPERSONATOR_UNKNOWN")),
    ("step_ca_cve_2026_30836_a_kind_of_message_that_nobody_knows", |s| wire::path(s, "/istio.v1.auth.IstioCertificateService/Renew"), Expected::Status(Code::Unimplemented)),
    ("grpc_go_cve_2026_33186_a_method_without_its_first_slash", |s| wire::frames(s, &wire::headers("istio.v1.auth.IstioCertificateService/CreateCertificate")), Cut),

    // What stops the process, or fills it.
    ("istio_cve_2022_23635_a_token_that_crashes_its_reader", |s| s.bearer("."), unauthenticated("TOKEN_MALFORMED")),
    ("istio_cve_2022_24726_a_message_too_large", |s| s.csr("a".repeat(2_000_000)), TOO_LARGE),
    ("istio_cve_2022_39278_a_header_that_takes_long_to_match", |s| tokens::said(s, Some(s.gateway.clone()), &[&"URI=a;".repeat(2_000)]), unauthenticated("FORWARDED_MALFORMED")),
    ("step_ca_cve_2026_40097_a_csr_with_a_list_of_no_purposes", |s| s.csr(asking(&[no_purposes()])), Own(WEB)),
    ("step_ca_cve_2026_40097_a_certificate_with_a_list_of_no_purposes", |s| s.by(s.ca.leaf(|p| { p.extended_key_usages.clear(); p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 37], sequence(&[]))) })), unauthenticated("CERTIFICATE_MALFORMED")),
    ("cert_manager_cve_2024_12401_pem_that_takes_ever_longer", |s| within(s, |s| s.csr("-----BEGIN ".repeat(5_800))), invalid("CSR_MALFORMED")),
    ("spire_1_14_2_many_certificates_to_verify", |s| within(s, |s| s.by(s.many_certificates())), unauthenticated("CERTIFICATE_MALFORMED")),
    ("spire_1_14_2_a_key_that_takes_long_to_verify", |s| within(s, |s| s.csr(csr(|c| c.spki = super::csrs::rsa(&[0xff; 8_192], &[1, 0, 1])))), invalid("KEY_REFUSED")),
    ("spire_1_9_3_memory_is_taken_for_what_a_client_says_it_will_send", |s| wire::says_4_gb(s), TOO_LARGE),
    ("tonic_rustsec_2024_0376_a_connection_that_fails_ends_the_listener", |s| wire::babble(s), Cut),
];

/// The other way in has the same door.
#[rustfmt::skip]
pub(super) const HANDLE_CSR: &[Row] = &[
    ("step_ca_cve_2025_44005_another_protocol_asks_for_no_credential", |s| s.handle(None, mtls::csr(WEB)), unauthenticated("NO_CREDENTIAL")),
    ("step_ca_cve_2025_44005_another_protocol_asks_for_another_identity", |s| s.handle(Some(&s.web), mtls::csr(DB)), Expected::Refused(Code::PermissionDenied, "CSR_IDENTITY")),
    ("step_ca_cve_2025_44005_another_protocol_asks_for_a_ca", |s| s.handle(Some(&s.web), asking(&[names(&[(URI, WEB.as_bytes())]), extension(BASIC_CONSTRAINTS, true, &sequence(&[tlv(1, &[0xff])]))])), invalid("CSR_CA")),
    ("step_ca_cve_2025_44005_another_protocol_asks_for_dns_names", |s| s.handle(Some(&s.web), asking(&[names(&[(URI, WEB.as_bytes()), (DNS, b"istiod.istio-system.svc")])])), Expected::Refused(Code::PermissionDenied, "CSR_IDENTITY")),
];

impl Stage {
    fn impersonating(&self, id: &str) -> Answer {
        let mut ask = self.ask();
        let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(id.to_owned())) };
        let fields = [("ImpersonatedIdentity".to_owned(), value)].into();
        ask.message.metadata = Some(prost_types::Struct { fields });
        let headers = vec![("authorization", format!("Bearer {}", self.issuer.token("web")))];
        self.send(Ask { identity: None, headers, ..ask })
    }

    /// A good one, and as many that are signed by one another as a handshake takes.
    fn many_certificates(&self) -> super::Identity {
        let mut identity = self.ca.leaf(|_| ());
        let other = self_signed().chain.remove(0);
        identity.chain.extend(vec![other; 100]);
        identity
    }
}

fn no_purposes() -> Vec<u8> {
    extension(EXTENDED_KEY_USAGE, false, &sequence(&[]))
}

/// Web's certificate as everybody can have it, behind one that somebody else holds the key of.
fn beside(stage: &Stage) -> Answer {
    let mut identity = self_signed();
    identity.chain.extend(stage.web.chain.iter().cloned().map(CertificateDer::into_owned));
    stage.by(identity)
}

/// Four certificates whose serial numbers are long, and have nothing in common.
fn serials(stage: &Stage) -> Answer {
    let mut seen: Vec<[u8; 8]> = Vec::new();
    let mut last = None;
    for _ in 0..4 {
        let answer = stage.send(stage.ask());
        let Answer::Issued(issued) = &answer else { return answer };
        let leaf =
            mica::core::certificate::Certificate::all_from_pem(issued.chain[0].as_bytes()).unwrap().remove(0);
        // Of 127 random bits, fewer than 96 stand behind leading zeros once in 2^31.
        assert!((12..=16).contains(&leaf.serial.len()), "{leaf:?}");
        let start = leaf.serial[..8].try_into().unwrap();
        assert!(!seen.contains(&start), "{leaf:?}");
        seen.push(start);
        last = Some(answer);
    }
    last.unwrap()
}

/// Fast, even in a debug build on a busy machine.
fn within(stage: &Stage, ask: impl Fn(&Stage) -> Answer) -> Answer {
    let begun = std::time::Instant::now();
    let answer = ask(stage);
    assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{:?}", begun.elapsed());
    answer
}

#[test]
fn every_lesson_is_in_the_document() {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/security-lessons.md");
    let document = fs::read_to_string(document).unwrap();
    for (name, ..) in ROWS.iter().chain(HANDLE_CSR) {
        assert!(document.contains(&format!("`{name}`")), "{name}");
    }
}

#[test]
fn no_dependency_is_of_a_version_with_a_known_fault() {
    let lock = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock")).unwrap();
    let version =
        |text: &str| -> Vec<u64> { text.split('.').map(|part| part.parse().unwrap_or(0)).collect() };
    // RUSTSEC-2026-0049, -0098, -0099 and -0104; RUSTSEC-2024-0376; CVE-2023-44487 and CVE-2023-45288; CVE-2026-25537.
    for (name, least) in
        [("rustls-webpki", "0.103.13"), ("tonic", "0.12.3"), ("h2", "0.4.4"), ("jsonwebtoken", "10.3.0")]
    {
        let mut found = 0;
        for (_, rest) in lock
            .match_indices(&format!("name = \"{name}\"\nversion = \""))
            .map(|(at, it)| (at, &lock[at + it.len()..]))
        {
            let used = rest.split('"').next().unwrap();
            assert!(version(used) >= version(least), "{name} {used}");
            found += 1;
        }
        // The last one is not used here, and may come back.
        assert!(found > 0 || name == "jsonwebtoken", "{name} is not used any more: look for what is");
    }
}
