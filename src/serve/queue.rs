//! Who works next. A request costs a signature, a token check and a parse, a hundred microseconds that no other request
//! can use; so requests take turns, as many at a time as there are threads. On an idle server everybody has one at once.
//! When more wait than can work, the turns go around: over the addresses that requests come from, and over the
//! credentials that one address presents. Credentials are told apart here and believed nowhere.

use std::cell::Cell;
use std::collections::hash_map::RandomState;
use std::future::{Future, poll_fn};
use std::hash::BuildHasher as _;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use http::header::AUTHORIZATION;
use hyper::rt::Executor;
use hyper_util::rt::TokioExecutor;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::auth::Evidence;
use crate::core::fair::{Fair, Place};
use crate::core::refusal::{Reason, Refusal};
use crate::sys::listen::network;

/// The longest that the queue gets unless told otherwise: about a second of work.
pub const MOST: usize = 8_192;

/// Hands out turns. Clones share one queue.
#[derive(Clone, Debug)]
pub struct Queue(Arc<Shared>);

/// In whose name a request waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    source: IpAddr,
    credential: u64,
}

/// The right to work. Dropping it gives the next one theirs.
#[derive(Debug)]
pub struct Turn(Arc<Shared>);

/// Too many wait, and of them this flow has the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl From<Full> for Refusal {
    fn from(_: Full) -> Self {
        Self::new(Reason::QueueFull, "too many requests are waiting; try again in a moment")
    }
}

impl Queue {
    /// Lets so many work at a time, and at most so many wait.
    pub fn new(turns: usize, most: usize) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State { free: turns.max(1), waiting: Fair::new(most) }),
            hasher: RandomState::new(),
            full: Counter::default(),
            wait: Histogram::new(BUCKETS),
        }))
    }

    /// Whose turn a request would use.
    pub fn flow(&self, evidence: &Evidence<'_>) -> Flow {
        let headers = evidence.metadata.as_ref();
        let leaf = evidence.peer.certificates.first().map(|leaf| tail(leaf));
        let credential = match headers.get(AUTHORIZATION) {
            Some(token) => self.0.hasher.hash_one(tail(token.as_bytes())),
            None => {
                let forwarded = headers.get("x-forwarded-client-cert").map(|value| tail(value.as_bytes()));
                self.0.hasher.hash_one((leaf, forwarded))
            }
        };
        Flow { source: network(evidence.peer.source), credential }
    }

    /// Waits for a turn. Whoever stops waiting leaves no hole.
    pub async fn turn(&self, flow: Flow) -> Result<Turn, Full> {
        let began = Instant::now();
        let (grant, granted) = oneshot::channel();
        let (place, out, free) = {
            let mut state = self.0.state();
            let (place, out) = state.waiting.push(flow.source, flow.credential, grant);
            (place, out, state.free > 0)
        };
        if out.is_some() {
            self.0.full.inc();
            drop(out);
        }
        let waiting = Waiting { queue: &self.0, place };
        if free {
            // A turn that was taken at once would go to whom the runtime happens to run first, and nobody would ever
            // wait: first all that are there come into the queue, then it is decided.
            tokio::task::yield_now().await;
            self.0.hand_out();
        }
        let turn = granted.await;
        // It is no longer in the queue, either way.
        std::mem::forget(waiting);
        self.0.wait.observe(began.elapsed().as_secs_f64());
        turn.map_err(|_| Full)
    }

    /// Does work in turns. Each time it has to wait for something, such as an answer from the network, its turn is given
    /// back, and it waits for another one to go on; what must hold its turn must not be awaited.
    pub async fn run<F: Future>(&self, flow: Flow, work: F) -> Result<F::Output, Full> {
        let mut work = pin!(work);
        loop {
            let turn = self.turn(flow).await?;
            let polled = poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await;
            drop(turn);
            if let Poll::Ready(done) = polled {
                return Ok(done);
            }
            let mut woken = false;
            // What the work waits for wakes this task.
            poll_fn(|_| if std::mem::replace(&mut woken, true) { Poll::Ready(()) } else { Poll::Pending })
                .await;
        }
    }

    /// Registers the queue's metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "mica_queue_full",
            "Requests that were sent away because too many were waiting",
            self.0.full.clone(),
        );
        registry.register_with_unit(
            "mica_queue_wait",
            "How long requests waited for their turn",
            Unit::Seconds,
            self.0.wait.clone(),
        );
        registry.register_collector(Box::new(Length(self.0.clone())));
    }
}

/// From what an idle server needs to what clients' patience bounds.
const BUCKETS: [f64; 10] = [0.000_01, 0.000_1, 0.000_3, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0];

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    hasher: RandomState,
    full: Counter,
    wait: Histogram,
}

#[derive(Debug)]
struct State {
    free: usize,
    waiting: Fair<IpAddr, u64, oneshot::Sender<Turn>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing below it panics half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Free turns go to those who are next.
    fn hand_out(self: &Arc<Self>) {
        loop {
            let grant = {
                let mut state = self.state();
                if state.free == 0 {
                    return;
                }
                let Some(grant) = state.waiting.pop() else { return };
                state.free -= 1;
                grant
            };
            // One who has just gone away gives it back by this.
            drop(grant.send(Turn(self.clone())));
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.state().free += 1;
        match ENDED.take() {
            None => self.0.hand_out(),
            Some(other) => {
                ENDED.set(Some(Some(self.0.clone())));
                if let Some(other) = other.filter(|other| !Arc::ptr_eq(other, &self.0)) {
                    other.hand_out();
                }
            }
        }
    }
}

thread_local! {
    /// Within a poll at whose end turns are handed on: of which queue, once there is one.
    static ENDED: Cell<Option<Option<Arc<Shared>>>> = const { Cell::new(None) };
}

/// Runs the requests of a connection, each as a task that hands its turn on when its poll ends, and not within it. By then
/// its answer is with the connection, which is thereby woken before whoever works next; and since the runtime runs first
/// whom it woke last, several answers come together before the connection is polled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tasks;

impl<F: Future<Output = ()> + Unpin + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        TokioExecutor::new().execute(HandsOnLast(task));
    }
}

struct HandsOnLast<F>(F);

impl<F: Future + Unpin> Future for HandsOnLast<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        ENDED.set(Some(None));
        let _end = End;
        Pin::new(&mut self.0).poll(cx)
    }
}

/// The end of a poll, however it comes.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        if let Some(Some(queue)) = ENDED.take() {
            queue.hand_out();
        }
    }
}

/// Leaves the queue when dropped.
struct Waiting<'a> {
    queue: &'a Shared,
    place: Place<IpAddr, u64>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // Dropped when the lock is not held any more.
        let _gone = self.queue.state().waiting.remove(&self.place);
    }
}

#[derive(Debug)]
struct Length(Arc<Shared>);

impl Collector for Length {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let gauge = ConstGauge::new(self.0.state().waiting.len() as u64);
        let help = "Requests that wait for their turn";
        gauge.encode(encoder.encode_descriptor("mica_queue_waiting", help, None, gauge.metric_type())?)
    }
}

/// Tokens and certificates end in their signature, which tells them apart.
fn tail(credential: &[u8]) -> &[u8] {
    &credential[credential.len().saturating_sub(64)..]
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use rustls::pki_types::CertificateDer;
    use tokio::task::JoinSet;
    use tonic::metadata::MetadataMap;

    use super::*;
    use crate::auth::Peer;

    fn flow(source: u8, credential: u64) -> Flow {
        Flow { source: IpAddr::from([10, 0, 0, source]), credential }
    }

    fn text(queue: &Queue) -> String {
        let (mut registry, mut text) = (Registry::default(), String::new());
        queue.register(&mut registry);
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }

    /// All turns are there and nobody waits.
    fn is_idle(queue: &Queue, turns: usize) {
        let state = queue.0.state();
        assert_eq!((state.free, state.waiting.len()), (turns, 0));
    }

    #[tokio::test]
    async fn who_comes_late_and_light_is_served_early() {
        let (queue, order) = (Queue::new(1, 100), Arc::new(Mutex::new(Vec::new())));
        let mut tasks = JoinSet::new();
        for (source, credential) in [(1, 1); 6].into_iter().chain([(1, 2), (2, 1)]) {
            let (queue, order) = (queue.clone(), order.clone());
            tasks.spawn(async move {
                let _turn = queue.turn(flow(source, credential)).await.unwrap();
                order.lock().unwrap().push((source, credential));
            });
        }
        tasks.join_all().await;
        let order = order.lock().unwrap().clone();
        assert_eq!(order, [(1, 1), (2, 1), (1, 2), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)]);
        is_idle(&queue, 1);
    }

    #[tokio::test]
    async fn a_full_queue_refuses_the_crowd_and_takes_the_newcomer() {
        let queue = Queue::new(1, 4);
        let working = queue.turn(flow(9, 9)).await.unwrap();
        let mut crowd = JoinSet::new();
        for _ in 0..10 {
            let queue = queue.clone();
            crowd.spawn(async move { queue.turn(flow(1, 1)).await.map(drop) });
        }
        for _ in 0..6 {
            assert_eq!(crowd.join_next().await.unwrap().unwrap(), Err(Full));
        }
        assert!(text(&queue).contains("mica_queue_waiting 4\n"), "{}", text(&queue));
        let newcomer = {
            let queue = queue.clone();
            let mut newcomer = JoinSet::new();
            newcomer.spawn(async move { queue.turn(flow(2, 1)).await.map(drop) });
            newcomer
        };
        assert_eq!(crowd.join_next().await.unwrap().unwrap(), Err(Full));
        drop(working);
        assert_eq!(newcomer.join_all().await, [Ok(())]);
        assert_eq!(crowd.join_all().await, [Ok(()); 3]);
        assert!(text(&queue).contains("mica_queue_full_total 7\n"), "{}", text(&queue));
        assert!(text(&queue).contains("mica_queue_wait_seconds_count 12\n"), "{}", text(&queue));
        is_idle(&queue, 1);
        assert_eq!(Refusal::from(Full).reason.name(), "QUEUE_FULL");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_goes_away_leaves_no_hole() {
        for turns in [1, 2, 5] {
            let queue = Queue::new(turns, 200);
            let (working, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let mut tasks = JoinSet::new();
            for n in 0..2_000_u64 {
                let (queue, working, most) = (queue.clone(), working.clone(), most.clone());
                tasks.spawn(async move {
                    let asked = async {
                        let turn = queue.turn(flow((n % 7) as u8, n % 3)).await?;
                        most.fetch_max(working.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        if n % 2 == 0 {
                            tokio::task::yield_now().await;
                        }
                        working.fetch_sub(1, Ordering::SeqCst);
                        drop(turn);
                        Ok::<_, Full>(())
                    };
                    // Some give up at once, some soon, some wait.
                    match n % 5 {
                        0 => drop(tokio::time::timeout(Duration::from_micros(n % 900), asked).await),
                        1 => {
                            let mut asked = pin!(asked);
                            poll_fn(|cx| Poll::Ready(asked.as_mut().poll(cx).is_ready())).await;
                        }
                        _ => drop(asked.await),
                    }
                });
            }
            tasks.join_all().await;
            is_idle(&queue, turns);
        }
    }

    #[tokio::test]
    async fn one_who_waits_for_the_network_holds_up_nobody() {
        let queue = Queue::new(1, 10);
        let (answer, answered) = oneshot::channel();
        let mut slow = JoinSet::new();
        let shared = queue.clone();
        slow.spawn(async move { shared.run(flow(1, 1), async move { answered.await.unwrap() }).await });
        for _ in 0..3 {
            assert_eq!(queue.run(flow(2, 1), async { 5 }).await, Ok(5));
        }
        assert!(slow.try_join_next().is_none());
        // The turn is not there when the answer comes.
        let turn = queue.turn(flow(2, 1)).await.unwrap();
        answer.send(7).unwrap();
        tokio::task::yield_now().await;
        assert!(slow.try_join_next().is_none());
        drop(turn);
        assert_eq!(slow.join_all().await, [Ok(7)]);
        is_idle(&queue, 1);
    }

    #[tokio::test]
    async fn a_work_that_panics_or_is_dropped_gives_its_turn_back() {
        let queue = Queue::new(1, 10);
        let mut tasks = JoinSet::new();
        let shared = queue.clone();
        tasks.spawn(async move { shared.run(flow(1, 1), async { panic!("as planned") }).await });
        assert!(tasks.join_next().await.unwrap().is_err());
        let turn = queue.turn(flow(1, 1)).await.unwrap();
        let shared = queue.clone();
        let waiting = tasks.spawn(async move { shared.run(flow(1, 1), async { panic!("never") }).await });
        tokio::task::yield_now().await;
        waiting.abort();
        assert!(tasks.join_next().await.unwrap().unwrap_err().is_cancelled());
        drop(turn);
        is_idle(&queue, 1);
    }

    /// Gives its turn back in the middle of a poll.
    struct Works(Option<Turn>, Arc<Mutex<Vec<&'static str>>>);

    impl Future for Works {
        type Output = ();

        fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
            let turn = self.0.take().unwrap();
            let queue = Queue(turn.0.clone());
            drop(turn);
            let mut order = self.1.lock().unwrap();
            order.push(if queue.0.state().waiting.is_empty() { "handed on" } else { "answered" });
            let ends_well = order.len() == 1;
            drop(order);
            assert!(ends_well, "as planned");
            Poll::Ready(())
        }
    }

    #[tokio::test]
    async fn a_turn_is_handed_on_when_the_poll_is_over_however_that_ends() {
        let (queue, order) = (Queue::new(1, 10), Arc::<Mutex<Vec<_>>>::default());
        for _ in 0..2 {
            let turn = queue.turn(flow(1, 1)).await.unwrap();
            let mut waiting = JoinSet::new();
            let (shared, next) = (queue.clone(), order.clone());
            waiting.spawn(async move {
                let _turn = shared.turn(flow(1, 1)).await.unwrap();
                next.lock().unwrap().push("next");
            });
            tokio::task::yield_now().await;
            Tasks.execute(Works(Some(turn), order.clone()));
            waiting.join_all().await;
            is_idle(&queue, 1);
        }
        let order = order.lock().unwrap().clone();
        assert_eq!(order, ["answered", "next", "answered", "next"]);
    }

    #[test]
    fn an_address_is_its_network_and_a_credential_its_end() {
        let queue = Queue::new(1, 1);
        let flow = |source: &str, token: Option<&str>, leaf: &[u8]| {
            let mut metadata = MetadataMap::new();
            if let Some(token) = token {
                metadata.insert("authorization", token.parse().unwrap());
            }
            let peer = Peer::new(source.parse().unwrap(), [CertificateDer::from(leaf.to_vec())].into());
            queue.flow(&Evidence { peer: &Arc::new(peer), metadata: &metadata })
        };
        let one = flow("2001:db8::1", Some("Bearer one"), b"leaf");
        assert_eq!(one, flow("2001:db8::ffff:ffff:ffff:ffff", Some("Bearer one"), b"other leaf"));
        assert_ne!(one, flow("2001:db8:0:1::1", Some("Bearer one"), b"leaf"));
        assert_ne!(one, flow("2001:db8::1", Some("Bearer two"), b"leaf"));
        assert_ne!(one, flow("2001:db8::1", None, b"leaf"));
        assert_ne!(flow("10.0.0.1", None, b"leaf"), flow("10.0.0.1", None, b"other leaf"));
        assert_ne!(flow("10.0.0.1", None, b"leaf"), flow("10.0.0.2", None, b"leaf"));
        assert_eq!(flow("10.0.0.1", None, b"leaf"), flow("::ffff:10.0.0.1", None, b"leaf"));
    }
}
