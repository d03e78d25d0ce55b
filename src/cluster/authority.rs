//! The authority, kept in the cluster as Istio keeps it: the secret `cacerts`, else `istio-ca-secret`.
//!
//! A new root is made only where the cluster shows no trace of an earlier one. Which roots there were is written into the
//! ConfigMap `mica-authority` before anything is issued below them, and others are refused from then on.

mod home;
mod memory;
mod trace;
mod watching;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};
use zeroize::Zeroizing;

use super::Cluster;
use super::call::{Fault, jittered};
use super::events::{EventReason, Events, Severity};
use crate::core::authority_files::{self, CA_CERT, CA_KEY, CERT_CHAIN};
use crate::core::bundle::TrustBundle;
use crate::core::issuer::Issuer;
use crate::core::lifetime::Lifetime;
use crate::core::profile::Organization;
use crate::core::spiffe::TrustDomain;
use crate::store::{self, AuthorityStore, MAX_FILE, Made, ROOTS, fingerprints};
use crate::sys::dir::{Access, Dir};
use home::Home;
pub use memory::ClusterMemory;
use watching::Watching;

/// The CA that an operator brings. It counts, if it is there.
pub(super) const BROUGHT: &str = "cacerts";
/// The CA that Istio made, or Mica.
pub(super) const OWN: &str = "istio-ca-secret";
/// The roots that the cluster has known.
pub(super) const MARKER: &str = "mica-authority";
/// The type of [`OWN`].
const OWN_TYPE: &str = "istio.io/ca-root";
/// A key of a secret that says that Istio made it, so that it has Istio's shape.
const MADE_BY_ISTIO: &str = "istio-generated";

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// What no watch tells of is looked for this often.
const LOOK: Duration = Duration::from_secs(30);
/// So long after the last word of a change it is looked at.
const QUIET: Duration = Duration::from_millis(100);
/// Secrets are often replaced by deleting and creating them; one that comes again so soon was never gone.
const SETTLE: Duration = Duration::from_secs(3);

/// Why the cluster's authority is not used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// There was one.
    #[error(
        "the authority is gone: neither the secret {BROUGHT} nor {OWN} is in the namespace {namespace}, but {trace} shows that this cluster had one; restore the secret from a backup, or see \"Switching to another root\" in docs/operations.md: every identity is then issued again"
    )]
    Lost {
        /// Where it was.
        namespace: String,
        /// What shows it.
        trace: String,
    },
    /// It is there and cannot be used.
    #[error(
        "the secret {secret} in the namespace {namespace} cannot be used: {fault}; mend it, or restore it from a backup: mica makes no new root in its place"
    )]
    Secret {
        /// Where it is.
        namespace: String,
        /// Its name.
        secret: &'static str,
        /// What is wrong with it.
        fault: String,
    },
    /// It has another root.
    #[error(
        "the root has changed: {witness} has known {known}, and {place} now brings {brought}; workloads that trust the old root would refuse the new one. Bring a CA below the old root, or see \"Switching to another root\" in docs/operations.md: every identity is then issued again"
    )]
    ChangedRoot {
        /// Who says so.
        witness: String,
        /// Fingerprints of the roots known.
        known: String,
        /// Where the new one comes from.
        place: String,
        /// Fingerprints of the roots brought.
        brought: String,
    },
    /// What was remembered cannot be read.
    #[error(
        "the ConfigMap {MARKER} in the namespace {namespace} cannot be read: {fault}; it holds the roots that this cluster has known: restore it, or, if the CA is surely the right one, delete the ConfigMap, which mica then writes anew"
    )]
    Marker {
        /// Where it is.
        namespace: String,
        /// What is wrong with it.
        fault: String,
    },
    /// There is no place for it.
    #[error("there is no namespace {namespace}; create it, or name another with --namespace")]
    NoNamespace {
        /// Which.
        namespace: String,
    },
    /// An earlier run kept its authority elsewhere.
    #[error(
        "{folder} is an authority of its own, and with --kube the authority is kept in the cluster: give --authority {folder} to go on with it, or another --data-dir, or move it away to use the cluster's"
    )]
    Folder {
        /// The authority's folder.
        folder: String,
    },
    /// The API server says that it can never be.
    #[error("{0}")]
    Wrong(String),
}

impl From<AuthorityError> for store::Error {
    fn from(error: AuthorityError) -> Self {
        Self::Elsewhere(Box::new(error))
    }
}

/// Why a try did not end with an issuer.
enum Failure {
    Final(store::Error),
    Later(Fault),
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        Self::Final(error)
    }
}

impl From<AuthorityError> for Failure {
    fn from(error: AuthorityError) -> Self {
        Self::Final(error.into())
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Wrong(fault) => AuthorityError::Wrong(fault).into(),
            fault => Self::Later(fault),
        }
    }
}

/// What is asked again and again, more and more slowly.
struct Tries {
    pause: Duration,
}

impl Default for Tries {
    fn default() -> Self {
        Self { pause: FIRST_PAUSE }
    }
}

impl Tries {
    /// Waits after one that was of no avail.
    async fn after(&mut self, fault: &Fault) {
        match fault {
            Fault::Denied(_) => tracing::error!(%fault, "the authority cannot be read; trying again"),
            _ => tracing::warn!(%fault, "the authority cannot be read yet; trying again"),
        }
        let mut wait = jittered(self.pause);
        if let Fault::Away(_, Some(after)) = fault {
            wait = wait.max(jittered((*after).min(LOOK)));
        }
        sleep(wait).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

/// An authority in the cluster.
pub struct ClusterStore {
    kept: Kept,
    tellings: Arc<Events>,
    watching: Watching,
    next_look: Instant,
    /// Since when a secret that was there is not.
    missing: Option<Instant>,
}

/// How istio-ca 0.2.10 kept its authority: in `istio-ca-secret` alone, within rights that know no ConfigMaps.
#[derive(Clone, Debug)]
pub struct AsIstioCa {
    /// Of a root that is made.
    pub organization: Organization,
    /// Of a root that is made.
    pub lifetime: Lifetime,
}

/// What is kept, where, and what is known of it.
struct Kept {
    home: Home,
    data: Dir,
    /// What this process has issued below, whatever becomes of the cluster.
    known: Option<TrustBundle>,
    /// The versions of what was last loaded.
    seen: Option<Versions>,
    /// The only namespace beside that one which may be read.
    only: Option<Arc<str>>,
    as_istio_ca: Option<AsIstioCa>,
}

impl ClusterStore {
    /// Takes the data folder, whose lock the caller holds.
    pub fn new(cluster: &Cluster, tellings: Arc<Events>, data: Dir) -> Self {
        let (home, only) = (Home::new(cluster), cluster.only.clone());
        let watching = Watching::new(&home.client, &home.namespace, [BROUGHT, OWN]);
        let kept = Kept { home, data, only, known: None, seen: None, as_istio_ca: None };
        Self { kept, tellings, watching, next_look: Instant::now() + LOOK, missing: None }
    }

    /// Tells of it beside the secret.
    fn tell(&self, error: &store::Error) {
        // Which has no right to.
        if self.kept.as_istio_ca.is_some() {
            return;
        }
        let is_brought = self.kept.seen.as_ref().is_some_and(|[brought, ..]| brought.is_some());
        let secret = self.kept.home.reference("Secret", if is_brought { BROUGHT } else { OWN });
        self.tellings.tell(&secret, Severity::Warning, EventReason::AuthorityUnusable, error.to_string());
    }

    /// Keeps it as istio-ca did.
    pub fn as_istio_ca(mut self, how: AsIstioCa) -> Self {
        self.kept.as_istio_ca = Some(how);
        self
    }
}

impl Kept {
    async fn attempt(&mut self, trust_domain: &TrustDomain) -> Result<Issuer, Failure> {
        let folder = self.data.path().join(store::FOLDER);
        if self.data.find(store::FOLDER).map_err(store::Error::from)?.is_some() {
            return Err(AuthorityError::Folder { folder: folder.display().to_string() }.into());
        }
        let mut trace: Option<String> = None;
        loop {
            let looked = self.look().await?;
            self.seen = Some(looked.versions());
            let marked = looked.marker.as_ref().map(|marker| self.home.roots_of(marker)).transpose()?;
            if let Some((name, secret)) = looked.secret() {
                let issuer = self.read(name, secret, trust_domain)?;
                self.check(name, &issuer, marked.as_ref())?;
                if marked.is_none() && self.as_istio_ca.is_none() {
                    self.home.mark(issuer.bundle()).await?;
                }
                self.publish(issuer.bundle())?;
                self.known = Some(TrustBundle::clone(issuer.bundle()));
                return Ok(issuer);
            }
            // Who made the trace may have made the secret a moment after it was looked for.
            if let Some(trace) = trace {
                return Err(AuthorityError::Lost { namespace: self.home.namespace.clone(), trace }.into());
            }
            trace = match marked {
                Some(_) => Some(format!("the ConfigMap {MARKER} there")),
                None => self.trace().await?,
            };
            if trace.is_none() {
                self.make(trust_domain).await?;
            }
        }
    }

    /// Whether a secret that was there is not.
    fn misses_one(&self, looked: &Looked) -> bool {
        let [brought, own, _] = self.seen.clone().unwrap_or_default();
        brought.is_some() && looked.brought.is_none() || own.is_some() && looked.own.is_none()
    }

    async fn look(&self) -> Result<Looked, Fault> {
        if self.as_istio_ca.is_some() {
            return Ok(Looked { brought: None, own: self.home.get("secrets", OWN).await?, marker: None });
        }
        Ok(Looked {
            brought: self.home.get("secrets", BROUGHT).await?,
            own: self.home.get("secrets", OWN).await?,
            marker: self.home.get("configmaps", MARKER).await?,
        })
    }

    fn read(
        &self,
        name: &'static str,
        secret: &Secret,
        trust_domain: &TrustDomain,
    ) -> Result<Issuer, AuthorityError> {
        let bad = |fault: String| AuthorityError::Secret {
            namespace: self.home.namespace.clone(),
            secret: name,
            fault,
        };
        let kind = secret.type_.as_deref().unwrap_or_default();
        if name == OWN && kind != OWN_TYPE {
            return Err(bad(format!(
                "its type is {kind:?}, not {OWN_TYPE:?}, so somebody else keeps something there"
            )));
        }
        authority_files::issuer(&files(name, secret), None, trust_domain)
            .map_err(|fault| bad(fault.to_string()))
    }

    fn check(
        &self,
        secret: &'static str,
        issuer: &Issuer,
        marked: Option<&TrustBundle>,
    ) -> Result<(), store::Error> {
        let published = self.published()?;
        let witnesses = [
            (self.known.as_ref(), "this process".to_owned()),
            (marked, self.home.marker()),
            (published.as_ref(), self.data.path().join(ROOTS).display().to_string()),
        ];
        for (known, witness) in witnesses {
            if let Some(known) = known.filter(|known| !known.same_roots(issuer.bundle())) {
                return Err(AuthorityError::ChangedRoot {
                    witness,
                    known: fingerprints(known),
                    place: format!("the secret {secret} in the namespace {}", self.home.namespace),
                    brought: fingerprints(issuer.bundle()),
                }
                .into());
            }
        }
        Ok(())
    }

    /// Makes a root and keeps it in the cluster, unless somebody else has done so meanwhile.
    async fn make(&self, trust_domain: &TrustDomain) -> Result<(), Failure> {
        let Made { key, root_pem, .. } = match &self.as_istio_ca {
            Some(how) => Made::of(trust_domain, &how.organization, how.lifetime)?,
            None => Made::new(trust_domain)?,
        };
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "type": OWN_TYPE,
            "metadata": {"name": OWN, "namespace": self.home.namespace},
            // As Istio writes it: the root alone, and the other names empty.
            "stringData": {
                CA_CERT: root_pem, CA_KEY: key.to_pem().as_str(), CERT_CHAIN: "", "key.pem": "", ROOTS: "",
            },
        });
        if self.home.create("secrets", OWN, &secret).await? {
            tracing::info!(namespace = self.home.namespace, secret = OWN, "a new root was made");
        }
        Ok(())
    }

    /// The roots published in the data folder. What cannot be read is no witness.
    fn published(&self) -> Result<Option<TrustBundle>, store::Error> {
        match self.data.read(ROOTS, MAX_FILE) {
            Ok((text, _)) => Ok(TrustBundle::from_pem(&text).ok()),
            Err(e) if e.is_absent() => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn publish(&self, bundle: &TrustBundle) -> Result<(), store::Error> {
        let pem = bundle.pem().as_bytes();
        match self.data.read(ROOTS, MAX_FILE) {
            Ok((text, _)) if *text == *pem => Ok(()),
            Err(e) if !e.is_absent() => Err(e.into()),
            _ => Ok(self.data.replace(ROOTS, pem, Access::mode(0o644))?),
        }
    }
}

impl AuthorityStore for ClusterStore {
    /// Waits for as long as the API server does not answer.
    async fn load(&mut self, trust_domain: &TrustDomain) -> Result<Issuer, store::Error> {
        let mut tries = Tries::default();
        loop {
            match self.kept.attempt(trust_domain).await {
                Ok(issuer) => return Ok(issuer),
                Err(Failure::Later(fault)) => tries.after(&fault).await,
                Err(Failure::Final(error)) => {
                    self.tell(&error);
                    self.tellings.flush().await;
                    return Err(error);
                }
            }
        }
    }

    async fn changed(&mut self) {
        loop {
            tokio::select! {
                () = self.watching.next() => {
                    // What comes together is looked at once.
                    let quiet = async { while timeout(QUIET, self.watching.next()).await.is_ok() {} };
                    let _ = timeout(SETTLE, quiet).await;
                }
                () = tokio::time::sleep_until(self.next_look) => {}
            }
            self.next_look = Instant::now() + jittered(LOOK);
            match self.kept.look().await {
                Ok(looked) if self.kept.seen.as_ref() == Some(&looked.versions()) => self.missing = None,
                Ok(looked) if !self.kept.misses_one(&looked) => {
                    self.missing = None;
                    return;
                }
                Ok(_) => {
                    let until = *self.missing.get_or_insert_with(Instant::now) + SETTLE;
                    if Instant::now() >= until {
                        self.missing = None;
                        return;
                    }
                    self.next_look = until;
                }
                // What is there stays; the watches say more of it.
                Err(fault) => {
                    tracing::debug!(%fault, "the authority cannot be looked at");
                    self.next_look = Instant::now() + jittered(LONGEST_PAUSE);
                }
            }
        }
    }
}

/// What is in the cluster.
struct Looked {
    brought: Option<Secret>,
    own: Option<Secret>,
    marker: Option<ConfigMap>,
}

/// Tells one state of an object from every other; none if it is not there.
type Version = Option<(Option<String>, Option<String>)>;
type Versions = [Version; 3];

impl Looked {
    /// The secret that counts.
    fn secret(&self) -> Option<(&'static str, &Secret)> {
        match (&self.brought, &self.own) {
            (Some(secret), _) => Some((BROUGHT, secret)),
            (None, Some(secret)) => Some((OWN, secret)),
            (None, None) => None,
        }
    }

    fn versions(&self) -> Versions {
        let meta = [
            self.brought.as_ref().map(|object| &object.metadata),
            self.own.as_ref().map(|object| &object.metadata),
            self.marker.as_ref().map(|object| &object.metadata),
        ];
        meta.map(|meta| meta.map(|meta| (meta.uid.clone(), meta.resource_version.clone())))
    }
}

/// What is in a secret. Where Istio made it, what it leaves empty is what it means: the root is the CA itself.
fn files(name: &str, secret: &Secret) -> BTreeMap<String, Zeroizing<Vec<u8>>> {
    let mut files: BTreeMap<_, Zeroizing<Vec<u8>>> = secret
        .data
        .iter()
        .flatten()
        .map(|(name, bytes)| (name.clone(), Zeroizing::new(bytes.0.clone())))
        .collect();
    if name == OWN || files.contains_key(MADE_BY_ISTIO) {
        let is_empty = |name: &str| files.get(name).is_none_or(|bytes| bytes.trim_ascii().is_empty());
        if let Some(root) = files.get(CA_CERT).filter(|_| is_empty(ROOTS)).cloned() {
            files.insert(ROOTS.to_owned(), root);
        }
        files.entry(CERT_CHAIN.to_owned()).or_default();
    }
    files
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    fn secret(data: &[(&str, &str)]) -> Secret {
        let data = data.iter().map(|(name, text)| ((*name).to_owned(), ByteString(text.as_bytes().to_vec())));
        Secret { data: Some(data.collect()), ..Secret::default() }
    }

    #[test]
    fn what_istio_leaves_empty_is_the_ca_itself() {
        let text = |name: &str, data: &[(&str, &str)], file: &str| {
            files(name, &secret(data)).get(file).map(|bytes| String::from_utf8(bytes.to_vec()).unwrap())
        };
        let some = |text: &str| Some(text.to_owned());
        let first = [(CA_CERT, "ca"), (CA_KEY, "key")];
        let later = [(CA_CERT, "ca"), (CA_KEY, "key"), (CERT_CHAIN, ""), ("key.pem", ""), (ROOTS, "")];
        for data in [&first[..], &later] {
            assert_eq!(text(OWN, data, ROOTS), some("ca"));
            assert_eq!(text(OWN, data, CERT_CHAIN), some(""));
        }
        assert_eq!(text(OWN, &[(CA_CERT, "ca"), (ROOTS, "root")], ROOTS), some("root"));
        // An operator's has to be whole.
        assert_eq!(text(BROUGHT, &later, ROOTS), some(""));
        assert_eq!(text(BROUGHT, &first, CERT_CHAIN), None);
        let generated = [(CA_CERT, "ca"), (CA_KEY, "key"), (MADE_BY_ISTIO, "")];
        assert_eq!(text(BROUGHT, &generated, ROOTS), some("ca"));
    }
}
