//! Who holds which trust bundle, as agents report it: the evidence that a root may go.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::core::spiffe::ServiceAccount;

/// What was not said again for so long says nothing any more.
pub const KEPT: Duration = Duration::from_secs(15 * 60);
/// Reporters of one account in one place.
const MOST_REPORTERS: usize = 16;
/// Lines of all reports. Beyond, the oldest report goes.
const MOST: usize = 65_536;

/// SHA-256 of a bundle's X.509 authorities.
pub type Digest = [u8; 32];

/// Who reports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reporter {
    /// As whom.
    pub account: ServiceAccount,
    /// From where.
    pub source: IpAddr,
    /// What it calls itself.
    pub name: String,
}

/// Consumers of one identity that hold one and the same bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Which.
    pub identity: ServiceAccount,
    /// Of which they hold.
    pub bundle: Digest,
    /// How many, and how that is known.
    pub count: Count,
}

/// How many consumers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Who said so themselves.
    pub acknowledged: u64,
    /// Who were given it and say nothing.
    pub given: u64,
}

/// All that was reported and is not too old.
#[derive(Debug, Default)]
pub struct Holders(Mutex<Reports>);

#[derive(Debug, Default)]
struct Reports {
    of: HashMap<Reporter, (Instant, Vec<Holder>)>,
    lines: usize,
}

impl Holders {
    /// Takes a report in place of the one that the same reporter made before.
    pub fn take(&self, reporter: Reporter, holders: Vec<Holder>) {
        let mut reports = self.lock();
        reports.forget();
        reports.remove(&reporter);
        if holders.is_empty() {
            return;
        }
        let is_near = |other: &Reporter| other.account == reporter.account && other.source == reporter.source;
        if reports.of.keys().filter(|other| is_near(other)).count() >= MOST_REPORTERS {
            reports.remove_oldest(is_near);
        }
        while reports.lines + holders.len() > MOST && reports.remove_oldest(|_| true) {}
        reports.lines += holders.len();
        reports.of.insert(reporter, (Instant::now(), holders));
    }

    /// How many consumers hold which bundle.
    pub fn all(&self) -> BTreeMap<Digest, Count> {
        let mut reports = self.lock();
        reports.forget();
        let mut all = BTreeMap::<Digest, Count>::new();
        for holder in reports.of.values().flat_map(|(_, holders)| holders) {
            let count = all.entry(holder.bundle).or_default();
            count.acknowledged += holder.count.acknowledged;
            count.given += holder.count.given;
        }
        all
    }

    /// How many report.
    pub fn reporters(&self) -> usize {
        let mut reports = self.lock();
        reports.forget();
        reports.of.len()
    }

    fn lock(&self) -> MutexGuard<'_, Reports> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reports {
    fn forget(&mut self) {
        let lines = &mut self.lines;
        self.of.retain(|_, (at, holders)| {
            let stays = at.elapsed() < KEPT;
            if !stays {
                *lines -= holders.len();
            }
            stays
        });
    }

    fn remove(&mut self, reporter: &Reporter) {
        if let Some((_, holders)) = self.of.remove(reporter) {
            self.lines -= holders.len();
        }
    }

    fn remove_oldest(&mut self, of: impl Fn(&Reporter) -> bool) -> bool {
        let all = self.of.iter().filter(|(reporter, _)| of(reporter));
        let Some(oldest) = all.min_by_key(|(_, (at, _))| *at).map(|(reporter, _)| reporter.clone()) else {
            return false;
        };
        self.remove(&oldest);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reporter(account: &str, source: u8, name: &str) -> Reporter {
        let account = ServiceAccount::new("shop", account).unwrap();
        Reporter { account, source: [10, 0, 0, source].into(), name: name.to_owned() }
    }

    fn holds(bundle: u8, acknowledged: u64) -> Holder {
        let identity = ServiceAccount::new("shop", "web").unwrap();
        Holder { identity, bundle: [bundle; 32], count: Count { acknowledged, given: 1 } }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_reporter_says_replaces_what_it_said_and_is_forgotten_in_time() {
        let holders = Holders::default();
        holders.take(reporter("web", 1, "a"), vec![holds(1, 2), holds(2, 1)]);
        holders.take(reporter("web", 1, "b"), vec![holds(1, 5)]);
        let of = |bundle: u8| holders.all().get(&[bundle; 32]).map(|count| (count.acknowledged, count.given));
        assert_eq!((of(1), of(2)), (Some((7, 2)), Some((1, 1))));
        tokio::time::advance(KEPT / 2).await;
        holders.take(reporter("web", 1, "a"), vec![holds(1, 3)]);
        assert_eq!((of(1), of(2)), (Some((8, 2)), None));
        tokio::time::advance(KEPT / 2).await;
        assert_eq!((of(1), holders.reporters()), (Some((3, 1)), 1));
        holders.take(reporter("web", 1, "a"), Vec::new());
        assert_eq!((of(1), holders.reporters(), holders.lock().lines), (None, 0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_makes_it_remember_more_than_it_can() {
        let holders = Holders::default();
        holders.take(reporter("other", 1, "first"), vec![holds(9, 1)]);
        for n in 0..100 {
            tokio::time::advance(Duration::from_secs(1)).await;
            holders.take(reporter("web", 1, &n.to_string()), vec![holds(1, 1)]);
        }
        // One place pushes out its own.
        assert_eq!(holders.reporters(), MOST_REPORTERS + 1);
        for n in 0..200 {
            tokio::time::advance(Duration::from_secs(1)).await;
            holders.take(reporter("web", n, "a"), vec![holds(1, 1); 1_024]);
        }
        assert!(holders.lock().lines <= MOST && holders.reporters() >= 60, "{}", holders.reporters());
    }
}
