//! Which of several replicas may write: what one of them does about the lease, given what it saw of it and when.
//!
//! Moments are told by the replica's own clock, as the time since it began, which nobody sets. What stands in the lease
//! of moments is another machine's word, and for people only.

use std::time::Duration;

/// What a lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Changes with each write.
    pub version: String,
    /// Who may write; empty if it was given back.
    pub holder: String,
    /// For how long after each write.
    pub lasts: Duration,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make the lease, one's own.
    Create,
    /// Take it over from whoever had it.
    Take,
    /// Write it again, since it is one's own.
    Renew,
    /// Nothing: somebody else has it.
    Wait,
}

/// One replica, and what it has seen.
#[derive(Clone, Debug)]
pub struct Candidate {
    name: String,
    lasts: Duration,
    /// So much longer than it lasts another's lease is respected.
    margin: Duration,
    seen: Option<Seen>,
    /// Whether it is there, as was last seen.
    there: bool,
    until: Option<Duration>,
}

/// A version of the lease, and since when it is the last one known.
#[derive(Clone, Debug)]
struct Seen {
    record: Record,
    since: Duration,
}

impl Candidate {
    /// Has seen nothing, and may not write.
    pub fn new(name: String, lasts: Duration, margin: Duration) -> Self {
        Self { name, lasts, margin, seen: None, there: false, until: None }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes what was read, or that there is no lease.
    pub fn saw(&mut self, record: Option<Record>, now: Duration) {
        self.there = record.is_some();
        // One that was removed says nothing new of who held it.
        let Some(record) = record else { return };
        if record.holder != self.name {
            self.until = None;
        }
        if self.seen.as_ref().is_none_or(|seen| seen.record.version != record.version) {
            self.seen = Some(Seen { record, since: now });
        }
    }

    /// Takes that a write of one's own, begun then, was done, and what the lease says since.
    pub fn wrote(&mut self, record: Record, begun: Duration, now: Duration) {
        // Others count from when they see it, which is later.
        self.until = Some(begun + self.lasts);
        self.there = true;
        self.seen = Some(Seen { record, since: now });
    }

    /// What to do now about what was seen last.
    pub fn step(&self, now: Duration) -> Step {
        match &self.seen {
            Some(seen) if seen.record.holder == self.name => {
                if self.there {
                    Step::Renew
                } else {
                    Step::Create
                }
            }
            Some(seen) if !seen.record.holder.is_empty() && now < self.end_of(seen) => Step::Wait,
            Some(_) if self.there => Step::Take,
            _ => Step::Create,
        }
    }

    /// How long another's lease is respected from now on, unless it is renewed.
    pub fn patience(&self, now: Duration) -> Duration {
        self.seen.as_ref().map_or(Duration::ZERO, |seen| self.end_of(seen).saturating_sub(now))
    }

    fn end_of(&self, seen: &Seen) -> Duration {
        // Whoever holds it counts with what stands in it, which may be more than we would give ourselves.
        seen.since.saturating_add(seen.record.lasts.max(self.lasts)).saturating_add(self.margin)
    }

    /// Until when it may write, if nothing comes between.
    pub fn until(&self, now: Duration) -> Option<Duration> {
        self.until.filter(|until| now < *until)
    }

    /// Gives up what it has.
    pub fn resign(&mut self) {
        self.until = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LASTS: Duration = Duration::from_secs(15);
    const MARGIN: Duration = Duration::from_secs(1);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn candidate() -> Candidate {
        Candidate::new("me".to_owned(), LASTS, MARGIN)
    }

    fn record(version: &str, holder: &str) -> Option<Record> {
        Some(Record { version: version.to_owned(), holder: holder.to_owned(), lasts: LASTS })
    }

    #[test]
    fn each_situation_has_its_step() {
        let long = Some(Record { lasts: at(60), ..record("1", "you").unwrap() });
        let never = Some(Record { lasts: Duration::MAX, ..record("1", "you").unwrap() });
        let none = Some(Record { lasts: Duration::ZERO, ..record("1", "you").unwrap() });
        let (yours, later, mine, free) =
            (record("1", "you"), record("2", "you"), record("3", "me"), record("4", ""));
        for (what, seen, now, wanted) in [
            ("nothing was there", vec![(None, 0)], 0, Step::Create),
            ("it is free", vec![(free.clone(), 0)], 0, Step::Take),
            ("another has it", vec![(yours.clone(), 0)], 15, Step::Wait),
            ("it was not renewed", vec![(yours.clone(), 0)], 16, Step::Take),
            (
                "it was not renewed, and looked at often",
                vec![(yours.clone(), 0), (yours.clone(), 14)],
                16,
                Step::Take,
            ),
            ("it was renewed", vec![(yours.clone(), 0), (later.clone(), 14)], 29, Step::Wait),
            ("it was renewed once", vec![(yours.clone(), 0), (later.clone(), 14)], 30, Step::Take),
            ("it was seen late", vec![(yours.clone(), 1000)], 1015, Step::Wait),
            ("it lasts longer", vec![(long.clone(), 0)], 60, Step::Wait),
            ("it lasted longer", vec![(long, 0)], 61, Step::Take),
            ("it never ends", vec![(never, 0)], 1 << 40, Step::Wait),
            ("it says that it lasts not at all", vec![(none, 0)], 15, Step::Wait),
            ("it was given back", vec![(yours.clone(), 0), (free, 1)], 1, Step::Take),
            ("it was removed while another had it", vec![(yours.clone(), 0), (None, 1)], 15, Step::Wait),
            ("it was removed, and its time is over", vec![(yours, 0), (None, 1)], 16, Step::Create),
            ("a write of ours was done and not answered", vec![(mine.clone(), 0)], 0, Step::Renew),
            ("ours was removed", vec![(mine, 0), (None, 1)], 1, Step::Create),
        ] {
            let mut candidate = candidate();
            for (record, moment) in seen {
                candidate.saw(record, at(moment));
                assert_eq!(candidate.until(at(moment)), None, "{what}");
            }
            assert_eq!(candidate.step(at(now)), wanted, "{what}");
            if wanted == Step::Wait {
                let then = at(now).saturating_add(candidate.patience(at(now)));
                assert_ne!(candidate.step(then), Step::Wait, "{what}");
            }
        }
    }

    #[test]
    fn it_may_write_until_its_time_is_over_or_another_has_it() {
        let mut candidate = candidate();
        candidate.wrote(record("1", "me").unwrap(), at(10), at(13));
        // From when the write was begun.
        assert_eq!((candidate.until(at(24)), candidate.until(at(25))), (Some(at(25)), None));
        assert_eq!(candidate.step(at(25)), Step::Renew);
        // Neither a look nor its absence make it longer or shorter.
        candidate.saw(record("2", "me"), at(20));
        candidate.saw(None, at(21));
        assert_eq!(candidate.until(at(24)), Some(at(25)));
        candidate.wrote(record("3", "me").unwrap(), at(22), at(22));
        assert_eq!(candidate.until(at(24)), Some(at(37)));
        candidate.saw(record("4", "you"), at(25));
        assert_eq!((candidate.until(at(25)), candidate.step(at(25))), (None, Step::Wait));
        candidate.wrote(record("5", "me").unwrap(), at(50), at(50));
        candidate.resign();
        assert_eq!(candidate.until(at(50)), None);
    }

    /// Two with clocks of their own, requests that take their time, and one that is cut off: never both at once.
    #[test]
    fn no_two_may_write_at_the_same_moment() {
        for cut_at in 0..40 {
            for slow in 0..5 {
                let mut lease: Option<Record> = None;
                let mut version = 0;
                // The second one's clock shows another time, which is of no importance.
                let mut both = [(candidate(), 0), (candidate(), 1_000_000)];
                both[1].0.name = "you".to_owned();
                let mut taken_over = false;
                for now in 0..120 {
                    for (i, (candidate, clock)) in both.iter_mut().enumerate() {
                        let cut = i == 0 && now >= cut_at;
                        if cut || now % 2 != i as u64 {
                            continue;
                        }
                        let own = at(now + *clock);
                        candidate.saw(lease.clone(), own);
                        if candidate.step(own) != Step::Wait {
                            version += 1;
                            lease = record(&version.to_string(), candidate.name());
                            // It is done now, and was begun a while ago.
                            let begun = own.saturating_sub(at(slow));
                            candidate.wrote(lease.clone().unwrap(), begun, own);
                        }
                    }
                    let may: Vec<_> =
                        both.iter().filter(|(c, clock)| c.until(at(now + clock)).is_some()).collect();
                    assert!(may.len() <= 1, "cut off at {cut_at}, {slow} slow, moment {now}: {may:?}");
                    taken_over |= may.first().is_some_and(|(candidate, _)| candidate.name() == "you");
                }
                assert!(taken_over, "cut off at {cut_at}");
            }
        }
    }
}
