//! A disk that is full while an agent keeps files on it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::{Follower, command, leaf_in, start, token, wait_for_another};
use crate::serve::disk::Small;
use crate::serve::{Place, wait_for};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn a_full_disk_keeps_the_set_before_and_nobody_from_the_certificate_after() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--ttl", "20s", "--trial-tokens"]);
    let (certs, socket) = (place.root.path().join("certs"), place.root.path().join("agent.sock"));
    let small = Small::mount(&certs);
    let mut agent = command(&place, &mica);
    agent.arg("--token-file").arg(token(&place, "shop/web"));
    let agent = start(&place, "web", agent.arg("--files").arg(&certs).arg("--socket").arg(&socket));
    let first = wait_for_another(&certs, "", SOON).serial_text();
    // Its readers have had their time, so nothing is written any more.
    let set = wait_for(SOON, "one set alone", || (names(&certs).len() == 5).then(|| whole(&certs)));
    small.fill();
    let workload = Follower::of(&socket);
    assert_eq!(workload.wait_for_another("", SOON), first);

    let second = workload.wait_for_another(&first, Duration::from_secs(20));
    let said = wait_for(SOON, "a report", || {
        let log = agent.log();
        let line = log.lines().find(|line| line.contains("the files cannot be written"))?;
        Some(line.to_owned())
    });
    assert!(said.contains("no space left on device") && said.contains("certs"), "{said}");
    let failures = || agent.metric("mica_agent_file_failures_total");
    wait_for(SOON, "it to be counted", || (failures() > 0.0).then_some(()));
    assert_eq!(leaf_in(&certs).map(|leaf| leaf.serial_text()), Ok(first.clone()));
    let third = workload.wait_for_another(&second, Duration::from_secs(20));
    assert_eq!(whole(&certs), set);
    assert_eq!(agent.page("/readyz").0, 200);

    // The newest at once, with no other in between.
    small.empty();
    let written = wait_for_another(&certs, &first, Duration::from_secs(35)).serial_text();
    assert_ne!(written, second);
    // One that is older than what the socket has would never be met there.
    wait_for(SOON, &format!("{written} on the socket, after {third}"), || {
        (workload.serial().as_ref() == Some(&written)).then_some(())
    });
    wait_for(SOON, "one set alone", || (names(&certs).len() == 5).then_some(()));
    agent.stop();
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with("fill")).collect()
}

/// What a reader finds, and in which folder.
fn whole(folder: &Path) -> (std::path::PathBuf, [String; 3]) {
    let set = fs::canonicalize(folder.join("..data")).unwrap();
    let read = |name| fs::read_to_string(folder.join(name)).unwrap();
    (set, ["cert-chain.pem", "key.pem", "root-cert.pem"].map(read))
}
