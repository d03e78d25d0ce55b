//! `mica explain` and `mica bench` against a running Mica.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{WEB, start};
use crate::mica::Done;
use crate::serve::{Place, output_within};

fn run(place: &Place, arguments: &[&str]) -> Done {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.args(arguments).args(["--data-dir".as_ref(), place.data().as_os_str()]);
    command.current_dir(place.root.path()).stdin(Stdio::null());
    output_within(&mut command, Duration::from_secs(30)).into()
}

#[test]
fn a_running_authority_explains_what_it_would_answer() {
    let policy = tempfile::NamedTempFile::new().unwrap();
    fs::write(policy.path(), "namespaces:\n  shop:\n    longest_lifetime: 2h\n    lifetime: 1h\n").unwrap();
    let (place, mica, folder) = start(&["--policy", policy.path().to_str().unwrap()]);
    let mine = folder.to_str().unwrap();
    let explain = |more: &[&str]| {
        let done = run(&place, &[&["explain", "--certificate", mine, "--output", "json"], more].concat());
        let json: serde_json::Value = serde_json::from_str(&done.stdout).unwrap_or_default();
        (done.code, json)
    };
    let (code, json) = explain(&[]);
    assert_eq!((code, &json["granted"], &json["identity"]), (0, &true.into(), &WEB.into()), "{json}");
    assert_eq!((&json["authenticator"], &json["lifetime"]), (&"certificate".into(), &3_600.into()), "{json}");
    assert_eq!(json["lifetime_from"], "the policy of namespace shop");
    assert_eq!((&json["longest_lifetime"], json["renewable_until"].is_string()), (&7_200.into(), true));

    let (code, json) = explain(&["--lifetime", "3h"]);
    assert_eq!((code, &json["reason"]), (1, &"LIFETIME_TOO_LONG".into()), "{json}");
    let (code, json) = explain(&["--impersonate", "spiffe://cluster.local/ns/shop/sa/other"]);
    assert_eq!((code, &json["reason"]), (1, &"IMPERSONATOR_UNKNOWN".into()), "{json}");
    // Nothing was issued for any of it.
    assert!(!mica.log().contains("\"why\":\"request\""), "{}", mica.log());

    mica.stop();
}

#[test]
fn a_load_is_measured_beside_the_floor() {
    let (place, mica, folder) = start(&[]);
    let mine = folder.to_str().unwrap();
    for more in [&["--in-flight", "8"][..], &["--rate", "50"], &["--new-connections", "--in-flight", "2"]] {
        let load = ["bench", "--certificate", mine, "--duration", "1s", "--output", "json"];
        let done = run(&place, &[&load[..], more].concat());
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{done:?}");
        let json: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
        assert!(
            json["granted"].as_u64().unwrap() > 10 && json["not_granted"] == serde_json::json!({}),
            "{json}"
        );
        assert!(json["floor_us"].as_f64().unwrap() > 1.0 && json["ratio"].as_f64().unwrap() > 1.0, "{json}");
        let latency = |name: &str| json["latency_us"][name].as_f64().unwrap();
        assert!(
            latency("p50") > 0.0
                && latency("p50") <= latency("p99")
                && latency("p99") <= latency("max") * 1.04
        );
    }
    // A load without a credential would measure refusals.
    let done = run(&place, &["bench", "--duration", "1s"]);
    assert_eq!(done.code, 2, "{done:?}");
    assert!(done.one_line().contains("--token-file"), "{done:?}");
    mica.stop();
}
