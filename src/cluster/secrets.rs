//! Secrets as a sink: `istio.<account>` in each account's namespace, as Istio's CA kept them.
//!
//! All of them are watched, and of each no more is kept than whether it is good. Nothing is changed that was not read
//! a moment ago: each change names the version that it is for.

mod requests;
mod stored;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kube::runtime::watcher::{self, Event};
use serde_json::Value;
use tokio::sync::Notify;

use super::watch::{Doubt, Watch};
use super::{Cluster, Leadership, Objects, Wanted};
use crate::auth::{Life, Liveness as _};
use crate::core::plan::CertificateSet;
use crate::core::spiffe::ServiceAccount;
use crate::sink::{Error, Found, Sink};
use crate::sys::clock;
use requests::{Fault, Requests};
use stored::{Marks, Stored, TYPE};

/// So many secrets are read at once: what a page holds is in memory together.
const PAGE: u32 = 250;
/// After so many events it is forgotten which of them come from writes of Mica's own that are past.
const PRUNE: usize = 1_024;
/// Watching again after a failure waits so long, in milliseconds, doubling.
const FIRST_PAUSE: u64 = 500;
const LAST_PAUSE: u64 = 8_000;

/// The secrets of a cluster's accounts.
pub struct Secrets {
    cluster: Cluster,
    requests: Requests,
    objects: Arc<Objects>,
    wanted: Wanted,
    /// What Mica writes into its label: its own namespace.
    own: Arc<str>,
    writes: Mutex<Writes>,
    disturbed: Notify,
}

/// Which events of the watch come from writes of Mica's own.
#[derive(Default)]
struct Writes {
    /// What is being written, and the latest version of it that was told of meanwhile.
    under_way: HashMap<ServiceAccount, u64>,
    /// What was written as which version, until the watch is past that.
    done: HashMap<ServiceAccount, u64>,
    /// What others have written in between.
    disturbed: Vec<ServiceAccount>,
    events: usize,
    /// The latest version that was told of.
    told: u64,
    /// Something newer was written as an older version: the API server's memory is a backup, and watches may wait for
    /// versions that it will not have for long.
    is_restored: bool,
}

impl Secrets {
    /// Those of the accounts that are wanted, written while this replica may write. `own` is the namespace of this Mica,
    /// by which it knows its own from another Mica's.
    pub fn new(
        cluster: &Cluster,
        objects: Arc<Objects>,
        wanted: Wanted,
        leadership: Leadership,
        own: &str,
    ) -> Self {
        Self {
            cluster: cluster.clone(),
            requests: Requests::new(cluster.client.clone(), leadership),
            objects,
            wanted,
            own: own.into(),
            writes: Mutex::default(),
            disturbed: Notify::new(),
        }
    }

    /// Follows what is there. The accounts have to be known by then.
    pub fn watch(self: &Arc<Self>) -> SecretWatch {
        let config = watcher::Config::default().fields(&format!("type={TYPE}")).page_size(PAGE);
        let watch = self.cluster.watches.watch(self.cluster.all(), config, || Pauses(FIRST_PAUSE));
        SecretWatch { secrets: self.clone(), watch, is_listing: true }
    }

    /// What a secret is to Mica.
    fn found(&self, account: &ServiceAccount, stored: Stored) -> Found {
        let uid = self.objects.uid(account);
        let is_given_up = uid.is_some() && !(self.wanted)(account);
        if let Err(why) = stored.is_ours(account, &self.own) {
            return Found::Foreign(why);
        }
        let marks = stored.marks(account, &self.own, uid.as_deref());
        match marks {
            Marks::Another => {
                return Found::Damaged("it belongs to another account of the same name".to_owned());
            }
            // Somebody else may keep it.
            Marks::Missing if is_given_up => {
                return Found::Foreign("its account is none that mica was told to serve".to_owned());
            }
            Marks::Whole if is_given_up => {
                return match stored.not_after() {
                    Some(not_after) => Found::Released(not_after),
                    None => {
                        Found::Foreign("its account is served no longer, and it cannot be read".to_owned())
                    }
                };
            }
            Marks::Missing | Marks::Whole => {}
        }
        match stored.set() {
            Ok(set) => Found::Set(crate::sink::FoundSet { set, loose: None, marked: marks == Marks::Whole }),
            Err(fault) => Found::Damaged(fault),
        }
    }

    /// Reads a secret that Mica may change.
    async fn ours(&self, account: &ServiceAccount) -> Result<Option<Value>, Error> {
        let Some(object) = self.get(account).await? else { return Ok(None) };
        let stored = Stored::of(&object)?;
        match stored.is_ours(account, &self.own) {
            Ok(()) => Ok(Some(object)),
            Err(why) => Err(Error::Foreign { account: account.clone(), why }),
        }
    }

    async fn get(&self, account: &ServiceAccount) -> Result<Option<Value>, Error> {
        match self.requests.get(account).await {
            Ok(object) => Ok(Some(object)),
            Err(Fault::NotFound) => Ok(None),
            Err(fault) => Err(fault.during("reading its secret")),
        }
    }

    async fn post(&self, account: &ServiceAccount, set: &CertificateSet) -> Result<u64, Error> {
        // Without an account nobody should have it, and the source will say so.
        let uid = self.objects.uid(account).ok_or(Error::Changed)?;
        let object = stored::new(account, set, &self.own, &uid)?;
        match self.requests.create(account, &object).await {
            Ok(version) => Ok(version),
            // Of a creation: the namespace.
            Err(Fault::NotFound) => Err(Error::Ending),
            Err(fault) => Err(fault.during("creating its secret")),
        }
    }

    async fn put(&self, account: &ServiceAccount, set: &CertificateSet) -> Result<u64, Error> {
        let Some(mut object) = self.ours(account).await? else { return self.post(account, set).await };
        let uid = self.objects.uid(account).ok_or(Error::Changed)?;
        if object["immutable"] == true {
            self.requests
                .delete(account, &object)
                .await
                .map_err(|e| e.during("deleting its immutable secret"))?;
            return self.post(account, set).await;
        }
        stored::fill(&mut object, account, set, &self.own, &uid)?;
        self.requests.replace(account, &object).await.map_err(|fault| fault.during("updating its secret"))
    }

    async fn put_marks(&self, account: &ServiceAccount) -> Result<u64, Error> {
        let Some(mut object) = self.ours(account).await? else { return Err(Error::Changed) };
        let uid = self.objects.uid(account).ok_or(Error::Changed)?;
        let set = Stored::of(&object)?.set().map_err(|_| Error::Changed)?;
        stored::mark(&mut object, account, &set, &self.own, &uid)?;
        self.requests.replace(account, &object).await.map_err(|fault| fault.during("taking its secret over"))
    }

    /// Whether a secret may be taken away: not on the word of a watch alone.
    async fn has_no_owner(&self, account: &ServiceAccount) -> Result<(), Error> {
        if self.objects.uid(account).is_some() && !(self.wanted)(account) {
            return Ok(());
        }
        match self.objects.account(account, None).await {
            Life::Gone | Life::Replaced => Ok(()),
            Life::Alive => Err(Error::Changed),
            Life::Unknown(fault) => Err(Error::Api { doing: "asking whether the account is gone", fault }),
        }
    }

    /// Has events of a write known as such.
    async fn written(
        &self,
        account: &ServiceAccount,
        write: impl Future<Output = Result<u64, Error>>,
    ) -> Result<(), Error> {
        let before = {
            let mut writes = self.writes();
            writes.under_way.insert(account.clone(), 0);
            writes.told
        };
        let _end = End(self, account);
        let written = write.await;
        let mut writes = self.writes();
        let told = writes.under_way.remove(account).unwrap_or(0);
        if let Ok(version) = &written {
            writes.done.insert(account.clone(), *version);
            if *version < before {
                writes.is_restored = true;
                self.disturbed.notify_one();
            }
        }
        if told > *written.as_ref().unwrap_or(&0) {
            writes.disturbed.push(account.clone());
            self.disturbed.notify_one();
        }
        written.map(|_| ())
    }

    /// Whether an event is about what Mica knows better, or is going to.
    fn is_own(&self, account: &ServiceAccount, version: u64, is_listing: bool) -> bool {
        let mut writes = self.writes();
        writes.told = writes.told.max(version);
        if !is_listing {
            writes.events += 1;
            if writes.events >= PRUNE {
                writes.events = 0;
                writes.done.retain(|_, done| *done > version);
            }
        }
        if let Some(told) = writes.under_way.get_mut(account) {
            *told = version.max(*told);
            return true;
        }
        // In a list, what is there has to be told of.
        writes.done.get(account).is_some_and(|done| version < *done || version == *done && !is_listing)
    }

    fn writes(&self) -> MutexGuard<'_, Writes> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A write that is given up is none that is under way.
struct End<'a>(&'a Secrets, &'a ServiceAccount);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.writes().under_way.remove(self.1);
    }
}

impl Sink for Secrets {
    const AT_ONCE: usize = 16;
    const TOGETHER: usize = 1;
    const TELLS: bool = true;

    fn recorded(&self) -> Vec<ServiceAccount> {
        Vec::new()
    }

    async fn read(&self, account: &ServiceAccount) -> Result<Found, Error> {
        Ok(match self.get(account).await? {
            Some(object) => self.found(account, Stored::of(&object)?),
            None => Found::Absent,
        })
    }

    async fn create(&self, account: &ServiceAccount, set: &CertificateSet) -> Result<(), Error> {
        self.written(account, self.post(account, set)).await
    }

    async fn publish(&self, account: &ServiceAccount, set: &CertificateSet) -> Result<(), Error> {
        self.written(account, self.put(account, set)).await
    }

    async fn mark(&self, account: &ServiceAccount) -> Result<(), Error> {
        self.written(account, self.put_marks(account)).await
    }

    async fn remove(&self, account: &ServiceAccount) -> Result<(), Error> {
        self.has_no_owner(account).await?;
        let object = match self.ours(account).await {
            Ok(Some(object)) => object,
            Ok(None) | Err(Error::Foreign { .. }) => return Ok(()),
            Err(fault) => return Err(fault),
        };
        match self.found(account, Stored::of(&object)?) {
            // Pods may use it: they are not to lose it with a label of their namespace.
            Found::Released(not_after) if clock::now() < not_after => return Err(Error::Changed),
            Found::Foreign(_) => return Ok(()),
            _ => {}
        }
        match self.requests.delete(account, &object).await {
            Ok(()) | Err(Fault::NotFound) => Ok(()),
            Err(fault) => Err(fault.during("deleting its secret")),
        }
    }
}

/// What is told of secrets.
#[derive(Debug)]
pub enum Told {
    /// All of them are about to be told of.
    Listing,
    /// One, or that there is none.
    Found(ServiceAccount, Found),
    /// All of them have been told of.
    Listed,
    /// It has to be read.
    Disturbed(Vec<ServiceAccount>),
}

/// Follows the secrets.
pub struct SecretWatch {
    secrets: Arc<Secrets>,
    watch: Watch<Stored>,
    is_listing: bool,
}

impl SecretWatch {
    /// Waits for the next news.
    pub async fn next(&mut self) -> Told {
        loop {
            let (disturbed, is_restored) = {
                let mut writes = self.secrets.writes();
                (std::mem::take(&mut writes.disturbed), std::mem::take(&mut writes.is_restored))
            };
            if is_restored {
                self.secrets.cluster.watches.read_again(Doubt::WentBack);
            }
            if !disturbed.is_empty() {
                return Told::Disturbed(disturbed);
            }
            let event = tokio::select! {
                () = self.secrets.disturbed.notified() => continue,
                event = self.watch.next() => event,
            };
            let told = match event {
                Event::Init => {
                    self.is_listing = true;
                    // What is listed now is the truth, also in a cluster that was put back to an older state, and has what
                    // was written before.
                    let mut writes = self.secrets.writes();
                    writes.done.clear();
                    writes.told = 0;
                    return Told::Listing;
                }
                Event::InitDone => {
                    self.is_listing = false;
                    return Told::Listed;
                }
                Event::InitApply(stored) | Event::Apply(stored) => self.found(stored, false),
                Event::Delete(stored) => self.found(stored, true),
            };
            if let Some(told) = told {
                return told;
            }
        }
    }

    fn found(&self, stored: Stored, is_gone: bool) -> Option<Told> {
        let account = stored.account()?;
        if self.secrets.is_own(&account, stored.version(), self.is_listing) {
            return None;
        }
        let found = if is_gone { Found::Absent } else { self.secrets.found(&account, stored) };
        Some(Told::Found(account, found))
    }
}

/// Shorter ones than kube's own, which would have newcomers wait for half a minute.
struct Pauses(u64);

impl Iterator for Pauses {
    type Item = std::time::Duration;

    fn next(&mut self) -> Option<Self::Item> {
        let pause = self.0;
        self.0 = (pause * 2).min(LAST_PAUSE);
        // Replicas that lose an API server together should not come back to it together.
        let draw = crate::sys::keys::random_bytes().map_or(0, u16::from_ne_bytes);
        Some(std::time::Duration::from_millis(pause / 2 + pause * u64::from(draw) / u64::from(u16::MAX) / 2))
    }
}

impl kube::runtime::utils::Backoff for Pauses {
    fn reset(&mut self) {
        self.0 = FIRST_PAUSE;
    }
}
