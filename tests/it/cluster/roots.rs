//! The roots in ConfigMaps and a ClusterTrustBundle, and others who write them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use k8s_openapi::api::certificates::v1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt as _};
use mica::cluster::{Events, Leadership, Namespaces, Roots, RootsOptions};
use mica::core::bundle::TrustBundle;
use mica::core::selection::Rules;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};

use super::control_plane::{ControlPlane, runtime};
use super::events::events_about;
use super::knowledge::cluster;
use super::namespaces::label;
use super::served::start;
use crate::mica as program;
use crate::serve::{Mica, Place, wait_for};

const NAME: &str = "istio-ca-root-cert";
const PROMPT: Duration = Duration::from_secs(5);

/// One for the tests of this file that run no program, which would write its own roots everywhere.
fn plane() -> &'static ControlPlane {
    static PLANE: OnceLock<ControlPlane> = OnceLock::new();
    PLANE.get_or_init(ControlPlane::start)
}

struct Maps {
    api: Api<ConfigMap>,
    name: String,
}

impl Maps {
    fn of(plane: &ControlPlane, namespace: &str, name: &str) -> Self {
        Self { api: Api::namespaced(plane.client(), namespace), name: name.to_owned() }
    }

    fn get(&self) -> Option<ConfigMap> {
        runtime().block_on(self.api.get_opt(&self.name)).unwrap()
    }

    fn text(&self) -> Option<String> {
        self.get()?.data?.get("root-cert.pem").cloned()
    }

    fn wait(&self, text: &str) {
        wait_for(PROMPT, "the roots", || (self.text()? == text).then_some(()));
    }

    fn patch(&self, manager: &str, patch: &Value) {
        let params = PatchParams { field_manager: Some(manager.to_owned()), ..PatchParams::default() };
        runtime().block_on(self.api.patch(&self.name, &params, &Patch::Merge(patch))).unwrap();
    }

    fn delete(&self) {
        runtime().block_on(self.api.delete(&self.name, &DeleteParams::default())).unwrap();
    }

    /// As istiod makes it.
    fn create(&self, manager: &str, text: &str) {
        let map = json!({"metadata": {"name": self.name, "labels": {"istio.io/config": "true"}},
            "data": {"root-cert.pem": text}});
        let params = PostParams { field_manager: Some(manager.to_owned()), ..PostParams::default() };
        let map: ConfigMap = serde_json::from_value(map).unwrap();
        runtime().block_on(self.api.create(&params, &map)).unwrap();
    }
}

fn bundles(plane: &ControlPlane) -> Api<ClusterTrustBundle> {
    Api::all(plane.client())
}

fn get_bundle(plane: &ControlPlane, name: &str) -> Option<ClusterTrustBundle> {
    runtime().block_on(bundles(plane).get_opt(name)).unwrap()
}

fn written(mica: &Mica, object: &str) -> f64 {
    mica.metric(&format!("mica_root_writes_total{{object=\"{object}\",outcome=\"written\"}}"))
}

#[test]
fn the_roots_are_everywhere_and_stay_as_they_are() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let shop = plane.namespace();
    // One that another CA has left behind, and one of a namespace that is not Mica's.
    let left = plane.namespace();
    Maps::of(&plane, &left.name, NAME).create("pilot-discovery", "old");
    let other = plane.namespace();
    label(&plane, &other.name, &json!({"ca.istio.io/env": "another-ca"}));
    Maps::of(&plane, &other.name, NAME).create("pilot-discovery", "theirs");

    let mica = start(&place, &plane, &[]);
    let roots = std::fs::read_to_string(place.data().join("root-cert.pem")).unwrap();
    let maps = Maps::of(&plane, &shop.name, NAME);
    for namespace in [&shop.name, &left.name, "default", "kube-system", "istio-system"] {
        Maps::of(&plane, namespace, NAME).wait(&roots);
    }
    let late = plane.namespace();
    Maps::of(&plane, &late.name, NAME).wait(&roots);
    let map = maps.get().unwrap();
    let labels = map.metadata.labels.unwrap();
    assert_eq!((&*labels["istio.io/config"], &*labels["mica.dev/managed-by"]), ("true", "istio-system"));
    let name = "mica.dev:workload:cluster.local";
    let bundle = wait_for(PROMPT, "the bundle", || get_bundle(&plane, name));
    assert_eq!(bundle.spec.signer_name.as_deref(), Some("mica.dev/workload"));
    assert_eq!(bundle.spec.trust_bundle, roots);

    // What others do to them does not last; what is theirs stays.
    maps.patch("kubectl-edit", &json!({"data": {"root-cert.pem": "broken", "more": "theirs"}}));
    maps.wait(&roots);
    maps.patch("kubectl-edit", &json!({"data": {"root-cert.pem": null}}));
    maps.wait(&roots);
    maps.patch("kubectl-label", &json!({"metadata": {"labels": {"istio.io/config": "no", "mine": "yes"}}}));
    wait_for(PROMPT, "the label", || {
        let labels = maps.get()?.metadata.labels?;
        (labels["istio.io/config"] == "true" && labels["mine"] == "yes").then_some(())
    });
    assert_eq!(maps.get().unwrap().data.unwrap()["more"], "theirs");
    maps.delete();
    maps.wait(&roots);
    let patch = Patch::Merge(json!({"spec": {"trustBundle": root()}}));
    runtime().block_on(bundles(&plane).patch(name, &PatchParams::default(), &patch)).unwrap();
    let is_back = || get_bundle(&plane, name).filter(|bundle| bundle.spec.trust_bundle == roots);
    wait_for(PROMPT, "the bundle's repair", is_back);
    runtime().block_on(bundles(&plane).delete(name, &DeleteParams::default())).unwrap();
    wait_for(PROMPT, "another bundle", is_back);
    let told = wait_for(PROMPT, "an event", || {
        events_about(&plane, &shop.name, NAME)
            .into_iter()
            .find(|event| event.reason.as_deref() == Some("RootsRepaired"))
    });
    assert!(told.message.unwrap().starts_with("kubectl-edit has written it"));

    // A namespace that goes is no trouble, and one that comes back is a new one.
    let namespaces: Api<Namespace> = Api::all(plane.client());
    runtime().block_on(namespaces.delete(&late.name, &DeleteParams::default())).unwrap();
    wait_for(Duration::from_secs(30), "the end of the namespace", || {
        runtime().block_on(namespaces.get_opt(&late.name)).unwrap().is_none().then_some(())
    });

    // Labels decide, at once where they ask for the roots; what was written stays where they do not.
    let theirs = Maps::of(&plane, &other.name, NAME);
    assert_eq!(theirs.text().unwrap(), "theirs");
    label(&plane, &other.name, &json!({"ca.istio.io/env": "istio-system"}));
    theirs.wait(&roots);
    label(&plane, &other.name, &json!({"ca.istio.io/override": "false"}));
    std::thread::sleep(Duration::from_secs(1));
    theirs.patch("kubectl-edit", &json!({"data": {"root-cert.pem": "theirs again"}}));
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(theirs.text().unwrap(), "theirs again");
    assert_eq!(mica.metric("mica_rival_writers{object=\"configmap\"}"), 0.0);
    mica.stop();

    // A start that finds everything in place writes nothing.
    let before = maps.get().unwrap().metadata.resource_version;
    let mica = start(&place, &plane, &[]);
    let fresh = plane.namespace();
    Maps::of(&plane, &fresh.name, NAME).wait(&roots);
    // It is there before Mica has heard so, and counts it.
    wait_for(PROMPT, "its count", || (written(&mica, "configmap") > 0.0).then_some(()));
    assert_eq!((written(&mica, "configmap"), written(&mica, "clustertrustbundle")), (1.0, 0.0));
    assert_eq!(maps.get().unwrap().metadata.resource_version, before);
    mica.stop();
}

/// Writes its own roots into a ConfigMap whenever others are in it, as a living istiod does, until it is dropped.
struct Rival {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU32>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Rival {
    fn start(plane: &ControlPlane, namespace: &str) -> Self {
        let maps = Maps::of(plane, namespace, NAME);
        let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let (stopped, counted) = (stop.clone(), writes.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if maps.text().is_some_and(|text| text != "istiod's") {
                    maps.patch("pilot-discovery", &json!({"data": {"root-cert.pem": "istiod's"}}));
                    counted.fetch_add(1, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Self { stop, writes, thread: Some(thread) }
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

#[test]
fn a_living_istiod_is_not_fought() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let [shop, bank] = [plane.namespace(), plane.namespace()];
    let mica = start(&place, &plane, &[]);
    let roots = std::fs::read_to_string(place.data().join("root-cert.pem")).unwrap();
    let namespaces: Api<Namespace> = Api::all(plane.client());
    for namespace in runtime().block_on(namespaces.list(&ListParams::default())).unwrap() {
        Maps::of(&plane, &namespace.name_any(), NAME).wait(&roots);
    }
    // One that does not lead writes nothing, whatever it sees.
    let elsewhere = Place::new();
    let follower = start(&elsewhere, &plane, &[]);
    let before = written(&mica, "configmap");
    let rival = Rival::start(&plane, &shop.name);
    let is_noticed = || mica.metric("mica_rival_writers{object=\"configmap\"}") == 1.0;
    wait_for(PROMPT, "the rival", || is_noticed().then_some(()));
    std::thread::sleep(Duration::from_secs(5));
    // It wrote, was repaired, wrote again; and that was all.
    assert_eq!(written(&mica, "configmap") - before, 1.0);
    assert_eq!(rival.writes.load(Ordering::Relaxed), 2);
    assert!(is_noticed());
    assert_eq!(Maps::of(&plane, &shop.name, NAME).text().unwrap(), "istiod's");
    let told = wait_for(PROMPT, "an event", || {
        events_about(&plane, &shop.name, NAME)
            .into_iter()
            .find(|event| event.reason.as_deref() == Some("RivalWriter"))
    });
    assert_eq!(told.type_.as_deref(), Some("Warning"));
    let note = told.message.unwrap();
    assert!(note.starts_with("pilot-discovery keeps writing it") && note.contains("10 minutes"), "{note}");
    let log = mica.log();
    assert!(
        log.contains("another writer keeps writing the roots") && log.contains("pilot-discovery"),
        "{log}"
    );
    // Other namespaces have theirs, and go on having them.
    let maps = Maps::of(&plane, &bank.name, NAME);
    maps.patch("kubectl-edit", &json!({"data": {"root-cert.pem": "broken"}}));
    maps.wait(&roots);
    assert_eq!((written(&follower, "configmap"), written(&follower, "clustertrustbundle")), (0.0, 0.0));
    mica.stop();
    // And goes on where the other one ended.
    maps.patch("kubectl-edit", &json!({"data": {"root-cert.pem": "broken"}}));
    maps.wait(&roots);
    follower.stop();
}

/// A distribution of roots without all the rest.
struct Writer {
    roots: Arc<Roots>,
    registry: Registry,
    current: Arc<Mutex<Arc<TrustBundle>>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Writer {
    fn start(plane: &ControlPlane, own: &str, name: &str, trust_domain: &str, pem: &str) -> Self {
        let cluster = cluster(plane, "admin");
        let rules = Rules { watched: None, by_default: true, own: own.to_owned() };
        let namespaces = Arc::new(Namespaces::new(&cluster, rules));
        let events = Arc::new(Events::new(&cluster, own));
        let options = RootsOptions {
            config_map: Some(name.to_owned()),
            trust_bundle: Some(trust_domain.parse().unwrap()),
            own: own.to_owned(),
        };
        let current = Arc::new(Mutex::new(bundle(pem)));
        let asked = current.clone();
        let asked = Box::new(move || asked.lock().unwrap().clone());
        let leadership = Leadership::always();
        let roots = Arc::new(Roots::new(&cluster, options, asked, namespaces.clone(), leadership, events));
        let mut registry = Registry::default();
        roots.register(&mut registry);
        let run = roots.clone();
        let tasks = vec![
            runtime().spawn(async move { namespaces.follow().await }),
            runtime().spawn(async move { run.run().await }),
        ];
        Self { roots, registry, current, tasks }
    }

    fn metric(&self, sample: &str) -> u64 {
        let mut page = String::new();
        encode(&mut page, &self.registry).unwrap();
        page.lines().find_map(|line| line.strip_prefix(sample)?.trim().parse().ok()).unwrap()
    }

    fn written(&self, object: &str) -> u64 {
        self.metric(&format!("mica_root_writes_total{{object=\"{object}\",outcome=\"written\"}}"))
    }

    fn rivals(&self) -> [u64; 2] {
        ["configmap", "clustertrustbundle"]
            .map(|object| self.metric(&format!("mica_rival_writers{{object=\"{object}\"}}")))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

fn bundle(pem: &str) -> Arc<TrustBundle> {
    Arc::new(TrustBundle::from_pem(pem.as_bytes()).unwrap())
}

/// The certificate of a root of its own.
fn root() -> String {
    let place = program::Place::new();
    place.ok(&["root", "new", "--out", "root"]);
    place.read("root/root-cert.pem")
}

#[test]
fn other_roots_go_everywhere_and_it_is_known_who_holds_which() {
    let plane = plane();
    let shop = plane.namespace();
    let [first, second] = [root(), root()];
    let writer = Writer::start(plane, "mica-one", "roots-one", "one.example", &first);
    let maps = Maps::of(plane, &shop.name, "roots-one");
    maps.wait(&first);
    let held = wait_for(PROMPT, "what it holds", || writer.roots.held(&shop.name));
    assert_eq!(held[..], *ring::digest::digest(&ring::digest::SHA256, first.as_bytes()).as_ref());
    assert_eq!(writer.roots.held("no-such-namespace"), None);
    let both = first + &second;
    *writer.current.lock().unwrap() = bundle(&both);
    maps.wait(&both);
    wait_for(PROMPT, "what it holds now", || writer.roots.held(&shop.name).filter(|now| *now != held));
    let name = "mica.dev:workload:one.example";
    wait_for(PROMPT, "the bundle", || {
        get_bundle(plane, name).filter(|bundle| bundle.spec.trust_bundle == both)
    });
    assert_eq!(writer.rivals(), [0, 0]);
}

#[test]
fn two_micas_that_mean_the_same_objects_do_not_fight() {
    let plane = plane();
    let shop = plane.namespace();
    let [first, second] = [root(), root()];
    let one = Writer::start(plane, "mica-a", "roots-two", "two.example", &first);
    Maps::of(plane, &shop.name, "roots-two").wait(&first);
    wait_for(PROMPT, "the bundle", || get_bundle(plane, "mica.dev:workload:two.example"));
    let other = Writer::start(plane, "mica-b", "roots-two", "two.example", &second);
    let all = || one.rivals()[0] + other.rivals()[0];
    wait_for(Duration::from_secs(10), "one of them to give up", || {
        (all() >= 4 && one.rivals()[1] + other.rivals()[1] == 1).then_some(())
    });
    let count = || ["configmap", "clustertrustbundle"].map(|o| one.written(o) + other.written(o));
    std::thread::sleep(Duration::from_secs(2));
    let before = (count(), all());
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!((count(), all()), before);
    // Of each object: made, taken over, taken back.
    assert_eq!(count()[1], 3);
    assert!(count()[0] <= 3 * all() + 3, "{:?} {}", count(), all());
    drop(other);
    drop(one);
}

#[test]
fn nothing_is_written_that_is_not_asked_for_and_names_have_to_be_possible() {
    let plane = plane();
    let place = program::Place::new();
    for (arguments, said) in [
        (
            &["--trust-domain", "under_score.example"][..],
            "--trust-domain under_score.example cannot be in the name of a ClusterTrustBundle",
        ),
        (&["--root-config-map", "Roots"], "mica: invalid value 'Roots' for '--root-config-map <NAME>'"),
    ] {
        let mut command = place.command(&[&["serve", "--kube"], arguments].concat());
        let done = command.env("KUBECONFIG", plane.kubeconfig_of("mica-none")).output().unwrap();
        let text = String::from_utf8(done.stderr).unwrap();
        assert!(done.status.code() == Some(2) && text.contains(said), "{text}");
    }
    let (place, plane) = (Place::new(), ControlPlane::start());
    let shop = plane.namespace();
    let flags = [
        "--root-config-map",
        "none",
        "--cluster-trust-bundle",
        "false",
        "--trust-domain",
        "under_score.example",
    ];
    let mica = start(&place, &plane, &flags);
    std::thread::sleep(Duration::from_secs(2));
    assert!(Maps::of(&plane, &shop.name, NAME).get().is_none());
    assert!(runtime().block_on(bundles(&plane).list(&ListParams::default())).unwrap().items.is_empty());
    assert_eq!(written(&mica, "configmap") + written(&mica, "clustertrustbundle"), 0.0);
    mica.stop();
}
