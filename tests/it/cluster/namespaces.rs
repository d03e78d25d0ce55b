//! Which namespaces and accounts are served, by their labels.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Secret, ServiceAccount};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use mica::cluster::Namespaces;
use mica::core::selection::{Choice, Rules};
use serde_json::{Value, json};

use super::control_plane::{ControlPlane, runtime};
use super::knowledge::permitted;
use super::served::start;
use crate::serve::{Place, wait_for};

const PROMPT: Duration = Duration::from_secs(5);

/// Gives a namespace labels; `null` takes one away.
pub(super) fn label(plane: &ControlPlane, namespace: &str, labels: &Value) {
    let api: Api<Namespace> = Api::all(plane.client());
    let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
    runtime().block_on(api.patch(namespace, &PatchParams::default(), &patch)).unwrap();
}

struct Following {
    namespaces: Arc<Namespaces>,
    task: tokio::task::JoinHandle<()>,
}

impl Following {
    fn start(plane: &ControlPlane, by_default: bool, watched: Option<&[&str]>) -> Self {
        let watched = watched.map(|names| names.iter().map(|name| (*name).to_owned()).collect());
        let rules = Rules { watched, by_default, own: "istio-system".to_owned() };
        let namespaces = Arc::new(Namespaces::new(&permitted(plane), rules));
        let followed = namespaces.clone();
        let task = runtime().spawn(async move { followed.follow().await });
        let all = namespaces.completed();
        runtime().block_on(async { tokio::time::timeout(Duration::from_secs(10), all).await.unwrap() });
        Self { namespaces, task }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[test]
fn the_choice_follows_the_labels_and_every_flip_is_told() {
    let plane = ControlPlane::shared();
    let [shop, bank] = [plane.namespace(), plane.namespace()];
    let following = Following::start(plane, true, None);
    let few = Following::start(plane, false, Some(&[&shop.name, "none-of-this-name"]));
    let flips = following.namespaces.flips();
    assert_eq!(few.namespaces.choice(&bank.name), Some(Choice::Unwatched));
    assert_eq!(few.namespaces.choice("none-of-this-name"), None);
    let other = "mica-elsewhere";
    for (labels, wanted, asked) in [
        (json!({}), Choice::Served, Choice::Unasked),
        (json!({"ca.istio.io/env": "istio-system"}), Choice::Served, Choice::Served),
        (json!({"ca.istio.io/env": other}), Choice::Another, Choice::Another),
        (json!({"ca.istio.io/override": "true"}), Choice::Served, Choice::Served),
        (json!({"ca.istio.io/override": "false"}), Choice::Excluded, Choice::Excluded),
        (json!({"ca.istio.io/override": null, "ca.istio.io/env": null}), Choice::Served, Choice::Unasked),
    ] {
        label(plane, &shop.name, &labels);
        for (following, wanted) in [(&following, wanted), (&few, asked)] {
            wait_for(PROMPT, &format!("{wanted:?}"), || {
                (following.namespaces.choice(&shop.name) == Some(wanted)).then_some(())
            });
        }
    }
    let late = plane.namespace();
    let mut told = BTreeSet::new();
    // Others make namespaces at the same time.
    wait_for(PROMPT, "both namespaces", || {
        runtime().block_on(async {
            if let Ok(more) = tokio::time::timeout(Duration::from_millis(100), flips.next()).await {
                told.extend(more);
            }
        });
        [&shop, &late].iter().all(|name| told.contains(&*name.name)).then_some(())
    });
    assert!(!told.contains(&*bank.name), "{told:?}");
    let api: Api<Namespace> = Api::all(plane.client());
    runtime().block_on(api.delete(&late.name, &DeleteParams::default())).unwrap();
    wait_for(PROMPT, "the end of the namespace", || {
        let choice = following.namespaces.choice(&late.name);
        (choice.is_none() || choice == Some(Choice::Ending)).then_some(())
    });
    wait_for(Duration::from_secs(30), "its last trace", || {
        following.namespaces.choice(&late.name).is_none().then_some(())
    });
}

#[test]
fn labels_of_namespaces_and_accounts_say_who_has_a_secret() {
    let (place, plane) = (Place::new(), ControlPlane::start());
    let [shop, bank, toys] = [plane.namespace(), plane.namespace(), plane.namespace()];
    for namespace in [&shop, &bank, &toys] {
        namespace.account("web");
    }
    label(&plane, &bank.name, &json!({"ca.istio.io/env": "another-ca"}));
    let mica = start(&place, &plane, &["--ttl", "30s"]);
    let get = |namespace: &str| -> Option<Secret> {
        let api: Api<Secret> = Api::namespaced(plane.client(), namespace);
        runtime().block_on(api.get_opt("istio.web")).unwrap()
    };
    let serial = |namespace: &str| {
        get(namespace).and_then(|secret| secret.metadata.annotations?.get("mica.dev/serial").cloned())
    };
    for namespace in [&shop, &toys] {
        wait_for(PROMPT, "the secret", || get(&namespace.name));
    }
    assert!(get(&bank.name).is_none());

    // Enabling holds for what was there before.
    label(&plane, &bank.name, &json!({"ca.istio.io/override": "true"}));
    wait_for(PROMPT, "the secret of bank", || serial(&bank.name));

    // Disabling: it is not renewed any more, nobody loses it at once, and it goes when it has expired.
    let last = serial(&shop.name);
    label(&plane, &shop.name, &json!({"ca.istio.io/override": "false"}));
    std::thread::sleep(Duration::from_secs(2));
    assert!(get(&shop.name).is_some());

    // An account decides for itself within that.
    let accounts: Api<ServiceAccount> = Api::namespaced(plane.client(), &toys.name);
    let opt = |change: Value| {
        let patch = Patch::Merge(json!({"metadata": change}));
        runtime().block_on(accounts.patch("web", &PatchParams::default(), &patch)).unwrap();
    };
    opt(json!({"annotations": {"mica.dev/deliver": "false"}}));
    let before = serial(&toys.name);
    wait_for(Duration::from_secs(60), "the ends of the secrets", || {
        (get(&shop.name).is_none() && get(&toys.name).is_none()).then_some(())
    });
    assert!(last.is_some() && before.is_some());
    // The one that is served was renewed meanwhile.
    assert!(serial(&bank.name).is_some());
    opt(json!({"annotations": null}));
    wait_for(PROMPT, "the secret of toys", || serial(&toys.name));
    label(&plane, &shop.name, &json!({"ca.istio.io/override": null}));
    wait_for(PROMPT, "the secret of shop", || serial(&shop.name));
    mica.stop();

    // By default nobody, but who asks.
    let quiet = plane.namespace();
    quiet.account("web");
    quiet.account("asks");
    let api: Api<ServiceAccount> = Api::namespaced(plane.client(), &quiet.name);
    let patch = Patch::Merge(json!({"metadata": {"labels": {"mica.dev/deliver": "true"}}}));
    runtime().block_on(api.patch("asks", &PatchParams::default(), &patch)).unwrap();
    let mica = start(&place, &plane, &["--namespaces-by-default", "false"]);
    let secrets: Api<Secret> = Api::namespaced(plane.client(), &quiet.name);
    let there = |name: &str| runtime().block_on(secrets.get_opt(name)).unwrap().is_some();
    wait_for(PROMPT, "the secret of the one who asks", || there("istio.asks").then_some(()));
    assert!(!there("istio.web"));
    label(&plane, &quiet.name, &json!({"ca.istio.io/env": "istio-system"}));
    wait_for(PROMPT, "the other secret", || there("istio.web").then_some(()));
    mica.stop();
}
