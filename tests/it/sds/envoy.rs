//! Real Envoys that take their certificates and roots from the agent's socket.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mica::agent::{Authorities, Bundles, Svid};
use serde_json::Value;

use super::{Ca, OTHER, OWN, Served, WEB, entitled, soon};
use crate::agent::{self, Agent};
use crate::docs;
use crate::envoy::{self, Envoy, Load, Mesh, Secrets};
use crate::parts;
use crate::serve::{Mica, Place, wait_for};

const PARTNER: &str = "partner.example";

fn secrets<'a>(socket: &'a Path, api: &'a str, roots: &'a str) -> Secrets<'a> {
    Secrets::Sds { socket, api, identity: "default", roots }
}

/// A server that speaks the one protocol and a client that speaks the other, each with an agent of its own. The authority
/// is away for a while, and an agent is killed, which ends a connection to it and nothing else.
#[test]
fn ten_rotations_by_agents_fail_no_request() {
    const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";
    const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";
    let place = Place::new();
    place.account("server");
    place.account("client");
    let flags = ["--ttl", "10s", "--trial-tokens"];
    let mut mica = place.start(&flags);
    let grpc = mica.address("grpc");
    let socket = |name: &str| place.root.path().join(name).join("agent.sock");
    let begin = |name: &str, mica: &_| {
        let token = agent::token(&place, &format!("shop/{name}"));
        let mut command = agent::command(&place, mica);
        command.arg("--token-file").arg(token).arg("--socket").arg(socket(name));
        agent::start(&place, name, &mut command)
    };
    let (server_agent, mut client_agent) = (begin("server", &mica), begin("client", &mica));
    let mesh = Mesh::start_over_sds(
        (secrets(&socket("server"), "GRPC", "ROOTCA"), SERVER),
        (secrets(&socket("client"), "DELTA_GRPC", "spiffe://cluster.local"), CLIENT),
    );
    let load = mesh.load();
    let mut serials = [mesh.server.serial(), mesh.client.serial()];
    assert!(serials.iter().all(Option::is_some), "{serials:?}");
    for rotation in 0..10 {
        match rotation {
            3 => {
                mica.kill();
                std::thread::sleep(Duration::from_secs(2));
                // Where the agents look for it, and who knows no trial token of before.
                mica = place.start_at(&grpc, &flags);
                for name in ["server", "client"] {
                    agent::token(&place, &format!("shop/{name}"));
                }
            }
            6 => {
                client_agent.kill();
                std::thread::sleep(Duration::from_secs(1));
                client_agent = begin("client", &mica);
            }
            _ => {}
        }
        for (envoy, serial) in [&mesh.server, &mesh.client].into_iter().zip(&mut serials) {
            let next = wait_for(Duration::from_secs(20), "another certificate", || {
                envoy.serial().filter(|now| Some(now) != serial.as_ref())
            });
            *serial = Some(next);
        }
        load.wait_for(50);
    }
    let report = load.stop();
    assert_eq!(report.failed, Vec::<String>::new());
    eprintln!("{} requests over {} connections, none failed", report.answered, report.connections);
    for envoy in [&mesh.server, &mesh.client] {
        assert!(envoy.stat(".ssl_context_update_by_sds").0 >= 10, "{}", envoy.page("/stats"));
        assert_eq!(envoy.stat(".update_rejected").0, 0, "{}", envoy.page("/stats"));
    }
    let took = |agent: &Agent, resource: &str| {
        agent.metric(&format!("mica_sds_acknowledged_total{{resource=\"{resource}\"}}"))
    };
    assert!(took(&server_agent, "certificate") >= 10.0);
    assert!(took(&client_agent, "certificate") >= 3.0);
    assert!(took(&server_agent, "bundle") >= 1.0);
    // Its bundle is the one that the proxy had from the agent before, by its version.
    assert!(client_agent.log().contains("bundle acknowledged over SDS"), "{}", client_agent.log());
    let (_, metrics) = client_agent.page("/metrics");
    assert!(!metrics.contains("mica_sds_sent_total{resource=\"bundle\"}"), "{metrics}");
    server_agent.stop();
    client_agent.stop();
    mica.stop();
}

#[test]
fn a_push_closes_no_connection() {
    let ca = Ca::new(OWN);
    for api in ["GRPC", "DELTA_GRPC"] {
        let (served, mut svid) = Served::with(&ca);
        let from_agent = secrets(&served.socket, api, "ROOTCA");
        let server = Envoy::over_sds("server", &from_agent, &envoy::server_resources(&from_agent, WEB));
        let mut resources = envoy::client_resources(&from_agent, WEB, server.listener());
        // One connection for all requests.
        let options = &mut resources["clusters"][0]["typed_extension_protocol_options"];
        options.as_object_mut().unwrap().values_mut().for_each(|options| {
            options.as_object_mut().unwrap().remove("common_http_protocol_options");
        });
        let client = Envoy::over_sds("client", &from_agent, &resources);
        let load = Load::start(client.listener(), Duration::from_millis(2));
        load.wait_for(50);
        // As many as there were requests at once, and none ended.
        let opened = || client.stat("cluster.server.upstream_cx_total").0;
        let closed = || {
            let ended = ["upstream_cx_destroy", "upstream_cx_destroy_with_active_rq"];
            let ended = ended.map(|name| client.stat(&format!("cluster.server.{name}")).0);
            (ended, server.stat(".listener_modified").0)
        };
        for _ in 0..10 {
            svid = ca.issue(WEB);
            served.hold(&svid);
            let serial = &svid.chain[0].serial_text();
            server.wait_for_serial(serial);
            client.wait_for_serial(serial);
            load.wait_for(20);
        }
        let report = load.stop();
        assert_eq!(report.failed, Vec::<String>::new());
        assert_eq!(closed(), ([0, 0], 0), "{api}");
        assert!((1..=4).contains(&opened()), "{}", opened());
        // As Envoy has it: what it holds, by its version.
        let dump = client.page("/config_dump?resource=dynamic_active_secrets");
        let dump: Value = serde_json::from_str(&dump).unwrap();
        let versions: Vec<_> =
            dump["configs"].as_array().unwrap().iter().map(|s| s["version_info"].as_str()).collect();
        let expected =
            [("default", svid.chain[0].fingerprint()), ("ROOTCA", ca.bundle().roots()[0].fingerprint())]
                .map(|(name, version)| if api == "GRPC" { format!("{name}={version}") } else { version });
        for version in &expected {
            assert!(versions.contains(&Some(version)), "{version} in {versions:?}");
        }
        // Two Envoys, each with two streams.
        let method = if api == "GRPC" { "StreamSecrets" } else { "DeltaSecrets" };
        assert_eq!(served.metric(&format!("mica_sds_streams{{method=\"{method}\"}}")), 4);
        soon("all is acknowledged", || {
            served.metric("mica_sds_acknowledged_total{resource=\"certificate\"}") == 22
                && served.metric("mica_sds_acknowledged_total{resource=\"bundle\"}") == 2
        });
        let holders: Vec<_> = served.agent.holders.counts().into_values().collect();
        assert_eq!((holders.len(), holders[0].acknowledged), (1, 2));
    }
}

/// Each peer is judged by the bundle of the trust domain that it names, and by no other.
#[test]
fn several_trust_domains_stay_apart() {
    let (ca, partner) = (Ca::new(OWN), Ca::new(PARTNER));
    let (served, _) = Served::with(&ca);
    served.trust(&[&ca, &partner]);
    let their = Served::new();
    let own = "spiffe://partner.example/client";
    their.say(Ok(entitled(&[own])));
    their.hold(&partner.issue(own));
    their.trust(&[&partner, &ca]);
    let mesh = Mesh::start_over_sds(
        (secrets(&served.socket, "GRPC", "ALL"), ""),
        (secrets(&their.socket, "DELTA_GRPC", "ALL"), ""),
    );
    assert_eq!(mesh.get().unwrap(), 200);

    // The partner's authority, with a certificate that names us.
    let impostor = Ca::new(OWN);
    let mut domains = served.agent.held.bundles().borrow().clone().unwrap().domains.clone();
    let theirs = Authorities { x509: Some(impostor.bundle()), jwt: None };
    domains.insert(partner.domain.clone(), theirs);
    served.agent.held.put_bundles(Bundles { own: ca.domain.clone(), domains });
    soon("the partner is not known any more", || mesh.get().unwrap() == 503);
    their.say_aloud(Ok(entitled(&[WEB])));
    let forged = impostor.issue(WEB);
    their.hold(&forged);
    mesh.client.wait_for_serial(&forged.chain[0].serial_text());
    for _ in 0..20 {
        assert_eq!(mesh.get().unwrap(), 503);
    }
    let real = ca.issue(WEB);
    their.hold(&real);
    mesh.client.wait_for_serial(&real.chain[0].serial_text());
    soon("who is who it says is let in", || mesh.get().unwrap() == 200);
    assert_eq!(mesh.server.stat(".update_rejected").0, 0);
    soon("both bundles are acknowledged", || {
        served.agent.holders.counts().values().filter(|count| count.acknowledged == 1).count() == 2
    });
}

/// Two authorities that fetch each other's bundles, an agent of each, and an Envoy of each agent.
#[test]
fn envoys_of_two_authorities_talk_as_long_as_these_know_each_other() {
    const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";
    const CLIENT: &str = "spiffe://example.org/ns/shop/sa/client";
    let (one, other) = (Place::new(), Place::new());
    one.account("server");
    other.account("client");
    let write = |place: &Place, text: &str| {
        let path = place.root.path().join("federation.yaml");
        fs::write(path.with_extension("next"), text).unwrap();
        fs::rename(path.with_extension("next"), &path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let knows = |place: &Place, domain: &str, whose: &Place, mica: &Mica| {
        let (address, root) = (mica.address("bundle"), whose.data().join("root-cert.pem"));
        let port = address.rsplit(':').next().unwrap();
        write(
            place,
            &format!(
                "trust_domains:\n  {domain}: {{url: 'https://localhost:{port}/', profile: https_spiffe, \
                 endpoint: 'spiffe://{domain}/mica/bundle-endpoint', bundle: {}}}\n",
                root.display()
            ),
        )
    };
    const NOBODY: &str = "trust_domains: {}\n";
    let flags = ["--trial-tokens", "--bundle-address", "127.0.0.1:0", "--federation"];
    let first = one.start(&[&flags[..], &[&write(&one, NOBODY)]].concat());
    let file = knows(&other, "cluster.local", &one, &first);
    let second = other.start(&[&flags[..], &[&file, "--trust-domain", "example.org"]].concat());
    let begin = |place: &Place, name: &str, mica: &Mica| {
        let token = agent::token(place, &format!("shop/{name}"));
        let mut command = agent::command(place, mica);
        command.arg("--token-file").arg(token).arg("--socket").arg(place.root.path().join("agent.sock"));
        agent::start(place, name, &mut command)
    };
    let (server, client) = (begin(&one, "server", &first), begin(&other, "client", &second));
    let mesh = Mesh::start_over_sds(
        (secrets(&one.root.path().join("agent.sock"), "DELTA_GRPC", "ALL"), SERVER),
        (secrets(&other.root.path().join("agent.sock"), "GRPC", "ALL"), CLIENT),
    );
    assert_eq!(mesh.get().unwrap(), 503);
    knows(&one, "example.org", &other, &second);
    soon("they know each other", || mesh.get().unwrap() == 200);
    soon("it is acknowledged", || {
        let log = server.log();
        log.lines()
            .any(|line| line.contains("bundle acknowledged over SDS") && line.contains("domain=example.org"))
    });
    // Pushed, and no Envoy started anew.
    write(&one, NOBODY);
    soon("they do not any more", || mesh.get().unwrap() == 503);
    for envoy in [&mesh.server, &mesh.client] {
        assert_eq!(envoy.stat(".update_rejected").0, 0, "{}", envoy.page("/stats"));
    }
    server.stop();
    client.stop();
    first.stop();
    second.stop();
}

#[test]
fn what_envoy_rejects_is_sent_once_and_what_it_has_goes_on() {
    let ca = Ca::new(OWN);
    for api in ["GRPC", "DELTA_GRPC"] {
        let (served, good) = Served::with(&ca);
        let from_agent = secrets(&served.socket, api, "ROOTCA");
        let mesh = Mesh::start_over_sds((from_agent, WEB), (from_agent, WEB));
        let load = mesh.load();
        let serial = good.chain[0].serial_text();
        mesh.wait_for_serials(&serial, &serial);
        let count = |what: &str| served.metric(&format!("mica_sds_{what}_total{{resource=\"certificate\"}}"));
        soon("it is acknowledged", || count("acknowledged") == 2);
        // Another's key.
        let (of, key) = (ca.issue(WEB), ca.issue(WEB).key.clone());
        let (id, chain, renew_at) = (of.id.clone(), of.chain.clone(), of.renew_at);
        served.hold(&Arc::new(Svid { id, chain, key, renew_at, trace: None }));
        soon("it is rejected", || count("rejected") == 2);
        std::thread::sleep(Duration::from_secs(3));
        load.wait_for(50);
        assert_eq!((count("sent"), count("acknowledged"), count("rejected")), (4, 2, 2), "{api}");
        mesh.wait_for_serials(&serial, &serial);
        let next = ca.issue(WEB);
        served.hold(&next);
        let serial = next.chain[0].serial_text();
        mesh.wait_for_serials(&serial, &serial);
        soon("it is acknowledged", || count("acknowledged") == 4);
        assert_eq!(load.stop().failed, Vec::<String>::new());
    }
}

#[test]
fn an_identity_of_another_workload_is_not_had_and_disturbs_nobody() {
    let ca = Ca::new(OWN);
    let (served, svid) = Served::with(&ca);
    served.hold(&ca.issue(OTHER));
    for api in ["GRPC", "DELTA_GRPC"] {
        let good = secrets(&served.socket, api, "ROOTCA");
        let bad = Secrets::Sds { socket: &served.socket, api, identity: OTHER, roots: "ROOTCA" };
        // It listens with its own identity, and would go out with another's.
        let server = Envoy::over_sds("server", &good, &envoy::server_resources(&good, ""));
        let mut resources = envoy::server_resources(&good, "");
        let out = envoy::client_resources(&bad, "", server.listener());
        resources["clusters"] = out["clusters"].clone();
        let both = Envoy::over_sds("both", &good, &resources);
        both.wait_for_serial(&svid.chain[0].serial_text());
        // Its log says why, with its spaces as gRPC has them.
        both.wait("to be told", || both.log().contains("other%22%20is%20no%20identity").then_some(()));
        // What it may have it still gets.
        let next = ca.issue(WEB);
        served.hold(&next);
        both.wait_for_serial(&next.chain[0].serial_text());
        served.hold(&svid);
        both.wait_for_serial(&svid.chain[0].serial_text());
    }
    assert!(served.metric("mica_sds_names_refused_total{reason=\"forbidden\"}") >= 2);
}

#[test]
fn a_certificate_comes_late_and_envoy_has_waited() {
    let ca = Ca::new(OWN);
    for api in ["GRPC", "DELTA_GRPC"] {
        let served = Served::new();
        let from_agent = secrets(&served.socket, api, "ROOTCA");
        let late = std::thread::scope(|scope| {
            let begun = scope.spawn(|| Mesh::start_over_sds((from_agent, WEB), (from_agent, WEB)));
            soon("it is wanted", || !served.agent.held.all().is_empty());
            std::thread::sleep(Duration::from_secs(1));
            served.trust(&[&ca]);
            served.hold(&ca.issue(WEB));
            begun.join().unwrap()
        });
        assert_eq!(late.get().unwrap(), 200);
    }
}

/// As its head and the document say, but for the port and the data folder's place.
#[test]
fn the_envoy_of_the_example_lets_in_productpage_alone() {
    let example = docs::read("examples/envoy-sds/server.yaml");
    let document = docs::read("docs/sds.md");
    let shown = document.split_once("```yaml\n").unwrap().1.split_once("```").unwrap().0;
    assert!(example.contains(shown));
    let place = Place::new();
    let home = place.root.path();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.arg("serve").arg(docs::checkout().join("examples/bookinfo")).arg("--data-dir").arg(place.data());
    command.args(["--trial-tokens", "--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]);
    let mica = place.start_command(command.stdin(Stdio::null()));
    let token = agent::token(&place, "bookinfo/reviews-v1");
    let mut command = agent::command(&place, &mica);
    command.arg("--token-file").arg(token).args(["--socket", "./agent.sock"]).current_dir(home);
    let agent = agent::start(&place, "agent", &mut command);
    let port = crate::serve::free_port();
    fs::write(home.join("server.yaml"), example.replace("8443", &port.to_string())).unwrap();
    let envoy = Command::new(parts::envoy())
        .args(["-c", "server.yaml", "--disable-hot-restart", "--concurrency", "1"])
        .current_dir(home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(home.join("envoy.log")).unwrap())
        .spawn()
        .unwrap();
    let _envoy = docs::Running(envoy);
    wait_for(Duration::from_secs(10), "an answer of Envoy's", || {
        docs::ask(&place, port, "productpage").ends_with("hello from reviews-v1\n").then_some(())
    });
    assert_eq!(docs::ask(&place, port, "ratings"), "");
    agent.stop();
    mica.stop();
}

/// Whoever wants to see what Envoy would get asks as a person would.
#[test]
fn grpcurl_fetches_by_reflection() {
    let ca = Ca::new(OWN);
    let (served, svid) = Served::with(&ca);
    let ask = |what: &str| {
        let service = "envoy.service.secret.v3.SecretDiscoveryService";
        let socket = served.socket.to_str().unwrap();
        let output = Command::new(parts::grpcurl())
            .args(["-plaintext", "-unix", "-authority", "localhost", "-d", what, socket])
            .arg(format!("{service}/FetchSecrets"))
            .output()
            .unwrap();
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (answer, error) = ask(r#"{"resource_names": ["default", "ALL"]}"#);
    let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{answer}{error}"));
    let resources = answer["resources"].as_array().unwrap();
    let of = |name: &str| resources.iter().find(|resource| resource["name"] == name).unwrap();
    let config = &of("ALL")["validationContext"]["customValidatorConfig"]["typedConfig"];
    assert_eq!(config["trustDomains"][0]["name"], OWN, "{answer}");
    let chain = of("default")["tlsCertificate"]["certificateChain"]["inlineBytes"].as_str().unwrap();
    let chain = base64(chain);
    assert_eq!(chain, svid.chain[0].to_pem());
    let (_, error) = ask(&format!("{{\"resource_names\": [\"{OTHER}\"]}}"));
    assert!(error.contains("PermissionDenied") && error.contains(OTHER), "{error}");
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    String::from_utf8(base64::engine::general_purpose::STANDARD.decode(text).unwrap()).unwrap()
}
