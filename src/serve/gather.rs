//! What is written to a connection, gathered. The answers of a moment leave together: one record, one packet and one
//! system call for all of them, where the HTTP library writes each frame by itself.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::bounds::Unanswered;
use crate::telemetry;

/// What a TLS record holds at most (RFC 8446 5.1). More is written without waiting for more.
const MOST: usize = 16 * 1024;
/// Room for a few answers, at first.
const ROOM: usize = 8 * 1024;
/// An answer waits for others of its client no longer than this.
const PATIENCE: Duration = Duration::from_millis(2);

/// A stream whose writes are gathered until they are flushed, and until other tasks that are ready have had a chance to
/// write, too. While the client waits for another certificate, they go on waiting for that.
#[derive(Debug)]
pub(super) struct Gather<S> {
    stream: S,
    unanswered: Arc<Unanswered>,
    /// Whether the client has said anything. Until then nothing waits: it may wait for the server's settings, and the HTTP
    /// library flushes those once.
    heard: bool,
    /// Not written yet, from `written` on. Empty, and without memory, on a connection that idles.
    gathered: Vec<u8>,
    written: usize,
    waiting: Option<Waiting>,
}

/// What is gathered is written
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Now,
    /// once the tasks that are ready have had a turn,
    NextTurn,
    /// or with the last certificate that the client waits for, unless patience ends first.
    Later,
}

/// For what other tasks may write.
#[derive(Debug)]
struct Waiting {
    since: Instant,
    /// How much there was when it was last flushed.
    flushed: usize,
    /// Whether the others had their turn: the HTTP library reads before it writes in each of its own. When new requests
    /// come it does both again in the same turn, and what waits may leave early then, which costs a packet.
    over: bool,
    patience: Option<Pin<Box<Sleep>>>,
}

impl<S> Gather<S> {
    pub(super) fn new(stream: S, unanswered: Arc<Unanswered>) -> Self {
        Self { stream, unanswered, heard: false, gathered: Vec::new(), written: 0, waiting: None }
    }
}

impl<S: AsyncWrite + Unpin> Gather<S> {
    fn when(&mut self, now: Instant, waker: &Waker) -> When {
        let length = self.gathered.len();
        if !self.heard || length == 0 || self.written > 0 || length >= MOST {
            return When::Now;
        }
        let none = Waiting { since: now, flushed: 0, over: false, patience: None };
        let waiting = self.waiting.get_or_insert(none);
        if now - waiting.since >= PATIENCE {
            return When::Now;
        }
        let has_grown = std::mem::replace(&mut waiting.flushed, length) < length;
        if self.unanswered.any_but_wake(waker) {
            return When::Later;
        }
        // An answer is of three frames, each of which is flushed.
        waiting.over &= !has_grown;
        if waiting.over { When::Now } else { When::NextTurn }
    }

    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.written < self.gathered.len() {
            // Also when a part is written already: more answers may have come behind it.
            telemetry::flush();
        }
        while self.written < self.gathered.len() {
            let rest = &self.gathered[self.written..];
            match ready!(Pin::new(&mut self.stream).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.written += count,
            }
        }
        self.gathered = Vec::new();
        self.written = 0;
        self.waiting = None;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gather<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some(waiting) = &mut self.waiting {
            waiting.over = true;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.heard |= buffer.filled().len() > before;
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gather<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.gathered.len() >= MOST {
            ready!(self.poll_write_out(cx))?;
        }
        if self.gathered.capacity() == 0 {
            self.gathered.reserve(ROOM);
        }
        let before = self.gathered.len();
        pieces.iter().for_each(|piece| self.gathered.extend_from_slice(piece));
        Poll::Ready(Ok(self.gathered.len() - before))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.when(Instant::now(), cx.waker()) {
            When::Now => {}
            When::NextTurn => {
                // A task that wakes itself comes after those that are ready. What else there is to write is welcome.
                cx.waker().wake_by_ref();
                return Poll::Ready(Ok(()));
            }
            When::Later => {
                if let Some(Waiting { since, patience, .. }) = &mut self.waiting {
                    let over = *since + PATIENCE;
                    let patience = patience.get_or_insert_with(|| Box::pin(sleep_until(over)));
                    if patience.as_mut().poll(cx).is_pending() {
                        return Poll::Ready(Ok(()));
                    }
                }
            }
        }
        ready!(self.poll_write_out(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_out(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    /// Counts what is written at once, and says nothing.
    struct Counted {
        writes: Vec<Vec<u8>>,
    }

    impl AsyncRead for Counted {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Counted {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.writes.push(bytes.to_vec());
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn gather<S>(stream: S) -> Gather<S> {
        Gather { heard: true, ..Gather::new(stream, Arc::default()) }
    }

    fn counted() -> Gather<Counted> {
        gather(Counted { writes: Vec::new() })
    }

    /// Others had theirs, and then the HTTP library reads.
    fn turn(gather: &mut Gather<Counted>) {
        let mut cx = Context::from_waker(Waker::noop());
        assert!(Pin::new(gather).poll_read(&mut cx, &mut ReadBuf::new(&mut [0])).is_pending());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_written_until_it_is_the_next_turn_leaves_at_once() {
        let mut gather = counted();
        gather.write_all(b"head").await.unwrap();
        gather.flush().await.unwrap();
        gather.write_all(b"body").await.unwrap();
        gather.flush().await.unwrap();
        assert!(gather.stream.writes.is_empty());
        turn(&mut gather);
        gather.write_all(b"more").await.unwrap();
        gather.flush().await.unwrap();
        assert!(gather.stream.writes.is_empty(), "the rest of it may follow");
        turn(&mut gather);
        gather.flush().await.unwrap();
        assert_eq!(gather.stream.writes, [b"headbodymore".to_vec()]);
        assert_eq!(gather.gathered.capacity(), 0);
        gather.write_all(b"next").await.unwrap();
        gather.shutdown().await.unwrap();
        assert_eq!(gather.stream.writes[1..], [b"next".to_vec()]);
    }

    #[test]
    fn an_answer_waits_for_a_turn_and_not_for_long() {
        let begun = Instant::now();
        let at = |microseconds| begun + Duration::from_micros(microseconds);
        let answer = || Gather { gathered: b"answer".to_vec(), ..counted() };
        let when = |gather: &mut Gather<_>, microseconds| gather.when(at(microseconds), Waker::noop());
        let mut one = answer();
        assert_eq!([0, 1_999].map(|us| when(&mut one, us)), [When::NextTurn; 2]);
        assert_eq!(when(&mut one, 2_000), When::Now);
        turn(&mut one);
        assert_eq!(when(&mut one, 1_999), When::Now);
        one.gathered.extend(b"head");
        turn(&mut one);
        assert_eq!(when(&mut one, 1_000), When::NextTurn);
        one.gathered.extend(b"body");
        assert_eq!(when(&mut one, 1_000), When::NextTurn);
        turn(&mut one);
        let other = one.unanswered.begin(Duration::from_secs(30), true);
        assert_eq!([1_000, 2_000].map(|us| when(&mut one, us)), [When::Later, When::Now]);
        // What takes its time is not waited for.
        let long = one.unanswered.begin(Duration::from_secs(30), false);
        assert_eq!(when(&mut one, 1_000), When::Later);
        drop(other);
        assert_eq!(when(&mut one, 1_000), When::Now);
        drop(long);
        assert_eq!(when(&mut one, 1_000), When::Now);
        let mut full = answer();
        full.gathered.resize(MOST, 0);
        assert_eq!(when(&mut full, 0), When::Now);
        assert_eq!(when(&mut counted(), 0), When::Now, "there is nothing to wait with");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_waits_for_the_last_of_its_client_and_leaves_without_it_when_patience_is_over() {
        for (others, last_comes) in [(1, true), (1, false), (0, true)] {
            let mut gather = counted();
            let mut open: Vec<_> =
                (0..others).map(|_| gather.unanswered.begin(Duration::from_secs(30), true)).collect();
            let begun = Instant::now();
            let mut polls = 0;
            gather.write_all(b"answer").await.unwrap();
            // The HTTP library reads and flushes at each poll of the connection.
            poll_fn(|cx| {
                polls += 1;
                turn(&mut gather);
                assert!(Pin::new(&mut gather).poll_flush(cx).is_ready());
                if polls == 1 {
                    assert!(gather.stream.writes.is_empty());
                    if last_comes {
                        open.clear();
                    }
                }
                if gather.stream.writes.is_empty() { Poll::Pending } else { Poll::Ready(()) }
            })
            .await;
            assert_eq!(polls, 2, "it was polled only when there was a reason");
            let waited = begun.elapsed();
            assert!(if last_comes { waited.is_zero() } else { waited >= PATIENCE && waited < 2 * PATIENCE });
        }
    }

    /// RFC 9113 3.2: both sides speak as soon as the handshake is done.
    #[tokio::test]
    async fn who_waits_for_the_servers_settings_gets_them() {
        let (ours, mut theirs) = duplex(1_024);
        let mut gather = Gather::new(ours, Arc::default());
        gather.write_all(b"settings").await.unwrap();
        gather.flush().await.unwrap();
        let mut read = [0; 8];
        theirs.read_exact(&mut read).await.unwrap();
        assert_eq!(read, *b"settings");
        theirs.write_all(b"PRI").await.unwrap();
        assert_eq!(gather.read(&mut read).await.unwrap(), 3);
        gather.write_all(b"answer").await.unwrap();
        assert_eq!(gather.when(Instant::now(), Waker::noop()), When::NextTurn);
    }

    #[tokio::test]
    async fn who_reads_nothing_is_written_no_more_than_a_record_and_a_piece() {
        let (ours, mut theirs) = duplex(8);
        let mut gather = gather(ours);
        let piece = [7; MOST - 1];
        let mut taken = 0;
        let refused = poll_fn(|cx| {
            for _ in 0..10 {
                match Pin::new(&mut gather).poll_write(cx, &piece) {
                    Poll::Ready(count) => taken += count.unwrap(),
                    Poll::Pending => return Poll::Ready(true),
                }
            }
            Poll::Ready(false)
        });
        assert!(refused.await);
        assert_eq!(taken, 2 * piece.len());
        let ends = async {
            gather.shutdown().await.unwrap();
            drop(gather);
        };
        let mut read = Vec::new();
        let (_, count) = tokio::join!(ends, theirs.read_to_end(&mut read));
        assert_eq!(count.unwrap(), taken);
    }
}
