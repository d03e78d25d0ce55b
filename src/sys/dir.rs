//! Directories by handle. A path is walked once, by [`Dir::open_trusted`]; from there on every operation takes one
//! name, relative to an open directory, and follows no link, so that nothing planted on the way leads elsewhere.

mod trust;

use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::path::{Component, Path, PathBuf};

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags, RawDir, RenameFlags};
use rustix::io::Errno;
use rustix::process;

/// What half-written files and folders of [`Dir::replace`] and [`Dir::replace_dir`] are called until they are whole.
const TEMPORARY: &str = ".mica-tmp.";
/// As many links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// Why an operation on a directory failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system said no.
    #[error("cannot {action} {}: {}", path.display(), super::reason(.source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Names here are single path components.
    #[error("{name:?} is no name of a file in {}", folder.display())]
    Name {
        /// The refused name.
        name: String,
        /// Where it was to be.
        folder: PathBuf,
    },
    /// A link, folder, FIFO, socket or device where a file is expected.
    #[error("{} is {found}, not a regular file", path.display())]
    NotFile {
        /// Which.
        path: PathBuf,
        /// What it is.
        found: Kind,
    },
    /// A link or a file where a folder is expected.
    #[error("{} is {found}, not a folder", path.display())]
    NotFolder {
        /// Which.
        path: PathBuf,
        /// What it is.
        found: Kind,
    },
    /// More bytes than this file can sensibly have.
    #[error("{} has more than {limit} bytes", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// The most that is read.
        limit: usize,
    },
    /// Another process holds the lock.
    #[error("{} is held by {holder}; stop that one first, or use another folder", folder.display())]
    Held {
        /// The locked folder.
        folder: PathBuf,
        /// Who holds it, as that process wrote it.
        holder: String,
    },
    /// Another user could change or replace what is kept here.
    #[error("{} cannot be trusted: {why}; {advice}", path.display())]
    Untrusted {
        /// The folder that was to be used.
        path: PathBuf,
        /// What was found, with mode and owner.
        why: String,
        /// The way out.
        advice: String,
    },
}

impl Error {
    /// There is nothing of that name.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Something of that name is there already.
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
    }

    /// A folder that was to be removed holds something.
    pub fn is_occupied(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::DirectoryNotEmpty)
    }

    /// The permissions do not allow it.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied)
    }
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A FIFO, socket or device.
    Other,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::File => "a file",
            Self::Folder => "a folder",
            Self::Link => "a symbolic link",
            Self::Other => "a FIFO, socket or device",
        })
    }
}

impl From<FileType> for Kind {
    fn from(kind: FileType) -> Self {
        match kind {
            FileType::RegularFile => Self::File,
            FileType::Directory => Self::Folder,
            FileType::Symlink => Self::Link,
            _ => Self::Other,
        }
    }
}

/// What the system knows of a file. Hashed, it tells whether anything was changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stat {
    dev: u64,
    ino: u64,
    mode: u32,
    owner: u32,
    group: u32,
    size: u64,
    changed: (i64, u64),
}

impl Stat {
    /// What it is.
    pub fn kind(&self) -> Kind {
        FileType::from_raw_mode(self.mode).into()
    }

    /// The permission bits, set-id and sticky bits included.
    pub fn mode(&self) -> u32 {
        self.mode & 0o7777
    }

    /// The user it belongs to.
    pub fn owner(&self) -> u32 {
        self.owner
    }

    /// The group it belongs to.
    pub fn group(&self) -> u32 {
        self.group
    }

    /// The number of the file on its file system.
    pub fn inode(&self) -> u64 {
        self.ino
    }

    /// Which users besides the owner may write, if any.
    pub fn writable_by(&self) -> Option<&'static str> {
        if self.mode() & 0o002 != 0 {
            Some("every user")
        } else if self.mode() & 0o020 != 0 && !trust::has_private_group(self) {
            Some("its group")
        } else {
            None
        }
    }

    /// Whether both are the same file, whatever happened to it in between.
    pub fn is_same_file(&self, other: &Self) -> bool {
        (self.dev, self.ino) == (other.dev, other.ino)
    }
}

impl From<fs::Stat> for Stat {
    // The widths of these fields differ between architectures.
    #[allow(clippy::unnecessary_cast)]
    fn from(stat: fs::Stat) -> Self {
        Self {
            dev: stat.st_dev as u64,
            ino: stat.st_ino as u64,
            mode: stat.st_mode as u32,
            owner: stat.st_uid as u32,
            group: stat.st_gid as u32,
            size: stat.st_size as u64,
            changed: (stat.st_ctime as i64, stat.st_ctime_nsec as u64),
        }
    }
}

/// Who may do what with a file or folder. Set exactly, whatever the umask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Permission bits.
    pub mode: u32,
    /// The user it belongs to; whoever makes it if none.
    pub owner: Option<u32>,
    /// The group it belongs to; as the system chooses if none.
    pub group: Option<u32>,
}

impl Access {
    /// Of whoever makes it.
    pub const fn mode(mode: u32) -> Self {
        Self { mode, owner: None, group: None }
    }

    /// Whether this is what a file has.
    pub fn is_of(&self, stat: &Stat) -> bool {
        stat.mode() == self.mode && self.owns(stat)
    }

    fn owns(&self, stat: &Stat) -> bool {
        self.owner.is_none_or(|owner| owner == stat.owner)
            && self.group.is_none_or(|group| group == stat.group)
    }

    fn creation_mode(self) -> Mode {
        // Group and others come in once the owner and the group are the right ones.
        let mode = if self.owner.is_none() && self.group.is_none() { self.mode } else { self.mode & 0o700 };
        Mode::from_raw_mode(mode)
    }
}

/// One name in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: OsString,
    /// What it stands for.
    pub kind: Kind,
}

/// An open directory. The path is for messages alone: nothing is ever opened by it again.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Holds a folder against other processes until it is dropped, or its process ends in whatever way.
#[derive(Debug)]
pub struct Lock {
    _fd: OwnedFd,
}

/// The user that files we make belong to.
pub fn our_user() -> u32 {
    process::geteuid().as_raw()
}

/// The group that files we make belong to, unless a folder imposes another.
pub fn our_group() -> u32 {
    process::getegid().as_raw()
}

/// Opening.
impl Dir {
    /// Opens a folder that no other user can change or replace, making it (with this mode) if asked to. Links on the
    /// way are followed when they belong to root or to us and stand in folders that pass the same test.
    pub fn open_trusted(path: &Path, create: Option<u32>) -> Result<Self, Error> {
        trust::Walk::new(path)?.run(create)
    }

    /// Opens a folder, making it (with this mode) if it is missing, and tells why it would not be trusted, if so: the
    /// volumes of a pod belong to the kubelet and may be written to by all of its containers that mount them for it.
    pub fn open_given(path: &Path, create: u32) -> Result<(Self, Option<Error>), Error> {
        let untrusted = match Self::open_trusted(path, Some(create)) {
            Err(error @ Error::Untrusted { .. }) => error,
            opened => return opened.map(|dir| (dir, None)),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match fs::open(path, flags, Mode::empty()) {
            Ok(fd) => Ok((Self { fd, path: path.to_owned() }, Some(untrusted))),
            Err(error) => Err(Error::Io { action: "open", path: path.to_owned(), source: error.into() }),
        }
    }

    /// Opens a folder in this one.
    pub fn subdir(&self, name: &str) -> Result<Self, Error> {
        self.open_folder(name, OFlags::RDONLY)
    }

    /// Opens a folder in this one only to look at what is in it by name: needs no permission to list it.
    pub fn subdir_to_look(&self, name: &str) -> Result<Self, Error> {
        self.open_folder(name, OFlags::PATH)
    }

    /// Makes a folder that does not exist yet, as [`Dir::make_subdir`], with exactly this access.
    pub fn create_subdir(&self, name: &str, access: Access) -> Result<Self, Error> {
        self.make_subdir(name, access)?;
        let folder = self.subdir(name)?;
        folder.settle(access)?;
        Ok(folder)
    }

    /// Another handle to this folder.
    pub fn try_clone(&self) -> Result<Self, Error> {
        match self.fd.try_clone() {
            Ok(fd) => Ok(Self { fd, path: self.path.clone() }),
            Err(source) => Err(Error::Io { action: "open again", path: self.path.clone(), source }),
        }
    }

    fn open_folder(&self, name: &str, how: OFlags) -> Result<Self, Error> {
        component(self, name)?;
        let flags = how | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { fd, path: self.path.join(name) }),
            Err(error @ (Errno::NOTDIR | Errno::LOOP)) => match self.stat(name)? {
                // Swapped while we looked.
                stat if stat.kind() == Kind::Folder => Err(self.failed("open", name, error)),
                stat => Err(Error::NotFolder { path: self.path.join(name), found: stat.kind() }),
            },
            Err(error) => Err(self.failed("open", name, error)),
        }
    }
}

/// Looking.
impl Dir {
    /// The path, links resolved, as it was when the folder was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path to this very folder, wherever it has been moved to, valid while it is open.
    pub fn handle_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }

    /// What the system knows of this folder.
    pub fn stat_self(&self) -> Result<Stat, Error> {
        match fs::fstat(&self.fd) {
            Ok(stat) => Ok(stat.into()),
            Err(error) => Err(self.failed_self("look at", error)),
        }
    }

    /// Whether the path still leads to this folder: it was not deleted or moved, and nothing was mounted over it.
    pub fn is_in_its_place(&self) -> bool {
        let found = fs::stat(&self.path).map(Stat::from);
        matches!((found, self.stat_self()), (Ok(found), Ok(own)) if found.is_same_file(&own))
    }

    /// Whether this folder has been deleted while it was open.
    pub fn is_deleted(&self) -> Result<bool, Error> {
        match fs::fstat(&self.fd) {
            Ok(stat) => Ok(stat.st_nlink == 0),
            Err(error) => Err(self.failed_self("look at", error)),
        }
    }

    /// What the system knows of a name; of a link itself, not of what it points to.
    pub fn stat(&self, name: &str) -> Result<Stat, Error> {
        component(self, name)?;
        match fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(stat.into()),
            Err(error) => Err(self.failed("look at", name, error)),
        }
    }

    /// As [`Dir::stat`], with `None` for a name that is not there.
    pub fn find(&self, name: &str) -> Result<Option<Stat>, Error> {
        match self.stat(name) {
            Ok(stat) => Ok(Some(stat)),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where a link points to. Fails on everything that is no link.
    pub fn read_link(&self, name: &str) -> Result<OsString, Error> {
        use std::os::unix::ffi::OsStringExt;
        component(self, name)?;
        match fs::readlinkat(&self.fd, name, Vec::with_capacity(64)) {
            Ok(target) => Ok(OsString::from_vec(target.into_bytes())),
            Err(error) => Err(self.failed("read the link", name, error)),
        }
    }

    /// The whole of a regular file of at most `limit` bytes, and what the system knew of it before it was read.
    pub fn read(&self, name: &str, limit: usize) -> Result<(Vec<u8>, Stat), Error> {
        component(self, name)?;
        // Without NONBLOCK a FIFO in the file's place would hold us until somebody writes to it.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            // A socket cannot be opened at all.
            Err(error @ (Errno::LOOP | Errno::NXIO)) => {
                let found = self.stat(name)?.kind();
                return Err(match found {
                    Kind::File => self.failed("open", name, error),
                    found => self.not_file(name, found),
                });
            }
            Err(error) => return Err(self.failed("open", name, error)),
        };
        let stat = match fs::fstat(&fd) {
            Ok(stat) => Stat::from(stat),
            Err(error) => return Err(self.failed("look at", name, error)),
        };
        if stat.kind() != Kind::File {
            return Err(self.not_file(name, stat.kind()));
        }
        let too_large = || Error::TooLarge { path: self.path.join(name), limit };
        if stat.size > limit as u64 {
            return Err(too_large());
        }
        let mut bytes = vec![0; stat.size as usize + 1];
        let mut filled = 0;
        loop {
            match rustix::io::read(&fd, &mut bytes[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(self.failed("read", name, error)),
            }
            if filled > limit {
                return Err(too_large());
            }
            if filled == bytes.len() {
                bytes.resize((filled * 2).min(limit + 1), 0);
            }
        }
        bytes.truncate(filled);
        Ok((bytes, stat))
    }

    /// All names in this folder, in no order, without `.` and `..`.
    pub fn names(&self) -> Result<Vec<Entry>, Error> {
        use std::os::unix::ffi::OsStrExt;
        let failed = |error| self.failed_self("list", error);
        fs::seek(&self.fd, fs::SeekFrom::Start(0)).map_err(failed)?;
        let mut buffer = [const { MaybeUninit::uninit() }; 4096];
        let mut listing = RawDir::new(&self.fd, &mut buffer);
        let mut entries = Vec::new();
        while let Some(entry) = listing.next() {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let kind = match entry.file_type() {
                // Some file systems do not say it in the listing.
                FileType::Unknown => {
                    match fs::statat(&self.fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
                        Ok(stat) => Stat::from(stat).kind(),
                        Err(Errno::NOENT) => continue,
                        Err(error) => return Err(failed(error)),
                    }
                }
                known => known.into(),
            };
            entries.push(Entry { name: std::ffi::OsStr::from_bytes(name).to_owned(), kind });
        }
        Ok(entries)
    }
}

/// Changing.
impl Dir {
    /// Writes a file that does not exist yet, without waiting for the disk.
    pub fn write_new(&self, name: &str, bytes: &[u8], access: Access) -> Result<Stat, Error> {
        let (_, stat) = self.write_file(name, bytes, access)?;
        Ok(stat)
    }

    /// As [`Dir::write_new`], and on the disk when it returns; the name itself is after [`Dir::sync`].
    pub fn write_new_synced(&self, name: &str, bytes: &[u8], access: Access) -> Result<Stat, Error> {
        let (fd, stat) = self.write_file(name, bytes, access)?;
        self.sync_file(&fd, name)?;
        Ok(stat)
    }

    /// Opens a file to add to its end, making it if it is not there.
    pub fn append_to(&self, name: &str, access: Access) -> Result<Log, Error> {
        component(self, name)?;
        self.step("open", name)?;
        let flags = OFlags::WRONLY
            | OFlags::APPEND
            | OFlags::CREATE
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK
            | OFlags::CLOEXEC;
        let fd = match fs::openat(&self.fd, name, flags, access.creation_mode()) {
            Ok(fd) => fd,
            Err(error) => return Err(self.failed("open", name, error)),
        };
        let stat = self.settle_fd(&fd, access, Some(name))?;
        if stat.kind() != Kind::File {
            return Err(self.not_file(name, stat.kind()));
        }
        Ok(Log { fd, path: self.path.join(name), length: stat.size })
    }

    /// Puts a file in the place of another, or of none: whoever looks, and whatever is killed or fails, finds the old
    /// one or the new one, whole. One writer at a time for one name.
    pub fn replace(&self, name: &str, bytes: &[u8], access: Access) -> Result<(), Error> {
        component(self, name)?;
        let temporary = format!("{TEMPORARY}{name}");
        if self.find(&temporary)?.is_some() {
            self.discard(&temporary)?;
        }
        let placed = self
            .write_new_synced(&temporary, bytes, access)
            .and_then(|_| self.rename(&temporary, self, name));
        if placed.is_err() {
            // The first fault is the one to tell; what stays behind is cleared by the next call.
            let _ = self.unlink(&temporary);
        }
        placed?;
        self.sync()
    }

    /// Puts a whole folder in the place of another, or of none. `build` fills it with files, which it syncs itself.
    pub fn replace_dir<E: From<Error>>(
        &self,
        name: &str,
        access: Access,
        build: impl FnOnce(&Dir) -> Result<(), E>,
    ) -> Result<(), E> {
        component(self, name)?;
        let temporary = format!("{TEMPORARY}{name}");
        if self.find(&temporary)?.is_some() {
            self.discard(&temporary)?;
        }
        let built = self.create_subdir(&temporary, access).map_err(E::from).and_then(|folder| {
            build(&folder)?;
            folder.sync()?;
            match self.find(name)? {
                None => self.rename_new(&temporary, name)?,
                Some(_) => self.exchange(&temporary, name)?,
            }
            self.sync()?;
            Ok(())
        });
        // The unfinished folder, or the one that was replaced.
        let cleared = match self.find(&temporary) {
            Ok(Some(_)) => self.discard(&temporary),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        built?;
        Ok(cleared?)
    }

    /// Removes what an interrupted [`Dir::replace`] or [`Dir::replace_dir`] left here. For start-up, under the lock.
    pub fn clear_leftovers(&self) -> Result<(), Error> {
        for entry in self.names()? {
            if let Some(name) = entry.name.to_str()
                && name.starts_with(TEMPORARY)
            {
                self.discard(name)?;
            }
        }
        Ok(())
    }

    /// Makes a folder that does not exist yet. The umask may take bits away: [`Dir::settle`] gives them back.
    pub fn make_subdir(&self, name: &str, access: Access) -> Result<(), Error> {
        component(self, name)?;
        self.step("make", name)?;
        fs::mkdirat(&self.fd, name, access.creation_mode()).map_err(|error| self.failed("make", name, error))
    }

    /// Gives this folder exactly this access, and tells what the system then knows of it.
    pub fn settle(&self, access: Access) -> Result<Stat, Error> {
        self.settle_fd(&self.fd, access, None)
    }

    /// Gives a folder that may not be opened a mode with which it may.
    pub fn reopen_to_us(&self, name: &str, mode: u32) -> Result<(), Error> {
        let folder = self.subdir_to_look(name)?;
        self.step("chmod", name)?;
        // The handle allows no fchmod, and fchmodat would follow a link planted at the name by now.
        fs::chmodat(fs::CWD, folder.handle_path(), Mode::from_raw_mode(mode), AtFlags::empty())
            .map_err(|error| self.failed("chmod", name, error))
    }

    /// Makes a link that does not exist yet. What it points to is not looked at.
    pub fn symlink(&self, target: &str, name: &str) -> Result<(), Error> {
        component(self, name)?;
        self.step("link", name)?;
        fs::symlinkat(target, &self.fd, name).map_err(|error| self.failed("link", name, error))
    }

    /// Gives a file or folder another name, here or in another folder, in place of what has that name.
    pub fn rename(&self, name: &str, to: &Dir, as_name: &str) -> Result<(), Error> {
        component(self, name)?;
        component(to, as_name)?;
        to.step("rename to", as_name)?;
        fs::renameat(&self.fd, name, &to.fd, as_name).map_err(|error| to.failed("rename to", as_name, error))
    }

    /// Renames within this folder, and fails if the new name is taken.
    pub fn rename_new(&self, name: &str, as_name: &str) -> Result<(), Error> {
        match self.rename_with(name, as_name, RenameFlags::NOREPLACE) {
            // A file system without it: folders then only ever replace empty folders, which loses nothing.
            Err(Error::Io { source, .. }) if source.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                if self.find(as_name)?.is_some() {
                    return Err(self.failed("rename to", as_name, Errno::EXIST));
                }
                self.rename(name, self, as_name)
            }
            result => result,
        }
    }

    /// Swaps two names of this folder in one step.
    pub fn exchange(&self, one: &str, other: &str) -> Result<(), Error> {
        self.rename_with(one, other, RenameFlags::EXCHANGE)
    }

    /// Removes a name that is no folder; a link itself, not what it points to.
    pub fn unlink(&self, name: &str) -> Result<(), Error> {
        component(self, name)?;
        self.step("remove", name)?;
        fs::unlinkat(&self.fd, name, AtFlags::empty()).map_err(|error| self.failed("remove", name, error))
    }

    /// Removes an empty folder.
    pub fn rmdir(&self, name: &str) -> Result<(), Error> {
        component(self, name)?;
        self.step("remove", name)?;
        fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR).map_err(|error| match error {
            // POSIX allows both.
            Errno::EXIST => self.failed("remove", name, Errno::NOTEMPTY),
            error => self.failed("remove", name, error),
        })
    }

    /// Waits until the names in this folder are on the disk.
    pub fn sync(&self) -> Result<(), Error> {
        self.step("sync", "")?;
        fs::fsync(&self.fd).map_err(|error| self.failed_self("sync", error))
    }

    /// Takes the lock of this folder, or tells who has it. `holder` is for the process that comes second.
    pub fn lock(&self, name: &str, holder: &str) -> Result<Lock, Error> {
        component(self, name)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        loop {
            let fd = fs::openat(&self.fd, name, flags, Mode::from_raw_mode(0o600))
                .map_err(|error| self.failed("open", name, error))?;
            let stat = fs::fstat(&fd).map(Stat::from).map_err(|error| self.failed("look at", name, error))?;
            if stat.kind() != Kind::File {
                return Err(self.not_file(name, stat.kind()));
            }
            match fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    return Err(Error::Held { folder: self.path.clone(), holder: holder_in(&fd) });
                }
                Err(error) => return Err(self.failed("lock", name, error)),
            }
            // Whoever removed the file in between would let a second one lock a new file of the same name.
            if !self.find(name)?.is_some_and(|now| now.is_same_file(&stat)) {
                continue;
            }
            // The lock is what counts: a full disk may keep the next one from learning who holds it.
            let _ = fs::ftruncate(&fd, 0).and_then(|()| rustix::io::write(&fd, holder.as_bytes()));
            return Ok(Lock { _fd: fd });
        }
    }

    /// Removes whatever has this name; of a folder its files too, one level deep.
    fn discard(&self, name: &str) -> Result<(), Error> {
        if self.stat(name)?.kind() != Kind::Folder {
            return self.unlink(name);
        }
        let folder = self.subdir(name)?;
        for entry in folder.names()? {
            match entry.name.to_str() {
                Some(inner) if entry.kind != Kind::Folder => folder.unlink(inner)?,
                _ => return Err(self.failed("remove", name, Errno::NOTEMPTY)),
            }
        }
        self.rmdir(name)
    }

    fn write_file(&self, name: &str, bytes: &[u8], access: Access) -> Result<(OwnedFd, Stat), Error> {
        component(self, name)?;
        self.step("make", name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match fs::openat(&self.fd, name, flags, access.creation_mode()) {
            Ok(fd) => fd,
            Err(error) => return Err(self.failed("make", name, error)),
        };
        let written = self
            .step("write", name)
            .and_then(|()| write_all(&fd, bytes).map_err(|e| self.failed("write", name, e)))
            .and_then(|()| self.settle_fd(&fd, access, Some(name)));
        match written {
            Ok(stat) => Ok((fd, stat)),
            Err(error) => {
                // Half a file helps nobody, least of all on a full disk.
                let _ = self.unlink(name);
                Err(error)
            }
        }
    }

    fn settle_fd(&self, fd: &OwnedFd, access: Access, name: Option<&str>) -> Result<Stat, Error> {
        let failed = |action, error| match name {
            Some(name) => self.failed(action, name, error),
            None => self.failed_self(action, error),
        };
        let look = || fs::fstat(fd).map(Stat::from);
        let mut stat = look().map_err(|error| failed("look at", error))?;
        if access.is_of(&stat) {
            return Ok(stat);
        }
        self.step("set the access of", name.unwrap_or_default())?;
        if !access.owns(&stat) {
            fs::fchown(fd, access.owner.map(fs::Uid::from_raw), access.group.map(fs::Gid::from_raw))
                .map_err(|error| failed("chown", error))?;
        }
        fs::fchmod(fd, Mode::from_raw_mode(access.mode)).map_err(|error| failed("chmod", error))?;
        stat = look().map_err(|error| failed("look at", error))?;
        Ok(stat)
    }

    fn sync_file(&self, fd: &OwnedFd, name: &str) -> Result<(), Error> {
        self.step("sync", name)?;
        fs::fsync(fd).map_err(|error| self.failed("sync", name, error))
    }

    fn rename_with(&self, name: &str, as_name: &str, how: RenameFlags) -> Result<(), Error> {
        component(self, name)?;
        component(self, as_name)?;
        self.step("rename to", as_name)?;
        fs::renameat_with(&self.fd, name, &self.fd, as_name, how)
            .map_err(|error| self.failed("rename to", as_name, error))
    }

    fn failed(&self, action: &'static str, name: &str, error: Errno) -> Error {
        Error::Io { action, path: self.path.join(name), source: error.into() }
    }

    fn failed_self(&self, action: &'static str, error: Errno) -> Error {
        Error::Io { action, path: self.path.clone(), source: error.into() }
    }

    fn not_file(&self, name: &str, found: Kind) -> Error {
        Error::NotFile { path: self.path.join(name), found }
    }

    /// Each change passes here, so that tests can end the world after any of them.
    #[cfg(not(test))]
    fn step(&self, _action: &'static str, _name: &str) -> Result<(), Error> {
        Ok(())
    }

    #[cfg(test)]
    fn step(&self, action: &'static str, name: &str) -> Result<(), Error> {
        fault::step().map_err(|error| self.failed(action, name, error))
    }
}

/// A file that only grows, or is cut back to what it was when a line did not fit on the disk.
#[derive(Debug)]
pub struct Log {
    fd: OwnedFd,
    path: PathBuf,
    length: u64,
}

impl Log {
    /// Adds all of `bytes` or, on an error, nothing.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        #[cfg(test)]
        fault::step().map_err(|error| self.failed("add to", error))?;
        match write_all(&self.fd, bytes) {
            Ok(()) => {
                self.length += bytes.len() as u64;
                Ok(())
            }
            Err(error) => {
                fs::ftruncate(&self.fd, self.length).map_err(|error| self.failed("shorten", error))?;
                Err(self.failed("add to", error))
            }
        }
    }

    /// Waits until all of it is on the disk.
    pub fn sync(&self) -> Result<(), Error> {
        fs::fdatasync(&self.fd).map_err(|error| self.failed("sync", error))
    }

    /// In bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    fn failed(&self, action: &'static str, error: Errno) -> Error {
        Error::Io { action, path: self.path.clone(), source: error.into() }
    }
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// One name, so that no operation can leave the folder it was asked in.
fn component(folder: &Dir, name: &str) -> Result<(), Error> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(Error::Name { name: name.to_owned(), folder: folder.path.clone() });
    }
    Ok(())
}

/// What the holder of a lock wrote about itself, fit for one line of an error.
fn holder_in(fd: &OwnedFd) -> String {
    let mut bytes = [0; 512];
    let count = rustix::io::pread(fd, &mut bytes, 0).unwrap_or(0);
    let text = String::from_utf8_lossy(&bytes[..count]);
    let text: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.as_str() {
        "" => "another process, which has not said who it is".to_owned(),
        _ => text,
    }
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@:,".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// Faults for tests: what a kill or a full disk does, at a chosen change.
#[cfg(test)]
pub(crate) mod fault {
    use std::cell::Cell;

    use rustix::io::Errno;

    #[derive(Clone, Copy)]
    enum Fault {
        None,
        /// After so many changes nothing happens any more.
        Killed(usize),
        /// After so many changes one fails for want of room.
        Full(usize),
    }

    thread_local! {
        static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
    }

    /// Runs `work` as a process that is killed after `count` changes; tells whether it got that far.
    pub(crate) fn killed_after<T>(count: usize, work: impl FnOnce() -> T) -> (T, bool) {
        FAULT.set(Fault::Killed(count));
        let result = work();
        let reached = matches!(FAULT.replace(Fault::None), Fault::Killed(0));
        (result, reached)
    }

    /// Runs `work` with one change after `count` others failing for want of room; tells whether it got that far.
    pub(crate) fn full_after<T>(count: usize, work: impl FnOnce() -> T) -> (T, bool) {
        FAULT.set(Fault::Full(count));
        let result = work();
        let reached = matches!(FAULT.replace(Fault::None), Fault::None);
        (result, reached)
    }

    pub(super) fn step() -> Result<(), Errno> {
        match FAULT.get() {
            Fault::None => Ok(()),
            Fault::Killed(0) => Err(Errno::CANCELED),
            Fault::Killed(left) => {
                FAULT.set(Fault::Killed(left - 1));
                Ok(())
            }
            Fault::Full(0) => {
                FAULT.set(Fault::None);
                Err(Errno::NOSPC)
            }
            Fault::Full(left) => {
                FAULT.set(Fault::Full(left - 1));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests;
