//! The secrets that `mica serve --kube` keeps, on control planes of their own, since it keeps those of all accounts.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::plan::{CertificateSet, judge};
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::control_plane::{ControlPlane, HOME, TestNamespace, runtime};
use super::served::{command, start};
use crate::parts;
use crate::serve::{Place, clock, wait_for};

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
    let repaired = || mica.metric("citadel_secret_controller_secret_deleted_cert_count");
    wait_for(PROMPT, "the last one to be counted", || (repaired() == 5.0).then_some(()));
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
    let other = json!({"metadata": {"ownerReferences": [
        {"apiVersion": "v1", "kind": "ServiceAccount", "name": "web", "uid": "00000000-0000-0000-0000-000000000000"},
    ]}});
    secrets.patch("web", &other);
    serial = secrets.wait_for_another("web", &serial, PROMPT);
    let secret = secrets.get("web").unwrap();
    assert_eq!(secret.immutable, None);
    assert_eq!(secrets.judge("web", &secret).unwrap(), serial);
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

/// A secret as Istio's CA made them: an RSA key in PKCS#1, and neither label nor owner.
fn istios(plane: &ControlPlane, namespace: &str, account: &str) -> Value {
    let api: Api<Secret> = Api::namespaced(plane.client(), HOME);
    let authority = runtime().block_on(api.get("istio-ca-secret")).unwrap().data.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["ca-cert.pem", "ca-key.pem"] {
        fs::write(path(name), &authority[name].0).unwrap();
    }
    fs::write(
        path("extensions"),
        format!(
            "subjectAltName=URI:spiffe://cluster.local/ns/{namespace}/sa/{account}\n\
             keyUsage=critical,digitalSignature,keyEncipherment\n\
             extendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=critical,CA:FALSE\n"
        ),
    )
    .unwrap();
    for arguments in [
        "genrsa -traditional -out key.pem 2048",
        "req -new -key key.pem -subj /O=cluster.local -out csr.pem",
        "x509 -req -in csr.pem -CA ca-cert.pem -CAkey ca-key.pem -days 7 -extfile extensions -out cert-chain.pem",
    ] {
        let made = parts::openssl().args(arguments.split(' ')).current_dir(folder.path()).output().unwrap();
        assert!(made.status.success(), "{arguments}: {made:?}");
    }
    let text = |name: &str| fs::read_to_string(path(name)).unwrap();
    assert!(text("key.pem").starts_with("-----BEGIN RSA PRIVATE KEY-----"));
    json!({
        "metadata": {
            "name": format!("istio.{account}"),
            "annotations": {"istio.io/service-account.name": account},
        },
        "type": TYPE,
        "data": {
            "cert-chain.pem": base64(&text("cert-chain.pem")),
            "key.pem": base64(&text("key.pem")),
            "root-cert.pem": base64(&text("ca-cert.pem")),
        },
    })
}

#[test]
fn istios_secrets_are_taken_over_and_others_left_alone() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    // For a root.
    start(&place, &plane, &[]).stop();
    let namespace = plane.namespace();
    let secrets = Secrets::new(&plane, &namespace, &place);
    let accounts: BTreeMap<_, _> =
        ["kept", "damaged", "opaque", "unnamed", "other"].map(|name| (name, namespace.account(name))).into();
    secrets.create(&istios(&plane, &namespace.name, "kept"));
    let mut damaged = istios(&plane, &namespace.name, "damaged");
    damaged["data"]["root-cert.pem"] = base64("garbage").into();
    secrets.create(&damaged);
    let foreign: Vec<_> = [
        json!({"metadata": {"name": "istio.opaque"}, "type": "Opaque", "data": {"x": base64("x")}}),
        json!({"metadata": {"name": "istio.unnamed"}, "type": TYPE, "data": {"x": base64("x")}}),
        json!({"metadata": {"name": "istio.other", "labels": {"mica.dev/managed-by": "elsewhere"},
            "annotations": {"istio.io/service-account.name": "other"}}, "type": TYPE}),
        // Not even of an account.
        json!({"metadata": {"name": "notes"}, "type": TYPE, "data": {"x": base64("x")}}),
    ]
    .iter()
    .map(|secret| secrets.create(secret))
    .collect();
    let key = |secret: &Secret| secret.data.as_ref().unwrap()["key.pem"].clone();
    let before = secrets.get("kept").unwrap();

    let mica = start(&place, &plane, &[]);
    let kept = secrets.get("kept").unwrap();
    assert_eq!(key(&kept), key(&before));
    let serial = secrets.judge("kept", &kept).unwrap();
    assert_eq!(annotations(&kept)["mica.dev/serial"], serial);
    assert_eq!(kept.metadata.labels.as_ref().unwrap()["mica.dev/managed-by"], HOME);
    assert_eq!(kept.metadata.owner_references.as_ref().unwrap()[0].uid, accounts["kept"].uid);
    secrets.wait("damaged");
    assert!(key(&secrets.get("damaged").unwrap()).0.starts_with(b"-----BEGIN PRIVATE KEY-----"));

    assert_eq!(mica.metric("mica_identities{state=\"foreign\"}"), 3.0);
    let events: Api<Event> = Api::namespaced(plane.client(), &namespace.name);
    wait_for(PROMPT, "the events", || {
        let told = runtime().block_on(events.list(&ListParams::default())).unwrap();
        let taken = told.items.iter().filter(|event| event.reason.as_deref() == Some("SecretNameTaken"));
        let named: Vec<_> = taken.filter_map(|event| event.regarding.as_ref()?.name.clone()).collect();
        ["opaque", "unnamed", "other"].iter().all(|name| named.iter().any(|told| told == name)).then_some(())
    });
    for account in ["opaque", "unnamed", "other"] {
        namespace.delete_account(account);
    }
    std::thread::sleep(Duration::from_secs(2));
    for secret in &foreign {
        let now = runtime().block_on(secrets.api.get(secret.metadata.name.as_ref().unwrap())).unwrap();
        assert_eq!(now, *secret);
    }
    wait_for(PROMPT, "none to be counted", || {
        (mica.metric("mica_identities{state=\"foreign\"}") == 0.0).then_some(())
    });

    // Once they are out of the way, the account has its own: at once if it is told of, else soon.
    namespace.account("unnamed");
    namespace.account("opaque");
    wait_for(PROMPT, "both", || (mica.metric("mica_identities{state=\"foreign\"}") == 2.0).then_some(()));
    secrets.delete("unnamed");
    secrets.delete("opaque");
    secrets.wait("unnamed");
    secrets.wait_for_another("opaque", "", Duration::from_secs(35));
    mica.stop();
}

#[test]
fn what_an_account_asks_for_counts_within_what_policy_grants() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let namespace = plane.namespace();
    let policy = place.root.path().join("policy.yaml");
    let name = &namespace.name;
    let text = format!(
        "keys: [p256, p384]\nnamespaces:\n  {name}: {{dns: [\"*.{{namespace}}.svc\"], longest_lifetime: 48h}}\n"
    );
    fs::write(&policy, text).unwrap();
    let mica = start(&place, &plane, &["--policy", policy.to_str().unwrap()]);
    let secrets = Secrets::new(&plane, &namespace, &place);
    let accounts: Api<ServiceAccount> = Api::namespaced(plane.client(), name);
    let ask = |account: &str, annotations: &Value| {
        let account: ServiceAccount =
            serde_json::from_value(json!({"metadata": {"name": account, "annotations": annotations}}))
                .unwrap();
        runtime().block_on(accounts.create(&PostParams::default(), &account)).unwrap();
    };
    let leaf = |account: &str| {
        secrets.wait(account);
        let chain = secrets.get(account).unwrap().data.unwrap()["cert-chain.pem"].0.clone();
        Certificate::all_from_pem(&chain).unwrap().remove(0)
    };
    let hours = |leaf: &Certificate| (leaf.validity.not_after - leaf.validity.issued_at()).whole_hours();
    let kind =
        |leaf: &Certificate| mica::core::key::PublicKey::from_spki(&leaf.spki).unwrap().kind().as_str();
    let (granted, theirs) = (format!("web.{name}.svc"), "ledger.example.org");
    ask("some", &json!({"mica.dev/ttl": "48h", "mica.dev/key-kind": "p384", "mica.dev/dns-names": granted}));
    ask(
        "more",
        &json!({
            "mica.dev/ttl": "49h",
            "mica.dev/key-kind": "ed25519",
            "mica.dev/dns-names": format!("{theirs}, {granted}"),
        }),
    );
    namespace.account("none");
    let [some, more, none] = ["some", "more", "none"].map(leaf);
    assert_eq!((hours(&some), kind(&some), some.dns.as_slice()), (48, "p384", &[granted.clone()][..]));
    assert_eq!((hours(&more), kind(&more), more.dns.as_slice()), (24, "p256", &[granted.clone()][..]));
    assert_eq!((hours(&none), kind(&none), none.dns.len()), (24, "p256", 0));
    assert_eq!(mica.metric("mica_delivery_wishes_refused_total"), 3.0);
    let events: Api<Event> = Api::namespaced(plane.client(), name);
    wait_for(PROMPT, "the event", || {
        let told = runtime().block_on(events.list(&ListParams::default())).unwrap();
        told.items.iter().any(|event| event.reason.as_deref() == Some("AnnotationRefused")).then_some(())
    });

    // A wish that comes later is granted at once.
    let patch = json!({"metadata": {"annotations": {"mica.dev/dns-names": granted}}});
    let serial = secrets.serial("none").unwrap();
    runtime().block_on(accounts.patch("none", &PatchParams::default(), &Patch::Merge(&patch))).unwrap();
    secrets.wait_for_another("none", &serial, PROMPT);
    assert_eq!(leaf("none").dns, std::slice::from_ref(&granted));

    // And one that policy grants later, too.
    let serial = secrets.serial("more").unwrap();
    fs::write(&policy, format!("namespaces:\n  {name}: {{dns: [\"*.{{namespace}}.svc\", {theirs}]}}\n"))
        .unwrap();
    secrets.wait_for_another("more", &serial, PROMPT);
    assert_eq!(leaf("more").dns, [theirs, &granted]);
    mica.stop();
}

/// A namespace that is being deleted takes nothing new, for as long as something in it does not let go.
#[test]
fn a_namespace_that_ends_is_not_written_to_again_and_again() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let (ends, stays) = (plane.namespace(), plane.namespace());
    (0..20).for_each(|n| drop(ends.account(&format!("account-{n}"))));
    let mica = start(&place, &plane, &[]);
    Secrets::new(&plane, &ends, &place).wait("account-19");
    let objects: Api<ConfigMap> = Api::namespaced(plane.client(), &ends.name);
    let held: ConfigMap =
        serde_json::from_value(json!({"metadata": {"name": "held", "finalizers": ["test.mica.dev/held"]}}))
            .unwrap();
    runtime().block_on(objects.create(&PostParams::default(), &held)).unwrap();
    let namespaces: Api<Namespace> = Api::all(plane.client());
    let before = asked(&plane);
    runtime().block_on(namespaces.delete(&ends.name, &DeleteParams::default())).unwrap();

    // The namespace controller takes accounts and secrets, and has to wait for the object that is held.
    let secrets = Secrets::new(&plane, &ends, &place);
    wait_for(REMOVED, "the end of the secrets", || versions(&secrets).is_empty().then_some(()));
    let since = std::time::Instant::now();
    while since.elapsed() < PROMPT {
        assert!(versions(&secrets).is_empty());
        std::thread::sleep(Duration::from_millis(200));
    }
    let after = asked(&plane);
    let more = |verb: &str| after.get(verb).copied().unwrap_or(0) - before.get(verb).copied().unwrap_or(0);
    // The keys of JWT-SVIDs are in a secret, too, elsewhere.
    assert!(more("create") <= 25 && more("update") <= 1, "{before:?} {after:?}");
    // Others are served meanwhile.
    stays.account("web");
    Secrets::new(&plane, &stays, &place).wait("web");
    let free = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    runtime().block_on(objects.patch("held", &PatchParams::default(), &free)).unwrap();
    wait_for(REMOVED * 3, "the end of the namespace", || {
        runtime().block_on(namespaces.get_opt(&ends.name)).unwrap().is_none().then_some(())
    });
    assert!(!mica.log().contains("\"ERROR\""), "{}", mica.log());
    mica.stop();
}

#[test]
fn a_clock_that_is_set_is_followed_and_touches_no_root() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let namespace = plane.namespace();
    namespace.account("web");
    clock::set_clock(&place, "+0d");
    let mica = clock::start_command(&place, command(&place, &plane));
    let secrets = Secrets::new(&plane, &namespace, &place);
    let serial = secrets.wait("web");
    let kept: Api<Secret> = Api::namespaced(plane.client(), HOME);
    let root = || runtime().block_on(kept.get("istio-ca-secret")).unwrap();
    let before = root();

    // What has expired for Mica is issued anew.
    clock::set_clock(&place, "+30d");
    wait_for(clock::NOTICED + PROMPT, "another", || {
        (annotations(&secrets.get("web")?)["mica.dev/serial"] != serial).then_some(())
    });
    // Before its root it can say nothing, and leaves all as it is.
    clock::set_clock(&place, "-365d");
    clock::wait_for_status(&mica, 503);
    let written = versions(&secrets);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(versions(&secrets), written);
    // What was issued for the future is not good yet.
    clock::set_clock(&place, "+0d");
    clock::wait_for_status(&mica, 200);
    secrets.wait_for_another("web", &serial, clock::NOTICED * 2);
    assert_eq!(root(), before);
    mica.stop();
}

/// The versions of all secrets of a namespace.
fn versions(secrets: &Secrets<'_>) -> BTreeMap<String, String> {
    let all = runtime().block_on(secrets.api.list(&ListParams::default())).unwrap();
    let version = |secret: Secret| Some((secret.metadata.name?, secret.metadata.resource_version?));
    all.items.into_iter().filter_map(version).collect()
}

/// How often Mica has asked the API server for something about secrets, by verb.
fn asked(plane: &ControlPlane) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for event in plane.audit("mica").iter().filter(|event| event["objectRef"]["resource"] == "secrets") {
        *found.entry(event["verb"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    found
}

fn all_good(secrets: &Secrets<'_>, accounts: &[String]) -> bool {
    let all = runtime().block_on(secrets.api.list(&ListParams::default())).unwrap().items;
    let by_name: BTreeMap<_, _> =
        all.iter().map(|secret| (secret.metadata.name.clone().unwrap(), secret)).collect();
    accounts.iter().all(|account| {
        by_name.get(&format!("istio.{account}")).is_some_and(|secret| secrets.judge(account, secret).is_ok())
    })
}

#[test]
fn an_outage_in_the_middle_of_many_is_caught_up_with_and_a_restart_writes_nothing() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let namespace = plane.namespace();
    let named = |from: usize, to: usize| (from..to).map(|n| format!("account-{n}")).collect::<Vec<_>>();
    let first = named(0, 300);
    first.iter().for_each(|name| drop(namespace.account(name)));
    let before = asked(&plane);
    let mica = start(&place, &plane, &[]);
    let secrets = Secrets::new(&plane, &namespace, &place);
    assert!(all_good(&secrets, &first));
    let after = asked(&plane);
    let more = |verb: &str| after.get(verb).copied().unwrap_or(0) - before.get(verb).copied().unwrap_or(0);
    // The accounts', those of the namespaces' `default`, and the authority's.
    assert!((300..=310).contains(&more("create")), "{before:?} {after:?}");
    assert!(more("update") == 0 && more("get") <= 10 && more("list") <= 5, "{before:?} {after:?}");

    // Nothing that is good is written again, by the next one or by one beside it.
    let written = versions(&secrets);
    mica.stop();
    let mica = start(&place, &plane, &[]);
    assert!(mica.report().contains("; 0 issued now"), "{}", mica.report());
    let beside = Place::new();
    let other = start(&beside, &plane, &[]);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(versions(&secrets), written);

    // Away in the middle of work.
    let second = named(300, 600);
    second.iter().take(150).for_each(|name| drop(namespace.account(name)));
    plane.stop_api_server();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(mica.page("/readyz").0, 200);
    plane.start_api_server();
    plane.wait_until_ready();
    second.iter().skip(150).for_each(|name| drop(namespace.account(name)));
    wait_for(Duration::from_secs(60), "all secrets", || all_good(&secrets, &second).then_some(()));
    assert!(all_good(&secrets, &first));
    let untouched = versions(&secrets);
    assert!(written.iter().all(|(name, version)| untouched.get(name) == Some(version)));

    // And killed in the middle of work: the other one goes on, once the lease is over.
    let third = named(600, 900);
    third.iter().for_each(|name| drop(namespace.account(name)));
    mica.kill();
    wait_for(Duration::from_secs(40), "all secrets", || all_good(&secrets, &third).then_some(()));
    let now = versions(&secrets);
    assert!(untouched.iter().all(|(name, version)| now.get(name) == Some(version)));
    other.stop();
}
