//! Connections of the socket, each with the process at its other end. How many there are is bounded, and of whom.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tonic::transport::server::Connected;

use super::authority::Cleaner;
use crate::sys::listen::{Places, Stream};
use crate::sys::peer::{Moment, Process};

/// Clients that are there answer a ping after 30 seconds.
const IDLE: Duration = Duration::from_secs(60);

/// Without the kernel's word on who connected, a process has to be older than this to be known for sure.
const LOOK: Duration = Duration::from_millis(100);

/// Accepts for ever: a connection that fails ends nothing but itself. When `most` are there, the user with the most
/// connections loses one, of the process with the most.
pub(super) async fn accept(
    listener: UnixListener,
    most: usize,
    accepted: mpsc::Sender<io::Result<Connection>>,
) {
    let places = Places::<u32, u32>::new(most);
    let is_handed_over = Process::is_handed_over();
    let mut before = Moment::now();
    loop {
        let outcome = match is_handed_over {
            true => listener.accept().await,
            false => {
                if let Some(moment) = Moment::when_nobody_waits(&listener) {
                    before = moment;
                }
                let Ok(outcome) = timeout(LOOK, listener.accept()).await else { continue };
                outcome
            }
        };
        let stream = match outcome {
            Ok((stream, _)) => stream,
            Err(fault) => {
                // Such as too many open files, which passes.
                tracing::warn!(%fault, "cannot accept a connection on the socket");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let process = match Process::at_other_end(&stream, before) {
            Ok(process) => process,
            Err(fault) => {
                tracing::info!(%fault, "a connection is closed: its process is not known");
                continue;
            }
        };
        let Some(place) = places.take_for(process.uid, process.pid) else {
            let Process { pid, uid, .. } = process;
            tracing::warn!(most, pid, uid, "a process is sent away: too many are connected");
            continue;
        };
        let stream = Stream::staying(stream, IDLE, place);
        if accepted.send(Ok(Connection { stream, cleaner: Cleaner::new(), process })).await.is_err() {
            return;
        }
    }
}

/// A connection, and who made it.
pub(super) struct Connection {
    stream: Stream<UnixStream, u32, u32>,
    cleaner: Cleaner,
    process: Process,
}

impl Connected for Connection {
    type ConnectInfo = Process;

    fn connect_info(&self) -> Process {
        self.process.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        self.cleaner.clean(&mut buffer.filled_mut()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
