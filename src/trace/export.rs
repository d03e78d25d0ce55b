//! From the queues to the collectors. A collector that is slow, or gone, costs spans and nothing else.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::{Record, Shared, Tracer, otlp, zipkin};
use crate::core::url::Collector;
use crate::sys::host_name;
use crate::sys::post::Post;

/// So many spans wait for a collector.
const QUEUE: usize = 2048;
/// And so many are sent at once.
const AT_ONCE: usize = 512;
/// A span waits this long for others to go with.
const GATHER: Duration = Duration::from_secs(1);
/// What is left when Mica stops has this long.
const LAST: Duration = Duration::from_secs(2);
/// A collector that stays away is told of this often.
const REMINDER: Duration = Duration::from_secs(600);

/// Where spans go, and which.
#[derive(Clone, Debug)]
pub struct Options {
    /// By OTLP over HTTP, in protobuf.
    pub otlp: Option<Collector>,
    /// As Zipkin's JSON, version 2.
    pub zipkin: Option<Collector>,
    /// The part of the traces that begin here which is recorded, from 0 to 1.
    pub sample: f64,
}

/// Who made the spans.
pub(super) struct Origin {
    pub(super) service: &'static str,
    pub(super) instance: String,
}

/// A tracer for a service, and what has to run beside it. Without a place to send spans to, it is off, and there is
/// nothing to run.
pub fn start(options: &Options, service: &'static str, registry: &mut Registry) -> (Tracer, Vec<Exporter>) {
    let places = [options.otlp.as_ref().map(|to| (to, OTLP)), options.zipkin.as_ref().map(|to| (to, ZIPKIN))];
    let metrics = Metrics::default();
    let mut outlets = Vec::new();
    let mut exporters = Vec::new();
    for (collector, protocol) in places.into_iter().flatten() {
        let (outlet, records) = mpsc::channel(QUEUE);
        let counters = metrics.counters(protocol.name);
        outlets.push(Outlet { queue: outlet, full: counters.full.clone() });
        exporters.push(Exporter {
            post: Post::new(collector.url().clone(), protocol.content_type),
            protocol,
            origin: Origin { service, instance: host_name() },
            records,
            counters,
            failing: None,
        });
    }
    if outlets.is_empty() {
        return (Tracer::default(), exporters);
    }
    metrics.register(registry);
    // Of 2^56, the number of values that the random part of an identifier has.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is from 0 to 2^56")]
    let sampled = (options.sample.clamp(0.0, 1.0) * (1u64 << 56) as f64) as u64;
    (Tracer(Some(Arc::new(Shared { sampled, outlets }))), exporters)
}

#[derive(Clone, Copy)]
struct Protocol {
    name: &'static str,
    content_type: &'static str,
    encode: fn(&Origin, &[Arc<Record>]) -> Vec<u8>,
}

const OTLP: Protocol =
    Protocol { name: "otlp", content_type: "application/x-protobuf", encode: otlp::encode };
const ZIPKIN: Protocol =
    Protocol { name: "zipkin", content_type: "application/json", encode: zipkin::encode };

/// The near end of a queue.
pub(super) struct Outlet {
    queue: mpsc::Sender<Arc<Record>>,
    full: Counter,
}

impl Outlet {
    pub(super) fn offer(&self, record: Arc<Record>, is_trusted: bool) {
        let has_room = is_trusted || self.queue.capacity() > QUEUE / 2;
        if !has_room || self.queue.try_send(record).is_err() {
            self.full.inc();
        }
    }
}

/// The far end of a queue, and a collector.
pub struct Exporter {
    protocol: Protocol,
    post: Post,
    origin: Origin,
    records: mpsc::Receiver<Arc<Record>>,
    counters: Counters,
    /// Since when the collector takes nothing was last told.
    failing: Option<Instant>,
}

impl Exporter {
    /// Sends what there is until `stop` resolves, and what is left then.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                count = self.records.recv_many(&mut batch, AT_ONCE) => if count == 0 { return },
                () = &mut stop => break,
            }
            if batch.len() < AT_ONCE {
                tokio::select! {
                    () = sleep(GATHER) => {}
                    () = &mut stop => break,
                }
                self.fill(&mut batch);
            }
            self.send(&mut batch).await;
        }
        let last = async {
            self.fill(&mut batch);
            while !batch.is_empty() {
                self.send(&mut batch).await;
                self.fill(&mut batch);
            }
        };
        // There is nobody left to tell of what it does not reach.
        let _ = timeout(LAST, last).await;
    }

    fn fill(&mut self, batch: &mut Vec<Arc<Record>>) {
        while batch.len() < AT_ONCE
            && let Ok(record) = self.records.try_recv()
        {
            batch.push(record);
        }
    }

    async fn send(&mut self, batch: &mut Vec<Arc<Record>>) {
        let count = batch.len() as u64;
        let document = (self.protocol.encode)(&self.origin, batch);
        // An idle queue keeps no memory.
        *batch = Vec::new();
        match self.post.send(document).await {
            Ok(()) => {
                self.counters.sent.inc_by(count);
                if self.failing.take().is_some() {
                    tracing::info!(collector = %self.post.url(), "spans can be sent again");
                }
            }
            Err(fault) => {
                self.counters.lost.inc_by(count);
                if self.failing.is_none_or(|told| told.elapsed() >= REMINDER) {
                    self.failing = Some(Instant::now());
                    tracing::warn!(
                        collector = %self.post.url(),
                        fault,
                        "spans cannot be sent and are dropped; nothing else waits for them"
                    );
                }
            }
        }
    }
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} exporter to {}", self.protocol.name, self.post.url())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct To {
    exporter: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Dropped {
    exporter: &'static str,
    reason: &'static str,
}

#[derive(Debug, Default)]
struct Metrics {
    sent: Family<To, Counter>,
    dropped: Family<Dropped, Counter>,
}

struct Counters {
    sent: Counter,
    full: Counter,
    lost: Counter,
}

impl Metrics {
    fn counters(&self, exporter: &'static str) -> Counters {
        let dropped = |reason| self.dropped.get_or_create_owned(&Dropped { exporter, reason });
        Counters {
            sent: self.sent.get_or_create_owned(&To { exporter }),
            full: dropped("queue_full"),
            lost: dropped("not_taken"),
        }
    }

    fn register(self, registry: &mut Registry) {
        registry.register("mica_trace_spans_sent", "Spans that a collector took", self.sent);
        registry.register("mica_trace_spans_dropped", "Spans that no collector got, by reason", self.dropped);
    }
}
