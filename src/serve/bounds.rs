//! What one connection may hold, and all together: how much at once, and for how long.
//!
//! HTTP/2 lets a peer begin requests that it never ends, and ask for answers that it never takes. Both would stay in
//! memory for as long as the connection, which a peer can keep alive with pings. So every request has its time, from its
//! header to the last byte of its answer being on its way, and a connection that has one above its time is ended. And since there are many connections, all requests need room.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::{Code, Status};

use super::codes::status;
use super::gate::Gate;
use super::queue::Full;
use super::requests::Requests;
use crate::core::refusal::{Reason, Refusal};
use crate::sys::listen::{Place, Places};

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

/// Below so many requests that are not done, over all connections, nobody asks whose they are;
const CALM: usize = 4_096;
/// of so many more, networks share equally.
const MOST: usize = 16_384;

/// The requests of all connections that are not done. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Crowd(Arc<Counted>);

#[derive(Debug)]
struct Counted {
    open: AtomicUsize,
    calm: usize,
    places: Places,
}

/// Room for a request in a crowd.
#[derive(Debug)]
struct Room {
    crowd: Crowd,
    place: Option<Place>,
}

impl Crowd {
    pub(super) fn new() -> Self {
        Self::of(CALM, MOST)
    }

    /// Of those who are answered with so many times as much.
    pub(super) fn of_large(times: usize) -> Self {
        Self::of(CALM / times, MOST / times)
    }

    fn of(calm: usize, most: usize) -> Self {
        Self(Arc::new(Counted { open: AtomicUsize::new(0), calm, places: Places::new(most) }))
    }

    /// None for one more of the network that has the most when all is taken. Who has to leave for somebody else's request
    /// goes on with its own, and only has no room for more: so there are never many above the most.
    fn room(&self, source: IpAddr) -> Option<Room> {
        let before = self.0.open.fetch_add(1, Ordering::Relaxed);
        // Gives it back when it is dropped.
        let mut room = Room { crowd: self.clone(), place: None };
        if before >= self.0.calm {
            room.place = Some(self.0.places.take(source)?);
        }
        Some(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.crowd.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The requests of one connection that are not done, by when they have to be.
#[derive(Debug, Default)]
pub(super) struct Unanswered(Mutex<Requested>);

#[derive(Debug, Default)]
struct Requested {
    open: BTreeSet<(Instant, u64)>,
    count: u64,
    /// Those of them that ask for one certificate, which takes no time.
    short: usize,
    /// Who waits for the last of these.
    waker: Option<Waker>,
}

impl Unanswered {
    /// Whether one is above its time.
    pub(super) fn is_overdue(&self) -> bool {
        self.lock().open.first().is_some_and(|(deadline, _)| *deadline < Instant::now())
    }

    /// Whether there is one that will be answered in no time. Whoever waits for that to change is woken.
    pub(super) fn any_but_wake(&self, waker: &Waker) -> bool {
        let mut all = self.lock();
        if all.short == 0 {
            return false;
        }
        match &mut all.waker {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        true
    }

    pub(super) fn begin(self: &Arc<Self>, within: Duration, is_short: bool) -> Open {
        let mut all = self.lock();
        all.count += 1;
        all.short += usize::from(is_short);
        let at = (Instant::now() + within, all.count);
        all.open.insert(at);
        Open { of: self.clone(), at, is_short }
    }

    fn lock(&self) -> MutexGuard<'_, Requested> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that is not done.
pub(super) struct Open {
    of: Arc<Unanswered>,
    at: (Instant, u64),
    is_short: bool,
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut all = self.of.lock();
        all.open.remove(&self.at);
        all.short -= usize::from(self.is_short);
        if all.short == 0
            && let Some(waker) = all.waker.take()
        {
            drop(all);
            waker.wake();
        }
    }
}

/// What the requests of a service have: their room and their time.
#[derive(Clone)]
pub(super) struct Terms {
    /// None for as long as clients like.
    within: Option<Duration>,
    crowd: Crowd,
    counted: Option<(Arc<Requests>, &'static str)>,
    /// Methods that have a crowd, and a time, of their own.
    apart: Vec<(&'static str, Option<Duration>, Crowd)>,
}

impl Terms {
    pub(super) fn new(within: Duration, crowd: &Crowd) -> Self {
        Self { within: Some(within), ..Self::endless(crowd) }
    }

    /// Of requests that may be listened to for ever.
    pub(super) fn endless(crowd: &Crowd) -> Self {
        Self { within: None, crowd: crowd.clone(), counted: None, apart: Vec::new() }
    }

    /// Of a service one of whose methods takes no room from the others, and has this time.
    pub(super) fn apart(mut self, path: &'static str, within: Option<Duration>, crowd: Crowd) -> Self {
        self.apart.push((path, within, crowd));
        self
    }

    /// Of a service that has one method, which asks for a certificate: what never gets there counts too, and what is written
    /// to a connection waits for the answer, for it takes no time.
    pub(super) fn counted(self, requests: &Arc<Requests>, method: &'static str) -> Self {
        Self { counted: Some((requests.clone(), method)), ..self }
    }
}

impl Gate for Terms {
    type Held = Option<Held>;

    fn enter<B>(&self, request: &Request<B>) -> Result<Option<Held>, Status> {
        // Set by the listener, for every connection.
        let Some(super::Connected { peer, unanswered }) = request.extensions().get() else { return Ok(None) };
        let (source, begun) = (peer.source, Instant::now());
        let apart = self.apart.iter().find(|(path, ..)| request.uri().path() == *path);
        let (crowd, within) = apart.map_or((&self.crowd, self.within), |(_, within, crowd)| (crowd, *within));
        let counted = self.counted.clone();
        let unread = counted.map(|(requests, method)| Unread { requests, method, source, begun });
        match crowd.room(source) {
            Some(room) => {
                let open = within.map(|within| unanswered.begin(within, self.counted.is_some()));
                Ok(Some(Held { open, _room: room, unread }))
            }
            None => Err(refused(unread.as_ref(), &Full.into())),
        }
    }

    fn answered(held: &Option<Held>, response: Response<Body>) -> Response<Body> {
        let unread = held.as_ref().and_then(|held| held.unread.as_ref());
        // Who listens for ever sends no CSR.
        let listens = held.as_ref().is_some_and(|held| held.open.is_none());
        if listens || !is_too_large(&response) {
            return response;
        }
        let sentence = format!("the request is longer than {LARGEST_MESSAGE} bytes");
        refused(unread, &Refusal::new(Reason::CsrMalformed, sentence)).into_http()
    }
}

/// What a request holds until its answer is gone.
pub(super) struct Held {
    open: Option<Open>,
    _room: Room,
    unread: Option<Unread>,
}

/// What is known of a request that nobody reads.
struct Unread {
    requests: Arc<Requests>,
    method: &'static str,
    source: IpAddr,
    begun: Instant,
}

fn refused(unread: Option<&Unread>, refusal: &Refusal) -> Status {
    if let Some(Unread { requests, method, source, begun }) = unread {
        requests.answered(method, None, Some(refusal), *begun, *source, None);
    }
    status(refusal)
}

/// What tonic answers to a message above the limit; nothing of Mica's uses this code.
fn is_too_large(response: &Response<Body>) -> bool {
    response.headers().contains_key("grpc-status")
        && Status::from_header_map(response.headers()).is_some_and(|status| status.code() == Code::OutOfRange)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::Future as _;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tonic::codegen::Service;

    use super::*;

    #[derive(Clone)]
    struct Silent;

    impl Service<Request<()>> for Silent {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::future::Pending<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<()>) -> Self::Future {
            std::future::pending()
        }
    }

    #[tokio::test]
    async fn who_takes_all_the_room_leaves_some_to_others() {
        let crowd = Crowd::of(2, 3);
        let mut service = Terms::new(Duration::from_secs(600), &crowd).before(Silent);
        let mut ask = |source: u8| {
            let peer = Arc::new(crate::auth::Peer::new([10, 0, 0, source].into(), Vec::new()));
            let connected = super::super::Connected { peer, unanswered: Arc::default() };
            let mut answering = service.call(Request::builder().extension(connected).body(()).unwrap());
            let mut cx = Context::from_waker(std::task::Waker::noop());
            match Pin::new(&mut answering).poll(&mut cx) {
                Poll::Pending => Some(answering),
                Poll::Ready(Ok(response)) => {
                    let status = Status::from_header_map(response.headers()).unwrap();
                    assert_eq!(status.code(), Code::ResourceExhausted);
                    None
                }
            }
        };
        let mut held: Vec<_> = (0..5).map(|_| ask(1).unwrap()).collect();
        assert!(ask(1).is_none() && ask(1).is_none());
        held.push(ask(2).unwrap());
        assert!(ask(1).is_none());
        held.push(ask(3).unwrap());
        assert!(ask(2).is_none() && ask(3).is_none());
        assert_eq!(crowd.0.open.load(Ordering::Relaxed), 7);
        held.clear();
        assert_eq!(crowd.0.open.load(Ordering::Relaxed), 0);
        held.extend((0..5).map(|_| ask(1).unwrap()));
    }

    #[test]
    fn the_one_that_is_due_first_decides() {
        let unanswered = Arc::new(Unanswered::default());
        let slow = unanswered.begin(Duration::from_secs(600), true);
        assert!(!unanswered.is_overdue());
        let late = [unanswered.begin(Duration::ZERO, true), unanswered.begin(Duration::ZERO, true)];
        std::thread::sleep(Duration::from_millis(2));
        assert!(unanswered.is_overdue());
        let [first, second] = late;
        drop(first);
        assert!(unanswered.is_overdue());
        drop(second);
        assert!(!unanswered.is_overdue());
        drop(slow);
        assert!(unanswered.lock().open.is_empty());
    }
}
