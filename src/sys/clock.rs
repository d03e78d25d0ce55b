//! The clock.

use time::OffsetDateTime;

/// The time now, in UTC.
pub fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}
