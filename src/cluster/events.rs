//! Kubernetes Events: what an operator should see beside the object that it is about. They are told in passing; nothing
//! waits for them, and nothing fails with them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Cluster, PATIENCE, said};
use crate::sys::clock;

/// Who tells.
const CONTROLLER: &str = "mica.dev/mica";
/// Where those about objects without a namespace are kept, as Kubernetes itself has it.
const CLUSTER_WIDE: &str = "default";
/// What was told of an object is not told again for so long.
const WINDOW: Duration = Duration::from_secs(10 * 60);
/// Of each reason so many at once.
const BURST: u32 = 20;
/// And later one in so long.
const PACE: Duration = Duration::from_secs(10);
/// So many wait while the API server is slow.
const QUEUE: usize = 256;
/// One that cannot be posted is tried again after so long each.
const RETRIES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(20)];
/// The API server takes no longer note.
const LONGEST: usize = 1024;

/// What can be told. The names are stable: people search and alert by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventReason {
    /// Something that Mica did not write has the name of an account's secret.
    SecretNameTaken,
    /// A delivered secret was damaged or edited, and was delivered again.
    SecretRepaired,
    /// An account's annotations ask for more than policy grants its namespace.
    AnnotationRefused,
    /// An account has no good certificate, since none can be issued or written.
    NotServed,
    /// A root ConfigMap or trust bundle was edited or deleted, and was put back.
    RootsRepaired,
    /// Somebody else keeps writing an object of Mica's, so that Mica has stopped.
    RivalWriter,
    /// The secret of the authority is missing, unreadable or damaged.
    AuthorityUnusable,
    /// This replica is the one that writes.
    LeaderElected,
}

impl EventReason {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::SecretNameTaken,
        Self::SecretRepaired,
        Self::AnnotationRefused,
        Self::NotServed,
        Self::RootsRepaired,
        Self::RivalWriter,
        Self::AuthorityUnusable,
        Self::LeaderElected,
    ];

    /// As it stands in an Event.
    pub fn name(self) -> &'static str {
        match self {
            Self::SecretNameTaken => "SecretNameTaken",
            Self::SecretRepaired => "SecretRepaired",
            Self::AnnotationRefused => "AnnotationRefused",
            Self::NotServed => "NotServed",
            Self::RootsRepaired => "RootsRepaired",
            Self::RivalWriter => "RivalWriter",
            Self::AuthorityUnusable => "AuthorityUnusable",
            Self::LeaderElected => "LeaderElected",
        }
    }

    /// What Mica was doing.
    fn action(self) -> &'static str {
        match self {
            Self::SecretNameTaken | Self::SecretRepaired | Self::AnnotationRefused | Self::NotServed => {
                "DeliverSecret"
            }
            Self::RootsRepaired | Self::RivalWriter => "DistributeRoots",
            Self::AuthorityUnusable => "LoadAuthority",
            Self::LeaderElected => "ElectLeader",
        }
    }
}

/// How much it is worth somebody's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// For the record.
    Normal,
    /// Somebody should look.
    Warning,
}

/// Tells what happens, in Events of an API server.
pub struct Events {
    client: Client,
    instance: String,
    told: Mutex<Told>,
    queue: mpsc::Sender<Waiting>,
    inbox: tokio::sync::Mutex<mpsc::Receiver<Waiting>>,
    outcomes: Family<Outcome, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

const OUTCOMES: [&str; 4] = ["posted", "repeated", "held_back", "failed"];

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").field("instance", &self.instance).finish_non_exhaustive()
    }
}

impl Events {
    /// Of this replica, by the name of its pod or machine. Nothing is posted before [`Events::post`] runs.
    pub fn new(cluster: &Cluster, instance: &str) -> Self {
        let (queue, inbox) = mpsc::channel(QUEUE);
        let instance = cut(instance, 128);
        Self {
            client: cluster.client.clone(),
            // It may not be empty.
            instance: if instance.is_empty() { CONTROLLER.to_owned() } else { instance },
            told: Mutex::default(),
            queue,
            inbox: tokio::sync::Mutex::new(inbox),
            outcomes: Family::default(),
        }
    }

    /// Registers what is counted.
    pub fn register(&self, registry: &mut Registry) {
        for outcome in OUTCOMES {
            drop(self.outcomes.get_or_create(&Outcome { outcome }));
        }
        registry.register(
            "mica_kube_events",
            "Kubernetes Events: posted, repeated within minutes, held back as too many, or failed",
            self.outcomes.clone(),
        );
    }

    /// Tells of an object, unless the same has been told of it within minutes, or too much is being told. Never waits.
    ///
    /// The object needs kind, name, API version and, if it has one, its namespace; with its UID `kubectl describe` shows
    /// the event, too. The note is for everybody who may read events: it holds nothing secret.
    pub fn tell(&self, about: &ObjectReference, severity: Severity, reason: EventReason, note: String) {
        let key = Key::new(about, reason);
        let verdict = self.told().judge(&key, Instant::now());
        let before = match verdict {
            Verdict::Tell { before } => before,
            Verdict::Repeated => return self.count("repeated"),
            Verdict::TooMany => return self.count("held_back"),
        };
        let note = match before {
            0 => note,
            before => format!("{note} (and {before} times before that)"),
        };
        let event = self.event(about, severity, reason, &note);
        if self.queue.try_send(Waiting { key: key.clone(), event }).is_err() {
            self.told().forget(&key);
            self.count("held_back");
        }
    }

    /// Posts what is told, for ever.
    pub async fn post(&self) {
        let mut inbox = self.inbox.lock().await;
        while let Some(waiting) = inbox.recv().await {
            self.post_one(waiting).await;
        }
    }

    /// Posts once what nobody has begun to post, for as long as one request may take: before an end.
    pub async fn flush(&self) {
        let Ok(mut inbox) = self.inbox.try_lock() else { return };
        let waiting = async {
            while let Ok(waiting) = inbox.try_recv() {
                self.post_one(waiting).await;
            }
        };
        let _ = tokio::time::timeout(PATIENCE, waiting).await;
    }

    async fn post_one(&self, waiting: Waiting) {
        match self.try_to_post(&waiting.event).await {
            Ok(()) => self.count("posted"),
            Err(fault) => {
                let (reason, fault) = (waiting.key.reason.name(), fault.as_str());
                tracing::warn!(reason, fault, "a Kubernetes Event cannot be posted");
                self.told().forget(&waiting.key);
                self.count("failed");
            }
        }
    }

    async fn try_to_post(&self, event: &Event) -> Result<(), String> {
        let namespace = event.metadata.namespace.as_deref().unwrap_or(CLUSTER_WIDE);
        let api: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        let mut retries = RETRIES.iter();
        loop {
            let params = PostParams::default();
            let posted = tokio::time::timeout(PATIENCE, api.create(&params, event)).await;
            let fault = match posted {
                Ok(Ok(_)) => return Ok(()),
                // Such as in a namespace that is being deleted.
                Ok(Err(fault)) if is_final(&fault) => return Err(said(&fault)),
                Ok(Err(fault)) => said(&fault),
                Err(_) => format!("no answer within {} seconds", PATIENCE.as_secs()),
            };
            let Some(pause) = retries.next() else { return Err(fault) };
            tokio::time::sleep(*pause).await;
        }
    }

    fn event(&self, about: &ObjectReference, severity: Severity, reason: EventReason, note: &str) -> Event {
        let namespace = about.namespace.as_deref().filter(|namespace| !namespace.is_empty());
        let now = clock::now();
        let at = Timestamp::new(now.unix_timestamp(), i32::try_from(now.nanosecond()).unwrap_or(0));
        Event {
            metadata: ObjectMeta {
                namespace: Some(namespace.unwrap_or(CLUSTER_WIDE).to_owned()),
                // Names of objects need not be fit for names of events.
                generate_name: Some("mica-".to_owned()),
                ..ObjectMeta::default()
            },
            event_time: at.ok().map(MicroTime),
            regarding: Some(about.clone()),
            type_: Some(format!("{severity:?}")),
            reason: Some(reason.name().to_owned()),
            action: Some(reason.action().to_owned()),
            note: Some(cut(note, LONGEST)),
            reporting_controller: Some(CONTROLLER.to_owned()),
            reporting_instance: Some(self.instance.clone()),
            ..Event::default()
        }
    }

    fn count(&self, outcome: &'static str) {
        self.outcomes.get_or_create(&Outcome { outcome }).inc();
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Waiting {
    key: Key,
    event: Event,
}

/// What counts as the same event.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    reason: EventReason,
    kind: Arc<str>,
    namespace: Arc<str>,
    name: Arc<str>,
}

impl Key {
    fn new(about: &ObjectReference, reason: EventReason) -> Self {
        let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
        Self { reason, kind: text(&about.kind), namespace: text(&about.namespace), name: text(&about.name) }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// And so many times it was not told.
    Tell {
        before: u64,
    },
    Repeated,
    TooMany,
}

/// What was told a while ago.
#[derive(Debug, Default)]
struct Told {
    lately: HashMap<Key, (Instant, u64)>,
    /// When the last of a reason may be counted as forgotten.
    paces: HashMap<EventReason, Instant>,
}

impl Told {
    fn judge(&mut self, key: &Key, now: Instant) -> Verdict {
        if let Entry::Occupied(mut known) = self.lately.entry(key.clone()) {
            let (at, repeats) = known.get_mut();
            if now < *at + WINDOW {
                *repeats += 1;
                return Verdict::Repeated;
            }
        }
        let pace = self.paces.entry(key.reason).or_insert(now);
        if *pace > now + PACE * (BURST - 1) {
            return Verdict::TooMany;
        }
        *pace = (*pace).max(now) + PACE;
        let before = self.lately.get(key).map_or(0, |(_, repeats)| *repeats);
        // What is told has its pace, so this stays short.
        self.lately.retain(|_, (at, _)| now < *at + WINDOW);
        self.lately.insert(key.clone(), (now, 0));
        Verdict::Tell { before }
    }

    fn forget(&mut self, key: &Key) {
        self.lately.remove(key);
    }
}

/// Whether trying again is of no use.
fn is_final(fault: &kube::Error) -> bool {
    matches!(fault, kube::Error::Api(status) if (400..500).contains(&status.code) && !matches!(status.code, 408 | 429))
}

fn cut(text: &str, most: usize) -> String {
    match text.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= most).last() {
        Some(end) => text[..end].to_owned(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str, reason: EventReason) -> Key {
        let about = ObjectReference { name: Some(name.to_owned()), ..ObjectReference::default() };
        Key::new(&about, reason)
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_is_told_once_in_ten_minutes() {
        let (mut told, begun) = (Told::default(), Instant::now());
        let web = key("web", EventReason::SecretNameTaken);
        assert_eq!(told.judge(&web, begun), Verdict::Tell { before: 0 });
        for second in 1..600 {
            assert_eq!(told.judge(&web, begun + Duration::from_secs(second)), Verdict::Repeated);
        }
        assert_eq!(told.judge(&key("db", EventReason::SecretNameTaken), begun), Verdict::Tell { before: 0 });
        assert_eq!(told.judge(&key("web", EventReason::NotServed), begun), Verdict::Tell { before: 0 });
        assert_eq!(told.judge(&web, begun + WINDOW), Verdict::Tell { before: 599 });
        told.forget(&web);
        assert_eq!(told.judge(&web, begun + WINDOW), Verdict::Tell { before: 0 });
    }

    #[tokio::test(start_paused = true)]
    async fn ten_thousand_faults_are_few_events_and_hide_no_other_reason() {
        let (mut told, begun) = (Told::default(), Instant::now());
        let mut fell = 0;
        for n in 0..10_000 {
            let verdict = told.judge(&key(&n.to_string(), EventReason::NotServed), begun);
            fell += u32::from(verdict == Verdict::Tell { before: 0 });
        }
        assert_eq!(fell, BURST);
        let rival = key("roots", EventReason::RivalWriter);
        assert_eq!(told.judge(&rival, begun), Verdict::Tell { before: 0 });
        // An hour of it.
        let mut fell = 0;
        for second in 0..3600 {
            for n in 0..10 {
                let key = key(&format!("{second}-{n}"), EventReason::NotServed);
                let at = begun + Duration::from_secs(second);
                fell += u32::from(told.judge(&key, at) == Verdict::Tell { before: 0 });
            }
        }
        assert!((350..=360).contains(&fell), "{fell}");
        assert!(told.lately.len() <= 80, "{}", told.lately.len());
    }

    #[test]
    fn a_note_is_cut_between_letters() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abc", 2), "ab");
        assert_eq!(cut("aéb", 2), "a");
        assert_eq!(cut("é", 1), "");
        assert_eq!(cut(&"é".repeat(1000), LONGEST).len(), LONGEST);
    }
}
