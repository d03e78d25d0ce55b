//! A load of requests for certificates, and what came of it. HTTP/2 by hand, since the client should cost little beside
//! the server that it measures.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use h2::client::{Connection, SendRequest};
use prost::Message as _;
use prost::bytes::{BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};
use tonic::codegen::http::header::AUTHORIZATION;
use tonic::codegen::http::{HeaderMap, HeaderValue, Request};
use tonic::{Code, Status};

use super::{code_name, reason_of};
use crate::proto::istio::v1::auth::IstioCertificateRequest;

/// Of CreateCertificate.
const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// After a connection that failed, so that a server that is gone is not called ever faster.
const RETRY: Duration = Duration::from_millis(100);
/// For answers to what was asked last.
const PATIENCE: Duration = Duration::from_secs(35);
/// In an open loop: more than these are not sent, which is counted.
const BACKLOG: usize = 20_000;

/// How much, how fast, for how long.
#[derive(Clone, Debug)]
pub struct Load {
    /// Kept connections.
    pub connections: usize,
    /// Requests at once, over all of them.
    pub in_flight: usize,
    /// When to stop asking.
    pub duration: Duration,
    /// And after how many requests.
    pub requests: u64,
    /// So many a second, whatever the answers do; without it each answer makes room for the next request.
    pub rate: Option<f64>,
    /// Each request on a connection of its own.
    pub new_connections: bool,
}

/// What is asked.
pub struct Call {
    request: Request<()>,
    /// One after the other; none for what the request has itself.
    authorizations: Vec<HeaderValue>,
    messages: Vec<Bytes>,
}

impl Call {
    /// One of these requests after the other, with this authorization header if any.
    pub fn new(host: &str, authorization: Option<HeaderValue>, requests: &[IstioCertificateRequest]) -> Self {
        let mut request = Request::new(());
        *request.method_mut() = tonic::codegen::http::Method::POST;
        *request.uri_mut() = format!("https://{host}{PATH}").parse().unwrap_or_default();
        let headers = request.headers_mut();
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        headers.insert("te", HeaderValue::from_static("trailers"));
        headers.insert("user-agent", HeaderValue::from_static(concat!("mica/", env!("CARGO_PKG_VERSION"))));
        headers.extend(authorization.map(|value| (AUTHORIZATION, value)));
        Self { request, authorizations: Vec::new(), messages: requests.iter().map(framed).collect() }
    }

    /// With these authorization headers, one after the other.
    #[must_use]
    pub fn with_authorizations(mut self, authorizations: Vec<HeaderValue>) -> Self {
        self.authorizations = authorizations;
        self
    }
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Requests that were granted.
    pub granted: u64,
    /// The others, by code and reason, or by what happened to the connection.
    pub failed: BTreeMap<String, u64>,
    /// Of those that were answered.
    pub latency: Latency,
    /// From the first request to the last answer.
    pub elapsed: Duration,
}

impl Outcome {
    /// Granted ones, a second.
    pub fn throughput(&self) -> f64 {
        self.granted as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// All that were not granted.
    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }
}

/// Puts a load on a server that `dial` makes connections to.
pub async fn put<D, F, S>(dial: D, call: Call, load: &Load) -> Outcome
where
    D: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Result<S, String>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connections = if load.new_connections { 0 } else { load.connections.max(1) };
    let run = Arc::new(Run {
        dial,
        call,
        slots: (0..connections).map(|_| tokio::sync::Mutex::new(Slot::default())).collect(),
        begun: AtomicU64::new(0),
        requests: load.requests,
        end: Instant::now() + load.duration,
        outcome: Mutex::default(),
        open: AtomicUsize::new(0),
    });
    // Everybody is connected before the first request, so that handshakes are not what is measured.
    for slot in 0..connections {
        if let Err(fault) = run.client(slot).await {
            run.outcome().failed.insert(fault, 1);
            return run.outcome().clone();
        }
    }
    let started = Instant::now();
    let mut lanes = JoinSet::new();
    match load.rate {
        None => {
            for lane in 0..load.in_flight.max(1) {
                let run = run.clone();
                lanes.spawn(async move {
                    while let Some(number) = run.begin() {
                        run.ask(lane, number, Instant::now()).await;
                    }
                });
            }
        }
        Some(rate) => pace(&run, rate, started, &mut lanes).await,
    }
    while let Ok(Some(_)) = timeout_at(run.end + PATIENCE, lanes.join_next()).await {}
    let mut outcome = run.outcome().clone();
    if !lanes.is_empty() {
        let unanswered = format!("no answer within {} s of the end", PATIENCE.as_secs());
        outcome.failed.insert(unanswered, lanes.len() as u64);
    }
    outcome.elapsed = started.elapsed();
    outcome
}

/// Sends each request at its time. The clock of the runtime ticks in milliseconds, so the last one is waited for busily.
async fn pace<D, F, S>(run: &Arc<Run<D>>, rate: f64, started: Instant, lanes: &mut JoinSet<()>)
where
    D: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Result<S, String>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    while let Some(number) = run.begin() {
        let due = started + Duration::from_secs_f64(number as f64 / rate.max(1e-3));
        if due >= run.end {
            return;
        }
        loop {
            match due.saturating_duration_since(Instant::now()) {
                Duration::ZERO => break,
                long if long > Duration::from_millis(3) => {
                    tokio::time::sleep(long - Duration::from_millis(2)).await;
                }
                _ => tokio::task::yield_now().await,
            }
            while lanes.try_join_next().is_some() {}
        }
        if run.open.load(Ordering::Relaxed) >= BACKLOG {
            run.failed("not sent: too many are unanswered".to_owned());
            continue;
        }
        let run = run.clone();
        run.open.fetch_add(1, Ordering::Relaxed);
        lanes.spawn(async move {
            // Waiting begins when it should have been sent.
            run.ask(number as usize, number, due).await;
            run.open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

struct Run<D> {
    dial: D,
    call: Call,
    slots: Vec<tokio::sync::Mutex<Slot>>,
    begun: AtomicU64,
    requests: u64,
    end: Instant,
    outcome: Mutex<Outcome>,
    open: AtomicUsize,
}

/// One of the kept connections.
#[derive(Default)]
struct Slot {
    client: Option<SendRequest<Bytes>>,
    generation: u64,
    driver: JoinSet<()>,
}

impl<D, F, S> Run<D>
where
    D: Fn() -> F + Send + Sync + 'static,
    F: Future<Output = Result<S, String>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    /// The number of the next request, while there is one.
    fn begin(&self) -> Option<u64> {
        if Instant::now() >= self.end {
            return None;
        }
        let number = self.begun.fetch_add(1, Ordering::Relaxed);
        (number < self.requests).then_some(number)
    }

    async fn ask(&self, lane: usize, number: u64, since: Instant) {
        let answer = match self.slots.len() {
            0 => self.ask_anew(number).await,
            slots => {
                let slot = lane % slots;
                match self.client(slot).await {
                    Ok((client, generation)) => {
                        let answer = exchange(client, self.request(number), self.message(number)).await;
                        if answer.is_err() {
                            self.forget(slot, generation).await;
                        }
                        answer
                    }
                    Err(fault) => Err(fault),
                }
            }
        };
        let latency = since.elapsed();
        match answer {
            Ok(refused) => {
                let mut outcome = self.outcome();
                outcome.latency.add(latency);
                match refused {
                    None => outcome.granted += 1,
                    Some(why) => *outcome.failed.entry(why).or_default() += 1,
                }
            }
            Err(fault) => {
                self.failed(fault);
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn ask_anew(&self, number: u64) -> Result<Option<String>, String> {
        let (client, connection) = connect((self.dial)()).await?;
        let mut driver = JoinSet::new();
        driver.spawn(drive(connection));
        let answer = exchange(client, self.request(number), self.message(number)).await;
        // With the last handle gone the connection says goodbye.
        driver.join_next().await;
        answer
    }

    async fn client(&self, slot: usize) -> Result<(SendRequest<Bytes>, u64), String> {
        let mut slot = self.slots[slot].lock().await;
        if slot.client.is_none() {
            let (client, connection) = connect((self.dial)()).await?;
            slot.driver.spawn(drive(connection));
            slot.generation += 1;
            slot.client = Some(client);
        }
        let client = slot.client.clone().ok_or_else(|| "no connection".to_owned())?;
        Ok((client, slot.generation))
    }

    async fn forget(&self, slot: usize, generation: u64) {
        let mut slot = self.slots[slot].lock().await;
        if slot.generation == generation {
            slot.client = None;
        }
    }

    fn request(&self, number: u64) -> Request<()> {
        let mut request = self.call.request.clone();
        if let Some(last) = self.call.authorizations.len().checked_sub(1) {
            let value = self.call.authorizations[number as usize % (last + 1)].clone();
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        request
    }

    fn message(&self, number: u64) -> Bytes {
        self.call.messages[number as usize % self.call.messages.len()].clone()
    }

    fn failed(&self, fault: String) {
        *self.outcome().failed.entry(fault).or_default() += 1;
    }

    fn outcome(&self) -> MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    dialling: impl Future<Output = Result<S, String>>,
) -> Result<(SendRequest<Bytes>, Connection<S, Bytes>), String> {
    h2::client::Builder::new()
        .initial_window_size(1 << 20)
        .initial_connection_window_size(16 << 20)
        .enable_push(false)
        .handshake(dialling.await?)
        .await
        .map_err(|fault| broken(&fault))
}

async fn drive<S: AsyncRead + AsyncWrite + Unpin>(connection: Connection<S, Bytes>) {
    // Those whose requests are under way are told too.
    let _ = connection.await;
}

/// One request and its answer: granted, or why not. An error means that the connection cannot be used any more.
async fn exchange(
    client: SendRequest<Bytes>,
    request: Request<()>,
    message: Bytes,
) -> Result<Option<String>, String> {
    let asked = async {
        let mut client = client.ready().await?;
        let (answer, mut sending) = client.send_request(request, false)?;
        drop(client);
        sending.send_data(message, true)?;
        let (head, mut body) = answer.await?.into_parts();
        if head.headers.contains_key("grpc-status") {
            return Ok(head.headers);
        }
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            body.flow_control().release_capacity(chunk.len())?;
        }
        Ok::<_, h2::Error>(body.trailers().await?.unwrap_or_default())
    };
    match asked.await {
        Ok(trailers) => Ok(refused(&trailers)),
        // Of this stream alone.
        Err(fault) if fault.is_reset() => Ok(Some(broken(&fault))),
        Err(fault) => Err(broken(&fault)),
    }
}

fn broken(fault: &h2::Error) -> String {
    format!("connection: {fault}")
}

/// The code and the reason of a refusal.
fn refused(trailers: &HeaderMap) -> Option<String> {
    let Some(status) = Status::from_header_map(trailers) else {
        return Some("an answer without a status".into());
    };
    if status.code() == Code::Ok {
        return None;
    }
    let code = code_name(status.code());
    Some(match reason_of(status.details()) {
        Some(reason) => format!("{code} {reason}"),
        None => code.to_owned(),
    })
}

/// As gRPC frames it: uncompressed, then the length.
fn framed(request: &IstioCertificateRequest) -> Bytes {
    let mut message = BytesMut::with_capacity(5 + request.encoded_len());
    message.put_u8(0);
    message.put_u32(request.encoded_len() as u32);
    message.extend_from_slice(&request.encode_to_vec());
    message.freeze()
}

/// How long answers took, to three per cent.
#[derive(Clone, Debug, Default)]
pub struct Latency {
    /// Of 32 equal parts of each power of two, in nanoseconds.
    counts: BTreeMap<u32, u64>,
    count: u64,
    longest: Duration,
}

impl Latency {
    fn add(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX).max(32);
        let power = nanos.ilog2();
        let part = (nanos >> (power - 5)) as u32 & 31;
        *self.counts.entry(power * 32 + part).or_default() += 1;
        self.count += 1;
        self.longest = self.longest.max(latency);
    }

    /// What this part of the answers, from 0 to 1, took at most. None without answers.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let rank = (part * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let (bucket, _) = self.counts.iter().find(|(_, count)| {
            seen += **count;
            seen >= rank
        })?;
        let (power, part) = (bucket / 32, u64::from(bucket % 32));
        let upper = Duration::from_nanos((33 + part) << (power - 5));
        Some(upper.min(self.longest))
    }

    /// The longest of all.
    pub fn longest(&self) -> Duration {
        self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_three_per_cent() {
        let mut latency = Latency::default();
        assert_eq!(latency.quantile(0.5), None);
        for micros in 1..=10_000 {
            latency.add(Duration::from_micros(micros));
        }
        for (part, micros) in [(0.0, 1.0), (0.5, 5_000.0), (0.9, 9_000.0), (0.99, 9_900.0), (1.0, 10_000.0)] {
            let found = latency.quantile(part).unwrap().as_secs_f64() * 1e6;
            assert!((micros * 0.999..=micros * 1.035).contains(&found), "{part}: {found}");
        }
        assert_eq!(latency.longest(), Duration::from_millis(10));
        latency.add(Duration::ZERO);
        latency.add(Duration::MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_never_answers_is_not_waited_for_for_ever() {
        let servers = Arc::new(Mutex::new(JoinSet::new()));
        let dial = move || {
            let (client, server) = tokio::io::duplex(1 << 16);
            servers.lock().unwrap().spawn(async move {
                let mut connection = h2::server::handshake(server).await.unwrap();
                let mut unanswered = Vec::new();
                while let Some(request) = connection.accept().await {
                    unanswered.push(request);
                }
            });
            std::future::ready(Ok(client))
        };
        let load = Load {
            connections: 1,
            in_flight: 3,
            duration: Duration::from_secs(1),
            requests: u64::MAX,
            rate: None,
            new_connections: false,
        };
        let call = Call::new("localhost", None, &[IstioCertificateRequest::default()]);
        let outcome = timeout_at(Instant::now() + 2 * PATIENCE, put(dial, call, &load)).await.unwrap();
        assert_eq!((outcome.granted, outcome.failures()), (0, 3));
    }

    #[test]
    fn a_refusal_is_its_code_and_reason() {
        let trailers = |status: &Status| {
            let mut trailers = HeaderMap::new();
            status.add_header(&mut trailers).unwrap();
            trailers
        };
        assert_eq!(refused(&trailers(&Status::new(Code::Ok, ""))), None);
        assert_eq!(refused(&trailers(&Status::unavailable("later"))).as_deref(), Some("UNAVAILABLE"));
        assert_eq!(refused(&HeaderMap::new()).as_deref(), Some("an answer without a status"));
    }
}
