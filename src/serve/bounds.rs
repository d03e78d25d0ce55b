//! What one connection may hold: how much at once, and for how long.
//!
//! HTTP/2 lets a peer begin requests that it never ends, and ask for answers that it never takes. Both would stay in
//! memory for as long as the connection, which a peer can keep alive with pings. So every request has its time, from its
//! header to the last byte of its answer being on its way, and a connection that has one above its time is ended.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::BodyExt as _;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tonic::{Code, Status};

use super::codes::status;
use super::requests::Requests;
use crate::core::refusal::{Reason, Refusal};

/// A request for a certificate fits many times, even one of an RSA-4096 key with a hundred names.
pub(super) const LARGEST_MESSAGE: usize = 64 * 1024;
/// A token fits many times.
pub(super) const LARGEST_HEADER: u32 = 16 * 1024;
/// Requests at once on one connection. Clients wait with more.
pub(super) const STREAMS: u32 = 128;
/// What clients may send of one request before it is read, and of all on a connection.
pub(super) const WINDOWS: (u32, u32) = (LARGEST_MESSAGE as u32, 512 * 1024);
/// Requests that a client takes back before they were looked at, and those that break rules, before it is sent away.
pub(super) const RESETS: (usize, usize) = (32, 128);
/// No client waits longer; more than a full queue needs with the slowest of keys.
pub(super) const ANSWERED: Duration = Duration::from_secs(30);

/// The requests of one connection that are not done, by when they have to be.
#[derive(Debug, Default)]
pub(super) struct Unanswered(Mutex<(BTreeSet<(Instant, u64)>, u64)>);

impl Unanswered {
    /// Whether one is above its time.
    pub(super) fn is_overdue(&self) -> bool {
        self.lock().0.first().is_some_and(|(deadline, _)| *deadline < Instant::now())
    }

    fn begin(self: &Arc<Self>, within: Duration) -> Open {
        let mut all = self.lock();
        all.1 += 1;
        let at = (Instant::now() + within, all.1);
        all.0.insert(at);
        Open { of: self.clone(), at }
    }

    fn lock(&self) -> MutexGuard<'_, (BTreeSet<(Instant, u64)>, u64)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is not done.
struct Open {
    of: Arc<Unanswered>,
    at: (Instant, u64),
}

impl Drop for Open {
    fn drop(&mut self) {
        self.of.lock().0.remove(&self.at);
    }
}

/// A service whose requests have their time.
#[derive(Clone)]
pub(super) struct Bounded<S> {
    inner: S,
    within: Duration,
    counted: Option<(Arc<Requests>, &'static str)>,
}

impl<S> Bounded<S> {
    pub(super) fn new(inner: S, within: Duration) -> Self {
        Self { inner, within, counted: None }
    }

    /// Of a service that has one method, which asks for certificates: what is too long to get there counts too.
    pub(super) fn counted(inner: S, requests: Arc<Requests>, method: &'static str) -> Self {
        Self { inner, within: ANSWERED, counted: Some((requests, method)) }
    }
}

impl<S: NamedService> NamedService for Bounded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<Request<B>> for Bounded<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
    S::Future: Unpin,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let connection = request.extensions().get::<super::Connected>();
        let open = connection.map(|connection| connection.unanswered.begin(self.within));
        let counted = self.counted.clone().zip(connection.map(|connection| connection.peer.source));
        let too_long = counted.map(|((requests, method), source)| TooLong {
            requests,
            method,
            source,
            begun: Instant::now(),
        });
        Answering { inner: self.inner.call(request), open, too_long }
    }
}

/// Holds a request open until its answer is gone.
pub(super) struct Answering<F> {
    inner: F,
    open: Option<Open>,
    too_long: Option<TooLong>,
}

/// What is known of a request that is too long to be read.
struct TooLong {
    requests: Arc<Requests>,
    method: &'static str,
    source: IpAddr,
    begun: Instant,
}

impl<F> Future for Answering<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Poll::Ready(Ok(response)) = Pin::new(&mut self.inner).poll(cx) else { return Poll::Pending };
        if is_too_large(&response) {
            let sentence = format!("the request is longer than {LARGEST_MESSAGE} bytes");
            let refusal = Refusal::new(Reason::CsrMalformed, sentence);
            if let Some(TooLong { requests, method, source, begun }) = &self.too_long {
                requests.answered(method, None, Some(&refusal), *begun, *source, None);
            }
            return Poll::Ready(Ok(status(&refusal).into_http()));
        }
        let open = self.open.take();
        Poll::Ready(Ok(response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                let _until_it_is_dropped = &open;
                frame
            }))
        })))
    }
}

/// What tonic answers to a message above the limit; nothing of Mica's uses this code.
fn is_too_large(response: &Response<Body>) -> bool {
    response.headers().contains_key("grpc-status")
        && Status::from_header_map(response.headers()).is_some_and(|status| status.code() == Code::OutOfRange)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_is_due_first_decides() {
        let unanswered = Arc::new(Unanswered::default());
        let slow = unanswered.begin(Duration::from_secs(600));
        assert!(!unanswered.is_overdue());
        let late = [unanswered.begin(Duration::ZERO), unanswered.begin(Duration::ZERO)];
        std::thread::sleep(Duration::from_millis(2));
        assert!(unanswered.is_overdue());
        let [first, second] = late;
        drop(first);
        assert!(unanswered.is_overdue());
        drop(second);
        assert!(!unanswered.is_overdue());
        drop(slow);
        assert!(unanswered.lock().0.is_empty());
    }
}
