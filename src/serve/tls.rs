//! The serving certificate: Mica's own leaf, issued through the one door and swapped while connections live.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;

use crate::authority::{self, Authority};
use crate::core::issuer::Order;
use crate::core::key::KeyKind;
use crate::core::lifetime::Lifetime;
use crate::core::plan::Good;
use crate::core::profile::{DnsName, Profile};
use crate::sys::{clock, keys};

/// Long enough that a restart of everything around Mica does not matter, short enough to be renewed daily.
const LIFETIME: Lifetime = Lifetime::from_secs(24 * 3_600);
/// Between attempts to renew.
const RETRY: Duration = Duration::from_secs(5);
/// A suspended machine is noticed this late.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// Why there is no serving certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was not issued.
    #[error("the serving certificate: {0}")]
    Authority(#[from] authority::Error),
    /// No key for it.
    #[error("the serving certificate: {0}")]
    Keys(#[from] keys::Error),
    /// rustls does not take it.
    #[error("the serving certificate: {0}")]
    Tls(#[from] rustls::Error),
}

/// Names and addresses that clients reach Mica by.
#[derive(Clone, Debug)]
pub struct Names {
    /// DNS names.
    pub dns: Vec<DnsName>,
    /// IP addresses.
    pub addresses: Vec<IpAddr>,
}

/// The certificate of the gRPC listener. Without one, as under an expired issuer, handshakes fail and readiness says why.
pub struct ServingCertificate {
    authority: Arc<Authority>,
    names: Names,
    current: ArcSwap<Option<Current>>,
}

struct Current {
    key: Arc<CertifiedKey>,
    renew_at: OffsetDateTime,
    /// By which an issuer that was replaced is noticed.
    issuer: Vec<u8>,
}

impl ServingCertificate {
    /// Begins without a certificate; [`ServingCertificate::keep`] gets it.
    pub fn new(authority: Arc<Authority>, names: Names) -> Self {
        Self { authority, names, current: ArcSwap::from_pointee(None) }
    }

    /// Keeps it fresh, for ever.
    pub async fn keep(&self) {
        loop {
            let now = clock::now();
            let wait = match &**self.current.load() {
                Some(current) if now < current.renew_at && self.is_of_issuer(current) => {
                    (current.renew_at - now).try_into().unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP)
                }
                _ => match self.renew(now) {
                    Ok(()) => continue,
                    Err(fault) => {
                        tracing::warn!(%fault, "no serving certificate; trying again");
                        RETRY
                    }
                },
            };
            tokio::time::sleep(wait).await;
        }
    }

    fn is_of_issuer(&self, current: &Current) -> bool {
        self.authority.issuer().certificate().der() == current.issuer
    }

    fn renew(&self, now: OffsetDateTime) -> Result<(), Error> {
        let key = keys::generate(KeyKind::P256)?;
        let order = Order {
            profile: Profile::Serving { dns: &self.names.dns, addresses: &self.names.addresses },
            key: key.public(),
            lifetime: LIFETIME,
        };
        let grant = self.authority.issue(&order, now, "serving")?;
        let chain = std::iter::once(CertificateDer::from(grant.issued.der().to_owned()))
            .chain(grant.issuer.chain().iter().map(|c| CertificateDer::from(c.der().to_owned())))
            .collect();
        let provider = rustls::crypto::ring::default_provider();
        let private = rustls::pki_types::PrivateKeyDer::Pkcs8(key.pkcs8().to_owned().into());
        let key = CertifiedKey::from_der(chain, private, &provider)?;
        let good = Good::of(grant.issued.validity, grant.issued.serial.bytes());
        self.current.store(Arc::new(Some(Current {
            key: Arc::new(key),
            renew_at: good.renew_at,
            issuer: grant.issuer.certificate().der().to_owned(),
        })));
        Ok(())
    }

    /// TLS 1.2 and 1.3 with HTTP/2. Sessions are not resumed: a resumed one would skip the certificates, and so a trust
    /// bundle that changed meanwhile.
    pub fn config(self: &Arc<Self>) -> ServerConfig {
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS12, &rustls::version::TLS13])
                .unwrap_or_else(|_| unreachable!("ring has suites for both versions"))
                .with_no_client_auth()
                .with_cert_resolver(self.clone());
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

impl ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load().as_ref().as_ref().map(|current| current.key.clone())
    }
}

impl std::fmt::Debug for ServingCertificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServingCertificate")
    }
}
