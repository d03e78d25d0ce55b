//! Which of several replicas may write: what one of them does about the lease, given what it saw of it and when.
//!
//! Moments are told by the replica's own clock, as the time since it began, which nobody sets. What stands in the lease
//! of moments is another machine's word, and for people only.

use std::time::Duration;

/// For how long a lease is good after each write, as everybody reads it.
pub const LASTS: Duration = Duration::from_secs(15);
/// For how long its holder writes after the start of the last good one, which it says to its like.
pub const WRITES: Duration = Duration::from_secs(12);
/// The holder writes it about this often.
pub const TURN: Duration = Duration::from_secs(2);
/// Another's is looked at about this often, and one's own written again about this soon after a failure.
pub const LOOK: Duration = Duration::from_secs(1);
/// Another's is respected about so much longer, and those who wait do not come all at once.
pub const MARGIN: Duration = Duration::from_millis(500);

/// What a lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Changes with each write.
    pub version: String,
    /// Who may write; empty if it was given back.
    pub holder: String,
    /// For how long after each write.
    pub lasts: Duration,
    /// For how long after each write its holder writes, if it says so.
    pub writes: Option<Duration>,
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
    /// So much longer another's lease is respected.
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
    pub fn new(name: String, margin: Duration) -> Self {
        Self { name, margin, seen: None, there: false, until: None }
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
        self.until = Some(begun + WRITES);
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
        let respected = match seen.record.writes {
            Some(writes) => writes.max(WRITES),
            None => seen.record.lasts.max(LASTS),
        };
        seen.since.saturating_add(respected).saturating_add(self.margin)
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
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn candidate() -> Candidate {
        Candidate::new("me".to_owned(), at(1))
    }

    /// As one of ours writes it.
    fn record(version: &str, holder: &str) -> Option<Record> {
        let (version, holder) = (version.to_owned(), holder.to_owned());
        Some(Record { version, holder, lasts: LASTS, writes: Some(WRITES) })
    }

    #[test]
    fn each_situation_has_its_step() {
        let with = |lasts, writes| Some(Record { lasts, writes, ..record("1", "you").unwrap() });
        let foreign = with(LASTS, None);
        let long = with(at(60), None);
        let never = with(Duration::MAX, None);
        let none = with(Duration::ZERO, None);
        let (slower, never_ends) = (with(LASTS, Some(at(30))), with(LASTS, Some(Duration::MAX)));
        let in_no_time = with(LASTS, Some(Duration::ZERO));
        let (yours, later, mine, free) =
            (record("1", "you"), record("2", "you"), record("3", "me"), record("4", ""));
        for (what, seen, now, wanted) in [
            ("nothing was there", vec![(None, 0)], 0, Step::Create),
            ("it is free", vec![(free.clone(), 0)], 0, Step::Take),
            ("another has it", vec![(yours.clone(), 0)], 12, Step::Wait),
            ("it was not renewed", vec![(yours.clone(), 0)], 13, Step::Take),
            (
                "it was not renewed, and looked at often",
                vec![(yours.clone(), 0), (yours.clone(), 11)],
                13,
                Step::Take,
            ),
            ("it was renewed", vec![(yours.clone(), 0), (later.clone(), 12)], 24, Step::Wait),
            ("it was renewed once", vec![(yours.clone(), 0), (later.clone(), 12)], 25, Step::Take),
            ("it was seen late", vec![(yours.clone(), 1000)], 1012, Step::Wait),
            ("its holder says nothing of itself", vec![(foreign.clone(), 0)], 15, Step::Wait),
            ("its holder said nothing of itself", vec![(foreign, 0)], 16, Step::Take),
            ("it lasts longer", vec![(long.clone(), 0)], 60, Step::Wait),
            ("it lasted longer", vec![(long, 0)], 61, Step::Take),
            ("it never ends", vec![(never, 0)], 1 << 40, Step::Wait),
            ("it says that it lasts not at all", vec![(none, 0)], 15, Step::Wait),
            ("its holder writes for longer", vec![(slower.clone(), 0)], 30, Step::Wait),
            ("its holder wrote for longer", vec![(slower, 0)], 31, Step::Take),
            ("its holder writes for ever", vec![(never_ends, 0)], 1 << 40, Step::Wait),
            ("its holder says that it does not write at all", vec![(in_no_time, 0)], 12, Step::Wait),
            ("it was given back", vec![(yours.clone(), 0), (free, 1)], 1, Step::Take),
            ("it was removed while another had it", vec![(yours.clone(), 0), (None, 1)], 12, Step::Wait),
            ("it was removed, and its time is over", vec![(yours, 0), (None, 1)], 13, Step::Create),
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
        assert_eq!((candidate.until(at(21)), candidate.until(at(22))), (Some(at(22)), None));
        assert_eq!(candidate.step(at(22)), Step::Renew);
        // Neither a look nor its absence make it longer or shorter.
        candidate.saw(record("2", "me"), at(20));
        candidate.saw(None, at(21));
        assert_eq!(candidate.until(at(21)), Some(at(22)));
        candidate.wrote(record("3", "me").unwrap(), at(22), at(22));
        assert_eq!(candidate.until(at(24)), Some(at(34)));
        candidate.saw(record("4", "you"), at(25));
        assert_eq!((candidate.until(at(25)), candidate.step(at(25))), (None, Step::Wait));
        candidate.wrote(record("5", "me").unwrap(), at(50), at(50));
        candidate.resign();
        assert_eq!(candidate.until(at(50)), None);
    }

    /// So long is a step of the worlds below.
    const TICK: Duration = Duration::from_millis(25);

    /// The lease, where all see it.
    #[derive(Default)]
    struct Shared {
        lease: Option<Record>,
        writes: u64,
        written: Duration,
    }

    /// Whoever asks waits so long for an answer.
    const PATIENCE: Duration = Duration::from_secs(5);

    /// A request under way: when it is done there, when its answer is here, and whether there is one.
    struct Request {
        write: Option<Option<String>>,
        begun: Duration,
        done: Duration,
        answered: Duration,
        is_lost: bool,
        result: Option<Result<Option<Record>, ()>>,
    }

    /// One replica, as `cluster::lease` has it turn.
    struct Replica {
        candidate: Candidate,
        /// What its clock shows more than those of others.
        clock: Duration,
        next: Duration,
        request: Option<Request>,
        /// Those that nobody waits for any more.
        given_up: Vec<Request>,
        seen: Option<String>,
        dead_from: Duration,
        cut_from: Duration,
        draws: std::vec::IntoIter<u16>,
    }

    /// How a world is: the longest that a request takes each way, and one in so many is lost.
    #[derive(Clone, Copy)]
    struct Weather {
        slow: Duration,
        lost: Option<u16>,
    }

    /// What befalls the leader right after a renewal, from this moment on.
    #[derive(Clone, Copy, Debug)]
    enum Fate {
        Dies(Duration),
        IsCutOff(Duration),
    }

    impl Replica {
        fn new(n: u64, draws: Vec<u16>) -> Self {
            let mut draws = draws.into_iter();
            let margin = about(MARGIN, draws.next().unwrap_or(0));
            Self {
                candidate: Candidate::new(format!("replica {n}"), margin),
                clock: at(n * 1_000_003),
                next: TICK * u32::try_from(n).unwrap(),
                request: None,
                given_up: Vec::new(),
                seen: None,
                dead_from: Duration::MAX,
                cut_from: Duration::MAX,
                draws,
            }
        }

        fn draw(&mut self) -> u16 {
            self.draws.next().unwrap_or(u16::MAX / 2)
        }

        fn until(&self, now: Duration) -> Option<Duration> {
            self.candidate.until(now + self.clock).filter(|_| now < self.dead_from)
        }

        fn begin(&mut self, write: Option<Option<String>>, now: Duration, weather: Weather) {
            let [there, back, lost] = [self.draw(), self.draw(), self.draw()];
            let part = |draw: u16| weather.slow.mul_f64(f64::from(draw) / f64::from(u16::MAX));
            let done = if now < self.cut_from { now + part(there) } else { Duration::MAX };
            self.request = Some(Request {
                write,
                begun: now,
                done,
                answered: done.saturating_add(part(back)),
                is_lost: weather.lost.is_some_and(|of| lost % of == 0),
                result: None,
            });
        }

        fn tick(&mut self, now: Duration, shared: &mut Shared, weather: Weather) {
            // What is under way is done, even if nobody hears of it.
            let under_way = self.request.iter_mut().chain(&mut self.given_up);
            for request in under_way.filter(|r| r.result.is_none() && r.done <= now) {
                let found = shared.lease.as_ref().map(|record| record.version.clone());
                request.result = Some(match &request.write {
                    None => Ok(shared.lease.clone()),
                    Some(version) if *version == found => {
                        shared.writes += 1;
                        shared.written = now;
                        shared.lease = record(&shared.writes.to_string(), &self.candidate.name);
                        Ok(shared.lease.clone())
                    }
                    Some(_) => Err(()),
                });
            }
            if now >= self.dead_from {
                return;
            }
            let own = now + self.clock;
            let is_over = |r: &mut Request| r.answered <= now || r.begun + PATIENCE <= now;
            if let Some(mut request) = self.request.take_if(is_over) {
                let answer = request.result.clone().filter(|_| request.answered <= now && !request.is_lost);
                let turned = match (request.write.take(), answer) {
                    (write, None) => {
                        request.write = write;
                        self.given_up.push(request);
                        false
                    }
                    (_, Some(Err(()))) => false,
                    (None, Some(Ok(lease))) => {
                        self.seen = lease.as_ref().map(|record| record.version.clone());
                        self.candidate.saw(lease, own);
                        if self.candidate.step(own) != Step::Wait {
                            return self.begin(Some(self.seen.clone()), now, weather);
                        }
                        true
                    }
                    (Some(_), Some(Ok(lease))) => {
                        self.seen = lease.as_ref().map(|record| record.version.clone());
                        self.candidate.wrote(lease.unwrap(), request.begun + self.clock, own);
                        true
                    }
                };
                let draw = self.draw();
                self.next = now
                    + match self.candidate.step(own) {
                        Step::Renew if turned => about(TURN, draw),
                        Step::Wait => about(LOOK, draw).min(self.candidate.patience(own)),
                        _ => about(LOOK, draw),
                    };
                if !turned {
                    self.seen = None;
                }
            }
            if self.request.is_none() && now >= self.next {
                let renews = self.candidate.step(own) == Step::Renew && self.seen.is_some();
                let write = renews.then(|| self.seen.clone());
                self.begin(write, now, weather);
            }
        }
    }

    /// As the callers do it: a quarter less or more.
    fn about(duration: Duration, draw: u16) -> Duration {
        duration.mul_f64(0.75 + 0.5 * f64::from(draw) / f64::from(u16::MAX))
    }

    /// Lets replicas live for two minutes. Gives how long it took from the leader's end until another one leads.
    fn live(draws: [Vec<u16>; 3], weather: Weather, fate: Fate) -> Option<Duration> {
        let mut shared = Shared::default();
        let mut all: Vec<_> = (0..).zip(draws).map(|(n, draws)| Replica::new(n, draws)).collect();
        let (mut struck, mut replaced) = (None, None);
        for now in (0..120 * 40).map(|tick| TICK * tick) {
            let before: Vec<_> = all.iter().map(|replica| replica.candidate.until).collect();
            for replica in &mut all {
                replica.tick(now, &mut shared, weather);
            }
            let leads: Vec<_> = (0..all.len()).filter(|n| all[*n].until(now).is_some()).collect();
            assert!(leads.len() <= 1, "at {now:?}: {leads:?}");
            match (struck, leads.first(), fate) {
                (None, Some(leader), Fate::Dies(from)) if now >= from && shared.written == now => {
                    all[*leader].dead_from = now;
                    struck = Some((*leader, now));
                }
                (None, Some(leader), Fate::IsCutOff(from))
                    if now >= from && all[*leader].candidate.until != before[*leader] =>
                {
                    all[*leader].cut_from = now;
                    struck = Some((*leader, now));
                }
                (Some((whom, then)), Some(leader), _) if whom != *leader => {
                    replaced.get_or_insert(now - then);
                }
                _ => {}
            }
        }
        replaced
    }

    fn draws() -> impl Strategy<Value = [Vec<u16>; 3]> {
        let one = || prop::collection::vec(any::<u16>(), 400);
        [one(), one(), one()]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Each has a clock of its own; requests are slow, and done without an answer.
        #[test]
        fn no_two_may_write_at_the_same_moment(
            draws in draws(), slow in 0..7_000_u64, lost in prop::option::of(2..9_u16), from in 5..40_u64,
        ) {
            let weather = Weather { slow: Duration::from_millis(slow), lost };
            live(draws, weather, Fate::IsCutOff(at(from)));
        }

        /// The last renewal counts as the moment of death: whoever dies later is replaced sooner.
        #[test]
        fn who_dies_is_replaced_within_the_lease(draws in draws(), from in 5..40_u64) {
            let weather = Weather { slow: Duration::from_millis(200), lost: None };
            let replaced = live(draws, weather, Fate::Dies(at(from))).expect("another one leads");
            prop_assert!(replaced > WRITES && replaced < LASTS, "{replaced:?}");
        }
    }
}
