//! The authority's state: never lost, never made twice, brought by the user, taken while running.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::issuer::{self, Issuer, Order};
use mica::core::key::KeyKind;
use mica::core::profile::Profile;
use mica::sys::keys;
use time::OffsetDateTime;

use mica::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;

use super::mtls;
use super::{Place, tree, wait_for};
use crate::fixtures::run;
use crate::parts;

const FILES: [&str; 4] = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"];

#[test]
fn a_damaged_partial_or_foreign_state_ends_the_start_and_changes_nothing() {
    let (place, foreign) = (Place::new(), Place::new());
    for place in [&place, &foreign] {
        place.account("web");
        place.start(&[]).stop();
    }
    let state = place.data().join("authority");
    let whole: Vec<_> = FILES.map(|name| fs::read(state.join(name)).unwrap()).into();
    let restore = || {
        fs::create_dir_all(&state).unwrap();
        for (name, bytes) in FILES.iter().zip(&whole) {
            fs::write(state.join(name), bytes).unwrap();
        }
        fs::set_permissions(&state, fs::Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(state.join("ca-key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
    };
    let theirs = foreign.data().join("authority");
    let mut damages: Vec<(String, Box<dyn Fn()>)> = Vec::new();
    for name in FILES {
        let path = state.join(name);
        let (gone, cut, garbage, other) = (path.clone(), path.clone(), path.clone(), path.clone());
        damages.push((format!("{name} gone"), Box::new(move || fs::remove_file(&gone).unwrap())));
        damages.push((
            format!("{name} cut"),
            Box::new(move || {
                let bytes = fs::read(&cut).unwrap();
                fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
            }),
        ));
        damages.push((format!("{name} garbage"), Box::new(move || fs::write(&garbage, "garbage").unwrap())));
        // The chain of a root says nothing that the certificate does not say, and roots in it are left out.
        if name != "cert-chain.pem" {
            let theirs = theirs.join(name);
            damages.push((
                format!("{name} of another authority"),
                Box::new(move || fs::write(&other, fs::read(&theirs).unwrap()).unwrap()),
            ));
        }
    }
    let key = state.join("ca-key.pem");
    damages.push((
        "ca-key.pem for all to read".to_owned(),
        Box::new(move || fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap()),
    ));
    let (from, to) = (theirs.clone(), state.clone());
    damages.push((
        "another authority".to_owned(),
        Box::new(move || {
            for name in FILES {
                fs::write(to.join(name), fs::read(from.join(name)).unwrap()).unwrap();
            }
        }),
    ));
    let gone = state.clone();
    damages.push(("authority gone".to_owned(), Box::new(move || fs::remove_dir_all(&gone).unwrap())));
    let (secrets, root) = (tree(&place.data().join("secrets")), place.root_pem());
    for (what, damage) in damages {
        damage();
        let before = tree(&state);
        let refused = place.refused(&[]);
        let named = what.split(' ').next().unwrap().trim_start_matches("another");
        assert!(
            refused.contains(named) && refused.contains("backup") || refused.contains("chmod"),
            "{what}: {refused}"
        );
        assert_eq!(tree(&state), before, "{what}");
        assert_eq!(tree(&place.data().join("secrets")), secrets, "{what}");
        restore();
        assert_eq!(place.root_pem(), root, "{what}");
    }
    place.start(&[]).stop();
    assert_eq!(tree(&place.data().join("secrets")), secrets);
}

#[test]
fn another_trust_domain_is_refused() {
    let place = Place::new();
    place.account("web");
    place.start(&[]).stop();
    let refused = place.refused(&["--trust-domain", "example.org"]);
    assert!(refused.contains("cluster.local") && refused.contains("example.org"), "{refused}");
}

/// A CA of OpenSSL's making, as users bring them.
pub(crate) struct Brought {
    folder: tempfile::TempDir,
}

impl Brought {
    pub(crate) fn new() -> Self {
        let brought = Self { folder: tempfile::tempdir().unwrap() };
        brought.openssl(
            &["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3650", "-sha256"],
            |command| {
                command.args([
                    "-subj",
                    "/DC=org/DC=example/O=Example/CN=Root",
                    "-keyout",
                    "root.key",
                    "-out",
                    "root.pem",
                ]);
                command.args(["-addext", "basicConstraints=critical,CA:TRUE"]);
                command.args(["-addext", "keyUsage=critical,keyCertSign,cRLSign"]);
            },
        );
        brought
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn openssl(&self, arguments: &[&str], more: impl FnOnce(&mut std::process::Command)) {
        let mut command = parts::openssl();
        command.current_dir(self.folder.path()).args(arguments);
        more(&mut command);
        run(&mut command);
    }

    /// An intermediate below the root, with a key of this kind, as four files in a folder.
    pub(crate) fn intermediate(&self, name: &str, key: &[&str], days: &str) -> PathBuf {
        let folder = self.path(name);
        fs::create_dir_all(&folder).unwrap();
        self.openssl(&["genpkey", "-out"], |command| {
            command.arg(format!("{name}.key")).args(key);
        });
        self.openssl(&["req", "-new", "-sha256", "-subj"], |command| {
            command.arg(format!("/DC=org/DC=example/OU=a/OU=b/CN={name}"));
            command.args(["-key", &format!("{name}.key"), "-out", &format!("{name}.csr")]);
        });
        fs::write(
            self.path("ext"),
            "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n\
             subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n",
        )
        .unwrap();
        self.openssl(
            &["x509", "-req", "-sha256", "-CA", "root.pem", "-CAkey", "root.key", "-days", days],
            |command| {
                command.args([
                    "-extfile",
                    "ext",
                    "-in",
                    &format!("{name}.csr"),
                    "-out",
                    &format!("{name}.pem"),
                ]);
            },
        );
        self.put(name, &folder);
        folder
    }

    /// Copies the files of an intermediate into a folder, one after the other, as people do.
    pub(crate) fn put(&self, name: &str, folder: &Path) {
        let read = |file: String| fs::read_to_string(self.path(&file)).unwrap();
        let (certificate, root) = (read(format!("{name}.pem")), read("root.pem".to_owned()));
        fs::write(folder.join("ca-cert.pem"), &certificate).unwrap();
        fs::write(folder.join("ca-key.pem"), read(format!("{name}.key"))).unwrap();
        fs::write(folder.join("cert-chain.pem"), certificate + &root).unwrap();
        fs::write(folder.join("root-cert.pem"), root).unwrap();
    }
}

pub(crate) const P256: [&str; 4] = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];
const RSA: [&str; 4] = ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"];

fn openssl_accepts(place: &Place, account: &str) {
    for purpose in ["sslserver", "sslclient"] {
        let chain = place.folder("shop", account).join("cert-chain.pem");
        let mut command = parts::openssl();
        command.args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"]);
        run(command.arg(place.data().join("root-cert.pem")).arg("-untrusted").arg(&chain).arg(&chain));
    }
}

#[test]
fn a_brought_authority_issues_and_its_new_intermediate_is_taken_while_running() {
    let (place, brought) = (Place::new(), Brought::new());
    place.account("web");
    let folder = brought.intermediate("one", &RSA, "30");
    let authority = folder.to_str().unwrap();
    let mica = place.start(&["--authority", authority]);
    openssl_accepts(&place, "web");
    let chain = fs::read_to_string(place.folder("shop", "web").join("cert-chain.pem")).unwrap();
    assert_eq!(
        chain.matches("BEGIN CERTIFICATE").count(),
        2,
        "the leaf and its intermediate, without the root"
    );
    assert!(!place.data().join("authority/ca-key.pem").exists(), "a brought key stays where it is");
    let serial = place.serial("web");

    // Broken on the way: the old one stays.
    fs::write(folder.join("ca-cert.pem"), "garbage").unwrap();
    wait_for(Duration::from_secs(5), "a report", || mica.log().contains("not taken").then_some(()));
    place.account("meanwhile");
    place.wait_for_account("meanwhile", Duration::from_secs(2));
    assert!(mica.metric("mica_authority_reload_failures_total") >= 1.0);

    brought.intermediate("two", &P256, "30");
    brought.put("two", &folder);
    wait_for(Duration::from_secs(5), "the new issuer", || {
        mica.log().contains("has a new issuer").then_some(())
    });
    place.account("db");
    place.wait_for_account("db", Duration::from_secs(2));
    openssl_accepts(&place, "db");
    assert_ne!(place.leaf("db").issuer, place.leaf("web").issuer);
    assert_eq!(place.serial("web"), serial, "what was issued below the old intermediate stays good");

    // Another root is not taken.
    let other = Brought::new();
    other.intermediate("three", &P256, "30");
    other.put("three", &folder);
    wait_for(Duration::from_secs(5), "a refusal", || {
        mica.log().contains("the root has changed").then_some(())
    });
    assert_eq!(mica.page("/readyz").0, 200);
    place.account("still");
    place.wait_for_account("still", Duration::from_secs(2));
    assert_eq!(place.leaf("still").issuer, place.leaf("db").issuer);
    mica.stop();
    let refused = place.refused(&["--authority", authority]);
    assert!(refused.contains("the root has changed") && refused.contains("--data-dir"), "{refused}");
    let refused = place.refused(&[]);
    assert!(refused.contains("--authority"), "{refused}");
}

#[test]
fn keys_of_every_form_are_taken_and_those_that_do_not_fit_are_refused() {
    let brought = Brought::new();
    let rsa = brought.intermediate("rsa", &RSA, "30");
    let ec = brought.intermediate("ec", &P256, "30");
    let ed = brought.intermediate("ed", &["-algorithm", "ED25519"], "30");
    let fresh = || {
        let place = Place::new();
        place.account("web");
        place
    };
    for folder in [&rsa, &ec, &ed] {
        let place = fresh();
        let mica = place.start(&["--authority", folder.to_str().unwrap()]);
        openssl_accepts(&place, "web");
        // Over the CSR API too, several at once: an RSA signature is made beside the connections.
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let channel = mtls::connect(&mica, &place, Some(&place.folder("shop", "web"))).await;
            let mut asked = tokio::task::JoinSet::new();
            for _ in 0..16 {
                let mut client = IstioCertificateServiceClient::new(channel.clone());
                let request = mtls::ask(mtls::csr("spiffe://cluster.local/ns/shop/sa/web"));
                asked.spawn(async move { client.create_certificate(request).await.unwrap() });
            }
            assert_eq!(asked.join_all().await.len(), 16);
        });
        mica.stop();
    }
    // PKCS#1 and SEC1.
    for (folder, kind) in [(&rsa, "rsa"), (&ec, "ec")] {
        let key = folder.join("ca-key.pem");
        let other = brought.path("other");
        brought.openssl(&[kind, "-in"], |command| {
            command.arg(&key).arg("-out").arg(&other);
            if kind == "rsa" {
                command.arg("-traditional");
            }
        });
        fs::rename(&other, &key).unwrap();
        let place = fresh();
        place.start(&["--authority", folder.to_str().unwrap()]).stop();
        openssl_accepts(&place, "web");
    }
    // Encrypted PKCS#8.
    let key = ec.join("ca-key.pem");
    let other = brought.path("other");
    brought.openssl(&["pkcs8", "-topk8", "-passout", "pass:secret", "-in"], |command| {
        command.arg(&key).arg("-out").arg(&other);
    });
    fs::rename(&other, &key).unwrap();
    let refused = fresh().refused(&["--authority", ec.to_str().unwrap()]);
    assert!(refused.contains("--passphrase-file"), "{refused}");
    let passphrase = brought.path("passphrase");
    fs::write(&passphrase, "wrong\n").unwrap();
    let arguments = ["--authority", ec.to_str().unwrap(), "--passphrase-file", passphrase.to_str().unwrap()];
    let refused = fresh().refused(&arguments);
    assert!(refused.contains("passphrase is wrong") && !refused.contains("secret"), "{refused}");
    fs::write(&passphrase, "secret\n").unwrap();
    let place = fresh();
    place.start(&arguments).stop();
    openssl_accepts(&place, "web");
    // The TLS form.
    let tls = brought.path("tls");
    fs::create_dir(&tls).unwrap();
    fs::copy(brought.path("rsa.pem"), tls.join("tls.crt")).unwrap();
    fs::copy(brought.path("rsa.key"), tls.join("tls.key")).unwrap();
    fs::copy(brought.path("root.pem"), tls.join("ca.crt")).unwrap();
    let place = fresh();
    place.start(&["--authority", tls.to_str().unwrap()]).stop();
    openssl_accepts(&place, "web");
    // Another's key, and a missing file.
    fs::copy(brought.path("ed.key"), tls.join("tls.key")).unwrap();
    let refused = fresh().refused(&["--authority", tls.to_str().unwrap()]);
    assert!(refused.contains("tls.key") || refused.contains("key"), "{refused}");
    fs::remove_file(tls.join("ca.crt")).unwrap();
    let refused = fresh().refused(&["--authority", tls.to_str().unwrap()]);
    assert!(refused.contains("ca.crt"), "{refused}");
}

/// The four files of an intermediate that was issued at a time for thirty days, below a root that still lasts.
fn put_intermediate(folder: &Path, root: &(Issuer, String), issued: OffsetDateTime) {
    let key = keys::generate(KeyKind::P256).unwrap();
    let (organization, trust_domain) = ("Example".parse().unwrap(), "cluster.local".parse().unwrap());
    let profile = Profile::Intermediate { organization: &organization, trust_domain: &trust_domain };
    let order = Order { profile, key: key.public(), lifetime: "30d".parse().unwrap() };
    let certificate = root.0.issue(&order, issued, keys::serial_number().unwrap()).unwrap();
    let pem = root.0.chain_pem(&certificate);
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("ca-cert.pem"), &pem).unwrap();
    fs::write(folder.join("ca-key.pem"), key.to_pem().as_bytes()).unwrap();
    fs::write(folder.join("cert-chain.pem"), &pem).unwrap();
    fs::write(folder.join("root-cert.pem"), &root.1).unwrap();
}

/// A root for ten years that was made at a time.
fn root_of(made: OffsetDateTime) -> (Issuer, String) {
    let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
    let (organization, trust_domain) = ("Example".parse().unwrap(), "cluster.local".parse().unwrap());
    let profile = Profile::Root { organization: &organization, trust_domain: &trust_domain };
    let serial = keys::serial_number().unwrap();
    let root = issuer::root(&key, &profile, "10y".parse().unwrap(), made, serial).unwrap();
    let root = Certificate::from_der(root.der()).unwrap();
    let bundle = TrustBundle::new([root.clone()]).unwrap();
    let pem = root.to_pem();
    (Issuer::new(Arc::new(key), &[root], bundle, &trust_domain).unwrap(), pem)
}

#[test]
fn with_an_expired_issuer_mica_runs_is_not_ready_and_loses_nothing() {
    let place = Place::new();
    place.account("web");
    let now = OffsetDateTime::now_utc();
    let ago = now - Duration::from_secs(60 * 86_400);
    let root = root_of(ago);

    let folder = place.root.path().join("ca");
    put_intermediate(&folder, &root, now);
    let mica = place.start(&["--authority", folder.to_str().unwrap()]);
    assert_eq!(mica.page("/readyz").0, 200);
    mica.stop();
    let secrets = tree(&place.data().join("secrets"));
    let expired = Place::new();
    expired.account("web");
    put_intermediate(&folder, &root, ago);
    for (place, has_a_set) in [(&place, true), (&expired, false)] {
        let mica = place.start(&["--authority", folder.to_str().unwrap()]);
        let (status, why) = mica.page("/readyz");
        assert_eq!(status, 503);
        assert!(why.contains("expired"), "{why}");
        assert_eq!(mica.page("/livez").0, 200);
        assert!(mica.metric("citadel_server_cert_chain_expiry_seconds") < 0.0);
        if has_a_set {
            assert_eq!(tree(&place.data().join("secrets")), secrets, "what was delivered stays");
        }
        mica.stop();
    }
    // A good one mends it, without a restart.
    let mica = expired.start(&["--authority", folder.to_str().unwrap()]);
    put_intermediate(&folder, &root, now);
    wait_for(Duration::from_secs(5), "readiness", || (mica.page("/readyz").0 == 200).then_some(()));
    expired.wait_for_account("web", Duration::from_secs(2));
    mica.stop();
}

#[test]
fn an_issuer_that_expires_while_mica_runs_is_waited_for_without_haste() {
    let place = Place::new();
    place.account("web");
    let now = OffsetDateTime::now_utc();
    let thirty_days = Duration::from_secs(30 * 86_400);
    let root = root_of(now - 2 * thirty_days);
    let folder = place.root.path().join("ca");
    put_intermediate(&folder, &root, now - thirty_days + Duration::from_secs(12));
    let mica = place.start(&["--authority", folder.to_str().unwrap()]);
    assert_eq!(mica.page("/readyz").0, 200);
    assert_eq!(mica.metric("mica_authority_ending"), 1.0);
    assert!(mica.log().contains("the authority ends soon: nothing can be issued then"));
    let issued = mica.metric("citadel_server_success_cert_issuance_count");
    wait_for(Duration::from_secs(12), "the end of readiness", || {
        (mica.page("/readyz").0 == 503).then_some(())
    });
    std::thread::sleep(Duration::from_secs(2));
    let before = mica.worked();
    std::thread::sleep(Duration::from_secs(3));
    let worked = mica.worked() - before;
    assert!(worked < Duration::from_millis(150), "{worked:?} of work in three seconds of waiting");
    assert_eq!(mica.metric("mica_identities{state=\"good\"}"), 0.0);
    assert!(mica.metric("citadel_server_success_cert_issuance_count") - issued <= 3.0);
    put_intermediate(&folder, &root, now);
    wait_for(Duration::from_secs(5), "readiness", || (mica.page("/readyz").0 == 200).then_some(()));
    place.wait_for_account("web", Duration::from_secs(2));
    assert_eq!(mica.metric("mica_authority_ending"), 0.0);
    mica.stop();
}

#[test]
fn a_mounted_authority_is_followed_wherever_its_links_lead() {
    let (place, brought) = (Place::new(), Brought::new());
    let root = place.root.path();
    for name in ["one", "two", "three"] {
        brought.intermediate(name, &P256, "30");
    }
    // As the kubelet mounts a Secret, behind a link of the user's, and named by a relative path.
    let names = FILES;
    for (folder, sets) in [("a", ["one", "two"]), ("b", ["three", "three"])] {
        let folder = root.join(folder);
        for (n, set) in sets.iter().enumerate() {
            fs::create_dir_all(folder.join(format!("..{n}"))).unwrap();
            brought.put(set, &folder.join(format!("..{n}")));
        }
        symlink("..0", folder.join("..data")).unwrap();
        for name in names {
            symlink(format!("..data/{name}"), folder.join(name)).unwrap();
        }
    }
    symlink("a", root.join("ca")).unwrap();
    let mica = place.start_command(place.command().args(["--authority", "ca"]).current_dir(root));
    let issuer_is = |name: &str| {
        let account = format!("web-{name}");
        place.account(&account);
        place.wait_for_account(&account, Duration::from_secs(2));
        let expected = Certificate::all_from_pem(&fs::read(brought.path(&format!("{name}.pem"))).unwrap());
        assert_eq!(place.leaf(&account).issuer, expected.unwrap()[0].subject);
    };
    let taken = |n| {
        wait_for(Duration::from_secs(5), "a new issuer", || {
            (mica.log().matches("has a new issuer").count() == n).then_some(())
        });
    };
    issuer_is("one");
    let swap = |target: &str, link: PathBuf| {
        symlink(target, root.join("new")).unwrap();
        fs::rename(root.join("new"), link).unwrap();
    };
    swap("..1", root.join("a/..data"));
    taken(1);
    issuer_is("two");
    swap("b", root.join("ca"));
    taken(2);
    issuer_is("three");
    assert!(!mica.log().contains("not taken"), "a swap is never seen half done");

    // While it is away it is told of once.
    fs::remove_file(root.join("ca")).unwrap();
    wait_for(Duration::from_secs(5), "a report", || mica.log().contains("not taken").then_some(()));
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(mica.log().matches("not taken").count(), 1);
    assert_eq!(mica.page("/readyz").0, 200);
    mica.stop();
}

#[test]
fn an_issuer_that_issues_is_not_given_up_for_one_that_does_not() {
    let place = Place::new();
    let now = OffsetDateTime::now_utc();
    let days = |n: i64| time::Duration::days(n);
    let root = root_of(now - days(90));
    let folder = place.root.path().join("ca");
    put_intermediate(&folder, &root, now);
    let mica = place.start(&["--authority", folder.to_str().unwrap()]);
    for (issued, told) in [(now - days(60), "expired"), (now + days(60), "is not valid before")] {
        put_intermediate(&folder, &root, issued);
        wait_for(Duration::from_secs(5), told, || mica.log().contains(told).then_some(()));
        assert_eq!(mica.page("/readyz").0, 200);
    }
    // Its time comes two minutes before it was issued.
    put_intermediate(&folder, &root, now + time::Duration::seconds(130));
    wait_for(Duration::from_secs(40), "the new issuer", || {
        mica.log().contains("has a new issuer").then_some(())
    });
    assert_eq!(mica.page("/readyz").0, 200);
    mica.stop();
}

#[test]
fn another_root_is_not_taken_even_when_the_memory_of_the_first_is_gone() {
    let (place, brought, other) = (Place::new(), Brought::new(), Brought::new());
    let folder = brought.intermediate("one", &P256, "30");
    let mica = place.start(&["--authority", folder.to_str().unwrap()]);
    fs::remove_dir_all(place.data().join("authority")).unwrap();
    for name in ["root-cert.pem", "delivered"] {
        fs::remove_file(place.data().join(name)).unwrap();
    }
    other.intermediate("two", &P256, "30");
    other.put("two", &folder);
    wait_for(Duration::from_secs(5), "a refusal", || {
        mica.log().contains("the root has changed").then_some(())
    });
    mica.stop();
}
