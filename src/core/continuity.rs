//! Whether what a server says goes on from what it said before.
//!
//! One that was away may have come back as a backup of itself. Nothing that it says shows that, if the backup has all
//! that was asked for last. Moments are told as the time since some beginning.

use std::time::Duration;

/// One that is asked every second or two and was silent for longer was away.
pub const SILENCE: Duration = Duration::from_secs(4);
/// All is read again at most this often, so that a server that has trouble does not get more of it.
pub const REST: Duration = Duration::from_secs(60);

/// One server, as far as it was asked.
#[derive(Clone, Debug, Default)]
pub struct Continuity {
    answered: Option<Duration>,
    was_away: bool,
    rested: Duration,
}

impl Continuity {
    /// It did not answer. Before it ever has, there is nothing to go on from.
    pub fn failed(&mut self) {
        self.was_away |= self.answered.is_some();
    }

    /// It answered. True if all that it said before has to be asked for again.
    pub fn answered(&mut self, now: Duration) -> bool {
        let before = self.answered.replace(now);
        self.was_away |= before.is_some_and(|before| now.saturating_sub(before) > SILENCE);
        let again = self.was_away && now >= self.rested;
        if again {
            self.was_away = false;
            self.rested = now + REST;
        }
        again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_server_that_was_away_is_asked_for_everything_again() {
        let mut server = Continuity::default();
        server.failed();
        assert!(!server.answered(at(30)), "nothing was said before");
        assert!(!server.answered(at(34)), "it was asked in time");
        assert!(server.answered(at(39)), "it was silent");
        assert!(!server.answered(at(40)), "that was done");
    }

    #[test]
    fn one_that_often_fails_is_asked_for_everything_once_a_minute() {
        let mut server = Continuity::default();
        let mut again = Vec::new();
        for now in 0..=200 {
            if now % 3 == 1 {
                server.failed();
            } else if server.answered(at(now)) {
                again.push(now);
            }
        }
        assert_eq!(again, [2, 62, 122, 182]);
        // Nothing is forgotten in between.
        server.failed();
        assert!((201..242).all(|now| !server.answered(at(now))));
        assert!(server.answered(at(242)));
        assert!((243..400).all(|now| !server.answered(at(now))));
    }
}
