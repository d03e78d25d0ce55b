//! Files that people name: read whole, up to a bound.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::dir::{self, Access, Dir};
use super::reason;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("cannot read {}: {}", .path.display(), reason(.source))]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Too long.
    #[error("{path} is longer than {limit} bytes, which nothing that mica reads here is")]
    TooLong {
        /// Which.
        path: PathBuf,
        /// The bound.
        limit: u64,
    },
    /// A first line with nothing in it.
    #[error("{path}: the passphrase is empty; it is the first line of the file")]
    EmptyPassphrase {
        /// Which.
        path: PathBuf,
    },
    /// Not a file.
    #[error("{path} is no regular file")]
    NoFile {
        /// Which.
        path: PathBuf,
    },
    /// More files than a delivered folder has.
    #[error("{path} holds more than {limit} files; name those that are meant")]
    TooMany {
        /// Which.
        path: PathBuf,
        /// The bound.
        limit: usize,
    },
    /// Something is there already.
    #[error("{path} is there already, and is not overwritten; choose another name, or {advice}")]
    Taken {
        /// Which.
        path: PathBuf,
        /// What else can be done.
        advice: &'static str,
    },
    /// A folder that was to be empty.
    #[error("{path} is not empty (it holds {found}), and nothing in it is touched; choose another folder")]
    Occupied {
        /// Which.
        path: PathBuf,
        /// One of the names in it.
        found: String,
    },
    /// The system refused to write.
    #[error("cannot write {}: {}", .path.display(), reason(.source))]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A folder could not be opened or written to.
    #[error(transparent)]
    Folder(#[from] dir::Error),
}

/// Reads a regular file. Links are followed, since the user named them; a FIFO is refused and not waited for. The
/// contents may be a key and are wiped.
pub fn read(path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, Error> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open(path)
        .map_err(failed)?;
    let facts = file.metadata().map_err(failed)?;
    if !facts.is_file() {
        return Err(Error::NoFile { path: path.to_owned() });
    }
    read_to(file, facts.len(), limit, path)
}

/// The first line of a file, which is what an editor or `echo` leaves in it.
pub fn read_passphrase(path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    let text = read_given(path, 4096)?;
    let line = text.split(|b| *b == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.is_empty() {
        return Err(Error::EmptyPassphrase { path: path.to_owned() });
    }
    Ok(Zeroizing::new(line.to_owned()))
}

/// Reads what a command was given: a file, a FIFO such as a shell's `<(…)`, or standard input for `-`.
pub fn read_given(path: &Path, limit: u64) -> Result<Zeroizing<Vec<u8>>, Error> {
    let failed = |source| Error::Io { path: path.to_owned(), source };
    if path == Path::new("-") {
        return read_to(std::io::stdin().lock(), 64 * 1024, limit, Path::new("standard input"));
    }
    let file = File::open(path).map_err(failed)?;
    let facts = file.metadata().map_err(failed)?;
    if facts.is_dir() {
        return Err(Error::NoFile { path: path.to_owned() });
    }
    read_to(file, facts.len(), limit, path)
}

/// Something that changes when the file that a path leads to is changed or replaced; none if there is none.
pub fn stamp(path: &Path) -> Option<u64> {
    let facts = std::fs::metadata(path).ok()?;
    let mut hash = DefaultHasher::new();
    (facts.dev(), facts.ino(), facts.len(), facts.mtime(), facts.mtime_nsec()).hash(&mut hash);
    Some(hash.finish())
}

/// Whether a path that a command was given is a folder.
pub fn is_folder(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|facts| facts.is_dir())
}

/// Reads all files of a folder but hidden ones, by name. Of a folder that is published through `..data` one whole set
/// is read, even while the next one is published.
pub fn read_folder(folder: &Path, limit: u64) -> Result<BTreeMap<String, Zeroizing<Vec<u8>>>, Error> {
    const FILES: usize = 64;
    let failed = |source| Error::Io { path: folder.to_owned(), source };
    let set = set_of(folder);
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(&set).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        let path = set.join(&name);
        if name.starts_with('.') || !std::fs::metadata(&path).is_ok_and(|facts| facts.is_file()) {
            continue;
        }
        if found.len() == FILES {
            return Err(Error::TooMany { path: folder.to_owned(), limit: FILES });
        }
        found.insert(name, read(&path, limit)?);
    }
    Ok(found)
}

/// Writes files to a folder of its own, which is made (0700) if it is missing and has to be empty. The last file
/// is begun when all others are on the disk, so that a set which a kill cut short lacks it or has it cut short.
pub fn write_set(folder: &Path, files: &[(&str, &[u8], u32)]) -> Result<(), Error> {
    let was_there = is_folder(folder);
    let dir = Dir::open_trusted(folder, Some(0o700))?;
    if let Some(entry) = dir.names()?.first() {
        let found = entry.name.to_string_lossy().into_owned();
        return Err(Error::Occupied { path: folder.to_owned(), found });
    }
    write_all(&dir, folder, files).inspect_err(|_| {
        if !was_there {
            // Fails if anything has come into it meanwhile, as it should.
            let _ = std::fs::remove_dir(folder);
        }
    })
}

/// Writes files to a folder that may hold others, but none of these names.
pub fn add_to(folder: &Path, files: &[(&str, &[u8], u32)]) -> Result<(), Error> {
    let was_there = is_folder(folder);
    let dir = Dir::open_trusted(folder, Some(0o700))?;
    write_all(&dir, folder, files).inspect_err(|_| {
        if !was_there {
            let _ = std::fs::remove_dir(folder);
        }
    })
}

/// Whether [`add_to`] would find a place for files of these names, to be known before there is something to write.
pub fn has_room(folder: &Path, names: &[&str]) -> Result<(), Error> {
    match names.iter().map(|name| folder.join(name)).find(|path| std::fs::symlink_metadata(path).is_ok()) {
        Some(path) => Err(Error::Taken { path, advice: "take it away first" }),
        None => Ok(()),
    }
}

fn write_all(dir: &Dir, folder: &Path, files: &[(&str, &[u8], u32)]) -> Result<(), Error> {
    for (name, _, _) in files {
        if dir.find(name)?.is_some() {
            return Err(Error::Taken { path: folder.join(name), advice: "take it away first" });
        }
    }
    let mut written = Vec::new();
    let mut write = || {
        for (name, bytes, mode) in files {
            dir.write_new_synced(name, bytes, Access::mode(*mode))?;
            written.push(*name);
        }
        dir.sync()
    };
    if let Err(fault) = write() {
        // What was written is no whole set, and would be in the way of the next try.
        for name in written {
            let _ = dir.unlink(name);
        }
        return Err(fault.into());
    }
    Ok(())
}

/// Writes one file that anyone may read: whole or not at all, in place of another only if `replace`.
pub fn write_public(path: &Path, bytes: &[u8], replace: bool) -> Result<(), Error> {
    write_file(path, bytes, replace, 0o666)
}

/// The same, of a file that nobody else may read.
pub fn write_private(path: &Path, bytes: &[u8], replace: bool) -> Result<(), Error> {
    write_file(path, bytes, replace, 0o600)
}

fn write_file(path: &Path, bytes: &[u8], replace: bool, mode: u32) -> Result<(), Error> {
    use std::io::Write as _;
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let taken = || Error::Taken { path: path.to_owned(), advice: "give --force to replace it" };
    match std::fs::symlink_metadata(path) {
        Ok(facts) if facts.is_dir() => {
            return Err(failed(std::io::ErrorKind::IsADirectory.into()));
        }
        Ok(_) if !replace => return Err(taken()),
        Ok(_) | Err(_) => {}
    }
    let name = path.file_name().ok_or_else(|| failed(std::io::ErrorKind::InvalidFilename.into()))?;
    let temporary = path.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let write = || {
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        if replace {
            std::fs::rename(&temporary, path)
        } else {
            // A rename would replace what came there meanwhile.
            std::fs::hard_link(&temporary, path)?;
            std::fs::remove_file(&temporary)
        }
    };
    write().map_err(|source| {
        let _ = std::fs::remove_file(&temporary);
        if source.kind() == std::io::ErrorKind::AlreadyExists { taken() } else { failed(source) }
    })
}

/// Makes a folder and those above it, as everyone would.
pub fn make_folder(path: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(path).map_err(|source| Error::Write { path: path.to_owned(), source })
}

fn read_to(
    file: impl std::io::Read,
    length: u64,
    limit: u64,
    path: &Path,
) -> Result<Zeroizing<Vec<u8>>, Error> {
    // One allocation of the right size, so that no copy of a key is left behind by a growing buffer.
    let mut bytes = Zeroizing::new(Vec::with_capacity(length.min(limit) as usize + 1));
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| Error::Io { path: path.to_owned(), source })?;
    if bytes.len() as u64 > limit {
        return Err(Error::TooLong { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

/// The folder itself, or what it is published through: once resolved, it stays one set.
fn set_of(folder: &Path) -> PathBuf {
    std::fs::canonicalize(folder.join("..data")).unwrap_or_else(|_| folder.to_owned())
}

/// Reads those of the named files of a folder that are there; of one that is published through `..data`, of one set.
pub fn read_named(
    folder: &Path,
    names: &[&str],
    limit: u64,
) -> Result<BTreeMap<String, Zeroizing<Vec<u8>>>, Error> {
    let failed = |source| Error::Io { path: folder.to_owned(), source };
    if !std::fs::metadata(folder).map_err(failed)?.is_dir() {
        return Err(failed(std::io::ErrorKind::NotADirectory.into()));
    }
    let set = set_of(folder);
    let mut found = BTreeMap::new();
    for name in names {
        match read(&set.join(name), limit) {
            Ok(bytes) => {
                found.insert((*name).to_owned(), bytes);
            }
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(other) => return Err(other),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_public_file_is_replaced_only_on_request() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        write_public(&path, b"1", false).unwrap();
        assert!(matches!(write_public(&path, b"2", false), Err(Error::Taken { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"1");
        write_public(&path, b"2", true).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"2");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_set_is_written_to_an_empty_folder_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new");
        let files: [(&str, &[u8], u32); 2] = [("a", b"1", 0o644), ("b", b"2", 0o600)];
        write_set(&path, &files).unwrap();
        assert!(matches!(write_set(&path, &files), Err(Error::Occupied { .. })));
        assert!(matches!(add_to(&path, &files[1..]), Err(Error::Taken { .. })));
        add_to(&path, &[("c", b"3", 0o600)]).unwrap();
        let read = read_folder(&path, 10).unwrap();
        assert_eq!(read.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        let mode = std::os::unix::fs::PermissionsExt::mode;
        assert_eq!(mode(&std::fs::metadata(path.join("b")).unwrap().permissions()) & 0o7777, 0o600);
        assert_eq!(mode(&std::fs::metadata(&path).unwrap().permissions()) & 0o7777, 0o700);
    }

    #[test]
    fn long_input_is_not_read_to_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, [0; 11]).unwrap();
        assert!(matches!(read_given(&path, 10), Err(Error::TooLong { .. })));
        assert_eq!(read_given(&path, 11).unwrap().len(), 11);
        assert!(matches!(read_given(Path::new("/dev/zero"), 10), Err(Error::TooLong { .. })));
    }
}
