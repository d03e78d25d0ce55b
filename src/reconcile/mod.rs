//! Source, plan, sink: the loop that gives every account its identity and keeps it fresh.
//!
//! One task owns all of this state. It sleeps until something happens or some certificate's time has come, and then has
//! work done on the accounts concerned and on no others. What is ready waits in a queue, and of some sinks many pieces of
//! work are under way at once, so that one that is slow or fails holds up no other.

mod metrics;
mod work;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

pub use metrics::Metrics;
pub use work::Judge;

use crate::authority::Authority;
use crate::core::key::KeyKind;
use crate::core::lifetime::Lifetime;
use crate::core::plan::{Observed, Why};
use crate::core::policy::Delivery;
use crate::core::refusal::Refusal;
use crate::core::spiffe::ServiceAccount;
use crate::sink::{self, Sink};
use crate::source::Change;
use crate::sys::clock;
use metrics::State;
use work::{Done, Fault, Job, Outcome, Worker};

/// What the loop is told.
#[derive(Debug)]
pub enum Event {
    /// The source speaks of other accounts.
    Source(Change),
    /// Others changed what was delivered.
    Disturbed(Vec<ServiceAccount>),
    /// A sink that tells what is there begins to tell all of it.
    Listing,
    /// It was seen what is there.
    Seen(ServiceAccount, Observed),
    /// All that is there has been told of since [`Event::Listing`].
    Listed,
    /// The authority has another issuer.
    Issuer,
}

/// What is delivered to an account, or why nothing is.
pub type Terms = Arc<dyn Fn(&ServiceAccount) -> Result<Delivery, Refusal> + Send + Sync>;
/// Hears what somebody should know of an account.
pub type Tell = Arc<dyn Fn(&ServiceAccount, News<'_>) + Send + Sync>;

/// What is delivered, and who is told.
#[derive(Clone)]
pub struct Options {
    /// What is delivered to whom.
    pub terms: Terms,
    /// Who hears of what.
    pub tell: Tell,
}

/// What somebody should know of an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News<'a> {
    /// Its place is taken by something that Mica did not write.
    Taken(&'a str),
    /// What was delivered was not good any more, and was delivered again.
    Repaired(&'a str),
    /// It asks for more than it may have.
    Refused(&'a str),
    /// It has no good certificate, again and again.
    NotServed(&'a str),
}

impl Options {
    /// The same for everybody, and nobody is told.
    pub fn fixed(lifetime: Lifetime, key_kind: KeyKind) -> Self {
        let delivery = Delivery { lifetime, key: (key_kind, false), dns: Vec::new(), refused: Vec::new() };
        Self { terms: Arc::new(move |_| Ok(delivery.clone())), tell: Arc::new(|_, _| {}) }
    }
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
/// A place that is taken, or in a namespace that goes, is looked at again this often.
const TAKEN_RETRY: Duration = Duration::from_secs(30);
/// So many repairs are done at once; each further one waits twice as long as the one before, since it undoes what
/// somebody does.
const REPAIRS: u8 = 20;
/// After so many failures in a row somebody is told.
const NOT_SERVED: u8 = 4;
const LONGEST_TRUCE: Duration = Duration::from_secs(5 * 60);
/// And after so long without one they are forgotten.
const PEACE: Duration = Duration::from_secs(10 * 60);
/// News of so few accounts are worked on before what waits already.
const FEW: usize = 64;
/// So many failures of one kind are logged one by one.
const LOGGED: usize = 10;

/// Progress of a long piece of work: done, of how many.
pub type Progress = Box<dyn FnMut(usize, usize) + Send>;

/// The loop's state.
pub struct Reconciler<S> {
    worker: Arc<Worker<S>>,
    metrics: Metrics,
    entries: HashMap<ServiceAccount, Entry>,
    /// When to look at whom again; each account has one place here, which its entry knows.
    timers: BTreeSet<(OffsetDateTime, ServiceAccount)>,
    /// Who is to be worked on; each account has one place here, which its entry knows.
    queue: VecDeque<ServiceAccount>,
    under_way: JoinSet<Vec<Done>>,
    settled: bool,
    /// How often all that is there has been told of.
    listing: u32,
    first: Option<First>,
    stop: watch::Receiver<bool>,
    progress: Progress,
    /// Since the queue was last empty.
    done: usize,
    faults: Vec<(ServiceAccount, Fault)>,
    further_faults: usize,
    issuer_was_usable: bool,
}

/// The first pass: over all that is known once the source has spoken, and all that is there has been told of.
struct First {
    sender: oneshot::Sender<Report>,
    source: bool,
    listed: bool,
    begun: bool,
    /// How many accounts have not been worked on yet.
    left: usize,
    report: Report,
}

struct Entry {
    desired: bool,
    /// Whether the source has spoken of it. If not, it was delivered by an earlier process, and may belong to a part of
    /// the source that cannot be read yet.
    named: bool,
    queued: bool,
    busy: bool,
    /// Something was told of it while it was worked on, so that it has to be looked at.
    dirty: bool,
    /// Whether the first pass waits for it.
    first: bool,
    failures: u8,
    repairs: u8,
    /// As of which listing it is known.
    listing: u32,
    /// None when it has to be looked at.
    observed: Option<Observed>,
    timer: Option<OffsetDateTime>,
    /// In seconds since 1970.
    repaired_at: i64,
    /// As what it stands in the metrics.
    counted: Option<State>,
}

impl Entry {
    fn state(&self) -> Option<State> {
        match &self.observed {
            _ if !self.desired => None,
            Some(Observed::Foreign(_)) => Some(State::Foreign),
            Some(Observed::Good(_) | Observed::Unmarked(_)) if self.failures == 0 => Some(State::Good),
            _ => Some(State::Waiting),
        }
    }

    /// When it may be repaired, after so many repairs.
    fn repair_at(&mut self) -> OffsetDateTime {
        let last =
            OffsetDateTime::from_unix_timestamp(self.repaired_at).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        if clock::now() - last > PEACE {
            self.repairs = 0;
        }
        match self.repairs.checked_sub(REPAIRS) {
            None => OffsetDateTime::UNIX_EPOCH,
            Some(more) => last + (FIRST_RETRY * 2u32.pow(u32::from(more.min(8)) + 1)).min(LONGEST_TRUCE),
        }
    }
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
        let judge = Judge::new(authority.clone(), options.terms.clone());
        metrics.begin();
        Self {
            worker: Arc::new(Worker {
                authority,
                judge,
                sink,
                options,
                metrics: metrics.clone(),
                stop: stop.clone(),
            }),
            metrics: metrics.clone(),
            entries: HashMap::new(),
            timers: BTreeSet::new(),
            queue: VecDeque::new(),
            under_way: JoinSet::new(),
            settled: false,
            listing: 0,
            first: None,
            stop,
            progress,
            done: 0,
            faults: Vec::new(),
            further_faults: 0,
            issuer_was_usable: true,
        }
    }

    /// Runs until `stop`, or until nobody sends events any more. `first` hears of the first pass.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>, first: oneshot::Sender<Report>) {
        self.first = Some(First {
            sender: first,
            source: false,
            listed: !S::TELLS,
            begun: false,
            left: 0,
            report: Report::default(),
        });
        let mut clocks = (clock::now(), Instant::from(tokio::time::Instant::now()));
        loop {
            if self.work().await {
                return;
            }
            let sleep = if self.is_ready() { Duration::ZERO } else { self.sleep(clock::now()) };
            let wake = tokio::time::sleep(sleep);
            let mut stop = self.stop.clone();
            tokio::select! {
                // The end first: a runtime that is going has no timers any more.
                biased;
                _ = stop.wait_for(|stop| *stop) => return,
                event = events.recv() => match event {
                    Some(event) => self.take(event),
                    None => return,
                },
                Some(done) = self.under_way.join_next() => self.joined(done),
                () = wake => {}
            }
            // Neither what is told nor what is done waits for all of the other.
            while let Some(done) = self.under_way.try_join_next() {
                self.joined(done);
            }
            let mut accounts = self.due(clock::now());
            accounts.extend(self.clock_was_set(&mut clocks));
            self.ready(accounts);
        }
    }

    /// Whether work could be begun at once.
    fn is_ready(&self) -> bool {
        !self.queue.is_empty() && self.is_open() && self.under_way.len() < S::AT_ONCE
    }

    /// Nothing is done before it is known what there is to do.
    fn is_open(&self) -> bool {
        self.first.as_ref().is_none_or(|first| first.begun)
    }

    /// Has work done, as much as may be under way at once. Tells whether Mica stops.
    async fn work(&mut self) -> bool {
        self.begin_first_pass();
        while self.is_ready() {
            let usable = self.issuer_is_usable(clock::now());
            let mut jobs = Vec::with_capacity(S::TOGETHER.min(self.queue.len()));
            while jobs.len() < S::TOGETHER
                && let Some(account) = self.queue.pop_front()
            {
                let Some(entry) = self.entries.get_mut(&account) else { continue };
                entry.queued = false;
                entry.busy = true;
                jobs.push(Job {
                    desired: entry.desired,
                    settled: self.settled || entry.named,
                    observed: entry.observed.clone(),
                    repair_at: entry.repair_at(),
                    account,
                });
            }
            let work = self.worker.clone().work(jobs, usable);
            if S::AT_ONCE > 1 {
                self.under_way.spawn(work);
            } else {
                let done = work.await;
                if self.finish(done) {
                    return true;
                }
                break;
            }
        }
        self.end_first_pass();
        if self.queue.is_empty() && self.under_way.is_empty() {
            self.pause();
        }
        false
    }

    fn joined(&mut self, done: Result<Vec<Done>, tokio::task::JoinError>) {
        match done {
            Ok(done) => {
                self.finish(done);
            }
            Err(fault) if fault.is_panic() => std::panic::resume_unwind(fault.into_panic()),
            Err(_) => {}
        }
    }

    /// Nothing is left to do for now.
    fn pause(&mut self) {
        if self.done > 0 {
            // Those that could not be looked at as well.
            (self.progress)(self.done, self.done);
            self.done = 0;
        }
        for (account, fault) in self.faults.drain(..) {
            tracing::error!(%account, %fault, "not served; trying again");
        }
        if self.further_faults > 0 {
            let accounts = std::mem::take(&mut self.further_faults);
            tracing::error!(accounts, "and further accounts were not served");
        }
    }

    fn begin_first_pass(&mut self) {
        let Some(first) = &mut self.first else { return };
        if first.begun || !first.source || !first.listed {
            return;
        }
        first.begun = true;
        let mut accounts: Vec<_> = self.entries.keys().cloned().collect();
        accounts.sort_unstable();
        first.left = accounts.len();
        for account in &accounts {
            if let Some(entry) = self.entries.get_mut(account) {
                entry.first = true;
                entry.queued = true;
            }
        }
        self.queue = accounts.into();
    }

    fn end_first_pass(&mut self) {
        let Some(mut first) = self.first.take_if(|first| first.begun && first.left == 0) else { return };
        let mut good = Vec::new();
        for (account, entry) in &self.entries {
            match (entry.state(), &entry.observed) {
                (Some(State::Good), Some(Observed::Good(set) | Observed::Unmarked(set))) => {
                    good.push((account, set.not_after));
                }
                (Some(State::Foreign), _) => first.report.foreign += 1,
                (Some(State::Waiting), _) => first.report.waiting += 1,
                _ => {}
            }
        }
        first.report.good = good.len();
        if good.len() > Report::SHOWN {
            good.select_nth_unstable(Report::SHOWN);
            good.truncate(Report::SHOWN);
        }
        good.sort_unstable();
        first.report.shown = good.into_iter().map(|(account, until)| (account.clone(), until)).collect();
        // Nobody waits for it when the start has failed elsewhere.
        let _ = first.sender.send(first.report);
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
                if entry.failures > 0 || matches!(entry.observed, Some(Observed::Foreign(_))) {
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
                entry.dirty = entry.busy;
                accounts.push(account.clone());
            }
        }
        accounts
    }

    /// Has accounts worked on.
    fn ready(&mut self, mut accounts: Vec<ServiceAccount>) {
        // In one order, whatever they were found by.
        accounts.sort_unstable();
        let few = accounts.len() <= FEW;
        for account in accounts.into_iter().rev() {
            let Some(entry) = self.entries.get_mut(&account) else { continue };
            // One that is busy is looked at again when that is over, if there is a reason.
            if entry.queued || entry.busy {
                continue;
            }
            entry.queued = true;
            if few {
                self.queue.push_front(account);
            } else {
                self.queue.push_back(account);
            }
        }
    }

    /// Takes an event into the state, and has those worked on whom it concerns.
    fn take(&mut self, event: Event) {
        let concerned = match event {
            Event::Disturbed(accounts) => {
                for account in &accounts {
                    if let Some(entry) = self.entries.get_mut(account) {
                        entry.observed = None;
                        entry.dirty = entry.busy;
                    }
                }
                accounts
            }
            Event::Issuer => self.look_again(|entry| !matches!(entry.observed, Some(Observed::Good(_)))),
            Event::Source(change) => self.take_change(change),
            Event::Seen(account, observed) => self.take_seen(account, observed),
            Event::Listing => {
                self.listing = self.listing.wrapping_add(1);
                Vec::new()
            }
            Event::Listed => {
                if let Some(first) = &mut self.first {
                    first.listed = true;
                }
                self.not_listed()
            }
        };
        self.ready(concerned);
    }

    fn take_change(&mut self, change: Change) -> Vec<ServiceAccount> {
        let mut concerned = Vec::with_capacity(change.added.len() + change.removed.len());
        // What is not there needs no look to be known.
        let unseen = || if S::TELLS { Some(Observed::Absent) } else { None };
        for (accounts, desired) in [(change.removed, false), (change.added, true)] {
            for account in accounts {
                let is_new = !self.entries.contains_key(&account);
                self.note(&account, |entry| {
                    entry.dirty |= entry.busy;
                    // Another account of the same name, if it is named again.
                    entry.observed = match entry.observed.take() {
                        None if is_new => unseen(),
                        Some(Observed::Absent) if S::TELLS => unseen(),
                        _ if desired => None,
                        known => known,
                    };
                    entry.desired = desired;
                    entry.named = true;
                });
                concerned.push(account);
            }
        }
        if !self.settled {
            // What was delivered by an earlier process: kept until all parts have been readable, then removed.
            let known: Vec<_> = self
                .worker
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
        if let Some(first) = &mut self.first {
            first.source = true;
        }
        concerned
    }

    fn take_seen(&mut self, account: ServiceAccount, observed: Observed) -> Vec<ServiceAccount> {
        let listing = self.listing;
        match self.entries.get_mut(&account) {
            Some(entry) if entry.busy => {
                entry.dirty = true;
                entry.listing = listing;
                return Vec::new();
            }
            None if matches!(observed, Observed::Absent | Observed::Foreign(_)) => return Vec::new(),
            _ => {}
        }
        self.tell_foreign(&account, &observed);
        self.note(&account, |entry| {
            entry.listing = listing;
            entry.failures = 0;
            entry.observed = Some(observed);
        });
        vec![account]
    }

    /// What was not told of in a list of all is not there.
    fn not_listed(&mut self) -> Vec<ServiceAccount> {
        let listing = self.listing;
        let is_missing = |entry: &Entry| {
            let is_known = matches!(entry.observed, None | Some(Observed::Absent | Observed::Foreign(_)));
            entry.listing != listing && !entry.busy && !is_known
        };
        let missing: Vec<_> = self
            .entries
            .iter()
            .filter(|(_, entry)| is_missing(entry))
            .map(|(account, _)| account.clone())
            .collect();
        for account in &missing {
            self.note(account, |entry| entry.observed = Some(Observed::Absent));
        }
        missing
    }

    fn entry(&mut self, account: &ServiceAccount) -> &mut Entry {
        self.entries.entry(account.clone()).or_insert(Entry {
            desired: false,
            named: false,
            queued: false,
            busy: false,
            dirty: false,
            first: false,
            failures: 0,
            repairs: 0,
            listing: 0,
            observed: None,
            timer: None,
            repaired_at: 0,
            counted: None,
        })
    }

    fn issuer_is_usable(&mut self, now: OffsetDateTime) -> bool {
        let usable = self.worker.authority.issuer().usable(now);
        if let (Err(fault), true) = (&usable, self.issuer_was_usable) {
            tracing::error!(%fault, "nothing can be issued; what was delivered stays");
        }
        self.issuer_was_usable = usable.is_ok();
        usable.is_ok()
    }

    /// Takes what was done into the state. Tells whether Mica stops.
    fn finish(&mut self, done: Vec<Done>) -> bool {
        let listing = self.listing;
        for Done { account, observed, outcome } in done {
            let Some(entry) = self.entries.get_mut(&account) else { continue };
            entry.busy = false;
            entry.listing = listing;
            let dirty = std::mem::take(&mut entry.dirty);
            let is_first = std::mem::take(&mut entry.first);
            if let Some(observed) = &observed {
                self.tell_foreign(&account, observed);
            }
            match outcome {
                Outcome::Stopped => return true,
                Outcome::Delivered(why, good) => {
                    if let Some(first) = &mut self.first {
                        first.report.issued += 1;
                    }
                    self.metrics.delivered(&why);
                    if let Why::Repair(fault) = &why {
                        (self.worker.options.tell)(&account, News::Repaired(fault));
                    }
                    let is_repair = matches!(why, Why::Repair(_));
                    self.wait(&account, good.renew_at);
                    let now = clock::now();
                    self.note(&account, |entry| {
                        entry.observed = Some(Observed::Good(good));
                        entry.failures = 0;
                        if is_repair {
                            entry.repairs = entry.repairs.saturating_add(1);
                            entry.repaired_at = now.unix_timestamp();
                        }
                    });
                }
                Outcome::Marked(good) => {
                    tracing::info!(%account, "taken over as it is");
                    self.wait(&account, good.renew_at);
                    self.note(&account, |entry| {
                        entry.observed = Some(Observed::Good(good));
                        entry.failures = 0;
                    });
                }
                Outcome::Removed => {
                    if let Some(first) = &mut self.first {
                        first.report.removed += 1;
                    }
                    self.metrics.removed();
                    tracing::info!(%account, "identity removed, its account is gone");
                    if dirty {
                        self.note(&account, |entry| entry.observed = None);
                    } else {
                        self.forget(&account);
                    }
                }
                Outcome::Wait(at) => {
                    self.wait(&account, at);
                    self.note(&account, |entry| {
                        entry.observed = observed;
                        entry.failures = 0;
                    });
                }
                Outcome::Nothing => {
                    self.note(&account, |entry| entry.observed = observed);
                    self.settle_down(&account, dirty);
                }
                Outcome::NoIssuer(why) => {
                    self.wait(&account, clock::now() + ISSUER_RETRY);
                    self.note(&account, |entry| {
                        entry.failures = 0;
                        entry.observed = match why {
                            Why::Renewal => Some(Observed::Bad("its renewal is overdue".to_owned())),
                            Why::New | Why::Repair(_) => observed,
                        };
                    });
                }
                Outcome::Failed(fault) => self.failed(&account, observed, fault),
            }
            self.done += 1;
            let total = self.done + self.queue.len() + self.under_way.len();
            (self.progress)(self.done, total);
            if let (Some(first), true) = (&mut self.first, is_first) {
                first.left -= 1;
            }
            if dirty && self.entries.contains_key(&account) {
                self.note(&account, |entry| entry.observed = None);
                self.ready(vec![account]);
            }
        }
        false
    }

    fn tell_foreign(&self, account: &ServiceAccount, observed: &Observed) {
        let Observed::Foreign(why) = observed else { return };
        let Some(entry) = self.entries.get(account) else { return };
        if entry.desired && entry.counted != Some(State::Foreign) {
            tracing::warn!(%account, %why, "not delivered: its place is taken by something that mica did not write");
            (self.worker.options.tell)(account, News::Taken(why));
        }
    }

    fn failed(&mut self, account: &ServiceAccount, observed: Option<Observed>, fault: Fault) {
        let now = clock::now();
        match fault {
            Fault::Sink(sink::Error::Foreign { why, .. }) => {
                let observed = Observed::Foreign(why);
                self.tell_foreign(account, &observed);
                self.note(account, |entry| entry.observed = Some(observed));
                return self.wait(account, now + jittered(TAKEN_RETRY, account, 0));
            }
            Fault::Sink(sink::Error::Ending) => {
                self.note(account, |entry| entry.observed = observed);
                return self.wait(account, now + jittered(TAKEN_RETRY, account, 0));
            }
            Fault::Refused(ref refusal) => {
                (self.worker.options.tell)(account, News::NotServed(&refusal.sentence));
                if self.entry(account).failures == 0 {
                    tracing::warn!(%account, sentence = %refusal.sentence, detail = refusal.detail, "not delivered: policy does not allow it");
                }
                self.note(account, |entry| {
                    entry.observed = observed;
                    entry.failures = 1;
                });
                return self.wait(account, now + jittered(TAKEN_RETRY, account, 0));
            }
            _ => {}
        }
        let entry = self.entry(account);
        let failures = entry.failures.saturating_add(1);
        let wait = match fault {
            // It was somebody's turn to be first.
            Fault::Sink(sink::Error::Changed) if failures == 1 => Duration::ZERO,
            _ => jittered(
                (FIRST_RETRY * 2u32.pow(u32::from(failures.min(7)) - 1)).min(LAST_RETRY),
                account,
                failures,
            ),
        };
        self.wait(account, now + wait);
        self.note(account, |entry| entry.failures = failures);
        if wait.is_zero() {
            return;
        }
        self.metrics.failed();
        if failures == NOT_SERVED {
            (self.worker.options.tell)(account, News::NotServed(&fault.to_string()));
        }
        if self.faults.len() < LOGGED {
            self.faults.push((account.clone(), fault));
        } else {
            self.further_faults += 1;
        }
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
    fn settle_down(&mut self, account: &ServiceAccount, dirty: bool) {
        let entry = self.entry(account);
        let is_absent = matches!(entry.observed, Some(Observed::Absent | Observed::Foreign(_)));
        match entry.desired {
            true if matches!(entry.observed, Some(Observed::Foreign(_))) => {
                self.wait(account, clock::now() + jittered(TAKEN_RETRY, account, 0));
            }
            false if is_absent && !dirty => self.forget(account),
            _ => {}
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

/// Between half of it and all of it, other for each account and each time, so that many do not come back together.
fn jittered(wait: Duration, account: &ServiceAccount, time: u8) -> Duration {
    let mut hasher = DefaultHasher::new();
    (account, time).hash(&mut hasher);
    wait / 2
        + wait.mul_f64(
            f64::from(u32::try_from(hasher.finish() >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX) / 2.0,
        )
}

#[cfg(test)]
mod tests;
