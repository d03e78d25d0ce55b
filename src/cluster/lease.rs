//! Which replica may write.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::PATIENCE;

/// Whether this replica may write into the cluster, and until when. Clones share one answer.
///
/// Who writes asks [`Leadership::may_write`] before each write, and gives the write at most as long as a request may take:
/// then it has ended before another replica can begin.
#[derive(Clone, Debug)]
pub struct Leadership(watch::Receiver<Option<Instant>>);

impl Leadership {
    /// The only replica there is.
    pub fn always() -> Self {
        const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
        Self(watch::channel(Some(Instant::now() + FOREVER)).1)
    }

    /// Whether a write that begins now ends before another replica can write.
    pub fn may_write(&self) -> bool {
        self.0.borrow().is_some_and(|until| Instant::now() + PATIENCE < until)
    }

    /// Waits until this replica may write.
    pub async fn gained(&mut self) {
        if self.0.wait_for(Option::is_some).await.is_err() {
            std::future::pending().await
        }
    }

    /// Waits until it may not any more.
    pub async fn lost(&mut self) {
        loop {
            let until = *self.0.borrow_and_update();
            let Some(until) = until else { return };
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                changed = self.0.changed() => if changed.is_err() { tokio::time::sleep_until(until).await; return },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until(until: Option<Instant>) -> (watch::Sender<Option<Instant>>, Leadership) {
        let (sender, receiver) = watch::channel(until);
        (sender, Leadership(receiver))
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_could_last_too_long_is_not_begun() {
        let (sender, leadership) = until(None);
        assert!(!leadership.may_write());
        sender.send_replace(Some(Instant::now() + PATIENCE + Duration::from_secs(1)));
        assert!(leadership.may_write());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!leadership.may_write());
    }

    #[tokio::test(start_paused = true)]
    async fn a_term_ends_when_its_time_is_over_and_nobody_has_said_so() {
        let second = Duration::from_secs(1);
        let (sender, mut leadership) = until(None);
        let begun = Instant::now();
        let mut waiting = leadership.clone();
        tokio::join!(waiting.gained(), async { sender.send_replace(Some(begun + second)) });
        sender.send_replace(Some(begun + 2 * second));
        leadership.lost().await;
        assert_eq!(begun.elapsed(), 2 * second);
        assert!(Leadership::always().may_write());
    }
}
