//! Which folders are ours: a file in the data folder with a line for each, written before the folder is made.
//!
//! ```text
//! secrets "/var/lib/mica/secrets"   the lines below are about this secrets folder
//! default/                          Mica made the folder of this namespace
//! default/web                       Mica made this account's folder
//! ~default/web                      emptied, but it stays, because somebody keeps a file in it
//! -default/web                      removed
//! ```
//!
//! Lines are only added; once in a while the file is replaced by one without the dead lines.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use crate::core::spiffe::{self, ServiceAccount};
use crate::sink::Error;
use crate::sys::dir::{Access, Dir, Log};

/// The record's name in the data folder.
pub(super) const NAME: &str = "delivered";
const ACCESS: Access = Access::mode(0o600);
/// Some millions of accounts.
const LARGEST: usize = 1 << 28;
/// Below this size dead lines are not worth a rewrite.
const SMALL: u64 = 64 * 1024;

pub(super) struct Record {
    data: Dir,
    log: Log,
    /// Lines about other secrets folders that this data folder served earlier, kept as they are, each with its end.
    others: String,
    heading: String,
    /// What a rewritten file would have, in bytes.
    live: u64,
}

/// What was recorded.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Recorded {
    /// Accounts, and whether their folder holds a set of ours or was only kept for somebody's file.
    pub accounts: HashMap<ServiceAccount, Standing>,
    /// Namespaces whose folder we made.
    pub namespaces: HashSet<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Ours,
    Vacated,
}

/// One thing to write down.
pub(super) enum Line<'a> {
    Account(&'a ServiceAccount),
    Vacated(&'a ServiceAccount),
    Removed(&'a ServiceAccount),
    Namespace(&'a str),
    NamespaceRemoved(&'a str),
}

impl Line<'_> {
    fn write(&self, to: &mut String) {
        // Writing to a string cannot fail.
        let _ = match self {
            Self::Account(account) => writeln!(to, "{account}"),
            Self::Vacated(account) => writeln!(to, "~{account}"),
            Self::Removed(account) => writeln!(to, "-{account}"),
            Self::Namespace(name) => writeln!(to, "{name}/"),
            Self::NamespaceRemoved(name) => writeln!(to, "-{name}/"),
        };
    }
}

impl Record {
    /// Reads the record, lets `check` take out what is there no more, and begins a new file without it.
    pub(super) fn open(
        data: Dir,
        secrets: &Path,
        check: impl FnOnce(&mut Recorded) -> Result<(), Error>,
    ) -> Result<(Self, Recorded), Error> {
        // Inside the data folder the path is relative, so that the folder can be moved with all in it.
        let shown = secrets.strip_prefix(data.path()).unwrap_or(secrets);
        let heading = format!("secrets {shown:?}\n");
        let bytes = match data.read(NAME, LARGEST) {
            Ok((bytes, _)) => bytes,
            Err(error) if error.is_absent() => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        let path = data.path().join(NAME);
        let (mut recorded, others) = parse(&bytes, &heading, &path)?;
        check(&mut recorded)?;
        let text = render(&others, &heading, &recorded);
        if bytes != text.as_bytes() {
            data.replace(NAME, text.as_bytes(), ACCESS)?;
        }
        let log = data.append_to(NAME, ACCESS)?;
        let live = log.length();
        Ok((Self { data, log, others, heading, live }, recorded))
    }

    /// Fails when the record would be lost with the data folder, which was removed or moved.
    pub(super) fn check(&self) -> Result<(), Error> {
        if self.data.is_in_its_place() { Ok(()) } else { Err(Error::NoRecord(self.data.path().to_owned())) }
    }

    /// Adds lines, all or none.
    pub(super) fn add<'a>(&mut self, lines: impl IntoIterator<Item = Line<'a>>) -> Result<(), Error> {
        self.check()?;
        let mut text = String::new();
        let mut live = self.live;
        for line in lines {
            let before = text.len();
            line.write(&mut text);
            let length = (text.len() - before) as u64;
            live = match line {
                Line::Account(_) | Line::Vacated(_) | Line::Namespace(_) => live + length,
                Line::Removed(_) | Line::NamespaceRemoved(_) => live.saturating_sub(length - 1),
            };
        }
        self.log.append(text.as_bytes())?;
        self.live = live;
        Ok(())
    }

    /// Waits until all lines are on the disk. After a power failure a folder without its line would be taken for
    /// somebody else's.
    pub(super) fn sync(&self) -> Result<(), Error> {
        Ok(self.log.sync()?)
    }

    /// Whether half of the file is dead lines.
    pub(super) fn is_bloated(&self) -> bool {
        self.log.length() > SMALL.max(2 * self.live)
    }

    /// Rewrites the file with these live lines.
    pub(super) fn compact(&mut self, recorded: &Recorded) -> Result<(), Error> {
        let text = render(&self.others, &self.heading, recorded);
        self.data.replace(NAME, text.as_bytes(), ACCESS)?;
        self.log = self.data.append_to(NAME, ACCESS)?;
        self.live = self.log.length();
        Ok(())
    }
}

fn render(others: &str, heading: &str, recorded: &Recorded) -> String {
    let mut text = String::with_capacity(others.len() + 64 * recorded.accounts.len());
    text.push_str(others);
    text.push_str(heading);
    // In order, so that a rewrite of the same is the same.
    let mut namespaces: Vec<_> = recorded.namespaces.iter().collect();
    namespaces.sort_unstable();
    for namespace in namespaces {
        Line::Namespace(namespace).write(&mut text);
    }
    let mut accounts: Vec<_> = recorded.accounts.iter().collect();
    accounts.sort_unstable_by_key(|(account, _)| *account);
    for (account, standing) in accounts {
        match standing {
            Standing::Ours => Line::Account(account),
            Standing::Vacated => Line::Vacated(account),
        }
        .write(&mut text);
    }
    text
}

/// What concerns the secrets folder of this heading, and the lines that concern others.
fn parse(bytes: &[u8], heading: &str, path: &Path) -> Result<(Recorded, String), Error> {
    let mut recorded = Recorded::default();
    let mut others = String::new();
    let mut section = None;
    // What has no end was being written when the process was killed: its folder has not been made yet.
    let end = match bytes.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => end,
        // The heading was put in place as a whole, so whoever emptied the file wanted a new one.
        None if bytes.is_empty() => return Ok((recorded, others)),
        None => bytes.len(),
    };
    for (number, line) in bytes[..end].split(|byte| *byte == b'\n').enumerate() {
        let damaged = || Error::Record {
            path: PathBuf::from(path),
            line: number + 1,
            text: spiffe::shortened(&String::from_utf8_lossy(line)),
        };
        let line = std::str::from_utf8(line).map_err(|_| damaged())?;
        if line.starts_with("secrets ") {
            section = Some(line == heading.trim_end());
        }
        match section {
            None => return Err(damaged()),
            Some(true) if line.starts_with("secrets ") => {}
            Some(true) => note(&mut recorded, line).ok_or_else(damaged)?,
            Some(false) => {
                others.push_str(line);
                others.push('\n');
            }
        }
    }
    Ok((recorded, others))
}

fn note(recorded: &mut Recorded, line: &str) -> Option<()> {
    let (sign, name) = match line.as_bytes().first()? {
        b'-' | b'~' => line.split_at(1),
        _ => ("", line),
    };
    let (namespace, account) = name.split_once('/')?;
    if account.is_empty() {
        // Any account proves that the namespace is a name.
        ServiceAccount::new(namespace, "default").ok()?;
        match sign {
            "" => recorded.namespaces.insert(namespace.to_owned()),
            "-" => recorded.namespaces.remove(namespace),
            _ => return None,
        };
        return Some(());
    }
    let account = ServiceAccount::new(namespace, account).ok()?;
    match sign {
        "" => recorded.accounts.insert(account, Standing::Ours),
        "~" => recorded.accounts.insert(account, Standing::Vacated),
        _ => recorded.accounts.remove(&account),
    };
    Some(())
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests make and damage files as other programs do")]
mod tests {
    use super::*;

    const SECRETS: &str = "secrets \"secrets\"\n";

    fn account(name: &str) -> ServiceAccount {
        let (namespace, name) = name.split_once('/').unwrap();
        ServiceAccount::new(namespace, name).unwrap()
    }

    fn open(folder: &Path) -> Result<(Record, Recorded), Error> {
        let data = Dir::open_trusted(folder, None).unwrap();
        Record::open(data, &folder.join("secrets"), |_| Ok(()))
    }

    fn text(folder: &Path) -> String {
        std::fs::read_to_string(folder.join(NAME)).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let (mut record, found) = open(folder.path()).unwrap();
        assert_eq!(found, Recorded::default());
        let (web, db, old) = (account("a/web"), account("a/db"), account("b/old"));
        record
            .add([
                Line::Namespace("a"),
                Line::Account(&web),
                Line::Account(&db),
                Line::Namespace("b"),
                Line::Account(&old),
            ])
            .unwrap();
        record.sync().unwrap();
        record.add([Line::Vacated(&db), Line::Removed(&old), Line::NamespaceRemoved("b")]).unwrap();
        drop(record);
        let (_, found) = open(folder.path()).unwrap();
        assert_eq!(found.accounts, HashMap::from([(web, Standing::Ours), (db, Standing::Vacated)]));
        assert_eq!(found.namespaces, HashSet::from(["a".to_owned()]));
        assert_eq!(text(folder.path()), format!("{SECRETS}a/\n~a/db\na/web\n"), "compacted");
    }

    #[test]
    fn a_last_line_without_its_end_is_passed_over_and_taken_out() {
        let folder = tempfile::tempdir().unwrap();
        for tail in ["a/we", "-a/db", "\0\0\0\0", "se"] {
            let path = folder.path().join(NAME);
            std::fs::write(&path, format!("{SECRETS}a/db\n{tail}")).unwrap();
            let (mut record, found) = open(folder.path()).unwrap();
            assert_eq!(found.accounts.len(), 1, "{tail:?}");
            record.add([Line::Account(&account("a/next"))]).unwrap();
            assert_eq!(text(folder.path()), format!("{SECRETS}a/db\na/next\n"));
        }
    }

    #[test]
    fn other_damage_is_told_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        for damage in ["a/..", "a/web/x", "nonsense", "", "../../etc/", "~a/", "\0\0", "A/b", "-"] {
            let path = folder.path().join(NAME);
            let before = format!("{SECRETS}a/db\n{damage}\na/web\n");
            std::fs::write(&path, &before).unwrap();
            let error = open(folder.path()).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("line 3 of "), "{damage:?}: {error}");
            assert_eq!(text(folder.path()), before, "left as it was");
        }
        for garbage in ["a/web\n", "garbage"] {
            std::fs::write(folder.path().join(NAME), garbage).unwrap();
            let error = open(folder.path()).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("line 1 of "), "{error}");
        }
    }

    #[test]
    fn names_recorded_for_one_secrets_folder_say_nothing_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let (mut record, _) = open(folder.path()).unwrap();
        record.add([Line::Account(&account("a/web"))]).unwrap();
        drop(record);
        let data = || Dir::open_trusted(folder.path(), None).unwrap();
        let elsewhere = Path::new("/srv/else\nwhere");
        let (mut record, found) = Record::open(data(), elsewhere, |_| Ok(())).unwrap();
        assert_eq!(found, Recorded::default());
        record.add([Line::Account(&account("b/db"))]).unwrap();
        drop(record);
        let (_, found) = open(folder.path()).unwrap();
        assert_eq!(found.accounts.keys().collect::<Vec<_>>(), [&account("a/web")]);
        let (_, found) = Record::open(data(), elsewhere, |_| Ok(())).unwrap();
        assert_eq!(found.accounts.keys().collect::<Vec<_>>(), [&account("b/db")]);
    }

    #[test]
    fn dead_lines_are_taken_out_when_they_are_half_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let (mut record, _) = open(folder.path()).unwrap();
        let (web, db) = (account("a/web"), account("a/db"));
        record.add([Line::Account(&db)]).unwrap();
        while !record.is_bloated() {
            assert!(record.log.length() < 2 * SMALL, "never bloated");
            record.add([Line::Account(&web), Line::Removed(&web)]).unwrap();
        }
        let live =
            Recorded { accounts: HashMap::from([(db.clone(), Standing::Ours)]), namespaces: HashSet::new() };
        record.compact(&live).unwrap();
        assert!(!record.is_bloated());
        record.add([Line::Account(&web)]).unwrap();
        assert_eq!(text(folder.path()), format!("{SECRETS}a/db\na/web\n"));
    }
}
