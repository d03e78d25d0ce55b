//! Kubernetes Events on a real API server.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, ObjectReference};
use kube::Api;
use kube::api::ListParams;
use mica::cluster::{Cluster, EventReason, Events, Severity};
use mica::sys;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::control_plane::{ControlPlane, TestNamespace, runtime};
use super::knowledge::{cluster, permitted};
use crate::serve::wait_for;

/// One that posts until it is dropped.
struct Posting {
    events: Arc<Events>,
    registry: Registry,
    task: tokio::task::JoinHandle<()>,
}

impl Posting {
    fn start(cluster: &Cluster) -> Self {
        let events = Arc::new(Events::new(cluster, &sys::host_name()));
        let mut registry = Registry::default();
        events.register(&mut registry);
        let posting = events.clone();
        let task = runtime().spawn(async move { posting.post().await });
        Self { events, registry, task }
    }

    fn count(&self, outcome: &str) -> u64 {
        let mut page = String::new();
        encode(&mut page, &self.registry).unwrap();
        let sample = format!("mica_kube_events_total{{outcome=\"{outcome}\"}} ");
        page.lines().find_map(|line| line.strip_prefix(&sample)).unwrap().parse().unwrap()
    }
}

impl Drop for Posting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The ones about an object, as `kubectl get events` and `kubectl describe` ask for them.
pub(super) fn events_about(plane: &ControlPlane, namespace: &str, name: &str) -> Vec<Event> {
    let api: Api<Event> = Api::namespaced(plane.client(), namespace);
    let about = ListParams::default().fields(&format!("involvedObject.name={name}"));
    runtime().block_on(api.list(&about)).unwrap().items
}

fn account(namespace: &TestNamespace<'_>, name: &str, uid: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("ServiceAccount".to_owned()),
        namespace: Some(namespace.name.clone()),
        name: Some(name.to_owned()),
        uid: Some(uid.to_owned()),
        ..ObjectReference::default()
    }
}

#[test]
fn a_thousand_of_the_same_are_one_event_that_kubectl_shows() {
    let plane = ControlPlane::shared();
    let namespace = plane.namespace();
    let web = namespace.account("web");
    let about = account(&namespace, "web", &web.uid);
    let posting = Posting::start(&permitted(plane));
    for n in 0..1000 {
        let note = format!("the secret istio.web is not Mica's, {n}");
        posting.events.tell(&about, Severity::Warning, EventReason::SecretNameTaken, note);
    }
    // Another reason, and one without a namespace, whose name would be none of an event.
    posting.events.tell(&about, Severity::Normal, EventReason::SecretRepaired, "é".repeat(2000));
    let wide = ObjectReference {
        api_version: Some("certificates.k8s.io/v1".to_owned()),
        kind: Some("ClusterTrustBundle".to_owned()),
        name: Some(format!("mica.dev:workload:{}", namespace.name)),
        ..ObjectReference::default()
    };
    posting.events.tell(&wide, Severity::Warning, EventReason::RivalWriter, "another writes it".to_owned());
    wait_for(Duration::from_secs(5), "three events", || (posting.count("posted") == 3).then_some(()));
    assert_eq!((posting.count("repeated"), posting.count("held_back"), posting.count("failed")), (999, 0, 0));

    let mut found = events_about(plane, &namespace.name, "web");
    found.sort_by_key(|event| event.reason.clone());
    assert_eq!(found.len(), 2, "{found:?}");
    let [taken, repaired] = &found[..] else { unreachable!() };
    assert_eq!(taken.type_.as_deref(), Some("Warning"));
    assert_eq!(taken.reason.as_deref(), Some("SecretNameTaken"));
    assert_eq!(taken.message.as_deref(), Some("the secret istio.web is not Mica's, 0"));
    assert_eq!(taken.reporting_component.as_deref(), Some("mica.dev/mica"));
    assert_eq!(taken.reporting_instance.as_deref(), Some(&*sys::host_name()));
    // By which `kubectl describe` finds it.
    assert_eq!(taken.involved_object.uid.as_deref(), Some(&*web.uid));
    assert_eq!(repaired.message.as_ref().map(String::len), Some(1024));
    let wide = events_about(plane, "default", wide.name.as_deref().unwrap());
    assert_eq!(wide.len(), 1);
}

#[test]
fn what_cannot_be_posted_is_counted_and_told_again_the_next_time() {
    let plane = ControlPlane::shared();
    let namespace = plane.namespace();
    let about = account(&namespace, "web", "u");
    let posting = Posting::start(&cluster(plane, "nobody"));
    for failed in 1..=2 {
        posting.events.tell(&about, Severity::Warning, EventReason::NotServed, "why".to_owned());
        wait_for(Duration::from_secs(5), "a refusal", || (posting.count("failed") == failed).then_some(()));
    }
    // Nobody posts, and nobody waits for it.
    posting.task.abort();
    for n in 0..10_000 {
        let about = account(&namespace, &format!("a-{n}"), "u");
        posting.events.tell(&about, Severity::Warning, EventReason::NotServed, "why".to_owned());
    }
    assert!(posting.count("held_back") > 9_900);
    assert!(events_about(plane, &namespace.name, "web").is_empty());
}
