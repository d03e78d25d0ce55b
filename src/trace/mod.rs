//! Spans: what was done for one request or one certificate, how long each part took, and where it belongs.
//!
//! A [`Tracer`] that is off makes spans that are nothing: they hold no memory and ask for no time. One that is on hands
//! finished spans to bounded queues, which [`Exporter`]s empty. Nobody waits for those.

mod export;
mod otlp;
mod zipkin;

use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::time::Instant;

pub use export::{Exporter, Options, start};

use crate::core::trace::{Context, Parent, SpanId, TraceId};
use crate::sys::{clock, keys};
use export::Outlet;

/// An attribute's text is cut here.
const LONGEST: usize = 1024;
/// A request has few parts; more of one are not kept.
const MOST: usize = 64;

/// Makes spans. Clones share the queues.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<Shared>>);

struct Shared {
    /// Of 2^56.
    sampled: u64,
    outlets: Vec<Outlet>,
}

impl Tracer {
    /// Whether there is anybody to send spans to.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// A span that begins a trace, which is recorded or not by the ratio.
    pub fn begin(&self, name: &'static str) -> Span {
        self.follow(None, name)
    }

    /// A span in a trace of this process, or one that begins a trace.
    pub fn follow(&self, parent: Option<Context>, name: &'static str) -> Span {
        let Some(shared) = &self.0 else { return Span(None) };
        let (trace, sampled) = match parent {
            Some(parent) => (Some(parent.trace), parent.sampled),
            None => {
                let trace = random().and_then(TraceId::new);
                (trace, trace.is_some_and(|trace| shared.samples(trace.randomness())))
            }
        };
        let parent = parent.map(|parent| parent.span);
        let Some((trace, span)) = trace.zip(random().and_then(SpanId::new)) else { return Span(None) };
        let context = Context { trace, span, sampled };
        let record = sampled.then(|| Record::new(context, parent, name.into(), Kind::Internal));
        Span(Some(Box::new(Open::new(shared.clone(), context, record, None))))
    }

    /// The span of a call that is answered here. Its parts are held back until it ends, since who calls is not known yet:
    /// a stranger's wish to have it recorded counts for nothing, see [`Span::trust`].
    pub fn answer(&self, parent: Option<&Parent>, service: &'static str, method: &'static str) -> Span {
        let Some(shared) = &self.0 else { return Span(None) };
        let Some(span) = random().and_then(SpanId::new) else { return Span(None) };
        // Who chooses the identifier does not choose what is recorded.
        let own = random().and_then(TraceId::new);
        let sampled = own.is_some_and(|own| shared.samples(own.randomness()));
        let Some(trace) = parent.map(|parent| parent.trace).or(own) else { return Span(None) };
        let wish = parent.and_then(|parent| parent.sampled);
        let context = Context { trace, span, sampled };
        let record = (sampled || wish == Some(true)).then(|| {
            let above = parent.map(|parent| parent.span);
            let mut record = Record::new(context, above, format!("{service}/{method}").into(), Kind::Server);
            record.is_call(service, method);
            record
        });
        let held = Held { wish, is_trusted: false, parts: Arc::default() };
        Span(Some(Box::new(Open::new(shared.clone(), context, record, Some(Family::Head(held))))))
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "tracer" } else { "no tracer" })
    }
}

impl Shared {
    fn samples(&self, randomness: u64) -> bool {
        randomness < self.sampled
    }

    /// What strangers cause must leave room for others.
    fn offer(&self, record: Record, is_trusted: bool) {
        let record = Arc::new(record);
        self.outlets.iter().for_each(|outlet| outlet.offer(record.clone(), is_trusted));
    }
}

/// Something that is being done. It ends when it is dropped.
#[derive(Default)]
pub struct Span(Option<Box<Open>>);

struct Open {
    shared: Arc<Shared>,
    context: Context,
    begun: Instant,
    /// None if it is not recorded.
    record: Option<Record>,
    family: Option<Family>,
}

/// Spans that are recorded together or not at all.
enum Family {
    Head(Held),
    Part(Arc<Mutex<Vec<Record>>>),
}

struct Held {
    wish: Option<bool>,
    is_trusted: bool,
    parts: Arc<Mutex<Vec<Record>>>,
}

impl Open {
    fn new(shared: Arc<Shared>, context: Context, record: Option<Record>, family: Option<Family>) -> Self {
        Self { shared, context, begun: Instant::now(), record, family }
    }
}

impl Span {
    /// A part of it.
    #[must_use]
    pub fn part(&self, name: &'static str) -> Self {
        self.below(name.into(), Kind::Internal)
    }

    /// A call of it to somebody else.
    #[must_use]
    pub fn call(&self, service: &'static str, method: &'static str) -> Self {
        if self.0.is_none() {
            return Self(None);
        }
        let mut span = self.below(format!("{service}/{method}").into(), Kind::Client);
        if let Some(record) = span.record() {
            record.is_call(service, method);
        }
        span
    }

    fn below(&self, name: Cow<'static, str>, kind: Kind) -> Self {
        let Some(open) = &self.0 else { return Self(None) };
        let Some(span) = random().and_then(SpanId::new) else { return Self(None) };
        let context = Context { span, ..open.context };
        let record = open.record.is_some().then(|| Record::new(context, Some(open.context.span), name, kind));
        let family = open.family.as_ref().map(|family| match family {
            Family::Head(held) => Family::Part(held.parts.clone()),
            Family::Part(parts) => Family::Part(parts.clone()),
        });
        Self(Some(Box::new(Open::new(open.shared.clone(), context, record, family))))
    }

    /// What others need to go on with the trace; none if the tracer is off.
    pub fn context(&self) -> Option<Context> {
        self.0.as_ref().map(|open| open.context)
    }

    /// Its trace; none if the tracer is off.
    pub fn trace(&self) -> Option<TraceId> {
        self.context().map(|context| context.trace)
    }

    /// Whoever calls is known now, so what it wishes counts.
    pub fn trust(&mut self) {
        if let Some(open) = &mut self.0
            && let Some(Family::Head(held)) = &mut open.family
        {
            held.is_trusted = true;
            open.context.sampled = held.wish.unwrap_or(open.context.sampled);
        }
    }

    /// It began earlier than it was made.
    pub fn since(&mut self, begun: Instant) {
        if let Some(open) = &mut self.0 {
            let earlier = open.begun.saturating_duration_since(begun);
            open.begun -= earlier;
            open.record.iter_mut().for_each(|record| record.begun -= earlier);
        }
    }

    /// Somebody waits for it, who asked from outside.
    pub fn is_answer(&mut self, service: &'static str, method: &'static str) {
        if let Some(record) = self.record() {
            record.kind = Kind::Server;
            record.name = format!("{service}/{method}").into();
            record.is_call(service, method);
        }
    }

    /// Says something of it. Never a key or a token.
    pub fn set(&mut self, key: &'static str, value: impl fmt::Display) {
        if let Some(record) = self.record() {
            let mut text = value.to_string();
            text.truncate(text.floor_char_boundary(LONGEST));
            record.set(key, Value::Text(text.into()));
        }
    }

    /// Likewise, a number.
    pub fn count(&mut self, key: &'static str, value: i64) {
        if let Some(record) = self.record() {
            record.set(key, Value::Number(value));
        }
    }

    /// It came to nothing, for a reason with a short fixed name.
    pub fn fail(&mut self, reason: &'static str) {
        if let Some(record) = self.record() {
            record.set("error.type", Value::Text(reason.into()));
            record.set("mica.reason", Value::Text(reason.into()));
            record.failed = Some(reason);
        }
    }

    fn record(&mut self) -> Option<&mut Record> {
        self.0.as_mut()?.record.as_mut()
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(open) = self.0.take() else { return };
        let Open { shared, context, begun, record, family } = *open;
        let Some(mut record) = record else { return };
        record.took = begun.elapsed();
        match family {
            None => shared.offer(record, true),
            Some(Family::Part(parts)) => {
                let mut parts = parts.lock().unwrap_or_else(PoisonError::into_inner);
                if parts.len() < MOST {
                    parts.push(record);
                }
            }
            Some(Family::Head(held)) if context.sampled => {
                let parts = std::mem::take(&mut *held.parts.lock().unwrap_or_else(PoisonError::into_inner));
                parts.into_iter().chain([record]).for_each(|record| shared.offer(record, held.is_trusted));
            }
            Some(Family::Head(_)) => {}
        }
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(open) => write!(f, "span {}", open.context.traceparent()),
            None => f.write_str("no span"),
        }
    }
}

/// A span that has ended, or will be one.
#[derive(Clone, Debug)]
struct Record {
    trace: TraceId,
    span: SpanId,
    parent: Option<SpanId>,
    name: Cow<'static, str>,
    kind: Kind,
    begun: OffsetDateTime,
    took: Duration,
    attributes: Vec<(&'static str, Value)>,
    failed: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Internal,
    Server,
    Client,
}

#[derive(Clone, Debug)]
enum Value {
    Text(Cow<'static, str>),
    Number(i64),
}

impl Record {
    fn new(context: Context, parent: Option<SpanId>, name: Cow<'static, str>, kind: Kind) -> Self {
        let Context { trace, span, .. } = context;
        Self {
            trace,
            span,
            parent,
            name,
            kind,
            begun: clock::now(),
            took: Duration::ZERO,
            attributes: Vec::new(),
            failed: None,
        }
    }

    fn is_call(&mut self, service: &'static str, method: &'static str) {
        self.set("rpc.system", Value::Text("grpc".into()));
        self.set("rpc.service", Value::Text(service.into()));
        self.set("rpc.method", Value::Text(method.into()));
    }

    fn set(&mut self, key: &'static str, value: Value) {
        match self.attributes.iter_mut().find(|(known, _)| *known == key) {
            Some((_, before)) => *before = value,
            None => self.attributes.push((key, value)),
        }
    }
}

/// A machine without randomness has no spans.
fn random<const N: usize>() -> Option<[u8; N]> {
    keys::random_bytes().ok()
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::core::url::Collector;

    fn tracer(sample: f64) -> (Tracer, Registry) {
        let collector = Collector::new("http://127.0.0.1:1", "/x").unwrap();
        let mut registry = Registry::default();
        let options = Options { otlp: None, zipkin: Some(collector), sample };
        let (tracer, exporters) = start(&options, "test", &mut registry);
        // Nobody empties the queue, and it stays open.
        std::mem::forget(exporters);
        (tracer, registry)
    }

    fn dropped(registry: &Registry) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        let line = text.lines().find(|line| line.contains("dropped_total{") && line.contains("queue_full"));
        line.unwrap().split(' ').next_back().unwrap().parse().unwrap()
    }

    fn parent(sampled: Option<bool>) -> Parent {
        let (trace, span) = (TraceId::new([1; 16]).unwrap(), SpanId::new([2; 8]).unwrap());
        Parent { trace, span, sampled }
    }

    #[test]
    fn a_tracer_that_is_off_makes_nothing() {
        let (tracer, exporters) =
            start(&Options { otlp: None, zipkin: None, sample: 1.0 }, "test", &mut Registry::default());
        assert!(!tracer.is_on() && exporters.is_empty());
        let mut span = tracer.answer(Some(&parent(Some(true))), "service", "method");
        span.set("key", "value");
        assert!(span.0.is_none() && span.part("part").0.is_none() && span.call("a", "b").0.is_none());
        assert_eq!((span.context(), size_of::<Span>()), (None, size_of::<usize>()));
    }

    #[test]
    fn a_wish_counts_only_of_who_is_known() {
        let recorded = |sample: f64, wish: Option<bool>, is_known: bool| {
            let (tracer, _registry) = tracer(sample);
            let mut span = tracer.answer(Some(&parent(wish)), "service", "method");
            drop(span.part("part"));
            if is_known {
                span.trust();
            }
            span.context().unwrap().sampled
        };
        for (sample, wish, known, stranger) in [
            (0.0, Some(true), true, false),
            (0.0, None, false, false),
            (0.0, Some(false), false, false),
            (1.0, Some(true), true, true),
            (1.0, None, true, true),
            (1.0, Some(false), false, true),
        ] {
            assert_eq!((recorded(sample, wish, true), recorded(sample, wish, false)), (known, stranger));
        }
    }

    #[test]
    fn strangers_leave_half_of_the_queue_to_others() {
        let (tracer, registry) = tracer(1.0);
        let ask = |is_known: bool| {
            let mut span = tracer.answer(None, "service", "method");
            if is_known {
                span.trust();
            }
        };
        (0..2_000).for_each(|_| ask(false));
        assert_eq!(dropped(&registry), 2_000 - 1_024);
        (0..1_024).for_each(|_| ask(true));
        assert_eq!(dropped(&registry), 2_000 - 1_024);
        ask(true);
        assert_eq!(dropped(&registry), 2_000 - 1_024 + 1);
    }

    #[test]
    fn what_is_not_recorded_is_told_to_others_as_such() {
        let (tracer, registry) = tracer(0.0);
        (0..3_000).for_each(|_| drop(tracer.begin("root").part("part")));
        assert_eq!(dropped(&registry), 0);
        let span = tracer.begin("root");
        let context = span.context().unwrap();
        assert!(context.traceparent().ends_with("-00"));
        let next = tracer.follow(Some(context), "next").context().unwrap();
        assert_eq!((next.trace, next.sampled), (context.trace, false));
    }
}
