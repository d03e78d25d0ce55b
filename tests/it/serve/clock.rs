//! The machine's clock is wrong, or was: by a year, while Mica runs and while it does not.

use std::fs;
use std::process::Command;
use std::time::Duration;

use time::OffsetDateTime;

use super::{Mica, Place, grpc, tree, wait_for};
use crate::fixtures::run;
use crate::parts;

/// A clock that was set is noticed within fifteen seconds.
pub(crate) const NOTICED: Duration = Duration::from_secs(15);
const YEAR: time::Duration = time::Duration::days(365);

/// Sets the clock of Micas in this place, running ones too.
pub(crate) fn set_clock(place: &Place, offset: &str) {
    fs::write(place.root.path().join("clock.new"), offset).unwrap();
    fs::rename(place.root.path().join("clock.new"), place.root.path().join("clock")).unwrap();
}

fn start(place: &Place) -> Mica {
    start_command(place, place.command())
}

/// With the clock of the place.
pub(crate) fn start_command(place: &Place, command: Command) -> Mica {
    place.start_command(&mut faked(place, command))
}

/// A command with the clock of the place.
pub(crate) fn faked(place: &Place, mut command: Command) -> Command {
    let mut faketime = Command::new(parts::faketime());
    let library = run(faketime.args(["-m", "-f", "+0d", "printenv", "LD_PRELOAD"]));
    command.env("LD_PRELOAD", library.trim());
    command.env("FAKETIME_TIMESTAMP_FILE", place.root.path().join("clock"));
    for name in ["FAKETIME_NO_CACHE", "FAKETIME_DONT_FAKE_MONOTONIC", "NO_FAKE_STAT"] {
        command.env(name, "1");
    }
    command
}

pub(crate) fn wait_for_status(mica: &Mica, status: u16) -> String {
    wait_for(NOTICED, &format!("status {status}"), || {
        let (found, why) = mica.page("/readyz");
        (found == status).then_some(why)
    })
}

/// The leaf of `web`, whatever the time.
fn leaf(place: &Place) -> Option<mica::core::certificate::Certificate> {
    let chain = fs::read(place.folder("shop", "web").join("cert-chain.pem")).ok()?;
    Some(mica::core::certificate::Certificate::all_from_pem(&chain).unwrap().remove(0))
}

#[test]
fn a_clock_set_back_a_year_loses_nothing() {
    let place = Place::new();
    place.account("web");
    set_clock(&place, "+0d");
    let mica = start(&place);
    let secrets = tree(&place.data().join("secrets"));

    set_clock(&place, "-365d");
    let why = wait_for_status(&mica, 503);
    assert!(why.contains("is not valid before") && why.contains("clock"), "{why}");
    wait_for(NOTICED, "a warning", || mica.log().contains("the clock was set").then_some(()));
    place.account("db");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(tree(&place.data().join("secrets")), secrets);

    // The same across a restart.
    mica.stop();
    let mica = start(&place);
    assert_eq!(mica.page("/readyz").0, 503);
    wait_for(NOTICED, "the report", || mica.report().contains("2 not served yet").then_some(()));
    assert_eq!(tree(&place.data().join("secrets")), secrets);

    set_clock(&place, "+0d");
    wait_for_status(&mica, 200);
    place.wait_for_account("db", NOTICED);
    let after = tree(&place.data().join("secrets"));
    assert!(secrets.iter().all(|file| after.contains(file)), "what was good is as it was");
    mica.stop();
}

#[test]
fn a_clock_set_forward_a_year_is_followed_and_so_is_its_return() {
    let place = Place::new();
    place.account("web");
    set_clock(&place, "+0d");
    let mica = start(&place);
    let serial = place.serial("web");
    set_clock(&place, "+365d");
    wait_for(NOTICED, "a leaf of next year", || {
        (leaf(&place)?.validity.not_before > OffsetDateTime::now_utc() + YEAR / 2).then_some(())
    });
    assert_eq!(mica.page("/readyz").0, 200);
    // So is the gRPC port's.
    wait_for(NOTICED, "a serving certificate of next year", || {
        (!grpc::asked(&place, &mica, &["--name", "localhost"]).status.success()).then_some(())
    });
    set_clock(&place, "+0d");
    place.wait_for_another("web", &serial, NOTICED);
    wait_for(NOTICED, "a serving certificate of this year", || {
        grpc::asked(&place, &mica, &["--name", "localhost"]).status.success().then_some(())
    });
    mica.stop();
}

#[test]
fn a_root_that_is_long_expired_by_the_clock_is_kept_and_good_again_by_the_right_one() {
    let place = Place::new();
    place.account("web");
    set_clock(&place, "+0d");
    start(&place).stop();
    let (root, secrets) = (place.root_pem(), tree(&place.data().join("secrets")));
    set_clock(&place, "+4000d");
    let mica = start(&place);
    let (status, why) = mica.page("/readyz");
    assert!(status == 503 && why.contains("expired"), "{status} {why}");
    assert_eq!(place.root_pem(), root);
    assert_eq!(tree(&place.data().join("secrets")), secrets);
    set_clock(&place, "+0d");
    wait_for_status(&mica, 200);
    std::thread::sleep(NOTICED);
    assert_eq!(tree(&place.data().join("secrets")), secrets);
    mica.stop();
}
