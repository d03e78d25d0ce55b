//! The way to a folder: whom each part of it belongs to, and who may replace it.

use super::*;

/// The way from the root of the file system to a folder, one handle after the other.
pub(super) struct Walk {
    goal: PathBuf,
    /// What is still to be walked, the next one last.
    rest: Vec<OsString>,
    /// The folders that we are in, the root first.
    within: Vec<Dir>,
    links: usize,
    us: u32,
}

impl Walk {
    pub(super) fn new(path: &Path) -> Result<Self, Error> {
        let failed = |action, source: io::Error| Error::Io { action, path: path.to_owned(), source };
        let goal = std::path::absolute(path).map_err(|e| failed("make sense of", e))?;
        let root = fs::open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| failed("open the root folder on the way to", e.into()))?;
        let mut walk = Self {
            rest: Vec::new(),
            within: vec![Dir { fd: root, path: PathBuf::from("/") }],
            links: 0,
            us: our_user(),
            goal,
        };
        let goal = walk.goal.clone();
        walk.push(&goal);
        Ok(walk)
    }

    pub(super) fn run(mut self, create: Option<u32>) -> Result<Dir, Error> {
        self.judge_ancestor()?;
        while let Some(name) = self.rest.pop() {
            if name == ".." {
                if self.within.len() > 1 {
                    self.within.pop();
                }
                continue;
            }
            let name = name.to_str().ok_or_else(|| Error::Name {
                name: name.to_string_lossy().into_owned(),
                folder: self.here().path.clone(),
            })?;
            self.enter(name, create)?;
        }
        self.judge_goal()?;
        // On the way a handle to pass through is enough; this one can be listed and synced.
        let here = self.here();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match fs::openat(&here.fd, ".", flags, Mode::empty()) {
            Ok(fd) => Ok(Dir { fd, path: here.path.clone() }),
            Err(error) => Err(here.failed_self("open", error)),
        }
    }

    pub(super) fn enter(&mut self, name: &str, create: Option<u32>) -> Result<(), Error> {
        let stat = match (self.here().find(name)?, create) {
            (Some(stat), _) => stat,
            (None, Some(mode)) => {
                match self.here().create_subdir(name, Access::mode(mode)) {
                    Ok(_) => {}
                    // Another process was quicker, which is as good.
                    Err(error) if error.is_taken() => {}
                    Err(error) => return Err(error),
                }
                self.here().stat(name)?
            }
            (None, None) => return Err(self.here().failed("open", name, Errno::NOENT)),
        };
        if stat.kind() != Kind::Link {
            let folder = self.here().subdir_to_look(name)?;
            self.within.push(folder);
            return if self.rest.is_empty() { Ok(()) } else { self.judge_ancestor() };
        }
        if stat.owner() != 0 && stat.owner() != self.us {
            return Err(self.untrusted(
                format!(
                    "the link {} on its way belongs to user {}, who could point it elsewhere",
                    self.here().path.join(name).display(),
                    stat.owner()
                ),
                "give the path without that link".to_owned(),
            ));
        }
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(self.here().failed("open", name, Errno::LOOP));
        }
        let target = PathBuf::from(self.here().read_link(name)?);
        if target.is_absolute() {
            self.within.truncate(1);
        }
        self.push(&target);
        Ok(())
    }

    /// Nobody else may rename or remove what stands in a folder above.
    pub(super) fn judge_ancestor(&self) -> Result<(), Error> {
        let stat = self.here().stat_self()?;
        let path = self.here().path();
        if stat.owner() != 0 && stat.owner() != self.us {
            return Err(self.untrusted(
                format!(
                    "{} above it belongs to user {} (mode {:04o}), who could replace it",
                    path.display(),
                    stat.owner(),
                    stat.mode()
                ),
                format!("choose a folder elsewhere, or run: chown {} {}", self.us, quoted(path)),
            ));
        }
        let sticky = stat.mode() & 0o1000 != 0;
        if !sticky && let Some(whom) = stat.writable_by() {
            return Err(self.untrusted(
                format!(
                    "{} above it may be written to by {whom} (mode {:04o}, owner {}, group {})",
                    path.display(),
                    stat.mode(),
                    stat.owner(),
                    stat.group()
                ),
                format!("choose a folder elsewhere, or run: chmod go-w {}", quoted(path)),
            ));
        }
        Ok(())
    }

    /// The folder itself is ours alone to change.
    pub(super) fn judge_goal(&self) -> Result<(), Error> {
        let stat = self.here().stat_self()?;
        let path = self.here().path();
        if stat.owner() != self.us {
            return Err(self.untrusted(
                format!(
                    "it belongs to user {} (mode {:04o}), and Mica runs as user {}",
                    stat.owner(),
                    stat.mode(),
                    self.us
                ),
                format!("choose another folder, or run: chown {} {}", self.us, quoted(path)),
            ));
        }
        if let Some(whom) = stat.writable_by() {
            return Err(self.untrusted(
                format!(
                    "it may be written to by {whom} (mode {:04o}, owner {}, group {})",
                    stat.mode(),
                    stat.owner(),
                    stat.group()
                ),
                format!("run: chmod go-w {}", quoted(path)),
            ));
        }
        Ok(())
    }

    pub(super) fn push(&mut self, path: &Path) {
        for part in path.components().rev() {
            match part {
                Component::Normal(name) => self.rest.push(name.to_owned()),
                Component::ParentDir => self.rest.push("..".into()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
    }

    pub(super) fn here(&self) -> &Dir {
        // The root is never taken off.
        &self.within[self.within.len() - 1]
    }

    pub(super) fn untrusted(&self, why: String, advice: String) -> Error {
        Error::Untrusted { path: self.goal.clone(), why, advice }
    }
}

/// Many systems give each user a group of their own and new folders to that group with write permission: nobody else
/// is in it, so nobody else may write.
pub(super) fn has_private_group(stat: &Stat) -> bool {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    is_private_group(&read("/etc/passwd"), &read("/etc/group"), stat.owner(), stat.group())
}

pub(super) fn is_private_group(users: &str, groups: &str, owner: u32, group: u32) -> bool {
    pub(super) fn fields(text: &str) -> impl Iterator<Item = Vec<&str>> {
        text.lines().map(|line| line.split(':').collect())
    }
    let number = |field: Option<&&str>| field.and_then(|text| text.parse::<u32>().ok());
    let Some(name) =
        fields(users).find(|user| number(user.get(2)) == Some(owner)).and_then(|user| user.first().copied())
    else {
        return false;
    };
    let only_theirs = fields(users)
        .filter(|user| number(user.get(3)) == Some(group))
        .all(|user| user.first() == Some(&name));
    let mut entries = fields(groups).filter(|entry| number(entry.get(2)) == Some(group)).peekable();
    // A group that is not described here may have members that are not either.
    entries.peek().is_some()
        && only_theirs
        && entries.all(|entry| {
            entry.get(3).is_none_or(|members| members.split(',').all(|m| m.is_empty() || m == name))
        })
}
