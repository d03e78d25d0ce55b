//! Which namespaces are served, from their labels.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};

use k8s_openapi::api::core::v1::Namespace;
use kube::core::PartialObjectMeta;
use kube::{Api, Client, ResourceExt as _};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::Cluster;
use super::watch::{self as watching, Change, Watches};
use crate::core::selection::{Choice, ENVIRONMENT, Labels, OVERRIDE, Rules};

/// The namespaces of a cluster, and what was chosen for each.
///
/// What a watch has told is believed until it tells otherwise, also while the API server is away.
pub struct Namespaces {
    client: Client,
    watches: Watches,
    rules: Rules,
    known: RwLock<HashMap<Arc<str>, Choice>>,
    /// Watches that have not read all of theirs yet.
    reading: watch::Sender<usize>,
    listeners: Mutex<Vec<Weak<Flips>>>,
    /// What they say of themselves counts, and is asked for.
    reads_labels: bool,
}

impl std::fmt::Debug for Namespaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Namespaces").field(&self.rules).finish()
    }
}

impl Namespaces {
    /// Knows nothing yet.
    pub fn new(cluster: &Cluster, rules: Rules) -> Self {
        Self {
            client: cluster.client.clone(),
            watches: cluster.watches.clone(),
            known: RwLock::default(),
            reading: watch::Sender::new(rules.watched.as_ref().map_or(1, BTreeSet::len)),
            listeners: Mutex::default(),
            rules,
            reads_labels: true,
        }
    }

    /// All that are watched are served, and nobody asks what they say of themselves, as where that is not allowed.
    pub fn without_labels(mut self) -> Self {
        self.reads_labels = false;
        self.reading.send_replace(0);
        self
    }

    /// Registers what is counted.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        registry.register_collector(Box::new(Chosen(self.clone())));
    }

    /// Follows the cluster for ever. If only some namespaces are watched, nothing is asked about the others.
    pub async fn follow(self: &Arc<Self>) {
        let Some(watched) = &self.rules.watched else { return self.watch(None).await };
        let mut watches = JoinSet::new();
        for name in watched {
            let (known, name) = (self.clone(), name.clone());
            watches.spawn(async move { known.watch(Some(&name)).await });
        }
        // A watch has no end.
        watches.join_all().await;
    }

    /// Waits until all of them have been seen once.
    pub async fn completed(&self) {
        // The sender lives as long as this.
        let _ = self.reading.subscribe().wait_for(|reading| *reading == 0).await;
    }

    /// What was chosen for a namespace; none if it is not known, or not yet.
    pub fn choice(&self, namespace: &str) -> Option<Choice> {
        match &self.rules.watched {
            Some(watched) if !watched.contains(namespace) => Some(Choice::Unwatched),
            _ if !self.reads_labels => Some(Choice::Served),
            _ => self.known().get(namespace).copied(),
        }
    }

    /// Those that are watched; none if all are.
    pub(super) fn watched(&self) -> Option<&BTreeSet<String>> {
        self.rules.watched.as_ref()
    }

    /// All that are known.
    pub(super) fn all(&self) -> Vec<Arc<str>> {
        self.known().keys().cloned().collect()
    }

    /// Tells from now on for which namespaces another choice was made.
    pub fn flips(&self) -> Arc<Flips> {
        let flips = Arc::new(Flips::default());
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.push(Arc::downgrade(&flips));
        flips
    }

    async fn watch(&self, name: Option<&str>) {
        let api: Api<PartialObjectMeta<Namespace>> = Api::all(self.client.clone());
        let mut is_first = true;
        let choose = |namespace: &PartialObjectMeta<Namespace>| {
            let label = |key: &str| namespace.labels().get(key).map(String::as_str);
            let labels = Labels {
                overriding: label(OVERRIDE),
                environment: label(ENVIRONMENT),
                is_ending: namespace.metadata.deletion_timestamp.is_some(),
            };
            let name: Arc<str> = namespace.name_any().into();
            let choice = self.rules.choose(&name, &labels);
            (name, choice)
        };
        let tell = |change| match change {
            Change::Begun => {}
            Change::All(all) => {
                let all: HashMap<_, _> = all.into_iter().collect();
                let gone: Vec<_> = {
                    let known = self.known();
                    let ours = known.keys().filter(|known| name.is_none_or(|name| ***known == *name));
                    ours.filter(|known| !all.contains_key(*known)).cloned().collect()
                };
                self.take(all.into_iter().map(|(name, choice)| (name, Some(choice))));
                self.take(gone.into_iter().map(|name| (name, None)));
                if std::mem::take(&mut is_first) {
                    self.reading.send_modify(|reading| *reading -= 1);
                }
            }
            Change::There((name, choice)) => self.take([(name, Some(choice))]),
            Change::Gone((name, _)) => self.take([(name, None)]),
        };
        watching::follow(api, name, &self.watches, choose, tell).await;
    }

    fn take(&self, changes: impl IntoIterator<Item = (Arc<str>, Option<Choice>)>) {
        let mut flipped = Vec::new();
        {
            let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
            for (name, choice) in changes {
                let before = match choice {
                    Some(choice) => known.insert(name.clone(), choice),
                    None => known.remove(&name),
                };
                if before != choice {
                    flipped.push(name);
                }
            }
        }
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.retain(|listener| match listener.upgrade() {
            Some(flips) => {
                flips.note(flipped.iter().cloned());
                true
            }
            None => false,
        });
    }

    fn known(&self) -> RwLockReadGuard<'_, HashMap<Arc<str>, Choice>> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Namespaces for which another choice was made than before.
#[derive(Debug, Default)]
pub struct Flips {
    names: Mutex<BTreeSet<Arc<str>>>,
    some: Notify,
}

impl Flips {
    /// Waits for some. Cancel safe.
    pub async fn next(&self) -> BTreeSet<Arc<str>> {
        loop {
            let names = std::mem::take(&mut *self.names());
            if !names.is_empty() {
                return names;
            }
            self.some.notified().await;
        }
    }

    fn note(&self, names: impl IntoIterator<Item = Arc<str>>) {
        let mut all = self.names();
        all.extend(names);
        if !all.is_empty() {
            self.some.notify_one();
        }
    }

    fn names(&self) -> std::sync::MutexGuard<'_, BTreeSet<Arc<str>>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many namespaces are served, and why others are not.
#[derive(Debug)]
struct Chosen(Arc<Namespaces>);

impl Collector for Chosen {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut counts = Choice::WATCHED.map(|choice| (choice, 0u64));
        for choice in self.0.known().values() {
            if let Some((_, count)) = counts.iter_mut().find(|(counted, _)| counted == choice) {
                *count += 1;
            }
        }
        let kind = ConstGauge::new(0u64).metric_type();
        let help = "Namespaces that are watched, by what was chosen for them";
        let mut family = encoder.encode_descriptor("mica_namespaces", help, None, kind)?;
        for (choice, count) in counts {
            ConstGauge::new(count).encode(family.encode_family(&[("choice", choice.name())])?)?;
        }
        Ok(())
    }
}
