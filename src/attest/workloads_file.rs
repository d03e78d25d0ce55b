//! A file that says which processes are which workloads, read again when it changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::sleep;

use super::{Attestor, Entitled, Refused};
use crate::core::workloads::{self, Facts, Workloads};
use crate::sys::files;
use crate::sys::peer::{self, Process};

/// A change is noticed this late.
const LOOK: Duration = Duration::from_secs(1);

/// Processes are whoever the file says.
pub struct WorkloadsFile {
    file: PathBuf,
    current: ArcSwap<Workloads>,
    changes: watch::Sender<()>,
}

impl WorkloadsFile {
    /// Reads the file. The error names it, the line, and what to do.
    pub fn open(file: &Path) -> Result<Self, String> {
        let current = ArcSwap::from_pointee(read(file)?);
        Ok(Self { file: file.to_owned(), current, changes: watch::Sender::new(()) })
    }

    /// As it is now.
    pub fn current(&self) -> Arc<Workloads> {
        self.current.load_full()
    }

    /// Takes changes of the file, for ever. One that cannot be read leaves what was there before.
    pub async fn follow(&self) {
        let shown = self.file.display();
        let with_credentials = self.current().credentials();
        let mut seen = None;
        loop {
            let stamp = files::stamp(&self.file);
            if seen != Some(stamp) {
                seen = Some(stamp);
                match read(&self.file) {
                    Ok(workloads) if workloads == *self.current() => {}
                    Ok(workloads) => {
                        if workloads.credentials() != with_credentials {
                            tracing::warn!(
                                file = %shown,
                                "other tokenFile and certificate entries are used from the next start on"
                            );
                        }
                        tracing::info!(file = %shown, entries = workloads.count(), "the changed workloads are in force");
                        self.current.store(Arc::new(workloads));
                        self.changes.send_replace(());
                    }
                    Err(fault) => {
                        tracing::error!(fault, "the changed workloads are not taken, those before stay");
                    }
                }
            }
            sleep(LOOK).await;
        }
    }
}

#[tonic::async_trait]
impl Attestor for WorkloadsFile {
    async fn attest(&self, caller: &Process) -> Result<Vec<Entitled>, Refused> {
        let workloads = self.current();
        let (binary, unit) = workloads.asks_for();
        let mut unknown = Vec::new();
        let mut found = |asked: bool, look: &dyn Fn() -> Result<Option<String>, peer::Error>| {
            if !asked {
                return None;
            }
            look().unwrap_or_else(|fault| {
                unknown.push(fault.to_string());
                None
            })
        };
        let run = found(binary, &|| Ok(caller.executable()?.into_os_string().into_string().ok()));
        let groups = found(unit, &|| caller.control_groups().map(Some));
        let facts = Facts {
            uid: caller.uid,
            gid: caller.gid,
            binary: run.as_deref().map(Path::new),
            unit: groups.as_deref().and_then(workloads::unit),
        };
        let entitled: Vec<_> =
            workloads.of(&facts).into_iter().map(|(id, hint)| Entitled { id, hint }).collect();
        // Whatever was read by its number was read of it, and it is still there to have it.
        if !caller.is_alive() {
            return Err(Refused::Unknown("it has ended".to_owned()));
        }
        if entitled.is_empty() {
            unknown.insert(0, format!("{} has no entry that fits it", self.file.display()));
            return Err(Refused::Unknown(unknown.join("; ")));
        }
        Ok(entitled)
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }
}

fn read(file: &Path) -> Result<Workloads, String> {
    let text = files::read(file, workloads::MAX as u64).map_err(|fault| fault.to_string())?;
    Workloads::parse(&text).map_err(|fault| format!("the workloads {}: {fault}", file.display()))
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests change files as other programs do")]
mod tests {
    use tokio::net::UnixStream;

    use super::*;
    use crate::sys::peer::Moment;

    fn write(file: &Path, what: &str) {
        let text = format!("workloads:\n- identity: spiffe://example.org/a\n  match: {{ {what} }}\n");
        std::fs::write(file, text).unwrap();
    }

    #[tokio::test]
    async fn we_are_who_the_file_says() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("workloads.yaml");
        let (one, _other) = UnixStream::pair().unwrap();
        let us = Process::at_other_end(&one, Moment::now()).unwrap();
        let ours = std::env::current_exe().unwrap();
        let ours = ours.display();
        for (what, fits) in [
            (format!("uid: {}", us.uid), true),
            (format!("uid: {}, gid: {}, binary: {ours}", us.uid, us.gid), true),
            (format!("uid: {}", us.uid + 1), false),
            (format!("gid: {}", us.gid + 1), false),
            ("binary: /bin/sh".to_owned(), false),
            (format!("binary: {ours}, unit: no.service"), false),
        ] {
            write(&file, &what);
            let attestor = WorkloadsFile::open(&file).unwrap();
            let found = attestor.attest(&us).await;
            assert_eq!(found.is_ok(), fits, "{what}: {found:?}");
        }
    }

    #[tokio::test]
    async fn a_changed_file_is_taken_if_it_is_good() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("workloads.yaml");
        std::fs::write(&file, "workloads: {}").unwrap();
        let fault = WorkloadsFile::open(&file).err().unwrap();
        assert!(fault.contains("workloads.yaml: line 1"), "{fault}");

        write(&file, "uid: 1");
        let attestor = WorkloadsFile::open(&file).unwrap();
        let mut changes = attestor.changes();
        let follow = attestor.follow();
        tokio::pin!(follow);
        let wait = Duration::from_secs(10);
        std::fs::write(&file, "broken: [").unwrap();
        assert!(tokio::time::timeout(LOOK * 2, &mut follow).await.is_err());
        assert!(!changes.has_changed().unwrap());
        assert_eq!(attestor.current().count(), 1);
        write(&file, "uid: 2");
        tokio::select! {
            () = &mut follow => {}
            changed = tokio::time::timeout(wait, changes.changed()) => changed.unwrap().unwrap(),
        }
        assert_eq!(attestor.current().of(&Facts { uid: 2, ..Facts::default() }).len(), 1);
    }
}
