//! The living accounts of a source that tells only names, such as a folder of manifests.

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

use super::{Answer, Life, Liveness};
use crate::core::caller::Object;
use crate::core::spiffe::ServiceAccount;

/// Which accounts a source names. It knows no UIDs and no pods, and so takes the one and the other as they are given.
#[derive(Debug, Default)]
pub struct Accounts {
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    accounts: HashSet<ServiceAccount>,
    /// Whether all of the source has been readable.
    settled: bool,
}

impl Accounts {
    /// Takes what is different. `settled` is false while a part of the source has never been readable.
    pub fn take(&self, added: &[ServiceAccount], removed: &[ServiceAccount], settled: bool) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        for account in removed {
            known.accounts.remove(account);
        }
        known.accounts.extend(added.iter().cloned());
        known.settled |= settled;
    }

    fn life(&self, account: &ServiceAccount) -> Life {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if known.accounts.contains(account) {
            Life::Alive
        } else if known.settled {
            Life::Gone
        } else {
            Life::Unknown("a part of the source folder has not been readable yet".to_owned())
        }
    }
}

impl Liveness for Accounts {
    fn account<'a>(&'a self, account: &'a ServiceAccount, _: Option<&'a str>) -> Answer<'a, Life> {
        Box::pin(std::future::ready(self.life(account)))
    }

    fn pod<'a>(&'a self, _: &'a str, _: &'a Object) -> Answer<'a, Life> {
        Box::pin(std::future::ready(Life::Alive))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_is_gone_before_everything_was_read() {
        let (a, b) = (ServiceAccount::new("n", "a").unwrap(), ServiceAccount::new("n", "b").unwrap());
        let accounts = Accounts::default();
        assert!(matches!(accounts.account(&a, None).await, Life::Unknown(_)));
        accounts.take(std::slice::from_ref(&a), &[], false);
        assert_eq!(accounts.account(&a, None).await, Life::Alive);
        assert!(matches!(accounts.account(&b, None).await, Life::Unknown(_)));
        accounts.take(&[], &[], true);
        assert_eq!(accounts.account(&b, None).await, Life::Gone);
        accounts.take(&[], std::slice::from_ref(&a), true);
        assert_eq!(accounts.account(&a, None).await, Life::Gone);
    }
}
