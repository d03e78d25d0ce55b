//! How long: durations as people write them, and the window of a certificate.

use std::fmt;
use std::time::Duration;

use time::OffsetDateTime;

/// How early a certificate is valid, at most: enough for clocks that differ a little.
pub const BACKDATE: Duration = Duration::from_secs(120);

/// A duration as flags and policies carry it: `90s`, `15m`, `24h`, `90d`, `10y` (a year is 365 days).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lifetime(Duration);

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("duration {0:?} is not a whole number with one of s, m, h, d, y behind it, such as 90s, 24h or 10y")]
pub struct Error(String);

const UNITS: [(char, u64); 5] = [('y', 365 * 86_400), ('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];
/// Beyond this no certificate could say when it ends (GeneralizedTime stops at 9999).
const MAX_SECONDS: u64 = 1_000 * 365 * 86_400;

impl Lifetime {
    /// Whole seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// As the standard library has it.
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl std::str::FromStr for Lifetime {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = || Error(super::spiffe::shortened(text));
        let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(refused)?;
        if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
            return Err(refused());
        }
        let unit = UNITS.iter().find(|(name, _)| unit.starts_with(*name)).ok_or_else(refused)?.1;
        let seconds = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).ok_or_else(refused)?;
        if seconds > MAX_SECONDS {
            return Err(refused());
        }
        Ok(Self::from_secs(seconds))
    }
}

impl fmt::Display for Lifetime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let (name, unit) = UNITS
            .into_iter()
            // One day is written as everybody writes it: 24h.
            .find(|(name, unit)| {
                seconds >= *unit && seconds.is_multiple_of(*unit) && !(*name == 'd' && seconds == *unit)
            })
            .unwrap_or(('s', 1));
        write!(f, "{}{name}", seconds / unit)
    }
}

impl fmt::Debug for Lifetime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// When a certificate is valid, both ends included (RFC 5280 4.1.2.5); whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub not_before: OffsetDateTime,
    /// The last second.
    pub not_after: OffsetDateTime,
}

impl Validity {
    /// The window of a certificate issued at `now` for `lifetime` below `issuer`: early by two minutes or a quarter
    /// of the lifetime, whichever is less, and within the issuer's own. The caller has made sure that the issuer is
    /// valid at `now`.
    pub fn below(issuer: Option<Validity>, now: OffsetDateTime, lifetime: Lifetime) -> Self {
        let early = BACKDATE.min(lifetime.duration() / 4);
        let mut not_before = whole(now - early);
        let mut not_after = whole(now + lifetime.duration());
        if let Some(issuer) = issuer {
            not_before = not_before.max(issuer.not_before);
            not_after = not_after.min(issuer.not_after);
        }
        Self { not_before, not_after }
    }

    /// What two windows share; empty when it ends before it begins.
    pub fn and(self, other: Self) -> Self {
        Self {
            not_before: self.not_before.max(other.not_before),
            not_after: self.not_after.min(other.not_after),
        }
    }

    /// Whether `at` is within.
    pub fn contains(&self, at: OffsetDateTime) -> bool {
        self.not_before <= at && at < self.not_after + Duration::from_secs(1)
    }

    /// When the certificate was issued, which its NotBefore precedes by two minutes or by a quarter of its lifetime.
    pub fn issued_at(&self) -> OffsetDateTime {
        let whole: time::Duration = (self.not_after - self.not_before).max(time::Duration::ZERO);
        self.not_before + (whole / 5_i32).min(time::Duration::new(BACKDATE.as_secs() as i64, 0))
    }
}

/// A moment as reports and errors show it.
pub fn shown(at: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC);
    let (date, (hour, minute, second)) = (at.date(), at.to_hms());
    format!("{date} {hour:02}:{minute:02}:{second:02} UTC")
}

fn whole(at: OffsetDateTime) -> OffsetDateTime {
    at.replace_nanosecond(0).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn durations_are_read_and_written() {
        for text in ["90s", "15m", "24h", "91d", "10y", "0s"] {
            let lifetime: Lifetime = text.parse().unwrap();
            assert_eq!(lifetime.to_string().parse::<Lifetime>().unwrap(), lifetime);
        }
        assert_eq!("24h".parse::<Lifetime>().unwrap().duration(), Duration::from_secs(86_400));
        assert_eq!("1d".parse::<Lifetime>().unwrap().to_string(), "24h");
        for text in ["", "s", "1", "-1s", "1.5h", "1w", "1 h", "99999999999999999999s", "1001y", "1µ", "+1s"]
        {
            assert!(text.parse::<Lifetime>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn moments_are_shown_in_utc() {
        assert_eq!(shown(datetime!(2026-01-02 03:04:05.6 +1)), "2026-01-02 02:04:05 UTC");
    }

    #[test]
    fn a_window_is_early_by_two_minutes_or_a_quarter() {
        let now = datetime!(2026-01-02 03:04:05.678 UTC);
        let day = Validity::below(None, now, Lifetime::from_secs(86_400));
        assert_eq!(day.not_before, datetime!(2026-01-02 03:02:05 UTC));
        assert_eq!(day.not_after, datetime!(2026-01-03 03:04:05 UTC));
        assert_eq!(day.issued_at(), datetime!(2026-01-02 03:04:05 UTC));
        let short = Validity::below(None, now, Lifetime::from_secs(20));
        assert_eq!(short.not_before, datetime!(2026-01-02 03:04:00 UTC));
        assert_eq!(short.issued_at(), datetime!(2026-01-02 03:04:05 UTC));
    }

    #[test]
    fn a_window_stays_within_the_issuers() {
        let now = datetime!(2026-01-02 03:04:05 UTC);
        let issuer = Validity { not_before: now, not_after: now + Duration::from_secs(60) };
        assert_eq!(Validity::below(Some(issuer), now, Lifetime::from_secs(86_400)), issuer);
    }

    #[test]
    fn both_ends_are_valid() {
        let at = datetime!(2026-01-02 03:04:05 UTC);
        let window = Validity { not_before: at, not_after: at };
        assert!(window.contains(at) && window.contains(at + Duration::from_millis(999)));
        assert!(
            !window.contains(at - Duration::from_millis(1)) && !window.contains(at + Duration::from_secs(1))
        );
    }
}
