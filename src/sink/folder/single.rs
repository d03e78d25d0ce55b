//! One set in a folder that was given for it, such as a proxy's `/etc/certs`. What stood there under the same names is
//! replaced: another agent's files are taken over.

use std::path::Path;

use zeroize::Zeroizing;

use super::volume::{self, Content, FILES, Names, Shape};
use super::{FolderSink, folder_mode};
use crate::core::plan::CertificateSet;
use crate::sink::{Error, Found};
use crate::sys::clock;
use crate::sys::dir::{Access, Dir, Kind};

/// Far more than three files of PEM.
const LARGEST: usize = 1 << 20;

/// Publishes one set after the other.
pub struct Single {
    dir: Dir,
    shape: Shape,
}

impl Single {
    /// Opens a folder, or makes it. `names` are those of chain, key and trust bundle; without them Istio's.
    pub fn open(path: &Path, access: Access, names: Option<[String; 3]>) -> Result<Self, Error> {
        FolderSink::check_mode(access.mode)?;
        let folder = Access { mode: folder_mode(access.mode), ..access };
        let (dir, untrusted) = Dir::open_given(path, folder.mode)?;
        if let Some(why) = untrusted {
            tracing::warn!(%why, "whoever else may write to the folder of files may replace them");
        }
        // Kept as long as the process runs.
        let names: Names = names.map_or(FILES, |names| names.map(|name| &*name.leak()));
        Ok(Self { dir, shape: Shape { file: access, folder, names, given: true } })
    }

    /// What is there. Plain files of the right names count as a set that another program wrote.
    pub fn read(&self) -> Result<Found, Error> {
        if let Some(set) = self.plain()? {
            return Ok(Found::Set(super::super::FoundSet { set, loose: None, marked: false }));
        }
        Ok(match volume::read_given(&self.dir, &self.shape)? {
            Content::Absent => Found::Absent,
            Content::Damaged(what) => Found::Damaged(what),
            Content::Set { found, .. } => Found::Set(found),
        })
    }

    /// What the folder looks like without its files being read: another number after any change to it, and none if
    /// its path leads elsewhere.
    pub fn stamp(&self) -> Option<u64> {
        let (look, _) = volume::look_at(&self.dir, self.shape.names)?;
        self.dir.is_in_its_place().then_some(look.stamp)
    }

    /// Puts a set in the place of what is there.
    pub fn publish(&self, set: &CertificateSet) -> Result<(), Error> {
        if let Some(before) = self.plain()? {
            // The same contents first: while files become links one after the other, readers never see a mixture.
            volume::publish(&self.dir, false, &before, &self.shape, clock::now())?;
        }
        volume::publish(&self.dir, false, set, &self.shape, clock::now())?;
        Ok(())
    }

    /// Takes away what is left of earlier sets, when readers have had time to read what they opened.
    pub fn tidy(&self) -> Result<(), Error> {
        volume::tidy(&self.dir, self.shape.names)
    }

    /// Whether the folder is the one that its path leads to.
    pub fn is_in_its_place(&self) -> bool {
        self.dir.is_in_its_place()
    }

    /// Three files that are no links.
    fn plain(&self) -> Result<Option<CertificateSet>, Error> {
        let mut texts = Vec::new();
        for name in self.shape.names {
            match self.dir.find(name)? {
                Some(stat) if stat.kind() == Kind::File => {}
                _ => return Ok(None),
            }
            let (bytes, _) = self.dir.read(name, LARGEST)?;
            match String::from_utf8(bytes) {
                Ok(text) => texts.push(Zeroizing::new(text)),
                Err(error) => {
                    drop(Zeroizing::new(error.into_bytes()));
                    return Ok(None);
                }
            }
        }
        let [chain, key, roots] = <[_; 3]>::try_from(texts).unwrap_or_default();
        Ok(Some(CertificateSet {
            chain_pem: chain.to_string(),
            key_pem: key,
            roots_pem: roots.as_str().into(),
        }))
    }
}
