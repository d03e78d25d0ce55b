//! What the bundle endpoint is known by: an X509-SVID of its own (`https_spiffe`), or a certificate of the operator's
//! (`https_web`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use rustls::ServerConfig;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::authority::{Authority, Cause};
use crate::core::issuer::Order;
use crate::core::key::KeyKind;
use crate::core::lifetime::Lifetime;
use crate::core::profile::Profile;
use crate::core::spiffe::SpiffeId;
use crate::sys::{clock, files, keys};

/// Renewed at half of it.
const LIFETIME: Lifetime = Lifetime::from_secs(24 * 3_600);
/// An issuer that was replaced, a clock that was set and files that were changed are noticed this late.
const LOOK: Duration = Duration::from_secs(5);
/// A chain fits many times.
const MAX_FILE: u64 = 1024 * 1024;

/// Where the operator has certificate and key.
#[derive(Clone, Debug)]
pub struct Files {
    /// The chain, leaf first, PEM.
    pub chain: PathBuf,
    /// Its key, PEM.
    pub key: PathBuf,
}

/// The certificate of the bundle endpoint. Without one handshakes fail.
pub struct Certificate {
    authority: Arc<Authority>,
    files: Option<Files>,
    id: SpiffeId,
    current: ArcSwapOption<CertifiedKey>,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Certificate")
    }
}

/// What it was made of.
enum Of {
    /// Until when it is good enough, and by which issuer.
    Svid(OffsetDateTime, Vec<u8>),
    Files([Zeroizing<Vec<u8>>; 2]),
}

impl Certificate {
    /// Begins without one.
    pub fn new(authority: Arc<Authority>, files: Option<Files>) -> Result<Self, String> {
        // No account has such an ID: theirs begin with /ns/.
        let id = format!("{}/mica/bundle-endpoint", authority.trust_domain().id());
        let id = SpiffeId::parse_workload(&id).map_err(|fault| fault.to_string())?;
        Ok(Self { authority, files, id, current: ArcSwapOption::empty() })
    }

    /// The SPIFFE ID that it has, with `https_spiffe`.
    pub fn id(&self) -> Option<&SpiffeId> {
        self.files.is_none().then_some(&self.id)
    }

    /// Gets the first one; files have to be good.
    pub fn begin(&self) -> Result<(), String> {
        match &self.files {
            Some(files) => self.take(files).map(drop),
            // Told, and mended, by the next look.
            None => {
                let _ = self.issue(clock::now());
                Ok(())
            }
        }
    }

    /// Keeps it fresh, for ever.
    pub async fn keep(&self) {
        let mut of: Option<Of> = None;
        let mut told = None;
        loop {
            match self.look(of.as_ref()) {
                Ok(Some(new)) => {
                    of = Some(new);
                    told = None;
                }
                Ok(None) => told = None,
                Err(fault) => {
                    if told.as_ref() != Some(&fault) {
                        tracing::warn!(fault, "the bundle endpoint has no new certificate; trying again");
                        told = Some(fault);
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Another one, if it is due.
    fn look(&self, of: Option<&Of>) -> Result<Option<Of>, String> {
        match (&self.files, of) {
            (Some(files), Some(Of::Files(before))) if read(files)? == *before => Ok(None),
            (Some(files), _) => self.take(files).map(Some),
            (None, Some(Of::Svid(until, issuer)))
                if clock::now() < *until
                    && clock::now() + Duration::from_secs(LIFETIME.duration().as_secs()) > *until
                    && *issuer == self.authority.issuer().certificate().der() =>
            {
                Ok(None)
            }
            (None, _) => self.issue(clock::now()).map(Some),
        }
    }

    fn issue(&self, now: OffsetDateTime) -> Result<Of, String> {
        let key = keys::generate(KeyKind::P256).map_err(|fault| fault.to_string())?;
        let profile = Profile::Workload { id: &self.id, dns: &[], proved_at: None };
        let order = Order { profile, key: key.public(), lifetime: LIFETIME };
        let grant =
            self.authority.issue(&order, now, &Cause::own("serving")).map_err(|fault| fault.to_string())?;
        let chain = std::iter::once(CertificateDer::from(grant.issued.der().to_owned()))
            .chain(grant.issuer.chain().iter().map(|above| CertificateDer::from(above.der().to_owned())))
            .collect();
        self.put(chain, PrivateKeyDer::Pkcs8(key.pkcs8().to_owned().into()))?;
        let half = (grant.issued.validity.not_after - now) / 2;
        Ok(Of::Svid(now + half, grant.issuer.certificate().der().to_owned()))
    }

    fn take(&self, files: &Files) -> Result<Of, String> {
        let read = read(files)?;
        let [chain, key] = &read;
        let bad = |path: &PathBuf, fault: String| format!("{}: {fault}", path.display());
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
        let certificates = certificates.map_err(|fault| bad(&files.chain, fault.to_string()))?;
        if certificates.is_empty() {
            return Err(bad(&files.chain, "it holds no certificate".to_owned()));
        }
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| bad(&files.key, "it holds no private key in PEM".to_owned()))?;
        self.put(certificates, key).map_err(|fault| bad(&files.chain, fault))?;
        Ok(Of::Files(read))
    }

    fn put(&self, chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<(), String> {
        let key = CertifiedKey::from_der(chain, key, &default_provider())
            .map_err(|fault| format!("certificate and key cannot be used together: {fault}"))?;
        self.current.store(Some(Arc::new(key)));
        Ok(())
    }

    /// TLS 1.2 and 1.3 with suites that are Mozilla's "intermediate" ones, for HTTP/1.1. No client is asked for a
    /// certificate, and sessions are not resumed.
    pub fn config(self: &Arc<Self>) -> ServerConfig {
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS12, &rustls::version::TLS13])
            .unwrap_or_else(|_| unreachable!("ring has suites for both versions"))
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }
}

fn read(files: &Files) -> Result<[Zeroizing<Vec<u8>>; 2], String> {
    let read = |path: &PathBuf| files::read(path, MAX_FILE).map_err(|fault| fault.to_string());
    Ok([read(&files.chain)?, read(&files.key)?])
}
