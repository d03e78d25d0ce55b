//! Starting, stopping, one at a time, and what it says over HTTP and gRPC.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use super::{Place, output_within, wait_for};
use crate::parts;

#[test]
fn a_second_mica_says_who_holds_the_folder_and_stops() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&[]);
    let before = super::tree(&place.data());
    let refused = place.refused(&[]);
    assert!(refused.contains(&mica.pid().to_string()) && refused.contains("data"), "{refused}");
    assert_eq!(super::tree(&place.data()), before);
    assert_eq!(mica.page("/livez"), (200, "ok\n".to_owned()));
    mica.stop();
}

#[test]
fn two_data_folders_cannot_share_a_secrets_folder() {
    let (one, two) = (Place::new(), Place::new());
    one.account("web");
    let secrets = one.root.path().join("delivered");
    let mica = one.start(&["--secrets", secrets.to_str().unwrap()]);
    let refused = two.refused(&["--secrets", secrets.to_str().unwrap()]);
    assert!(refused.contains(&mica.pid().to_string()), "{refused}");
    mica.stop();
}

#[test]
fn wrong_usage_is_told_in_one_line_and_changes_nothing() {
    let place = Place::new();
    for (arguments, told) in [
        (&["--ttl", "9s"][..], "--ttl 9s"),
        (&["--ttl", "91d"], "--max-ttl"),
        (&["--ttl", "soon"], "soon"),
        (&["--trust-domain", "Cluster.Local"], "Cluster.Local"),
        (&["--trust-domain", "a:8080"], "a:8080"),
        (&["--secrets-mode", "0666"], "0666"),
        (&["--dns-names", "a b"], "a b"),
        (&["--authority", "/nowhere"], "/nowhere"),
        (&["--passphrase-file", "x"], "--authority"),
        (&["--no-such-flag"], "--no-such-flag"),
    ] {
        let refused = place.refused(arguments);
        assert!(refused.contains(told), "{refused}");
    }
    assert!(!place.data().join("authority").exists());
    fs::remove_dir(place.source()).unwrap();
    let refused = place.refused(&[]);
    assert!(refused.contains("manifests"), "{refused}");
}

#[test]
fn a_folder_that_others_may_write_to_is_refused() {
    let place = Place::new();
    fs::create_dir(place.data()).unwrap();
    fs::set_permissions(place.data(), fs::Permissions::from_mode(0o777)).unwrap();
    let refused = place.refused(&[]);
    assert!(refused.contains("chmod"), "{refused}");
    fs::set_permissions(place.data(), fs::Permissions::from_mode(0o700)).unwrap();
    let open = place.root.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let refused = place.refused(&["--secrets", open.join("secrets").to_str().unwrap()]);
    assert!(refused.contains("open"), "{refused}");
}

#[test]
fn it_stops_on_both_signals_and_says_where_it_listens_only_while_it_runs() {
    let place = Place::new();
    place.account("web");
    for signal in ["-TERM", "-INT"] {
        let mut mica = place.start(&[]);
        mica.signal(signal);
        let status = wait_for(Duration::from_secs(5), "the end", || mica.child.try_wait().unwrap());
        assert_eq!(status.code(), Some(0));
        assert!(!place.data().join("addresses.json").exists());
    }
}

#[test]
fn metrics_carry_istios_names_and_readiness_follows_the_authority() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&[]);
    assert_eq!(mica.page("/readyz"), (200, "ok\n".to_owned()));
    assert_eq!(mica.page("/nothing").0, 404);
    assert_eq!(mica.metric("mica_identities{state=\"good\"}"), 1.0);
    assert_eq!(mica.metric("mica_certificates_issued_total{why=\"new\"}"), 1.0);
    assert_eq!(mica.metric("citadel_secret_controller_svc_acc_created_cert_count"), 1.0);
    assert!(mica.metric("citadel_server_success_cert_issuance_count") >= 1.0);
    let ten_years = 10.0 * 365.0 * 86_400.0;
    for name in ["citadel_server_root_cert_expiry_seconds", "citadel_server_cert_chain_expiry_seconds"] {
        let left = mica.metric(name);
        assert!((ten_years - 60.0..=ten_years).contains(&left), "{name} {left}");
    }
    let root = place.root_pem();
    let root = mica::core::certificate::Certificate::all_from_pem(root.as_bytes()).unwrap().remove(0);
    let stamp = mica.metric("citadel_server_root_cert_expiry_timestamp");
    assert_eq!(stamp, root.validity.not_after.unix_timestamp() as f64);
    mica.stop();
}

#[test]
fn each_certificate_is_one_line_of_the_log_and_no_key_is() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--log-format", "json"]);
    let log = mica.log();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let issued: Vec<_> = lines.iter().filter(|line| line["message"] == "certificate issued").collect();
    let web: Vec<_> =
        issued.iter().filter(|line| line["identity"] == "spiffe://cluster.local/ns/shop/sa/web").collect();
    assert_eq!(web.len(), 1, "{log}");
    assert_eq!(web[0]["serial"], place.serial("web"));
    assert_eq!(web[0]["why"], "new");
    assert!(web[0]["not_after"].as_str().unwrap().ends_with('Z'));
    assert!(!log.contains("PRIVATE"));
    mica.stop();
}

#[test]
fn the_report_can_be_read_by_programs() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--output", "json"]);
    let report: serde_json::Value =
        wait_for(Duration::from_secs(2), "the report", || serde_json::from_str(&mica.report()).ok());
    let identity = &report["identities"][0];
    assert_eq!(identity["id"], "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(identity["folder"], place.folder("shop", "web").display().to_string());
    let format = &time::format_description::well_known::Rfc3339;
    let not_after = time::OffsetDateTime::parse(identity["not_after"].as_str().unwrap(), format).unwrap();
    assert_eq!(not_after, place.leaf("web").validity.not_after);
    assert_eq!(report["http"], mica.address("http"));
    mica.stop();
}

/// A resumed session would pass over the certificates, and so over a trust bundle that changed meanwhile.
#[test]
fn the_grpc_port_resumes_no_session() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&[]);
    for (version, fresh) in [("-tls1_2", "New, TLSv1.2"), ("-tls1_3", "New, TLSv1.3")] {
        let session = place.root.path().join(version);
        let connect = |flag: &str| {
            let mut openssl = parts::openssl();
            openssl.args(["s_client", version, "-alpn", "h2", "-connect", &mica.address("grpc")]);
            openssl.arg("-CAfile").arg(place.data().join("root-cert.pem"));
            openssl.args(["-verify_return_error", flag]).arg(&session).stdin(std::process::Stdio::null());
            let output = output_within(&mut openssl, Duration::from_secs(10));
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        let first = connect("-sess_out");
        assert!(first.contains(fresh) && first.contains("Verify return code: 0"), "{first}");
        assert!(!first.contains("TLS session ticket:"), "{first}");
        // In TLS 1.3 there is no session without a ticket.
        if session.exists() {
            let second = connect("-sess_in");
            assert!(second.contains(fresh) && !second.contains("Reused"), "{second}");
        }
    }
    mica.stop();
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    let place = Place::new();
    place.account("web");
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut child = place.command().stdout(std::process::Stdio::null()).stderr(full).spawn().unwrap();
    place.wait_for_account("web", Duration::from_secs(10));
    place.account("db");
    place.wait_for_account("db", Duration::from_secs(2));
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn accounts_that_cannot_be_served_are_not_reported_as_missing() {
    let place = Place::new();
    place.account("web");
    for folder in [place.data(), place.data().join("secrets"), place.data().join("secrets/shop")] {
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    }
    fs::create_dir(place.folder("shop", "web")).unwrap();
    let mica = place.start(&[]);
    let report = wait_for(Duration::from_secs(2), "the report", || {
        Some(mica.report()).filter(|report| !report.is_empty())
    });
    assert!(!report.contains("No service account was found"), "{report}");
    assert!(report.contains("1 not delivered: their place is taken"), "{report}");
    mica.stop();
}
