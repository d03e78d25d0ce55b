//! `mica csr request`, as a user runs it.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use mica::core::certificate::Certificate;

use super::{WEB, request, start};
use crate::mica::Done;
use crate::parts;
use crate::serve::{Place, output_within};

fn refused(done: &Done, code: i32, parts: &[&str]) -> String {
    assert_eq!(done.code, code, "{done:?}");
    let line = done.one_line();
    for part in parts {
        assert!(line.contains(part), "{part}: {line}");
    }
    line
}

#[test]
fn a_certificate_is_renewed_into_a_folder_that_others_can_use() {
    let (place, mica, folder) = start(&[]);
    let mine = folder.to_str().unwrap();
    let done = request(&place, &["--certificate", mine, "--out", "one"]);
    assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{done:?}");
    let leaf =
        Certificate::all_from_pem(&fs::read(place.root.path().join("one/cert-chain.pem")).unwrap()).unwrap();
    for part in ["granted, in one", WEB, &leaf[0].serial_text(), "valid until"] {
        assert!(done.stdout.contains(part), "{part}: {}", done.stdout);
    }
    let one = place.root.path().join("one");
    crate::go_spiffe::accepts(&one, WEB);
    for (name, mode) in [("key.pem", 0o600), ("cert-chain.pem", 0o644), ("root-cert.pem", 0o644)] {
        assert_eq!(fs::metadata(one.join(name)).unwrap().permissions().mode() & 0o7777, mode, "{name}");
    }
    assert_eq!(fs::metadata(&one).unwrap().permissions().mode() & 0o7777, 0o700);
    assert!(fs::read_to_string(one.join("key.pem")).unwrap().starts_with("-----BEGIN PRIVATE KEY-----"));
    assert_eq!(fs::read_to_string(one.join("root-cert.pem")).unwrap(), place.root_pem());

    // With what was got, of another kind, for machines, by address and roots, for as long as was asked.
    let address = mica.address("grpc");
    for (kind, name) in [("p384", "two"), ("ed25519", "three")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        command.args(["csr", "request", "--address", &address, "--roots", "one/root-cert.pem"]);
        command.args(["--certificate", "one", "--out", name, "--key-kind", kind, "--output", "json"]);
        command.args(["--ttl", "2h", "--exact-lifetime", "--identity", WEB, "--name", "istio-ca"]);
        let done: Done =
            output_within(command.current_dir(place.root.path()), Duration::from_secs(30)).into();
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{done:?}");
        let json: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
        assert_eq!((&json["granted"], &json["same_roots"]), (&true.into(), &true.into()));
        assert_eq!(json["certificate"]["key"], kind);
        assert_eq!(json["certificate"]["spiffe_id"], WEB);
        crate::go_spiffe::accepts(&place.root.path().join(name), WEB);
    }

    // Nothing is overwritten, and nothing asked for that would have no place.
    let issued = mica.metric("citadel_server_success_cert_issuance_count");
    let before = crate::serve::tree(place.root.path());
    refused(&request(&place, &["--certificate", mine, "--out", "one"]), 2, &["one/key.pem is there already"]);
    let unchanged = crate::serve::tree(place.root.path()) == before;
    assert!(unchanged && mica.metric("citadel_server_success_cert_issuance_count") == issued);
    mica.stop();
}

#[test]
fn a_csr_made_elsewhere_is_sent_and_its_key_stays_where_it_is() {
    let (place, mica, folder) = start(&[]);
    let mine = folder.to_str().unwrap();
    let mut openssl = parts::openssl();
    openssl.args(["req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", "key.pem"]);
    openssl.args([
        "-out",
        "csr.pem",
        "-addext",
        "subjectAltName=URI:spiffe://cluster.local/ns/shop/sa/other",
    ]);
    crate::fixtures::run(openssl.current_dir(place.root.path()));
    let done = request(&place, &["--certificate", mine, "--csr", "csr.pem", "--out", "out"]);
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(
        done.stderr,
        "mica: note: the CSR asked for spiffe://cluster.local/ns/shop/sa/other, which was not given\n"
    );
    assert!(done.stdout.contains(WEB) && done.stdout.contains("rsa2048"));
    let out = place.root.path().join("out");
    assert!(!out.join("key.pem").exists());
    fs::copy(place.root.path().join("key.pem"), out.join("key.pem")).unwrap();
    crate::go_spiffe::accepts(&out, WEB);

    fs::write(place.root.path().join("bad.pem"), "x").unwrap();
    let done = request(&place, &["--certificate", mine, "--csr", "bad.pem", "--out", "no"]);
    refused(&done, 2, &["bad.pem", "CERTIFICATE REQUEST"]);
    assert!(!place.root.path().join("no").exists());
    mica.stop();
}

#[test]
fn what_the_authority_says_no_to_is_said_with_its_code_reason_and_sentence() {
    let (place, mica, folder) = start(&[]);
    let mine = folder.to_str().unwrap();
    let with = |more: &[&str]| request(&place, &[&["--certificate", mine, "--out", "no"], more].concat());
    let said = refused(&with(&["--ttl", "1000d"]), 1, &["says no: INVALID_ARGUMENT (LIFETIME_TOO_LONG): "]);
    assert!(said.starts_with(&mica.address("grpc")) && said.contains("longer than 90d"), "{said}");
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    refused(&with(&["--impersonate", other]), 1, &["says no: UNAUTHENTICATED (IMPERSONAT"]);
    let done = with(&["--ttl", "1000d", "--output", "json"]);
    assert_eq!((done.code, done.stderr.lines().count()), (1, 1), "{done:?}");
    let json: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!(
        (&json["granted"], &json["code"], &json["reason"]),
        (&false.into(), &"INVALID_ARGUMENT".into(), &"LIFETIME_TOO_LONG".into())
    );
    // It would be granted, and is not what was wanted.
    refused(&with(&["--identity", other]), 1, &["nothing was written", WEB, other]);
    assert!(!place.root.path().join("no").exists());
    mica.stop();
}

#[test]
fn what_is_wrong_with_the_connection_is_said() {
    let (place, mica, folder) = start(&[]);
    let (mine, address) = (folder.to_str().unwrap(), mica.address("grpc"));
    let (stranger, other, _) = start(&[]);
    let foreign = stranger.data().join("root-cert.pem");
    let own = place.data().join("root-cert.pem");
    let ask = |address: &str, roots: &std::path::Path, more: &[&str]| -> Done {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        command.args(["csr", "request", "--address", address, "--roots"]).arg(roots).args(["--out", "no"]);
        command.current_dir(place.root.path()).args(more);
        output_within(command.stdin(Stdio::null()), Duration::from_secs(30)).into()
    };
    let shown = ["--certificate", mine];
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    refused(&ask(&closed, &own, &shown), 2, &[&closed, "connection refused", "mica serve"]);
    refused(&ask("nowhere.invalid:1", &own, &shown), 2, &["cannot connect to nowhere.invalid:1"]);
    refused(&ask(&mica.address("http"), &own, &shown), 2, &["does not speak TLS", "15012"]);
    refused(&ask(&address, &foreign, &shown), 2, &[&address, "none of the roots", "root-cert.pem"]);
    let named = [&shown[..], &["--name", "example.org"]].concat();
    let said = refused(&ask(&address, &own, &named), 2, &["\"example.org\"", "localhost", "--name"]);
    assert!(said.contains("127.0.0.1") && !said.contains("DnsName"), "{said}");
    let named = [&shown[..], &["--name", "no name"]].concat();
    refused(&ask(&address, &own, &named), 2, &["\"no name\""]);

    let file = |name: &str, text: &str| fs::write(place.root.path().join(name), text).unwrap();
    file("empty", "\n");
    file("words", "a token");
    for (name, part) in [("nothing", "cannot read nothing"), ("empty", "is empty"), ("words", "spaces")] {
        refused(&ask(&address, &own, &["--token-file", name]), 2, &[part]);
    }
    fs::create_dir(place.root.path().join("mixed")).unwrap();
    refused(&ask(&address, &own, &["--certificate", "mixed"]), 2, &["mixed", "cert-chain.pem is missing"]);
    fs::copy(folder.join("cert-chain.pem"), place.root.path().join("mixed/cert-chain.pem")).unwrap();
    fs::copy(stranger.folder("shop", "web").join("key.pem"), place.root.path().join("mixed/key.pem"))
        .unwrap();
    refused(&ask(&address, &own, &["--certificate", "mixed"]), 2, &["mixed", "key.pem does not belong"]);
    assert!(!place.root.path().join("no").exists());
    other.stop();
    mica.stop();
    refused(
        &request(&place, &["--certificate", mine, "--out", "no"]),
        2,
        &["no mica serves", "mica serve DIR"],
    );
}

#[test]
fn a_token_is_shown_from_a_file_or_a_pipe_and_never_said() {
    let (place, mica, _) = start(&[]);
    let secret = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.c2VjcmV0";
    fs::write(place.root.path().join("token"), secret).unwrap();
    let done = request(&place, &["--token-file", "token", "--out", "no"]);
    refused(&done, 1, &["says no: UNAUTHENTICATED"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.args(["csr", "request", "--token-file", "-", "--out", "no", "--data-dir"]).arg(place.data());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.current_dir(place.root.path()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(secret.as_bytes()).unwrap();
    let piped: Done = child.wait_with_output().unwrap().into();
    assert_eq!(piped.stderr, done.stderr);
    for text in [&done.stderr, &mica.log()] {
        assert!(!text.contains("c2VjcmV0"), "{text}");
    }
    mica.stop();
}

#[test]
fn an_authority_whose_clock_is_another_is_recognized() {
    let library = crate::fixtures::run(Command::new(parts::faketime()).args([
        "-m",
        "-f",
        "+0d",
        "printenv",
        "LD_PRELOAD",
    ]));
    for (offset, parts) in [("-3d", ["expired at", "clock"]), ("+3d", ["is not valid before", "clock"])] {
        let place = Place::new();
        place.account("web");
        let mut command = place.command();
        command
            .env("LD_PRELOAD", library.trim())
            .env("FAKETIME", offset)
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        command.env("NO_FAKE_STAT", "1");
        let mica = place.start_command(&mut command);
        let mine = place.folder("shop", "web");
        let done = request(&place, &["--certificate", mine.to_str().unwrap(), "--out", "no"]);
        refused(&done, 2, &parts);
        mica.stop();
    }
}
