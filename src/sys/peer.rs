//! The process at the other end of a Unix socket.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{self, AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::{ClockId, clock_gettime};
use tokio::net::UnixStream;

/// A process as the kernel knew it when it connected. Its number is its own only as long as it lives, which its handle
/// tells.
#[derive(Clone, Debug)]
pub struct Process {
    /// In the agent's PID namespace; 0 if it is in none that the agent sees.
    pub pid: u32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// A pidfd.
    pub handle: Arc<OwnedFd>,
}

/// Why it is not known who is at the other end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It connected and ended.
    #[error("process {0} of the caller has ended")]
    Gone(u32),
    /// The number may have become another's between the connection and now.
    #[error(
        "process {0} may have begun after the connection was made, so it may not be the caller; it may connect again"
    )]
    Young(u32),
    /// The system refused.
    #[error("cannot {action} of process {pid}: {}", super::reason(.source))]
    Io {
        /// What was asked.
        action: &'static str,
        /// Of whom.
        pid: u32,
        /// Why not.
        source: io::Error,
    },
    /// What it runs has another name to itself than to the agent.
    #[error("process {pid} runs {}, which is not the file of that name that the agent sees", .path.display())]
    Elsewhere {
        /// Whose.
        pid: u32,
        /// What it calls it.
        path: PathBuf,
    },
    /// The agent cannot look at it.
    #[error("the caller is in a PID namespace that the agent does not see")]
    Unseen,
}

/// A moment since the machine started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        Self(Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0)))
    }

    /// Now, if nobody waits to be accepted: whoever is accepted next will have connected later.
    pub fn when_nobody_waits(listener: &impl AsFd) -> Option<Self> {
        let now = Self::now();
        is_silent(listener).then_some(now)
    }
}

impl Process {
    /// Whether the kernel hands over who connected (Linux 6.5), so that it does not matter when that was.
    pub fn is_handed_over() -> bool {
        std::os::unix::net::UnixStream::pair()
            .is_ok_and(|(one, _)| getsockopt(&one, sockopt::PeerPidfd).is_ok())
    }

    /// Who connected. `before` is a moment before the connection was made.
    pub fn at_other_end(socket: &UnixStream, before: Moment) -> Result<Self, Error> {
        let told = socket.peer_cred();
        let told = told.map_err(|source| Error::Io { action: "learn the credentials", pid: 0, source })?;
        let pid = told.pid().unwrap_or_default().unsigned_abs();
        let handle = match getsockopt(socket, sockopt::PeerPidfd) {
            Ok(handle) => handle,
            // Linux before 6.5.
            Err(nix::errno::Errno::ENOPROTOOPT) => opened(pid, before)?,
            Err(nix::errno::Errno::ESRCH | nix::errno::Errno::EINVAL | nix::errno::Errno::ENODATA) => {
                return Err(Error::Gone(pid));
            }
            Err(errno) => {
                let source = io::Error::from(errno);
                return Err(Error::Io { action: "get a handle", pid, source });
            }
        };
        let process = Self { pid, uid: told.uid(), gid: told.gid(), handle: Arc::new(handle) };
        match process.is_alive() {
            true => Ok(process),
            false => Err(Error::Gone(pid)),
        }
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        lives(&self.handle)
    }

    /// The file that it runs, by a name that leads the agent to that very file.
    pub fn executable(&self) -> Result<PathBuf, Error> {
        let failed = |source: Errno| self.failed("see what is run", source);
        let folder = self.folder()?;
        let path = fs::readlinkat(&folder, "exe", Vec::new()).map_err(failed)?;
        let path = PathBuf::from(OsString::from_vec(path.into_bytes()));
        // A process can have a file of its own under any name, in a mount namespace of its own.
        let here = fs::readlinkat(&folder, "ns/mnt", Vec::new()).map_err(failed)?;
        let ours = fs::readlink("/proc/self/ns/mnt", Vec::new()).map_err(failed)?;
        let path = if here == ours {
            without_deleted(path)
        } else {
            let run = fs::statat(&folder, "exe", AtFlags::empty()).map_err(failed)?;
            match fs::stat(&path) {
                Ok(seen) if (seen.st_dev, seen.st_ino) == (run.st_dev, run.st_ino) => path,
                _ => return Err(Error::Elsewhere { pid: self.pid, path }),
            }
        };
        self.still(path)
    }

    /// Its control groups, as the kernel lists them.
    pub fn control_groups(&self) -> Result<String, Error> {
        const LONGEST: usize = 64 * 1024;
        let failed = |source: Errno| self.failed("read the control groups", source);
        let folder = self.folder()?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = fs::openat(&folder, "cgroup", flags, Mode::empty()).map_err(failed)?;
        let mut text = Vec::new();
        let mut part = [0; 4096];
        loop {
            let count = rustix::io::read(&file, &mut part).map_err(failed)?;
            text.extend_from_slice(&part[..count]);
            if count == 0 {
                break;
            }
            if text.len() > LONGEST {
                return Err(failed(Errno::FBIG));
            }
        }
        self.still(String::from_utf8_lossy(&text).into_owned())
    }

    /// What stands in `/proc` for it. Only what is read before [`Self::still`] says so is of this process.
    fn folder(&self) -> Result<OwnedFd, Error> {
        if self.pid == 0 {
            return Err(Error::Unseen);
        }
        let mut path = "/proc/".to_owned();
        let _ = write!(path, "{}", self.pid);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        fs::open(&path, flags, Mode::empty()).map_err(|errno| self.failed("look into /proc", errno))
    }

    /// While it lives its number cannot be another's, so what was read by its number was read of it.
    fn still<T>(&self, read: T) -> Result<T, Error> {
        match self.is_alive() {
            true => Ok(read),
            false => Err(Error::Gone(self.pid)),
        }
    }

    fn failed(&self, action: &'static str, errno: Errno) -> Error {
        match errno {
            Errno::NOENT | Errno::SRCH => Error::Gone(self.pid),
            _ => Error::Io { action, pid: self.pid, source: errno.into() },
        }
    }
}

/// The control groups of this process, as the kernel lists them; empty if it does not.
pub fn own_control_groups() -> String {
    std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default()
}

/// A handle to whatever has that number now, if it had it before the connection was made: then it is the caller.
fn opened(pid: u32, before: Moment) -> Result<OwnedFd, Error> {
    let failed = |source: Errno| Error::Io { action: "get a handle", pid, source: source.into() };
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Error::Unseen)?;
    let handle = match pidfd_open(number, PidfdFlags::empty()) {
        Ok(handle) => handle,
        Err(Errno::SRCH) => return Err(Error::Gone(pid)),
        Err(errno) => return Err(failed(errno)),
    };
    let began = began(pid).ok_or(Error::Gone(pid))?;
    if !lives(&handle) {
        return Err(Error::Gone(pid));
    }
    // Both of them full ticks: the same tick could be after as well.
    if began >= ticks(before) { Err(Error::Young(pid)) } else { Ok(handle) }
}

/// When a process began, in ticks since the machine started (proc_pid_stat(5), the 22nd field).
fn began(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name is in brackets, and may be anything.
    let (_, rest) = text.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn ticks(moment: Moment) -> u64 {
    let in_a_second = rustix::param::clock_ticks_per_second().max(1);
    let ticks = moment.0.as_nanos() * u128::from(in_a_second) / 1_000_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

fn lives(handle: &OwnedFd) -> bool {
    is_silent(handle)
}

/// Nothing is to be read: nobody waits, nobody has ended.
fn is_silent(handle: &impl AsFd) -> bool {
    let mut events = [PollFd::new(handle, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut events, Some(&at_once)), Ok(0))
}

/// A file that was replaced since it was started keeps its name.
fn without_deleted(path: PathBuf) -> PathBuf {
    let bytes = path.as_os_str().as_bytes();
    match bytes.strip_suffix(b" (deleted)") {
        Some(name) => Path::new(std::ffi::OsStr::from_bytes(name)).to_owned(),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn of_child(child: &std::process::Child) -> Process {
        let pid = Pid::from_child(child);
        let handle = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        Process { pid: child.id(), uid: 0, gid: 0, handle: Arc::new(handle) }
    }

    #[tokio::test]
    async fn who_connected_is_known() {
        let (one, _other) = UnixStream::pair().unwrap();
        let us = Process::at_other_end(&one, Moment::now()).unwrap();
        assert_eq!(us.pid, std::process::id());
        assert_eq!(us.uid, rustix::process::geteuid().as_raw());
        assert_eq!(us.gid, rustix::process::getegid().as_raw());
        assert!(us.is_alive());
        assert_eq!(us.executable().unwrap(), std::env::current_exe().unwrap());
        assert_eq!(us.control_groups().unwrap(), std::fs::read_to_string("/proc/self/cgroup").unwrap());
    }

    #[test]
    fn a_process_that_ended_is_nobody() {
        let mut child = Command::new("sleep").arg("60").stdout(Stdio::null()).spawn().unwrap();
        let process = of_child(&child);
        assert!(process.is_alive());
        assert!(process.control_groups().is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
        assert!(matches!(process.control_groups(), Err(Error::Gone(_))));
        assert!(matches!(process.executable(), Err(Error::Gone(_))));
        // Its number may be another's by now: here it is our own.
        let reused = Process { pid: std::process::id(), ..process };
        assert!(matches!(reused.control_groups(), Err(Error::Gone(_))));
        assert!(matches!(reused.executable(), Err(Error::Gone(_))));
    }

    #[test]
    fn without_the_kernels_word_only_who_was_there_before_is_the_caller() {
        let us = std::process::id();
        let mut child = Command::new("sleep").arg("60").stdout(Stdio::null()).spawn().unwrap();
        let since = Moment(Duration::from_millis(began(child.id()).unwrap() * 10));
        assert!(matches!(opened(child.id(), since), Err(Error::Young(_))));
        let later = Moment(since.0 + Duration::from_millis(20));
        assert!(opened(child.id(), later).is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(opened(child.id(), later), Err(Error::Gone(_))));
        assert!(opened(us, Moment::now()).is_ok());
        assert!(matches!(opened(0, later), Err(Error::Unseen)));

        let folder = tempfile::tempdir().unwrap();
        let listener = std::os::unix::net::UnixListener::bind(folder.path().join("s")).unwrap();
        let before = Moment::now();
        assert!(Moment::when_nobody_waits(&listener).is_some_and(|moment| moment >= before));
        let _waiting = std::os::unix::net::UnixStream::connect(folder.path().join("s")).unwrap();
        assert_eq!(Moment::when_nobody_waits(&listener), None);
    }

    #[test]
    fn a_file_is_not_taken_for_one_of_the_same_name_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let (mine, theirs) = (folder.path().join("mine"), folder.path().join("theirs"));
        let sleep = "/bin/sleep";
        std::fs::copy(sleep, &mine).unwrap();
        std::fs::copy(sleep, &theirs).unwrap();
        let run = |script: &str| {
            let mut child = Command::new("unshare")
                .args(["--mount", "sh", "-c", script])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let deadline = std::time::Instant::now() + Duration::from_secs(20);
            let comm = format!("/proc/{}/comm", child.id());
            while std::fs::read_to_string(&comm).unwrap().trim() != "theirs" {
                assert!(std::time::Instant::now() < deadline, "{script} does not begin");
                std::thread::sleep(Duration::from_millis(5));
            }
            let found = of_child(&child).executable();
            child.kill().unwrap();
            child.wait().unwrap();
            found
        };
        let (from, to) = (mine.display(), theirs.display());
        // Its own mounts, and still the same file.
        assert_eq!(run(&format!("exec {to} 60")).unwrap(), theirs);
        let faked = run(&format!("mount --bind {from} {to} && exec {to} 60"));
        assert!(matches!(&faked, Err(Error::Elsewhere { path, .. }) if *path == theirs), "{faked:?}");
    }

    #[test]
    fn a_program_that_was_replaced_keeps_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        std::fs::copy("/bin/sleep", &path).unwrap();
        let mut child = Command::new(&path).arg("60").stdout(Stdio::null()).spawn().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(of_child(&child).executable().unwrap(), path);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
