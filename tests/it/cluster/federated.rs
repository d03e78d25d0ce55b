//! The bundles of other trust domains in ConfigMaps.

use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

use super::control_plane::{ControlPlane, runtime};
use super::knowledge::permitted;
use super::served::start;
use crate::serve::federation::{Fetchable, federation};
use crate::serve::{Place, wait_for};

const NAME: &str = "mica-federated-bundles";
const SOON: Duration = Duration::from_secs(30);

#[test]
fn what_is_fetched_stands_in_each_namespace_and_is_never_merged() {
    let plane = ControlPlane::start();
    permitted(&plane);
    let rule = json!([{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [NAME], "verbs": ["patch"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create"]}]);
    let place = Place::new();
    let foreign = Fetchable::start(&place, 5);
    let file = federation(&place, &foreign.text());
    let namespace = plane.namespace();
    let maps: Api<ConfigMap> = Api::namespaced(plane.client(), &namespace.name);
    let mica = start(&place, &plane, &["--federation", &file, "--federated-config-map", NAME]);
    let failed = "mica_federated_bundle_writes_total{outcome=\"failed\"}";
    wait_for(SOON, "a refusal", || (mica.metric(failed) > 0.0).then_some(()));
    assert!(mica.log().contains("the bundles of other trust domains cannot be written"));
    plane.allow_in(&namespace.name, "mica", &rule);

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
