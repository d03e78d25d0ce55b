//! The pods of one node, for an agent there.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use k8s_openapi::api::core::v1;
use kube::Api;
use kube::api::ListParams;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, timeout};

use super::known::Facts;
use super::seen::Seen;
use super::watch::{Change, Watches, follow_where};
use super::{Cluster, PATIENCE, said};
use crate::attest::{Pod, Pods};
use crate::sys::clock;

/// What an agent that serves a node may do in the cluster, as RBAC rules in YAML.
pub const NODE_PERMISSIONS: &str = "\
- apiGroups: [\"\"]
  resources: [pods]
  verbs: [list, watch]
";

/// The pods of the node are read again for one that the watch has not told of, but not more often than this.
const MOMENT: Duration = Duration::from_secs(1);

/// The pods of one node.
pub struct NodePods {
    api: Api<Seen<v1::Pod>>,
    chosen: String,
    watches: Watches,
    known: RwLock<HashMap<Box<str>, Facts>>,
    changes: watch::Sender<()>,
    asked: Mutex<Option<Instant>>,
}

impl NodePods {
    /// Knows nothing yet.
    pub fn new(cluster: &Cluster, node: &str) -> Self {
        Self {
            api: cluster.all(),
            chosen: format!("spec.nodeName={node}"),
            watches: cluster.watches.clone(),
            known: RwLock::default(),
            changes: watch::Sender::new(()),
            asked: Mutex::default(),
        }
    }

    /// Follows them for ever. What was told is believed until it is told otherwise, also while the API server is away.
    pub async fn follow(&self) {
        let reduce = |seen: &Seen<v1::Pod>| (Box::<str>::from(seen.uid()), Facts::of(seen));
        let tell = |change| {
            match change {
                Change::Begun => return,
                Change::All(all) => *self.write() = all.into_iter().collect(),
                Change::There((uid, facts)) => drop(self.write().insert(uid, facts)),
                Change::Gone((uid, _)) => drop(self.write().remove(&uid)),
            }
            self.changes.send_replace(());
        };
        follow_where(self.api.clone(), Some(&self.chosen), &self.watches, reduce, tell).await;
    }

    fn told(&self, uid: &str) -> Option<Facts> {
        self.read().get(uid).cloned()
    }

    async fn ask(&self, uid: &str) -> Result<Option<Facts>, String> {
        let mut asked = self.asked.lock().await;
        if let Some(facts) = self.told(uid) {
            return Ok(Some(facts));
        }
        if asked.is_some_and(|at| at.elapsed() < MOMENT) {
            return Err("the pods of the node were read a moment ago".to_owned());
        }
        *asked = Some(Instant::now());
        let chosen = ListParams::default().fields(&self.chosen);
        match timeout(PATIENCE, self.api.list(&chosen)).await {
            Ok(Ok(all)) => Ok(all.items.iter().find(|seen| seen.uid() == uid).map(Facts::of)),
            Ok(Err(fault)) => Err(said(&fault)),
            Err(_) => Err("the API server does not answer".to_owned()),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<Box<str>, Facts>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<Box<str>, Facts>> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Pods for NodePods {
    async fn pod(&self, uid: &str) -> Result<Option<Pod>, String> {
        let facts = match self.told(uid) {
            Some(facts) => Some(facts),
            None => self.ask(uid).await?,
        };
        let now = clock::now().unix_timestamp();
        Ok(facts.and_then(|facts| Some(Pod { runs: facts.runs(now), account: facts.account? })))
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }
}
