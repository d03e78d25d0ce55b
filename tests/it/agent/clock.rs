//! The machine's clock is wrong, or was, while an agent runs.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mica::core::certificate::Certificate;
use mica::proto::spiffe::JwtsvidRequest;
use tokio::runtime::Runtime;

use super::{Agent, Follower, command, conformance, start, token, wait_for_another};
use crate::serve::clock::{NOTICED, faked, set_clock, start_command};
use crate::serve::{Mica, Place, output_within, wait_for};

const SOON: Duration = Duration::from_secs(5);
const OBTAINED: &str = "mica_agent_certificates_obtained_total";
/// Long enough for a storm of requests to be seen.
const WHILE: Duration = Duration::from_secs(8);

/// An authority whose root is a day older than what it issues, with the clock of the place.
fn authority(place: &Place) -> Mica {
    let policy = place.root.path().join("policy.yaml");
    fs::write(&policy, "spread: 0%\n").unwrap();
    let begin = || {
        let mut serve = place.command();
        serve.args(["--ttl", "1h", "--trial-tokens", "--policy"]).arg(&policy);
        start_command(place, serve)
    };
    set_clock(place, "-1d");
    begin().stop();
    set_clock(place, "+0d");
    begin()
}

fn failures(agent: &Agent) -> f64 {
    let (_, text) = agent.page("/metrics");
    let lines = text.lines().filter(|line| line.starts_with("mica_agent_failures_total{"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

/// The leaf in a folder, whatever the time.
fn leaf(folder: &Path) -> Certificate {
    let chain = fs::read(folder.join("cert-chain.pem")).unwrap();
    Certificate::all_from_pem(&chain).unwrap().remove(0)
}

/// Replaces a token's file by one that is made now, as the kubelet does it.
fn replace_token(place: &Place, file: &Path) {
    let mut new = Command::new(env!("CARGO_BIN_EXE_mica"));
    new.args(["token", "new", "shop/web", "--ttl", "1h"]).arg("--data-dir").arg(place.data());
    let output = output_within(&mut faked(place, new), Duration::from_secs(10));
    assert!(output.status.success(), "{output:?}");
    let next = place.root.path().join("token.next");
    fs::write(&next, output.stdout).unwrap();
    fs::rename(next, file).unwrap();
}

/// When the token that a workload gets now was issued.
fn issued_at(socket: &Path) -> i64 {
    let request = JwtsvidRequest { audience: vec!["somebody".to_owned()], spiffe_id: String::new() };
    let request = conformance::with_header(request, &["true"]);
    let answer = Runtime::new().unwrap().block_on(async {
        conformance::client(socket).await.fetch_jwtsvid(request).await.unwrap().into_inner()
    });
    let claims = URL_SAFE_NO_PAD.decode(answer.svids[0].svid.split('.').nth(1).unwrap()).unwrap();
    let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();
    claims["iat"].as_i64().unwrap()
}

#[test]
fn a_clock_set_back_an_hour_takes_nothing_away_and_is_followed_without_a_storm() {
    let place = Place::new();
    place.account("web");
    let mica = authority(&place);
    let (certs, socket) = (place.root.path().join("certs"), place.root.path().join("agent.sock"));
    let tokens = token(&place, "shop/web");
    let mut agent = command(&place, &mica);
    agent.arg("--token-file").arg(&tokens).arg("--files").arg(&certs).arg("--socket").arg(&socket);
    let agent = start(&place, "web", &mut faked(&place, agent));
    let first = wait_for_another(&certs, "", SOON).serial_text();
    let workload = Follower::of(&socket);
    assert_eq!(workload.wait_for_another("", SOON), first);
    let before = issued_at(&socket);

    // The token, too, is of a time that is still to come: nothing new can be had. Peers whose clocks are right take
    // what there is.
    set_clock(&place, "-1h");
    let why = wait_for(NOTICED, "readiness to end", || {
        let (status, why) = agent.page("/readyz");
        (status == 503).then_some(why)
    });
    assert!(why.contains("is not valid before"), "{why}");
    wait_for(NOTICED, "a refusal", || agent.log().contains("TOKEN_NOT_YET_VALID").then_some(()));
    std::thread::sleep(WHILE);
    assert!(failures(&agent) < 12.0, "{}", failures(&agent));
    assert_eq!(leaf(&certs).serial_text(), first);
    assert_eq!(workload.serial(), Some(first.clone()));
    assert_eq!(Follower::of(&socket).wait_for_another("", SOON), first);

    // With a token of this time there is a certificate of this time, once.
    replace_token(&place, &tokens);
    let second = workload.wait_for_another(&first, NOTICED);
    wait_for(SOON, "the files", || (leaf(&certs).serial_text() == second).then_some(()));
    assert_eq!(agent.page("/readyz").0, 200);
    assert!(issued_at(&socket) < before - 3_000, "the token before is of a time that is still to come");
    std::thread::sleep(WHILE);
    assert_eq!(agent.metric(OBTAINED), 2.0);

    // And it is renewed in time: three quarters of its hour are over.
    set_clock(&place, "-10m");
    let third = workload.wait_for_another(&second, NOTICED);
    set_clock(&place, "+0d");
    std::thread::sleep(WHILE);
    assert_eq!((agent.metric(OBTAINED), workload.serial()), (3.0, Some(third)));
    agent.stop();
}

/// As a machine that starts with the clock of its last battery.
#[test]
fn an_agent_whose_clock_was_ahead_comes_back_when_it_is_set_and_makes_no_storm_until_then() {
    let (place, other) = (Place::new(), Place::new());
    place.account("web");
    let mica = authority(&place);
    let certs = place.root.path().join("certs");
    set_clock(&other, "+2d");
    let mut agent = command(&place, &mica);
    agent.arg("--token-file").arg(token(&place, "shop/web")).arg("--files").arg(&certs);
    let agent = start(&place, "web", &mut faked(&other, agent));
    // By its clock, the authority's certificate has expired.
    wait_for(NOTICED, "failures", || (failures(&agent) > 3.0).then_some(()));
    assert!(failures(&agent) < 12.0, "{}", failures(&agent));

    // Most of the hour of each certificate is over by then, as it seems.
    set_clock(&other, "+50m");
    wait_for_another(&certs, "", Duration::from_secs(30));
    std::thread::sleep(WHILE);
    assert!(agent.metric(OBTAINED) < 3.0, "{}", agent.metric(OBTAINED));
    let last = leaf(&certs).serial_text();
    set_clock(&other, "+0d");
    std::thread::sleep(WHILE);
    assert!(agent.metric(OBTAINED) < 3.0, "{}", agent.metric(OBTAINED));
    assert_eq!(agent.page("/readyz").0, 200);
    set_clock(&other, "+55m");
    wait_for_another(&certs, &last, NOTICED);
    agent.stop();
}
