//! One certificate set in one folder, published as the kubelet publishes a Secret volume:
//!
//! ```text
//! ..2026_11_23_05_36_16.123456789/   cert-chain.pem  key.pem  root-cert.pem
//! ..data          -> ..2026_11_23_05_36_16.123456789
//! cert-chain.pem  -> ..data/cert-chain.pem      and so on
//! ```
//!
//! `..data` is swapped by one rename, so whoever opens it once sees one whole set. The set before is kept for a moment,
//! for readers that have opened it and not yet read it. Nothing here waits for the disk: a set that a power failure
//! spoils is minted anew, and every start looks.

use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::core::plan::CertificateSet;
use crate::sink::{Error, FoundSet};
use crate::sys::dir::{self, Access, Dir, Kind, Stat};

/// What the files are called: chain, key, trust bundle.
pub(super) type Names = [&'static str; 3];
/// As Istio's sidecars mount them.
pub(super) const FILES: Names = ["cert-chain.pem", "key.pem", "root-cert.pem"];
const DATA: &str = "..data";
const DATA_NEXT: &str = "..data_tmp";
/// Far more than a bundle of hundreds of roots.
const LARGEST: usize = 1 << 20;

/// Who may do what with delivered files and folders.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub file: Access,
    pub folder: Access,
    pub names: Names,
    /// The outer folder is somebody else's, who gave it for this: its access is left as it is.
    pub given: bool,
}

/// What a volume looked like. Any change made to it by others changes the stamp.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// Never zero.
    pub stamp: u64,
    /// The inodes of the folder and of the one that `..data` points to, cut to what tells two apart.
    pub folder: u32,
    pub current: u32,
}

/// What was found in a volume.
pub(super) enum Content {
    Absent,
    Damaged(String),
    Set {
        found: FoundSet,
        /// Something is left of an earlier set.
        untidy: bool,
    },
}

/// What there is to say of a volume that was emptied.
pub(super) enum Cleared {
    Empty,
    /// Names in it that are not ours.
    Kept(Vec<String>),
}

/// Writes a set into a folder that is ours. `fresh` says that the folder was made just now and is empty.
pub(super) fn publish(
    folder: &Dir,
    fresh: bool,
    set: &CertificateSet,
    shape: &Shape,
    now: OffsetDateTime,
) -> Result<(Look, bool), Error> {
    let names = shape.names;
    let listing = if fresh { Listing::default() } else { Listing::of(folder, names)? };
    let before = match listing.data {
        Some(Kind::Link) => target(folder)?,
        _ => None,
    };
    let mut untidy = false;
    for old in &listing.stamped {
        if before.as_ref() == Some(old) {
            untidy = true;
        } else {
            drop_stamped(folder, old, names)?;
        }
    }
    let name = make_stamped(folder, shape, now)?;
    let written = fill(folder, &name, set, shape).and_then(|stats| swap(folder, &name, &listing, stats));
    let (current, files) = match written {
        Ok(stats) => stats,
        Err(error) => {
            // The first fault is the one to tell; what stays is cleared by the next call.
            let _ = drop_stamped(folder, &name, names);
            return Err(error);
        }
    };
    for (index, link) in names.iter().enumerate() {
        let target = through(link);
        match listing.links[index] {
            None => {}
            Some(Kind::Link) if folder.read_link(link)? == *target => continue,
            Some(kind) => displace(folder, link, kind)?,
        }
        folder.symlink(&target, link)?;
    }
    let stat = if shape.given { folder.stat_self()? } else { folder.settle(shape.folder)? };
    let files = files.map(Some);
    Ok((Look::new(&stat, Some((&current, &files))), untidy))
}

/// Reads the set of a folder that is ours.
pub(super) fn read(parent: &Dir, name: &str, shape: &Shape) -> Result<Content, Error> {
    match parent.subdir(name).map_err(Fault::from).and_then(|folder| read_whole(&folder, shape)) {
        Ok(content) => Ok(content),
        Err(Fault::Damage(what)) => Ok(Content::Damaged(what)),
        Err(Fault::Dir(error)) => match error {
            error if error.is_absent() && parent.find(name)?.is_none() => Ok(Content::Absent),
            dir::Error::NotFile { .. } | dir::Error::NotFolder { .. } | dir::Error::TooLarge { .. } => {
                Ok(Content::Damaged(error.to_string()))
            }
            error if error.is_absent() || error.is_denied() => Ok(Content::Damaged(error.to_string())),
            error => Err(error.into()),
        },
    }
}

/// Looks at a volume without reading it. With the look come handles to the folder and to the current set's.
pub(super) fn look(parent: &Dir, name: &str, names: Names) -> (Look, Option<Dir>, Option<Dir>) {
    let Ok(folder) = parent.subdir_to_look(name) else {
        return (Look::of_foreign(parent, name), None, None);
    };
    match look_at(&folder, names) {
        Some((look, current)) => (look, Some(folder), current),
        None => (Look::of_foreign(parent, name), Some(folder), None),
    }
}

/// The same of a folder that is open, with a handle to the current set's.
pub(super) fn look_at(folder: &Dir, names: Names) -> Option<(Look, Option<Dir>)> {
    let stat = folder.stat_self().ok()?;
    let current = target(folder).ok().flatten().and_then(|target| folder.subdir_to_look(&target).ok());
    let Some((current, current_stat)) = current.and_then(|dir| dir.stat_self().ok().map(|stat| (dir, stat)))
    else {
        return Some((Look::new(&stat, None), None));
    };
    let files = names.map(|file| current.find(file).ok().flatten());
    Some((Look::new(&stat, Some((&current_stat, &files))), Some(current)))
}

/// Removes what is left of earlier sets.
pub(super) fn tidy(folder: &Dir, names: Names) -> Result<(), Error> {
    let listing = Listing::of(folder, names)?;
    if listing.data != Some(Kind::Link) {
        // Damaged: the next publication clears it.
        return Ok(());
    }
    let current = target(folder)?;
    for old in &listing.stamped {
        if current.as_ref() != Some(old) {
            drop_stamped(folder, old, names)?;
        }
    }
    match listing.data_next {
        None | Some(Kind::Folder) => {}
        Some(_) => folder.unlink(DATA_NEXT)?,
    }
    Ok(())
}

/// Takes a set out of a folder that is ours, `..data` first, so that it is gone for readers in one step.
pub(super) fn clear(folder: &Dir, names: Names) -> Result<Cleared, Error> {
    let listing = Listing::of(folder, names)?;
    let mut kept = listing.others;
    let ours = [(DATA, listing.data), (DATA_NEXT, listing.data_next)];
    for (name, kind) in ours.into_iter().chain(names.into_iter().zip(listing.links)) {
        match kind {
            None => {}
            Some(Kind::Folder) => match folder.rmdir(name) {
                Err(error) if error.is_occupied() => kept.push(name.to_owned()),
                result => result?,
            },
            Some(_) => folder.unlink(name)?,
        }
    }
    for name in listing.stamped {
        if !drop_stamped(folder, &name, names)? {
            kept.push(name);
        }
    }
    Ok(if kept.is_empty() { Cleared::Empty } else { Cleared::Kept(kept) })
}

impl Look {
    fn new(folder: &Stat, current: Option<(&Stat, &[Option<Stat>; 3])>) -> Self {
        let mut hash = DefaultHasher::new();
        (folder, current).hash(&mut hash);
        Self {
            stamp: hash.finish() | 1,
            folder: folder.inode() as u32,
            current: current.map_or(0, |(stat, _)| stat.inode() as u32),
        }
    }

    /// Of what is no folder of ours only its coming and going counts.
    pub(super) fn of_foreign(parent: &Dir, name: &str) -> Self {
        let identity = parent.find(name).ok().flatten();
        let mut hash = DefaultHasher::new();
        identity.map(|stat| (stat.inode(), stat.mode(), stat.kind() as u8)).hash(&mut hash);
        Self { stamp: hash.finish() | 1, ..Self::default() }
    }
}

/// What makes a volume unreadable, and what keeps us from finding out.
enum Fault {
    Damage(String),
    Dir(dir::Error),
}

impl From<dir::Error> for Fault {
    fn from(error: dir::Error) -> Self {
        Self::Dir(error)
    }
}

/// Reads the set of a folder that was given to us.
pub(super) fn read_given(folder: &Dir, shape: &Shape) -> Result<Content, Error> {
    match read_whole(folder, shape) {
        Ok(content) => Ok(content),
        Err(Fault::Damage(what)) => Ok(Content::Damaged(what)),
        Err(Fault::Dir(error)) => Ok(Content::Damaged(error.to_string())),
    }
}

fn read_whole(folder: &Dir, shape: &Shape) -> Result<Content, Fault> {
    let names = shape.names;
    let path = folder.path().display();
    let damage = |what: String| Fault::Damage(format!("{path}/{what}"));
    let listing = Listing::of(folder, names)?;
    match listing.data {
        Some(Kind::Link) => {}
        None => return Err(damage(format!("{DATA} is missing"))),
        Some(kind) => return Err(damage(format!("{DATA} is {kind}, not a symbolic link"))),
    }
    let Some(current_name) = target(folder)? else {
        let target = folder.read_link(DATA)?;
        return Err(damage(format!("{DATA} points to {target:?}, which mica did not make")));
    };
    for (index, link) in names.iter().enumerate() {
        match listing.links[index] {
            Some(Kind::Link) => {}
            None => return Err(damage(format!("{link} is missing"))),
            Some(kind) => return Err(damage(format!("{link} is {kind}, not a symbolic link"))),
        }
        let (target, ours) = (folder.read_link(link)?, through(link));
        if target != *ours {
            return Err(damage(format!("{link} points to {target:?}, not to {ours:?}")));
        }
    }
    let current = folder.subdir(&current_name)?;
    let mut loose = String::new();
    if !shape.given {
        judge(&mut loose, folder, None, &folder.stat_self()?, shape.folder);
    }
    judge(&mut loose, &current, None, &current.stat_self()?, shape.folder);
    let mut text = |file: &str| -> Result<Zeroizing<String>, Fault> {
        let (bytes, stat) = current.read(file, LARGEST)?;
        judge(&mut loose, &current, Some(file), &stat, shape.file);
        String::from_utf8(bytes).map(Zeroizing::new).map_err(|error| {
            // The key may be among it.
            drop(Zeroizing::new(error.into_bytes()));
            damage(format!("{current_name}/{file} is not text"))
        })
    };
    let [chain, key, roots] = names;
    let set = CertificateSet {
        chain_pem: std::mem::take(&mut *text(chain)?),
        key_pem: text(key)?,
        roots_pem: Arc::from(text(roots)?.as_str()),
    };
    Ok(Content::Set {
        found: FoundSet { set, loose: (!loose.is_empty()).then_some(loose), marked: true },
        untidy: listing.data_next.is_some() || listing.stamped.len() > 1,
    })
}

/// Says in words how a file's access differs from what is configured.
pub(super) fn judge(loose: &mut String, folder: &Dir, file: Option<&str>, stat: &Stat, access: Access) {
    if access.is_of(stat) {
        return;
    }
    let path = match file {
        Some(file) => folder.path().join(file),
        None => folder.path().to_owned(),
    };
    if !loose.is_empty() {
        loose.push_str("; ");
    }
    // Writing to a string cannot fail.
    let _ = write!(
        loose,
        "{} has mode {:04o}, owner {} and group {}, not {:04o}, {} and {}",
        path.display(),
        stat.mode(),
        stat.owner(),
        stat.group(),
        access.mode,
        access.owner.unwrap_or(stat.owner()),
        access.group.unwrap_or(stat.group()),
    );
}

/// What stands under our names in a folder, and what else is there.
#[derive(Default)]
struct Listing {
    data: Option<Kind>,
    data_next: Option<Kind>,
    links: [Option<Kind>; 3],
    stamped: Vec<String>,
    others: Vec<String>,
}

impl Listing {
    fn of(folder: &Dir, names: Names) -> Result<Self, dir::Error> {
        let mut listing = Self::default();
        for entry in folder.names()? {
            let name = entry.name.to_string_lossy();
            let slot = match name.as_ref() {
                DATA => &mut listing.data,
                DATA_NEXT => &mut listing.data_next,
                name => match names.iter().position(|file| *file == name) {
                    Some(index) => &mut listing.links[index],
                    None if entry.kind == Kind::Folder && is_stamped(name) => {
                        listing.stamped.push(name.to_owned());
                        continue;
                    }
                    None => {
                        listing.others.push(name.to_owned());
                        continue;
                    }
                },
            };
            *slot = Some(entry.kind);
        }
        Ok(listing)
    }
}

/// What a file's link says.
fn through(name: &str) -> String {
    format!("{DATA}/{name}")
}

/// The folder that `..data` points to, if it is one that we could have made, in this folder.
fn target(folder: &Dir) -> Result<Option<String>, dir::Error> {
    let target = folder.read_link(DATA)?;
    Ok(target.into_string().ok().filter(|name| is_stamped(name)))
}

/// `..2026_11_23_05_36_16.123456789`: what the kubelet makes, too.
pub(super) fn is_stamped(name: &str) -> bool {
    let Some((date, rest)) = name.strip_prefix("..").and_then(|n| n.split_once('.')) else {
        return false;
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let widths = [4, 2, 2, 2, 2, 2];
    digits(rest)
        && rest.len() <= 10
        && date.split('_').count() == widths.len()
        && date.split('_').zip(widths).all(|(part, width)| part.len() == width && digits(part))
}

fn make_stamped(folder: &Dir, shape: &Shape, now: OffsetDateTime) -> Result<String, Error> {
    let mut nanosecond = now.nanosecond();
    loop {
        let name = format!(
            "..{:04}_{:02}_{:02}_{:02}_{:02}_{:02}.{:09}",
            now.year(),
            u8::from(now.month()),
            now.day(),
            now.hour(),
            now.minute(),
            now.second(),
            nanosecond
        );
        match folder.make_subdir(&name, shape.folder) {
            Ok(()) => return Ok(name),
            // A clock that stands still or was set back; each name is tried once at most.
            Err(error) if error.is_taken() && nanosecond < 1_999_999_999 => nanosecond += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

fn fill(folder: &Dir, name: &str, set: &CertificateSet, shape: &Shape) -> Result<(Stat, [Stat; 3]), Error> {
    let inside = folder.subdir(name)?;
    let [chain, key, roots] = shape.names;
    let files = [
        inside.write_new(chain, set.chain_pem.as_bytes(), shape.file)?,
        inside.write_new(key, set.key_pem.as_bytes(), shape.file)?,
        inside.write_new(roots, set.roots_pem.as_bytes(), shape.file)?,
    ];
    Ok((inside.settle(shape.folder)?, files))
}

/// The one step that readers see.
fn swap<T>(folder: &Dir, name: &str, listing: &Listing, passed_on: T) -> Result<T, Error> {
    if let Some(kind) = listing.data_next {
        displace(folder, DATA_NEXT, kind)?;
    }
    match listing.data {
        None => folder.symlink(name, DATA)?,
        Some(kind) => {
            if kind == Kind::Folder {
                displace(folder, DATA, kind)?;
            }
            folder.symlink(name, DATA_NEXT)?;
            folder.rename(DATA_NEXT, folder, DATA)?;
        }
    }
    Ok(passed_on)
}

/// Removes whatever has one of our names; never what is inside a folder.
fn displace(folder: &Dir, name: &str, kind: Kind) -> Result<(), Error> {
    if kind != Kind::Folder {
        return Ok(folder.unlink(name)?);
    }
    match folder.rmdir(name) {
        Err(error) if error.is_occupied() => Err(Error::Obstructed { path: folder.path().join(name) }),
        result => Ok(result?),
    }
}

/// Removes our files from a timestamped folder, then the folder; `false` if there is something else in it.
fn drop_stamped(folder: &Dir, name: &str, names: Names) -> Result<bool, Error> {
    let inside = folder.subdir(name)?;
    for file in names {
        match inside.unlink(file) {
            Err(error) if !error.is_absent() => match inside.find(file)? {
                // Not ours then, and it keeps the folder.
                Some(stat) if stat.kind() == Kind::Folder => {}
                _ => return Err(error.into()),
            },
            _ => {}
        }
    }
    match folder.rmdir(name) {
        Ok(()) => Ok(true),
        Err(error) if error.is_absent() => Ok(true),
        Err(error) if error.is_occupied() => {
            tracing::warn!(
                folder = %inside.path().display(),
                "an old folder stays because it holds files that mica did not write"
            );
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests make and damage files as other programs do")]
mod tests {
    use super::*;

    #[test]
    fn names_of_published_folders_are_told_from_others() {
        for ours in
            ["..2026_11_23_05_36_16.123456789", "..1970_01_01_00_00_00.0", "..2026_11_23_05_36_16.1999999999"]
        {
            assert!(is_stamped(ours), "{ours}");
        }
        for other in [
            "",
            "..",
            "..data",
            "..data_tmp",
            "../../x",
            "..2026_11_23_05_36_16",
            "..2026_11_23_05_36_16.",
            "..2026_11_23_05_36_16.12345678901",
            "..2026_11_23_05_36_16.12/4",
            "..2026_11_23_05_36.123456789",
            "..2026_11_23_05_36_16_17.123456789",
            "..26_11_23_05_36_16.123456789",
            "2026_11_23_05_36_16.123456789",
            "..+026_11_23_05_36_16.123456789",
        ] {
            assert!(!is_stamped(other), "{other}");
        }
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_is_no_hindrance() {
        let place = tempfile::tempdir().unwrap();
        let folder = Dir::open_trusted(place.path(), None).unwrap();
        let shape =
            Shape { file: Access::mode(0o600), folder: Access::mode(0o700), names: FILES, given: false };
        let late = OffsetDateTime::UNIX_EPOCH + time::Duration::days(400) - time::Duration::nanoseconds(1);
        for (round, now) in [late, late, late, late - time::Duration::days(365), late].into_iter().enumerate()
        {
            let set = CertificateSet {
                chain_pem: round.to_string(),
                key_pem: Zeroizing::new(String::new()),
                roots_pem: "".into(),
            };
            publish(&folder, round == 0, &set, &shape, now).unwrap();
            let seen = std::fs::read_to_string(place.path().join("cert-chain.pem")).unwrap();
            assert_eq!(seen, round.to_string());
        }
    }
}
