//! What changes in directories and files, as the kernel tells it (inotify).

use std::collections::HashMap;
use std::ffi::OsString;
use std::hash::Hash;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Names that come and go; contents; modes and owners; the watched thing itself.
const EVERYTHING: WatchMask = NAMES.union(WatchMask::CLOSE_WRITE).union(WatchMask::MODIFY);
const NAMES: WatchMask = WatchMask::CREATE
    .union(WatchMask::DELETE)
    .union(WatchMask::MOVED_FROM)
    .union(WatchMask::MOVED_TO)
    .union(WatchMask::ATTRIB)
    .union(WatchMask::DELETE_SELF)
    .union(WatchMask::MOVE_SELF);

/// Room for some 200 events; the kernel keeps the rest.
const BUFFER: usize = 16 * 1024;

/// Why something cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine's share of watches is used up.
    #[error(
        "the limit of file watches is reached ({setting} = {value}); raise it with sysctl -w {setting}=<more>"
    )]
    Limit {
        /// The setting's name, as `sysctl` takes it.
        setting: &'static str,
        /// What it is set to.
        value: String,
    },
    /// There is nothing there, or no right to read it.
    #[error("{path} cannot be watched: {source}")]
    Path {
        /// What was to be watched.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The system gives no watcher at all.
    #[error("file watching is not available: {0}")]
    Unavailable(#[source] io::Error),
}

/// What happened to a watched directory or file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<K> {
    /// The entry of that name, or without one the watched thing itself, came, went or changed.
    Changed {
        /// As given to [`Watcher::watch`].
        key: K,
        /// The entry of the watched directory.
        name: Option<OsString>,
    },
    /// The contents are changing now. When the writer closes the file a `Changed` follows, so whoever wants whole
    /// files waits for it; but not for ever, since a writer may never close.
    Writing {
        /// As given to [`Watcher::watch`].
        key: K,
        /// The entry of the watched directory.
        name: Option<OsString>,
    },
    /// The watched thing itself was deleted, moved or unmounted: what is at its path now, if anything, is not watched.
    Gone {
        /// As given to [`Watcher::watch`].
        key: K,
    },
    /// Events were lost. Everything may have changed.
    Overflow,
}

/// One registration, to be given back to [`Watcher::unwatch`].
#[derive(Debug)]
pub struct Watch {
    descriptor: WatchDescriptor,
    ticket: u32,
}

/// Directories and files watched by key. Keys are chosen by the caller and come back with each event.
///
/// The kernel knows one watch for each inode however many paths lead to it, so several keys may share one; each is
/// told. Dropping the watcher ends all its watches.
pub struct Watcher<K> {
    inotify: AsyncFd<Inotify>,
    keys: HashMap<i32, Keys<K>>,
    tickets: u32,
    buffer: Box<[u8]>,
}

/// Nearly always one; there may be hundreds of thousands of these.
enum Keys<K> {
    One(u32, K),
    Many(Box<[(u32, K)]>),
}

impl<K: Copy + Eq + Hash + Send> Watcher<K> {
    /// To be called inside a tokio runtime, which will wake [`Watcher::next`].
    pub fn new() -> Result<Self, Error> {
        let inotify = Inotify::init().map_err(|source| {
            let per_process = source.raw_os_error() == Some(EMFILE);
            match per_process.then(|| limit("fs.inotify.max_user_instances")) {
                Some(Some(limit)) => limit,
                _ => Error::Unavailable(source),
            }
        })?;
        #[expect(
            deprecated,
            reason = "the successor is unsafe; the descriptor is owned here and never replaced, so this is sound"
        )]
        let inotify = AsyncFd::with_interest(inotify, Interest::READABLE).map_err(Error::Unavailable)?;
        Ok(Self { inotify, keys: HashMap::new(), tickets: 0, buffer: vec![0; BUFFER].into_boxed_slice() })
    }

    /// Watches a file, or a directory and its direct entries. Links are followed.
    pub fn watch(&mut self, path: &Path, key: K) -> Result<Watch, Error> {
        self.add(path, key, EVERYTHING)
    }

    /// As [`Watcher::watch`] without [`Event::Writing`] and without the end of writes: for busy directories of which
    /// only the names matter.
    pub fn watch_names(&mut self, path: &Path, key: K) -> Result<Watch, Error> {
        self.add(path, key, NAMES)
    }

    /// Ends a registration. Right also after [`Event::Gone`], when the kernel may have ended it already.
    pub fn unwatch(&mut self, watch: Watch) {
        let id = watch.descriptor.get_watch_descriptor_id();
        let last = match self.keys.get_mut(&id) {
            Some(keys) => keys.remove(watch.ticket),
            None => return,
        };
        if last {
            self.keys.remove(&id);
            // It fails only if the kernel has ended the watch already.
            let _ = self.inotify.get_ref().watches().remove(watch.descriptor);
        }
    }

    /// The next events, at least one. Cancel safe: an event is either returned or still to come.
    pub async fn next(&mut self) -> Vec<Event<K>> {
        loop {
            let read = match self.inotify.readable_mut().await {
                Ok(mut ready) => {
                    ready.try_io(|inotify| read(inotify.get_mut(), &mut self.buffer, &self.keys))
                }
                Err(error) => Ok(Err(error)),
            };
            match read {
                Ok(Ok(news)) => {
                    let events = self.forget_ended(news);
                    if !events.is_empty() {
                        return events;
                    }
                }
                // Not ready after all, or interrupted.
                Err(_would_block) => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel gives no such error; if it did, nothing may be known to be unchanged.
                Ok(Err(_)) => {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    return vec![Event::Overflow];
                }
            }
        }
    }

    fn add(&mut self, path: &Path, key: K, mask: WatchMask) -> Result<Watch, Error> {
        let descriptor = self
            .inotify
            .get_ref()
            .watches()
            // Added to what another key may have asked of the same inode.
            .add(path, mask | WatchMask::MASK_ADD)
            .map_err(|source| {
                let full = source.raw_os_error() == Some(ENOSPC);
                match full.then(|| limit("fs.inotify.max_user_watches")) {
                    Some(Some(limit)) => limit,
                    _ => Error::Path { path: path.to_owned(), source },
                }
            })?;
        let ticket = self.tickets;
        self.tickets = self.tickets.wrapping_add(1);
        self.keys
            .entry(descriptor.get_watch_descriptor_id())
            .and_modify(|keys| keys.add(ticket, key))
            .or_insert(Keys::One(ticket, key));
        Ok(Watch { descriptor, ticket })
    }

    fn forget_ended(&mut self, news: News<K>) -> Vec<Event<K>> {
        for id in news.ended {
            self.keys.remove(&id);
        }
        news.events
    }
}

impl<K> std::fmt::Debug for Watcher<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher").field("watches", &self.keys.len()).finish_non_exhaustive()
    }
}

impl<K: Copy> Keys<K> {
    fn as_slice(&self) -> KeySlice<'_, K> {
        match self {
            Self::One(_, key) => KeySlice::One(std::iter::once(*key)),
            Self::Many(keys) => KeySlice::Many(keys.iter()),
        }
    }

    fn add(&mut self, ticket: u32, key: K) {
        let mut all = match self {
            Self::One(first, one) => vec![(*first, *one)],
            Self::Many(keys) => std::mem::take(keys).into_vec(),
        };
        all.push((ticket, key));
        *self = Self::Many(all.into());
    }

    /// Whether none is left.
    fn remove(&mut self, ticket: u32) -> bool {
        match self {
            Self::One(only, _) => *only == ticket,
            Self::Many(keys) => {
                let mut left = std::mem::take(keys).into_vec();
                left.retain(|(other, _)| *other != ticket);
                match *left {
                    [(ticket, key)] => *self = Self::One(ticket, key),
                    _ => *self = Self::Many(left.into()),
                }
                false
            }
        }
    }
}

enum KeySlice<'a, K> {
    One(std::iter::Once<K>),
    Many(std::slice::Iter<'a, (u32, K)>),
}

impl<K: Copy> Iterator for KeySlice<'_, K> {
    type Item = K;

    fn next(&mut self) -> Option<K> {
        match self {
            Self::One(one) => one.next(),
            Self::Many(keys) => keys.next().map(|(_, key)| *key),
        }
    }
}

struct News<K> {
    events: Vec<Event<K>>,
    /// Watches that the kernel has ended.
    ended: Vec<i32>,
}

fn read<K: Copy>(
    inotify: &mut Inotify,
    buffer: &mut [u8],
    keys: &HashMap<i32, Keys<K>>,
) -> io::Result<News<K>> {
    let mut news = News { events: Vec::new(), ended: Vec::new() };
    for event in inotify.read_events(buffer)? {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            news.events.push(Event::Overflow);
            continue;
        }
        let id = event.wd.get_watch_descriptor_id();
        // Events may still come for a watch that was given up.
        let Some(keys) = keys.get(&id) else { continue };
        if news.ended.contains(&id) {
            continue;
        }
        let ended = event.mask.intersects(EventMask::DELETE_SELF | EventMask::UNMOUNT | EventMask::IGNORED);
        if ended {
            news.ended.push(id);
        }
        for key in keys.as_slice() {
            let name = event.name.map(ToOwned::to_owned);
            news.events.push(if ended || event.mask.contains(EventMask::MOVE_SELF) {
                Event::Gone { key }
            } else if event.mask.contains(EventMask::MODIFY) {
                Event::Writing { key, name }
            } else {
                Event::Changed { key, name }
            });
        }
    }
    Ok(news)
}

const ENOSPC: i32 = rustix::io::Errno::NOSPC.raw_os_error();
const EMFILE: i32 = rustix::io::Errno::MFILE.raw_os_error();

/// `None` if the setting cannot be read, as when it is the process that may open no more files.
fn limit(setting: &'static str) -> Option<Error> {
    let value = std::fs::read_to_string(format!("/proc/sys/{}", setting.replace('.', "/"))).ok()?;
    Some(Error::Limit { setting, value: value.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    /// Everything told until nothing more comes for a moment.
    async fn told(watcher: &mut Watcher<u32>) -> Vec<Event<u32>> {
        let mut all = Vec::new();
        while let Ok(events) = tokio::time::timeout(Duration::from_millis(50), watcher.next()).await {
            assert!(!events.is_empty());
            all.extend(events);
        }
        all
    }

    fn changed(key: u32, name: &str) -> Event<u32> {
        let name = Some(name.into());
        Event::Changed { key, name }
    }

    fn writing(key: u32, name: &str) -> Event<u32> {
        let name = Some(name.into());
        Event::Writing { key, name }
    }

    #[tokio::test]
    async fn names_come_and_go_under_their_keys() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        let mut watcher = Watcher::new().unwrap();
        let _a = watcher.watch(&a, 1).unwrap();
        let _b = watcher.watch(&b, 2).unwrap();

        fs::create_dir(a.join("x")).unwrap();
        fs::rename(a.join("x"), b.join("y")).unwrap();
        fs::remove_dir(b.join("y")).unwrap();
        assert_eq!(
            told(&mut watcher).await,
            [changed(1, "x"), changed(1, "x"), changed(2, "y"), changed(2, "y")]
        );
    }

    #[tokio::test]
    async fn a_write_is_told_while_it_lasts_and_at_its_end() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("f"), "old").unwrap();
        let mut watcher = Watcher::new().unwrap();
        let _watch = watcher.watch(root.path(), 7).unwrap();

        let mut file = fs::File::create(root.path().join("f")).unwrap();
        file.write_all(b"new").unwrap();
        let during = told(&mut watcher).await;
        assert!(!during.is_empty());
        assert!(during.iter().all(|event| *event == writing(7, "f")));
        drop(file);
        assert_eq!(told(&mut watcher).await, [changed(7, "f")]);

        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(root.path().join("f"), fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(told(&mut watcher).await, [changed(7, "f")]);
    }

    #[tokio::test]
    async fn a_directory_that_is_only_watched_for_names_is_silent_about_writes() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("f"), "old").unwrap();
        let mut watcher = Watcher::new().unwrap();
        let _names = watcher.watch_names(root.path(), 1).unwrap();
        fs::write(root.path().join("f"), "new").unwrap();
        fs::rename(root.path().join("f"), root.path().join("g")).unwrap();
        assert_eq!(told(&mut watcher).await, [changed(1, "f"), changed(1, "g")]);

        // Asking for less afterwards takes nothing from whoever asked for more.
        let _all = watcher.watch(root.path(), 2).unwrap();
        let _names = watcher.watch_names(root.path(), 3).unwrap();
        fs::write(root.path().join("g"), "newer").unwrap();
        assert!(told(&mut watcher).await.contains(&changed(2, "g")));
    }

    #[tokio::test]
    async fn a_watched_directory_that_vanishes_or_moves_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        let mut watcher = Watcher::new().unwrap();
        let watch_a = watcher.watch(&a, 1).unwrap();
        let watch_b = watcher.watch(&b, 2).unwrap();

        fs::remove_dir(&a).unwrap();
        fs::rename(&b, root.path().join("c")).unwrap();
        let told_of = told(&mut watcher).await;
        assert!(told_of.contains(&Event::Gone { key: 1 }), "{told_of:?}");
        assert!(told_of.contains(&Event::Gone { key: 2 }), "{told_of:?}");

        watcher.unwatch(watch_a);
        watcher.unwatch(watch_b);
        fs::write(root.path().join("c/f"), "").unwrap();
        assert_eq!(told(&mut watcher).await, []);
        assert!(watcher.keys.is_empty());
    }

    #[tokio::test]
    async fn a_watch_given_up_is_silent_and_leaves_the_others() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join("link");
        fs::create_dir(root.path().join("dir")).unwrap();
        std::os::unix::fs::symlink("dir", &link).unwrap();
        let mut watcher = Watcher::new().unwrap();
        let first = watcher.watch(&root.path().join("dir"), 1).unwrap();
        let second = watcher.watch(&link, 2).unwrap();
        let third = watcher.watch(&link, 3).unwrap();

        fs::create_dir(link.join("x")).unwrap();
        assert_eq!(told(&mut watcher).await, [changed(1, "x"), changed(2, "x"), changed(3, "x")]);
        watcher.unwatch(first);
        watcher.unwatch(third);
        fs::remove_dir(link.join("x")).unwrap();
        assert_eq!(told(&mut watcher).await, [changed(2, "x")]);
        watcher.unwatch(second);
        fs::create_dir(link.join("y")).unwrap();
        assert_eq!(told(&mut watcher).await, []);
    }

    #[tokio::test]
    async fn what_is_not_there_cannot_be_watched() {
        let root = tempfile::tempdir().unwrap();
        let mut watcher = Watcher::new().unwrap();
        let error = watcher.watch(&root.path().join("none"), 1).unwrap_err();
        assert!(matches!(&error, Error::Path { .. }), "{error}");
        assert!(error.to_string().contains("none cannot be watched"));
    }

    #[tokio::test]
    async fn more_events_than_the_buffer_holds_all_come() {
        let root = tempfile::tempdir().unwrap();
        let mut watcher = Watcher::new().unwrap();
        let _watch = watcher.watch(root.path(), 1).unwrap();
        for i in 0..2_000 {
            fs::create_dir(root.path().join(format!("{i:0>200}"))).unwrap();
        }
        assert_eq!(told(&mut watcher).await.len(), 2_000);
    }

    #[tokio::test]
    async fn lost_events_are_told_as_overflow() {
        let queue: usize =
            fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        fs::write(&a, "").unwrap();
        let mut watcher = Watcher::new().unwrap();
        let _watch = watcher.watch(root.path(), 1).unwrap();
        for _ in 0..=queue / 4 {
            fs::rename(&a, &b).unwrap();
            fs::rename(&b, &a).unwrap();
        }
        assert!(told(&mut watcher).await.contains(&Event::Overflow));
    }

    #[test]
    fn the_limit_names_the_setting_and_its_value() {
        let error = limit("fs.inotify.max_user_watches").unwrap();
        let set = fs::read_to_string("/proc/sys/fs/inotify/max_user_watches").unwrap();
        assert!(
            error.to_string().contains(&format!("fs.inotify.max_user_watches = {}", set.trim())),
            "{error}"
        );
    }

    #[test]
    fn a_watch_costs_few_bytes() {
        assert!(size_of::<(i32, Keys<u32>)>() <= 24);
        assert!(size_of::<Watch>() <= 24);
    }
}
