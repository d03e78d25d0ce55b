//! Distributes the roots: a ConfigMap in each namespace that is served, as istiod has it, and a ClusterTrustBundle.
//!
//! While this replica may write. What others do to these objects is repaired, unless they go on doing it.

mod held;
mod write;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::certificates::v1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client, ResourceExt as _};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use self::held::{Digest, Held};
use self::write::Term;
use super::watch::{self, Change, Watches};
use super::{Cluster, Events, Leadership, Namespaces};
use crate::core::bundle::TrustBundle;
use crate::core::spiffe::TrustDomain;

/// Who vouches for the bundle.
const SIGNER: &str = "mica.dev/workload";
/// How often the roots are compared with those before.
const LOOK: Duration = Duration::from_secs(1);

/// What is written.
#[derive(Clone, Debug)]
pub struct RootsOptions {
    /// The name of the ConfigMap in each namespace; none writes none.
    pub config_map: Option<String>,
    /// The trust domain whose ClusterTrustBundle is written; none writes none.
    pub trust_bundle: Option<TrustDomain>,
    /// Mica's own namespace, which is who it is.
    pub own: String,
}

/// The roots as they are now.
type Current = Box<dyn Fn() -> Arc<TrustBundle> + Send + Sync>;

/// Distributes the roots.
pub struct Roots {
    client: Client,
    options: RootsOptions,
    current: Current,
    namespaces: Arc<Namespaces>,
    leadership: Leadership,
    events: Arc<Events>,
    known: Mutex<Known>,
    changed: Notify,
    watches: Watches,
    writes: Family<Outcome, Counter>,
    rivals: Family<Object, Gauge>,
}

impl std::fmt::Debug for Roots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Roots").field(&self.options).finish()
    }
}

/// Where the roots go.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Place {
    Bundle,
    Namespace(Arc<str>),
}

impl Place {
    fn object(&self) -> Object {
        Object { object: if *self == Self::Bundle { "clustertrustbundle" } else { "configmap" } }
    }
}

/// What is there, as far as the watches have told.
#[derive(Debug, Default)]
struct Known {
    /// None of one that was there and is gone.
    held: HashMap<Place, Option<Held>>,
    /// Changed since somebody looked.
    changed: BTreeSet<Place>,
    /// Watches that have read all there was.
    complete: HashSet<Scope>,
    /// Written while a watch reads all again, which may not have it yet.
    overtaken: HashSet<Place>,
}

/// What a watch is about: a namespace's ConfigMap, all ConfigMaps, or the bundle.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Scope {
    Bundle,
    Namespaces(Option<Arc<str>>),
}

impl Scope {
    fn has(&self, place: &Place) -> bool {
        match (self, place) {
            (Self::Bundle, Place::Bundle) | (Self::Namespaces(None), Place::Namespace(_)) => true,
            (Self::Namespaces(Some(one)), Place::Namespace(namespace)) => one == namespace,
            _ => false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Object {
    object: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    object: &'static str,
    outcome: &'static str,
}

impl Roots {
    /// Writes nothing yet.
    pub fn new(
        cluster: &Cluster,
        options: RootsOptions,
        current: Current,
        namespaces: Arc<Namespaces>,
        leadership: Leadership,
        events: Arc<Events>,
    ) -> Self {
        Self {
            client: cluster.client.clone(),
            watches: cluster.watches.clone(),
            options,
            current,
            namespaces,
            leadership,
            events,
            known: Mutex::default(),
            changed: Notify::new(),
            writes: Family::default(),
            rivals: Family::default(),
        }
    }

    /// Registers what is counted.
    pub fn register(&self, registry: &mut Registry) {
        for object in ["configmap", "clustertrustbundle"] {
            for outcome in ["written", "failed"] {
                drop(self.writes.get_or_create(&Outcome { object, outcome }));
            }
            drop(self.rivals.get_or_create(&Object { object }));
        }
        registry.register(
            "mica_root_writes",
            "Writes of the objects that the roots are distributed in",
            self.writes.clone(),
        );
        registry.register(
            "mica_rival_writers",
            "Objects for the roots that are left alone, since somebody else keeps writing them",
            self.rivals.clone(),
        );
    }

    /// Distributes them for ever, term by term.
    pub async fn run(self: &Arc<Self>) {
        let mut leadership = self.leadership.clone();
        loop {
            leadership.gained().await;
            tokio::select! {
                () = leadership.lost() => {}
                () = self.term() => {}
            }
            *self.known() = Known::default();
            for object in ["configmap", "clustertrustbundle"] {
                self.rivals.get_or_create(&Object { object }).set(0);
            }
        }
    }

    /// The SHA-256 of the bundle that a namespace's ConfigMap holds now, as far as this replica knows, which it does while
    /// it writes.
    pub fn held(&self, namespace: &str) -> Option<Digest> {
        self.known().held.get(&Place::Namespace(namespace.into()))?.as_ref()?.digest
    }

    /// Begins with nothing known, and ends when it is dropped.
    async fn term(self: &Arc<Self>) {
        let mut watches = JoinSet::new();
        for scope in self.scopes() {
            let roots = self.clone();
            watches.spawn(async move { roots.watch(scope).await });
        }
        self.namespaces.completed().await;
        let flips = self.namespaces.flips();
        let mut term = Term::new(self);
        self.namespaces.all().into_iter().for_each(|namespace| term.look(Place::Namespace(namespace)));
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                flipped = flips.next() => {
                    for namespace in flipped {
                        term.look(Place::Namespace(namespace));
                    }
                }
                () = self.changed.notified() => {
                    for place in std::mem::take(&mut self.known().changed) {
                        term.look(place);
                    }
                }
                _ = look.tick() => {
                    if term.take_current() {
                        let places: Vec<_> = self.known().held.keys().cloned().collect();
                        places.into_iter().for_each(|place| term.look(place));
                    }
                }
                () = term.progress() => {}
            }
            term.work();
        }
    }

    fn scopes(&self) -> Vec<Scope> {
        let mut scopes = Vec::new();
        if self.options.config_map.is_some() {
            match self.namespaces.watched() {
                None => scopes.push(Scope::Namespaces(None)),
                Some(watched) => {
                    scopes.extend(watched.iter().map(|one| Scope::Namespaces(Some(one.as_str().into()))));
                }
            }
        }
        if self.options.trust_bundle.is_some() {
            scopes.push(Scope::Bundle);
        }
        scopes
    }

    async fn watch(&self, scope: Scope) {
        let own = self.options.own.as_str();
        let tell = |change| self.take(&scope, change);
        match &scope {
            Scope::Bundle => {
                let name = self.bundle_name();
                let api: Api<ClusterTrustBundle> = Api::all(self.client.clone());
                let reduce =
                    |bundle: &ClusterTrustBundle| (Place::Bundle, Held::in_trust_bundle(bundle, SIGNER, own));
                watch::follow(api, name.as_deref(), &self.watches, reduce, tell).await;
            }
            Scope::Namespaces(namespace) => {
                let api: Api<ConfigMap> = match namespace {
                    Some(namespace) => Api::namespaced(self.client.clone(), namespace),
                    None => Api::all(self.client.clone()),
                };
                let reduce = |map: &ConfigMap| {
                    let namespace = map.namespace().unwrap_or_default();
                    (Place::Namespace(namespace.into()), Held::in_config_map(map, own))
                };
                watch::follow(api, self.options.config_map.as_deref(), &self.watches, reduce, tell).await;
            }
        }
    }

    fn take(&self, scope: &Scope, change: Change<(Place, Held)>) {
        let mut known = self.known();
        match change {
            Change::Begun => known.overtaken.retain(|place| !scope.has(place)),
            Change::All(all) => {
                let all: HashMap<_, _> = all.into_iter().collect();
                let known = &mut *known;
                for (place, held) in known.held.iter_mut().filter(|(place, _)| scope.has(place)) {
                    if !all.contains_key(place) && !known.overtaken.contains(place) {
                        *held = None;
                        known.changed.insert(place.clone());
                    }
                }
                for (place, held) in all {
                    known.changed.insert(place.clone());
                    if !known.overtaken.contains(&place) {
                        known.held.insert(place, Some(held));
                    }
                }
                if known.complete.insert(scope.clone()) {
                    // Those that hold nothing are not among them.
                    let places = self.namespaces.all().into_iter().map(Place::Namespace);
                    known.changed.extend(places.chain([Place::Bundle]).filter(|place| scope.has(place)));
                }
            }
            Change::There((place, held)) => known.put(place, held),
            Change::Gone((place, held)) => {
                let is_older = |now: &Held| held.is_older(now);
                if !known.held.get(&place).and_then(Option::as_ref).is_some_and(is_older) {
                    known.held.insert(place.clone(), None);
                    known.changed.insert(place);
                }
            }
        }
        self.changed.notify_one();
    }

    fn bundle_name(&self) -> Option<String> {
        let trust_domain = self.options.trust_bundle.as_ref()?;
        Some(format!("{}:{trust_domain}", SIGNER.replace('/', ":")))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    /// Takes what is there, unless something newer is known.
    fn put(&mut self, place: Place, held: Held) {
        if !self.held.get(&place).and_then(Option::as_ref).is_some_and(|now| held.is_older(now)) {
            self.held.insert(place.clone(), Some(held));
            self.changed.insert(place);
        }
    }

    fn is_complete(&self, place: &Place) -> bool {
        self.complete.iter().any(|scope| scope.has(place))
    }
}
