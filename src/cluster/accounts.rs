//! The service accounts of a cluster as a source: who should have an identity.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::ObjectReference;
use tokio::sync::Notify;

use super::Objects;
use crate::core::policy::Wishes;
use crate::core::spiffe::ServiceAccount;
use crate::source::{Change, Source};

/// Whether an account that lives should have an identity.
pub type Wanted = Arc<dyn Fn(&ServiceAccount) -> bool + Send + Sync>;

/// Tells which accounts came, went, or were replaced by others of the same name, from what is known of the cluster.
pub struct AccountSource {
    objects: Arc<Objects>,
    wanted: Wanted,
    begun: bool,
}

impl AccountSource {
    /// Of those that are wanted. There is one at a time.
    pub fn new(objects: Arc<Objects>, wanted: Wanted) -> Self {
        Self { objects, wanted, begun: false }
    }

    fn change(&self, accounts: impl Iterator<Item = ServiceAccount>) -> Change {
        let (alive, mut removed): (Vec<_>, Vec<_>) = {
            let known = self.objects.accounts.read();
            accounts.partition(|account| known.get(account).is_some())
        };
        // What is wanted may depend on what is known of the account.
        let (added, given_up): (_, Vec<_>) = alive.into_iter().partition(|account| (self.wanted)(account));
        removed.extend(given_up);
        // It is only told once all of it was read.
        Change { added, removed, settled: true }
    }
}

impl Source for AccountSource {
    async fn next(&mut self) -> Change {
        if !self.begun {
            self.objects.accounts.completed().await;
            self.begun = true;
            // Before they are read: what changes meanwhile is told twice.
            self.objects.changed.begin();
            let all: Vec<_> = self.objects.accounts.read().iter().cloned().collect();
            return Change { removed: Vec::new(), ..self.change(all.into_iter()) };
        }
        let accounts = self.objects.changed.next().await;
        self.change(accounts.into_iter())
    }
}

impl Drop for AccountSource {
    fn drop(&mut self) {
        self.objects.changed.end();
    }
}

impl Objects {
    /// What an account says of itself about being delivered to.
    pub fn deliver(&self, account: &ServiceAccount) -> Option<bool> {
        self.accounts.read().get(account)?.deliver
    }

    /// What an account asks for in its annotations.
    pub fn wishes(&self, account: &ServiceAccount) -> Wishes {
        let known = self.accounts.read();
        known.get(account).and_then(|which| which.wishes.as_deref()).cloned().unwrap_or_default()
    }

    /// Those that ask for anything.
    pub fn wishing(&self) -> Vec<ServiceAccount> {
        let known = self.accounts.read();
        let wishes =
            |account: &&ServiceAccount| known.get(account).is_some_and(|which| which.wishes.is_some());
        known.iter().filter(wishes).cloned().collect()
    }

    /// What events about an account name.
    pub fn reference(&self, account: &ServiceAccount) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("ServiceAccount".to_owned()),
            namespace: Some(account.namespace().to_owned()),
            name: Some(account.name().to_owned()),
            uid: self.uid(account).map(String::from),
            ..ObjectReference::default()
        }
    }

    /// Has all accounts of a namespace told again, since other ones of them may be wanted now.
    pub fn tell_again(&self, namespace: &str) {
        let known = self.accounts.read();
        let accounts: Vec<_> =
            known.iter().filter(|account| account.namespace() == namespace).cloned().collect();
        drop(known);
        self.changed.note(accounts);
    }
}

/// Accounts that have changed since somebody asked; none are kept while nobody wants to know.
#[derive(Debug, Default)]
pub(super) struct Changed {
    accounts: Mutex<Option<HashSet<ServiceAccount>>>,
    some: Notify,
}

impl Changed {
    pub(super) fn note(&self, changed: impl IntoIterator<Item = ServiceAccount>) {
        if let Some(accounts) = self.accounts().as_mut() {
            accounts.extend(changed);
            if !accounts.is_empty() {
                self.some.notify_one();
            }
        }
    }

    fn begin(&self) {
        *self.accounts() = Some(HashSet::new());
    }

    fn end(&self) {
        *self.accounts() = None;
    }

    async fn next(&self) -> HashSet<ServiceAccount> {
        loop {
            if let Some(accounts) = self.accounts().as_mut().filter(|accounts| !accounts.is_empty()) {
                return std::mem::take(accounts);
            }
            self.some.notified().await;
        }
    }

    fn accounts(&self) -> MutexGuard<'_, Option<HashSet<ServiceAccount>>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
