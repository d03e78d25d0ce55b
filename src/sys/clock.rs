//! The clock.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};
use time::OffsetDateTime;

use crate::core::rotation::Now;

/// The time now, in UTC.
pub fn now() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}

/// The time now, by both clocks. What passes while the machine sleeps counts.
pub fn both() -> Now {
    Now { wall: now(), passed: duration(clock_gettime(ClockId::Boottime)) }
}

/// How long this thread has worked in all, waiting not counted.
pub fn worked() -> Duration {
    duration(clock_gettime(ClockId::ThreadCPUTime))
}

fn duration(time: Timespec) -> Duration {
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_no_work() {
        let before = worked();
        std::thread::sleep(Duration::from_millis(100));
        let waited = worked() - before;
        assert!(waited < Duration::from_millis(50), "{waited:?}");
        let mut sum = 0u64;
        while worked() - before < Duration::from_millis(20) {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(sum > 0);
    }
}
