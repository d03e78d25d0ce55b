//! Two pods, each an Envoy with the Secret of its account, that talk mutual TLS with one another through a service:
//!
//! ```text
//! plain HTTP from the machine -> Envoy of one -> mutual TLS -> Envoy of the other -> 200
//! ```

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::injection::injected;
use super::node::{Door, Node};
use super::pods::{account, confined, namespace, restricted};
use crate::envoy::{self, Admin, Load, Secrets};
use crate::parts;
use crate::serve::wait_for;

const IMAGE: &str = "localhost/envoy:1";
/// Where the pods are.
pub(super) const NAMESPACE: &str = "shop";
/// Their accounts, after which everything of theirs is named.
pub(super) const ACCOUNTS: [&str; 2] = ["a", "b"];
/// Where Envoy finds its settings, and what its account's Secret holds.
const SETTINGS: &str = "/etc/envoy";
const CERTIFICATES: &str = "/etc/certs";
const MUTUAL_TLS: u16 = 8443;
const PLAIN: u16 = 8080;
const ADMIN: u16 = 9901;

/// Two pods under load.
pub(super) struct Sidecars<'a> {
    node: &'a Node,
    pods: [Sidecar; 2],
}

struct Sidecar {
    admin: Admin,
    load: Load,
    _doors: [Door; 2],
}

/// Makes both. Their Secrets may come later than they.
pub(super) fn make(node: &Node) {
    node.image(IMAGE, &parts::envoy());
    node.apply(&[namespace(NAMESPACE)]);
    let [a, b] = ACCOUNTS;
    for (own, peer) in [(a, b), (b, a)] {
        node.apply(&[account(NAMESPACE, own), settings(own, peer), deployment(own), service(own)]);
    }
}

impl<'a> Sidecars<'a> {
    /// Waits until both answer, and asks each for the other until it is told to stop.
    pub(super) fn under_load(node: &'a Node) -> Self {
        let pods = ACCOUNTS.map(|name| {
            node.rolled_out(NAMESPACE, name);
            let address = node.kubectl(&[
                "get",
                "pod",
                "--namespace",
                NAMESPACE,
                "--selector",
                &format!("app={name}"),
                "--output=jsonpath={.items[0].status.podIP}",
            ]);
            let [plain, admin] = [PLAIN, ADMIN].map(|port| node.door(&format!("{address}:{port}")));
            // The way to a service is made a moment after its pod is ready.
            wait_for(Duration::from_secs(30), "a first answer", || {
                (envoy::get(plain.address).ok()? == 200).then_some(())
            });
            Sidecar {
                load: Load::start(plain.address, Duration::from_millis(20)),
                admin: Admin { name, address: admin.address },
                _doors: [plain, admin],
            }
        });
        Self { node, pods }
    }

    /// The serial numbers of the certificates that they hold.
    pub(super) fn serials(&self) -> [String; 2] {
        self.pods.each_ref().map(|pod| pod.admin.serial().unwrap())
    }

    /// Waits until both hold other certificates than these.
    pub(super) fn wait_for_others(&self, than: &[String; 2], when: &str, within: Duration) {
        let begun = Instant::now();
        wait_for(within, &format!("other certificates in both pods {when}"), || {
            let now = self.serials();
            (now[0] != than[0] && now[1] != than[1]).then_some(())
        });
        eprintln!("both pods have other certificates {when}, in {:?}", begun.elapsed());
    }

    /// Waits until each has answered so many more requests.
    pub(super) fn wait_for_answers(&self, requests: usize) {
        for pod in &self.pods {
            pod.load.wait_for(requests);
        }
    }

    /// Stops asking. Not one request may have failed, and no sidecar may have been started anew.
    pub(super) fn stop(self) {
        for pod in self.pods {
            let report = pod.load.stop();
            eprintln!(
                "{} answered {}, over {} connections",
                pod.admin.name, report.answered, report.connections
            );
            assert_eq!(report.failed, Vec::<String>::new(), "{}", pod.admin.name);
            assert!(report.answered > 100, "{report:?}");
            for fault in [
                ".key_rotation_failed",
                ".ssl.fail_verify_error",
                ".ssl.fail_verify_san",
                ".ssl.fail_verify_no_cert",
            ] {
                assert_eq!(pod.admin.stat(fault).0, 0, "{}", pod.admin.page("/stats"));
            }
            assert!(pod.admin.stat(".ssl.handshake").0 > 100, "{}", pod.admin.page("/stats"));
        }
        let restarts = self.node.kubectl(&[
            "get",
            "pods",
            "--namespace",
            NAMESPACE,
            "--output=jsonpath={.items[*].status.containerStatuses[*].restartCount}",
        ]);
        assert_eq!(restarts, "0 0");
    }
}

fn settings(own: &str, peer: &str) -> Value {
    let (work, certificates) = (Secrets::Files(Path::new(SETTINGS)), Path::new(CERTIFICATES));
    let identity = format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{peer}");
    let address = envoy::socket(&format!("{peer}.{NAMESPACE}.svc.cluster.local"), MUTUAL_TLS);
    let bootstrap = json!({
        "node": {"id": own, "cluster": "test"},
        "admin": {"address": envoy::socket("0.0.0.0", ADMIN)},
        "static_resources": {
            "listeners": [
                envoy::inbound(&envoy::socket("0.0.0.0", MUTUAL_TLS), &work, &identity),
                envoy::outbound(&envoy::socket("0.0.0.0", PLAIN)),
            ],
            "clusters": [envoy::peer("STRICT_DNS", &address, &work, &identity)],
        },
    });
    json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": NAMESPACE, "name": own},
        "data": {
            "bootstrap.json": bootstrap.to_string(),
            "identity.json": envoy::identity_secret(certificates, "").to_string(),
            "roots.json": envoy::roots_secret(certificates, "").to_string(),
        },
    })
}

/// As somebody writes it who leaves certificates to `mica inject`.
fn deployment(name: &str) -> Value {
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": NAMESPACE, "name": name},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {
                    "serviceAccountName": name,
                    "automountServiceAccountToken": false,
                    "securityContext": restricted(),
                    "containers": [{
                        "name": "envoy", "image": IMAGE,
                        "args": ["--config-path", format!("{SETTINGS}/bootstrap.json"), "--concurrency", "1",
                            "--disable-hot-restart"],
                        "readinessProbe": {"httpGet": {"path": "/ready", "port": ADMIN}, "periodSeconds": 1},
                        "securityContext": confined(),
                        "volumeMounts": [
                            {"name": "settings", "mountPath": SETTINGS},
                        ],
                    }],
                    "volumes": [
                        {"name": "settings", "configMap": {"name": name}},
                    ],
                },
            },
        },
    });
    serde_json::from_str(&injected(&deployment.to_string(), &["--container", "envoy"])).unwrap()
}

fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": NAMESPACE, "name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": MUTUAL_TLS}]},
    })
}
