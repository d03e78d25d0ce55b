//! When a certificate is renewed.

use std::time::Duration;

use time::OffsetDateTime;

use super::lifetime::Validity;

/// When renewal of a certificate begins: half way from issue to expiry, and later by up to a quarter of that time. How
/// much later is drawn once for each certificate, from its random serial number: it survives restarts without being
/// stored, and certificates minted in one second spread over hours.
pub fn renew_at(validity: Validity, serial: &[u8]) -> OffsetDateTime {
    let issued = validity.issued_at();
    let lifetime = (validity.not_after - issued).max(time::Duration::ZERO).unsigned_abs();
    issued + lifetime / 2 + scaled(lifetime / 4, draw(serial))
}

/// When a certificate that has just come is renewed: at `renew_at`, and not before half of what is left of it is over.
/// So whoever's clock is ahead of the issuer's, by which most of it is always over, does not ask without end.
pub fn renew_from(
    renew_at: OffsetDateTime,
    not_after: OffsetDateTime,
    now: OffsetDateTime,
) -> OffsetDateTime {
    let left: Duration = (not_after - now).try_into().unwrap_or_default();
    renew_at.max(now + (left / 2).max(Duration::from_secs(1)))
}

/// Now, by the clock on the wall, which may be set, and by the time that passes.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// What certificates go by.
    pub wall: OffsetDateTime,
    /// Since some moment that is always the same.
    pub passed: Duration,
}

/// When something is due: as soon as either says so. A clock that was set forward brings it nearer, and one that was set
/// back does not put it off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Due {
    wall: OffsetDateTime,
    passed: Duration,
}

impl Due {
    /// At a time of the wall's clock.
    pub fn at(wall: OffsetDateTime, now: Now) -> Self {
        let left: Duration = (wall - now.wall).try_into().unwrap_or_default();
        Self { wall, passed: now.passed + left }
    }

    /// After a while.
    pub fn after(wait: Duration, now: Now) -> Self {
        Self { wall: now.wall + wait, passed: now.passed + wait }
    }

    /// How long it is until then; nothing when it is due.
    pub fn left(self, now: Now) -> Duration {
        let wall = (self.wall - now.wall).try_into().unwrap_or_default();
        self.passed.saturating_sub(now.passed).min(wall)
    }
}

/// How long to wait after a number of failures in a row: from half a second, doubled each time up to a minute, and less
/// by up to a half, which `fraction` of 2^64 says. Never longer than half of what is left of a certificate that still
/// is good, so that tries come closer together towards its end and none of them comes after it.
pub fn retry_after(failures: u32, left: Option<Duration>, fraction: u64) -> Duration {
    let whole = Duration::from_millis(500)
        .saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX))
        .min(Duration::from_secs(60));
    let wait = whole / 2 + scaled(whole / 2, fraction);
    match left {
        Some(left) if !left.is_zero() => wait.min((left / 2).max(Duration::from_millis(100))),
        _ => wait,
    }
}

/// The last eight bytes of a serial number, as a fraction of 2^64. Serial numbers of other CAs, which may count from
/// one, spread badly and still renew in time.
fn draw(serial: &[u8]) -> u64 {
    serial.iter().rev().take(8).rev().fold(0, |value, b| value << 8 | u64::from(*b))
}

fn scaled(span: Duration, fraction: u64) -> Duration {
    let nanoseconds = (span.as_nanos() * u128::from(fraction)) >> 64;
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::lifetime::Lifetime;
    use time::macros::datetime;

    #[test]
    fn renewal_begins_between_half_and_three_quarters() {
        let now = datetime!(2026-01-02 03:04:05 UTC);
        let validity = Validity::below(None, now, Lifetime::from_secs(86_400));
        assert_eq!(renew_at(validity, &[0; 16]), now + Duration::from_secs(43_200));
        let last = renew_at(validity, &[0xff; 16]);
        assert!(last > now + Duration::from_secs(64_799) && last < now + Duration::from_secs(64_800));
    }

    #[test]
    fn what_comes_with_most_of_it_over_is_not_renewed_at_once() {
        let now = datetime!(2026-01-02 03:04:05 UTC);
        let minutes = |n: i64| now + time::Duration::minutes(n);
        assert_eq!(renew_from(minutes(35), minutes(60), now), minutes(35));
        // The issuer's clock is fifty minutes behind.
        assert_eq!(renew_from(minutes(-15), minutes(10), now), minutes(5));
        assert_eq!(renew_from(minutes(-15), now, now), now + Duration::from_secs(1));
        assert_eq!(renew_from(minutes(-15), minutes(-1), now), now + Duration::from_secs(1));
    }

    #[test]
    fn what_is_due_is_due_by_either_clock() {
        let wall = datetime!(2026-01-02 03:04:05 UTC);
        let hour = Duration::from_secs(3_600);
        let at = |shown: i64, passed: u32| Now {
            wall: wall + time::Duration::hours(shown),
            passed: hour * (7 + passed),
        };
        let now = at(0, 0);
        for due in [Due::at(wall + hour * 2, now), Due::after(hour * 2, now)] {
            assert_eq!(due.left(now), hour * 2);
            assert_eq!(due.left(at(1, 1)), hour);
            assert_eq!(due.left(at(2, 2)), Duration::ZERO);
            // Set forward.
            assert_eq!(due.left(at(3, 1)), Duration::ZERO);
            // Set back.
            assert_eq!(due.left(at(-100, 1)), hour);
            assert_eq!(due.left(at(-100, 2)), Duration::ZERO);
        }
        assert_eq!(Due::at(wall - hour, now).left(now), Duration::ZERO);
    }

    #[test]
    fn no_retry_waits_past_the_end() {
        let second = Duration::from_secs(1);
        assert_eq!(retry_after(1, None, 0), second / 4);
        assert_eq!(retry_after(1, None, u64::MAX).as_millis(), 499);
        assert_eq!(retry_after(7, None, 0), second * 16);
        assert!(
            retry_after(8, None, 0) == second * 30 && retry_after(u32::MAX, None, u64::MAX) < second * 60
        );
        // A certificate that ends in 40 s, and an authority that never answers.
        let mut left = second * 40;
        let mut tries = 0;
        while left > second {
            let wait = retry_after(20, Some(left), u64::MAX);
            assert!(wait < left);
            left -= wait;
            tries += 1;
        }
        assert_eq!(tries, 6);
        assert_eq!(retry_after(20, Some(Duration::ZERO), 0), second * 30);
    }

    /// The busiest ten minutes have at most 1.5 times what ten minutes have on average, wherever they begin.
    #[test]
    fn ten_thousand_of_one_second_spread_evenly_over_hours() {
        let now = datetime!(2026-01-02 03:04:05 UTC);
        let validity = Validity::below(None, now, Lifetime::from_secs(86_400));
        let mut minutes = [0; 6 * 60];
        for n in 0..10_000u32 {
            let serial = ring::digest::digest(&ring::digest::SHA256, &n.to_be_bytes());
            let after = renew_at(validity, &serial.as_ref()[..16]) - now - Duration::from_secs(43_200);
            minutes[usize::try_from(after.whole_minutes()).unwrap()] += 1;
        }
        let busiest = minutes.windows(10).map(|ten| ten.iter().sum::<i32>()).max().unwrap();
        let mean = 10_000.0 / 36.0;
        assert!(f64::from(busiest) <= 1.5 * mean, "{busiest} in ten minutes, {mean} on average");
    }
}
