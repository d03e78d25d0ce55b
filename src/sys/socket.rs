//! A Unix socket by its path: made whole, never in the place of what is not one's own, and removed at the end.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use super::dir::{self, Dir, Lock, our_user};
use super::reason;

/// A path that fits into a socket's address, with the zero that ends it.
const LONGEST: usize = 107;
/// As many callers may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Longer than an address of a socket.
    #[error(
        "the socket's path {path} has {length} bytes, and no socket can have more than {LONGEST}; choose a shorter one"
    )]
    Long {
        /// Which.
        path: PathBuf,
        /// So long.
        length: usize,
    },
    /// No name in a folder.
    #[error("{0} is no name for a socket; give the path of a file that is to be made")]
    Name(PathBuf),
    /// Something else of that name.
    #[error("{path} is {found}, and is not touched; choose another --socket, or remove it")]
    Occupied {
        /// Which.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// Somebody answers on it.
    #[error("a program answers on the socket {0} already; stop that one first, or choose another --socket")]
    Answered(PathBuf),
    /// Another agent has it.
    #[error("the socket {path} is held by {holder}; stop that one first, or choose another --socket")]
    Held {
        /// Which.
        path: PathBuf,
        /// Who holds it, as that process wrote it.
        holder: String,
    },
    /// The system refused.
    #[error("cannot {action} the socket {path}: {}", reason(.source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its folder.
    #[error(transparent)]
    Folder(#[from] dir::Error),
}

/// A socket that is there for as long as this is.
#[derive(Debug)]
pub struct Socket {
    folder: Dir,
    name: String,
    inode: (u64, u64),
    _lock: Lock,
    /// Who could put another socket in its place, and what would help.
    exposed: Option<String>,
}

impl Socket {
    /// Makes the socket, and its folder if need be, and listens. A socket that was left over is replaced if it belongs
    /// to this user and nobody answers on it. `holder` is for a process that comes second.
    pub fn bind(
        path: &Path,
        mode: u32,
        holder: &str,
    ) -> Result<(Self, std::os::unix::net::UnixListener), Error> {
        let length = path.as_os_str().len();
        if length > LONGEST {
            return Err(Error::Long { path: path.to_owned(), length });
        }
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Error::Name(path.to_owned()))?.to_owned();
        let (folder, exposed) = folder(path)?;
        let lock = folder.lock(&lock_name(&name), holder).map_err(|error| match error {
            dir::Error::Held { holder, .. } => Error::Held { path: path.to_owned(), holder },
            other => other.into(),
        })?;
        let failed =
            |action| move |errno: Errno| Error::Io { action, path: path.to_owned(), source: errno.into() };
        if clear(&folder, path, &name)? {
            tracing::info!(socket = %path.display(), "a socket was left over, and is replaced");
        }
        // Whole, with its mode and with somebody who listens, before it has the name by which it is found.
        let unfinished = format!(".{name}.new");
        clear(&folder, path, &unfinished)?;
        let at = SocketAddrUnix::new(folder.handle_path().join(&unfinished)).map_err(failed("name"))?;
        let socket = plain_socket().map_err(failed("make"))?;
        bind(&socket, &at).map_err(failed("make"))?;
        let whole = rustix::fs::chmodat(&folder, &unfinished, Mode::from_raw_mode(mode), AtFlags::empty())
            .and_then(|()| listen(&socket, BACKLOG))
            .map_err(failed("make"))
            .and_then(|()| Ok(folder.rename_new(&unfinished, &name)?));
        if whole.is_err() {
            // The first fault is the one to tell; the next start clears it.
            let _ = folder.unlink(&unfinished);
        }
        whole?;
        let stat =
            rustix::fs::statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("look at"))?;
        let inode = (stat.st_dev, stat.st_ino);
        Ok((Self { folder, name, inode, _lock: lock, exposed }, socket.into()))
    }

    /// Who else could put a socket of their own in its place, if anybody.
    pub fn exposed(&self) -> Option<&str> {
        self.exposed.as_deref()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let now = rustix::fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        // Whatever has taken its place is not ours.
        if now.is_ok_and(|now| (now.st_dev, now.st_ino) == self.inode) {
            let _ = self.folder.unlink(&self.name);
        }
        let _ = self.folder.unlink(&lock_name(&self.name));
    }
}

fn lock_name(name: &str) -> String {
    format!("{name}.lock")
}

/// The folder, made if need be. In a volume that the containers of a pod share, all of them may write.
fn folder(path: &Path) -> Result<(Dir, Option<String>), dir::Error> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (dir, untrusted) = Dir::open_given(folder, 0o755)?;
    Ok((dir, untrusted.map(|error| error.to_string())))
}

/// Removes a socket that was left over; tells whether there was one.
fn clear(folder: &Dir, path: &Path, name: &str) -> Result<bool, Error> {
    let failed = |errno: Errno| Error::Io { action: "look at", path: path.to_owned(), source: errno.into() };
    let stat = match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(false),
        Err(errno) => return Err(failed(errno)),
    };
    let occupied = |found: String| Error::Occupied { path: path.with_file_name(name), found };
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Socket if stat.st_uid == our_user() => None,
        FileType::Socket => Some(format!("a socket of user {}", stat.st_uid)),
        FileType::RegularFile => Some("a regular file".to_owned()),
        FileType::Directory => Some("a folder".to_owned()),
        FileType::Symlink => Some("a symbolic link".to_owned()),
        _ => Some("no socket".to_owned()),
    };
    if let Some(what) = what {
        return Err(occupied(what));
    }
    let at = SocketAddrUnix::new(folder.handle_path().join(name)).map_err(failed)?;
    match plain_socket().and_then(|socket| connect(&socket, &at)) {
        Err(Errno::CONNREFUSED) => {}
        // All its places are taken: somebody lives there.
        Ok(()) | Err(Errno::AGAIN) => return Err(Error::Answered(path.with_file_name(name))),
        // A socket of another type.
        Err(Errno::PROTOTYPE) => return Err(occupied("a socket of another kind".to_owned())),
        Err(errno) => {
            return Err(Error::Io { action: "try", path: path.to_owned(), source: errno.into() });
        }
    }
    folder.unlink(name)?;
    Ok(true)
}

fn plain_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn bound(path: &Path) -> Result<(Socket, UnixListener), Error> {
        Socket::bind(path, 0o666, "a test")
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn it_is_there_with_its_mode_and_goes_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/mica/agent.sock");
        for mode in [0o666, 0o600] {
            let (socket, listener) = Socket::bind(&path, mode, "a test").unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode);
            assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o7777, 0o755);
            assert_eq!(socket.exposed(), None);
            let _client = UnixStream::connect(&path).unwrap();
            drop(listener);
            drop(socket);
            assert_eq!(names(path.parent().unwrap()), Vec::<String>::new());
        }
    }

    #[test]
    fn a_leftover_of_ones_own_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        drop(UnixListener::bind(&path).unwrap());
        drop(UnixListener::bind(folder.path().join(".agent.sock.new")).unwrap());
        fs::write(folder.path().join("agent.sock.lock"), "killed").unwrap();
        let (_socket, _listener) = bound(&path).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        assert_eq!(names(folder.path()), ["agent.sock", "agent.sock.lock"]);
    }

    #[test]
    fn what_is_not_ones_own_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        let refused = |wanted: &str| {
            let before = fs::symlink_metadata(&path).unwrap();
            let error = bound(&path).unwrap_err().to_string();
            assert!(error.contains(wanted) && error.contains("agent.sock"), "{error}");
            let after = fs::symlink_metadata(&path).unwrap();
            assert_eq!((before.ino(), before.mtime_nsec()), (after.ino(), after.mtime_nsec()));
        };
        fs::write(&path, "precious").unwrap();
        refused("a regular file");
        fs::remove_file(&path).unwrap();

        fs::create_dir(&path).unwrap();
        refused("a folder");
        fs::remove_dir(&path).unwrap();

        let elsewhere = folder.path().join("elsewhere");
        drop(UnixListener::bind(&elsewhere).unwrap());
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        refused("a symbolic link");
        fs::remove_file(&path).unwrap();

        let _datagrams = UnixDatagram::bind(&path).unwrap();
        refused("another kind");
        fs::remove_file(&path).unwrap();

        let alive = UnixListener::bind(&path).unwrap();
        refused("answers on the socket");
        drop(alive);
        // Tests run as root in the places where they can give files away.
        if our_user() == 0 {
            std::os::unix::fs::chown(&path, Some(4711), None).unwrap();
            refused("of user 4711");
        }
    }

    #[test]
    fn a_second_agent_is_told_who_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        let (first, _listener) = bound(&path).unwrap();
        let error = bound(&path).unwrap_err().to_string();
        assert!(error.contains("is held by a test"), "{error}");
        // Somebody took it away and has made another: that one stays.
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(first);
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn paths_that_no_socket_can_have_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("a".repeat(LONGEST));
        assert!(bound(&long).unwrap_err().to_string().contains("shorter"));
        assert!(matches!(bound(Path::new("/")), Err(Error::Name(_))));
        // What a deep folder costs is not the address.
        let name = "b".repeat(60);
        let (_socket, _listener) = bound(&folder.path().join(name)).unwrap();
    }

    #[test]
    fn a_folder_that_others_may_write_to_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let shared = folder.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).unwrap();
        let (socket, _listener) = bound(&shared.join("agent.sock")).unwrap();
        assert!(socket.exposed().unwrap().contains("0777"), "{:?}", socket.exposed());
    }
}
