//! What an agent for a node knows of its pods, from a real API server and with the rights that it says it needs.

use std::sync::Arc;
use std::time::Duration;

use mica::attest::{Pod, Pods as _};
use mica::cluster::{NODE_PERMISSIONS, NodePods};
use mica::core::spiffe::ServiceAccount;

use super::control_plane::{ControlPlane, runtime};
use super::knowledge::cluster;
use crate::serve::wait_for;

#[test]
fn the_pods_of_the_node_are_known_by_their_uids_until_they_end() {
    let plane = ControlPlane::shared();
    if !plane.knows("node-agent") {
        plane.allow("node-agent", &serde_saphyr::from_str(NODE_PERMISSIONS).unwrap());
    }
    let namespace = plane.namespace();
    namespace.account("web");
    let (here, there) = (namespace.node("here"), namespace.node("there"));
    let first = namespace.pod("first", "web", &here);
    let foreign = namespace.pod("foreign", "web", &there);
    let pods = Arc::new(NodePods::new(&cluster(plane, "node-agent"), &here.name));
    let of = |uid: &str| runtime().block_on(pods.pod(uid));
    let account = ServiceAccount::new(&namespace.name, "web").unwrap();
    let runs = Pod { account, runs: true };
    // Nothing is followed yet: it is read.
    assert_eq!(of(&first.uid), Ok(Some(runs.clone())));
    assert!(of(&foreign.uid).is_err(), "a moment later it is not read again");
    std::thread::sleep(Duration::from_millis(1_100));
    assert_eq!(of(&foreign.uid), Ok(None), "on another node");

    let followed = pods.clone();
    let task = runtime().spawn(async move { followed.follow().await });
    let mut changes = pods.changes();
    let second = namespace.pod("second", "web", &here);
    let wait = |uid: &str, wanted: Option<Pod>| {
        wait_for(Duration::from_secs(10), "the API server's word", || {
            (of(uid) == Ok(wanted.clone())).then_some(())
        });
    };
    wait(&second.uid, Some(runs.clone()));
    runtime().block_on(async {
        tokio::time::timeout(Duration::from_secs(10), changes.changed()).await.unwrap().unwrap();
    });
    namespace.phase("second", "Failed");
    wait(&second.uid, Some(Pod { runs: false, ..runs.clone() }));
    namespace.delete_pod("first");
    wait(&first.uid, None);
    task.abort();
}
