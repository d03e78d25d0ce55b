//! The authority in the cluster: made once, taken over as it is, and never replaced.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, DeleteParams};
use mica::cluster::{ClusterMemory, ClusterStore, Events};
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::store::{AuthorityStore as _, Memory as _};
use mica::sys::dir::Dir;
use serde_json::json;

use super::control_plane::{ControlPlane, HOME, runtime};
use super::events::events_about;
use super::knowledge::{permissions, permit, permitted};
use super::served::{Client, command, command_at, start};
use crate::parts;
use crate::serve::{Mica, Place, free_port, output_within, page, wait_for};

const OWN: &str = "istio-ca-secret";
const BROUGHT: &str = "cacerts";
const FILES: [&str; 4] = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"];
/// What a watch tells of is in force after so long.
const SOON: Duration = Duration::from_secs(3);

type Files = BTreeMap<String, String>;

/// The objects in which the authority is.
struct State<'a>(&'a ControlPlane);

impl State<'_> {
    fn secret(&self, name: &str) -> Option<Secret> {
        let secrets: Api<Secret> = Api::namespaced(self.0.client(), HOME);
        runtime().block_on(secrets.get_opt(name)).unwrap()
    }

    fn marker(&self) -> Option<ConfigMap> {
        let maps: Api<ConfigMap> = Api::namespaced(self.0.client(), HOME);
        runtime().block_on(maps.get_opt("mica-authority")).unwrap()
    }

    /// All there is, to be compared.
    fn everything(&self) -> (Option<Secret>, Option<Secret>, Option<ConfigMap>) {
        (self.secret(BROUGHT), self.secret(OWN), self.marker())
    }

    fn delete(&self, name: &str) {
        let secrets: Api<Secret> = Api::namespaced(self.0.client(), HOME);
        runtime().block_on(secrets.delete(name, &DeleteParams::default())).unwrap();
    }

    fn unmark(&self) {
        let maps: Api<ConfigMap> = Api::namespaced(self.0.client(), HOME);
        runtime().block_on(maps.delete("mica-authority", &DeleteParams::default())).unwrap();
    }

    fn create(&self, name: &str, kind: &str, files: &Files) {
        let data: BTreeMap<_, _> = files.iter().map(|(name, text)| (name, STANDARD.encode(text))).collect();
        let secret = json!({"metadata": {"name": name}, "type": kind, "data": data});
        self.0.create::<Secret>(Some(HOME), &secret);
    }

    fn replace(&self, name: &str, kind: &str, files: &Files) {
        self.delete(name);
        self.create(name, kind, files);
    }

    /// A start that is refused; its last line.
    fn refused(&self, place: &Place) -> String {
        self.refused_with(place, &[])
    }

    fn refused_with(&self, place: &Place, arguments: &[&str]) -> String {
        let before = self.everything();
        let output = output_within(command(place, self.0).args(arguments), Duration::from_secs(30));
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(self.everything() == before, "it changed something: {error}");
        error.lines().last().unwrap().strip_prefix("mica: ").unwrap().to_owned()
    }
}

/// The files of a folder.
fn files(folder: &Path) -> Files {
    FILES.map(|name| (name.to_owned(), fs::read_to_string(folder.join(name)).unwrap())).into()
}

fn text(secret: &Secret, name: &str) -> String {
    String::from_utf8(secret.data.as_ref().unwrap()[name].0.clone()).unwrap()
}

/// A folder with a root as Istio's CA makes it, with openssl: RSA, PKCS#1, and, as long ago, no key identifier.
fn istios_root(folder: &Path) {
    fs::create_dir(folder).unwrap();
    let config = "[req]\ndistinguished_name=name\nprompt=no\nx509_extensions=ca\n[name]\nO=cluster.local\n[ca]\nbasicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign\nsubjectKeyIdentifier=none\nauthorityKeyIdentifier=none\n";
    fs::write(folder.join("config"), config).unwrap();
    for arguments in [
        &["genrsa", "-traditional", "-out", "ca-key.pem", "2048"][..],
        &[
            "req",
            "-new",
            "-x509",
            "-config",
            "config",
            "-key",
            "ca-key.pem",
            "-days",
            "3650",
            "-out",
            "ca-cert.pem",
        ],
    ] {
        let done = parts::openssl().args(arguments).current_dir(folder).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }
    fs::copy(folder.join("ca-cert.pem"), folder.join("root-cert.pem")).unwrap();
    fs::write(folder.join("cert-chain.pem"), "").unwrap();
}

/// An intermediate below a root's folder.
fn intermediate(root: &Path, folder: &Path) -> Files {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.args(["intermediate", "new", "--root"]).arg(root).arg("--out").arg(folder);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{done:?}");
    files(folder)
}

fn root(folder: &Path) -> Files {
    let done =
        Command::new(env!("CARGO_BIN_EXE_mica")).args(["root", "new", "--out"]).arg(folder).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    files(folder)
}

/// Somebody who asks again and again.
struct Asking {
    client: Client,
    token: String,
}

impl Asking {
    fn new(plane: &ControlPlane, mica: &Mica, place: &Place) -> Self {
        let namespace = plane.namespace();
        namespace.account("web");
        let token = namespace.token("web", "istio-ca", None);
        let asking = Self { client: Client::new(mica, place), token };
        wait_for(SOON, "a certificate", || asking.client.identity(&asking.token).ok());
        asking
    }

    /// Who issues now.
    fn issuer(&self) -> Certificate {
        Certificate::all_from_pem(self.client.pem(&self.token).unwrap()[1].as_bytes()).unwrap().remove(0)
    }

    fn ask(&self) {
        self.client.identity(&self.token).unwrap();
    }
}

#[test]
fn an_empty_cluster_gets_one_root_and_keeps_it() {
    let plane = ControlPlane::start();
    let (place, state) = (Place::new(), State(&plane));
    let mica = start(&place, &plane, &[]);
    let root = place.root_pem();
    mica.stop();
    let made = state.secret(OWN).unwrap();
    assert_eq!(made.type_.as_deref(), Some("istio.io/ca-root"));
    let names: Vec<_> = made.data.as_ref().unwrap().keys().cloned().collect();
    assert_eq!(names, ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "key.pem", "root-cert.pem"]);
    assert_eq!(text(&made, "ca-cert.pem"), root);
    assert_eq!(text(&made, "root-cert.pem"), "");
    assert_eq!(state.marker().unwrap().data.unwrap()["root-cert.pem"], root);
    let names: Vec<_> = fs::read_dir(place.data()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "the lock and the roots: {names:?}");

    let another = Place::new();
    let mica = start(&another, &plane, &[]);
    assert_eq!(another.root_pem(), root);
    Asking::new(&plane, &mica, &another).ask();
    mica.stop();
    assert_eq!(state.secret(OWN).unwrap(), made);
    // An authority of its own, of an earlier version.
    fs::create_dir(another.data().join("authority")).unwrap();
    let error = state.refused(&another);
    assert!(error.contains("is an authority of its own") && error.contains("give --authority"), "{error}");
}

#[test]
fn starters_of_the_same_instant_agree_on_one_root() {
    let plane = ControlPlane::start();
    let state = State(&plane);
    let cluster = permitted(&plane);
    let domain = mica::core::spiffe::TrustDomain::parse("cluster.local").unwrap();
    for round in 0..4 {
        let folders: Vec<_> = (0..10).map(|_| tempfile::tempdir().unwrap()).collect();
        let tellings = Arc::new(Events::new(&cluster, "test"));
        let roots = runtime().block_on(async {
            let mut starting = tokio::task::JoinSet::new();
            for folder in &folders {
                let data = Dir::open_trusted(&folder.path().join("data"), Some(0o700)).unwrap();
                let mut store = ClusterStore::new(&cluster, tellings.clone(), data);
                let domain = domain.clone();
                starting.spawn(async move { store.load(&domain).await.unwrap().bundle().pem().to_string() });
            }
            starting.join_all().await
        });
        let marked = state.marker().unwrap().data.unwrap().remove("root-cert.pem").unwrap();
        assert!(roots.iter().all(|root| *root == marked), "round {round}");
        assert_eq!(text(&state.secret(OWN).unwrap(), "ca-cert.pem"), marked);
        state.delete(OWN);
        state.unmark();
    }
    let places = [Place::new(), Place::new(), Place::new()];
    std::thread::scope(|scope| {
        let started: Vec<_> = places.iter().map(|place| scope.spawn(|| start(place, &plane, &[]))).collect();
        for mica in started {
            mica.join().unwrap().stop();
        }
    });
    let root = text(&state.secret(OWN).unwrap(), "ca-cert.pem");
    assert!(places.iter().all(|place| place.root_pem() == root));
}

#[test]
fn istios_secret_is_taken_over_as_it_is_and_cacerts_below_its_root_wins() {
    let plane = ControlPlane::start();
    let (place, state) = (Place::new(), State(&plane));
    let folder = |name: &str| place.root.path().join(name);
    istios_root(&folder("istio"));
    let own = files(&folder("istio"));
    assert!(own["ca-key.pem"].starts_with("-----BEGIN RSA PRIVATE KEY-----"), "not PKCS#1");
    let mut written = own.clone();
    written.insert("root-cert.pem".to_owned(), String::new());
    written.insert("key.pem".to_owned(), String::new());
    state.create(OWN, "istio.io/ca-root", &written);
    let before = state.secret(OWN).unwrap();

    let mica = start(&place, &plane, &[]);
    assert_eq!(place.root_pem().trim(), own["ca-cert.pem"].trim());
    let asking = Asking::new(&plane, &mica, &place);
    let chain = asking.client.pem(&asking.token).unwrap();
    assert_eq!(chain.len(), 2, "the leaf and the root alone");
    fs::write(folder("leaf.pem"), &chain[0]).unwrap();
    let verified = parts::openssl()
        .args(["verify", "-CAfile"])
        .args([folder("istio").join("ca-cert.pem"), folder("leaf.pem")])
        .output()
        .unwrap();
    assert!(verified.status.success(), "{verified:?}");
    assert_eq!(state.secret(OWN).unwrap(), before, "byte for byte, and not even written");
    assert_eq!(state.marker().unwrap().data.unwrap()["root-cert.pem"], place.root_pem());

    // An intermediate below the same root, and the next.
    let serial =
        |files: &Files| Certificate::all_from_pem(files["ca-cert.pem"].as_bytes()).unwrap()[0].serial_text();
    let first = intermediate(&folder("istio"), &folder("first"));
    state.create(BROUGHT, "Opaque", &first);
    wait_for(SOON, "the brought issuer", || (asking.issuer().serial_text() == serial(&first)).then_some(()));
    let second = intermediate(&folder("istio"), &folder("second"));
    state.replace(BROUGHT, "Opaque", &second);
    wait_for(SOON, "the next issuer", || (asking.issuer().serial_text() == serial(&second)).then_some(()));
    assert_eq!(mica.metric("mica_authority_stale"), 0.0);
    mica.stop();
    let another = Place::new();
    let mica = start(&another, &plane, &[]);
    let asking = Asking::new(&plane, &mica, &another);
    assert_eq!(asking.issuer().serial_text(), serial(&second));

    // Another root is not taken, and not begun with.
    let foreign = root(&folder("foreign"));
    state.replace(BROUGHT, "Opaque", &foreign);
    wait_for(SOON, "the refusal", || (mica.metric("mica_authority_stale") == 1.0).then_some(()));
    assert!(mica.metric("mica_authority_reload_failures_total") >= 1.0);
    assert!(
        mica.log().contains("the changed authority is not taken")
            && mica.log().contains("the root has changed")
    );
    assert_eq!(asking.issuer().serial_text(), serial(&second));
    assert_eq!(mica.page("/readyz").0, 200);
    let error = state.refused(&Place::new());
    assert!(
        error.starts_with("the root has changed: the ConfigMap mica-authority in the namespace istio-system has known sha256 "),
        "{error}"
    );
    assert!(error.contains("the secret cacerts in the namespace istio-system now brings sha256 "), "{error}");
    let error = state.refused(&place);
    assert!(error.starts_with("the root has changed: "), "{error}");
    // Without it, what was there before counts again.
    state.delete(BROUGHT);
    wait_for(SOON, "the issuer of before", || (mica.metric("mica_authority_stale") == 0.0).then_some(()));
    asking.ask();
    mica.stop();
}

#[test]
fn a_lost_or_damaged_secret_ends_a_start_and_leaves_a_running_mica_as_it_is() {
    let plane = ControlPlane::start();
    let (place, state) = (Place::new(), State(&plane));
    let mica = start(&place, &plane, &[]);
    let asking = Asking::new(&plane, &mica, &place);
    let root_pem = place.root_pem();
    let good: Files = {
        let secret = state.secret(OWN).unwrap();
        secret
            .data
            .unwrap()
            .into_iter()
            .map(|(name, bytes)| (name, String::from_utf8(bytes.0).unwrap()))
            .collect()
    };
    let foreign = root(&place.root.path().join("foreign"));
    let with = |name: &str, text: &str| {
        let mut files = good.clone();
        files.insert(name.to_owned(), text.to_owned());
        files
    };
    let without = |name: &str| {
        let mut files = good.clone();
        files.remove(name);
        files
    };
    let kind = "istio.io/ca-root";
    let cut = &good["ca-key.pem"][..60];
    let mut refused = 0;
    for (what, kind, files, said) in [
        (
            "gone",
            kind,
            None,
            "the authority is gone: neither the secret cacerts nor istio-ca-secret is in the namespace istio-system, but the ConfigMap mica-authority there shows",
        ),
        ("a key that is cut", kind, Some(with("ca-key.pem", cut)), "ca-key.pem: "),
        ("garbage", kind, Some(with("ca-cert.pem", "garbage")), "ca-cert.pem: "),
        ("no key", kind, Some(without("ca-key.pem")), "ca-key.pem is missing"),
        ("nothing", kind, Some(Files::new()), "are missing"),
        (
            "the key of another",
            kind,
            Some(with("ca-key.pem", &foreign["ca-key.pem"])),
            "does not belong to ca-cert.pem",
        ),
        ("another root", kind, Some(foreign.clone()), "the root has changed: "),
        ("of another type", "Opaque", Some(good.clone()), "its type is \"Opaque\""),
    ] {
        state.delete(OWN);
        if let Some(files) = &files {
            state.create(OWN, kind, files);
        }
        wait_for(SOON, what, || (mica.metric("mica_authority_stale") == 1.0).then_some(()));
        asking.ask();
        assert_eq!((mica.page("/readyz").0, place.root_pem()), (200, root_pem.clone()), "{what}");
        let error = state.refused(&Place::new());
        refused += 1;
        assert!(error.contains(said), "{what}: {error}");
        assert!(!error.contains(&cut[30..]), "{error}");
        if files.is_some() {
            state.delete(OWN);
        }
        state.create(OWN, "istio.io/ca-root", &good);
        wait_for(SOON, "what was there", || (mica.metric("mica_authority_stale") == 0.0).then_some(()));
    }

    let told = wait_for(SOON, "Events", || {
        let told = events_about(&plane, HOME, OWN);
        // The running one tells once in a while, each start that is refused for itself.
        (told.len() > refused).then_some(told)
    });
    for event in &told {
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        assert_eq!(event.reason.as_deref(), Some("AuthorityUnusable"));
    }
    for said in ["the authority is gone: ", "ca-key.pem is missing", "the root has changed: "] {
        assert!(told.iter().any(|event| event.message.as_ref().unwrap().contains(said)), "{said}: {told:?}");
    }

    // The marker alone is written again, and one that says something else is believed.
    state.unmark();
    state.replace(OWN, kind, &good);
    wait_for(SOON, "the marker", || state.marker());
    state.unmark();
    let marker =
        |text: &str| json!({"metadata": {"name": "mica-authority"}, "data": {"root-cert.pem": text}});
    plane.create::<ConfigMap>(Some(HOME), &marker(&foreign["root-cert.pem"]));
    let error = state.refused(&Place::new());
    assert!(
        error.starts_with("the root has changed: the ConfigMap mica-authority in the namespace"),
        "{error}"
    );
    state.unmark();
    plane.create::<ConfigMap>(Some(HOME), &marker("garbage"));
    let error = state.refused(&Place::new());
    assert!(
        error.starts_with(
            "the ConfigMap mica-authority in the namespace istio-system cannot be read: root-cert.pem: "
        ),
        "{error}"
    );

    // As after the return of an old backup: what runs knows better.
    state.unmark();
    state.delete(OWN);
    wait_for(SOON, "the loss", || (mica.metric("mica_authority_stale") == 1.0).then_some(()));
    assert!(
        mica.log().contains("this process, which issues below its root, shows that this cluster had one")
    );
    state.create(OWN, kind, &foreign);
    wait_for(SOON, "another root", || {
        mica.log().contains("the root has changed: this process has known").then_some(())
    });
    asking.ask();
    assert_eq!(place.root_pem(), root_pem);
    mica.stop();
}

#[test]
fn an_older_backup_of_the_cluster_never_changes_the_root_of_what_runs() {
    let plane = ControlPlane::start();
    let (place, state) = (Place::new(), State(&plane));
    let folder = |name: &str| place.root.path().join(name);
    let own = root(&folder("own"));
    state.create(OWN, "istio.io/ca-root", &own);
    let mica = start(&place, &plane, &[]);
    let asking = Asking::new(&plane, &mica, &place);
    let serial =
        |files: &Files| Certificate::all_from_pem(files["ca-cert.pem"].as_bytes()).unwrap()[0].serial_text();
    plane.back_up();
    state.create(BROUGHT, "Opaque", &intermediate(&folder("own"), &folder("ca")));
    wait_for(Duration::from_secs(15), "the brought issuer", || {
        (asking.issuer().serial_text() != serial(&own)).then_some(())
    });
    plane.restore();
    assert_eq!(state.secret(BROUGHT), None);
    wait_for(Duration::from_secs(45), "the issuer of before", || {
        (asking.issuer().serial_text() == serial(&own)).then_some(())
    });
    wait_for(SOON, "it to be counted", || (mica.metric("mica_authority_stale") == 0.0).then_some(()));
    let another = Place::new();
    start(&another, &plane, &[]).stop();
    assert_eq!(another.root_pem(), place.root_pem());
    mica.stop();
}

#[test]
fn where_something_shows_an_earlier_authority_no_new_root_is_made() {
    let plane = ControlPlane::start();
    let (place, state) = (Place::new(), State(&plane));
    let pem = root(&place.root.path().join("earlier"))["root-cert.pem"].clone();
    let [first, second] = [plane.namespace(), plane.namespace()];
    let config_map =
        |text: &str| json!({"metadata": {"name": "istio-ca-root-cert"}, "data": {"root-cert.pem": text}});
    let delete_map = |namespace: &str| {
        let maps: Api<ConfigMap> = Api::namespaced(plane.client(), namespace);
        runtime().block_on(maps.delete("istio-ca-root-cert", &DeleteParams::default())).unwrap();
    };
    let mut nowhere = command(&Place::new(), &plane);
    nowhere.args(["--namespace", "nowhere"]).env("KUBECONFIG", plane.kubeconfig_of("admin"));
    let output = output_within(&mut nowhere, Duration::from_secs(30));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("mica: there is no namespace nowhere; create it"), "{error}");
    assert_eq!(output.status.code(), Some(2));

    // One that says nothing shows nothing.
    plane.create::<ConfigMap>(Some(&first.name), &config_map("garbage"));
    plane.create::<ConfigMap>(Some(&second.name), &config_map(&pem));
    let error = state.refused(&Place::new());
    let shows = format!(
        "but the ConfigMap istio-ca-root-cert in the namespace {} shows that this cluster had one",
        second.name
    );
    assert!(error.contains(&shows), "{error}");
    delete_map(&second.name);
    let delivered = json!({
        "metadata": {"name": "istio.default"}, "type": "istio.io/key-and-cert",
        "data": {"root-cert.pem": STANDARD.encode(&pem)},
    });
    plane.create::<Secret>(Some(&second.name), &delivered);
    let error = state.refused(&Place::new());
    assert!(
        error.contains(&format!("but the secret istio.default in the namespace {} shows", second.name)),
        "{error}"
    );
    let secrets: Api<Secret> = Api::namespaced(plane.client(), &second.name);
    runtime().block_on(secrets.delete("istio.default", &DeleteParams::default())).unwrap();
    // This disk remembers, too.
    let remembering = Place::new();
    Dir::open_trusted(&remembering.data(), Some(0o700)).unwrap();
    fs::write(remembering.data().join("root-cert.pem"), &pem).unwrap();
    let error = state.refused(&remembering);
    assert!(error.contains("/root-cert.pem shows that this cluster had one"), "{error}");

    assert!(state.everything() == (None, None, None));
    start(&place, &plane, &[]).stop();
    assert!(state.secret(OWN).is_some());
    delete_map(&first.name);
}

#[test]
fn a_root_that_is_brought_in_files_is_remembered_by_the_cluster() {
    let plane = ControlPlane::start();
    let (place, state) = (Place::new(), State(&plane));
    let folder = |name: &str| place.root.path().join(name);
    let bring = |name: &str| ["--authority".to_owned(), folder(name).to_str().unwrap().to_owned()];
    let first = root(&folder("first"));
    intermediate(&folder("first"), &folder("below"));
    let foreign = root(&folder("foreign"));
    let both = format!("{}{}", first["root-cert.pem"], foreign["root-cert.pem"]);
    intermediate(&folder("first"), &folder("added"));
    fs::write(folder("added").join("root-cert.pem"), &both).unwrap();
    let start = |place: &Place, name: &str| start(place, &plane, &bring(name).each_ref().map(String::as_str));
    let refused = |place: &Place, name: &str| {
        let error = state.refused_with(place, &bring(name).each_ref().map(String::as_str));
        let said = "the root has changed: the ConfigMap mica-authority in the namespace istio-system has known sha256 ";
        assert!(error.starts_with(said), "{error}");
        assert!(error.contains(&format!("and {} now brings sha256 ", folder(name).display())), "{error}");
        let left: Vec<_> =
            fs::read_dir(place.data()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["lock"], "it is remembered nonetheless");
    };

    let mica = start(&place, "first");
    assert_eq!(state.marker().unwrap().data.unwrap()["root-cert.pem"], first["root-cert.pem"]);
    let marker = state.marker();
    // A second replica, as all are in a pod: with nothing in its data folder.
    let second = Place::new();
    let replica = start(&second, "below");
    assert_eq!(second.root_pem(), place.root_pem());
    refused(&Place::new(), "added");
    replica.stop();
    mica.stop();
    let restarted = Place::new();
    refused(&restarted, "foreign");
    let told = events_about(&plane, HOME, "mica-authority");
    assert!(!told.is_empty());
    for event in told {
        assert_eq!(event.reason.as_deref(), Some("AuthorityUnusable"));
        assert!(event.message.unwrap().starts_with("the root has changed: "));
    }
    let mica = start(&restarted, "first");
    Asking::new(&plane, &mica, &restarted).ask();
    mica.stop();
    assert_eq!(state.marker(), marker, "and it is not even written");
    // Nor is a new one made in its place.
    let error = state.refused(&Place::new());
    assert!(
        error.starts_with("the authority is gone: ") && error.contains("ConfigMap mica-authority"),
        "{error}"
    );

    // As long as it cannot be asked nothing is taken.
    let waiting = Place::new();
    permitted(&plane);
    let kubeconfig = plane.kubeconfig_of("newcomer");
    let address = format!("127.0.0.1:{}", free_port());
    let mut mica = command_at(&waiting, &plane, &address);
    mica.args(bring("foreign")).env("KUBECONFIG", &kubeconfig).stdout(std::process::Stdio::null());
    mica.stderr(fs::File::create(folder("log")).unwrap());
    let mut mica = mica.spawn().unwrap();
    let missing = "the permission to get configmaps mica-authority in the namespace istio-system is missing";
    wait_for(SOON, "a word on what is missing", || {
        fs::read_to_string(folder("log")).unwrap().contains(missing).then_some(())
    });
    assert_eq!((page(&address, "/livez").0, page(&address, "/readyz").0), (200, 503));
    assert!(!waiting.data().join("authority").exists());
    permit(&plane, "newcomer", &permissions());
    let code = wait_for(Duration::from_secs(15), "the refusal", || mica.try_wait().unwrap());
    assert_eq!(code.code(), Some(2));
    let mut nowhere = command(&Place::new(), &plane);
    nowhere.args(["--namespace", "nowhere"]).args(bring("first"));
    nowhere.env("KUBECONFIG", plane.kubeconfig_of("admin"));
    let output = output_within(&mut nowhere, Duration::from_secs(30));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("mica: there is no namespace nowhere; create it"), "{error}");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn of_starters_of_the_same_instant_with_two_roots_those_of_one_begin() {
    let plane = ControlPlane::start();
    let state = State(&plane);
    let cluster = permitted(&plane);
    let folder = tempfile::tempdir().unwrap();
    let roots = ["one", "other"].map(|name| {
        let pem = root(&folder.path().join(name)).remove("root-cert.pem").unwrap();
        (TrustBundle::from_pem(pem.as_bytes()).unwrap(), pem)
    });
    for round in 0..6 {
        let tellings = Arc::new(Events::new(&cluster, "test"));
        let agreed: Vec<(usize, bool)> = runtime().block_on(async {
            let mut starting = tokio::task::JoinSet::new();
            for n in 0..10 {
                let mut memory = ClusterMemory::new(&cluster, tellings.clone());
                let bundle = roots[n % 2].0.clone();
                starting.spawn(async move { (n % 2, memory.agree(&bundle, Path::new("/ca")).await.is_ok()) });
            }
            starting.join_all().await
        });
        let marked = state.marker().unwrap().data.unwrap().remove("root-cert.pem").unwrap();
        for (which, agreed) in agreed {
            assert_eq!(agreed, roots[which].1 == marked, "round {round}");
        }
        state.unmark();
    }
}

#[test]
fn a_missing_permission_is_named_and_waited_for() {
    let plane = ControlPlane::start();
    let place = Place::new();
    permitted(&plane);
    let kubeconfig = plane.kubeconfig_of("nobody");
    let address = format!("127.0.0.1:{}", free_port());
    let log = place.root.path().join("waiting");
    let begin = || {
        let mut mica = command_at(&place, &plane, &address);
        mica.env("KUBECONFIG", &kubeconfig);
        mica.stderr(fs::File::create(&log).unwrap()).stdout(std::process::Stdio::null());
        let child = mica.spawn().unwrap();
        wait_for(SOON, "a word on what is missing", || {
            let said = fs::read_to_string(&log).unwrap();
            said.contains("the permission to get secrets cacerts in the namespace istio-system is missing")
                .then_some(())
        });
        child
    };
    let mut mica = begin();
    assert_eq!(page(&address, "/livez").0, 200);
    let (status, said) = page(&address, "/readyz");
    assert_eq!((status, said.trim()), (503, "the authority is not loaded yet; the log says why"));
    // It can be stopped while it waits.
    assert!(Command::new("kill").arg(mica.id().to_string()).status().unwrap().success());
    assert_eq!(mica.wait().unwrap().code(), Some(0));

    let mut mica = begin();
    permit(&plane, "nobody", &permissions());
    wait_for(Duration::from_secs(15), "readiness", || (page(&address, "/readyz").0 == 200).then_some(()));
    assert!(Command::new("kill").arg(mica.id().to_string()).status().unwrap().success());
    assert_eq!(mica.wait().unwrap().code(), Some(0));
}
