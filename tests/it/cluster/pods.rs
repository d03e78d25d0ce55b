//! Mica as its users have it in a cluster: the pods that its manifests make, among others.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::injection::injected;
use super::node::Node;
use super::sidecars::{self, Sidecars};
use crate::fixtures::run;
use crate::serve::wait_for;

/// The name that the manifests have, and that of another version.
const IMAGE: &str = "localhost/mica:0.1.0";
const NEXT_IMAGE: &str = "localhost/mica:0.1.1";
/// Where Mica runs.
const NAMESPACE: &str = "istio-system";
/// Where pods have the token and the roots that they ask with.
const MOUNTED: &str = "/var/run/secrets/istio";

#[test]
fn a_pod_gets_a_certificate_from_a_pod() {
    let node = Node::shared();
    install(node, &[]);
    node.apply(&[namespace("shop"), account("shop", "web")]);
    // Again if need be: the way to a service is made a moment after its pod is ready.
    node.apply(&[asks("with-its-token", "istio-ca", "OnFailure")]);
    let (phase, said) = node.ended("shop", "with-its-token");
    assert!(phase == "Succeeded" && said.contains("spiffe://cluster.local/ns/shop/sa/web"), "{phase} {said}");
    node.apply(&[asks("with-another", "example.org", "Never")]);
    let (phase, said) = node.ended("shop", "with-another");
    assert!(phase == "Failed" && said.contains("TOKEN_AUDIENCE"), "{phase} {said}");
}

#[test]
fn an_injected_agent_has_a_certificate_before_the_container_that_needs_it_begins() {
    let node = Node::shared();
    install(node, &[]);
    node.apply(&[namespace("shop"), account("shop", "web")]);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "shop", "name": "with-an-agent"},
        "spec": {
            "serviceAccountName": "web", "automountServiceAccountToken": false, "restartPolicy": "Never",
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "istio-proxy", "image": IMAGE, "args": ["verify", "/etc/certs"],
                "securityContext": confined(),
            }],
        },
    });
    let pod = injected(&pod.to_string(), &["--mode", "agent", "--files", "/etc/certs", "--image", IMAGE]);
    node.apply(&[serde_json::from_str(&pod).unwrap()]);
    let (phase, said) = node.ended("shop", "with-an-agent");
    assert!(
        phase == "Succeeded" && said.contains("good: spiffe://cluster.local/ns/shop/sa/web"),
        "{phase} {said}"
    );
}

#[test]
fn sidecars_live_through_upgrades_outages_and_kills_without_a_failed_request() {
    let node = &Node::start();
    install(node, &["--ttl=90s"]);
    sidecars::make(node);
    let sidecars = Sidecars::under_load(node);
    let renewed = |what: &str| {
        let before = sidecars.serials();
        node.kubectl(&["delete", "secrets", "--namespace", sidecars::NAMESPACE, "istio.a", "istio.b"]);
        sidecars.wait_for_others(&before, what, Duration::from_secs(30));
    };
    renewed("before all");

    node.cluster(["exec", "ctr", "--namespace=k8s.io", "images", "tag", IMAGE, NEXT_IMAGE]);
    let image = format!("mica={NEXT_IMAGE}");
    node.kubectl(&["set", "image", "--namespace", NAMESPACE, "deployment/mica", &image]);
    node.rolled_out(NAMESPACE, "mica");
    renewed("after an upgrade");

    node.cluster(["stop", "kube-apiserver"]);
    sidecars.wait_for_answers(100);
    node.cluster(["start", "kube-apiserver"]);
    node.answers();
    renewed("after an outage");

    let killed = leader(node);
    // Followed by what makes two replicas' names differ.
    node.kill(NAMESPACE, killed.split_once('_').unwrap().0);
    let begun = Instant::now();
    wait_for(Duration::from_secs(15), "another leader", || (leader(node) != killed).then_some(()));
    eprintln!("another leads {:?} after the kill", begun.elapsed());
    renewed("after a kill");

    // By age.
    sidecars.wait_for_others(&sidecars.serials(), "after a while", Duration::from_secs(90));
    sidecars.wait_for_answers(20);
    sidecars.stop();
}

/// Who writes.
fn leader(node: &Node) -> String {
    let holder = "--output=jsonpath={.spec.holderIdentity}";
    node.kubectl(&["get", "lease", "mica", "--namespace", NAMESPACE, holder])
}

/// Mica's manifests and its image, as a user of kustomize adds arguments to them.
fn install(node: &Node, arguments: &[&str]) {
    image(node);
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    symlink(checkout.join("manifests"), folder.path().join("manifests")).unwrap();
    let added: Vec<Value> = arguments
        .iter()
        .map(|argument| json!({"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": argument}))
        .collect();
    let overlay = json!({
        "resources": ["manifests"],
        "patches": [{"target": {"kind": "Deployment", "name": "mica"}, "patch": json!(added).to_string()}],
    });
    std::fs::write(folder.path().join("kustomization.yaml"), overlay.to_string()).unwrap();
    node.kubectl(&["apply", "--kustomize", folder.path().to_str().unwrap()]);
    node.rolled_out(NAMESPACE, "mica");
}

/// Mica's image, under the name that the manifests have.
pub(super) fn image(node: &Node) {
    let folder = tempfile::tempdir().unwrap();
    let archive = folder.path().join("mica.tar");
    run(std::process::Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/image"))
        .args(["--name", IMAGE, env!("CARGO_BIN_EXE_mica")])
        .arg(&archive));
    node.cluster(["image".as_ref(), archive.as_os_str()]);
}

/// A pod that asks Mica for a certificate, and ends.
fn asks(name: &str, audience: &str, restart: &str) -> Value {
    let address = format!("mica.{NAMESPACE}.svc:15012");
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
                "args": ["csr", "request", "--address", address, "--roots", roots, "--token-file", token, "--out", "set"],
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
