//! What Mica knows of a cluster, and how it learns it, with no more permissions than it says it needs.

use std::sync::Arc;
use std::time::Duration;

use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig};
use mica::auth::{KeySource as _, Life, Liveness as _, Nodes as _, Reviewer as _};
use mica::cluster::{Cluster, OWN_PERMISSIONS, Objects, PERMISSIONS, TokenReviews};
use mica::core::caller::{Bound, Object};
use mica::core::refusal::Reason;
use mica::core::spiffe::ServiceAccount;
use serde_json::Value;

use super::control_plane::{ControlPlane, HOME, ISSUER, TestNamespace, runtime};
use crate::serve::wait_for;

/// A control plane, as Mica with its permissions sees it.
pub(super) fn cluster(plane: &ControlPlane, user: &str) -> Cluster {
    let kubeconfig = Kubeconfig::read_from(plane.kubeconfig_of(user)).unwrap();
    runtime().block_on(async {
        let options = KubeConfigOptions::default();
        Cluster::new(Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap()).unwrap()
    })
}

/// One that may do what the documents say.
pub(super) fn permitted(plane: &ControlPlane) -> Cluster {
    static ONCE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one_at_a_time = ONCE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !plane.knows("mica") {
        permit(plane, "mica", &permissions());
    }
    cluster(plane, "mica")
}

/// Lets a user do this in the cluster, and in Mica's own namespace what Mica does there.
pub(super) fn permit(plane: &ControlPlane, user: &str, rules: &Value) {
    plane.allow(user, rules);
    plane.allow_in(HOME, user, &serde_saphyr::from_str(OWN_PERMISSIONS).unwrap());
}

pub(super) fn permissions() -> Value {
    serde_saphyr::from_str(PERMISSIONS).unwrap()
}

/// Follows the cluster until it is dropped.
pub(super) struct Following {
    pub(super) objects: Arc<Objects>,
    task: tokio::task::JoinHandle<()>,
}

impl Following {
    pub(super) fn start(cluster: &Cluster) -> Self {
        let objects = Arc::new(Objects::new(cluster));
        let followed = objects.clone();
        let task = runtime().spawn(async move { followed.follow().await });
        let following = Self { objects, task };
        let all = following.objects.completed();
        runtime().block_on(async { tokio::time::timeout(Duration::from_secs(10), all).await.unwrap() });
        following
    }

    fn account(&self, account: &ServiceAccount, uid: Option<&str>) -> Life {
        runtime().block_on(self.objects.account(account, uid))
    }

    fn pod(&self, namespace: &str, pod: &Object) -> Life {
        runtime().block_on(self.objects.pod(namespace, pod))
    }

    fn node_of(&self, account: &ServiceAccount, pod: &Object) -> Option<Object> {
        runtime().block_on(self.objects.node_of(account, pod)).unwrap()
    }

    fn runs(&self, node: &Object, account: &ServiceAccount) -> bool {
        runtime().block_on(self.objects.runs(node, account)).unwrap()
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) fn account(namespace: &TestNamespace<'_>, name: &str) -> ServiceAccount {
    ServiceAccount::new(&namespace.name, name).unwrap()
}

fn other(object: &Object) -> Object {
    Object { name: object.name.clone(), uid: "00000000-0000-0000-0000-000000000000".to_owned() }
}

#[test]
fn an_account_lives_until_it_is_deleted_and_is_not_the_next_of_its_name() {
    let plane = ControlPlane::shared();
    let namespace = plane.namespace();
    let first = namespace.account("before");
    let following = Following::start(&permitted(plane));
    let (before, after) = (account(&namespace, "before"), account(&namespace, "after"));
    assert_eq!(following.account(&before, Some(&first.uid)), Life::Alive);
    assert_eq!(following.account(&before, None), Life::Alive);
    assert_eq!(following.account(&before, Some("another")), Life::Replaced);
    // At once, whether or not the watch has told of it.
    let second = namespace.account("after");
    assert_eq!(following.account(&after, Some(&second.uid)), Life::Alive);
    assert_eq!(following.account(&account(&namespace, "never"), None), Life::Gone);
    namespace.delete_account("before");
    wait_for(Duration::from_secs(2), "the end of the account", || {
        (following.account(&before, Some(&first.uid)) == Life::Gone).then_some(())
    });
    let third = namespace.account("before");
    wait_for(Duration::from_secs(2), "the next account", || {
        (following.account(&before, Some(&third.uid)) == Life::Alive).then_some(())
    });
    // What was answered a moment ago is not asked again.
    wait_for(Duration::from_secs(2), "another answer", || {
        (following.account(&before, Some(&first.uid)) == Life::Replaced).then_some(())
    });
}

#[test]
fn a_pod_lives_until_it_is_deleted_and_is_not_the_next_of_its_name() {
    let plane = ControlPlane::shared();
    let namespace = plane.namespace();
    namespace.account("web");
    let node = namespace.node("a");
    let following = Following::start(&permitted(plane));
    let first = namespace.pod("web-1", "web", &node);
    assert_eq!(following.pod(&namespace.name, &first), Life::Alive);
    assert_eq!(following.pod(&namespace.name, &other(&first)), Life::Replaced);
    assert_eq!(following.pod("default", &first), Life::Gone);
    namespace.delete_pod("web-1");
    wait_for(Duration::from_secs(2), "the end of the pod", || {
        (following.pod(&namespace.name, &first) == Life::Gone).then_some(())
    });
    let second = namespace.pod("web-1", "web", &node);
    wait_for(Duration::from_secs(2), "the next pod", || {
        (following.pod(&namespace.name, &second) == Life::Alive).then_some(())
    });
    wait_for(Duration::from_secs(2), "another answer", || {
        (following.pod(&namespace.name, &first) == Life::Replaced).then_some(())
    });
}

#[test]
fn who_runs_where_is_known_at_once_and_until_the_pod_ends() {
    let plane = ControlPlane::shared();
    let namespace = plane.namespace();
    for name in ["web", "db", "job"] {
        namespace.account(name);
    }
    let [web, db] = ["web", "db"].map(|name| account(&namespace, name));
    let (a, b) = (namespace.node("a"), namespace.node("b"));
    let following = Following::start(&permitted(plane));
    // Before the watch of the nodes has begun, and before the one of the pods has told.
    let pod = namespace.pod("web-1", "web", &a);
    assert_eq!(following.node_of(&web, &pod), Some(a.clone()));
    assert!(following.runs(&a, &web));
    assert!(!following.runs(&b, &web) && !following.runs(&a, &db));
    assert_eq!(following.node_of(&db, &pod), None);
    assert_eq!(following.node_of(&web, &other(&pod)), None);
    assert!(!following.runs(&other(&a), &web));
    for (name, of, phase) in [("db-1", "db", "Failed"), ("job-1", "job", "Succeeded")] {
        let ended = namespace.pod(name, of, &b);
        let of = account(&namespace, of);
        assert!(following.runs(&b, &of), "{name}");
        namespace.phase(name, phase);
        wait_for(Duration::from_secs(2), "the end of the pod", || (!following.runs(&b, &of)).then_some(()));
        assert_eq!(following.node_of(&of, &ended), None, "{name}");
        assert_eq!(following.pod(&namespace.name, &ended), Life::Alive, "{name}");
    }
    // Another machine of the same name.
    plane.delete_node(&a.name);
    let again = plane.node(&a.name);
    wait_for(Duration::from_secs(2), "the next node", || {
        (following.node_of(&web, &pod) == Some(again.clone())).then_some(())
    });
    assert!(following.runs(&again, &web) && !following.runs(&a, &web));
}

#[test]
fn the_api_server_vouches_for_living_tokens_with_this_audience_alone() {
    let plane = ControlPlane::shared();
    let namespace = plane.namespace();
    let web = namespace.account("web");
    let node = namespace.node("a");
    let pod = namespace.pod("web-1", "web", &node);
    let reviews = TokenReviews::new(&permitted(plane));
    let review = |token: &str, audience: &str| runtime().block_on(reviews.review(token, audience));
    let reason = |token: &str, audience: &str| review(token, audience).unwrap_err().reason;
    let [bound, unbound, foreign] = [("istio-ca", true), ("istio-ca", false), ("example.org", true)]
        .map(|(audience, bound)| namespace.token("web", audience, bound.then_some(&pod)));
    let reviewed = review(&bound, "istio-ca").unwrap();
    assert_eq!(reviewed.account, account(&namespace, "web"));
    let uid = Some(web.uid.clone());
    assert_eq!(
        reviewed.bound,
        Bound { account_uid: uid.clone(), pod: Some(pod.clone()), node: Some(node.clone()) }
    );
    let reviewed = review(&unbound, "istio-ca").unwrap();
    assert_eq!(reviewed.bound, Bound { account_uid: uid, ..Bound::default() });
    assert_eq!(reason(&foreign, "istio-ca"), Reason::TokenRejected);
    assert_eq!(reason(&bound, "example.org"), Reason::TokenRejected);
    assert_eq!(reason("no.token.atall", "istio-ca"), Reason::TokenRejected);
    assert_eq!(reason(&format!("{bound}x"), "istio-ca"), Reason::TokenRejected);
    namespace.account("db");
    let deleted = namespace.token("db", "istio-ca", None);
    review(&deleted, "istio-ca").unwrap();
    namespace.delete_pod("web-1");
    namespace.delete_account("db");
    // The API server keeps what it has found for ten seconds.
    for token in [bound, deleted] {
        wait_for(Duration::from_secs(15), "the end of the token", || {
            (review(&token, "istio-ca").is_err()).then_some(())
        });
    }
    review(&unbound, "istio-ca").unwrap();
}

#[test]
fn the_issuer_and_its_keys_come_from_the_api_server() {
    let cluster = permitted(ControlPlane::shared());
    assert_eq!(runtime().block_on(cluster.issuer()).unwrap(), ISSUER);
    let keys = runtime().block_on(cluster.fetch()).unwrap();
    let keys: Value = serde_json::from_slice(&keys).unwrap();
    assert_eq!(keys["keys"][0]["kty"], "RSA");
    assert!(mica::auth::KeySource::place(&cluster).ends_with("/openid/v1/jwks"));
}

#[test]
fn without_permissions_nothing_is_known_and_everything_says_why() {
    let plane = ControlPlane::shared();
    let namespace = plane.namespace();
    let web = namespace.account("web");
    let cluster = cluster(plane, "nobody");
    let objects = Objects::new(&cluster);
    let life = runtime().block_on(objects.account(&account(&namespace, "web"), Some(&web.uid)));
    let Life::Unknown(why) = life else { panic!("{life:?}") };
    assert!(why.contains("serviceaccounts") && why.contains("nobody"), "{why}");
    let refusal = runtime().block_on(TokenReviews::new(&cluster).review("x.y.z", "istio-ca")).unwrap_err();
    assert_eq!(refusal.reason, Reason::VerifierUnavailable);
    let detail = refusal.detail.unwrap();
    assert!(detail.contains("tokenreviews") && !detail.contains("x.y.z"), "{detail}");
}

#[test]
fn without_the_api_server_what_is_known_stays_and_the_rest_is_unknown() {
    let plane = ControlPlane::start();
    let namespace = plane.namespace();
    let web = namespace.account("web");
    let node = namespace.node("a");
    let pod = namespace.pod("web-1", "web", &node);
    let name = account(&namespace, "web");
    let cluster = permitted(&plane);
    let following = Following::start(&cluster);
    assert_eq!(following.node_of(&name, &pod), Some(node.clone()));
    let reviews = TokenReviews::new(&cluster);
    let token = namespace.token("web", "istio-ca", Some(&pod));
    plane.stop_api_server();
    assert_eq!(following.account(&name, Some(&web.uid)), Life::Alive);
    assert_eq!(following.pod(&namespace.name, &pod), Life::Alive);
    wait_for(Duration::from_secs(2), "the node from memory", || {
        (runtime().block_on(following.objects.node_of(&name, &pod)) == Ok(Some(node.clone()))).then_some(())
    });
    assert!(following.runs(&node, &name));
    for life in [
        following.account(&account(&namespace, "db"), None),
        // Either it is older than what is known, or newer.
        following.account(&name, Some("another")),
        following.pod(&namespace.name, &other(&pod)),
    ] {
        let Life::Unknown(why) = life else { panic!("{life:?}") };
        assert!(why.contains("onnect"), "{why}");
    }
    let refusal = runtime().block_on(reviews.review(&token, "istio-ca")).unwrap_err();
    assert_eq!(refusal.reason, Reason::VerifierUnavailable);
    assert!(runtime().block_on(cluster.fetch()).unwrap_err().contains("/openid/v1/jwks"));
    plane.start_api_server();
    plane.wait_until_ready();
    runtime().block_on(reviews.review(&token, "istio-ca")).unwrap();
    let db = namespace.account("db");
    wait_for(Duration::from_secs(2), "the new account", || {
        (following.account(&account(&namespace, "db"), Some(&db.uid)) == Life::Alive).then_some(())
    });
    // And the watch is back too: the deletion is told, not asked for.
    namespace.delete_account("web");
    wait_for(Duration::from_secs(30), "the end of the account", || {
        (following.account(&name, Some(&web.uid)) == Life::Gone).then_some(())
    });
}
