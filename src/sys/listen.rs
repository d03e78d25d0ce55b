//! A TCP port that clients who say nothing, and never go, do not take from the others.

use std::collections::VecDeque;
use std::future::Future as _;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::{Instant, Sleep, sleep};

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
            match self.inner.accept().await {
                Ok((inner, _)) => {
                    if self.inside.len() >= self.most {
                        self.inside.retain(|stream| !stream.is_closed());
                    }
                    if self.inside.len() >= self.most {
                        self.inside.pop_front();
                    }
                    let (stays, pushed_out) = oneshot::channel();
                    self.inside.push_back(stays);
                    let deadline = Box::pin(sleep(self.time));
                    return Stream { inner, deadline, pushed_out: Some(pushed_out), stays: None };
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

/// A connection that ends, with an error, when its time is over.
#[derive(Debug)]
pub struct Stream {
    inner: TcpStream,
    deadline: Pin<Box<Sleep>>,
    /// Resolves when the listener needs the place.
    pushed_out: Option<oneshot::Receiver<()>>,
    stays: Option<(Duration, OwnedSemaphorePermit)>,
}

impl Stream {
    /// Lets it stay for as long as the client says something now and then, in a place that it gives back at its end.
    /// The listener forgets it.
    pub fn stay(&mut self, idle: Duration, place: OwnedSemaphorePermit) {
        self.pushed_out = None;
        self.stays = Some((idle, place));
        self.deadline.as_mut().reset(Instant::now() + idle);
    }

    /// The connection itself.
    pub fn get_ref(&self) -> &TcpStream {
        &self.inner
    }

    fn unless_over<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let pushed_out = match &mut self.pushed_out {
            Some(pushed_out) => Pin::new(pushed_out).poll(cx).is_ready(),
            None => false,
        };
        if pushed_out || self.deadline.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
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

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.inner).poll_write(cx, bytes) {
            Poll::Pending => self.unless_over(cx),
            written => written,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
