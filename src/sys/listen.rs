//! A TCP port, or a socket, that clients who say nothing, and never go, do not take from the others.

use std::collections::VecDeque;
use std::future::Future as _;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep};

use crate::core::fair::{self, Fair};

/// Raises the number of files this process may hold open to what it is allowed, and tells it.
pub fn raise_open_files() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let now = if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current };
    now.and_then(|now| now.try_into().ok()).unwrap_or(usize::MAX)
}

/// Accepts connections, each with a time in which it has to be done. When there are too many of them a newcomer takes
/// the place of the one that has been there longest, which had the most time.
#[derive(Debug)]
pub struct Listener {
    inner: TcpListener,
    most: usize,
    time: Duration,
    inside: VecDeque<oneshot::Sender<()>>,
}

impl Listener {
    /// At most so many connections, each for so long.
    pub fn new(inner: TcpListener, most: usize, time: Duration) -> Self {
        Self { inner, most, time, inside: VecDeque::new() }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    /// The next connection. Cancel safe.
    pub async fn accept(&mut self) -> Stream {
        loop {
            if self.inside.len() >= self.most {
                // Those that were pushed out hold their files until they have had a turn.
                tokio::task::yield_now().await;
            }
            match self.inner.accept().await {
                Ok((inner, _)) => {
                    // An answer is not kept back for the one after it.
                    let _ = inner.set_nodelay(true);
                    if self.inside.len() >= self.most {
                        self.inside.retain(|stream| !stream.is_closed());
                    }
                    if self.inside.len() >= self.most {
                        self.inside.pop_front();
                    }
                    let (stays, pushed_out) = oneshot::channel();
                    self.inside.push_back(stays);
                    let deadline = Box::pin(sleep(self.time));
                    let pushed_out = Some(pushed_out);
                    return Stream { inner, deadline, pushed_out, stays: None, stalled: None };
                }
                Err(fault) => {
                    // Such as too many open files, which passes.
                    tracing::warn!(%fault, "cannot accept a connection");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// Places for connections that stay. When all are taken, the source with the most connections loses its newest, and
/// within it the part with the most, and not a newcomer from elsewhere. Clones share the places.
#[derive(Debug)]
pub struct Places<S: Copy + Ord = IpAddr, P: Copy + Ord = ()>(Arc<Mutex<Taken<S, P>>>);

type Taken<S, P> = Fair<S, P, oneshot::Sender<()>>;

/// Given back when dropped.
#[derive(Debug)]
pub struct Place<S: Copy + Ord = IpAddr, P: Copy + Ord = ()> {
    places: Places<S, P>,
    at: fair::Place<S, P>,
    /// Resolves when it is somebody else's.
    pushed_out: Option<oneshot::Receiver<()>>,
}

impl Places {
    /// A place, but for a newcomer of a network that has the most already.
    pub fn take(&self, source: IpAddr) -> Option<Place> {
        self.take_for(network(source), ())
    }
}

impl<S: Copy + Ord, P: Copy + Ord> Clone for Places<S, P> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S: Copy + Ord, P: Copy + Ord> Places<S, P> {
    /// So many.
    pub fn new(most: usize) -> Self {
        Self(Arc::new(Mutex::new(Fair::new(most))))
    }

    /// A place, but for a newcomer of a part, of a source, that has the most already.
    pub fn take_for(&self, source: S, part: P) -> Option<Place<S, P>> {
        let (stays, mut pushed_out) = oneshot::channel();
        let (at, out) = self.taken().push(source, part, stays);
        drop(out);
        let place = match pushed_out.try_recv() {
            Err(oneshot::error::TryRecvError::Closed) => None,
            _ => Some(pushed_out),
        };
        place.map(|pushed_out| Place { places: self.clone(), at, pushed_out: Some(pushed_out) })
    }

    fn taken(&self) -> MutexGuard<'_, Taken<S, P>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Copy + Ord, P: Copy + Ord> Drop for Place<S, P> {
    fn drop(&mut self) {
        let _gone = self.places.taken().remove(&self.at);
    }
}

/// What one client can have: an IPv4 address, or the 2^64 of an IPv6 network.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

/// A connection that ends, with an error, when its time is over.
#[derive(Debug)]
pub struct Stream<I = TcpStream, S: Copy + Ord = IpAddr, P: Copy + Ord = ()> {
    inner: I,
    deadline: Pin<Box<Sleep>>,
    /// Resolves when somebody else needs the place.
    pushed_out: Option<oneshot::Receiver<()>>,
    stays: Option<(Duration, Place<S, P>)>,
    /// Since when the client takes nothing.
    stalled: Option<Instant>,
}

impl<I, S: Copy + Ord, P: Copy + Ord> Stream<I, S, P> {
    /// One that stays, as [`Self::stay`].
    pub fn staying(inner: I, idle: Duration, mut place: Place<S, P>) -> Self {
        let pushed_out = place.pushed_out.take();
        let deadline = Box::pin(sleep(idle));
        Self { inner, deadline, pushed_out, stays: Some((idle, place)), stalled: None }
    }

    /// Lets it stay for as long as the client says something now and then, and takes what it is sent. The listener
    /// forgets it.
    pub fn stay(&mut self, idle: Duration, mut place: Place<S, P>) {
        self.pushed_out = place.pushed_out.take();
        self.stays = Some((idle, place));
        self.deadline.as_mut().reset(Instant::now() + idle);
    }

    /// The connection itself.
    pub fn get_ref(&self) -> &I {
        &self.inner
    }

    fn unless_over<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if self.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }

    /// What came of writing, while the client takes something now and then.
    fn unless_stalled(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let since = *self.stalled.get_or_insert_with(Instant::now);
        if self.stays.as_ref().is_some_and(|(idle, _)| since.elapsed() > *idle) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.unless_over(cx)
    }

    /// Whoever is pushed out stays so.
    fn is_pushed_out(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(pushed_out) = &mut self.pushed_out else { return false };
        if Pin::new(pushed_out).poll(cx).is_pending() {
            return false;
        }
        let (closed, gone) = oneshot::channel();
        drop(closed);
        self.pushed_out = Some(gone);
        true
    }
}

impl<I: AsyncRead + Unpin, S: Copy + Ord + Unpin, P: Copy + Ord + Unpin> AsyncRead for Stream<I, S, P> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_pushed_out(cx) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        match Pin::new(&mut self.inner).poll_read(cx, buffer) {
            Poll::Pending => self.unless_over(cx),
            read => {
                if let Some((idle, _)) = self.stays {
                    self.deadline.as_mut().reset(Instant::now() + idle);
                }
                read
            }
        }
    }
}

impl<I: AsyncWrite + Unpin, S: Copy + Ord + Unpin, P: Copy + Ord + Unpin> AsyncWrite for Stream<I, S, P> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.unless_stalled(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, pieces);
        self.unless_stalled(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
