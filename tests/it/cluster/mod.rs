//! Mica and a real API server.

mod admission;
pub(crate) mod control_plane;
mod events;
mod federated;
mod injection;
mod istio_ca;
mod keyring;
mod knowledge;
mod lease;
mod manifests;
mod namespaces;
pub(crate) mod node;
mod node_agent;
mod node_pods;
mod pods;
mod roots;
mod secrets;
mod served;
mod sidecars;
mod state;
mod storm;
mod weather;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use control_plane::{ControlPlane, ISSUER};
use serde_json::Value;
pub(crate) use served::metrics_page;

#[test]
fn the_control_plane_makes_tokens_as_a_kubelet_gets_them() {
    let plane = ControlPlane::shared();
    let namespace = plane.namespace();
    let account = namespace.account("web");
    let node = namespace.node("a");
    let pod = namespace.pod("web-1", "web", &node);
    let token = namespace.token("web", "istio-ca", Some(&pod));
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    assert_eq!(claims["iss"], ISSUER);
    assert_eq!(claims["aud"][0], "istio-ca");
    let bound = &claims["kubernetes.io"];
    assert_eq!(bound["serviceaccount"]["uid"], *account.uid);
    assert_eq!(bound["pod"]["uid"], *pod.uid);
    assert_eq!(bound["node"]["name"], *node.name);
    assert_eq!(bound["node"]["uid"], *node.uid);
}
