//! Identities in folders, for programs that read files.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use zeroize::Zeroizing;

use super::held::{Bundles, Svid};
use super::{Agent, Consumer};
use crate::core::bundle::TrustBundle;
use crate::core::certificate::Certificate;
use crate::core::key::PrivateKey;
use crate::core::plan::{self, CertificateSet};
use crate::core::rotation::{renew_at, retry_after};
use crate::core::spiffe::SpiffeId;
use crate::sink::folder::Single;
use crate::sink::{self, Found};
use crate::sys::clock;
use crate::sys::dir::Access;
use crate::sys::process::{self, Signal};
use crate::trace::Span;

/// Damage is noticed this late,
const LOOK: Duration = Duration::from_secs(3);
/// and where there are many folders later, so that looking at one takes a small part of this time.
const LOOK_AT_EACH: Duration = Duration::from_millis(40);
/// Readers of the set before have this long to read what they have opened.
const READERS: Duration = Duration::from_secs(1);

/// How files are written, and who is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many folders there are,
    pub folders: u32,
    /// and since when they are looked at, all at the same times, so that looking wakes the agent once and not for each.
    pub since: Instant,
    /// Of the files.
    pub access: Access,
    /// What chain, key and trust bundle are called, if not as Istio calls them.
    pub names: Option<[String; 3]>,
    /// After each change.
    pub told: Option<Told>,
}

/// Who is told that files have changed.
#[derive(Clone, Debug)]
pub enum Told {
    /// A program with its arguments, run without a shell.
    Program(Vec<OsString>),
    /// The process whose number a file holds.
    Process(PathBuf, Signal),
}

/// The folder of one identity.
pub struct Folder {
    path: PathBuf,
    options: Options,
    single: Single,
}

impl Folder {
    /// Opens the folder, or makes it.
    pub fn open(path: PathBuf, options: Options) -> Result<Self, sink::Error> {
        let single = Single::open(&path, options.access, options.names.clone())?;
        Ok(Self { path, options, single })
    }

    /// Holds what is there already, if peers would take it, so that a start asks the authority for nothing that is not
    /// due. `expected` is whose it has to be.
    pub fn take_over(&self, agent: &Agent, expected: Option<&SpiffeId>) -> Option<SpiffeId> {
        let shown = self.path.display();
        let set = match self.single.read() {
            Ok(Found::Set(found)) => found.set,
            Ok(Found::Damaged(why)) => {
                tracing::info!(folder = %shown, why, "what is in the folder cannot be taken over");
                return None;
            }
            Ok(_) => return None,
            Err(fault) => {
                tracing::warn!(folder = %shown, %fault, "the folder cannot be read");
                return None;
            }
        };
        match read(&set, expected) {
            Ok((svid, roots)) => {
                tracing::info!(folder = %shown, identity = %svid.id, "certificate taken over");
                let id = svid.id.clone();
                agent.held.pin(&id);
                agent.held.put_bundles(Bundles::new(id.trust_domain().clone(), roots));
                agent.held.put(Arc::new(svid));
                Some(id)
            }
            Err(why) => {
                tracing::info!(folder = %shown, why, "what is in the folder is not taken over");
                None
            }
        }
    }

    /// Writes one identity for ever. `None` is the agent's own, whoever that turns out to be.
    pub async fn keep(mut self, agent: Arc<Agent>, id: Option<SpiffeId>) {
        let id = match id {
            Some(id) => id,
            None => match agent.own().wait_for(Option::is_some).await.map(|own| own.clone()) {
                Ok(Some(id)) => id,
                _ => return,
            },
        };
        let consumer = agent.holders.join(&id);
        let (mut svid, mut bundles) = (agent.held.pin(&id), agent.held.bundles());
        let mut written: Option<CertificateSet> = None;
        // Of the folder when it was last found to hold what was written.
        let mut stamp: Option<u64> = None;
        let mut failures = 0;
        let look = LOOK.max(LOOK_AT_EACH.saturating_mul(self.options.folders));
        let since = self.options.since;
        let next_look = move || {
            let past = since.elapsed().as_secs_f64() % look.as_secs_f64();
            Instant::now() + look - Duration::from_secs_f64(past)
        };
        loop {
            let wanted = {
                let (svid, bundles) = (svid.borrow_and_update(), bundles.borrow_and_update());
                match (&*svid, &*bundles) {
                    (Some(svid), Some(bundles)) => {
                        set_of(svid, bundles).map(|set| (set, svid.clone(), bundles.clone()))
                    }
                    _ => None,
                }
            };
            let mut next = next_look();
            if let Some((wanted, svid, bundles)) = wanted {
                let before = self.single.stamp();
                let was_awaited = written.as_ref().is_none_or(|set| set.chain_pem != wanted.chain_pem);
                let span = || agent.delivery(&svid, was_awaited);
                match self.write(&wanted, &bundles, &consumer, written.as_ref(), span).await {
                    Ok(was_there) => {
                        (written, failures) = (Some(wanted), 0);
                        stamp = before.filter(|_| was_there);
                    }
                    Err(fault) => {
                        stamp = None;
                        failures += 1;
                        let wait = retry_after(failures, None, 0);
                        tracing::error!(folder = %self.path.display(), %fault, "the files cannot be written");
                        agent.metrics.file_failure();
                        next = Instant::now() + wait;
                    }
                }
            }
            loop {
                tokio::select! {
                    changed = svid.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    changed = bundles.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    () = sleep_until(next) => {}
                }
                if stamp.is_none() || self.single.stamp() != stamp {
                    break;
                }
                next = next_look();
            }
        }
    }

    /// Writes a set, unless it is there: then the answer is true.
    async fn write(
        &mut self,
        wanted: &CertificateSet,
        bundles: &Bundles,
        consumer: &Consumer,
        written: Option<&CertificateSet>,
        span: impl FnOnce() -> Span,
    ) -> Result<bool, sink::Error> {
        if !self.single.is_in_its_place() {
            self.single = Single::open(&self.path, self.options.access, self.options.names.clone())?;
        }
        let why = match self.single.read()? {
            Found::Set(found) if found.set == *wanted && found.marked && found.loose.is_none() => None,
            _ if written != Some(wanted) => Some("changed".to_owned()),
            Found::Damaged(what) => Some(what),
            Found::Set(found) => Some(found.loose.unwrap_or_else(|| "others have changed it".to_owned())),
            _ => Some("it was gone".to_owned()),
        };
        let Some(why) = why else { return Ok(true) };
        let mut span = span();
        span.set("mica.folder", self.path.display());
        self.single.publish(wanted).inspect_err(|_| span.fail("file"))?;
        tracing::info!(folder = %self.path.display(), why, "files written");
        if let Some(roots) = bundles.roots() {
            consumer.given(&bundles.own, roots.digest());
        }
        if let Some(told) = &self.options.told
            && let Err(fault) = tell(told).await
        {
            tracing::error!(fault, "the files have changed, and who is to be told was not");
        }
        drop(span);
        tokio::time::sleep(READERS).await;
        self.single.tidy().map(|()| false)
    }
}

async fn tell(told: &Told) -> Result<(), String> {
    match told {
        Told::Program(words) => match words.split_first() {
            Some((program, arguments)) => process::run(program, arguments).await,
            None => Ok(()),
        },
        Told::Process(file, signal) => process::signal(file, *signal),
    }
}

fn set_of(svid: &Svid, bundles: &Bundles) -> Option<CertificateSet> {
    let roots = bundles.domains.get(svid.id.trust_domain())?.x509.as_ref()?;
    Some(CertificateSet {
        chain_pem: svid.chain.iter().map(Certificate::to_pem).collect(),
        key_pem: svid.key.to_pem(),
        roots_pem: roots.pem().clone(),
    })
}

fn read(set: &CertificateSet, expected: Option<&SpiffeId>) -> Result<(Svid, TrustBundle), String> {
    let roots = TrustBundle::from_pem(set.roots_pem.as_bytes()).map_err(|fault| fault.to_string())?;
    let chain = Certificate::all_from_pem(set.chain_pem.as_bytes()).map_err(|fault| fault.to_string())?;
    let leaf = chain.first().ok_or("there is no certificate")?;
    let id = leaf.spiffe_id().map_err(|fault| fault.to_string())?;
    let now = clock::now();
    if expected.is_some_and(|expected| *expected != id) {
        return Err(format!("it is of {id}"));
    }
    // Its roots may be written another way than Mica's own.
    let normal = CertificateSet {
        chain_pem: set.chain_pem.clone(),
        key_pem: Zeroizing::new(set.key_pem.to_string()),
        roots_pem: roots.pem().clone(),
    };
    plan::judge(&normal, &id, &roots, now)?;
    let key = PrivateKey::from_pem(set.key_pem.as_bytes(), None, None).map_err(|fault| fault.to_string())?;
    let renew_at = renew_at(leaf.validity, &leaf.serial);
    Ok((Svid { id, chain, key: Arc::new(key), renew_at, trace: None }, roots))
}
