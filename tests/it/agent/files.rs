//! An agent that keeps files.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use super::{command, leaf_in, start, token, wait_for_another};
use crate::envoy::Mesh;
use crate::fixtures::run;
use crate::parts;
use crate::serve::clock::{set_clock, start_command as with_clock};
use crate::serve::{Place, output_within, wait_for};

const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";
const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
const SOON: Duration = Duration::from_secs(5);

/// Each with a token at first and its certificate afterwards, since the authority forgets its trial tokens when it is
/// killed in between; one agent is killed, too.
#[test]
fn ten_rotations_by_agents_fail_no_request_of_envoys() {
    let place = Place::new();
    place.account("server");
    place.account("client");
    let flags = ["--ttl", "10s", "--trial-tokens"];
    let mut mica = place.start(&flags);
    let grpc = mica.address("grpc");
    let folder = |name: &str| place.root.path().join(format!("certs-{name}"));
    let begin = |name: &str, mica: &_| {
        let token = token(&place, &format!("shop/{name}"));
        let mut command = command(&place, mica);
        command.arg("--token-file").arg(token).arg("--certificate").arg(folder(name));
        start(&place, name, command.arg("--files").arg(folder(name)))
    };
    let (server, mut client) = (begin("server", &mica), begin("client", &mica));
    let mut serial = wait_for_another(&folder("server"), "", SOON).serial_text();
    wait_for_another(&folder("client"), "", SOON);
    let mut mesh = Mesh::start((&folder("server"), SERVER), (&folder("client"), CLIENT));
    let load = mesh.load();
    for rotation in 0..10 {
        match rotation {
            3 => {
                mica.kill();
                std::thread::sleep(Duration::from_secs(2));
                // Where the agents look for it.
                mica = place.start_at(&grpc, &flags);
            }
            6 => {
                client.kill();
                let before = leaf_in(&folder("client")).unwrap().serial_text();
                client = begin("client", &mica);
                assert!(client.log().contains("certificate taken over"), "{}", client.log());
                wait_for_another(&folder("client"), &before, Duration::from_secs(8));
            }
            _ => {}
        }
        serial = wait_for(Duration::from_secs(10), "a connection with a new certificate", || {
            let served = mesh.served_serial(&folder("client"));
            (served != serial).then_some(served)
        });
        load.wait_for(50);
    }
    let report = load.stop();
    assert_eq!(report.failed, Vec::<String>::new());
    eprintln!("{} requests over {} connections, none failed", report.answered, report.connections);
    assert!(mesh.server.runs() && mesh.client.runs());
    assert!(mica.metric("mica_certificates_issued_total{why=\"request\"}") > 4.0);
    server.stop();
    client.stop();
    mica.stop();
}

/// As Istio's own agents leave it: three plain files.
#[test]
fn what_another_agent_left_is_taken_over_and_renewed_with() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--trial-tokens"]);
    let certs = place.root.path().join("certs");
    let mut request = Command::new(env!("CARGO_BIN_EXE_mica"));
    request.args(["csr", "request", "--ttl", "30s", "--exact-lifetime"]).arg("--data-dir").arg(place.data());
    run(request.arg("--token-file").arg(token(&place, "shop/web")).arg("--out").arg(&certs));
    assert!(fs::symlink_metadata(certs.join("key.pem")).unwrap().is_file());
    let own = fs::read(certs.join("cert-chain.pem")).unwrap();
    let serial = mica::core::certificate::Certificate::all_from_pem(&own).unwrap()[0].serial_text();

    let mut command = command(&place, &mica);
    command.arg("--certificate").arg(&certs).arg("--files").arg(&certs);
    let agent = start(&place, "web", command.args(["--files-mode", "0640"]));
    // Nothing was due, so nothing was asked; the files are links into one set now.
    wait_for(SOON, "one set", || {
        let links = ["cert-chain.pem", "key.pem", "root-cert.pem"];
        let linked = |name| fs::symlink_metadata(certs.join(name)).is_ok_and(|facts| facts.is_symlink());
        let mode = fs::metadata(certs.join("key.pem")).ok()?.permissions().mode() & 0o777;
        let whole = links.into_iter().all(linked) && mode == 0o640;
        (whole && leaf_in(&certs).ok()?.serial_text() == serial).then_some(())
    });
    assert_eq!(agent.metric("mica_agent_certificates_obtained_total"), 0.0);

    let renewed = wait_for_another(&certs, &serial, Duration::from_secs(25));
    assert_eq!(renewed.uris, ["spiffe://cluster.local/ns/shop/sa/web"]);
    // The one before is gone when its readers have had their time, and nothing else is there.
    wait_for(SOON, "one set alone", || (fs::read_dir(&certs).unwrap().count() == 5).then_some(()));
    assert_eq!(agent.page("/readyz").0, 200);
    agent.stop();
}

#[test]
fn one_agent_keeps_several_identities() {
    let place = Place::new();
    for account in ["web", "db"] {
        place.account(account);
    }
    let mica = place.start(&["--trial-tokens"]);
    let path = |name: &str| place.root.path().join(name);
    let entry = |account: &str, uid: u32| {
        let token = token(&place, &format!("shop/{account}"));
        format!(
            "- identity: spiffe://cluster.local/ns/shop/sa/{account}\n  match: {{uid: {uid}}}\n  tokenFile: {}\n",
            token.display()
        )
    };
    fs::write(path("workloads"), format!("workloads:\n{}{}", entry("web", 1001), entry("db", 1002))).unwrap();
    let mut agent = command(&place, &mica);
    agent.arg("--token-file").arg(token(&place, "shop/web")).arg("--workloads").arg(path("workloads"));
    agent.arg("--files").arg(path("certs")).arg("--socket").arg(path("agent.sock"));
    let agent = start(&place, "node", &mut agent);
    for account in ["web", "db"] {
        let folder = path("certs").join("shop").join(format!("istio.{account}"));
        let leaf = wait_for_another(&folder, "", SOON);
        assert_eq!(leaf.uris, [format!("spiffe://cluster.local/ns/shop/sa/{account}")]);
    }
    agent.stop();
}

#[test]
fn files_are_named_repaired_and_told_of() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--trial-tokens"]);
    let path = |name: &str| place.root.path().join(name);
    let mut agent = command(&place, &mica);
    agent.arg("--token-file").arg(token(&place, "shop/web")).arg("--files").arg(path("certs"));
    agent.args(["--file-names", "tls.crt,tls.key,ca.crt", "--"]);
    // No shell: what a shell would make of it stays as it is.
    let script = "printf '%s\n' \"$1\" >> \"$0\"";
    agent.args(["sh", "-c", script]).arg(path("told")).arg("a $HOME; b");
    let agent = start(&place, "web", &mut agent);
    let told = || fs::read_to_string(path("told")).unwrap_or_default();
    wait_for(SOON, "the program", || (told() == "a $HOME; b\n").then_some(()));
    let names = |folder: &str| {
        let mut names: Vec<String> = fs::read_dir(path(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with(".."))
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("certs"), ["ca.crt", "tls.crt", "tls.key"]);
    let verify = |folder: &str| {
        let of = |name| path(folder).join(name);
        parts::openssl()
            .args(["verify", "-x509_strict", "-CAfile"])
            .arg(of("ca.crt"))
            .arg(of("tls.crt"))
            .output()
            .is_ok_and(|output| output.status.success())
    };
    assert!(verify("certs"));

    for damage in 0..4 {
        let certs = path("certs");
        match damage {
            0 => fs::remove_file(certs.join("tls.key")).unwrap(),
            1 => fs::write(certs.join("tls.crt"), "no certificate").unwrap(),
            2 => fs::set_permissions(certs.join("tls.key"), fs::Permissions::from_mode(0o644)).unwrap(),
            _ => fs::remove_dir_all(&certs).unwrap(),
        }
        wait_for(SOON, &format!("repair of damage {damage}"), || {
            let mode = fs::metadata(certs.join("tls.key")).ok()?.permissions().mode() & 0o777;
            (mode == 0o600 && verify("certs")).then_some(())
        });
    }
    assert_eq!(agent.metric("mica_agent_certificates_obtained_total"), 1.0);
    agent.stop();
}

/// The authority is away until long after the certificate has expired, and the token that was good is gone.
#[test]
fn an_agent_comes_back_after_its_certificate_has_expired() {
    let place = Place::new();
    place.account("web");
    set_clock(&place, "+0d");
    let mut serve = place.command();
    serve.args(["--ttl", "1h", "--trial-tokens"]);
    let mica = with_clock(&place, serve);
    let certs = place.root.path().join("certs");
    let tokens = token(&place, "shop/web");
    let mut agent = command(&place, &mica);
    agent.arg("--token-file").arg(&tokens).arg("--files").arg(&certs);
    let agent = start(&place, "web", &mut crate::serve::clock::faked(&place, agent));
    let first = wait_for_another(&certs, "", SOON).serial_text();
    // As if the machine had slept for two days: the token, too, ended long ago.
    set_clock(&place, "+2d");
    let why = wait_for(Duration::from_secs(20), "readiness to end", || {
        let (status, why) = agent.page("/readyz");
        (status == 503).then_some(why)
    });
    assert!(why.contains("expired"), "{why}");
    wait_for(Duration::from_secs(20), "a refusal", || agent.log().contains("TOKEN_EXPIRED").then_some(()));
    let output = {
        let mut new = Command::new(env!("CARGO_BIN_EXE_mica"));
        new.args(["token", "new", "shop/web"]).arg("--data-dir").arg(place.data());
        output_within(&mut crate::serve::clock::faked(&place, new), Duration::from_secs(10))
    };
    // The token's file is replaced, as the kubelet does it.
    let next = place.root.path().join("token.next");
    fs::write(&next, output.stdout).unwrap();
    fs::rename(next, &tokens).unwrap();
    wait_for(Duration::from_secs(10), "another certificate", || {
        let chain = fs::read(certs.join("cert-chain.pem")).ok()?;
        let leaf = mica::core::certificate::Certificate::all_from_pem(&chain).ok()?.remove(0);
        (leaf.serial_text() != first).then_some(())
    });
    assert_eq!(agent.page("/readyz").0, 200);
}

#[test]
fn what_cannot_be_used_is_said_and_nothing_is_written() {
    let place = Place::new();
    place.account("web");
    place.account("other");
    let mica = place.start(&["--trial-tokens"]);
    let certs = place.root.path().join("certs");
    let refused = |command: &mut Command| {
        let output = output_within(command, Duration::from_secs(10));
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        error.lines().last().unwrap().to_owned()
    };
    let agent = || {
        let mut agent = command(&place, &mica);
        agent.arg("--files").arg(&certs);
        agent
    };
    let said = refused(&mut agent());
    assert!(said.contains("--token-file"), "{said}");
    let elsewhere = |address: &str, roots: &str| {
        let mut agent = Command::new(env!("CARGO_BIN_EXE_mica"));
        agent.args(["agent", "--token-file", "t", "--http-address", "127.0.0.1:0", "--files"]).arg(&certs);
        refused(agent.args(["--authority-address", address, "--authority-roots", roots]))
    };
    let roots = place.data().join("root-cert.pem");
    let said = elsewhere("nowhere", roots.to_str().unwrap());
    assert!(said.contains("is no HOST:PORT"), "{said}");
    let said = elsewhere("127.0.0.1:1", "/nonexistent");
    assert!(said.contains("/nonexistent"), "{said}");
    let said = refused(agent().args(["--token-file", "t", "--file-names", "a,b"]));
    assert!(said.contains("three"), "{said}");
    let said = refused(agent().args(["--token-file", "t", "--files-mode", "0666"]));
    assert!(said.contains("0666"), "{said}");
    assert!(!certs.exists());

    // Somebody else's certificate: the token is good, and not for whom it was asked.
    let mut other = agent();
    other.arg("--token-file").arg(token(&place, "shop/other"));
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    let agent = start(&place, "other", other.args(["--identity", web]));
    wait_for(SOON, "a refusal", || {
        agent.log().contains("answered with what peers would refuse").then_some(())
    });
    assert!(agent.log().contains("sa/other"), "{}", agent.log());
    assert!(!certs.join("cert-chain.pem").exists());
    assert_eq!(agent.page("/readyz").0, 503);
    agent.stop();
}
