//! How many files name each account, and who has been told.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::core::spiffe::ServiceAccount;

/// How long an account stays that no file names any more. Files are replaced by deleting and writing anew, by
/// truncating and filling; an account that is gone only meanwhile must not lose its certificate.
pub(super) const HOLD: Duration = Duration::from_millis(1_500);

#[derive(Debug, Default)]
pub(super) struct Tally {
    counts: HashMap<ServiceAccount, Count>,
    touched: Vec<ServiceAccount>,
    /// Delivered, but named no more; with the time when that becomes final.
    held: HashMap<ServiceAccount, Instant>,
    frozen: bool,
}

#[derive(Debug, Default)]
struct Count {
    files: u32,
    delivered: bool,
    touched: bool,
}

impl Tally {
    /// The one copy of an account that all files share.
    pub(super) fn shared(&self, account: ServiceAccount) -> ServiceAccount {
        match self.counts.get_key_value(&account) {
            Some((known, _)) => known.clone(),
            None => account,
        }
    }

    /// One more file names it.
    pub(super) fn add(&mut self, account: &ServiceAccount) {
        let count = self.counts.entry(account.clone()).or_default();
        count.files += 1;
        if count.files == 1 && !std::mem::replace(&mut count.touched, true) {
            self.touched.push(account.clone());
        }
    }

    /// One file less names it.
    pub(super) fn remove(&mut self, account: &ServiceAccount) {
        let Some(count) = self.counts.get_mut(account) else { return };
        count.files = count.files.saturating_sub(1);
        if count.files == 0 && !std::mem::replace(&mut count.touched, true) {
            self.touched.push(account.clone());
        }
    }

    /// What is new since the last time; what is gone begins to be held.
    pub(super) fn added(&mut self, now: Instant) -> Vec<ServiceAccount> {
        let mut added = Vec::new();
        for account in std::mem::take(&mut self.touched) {
            let Some(count) = self.counts.get_mut(&account) else { continue };
            count.touched = false;
            match (count.files > 0, count.delivered) {
                (true, false) => {
                    count.delivered = true;
                    added.push(account);
                }
                (true, true) => {
                    self.held.remove(&account);
                }
                (false, true) => {
                    self.held.entry(account).or_insert(now + HOLD);
                }
                (false, false) => {
                    self.counts.remove(&account);
                }
            }
        }
        added
    }

    /// What has been gone for long enough.
    pub(super) fn removed(&mut self, now: Instant) -> Vec<ServiceAccount> {
        if self.frozen {
            return Vec::new();
        }
        let removed: Vec<_> =
            self.held.extract_if(|_, due| *due <= now).map(|(account, _)| account).collect();
        for account in &removed {
            self.counts.remove(account);
        }
        removed
    }

    /// When [`Tally::removed`] has something.
    pub(super) fn next_removal(&self) -> Option<Instant> {
        self.held.values().min().copied()
    }

    /// Nothing is removed until [`Tally::thaw`].
    pub(super) fn freeze(&mut self) {
        self.held.clear();
        self.frozen = true;
    }

    /// What is gone begins to be held, if nothing was until now.
    pub(super) fn thaw(&mut self, now: Instant) {
        if !std::mem::take(&mut self.frozen) {
            return;
        }
        for (account, count) in &self.counts {
            if count.files == 0 && count.delivered {
                self.held.entry(account.clone()).or_insert(now + HOLD);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(name: &str) -> ServiceAccount {
        ServiceAccount::new("default", name).unwrap()
    }

    #[test]
    fn an_account_is_there_while_one_file_names_it() {
        let (mut tally, now, a) = (Tally::default(), Instant::now(), account("a"));
        tally.add(&a);
        tally.add(&a);
        assert_eq!(tally.added(now), std::slice::from_ref(&a));
        tally.remove(&a);
        assert_eq!((tally.added(now), tally.next_removal()), (vec![], None));
        tally.remove(&a);
        assert_eq!((tally.added(now), tally.next_removal()), (vec![], Some(now + HOLD)));
        assert_eq!(tally.removed(now + HOLD - Duration::from_millis(1)), []);
        assert_eq!(tally.removed(now + HOLD), [a]);
        assert!(tally.counts.is_empty());
    }

    #[test]
    fn an_account_that_comes_back_was_never_gone_and_is_held_anew() {
        let (mut tally, now, a) = (Tally::default(), Instant::now(), account("a"));
        tally.add(&a);
        tally.added(now);
        tally.remove(&a);
        tally.added(now);
        tally.add(&a);
        assert_eq!((tally.added(now), tally.next_removal()), (vec![], None));
        tally.remove(&a);
        let later = now + HOLD;
        tally.added(later);
        assert_eq!(tally.removed(later), []);
        assert_eq!(tally.removed(later + HOLD), [a]);
    }

    #[test]
    fn what_comes_and_goes_between_two_looks_is_never_told() {
        let (mut tally, now, a) = (Tally::default(), Instant::now(), account("a"));
        tally.add(&a);
        tally.remove(&a);
        assert_eq!((tally.added(now), tally.next_removal()), (vec![], None));
        assert!(tally.counts.is_empty());
    }

    #[test]
    fn nothing_is_removed_while_frozen() {
        let (mut tally, now, a) = (Tally::default(), Instant::now(), account("a"));
        tally.add(&a);
        tally.added(now);
        tally.remove(&a);
        tally.added(now);
        tally.freeze();
        assert_eq!((tally.next_removal(), tally.removed(now + 9 * HOLD)), (None, vec![]));
        tally.thaw(now);
        assert_eq!(tally.removed(now + HOLD), [a]);
    }
}
