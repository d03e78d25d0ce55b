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
