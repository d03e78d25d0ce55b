//! The policy in force: a file that is read again when it changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch::{Receiver, Sender};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::core::policy::{self, Limits, Policy};
use crate::sys::files;
use crate::sys::watch::Watcher;

/// Editors and volumes change a file in several steps; this long after the last one it is read,
const SETTLE: Duration = Duration::from_millis(300);
/// but no later than this after the first.
const PATIENCE: Duration = Duration::from_secs(2);
/// What no event tells of, such as a link whose target was changed elsewhere, is looked for this often.
const LOOK: Duration = Duration::from_secs(3);

/// A policy that may change, and is always a good one.
#[derive(Debug)]
pub struct LivingPolicy {
    current: ArcSwap<Policy>,
    changes: Sender<()>,
    file: Option<PathBuf>,
    limits: Limits,
    failures: Counter,
    stale: Gauge,
}

impl LivingPolicy {
    /// Reads the file, if there is one. The error names it, the line, and what to do.
    pub fn open(file: Option<&Path>, limits: Limits) -> Result<Self, String> {
        let policy = match file {
            None => Policy::new(&limits).map_err(|fault| fault.to_string())?,
            Some(file) => read(file).and_then(|text| parse(file, &text, &limits))?,
        };
        Ok(Self {
            current: ArcSwap::from_pointee(policy),
            changes: Sender::new(()),
            file: file.map(Path::to_owned),
            limits,
            failures: Counter::default(),
            stale: Gauge::default(),
        })
    }

    /// As it is now. Whoever decides takes it once, so that a decision is of one policy.
    pub fn current(&self) -> Arc<Policy> {
        self.current.load_full()
    }

    /// Tells of each change, once it is in force.
    pub fn changes(&self) -> Receiver<()> {
        self.changes.subscribe()
    }

    /// Registers its metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "mica_policy_reload_failures",
            "Changes of the policy that were not taken",
            self.failures.clone(),
        );
        registry.register(
            "mica_policy_stale",
            "1 while the policy file is not what is in force",
            self.stale.clone(),
        );
    }

    /// Takes changes of the file, for ever.
    pub async fn follow(&self) {
        let Some(file) = &self.file else { return std::future::pending().await };
        let mut seen = None;
        loop {
            let named = file.clone();
            // A file system may hang.
            let looked = spawn_blocking(move || {
                // Before the file is read, so that a change in between is seen.
                let watcher = watch(&named);
                (watcher, read(&named))
            });
            let (watcher, found) = looked.await.unwrap_or_else(|fault| (None, Err(fault.to_string())));
            if seen.as_ref() != Some(&found) {
                self.take(file, &found);
                seen = Some(found);
            }
            changed(watcher).await;
        }
    }

    fn take(&self, file: &Path, found: &Result<Vec<u8>, String>) {
        let parsed = found.as_ref().map_err(Clone::clone).and_then(|text| parse(file, text, &self.limits));
        match parsed {
            Ok(policy) => {
                self.stale.set(0);
                if policy != **self.current.load() {
                    self.current.store(Arc::new(policy));
                    self.changes.send_replace(());
                    tracing::info!(file = %file.display(), "the changed policy is in force");
                }
            }
            Err(fault) => {
                self.failures.inc();
                self.stale.set(1);
                tracing::error!(fault, "the changed policy is not taken, the one before stays");
            }
        }
    }
}

fn read(file: &Path) -> Result<Vec<u8>, String> {
    match files::read(file, policy::MAX as u64) {
        Ok(text) => Ok(text.to_vec()),
        Err(fault) => Err(fault.to_string()),
    }
}

fn parse(file: &Path, text: &[u8], limits: &Limits) -> Result<Policy, String> {
    Policy::parse(text, limits).map_err(|fault| format!("the policy {}: {fault}", file.display()))
}

/// The folder tells of renames, which is how whole files come, and of a ConfigMap's `..data`.
fn watch(file: &Path) -> Option<Watcher<()>> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut watcher = Watcher::new().ok()?;
    watcher.watch(folder.unwrap_or(Path::new(".")), ()).ok()?;
    Some(watcher)
}

async fn changed(watcher: Option<Watcher<()>>) {
    let Some(mut watcher) = watcher else { return sleep(LOOK).await };
    if timeout(LOOK, watcher.next()).await.is_ok() {
        let quiet = async { while timeout(SETTLE, watcher.next()).await.is_ok() {} };
        // An error means that it never was.
        let _ = timeout(PATIENCE, quiet).await;
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests change files as other programs do")]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::core::caller::{Caller, Proof};
    use crate::core::policy::Ask;
    use crate::core::spiffe::ServiceAccount;
    use crate::sys::clock;

    fn limits() -> Limits {
        let [lifetime, longest] = ["24h", "90d"].map(|text| text.parse().unwrap());
        Limits { lifetime, longest, own_names: Vec::new() }
    }

    /// What is granted when nothing is asked for.
    fn granted(policy: &LivingPolicy) -> String {
        let account = ServiceAccount::new("a", "b").unwrap();
        let caller = Caller { account, proof: Proof::Oidc { issuer: "".into() } };
        let ask = Ask {
            caller: &caller,
            impersonated: None,
            key: None,
            dns: &[],
            lifetime: None,
            now: clock::now(),
        };
        policy.current().decide(&ask).unwrap().lifetime.value.to_string()
    }

    async fn until(policy: &LivingPolicy, what: &str, condition: impl Fn() -> bool) {
        let waited = timeout(Duration::from_secs(10), async {
            while !condition() {
                sleep(Duration::from_millis(20)).await;
            }
        });
        tokio::select! {
            () = policy.follow() => {}
            waited = waited => waited.unwrap_or_else(|_| panic!("waited in vain for {what}")),
        }
    }

    #[tokio::test]
    async fn a_changed_file_counts_and_a_bad_one_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        fs::write(&file, "lifetime: 1h\n").unwrap();
        let policy = LivingPolicy::open(Some(&file), limits()).unwrap();
        assert_eq!(granted(&policy), "1h");
        fs::write(&file, "lifetime: 2h\n").unwrap();
        until(&policy, "the change", || granted(&policy) == "2h").await;
        assert_eq!((policy.failures.get(), policy.stale.get()), (0, 0));

        fs::write(&file, "lifetim: 3h\n").unwrap();
        until(&policy, "a failure", || policy.stale.get() == 1).await;
        assert_eq!(granted(&policy), "2h");
        fs::remove_file(&file).unwrap();
        until(&policy, "another", || policy.failures.get() >= 2).await;
        assert_eq!(granted(&policy), "2h");

        let next = folder.path().join("next");
        fs::write(&next, "lifetime: 4h\n").unwrap();
        fs::rename(&next, &file).unwrap();
        until(&policy, "the next", || granted(&policy) == "4h").await;
        assert_eq!(policy.stale.get(), 0);
    }

    #[tokio::test]
    async fn a_config_map_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let set = |name: &str, text: &str| {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("policy.yaml"), text).unwrap();
            symlink(name, folder.path().join("..new")).unwrap();
            fs::rename(folder.path().join("..new"), folder.path().join("..data")).unwrap();
        };
        set("..1", "lifetime: 1h\n");
        let file = folder.path().join("policy.yaml");
        symlink("..data/policy.yaml", &file).unwrap();
        let policy = LivingPolicy::open(Some(&file), limits()).unwrap();
        assert_eq!(granted(&policy), "1h");
        set("..2", "lifetime: 2h\n");
        until(&policy, "the swap", || granted(&policy) == "2h").await;
    }

    #[test]
    fn a_bad_or_missing_file_is_no_start() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        let fault = LivingPolicy::open(Some(&file), limits()).unwrap_err();
        assert!(fault.contains("policy.yaml") && fault.contains("no such file"), "{fault}");
        fs::write(&file, "deny: true\nkey: [p256]\n").unwrap();
        let fault = LivingPolicy::open(Some(&file), limits()).unwrap_err();
        assert!(fault.contains("policy.yaml: line 2: unknown field"), "{fault}");
    }
}
