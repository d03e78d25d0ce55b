//! The bundles of other trust domains in ConfigMaps.

use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::rbac::v1::ClusterRoleBinding;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use super::control_plane::{ControlPlane, HOME, runtime};
use super::knowledge::permitted;
use super::served::start;
use crate::serve::federation::{Fetchable, federation};
use crate::serve::{Mica, Place, wait_for};

const NAME: &str = "mica-federated-bundles";
const SOON: Duration = Duration::from_secs(30);

/// What `docs/federation.md` says to add.
fn rule() -> Value {
    let named = json!({"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [NAME], "verbs": ["list", "patch"]});
    json!([named, {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create"]}])
}

/// What a namespace's ConfigMap has of example.org: its number.
fn number(plane: &ControlPlane, namespace: &str) -> Option<u64> {
    let maps: Api<ConfigMap> = Api::namespaced(plane.client(), namespace);
    let data = runtime().block_on(maps.get_opt(NAME)).unwrap()?.data?;
    let bundle: Value = serde_json::from_str(data.get("example.org.json")?).unwrap();
    bundle["spiffe_sequence"].as_u64()
}

#[test]
fn what_is_fetched_stands_in_each_namespace_and_is_never_merged() {
    let plane = ControlPlane::start();
    permitted(&plane);
    let place = Place::new();
    let foreign = Fetchable::start(&place, 5);
    let file = federation(&place, &foreign.text());
    let namespace = plane.namespace();
    let maps: Api<ConfigMap> = Api::namespaced(plane.client(), &namespace.name);
    let mica = start(&place, &plane, &["--federation", &file, "--federated-config-map", NAME]);
    let failed = "mica_federated_bundle_writes_total{outcome=\"failed\"}";
    wait_for(SOON, "a refusal", || (mica.metric(failed) > 0.0).then_some(()));
    assert!(mica.log().contains("the bundles of other trust domains cannot be written"));
    plane.allow_in(&namespace.name, "mica", &rule());

    let held = |sequence: u64| {
        let found = runtime().block_on(maps.get_opt(NAME)).unwrap()?;
        let data = found.data.unwrap_or_default();
        assert!(data.len() <= 1, "{data:?}");
        let bundle: Value = serde_json::from_str(data.get("example.org.json")?).unwrap();
        (bundle["spiffe_sequence"] == sequence).then_some(bundle)
    };
    // A refusal is tried again after a minute or so.
    let bundle = wait_for(Duration::from_secs(90), "the bundle", || held(5));
    let uses: Vec<_> =
        bundle["keys"].as_array().unwrap().iter().map(|key| key["use"].as_str().unwrap()).collect();
    assert_eq!(uses, ["x509-svid", "jwt-svid"]);
    foreign.publish(6);
    wait_for(SOON, "the next", || held(6));
    // What others change is repaired.
    let spoiled = json!({"data": {"example.org.json": "{}"}});
    let patch = Patch::Merge(&spoiled);
    runtime().block_on(maps.patch(NAME, &PatchParams::default(), &patch)).unwrap();
    assert_eq!(held(6), None);
    wait_for(Duration::from_secs(90), "its repair", || held(6));
    // Nothing of it is in the roots.
    let roots =
        wait_for(SOON, "the roots", || runtime().block_on(maps.get_opt("istio-ca-root-cert")).unwrap());
    assert_eq!(roots.data.unwrap()["root-cert.pem"].matches("BEGIN CERTIFICATE").count(), 1);
    mica.stop();
}

#[test]
fn what_one_knew_is_not_lost_to_the_next_while_the_other_side_is_away() {
    let plane = ControlPlane::start();
    permitted(&plane);
    plane.allow("federated", &rule());
    let binding = json!({
        "metadata": {"name": "mica-federated"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "federated"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "mica"}],
    });
    plane.create::<ClusterRoleBinding>(None, &binding);
    let place = Place::new();
    let foreign = Fetchable::start(&place, 5);
    let text = foreign.text();
    let arguments = |file: &str| ["--federation", file, "--federated-config-map", NAME].map(str::to_owned);
    let started = |place: &Place, more: &[&str]| {
        let flags = arguments(&federation(place, &text));
        start(
            place,
            &plane,
            &flags.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>(),
        )
    };
    let written = |mica: &Mica| {
        let name = "mica_federated_bundle_writes_total{outcome=\"written\"}";
        wait_for(SOON, "writes", || (mica.metric(name) >= 2.0).then_some(()));
    };
    let namespace = plane.namespace();
    let mica = started(&place, &[]);
    for name in [&*namespace.name, HOME] {
        wait_for(SOON, "the bundle", || (number(&plane, name) == Some(5)).then_some(()));
    }
    mica.stop();
    drop(foreign);

    // Another pod, with an empty data folder: it has what the cluster has, and gives it on.
    let next = Place::new();
    let mica = started(&next, &[]);
    let new = plane.namespace();
    wait_for(SOON, "the bundle", || (number(&plane, &new.name) == Some(5)).then_some(()));
    written(&mica);
    assert_eq!(number(&plane, &namespace.name), Some(5));
    assert!(mica.log().contains("is what the cluster has, until it is fetched"), "{}", mica.log());
    mica.stop();

    // Where its own namespace has nothing, it does not know the bundle, and leaves it where it stands.
    let maps: Api<ConfigMap> = Api::namespaced(plane.client(), HOME);
    runtime().block_on(maps.delete(NAME, &DeleteParams::default())).unwrap();
    let last = Place::new();
    let mica = started(&last, &[]);
    written(&mica);
    let later = plane.namespace();
    let maps: Api<ConfigMap> = Api::namespaced(plane.client(), &later.name);
    wait_for(SOON, "an empty one", || runtime().block_on(maps.get_opt(NAME)).unwrap());
    assert_eq!(number(&plane, &later.name), None);
    for name in [&namespace.name, &new.name] {
        assert_eq!(number(&plane, name), Some(5));
    }
    // Nobody's any more, and gone.
    federation(&last, "trust_domains: {}");
    for name in [&namespace.name, &new.name] {
        wait_for(SOON, "its end", || number(&plane, name).is_none().then_some(()));
    }
    mica.stop();
}
