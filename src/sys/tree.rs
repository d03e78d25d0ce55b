//! Reading a tree of files that others write: entries, contents, and whether either has changed.
//!
//! Nothing but regular files is ever opened for reading, so that neither a FIFO nor a device can hold Mica up.

use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, SeekFrom, Stat};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

/// How many links one path may lead through, as in the kernel.
const MAX_LINKS: usize = 40;

/// Room for some hundred entries at a time.
const LISTING: usize = 16 * 1024;

/// What a name leads to, told from everything else that exists at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    device: u64,
    inode: u64,
}

/// A digest of what the system says of a file when it has not been changed. Two are equal only if both are sure.
#[derive(Clone, Copy, Debug)]
pub struct Stamp(u64);

impl Stamp {
    /// Equal to nothing.
    pub const UNSURE: Self = Self(0);
}

impl PartialEq for Stamp {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0 && self.0 != 0
    }
}

/// What is at a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A FIFO, a socket or a device.
    Other,
}

/// What the system says of a name.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// What it is.
    pub kind: Kind,
    /// Which it is.
    pub identity: Identity,
    /// Changes with it.
    pub stamp: Stamp,
}

/// What is at a path, links followed.
pub fn look(path: &Path) -> io::Result<Facts> {
    Ok(facts(&rustix::fs::stat(path)?))
}

/// A path from the root of the file system that leads to the same, whatever becomes of the working directory.
pub fn absolute(path: &Path) -> io::Result<PathBuf> {
    std::path::absolute(path)
}

/// An open directory.
#[derive(Debug)]
pub struct Directory {
    descriptor: OwnedFd,
    /// As it was when it was opened.
    pub facts: Facts,
}

impl Directory {
    /// Opens a directory for reading, links followed.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open(path, flags, Mode::empty())?;
        let facts = facts(&rustix::fs::fstat(&descriptor)?);
        Ok(Self { descriptor, facts })
    }

    /// A path that leads to this very directory for as long as it is open, whatever is moved meanwhile.
    pub fn handle(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.descriptor.as_raw_fd()).into()
    }

    /// Where it is now, without links.
    pub fn real_path(&self) -> io::Result<PathBuf> {
        let path = rustix::fs::readlink(self.handle(), Vec::new())?;
        Ok(OsString::from_vec(path.into_bytes()).into())
    }

    /// The entries that are wanted.
    pub fn entries(&self, wanted: impl Fn(&OsStr, Kind) -> bool) -> io::Result<Vec<(Box<OsStr>, Kind)>> {
        let mut entries = Vec::new();
        // Rewound, for it may have been listed before.
        rustix::fs::seek(&self.descriptor, SeekFrom::Start(0))?;
        let mut buffer = Vec::with_capacity(LISTING);
        let mut listing = RawDir::new(&self.descriptor, buffer.spare_capacity_mut());
        while let Some(entry) = listing.next() {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if matches!(name.as_bytes(), b"." | b"..") {
                continue;
            }
            let kind = match entry.file_type() {
                // Not every file system says.
                FileType::Unknown => match self.look(name) {
                    Ok(facts) => facts.kind,
                    Err(_) => continue,
                },
                known => kind(known),
            };
            if wanted(name, kind) {
                entries.push((name.into(), kind));
            }
        }
        Ok(entries)
    }

    /// What an entry is, links not followed.
    pub fn look(&self, name: &OsStr) -> io::Result<Facts> {
        Ok(facts(&rustix::fs::statat(&self.descriptor, name, AtFlags::SYMLINK_NOFOLLOW)?))
    }

    /// What an entry leads to.
    pub fn look_through(&self, name: &OsStr) -> io::Result<Facts> {
        Ok(facts(&rustix::fs::statat(&self.descriptor, name, AtFlags::empty())?))
    }

    /// Reads a regular file of at most so many bytes into a buffer. The caller has looked that it is one; what took
    /// its place since is opened in a way that neither waits nor follows, and refused.
    pub fn read(&self, name: &OsStr, limit: u64, buffer: &mut Vec<u8>) -> io::Result<Facts> {
        self.read_with(name, OFlags::NOFOLLOW, limit, buffer)
    }

    /// As [`Directory::read`] through a link.
    pub fn read_through(&self, name: &OsStr, limit: u64, buffer: &mut Vec<u8>) -> io::Result<Facts> {
        self.read_with(name, OFlags::empty(), limit, buffer)
    }

    fn read_with(&self, name: &OsStr, how: OFlags, limit: u64, buffer: &mut Vec<u8>) -> io::Result<Facts> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | how;
        let descriptor = rustix::fs::openat(&self.descriptor, name, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&descriptor)?;
        let facts = facts(&stat);
        if facts.kind != Kind::File {
            return Err(io::Error::other("it is no regular file"));
        }
        let too_large = |size: u64| {
            let message = format!("its {size} bytes are more than the {limit} that a manifest may have");
            Err(io::Error::new(io::ErrorKind::FileTooLarge, message))
        };
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size > limit {
            return too_large(size);
        }
        buffer.clear();
        buffer.reserve(usize::try_from(size).unwrap_or(0) + 1);
        std::fs::File::from(descriptor).take(limit + 1).read_to_end(buffer)?;
        match buffer.len() as u64 {
            size if size > limit => too_large(size),
            _ => Ok(facts),
        }
    }
}

/// How a link is followed.
#[derive(Debug)]
pub struct Route {
    /// The names that were looked up on the way, each with the real path of its directory. If one of these changes,
    /// so may the end.
    pub steps: Vec<(PathBuf, OsString)>,
    /// The real path that it ends at, whether or not anything is there.
    pub end: PathBuf,
}

/// Follows the link of that name in a directory given by its real path.
pub fn follow(directory: &Path, name: &OsStr) -> io::Result<Route> {
    let mut route = Route { steps: Vec::new(), end: directory.to_owned() };
    // What is still to be walked, last component first.
    let mut ahead: Vec<OsString> = vec![name.to_owned()];
    let mut links = 0;
    while let Some(name) = ahead.pop() {
        if name == ".." {
            // A real path has no links, so its parent is where ".." leads.
            route.end.pop();
            continue;
        }
        let next = route.end.join(&name);
        route.steps.push((route.end.clone(), name));
        let target = match rustix::fs::readlinkat(CWD, &next, Vec::new()) {
            Ok(target) => target,
            Err(_no_link) => {
                route.end = next;
                continue;
            }
        };
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
        if target.is_absolute() {
            route.end = PathBuf::from("/");
        }
        let parts =
            target.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
        ahead.extend(parts.rev().map(|part| part.as_os_str().to_owned()));
    }
    Ok(route)
}

fn facts(stat: &Stat) -> Facts {
    Facts {
        kind: kind(FileType::from_raw_mode(stat.st_mode)),
        identity: Identity { device: stat.st_dev, inode: stat.st_ino },
        stamp: stamp(stat),
    }
}

fn kind(file_type: FileType) -> Kind {
    match file_type {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Link,
        _ => Kind::Other,
    }
}

/// Times in file systems move in steps, so a file that was changed just now may change again and keep its times.
fn stamp(stat: &Stat) -> Stamp {
    const STEP_SECONDS: i64 = 2;
    let now = clock_gettime(ClockId::Realtime);
    if stat.st_ctime.saturating_add(STEP_SECONDS) > now.tv_sec {
        return Stamp::UNSURE;
    }
    let mut hasher = DefaultHasher::new();
    (stat.st_dev, stat.st_ino, stat.st_mode, stat.st_size).hash(&mut hasher);
    (stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec).hash(&mut hasher);
    Stamp(hasher.finish().max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_is_followed_as_the_kernel_does_and_every_step_is_told() {
        let root = tempfile::tempdir().unwrap();
        let at = root.path().canonicalize().unwrap();
        fs::create_dir_all(at.join("mount/..v1/deep")).unwrap();
        fs::write(at.join("mount/..v1/a.yaml"), "").unwrap();
        symlink("..v1", at.join("mount/..data")).unwrap();
        symlink("..data/a.yaml", at.join("mount/a.yaml")).unwrap();
        symlink("..data/deep/../a.yaml", at.join("mount/up.yaml")).unwrap();
        symlink(at.join("mount/./a.yaml"), at.join("far.yaml")).unwrap();
        symlink("mount/..data/none/x", at.join("none.yaml")).unwrap();

        let route = follow(&at.join("mount"), "a.yaml".as_ref()).unwrap();
        assert_eq!(route.end, at.join("mount/..v1/a.yaml"));
        let steps: Vec<_> = route
            .steps
            .iter()
            .map(|(directory, name)| directory.strip_prefix(&at).unwrap().join(name))
            .collect();
        let expected = ["mount/a.yaml", "mount/..data", "mount/..v1", "mount/..v1/a.yaml"];
        assert_eq!(steps, expected.map(PathBuf::from));

        for (name, end) in [
            ("mount/up.yaml", "mount/..v1/a.yaml"),
            ("far.yaml", "mount/..v1/a.yaml"),
            ("none.yaml", "mount/..v1/none/x"),
        ] {
            let path = at.join(name);
            let route = follow(path.parent().unwrap(), path.file_name().unwrap()).unwrap();
            assert_eq!(route.end, at.join(end), "{name}");
            if let Ok(real) = path.canonicalize() {
                assert_eq!(route.end, real);
            }
        }
        symlink("b", at.join("a")).unwrap();
        symlink("a", at.join("b")).unwrap();
        assert!(follow(&at, "a".as_ref()).is_err());
    }

    #[test]
    fn only_regular_files_of_bounded_size_are_read() {
        let root = tempfile::tempdir().unwrap();
        let at = root.path();
        fs::write(at.join("file"), "12345").unwrap();
        symlink("file", at.join("link")).unwrap();
        rustix::fs::mknodat(CWD, at.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        fs::File::create(at.join("huge")).unwrap().set_len(1 << 40).unwrap();
        let directory = Directory::open(at).unwrap();
        let mut buffer = Vec::new();

        directory.read("file".as_ref(), 5, &mut buffer).unwrap();
        assert_eq!(buffer, b"12345");
        assert!(directory.read("file".as_ref(), 4, &mut buffer).is_err());
        assert!(directory.read("link".as_ref(), 5, &mut buffer).is_err());
        directory.read_through("link".as_ref(), 5, &mut buffer).unwrap();
        assert_eq!(buffer, b"12345");
        assert!(
            directory.read("fifo".as_ref(), 5, &mut buffer).unwrap_err().to_string().contains("no regular")
        );
        let error = directory.read("huge".as_ref(), 1 << 20, &mut buffer).unwrap_err();
        assert!(error.to_string().contains("1099511627776 bytes"), "{error}");
        assert!(buffer.capacity() < 1 << 20);

        let mut entries = directory.entries(|_, kind| kind != Kind::Other).unwrap();
        entries.sort();
        let names: Vec<_> = entries.iter().map(|(name, kind)| (name.to_str().unwrap(), *kind)).collect();
        assert_eq!(names, [("file", Kind::File), ("huge", Kind::File), ("link", Kind::Link)]);
    }

    #[test]
    fn a_stamp_is_sure_once_the_file_has_been_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let stamp = || look(&file).unwrap().stamp;
        assert_ne!(stamp(), stamp());
        std::thread::sleep(std::time::Duration::from_millis(3_100));
        let old = stamp();
        assert_eq!(old, stamp());
        fs::write(&file, "").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(3_100));
        assert_ne!(old, stamp());
    }
}
