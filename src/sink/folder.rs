//! Certificates in folders: `<secrets>/<namespace>/istio.<account>/`.

mod notice;
mod record;
mod single;
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests make and damage files as other programs do")]
mod tests;
mod volume;

pub use single::Single;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::notice::Eyes;
use self::record::{Line, Record, Recorded, Standing};
use self::volume::{Cleared, Content, FILES, Look, Shape};
use super::{Error, Found, Sink};
use crate::core::plan::CertificateSet;
use crate::core::spiffe::ServiceAccount;
use crate::sys::clock;
use crate::sys::dir::{self, Access, Dir, Kind, Lock, Stat};
use crate::sys::watch::Watch;

/// Keeps two Micas with different data folders from one secrets folder.
const LOCK: &str = ".mica.lock";
/// Accounts of one lane wait for each other; enough that threads hardly ever meet.
const LANES: usize = 64;
/// Folders of namespaces that are held open.
const OPEN_NAMESPACES: usize = 256;
/// A namespace that vanishes between two steps is made again; more often than this somebody is at work against us.
const ATTEMPTS: usize = 3;

/// Delivers into folders below one secrets folder, and keeps a record of them in the data folder.
///
/// Every operation is a few system calls on a local file system, none of which waits for the disk, so the async
/// methods of [`Sink`] simply make them.
pub struct FolderSink {
    /// As configured, to open it again when it was removed.
    path: PathBuf,
    /// What the lock says to whoever comes second.
    holder: String,
    shape: Shape,
    root: Mutex<Root>,
    /// One operation at a time for an account.
    lanes: [Mutex<()>; LANES],
    /// Locked before `state` where both are.
    record: Mutex<Record>,
    state: Mutex<State>,
    eyes: tokio::sync::Mutex<Eyes>,
    /// Something waits in `state.pending`.
    wake: tokio::sync::Notify,
}

struct Root {
    dir: Arc<Dir>,
    _lock: Lock,
}

/// What is known of accounts and namespaces. There may be a hundred thousand accounts: each byte counts.
#[derive(Default)]
struct State {
    slots: Vec<Slot>,
    /// Slots of accounts that are gone.
    free: Vec<u32>,
    index: HashMap<ServiceAccount, u32>,
    namespaces: Vec<Namespace>,
    names: HashMap<Box<str>, u32>,
    open_namespaces: usize,
    /// Slots that were read or published, and are to be watched anew.
    pending: Vec<u32>,
    /// How often something was read or published, to tell when it is quiet.
    busy: u64,
    /// How many slots are in use and not watched.
    unwatched: usize,
    /// The secrets folder was opened again, and is to be watched again.
    root_is_new: bool,
    /// To be given back to the watcher.
    retired: Vec<Watch>,
}

struct Slot {
    /// `None` in a free slot.
    account: Option<ServiceAccount>,
    /// What it looked like when we last read or published it. Stamp zero: not known, so nothing can be said of it.
    look: Look,
    /// Of the account's folder and of the current set's.
    watches: [Option<Watch>; 2],
    /// The inodes that these watch; zero when they may have ended.
    watched: [u32; 2],
    namespace: u32,
    owner: Owner,
    flags: Flags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// Recorded as ours.
    Us,
    /// Recorded, but emptied: it stays for somebody's file.
    Vacated,
    /// Not recorded, and there.
    Others,
}

#[derive(Clone, Copy, Default)]
struct Flags {
    /// The folder exists, as far as we know. Until then only making it anew makes it ours.
    made: bool,
    pending: bool,
    dirty: bool,
    watched: bool,
    /// An earlier set is still there, for readers that have opened it.
    untidy: bool,
}

struct Namespace {
    name: Box<str>,
    dir: Option<Arc<Dir>>,
    /// Of the folder when it was last looked at.
    seen: Option<Stat>,
    /// We made its folder.
    made: bool,
    /// How many slots are in it.
    accounts: u32,
    watch: Option<Watch>,
    /// The folder that is watched, as it was when accounts were last told that it changed.
    noticed: Option<Stat>,
    /// It was removed or moved, so that what is there now is another one, however like it looks.
    replaced: bool,
}

/// A namespace's folder.
enum Place {
    Absent,
    Foreign(String),
    Open(Arc<Dir>, Stat),
}

impl FolderSink {
    /// Opens the secrets folder, making it if need be, and the record in the data folder, whose lock the caller holds.
    ///
    /// `access` is that of delivered files; folders have the same, and may be passed through by whoever may read them.
    /// Without an owner or a group it is ours.
    pub fn open(data: &Dir, secrets: &Path, access: Access) -> Result<Self, Error> {
        let Access { mode, owner, group } = access;
        Self::check_mode(mode)?;
        let holder = format!(
            "the mica that has the data folder {}, process {}",
            data.path().display(),
            std::process::id()
        );
        let access = |mode| Access {
            mode,
            owner: Some(owner.unwrap_or(dir::our_user())),
            group: Some(group.unwrap_or(dir::our_group())),
        };
        let shape =
            Shape { file: access(mode), folder: access(folder_mode(mode)), names: FILES, given: false };
        let root = open_root(secrets, &shape, &holder)?;
        let (record, recorded) =
            Record::open(data.try_clone()?, root.dir.path(), |recorded| forget_absent(&root.dir, recorded))?;
        let mut state = State::default();
        for namespace in recorded.namespaces {
            let id = state.namespace(&namespace);
            state.namespaces[id as usize].made = true;
        }
        for (account, standing) in recorded.accounts {
            let owner = match standing {
                Standing::Ours => Owner::Us,
                Standing::Vacated => Owner::Vacated,
            };
            let slot = state.insert(&account, owner);
            state.slots[slot as usize].flags.made = true;
        }
        Ok(Self {
            path: secrets.to_owned(),
            holder,
            shape,
            root: Mutex::new(root),
            lanes: [const { Mutex::new(()) }; LANES],
            record: Mutex::new(record),
            state: Mutex::new(state),
            eyes: tokio::sync::Mutex::default(),
            wake: tokio::sync::Notify::new(),
        })
    }

    /// Whether files may be delivered with this mode.
    pub fn check_mode(mode: u32) -> Result<(), Error> {
        if mode & !0o644 != 0 || mode & 0o400 == 0 { Err(Error::Mode(mode)) } else { Ok(()) }
    }

    /// Where an account's certificate is delivered, for people to read.
    pub fn path_of(&self, account: &ServiceAccount) -> PathBuf {
        let root = locked(&self.root).dir.path().to_owned();
        root.join(account.namespace()).join(folder_name(account))
    }

    /// Whether nothing was changed by others since the account was last read or published; `false` when in doubt.
    pub fn unchanged(&self, account: &ServiceAccount) -> bool {
        let _lane = self.lane(account);
        let state = locked(&self.state);
        let Some(slot) = state.slot(account) else {
            return false;
        };
        let (known, owner) = (slot.look.stamp, slot.owner);
        drop(state);
        known != 0 && self.look(account, owner).stamp == known
    }

    fn look(&self, account: &ServiceAccount, owner: Owner) -> Look {
        match self.place(account.namespace()) {
            Ok(Place::Open(namespace, _)) if owner == Owner::Us => {
                volume::look(&namespace, &folder_name(account), FILES).0
            }
            Ok(Place::Open(namespace, _)) => Look::of_foreign(&namespace, &folder_name(account)),
            // What became of the namespace is seen by looking at the namespace.
            _ => Look { stamp: 1, ..Look::default() },
        }
    }

    fn announce_now(&self, accounts: &[ServiceAccount]) -> Result<(), Error> {
        let mut free = Vec::new();
        for account in accounts {
            if locked(&self.state).slot(account).is_some() || check_name(account).is_err() {
                continue;
            }
            // What cannot be looked at is told when it is published.
            let is_free = match self.place(account.namespace()) {
                Ok(Place::Absent) => true,
                Ok(Place::Open(namespace, _)) => {
                    matches!(namespace.find(&folder_name(account)), Ok(None))
                }
                Ok(Place::Foreign(_)) | Err(_) => false,
            };
            if is_free {
                free.push(account);
            }
        }
        if free.is_empty() {
            return Ok(());
        }
        let mut record = locked(&self.record);
        record.add(free.iter().map(|account| Line::Account(account)))?;
        record.sync()?;
        let mut state = locked(&self.state);
        for account in free {
            state.insert(account, Owner::Us);
        }
        Ok(())
    }

    fn read_now(&self, account: &ServiceAccount) -> Result<Found, Error> {
        check_name(account)?;
        let _lane = self.lane(account);
        let name = folder_name(account);
        let owner = locked(&self.state).slot(account).map(|slot| slot.owner);
        let (namespace, stat) = match self.place(account.namespace())? {
            Place::Open(namespace, stat) => (namespace, stat),
            Place::Absent => {
                self.seen(account, owner, None, false);
                return Ok(Found::Absent);
            }
            Place::Foreign(why) => {
                self.seen(account, owner.or(Some(Owner::Others)), None, false);
                return Ok(Found::Foreign(why));
            }
        };
        if owner != Some(Owner::Us) {
            let look = Look::of_foreign(&namespace, &name);
            let there = namespace.find(&name)?;
            return Ok(match (owner, there) {
                (Some(Owner::Vacated), _) => {
                    self.seen(account, owner, Some(look), false);
                    Found::Absent
                }
                (_, None) => {
                    self.forget(account);
                    Found::Absent
                }
                (_, Some(stat)) => {
                    self.seen(account, Some(Owner::Others), Some(look), false);
                    Found::Foreign(why_foreign(&namespace, &name, stat.kind()))
                }
            });
        }
        // Before it is read: what changes meanwhile will be noticed.
        let (look, ..) = volume::look(&namespace, &name, FILES);
        let content = volume::read(&namespace, &name, &self.shape)?;
        let is_left = matches!(content, Content::Set { untidy: true, .. });
        self.seen(account, owner, Some(look), is_left);
        Ok(match content {
            Content::Absent => {
                // Whoever makes the folder before we do keeps it.
                self.set_made(account, false);
                Found::Absent
            }
            Content::Damaged(what) => Found::Damaged(what),
            Content::Set { mut found, .. } => {
                if self.made_namespace(account.namespace()) {
                    let mut loose = found.loose.take().unwrap_or_default();
                    volume::judge(&mut loose, &namespace, None, &stat, self.shape.folder);
                    found.loose = (!loose.is_empty()).then_some(loose);
                }
                Found::Set(found)
            }
        })
    }

    fn publish_now(&self, account: &ServiceAccount, set: &CertificateSet) -> Result<(), Error> {
        check_name(account)?;
        let _lane = self.lane(account);
        // Until it has succeeded nothing is known of it.
        if let Some(slot) = locked(&self.state).slot_mut(account) {
            slot.look.stamp = 0;
        }
        for attempt in 1.. {
            let namespace = self.namespace_to_write(account)?;
            match self.publish_in(&namespace, account, set) {
                // The namespace was removed between two steps, by us with its last account or by somebody else.
                Err(Error::Dir(error))
                    if error.is_absent() && attempt < ATTEMPTS && namespace.is_deleted().unwrap_or(false) => {
                }
                result => return result,
            }
        }
        Ok(())
    }

    fn publish_in(
        &self,
        namespace: &Dir,
        account: &ServiceAccount,
        set: &CertificateSet,
    ) -> Result<(), Error> {
        let name = folder_name(account);
        self.claim(namespace, account, &name)?;
        let made = locked(&self.state).slot(account).is_some_and(|slot| slot.flags.made);
        let present = if made { self.folder_of_ours(namespace, &name)? } else { None };
        let fresh = present.is_none();
        let folder = match present {
            Some(folder) => folder,
            None => {
                match namespace.make_subdir(&name, self.shape.folder) {
                    Ok(()) => {}
                    Err(error) if error.is_taken() => {
                        return Err(self.lost_to_others(namespace, account, &name)?);
                    }
                    Err(error) => return Err(error.into()),
                }
                self.set_made(account, true);
                namespace.subdir(&name)?
            }
        };
        match volume::publish(&folder, fresh, set, &self.shape, clock::now()) {
            Ok((look, untidy)) => {
                self.seen(account, Some(Owner::Us), Some(look), untidy);
                Ok(())
            }
            Err(error) => {
                // An empty folder would say that there is something. Best effort: the first fault is the one to tell.
                if fresh
                    && matches!(volume::clear(&folder, FILES), Ok(Cleared::Empty))
                    && namespace.rmdir(&name).is_ok()
                {
                    self.set_made(account, false);
                }
                Err(error)
            }
        }
    }

    /// Makes sure that the name is recorded as ours before anything is made of that name.
    fn claim(&self, namespace: &Dir, account: &ServiceAccount, name: &str) -> Result<(), Error> {
        let owner = locked(&self.state).slot(account).map(|slot| slot.owner);
        match owner {
            Some(Owner::Us) => return Ok(()),
            Some(Owner::Vacated) => {}
            Some(Owner::Others) | None => {
                if let Some(stat) = namespace.find(name)? {
                    let look = Look::of_foreign(namespace, name);
                    self.seen(account, Some(Owner::Others), Some(look), false);
                    return Err(Error::Foreign {
                        account: account.clone(),
                        why: why_foreign(namespace, name, stat.kind()),
                    });
                }
            }
        }
        let mut record = locked(&self.record);
        record.add([Line::Account(account)])?;
        record.sync()?;
        let mut state = locked(&self.state);
        let slot = state.insert(account, Owner::Us);
        state.slots[slot as usize].owner = Owner::Us;
        Ok(())
    }

    /// The account's folder, if it is there. What has taken its name, which is ours, is removed, unless it is a folder.
    fn folder_of_ours(&self, namespace: &Dir, name: &str) -> Result<Option<Dir>, Error> {
        match namespace.subdir(name) {
            Ok(folder) => Ok(Some(folder)),
            Err(error) if error.is_absent() => Ok(None),
            Err(dir::Error::NotFolder { .. }) => {
                namespace.unlink(name)?;
                Ok(None)
            }
            Err(error) if error.is_denied() => {
                namespace.reopen_to_us(name, self.shape.folder.mode)?;
                Ok(Some(namespace.subdir(name)?))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Somebody made a folder between our looking and our making it, so it is not ours.
    fn lost_to_others(&self, namespace: &Dir, account: &ServiceAccount, name: &str) -> Result<Error, Error> {
        let kind = namespace.find(name)?.map_or(Kind::Other, |s| s.kind());
        locked(&self.record).add([Line::Removed(account)])?;
        self.forget(account);
        let look = Look::of_foreign(namespace, name);
        self.seen(account, Some(Owner::Others), Some(look), false);
        Ok(Error::Foreign { account: account.clone(), why: why_foreign(namespace, name, kind) })
    }

    fn remove_now(&self, account: &ServiceAccount) -> Result<(), Error> {
        check_name(account)?;
        let _lane = self.lane(account);
        let mut state = locked(&self.state);
        let Some(slot) = state.slot_mut(account) else {
            return Ok(());
        };
        match slot.owner {
            Owner::Us => {}
            Owner::Vacated => return Ok(()),
            Owner::Others => {
                state.remove(account);
                return Ok(());
            }
        }
        slot.look.stamp = 0;
        let made = slot.flags.made;
        drop(state);
        let name = folder_name(account);
        match self.place(account.namespace())? {
            // Announced and never published: what may be there is somebody else's.
            _ if !made => {}
            Place::Absent => {}
            Place::Foreign(why) => {
                return Err(Error::Foreign { account: account.clone(), why });
            }
            Place::Open(namespace, _) => {
                if let Some(folder) = self.folder_of_ours(&namespace, &name)?
                    && !remove_folder(&namespace, &folder, &name)?
                {
                    let mut record = locked(&self.record);
                    record.add([Line::Vacated(account)])?;
                    drop(record);
                    let mut state = locked(&self.state);
                    if let Some(slot) = state.slot_mut(account) {
                        slot.owner = Owner::Vacated;
                    }
                    return Ok(());
                }
            }
        }
        locked(&self.record).add([Line::Removed(account)])?;
        self.forget(account);
        self.remove_namespace(account.namespace());
        if let Err(error) = self.compact_record() {
            tracing::warn!(%error, "the record of delivered folders stays longer than need be");
        }
        Ok(())
    }

    /// Removes the folder of a namespace if we made it and it is empty. A failure costs no more than an empty folder.
    fn remove_namespace(&self, name: &str) {
        // Held until it is noted, against another account for which the folder is made again.
        let mut record = locked(&self.record);
        let is_empty = locked(&self.state)
            .namespace_named(name)
            .is_some_and(|namespace| namespace.accounts == 0 && namespace.made);
        if !is_empty {
            return;
        }
        let root = locked(&self.root).dir.clone();
        match root.rmdir(name) {
            Ok(()) => {}
            Err(error) if error.is_absent() => {}
            Err(_) => return,
        }
        locked(&self.state).lose(name);
        if let Err(error) = record.add([Line::NamespaceRemoved(name)]) {
            tracing::warn!(namespace = name, %error, "cannot record that an empty folder was removed");
        }
    }

    fn compact_record(&self) -> Result<(), Error> {
        let mut record = locked(&self.record);
        if !record.is_bloated() {
            return Ok(());
        }
        let state = locked(&self.state);
        let accounts = state.slots.iter().filter_map(|slot| {
            let standing = match slot.owner {
                Owner::Us => Standing::Ours,
                Owner::Vacated => Standing::Vacated,
                Owner::Others => return None,
            };
            Some((slot.account.clone()?, standing))
        });
        let namespaces = state.namespaces.iter().filter(|n| n.made);
        let recorded = Recorded {
            accounts: accounts.collect(),
            namespaces: namespaces.map(|n| n.name.to_string()).collect(),
        };
        drop(state);
        record.compact(&recorded)
    }

    /// The folder of a namespace, made if it is not there, with the access it is to have.
    fn namespace_to_write(&self, account: &ServiceAccount) -> Result<Arc<Dir>, Error> {
        let name = account.namespace();
        if locked(&self.root).dir.clone().is_deleted()? {
            self.refresh_root()?;
        }
        if let Some(namespace) = self.namespace_there(account)? {
            return Ok(namespace);
        }
        // Held from looking to making: of us, only whoever holds it makes or removes the folder.
        let mut record = locked(&self.record);
        for _ in 0..ATTEMPTS {
            if let Some(namespace) = self.namespace_there(account)? {
                return Ok(namespace);
            }
            record.add([Line::Namespace(name)])?;
            let root = locked(&self.root).dir.clone();
            match root.make_subdir(name, self.shape.folder) {
                Ok(()) => {
                    let dir = Arc::new(root.subdir(name)?);
                    let stat = dir.settle(self.shape.folder)?;
                    let mut state = locked(&self.state);
                    state.keep_open(name, dir.clone(), stat);
                    if let Some(namespace) = state.namespace_named(name) {
                        namespace.made = true;
                    }
                    return Ok(dir);
                }
                // It is somebody else's.
                Err(error) if error.is_taken() => record.add([Line::NamespaceRemoved(name)])?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::Foreign {
            account: account.clone(),
            why: format!("the folder of namespace {name} is removed again and again"),
        })
    }

    /// The folder of a namespace with the access it is to have, if there is one.
    fn namespace_there(&self, account: &ServiceAccount) -> Result<Option<Arc<Dir>>, Error> {
        match self.place(account.namespace())? {
            Place::Open(namespace, stat) => {
                if self.made_namespace(account.namespace()) && !self.shape.folder.is_of(&stat) {
                    namespace.settle(self.shape.folder)?;
                }
                Ok(Some(namespace))
            }
            Place::Foreign(why) => {
                self.seen(account, None, None, false);
                Err(Error::Foreign { account: account.clone(), why })
            }
            Place::Absent => Ok(None),
        }
    }

    /// The folder of a namespace as it is now. A handle that was kept is used only while the name still stands for it.
    fn place(&self, name: &str) -> Result<Place, Error> {
        let root = locked(&self.root).dir.clone();
        // Held from looking to noting, so that what is noted is never older than what another thread has noted.
        let mut state = locked(&self.state);
        let id = state.namespace(name) as usize;
        let Some(stat) = root.find(name)? else {
            state.lose(name);
            return Ok(Place::Absent);
        };
        let seen = state.namespaces[id].seen;
        let is_known = seen.is_some_and(|seen| seen.is_same_file(&stat));
        if seen.is_some() && !is_known {
            state.lose(name);
        }
        let namespace = &mut state.namespaces[id];
        namespace.seen = Some(stat);
        namespace.noticed.get_or_insert(stat);
        let made = namespace.made;
        if is_known && let Some(dir) = &namespace.dir {
            let dir = dir.clone();
            if !made
                && seen.is_some_and(|seen| seen.mode() != stat.mode())
                && let Some(why) = self.why_foreign_namespace(&root, name, &stat)
            {
                // So that the next look judges it again.
                state.close(name);
                return Ok(Place::Foreign(why));
            }
            return Ok(Place::Open(dir, stat));
        }
        let why = match stat.kind() {
            Kind::Folder if made => None,
            Kind::Folder => self.why_foreign_namespace(&root, name, &stat),
            kind => Some(format!("{} is {kind}", root.path().join(name).display())),
        };
        if let Some(why) = why {
            state.close(name);
            return Ok(Place::Foreign(why));
        }
        let opened = match root.subdir(name) {
            Err(error) if error.is_denied() && made => {
                root.reopen_to_us(name, self.shape.folder.mode).and_then(|()| root.subdir(name))
            }
            opened => opened,
        };
        let dir = match opened {
            Err(error) if error.is_absent() => {
                state.lose(name);
                return Ok(Place::Absent);
            }
            opened => Arc::new(opened?),
        };
        let stat = dir.stat_self()?;
        state.keep_open(name, dir.clone(), stat);
        Ok(Place::Open(dir, stat))
    }

    /// A folder that we did not make is used only if no other user can replace what we put there.
    fn why_foreign_namespace(&self, root: &Dir, name: &str, stat: &Stat) -> Option<String> {
        let path = root.path().join(name);
        let path = path.display();
        let ours = [Some(0), Some(dir::our_user()), self.shape.folder.owner];
        if !ours.contains(&Some(stat.owner())) {
            return Some(format!("{path} belongs to user {}", stat.owner()));
        }
        stat.writable_by()
            .map(|whom| format!("{path} may be written to by {whom} (mode {:04o})", stat.mode()))
    }

    /// Opens the secrets folder again if its path now leads to another folder, or to none; tells whether it did.
    fn refresh_root(&self) -> Result<bool, Error> {
        // The secrets folder may have gone with it, and would be made again where the next start finds no authority.
        locked(&self.record).check()?;
        let mut root = locked(&self.root);
        let now = match Dir::open_trusted(&self.path, None) {
            Ok(dir) => Some(dir.stat_self()?),
            Err(error) if error.is_absent() => None,
            Err(error) => return Err(error.into()),
        };
        let before = root.dir.stat_self()?;
        if now.is_some_and(|now| now.is_same_file(&before)) {
            return Ok(false);
        }
        *root = open_root(&self.path, &self.shape, &self.holder)?;
        let mut state = locked(&self.state);
        for namespace in &mut state.namespaces {
            namespace.dir = None;
            namespace.seen = None;
            // The folders there are others now, and so nobody's that we know of.
            namespace.made = false;
        }
        state.open_namespaces = 0;
        for slot in &mut state.slots {
            slot.flags.made = false;
        }
        state.root_is_new = true;
        self.wake.notify_one();
        Ok(true)
    }

    fn made_namespace(&self, name: &str) -> bool {
        let mut state = locked(&self.state);
        state.namespace_named(name).is_some_and(|n| n.made)
    }

    fn set_made(&self, account: &ServiceAccount, made: bool) {
        if let Some(slot) = locked(&self.state).slot_mut(account) {
            slot.flags.made = made;
        }
    }

    /// Notes what an account looked like, and that it is to be watched. Without an owner only for a known account.
    fn seen(&self, account: &ServiceAccount, owner: Option<Owner>, look: Option<Look>, untidy: bool) {
        let mut state = locked(&self.state);
        let id = match (state.index.get(account), owner) {
            (Some(id), _) => *id,
            (None, Some(owner)) => state.insert(account, owner),
            (None, None) => return,
        };
        let slot = &mut state.slots[id as usize];
        slot.look = look.unwrap_or(Look { stamp: 1, ..Look::default() });
        slot.flags.untidy = untidy;
        state.busy += 1;
        if !std::mem::replace(&mut state.slots[id as usize].flags.pending, true) {
            state.pending.push(id);
            if state.pending.len() == 1 {
                self.wake.notify_one();
            }
        }
    }

    fn forget(&self, account: &ServiceAccount) {
        locked(&self.state).remove(account);
    }

    fn lane(&self, account: &ServiceAccount) -> MutexGuard<'_, ()> {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hash = DefaultHasher::new();
        account.hash(&mut hash);
        locked(&self.lanes[hash.finish() as usize % LANES])
    }
}

impl Sink for FolderSink {
    fn recorded(&self) -> Vec<ServiceAccount> {
        let state = locked(&self.state);
        let ours = state.slots.iter().filter(|slot| slot.owner == Owner::Us);
        ours.filter_map(|slot| slot.account.clone()).collect()
    }

    async fn announce(&self, accounts: &[ServiceAccount]) -> Result<(), Error> {
        self.announce_now(accounts)
    }

    async fn read(&self, account: &ServiceAccount) -> Result<Found, Error> {
        self.read_now(account)
    }

    async fn publish(&self, account: &ServiceAccount, set: &CertificateSet) -> Result<(), Error> {
        self.publish_now(account, set)
    }

    async fn remove(&self, account: &ServiceAccount) -> Result<(), Error> {
        self.remove_now(account)
    }

    async fn disturbed(&self) -> Vec<ServiceAccount> {
        self.notice().await
    }
}

impl State {
    fn slot(&self, account: &ServiceAccount) -> Option<&Slot> {
        let id = *self.index.get(account)?;
        self.slots.get(id as usize)
    }

    fn slot_mut(&mut self, account: &ServiceAccount) -> Option<&mut Slot> {
        let id = *self.index.get(account)?;
        self.slots.get_mut(id as usize)
    }

    /// The slot of an account, a new one if it has none; the owner is that of a new one.
    fn insert(&mut self, account: &ServiceAccount, owner: Owner) -> u32 {
        if let Some(id) = self.index.get(account) {
            return *id;
        }
        let namespace = self.namespace(account.namespace());
        self.namespaces[namespace as usize].accounts += 1;
        self.unwatched += 1;
        let slot = Slot {
            account: Some(account.clone()),
            look: Look::default(),
            watches: [None, None],
            watched: [0; 2],
            namespace,
            owner,
            flags: Flags::default(),
        };
        let id = match self.free.pop() {
            Some(id) => {
                // It may still be in a list under its former account, which then costs one look too many.
                let flags = self.slots[id as usize].flags;
                self.slots[id as usize] = slot;
                self.slots[id as usize].flags.pending = flags.pending;
                self.slots[id as usize].flags.dirty = flags.dirty;
                id
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        self.index.insert(account.clone(), id);
        id
    }

    fn remove(&mut self, account: &ServiceAccount) {
        let Some(id) = self.index.remove(account) else {
            return;
        };
        let slot = &mut self.slots[id as usize];
        slot.account = None;
        slot.owner = Owner::Others;
        slot.look = Look::default();
        slot.watched = [0; 2];
        if !std::mem::take(&mut slot.flags.watched) {
            self.unwatched -= 1;
        }
        let namespace = slot.namespace;
        let watches = std::mem::take(&mut slot.watches);
        self.retired.extend(watches.into_iter().flatten());
        self.namespaces[namespace as usize].accounts -= 1;
        self.free.push(id);
    }

    /// The number of a namespace, a new one if it has none. Numbers are never given up: clusters have few namespaces.
    fn namespace(&mut self, name: &str) -> u32 {
        if let Some(id) = self.names.get(name) {
            return *id;
        }
        let id = self.namespaces.len() as u32;
        self.namespaces.push(Namespace {
            name: name.into(),
            dir: None,
            seen: None,
            made: false,
            accounts: 0,
            watch: None,
            noticed: None,
            replaced: false,
        });
        self.names.insert(name.into(), id);
        id
    }

    fn namespace_named(&mut self, name: &str) -> Option<&mut Namespace> {
        let id = *self.names.get(name)?;
        self.namespaces.get_mut(id as usize)
    }

    fn keep_open(&mut self, name: &str, dir: Arc<Dir>, stat: Stat) {
        if self.open_namespaces >= OPEN_NAMESPACES {
            for namespace in &mut self.namespaces {
                namespace.dir = None;
            }
            self.open_namespaces = 0;
        }
        let mut opened = false;
        if let Some(namespace) = self.namespace_named(name) {
            opened = namespace.dir.replace(dir).is_none();
            namespace.seen = Some(stat);
            namespace.noticed.get_or_insert(stat);
        }
        self.open_namespaces += usize::from(opened);
    }

    /// Its folder is gone: whoever makes it anew before we do keeps it.
    fn lose(&mut self, name: &str) {
        self.close(name);
        if let Some(namespace) = self.namespace_named(name) {
            namespace.made = false;
            namespace.seen = None;
        }
    }

    fn close(&mut self, name: &str) {
        let closed = self.namespace_named(name).is_some_and(|namespace| namespace.dir.take().is_some());
        self.open_namespaces -= usize::from(closed);
    }
}

/// A panic elsewhere does not make these structures wrong: each change to them is one statement.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn folder_name(account: &ServiceAccount) -> String {
    format!("istio.{}", account.name())
}

/// Kubernetes allows names that no file system takes once `istio.` is before them.
fn check_name(account: &ServiceAccount) -> Result<(), Error> {
    if account.name().len() > 255 - "istio.".len() {
        return Err(Error::LongName { account: account.clone() });
    }
    Ok(())
}

fn why_foreign(namespace: &Dir, name: &str, kind: Kind) -> String {
    let path = namespace.path().join(name);
    format!("{} is {kind} that mica did not make", path.display())
}

/// Whoever may read the files may pass through their folder.
fn folder_mode(file: u32) -> u32 {
    0o700 | file & 0o044 | (file & 0o044) >> 2
}

fn open_root(path: &Path, shape: &Shape, holder: &str) -> Result<Root, Error> {
    let access = root_access(shape);
    let is_new = matches!(Dir::open_trusted(path, None), Err(error) if error.is_absent());
    let dir = Dir::open_trusted(path, Some(0o700))?;
    if is_new {
        dir.settle(access)?;
    }
    let lock = dir.lock(LOCK, holder)?;
    Ok(Root { dir: Arc::new(dir), _lock: lock })
}

/// The secrets folder stays ours; whoever delivered files belong to may pass through it.
fn root_access(shape: &Shape) -> Access {
    let others = shape.folder.owner != Some(dir::our_user());
    Access {
        mode: shape.folder.mode | if others { 0o011 } else { 0 },
        owner: None,
        group: shape.folder.group,
    }
}

/// A name whose folder is not there, because it was removed or never made, is not ours any more: the next one to make
/// that folder may be somebody else.
fn forget_absent(root: &Dir, recorded: &mut Recorded) -> Result<(), Error> {
    let mut accounts: Vec<_> = recorded.accounts.keys().collect();
    // One namespace after the other, so that one is open at a time.
    accounts.sort_unstable();
    let mut gone = Vec::new();
    for accounts in accounts.chunk_by(|one, other| one.namespace() == other.namespace()) {
        let namespace = match root.subdir(accounts[0].namespace()) {
            Ok(namespace) => namespace,
            Err(error) if error.is_absent() => {
                gone.extend(accounts.iter().copied().cloned());
                continue;
            }
            // Nothing can be said of what is in it.
            Err(dir::Error::NotFolder { .. }) => continue,
            Err(error) if error.is_denied() => continue,
            Err(error) => return Err(error.into()),
        };
        for account in accounts {
            if namespace.find(&folder_name(account))?.is_none() {
                gone.push((*account).clone());
            }
        }
    }
    for account in gone {
        recorded.accounts.remove(&account);
    }
    let mut absent = Vec::new();
    for name in &recorded.namespaces {
        if root.find(name)?.is_none() {
            absent.push(name.clone());
        }
    }
    for name in absent {
        recorded.namespaces.remove(&name);
    }
    Ok(())
}

/// Takes our files out of an account's folder, and the folder away; `false` if it stays for what others keep in it.
fn remove_folder(namespace: &Dir, folder: &Dir, name: &str) -> Result<bool, Error> {
    let kept = match volume::clear(folder, FILES)? {
        Cleared::Kept(names) => names,
        Cleared::Empty => match namespace.rmdir(name) {
            Ok(()) => return Ok(true),
            Err(error) if error.is_absent() => return Ok(true),
            Err(error) if error.is_occupied() => Vec::new(),
            Err(error) => return Err(error.into()),
        },
    };
    tracing::warn!(
        folder = %folder.path().display(),
        ?kept,
        "the folder of a removed account stays because it holds files that mica did not write"
    );
    Ok(false)
}
