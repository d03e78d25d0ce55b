//! Kubernetes manifests in a folder, and whatever becomes of them.
//!
//! The folder is held as a graph: each real directory once, however many links lead to it, owned by the entry through
//! which it was found first. The kernel's events say which entries to look at again; nothing else is read. Two things
//! go by the clock, since nothing tells of them: whether the folder itself is still the one at its path, and a sweep
//! over what cannot be watched.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::manifests::{Fault, accounts_in};
use super::tally::Tally;
use super::{Change, Source};
use crate::core::spiffe::ServiceAccount;
use crate::sys::clock;
use crate::sys::tree::{self, Directory, Identity, Kind, Stamp};
use crate::sys::watch::{self, Event, Watch, Watcher};

/// The largest manifest that is read.
pub const MAX_FILE: u64 = 64 << 20;

/// Changes are gathered until it has been quiet for this long,
const QUIET: Duration = Duration::from_millis(100);
/// but no longer than this, also if a writer has not yet closed its file.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the clock is asked for what no event tells.
const TICK: Duration = Duration::from_secs(1);
/// Work is done in slices, so that other tasks get their turn.
const SLICE: Duration = Duration::from_millis(1);
/// A sweep rests this many times as long as it works: over what is not watched, and over what is, since some file
/// systems tell nothing of what other machines do.
const REST_UNWATCHED: u32 = 2_000;
const REST_WATCHED: u32 = 10_000;
/// A sweep looks at this many entries before it asks whether its slice is over.
const SWEEP_ENTRIES: usize = 64;
/// More dirty names than this are not worth telling apart.
const MAX_DIRTY: usize = 1 << 16;
const ELOOP: i32 = rustix::io::Errno::LOOP.raw_os_error();
/// Faults of one file that are logged at a time.
const MAX_LOGGED: usize = 20;

/// Why a folder cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing at the path.
    #[error("the folder {0} does not exist; create it or name another")]
    Missing(PathBuf),
    /// There is something else.
    #[error("{0} is no folder; name the folder that holds the manifests")]
    NoFolder(PathBuf),
    /// It cannot be read.
    #[error("the folder {path} cannot be read: {source}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The service accounts that the manifests below a folder name.
#[derive(Debug)]
pub struct FolderSource {
    root: PathBuf,
    excluded: Vec<PathBuf>,
    excluded_now: Vec<(Identity, PathBuf)>,
    watcher: Option<Watcher<u32>>,
    /// Open directories have paths of their own.
    handles: bool,
    limit_told: bool,
    #[cfg(test)]
    watches_left: usize,

    dirs: Vec<Option<Box<Dir>>>,
    free: Vec<u32>,
    by_identity: HashMap<Identity, u32>,
    lookouts: Vec<Lookout>,
    lookout_at: HashMap<PathBuf, u32>,

    pending: Pending,
    queue: VecDeque<Work>,
    scan: Option<Scan>,
    sweep: Sweep,
    tick: Instant,
    buffer: Vec<u8>,

    tally: Tally,
    trouble: Counted,
    /// Why the folder itself cannot be read; then nothing is removed.
    lost: Option<String>,
    /// Files with faults that went or came in this batch: a renamed one keeps what it named.
    orphans: HashMap<Identity, Remembered>,
    newcomers: Vec<(Identity, u32, Box<OsStr>)>,
    told: Option<bool>,
}

/// The directory of the folder itself.
const ROOT: u32 = 0;
/// In a watch's key: it is a lookout and no directory.
const LOOKOUT: u32 = 1 << 31;

#[derive(Debug)]
struct Dir {
    /// The owner; the root is its own.
    parent: u32,
    name: Box<OsStr>,
    identity: Identity,
    watch: Option<Watch>,
    stamp: Stamp,
    /// By name.
    entries: Vec<Entry>,
    /// Entries elsewhere that lead here too.
    aliases: Vec<(u32, Box<OsStr>)>,
    /// Which lookouts' names its links lead through.
    steps: Box<[(u32, Box<OsStr>)]>,
    /// Why it cannot be listed.
    trouble: Option<Box<str>>,
    listed: bool,
    /// Not everything that its links lead through is watched.
    blind: bool,
    queued_list: bool,
    queued_links: bool,
}

#[derive(Debug)]
struct Entry {
    name: Box<OsStr>,
    link: bool,
    node: Node,
}

#[derive(Debug)]
enum Node {
    File(File),
    /// A directory found here.
    Dir(u32),
    /// A directory found elsewhere before.
    Alias(u32),
    /// A link that leads to nothing of interest now.
    Nothing,
}

#[derive(Debug)]
struct File {
    stamp: Stamp,
    names: Names,
    trouble: Option<Box<Trouble>>,
}

/// Nearly always one.
#[derive(Clone, Debug)]
enum Names {
    One(ServiceAccount),
    Many(Box<[ServiceAccount]>),
}

#[derive(Debug)]
struct Trouble {
    identity: Option<Identity>,
    faults: Vec<Fault>,
    good: Remembered,
}

/// What a file named when it was last without fault.
#[derive(Clone, Debug)]
struct Remembered {
    names: Names,
    ever: bool,
}

/// A directory outside through which links lead.
#[derive(Debug)]
struct Lookout {
    path: PathBuf,
    watch: Option<Watch>,
    /// Links end here, so contents matter too.
    last: bool,
    users: Vec<u32>,
}

/// What events have named since the last look.
#[derive(Debug, Default)]
struct Pending {
    names: HashSet<(u32, Box<OsStr>)>,
    dirs: HashSet<u32>,
    links: HashSet<u32>,
    everything: bool,
    /// Files that somebody is writing.
    unfinished: HashSet<(u32, Box<OsStr>)>,
    first: Option<Instant>,
    last: Option<Instant>,
}

#[derive(Debug)]
enum Work {
    List(u32),
    Links(u32),
    Name(u32, Box<OsStr>),
}

/// A directory that is being listed.
#[derive(Debug)]
struct Scan {
    dir: u32,
    handle: Directory,
    /// Last one first.
    entries: Vec<(Box<OsStr>, Kind)>,
}

#[derive(Debug)]
struct Sweep {
    dir: usize,
    entry: usize,
    /// There are such, so they come first.
    only_unwatched: bool,
    round: Instant,
    due: Instant,
}

/// How much is wrong now.
#[derive(Debug, Default)]
struct Counted {
    faults: Arc<AtomicUsize>,
    /// Files and directories that have never been readable.
    never: usize,
}

impl FolderSource {
    /// Takes a folder, passing over the excluded ones in it: Mica's own. To be called inside a tokio runtime.
    pub fn open(root: &Path, excluded: &[PathBuf]) -> Result<Self, Error> {
        let watcher = Watcher::new().inspect_err(|error| {
            tracing::warn!(%error, "changes of manifests are looked for by sweeping over them, which is slower");
        });
        Self::with_watcher(root, excluded, watcher.ok())
    }

    /// How many faults there are now: documents, files and folders that cannot be read or are refused.
    pub fn faults(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.trouble.faults)
    }

    fn with_watcher(root: &Path, excluded: &[PathBuf], watcher: Option<Watcher<u32>>) -> Result<Self, Error> {
        let unreadable = |source| Error::Unreadable { path: root.to_owned(), source };
        let handle = Directory::open(root).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::Missing(root.to_owned()),
            io::ErrorKind::NotADirectory => Error::NoFolder(root.to_owned()),
            _ => unreadable(source),
        })?;
        let absolute = |path: &Path| tree::absolute(path).map_err(unreadable);
        let now = Instant::now();
        let mut source = Self {
            root: absolute(root)?,
            excluded: excluded.iter().map(|path| absolute(path)).collect::<Result<_, _>>()?,
            excluded_now: Vec::new(),
            handles: tree::look(&handle.handle()).is_ok(),
            limit_told: watcher.is_none(),
            watcher,
            #[cfg(test)]
            watches_left: usize::MAX,
            dirs: Vec::new(),
            free: Vec::new(),
            by_identity: HashMap::new(),
            lookouts: Vec::new(),
            lookout_at: HashMap::new(),
            pending: Pending::default(),
            queue: VecDeque::new(),
            scan: None,
            sweep: Sweep { dir: 0, entry: 0, only_unwatched: false, round: now, due: now + TICK },
            tick: now + TICK,
            buffer: Vec::new(),
            tally: Tally::default(),
            trouble: Counted::default(),
            lost: None,
            orphans: HashMap::new(),
            newcomers: Vec::new(),
            told: None,
        };
        let name = source.root.as_os_str().into();
        let root = source.new_dir(ROOT, name, handle.facts.identity);
        source.refresh_excluded();
        source.queue_list(root);
        Ok(source)
    }
}

impl Source for FolderSource {
    async fn next(&mut self) -> Change {
        loop {
            self.work().await;
            if let Some(change) = self.change() {
                return change;
            }
            let due = self.due();
            match &mut self.watcher {
                Some(watcher) => tokio::select! {
                    events = watcher.next() => self.note(events),
                    () = tokio::time::sleep_until(due) => {}
                },
                None => tokio::time::sleep_until(due).await,
            }
            self.look_at_the_clock();
        }
    }
}

// Time.

impl FolderSource {
    fn due(&self) -> Instant {
        let removal = self.tally.next_removal().filter(|_| self.lost.is_none());
        [self.pending.due(), removal, Some(self.sweep.due)]
            .into_iter()
            .flatten()
            .fold(self.tick, Instant::min)
    }

    fn look_at_the_clock(&mut self) {
        let now = Instant::now();
        if now >= self.tick {
            self.tick = now + TICK;
            self.look_at_the_root();
        }
        if self.pending.due().is_some_and(|due| due <= now) {
            self.queue_pending();
        }
        if now >= self.sweep.due && self.lost.is_none() {
            self.sweep_a_slice(now);
        }
    }

    /// Does what is queued, in slices. What is done stays done if this is dropped between two.
    async fn work(&mut self) {
        let mut slice = Instant::now();
        while self.step() {
            if slice.elapsed() >= SLICE {
                tokio::task::yield_now().await;
                slice = Instant::now();
            }
        }
        self.adopt_orphans();
        if self.buffer.capacity() > 1 << 20 {
            self.buffer = Vec::new();
        }
    }

    fn change(&mut self) -> Option<Change> {
        let now = Instant::now();
        let added = self.tally.added(now);
        let mut removed = Vec::new();
        if self.tally.next_removal().is_some_and(|due| due <= now) {
            // The files may have gone because the whole folder is going.
            self.look_at_the_root();
            if self.lost.is_none() && self.queue.is_empty() {
                removed = self.tally.removed(now);
            }
        }
        let listed = self.dir(ROOT).is_some_and(|root| root.listed);
        let settled = listed && self.trouble.never == 0;
        if added.is_empty() && removed.is_empty() && self.told == Some(settled) {
            return None;
        }
        self.told = Some(settled);
        Some(Change { added, removed, settled })
    }

    /// Whether the folder is still the one at its path. No event tells of one that is mounted over it.
    fn look_at_the_root(&mut self) {
        let found = tree::look(&self.root).and_then(|facts| match facts.kind {
            Kind::Directory => Ok(facts.identity),
            _ => Err(io::ErrorKind::NotADirectory.into()),
        });
        match found {
            Err(error) => self.lose_root(&error),
            Ok(identity) => {
                let same = self.dir(ROOT).is_some_and(|root| root.identity == identity);
                if self.lost.is_some() || !same {
                    self.tally.freeze();
                    self.queue_everything();
                }
            }
        }
    }

    fn lose_root(&mut self, error: &io::Error) {
        let reason = error.to_string();
        if self.lost.is_none() {
            self.trouble.faults.fetch_add(1, Ordering::Relaxed);
        }
        if self.lost.as_ref() != Some(&reason) {
            tracing::warn!(
                folder = %self.root.display(), reason,
                "the folder of manifests cannot be read; all accounts are kept until it is back"
            );
            self.lost = Some(reason);
        }
        self.tally.freeze();
        self.queue.clear();
        self.scan = None;
        for dir in self.dirs.iter_mut().flatten() {
            dir.queued_list = false;
            dir.queued_links = false;
        }
    }

    fn find_root(&mut self) {
        if self.lost.take().is_some() {
            self.trouble.faults.fetch_sub(1, Ordering::Relaxed);
            tracing::info!(folder = %self.root.display(), "the folder of manifests is back");
        }
        // What is gone is held anew: the folder may only now be filled again.
        self.tally.thaw(Instant::now());
    }
}

// Events.

impl Pending {
    fn due(&self) -> Option<Instant> {
        let patience = self.first? + PATIENCE;
        match self.last {
            Some(last) if self.unfinished.is_empty() => Some(patience.min(last + QUIET)),
            _ => Some(patience),
        }
    }

    fn touch(&mut self) {
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
        if self.names.len() > MAX_DIRTY {
            self.everything = true;
            self.names.clear();
        }
    }
}

impl FolderSource {
    fn note(&mut self, events: Vec<Event<u32>>) {
        for event in events {
            match event {
                Event::Overflow => {
                    self.pending.everything = true;
                    self.pending.touch();
                }
                Event::Gone { key } => self.note_gone(key),
                Event::Changed { key, name } => self.note_changed(key, name, false),
                Event::Writing { key, name } => self.note_changed(key, name, true),
            }
        }
    }

    fn note_gone(&mut self, key: u32) {
        if key & LOOKOUT != 0 {
            let Some(lookout) = self.lookouts.get_mut((key & !LOOKOUT) as usize) else { return };
            let watch = lookout.watch.take();
            self.pending.links.extend(&lookout.users);
            self.unwatch(watch);
        } else {
            let Some(dir) = self.dir_mut(key) else { return };
            let watch = dir.watch.take();
            let owner = (dir.parent, dir.name.clone());
            self.unwatch(watch);
            if key == ROOT {
                self.tick = Instant::now();
            } else {
                self.pending.names.insert(owner);
            }
        }
        self.pending.touch();
    }

    fn note_changed(&mut self, key: u32, name: Option<OsString>, writing: bool) {
        if key & LOOKOUT != 0 {
            let id = key & !LOOKOUT;
            let Some(lookout) = self.lookouts.get(id as usize) else { return };
            for &user in &lookout.users {
                let Some(dir) = self.dirs.get(user as usize).and_then(Option::as_ref) else { continue };
                let concerned = name.as_deref().is_none_or(|name| {
                    dir.steps.binary_search_by(|(at, step)| (*at, &**step).cmp(&(id, name))).is_ok()
                });
                if concerned {
                    self.pending.links.insert(user);
                    self.pending.touch();
                }
            }
            return;
        }
        let Some(name) = name else {
            self.pending.dirs.insert(key);
            return self.pending.touch();
        };
        if is_hidden(&name) {
            return;
        }
        let entry = (key, name.into_boxed_os_str());
        if !writing {
            self.pending.unfinished.remove(&entry);
        } else if is_manifest(&entry.1) {
            self.pending.unfinished.insert(entry.clone());
        } else {
            return;
        }
        self.pending.names.insert(entry);
        self.pending.touch();
    }

    fn queue_pending(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        if self.lost.is_some() {
            return;
        }
        self.refresh_excluded();
        if pending.everything {
            return self.queue_everything();
        }
        for dir in pending.dirs {
            self.queue_list(dir);
        }
        for dir in pending.links {
            self.queue_links(dir);
        }
        self.queue.extend(pending.names.into_iter().map(|(dir, name)| Work::Name(dir, name)));
    }

    fn queue_everything(&mut self) {
        self.refresh_excluded();
        for dir in 0..self.dirs.len() as u32 {
            self.queue_list(dir);
            self.queue_links(dir);
        }
    }

    fn queue_list(&mut self, id: u32) {
        if let Some(dir) = self.dir_mut(id)
            && !std::mem::replace(&mut dir.queued_list, true)
        {
            self.queue.push_back(Work::List(id));
        }
    }

    fn queue_links(&mut self, id: u32) {
        if let Some(dir) = self.dir_mut(id)
            && !std::mem::replace(&mut dir.queued_links, true)
        {
            self.queue.push_back(Work::Links(id));
        }
    }

    fn refresh_excluded(&mut self) {
        self.excluded_now.clear();
        for path in &self.excluded {
            if let Ok(handle) = Directory::open(path)
                && let Ok(real) = handle.real_path()
            {
                self.excluded_now.push((handle.facts.identity, real));
            }
        }
    }
}

// Sweeping.

impl FolderSource {
    fn sweep_a_slice(&mut self, start: Instant) {
        if self.sweep.dir == 0 && self.sweep.entry == 0 {
            self.sweep.round = start;
            self.sweep.only_unwatched = self.dirs.iter().flatten().any(|dir| dir.is_unwatched());
        }
        let only_unwatched = self.sweep.only_unwatched;
        // Not the time on the clock: a busy machine must not make the sweep still slower.
        let before = clock::worked();
        let mut spent = Duration::ZERO;
        while self.sweep.dir < self.dirs.len() && spent < SLICE {
            let wanted =
                self.dirs[self.sweep.dir].as_ref().is_some_and(|dir| !only_unwatched || dir.is_unwatched());
            if !wanted || !self.sweep_entries() {
                self.sweep.dir += 1;
                self.sweep.entry = 0;
            }
            spent = clock::worked().saturating_sub(before);
        }
        let rest = start + spent * if only_unwatched { REST_UNWATCHED } else { REST_WATCHED };
        self.sweep.due = rest;
        if self.sweep.dir >= self.dirs.len() {
            self.sweep.dir = 0;
            self.sweep.entry = 0;
            self.sweep.due = rest.max(self.sweep.round + TICK);
        }
    }

    /// Looks at some entries of a directory. Whether there are more.
    fn sweep_entries(&mut self) -> bool {
        let id = self.sweep.dir as u32;
        let Some(dir) = self.dir(id) else { return false };
        let owner = (dir.parent, dir.name.clone());
        let handle = Directory::open(&self.path(id));
        let Some(dir) = self.dirs.get(id as usize).and_then(Option::as_ref) else { return false };
        let handle = match handle {
            Ok(handle) if handle.facts.identity == dir.identity => handle,
            // Known, and told.
            Err(error) if dir.trouble.as_deref() == Some(&*error.to_string()) => return false,
            _ => {
                if id == ROOT {
                    self.tick = Instant::now();
                } else {
                    self.pending.names.insert(owner);
                    self.pending.touch();
                }
                return false;
            }
        };
        if self.sweep.entry == 0 && (dir.trouble.is_some() || handle.facts.stamp != dir.stamp) {
            self.pending.dirs.insert(id);
            self.pending.touch();
        }
        let entries = dir.entries.get(self.sweep.entry..).unwrap_or_default();
        for entry in entries.iter().take(SWEEP_ENTRIES) {
            if entry.link {
                let facts = handle.look_through(&entry.name).ok();
                let same = match (&entry.node, facts) {
                    (Node::File(file), Some(facts)) => file.stamp == facts.stamp,
                    (Node::File(file), None) => file.trouble.is_some(),
                    (Node::Dir(to) | Node::Alias(to), Some(facts)) => {
                        self.dir(*to).is_some_and(|to| to.identity == facts.identity)
                    }
                    (Node::Dir(to) | Node::Alias(to), None) => {
                        self.dir(*to).is_some_and(|to| to.trouble.is_some())
                    }
                    (Node::Nothing, Some(facts)) => facts.kind == Kind::Other || facts.kind == Kind::File,
                    (Node::Nothing, None) => true,
                };
                if !same {
                    self.pending.links.insert(id);
                    self.pending.touch();
                }
            } else if let Node::File(file) = &entry.node {
                let same = handle.look(&entry.name).is_ok_and(|facts| facts.stamp == file.stamp);
                if !same {
                    self.pending.names.insert((id, entry.name.clone()));
                    self.pending.touch();
                }
            }
        }
        self.sweep.entry += SWEEP_ENTRIES;
        entries.len() > SWEEP_ENTRIES
    }
}

impl Dir {
    fn is_unwatched(&self) -> bool {
        self.watch.is_none() || self.blind
    }

    fn find(&self, name: &OsStr) -> Result<usize, usize> {
        // Listings are read in order.
        match self.entries.last() {
            Some(last) if &*last.name < name => Err(self.entries.len()),
            _ => self.entries.binary_search_by(|entry| (*entry.name).cmp(name)),
        }
    }
}

// Looking at what is there.

impl FolderSource {
    /// Does the next thing. Whether there was one.
    fn step(&mut self) -> bool {
        if let Some(mut scan) = self.scan.take() {
            match scan.entries.pop() {
                Some((name, kind)) => {
                    self.examine(&scan.handle, scan.dir, &name, Some(kind), false);
                    self.scan = Some(scan);
                }
                None => {
                    if let Some(dir) = self.dir_mut(scan.dir) {
                        dir.entries.shrink_to_fit();
                    }
                }
            }
            return true;
        }
        match self.queue.pop_front() {
            Some(Work::List(id)) => self.list(id),
            Some(Work::Links(id)) => self.follow_links(id),
            Some(Work::Name(id, name)) => {
                if let Some(handle) = self.open_known(id) {
                    self.examine(&handle, id, &name, None, true);
                }
            }
            None => return false,
        }
        true
    }

    /// Opens a directory if what is at its path is still it; else sees to it that its owner looks.
    fn open_known(&mut self, id: u32) -> Option<Directory> {
        let dir = self.dir(id)?;
        let (identity, owner) = (dir.identity, (dir.parent, dir.name.clone()));
        match Directory::open(&self.path(id)) {
            Ok(handle) if handle.facts.identity == identity => Some(handle),
            Ok(_) => {
                self.look_at_owner(id, owner);
                None
            }
            Err(error) => {
                self.unreadable(id, owner, &error);
                None
            }
        }
    }

    fn look_at_owner(&mut self, id: u32, (parent, name): (u32, Box<OsStr>)) {
        if id == ROOT {
            self.queue_list(ROOT);
        } else {
            // Not at once: what is being replaced needs a moment.
            self.pending.names.insert((parent, name));
            self.pending.touch();
        }
    }

    fn unreadable(&mut self, id: u32, owner: (u32, Box<OsStr>), error: &io::Error) {
        if id == ROOT {
            self.lose_root(error);
        } else if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
            // The owner will find it gone, if it has not yet.
            let gone = self.path(owner.0);
            let gone = Directory::open(&gone).and_then(|handle| handle.look(&owner.1)).is_err();
            if gone {
                self.queue.push_back(Work::Name(owner.0, owner.1));
            } else {
                self.look_at_owner(id, owner);
            }
        } else {
            self.set_dir_trouble(id, &error.to_string());
        }
    }

    fn list(&mut self, id: u32) {
        let Some(dir) = self.dir_mut(id) else { return };
        dir.queued_list = false;
        let handle = if id == ROOT {
            match Directory::open(&self.root) {
                Ok(handle) => {
                    let identity = handle.facts.identity;
                    if self.dir(ROOT).is_some_and(|root| root.identity != identity) {
                        self.replace_identity(ROOT, identity);
                    }
                    Some(handle)
                }
                Err(error) => {
                    self.lose_root(&error);
                    None
                }
            }
        } else {
            self.open_known(id)
        };
        let Some(handle) = handle else { return };
        // First, so that nothing happens unseen between this and the listing.
        self.watch_dir(id, &handle);
        let wanted = |name: &OsStr, kind: Kind| {
            !is_hidden(name) && (is_manifest(name) || matches!(kind, Kind::Directory | Kind::Link))
        };
        let mut entries = match handle.entries(wanted) {
            Ok(entries) => entries,
            Err(error) if id == ROOT => return self.lose_root(&error),
            Err(error) => return self.set_dir_trouble(id, &error.to_string()),
        };
        entries.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        if self.clear_dir_trouble(id) {
            tracing::info!(folder = %self.path(id).display(), "the folder of manifests can be read again");
        }
        if id == ROOT {
            self.find_root();
        }
        let Some(dir) = self.dir_mut(id) else { return };
        dir.listed = true;
        dir.stamp = handle.facts.stamp;
        let is_there = |name: &OsStr| entries.binary_search_by(|(there, _)| (**there).cmp(name)).is_ok();
        let gone: Vec<_> = dir
            .entries
            .iter()
            .filter(|entry| !is_there(&entry.name))
            .map(|entry| entry.name.clone())
            .collect();
        dir.entries.reserve(entries.len().saturating_sub(dir.entries.len()));
        for name in gone {
            self.remove_entry(id, &name);
        }
        entries.reverse();
        self.scan = Some(Scan { dir: id, handle, entries });
    }

    /// Looks at one entry. A file that has not changed is only read if that is asked for.
    fn examine(&mut self, handle: &Directory, id: u32, name: &OsStr, kind: Option<Kind>, anyway: bool) {
        if self.dir(id).is_none() || is_hidden(name) {
            return;
        }
        let facts = match kind {
            Some(Kind::File) if self.file(id, name).is_none() => None,
            Some(Kind::Link) => None,
            _ => match handle.look(name) {
                Ok(facts) => Some(facts),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return self.remove_entry(id, name),
                Err(error) if is_manifest(name) => {
                    return self.put_unreadable(id, name, false, None, &error.to_string());
                }
                Err(_) => return,
            },
        };
        let kind = facts.map(|facts| facts.kind).or(kind);
        if kind != Some(Kind::Link) {
            self.put_no_link(id, name);
        }
        match (kind, facts) {
            (Some(Kind::Link), _) => self.put_link(id, name),
            (Some(Kind::Directory), Some(facts)) => self.enter(id, name, false, facts.identity, None),
            (Some(Kind::File), facts) if is_manifest(name) => {
                let same = |file: &File| facts.is_some_and(|facts| facts.stamp == file.stamp);
                if anyway || !self.file(id, name).is_some_and(same) {
                    let mut buffer = std::mem::take(&mut self.buffer);
                    let read = handle.read(name, MAX_FILE, &mut buffer);
                    self.put_read(id, name, false, facts, read, &buffer);
                    self.buffer = buffer;
                }
            }
            (Some(Kind::Other), facts) if is_manifest(name) => {
                let identity = facts.map(|facts| facts.identity);
                self.put_unreadable(id, name, false, identity, "it is no regular file");
            }
            _ => self.remove_entry(id, name),
        }
    }

    /// Looks where all links of a directory lead, and sees to it that changes on their way are heard of.
    fn follow_links(&mut self, id: u32) {
        let Some(dir) = self.dir_mut(id) else { return };
        dir.queued_links = false;
        if dir.steps.is_empty() && !dir.entries.iter().any(|entry| entry.link) {
            return;
        }
        let names: Vec<_> =
            dir.entries.iter().filter(|entry| entry.link).map(|entry| entry.name.clone()).collect();
        let Some(handle) = self.open_known(id) else { return };
        let Ok(real) = handle.real_path() else { return };
        // Before looking, so that nothing happens unseen between this and that.
        let mut steps = BTreeMap::new();
        let mut ends = Vec::with_capacity(names.len());
        for name in &names {
            let route = tree::follow(&real, name).ok();
            ends.push(route.as_ref().map(|route| route.end.clone()));
            let on_the_way = route.map(|route| route.steps).unwrap_or_default();
            let last = on_the_way.len().saturating_sub(1);
            // The first step is the link itself, of which the directory's own watch tells.
            for (index, step) in on_the_way.into_iter().enumerate().skip(1) {
                *steps.entry(step).or_insert(false) |= index == last;
            }
        }
        self.look_out(id, steps);
        for (name, end) in names.iter().zip(ends) {
            self.follow_link(&handle, id, name, end.as_deref());
        }
    }

    fn follow_link(&mut self, handle: &Directory, id: u32, name: &OsStr, end: Option<&Path>) {
        let excluded = |real: &Path| self.excluded_now.iter().any(|(_, path)| real.starts_with(path));
        let facts = match handle.look(name) {
            Ok(facts) if facts.kind == Kind::Link => handle.look_through(name),
            // No link any more.
            Ok(_) | Err(_) => {
                self.queue.push_back(Work::Name(id, name.into()));
                return;
            }
        };
        match facts {
            _ if end.is_some_and(excluded) => self.put_nothing(id, name),
            Ok(facts) if facts.kind == Kind::Directory => self.enter(id, name, true, facts.identity, end),
            Ok(_) if !is_manifest(name) => self.put_nothing(id, name),
            Ok(facts) if facts.kind == Kind::File => {
                if !self.file(id, name).is_some_and(|file| file.stamp == facts.stamp) {
                    let mut buffer = std::mem::take(&mut self.buffer);
                    let read = handle.read_through(name, MAX_FILE, &mut buffer);
                    self.put_read(id, name, true, Some(facts), read, &buffer);
                    self.buffer = buffer;
                }
            }
            Ok(facts) => {
                self.put_unreadable(id, name, true, Some(facts.identity), "it leads to no regular file");
            }
            Err(error) => {
                let reason = match error.kind() {
                    io::ErrorKind::NotFound => "it is a link that leads nowhere".to_owned(),
                    _ if error.raw_os_error() == Some(ELOOP) => {
                        "it is a link that leads in a circle".to_owned()
                    }
                    _ => error.to_string(),
                };
                match self.node(id, name) {
                    // As a folder that is not there: nothing is removed.
                    Some(&Node::Dir(to)) => {
                        let watch = self.dir_mut(to).and_then(|dir| dir.watch.take());
                        self.unwatch(watch);
                        self.set_dir_trouble(to, &reason);
                    }
                    // What it led to was read, and still is where it was found.
                    Some(Node::Alias(_)) => {
                        self.clear_node(id, name);
                        let read = File { stamp: Stamp::UNSURE, names: Names::none(), trouble: None };
                        self.set_node(id, name, true, Node::File(read));
                        self.put_unreadable(id, name, true, None, &reason);
                    }
                    // It may have led to a folder, or be about to.
                    _ if is_manifest(name) || Path::new(name).extension().is_none() => {
                        self.put_unreadable(id, name, true, None, &reason);
                    }
                    _ => self.put_nothing(id, name),
                }
            }
        }
    }

    /// An entry turns out to lead to a directory.
    fn enter(&mut self, id: u32, name: &OsStr, link: bool, identity: Identity, real: Option<&Path>) {
        let excluded = self
            .excluded_now
            .iter()
            .any(|(own, path)| *own == identity || real.is_some_and(|real| real.starts_with(path)));
        if excluded {
            return if link { self.put_nothing(id, name) } else { self.remove_entry(id, name) };
        }
        match self.node(id, name) {
            Some(&Node::Dir(to)) => {
                let known = self.by_identity.contains_key(&identity);
                match self.dir(to) {
                    Some(dir) if dir.identity == identity => {
                        if dir.watch.is_none() || dir.trouble.is_some() {
                            self.queue_list(to);
                        }
                        return;
                    }
                    // Another directory took its place. What is below keeps its names, and what they were good for.
                    Some(_) if !known => {
                        self.replace_identity(to, identity);
                        self.queue_list(to);
                        self.queue_links(to);
                        return;
                    }
                    _ => {}
                }
            }
            Some(&Node::Alias(to)) if self.dir(to).is_some_and(|dir| dir.identity == identity) => return,
            _ => {}
        }
        self.clear_node(id, name);
        let node = match self.by_identity.get(&identity) {
            Some(&other) => {
                if let Some(dir) = self.dir_mut(other) {
                    dir.aliases.push((id, name.into()));
                }
                Node::Alias(other)
            }
            None => {
                let new = self.new_dir(id, name.into(), identity);
                self.queue_list(new);
                Node::Dir(new)
            }
        };
        self.set_node(id, name, link, node);
    }
}

// Keeping what was found.

impl FolderSource {
    fn dir(&self, id: u32) -> Option<&Dir> {
        self.dirs.get(id as usize)?.as_deref()
    }

    fn dir_mut(&mut self, id: u32) -> Option<&mut Dir> {
        self.dirs.get_mut(id as usize)?.as_deref_mut()
    }

    fn node(&self, id: u32, name: &OsStr) -> Option<&Node> {
        let dir = self.dir(id)?;
        dir.find(name).ok().map(|at| &dir.entries[at].node)
    }

    fn file(&self, id: u32, name: &OsStr) -> Option<&File> {
        match self.node(id, name) {
            Some(Node::File(file)) => Some(file),
            _ => None,
        }
    }

    fn file_mut(&mut self, id: u32, name: &OsStr) -> Option<&mut File> {
        let dir = self.dir_mut(id)?;
        let at = dir.find(name).ok()?;
        match &mut dir.entries[at].node {
            Node::File(file) => Some(file),
            _ => None,
        }
    }

    /// The file itself, leaving nothing in its place.
    fn take_file(&mut self, id: u32, name: &OsStr) -> Option<File> {
        self.file(id, name)?;
        let dir = self.dir_mut(id)?;
        let at = dir.find(name).ok()?;
        match std::mem::replace(&mut dir.entries[at].node, Node::Nothing) {
            Node::File(file) => Some(file),
            _ => None,
        }
    }

    /// Sets what an entry leads to, and makes it if need be.
    fn set_node(&mut self, id: u32, name: &OsStr, link: bool, node: Node) {
        let Some(dir) = self.dir_mut(id) else { return };
        match dir.find(name) {
            Ok(at) => {
                dir.entries[at].link = link;
                dir.entries[at].node = node;
            }
            Err(at) => dir.entries.insert(at, Entry { name: name.into(), link, node }),
        }
    }

    /// Where a directory was found.
    fn path(&self, id: u32) -> PathBuf {
        let mut names = Vec::new();
        let mut at = id;
        while at != ROOT
            && let Some(dir) = self.dir(at)
        {
            names.push(&*dir.name);
            at = dir.parent;
        }
        let mut path = self.root.clone();
        path.extend(names.into_iter().rev());
        path
    }

    fn new_dir(&mut self, parent: u32, name: Box<OsStr>, identity: Identity) -> u32 {
        let dir = Box::new(Dir {
            parent,
            name,
            identity,
            watch: None,
            stamp: Stamp::UNSURE,
            entries: Vec::new(),
            aliases: Vec::new(),
            steps: Box::default(),
            trouble: None,
            listed: false,
            blind: false,
            queued_list: false,
            queued_links: false,
        });
        let id = match self.free.pop() {
            Some(id) => {
                self.dirs[id as usize] = Some(dir);
                id
            }
            None => {
                self.dirs.push(Some(dir));
                (self.dirs.len() - 1) as u32
            }
        };
        self.by_identity.insert(identity, id);
        id
    }

    fn replace_identity(&mut self, id: u32, identity: Identity) {
        let Some(dir) = self.dir_mut(id) else { return };
        let before = std::mem::replace(&mut dir.identity, identity);
        dir.stamp = Stamp::UNSURE;
        let watch = dir.watch.take();
        let aliases = std::mem::take(&mut dir.aliases);
        self.unwatch(watch);
        if self.by_identity.get(&before) == Some(&id) {
            self.by_identity.remove(&before);
        }
        self.by_identity.insert(identity, id);
        self.scatter(aliases);
    }

    /// Entries that led to a directory which is known here no longer have to look for themselves.
    fn scatter(&mut self, aliases: Vec<(u32, Box<OsStr>)>) {
        for (id, name) in aliases {
            if let Some(dir) = self.dir_mut(id)
                && let Ok(at) = dir.find(&name)
                && let Node::Alias(_) = dir.entries[at].node
            {
                dir.entries[at].node = Node::Nothing;
                self.queue.push_back(Work::Name(id, name));
            }
        }
    }

    fn remove_entry(&mut self, id: u32, name: &OsStr) {
        self.clear_node(id, name);
        if let Some(dir) = self.dir_mut(id)
            && let Ok(at) = dir.find(name)
        {
            let entry = dir.entries.remove(at);
            if entry.link {
                self.queue_links(id);
            }
        }
    }

    /// An entry turns out to be a link. Where it leads is looked at with the directory's other links.
    fn put_link(&mut self, id: u32, name: &OsStr) {
        match self.dir_mut(id) {
            Some(dir) => match dir.find(name) {
                Ok(at) => dir.entries[at].link = true,
                Err(at) => {
                    dir.entries.insert(at, Entry { name: name.into(), link: true, node: Node::Nothing })
                }
            },
            None => return,
        }
        self.queue_links(id);
    }

    /// An entry turns out to be no link, if it was one.
    fn put_no_link(&mut self, id: u32, name: &OsStr) {
        if let Some(dir) = self.dir_mut(id)
            && let Ok(at) = dir.find(name)
            && std::mem::replace(&mut dir.entries[at].link, false)
        {
            self.queue_links(id);
        }
    }

    fn put_nothing(&mut self, id: u32, name: &OsStr) {
        self.clear_node(id, name);
    }

    /// Forgets what an entry led to.
    fn clear_node(&mut self, id: u32, name: &OsStr) {
        let Some(dir) = self.dir_mut(id) else { return };
        let Ok(at) = dir.find(name) else { return };
        match std::mem::replace(&mut dir.entries[at].node, Node::Nothing) {
            Node::File(file) => self.forget_file(file),
            Node::Dir(to) => self.forget_dir(to),
            Node::Alias(to) => {
                if let Some(other) = self.dir_mut(to) {
                    other.aliases.retain(|(dir, alias)| (*dir, &**alias) != (id, name));
                }
            }
            Node::Nothing => {}
        }
    }

    fn forget_file(&mut self, file: File) {
        for account in file.names.as_slice() {
            self.tally.remove(account);
        }
        if let Some(trouble) = file.trouble {
            self.count(&trouble, false);
            if let Some(identity) = trouble.identity {
                self.orphans.insert(identity, trouble.good);
            }
        }
    }

    fn forget_dir(&mut self, id: u32) {
        let mut ids = vec![id];
        while let Some(id) = ids.pop() {
            self.clear_dir_trouble(id);
            let Some(dir) = self.dirs.get_mut(id as usize).and_then(Option::take) else { continue };
            self.free.push(id);
            if self.by_identity.get(&dir.identity) == Some(&id) {
                self.by_identity.remove(&dir.identity);
            }
            self.unwatch(dir.watch);
            for (lookout, _) in &dir.steps {
                self.leave_lookout(*lookout, id);
            }
            for entry in dir.entries {
                match entry.node {
                    Node::File(file) => self.forget_file(file),
                    Node::Dir(to) => ids.push(to),
                    Node::Alias(to) => {
                        if let Some(other) = self.dir_mut(to) {
                            other.aliases.retain(|(dir, alias)| (*dir, alias) != (id, &entry.name));
                        }
                    }
                    Node::Nothing => {}
                }
            }
            self.scatter(dir.aliases);
        }
    }

    fn put_read(
        &mut self,
        id: u32,
        name: &OsStr,
        link: bool,
        before: Option<tree::Facts>,
        read: io::Result<tree::Facts>,
        text: &[u8],
    ) {
        match read {
            Ok(facts) => {
                let found = accounts_in(text);
                self.put_file(
                    id,
                    name,
                    link,
                    Some(facts.identity),
                    facts.stamp,
                    found.accounts,
                    found.faults,
                );
            }
            Err(error) if !link && error.kind() == io::ErrorKind::NotFound => self.remove_entry(id, name),
            Err(error) => {
                let identity = before.map(|facts| facts.identity);
                self.put_unreadable(id, name, link, identity, &error.to_string());
            }
        }
    }

    fn put_unreadable(
        &mut self,
        id: u32,
        name: &OsStr,
        link: bool,
        identity: Option<Identity>,
        reason: &str,
    ) {
        let fault = Fault { document: 0, reason: reason.to_owned() };
        // What it names is not known, so nothing says that it is other than before.
        let named = self.file(id, name).map(|file| file.names.as_slice().to_vec()).unwrap_or_default();
        self.put_file(id, name, link, identity, Stamp::UNSURE, named, vec![fault]);
    }

    #[expect(clippy::too_many_arguments, reason = "what is known of a file, in one place")]
    fn put_file(
        &mut self,
        id: u32,
        name: &OsStr,
        link: bool,
        identity: Option<Identity>,
        stamp: Stamp,
        mut accounts: Vec<ServiceAccount>,
        faults: Vec<Fault>,
    ) {
        let before = self.take_file(id, name);
        if before.is_none() {
            self.clear_node(id, name);
        }
        let is_new = before.is_none();
        let (names_before, trouble_before) = match before {
            Some(file) => (file.names, file.trouble),
            None => (Names::none(), None),
        };
        let trouble = (!faults.is_empty()).then(|| {
            let good = match &trouble_before {
                Some(trouble) => trouble.good.clone(),
                None => Remembered { names: names_before.clone(), ever: !is_new },
            };
            accounts.extend_from_slice(good.names.as_slice());
            Box::new(Trouble { identity, faults, good })
        });
        self.tell(id, name, trouble_before.as_deref(), trouble.as_deref());
        if let Some(trouble) = &trouble_before {
            self.count(trouble, false);
        }
        if let Some(trouble) = &trouble {
            self.count(trouble, true);
            if let (true, Some(identity)) = (is_new, identity) {
                self.newcomers.push((identity, id, name.into()));
            }
        }
        let names = self.tally_names(accounts, &names_before);
        self.set_node(id, name, link, Node::File(File { stamp, names, trouble }));
    }

    fn tally_names(&mut self, mut accounts: Vec<ServiceAccount>, before: &Names) -> Names {
        accounts.sort_unstable();
        accounts.dedup();
        for account in &mut accounts {
            *account = self.tally.shared(account.clone());
            self.tally.add(account);
        }
        for account in before.as_slice() {
            self.tally.remove(account);
        }
        Names::from(accounts)
    }

    /// A file with faults that was renamed keeps what it named when it was good.
    fn adopt_orphans(&mut self) {
        let mut orphans = std::mem::take(&mut self.orphans);
        for (identity, id, name) in std::mem::take(&mut self.newcomers) {
            let Some(good) = orphans.remove(&identity) else { continue };
            let Some(file) = self.file(id, &name) else { continue };
            let Some(trouble) = file.trouble.as_deref().filter(|trouble| !trouble.good.ever) else {
                continue;
            };
            let was_never =
                Trouble { identity: None, faults: trouble.faults.clone(), good: trouble.good.clone() };
            let before = file.names.clone();
            let accounts = [before.as_slice(), good.names.as_slice()].concat();
            let names = self.tally_names(accounts, &before);
            let now = Trouble { identity: Some(identity), faults: was_never.faults.clone(), good };
            self.count(&was_never, false);
            self.count(&now, true);
            if let Some(file) = self.file_mut(id, &name) {
                file.names = names;
                file.trouble = Some(Box::new(now));
            }
        }
    }
}

// Faults.

impl FolderSource {
    fn count(&mut self, trouble: &Trouble, more: bool) {
        let (faults, never) = (trouble.faults.len(), usize::from(!trouble.good.ever));
        if more {
            self.trouble.faults.fetch_add(faults, Ordering::Relaxed);
            self.trouble.never += never;
        } else {
            self.trouble.faults.fetch_sub(faults, Ordering::Relaxed);
            self.trouble.never -= never;
        }
    }

    /// Says what is new, once.
    fn tell(&self, id: u32, name: &OsStr, before: Option<&Trouble>, now: Option<&Trouble>) {
        let file = || self.path(id).join(name);
        let Some(now) = now else {
            if before.is_some() {
                tracing::info!(file = %file().display(), "the manifest is without fault again");
            }
            return;
        };
        let known = before.map(|trouble| &*trouble.faults).unwrap_or_default();
        let mut new = now.faults.iter().filter(|fault| !known.contains(fault));
        for Fault { document, reason } in new.by_ref().take(MAX_LOGGED) {
            let file = file();
            match document {
                0 => tracing::warn!(file = %file.display(), reason, "a manifest cannot be read"),
                _ => tracing::warn!(file = %file.display(), document, reason, "a manifest has a fault"),
            }
        }
        let more = new.count();
        if more > 0 {
            tracing::warn!(file = %file().display(), more, "a manifest has more faults");
        }
    }

    fn set_dir_trouble(&mut self, id: u32, reason: &str) {
        if self.dir(id).is_none_or(|dir| dir.trouble.as_deref() == Some(reason)) {
            return;
        }
        self.clear_dir_trouble(id);
        tracing::warn!(folder = %self.path(id).display(), reason, "a folder of manifests cannot be read");
        if let Some(dir) = self.dir_mut(id) {
            dir.trouble = Some(reason.into());
            let never = usize::from(!dir.listed);
            self.trouble.never += never;
            self.trouble.faults.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether there was trouble.
    fn clear_dir_trouble(&mut self, id: u32) -> bool {
        let Some(dir) = self.dir_mut(id) else { return false };
        let never = usize::from(!dir.listed);
        let was = dir.trouble.take().is_some();
        if was {
            self.trouble.never -= never;
            self.trouble.faults.fetch_sub(1, Ordering::Relaxed);
        }
        was
    }
}

// Watching.

impl FolderSource {
    fn watch_dir(&mut self, id: u32, handle: &Directory) {
        if self.dir(id).is_some_and(|dir| dir.watch.is_some()) {
            return;
        }
        // By the handle, which cannot be swapped; by the path where there is no /proc.
        let path = if self.handles { handle.handle() } else { self.path(id) };
        let watch = self.watch(&path, id, true);
        if let Some(dir) = self.dir_mut(id) {
            dir.watch = watch;
        }
    }

    fn watch(&mut self, path: &Path, key: u32, contents: bool) -> Option<Watch> {
        #[cfg(test)]
        {
            self.watches_left = self.watches_left.checked_sub(1)?;
        }
        let watcher = self.watcher.as_mut()?;
        let watched = if contents { watcher.watch(path, key) } else { watcher.watch_names(path, key) };
        match watched {
            Ok(watch) => Some(watch),
            Err(error @ watch::Error::Limit { .. }) => {
                if !std::mem::replace(&mut self.limit_told, true) {
                    tracing::warn!(
                        %error,
                        "changes of the manifests beyond are looked for by sweeping over them, which is slower"
                    );
                }
                None
            }
            // Whoever cannot read it will say so.
            Err(_) => None,
        }
    }

    fn unwatch(&mut self, watch: Option<Watch>) {
        if let (Some(watcher), Some(watch)) = (&mut self.watcher, watch) {
            watcher.unwatch(watch);
        }
    }

    /// Takes the names that a directory's links lead through.
    fn look_out(&mut self, id: u32, steps: BTreeMap<(PathBuf, OsString), bool>) {
        let mut by_lookout: Vec<(u32, Box<OsStr>)> = Vec::with_capacity(steps.len());
        let mut last_ones = BTreeSet::new();
        for ((path, name), last) in steps {
            let lookout = match self.lookout_at.get(&path) {
                Some(&lookout) => lookout,
                None => {
                    let lookout = Lookout { path: path.clone(), watch: None, last: false, users: vec![] };
                    let free = self.lookouts.iter().position(|other| other.users.is_empty());
                    let at = match free.filter(|_| self.lookouts.len() > self.lookout_at.len()) {
                        Some(at) => {
                            self.lookouts[at] = lookout;
                            at
                        }
                        None => {
                            self.lookouts.push(lookout);
                            self.lookouts.len() - 1
                        }
                    } as u32;
                    self.lookout_at.insert(path, at);
                    at
                }
            };
            let users = &mut self.lookouts[lookout as usize].users;
            if !users.contains(&id) {
                users.push(id);
            }
            by_lookout.push((lookout, name.into()));
            if last {
                last_ones.insert(lookout);
            }
        }
        by_lookout.sort_unstable();
        let Some(dir) = self.dir_mut(id) else { return };
        let before = std::mem::replace(&mut dir.steps, by_lookout.into());
        let now: BTreeSet<u32> = dir.steps.iter().map(|(lookout, _)| *lookout).collect();
        let then: BTreeSet<u32> = before.iter().map(|(lookout, _)| *lookout).collect();
        for lookout in then.difference(&now) {
            self.leave_lookout(*lookout, id);
        }
        let mut blind = false;
        for lookout in now {
            let at = &mut self.lookouts[lookout as usize];
            // On the way only names matter, and "/tmp" and the like are busy.
            let more = last_ones.contains(&lookout) && !std::mem::replace(&mut at.last, true);
            if at.watch.is_none() || more {
                let (path, last) = (at.path.clone(), at.last);
                let watch = self.watch(&path, LOOKOUT | lookout, last);
                let before = std::mem::replace(&mut self.lookouts[lookout as usize].watch, watch);
                self.unwatch(before);
            }
            blind |= self.lookouts[lookout as usize].watch.is_none();
        }
        if let Some(dir) = self.dir_mut(id) {
            dir.blind = blind;
        }
    }

    fn leave_lookout(&mut self, lookout: u32, id: u32) {
        let Some(left) = self.lookouts.get_mut(lookout as usize) else { return };
        left.users.retain(|user| *user != id);
        if left.users.is_empty() {
            let watch = left.watch.take();
            self.lookout_at.remove(&left.path);
            self.unwatch(watch);
        }
    }
}

impl Names {
    fn none() -> Self {
        Self::Many(Box::default())
    }

    fn as_slice(&self) -> &[ServiceAccount] {
        match self {
            Self::One(account) => std::slice::from_ref(account),
            Self::Many(accounts) => accounts,
        }
    }
}

impl From<Vec<ServiceAccount>> for Names {
    fn from(mut accounts: Vec<ServiceAccount>) -> Self {
        match (accounts.len(), accounts.pop()) {
            (1, Some(one)) => Self::One(one),
            (_, last) => {
                accounts.extend(last);
                Self::Many(accounts.into())
            }
        }
    }
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_bytes().first() == Some(&b'.')
}

fn is_manifest(name: &OsStr) -> bool {
    let name = name.as_bytes();
    [&b".yaml"[..], b".yml", b".json"].iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests;
