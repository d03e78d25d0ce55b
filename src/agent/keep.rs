//! The loop that keeps what is held fresh. It goes by the wall clock, on which certificates end, and looks at it every
//! few seconds, so that a clock that is set and a machine that slept are noticed.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::convert::Infallible;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};
use tokio::task::{self, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use super::ask::{Credentials, Error};
use super::held::{Authorities, Bundles, Svid};
use super::{Agent, Wish, Wishes};
use crate::client;
use crate::core::bundle::TrustBundle;
use crate::core::certificate::Certificate;
use crate::core::inspect::one_line;
use crate::core::lifetime::shown;
use crate::core::rotation::{Due, Now, renew_from, retry_after};
use crate::core::spiffe::{SpiffeId, TrustDomain};
use crate::core::window::Window;
use crate::core::{chain, granted};
use crate::proto::mica::v1::{Bundle, WatchBundlesResponse};
use crate::sys::{clock, files, keys};
use crate::trace::{Span, Tracer};

/// A request that takes longer has failed.
const ANSWER: Duration = Duration::from_secs(45);
/// A clock that was set, or a machine that slept, is noticed this late.
const LOOK: Duration = Duration::from_secs(5);
/// And credentials that were changed, as long as something waits for them.
const LOOK_AT_FILES: Duration = Duration::from_secs(1);
/// What the authority wants renewed early is renewed within this time.
const SPREAD: Duration = Duration::from_secs(300);

/// Keeps all identities that are wanted, for ever.
pub async fn keep(agent: Arc<Agent>, mut wanted: mpsc::UnboundedReceiver<SpiffeId>) {
    let (hint, mut hints) = watch::channel(None);
    let mut keeper = Keeper {
        agent: agent.clone(),
        entries: HashMap::new(),
        alone: VecDeque::new(),
        together: VecDeque::new(),
        tasks: JoinSet::new(),
        under_way: HashMap::new(),
        window: Window::default(),
        judged: None,
        hint,
    };
    if agent.wishes.own.is_some() {
        keeper.begin(agent.own.borrow().clone());
    }
    let mut bundles = agent.held.bundles();
    let mut follow = pin!(follow_bundles(agent.clone(), keeper.hint.clone()));
    let mut files = Files::default();
    loop {
        let wait = keeper.ask_for_what_is_due();
        tokio::select! {
            Some(ended) = keeper.tasks.join_next_with_id(), if !keeper.tasks.is_empty() => {
                match ended {
                    Ok((task, (took, all))) => {
                        keeper.under_way.remove(&task);
                        all.into_iter().for_each(|(key, outcome)| keeper.settle(key, took, outcome));
                    }
                    Err(fault) => keeper.ask_again(&fault),
                }
            }
            Some(id) = wanted.recv() => {
                keeper.begin(Some(id));
                while let Ok(id) = wanted.try_recv() {
                    keeper.begin(Some(id));
                }
            }
            Ok(()) = bundles.changed() => keeper.judge_again(),
            Ok(()) = hints.changed() => {
                let before = *hints.borrow_and_update();
                keeper.hurry(before);
            }
            never = &mut follow => match never {},
            () = sleep(wait) => {
                let failing = keeper.entries.values().any(|entry| entry.failures > 0);
                if failing && files.changed(&agent.wishes) {
                    keeper.try_failed_now();
                }
            }
        }
    }
}

type Key = Option<SpiffeId>;
type Outcome = Result<(Svid, TrustBundle), Arc<Error>>;

/// One identity that is being asked for.
struct Asked {
    key: Key,
    wish: Wish,
    held: Option<Arc<Svid>>,
    span: Span,
}

/// One identity that is kept.
struct Entry {
    /// When it is asked for next.
    due: Due,
    failures: u32,
    /// The request that is under way.
    asked: Option<task::Id>,
    svid: Option<Arc<Svid>>,
    /// From when it was wanted, or was due, until there is a certificate.
    span: Option<Span>,
}

impl Entry {
    /// How long nothing is to be asked.
    fn left(&self, now: Now) -> Duration {
        match self.failures == 0 && self.is_early(now) {
            true => Duration::ZERO,
            false => self.due.left(now),
        }
    }

    /// Whether what is held is not valid yet, since the clock was set back: whoever goes by this clock refuses it.
    fn is_early(&self, now: Now) -> bool {
        self.svid.as_ref().is_some_and(|svid| svid.chain[0].validity.not_before > now.wall)
    }
}

struct Keeper {
    agent: Arc<Agent>,
    /// None is the agent's own identity, as long as nobody knows it.
    entries: HashMap<Key, Entry>,
    /// What was due when it was last looked for, and has to wait for room: what is asked for alone,
    alone: VecDeque<Key>,
    /// and what one token speaks for, so that one call asks for several.
    together: VecDeque<Key>,
    /// Each for one identity, or for several at once; and how long that took.
    tasks: JoinSet<(Duration, Vec<(Key, Outcome)>)>,
    /// For how many.
    under_way: HashMap<task::Id, usize>,
    window: Window,
    /// The roots that all that is held was judged by.
    judged: Option<TrustBundle>,
    /// What was issued before is to be renewed early.
    hint: watch::Sender<Option<OffsetDateTime>>,
}

impl Keeper {
    fn begin(&mut self, key: Key) {
        let svid = key.as_ref().and_then(|id| self.agent.held.current(id)).flatten();
        if svid.is_some() {
            self.judged = None;
        }
        let now = clock::both();
        let due = Due::at(svid.as_ref().map_or(now.wall, |svid| svid.renew_at), now);
        let tracer = &self.agent.tracer;
        self.entries.entry(key).or_insert_with(|| {
            let span = svid.is_none().then(|| begun(tracer, "new"));
            Entry { due, failures: 0, asked: None, svid, span }
        });
    }

    /// Sends what can be sent, and says how long nothing else is due.
    fn ask_for_what_is_due(&mut self) -> Duration {
        let mut wait = LOOK;
        let mut has_looked = false;
        loop {
            if self.nothing_waits() && !has_looked {
                wait = self.line_up();
                has_looked = true;
            }
            // Whatever ends makes room, and wakes the loop.
            let room = self.window.size().saturating_sub(self.under_way.values().sum());
            let next = self.next(room);
            if !next.is_empty() {
                self.ask(next);
            } else if has_looked || !self.nothing_waits() {
                return wait;
            }
        }
    }

    fn nothing_waits(&self) -> bool {
        self.alone.is_empty() && self.together.is_empty()
    }

    /// One that is asked for alone, or several of the others, half of the window at most: while the authority works on
    /// these, the next are made ready. If more wait than there is room for, they wait until half of it is free, or there
    /// would never be room for more than one.
    fn next(&mut self, room: usize) -> Vec<Asked> {
        while room > 0
            && let Some(key) = self.alone.pop_front()
        {
            if let Some(asked) = self.asked(key) {
                return vec![asked];
            }
        }
        let half = self.window.size() / 2;
        let mut several = Vec::new();
        if room < half && self.together.len() > room {
            return several;
        }
        while several.len() < room.min(half)
            && let Some(key) = self.together.pop_front()
        {
            several.extend(self.asked(key));
        }
        several
    }

    /// Whether one token speaks for this identity and others. What has failed may hold up others, and is asked for alone.
    fn is_for_several(&self, key: &Key, entry: &Entry) -> bool {
        let Some(wish) = key.as_ref().map(|id| self.agent.wish(id)) else { return false };
        entry.failures == 0
            && wish.impersonated
            && wish.credentials.token.is_some()
            && self.agent.asker.may_ask_for_several()
    }

    /// Puts what is due into its line, the longest due first, and says how long nothing else is.
    fn line_up(&mut self) -> Duration {
        let now = clock::both();
        let mut wait = LOOK;
        let mut due: Vec<(Due, &Key, &Entry)> = Vec::new();
        for (key, entry) in self.entries.iter().filter(|(_, entry)| entry.asked.is_none()) {
            match entry.left(now) {
                Duration::ZERO => due.push((entry.due, key, entry)),
                left => wait = wait.min(left),
            }
            if entry.failures > 0 {
                wait = wait.min(LOOK_AT_FILES);
            }
        }
        due.sort_unstable_by_key(|(due, key, _)| (*due, *key));
        let (together, alone): (Vec<_>, Vec<_>) =
            due.into_iter().partition(|(_, key, entry)| self.is_for_several(key, entry));
        [self.together, self.alone] =
            [together, alone].map(|line| line.into_iter().map(|(_, key, _)| key.clone()).collect());
        wait
    }

    /// What is to be asked for an identity, if it is still wanted.
    fn asked(&mut self, key: Key) -> Option<Asked> {
        let wish = match &key {
            // Wanted by nobody any more.
            Some(id) if self.agent.held.current(id).is_none() => {
                self.entries.remove(&key);
                tracing::info!(identity = %id, "identity is not wanted any more");
                return None;
            }
            Some(id) => self.agent.wish(id),
            None => self.agent.own_wish(),
        };
        let entry = self.entries.get_mut(&key).filter(|entry| entry.asked.is_none())?;
        if entry.failures == 0 && entry.is_early(clock::both()) {
            tracing::warn!(identity = ?key, "the clock was set back: the certificate is not valid yet, and is renewed at once");
        }
        let span = entry.span.get_or_insert_with(|| begun(&self.agent.tracer, "renewal")).part("obtain");
        let held = entry.svid.clone();
        Some(Asked { key, wish, held, span })
    }

    fn ask(&mut self, all: Vec<Asked>) {
        let keys: Vec<Key> = all.iter().map(|asked| asked.key.clone()).collect();
        let agent = self.agent.clone();
        let task = self.tasks.spawn(async move {
            let begun = Instant::now();
            let outcomes = obtain(&agent, all).await;
            (begun.elapsed(), outcomes)
        });
        self.under_way.insert(task.id(), keys.len());
        for key in keys {
            if let Some(entry) = self.entries.get_mut(&key) {
                entry.asked = Some(task.id());
            }
        }
    }

    /// A request that a fault of ours ended is a failure as any other: its identity is not forgotten.
    fn ask_again(&mut self, fault: &task::JoinError) {
        tracing::error!(%fault, "a request ended by itself");
        self.under_way.remove(&fault.id());
        for entry in self.entries.values_mut().filter(|entry| entry.asked == Some(fault.id())) {
            self.agent.metrics.failed("fault");
            entry.asked = None;
            entry.failures = entry.failures.saturating_add(1);
            entry.due = Due::after(retry_after(entry.failures, None, draw()), clock::both());
        }
    }

    fn settle(&mut self, key: Key, took: Duration, outcome: Outcome) {
        match &outcome {
            Ok(_) => self.window.answered(took),
            Err(_) => self.window.failed(),
        }
        let now = clock::both();
        let Some(mut entry) = self.entries.remove(&key) else { return };
        entry.asked = None;
        let (mut svid, bundle) = match outcome {
            Ok(got) => got,
            Err(error) => {
                entry.failures = entry.failures.saturating_add(1);
                let left = entry.svid.as_ref().and_then(|svid| (svid.not_after() - now.wall).try_into().ok());
                let wait = retry_after(entry.failures, left, draw());
                entry.due = Due::after(wait, now);
                let identity = key.as_ref().map_or("the agent's own", SpiffeId::as_str);
                let held_for = left.map_or(0, |left| left.as_secs());
                tracing::warn!(
                    identity,
                    fault = %error,
                    retry_after_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                    held_for,
                    "certificate not obtained"
                );
                self.agent.metrics.failed(error.reason());
                self.entries.insert(key, entry);
                return;
            }
        };
        if let Some(mut span) = entry.span.take() {
            span.set("mica.identity", &svid.id);
            svid.trace = span.context();
        }
        svid.renew_at = renew_from(svid.renew_at, svid.not_after(), now.wall);
        let svid = Arc::new(svid);
        entry.failures = 0;
        entry.due = Due::at(svid.renew_at, now);
        entry.svid = Some(svid.clone());
        let leaf = &svid.chain[0];
        tracing::info!(
            identity = %svid.id,
            serial = %leaf.serial_text(),
            not_after = %shown(svid.not_after()),
            renew_at = %shown(svid.renew_at),
            "certificate obtained"
        );
        self.agent.metrics.obtained();
        // The bundle first: whoever sees the certificate may look for it at once.
        self.take_own_bundle(svid.id.trust_domain(), bundle);
        if key.is_none() {
            self.agent.own.send_replace(Some(svid.id.clone()));
            self.agent.held.pin(&svid.id);
        }
        self.agent.held.put(svid.clone());
        self.entries.insert(Some(svid.id.clone()), entry);
    }

    /// The roots that came with a certificate. What else is known of other trust domains stays.
    fn take_own_bundle(&self, domain: &TrustDomain, x509: TrustBundle) {
        let held = self.agent.held.bundles().borrow().clone();
        let bundles = match held.as_deref().filter(|held| held.own == *domain) {
            Some(held) if held.roots().is_some_and(|known| known.same_roots(&x509)) => return,
            Some(held) => {
                let mut bundles = held.clone();
                let authorities =
                    bundles.domains.entry(domain.clone()).or_insert(Authorities { x509: None, jwt: None });
                authorities.x509 = Some(x509);
                bundles
            }
            None => Bundles::new(domain.clone(), x509),
        };
        self.agent.held.put_bundles(bundles);
    }

    /// What peers refuse that hold the roots as they are now is replaced at once.
    fn judge_again(&mut self) {
        let Some(bundles) = self.agent.held.bundles().borrow().clone() else { return };
        let Some(roots) = bundles.roots() else { return };
        // Another bundle that was taken, with the same roots, changes nothing.
        if self.judged.as_ref().is_some_and(|judged| judged.same_roots(roots)) {
            return;
        }
        self.judged = Some(roots.clone());
        let now = clock::both();
        for (key, entry) in &mut self.entries {
            let Some(svid) = &entry.svid else { continue };
            let refused = chain::verify(&svid.chain, roots, Some(&svid.id), now.wall).is_err();
            if refused && entry.failures == 0 && !entry.left(now).is_zero() && svid.not_after() > now.wall {
                tracing::warn!(identity = ?key, "the roots have changed: the certificate is renewed at once");
                entry.due = Due::after(Duration::ZERO, now);
            }
        }
    }

    fn hurry(&mut self, issued_before: Option<OffsetDateTime>) {
        let Some(before) = issued_before else { return };
        let now = clock::both();
        for entry in self.entries.values_mut() {
            let Some(svid) = &entry.svid else { continue };
            if svid.chain[0].validity.issued_at() < before {
                let left = (svid.not_after() - now.wall).try_into().unwrap_or(Duration::ZERO);
                let within = SPREAD.min(left / 4).as_secs_f64();
                #[expect(clippy::cast_precision_loss, reason = "a random moment needs no precision")]
                let fraction = draw() as f64 / u64::MAX as f64;
                let within = Duration::from_secs_f64(within * fraction);
                if within < entry.due.left(now) {
                    entry.due = Due::after(within, now);
                }
            }
        }
    }

    fn try_failed_now(&mut self) {
        let now = Due::after(Duration::ZERO, clock::both());
        for entry in self.entries.values_mut().filter(|entry| entry.failures > 0 && entry.asked.is_none()) {
            (entry.due, entry.failures) = (now, 1);
        }
    }
}

fn begun(tracer: &Tracer, why: &'static str) -> Span {
    let mut span = tracer.begin("certificate");
    span.set("mica.why", why);
    span
}

/// Asks for one identity, or for several at once.
async fn obtain(agent: &Agent, all: Vec<Asked>) -> Vec<(Key, Outcome)> {
    let begun = Instant::now();
    let outcomes = certificates(agent, &all).await;
    let settled = all.into_iter().zip(outcomes).map(|(Asked { key, mut span, .. }, outcome)| {
        agent.metrics.asked(begun.elapsed());
        let outcome = outcome.and_then(|got| accepted(agent, got).map_err(Arc::new));
        match &outcome {
            Ok((svid, _)) => span.set("mica.identity", &svid.id),
            Err(error) => span.fail(error.reason()),
        }
        (key, outcome)
    });
    settled.collect()
}

async fn certificates(agent: &Agent, all: &[Asked]) -> Vec<Outcome> {
    let asker = &agent.asker;
    let bundles = agent.held.bundles().borrow().clone();
    let roots = bundles.as_deref().and_then(Bundles::roots);
    let slow =
        || Error::Client(client::Error::Slow { address: asker.address(), what: "answer", within: ANSWER });
    if all.len() > 1 {
        let wishes: Vec<_> = all.iter().map(|asked| (&asked.wish, &asked.span)).collect();
        match timeout(ANSWER, asker.certificates(&wishes, roots)).await.unwrap_or_else(|_| Err(slow())) {
            Ok(Some(outcomes)) => return outcomes.into_iter().map(|one| one.map_err(Arc::new)).collect(),
            Ok(None) => {}
            Err(error) => {
                let error = Arc::new(error);
                return all.iter().map(|_| Err(error.clone())).collect();
            }
        }
    }
    let mut outcomes = Vec::with_capacity(all.len());
    for Asked { wish, held, span, .. } in all {
        let asked = asker.certificate(wish, held.as_deref(), roots, span);
        let outcome = timeout(ANSWER, asked).await.unwrap_or_else(|_| Err(slow()));
        outcomes.push(outcome.map_err(Arc::new));
    }
    outcomes
}

/// Peers may know the roots better than the authority that answered.
fn accepted(agent: &Agent, (svid, bundle): (Svid, TrustBundle)) -> Result<(Svid, TrustBundle), Error> {
    let known = agent.held.bundles().borrow().clone();
    if agent.bundles_live.load(Ordering::Relaxed)
        && let Some(roots) = known.as_deref().and_then(Bundles::roots)
        && !roots.same_roots(&bundle)
    {
        granted::accepted_by(&svid.chain, &svid.id, roots, clock::now())
            .map_err(|fault| Error::Answer { address: agent.asker.address(), fault })?;
    }
    Ok((svid, bundle))
}

/// Follows the authority's bundles as they change. An authority that tells of none, as Istio's, is asked again rarely.
async fn follow_bundles(agent: Arc<Agent>, hint: watch::Sender<Option<OffsetDateTime>>) -> Infallible {
    const ASK_AGAIN: Duration = Duration::from_secs(600);
    let mut failures = 0;
    loop {
        let wish = agent.own_wish();
        let held = wish.id.as_ref().and_then(|id| agent.held.current(id)).flatten();
        let error = match agent.asker.bundles(&wish, held.as_deref()).await {
            Ok(mut stream) => loop {
                match stream.next().await {
                    Ok(Some(told)) => {
                        failures = 0;
                        agent.bundles_live.store(true, Ordering::Relaxed);
                        take_bundles(&agent, told, &hint);
                    }
                    Ok(None) => break None,
                    Err(error) => break Some(error),
                }
            },
            Err(error) => Some(error),
        };
        agent.bundles_live.store(false, Ordering::Relaxed);
        failures += 1;
        let mut wait = retry_after(failures, None, draw());
        if let Some(error) = error {
            if matches!(&error, Error::Client(client::Error::Denied { denial, .. }) if denial.code == tonic::Code::Unimplemented)
            {
                tracing::info!("the authority tells of bundles with certificates alone");
                wait = ASK_AGAIN;
            } else {
                tracing::debug!(fault = %error, "bundles cannot be followed");
            }
        }
        sleep(wait).await;
    }
}

fn take_bundles(agent: &Agent, told: WatchBundlesResponse, hint: &watch::Sender<Option<OffsetDateTime>>) {
    let mut domains = BTreeMap::new();
    let mut own = None;
    for bundle in told.bundles {
        match read_bundle(&bundle) {
            Ok((domain, authorities)) => {
                own.get_or_insert_with(|| domain.clone());
                domains.insert(domain, authorities);
            }
            Err(fault) => {
                let domain = one_line(&bundle.trust_domain);
                tracing::warn!(domain, fault, "a bundle that cannot be read is not taken, nor any with it");
                return;
            }
        }
    }
    let Some(own) = own else { return };
    if domains.get(&own).is_none_or(|authorities| authorities.x509.is_none()) {
        tracing::warn!(domain = %own, "the authority told of no roots of its own; those before stay");
        return;
    }
    agent.held.put_bundles(Bundles { own, domains });
    let before = told.renew_issued_before.and_then(|at| OffsetDateTime::from_unix_timestamp(at.seconds).ok());
    hint.send_if_modified(|known| std::mem::replace(known, before) != before);
}

fn read_bundle(bundle: &Bundle) -> Result<(TrustDomain, Authorities), String> {
    let domain = TrustDomain::parse(&bundle.trust_domain).map_err(|fault| fault.to_string())?;
    let roots = bundle.x509_authorities.iter().map(|der| Certificate::from_der(der));
    let roots = roots.collect::<Result<Vec<_>, _>>().map_err(|fault| fault.to_string())?;
    let x509 = match roots.is_empty() {
        true => None,
        false => {
            let mut x509 = TrustBundle::new(roots).map_err(|fault| fault.to_string())?;
            x509.sequence = Some(bundle.sequence).filter(|sequence| *sequence != 0);
            x509.refresh_hint = bundle.refresh_hint.and_then(|hint| u64::try_from(hint.seconds).ok());
            Some(x509)
        }
    };
    let jwt = match &bundle.jwt_authorities[..] {
        [] => None,
        json => Some(std::str::from_utf8(json).map_err(|_| "its keys are not text".to_owned())?.into()),
    };
    Ok((domain, Authorities { x509, jwt }))
}

/// A random fraction of 2^64; a machine without randomness spreads nothing.
fn draw() -> u64 {
    keys::random_bytes::<8>().map_or(0, u64::from_ne_bytes)
}

/// The files that credentials are in, to notice that one was changed.
#[derive(Default)]
struct Files(Option<Vec<Option<u64>>>);

impl Files {
    fn changed(&mut self, wishes: &Wishes) -> bool {
        let all = std::iter::once(&wishes.credentials).chain(wishes.others.values());
        let now: Vec<Option<u64>> = all.flat_map(paths).map(|path| files::stamp(&path)).collect();
        let changed = self.0.as_ref().is_some_and(|before| *before != now);
        self.0 = Some(now);
        changed
    }
}

fn paths(credentials: &Credentials) -> Vec<std::path::PathBuf> {
    let Credentials { token, certificate } = credentials;
    let chain = certificate.as_deref().map(|folder: &Path| folder.join("cert-chain.pem"));
    token.iter().cloned().chain(chain).collect()
}
