//! The bundles of other trust domains in a ConfigMap of each namespace that is served, for those who follow no stream.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde_json::json;
use tokio::time::{Instant, interval};

use super::call::jittered;
use super::{Cluster, Leadership, MANAGED_BY, MANAGER, Namespaces, in_time};
use crate::core::selection::Choice;

/// How often bundles and namespaces are compared with those before.
const LOOK: Duration = Duration::from_secs(2);
/// What others have changed is written again after about so long, and a failure tried again.
const AGAIN: Duration = Duration::from_secs(60);
/// An object has at most 1 MiB, its other parts included (API server).
const MAX: usize = 1_000_000;
/// What follows a trust domain's name.
const SUFFIX: &str = ".json";

/// The bundles as they are now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    /// Each trust domain's, as SPIFFE JSON.
    pub known: BTreeMap<String, String>,
    /// Trust domains that are wanted, and of which this replica knows nothing yet.
    pub awaited: BTreeSet<String>,
}

type Current = Box<dyn Fn() -> Foreign + Send + Sync>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// Distributes them.
pub struct FederatedBundles {
    client: Client,
    name: String,
    own: String,
    current: Current,
    namespaces: Arc<Namespaces>,
    leadership: Leadership,
    writes: Family<Outcome, Counter>,
}

impl std::fmt::Debug for FederatedBundles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("FederatedBundles").field(&self.name).finish()
    }
}

impl FederatedBundles {
    /// In ConfigMaps of this name. Writes nothing yet.
    pub fn new(
        cluster: &Cluster,
        name: String,
        current: Current,
        namespaces: Arc<Namespaces>,
        leadership: Leadership,
    ) -> Self {
        let (client, own) = (cluster.client.clone(), cluster.namespace().to_owned());
        Self { client, name, own, current, namespaces, leadership, writes: Family::default() }
    }

    /// Registers what is counted.
    pub fn register(&self, registry: &mut Registry) {
        for outcome in ["written", "failed"] {
            drop(self.writes.get_or_create(&Outcome { outcome }));
        }
        registry.register(
            "mica_federated_bundle_writes",
            "Writes of the ConfigMaps that the bundles of other trust domains are distributed in",
            self.writes.clone(),
        );
    }

    /// Distributes them for ever, while this replica may write.
    pub async fn run(&self) {
        let mut leadership = self.leadership.clone();
        loop {
            leadership.gained().await;
            tokio::select! {
                () = leadership.lost() => {}
                () = self.term() => {}
            }
        }
    }

    async fn term(&self) {
        self.namespaces.completed().await;
        let mut next: HashMap<Arc<str>, Instant> = HashMap::new();
        let mut before = None;
        let mut told = None;
        let mut look = interval(LOOK);
        loop {
            look.tick().await;
            let bundles = (self.current)();
            if before.as_ref() != Some(&bundles) {
                next.clear();
                if bundles.known.iter().map(|(name, text)| name.len() + text.len()).sum::<usize>() > MAX {
                    tracing::error!(
                        name = self.name,
                        "the bundles of other trust domains are too long for a ConfigMap: it is left as it is"
                    );
                }
                before = Some(bundles.clone());
            }
            if bundles.known.iter().map(|(name, text)| name.len() + text.len()).sum::<usize>() > MAX {
                continue;
            }
            let served = |name: &Arc<str>| self.namespaces.choice(name).is_some_and(Choice::is_served);
            let all: Vec<_> = self.namespaces.all().into_iter().filter(served).collect();
            next.retain(|namespace, _| all.contains(namespace));
            for namespace in all {
                if next.get(&namespace).is_some_and(|at| *at > Instant::now()) || !self.leadership.may_write()
                {
                    continue;
                }
                let written = self.write(&namespace, &bundles).await;
                let outcome = if written.is_ok() { "written" } else { "failed" };
                self.writes.get_or_create(&Outcome { outcome }).inc();
                match written {
                    Ok(()) => {}
                    Err(fault) if told.as_ref() == Some(&fault) => {}
                    Err(fault) => {
                        tracing::warn!(%namespace, name = self.name, fault, "the bundles of other trust domains cannot be written; trying again");
                        told = Some(fault);
                    }
                }
                next.insert(namespace, Instant::now() + jittered(AGAIN));
            }
        }
    }

    async fn write(&self, namespace: &str, bundles: &Foreign) -> Result<(), String> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
        let mut texts = bundles.known.clone();
        if !bundles.awaited.is_empty() {
            // What an earlier writer knew is not taken away by one that does not know it yet.
            let held = held(&maps, &self.name).await?;
            texts.extend(held.into_iter().filter(|(name, _)| bundles.awaited.contains(name)));
        }
        let data: BTreeMap<_, _> =
            texts.into_iter().map(|(name, text)| (format!("{name}{SUFFIX}"), text)).collect();
        let map = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": self.name, "labels": {MANAGED_BY: self.own}},
            "data": data,
        });
        let params = PatchParams::apply(MANAGER).force();
        in_time(maps.patch(&self.name, &params, &Patch::Apply(&map))).await.map(drop)
    }
}

/// What Mica's own namespace has in the ConfigMap of this name, of each trust domain, as SPIFFE JSON.
pub async fn federated_bundles(cluster: &Cluster, name: &str) -> Result<BTreeMap<String, String>, String> {
    held(&Api::namespaced(cluster.client.clone(), cluster.namespace()), name).await
}

/// By a list, which the rule for watched ConfigMaps allows too.
async fn held(maps: &Api<ConfigMap>, name: &str) -> Result<BTreeMap<String, String>, String> {
    let params = ListParams::default().fields(&format!("metadata.name={name}"));
    let found = in_time(maps.list(&params)).await?;
    let texts = found.items.into_iter().filter_map(|map| map.data).flatten();
    Ok(texts.filter_map(|(key, text)| Some((key.strip_suffix(SUFFIX)?.to_owned(), text))).collect())
}
