//! Which replica may write: the Lease `mica`.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::core::Request;
use kube::core::params::{GetParams, PostParams};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use time::macros::format_description;
use tokio::sync::watch;
use tokio::time::Instant;

use super::call::{Call, Fault, call, jittered};
use super::events::{EventReason, Events, Severity};
use super::watch::{Doubt, Watches};
use super::{Cluster, MANAGER, PATIENCE};
use crate::core::continuity::Continuity;
use crate::core::election::{Candidate, LASTS, LOOK, MARGIN, Record, Step, TURN, WRITES};
use crate::core::keyring;
use crate::sys::{self, clock, keys};

/// The lease's name.
const LEASE: &str = "mica";
/// What the trust bundle is numbered from since its holder has it, in milliseconds since 1970.
const NUMBERED_FROM: &str = "mica.dev/numbered-from";
/// For how long its holder writes after each write of it, and the holder that says so.
const WRITES_FOR: &str = "mica.dev/writes-for";

/// Whether this replica may write into the cluster, and until when. Clones share one answer.
///
/// Who writes asks [`Leadership::may_write`] before each write, and gives the write at most as long as a request may take:
/// then it has ended before another replica can begin.
#[derive(Clone, Debug)]
pub struct Leadership {
    until: watch::Receiver<Option<Instant>>,
    /// None without a lease, where nobody else writes.
    numbered_from: Option<watch::Receiver<Option<u64>>>,
}

impl Leadership {
    /// The only replica there is.
    pub fn always() -> Self {
        const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
        Self { until: watch::channel(Some(Instant::now() + FOREVER)).1, numbered_from: None }
    }

    /// Whether a write that begins now ends before another replica can write.
    pub fn may_write(&self) -> bool {
        may_write(*self.until.borrow())
    }

    /// Waits until this replica may write.
    pub async fn gained(&mut self) {
        if self.until.wait_for(Option::is_some).await.is_err() {
            std::future::pending().await
        }
    }

    /// What the lease says that the trust bundle is numbered from: more than any number published before its holder had
    /// it, unless that came from a clock that was ahead. Whoever reads the keys after that has all that was written until
    /// then. None where there is no lease to see.
    pub async fn numbered_from(&self) -> Result<Option<u64>, String> {
        let Some(mut numbered_from) = self.numbered_from.clone() else { return Ok(None) };
        let seen = numbered_from.wait_for(Option::is_some);
        match tokio::time::timeout(PATIENCE, seen).await {
            Ok(Ok(number)) => Ok(*number),
            _ => Err(format!(
                "the lease {LEASE} was not seen yet, by which the trust bundle is numbered; see what is said of it"
            )),
        }
    }

    /// Waits until it may not any more.
    pub async fn lost(&mut self) {
        loop {
            let until = *self.until.borrow_and_update();
            let Some(until) = until else { return };
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                changed = self.until.changed() => if changed.is_err() { tokio::time::sleep_until(until).await; return },
            }
        }
    }
}

/// One replica's part in the election.
pub struct Election {
    client: Client,
    namespace: String,
    candidate: Candidate,
    /// The lease as it was last read or written.
    lease: Option<Value>,
    begun: Instant,
    until: watch::Sender<Option<Instant>>,
    numbered_from: watch::Sender<Option<u64>>,
    /// What was last said to be wrong.
    fault: Option<String>,
    tellings: Arc<Events>,
    /// The newest version of the lease, which is the cluster's clock.
    newest: u64,
    continuity: Continuity,
    watches: Watches,
}

impl Election {
    /// Takes part from [`Election::run`] on. Whoever looks at the lease is the first to see the cluster go away, or back to
    /// a backup, and has what is known of it read again.
    pub fn new(cluster: &Cluster, tellings: Arc<Events>) -> Self {
        let suffix: u64 = keys::random_bytes().map_or(0, u64::from_le_bytes);
        let name = format!("{}_{suffix:016x}", sys::host_name());
        Self {
            client: cluster.client.clone(),
            namespace: cluster.namespace().to_owned(),
            candidate: Candidate::new(name, jittered(MARGIN)),
            lease: None,
            begun: Instant::now(),
            until: watch::Sender::new(None),
            numbered_from: watch::Sender::new(None),
            fault: None,
            tellings,
            newest: 0,
            continuity: Continuity::default(),
            watches: cluster.watches.clone(),
        }
    }

    /// For whoever writes.
    pub fn leadership(&self) -> Leadership {
        let numbered_from = Some(self.numbered_from.subscribe());
        Leadership { until: self.until.subscribe(), numbered_from }
    }

    /// Registers what is counted.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(Leader(self.until.clone())));
    }

    /// Takes part until `stop` resolves, and then gives the lease back, once nobody here writes any more.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::select! {
            () = stop => {}
            () = self.take_turns() => {}
        }
        let leads = self.until.send_replace(None).is_some();
        if leads {
            // Whoever writes holds a Leadership; what outlives that has begun before, and has an end.
            let _ = tokio::time::timeout(PATIENCE, self.until.closed()).await;
            self.give_back().await;
        }
    }

    async fn take_turns(&mut self) {
        loop {
            let turned = self.turn().await;
            let now = self.now();
            if let Err(fault) = &turned {
                let text = fault.to_string();
                if self.fault.as_ref() != Some(&text) {
                    tracing::warn!(fault = text, "the lease can be neither read nor written; trying again");
                    self.fault = Some(text);
                }
            } else {
                self.fault = None;
            }
            self.doubt(&turned, now);
            self.publish(now);
            let pause = match self.candidate.step(now) {
                Step::Renew if turned.is_ok() => jittered(TURN),
                // To be there when it ends.
                Step::Wait => jittered(LOOK).min(self.candidate.patience(now)),
                _ => jittered(LOOK),
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn publish(&self, now: Duration) {
        let until = self.candidate.until(now).map(|until| self.begun + until);
        let before = self.until.send_replace(until);
        let holder = self.candidate.name();
        match (before, until) {
            (None, Some(_)) => {
                tracing::info!(holder, "this replica writes into the cluster");
                let note = format!("{holder} writes into the cluster from now on");
                self.tellings.tell(&self.reference(), Severity::Normal, EventReason::LeaderElected, note);
            }
            (Some(_), None) => tracing::warn!(holder, "this replica writes into the cluster no longer"),
            _ => {}
        }
    }

    /// Looks and writes, as the case may be.
    async fn turn(&mut self) -> Result<(), Fault> {
        // One's own needs no look: if it is another's, the write fails.
        if self.candidate.step(self.now()) != Step::Renew {
            self.look().await?;
        }
        match self.act().await {
            Err(Fault::Taken(_) | Fault::Absent(_)) if self.lease.is_some() => {
                self.look().await?;
                match self.act().await {
                    // Somebody was faster, again.
                    Err(Fault::Taken(_)) => Ok(()),
                    acted => acted,
                }
            }
            Err(Fault::Taken(_)) => Ok(()),
            acted => acted,
        }
    }

    async fn look(&mut self) -> Result<(), Fault> {
        let request = Request::new(self.path()).get(LEASE, &GetParams::default());
        let lease: Option<Value> = match call(&self.client, self.what("get"), request).await {
            Ok(lease) => Some(lease),
            Err(Fault::Absent(_)) => None,
            Err(fault) => return Err(fault),
        };
        let record = lease.as_ref().map(record);
        if let (Some(record), Some(lease)) = (&record, &lease) {
            self.notice(record, lease);
        }
        self.candidate.saw(record, self.now());
        self.lease = lease;
        Ok(())
    }

    async fn act(&mut self) -> Result<(), Fault> {
        let begun = self.now();
        let step = self.candidate.step(begun);
        let (verb, lease) = match (step, &self.lease) {
            (Step::Wait, _) => return Ok(()),
            (Step::Create, _) | (_, None) => ("create", self.own(None, step)),
            (Step::Take | Step::Renew, Some(lease)) => ("update", self.own(Some(lease), step)),
        };
        let lease = self.write(verb, &lease).await?;
        let record = record(&lease);
        self.notice(&record, &lease);
        self.candidate.wrote(record, begun, self.now());
        self.lease = Some(lease);
        Ok(())
    }

    fn doubt(&mut self, turned: &Result<(), Fault>, now: Duration) {
        match turned {
            Ok(()) if self.continuity.answered(now) => self.watches.read_again(Doubt::WasAway),
            // Whoever asks for patience is there.
            Err(Fault::Away(_, None)) => self.continuity.failed(),
            _ => {}
        }
    }

    fn notice(&mut self, record: &Record, lease: &Value) {
        // Before anybody hears that this replica may write.
        let number = Some(numbered_from(lease));
        self.numbered_from.send_if_modified(|known| {
            let grows = *known < number;
            *known = number.max(*known);
            grows
        });
        let Ok(version) = record.version.parse() else { return };
        if version < self.newest {
            self.watches.read_again(Doubt::WentBack);
        }
        self.newest = version;
    }

    async fn write(&self, verb: &'static str, lease: &Value) -> Result<Value, Fault> {
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        let (path, body) = (Request::new(self.path()), lease.to_string().into_bytes());
        let request = match verb {
            "create" => path.create(&params, body),
            _ => path.replace(LEASE, &params, body),
        };
        call(&self.client, self.what(verb), request).await
    }

    /// The lease with us as its holder. What others have put there stays.
    fn own(&self, lease: Option<&Value>, step: Step) -> Value {
        let now = moment();
        let mut own = lease.cloned().unwrap_or_else(|| {
            json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": LEASE, "namespace": self.namespace},
            })
        });
        let transitions = own["spec"]["leaseTransitions"].as_i64().unwrap_or(0);
        own["spec"]["leaseDurationSeconds"] = LASTS.as_secs().into();
        own["spec"]["renewTime"] = now.clone().into();
        own["metadata"]["annotations"][WRITES_FOR] =
            format!("{}s {}", WRITES.as_secs(), self.candidate.name()).into();
        if step != Step::Renew {
            let last = numbered_from(&own).max(self.numbered_from.borrow().unwrap_or(0));
            own["metadata"]["annotations"][NUMBERED_FROM] =
                keyring::next_number(last, clock::now()).to_string().into();
            own["spec"]["holderIdentity"] = self.candidate.name().into();
            own["spec"]["acquireTime"] = now.into();
            let more = i64::from(step == Step::Take);
            own["spec"]["leaseTransitions"] = (transitions.saturating_add(more) & i64::from(i32::MAX)).into();
        }
        own
    }

    async fn give_back(&mut self) {
        self.candidate.resign();
        let Some(mut lease) = self.lease.take() else { return };
        lease["spec"]["holderIdentity"] = "".into();
        lease["spec"]["leaseDurationSeconds"] = 1.into();
        lease["spec"]["renewTime"] = moment().into();
        match self.write("update", &lease).await {
            Ok(_) => tracing::info!("the lease was given back"),
            Err(fault) => tracing::warn!(%fault, "the lease cannot be given back; it ends by itself"),
        }
    }

    fn reference(&self) -> ObjectReference {
        let uid = self.lease.as_ref().and_then(|lease| lease["metadata"]["uid"].as_str());
        ObjectReference {
            api_version: Some("coordination.k8s.io/v1".to_owned()),
            kind: Some("Lease".to_owned()),
            name: Some(LEASE.to_owned()),
            namespace: Some(self.namespace.clone()),
            uid: uid.map(str::to_owned),
            ..ObjectReference::default()
        }
    }

    fn what(&self, verb: &'static str) -> Call<'_> {
        Call { verb, resource: "leases", namespace: Some(&self.namespace), name: Some(LEASE) }
    }

    fn path(&self) -> String {
        format!("/apis/coordination.k8s.io/v1/namespaces/{}/leases", self.namespace)
    }
}

/// 0 if it says nothing of it, as those of earlier versions, or what no clock of 140,000 years says.
fn numbered_from(lease: &Value) -> u64 {
    let said = lease["metadata"]["annotations"][NUMBERED_FROM].as_str().and_then(|said| said.parse().ok());
    said.filter(|number| *number < 1 << 52).unwrap_or(0)
}

fn record(lease: &Value) -> Record {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let holder = text(&lease["spec"]["holderIdentity"]);
    // Others who write leases keep what one of us has said, of itself alone.
    let said = lease["metadata"]["annotations"][WRITES_FOR].as_str().and_then(|said| said.split_once("s "));
    let writes = said.filter(|(_, of)| *of == holder).and_then(|(seconds, _)| seconds.parse().ok());
    Record {
        version: text(&lease["metadata"]["resourceVersion"]),
        lasts: Duration::from_secs(lease["spec"]["leaseDurationSeconds"].as_u64().unwrap_or(0)),
        writes: writes.map(Duration::from_secs),
        holder,
    }
}

/// For people.
fn moment() -> String {
    clock::now()
        .format(format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:6]Z"))
        .unwrap_or_default()
}

/// Whether this replica writes now.
struct Leader(watch::Sender<Option<Instant>>);

impl fmt::Debug for Leader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Leader")
    }
}

impl Collector for Leader {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let gauge = ConstGauge::new(u64::from(may_write(*self.0.borrow())));
        let help = "1 while this replica may write into the cluster, else 0";
        gauge.encode(encoder.encode_descriptor("mica_leader", help, None, gauge.metric_type())?)
    }
}

fn may_write(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() + PATIENCE < until)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until(until: Option<Instant>) -> (watch::Sender<Option<Instant>>, Leadership) {
        let (sender, receiver) = watch::channel(until);
        (sender, Leadership { until: receiver, numbered_from: None })
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_could_last_too_long_is_not_begun() {
        let (sender, leadership) = until(None);
        assert!(!leadership.may_write());
        sender.send_replace(Some(Instant::now() + PATIENCE + Duration::from_secs(1)));
        assert!(leadership.may_write());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!leadership.may_write());
    }

    #[tokio::test(start_paused = true)]
    async fn a_term_ends_when_its_time_is_over_and_nobody_has_said_so() {
        let second = Duration::from_secs(1);
        let (sender, mut leadership) = until(None);
        let begun = Instant::now();
        let mut waiting = leadership.clone();
        tokio::join!(waiting.gained(), async { sender.send_replace(Some(begun + second)) });
        sender.send_replace(Some(begun + 2 * second));
        leadership.lost().await;
        assert_eq!(begun.elapsed(), 2 * second);
        assert!(Leadership::always().may_write());
    }
}
