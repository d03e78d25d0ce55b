//! Source, plan, sink: the loop that gives every account its identity and keeps it fresh.
//!
//! One task owns all of this state. It sleeps until something happens or some certificate's time has come, and then
//! works on the accounts concerned and on no others.

mod metrics;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};

pub use metrics::Metrics;

use crate::authority::{self, Authority, Cause};
use crate::core::issuer::Order;
use crate::core::key::KeyKind;
use crate::core::lifetime::Lifetime;
use crate::core::plan::{CertificateSet, Good, Observed, Policy, Step, Why, judge, step};
use crate::core::profile::Profile;
use crate::core::spiffe::ServiceAccount;
use crate::sink::{self, Found, Sink};
use crate::source::Change;
use crate::sys::{clock, keys};
use metrics::State;

/// What the loop is told.
#[derive(Debug)]
pub enum Event {
    /// The source speaks of other accounts.
    Source(Change),
    /// Others changed what was delivered.
    Disturbed(Vec<ServiceAccount>),
    /// The authority has another issuer.
    Issuer,
}

/// What is delivered.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The lifetime of leaves.
    pub lifetime: Lifetime,
    /// The kind of their keys.
    pub key_kind: KeyKind,
}

/// How the first pass went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The first identities by name, at most [`Report::SHOWN`], and until when each is good.
    pub shown: Vec<(ServiceAccount, OffsetDateTime)>,
    /// How many accounts have a good identity now.
    pub good: usize,
    /// How many of them were issued in this pass; the others were still good.
    pub issued: usize,
    /// Accounts whose place is taken by something that Mica did not write.
    pub foreign: usize,
    /// Accounts that have no good one yet, because something failed or nothing can be issued.
    pub waiting: usize,
    /// Identities that were removed with their accounts.
    pub removed: usize,
}

impl Report {
    /// More lines are not read by anybody.
    pub const SHOWN: usize = 20;
}

/// The loop may not sleep longer: a suspended machine, or a clock that was set, is noticed this late.
const LONGEST_SLEEP: Duration = Duration::from_secs(15);
/// A wall clock that moved this much against the monotonic one was set.
const CLOCK_STEP: Duration = Duration::from_secs(30);
/// Between attempts for one account, doubling.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// An issuer that cannot issue is asked again this often.
const ISSUER_RETRY: Duration = Duration::from_secs(15);
/// So many accounts are looked at, announced and served together.
const CHUNK: usize = 1_024;
/// So many failures of one kind are logged one by one.
const LOGGED: usize = 10;

/// Progress of a long piece of work: done, of how many.
pub type Progress = Box<dyn FnMut(usize, usize) + Send>;

/// The loop's state.
pub struct Reconciler<S> {
    authority: Arc<Authority>,
    sink: Arc<S>,
    options: Options,
    metrics: Metrics,
    entries: HashMap<ServiceAccount, Entry>,
    /// When to look at whom again; each account has one place here, which its entry knows.
    timers: BTreeSet<(OffsetDateTime, ServiceAccount)>,
    settled: bool,
    stop: watch::Receiver<bool>,
    progress: Progress,
    issuer_was_usable: bool,
}

struct Entry {
    desired: bool,
    /// Whether the source has spoken of it. If not, it was delivered by an earlier process, and may belong to a part of
    /// the source that cannot be read yet.
    named: bool,
    /// None when it has to be looked at.
    observed: Option<Observed>,
    failures: u8,
    timer: Option<OffsetDateTime>,
    /// As what it stands in the metrics.
    counted: Option<State>,
}

impl Entry {
    fn state(&self) -> Option<State> {
        match &self.observed {
            _ if !self.desired => None,
            Some(Observed::Foreign(_)) => Some(State::Foreign),
            Some(Observed::Good(_)) if self.failures == 0 => Some(State::Good),
            _ => Some(State::Waiting),
        }
    }
}

/// Why an account was not served.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Sink(#[from] sink::Error),
    #[error(transparent)]
    Authority(#[from] authority::Error),
    #[error(transparent)]
    Keys(#[from] keys::Error),
}

impl<S: Sink> Reconciler<S> {
    /// Begins with what the sink has recorded. Ends early when `stop` turns true.
    pub fn new(
        authority: Arc<Authority>,
        sink: Arc<S>,
        options: Options,
        metrics: Metrics,
        stop: watch::Receiver<bool>,
        progress: Progress,
    ) -> Self {
        Self {
            authority,
            sink,
            options,
            metrics,
            entries: HashMap::new(),
            timers: BTreeSet::new(),
            settled: false,
            stop,
            progress,
            issuer_was_usable: true,
        }
    }

    /// Runs until `stop`, or until nobody sends events any more. `first` hears of the first pass.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>, first: oneshot::Sender<Report>) {
        let mut first = Some(first);
        let mut clocks = (clock::now(), Instant::from(tokio::time::Instant::now()));
        loop {
            let wake = tokio::time::sleep(self.sleep(clock::now()));
            let mut stop = self.stop.clone();
            let event = tokio::select! {
                // The end first: a runtime that is going has no timers any more.
                biased;
                _ = stop.wait_for(|stop| *stop) => return,
                event = events.recv() => match event {
                    Some(event) => Some(event),
                    None => return,
                },
                () = wake => None,
            };
            let mut accounts = self.due(clock::now());
            accounts.extend(self.clock_was_set(&mut clocks));
            let is_source = matches!(event, Some(Event::Source(_)));
            if let Some(event) = event {
                accounts.extend(self.take(event));
            }
            if accounts.is_empty() && first.is_none() {
                continue;
            }
            let report = self.work(accounts).await;
            if is_source && let Some(first) = first.take() {
                // Nobody waits for it when the start has failed elsewhere.
                let _ = first.send(report);
            }
        }
    }

    fn sleep(&self, now: OffsetDateTime) -> Duration {
        match self.timers.first() {
            Some((at, _)) => (*at - now).try_into().unwrap_or(Duration::ZERO).min(LONGEST_SLEEP),
            None => LONGEST_SLEEP,
        }
    }

    /// Whose time has come.
    fn due(&mut self, now: OffsetDateTime) -> Vec<ServiceAccount> {
        let mut due = Vec::new();
        while self.timers.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, account)) = self.timers.pop_first() else { break };
            if let Some(entry) = self.entries.get_mut(&account) {
                entry.timer = None;
                if entry.failures > 0 {
                    entry.observed = None;
                }
            }
            due.push(account);
        }
        due
    }

    /// After the clock was set, everything is judged again: what was good may not be valid yet.
    fn clock_was_set(&mut self, clocks: &mut (OffsetDateTime, Instant)) -> Vec<ServiceAccount> {
        let now = (clock::now(), Instant::from(tokio::time::Instant::now()));
        let before = std::mem::replace(clocks, now);
        let drift = (now.0 - before.0) - time::Duration::try_from(now.1 - before.1).unwrap_or_default();
        if drift.unsigned_abs() < CLOCK_STEP {
            return Vec::new();
        }
        tracing::warn!(seconds = drift.whole_seconds(), "the clock was set; every identity is judged again");
        self.look_again(|_| true)
    }

    fn look_again(&mut self, which: impl Fn(&Entry) -> bool) -> Vec<ServiceAccount> {
        let mut accounts = Vec::new();
        for (account, entry) in &mut self.entries {
            if which(entry) {
                entry.observed = None;
                accounts.push(account.clone());
            }
        }
        accounts
    }

    /// Takes an event into the state, and tells whom it concerns.
    fn take(&mut self, event: Event) -> Vec<ServiceAccount> {
        match event {
            Event::Disturbed(accounts) => {
                for account in &accounts {
                    if let Some(entry) = self.entries.get_mut(account) {
                        entry.observed = None;
                    }
                }
                accounts
            }
            Event::Issuer => self.look_again(|entry| !matches!(entry.observed, Some(Observed::Good(_)))),
            Event::Source(change) => {
                let mut concerned = Vec::with_capacity(change.added.len() + change.removed.len());
                for (accounts, desired) in [(change.removed, false), (change.added, true)] {
                    for account in accounts {
                        self.note(&account, |entry| {
                            entry.desired = desired;
                            entry.named = true;
                        });
                        concerned.push(account);
                    }
                }
                if !self.settled {
                    // What was delivered by an earlier process: kept until all parts have been readable, then removed.
                    let known: Vec<_> = self
                        .sink
                        .recorded()
                        .into_iter()
                        .filter(|account| !self.entries.get(account).is_some_and(|entry| entry.desired))
                        .collect();
                    for account in known {
                        self.entry(&account);
                        concerned.push(account);
                    }
                }
                self.settled |= change.settled;
                concerned
            }
        }
    }

    fn entry(&mut self, account: &ServiceAccount) -> &mut Entry {
        self.entries.entry(account.clone()).or_insert(Entry {
            desired: false,
            named: false,
            observed: None,
            failures: 0,
            timer: None,
            counted: None,
        })
    }

    /// Looks at accounts, plans, and carries the plan out.
    async fn work(&mut self, mut accounts: Vec<ServiceAccount>) -> Report {
        accounts.sort();
        accounts.dedup();
        let mut report = Report::default();
        let mut faults = Vec::new();
        let total = accounts.len();
        let mut done = 0;
        for chunk in accounts.chunks(CHUNK) {
            let issuer = self.authority.issuer();
            let usable = self.issuer_is_usable(clock::now());
            let policy =
                Policy { lifetime: self.options.lifetime, issuer_not_after: issuer.window().not_after };
            let mut steps = Vec::with_capacity(chunk.len());
            for account in chunk {
                match self.plan(account, &policy).await {
                    Ok(planned) => steps.push((account, planned)),
                    Err(fault) => self.failed(account, fault, &mut faults),
                }
            }
            let fresh: Vec<_> = steps
                .iter()
                .filter(|(_, step)| usable && *step == Step::Deliver(Why::New))
                .map(|(account, _)| (*account).clone())
                .collect();
            if let Err(fault) = self.sink.announce(&fresh).await {
                tracing::error!(%fault, "cannot record who is about to be served");
            }
            for (account, planned) in steps {
                if *self.stop.borrow() {
                    return report;
                }
                match planned {
                    Step::Deliver(why) if !usable => {
                        self.wait(account, clock::now() + ISSUER_RETRY);
                        self.note(account, |entry| {
                            entry.failures = 0;
                            if why == Why::Renewal {
                                entry.observed = Some(Observed::Bad("its renewal is overdue".to_owned()));
                            }
                        });
                    }
                    Step::Deliver(why) => match self.deliver(account, &why).await {
                        Ok(good) => {
                            report.issued += 1;
                            self.metrics.delivered(&why);
                            self.wait(account, good.renew_at);
                            self.note(account, |entry| {
                                entry.observed = Some(Observed::Good(good));
                                entry.failures = 0;
                            });
                        }
                        Err(fault) => self.failed(account, fault, &mut faults),
                    },
                    Step::Remove => match self.sink.remove(account).await {
                        Ok(()) => {
                            report.removed += 1;
                            self.metrics.removed();
                            tracing::info!(%account, "identity removed, its account is gone");
                            self.forget(account);
                        }
                        Err(fault) => self.failed(account, fault.into(), &mut faults),
                    },
                    Step::Wait(at) => {
                        self.wait(account, at);
                        self.note(account, |entry| entry.failures = 0);
                    }
                    Step::Nothing => self.settle_down(account),
                }
                done += 1;
                (self.progress)(done, total);
                if let Some(entry) = self.entries.get(account) {
                    match (entry.state(), &entry.observed) {
                        (Some(State::Good), Some(Observed::Good(good))) => {
                            report.good += 1;
                            if report.shown.len() < Report::SHOWN {
                                report.shown.push((account.clone(), good.not_after));
                            }
                        }
                        (Some(State::Foreign), _) => report.foreign += 1,
                        _ => {}
                    }
                }
            }
        }
        // Those that could not be looked at as well.
        (self.progress)(total, total);
        let waits = |account| self.entries.get(account).is_some_and(|e| e.state() == Some(State::Waiting));
        report.waiting = accounts.iter().filter(|account| waits(account)).count();
        for (account, fault) in faults.iter().take(LOGGED) {
            tracing::error!(%account, %fault, "not served; trying again");
        }
        if faults.len() > LOGGED {
            tracing::error!(accounts = faults.len() - LOGGED, "and further accounts were not served");
        }
        report
    }

    fn issuer_is_usable(&mut self, now: OffsetDateTime) -> bool {
        let usable = self.authority.issuer().usable(now);
        if let (Err(fault), true) = (&usable, self.issuer_was_usable) {
            tracing::error!(%fault, "nothing can be issued; what was delivered stays");
        }
        self.issuer_was_usable = usable.is_ok();
        usable.is_ok()
    }

    /// Looks, unless it is known what is there, and decides.
    async fn plan(&mut self, account: &ServiceAccount, policy: &Policy) -> Result<Step, Fault> {
        if self.entries.get(account).is_none_or(|entry| entry.observed.is_none()) {
            let observed = self.observe(account).await?;
            let desired = self.entry(account).desired;
            if let Observed::Foreign(why) = &observed
                && desired
            {
                tracing::warn!(%account, %why, "not delivered: its place is taken by something that mica did not write");
            }
            self.note(account, |entry| entry.observed = Some(observed));
        }
        let settled = self.settled;
        let entry = self.entry(account);
        let observed = entry.observed.as_ref().unwrap_or(&Observed::Absent);
        Ok(step(entry.desired, settled || entry.named, observed, clock::now(), policy))
    }

    async fn observe(&self, account: &ServiceAccount) -> Result<Observed, Fault> {
        Ok(match self.sink.read(account).await? {
            Found::Absent => Observed::Absent,
            Found::Foreign(why) => Observed::Foreign(why),
            Found::Damaged(fault) => Observed::Bad(fault),
            // A key that others could read is not worth keeping.
            Found::Set(found) if found.loose.is_some() => Observed::Bad(found.loose.unwrap_or_default()),
            Found::Set(found) => {
                let id = account.spiffe_id(self.authority.trust_domain());
                let bundle = self.authority.issuer().bundle().clone();
                match judge(&found.set, &id, &bundle, clock::now()) {
                    Ok(good) => Observed::Good(good),
                    Err(fault) => Observed::Bad(fault),
                }
            }
        })
    }

    async fn deliver(&self, account: &ServiceAccount, why: &Why) -> Result<Good, Fault> {
        let key = keys::generate(self.options.key_kind)?;
        let id = account.spiffe_id(self.authority.trust_domain());
        let order = Order {
            profile: Profile::Workload { id: &id, dns: &[], proved_at: None },
            key: key.public(),
            lifetime: self.options.lifetime,
        };
        let grant = self.authority.issue(&order, clock::now(), &Cause::own(&why.to_string()))?;
        let set = CertificateSet {
            chain_pem: grant.chain_pem(),
            key_pem: key.to_pem(),
            roots_pem: grant.issuer.bundle().pem().clone(),
        };
        self.sink.publish(account, &set).await?;
        Ok(Good::of(grant.issued.validity, grant.issued.serial.bytes()))
    }

    fn failed(&mut self, account: &ServiceAccount, fault: Fault, faults: &mut Vec<(ServiceAccount, Fault)>) {
        self.metrics.failed();
        let entry = self.entry(account);
        let wait = FIRST_RETRY * 2u32.pow(u32::from(entry.failures.min(6)));
        let failures = entry.failures.saturating_add(1);
        self.wait(account, clock::now() + wait.min(LAST_RETRY));
        self.note(account, |entry| entry.failures = failures);
        faults.push((account.clone(), fault));
    }

    fn wait(&mut self, account: &ServiceAccount, at: OffsetDateTime) {
        let before = self.entry(account).timer.replace(at);
        if let Some(before) = before {
            self.timers.remove(&(before, account.clone()));
        }
        self.timers.insert((at, account.clone()));
    }

    /// Changes an entry and keeps the counts of states true.
    fn note(&mut self, account: &ServiceAccount, change: impl FnOnce(&mut Entry)) {
        let entry = self.entry(account);
        change(entry);
        let state = entry.state();
        let before = std::mem::replace(&mut entry.counted, state);
        self.metrics.moved(before, state);
    }

    /// Nothing to do: an account that nobody wants and that has nothing is forgotten.
    fn settle_down(&mut self, account: &ServiceAccount) {
        let entry = self.entry(account);
        if !entry.desired && matches!(entry.observed, Some(Observed::Absent | Observed::Foreign(_))) {
            self.forget(account);
        }
    }

    fn forget(&mut self, account: &ServiceAccount) {
        let Some(entry) = self.entries.remove(account) else { return };
        self.metrics.moved(entry.counted, None);
        if let Some(timer) = entry.timer {
            self.timers.remove(&(timer, account.clone()));
        }
    }
}
