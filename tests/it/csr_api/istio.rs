//! A client made of istio.io/api and grpc-go, which judges answers as pilot-agent and ztunnel do.

use std::fs;

use super::{WEB, istio, istio_grants, istio_refuses, start};
use crate::serve::authority::{Brought, P256};
use crate::serve::{Place, wait_for};
use std::time::Duration;

#[test]
fn every_kind_of_key_is_certified_over_either_version_of_tls() {
    let (place, mica, folder) = start(&[]);
    for version in ["--tls12", "--tls13"] {
        for (kind, algorithm) in [
            ("p256", "ECDSA"),
            ("p384", "ECDSA"),
            ("ed25519", "Ed25519"),
            ("rsa2048", "RSA"),
            ("rsa3072", "RSA"),
            ("rsa4096", "RSA"),
        ] {
            let granted =
                istio_grants(&place, &mica, "create", &folder, &[version, "--key-kind", kind, "--san", WEB]);
            assert_eq!((granted.text("id"), granted.text("key_algorithm")), (WEB, algorithm));
            assert_eq!(granted.text("subject"), "");
            assert_eq!(granted.json["dns"], serde_json::Value::Null);
        }
    }
    for (kind, reason) in [("rsa1024", "KEY_REFUSED"), ("p521", "KEY_REFUSED")] {
        for verb in ["create", "handle"] {
            let arguments = ["--key-kind", kind, "--san", WEB];
            istio_refuses(&place, &mica, verb, &folder, &arguments, ("InvalidArgument", reason));
        }
    }
    mica.stop();
}

#[test]
fn the_lifetime_is_the_one_asked_for_or_the_default_and_never_over_the_longest() {
    let (place, mica, folder) = start(&["--ttl", "2h", "--max-ttl", "4h"]);
    let seconds = |ttl: &str| {
        let exact = ["--ttl", ttl, "--metadata-json", r#"{"ExactLifetime": true}"#];
        istio_grants(&place, &mica, "create", &folder, &exact).json["seconds"].as_i64().unwrap()
    };
    for (ttl, wanted) in
        [("3600", 3_600), ("0", 7_200), ("-1", 7_200), ("-9223372036854775808", 7_200), ("14400", 14_400)]
    {
        assert!((wanted - 5..=wanted).contains(&seconds(ttl)), "{ttl}: {}", seconds(ttl));
    }
    for ttl in ["14401", "9223372036854775807"] {
        let how = ("InvalidArgument", "LIFETIME_TOO_LONG");
        istio_refuses(&place, &mica, "create", &folder, &["--ttl", ttl], how);
    }
    mica.stop();
}

#[test]
fn the_answer_is_framed_as_agents_take_it_apart() {
    // A root alone.
    let (place, mica, folder) = start(&[]);
    let granted = istio_grants(&place, &mica, "create", &folder, &[]);
    assert_eq!((&granted.json["intermediates"], &granted.json["roots"]), (&0.into(), &1.into()));
    mica.stop();

    // An intermediate; then one with a bundle of two roots, the second of them somebody else's.
    for roots in [1, 2] {
        let (place, brought) = (Place::new(), Brought::new());
        place.account("web");
        let folder = brought.intermediate("one", &P256, "30");
        if roots == 2 {
            let other =
                fs::read_to_string(Brought::new().intermediate("other", &P256, "30").join("root-cert.pem"));
            let own = fs::read_to_string(folder.join("root-cert.pem")).unwrap();
            fs::write(folder.join("root-cert.pem"), own + &other.unwrap()).unwrap();
        }
        let mica = place.start(&["--authority", folder.to_str().unwrap()]);
        let folder = place.folder("shop", "web");
        for version in ["--tls12", "--tls13"] {
            let granted = istio_grants(&place, &mica, "create", &folder, &[version]);
            assert_eq!((&granted.json["intermediates"], &granted.json["roots"]), (&1.into(), &roots.into()));
            let granted = istio_grants(&place, &mica, "handle", &folder, &[version, "--san", WEB]);
            assert_eq!(granted.json["intermediates"], 1);
        }
        mica.stop();
    }
}

#[test]
fn a_node_agent_of_0_2_10_renews_what_it_has_and_nothing_else() {
    let (place, mica, folder) = start(&[]);
    // What it was installed with, and then what it got; with and without the credential of a cloud.
    let mut with = folder;
    for (round, more) in [&[][..], &["--gcp"], &[]].into_iter().enumerate() {
        let next = place.root.path().join(format!("round-{round}"));
        let arguments = ["--san", WEB, "--key-kind", "rsa2048", "--out", next.to_str().unwrap()];
        let granted = istio_grants(&place, &mica, "handle", &with, &[&arguments[..], more].concat());
        assert_eq!((granted.text("id"), granted.text("key_algorithm")), (WEB, "RSA"));
        with = next;
    }
    for (arguments, how) in [
        (&["--san", "spiffe://cluster.local/ns/shop/sa/other"][..], ("PermissionDenied", "CSR_IDENTITY")),
        (&[], ("InvalidArgument", "CSR_NAMES")),
        (&["--csr", "/dev/null"], ("InvalidArgument", "CSR_MALFORMED")),
    ] {
        istio_refuses(&place, &mica, "handle", &with, arguments, how);
    }
    let said = istio(&place, &mica, "handle", &["--san", WEB]);
    assert_eq!((said.code, said.text("code"), said.text("reason")), (1, "Unauthenticated", "NO_CREDENTIAL"));
    mica.stop();
}

#[test]
fn a_certificate_is_renewed_by_the_one_before_it_again_and_again() {
    let (place, mica, folder) = start(&[]);
    let mut with = folder;
    let mut serials = Vec::new();
    for round in 0..5 {
        let next = place.root.path().join(format!("round-{round}"));
        let granted = istio_grants(&place, &mica, "create", &with, &["--out", next.to_str().unwrap()]);
        serials.push(granted.text("serial").to_owned());
        with = next;
    }
    serials.dedup();
    assert_eq!(serials.len(), 5);
    crate::go_spiffe::accepts(&with, WEB);
    mica.stop();
}

#[test]
fn what_agents_send_beside_the_csr_is_taken_or_refused_by_name() {
    let (place, mica, folder) = start(&[]);
    for arguments in [
        // As pilot-agent, always; as ztunnel for itself; with CA_HEADER_…; none at all; for other authorities.
        &["--metadata", "CertSigner="][..],
        &["--metadata-json", "{}", "--cluster", ""],
        &["--metadata-json", r#"{"ImpersonatedIdentity": ""}"#],
        &["--metadata-json", r#"{"CertSigner": null, "ImpersonatedIdentity": null, "ExactLifetime": null}"#],
        &["--cluster", "another", "--header", "x-tenant=a", "--header", "x-tenant=b"],
        &["--metadata-json", r#"{"SomebodyElses": {"deep": [1, 2, {"er": true}]}}"#],
        &["--san", "spiffe://cluster.local/ns/shop/sa/other"],
        &["--san", "spiffe://elsewhere/a"],
    ] {
        istio_grants(&place, &mica, "create", &folder, arguments);
    }
    for (arguments, how) in [
        (&["--metadata", "CertSigner=acme"][..], ("InvalidArgument", "CERT_SIGNER_UNSUPPORTED")),
        (&["--metadata-json", r#"{"CertSigner": 1}"#], ("InvalidArgument", "METADATA_MALFORMED")),
        (&["--metadata-json", r#"{"ImpersonatedIdentity": [1]}"#], ("InvalidArgument", "METADATA_MALFORMED")),
        (&["--metadata-json", r#"{"ExactLifetime": "yes"}"#], ("InvalidArgument", "METADATA_MALFORMED")),
    ] {
        istio_refuses(&place, &mica, "create", &folder, arguments, how);
    }
    // Certificates impersonate nobody.
    let other = "ImpersonatedIdentity=spiffe://cluster.local/ns/shop/sa/other";
    let said = super::said(
        super::istio_command(&place, &mica, "create")
            .arg("--certificate")
            .arg(&folder)
            .args(["--metadata", other]),
    );
    assert_eq!((said.code, said.text("code")), (1, "Unauthenticated"), "{said:?}");
    assert!(said.text("reason").starts_with("IMPERSONAT"), "{said:?}");
    mica.stop();
}

#[test]
fn an_account_that_is_gone_is_refused_on_old_connections_and_new_ones() {
    let (place, mica, folder) = start(&[]);
    let kept = place.root.path().join("kept");
    istio_grants(&place, &mica, "create", &folder, &["--out", kept.to_str().unwrap()]);
    fs::remove_file(place.source().join("web.yaml")).unwrap();
    wait_for(Duration::from_secs(5), "the refusal", || {
        let said = super::said(super::istio_command(&place, &mica, "create").arg("--certificate").arg(&kept));
        (said.code == 1).then(|| assert_eq!(said.text("reason"), "ACCOUNT_GONE"))
    });
    mica.stop();
}
