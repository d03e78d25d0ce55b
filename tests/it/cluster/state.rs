//! The authority in the cluster: made once, taken over as it is, and never replaced.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::Api;

use super::control_plane::{ControlPlane, HOME, runtime};
use super::served::{Client, start};
use crate::serve::Place;

fn secret(plane: &ControlPlane, name: &str) -> Option<Secret> {
    let secrets: Api<Secret> = Api::namespaced(plane.client(), HOME);
    runtime().block_on(secrets.get_opt(name)).unwrap()
}

fn data(secret: &Secret, name: &str) -> String {
    let bytes = secret.data.as_ref().unwrap().get(name).cloned().unwrap_or(ByteString(Vec::new()));
    String::from_utf8(bytes.0).unwrap()
}

fn marker(plane: &ControlPlane) -> Option<ConfigMap> {
    let marker: Api<ConfigMap> = Api::namespaced(plane.client(), HOME);
    runtime().block_on(marker.get_opt("mica-authority")).unwrap()
}

#[test]
fn an_empty_cluster_gets_one_root_and_keeps_it() {
    let plane = ControlPlane::start();
    let place = Place::new();
    let mica = start(&place, &plane, &[]);
    let root = place.root_pem();
    mica.stop();
    let made = secret(&plane, "istio-ca-secret").unwrap();
    assert_eq!(made.type_.as_deref(), Some("istio.io/ca-root"));
    let names: Vec<_> = made.data.as_ref().unwrap().keys().cloned().collect();
    assert_eq!(names, ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "key.pem", "root-cert.pem"]);
    assert_eq!(data(&made, "ca-cert.pem"), root);
    assert_eq!(data(&made, "root-cert.pem"), "");
    assert_eq!(marker(&plane).unwrap().data.unwrap()["root-cert.pem"], root);
    let names: Vec<_> =
        std::fs::read_dir(place.data()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "the lock and the roots: {names:?}");

    let another = Place::new();
    let mica = start(&another, &plane, &[]);
    assert_eq!(another.root_pem(), root);
    let namespace = plane.namespace();
    namespace.account("web");
    Client::new(&mica, &another).identity(&namespace.token("web", "istio-ca", None)).unwrap();
    mica.stop();
    assert_eq!(secret(&plane, "istio-ca-secret").unwrap(), made);
}
