//! An even load: certificates granted together must not be renewed together.
//!
//! ztunnel, and others, renew at exactly half of a certificate's life, so what is granted in one second comes back in one
//! second, for ever. A calendar knows the renewals that the lifetimes it gave will bring, and shortens a lifetime by a
//! little, so that its renewal falls where the fewest others do. Drawing lots instead barely helps: the window is a
//! small part of the cycle, and lots heap up in its middle. It only has to know its own grants: several replicas, each
//! with its own calendar, level each its own share.

use std::fmt;

use time::OffsetDateTime;

use super::lifetime::{BACKDATE, Lifetime};

/// By how much of itself a lifetime may be shortened, in percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spread(u8);

/// Why a text is no spread.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("spread {0:?} is not a whole number of percent from 0% to 25%")]
pub struct SpreadError(String);

impl Spread {
    /// Lifetimes are granted as they are.
    pub const NONE: Self = Self(0);
    /// A quarter, the most: nobody should find much less than was asked for.
    pub const WIDEST: Self = Self(25);

    /// The shortest that may become of a lifetime, in seconds.
    fn shortest(self, seconds: u64) -> u64 {
        seconds - (u128::from(seconds) * u128::from(self.0) / 100) as u64
    }
}

impl std::str::FromStr for Spread {
    type Err = SpreadError;

    fn from_str(text: &str) -> Result<Self, SpreadError> {
        let percent = text.strip_suffix('%').filter(|number| number.bytes().all(|b| b.is_ascii_digit()));
        percent
            .and_then(|number| number.parse().ok())
            .filter(|percent| *percent <= Self::WIDEST.0)
            .map(Self)
            .ok_or_else(|| SpreadError(super::spiffe::shortened(text)))
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

/// How many stretches a window is looked at in.
const STRETCHES: u64 = 32;
/// Seconds for the two hours ahead, which lifetimes of up to four hours need.
const SECONDS: usize = 8_192;
/// Minutes for the 45 days ahead, half of 90.
const MINUTES: usize = 65_536;

/// The renewals that granted lifetimes will bring. Some 300 KB, of which the machine holds what was written to.
#[derive(Debug)]
pub struct Calendar {
    /// When the calendar was last looked at, in seconds since 1970.
    now: u64,
    /// Of lifetimes whose renewals are near.
    seconds: Ring<SECONDS>,
    /// Of all others.
    minutes: Ring<MINUTES>,
}

impl Default for Calendar {
    fn default() -> Self {
        Self { now: 0, seconds: Ring::new(), minutes: Ring::new() }
    }
}

impl Calendar {
    /// Shortens a lifetime that begins now by at most `spread`, and remembers its renewal. Of equal places `draw`, a
    /// random number, chooses, so that several calendars do not agree.
    pub fn book(&mut self, now: OffsetDateTime, lifetime: Lifetime, spread: Spread, draw: u64) -> Lifetime {
        let now = u64::try_from(now.unix_timestamp()).unwrap_or(0);
        self.pass(now);
        let longest = lifetime.duration().as_secs();
        let shortest = spread.shortest(longest);
        let (first, last) = (now + renewal(shortest), now + renewal(longest));
        let granted = |at: u64| lifetime_of(at - now).clamp(shortest, longest);
        if last - now < SECONDS as u64 {
            let at = self.least(1, first, last, draw);
            let granted = granted(at);
            self.seconds.add(now + renewal(granted));
            Lifetime::from_secs(granted)
        } else if (last - now) / 60 + 1 < MINUTES as u64 {
            let place = self.least(60, first, last, draw);
            let (from, to) = ((place * 60).max(first), (place * 60 + 59).min(last));
            let granted = granted(from + part(draw, to - from + 1));
            self.minutes.add((now + renewal(granted)) / 60);
            Lifetime::from_secs(granted)
        } else {
            // Beyond every herd that a calendar could know of.
            Lifetime::from_secs(shortest + part(draw, longest - shortest + 1))
        }
    }

    /// The least booked place among those of a width that lie between two moments: first by stretches, in which even a
    /// small herd shows, and then within the least booked of them.
    fn least(&self, width: u64, first: u64, last: u64, draw: u64) -> u64 {
        // A place that is half outside would get twice its share.
        let (whole, end) = (first.div_ceil(width), (last + 1) / width);
        let (from, places) = if whole < end { (whole, end - whole) } else { (first / width, 1) };
        let length = places.div_ceil(STRETCHES);
        let stretches = places.div_ceil(length);
        let today = self.now / width;
        let booked = |place: u64, count: u64| match width {
            1 => self.seconds.sum(place, count),
            _ => self.minutes.sum(place, count),
        };
        let mut coming = 0;
        let stretch = least_of(stretches, draw >> 48, |stretch| {
            let step = (stretch * length).min(places - length);
            // Whoever renews before this stretch is out of reach for newcomers may still want a place in it. Half, since
            // they will look for empty places too.
            let wanted = coming * length / (2 * places);
            coming += booked(today + step, length);
            let others =
                if width == 1 { length * u64::from(self.minutes.get((from + step) / 60)) } else { 0 };
            60 * (booked(from + step, length) + wanted) + others
        });
        let begin = from + (stretch * length).min(places - length);
        begin + least_of(length, draw >> 32 & 0xffff, |place| booked(begin + place, 1))
    }

    /// Forgets what is past. If the clock was set back, what has the place of the time in between is too far ahead to be
    /// told from it, and is forgotten too.
    fn pass(&mut self, now: u64) {
        let (from, to) = (self.now.min(now), self.now.max(now));
        self.seconds.clear(from, to);
        self.minutes.clear(from / 60, to / 60);
        self.now = now;
    }
}

/// Counts for the places from now on, as many as it is long.
#[derive(Debug)]
struct Ring<const N: usize>(Box<[u32]>);

impl<const N: usize> Ring<N> {
    /// Zeros that nobody wrote take no memory.
    fn new() -> Self {
        Self(vec![0; N].into_boxed_slice())
    }

    fn get(&self, place: u64) -> u32 {
        self.0[place as usize % N]
    }

    fn sum(&self, place: u64, count: u64) -> u64 {
        let from = place as usize % N;
        let end = from + count as usize;
        let sum = |counts: &[u32]| counts.iter().map(|count| u64::from(*count)).sum::<u64>();
        match self.0.get(from..end) {
            Some(counts) => sum(counts),
            None => sum(&self.0[from..]) + sum(&self.0[..end - N]),
        }
    }

    fn add(&mut self, place: u64) {
        let count = &mut self.0[place as usize % N];
        *count = count.saturating_add(1);
    }

    fn clear(&mut self, from: u64, to: u64) {
        if to - from >= N as u64 {
            *self = Self::new();
        } else {
            (from..to).for_each(|place| self.0[place as usize % N] = 0);
        }
    }
}

/// After how many seconds a client renews that does so at half of what stands in the certificate, whose NotBefore is
/// early.
fn renewal(lifetime: u64) -> u64 {
    (lifetime - (lifetime / 4).min(BACKDATE.as_secs())) / 2
}

/// The least lifetime that brings a renewal no earlier than that.
fn lifetime_of(renewal_after: u64) -> u64 {
    let long = 2 * renewal_after + BACKDATE.as_secs();
    if long / 4 > BACKDATE.as_secs() {
        return long;
    }
    // Quarters and halves are rounded, so that the least may be a little below.
    let mut short = (8 * renewal_after / 3).saturating_sub(3);
    while renewal(short) < renewal_after {
        short += 1;
    }
    short
}

/// The one of `count` that costs least; of equals the first from one on that is drawn. Costs are asked for in order.
fn least_of(count: u64, draw: u64, mut cost: impl FnMut(u64) -> u64) -> u64 {
    let from = draw % count;
    let (mut least, mut found) = (cost(0), 0);
    for at in 1..count {
        let cost = cost(at);
        if cost < least || cost == least && found < from && at >= from {
            (least, found) = (cost, at);
        }
    }
    found
}

/// A number below `count`, by lot.
fn part(draw: u64, count: u64) -> u64 {
    ((u128::from(draw & 0xffff_ffff) * u128::from(count)) >> 32) as u64
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;
    use std::collections::{BTreeMap, BinaryHeap};

    use proptest::prelude::*;
    use time::Duration;
    use time::macros::datetime;

    use super::*;
    use crate::core::lifetime::Validity;

    const START: OffsetDateTime = datetime!(2026-03-01 08:00:00 UTC);
    const DAY: u64 = 86_400;

    /// Random numbers that are the same in each run (splitmix64).
    struct Draws(u64);

    impl Draws {
        fn next(&mut self) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Way {
        Whole,
        Draws,
        Calendars(usize),
    }

    /// When ztunnel renews: half of what stands in the certificate.
    fn renewed(now: OffsetDateTime, lifetime: Lifetime) -> OffsetDateTime {
        let window = Validity::below(None, now, lifetime);
        window.not_before + (window.not_after - window.not_before) / 2
    }

    /// The peak minutes of the first, second and later rounds of renewals, as multiples of the mean: the renewals per
    /// minute that the clients make over a whole cycle, which is 0.4375 of the lifetime that they ask for (between
    /// 0.375 and 0.5).
    fn peaks(
        herd: &[(u64, usize)],
        way: Way,
        spread: &str,
        restart: Option<Duration>,
        rounds: usize,
    ) -> Vec<f64> {
        let spread: Spread = spread.parse().unwrap();
        let mut draws = Draws(1);
        let count = if let Way::Calendars(count) = way { count } else { 0 };
        let mut calendars: Vec<_> = (0..count).map(|_| Calendar::default()).collect();
        let mut restart = restart.map(|after| START + after);
        let longest = herd.iter().map(|(lifetime, _)| *lifetime).max().unwrap();
        let mean: f64 = herd.iter().map(|(lifetime, n)| 60.0 * *n as f64 / (0.4375 * *lifetime as f64)).sum();
        let mut due = BinaryHeap::new();
        let mut herd_of = Vec::new();
        for (lifetime, clients) in herd {
            for _ in 0..*clients {
                due.push(Reverse((START, herd_of.len(), 0)));
                herd_of.push(*lifetime);
            }
        }
        // The span of each round, and the renewals of each minute.
        let mut spans = vec![(i64::MAX, i64::MIN); rounds + 1];
        let mut minutes = BTreeMap::<i64, usize>::new();
        while let Some(Reverse((now, client, round))) = due.pop() {
            if now > START + Duration::seconds(longest as i64) * (rounds as i32 + 1) / 2 {
                break;
            }
            if restart.is_some_and(|at| now >= at) {
                restart = None;
                calendars.iter_mut().for_each(|calendar| *calendar = Calendar::default());
            }
            let lifetime = herd_of[client];
            let minute = now.unix_timestamp() / 60;
            if round > 0 {
                *minutes.entry(minute).or_default() += 1;
                if lifetime == longest && round <= rounds {
                    let (first, last) = spans[round];
                    spans[round] = (first.min(minute), last.max(minute));
                }
            }
            let asked = Lifetime::from_secs(lifetime);
            let granted = match way {
                Way::Whole => asked,
                Way::Draws => {
                    let shortest = spread.shortest(lifetime);
                    Lifetime::from_secs(shortest + part(draws.next(), lifetime - shortest + 1))
                }
                Way::Calendars(count) => {
                    let calendar = &mut calendars[draws.next() as usize % count];
                    calendar.book(now, asked, spread, draws.next())
                }
            };
            due.push(Reverse((renewed(now, granted), client, round + 1)));
        }
        let peaks: Vec<f64> = (1..=rounds)
            .map(|round| {
                let (first, last) = spans[round];
                *minutes.range(first..=last).map(|(_, n)| n).max().unwrap() as f64 / mean
            })
            .collect();
        let shown: Vec<_> = peaks.iter().map(|peak| format!("{peak:.2}")).collect();
        let way = match way {
            Way::Whole => "nothing".to_owned(),
            Way::Draws => format!("draws of {spread}"),
            Way::Calendars(count) => format!("{count} calendars of {spread}, restart {restart:?}"),
        };
        println!("{herd:?}, {way}: mean {mean:.2} a minute, peaks {}", shown.join(" "));
        peaks
    }

    proptest! {
        #[test]
        fn of_equal_costs_the_first_from_the_drawn_one_on_is_taken(
            costs in prop::collection::vec(0..4_u64, 1..40),
            draw: u64,
        ) {
            let count = costs.len() as u64;
            let least = costs.iter().min().unwrap();
            let drawn = draw % count;
            let expected = (0..count).map(|n| (drawn + n) % count).find(|at| costs[*at as usize] == *least);
            prop_assert_eq!(Some(least_of(count, draw, |at| costs[at as usize])), expected);
        }
    }

    #[test]
    fn a_herd_of_20_000_is_level_by_the_third_renewal() {
        let herd = [(DAY, 20_000)];
        let peaks =
            |way, spread, restart: Option<i64>| peaks(&herd, way, spread, restart.map(Duration::minutes), 4);
        let calendar = peaks(Way::Calendars(1), "25%", None);
        assert!(calendar[2] < 1.6 && calendar[3] < 1.3, "{calendar:?}");
        let replicas = peaks(Way::Calendars(3), "25%", None);
        assert!(replicas[2] < 1.6 && replicas[3] < 1.3, "{replicas:?}");
        // In the middle of the first wave, and of the second, which is worst.
        for (hour, calendars) in [(10, 1), (21, 1), (21, 3)] {
            let restarted = peaks(Way::Calendars(calendars), "25%", Some(hour * 60 + 30));
            assert!(restarted[2] < 2.0, "restart after {hour} h 30: {restarted:?}");
        }
        // It is the calendar that does it.
        let draws = peaks(Way::Draws, "25%", None);
        assert!(draws[2] > 2.5, "{draws:?}");
        let few = peaks(Way::Draws, "10%", None);
        assert!(few[0] > 8.0 && few[2] > 6.0, "{few:?}");
        let none = peaks(Way::Whole, "0%", None);
        assert!(none[2] > 600.0, "{none:?}");
    }

    #[test]
    fn herds_of_other_lifetimes_are_level_too() {
        for (lifetime, clients) in [(3_600, 5_000), (7 * DAY, 20_000), (DAY, 1_000)] {
            let peaks = peaks(&[(lifetime, clients)], Way::Calendars(1), "25%", None, 3);
            assert!(peaks[2] < 2.0, "{lifetime}: {peaks:?}");
        }
        let mixed =
            peaks(&[(DAY, 4_000), (DAY / 2, 2_000), (3_600, 1_000)], Way::Calendars(2), "25%", None, 3);
        assert!(mixed[2] < 1.5, "{mixed:?}");
    }

    #[test]
    fn clients_without_a_herd_lose_no_more_than_by_lot() {
        let mut calendar = Calendar::default();
        let mut draws = Draws(5);
        let mut sum = 0;
        for n in 0..1_000 {
            let now = START + Duration::minutes(17 * n);
            sum += calendar
                .book(now, Lifetime::from_secs(DAY), Spread::WIDEST, draws.next())
                .duration()
                .as_secs();
        }
        let mean = sum / 1_000;
        assert!(mean > DAY * 85 / 100, "{mean}");
    }

    #[test]
    fn a_steady_load_is_hardly_shortened() {
        let mut calendar = Calendar::default();
        let mut draws = Draws(6);
        let (mut sum, mut count) = (0, 0);
        for second in 0..2 * DAY as i64 {
            let now = START + Duration::seconds(second);
            let granted = calendar.book(now, Lifetime::from_secs(DAY), Spread::WIDEST, draws.next());
            if second > DAY as i64 {
                sum += granted.duration().as_secs();
                count += 1;
            }
        }
        let mean = sum / count;
        println!("a steady load gets {mean} of {DAY} seconds");
        assert!(mean > DAY * 90 / 100, "{mean}");
    }

    #[test]
    fn spread_zero_changes_nothing_and_is_still_booked() {
        let mut calendar = Calendar::default();
        let mut draws = Draws(2);
        let hour = Lifetime::from_secs(3_600);
        let full = renewed(START, hour).unix_timestamp();
        for _ in 0..100 {
            assert_eq!(calendar.book(START, hour, Spread::NONE, draws.next()), hour);
        }
        for _ in 0..100 {
            let other = calendar.book(START, hour, Spread::WIDEST, draws.next());
            assert_ne!(renewed(START, other).unix_timestamp(), full);
        }
    }

    #[test]
    fn a_clock_that_is_set_leaves_a_calendar_that_works() {
        let mut calendar = Calendar::default();
        let mut draws = Draws(3);
        let mut now = START;
        for step in [
            Duration::ZERO,
            Duration::days(400),
            -Duration::days(400),
            Duration::hours(3),
            -Duration::hours(3),
            -Duration::days(40_000),
            Duration::days(30_000),
            Duration::seconds(-1),
        ] {
            now += step;
            let mut seconds = BTreeMap::<_, usize>::new();
            for _ in 0..4_500 {
                let granted = calendar.book(now, Lifetime::from_secs(3_600), Spread::WIDEST, draws.next());
                *seconds.entry(renewed(now, granted).unix_timestamp()).or_default() += 1;
            }
            // 450 seconds to choose from. What was booked before the clock was set may still count.
            assert!(seconds.values().all(|n| *n < 40), "{step}: {:?}", seconds.values().max());
            let total: u64 = calendar.seconds.0.iter().map(|n| u64::from(*n)).sum();
            assert!(total <= 2 * 4_500 + 4_500, "{step}: {total}");
        }
    }

    #[test]
    fn what_is_past_is_forgotten() {
        let mut calendar = Calendar::default();
        let mut draws = Draws(4);
        for lifetime in [10, 3_600, DAY, 80 * DAY] {
            for _ in 0..100 {
                calendar.book(START, Lifetime::from_secs(lifetime), Spread::WIDEST, draws.next());
            }
        }
        let booked =
            |calendar: &Calendar| -> u32 { calendar.seconds.0.iter().chain(calendar.minutes.0.iter()).sum() };
        assert_eq!(booked(&calendar), 400);
        for (after, left) in [(60, 300), (3_600, 200), (DAY, 100), (80 * DAY, 0)] {
            calendar.pass((START.unix_timestamp() as u64) + after);
            assert_eq!(booked(&calendar), left, "after {after} s");
        }
    }

    proptest! {
        #[test]
        fn no_lifetime_leaves_its_bounds(
            lifetime in prop_oneof![1u64..40, 10u64..20_000, DAY / 4..DAY * 4, DAY..DAY * 100, Just(1_000 * 365 * DAY)],
            percent in 0u8..=25,
            at in 0i64..4_000_000_000,
            draw: u64,
        ) {
            let now = OffsetDateTime::from_unix_timestamp(at).unwrap();
            let mut calendar = Calendar::default();
            let spread = Spread(percent);
            for turn in 0..3u64 {
                let granted = calendar.book(now, Lifetime::from_secs(lifetime), spread, draw.wrapping_mul(turn));
                prop_assert!(granted.duration().as_secs() <= lifetime);
                prop_assert!(granted.duration().as_secs() >= spread.shortest(lifetime));
            }
        }

        #[test]
        fn lifetimes_and_their_renewals_belong_together(lifetime in 1u64..1_000_000) {
            let least = lifetime_of(renewal(lifetime));
            prop_assert!(least <= lifetime && renewal(least) == renewal(lifetime), "{}", least);
            let now = START;
            let really = (renewed(now, Lifetime::from_secs(lifetime)) - now).whole_seconds();
            prop_assert!((really - renewal(lifetime) as i64).abs() <= 1, "{} {}", really, renewal(lifetime));
        }
    }

    #[test]
    fn the_least_lifetime_of_a_renewal_is_none_that_is_longer() {
        for lifetime in 1..2_000 {
            let least = lifetime_of(renewal(lifetime));
            assert!(least <= lifetime && renewal(least) == renewal(lifetime), "{lifetime}: {least}");
        }
    }

    #[test]
    fn spreads_are_read_and_written() {
        for text in ["0%", "7%", "25%"] {
            assert_eq!(text.parse::<Spread>().unwrap().to_string(), text);
        }
        for text in ["", "%", "26%", "5", "-1%", "+1%", "2.5%", "300%", " 5%"] {
            assert!(text.parse::<Spread>().is_err(), "{text:?}");
        }
    }
}
