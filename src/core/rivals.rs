//! Whether to write an object that others write, too: damage is repaired, and nobody is fought.

use std::time::Duration;

/// What was done to an object so long ago counts no longer.
const WINDOW: Duration = Duration::from_secs(10 * 60);
/// A program that has undone it so many times goes on doing so.
const PROGRAM: u32 = 2;
/// People, and whoever deletes without a name, have more tries, all of them together.
const PEOPLE: u32 = 5;
/// An object that was given up is looked at again after so long, then after twice as long each time.
const FIRST_LOOK: Duration = Duration::from_secs(10 * 60);
const LAST_LOOK: Duration = Duration::from_secs(24 * 60 * 60);
/// So many writers are told apart.
const WRITERS: usize = 8;

/// What an object was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// As it should be.
    AsWanted,
    /// Not there, and never was.
    Never,
    /// Somebody has deleted it.
    Deleted,
    /// What this very writer has left, and wants no longer.
    Outdated,
    /// What another has written, by the name of its field manager.
    Foreign(&'a str),
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing.
    Leave,
    /// Write it.
    Write,
    /// Write it no longer, and tell somebody.
    GiveUp,
}

/// What has happened to one object lately. Times are counted from any one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Who has undone it, and how many times.
    undone: Vec<(Box<str>, u32)>,
    /// The last time that anything happened.
    last: Duration,
    /// When it was given up, until when.
    paused: Option<Duration>,
    /// How long it was given up the last time.
    pause: Duration,
}

impl History {
    /// Judges an object that was found to have changed, or that is looked at again.
    pub fn judge(&mut self, found: Found<'_>, now: Duration) -> Step {
        if self.is_over(now) {
            *self = Self::default();
        }
        let writer = match found {
            Found::AsWanted => {
                self.paused = None;
                return Step::Leave;
            }
            _ if self.paused.is_some_and(|until| now < until) => return Step::Leave,
            Found::Never | Found::Outdated => {
                self.paused = None;
                return Step::Write;
            }
            Found::Deleted => "",
            Found::Foreign(writer) => writer,
        };
        self.last = now;
        // One look, to see whether the other still is there.
        if self.paused.take().is_some() {
            return Step::Write;
        }
        if self.count(writer) < if is_program(writer) { PROGRAM } else { PEOPLE } {
            return Step::Write;
        }
        self.pause = (self.pause * 2).clamp(FIRST_LOOK, LAST_LOOK);
        self.paused = Some(now + self.pause);
        Step::GiveUp
    }

    /// Until when the object is given up.
    pub fn paused(&self) -> Option<Duration> {
        self.paused
    }

    /// Whether nothing of it matters any more.
    pub fn is_over(&self, now: Duration) -> bool {
        self.paused.is_none() && now >= self.last + WINDOW.max(self.pause * 2)
    }

    /// How many times this writer has undone it; of people, how many times they all have.
    fn count(&mut self, writer: &str) -> u32 {
        match self.undone.iter_mut().find(|(known, _)| **known == *writer) {
            Some((_, times)) => *times += 1,
            None => {
                if self.undone.len() == WRITERS {
                    self.undone.remove(0);
                }
                self.undone.push((writer.into(), 1));
            }
        }
        let counted = self.undone.iter().filter(|(known, _)| match is_program(writer) {
            true => **known == *writer,
            false => !is_program(known),
        });
        counted.map(|(_, times)| times).sum()
    }
}

/// Whether a field manager is not a person's tool. Nameless is who deletes.
fn is_program(writer: &str) -> bool {
    !writer.is_empty() && !writer.starts_with("kubectl")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ISTIOD: Found<'_> = Found::Foreign("pilot-discovery");
    const PERSON: Found<'_> = Found::Foreign("kubectl-edit");

    /// What is done about what is found, each a second after the one before unless another time is given.
    fn steps(found: &[(u64, Found<'_>)]) -> Vec<Step> {
        let mut history = History::default();
        found.iter().map(|(at, found)| history.judge(*found, Duration::from_secs(*at))).collect()
    }

    #[test]
    fn what_to_do_follows_from_what_was_done() {
        use Step::{GiveUp, Leave, Write};
        let other = Found::Foreign("mica of mica-two");
        type Case<'a> = (&'a str, &'a [(u64, Found<'a>)], &'a [Step]);
        let cases: &[Case<'_>] = &[
            ("it is not there yet", &[(0, Found::Never), (1, Found::AsWanted)], &[Write, Leave]),
            ("the roots have changed", &[(0, Found::Outdated), (5, Found::Outdated)], &[Write, Write]),
            ("a dead istiod has left it", &[(0, ISTIOD), (0, Found::AsWanted)], &[Write, Leave]),
            (
                "a living istiod",
                &[(0, Found::Never), (0, Found::AsWanted), (1, ISTIOD), (1, Found::AsWanted), (2, ISTIOD)],
                &[Write, Leave, Write, Leave, GiveUp],
            ),
            (
                "it goes on",
                &[(0, ISTIOD), (1, ISTIOD), (2, ISTIOD), (600, ISTIOD)],
                &[Write, GiveUp, Leave, Leave],
            ),
            ("and is deleted", &[(0, ISTIOD), (1, ISTIOD), (2, Found::Deleted)], &[Write, GiveUp, Leave]),
            (
                "or the roots change",
                &[(0, ISTIOD), (1, ISTIOD), (2, Found::Outdated)],
                &[Write, GiveUp, Leave],
            ),
            (
                "a living one, looked at again after ten minutes, then twenty",
                &[(0, ISTIOD), (1, ISTIOD), (601, ISTIOD), (602, ISTIOD), (1801, ISTIOD), (1802, ISTIOD)],
                &[Write, GiveUp, Write, GiveUp, Leave, Write],
            ),
            (
                "one that has ended meanwhile",
                &[(0, ISTIOD), (1, ISTIOD), (601, ISTIOD), (601, Found::AsWanted), (2000, ISTIOD)],
                &[Write, GiveUp, Write, Leave, Write],
            ),
            (
                "one that begins again ten minutes later",
                &[(0, ISTIOD), (600, ISTIOD), (1200, ISTIOD)],
                &[Write, Write, Write],
            ),
            ("two others", &[(0, ISTIOD), (1, other), (2, ISTIOD)], &[Write, Write, GiveUp]),
            ("another mica", &[(0, other), (1, other)], &[Write, GiveUp]),
            (
                "a person",
                &[(0, PERSON), (9, PERSON), (20, PERSON), (30, PERSON), (40, PERSON)],
                &[Write, Write, Write, Write, GiveUp],
            ),
            (
                "one who deletes and edits",
                &[
                    (0, Found::Deleted),
                    (1, PERSON),
                    (2, Found::Deleted),
                    (3, Found::Foreign("kubectl-patch")),
                    (4, Found::Deleted),
                ],
                &[Write, Write, Write, Write, GiveUp],
            ),
            (
                "a person after a dead istiod",
                &[(0, ISTIOD), (9, PERSON), (20, PERSON)],
                &[Write, Write, Write],
            ),
            (
                "given up, and then as wanted",
                &[(0, ISTIOD), (1, ISTIOD), (2, Found::AsWanted), (3, ISTIOD)],
                &[Write, GiveUp, Leave, GiveUp],
            ),
        ];
        for (name, found, wanted) in cases {
            assert_eq!(steps(found), *wanted, "{name}");
        }
    }

    #[test]
    fn a_rival_for_a_year_is_written_over_about_once_a_day() {
        let (mut history, mut writes, mut gave_up) = (History::default(), 0, 0);
        for minute in 0..365 * 24 * 60 {
            match history.judge(ISTIOD, Duration::from_secs(60 * minute)) {
                Step::Write => writes += 1,
                Step::GiveUp => gave_up += 1,
                Step::Leave => {}
            }
        }
        assert!((365..380).contains(&writes) && (365..380).contains(&gave_up), "{writes} {gave_up}");
    }

    #[test]
    fn many_writers_take_little_room_and_what_is_long_ago_none() {
        let mut history = History::default();
        for n in 0..1000u64 {
            history.judge(Found::Foreign(&format!("writer-{n}")), Duration::from_secs(n));
        }
        assert!(history.undone.len() <= WRITERS);
        assert!(!history.is_over(Duration::from_secs(1000)) && history.is_over(Duration::from_secs(1600)));
    }
}
