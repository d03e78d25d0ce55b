//! Noticing what others change in delivered folders.
//!
//! Watches on the secrets folder, each namespace, each account's folder and its current set say that something
//! happened; whether it was ourselves is told by the stamp that was taken after our own last step. What cannot be
//! watched, because the machine allows no more watches, is looked at in turn, slowly.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::volume::{self, FILES};
use super::{FolderSink, Owner, Place, State, folder_name, locked};
use crate::core::spiffe::ServiceAccount;
use crate::sys::dir::Stat;
use crate::sys::watch::{self, Event, Watch, Watcher};

/// From the first sign of a change to looking at it: a change is often many steps.
const TICK: Duration = Duration::from_millis(100);
/// While much is being published, watching it waits, but no longer than this many ticks.
const PATIENCE: u32 = 20;
/// For how long readers of an earlier set find it.
const GRACE: Duration = Duration::from_secs(1);
/// Folders looked at in one go, some two milliseconds' worth.
const SLICE: usize = 256;
/// Looking at folders in turn takes at most this part of one core.
const SWEEP_SHARE: u32 = 2000;
const SWEEP_PAUSE: Duration = Duration::from_secs(1);
/// Accounts whose watches are given back when the limit is met: the source and other programs need some, too.
const ROOM: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Root,
    Namespace(u32),
    Account(u32),
}

/// What is kept between two calls, so that a call may be given up at any await.
#[derive(Default)]
pub(super) struct Eyes {
    watcher: Option<Watcher<Key>>,
    started: bool,
    root: Option<Watch>,
    root_dirty: bool,
    /// The last fault with the secrets folder, told once.
    root_fault: Option<String>,
    namespaces: Vec<u32>,
    accounts: Vec<u32>,
    /// Earlier sets, with the time when they may go.
    untidy: VecDeque<(Instant, u32)>,
    settle_at: Option<Instant>,
    busy: u64,
    waited: u32,
    /// The most accounts that are watched, once the limit was met.
    pub(super) most: Option<usize>,
    sweep_at: Option<Instant>,
    cursor: usize,
}

impl FolderSink {
    pub(super) async fn notice(&self) -> Vec<ServiceAccount> {
        let mut eyes = self.eyes.lock().await;
        let eyes = &mut *eyes;
        if !eyes.started {
            self.start(eyes);
        }
        loop {
            let now = Instant::now();
            let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
            let mut told = Vec::new();
            if due(eyes.settle_at) {
                self.settle(eyes, now, &mut told);
            }
            if due(eyes.sweep_at) {
                self.sweep(eyes, now, &mut told);
            }
            if !told.is_empty() {
                return told;
            }
            let next = eyes.next_wake();
            tokio::select! {
                events = next_events(&mut eyes.watcher) => self.note(eyes, events),
                () = self.wake.notified() => eyes.settle_within(TICK),
                () = until(next) => {}
            }
        }
    }

    fn start(&self, eyes: &mut Eyes) {
        eyes.started = true;
        match Watcher::new() {
            Ok(watcher) => eyes.watcher = Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "delivered folders are looked at in turn instead of being watched");
                eyes.sweep_at = Some(Instant::now() + SWEEP_PAUSE);
            }
        }
        self.watch_root(eyes);
        if !locked(&self.state).pending.is_empty() {
            eyes.settle_within(TICK);
        }
    }

    /// Turns events into what is to be looked at.
    pub(super) fn note(&self, eyes: &mut Eyes, events: Vec<Event<Key>>) {
        let mut state = locked(&self.state);
        for event in events {
            let (key, name) = match event {
                Event::Changed { key, name } | Event::Writing { key, name } => (key, name),
                Event::Gone { key } => {
                    state.watch_anew(key);
                    (key, None)
                }
                Event::Overflow => {
                    eyes.root_dirty = true;
                    eyes.namespaces = (0..state.namespaces.len() as u32).collect();
                    for id in 0..state.slots.len() as u32 {
                        eyes.suspect(&mut state, id);
                    }
                    continue;
                }
            };
            match (key, name) {
                (Key::Account(id), _) => eyes.suspect(&mut state, id),
                (Key::Root, None) => eyes.root_dirty = true,
                (Key::Namespace(id), None) => eyes.namespaces.push(id),
                (Key::Root, Some(name)) => {
                    let id = name.to_str().and_then(|name| state.names.get(name));
                    eyes.namespaces.extend(id);
                }
                (Key::Namespace(id), Some(name)) => {
                    let account =
                        name.to_str().and_then(|name| name.strip_prefix("istio.")).and_then(|name| {
                            let namespace = state.namespaces.get(id as usize)?;
                            ServiceAccount::new(&namespace.name, name).ok()
                        });
                    if let Some(id) = account.and_then(|a| state.index.get(&a).copied()) {
                        eyes.suspect(&mut state, id);
                    }
                }
            }
        }
        drop(state);
        let is_news = eyes.root_dirty || !eyes.namespaces.is_empty() || !eyes.accounts.is_empty();
        if is_news {
            eyes.settle_within(TICK);
        }
    }

    /// Looks at what may have changed, and watches what was published.
    fn settle(&self, eyes: &mut Eyes, now: Instant, told: &mut Vec<ServiceAccount>) {
        eyes.settle_at = None;
        if std::mem::take(&mut eyes.root_dirty) {
            self.look_at_root(eyes, told);
        }
        // Also when it was opened again to publish: its end is not told while it is held open.
        if std::mem::take(&mut locked(&self.state).root_is_new) {
            if let (Some(watcher), Some(watch)) = (&mut eyes.watcher, eyes.root.take()) {
                watcher.unwatch(watch);
            }
            self.watch_root(eyes);
        }
        eyes.namespaces.sort_unstable();
        eyes.namespaces.dedup();
        for id in std::mem::take(&mut eyes.namespaces) {
            self.look_at_namespace(id, told);
        }
        let from = eyes.accounts.len().saturating_sub(SLICE);
        for id in eyes.accounts.split_off(from) {
            if let Some(slot) = locked(&self.state).slots.get_mut(id as usize) {
                slot.flags.dirty = false;
            }
            self.look_at_account(eyes, id, false, told);
        }
        let mut state = locked(&self.state);
        let retired = std::mem::take(&mut state.retired);
        let is_busy = std::mem::replace(&mut eyes.busy, state.busy) != state.busy;
        let mut pending = Vec::new();
        if is_busy && eyes.waited < PATIENCE && !state.pending.is_empty() {
            eyes.waited += 1;
        } else {
            let from = state.pending.len().saturating_sub(SLICE);
            pending = state.pending.split_off(from);
            for id in &pending {
                state.slots[*id as usize].flags.pending = false;
            }
            if state.pending.is_empty() {
                eyes.waited = 0;
            } else {
                // The rest of them without another pause.
                eyes.waited = PATIENCE;
            }
        }
        let is_left = !state.pending.is_empty();
        drop(state);
        if let Some(watcher) = &mut eyes.watcher {
            for watch in retired {
                watcher.unwatch(watch);
            }
        }
        for id in pending {
            self.look_at_account(eyes, id, true, told);
            let is_untidy = locked(&self.state).slots.get(id as usize).is_some_and(|slot| slot.flags.untidy);
            if is_untidy {
                eyes.untidy.push_back((now + GRACE, id));
            }
        }
        while let Some((at, id)) = eyes.untidy.front().copied()
            && at <= now
        {
            eyes.untidy.pop_front();
            self.tidy(id);
        }
        if eyes.root_dirty {
            eyes.settle_within(SWEEP_PAUSE);
        }
        if !eyes.accounts.is_empty() || is_left && eyes.waited >= PATIENCE {
            eyes.settle_within(Duration::ZERO);
        } else if is_left {
            eyes.settle_within(TICK);
        }
        if let Some((at, _)) = eyes.untidy.front() {
            eyes.settle_at = Some(eyes.settle_at.map_or(*at, |other| other.min(*at)));
        }
    }

    fn look_at_root(&self, eyes: &mut Eyes, told: &mut Vec<ServiceAccount>) {
        match self.refresh_root() {
            Ok(false) => eyes.root_fault = None,
            Ok(true) => {
                eyes.root_fault = None;
                let mut state = locked(&self.state);
                for id in 0..state.slots.len() as u32 {
                    state.tell(id, told);
                }
            }
            Err(error) => {
                let error = error.to_string();
                if eyes.root_fault.as_ref() != Some(&error) {
                    tracing::warn!(error, "the secrets folder is not as it should be");
                    eyes.root_fault = Some(error);
                }
                // Until it is put right.
                eyes.root_dirty = true;
            }
        }
    }

    fn watch_root(&self, eyes: &mut Eyes) {
        let root = locked(&self.root).dir.clone();
        if let Some(watcher) = &mut eyes.watcher {
            match watcher.watch_names(&root.handle_path(), Key::Root) {
                Ok(watch) => eyes.root = Some(watch),
                Err(error) => eyes.cannot_watch(0, &error),
            }
        }
    }

    fn look_at_namespace(&self, id: u32, told: &mut Vec<ServiceAccount>) {
        let root = locked(&self.root).dir.clone();
        let mut state = locked(&self.state);
        let Some(namespace) = state.namespaces.get_mut(id as usize) else {
            return;
        };
        let now = root.find(&namespace.name).ok().flatten();
        // Its contents change all the time; who may change them must not.
        let essence = |stat: Option<Stat>| {
            stat.map(|stat| (stat.inode(), stat.kind(), stat.mode(), stat.owner(), stat.group()))
        };
        let replaced = std::mem::take(&mut namespace.replaced);
        if !replaced && essence(now) == essence(namespace.noticed) {
            return;
        }
        let is_same = match (now, namespace.noticed) {
            (Some(now), Some(before)) => !replaced && now.is_same_file(&before),
            _ => false,
        };
        namespace.noticed = now;
        if !is_same && let Some(watch) = namespace.watch.take() {
            state.retired.push(watch);
        }
        for slot in 0..state.slots.len() as u32 {
            if state.slots[slot as usize].namespace == id {
                state.tell(slot, told);
            }
        }
    }

    /// Compares an account with what it looked like, once it is watched if it is to be.
    fn look_at_account(&self, eyes: &mut Eyes, id: u32, watch: bool, told: &mut Vec<ServiceAccount>) {
        let account = locked(&self.state).slots.get(id as usize).and_then(|slot| slot.account.clone());
        let Some(account) = account else { return };
        let _lane = self.lane(&account);
        let owner = match locked(&self.state).slot(&account) {
            Some(slot) if slot.look.stamp != 0 => slot.owner,
            _ => return,
        };
        if watch {
            self.watch_account(eyes, id, &account, owner);
        }
        let look = self.look(&account, owner);
        let mut state = locked(&self.state);
        if state.slots[id as usize].look.stamp != look.stamp {
            state.tell(id, told);
        }
    }

    fn watch_account(&self, eyes: &mut Eyes, id: u32, account: &ServiceAccount, owner: Owner) {
        let Ok(Place::Open(namespace, _)) = self.place(account.namespace()) else {
            return;
        };
        let Some(watcher) = &mut eyes.watcher else {
            return;
        };
        let state = locked(&self.state);
        let number = state.slots[id as usize].namespace;
        let is_watched = state.namespaces[number as usize].watch.is_some();
        let watched = state.index.len() - state.unwatched;
        let before = &state.slots[id as usize];
        let watched_before = before.watched;
        let is_new = !before.flags.watched;
        drop(state);
        if is_new && eyes.most.is_some_and(|most| watched >= most) {
            eyes.sweep_at.get_or_insert_with(|| Instant::now() + SWEEP_PAUSE);
            return;
        }
        if !is_watched {
            match watcher.watch_names(&namespace.handle_path(), Key::Namespace(number)) {
                Ok(watch) => {
                    locked(&self.state).namespaces[number as usize].watch = Some(watch);
                }
                Err(error) => return self.cannot_watch(eyes, id, watched, &error),
            }
        }
        let mut inodes = [0; 2];
        if owner == Owner::Us {
            let (look, folder, current) = volume::look(&namespace, &folder_name(account), FILES);
            inodes = [look.folder, look.current];
            for (which, handle) in [folder, current].into_iter().enumerate() {
                let Some(handle) = handle else { continue };
                if inodes[which] == watched_before[which] {
                    continue;
                }
                let path = handle.handle_path();
                let key = Key::Account(id);
                let added = match which {
                    // Of the links in it only the names matter.
                    0 => watcher.watch_names(&path, key),
                    _ => watcher.watch(&path, key),
                };
                let watch = match added {
                    Ok(watch) => watch,
                    Err(error) => return self.cannot_watch(eyes, id, watched, &error),
                };
                let old = locked(&self.state).slots[id as usize].watches[which].replace(watch);
                if let Some(old) = old {
                    watcher.unwatch(old);
                }
            }
        }
        let mut state = locked(&self.state);
        let slot = &mut state.slots[id as usize];
        slot.watched = inodes;
        if !std::mem::replace(&mut slot.flags.watched, true) {
            state.unwatched -= 1;
        }
    }

    fn cannot_watch(&self, eyes: &mut Eyes, id: u32, watched: usize, error: &watch::Error) {
        let mut state = locked(&self.state);
        state.unwatch(id);
        if matches!(error, watch::Error::Limit { .. }) {
            let most = watched.saturating_sub(ROOM);
            for other in 0..state.slots.len() as u32 {
                if state.index.len() - state.unwatched <= most {
                    break;
                }
                state.unwatch(other);
            }
        }
        drop(state);
        eyes.cannot_watch(watched, error);
    }

    fn tidy(&self, id: u32) {
        let account = locked(&self.state)
            .slots
            .get(id as usize)
            .filter(|slot| slot.flags.untidy && slot.owner == Owner::Us && slot.look.stamp != 0)
            .and_then(|slot| slot.account.clone());
        let Some(account) = account else { return };
        let _lane = self.lane(&account);
        let Ok(Place::Open(namespace, _)) = self.place(account.namespace()) else {
            return;
        };
        let name = folder_name(&account);
        let known = locked(&self.state).slots[id as usize].look.stamp;
        if volume::look(&namespace, &name, FILES).0.stamp != known {
            // Changed by others, and so to be read and published, which clears it.
            return;
        }
        let tidied =
            namespace.subdir(&name).map_err(Into::into).and_then(|folder| volume::tidy(&folder, FILES));
        if let Err(error) = tidied {
            tracing::warn!(%account, %error, "an earlier certificate cannot be removed");
        }
        let (look, ..) = volume::look(&namespace, &name, FILES);
        let mut state = locked(&self.state);
        let slot = &mut state.slots[id as usize];
        slot.flags.untidy = false;
        slot.look = look;
    }

    /// Looks at the next few that are not watched.
    fn sweep(&self, eyes: &mut Eyes, now: Instant, told: &mut Vec<ServiceAccount>) {
        if eyes.cursor == 0 {
            self.look_at_root(eyes, told);
            let namespaces = locked(&self.state).namespaces.len() as u32;
            for id in 0..namespaces {
                self.look_at_namespace(id, told);
            }
        }
        let state = locked(&self.state);
        let mut slice = Vec::new();
        while slice.len() < SLICE && eyes.cursor < state.slots.len() {
            let slot = &state.slots[eyes.cursor];
            if slot.account.is_some() && !slot.flags.watched {
                slice.push(eyes.cursor as u32);
            }
            eyes.cursor += 1;
        }
        let is_over = eyes.cursor >= state.slots.len();
        let none_left = state.unwatched == 0 && eyes.watcher.is_some() && eyes.root.is_some();
        drop(state);
        for id in slice {
            self.look_at_account(eyes, id, false, told);
        }
        if is_over {
            eyes.cursor = 0;
        }
        let pause = SWEEP_PAUSE.max(now.elapsed() * SWEEP_SHARE);
        eyes.sweep_at = (!none_left).then(|| Instant::now() + pause);
    }
}

impl Eyes {
    /// When there is something to do even if nothing happens.
    pub(super) fn next_wake(&self) -> Option<Instant> {
        [self.settle_at, self.sweep_at].into_iter().flatten().min()
    }

    #[cfg(test)]
    pub(super) fn is_settled(&self) -> bool {
        !self.root_dirty && self.namespaces.is_empty() && self.accounts.is_empty()
    }

    #[cfg(test)]
    pub(super) fn deaf(&mut self) {
        self.watcher = None;
    }

    fn settle_within(&mut self, time: Duration) {
        let at = Instant::now() + time;
        self.settle_at = Some(self.settle_at.map_or(at, |other| other.min(at)));
    }

    fn suspect(&mut self, state: &mut State, id: u32) {
        if let Some(slot) = state.slots.get_mut(id as usize)
            && slot.account.is_some()
            && !std::mem::replace(&mut slot.flags.dirty, true)
        {
            self.accounts.push(id);
        }
    }

    fn cannot_watch(&mut self, watched: usize, error: &watch::Error) {
        if matches!(error, watch::Error::Limit { .. }) && self.most.is_none() {
            let most = watched.saturating_sub(ROOM);
            tracing::warn!(
                %error,
                "{most} delivered folders are watched; the others are looked at in turn, so damage to them is repaired later"
            );
            self.most = Some(most);
        }
        if self.sweep_at.is_none() {
            self.sweep_at = Some(Instant::now() + SWEEP_PAUSE);
        }
    }
}

impl State {
    /// Tells of a change once; then nothing is known of the account until it is read.
    fn tell(&mut self, id: u32, told: &mut Vec<ServiceAccount>) {
        let slot = &mut self.slots[id as usize];
        if slot.look.stamp == 0 {
            return;
        }
        if let Some(account) = &slot.account {
            slot.look.stamp = 0;
            told.push(account.clone());
        }
    }

    /// A watch has ended, and what comes next under that name may have the same inode.
    fn watch_anew(&mut self, key: Key) {
        match key {
            Key::Root => {}
            Key::Namespace(id) => {
                if let Some(namespace) = self.namespaces.get_mut(id as usize) {
                    namespace.replaced = true;
                    self.retired.extend(namespace.watch.take());
                }
            }
            Key::Account(id) => {
                if let Some(slot) = self.slots.get_mut(id as usize)
                    && slot.account.is_some()
                {
                    slot.watched = [0; 2];
                    if !std::mem::replace(&mut slot.flags.pending, true) {
                        self.pending.push(id);
                    }
                }
            }
        }
    }

    fn unwatch(&mut self, id: u32) {
        let slot = &mut self.slots[id as usize];
        slot.watched = [0; 2];
        let watches = std::mem::take(&mut slot.watches);
        if slot.account.is_some() && std::mem::take(&mut slot.flags.watched) {
            self.unwatched += 1;
        }
        self.retired.extend(watches.into_iter().flatten());
    }
}

async fn next_events(watcher: &mut Option<Watcher<Key>>) -> Vec<Event<Key>> {
    match watcher {
        Some(watcher) => watcher.next().await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
