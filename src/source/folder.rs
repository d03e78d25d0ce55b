//! Kubernetes manifests in a folder, and whatever becomes of them.
//!
//! The folder is held as a graph: each real directory once, however many links lead to it, owned by the entry through
//! which it was found first. The kernel's events say which entries to look at again; nothing else is read. Two things
//! go by the clock, since nothing tells of them: whether the folder itself is still the one at its path, and a sweep
//! over what cannot be watched.

mod events;
mod faults;
mod keep;
mod look;
mod sweep;
mod watching;

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
