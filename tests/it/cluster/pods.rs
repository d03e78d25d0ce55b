//! Mica as its users have it in a cluster: a pod among pods.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::knowledge::permissions;
use super::node::Node;
use super::sidecars::{self, Sidecars};
use crate::fixtures::OpensslCa;
use crate::mica::Place;

const IMAGE: &str = "localhost/mica:1";
/// Where Mica runs, as the names of its certificate have it.
const NAMESPACE: &str = "istio-system";
/// Where pods have the token and the roots that they ask with.
const MOUNTED: &str = "/var/run/secrets/istio";

#[test]
fn a_pod_gets_a_certificate_from_a_pod() {
    let node = Node::shared();
    node.image(IMAGE, Path::new(env!("CARGO_BIN_EXE_mica")));
    let place = Place::with_ca();
    node.apply(&[namespace(NAMESPACE), namespace("shop"), account("shop", "web")]);
    node.apply(&mica(&place));
    node.apply(&[json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"namespace": "shop", "name": "istio-ca-root-cert"},
        "data": {"root-cert.pem": place.read("root/root-cert.pem")},
    })]);
    node.rolled_out(NAMESPACE, "mica");

    // Again if need be: the way to a service is made a moment after its pod is ready.
    node.apply(&[asks("with-its-token", "istio-ca", "OnFailure")]);
    let (phase, said) = node.ended("shop", "with-its-token");
    assert!(phase == "Succeeded" && said.contains("spiffe://cluster.local/ns/shop/sa/web"), "{phase} {said}");
    node.apply(&[asks("with-another", "example.org", "Never")]);
    let (phase, said) = node.ended("shop", "with-another");
    assert!(phase == "Failed" && said.contains("TOKEN_AUDIENCE"), "{phase} {said}");
}

/// A pod that asks Mica for a certificate, and ends.
fn asks(name: &str, audience: &str, restart: &str) -> Value {
    let address = format!("istio-ca.{NAMESPACE}.svc:15012");
    let [roots, token] = ["root-cert.pem", "token"].map(|file| format!("{MOUNTED}/{file}"));
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": "shop", "name": name},
        "spec": {
            "serviceAccountName": "web",
            "restartPolicy": restart,
            "securityContext": restricted(),
            "containers": [{
                "name": "asks", "image": IMAGE,
                "args": ["csr", "request", "--address", address, "--roots", roots, "--token-file", token, "--out", "/tmp/set"],
                "securityContext": confined(),
                "volumeMounts": [{"name": "istio", "mountPath": MOUNTED}],
            }],
            "volumes": [{"name": "istio", "projected": {"sources": [
                {"serviceAccountToken": {"audience": audience, "path": "token"}},
                {"configMap": {"name": "istio-ca-root-cert"}},
            ]}}],
        },
    })
}

/// Mica with the CA that is in a place, and all that it needs.
fn mica(place: &Place) -> Vec<Value> {
    let files = ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"];
    let files: serde_json::Map<String, Value> =
        files.iter().map(|file| ((*file).to_owned(), place.read(&format!("ca/{file}")).into())).collect();
    let probe = json!({"httpGet": {"path": "/readyz", "port": 15014}, "periodSeconds": 1});
    vec![
        account(NAMESPACE, "mica"),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": "mica"}, "rules": permissions(),
        }),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": "mica"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "mica"},
            "subjects": [{"kind": "ServiceAccount", "namespace": NAMESPACE, "name": "mica"}],
        }),
        json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": NAMESPACE, "name": "ca"},
            "stringData": files,
        }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": NAMESPACE, "name": "istio-ca"},
            "spec": {"selector": {"app": "mica"}, "ports": [{"port": 15012}]},
        }),
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": NAMESPACE, "name": "mica"},
            "spec": {
                "selector": {"matchLabels": {"app": "mica"}},
                "template": {
                    "metadata": {"labels": {"app": "mica"}},
                    "spec": {
                        "serviceAccountName": "mica",
                        "securityContext": restricted(),
                        "containers": [{
                            "name": "mica", "image": IMAGE,
                            "args": ["serve", "--kube", "--authority", "/etc/mica", "--data-dir", "/tmp/mica",
                                "--grpc-address", "0.0.0.0:15012", "--http-address", "0.0.0.0:15014"],
                            "readinessProbe": probe,
                            "securityContext": confined(),
                            "volumeMounts": [{"name": "ca", "mountPath": "/etc/mica"}],
                        }],
                        "volumes": [{"name": "ca", "secret": {"secretName": "ca", "defaultMode": 0o440}}],
                    },
                },
            },
        }),
    ]
}

/// Where only pods run that the restricted standard of pod security lets in.
pub(super) fn namespace(name: &str) -> Value {
    let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

pub(super) fn account(namespace: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"namespace": namespace, "name": name}})
}

/// A pod's half of the restricted standard; its volumes belong to its group.
pub(super) fn restricted() -> Value {
    json!({"runAsNonRoot": true, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}})
}

/// A container's half.
pub(super) fn confined() -> Value {
    json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}})
}

/// What the sidecars do with Secrets as Mica keeps them, from an OpenSSL CA: what is proven with Mica stands on this.
#[test]
fn sidecars_take_what_their_secrets_become() {
    let node = &Node::start();
    let ca = OpensslCa::new();
    let deliver = || {
        for name in sidecars::ACCOUNTS {
            let set = ca.issue(&format!("spiffe://cluster.local/ns/{}/sa/{name}", sidecars::NAMESPACE));
            node.apply(&[json!({
                "apiVersion": "v1", "kind": "Secret",
                "metadata": {"namespace": sidecars::NAMESPACE, "name": format!("istio.{name}")},
                "stringData": {"cert-chain.pem": set.chain, "key.pem": set.key, "root-cert.pem": set.roots},
            })]);
        }
    };
    sidecars::make(node);
    deliver();
    let sidecars = Sidecars::under_load(node);
    for _ in 0..3 {
        let before = sidecars.serials();
        deliver();
        sidecars.wait_for_others(&before, Duration::from_secs(20));
        sidecars.wait_for_answers(20);
    }
    node.cluster(["restart", "kube-apiserver"]);
    sidecars.wait_for_answers(100);
    sidecars.stop();
}
