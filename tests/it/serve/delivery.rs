//! Accounts in, folders out: created, followed, renewed, repaired, removed.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Place, output_within, wait_for};
use crate::parts;

const PROMPT: Duration = Duration::from_secs(2);
const REPAIRED: Duration = Duration::from_secs(5);

#[test]
fn bookinfo_is_served_as_the_readme_says() {
    let place = Place::new();
    let mut command = place.command();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/bookinfo");
    // The place's own source comes second on the command line in no other test.
    let mica = {
        let mut arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        arguments[1] = example.into();
        command = std::process::Command::new(command.get_program());
        command.args(arguments);
        place.start_command(&mut command)
    };
    let accounts = ["details", "productpage", "ratings", "reviews-v1", "reviews-v2", "reviews-v3"];
    let found: Vec<_> = fs::read_dir(place.data().join("secrets/bookinfo"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(found.len(), accounts.len(), "{found:?}");
    let report = mica.report();
    for account in accounts {
        let folder = place.folder("bookinfo", account);
        let id = format!("spiffe://cluster.local/ns/bookinfo/sa/{account}");
        assert!(report.contains(&id) && report.contains(&folder.display().to_string()), "{report}");
        for purpose in ["sslserver", "sslclient"] {
            let mut openssl = parts::openssl();
            openssl.args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"]);
            openssl.arg(place.data().join("root-cert.pem")).arg(folder.join("cert-chain.pem"));
            let output = output_within(&mut openssl, Duration::from_secs(10));
            assert!(output.status.success(), "{output:?}");
        }
        let mut spiffe = std::process::Command::new(parts::go_spiffe());
        let output =
            output_within(spiffe.arg("svid").arg(&folder).args(["--id", &id]), Duration::from_secs(10));
        assert!(output.status.success(), "{output:?}");
        for name in ["cert-chain.pem", "key.pem", "root-cert.pem"] {
            assert_eq!(fs::read_link(folder.join(name)).unwrap(), Path::new("..data").join(name));
            assert_eq!(fs::metadata(folder.join(name)).unwrap().permissions().mode() & 0o7777, 0o600);
        }
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o7777, 0o700);
        assert!(
            fs::read_to_string(folder.join("key.pem")).unwrap().starts_with("-----BEGIN PRIVATE KEY-----")
        );
    }
    mica.stop();
}

#[test]
fn a_restart_issues_nothing_that_is_still_good() {
    let place = Place::new();
    place.account("web");
    place.account("db");
    place.start(&[]).stop();
    let (before, root) = (super::tree(&place.data().join("secrets")), place.root_pem());
    let mica = place.start(&[]);
    assert_eq!(super::tree(&place.data().join("secrets")), before);
    assert_eq!(place.root_pem(), root);
    assert_eq!(mica.metric("mica_identities{state=\"good\"}"), 2.0);
    mica.stop();
}

#[test]
fn accounts_come_change_and_go() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&[]);
    let started = Instant::now();
    place.account("db");
    place.wait_for_account("db", PROMPT);
    eprintln!("a new account was served after {:?}", started.elapsed());
    fs::create_dir_all(place.source().join("deep/er")).unwrap();
    fs::write(
        place.source().join("deep/er/pod.json"),
        r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"p","namespace":"shop"},"spec":{"serviceAccountName":"cart"}}"#,
    )
    .unwrap();
    place.wait_for_account("cart", PROMPT);

    // Half a file says nothing: what it named stays, and others are served.
    fs::write(place.source().join("web.yaml"), "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: [")
        .unwrap();
    place.account("late");
    place.wait_for_account("late", PROMPT);
    let serial = place.serial("web");
    wait_for(PROMPT, "a report of the bad document", || mica.log().contains("web.yaml").then_some(()));
    fs::remove_file(place.source().join("late.yaml")).unwrap();
    wait_for(REPAIRED, "the removal of late", || (!place.folder("shop", "late").exists()).then_some(()));
    assert_eq!(place.serial("web"), serial);

    // A source that is away removes nothing.
    let away = place.root.path().join("away");
    fs::rename(place.source(), &away).unwrap();
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(place.serial("web"), serial);
    fs::rename(&away, place.source()).unwrap();
    place.account("back");
    place.wait_for_account("back", REPAIRED);

    fs::remove_file(place.source().join("web.yaml")).unwrap();
    fs::remove_dir_all(place.source().join("deep")).unwrap();
    for account in ["web", "cart"] {
        wait_for(REPAIRED, account, || (!place.folder("shop", account).exists()).then_some(()));
    }
    place.leaf("db");
    mica.stop();
}

#[test]
fn an_account_that_went_while_mica_was_away_is_removed_and_an_unreadable_one_is_not() {
    let place = Place::new();
    place.account("gone");
    place.account("broken");
    place.start(&[]).stop();
    let serial = place.serial("broken");
    fs::remove_file(place.source().join("gone.yaml")).unwrap();
    fs::write(place.source().join("broken.yaml"), "{").unwrap();
    let mica = place.start(&[]);
    // Which of the two the broken file named cannot be known, so both stay.
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(place.serial("broken"), serial);
    assert!(place.folder("shop", "gone").exists());
    place.account("broken");
    wait_for(REPAIRED, "the removal of gone", || (!place.folder("shop", "gone").exists()).then_some(()));
    assert_eq!(place.serial("broken"), serial);
    mica.stop();
}

#[test]
fn an_account_whose_file_broke_while_mica_was_away_is_kept_fresh() {
    let place = Place::new();
    place.account("web");
    place.start(&["--ttl", "12s"]).stop();
    let serial = place.serial("web");
    fs::write(place.source().join("web.yaml"), "{").unwrap();
    let mica = place.start(&["--ttl", "12s"]);
    place.wait_for_another("web", &serial, Duration::from_secs(9));
    fs::remove_file(place.source().join("web.yaml")).unwrap();
    wait_for(REPAIRED, "the removal of web", || (!place.folder("shop", "web").exists()).then_some(()));
    mica.stop();
}

#[test]
fn every_damage_is_repaired_with_a_new_key() {
    let place = Place::new();
    for account in ["web", "other"] {
        place.account(account);
    }
    let foreign = Place::new();
    foreign.account("web");
    foreign.start(&[]).stop();
    let mica = place.start(&[]);
    let folder = place.folder("shop", "web");
    let other = place.folder("shop", "other");
    let theirs = foreign.folder("shop", "web");
    type Damage<'a> = (&'a str, Box<dyn Fn() + 'a>);
    let damages: Vec<Damage<'_>> = vec![
        ("a link deleted", Box::new(|| fs::remove_file(folder.join("key.pem")).unwrap())),
        (
            "the key deleted",
            Box::new(|| fs::remove_file(fs::canonicalize(folder.join("key.pem")).unwrap()).unwrap()),
        ),
        ("the key emptied", Box::new(|| fs::write(folder.join("key.pem"), "").unwrap())),
        ("the chain garbled", Box::new(|| fs::write(folder.join("cert-chain.pem"), "garbage").unwrap())),
        (
            "another's key",
            Box::new(|| assert!(fs::copy(other.join("key.pem"), folder.join("key.pem")).is_ok())),
        ),
        (
            "another's identity",
            Box::new(|| {
                for name in ["key.pem", "cert-chain.pem"] {
                    fs::copy(other.join(name), folder.join(name)).unwrap();
                }
            }),
        ),
        (
            "a foreign root",
            Box::new(|| {
                assert!(fs::copy(theirs.join("root-cert.pem"), folder.join("root-cert.pem")).is_ok())
            }),
        ),
        (
            "a foreign set",
            Box::new(|| {
                for name in ["key.pem", "cert-chain.pem", "root-cert.pem"] {
                    fs::copy(theirs.join(name), folder.join(name)).unwrap();
                }
            }),
        ),
        (
            "a key for all to read",
            Box::new(|| {
                fs::set_permissions(folder.join("key.pem"), fs::Permissions::from_mode(0o644)).unwrap()
            }),
        ),
        ("..data deleted", Box::new(|| fs::remove_file(folder.join("..data")).unwrap())),
        (
            "..data astray",
            Box::new(|| {
                fs::remove_file(folder.join("..data")).unwrap();
                symlink("/etc", folder.join("..data")).unwrap();
            }),
        ),
        ("the folder deleted", Box::new(|| fs::remove_dir_all(&folder).unwrap())),
        ("the namespace deleted", Box::new(|| fs::remove_dir_all(folder.parent().unwrap()).unwrap())),
    ];
    for (what, damage) in damages {
        let serial = place.serial("web");
        let started = Instant::now();
        damage();
        place.wait_for_another("web", &serial, REPAIRED);
        eprintln!("{what}: repaired after {:?}", started.elapsed());
    }
    let repaired = || mica.metric("citadel_secret_controller_secret_deleted_cert_count");
    wait_for(PROMPT, "the last one to be counted", || (repaired() >= 10.0).then_some(()));
    mica.stop();
}

#[test]
fn what_mica_did_not_write_is_never_touched() {
    let place = Place::new();
    place.account("web");
    let theirs = place.folder("shop", "web");
    fs::create_dir_all(&theirs).unwrap();
    for folder in
        [place.data(), place.data().join("secrets"), place.data().join("secrets/shop"), theirs.clone()]
    {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).unwrap();
    }
    fs::write(theirs.join("key.pem"), "theirs").unwrap();
    let mica = place.start(&[]);
    wait_for(PROMPT, "a report", || mica.log().contains("shop/web").then_some(()));
    assert_eq!(fs::read_to_string(theirs.join("key.pem")).unwrap(), "theirs");
    let foreign = || mica.metric("mica_identities{state=\"foreign\"}");
    wait_for(PROMPT, "it to be counted", || (foreign() == 1.0).then_some(()));
    fs::remove_dir_all(&theirs).unwrap();
    place.wait_for_account("web", REPAIRED);
    // A file of somebody else's in a folder of Mica's outlives the folder's certificates.
    fs::write(theirs.join("notes.txt"), "theirs").unwrap();
    fs::remove_file(place.source().join("web.yaml")).unwrap();
    wait_for(REPAIRED, "the removal", || (!theirs.join("key.pem").exists()).then_some(()));
    assert_eq!(fs::read_to_string(theirs.join("notes.txt")).unwrap(), "theirs");
    assert!(!theirs.join("..data").exists());
    mica.stop();
}

#[test]
fn delivered_files_have_the_owner_group_and_mode_that_were_asked_for() {
    let place = Place::new();
    place.account("web");
    let secrets = place.root.path().join("delivered");
    let secrets = secrets.to_str().unwrap();
    let mica = place.start(&["--secrets", secrets, "--secrets-group", "1337", "--secrets-mode", "0640"]);
    let folder = Path::new(secrets).join("shop/istio.web");
    for name in ["cert-chain.pem", "key.pem", "root-cert.pem"] {
        let facts = fs::metadata(folder.join(name)).unwrap();
        assert_eq!((facts.mode() & 0o7777, facts.gid()), (0o640, 1337));
    }
    let facts = fs::metadata(&folder).unwrap();
    assert_eq!((facts.mode() & 0o7777, facts.gid()), (0o750, 1337));
    mica.stop();
}

#[test]
fn certificates_are_renewed_from_half_of_their_lifetime_on() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--ttl", "12s"]);
    let mut leaf = place.leaf("web");
    for _ in 0..3 {
        let serial = leaf.serial_text();
        let issued = leaf.validity.issued_at();
        place.wait_for_another("web", &serial, Duration::from_secs(9));
        leaf = place.leaf("web");
        let after = (leaf.validity.issued_at() - issued).as_seconds_f64();
        // Times in certificates are whole seconds, and a busy machine is late.
        assert!((5.0..=9.0 + super::SLACK.as_secs_f64()).contains(&after), "renewed after {after} s");
    }
    assert!(mica.log().contains("renewal"));
    mica.stop();
}
