//! Which local processes are which workloads, as a file says: `docs/workload-api.md` is the schema for people.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_saphyr::Spanned;

use super::settings::{self, Error, said};
use super::spiffe::SpiffeId;

/// The most that is read.
pub const MAX: usize = 1024 * 1024;
/// SPIFFE Workload API 5.2.1.
const LONGEST_HINT: usize = 1_024;

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workloads(Vec<Workload>);

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Workload {
    identity: SpiffeId,
    hint: Option<String>,
    matching: Match,
    credentials: Option<Credentials>,
}

/// All that is named has to fit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Match {
    uid: Option<u32>,
    gid: Option<u32>,
    binary: Option<PathBuf>,
    unit: Option<String>,
}

/// What one identity is asked for with, in place of the agent's own credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// A file with a token.
    pub token: Option<PathBuf>,
    /// A folder with a certificate.
    pub certificate: Option<PathBuf>,
}

/// What is known of a process. What is none is unknown, and fits nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts<'a> {
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// The file that it runs.
    pub binary: Option<&'a Path>,
    /// The unit of the system's manager that it is part of.
    pub unit: Option<&'a str>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    workloads: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Entry {
    identity: Spanned<String>,
    #[serde(default, deserialize_with = "said")]
    hint: Option<Spanned<String>>,
    #[serde(rename = "match")]
    matching: Spanned<Criteria>,
    #[serde(default, deserialize_with = "said")]
    token_file: Option<Spanned<PathBuf>>,
    #[serde(default, deserialize_with = "said")]
    certificate: Option<Spanned<PathBuf>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Criteria {
    #[serde(deserialize_with = "said")]
    uid: Option<u32>,
    #[serde(deserialize_with = "said")]
    gid: Option<u32>,
    #[serde(deserialize_with = "said")]
    binary: Option<Spanned<PathBuf>>,
    #[serde(deserialize_with = "said")]
    unit: Option<Spanned<String>>,
}

impl Workloads {
    /// Reads a file.
    pub fn parse(text: &[u8]) -> Result<Self, Error> {
        let file: File = settings::read(text, MAX, "file of workloads", "that knows nobody")?;
        let mut all = Vec::new();
        let mut hints: BTreeMap<String, SpiffeId> = BTreeMap::new();
        let mut credentials: BTreeMap<SpiffeId, Option<Credentials>> = BTreeMap::new();
        for entry in file.workloads {
            let identity = SpiffeId::parse_workload(&entry.identity.value)
                .map_err(|fault| Error::at(&entry.identity, format!("identity: {fault}")))?;
            let workload = Workload {
                hint: entry.hint.as_ref().map(hint).transpose()?,
                matching: criteria(&entry.matching)?,
                credentials: credentials_of(&entry)?,
                identity,
            };
            let Workload { identity, hint, credentials: given, .. } = &workload;
            if let (Some(hint), Some(place)) = (hint, &entry.hint)
                && let Some(other) = hints.insert(hint.clone(), identity.clone()).filter(|it| it != identity)
            {
                let reason =
                    format!("the hint {hint:?} stands for {other} already, and a workload may be both");
                return Err(Error::at(place, reason));
            }
            let before = credentials.insert(identity.clone(), given.clone());
            if before.is_some_and(|before| before != *given) {
                let reason =
                    format!("{identity} has other credentials above; give each of its entries the same");
                return Err(Error::at(&entry.identity, reason));
            }
            all.push(workload);
        }
        Ok(Self(all))
    }

    /// Whom a process is, each identity once, in the order of the file.
    pub fn of(&self, facts: &Facts<'_>) -> Vec<(SpiffeId, Option<String>)> {
        let mut found: Vec<(SpiffeId, Option<String>)> = Vec::new();
        for workload in self.0.iter().filter(|workload| workload.matching.fits(facts)) {
            if !found.iter().any(|(id, _)| *id == workload.identity) {
                found.push((workload.identity.clone(), workload.hint.clone()));
            }
        }
        found
    }

    /// All that are named.
    pub fn identities(&self) -> BTreeSet<&SpiffeId> {
        self.0.iter().map(|workload| &workload.identity).collect()
    }

    /// Identities that are asked for with credentials of their own.
    pub fn credentials(&self) -> BTreeMap<SpiffeId, Credentials> {
        let with = |workload: &Workload| Some((workload.identity.clone(), workload.credentials.clone()?));
        self.0.iter().filter_map(with).collect()
    }

    /// Whether some entry asks for the file that a process runs, and whether one asks for its unit.
    pub fn asks_for(&self) -> (bool, bool) {
        let matching = || self.0.iter().map(|workload| &workload.matching);
        (matching().any(|it| it.binary.is_some()), matching().any(|it| it.unit.is_some()))
    }

    /// How many entries there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

impl Match {
    fn fits(&self, facts: &Facts<'_>) -> bool {
        self.uid.is_none_or(|uid| uid == facts.uid)
            && self.gid.is_none_or(|gid| gid == facts.gid)
            && self.binary.as_ref().is_none_or(|path| facts.binary == Some(path.as_path()))
            && self.unit.as_ref().is_none_or(|unit| facts.unit == Some(unit.as_str()))
    }
}

/// The unit of the system's manager that a process is part of, by its control groups as `/proc/PID/cgroup` has them
/// (systemd's own hierarchy, or the unified one). Slices are passed over, and what stands below a unit belongs to it: so a
/// user's own manager, and what that one calls units, is `user@<uid>.service`.
pub fn unit(control_groups: &str) -> Option<&str> {
    let path = |controllers: &str| {
        control_groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (named, path) = rest.split_once(':')?;
            (named == controllers).then_some(path)
        })
    };
    let found = match path("name=systemd") {
        Some(path) if path != "/" => path,
        _ => path("")?,
    };
    let first = found.strip_prefix('/')?.split('/').find(|part| !part.ends_with(".slice"))?;
    (first.ends_with(".service") || first.ends_with(".scope")).then_some(first)
}

fn hint(hint: &Spanned<String>) -> Result<String, Error> {
    let text = &hint.value;
    if text.is_empty() || text.len() > LONGEST_HINT {
        return Err(Error::at(
            hint,
            format!("a hint has 1 to {LONGEST_HINT} bytes, and this one {}", text.len()),
        ));
    }
    Ok(text.clone())
}

fn criteria(matching: &Spanned<Criteria>) -> Result<Match, Error> {
    let Criteria { uid, gid, binary, unit } = &matching.value;
    if uid.is_none() && gid.is_none() && binary.is_none() && unit.is_none() {
        let reason = "match says nothing, and every process would fit; name uid, gid, binary or unit";
        return Err(Error::at(matching, reason));
    }
    if let Some(path) = binary
        && !is_plain(&path.value)
    {
        let reason = format!(
            "the binary {} is no absolute path as the kernel writes it, without . and ..",
            path.value.display()
        );
        return Err(Error::at(path, reason));
    }
    if let Some(unit) = unit
        && !(unit.value.ends_with(".service") || unit.value.ends_with(".scope"))
    {
        let reason =
            format!("the unit {:?} is no service or scope; name it whole, such as web.service", unit.value);
        return Err(Error::at(unit, reason));
    }
    Ok(Match {
        uid: *uid,
        gid: *gid,
        binary: binary.as_ref().map(|path| path.value.clone()),
        unit: unit.as_ref().map(|unit| unit.value.clone()),
    })
}

/// Absolute, and as the kernel would write it.
fn is_plain(path: &Path) -> bool {
    let mut written = PathBuf::new();
    written
        .extend(path.components().filter(|part| matches!(part, Component::RootDir | Component::Normal(_))));
    path.is_absolute() && written.as_os_str() == path.as_os_str()
}

fn credentials_of(entry: &Entry) -> Result<Option<Credentials>, Error> {
    for path in entry.token_file.iter().chain(&entry.certificate) {
        if !path.value.is_absolute() {
            let reason = format!("{} is no absolute path", path.value.display());
            return Err(Error::at(path, reason));
        }
    }
    let token = entry.token_file.as_ref().map(|path| path.value.clone());
    let certificate = entry.certificate.as_ref().map(|path| path.value.clone());
    Ok((token.is_some() || certificate.is_some()).then_some(Credentials { token, certificate }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "
workloads:
- identity: spiffe://example.org/web
  hint: internal
  match: { uid: 1000, binary: /usr/bin/web }
- identity: spiffe://example.org/web
  match: { unit: web.service }
- identity: spiffe://example.org/batch
  match: { gid: 50 }
  tokenFile: /etc/batch/token
- identity: spiffe://example.org/all
  hint: external
  match: { uid: 1000 }
  certificate: /etc/all
";

    #[test]
    fn processes_are_whoever_they_fit() {
        let workloads = Workloads::parse(FILE.as_bytes()).unwrap();
        let web = Some(Path::new("/usr/bin/web"));
        for (facts, wanted) in [
            (Facts { uid: 1000, gid: 1, ..Facts::default() }, &["all external"][..]),
            (Facts { uid: 1000, binary: web, ..Facts::default() }, &["web internal", "all external"]),
            (Facts { uid: 1001, binary: web, ..Facts::default() }, &[]),
            (Facts { uid: 0, unit: Some("web.service"), ..Facts::default() }, &["web"]),
            (Facts { uid: 0, unit: Some("web2.service"), ..Facts::default() }, &[]),
            (
                Facts { uid: 1000, gid: 50, binary: web, unit: Some("web.service") },
                &["web internal", "batch", "all external"],
            ),
            (Facts { uid: 1, binary: Some(Path::new("/usr/bin/web2")), ..Facts::default() }, &[]),
        ] {
            let found: Vec<String> = workloads
                .of(&facts)
                .into_iter()
                .map(|(id, hint)| {
                    format!("{} {}", &id.path()[1..], hint.unwrap_or_default()).trim().to_owned()
                })
                .collect();
            assert_eq!(found, wanted, "{facts:?}");
        }
        let credentials = workloads.credentials();
        let named: Vec<_> = credentials.keys().map(|id| id.path()).collect();
        assert_eq!(named, ["/all", "/batch"]);
        assert_eq!(workloads.asks_for(), (true, true));
    }

    #[test]
    fn faults_have_their_line() {
        let mut wrong = Vec::new();
        let entry = |text: &str| format!("workloads:\n- identity: spiffe://example.org/a\n{text}");
        for (text, line, why) in [
            (String::new(), None, "empty"),
            ("[]".to_owned(), Some(1), "mapping"),
            ("workload: []".to_owned(), Some(1), "workload"),
            (entry(""), Some(2), "match"),
            (entry("  match:\n"), Some(3), "mapping"),
            (entry("  match: {}\n"), Some(3), "says nothing"),
            (entry("  match: { uid: }\n"), Some(3), ""),
            (entry("  match: { uid: -1 }\n"), Some(3), ""),
            (entry("  match: { uid: x }\n"), Some(3), ""),
            (entry("  match: { user: 1 }\n"), Some(3), "user"),
            (entry("  match: { binary: web }\n"), Some(3), "absolute"),
            (entry("  match: { binary: /usr/../web }\n"), Some(3), "absolute"),
            (entry("  match: { binary: /usr//web }\n"), Some(3), "absolute"),
            (entry("  match: { binary: /usr/./web }\n"), Some(3), "absolute"),
            (entry("  match: { binary: /usr/web/ }\n"), Some(3), "absolute"),
            (entry("  match: { unit: web }\n"), Some(3), "web.service"),
            (entry("  match: { uid: 1 }\n  hint: ''\n"), Some(4), "hint"),
            (entry("  match: { uid: 1 }\n  tokenFile: token\n"), Some(4), "absolute"),
            (entry("  match: { uid: 1 }\n  token: /a\n"), Some(4), "token"),
            (entry("  match: { uid: 1 }\n  match: { uid: 2 }\n"), Some(4), "match"),
            (
                "workloads:\n- identity: spiffe://example.org\n  match: { uid: 1 }\n".to_owned(),
                Some(2),
                "identity",
            ),
            (
                "workloads:\n- identity: https://example.org/a\n  match: { uid: 1 }\n".to_owned(),
                Some(2),
                "identity",
            ),
            (FILE.replace("external", "internal"), Some(12), "stands for"),
            (FILE.replacen("service }", "service }\n  tokenFile: /x", 1), Some(6), "other credentials"),
        ] {
            match Workloads::parse(text.as_bytes()) {
                Err(fault) if fault.to_string().contains(why) && (line.is_none() || fault.line == line) => {}
                other => wrong.push(format!("{text}: {:?}", other.map_err(|fault| fault.to_string()))),
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert_eq!(Workloads::parse(b"{}").unwrap().count(), 0);
        assert_eq!(Workloads::parse(b"workloads: []").unwrap().count(), 0);
    }

    #[test]
    fn a_unit_is_the_first_below_the_slices() {
        for (groups, wanted) in [
            ("0::/system.slice/web.service\n", Some("web.service")),
            ("0::/system.slice/web.service/payload\n", Some("web.service")),
            ("0::/system.slice/system-web.slice/web@1.service", Some("web@1.service")),
            ("0::/init.scope\n", Some("init.scope")),
            ("0::/user.slice/user-1000.slice/session-3.scope\n", Some("session-3.scope")),
            // What a user calls its units is no unit of the system.
            (
                "0::/user.slice/user-1000.slice/user@1000.service/app.slice/web.service",
                Some("user@1000.service"),
            ),
            ("12:cpu:/system.slice\n1:name=systemd:/system.slice/web.service\n0::/\n", Some("web.service")),
            ("1:name=systemd:/\n0::/system.slice/web.service\n", Some("web.service")),
            ("12:cpu:/system.slice/web.service\n0::/\n", None),
            ("0::/\n", None),
            ("0::/system.slice\n", None),
            ("0::/docker/0123\n", None),
            ("0::/docker/web.service\n", None),
            // Another namespace of control groups.
            ("0::/../web.service\n", None),
            ("0::/../../system.slice/web.service", None),
            ("", None),
            ("nonsense", None),
        ] {
            assert_eq!(unit(groups), wanted, "{groups}");
        }
    }
}
