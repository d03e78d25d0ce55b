//! Writes the objects: what is to be written when, by whom else it is written, and what to do when that fails.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::certificates::v1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use super::held::{Digest, Held, KEY, LABEL, digest_of};
use super::{Object, Outcome, Place, Roots, SIGNER};
use crate::cluster::{EventReason, MANAGED_BY, MANAGER, PATIENCE, Severity, said};
use crate::core::bundle::TrustBundle;
use crate::core::rivals::{Found, History, Step};
use crate::core::selection::Choice;
use crate::sys::keys;

/// So many writes at once.
const WRITES: usize = 8;
/// A write that failed is tried again after so long, then after twice as long each time.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// Of so many objects at a time each is told in the log.
const LINES: usize = 10;

/// Why an object was not written.
pub(super) enum Fault {
    /// Its namespace ends, or has ended.
    Ending,
    /// This replica may not write now.
    NotNow,
    /// With when to try again, if the API server says so.
    Failed(String, Option<Duration>),
}

/// What is known while this replica writes.
pub(super) struct Term<'a> {
    roots: &'a Arc<Roots>,
    begun: Instant,
    bundle: Arc<TrustBundle>,
    digest: Digest,
    /// To be looked at.
    ready: BTreeSet<Place>,
    later: BTreeSet<(Instant, Place)>,
    /// To be written, and the note about it, if somebody else has made it necessary.
    owed: HashMap<Place, Option<String>>,
    writing: JoinSet<(Place, Result<Held, Fault>)>,
    busy: HashSet<Place>,
    failures: HashMap<Place, u32>,
    histories: HashMap<Place, History>,
}

impl<'a> Term<'a> {
    pub(super) fn new(roots: &'a Arc<Roots>) -> Self {
        let bundle = (roots.current)();
        Self {
            begun: Instant::now(),
            digest: digest_of(bundle.pem()),
            bundle,
            ready: BTreeSet::new(),
            later: BTreeSet::new(),
            owed: HashMap::new(),
            writing: JoinSet::new(),
            busy: HashSet::new(),
            failures: HashMap::new(),
            histories: HashMap::new(),
            roots,
        }
    }

    /// Looks at a place as soon as there is time.
    pub(super) fn look(&mut self, place: Place) {
        self.ready.insert(place);
    }

    /// Takes the roots as they are now. Whether they are other ones than before.
    pub(super) fn take_current(&mut self) -> bool {
        let bundle = (self.roots.current)();
        let is_other = bundle.pem() != self.bundle.pem();
        if is_other {
            self.digest = digest_of(bundle.pem());
            self.bundle = bundle;
        }
        is_other
    }

    /// Waits until a write has ended, or something is to be looked at again. Cancel safe.
    pub(super) async fn progress(&mut self) {
        let next = self.later.first().map(|(at, _)| *at);
        let ripe = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(done) = self.writing.join_next() => self.done(done),
            () = ripe => {}
        }
        let now = Instant::now();
        while self.later.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, place)) = self.later.pop_first() {
                self.ready.insert(place);
            }
        }
    }

    /// Looks at what is to be looked at, as long as there is room for writes.
    pub(super) fn work(&mut self) {
        while self.writing.len() < WRITES {
            let Some(place) = self.ready.pop_first() else { return };
            // It is looked at again when that has ended.
            if !self.busy.contains(&place) && self.is_due(&place) {
                self.write(place);
            }
        }
    }

    fn is_due(&mut self, place: &Place) -> bool {
        let roots = self.roots;
        let choice = match place {
            Place::Bundle => Some(Choice::Served),
            Place::Namespace(namespace) => roots.namespaces.choice(namespace),
        };
        let mut known = roots.known();
        if !choice.is_some_and(Choice::is_served) {
            if choice.is_none() {
                known.held.remove(place);
            }
            drop(known);
            self.forget(place);
            return false;
        }
        if !known.is_complete(place) {
            return false;
        }
        let held = known.held.get(place).cloned();
        drop(known);
        let found = match &held {
            None => Found::Never,
            Some(None) => Found::Deleted,
            Some(Some(held)) if held.digest == Some(self.digest) => Found::AsWanted,
            Some(Some(held)) => held.writer.as_deref().map_or(Found::Outdated, Found::Foreign),
        };
        // What could not be written yet was not undone again.
        if found != Found::AsWanted && self.owed.contains_key(place) {
            return true;
        }
        let mut history = self.histories.remove(place).unwrap_or_default();
        let was_paused = history.paused();
        let step = history.judge(found, self.begun.elapsed());
        let paused = history.paused();
        if let Some(until) = paused {
            self.later.insert((self.begun + until, place.clone()));
        }
        if history != History::default() {
            self.histories.insert(place.clone(), history);
        }
        if paused != was_paused {
            self.count_rivals(place);
        }
        match step {
            Step::Leave => {
                self.owed.remove(place);
                self.failures.remove(place);
                false
            }
            Step::Write => {
                let note = match found {
                    Found::Deleted => Some("it was deleted, and has been made again".to_owned()),
                    Found::Foreign(writer) => {
                        Some(format!("{writer} has written it; it holds Mica's roots again"))
                    }
                    Found::Never | Found::Outdated | Found::AsWanted => None,
                };
                self.owed.insert(place.clone(), note);
                true
            }
            Step::GiveUp => {
                let writer = match found {
                    Found::Foreign(writer) => writer,
                    _ => "somebody who deletes it",
                };
                self.give_up(
                    place,
                    writer,
                    held.as_ref().and_then(Option::as_ref),
                    paused.unwrap_or_default(),
                );
                false
            }
        }
    }

    fn write(&mut self, place: Place) {
        self.busy.insert(place.clone());
        let (roots, bundle) = (self.roots.clone(), self.bundle.clone());
        self.writing.spawn(async move {
            let written = roots.write(&place, bundle.pem()).await;
            (place, written)
        });
    }

    fn done(&mut self, done: Result<(Place, Result<Held, Fault>), JoinError>) {
        let (place, written) = match done {
            Ok(done) => done,
            // A fault in a write is one in this task, too.
            Err(fault) => match fault.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => return,
            },
        };
        self.busy.remove(&place);
        let retry = match written {
            Ok(held) => {
                self.count(&place, "written");
                self.failures.remove(&place);
                if let Some(Some(note)) = self.owed.remove(&place) {
                    self.roots.tell(&place, &held, Severity::Normal, EventReason::RootsRepaired, note);
                }
                let mut known = self.roots.known();
                known.overtaken.insert(place.clone());
                known.put(place.clone(), held);
                Duration::ZERO
            }
            // The end of the namespace will be told, if it has not been.
            Err(Fault::Ending | Fault::NotNow) => FIRST_RETRY,
            Err(Fault::Failed(fault, after)) => {
                self.count(&place, "failed");
                let failures = self.failures.entry(place.clone()).or_default();
                *failures += 1;
                let pause = jittered((FIRST_RETRY * 2u32.pow((*failures - 1).min(10))).min(LAST_RETRY));
                if *failures == 1 && self.failures.len() <= LINES {
                    let object = self.roots.describe(&place);
                    tracing::warn!(object, fault, "the roots cannot be written; trying again");
                }
                after.unwrap_or_default().max(pause)
            }
        };
        if retry.is_zero() {
            self.ready.insert(place);
        } else {
            self.later.insert((Instant::now() + retry, place));
        }
    }

    fn give_up(&mut self, place: &Place, writer: &str, held: Option<&Held>, until: Duration) {
        let object = self.roots.describe(place);
        let minutes = until.saturating_sub(self.begun.elapsed()).as_secs().div_ceil(60);
        let flag = match place {
            Place::Bundle => "--cluster-trust-bundle false",
            Place::Namespace(_) => "--root-config-map with another name, or none",
        };
        let todo = format!("end one of the two, or give mica {flag}");
        let rivals = self.histories.values().filter(|history| history.paused().is_some()).count();
        if rivals <= LINES {
            tracing::error!(
                object,
                writer,
                minutes,
                todo,
                "another writer keeps writing the roots; they are left alone"
            );
        }
        let note = format!(
            "{writer} keeps writing it, so Mica leaves it alone and looks again in {minutes} minutes: {todo}"
        );
        let uid = held.map(|held| held.uid.clone()).unwrap_or_default();
        self.roots.tell_of(place, &uid, Severity::Warning, EventReason::RivalWriter, note);
    }

    fn forget(&mut self, place: &Place) {
        self.owed.remove(place);
        self.failures.remove(place);
        if self.histories.remove(place).is_some() {
            self.count_rivals(place);
        }
    }

    fn count_rivals(&self, changed: &Place) {
        let object = changed.object();
        let paused = self
            .histories
            .iter()
            .filter(|(place, history)| place.object() == object && history.paused().is_some());
        let count = i64::try_from(paused.count()).unwrap_or(i64::MAX);
        self.roots.rivals.get_or_create(&object).set(count);
    }

    fn count(&self, place: &Place, outcome: &'static str) {
        let Object { object } = place.object();
        self.roots.writes.get_or_create(&Outcome { object, outcome }).inc();
    }
}

impl Roots {
    async fn write(&self, place: &Place, pem: &str) -> Result<Held, Fault> {
        if !self.leadership.may_write() {
            return Err(Fault::NotNow);
        }
        let own = &self.options.own;
        let apply = PatchParams::apply(MANAGER).force();
        let name = self.name_of(place);
        let written = async {
            match place {
                Place::Bundle => {
                    let api: Api<ClusterTrustBundle> = Api::all(self.client.clone());
                    let object = json!({
                        "apiVersion": "certificates.k8s.io/v1", "kind": "ClusterTrustBundle",
                        "metadata": {"name": name, "labels": {MANAGED_BY: own}},
                        "spec": {"signerName": SIGNER, "trustBundle": pem},
                    });
                    let bundle = api.patch(&name, &apply, &Patch::Apply(object)).await?;
                    Ok(Held::in_trust_bundle(&bundle, SIGNER, own))
                }
                Place::Namespace(namespace) => {
                    let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), namespace);
                    let object = json!({
                        "apiVersion": "v1", "kind": "ConfigMap",
                        "metadata": {"name": name, "labels": {LABEL.0: LABEL.1, MANAGED_BY: own}},
                        "data": {KEY: pem},
                    });
                    let map = api.patch(&name, &apply, &Patch::Apply(object)).await?;
                    Ok(Held::in_config_map(&map, own))
                }
            }
        };
        match tokio::time::timeout(PATIENCE, written).await {
            Ok(Ok(held)) => Ok(held),
            Ok(Err(fault)) => Err(judged(&fault)),
            Err(_) => Err(Fault::Failed(format!("no answer within {} seconds", PATIENCE.as_secs()), None)),
        }
    }

    fn name_of(&self, place: &Place) -> String {
        let name = match place {
            Place::Bundle => self.bundle_name(),
            Place::Namespace(_) => self.options.config_map.clone(),
        };
        name.unwrap_or_default()
    }

    fn describe(&self, place: &Place) -> String {
        let name = self.name_of(place);
        match place {
            Place::Bundle => format!("ClusterTrustBundle {name}"),
            Place::Namespace(namespace) => format!("ConfigMap {namespace}/{name}"),
        }
    }

    fn tell(&self, place: &Place, held: &Held, severity: Severity, reason: EventReason, note: String) {
        self.tell_of(place, &held.uid, severity, reason, note);
    }

    fn tell_of(&self, place: &Place, uid: &str, severity: Severity, reason: EventReason, note: String) {
        let (version, kind, namespace) = match place {
            Place::Bundle => ("certificates.k8s.io/v1", "ClusterTrustBundle", None),
            Place::Namespace(namespace) => ("v1", "ConfigMap", Some(namespace.to_string())),
        };
        let about = ObjectReference {
            api_version: Some(version.to_owned()),
            kind: Some(kind.to_owned()),
            namespace,
            name: Some(self.name_of(place)),
            uid: Some(uid.to_owned()).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        };
        self.events.tell(&about, severity, reason, note);
    }
}

fn judged(fault: &kube::Error) -> Fault {
    if let kube::Error::Api(status) = fault {
        let details = status.details.as_ref();
        let is_ending = details
            .is_some_and(|details| details.causes.iter().any(|cause| cause.reason == "NamespaceTerminating"));
        let is_gone = status.code == 404 && details.is_some_and(|details| details.kind == "namespaces");
        if is_ending || is_gone {
            return Fault::Ending;
        }
        let after = details.map_or(0, |details| details.retry_after_seconds);
        return Fault::Failed(said(fault), (after > 0).then(|| Duration::from_secs(after.into())));
    }
    Fault::Failed(said(fault), None)
}

/// About so long, so that those who failed together do not come back together.
fn jittered(about: Duration) -> Duration {
    let [random] = keys::random_bytes().unwrap_or([128]);
    about.mul_f64(0.75 + f64::from(random) / 510.0)
}
