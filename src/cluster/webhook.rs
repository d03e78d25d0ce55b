//! Keeps what an API server trusts the admission webhook by: the `caBundle` of its MutatingWebhookConfiguration.
//!
//! That field and nothing else, while this replica may write. Somebody else makes the object, and may take it away.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::watch::{self, Change, Watches};
use super::{Cluster, Leadership, MANAGER, PATIENCE, said};
use crate::core::bundle::TrustBundle;
use crate::core::rivals::{Found, History, Step};

/// What Mica asks of the API server for its admission webhook, as the rules of a cluster role, beside
/// [`PERMISSIONS`](super::PERMISSIONS).
pub const INJECT_PERMISSIONS: &str = "\
- apiGroups: [admissionregistration.k8s.io]
  resources: [mutatingwebhookconfigurations]
  resourceNames: [mica-inject]
  verbs: [list, watch, patch]
";

/// How often the roots are compared with those before.
const LOOK: Duration = Duration::from_secs(1);
/// A write that failed is tried again after so long, then after twice as long each time.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// The roots as they are now.
type Current = Box<dyn Fn() -> Arc<TrustBundle> + Send + Sync>;

/// Keeps a `caBundle`.
pub struct WebhookTrust {
    client: Client,
    name: String,
    current: Current,
    leadership: Leadership,
    watches: Watches,
    known: Mutex<Known>,
    changed: Notify,
}

impl std::fmt::Debug for WebhookTrust {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("WebhookTrust").field(&self.name).finish()
    }
}

/// As far as the watch has told.
#[derive(Debug, Default)]
enum Known {
    #[default]
    Nothing,
    Absent,
    There(Held),
}

/// What is kept of the object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    version: String,
    /// Of each webhook; empty where there is none.
    bundles: Vec<Vec<u8>>,
    /// Who has last written one.
    writer: Option<String>,
}

impl Held {
    fn of(object: &MutatingWebhookConfiguration) -> Self {
        let webhooks = object.webhooks.iter().flatten();
        let bundle = |webhook: &k8s_openapi::api::admissionregistration::v1::MutatingWebhook| {
            webhook.client_config.ca_bundle.as_ref().map(|bundle| bundle.0.clone()).unwrap_or_default()
        };
        Self {
            version: object.metadata.resource_version.clone().unwrap_or_default(),
            bundles: webhooks.map(bundle).collect(),
            writer: writer(object.metadata.managed_fields.as_deref().unwrap_or_default()),
        }
    }

    fn found(&self, wanted: &[u8]) -> Found<'_> {
        if self.bundles.iter().all(|bundle| bundle == wanted) {
            return Found::AsWanted;
        }
        match self.writer.as_deref() {
            Some(MANAGER) => Found::Outdated,
            Some(writer) if self.bundles.iter().any(|bundle| !bundle.is_empty() && bundle != wanted) => {
                Found::Foreign(writer)
            }
            _ => Found::Never,
        }
    }

    /// Changes nothing if anything has changed since it was read.
    fn patch(&self, wanted: &[u8]) -> Value {
        let mut operations = vec![json!({
            "op": "test", "path": "/metadata/resourceVersion", "value": self.version,
        })];
        let encoded = STANDARD.encode(wanted);
        for (index, _) in self.bundles.iter().enumerate().filter(|(_, bundle)| *bundle != wanted) {
            operations.push(json!({
                "op": "add", "path": format!("/webhooks/{index}/clientConfig/caBundle"), "value": encoded,
            }));
        }
        Value::Array(operations)
    }
}

/// Who has last written a `caBundle`.
fn writer(entries: &[ManagedFieldsEntry]) -> Option<String> {
    let has = |entry: &&ManagedFieldsEntry| {
        entry.fields_v1.as_ref().is_some_and(|fields| holds(&fields.0, "f:caBundle"))
    };
    let last = entries.iter().filter(has).max_by_key(|entry| entry.time.clone())?;
    last.manager.clone()
}

fn holds(fields: &Value, name: &str) -> bool {
    fields.as_object().is_some_and(|map| map.iter().any(|(key, below)| key == name || holds(below, name)))
}

impl WebhookTrust {
    /// Of the MutatingWebhookConfiguration of a name. Writes nothing yet.
    pub fn new(cluster: &Cluster, name: &str, current: Current, leadership: Leadership) -> Self {
        Self {
            client: cluster.client.clone(),
            name: name.to_owned(),
            current,
            leadership,
            watches: cluster.watches.clone(),
            known: Mutex::default(),
            changed: Notify::new(),
        }
    }

    /// Keeps it for ever, term by term.
    pub async fn run(self: &Arc<Self>) {
        let mut leadership = self.leadership.clone();
        loop {
            leadership.gained().await;
            tokio::select! {
                () = leadership.lost() => {}
                () = self.term() => {}
            }
            *self.known() = Known::Nothing;
        }
    }

    /// Begins with nothing known, and ends when it is dropped.
    async fn term(self: &Arc<Self>) {
        let mut watches = JoinSet::new();
        let watching = self.clone();
        watches.spawn(async move { watching.watch().await });
        let begun = Instant::now();
        let mut history = History::default();
        let mut look = tokio::time::interval(LOOK);
        let (mut told_absent, mut was_wanted) = (false, false);
        let (mut failures, mut not_before) = (0u32, begun);
        loop {
            tokio::select! {
                () = self.changed.notified() => {}
                _ = look.tick() => {}
            }
            let held = match &*self.known() {
                Known::Nothing => continue,
                Known::There(held) => Some(held.clone()),
                Known::Absent => None,
            };
            let name = self.name.as_str();
            let Some(held) = held else {
                if !std::mem::replace(&mut told_absent, true) {
                    tracing::warn!(
                        name,
                        "there is no such MutatingWebhookConfiguration, so the API server asks nothing; make it as examples/inject does"
                    );
                }
                continue;
            };
            told_absent = false;
            let bundle = (self.current)();
            let wanted = bundle.pem().as_bytes();
            if Instant::now() < not_before {
                continue;
            }
            let was_paused = history.paused();
            let found = match held.found(wanted) {
                // Taken out again, by whoever puts another object in its place.
                Found::Never if was_wanted => Found::Deleted,
                found => found,
            };
            was_wanted |= found == Found::AsWanted;
            match history.judge(found, begun.elapsed()) {
                Step::Leave => {}
                Step::GiveUp if was_paused.is_none() => tracing::error!(
                    name,
                    ?found,
                    "another writer keeps writing the caBundle; it is left alone for a while: end one of the two"
                ),
                Step::GiveUp => {}
                Step::Write => match self.write(&held, wanted).await {
                    Ok(written) => {
                        tracing::info!(name, "the caBundle of the webhook holds Mica's roots");
                        failures = 0;
                        self.take(Change::There(written));
                    }
                    Err(fault) => {
                        failures += 1;
                        let pause = (FIRST_RETRY * 2u32.pow((failures - 1).min(10))).min(LAST_RETRY);
                        not_before = Instant::now() + pause;
                        if failures == 1 {
                            tracing::warn!(name, fault, "the caBundle cannot be written; trying again");
                        }
                    }
                },
            }
        }
    }

    async fn write(&self, held: &Held, wanted: &[u8]) -> Result<Held, String> {
        if !self.leadership.may_write() {
            return Err("this replica may not write now".to_owned());
        }
        let patch = serde_json::from_value(held.patch(wanted)).map_err(|fault| fault.to_string())?;
        let patch = Patch::Json::<()>(patch);
        let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let api: Api<MutatingWebhookConfiguration> = Api::all(self.client.clone());
        let patched = api.patch(&self.name, &parameters, &patch);
        match tokio::time::timeout(PATIENCE, patched).await {
            Ok(Ok(object)) => Ok(Held::of(&object)),
            Ok(Err(fault)) => Err(said(&fault)),
            Err(_) => Err(format!("no answer within {} seconds", PATIENCE.as_secs())),
        }
    }

    async fn watch(&self) {
        let api: Api<MutatingWebhookConfiguration> = Api::all(self.client.clone());
        watch::follow(api, Some(&self.name), &self.watches, Held::of, |change| self.take(change)).await;
    }

    fn take(&self, change: Change<Held>) {
        let number = |held: &Held| held.version.parse::<u64>().unwrap_or(u64::MAX);
        let mut known = self.known();
        match change {
            Change::Begun => return,
            Change::All(all) => *known = all.into_iter().next().map_or(Known::Absent, Known::There),
            Change::There(held) => {
                let newer = match &*known {
                    Known::There(now) => number(&held) >= number(now),
                    Known::Nothing | Known::Absent => true,
                };
                if newer {
                    *known = Known::There(held);
                }
            }
            Change::Gone(_) => *known = Known::Absent,
        }
        self.changed.notify_one();
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
