//! Files that people name: read whole, up to a bound.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("cannot read {path}: {source}")]
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
    /// Not a file.
    #[error("{path} is no regular file")]
    NoFile {
        /// Which.
        path: PathBuf,
    },
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

fn read_to(file: File, length: u64, limit: u64, path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
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

/// Reads those of the named files of a folder that are there.
pub fn read_named(
    folder: &Path,
    names: &[&str],
    limit: u64,
) -> Result<BTreeMap<String, Zeroizing<Vec<u8>>>, Error> {
    let failed = |source| Error::Io { path: folder.to_owned(), source };
    if !std::fs::metadata(folder).map_err(failed)?.is_dir() {
        return Err(failed(std::io::ErrorKind::NotADirectory.into()));
    }
    let mut found = BTreeMap::new();
    for name in names {
        match read(&folder.join(name), limit) {
            Ok(bytes) => {
                found.insert((*name).to_owned(), bytes);
            }
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(other) => return Err(other),
        }
    }
    Ok(found)
}
