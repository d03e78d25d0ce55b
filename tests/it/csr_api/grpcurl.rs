//! grpcurl, which knows nothing of Mica's protocols but what reflection tells it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{WEB, roots, start};
use crate::mica::Done;
use crate::parts;
use crate::serve::{Mica, Place, mtls, output_within};

fn grpcurl(place: &Place, mica: &Mica, folder: Option<&Path>, before: &[&str], after: &[&str]) -> Done {
    let mut command = Command::new(parts::grpcurl());
    command.arg("-cacert").arg(roots(place));
    if let Some(folder) = folder {
        command.arg("-cert").arg(folder.join("cert-chain.pem")).arg("-key").arg(folder.join("key.pem"));
    }
    command.args(before).arg(mica.address("grpc")).args(after);
    output_within(command.stdin(Stdio::null()), Duration::from_secs(30)).into()
}

#[test]
fn the_port_tells_what_it_serves() {
    let (place, mica, _) = start(&[]);
    let listed = grpcurl(&place, &mica, None, &[], &["list"]);
    assert_eq!(listed.code, 0, "{listed:?}");
    for service in [
        "grpc.health.v1.Health",
        "istio.v1.auth.IstioCAService",
        "istio.v1.auth.IstioCertificateService",
        "mica.v1.IdentityService",
    ] {
        assert!(listed.stdout.lines().any(|line| line == service), "{service}: {listed:?}");
    }
    let described = |what: &str| grpcurl(&place, &mica, None, &[], &["describe", what]).stdout;
    for (what, line) in [
        (
            "istio.v1.auth.IstioCertificateService",
            "rpc CreateCertificate ( .istio.v1.auth.IstioCertificateRequest ) returns ( .istio.v1.auth.IstioCertificateResponse );",
        ),
        ("istio.v1.auth.IstioCertificateRequest", "int64 validity_duration = 3"),
        ("istio.v1.auth.IstioCertificateResponse", "repeated string cert_chain = 1"),
        (
            "istio.v1.auth.IstioCAService",
            "rpc HandleCSR ( .istio.v1.auth.Request ) returns ( .istio.v1.auth.Response );",
        ),
        ("istio.v1.auth.Response", "bytes signed_cert_chain = 3"),
        ("google.rpc.ErrorInfo", "string reason = 1"),
    ] {
        assert!(described(what).contains(line), "{what}: {}", described(what));
    }
    let health = grpcurl(&place, &mica, None, &[], &["grpc.health.v1.Health/Check"]);
    assert!(health.stdout.contains("\"SERVING\""), "{health:?}");
    mica.stop();
}

#[test]
fn a_call_by_hand_is_granted_or_told_why_not() {
    const CALL: &str = "istio.v1.auth.IstioCertificateService/CreateCertificate";
    let (place, mica, folder) = start(&[]);
    let csr = serde_json::json!({"csr": mtls::csr(WEB), "validity_duration": 3_600}).to_string();
    let granted = grpcurl(&place, &mica, Some(&folder), &["-d", &csr], &[CALL]);
    assert_eq!(granted.code, 0, "{granted:?}");
    let answer: serde_json::Value = serde_json::from_str(&granted.stdout).unwrap();
    let chain = answer["certChain"].as_array().unwrap();
    assert_eq!((chain.len(), chain[1].as_str().unwrap()), (2, place.root_pem().as_str()));

    let denied = grpcurl(&place, &mica, None, &["-d", &csr], &[CALL]);
    assert_ne!(denied.code, 0);
    for part in ["Code: Unauthenticated", "NO_CREDENTIAL", "mica.dev", "google.rpc.ErrorInfo"] {
        assert!(denied.stderr.contains(part), "{part}: {denied:?}");
    }
    let denied = grpcurl(&place, &mica, Some(&folder), &["-d", r#"{"csr": "x"}"#], &[CALL]);
    assert!(
        denied.stderr.contains("Code: InvalidArgument") && denied.stderr.contains("CSR_MALFORMED"),
        "{denied:?}"
    );
    mica.stop();
}
