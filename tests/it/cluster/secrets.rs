//! The secrets that `mica serve --kube` keeps, on control planes of their own, since it keeps those of all accounts.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::plan::{CertificateSet, judge};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::control_plane::{ControlPlane, TestNamespace, runtime};
use super::served::start;
use crate::serve::{Place, wait_for};

const TYPE: &str = "istio.io/key-and-cert";
const PROMPT: Duration = Duration::from_secs(5);
const REMOVED: Duration = Duration::from_secs(10);

/// The secrets of a namespace, and the root that they should lead to.
struct Secrets<'a> {
    api: Api<Secret>,
    namespace: &'a str,
    place: &'a Place,
}

impl<'a> Secrets<'a> {
    fn new(plane: &ControlPlane, namespace: &'a TestNamespace<'_>, place: &'a Place) -> Self {
        Self { api: Api::namespaced(plane.client(), &namespace.name), namespace: &namespace.name, place }
    }

    fn get(&self, account: &str) -> Option<Secret> {
        runtime().block_on(self.api.get_opt(&format!("istio.{account}"))).unwrap()
    }

    fn create(&self, secret: &Value) -> Secret {
        let secret: Secret = serde_json::from_value(secret.clone()).unwrap();
        runtime().block_on(self.api.create(&PostParams::default(), &secret)).unwrap()
    }

    fn patch(&self, account: &str, patch: &Value) {
        let name = format!("istio.{account}");
        runtime().block_on(self.api.patch(&name, &PatchParams::default(), &Patch::Merge(patch))).unwrap();
    }

    fn delete(&self, account: &str) {
        runtime().block_on(self.api.delete(&format!("istio.{account}"), &DeleteParams::default())).unwrap();
    }

    /// The serial number of an account's secret, or what is wrong with it.
    fn serial(&self, account: &str) -> Result<String, String> {
        let secret = self.get(account).ok_or("there is none")?;
        self.judge(account, &secret)
    }

    fn judge(&self, account: &str, secret: &Secret) -> Result<String, String> {
        assert_eq!(secret.type_.as_deref(), Some(TYPE));
        let data = secret.data.clone().unwrap_or_default();
        let text = |key: &str| {
            let ByteString(bytes) = data.get(key).cloned().ok_or(format!("no {key}"))?;
            String::from_utf8(bytes).map_err(|e| e.to_string())
        };
        let set = CertificateSet {
            chain_pem: text("cert-chain.pem")?,
            key_pem: text("key.pem")?.into(),
            roots_pem: text("root-cert.pem")?.into(),
        };
        let roots = fs::read(self.place.data().join("root-cert.pem")).map_err(|e| e.to_string())?;
        let bundle = TrustBundle::from_pem(&roots).map_err(|e| e.to_string())?;
        let id = format!("spiffe://cluster.local/ns/{}/sa/{account}", self.namespace).parse().unwrap();
        judge(&set, &id, &bundle, OffsetDateTime::now_utc())?;
        Ok(Certificate::all_from_pem(set.chain_pem.as_bytes()).unwrap().remove(0).serial_text())
    }

    /// Waits for a good one that is not the one with this serial number.
    fn wait_for_another(&self, account: &str, serial: &str, within: Duration) -> String {
        wait_for(within, &format!("another good secret for {account}"), || {
            self.serial(account).ok().filter(|found| found != serial)
        })
    }

    fn wait(&self, account: &str) -> String {
        self.wait_for_another(account, "", PROMPT)
    }
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

fn annotations(secret: &Secret) -> BTreeMap<String, String> {
    secret.metadata.annotations.clone().unwrap_or_default()
}

#[test]
fn an_account_has_its_secret_from_when_it_comes_until_it_goes() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let namespace = plane.namespace();
    let before = namespace.account("before");
    let mica = start(&place, &plane, &[]);
    let secrets = Secrets::new(&plane, &namespace, &place);
    // Those that are there have one when Mica says that it is ready.
    let serial = secrets.serial("before").unwrap();
    assert!(mica.report().contains(" for the accounts of https://"), "{}", mica.report());

    let secret = secrets.get("before").unwrap();
    let noted = annotations(&secret);
    assert_eq!(noted["istio.io/service-account.name"], "before");
    assert_eq!(noted["mica.dev/serial"], serial);
    for key in ["mica.dev/not-after", "mica.dev/renew-at"] {
        let at = OffsetDateTime::parse(&noted[key], &time::format_description::well_known::Rfc3339).unwrap();
        let hours = (at - OffsetDateTime::now_utc()).whole_hours();
        assert!((11..=24).contains(&hours), "{key} {at}");
    }
    assert_eq!(secret.metadata.labels.as_ref().unwrap()["mica.dev/managed-by"], "istio-system");
    let owners = secret.metadata.owner_references.as_ref().unwrap();
    assert_eq!((owners.len(), owners[0].kind.as_str(), &owners[0].uid), (1, "ServiceAccount", &before.uid));
    let manager = &secret.metadata.managed_fields.as_ref().unwrap()[0];
    assert_eq!(manager.manager.as_deref(), Some("mica"));

    namespace.account("after");
    secrets.wait("after");

    // Another account of the same name gets another key.
    namespace.delete_account("before");
    let again = namespace.account("before");
    wait_for(PROMPT, "the secret of the next account", || {
        let secret = secrets.get("before")?;
        let uid = secret.metadata.owner_references.as_ref()?.first()?.uid.clone();
        (uid == again.uid && secrets.judge("before", &secret).ok()? != serial).then_some(())
    });

    namespace.delete_account("after");
    wait_for(REMOVED, "the end of the secret", || secrets.get("after").is_none().then_some(()));
    // Nor does one come back, or stay, that somebody else leaves for an account that is gone.
    let mut orphan = serde_json::to_value(&secret).unwrap();
    orphan["metadata"] = json!({
        "name": "istio.after",
        "annotations": {"istio.io/service-account.name": "after"},
    });
    secrets.create(&orphan);
    wait_for(REMOVED, "the end of the orphan", || secrets.get("after").is_none().then_some(()));
    std::thread::sleep(Duration::from_secs(1));
    assert!(secrets.get("after").is_none());
    mica.stop();
    // A Mica that stops takes nothing away.
    secrets.serial("before").unwrap();
}

#[test]
fn what_others_do_to_a_secret_is_undone() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let namespace = plane.namespace();
    namespace.account("web");
    let mica = start(&place, &plane, &[]);
    let secrets = Secrets::new(&plane, &namespace, &place);
    let garbage = ["cert-chain.pem", "key.pem", "root-cert.pem"].map(|key| {
        let mut patch = json!({"data": {}});
        patch["data"][key] = base64("garbage").into();
        patch
    });
    let other_root = {
        let other = tempfile::tempdir().unwrap();
        let made = std::process::Command::new(env!("CARGO_BIN_EXE_mica"))
            .args(["root", "new", "--out"])
            .arg(other.path().join("root"))
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        json!({"data": {"root-cert.pem": base64(&fs::read_to_string(other.path().join("root/root-cert.pem")).unwrap())}})
    };
    let mut serial = secrets.wait("web");
    for patch in garbage.iter().chain([&other_root, &json!({"data": null})]) {
        secrets.patch("web", patch);
        serial = secrets.wait_for_another("web", &serial, PROMPT);
    }
    assert_eq!(mica.metric("citadel_secret_controller_secret_deleted_cert_count"), 5.0);
    secrets.delete("web");
    serial = secrets.wait_for_another("web", &serial, PROMPT);

    // What else others write stays, and the marks come back without another key.
    secrets.patch(
        "web",
        &json!({
            "metadata": {
                "labels": {"team": "a", "mica.dev/managed-by": null},
                "annotations": {"mica.dev/serial": null, "note": "x"},
                "ownerReferences": null,
            },
            "data": {"more": base64("more")},
        }),
    );
    wait_for(PROMPT, "the marks", || {
        let secret = secrets.get("web")?;
        let labels = secret.metadata.labels.as_ref()?;
        (labels.get("mica.dev/managed-by")? == "istio-system" && secret.metadata.owner_references.is_some())
            .then_some(())
    });
    let secret = secrets.get("web").unwrap();
    assert_eq!(secrets.judge("web", &secret).unwrap(), serial);
    assert_eq!(annotations(&secret)["mica.dev/serial"], serial);
    assert_eq!(annotations(&secret)["note"], "x");
    assert_eq!(secret.metadata.labels.as_ref().unwrap()["team"], "a");
    assert_eq!(secret.data.as_ref().unwrap()["more"].0, b"more");

    // One that cannot be changed is made anew.
    secrets.patch("web", &json!({"immutable": true}));
    let immutable = secrets.get("web").unwrap();
    assert_eq!(immutable.immutable, Some(true));
    mica.stop();
}

#[test]
fn a_short_lived_secret_is_renewed_with_another_key() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let namespace = plane.namespace();
    namespace.account("web");
    let mica = start(&place, &plane, &["--ttl", "20s"]);
    let secrets = Secrets::new(&plane, &namespace, &place);
    let key = |secrets: &Secrets<'_>| secrets.get("web").unwrap().data.unwrap()["key.pem"].0.clone();
    let (first, first_key) = (secrets.wait("web"), key(&secrets));
    // From half to three quarters of its life.
    let second = secrets.wait_for_another("web", &first, Duration::from_secs(16));
    assert_ne!(key(&secrets), first_key);
    secrets.wait_for_another("web", &second, Duration::from_secs(16));
    assert_eq!(mica.metric("mica_delivery_failures_total"), 0.0);
    mica.stop();
}
