use std::sync::Arc;

use proptest::prelude::*;
use rcgen::{CertificateParams, CustomExtension, DnType, IsCa, KeyPair, SanType};
use time::macros::datetime;

use super::*;
use crate::core::bundle::TrustBundle;
use crate::core::certificate::Certificate;
use crate::core::issuer::{Issuer, Order, root};
use crate::core::key::{KeyKind, PrivateKey};
use crate::core::profile::Profile;
use crate::core::spiffe::{ServiceAccount, TrustDomain};
use crate::sys::keys;

const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);

/// A root, an intermediate and a leaf, with their keys.
struct World {
    root: Certificate,
    root_key: PrivateKey,
    ca: Certificate,
    ca_key: PrivateKey,
    leaf: Certificate,
    leaf_key: PrivateKey,
}

fn world() -> World {
    let trust_domain = TrustDomain::parse("cluster.local").unwrap();
    let organization = "example".parse().unwrap();
    let [root_key, ca_key, leaf_key] = [(); 3].map(|()| keys::generate(KeyKind::P256).unwrap());
    let serial = || keys::serial_number().unwrap();
    let profile = Profile::Root { organization: &organization, trust_domain: &trust_domain };
    let signing = root_key.signing().unwrap();
    let made = root(&signing, &profile, "10y".parse().unwrap(), NOW, serial()).unwrap();
    let root = Certificate::from_der(made.der()).unwrap();
    let bundle = TrustBundle::new([root.clone()]).unwrap();
    let top =
        Issuer::new(Arc::new(signing), std::slice::from_ref(&root), bundle.clone(), &trust_domain).unwrap();
    let order = Order {
        profile: Profile::Intermediate { organization: &organization, trust_domain: &trust_domain },
        key: ca_key.public(),
        lifetime: "1y".parse().unwrap(),
    };
    let ca = Certificate::from_der(top.issue(&order, NOW, serial()).unwrap().der()).unwrap();
    let signing = Arc::new(ca_key.signing().unwrap());
    let issuer = Issuer::new(signing, std::slice::from_ref(&ca), bundle, &trust_domain).unwrap();
    let id = ServiceAccount::new("a", "b").unwrap().spiffe_id(&trust_domain);
    let order = Order {
        profile: Profile::Workload { id: &id, dns: &[], proved_at: None },
        key: leaf_key.public(),
        lifetime: "24h".parse().unwrap(),
    };
    let leaf = Certificate::from_der(issuer.issue(&order, NOW, serial()).unwrap().der()).unwrap();
    World { root, root_key, ca, ca_key, leaf, leaf_key }
}

fn file(name: &str, text: impl AsRef<[u8]>) -> Input {
    Input { folder: None, name: name.to_owned(), bytes: text.as_ref().to_vec().into() }
}

fn in_folder(name: &str, text: impl AsRef<[u8]>) -> Input {
    Input { folder: Some("f".to_owned()), ..file(name, text) }
}

fn look(inputs: &[Input]) -> Inspection {
    inspect(inputs, None, NOW + time::Duration::HOUR).unwrap()
}

fn chain(certificates: &[&Certificate]) -> String {
    certificates.iter().map(|c| c.to_pem()).collect()
}

/// Everything that is wrong, in one text.
fn wrong(inspection: &Inspection) -> String {
    let of_items = inspection.items.iter().flat_map(|item| item.problems.clone());
    of_items.chain(inspection.problems.clone()).collect::<Vec<_>>().join("\n")
}

#[test]
fn what_mica_makes_is_sound() {
    let w = world();
    for inputs in [
        vec![file("leaf", w.leaf.to_pem())],
        vec![file("chain", chain(&[&w.leaf, &w.ca])), file("key", w.leaf_key.to_pem().as_bytes())],
        vec![file("der", w.leaf.der())],
        vec![file("roots", chain(&[&w.root]))],
        vec![
            in_folder("cert-chain.pem", chain(&[&w.leaf, &w.ca])),
            in_folder("key.pem", w.leaf_key.to_pem().as_bytes()),
            in_folder("root-cert.pem", w.root.to_pem()),
        ],
        vec![
            in_folder("ca-cert.pem", w.ca.to_pem()),
            in_folder("ca-key.pem", w.ca_key.to_pem().as_bytes()),
            in_folder("cert-chain.pem", chain(&[&w.ca, &w.root])),
            in_folder("root-cert.pem", w.root.to_pem()),
        ],
    ] {
        let inspection = look(&inputs);
        assert!(inspection.sound, "{inspection}");
    }
}

#[test]
fn a_key_is_matched_and_never_shown() {
    let w = world();
    let key = w.leaf_key.to_pem();
    let found = look(&[file("chain", chain(&[&w.leaf, &w.ca])), file("key", key.as_bytes())]);
    let Facts::PrivateKey(facts) = &found.items[2].facts else { panic!("{found}") };
    assert_eq!(facts.belongs_to, ["chain, certificate 1"]);
    for written in [found.to_string(), serde_json::to_string(&found).unwrap()] {
        for line in key.lines().filter(|line| !line.starts_with('-')) {
            assert!(!written.contains(line));
        }
    }
    let other = look(&[file("leaf", w.leaf.to_pem()), file("key", w.ca_key.to_pem().as_bytes())]);
    assert!(wrong(&other).contains("it belongs to none of the certificates beside it"));
    let folder = look(
        &[
            in_folder("ca-cert.pem", w.ca.to_pem()),
            in_folder("ca-key.pem", w.root_key.to_pem().as_bytes()),
            in_folder("cert-chain.pem", ""),
            in_folder("root-cert.pem", w.root.to_pem()),
        ]
        .into_iter()
        .filter(|input| !input.bytes.is_empty())
        .collect::<Vec<_>>(),
    );
    assert!(!folder.sound);
}

#[test]
fn a_protected_key_is_opened_only_with_its_passphrase() {
    let w = world();
    let locked = w.leaf_key.to_encrypted_pem(b"secret", [1; 16], [2; 16]).unwrap();
    let inputs = [file("leaf", w.leaf.to_pem()), file("key", locked)];
    let closed = look(&inputs);
    assert!(closed.sound && closed.notes.iter().any(|note| note.contains("--passphrase-file")));
    let opened = inspect(&inputs, Some(b"secret"), NOW).unwrap();
    let Facts::PrivateKey(facts) = &opened.items[1].facts else { panic!("{opened}") };
    assert!(facts.protected && facts.belongs_to == ["leaf"]);
    assert!(wrong(&inspect(&inputs, Some(b"wrong"), NOW).unwrap()).contains("the passphrase is wrong"));
}

#[test]
fn times_are_said_in_words() {
    let w = world();
    let at = |at| inspect(&[file("leaf", w.leaf.to_pem())], None, at).unwrap();
    assert!(at(NOW + 13 * time::Duration::HOUR).to_string().contains("expires in 11 h"));
    let late = at(NOW + 4 * time::Duration::DAY);
    assert!(wrong(&late).contains("it expired 3 d ago"), "{late}");
    let early = at(NOW - time::Duration::HOUR);
    assert!(wrong(&early).contains("it is not yet valid: it begins in 58 min"), "{early}");
}

#[test]
fn the_order_and_completeness_of_a_chain_are_judged() {
    let w = world();
    let text = chain(&[&w.leaf, &w.root, &w.ca]);
    let found = wrong(&look(&[file("x", text)]));
    assert!(found.contains("the order is wrong: x, certificate 1 was issued by x, certificate 3"), "{found}");
    let found = wrong(&look(&[file("x", chain(&[&w.leaf, &w.ca, &w.root]))]));
    assert!(found.contains("x, certificate 3 is the root, which peers have already"), "{found}");
    let found = wrong(&look(&[
        in_folder("cert-chain.pem", w.leaf.to_pem()),
        in_folder("root-cert.pem", w.root.to_pem()),
    ]));
    assert!(found.contains("an intermediate is missing, or the root is another's"), "{found}");
    let alone = look(&[file("x", w.leaf.to_pem())]);
    assert!(alone.sound && alone.notes[0].contains("which is not here"), "{alone}");
    let other = world();
    let found = wrong(&look(&[
        in_folder("cert-chain.pem", chain(&[&w.leaf, &w.ca])),
        in_folder("root-cert.pem", other.root.to_pem()),
    ]));
    assert!(found.contains("the root is another's"), "{found}");
}

#[expect(clippy::disallowed_methods, reason = "a foreign key, made by a foreign crate")]
fn foreign(change: impl FnOnce(&mut CertificateParams)) -> Certificate {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params.not_before = NOW;
    params.not_after = NOW + time::Duration::DAY;
    change(&mut params);
    Certificate::from_der(params.self_signed(&key).unwrap().der()).unwrap()
}

#[test]
fn rules_that_are_broken_are_named() {
    let found = wrong(&look(&[file("x", foreign(|_| {}).to_pem())]));
    assert!(found.contains("[X509-SVID 2]") && found.contains("[X509-SVID 4.3]"), "{found}");
    let found = wrong(&look(&[file(
        "x",
        foreign(|params| {
            let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
            extension.set_criticality(true);
            params.custom_extensions = vec![extension];
        })
        .to_pem(),
    )]));
    assert!(found.contains("its extension 1.2.3.4 is critical"), "{found}");
    let found = wrong(&look(&[file(
        "x",
        foreign(|params| {
            params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/a".try_into().unwrap())];
        })
        .to_pem(),
    )]));
    assert!(found.contains("[X509-SVID 3.2]") && found.contains("it has no key usage"), "{found}");
}

#[test]
fn foreign_text_cannot_draw_on_the_terminal() {
    let certificate = foreign(|params| {
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "a\u{1b}[2Jb\nwrong: \u{202e}c");
    });
    let text = look(&[file("x\n\u{1b}y", certificate.to_pem())]).to_string();
    assert!(text.chars().all(|c| c == '\n' || !c.is_control()) && !text.contains('\u{202e}'), "{text:?}");
    assert!(!text.lines().any(|line| line.starts_with("wrong: \\u")), "{text}");
}

fn secret(kind: &str, values: &[(&str, &str)]) -> String {
    use base64::Engine as _;
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let data: String = values.iter().map(|(name, text)| format!("  {name}: {}\n", encode(text))).collect();
    format!(
        "apiVersion: v1\nkind: Secret\ntype: {kind}\nmetadata:\n  name: istio.b\n  namespace: a\ndata:\n{data}"
    )
}

#[test]
fn secrets_of_each_type_are_read() {
    let w = world();
    let leaf = [
        ("cert-chain.pem", chain(&[&w.leaf, &w.ca])),
        ("key.pem", w.leaf_key.to_pem().to_string()),
        ("root-cert.pem", w.root.to_pem()),
    ];
    let ca = [
        ("ca-cert.pem", w.root.to_pem()),
        ("ca-key.pem", w.root_key.to_pem().to_string()),
        ("cert-chain.pem", String::new()),
        ("key.pem", String::new()),
        ("root-cert.pem", String::new()),
    ];
    let tls = [
        ("tls.crt", chain(&[&w.leaf, &w.ca])),
        ("tls.key", w.leaf_key.to_pem().to_string()),
        ("ca.crt", w.root.to_pem()),
    ];
    for (kind, values, count) in [
        ("istio.io/key-and-cert", &leaf[..], 4),
        ("istio.io/ca-root", &ca[..], 2),
        ("kubernetes.io/tls", &tls[..], 4),
    ] {
        let values: Vec<_> = values.iter().map(|(name, text)| (*name, text.as_str())).collect();
        let found = look(&[file("-", secret(kind, &values))]);
        assert!(found.sound && found.items.len() == count, "{kind}: {found}");
        assert!(found.items[0].source.starts_with(&format!("secret a/istio.b ({kind}), ")), "{found}");
    }
    let mixed = [("cert-chain.pem", leaf[0].1.as_str()), ("key.pem", &w.root_key.to_pem())];
    assert!(!look(&[file("-", secret("istio.io/key-and-cert", &mixed))]).sound);
    let several = format!(
        "{}---\n{}",
        secret("kubernetes.io/tls", &[("tls.crt", &tls[0].1)]),
        secret("kubernetes.io/tls", &[("tls.key", &w.root_key.to_pem())])
    );
    assert!(look(&[file("-", several)]).sound, "two Secrets are not judged together");
}

#[test]
fn lists_and_json_are_read_as_kubectl_prints_them() {
    let w = world();
    let item = serde_json::json!({ "metadata": { "name": "x" }, "stringData": { "a.pem": w.root.to_pem() } });
    for list in [
        serde_json::json!({ "kind": "SecretList", "items": [item, item] }),
        serde_json::json!({ "kind": "List", "items": [{ "kind": "ConfigMap", "data": { "root-cert.pem": w.root.to_pem() } }, { "kind": "Secret", "stringData": { "a.pem": w.root.to_pem() } }] }),
    ] {
        assert_eq!(look(&[file("-", list.to_string())]).items.len(), 2);
    }
}

#[test]
fn spiffe_bundles_are_read_with_their_faults() {
    let w = world();
    let json = TrustBundle::new([w.root.clone()]).unwrap().to_json().unwrap();
    assert!(look(&[file("b", &json)]).sound);
    let with_kid = json.replace("\"use\"", "\"kid\": \"a\", \"use\"");
    assert!(wrong(&look(&[file("b", with_kid)])).contains("key 1 has a kid"));
    let empty = look(&[file("b", "{\"keys\": []}")]);
    assert!(wrong(&empty).contains("trusts nobody"));
    let map = format!("{{\"trust_domains\": {{\"cluster.local\": {json}}}}}");
    assert!(look(&[file("b", map)]).to_string().contains("SPIFFE bundle of cluster.local"));
}

#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let w = world();
    for (bytes, reason) in [
        (&b""[..], "it is empty"),
        (b"hello", "neither PEM nor DER"),
        (b"{", "not JSON"),
        (b"{}", "no SPIFFE bundle"),
        (b"kind: Pod\n", "\"Pod\" holds nothing"),
        (b"kind: [\n", "cannot be read"),
        (b"kind: Secret\ndata:\n  a.pem: '*'\n", "not base64"),
        (&w.leaf.to_pem().as_bytes()[..200], "no end"),
        (&w.leaf.der()[..100], "it is DER, but"),
        (b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "X509 CRL is nothing that mica reads"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "not X.509 DER"),
    ] {
        let refused = inspect(&[file("x", bytes)], None, NOW).unwrap_err().to_string();
        assert!(refused.starts_with("x: ") && refused.contains(reason), "{refused}");
    }
    let long = vec![b'-'; crate::core::pem::MAX + 1];
    assert!(inspect(&[file("x", long)], None, NOW).is_err());
    let beside = [in_folder("README", "hello"), in_folder("a.pem", w.root.to_pem())];
    assert!(look(&beside).notes[0].contains("f/README is nothing that mica reads"));
}

proptest! {
    #[test]
    fn any_bytes_are_looked_at_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = inspect(&[file("x", bytes)], None, NOW);
    }

    #[test]
    fn a_changed_certificate_is_looked_at_without_a_panic(at in 0usize..10_000, to: u8) {
        thread_local!(static LEAF: Vec<u8> = world().leaf.der().to_vec());
        let mut der = LEAF.with(Clone::clone);
        let at = at % der.len();
        der[at] = to;
        if let Ok(found) = inspect(&[file("x", der)], None, NOW) {
            let _ = found.to_string();
        }
    }

    #[test]
    fn any_text_is_one_line(text: String) {
        prop_assert!(one_line(&text).chars().all(|c| !c.is_control()));
    }

    #[test]
    fn distances_are_short(seconds: i64) {
        prop_assert!(distance(seconds).len() < 24);
    }
}
