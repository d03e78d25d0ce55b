//! Fetches the bundles of other trust domains, keeps the newest of each, and gives it to the authority's followers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use ring::digest::{SHA256, digest};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring::default_provider;
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::authority::Authority;
use crate::core::bundle::{self, TrustBundle};
use crate::core::certificate::Certificate;
use crate::core::chain;
use crate::core::federation::{self, Foreign, MAX, MAX_BUNDLE, Next, Profile};
use crate::core::published::Published;
use crate::core::rotation::retry_after;
use crate::core::spiffe::{SpiffeId, TrustDomain};
use crate::sys::dir::{Access, Dir};
use crate::sys::fetch::{self, Trust};
use crate::sys::{clock, files, keys};

/// Within the data folder: what was fetched last.
const FOLDER: &str = "federation";
/// The file that says whose bundles are fetched is read this often.
const LOOK: Duration = Duration::from_secs(3);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    trust_domain: String,
    outcome: &'static str,
}

/// What is known of other trust domains.
#[derive(Debug, Default)]
pub struct Fetched {
    fetches: Family<Outcome, Counter>,
    /// When each was last fetched.
    at: Mutex<BTreeMap<TrustDomain, OffsetDateTime>>,
}

impl Fetched {
    /// Registers it.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        registry.register(
            "mica_federation_fetches",
            "Looks for the bundles of other trust domains, by what became of them",
            self.fetches.clone(),
        );
        registry.register_collector(Box::new(Age(self.clone())));
    }

    fn count(&self, domain: &TrustDomain, outcome: &'static str) {
        self.fetches.get_or_create(&Outcome { trust_domain: domain.to_string(), outcome }).inc();
    }

    fn at(&self) -> MutexGuard<'_, BTreeMap<TrustDomain, OffsetDateTime>> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What depends on the time of the scrape.
#[derive(Debug)]
struct Age(Arc<Fetched>);

impl Collector for Age {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let at = self.0.at();
        if at.is_empty() {
            return Ok(());
        }
        let now = clock::now();
        let help = "Seconds since the bundle of another trust domain was last fetched";
        let kind = ConstGauge::new(0i64).metric_type();
        let mut family = encoder.encode_descriptor("mica_federation_age_seconds", help, None, kind)?;
        for (domain, at) in at.iter() {
            let labels = [("trust_domain", domain.as_str())];
            ConstGauge::new((now - *at).whole_seconds()).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Fetches for ever.
pub struct Fetcher {
    authority: Arc<Authority>,
    data: Dir,
    file: PathBuf,
    fetched: Arc<Fetched>,
    /// As it was last taken.
    said: Vec<u8>,
    domains: BTreeMap<TrustDomain, Foreign>,
}

impl Fetcher {
    /// Reads the file, which has to be good, and publishes what was fetched by an earlier run, or else what `others`
    /// have, by the trust domain's name.
    pub fn open(
        authority: Arc<Authority>,
        data: Dir,
        file: PathBuf,
        fetched: Arc<Fetched>,
        others: &BTreeMap<String, String>,
    ) -> Result<Self, String> {
        if data.find(FOLDER).map_err(|fault| fault.to_string())?.is_none() {
            data.make_subdir(FOLDER, Access::mode(0o700)).map_err(|fault| fault.to_string())?;
        }
        let data = data.subdir(FOLDER).map_err(|fault| fault.to_string())?;
        data.clear_leftovers().map_err(|fault| fault.to_string())?;
        let said = files::read(&file, MAX as u64).map_err(|fault| fault.to_string())?.to_vec();
        let mut fetcher = Self { authority, data, file, fetched, said: Vec::new(), domains: BTreeMap::new() };
        fetcher.take(said, others)?;
        Ok(fetcher)
    }

    /// Fetches, and follows the file.
    pub async fn keep(mut self) {
        let mut told = None;
        loop {
            let mut following = JoinSet::new();
            for (domain, foreign) in &self.domains {
                match self.data.try_clone() {
                    Ok(data) => {
                        let one = One {
                            authority: self.authority.clone(),
                            fetched: self.fetched.clone(),
                            data,
                            domain: domain.clone(),
                            foreign: foreign.clone(),
                        };
                        following.spawn(one.follow());
                    }
                    Err(fault) => {
                        tracing::error!(%domain, %fault, "the bundle of a trust domain is not followed")
                    }
                }
            }
            loop {
                sleep(LOOK).await;
                let changed = match files::read(&self.file, MAX as u64) {
                    Ok(said) if *said == self.said => None,
                    Ok(said) => Some(self.take(said.to_vec(), &BTreeMap::new())),
                    Err(fault) => Some(Err(fault.to_string())),
                };
                match changed {
                    None => told = None,
                    Some(Ok(())) => {
                        told = None;
                        tracing::info!(
                            domains = self.domains.len(),
                            "the changed file of trust domains is in force"
                        );
                        break;
                    }
                    Some(Err(fault)) if told.as_ref() == Some(&fault) => {}
                    Some(Err(fault)) => {
                        tracing::error!(
                            fault,
                            "the changed file of trust domains is not taken, the one before stays"
                        );
                        told = Some(fault);
                    }
                }
            }
        }
    }

    /// Whose are not wanted any more are given up; whose are new are what was kept of them.
    fn take(&mut self, said: Vec<u8>, others: &BTreeMap<String, String>) -> Result<(), String> {
        let file = self.file.display();
        let domains = federation::read(&said, self.authority.trust_domain())
            .map_err(|fault| format!("{file}: {fault}"))?;
        for (domain, foreign) in &domains {
            if let Profile::Spiffe { bundle, .. } = &foreign.profile {
                read_bundle(bundle)?;
            }
            if let Profile::Web { roots: Some(roots) } = &foreign.profile {
                read_roots(roots)?;
            }
            if self.domains.get(domain) == Some(foreign) {
                continue;
            }
            let kept = Kept::read(&self.data, domain, foreign);
            if let Some((_, at)) = &kept {
                self.fetched.at().insert(domain.clone(), *at);
            }
            let bundle = kept.map(|(bundle, _)| bundle).or_else(|| {
                let bundle = Published::from_json(others.get(domain.as_str())?.as_bytes()).ok()?;
                tracing::info!(%domain, ?bundle, "the bundle of a trust domain is what the cluster has, until it is fetched");
                Some(bundle)
            });
            self.authority.federate(domain, bundle.map(Arc::new));
        }
        let gone = |domain: &&TrustDomain| !domains.contains_key(domain);
        for domain in self.domains.keys().filter(gone) {
            self.authority.give_up(domain);
            self.fetched.at().remove(domain);
        }
        let names: Vec<String> = domains.keys().map(name).collect();
        for entry in self.data.names().map_err(|fault| fault.to_string())? {
            if let Some(entry) = entry.name.to_str().filter(|entry| !names.iter().any(|name| name == entry)) {
                // What is left over is not read.
                let _ = self.data.unlink(entry);
            }
        }
        (self.said, self.domains) = (said, domains);
        Ok(())
    }
}

/// One trust domain.
struct One {
    authority: Arc<Authority>,
    fetched: Arc<Fetched>,
    data: Dir,
    domain: TrustDomain,
    foreign: Foreign,
}

impl One {
    async fn follow(self) {
        let (mut told, mut failures) = (None, 0);
        loop {
            let looked = self.look().await;
            let random = keys::random_bytes().map_or(0, u64::from_ne_bytes);
            // Those who were told the same do not come together.
            #[expect(clippy::cast_precision_loss, reason = "a random moment needs no precision")]
            let spread = 1.0 - random as f64 / u64::MAX as f64 / 10.0;
            let mut wait = federation::refresh(self.held(&self.domain).as_deref()).mul_f64(spread);
            match looked {
                Ok(()) => (told, failures) = (None, 0),
                Err((outcome, fault)) => {
                    // No answer is asked for again soon: both sides may have just started.
                    if outcome == "failed" {
                        failures += 1;
                        wait = wait.min(retry_after(failures, None, random));
                    }
                    self.fetched.count(&self.domain, outcome);
                    if told.as_ref() != Some(&fault) {
                        let domain = &self.domain;
                        tracing::warn!(%domain, fault, "the bundle of a trust domain cannot be fetched, the last one stays");
                        told = Some(fault);
                    }
                }
            }
            sleep(wait).await;
        }
    }

    /// What was fetched here. What the cluster had is compared with nothing, since it may be from another URL, and no
    /// endpoint is known by it.
    fn held(&self, domain: &TrustDomain) -> Option<Arc<Published>> {
        let held = self.authority.bundles().borrow().federated.get(domain).cloned();
        held.filter(|_| self.fetched.at().contains_key(domain))
    }

    /// An error is what became of it, and why.
    async fn look(&self) -> Result<(), (&'static str, String)> {
        let (text, bundle) = self.fetch().await.map_err(|fault| ("failed", fault))?;
        let domain = &self.domain;
        let (held, now) = (self.held(domain), clock::now());
        match federation::compare(held.as_deref(), &bundle) {
            Next::Older => {
                let sequence = |bundle: &Published| bundle.sequence.unwrap_or(0);
                let fault = format!(
                    "{} gave the number {}, and {} was seen before",
                    self.foreign.url,
                    sequence(&bundle),
                    held.as_deref().map_or(0, sequence)
                );
                return Err(("older", fault));
            }
            Next::Same => self.fetched.count(domain, "same"),
            Next::Newer => {
                self.fetched.count(domain, "newer");
                tracing::info!(%domain, ?bundle, "the bundle of a trust domain was fetched");
                if bundle.x509.is_empty() && bundle.jwt.is_empty() {
                    tracing::warn!(%domain, "the bundle of a trust domain is empty: nobody there is trusted");
                }
                self.authority.federate(domain, Some(Arc::new(bundle.clone())));
            }
        }
        self.fetched.at().insert(domain.clone(), now);
        Kept::write(&self.data, domain, &self.foreign, &text, now).map_err(|fault| ("not_kept", fault))
    }

    async fn fetch(&self) -> Result<(Vec<u8>, Published), String> {
        let url = &self.foreign.url;
        let text = fetch::get_from(url, MAX_BUNDLE, self.trust()?).await.map_err(|e| e.to_string())?;
        let bundle = Published::from_json(&text).map_err(|fault| format!("{url}: {fault}"))?;
        Ok((text, bundle))
    }

    fn trust(&self) -> Result<Trust, String> {
        match &self.foreign.profile {
            Profile::Web { roots: None } => Ok(Trust::System),
            Profile::Web { roots: Some(roots) } => Ok(Trust::Roots(read_roots(roots)?)),
            Profile::Spiffe { endpoint, bundle } => {
                let domain = endpoint.trust_domain();
                let latest = match domain == self.authority.trust_domain() {
                    true => self.authority.bundles().borrow().own.clone(),
                    false => self.held(domain),
                };
                // What was fetched counts from then on (5.2.2.4), even if it trusts nobody.
                let roots = match latest {
                    Some(latest) => {
                        latest.roots().map_err(|fault| format!("{domain}, of the endpoint: {fault}"))?
                    }
                    None => read_bundle(bundle)?,
                };
                Ok(Trust::Verifier(Arc::new(Verifier { endpoint: endpoint.clone(), roots })))
            }
        }
    }
}

/// The bundle that an endpoint's trust domain began with.
fn read_bundle(path: &Path) -> Result<TrustBundle, String> {
    let text = files::read(path, bundle::MAX as u64).map_err(|fault| fault.to_string())?;
    let read = match text.trim_ascii_start().first() {
        Some(b'{') => Published::from_json(&text).and_then(|bundle| bundle.roots()),
        _ => TrustBundle::from_pem(&text),
    };
    read.map_err(|fault| format!("{}: {fault}", path.display()))
}

fn read_roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = files::read(path, bundle::MAX as u64).map_err(|fault| fault.to_string())?;
    let roots = Certificate::all_from_pem(&text).map_err(|fault| format!("{}: {fault}", path.display()))?;
    if roots.is_empty() {
        return Err(format!("{} holds no certificate", path.display()));
    }
    Ok(roots.iter().map(|root| CertificateDer::from(root.der().to_owned())).collect())
}

/// Takes the X509-SVID of one endpoint (5.2.2.4); no name of the URL's counts.
#[derive(Debug)]
struct Verifier {
    endpoint: SpiffeId,
    roots: TrustBundle,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let refused = |fault: String| rustls::Error::General(format!("the endpoint's X509-SVID: {fault}"));
        let chain: Result<Vec<_>, _> =
            std::iter::once(leaf).chain(above).map(|der| Certificate::from_der(der)).collect();
        let chain = chain.map_err(|fault| refused(fault.to_string()))?;
        chain::verify(&chain, &self.roots, Some(&self.endpoint), clock::now()).map_err(|faults| {
            refused(faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = default_provider().signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = default_provider().signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// What was fetched last, so that a restart has it.
#[derive(Deserialize, Serialize)]
struct Kept {
    trust_domain: String,
    /// Another place is another's word: what it says is not compared with this.
    url: String,
    /// Seconds since 1970.
    fetched: i64,
    bundle: String,
}

impl Kept {
    fn read(data: &Dir, domain: &TrustDomain, foreign: &Foreign) -> Option<(Published, OffsetDateTime)> {
        let (text, _) = data.read(&name(domain), 2 * MAX_BUNDLE).ok()?;
        let kept: Self = serde_json::from_slice(&text).ok()?;
        if kept.trust_domain != domain.as_str() || kept.url != foreign.url.as_str() {
            return None;
        }
        let bundle = Published::from_json(kept.bundle.as_bytes()).ok()?;
        Some((bundle, OffsetDateTime::from_unix_timestamp(kept.fetched).ok()?))
    }

    fn write(
        data: &Dir,
        domain: &TrustDomain,
        foreign: &Foreign,
        text: &[u8],
        now: OffsetDateTime,
    ) -> Result<(), String> {
        let kept = Self {
            trust_domain: domain.to_string(),
            url: foreign.url.to_string(),
            fetched: now.unix_timestamp(),
            bundle: String::from_utf8_lossy(text).into_owned(),
        };
        let text = serde_json::to_vec(&kept).map_err(|fault| fault.to_string())?;
        data.replace(&name(domain), &text, Access::mode(0o600)).map_err(|fault| fault.to_string())
    }
}

/// A trust domain's name may be longer than a file's, and be a dot.
fn name(domain: &TrustDomain) -> String {
    let hash = digest(&SHA256, domain.as_str().as_bytes());
    let start: String = domain.as_str().chars().filter(|c| *c != '.').take(32).collect();
    let end: String = hash.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("d-{start}-{end}.json")
}
