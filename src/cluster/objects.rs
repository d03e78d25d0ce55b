//! Which accounts, pods and nodes live, from watches; what they do not know is read once.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kube::runtime::watcher::{self, Event};
use kube::{Api, Resource as _};
use tokio::sync::{Notify, watch};

use super::Cluster;
use super::accounts::Changed;
use super::known::{Accounts, Facts, Memory, NodeNames, Pods, Which};
use super::live::{Live, Question};
use super::metrics::Metrics;
use super::seen::Seen;
use crate::auth::{Answer, Life, Liveness, Nodes};
use crate::core::caller::Object;
use crate::core::spiffe::ServiceAccount;
use crate::sys::clock;

/// The living accounts, pods and nodes of a cluster.
///
/// What a watch has told is believed until it tells otherwise, also while the API server is away. What it has not told is
/// read once, and if that fails it is unknown.
pub struct Objects {
    cluster: Cluster,
    live: Live,
    pub(super) accounts: Kept<Accounts>,
    /// Accounts that came, went or were replaced, for who follows them.
    pub(super) changed: Changed,
    pods: Kept<Pods>,
    nodes: Kept<NodeNames>,
    nodes_wanted: Notify,
    /// Without, nothing is known of them but what is read once.
    follows_pods: bool,
}

impl std::fmt::Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Objects {:?}", self.counts())
    }
}

impl Objects {
    /// Knows nothing yet.
    pub fn new(cluster: &Cluster) -> Self {
        Self {
            cluster: cluster.clone(),
            live: Live::new(cluster.client.clone(), cluster.watches.metrics.clone()),
            accounts: Kept::default(),
            changed: Changed::default(),
            pods: Kept::default(),
            nodes: Kept::default(),
            nodes_wanted: Notify::new(),
            follows_pods: true,
        }
    }

    /// Does not follow pods, as where that is not allowed.
    pub fn without_pods(mut self) -> Self {
        self.follows_pods = false;
        self.pods.complete.send_replace(true);
        self
    }

    /// Follows the cluster for ever. Nodes are followed once somebody has asked for one, since few need them.
    pub async fn follow(&self) {
        let nodes = async {
            self.nodes_wanted.notified().await;
            self.watch(&self.nodes, Api::all(self.cluster.client.clone())).await;
        };
        let pods = async {
            if self.follows_pods {
                self.watch(&self.pods, self.cluster.all()).await;
            }
        };
        tokio::join!(self.watch(&self.accounts, self.cluster.all()), pods, nodes);
    }

    /// Waits until all accounts and pods have been seen once.
    pub async fn completed(&self) {
        self.accounts.completed().await;
        self.pods.completed().await;
    }

    /// The UID of an account that lives, as far as the watch has told.
    pub(super) fn uid(&self, account: &ServiceAccount) -> Option<Box<str>> {
        self.accounts.read().get(account).map(|which| which.uid.clone())
    }

    /// How many are known, by resource.
    pub(super) fn counts(&self) -> [(&'static str, usize); 3] {
        [
            ("serviceaccounts", self.accounts.read().len()),
            ("pods", self.pods.read().len()),
            ("nodes", self.nodes.read().len()),
        ]
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.cluster.watches.metrics
    }

    async fn watch<M: Memory>(&self, kept: &Kept<M>, api: Api<Seen<M::Kind>>) {
        let what = M::Kind::plural(&());
        let mut watch =
            self.cluster.watches.watch(api, watcher::Config::default(), watcher::DefaultBackoff::default);
        let mut fresh = M::default();
        loop {
            match watch.next().await {
                // What was known stays until all of the new is there.
                Event::Init => fresh = M::default(),
                Event::InitApply(seen) => {
                    fresh.apply(&seen);
                }
                Event::InitDone => {
                    tracing::info!(%what, count = fresh.len(), "all have been read from the API server");
                    let differences = kept.replace(std::mem::take(&mut fresh));
                    self.changed.note(differences);
                    kept.complete.send_replace(true);
                }
                Event::Apply(seen) => {
                    let newcomer = kept.write().apply(&seen);
                    self.changed.note(newcomer);
                }
                Event::Delete(seen) => {
                    let gone = kept.write().delete(&seen);
                    self.changed.note(gone);
                }
            }
        }
    }

    /// A pod as the watch has told it, or as it is read now if that is another one, or not enough.
    async fn pod_facts(
        &self,
        namespace: &str,
        pod: &Object,
        is_enough: fn(&Facts) -> bool,
    ) -> Result<Option<Facts>, String> {
        let known = self.pods.read().get(namespace, &pod.name).cloned();
        match known.filter(|facts| *facts.which.uid == *pod.uid && is_enough(facts)) {
            Some(facts) => Ok(Some(facts)),
            None => {
                let question = Question::Pod { namespace: namespace.into(), name: pod.name.as_str().into() };
                self.live.ask(question).await
            }
        }
    }

    async fn node_uid(&self, name: &str) -> Result<Option<String>, String> {
        self.nodes_wanted.notify_one();
        let known = self.nodes.read().get(name).map(|which| which.uid.to_string());
        match known {
            Some(uid) => Ok(Some(uid)),
            None => {
                let found = self.live.ask(Question::Node(name.into())).await?;
                Ok(found.map(|facts| facts.which.uid.into()))
            }
        }
    }
}

impl Liveness for Objects {
    fn account<'a>(&'a self, account: &'a ServiceAccount, uid: Option<&'a str>) -> Answer<'a, Life> {
        Box::pin(async move {
            let now = clock::now().unix_timestamp();
            let alive = |which: &Which| life(which, uid, now) == Life::Alive;
            if self.accounts.read().get(account).is_some_and(alive) {
                return Life::Alive;
            }
            match self.live.ask(Question::Account(account.clone())).await {
                Ok(Some(facts)) => life(&facts.which, uid, now),
                Ok(None) => Life::Gone,
                Err(fault) => Life::Unknown(fault),
            }
        })
    }

    fn pod<'a>(&'a self, namespace: &'a str, pod: &'a Object) -> Answer<'a, Life> {
        Box::pin(async move {
            let now = clock::now().unix_timestamp();
            match self.pod_facts(namespace, pod, |_| true).await {
                Ok(Some(facts)) => life(&facts.which, Some(&pod.uid), now),
                Ok(None) => Life::Gone,
                Err(fault) => Life::Unknown(fault),
            }
        })
    }
}

impl Nodes for Objects {
    fn runs<'a>(&'a self, node: &'a Object, account: &'a ServiceAccount) -> Answer<'a, Result<bool, String>> {
        Box::pin(async move {
            if self.node_uid(&node.name).await?.as_ref() != Some(&node.uid) {
                return Ok(false);
            }
            if self.pods.read().runs(&node.name, account) {
                return Ok(true);
            }
            let question = Question::Runs { node: node.name.as_str().into(), account: account.clone() };
            Ok(self.live.ask(question).await?.is_some())
        })
    }

    fn node_of<'a>(
        &'a self,
        account: &'a ServiceAccount,
        pod: &'a Object,
    ) -> Answer<'a, Result<Option<Object>, String>> {
        Box::pin(async move {
            let now = clock::now().unix_timestamp();
            // A pod may have been seen before it had a node.
            let placed = |facts: &Facts| facts.node.is_some();
            let Some(facts) = self.pod_facts(account.namespace(), pod, placed).await? else {
                return Ok(None);
            };
            let is_meant = *facts.which.uid == *pod.uid && facts.account.as_ref() == Some(account);
            let (Some(name), true, true) = (facts.node.as_deref(), is_meant, facts.runs(now)) else {
                return Ok(None);
            };
            Ok(self.node_uid(name).await?.map(|uid| Object { name: name.to_owned(), uid }))
        })
    }
}

fn life(which: &Which, uid: Option<&str>, now: i64) -> Life {
    match uid {
        _ if which.is_gone(now) => Life::Gone,
        Some(uid) if *which.uid != *uid => Life::Replaced,
        _ => Life::Alive,
    }
}

/// What a watch has told of one kind.
#[derive(Debug, Default)]
pub(super) struct Kept<M> {
    memory: RwLock<M>,
    complete: watch::Sender<bool>,
}

impl<M: Memory> Kept<M> {
    /// Waits until all has been told once.
    pub(super) async fn completed(&self) {
        // The sender lives as long as this.
        let _ = self.complete.subscribe().wait_for(|complete| *complete).await;
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, M> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, M> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells which accounts are not the same.
    fn replace(&self, all: M) -> Vec<ServiceAccount> {
        let before = std::mem::replace(&mut *self.write(), all);
        // Without the writer's lock: it may be large.
        self.read().differences(&before)
    }
}
