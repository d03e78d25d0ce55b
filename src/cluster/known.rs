//! What is remembered of the objects in the cluster: names, UIDs, and where pods run. No more: a cluster has many.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1;
use kube::Resource;

use super::seen::Seen;
use crate::core::policy::Wishes;
use crate::core::spiffe::ServiceAccount;

/// The API server counts an object as gone so many seconds after it should be.
const LEEWAY: i64 = 60;

/// Which object of its name it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Which {
    pub(super) uid: Box<str>,
    deleted_at: Option<i64>,
    /// Of an account: what it says of being delivered to.
    pub(super) deliver: Option<bool>,
    /// And of what is delivered.
    pub(super) wishes: Option<Box<Wishes>>,
}

/// A pod, or something of which less is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) which: Which,
    pub(super) node: Option<Arc<str>>,
    pub(super) account: Option<ServiceAccount>,
    ended: bool,
}

impl Which {
    fn of<K>(seen: &Seen<K>) -> Self {
        Self {
            uid: seen.uid().into(),
            deleted_at: seen.deleted_at,
            deliver: seen.deliver,
            wishes: seen.wishes.clone(),
        }
    }

    pub(super) fn is_gone(&self, now: i64) -> bool {
        self.deleted_at.is_some_and(|at| now > at.saturating_add(LEEWAY))
    }
}

impl Facts {
    pub(super) fn of<K>(seen: &Seen<K>) -> Self {
        Self {
            which: Which::of(seen),
            node: seen.node.as_deref().map(Arc::from),
            account: seen
                .account
                .as_deref()
                .and_then(|account| ServiceAccount::new(seen.namespace(), account).ok()),
            ended: seen.ended,
        }
    }

    /// Neither failed nor succeeded, nor long overdue.
    pub(super) fn runs(&self, now: i64) -> bool {
        !self.ended && !self.which.is_gone(now)
    }
}

/// All objects of one kind.
pub(super) trait Memory: Default + Send + Sync {
    type Kind: Resource<DynamicType = ()> + 'static;

    /// Tells whose account it is, if it was not known, or was not the same.
    fn apply(&mut self, seen: &Seen<Self::Kind>) -> Option<ServiceAccount>;
    /// Tells whose account it was.
    fn delete(&mut self, seen: &Seen<Self::Kind>) -> Option<ServiceAccount>;
    /// The accounts that are not the same in another memory.
    fn differences(&self, _other: &Self) -> Vec<ServiceAccount> {
        Vec::new()
    }
    fn len(&self) -> usize;
}

/// The service accounts.
#[derive(Debug, Default)]
pub(super) struct Accounts(HashMap<ServiceAccount, Which>);

impl Accounts {
    pub(super) fn get(&self, account: &ServiceAccount) -> Option<&Which> {
        self.0.get(account)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ServiceAccount> {
        self.0.keys()
    }
}

impl Memory for Accounts {
    type Kind = v1::ServiceAccount;

    fn apply(&mut self, seen: &Seen<Self::Kind>) -> Option<ServiceAccount> {
        let account = ServiceAccount::new(seen.namespace(), seen.name()).ok()?;
        let before = self.0.insert(account.clone(), Which::of(seen));
        let is_same = |before: Which| {
            *before.uid == *seen.uid() && before.deliver == seen.deliver && before.wishes == seen.wishes
        };
        (!before.is_some_and(is_same)).then_some(account)
    }

    fn delete(&mut self, seen: &Seen<Self::Kind>) -> Option<ServiceAccount> {
        let account = ServiceAccount::new(seen.namespace(), seen.name()).ok()?;
        self.0.remove(&account).map(|_| account)
    }

    fn differences(&self, other: &Self) -> Vec<ServiceAccount> {
        let differs = |account: &&ServiceAccount| {
            let said = |which: &Which| (which.uid.clone(), which.deliver, which.wishes.clone());
            let [here, there] = [self, other].map(|accounts| accounts.get(account).map(said));
            here != there
        };
        let gone = other.0.keys().filter(|account| !self.0.contains_key(account));
        self.0.keys().filter(differs).chain(gone).cloned().collect()
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// The nodes.
#[derive(Debug, Default)]
pub(super) struct NodeNames(HashMap<Box<str>, Which>);

impl NodeNames {
    pub(super) fn get(&self, name: &str) -> Option<&Which> {
        self.0.get(name)
    }
}

impl Memory for NodeNames {
    type Kind = v1::Node;

    fn apply(&mut self, seen: &Seen<Self::Kind>) -> Option<ServiceAccount> {
        self.0.insert(seen.name().into(), Which::of(seen));
        None
    }

    fn delete(&mut self, seen: &Seen<Self::Kind>) -> Option<ServiceAccount> {
        self.0.remove(seen.name());
        None
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// The pods, and which accounts they run as on which node.
#[derive(Debug, Default)]
pub(super) struct Pods {
    /// By `<namespace>/<name>`.
    pods: HashMap<Box<str>, Facts>,
    /// By node: as whom so many pods run there. It also holds the one copy of each node's name, and for each node one of
    /// each account's.
    running: HashMap<Arc<str>, HashMap<ServiceAccount, u32>>,
}

impl Pods {
    pub(super) fn get(&self, namespace: &str, name: &str) -> Option<&Facts> {
        self.pods.get(key(namespace, name).as_str())
    }

    /// Whether a pod of the account is on the node that has neither failed nor succeeded.
    pub(super) fn runs(&self, node: &str, account: &ServiceAccount) -> bool {
        self.running.get(node).is_some_and(|accounts| accounts.contains_key(account))
    }

    fn forget(&mut self, key: &str) {
        let Some(facts) = self.pods.remove(key) else { return };
        let (Some(node), Some(account), false) = (facts.node, facts.account, facts.ended) else { return };
        let Some(accounts) = self.running.get_mut(&node) else { return };
        if let Some(count) = accounts.get_mut(&account) {
            *count -= 1;
            if *count == 0 {
                accounts.remove(&account);
            }
        }
        if accounts.is_empty() {
            self.running.remove(&node);
        }
    }
}

impl Memory for Pods {
    type Kind = v1::Pod;

    fn apply(&mut self, seen: &Seen<Self::Kind>) -> Option<ServiceAccount> {
        let key = key(seen.namespace(), seen.name());
        self.forget(&key);
        let mut facts = Facts::of(seen);
        if let (Some(node), Some(account), false) = (&mut facts.node, &mut facts.account, facts.ended) {
            if let Some((known, _)) = self.running.get_key_value(node) {
                *node = known.clone();
            }
            let accounts = self.running.entry(node.clone()).or_default();
            if let Some((known, _)) = accounts.get_key_value(account) {
                *account = known.clone();
            }
            *accounts.entry(account.clone()).or_default() += 1;
        }
        self.pods.insert(key.into(), facts);
        None
    }

    fn delete(&mut self, seen: &Seen<Self::Kind>) -> Option<ServiceAccount> {
        self.forget(&key(seen.namespace(), seen.name()));
        None
    }

    fn len(&self) -> usize {
        self.pods.len()
    }
}

fn key(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, uid: &str, account: &str, node: Option<&str>, phase: &str) -> Seen<v1::Pod> {
        serde_json::from_value(json!({
            "metadata": {"namespace": "shop", "name": name, "uid": uid},
            "spec": {"serviceAccountName": account, "nodeName": node},
            "status": {"phase": phase},
        }))
        .unwrap()
    }

    fn account(name: &str) -> ServiceAccount {
        ServiceAccount::new("shop", name).unwrap()
    }

    #[test]
    fn who_runs_where_follows_the_pods() {
        let mut pods = Pods::default();
        let on_a = |pods: &Pods, name: &str| pods.runs("a", &account(name));
        pods.apply(&pod("web-1", "1", "web", None, "Pending"));
        assert!(!on_a(&pods, "web"));
        pods.apply(&pod("web-1", "1", "web", Some("a"), "Pending"));
        pods.apply(&pod("web-2", "2", "web", Some("a"), "Running"));
        pods.apply(&pod("db-1", "3", "db", Some("b"), "Running"));
        assert!(on_a(&pods, "web") && !on_a(&pods, "db") && !pods.runs("b", &account("web")));
        pods.apply(&pod("web-1", "1", "web", Some("a"), "Failed"));
        assert!(on_a(&pods, "web"));
        pods.apply(&pod("web-2", "2", "web", Some("a"), "Succeeded"));
        assert!(!on_a(&pods, "web"));
        // One of the same name is another one.
        pods.apply(&pod("web-2", "4", "db", Some("a"), "Running"));
        assert!(!on_a(&pods, "web") && on_a(&pods, "db"));
        assert_eq!(&*pods.get("shop", "web-2").unwrap().which.uid, "4");
        pods.delete(&pod("web-2", "4", "db", Some("a"), "Running"));
        pods.delete(&pod("never", "5", "db", Some("b"), "Running"));
        assert!(!on_a(&pods, "db") && pods.runs("b", &account("db")));
        pods.delete(&pod("db-1", "3", "db", Some("b"), "Running"));
        assert!(pods.running.is_empty() && pods.len() == 1);
    }

    #[test]
    fn names_are_held_once() {
        let mut pods = Pods::default();
        for n in 0..10 {
            pods.apply(&pod(&format!("web-{n}"), "u", "web", Some("a"), "Running"));
        }
        let (node, _) = pods.running.iter().next().unwrap();
        // Those of the pods and the key.
        assert_eq!(Arc::strong_count(node), 11);
    }

    #[test]
    fn what_should_be_gone_is_gone_a_minute_later() {
        let seen: Seen<v1::Pod> = serde_json::from_value(json!({
            "metadata": {"namespace": "shop", "name": "x", "uid": "u", "deletionTimestamp": "1970-01-01T00:10:00Z"},
        }))
        .unwrap();
        let facts = Facts::of(&seen);
        assert!(facts.runs(0) && facts.runs(660) && !facts.runs(661));
    }
}
