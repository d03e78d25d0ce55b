//! The serving certificate: Mica's own leaf, issued through the one door and swapped while connections live.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{ring::default_provider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use time::OffsetDateTime;

use crate::authority::{self, Authority, Cause};
use crate::core::issuer::Order;
use crate::core::key::KeyKind;
use crate::core::lifetime::{Lifetime, Validity};
use crate::core::plan::{Good, Observed, Policy, Step, step};
use crate::core::profile::{DnsName, Profile};
use crate::sys::{clock, keys};

/// Long enough that a restart of everything around Mica does not matter, short enough to be renewed daily.
const LIFETIME: Lifetime = Lifetime::from_secs(24 * 3_600);
/// Between attempts to renew.
const RETRY: Duration = Duration::from_secs(5);
/// An issuer that was replaced, a clock that was set and a suspended machine are noticed this late.
const LONGEST_SLEEP: Duration = Duration::from_secs(15);

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
    validity: Validity,
    good: Good,
    /// By which an issuer that was replaced is noticed.
    issuer: Vec<u8>,
}

impl ServingCertificate {
    /// Begins without a certificate; [`ServingCertificate::keep`] gets it.
    pub fn new(authority: Arc<Authority>, names: Names) -> Self {
        Self { authority, names, current: ArcSwap::from_pointee(None) }
    }

    /// Gets the first one, so that whoever is told of the port finds it there. A fault is [`ServingCertificate::keep`]'s to
    /// tell, and to mend.
    pub fn begin(&self) {
        let _ = self.renew(clock::now());
    }

    /// Keeps it fresh, for ever.
    pub async fn keep(&self) {
        let mut told = None;
        loop {
            let now = clock::now();
            let wait = match self.next(now) {
                Step::Wait(at) => (at - now).try_into().unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP),
                _ => match self.renew(now) {
                    Ok(()) => {
                        told = None;
                        continue;
                    }
                    Err(fault) => {
                        let fault = fault.to_string();
                        if told.as_ref() != Some(&fault) {
                            tracing::warn!(fault, "no serving certificate; trying again");
                            told = Some(fault);
                        }
                        RETRY
                    }
                },
            };
            tokio::time::sleep(wait).await;
        }
    }

    fn next(&self, now: OffsetDateTime) -> Step {
        let issuer = self.authority.issuer();
        let observed = match &**self.current.load() {
            Some(current)
                if current.validity.contains(now) && current.issuer == issuer.certificate().der() =>
            {
                Observed::Good(current.good)
            }
            _ => Observed::Absent,
        };
        let policy = Policy { lifetime: LIFETIME, issuer_not_after: issuer.window().not_after };
        step(true, true, &observed, now, &policy)
    }

    fn renew(&self, now: OffsetDateTime) -> Result<(), Error> {
        let key = keys::generate(KeyKind::P256)?;
        let order = Order {
            profile: Profile::Serving { dns: &self.names.dns, addresses: &self.names.addresses },
            key: key.public(),
            lifetime: LIFETIME,
        };
        let grant = self.authority.issue(&order, now, &Cause::own("serving"))?;
        let chain = std::iter::once(CertificateDer::from(grant.issued.der().to_owned()))
            .chain(grant.issuer.chain().iter().map(|c| CertificateDer::from(c.der().to_owned())))
            .collect();
        let provider = default_provider();
        let private = rustls::pki_types::PrivateKeyDer::Pkcs8(key.pkcs8().to_owned().into());
        let key = CertifiedKey::from_der(chain, private, &provider)?;
        let validity = grant.issued.validity;
        self.current.store(Arc::new(Some(Current {
            key: Arc::new(key),
            validity,
            good: Good::of(validity, grant.issued.serial.bytes()),
            issuer: grant.issuer.certificate().der().to_owned(),
        })));
        Ok(())
    }

    /// TLS 1.2 and 1.3 with HTTP/2. Sessions are not resumed: a resumed one would skip the certificates, and so a trust
    /// bundle that changed meanwhile.
    pub fn config(self: &Arc<Self>) -> ServerConfig {
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS12, &rustls::version::TLS13])
            .unwrap_or_else(|_| unreachable!("ring has suites for both versions"))
            .with_client_cert_verifier(Arc::new(AnyClient))
            .with_cert_resolver(self.clone());
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

/// Lets every client in, with or without a certificate, and makes sure that it holds the key of the one it sends. Whether
/// that is a good one is judged at each request, so that an expired or a foreign one gets a code and a sentence.
#[derive(Debug)]
struct AnyClient;

impl ClientCertVerifier for AnyClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &default_provider().signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &default_provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        default_provider().signature_verification_algorithms.supported_schemes()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::bundle::TrustBundle;
    use crate::core::certificate::Certificate;
    use crate::core::issuer::{self, Issuer};

    /// Below a root that was made at a time, without a certificate yet.
    fn serving(at: OffsetDateTime, lifetime: Lifetime) -> ServingCertificate {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let (organization, trust_domain) = ("Example".parse().unwrap(), "cluster.local".parse().unwrap());
        let profile = Profile::Root { organization: &organization, trust_domain: &trust_domain };
        let root = issuer::root(&key, &profile, lifetime, at, keys::serial_number().unwrap()).unwrap();
        let root = Certificate::from_der(root.der()).unwrap();
        let bundle = TrustBundle::new([root.clone()]).unwrap();
        let issuer = Issuer::new(Arc::new(key), &[root], bundle, &trust_domain).unwrap();
        let names = Names { dns: vec!["localhost".parse().unwrap()], addresses: Vec::new() };
        ServingCertificate::new(Arc::new(Authority::new(trust_domain, issuer)), names)
    }

    #[tokio::test]
    async fn a_dying_issuer_is_not_asked_ever_faster() {
        let certificate = serving(clock::now(), Lifetime::from_secs(3));
        let mut metrics = prometheus_client::registry::Registry::default();
        certificate.authority.register(&mut metrics);
        let kept = tokio::time::timeout(Duration::from_secs(5), certificate.keep()).await;
        assert!(kept.is_err());
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &metrics).unwrap();
        assert!(text.contains("mica_certificates_issued_total{why=\"serving\"} 1\n"), "{text}");
    }

    #[test]
    fn a_certificate_of_a_time_to_come_is_replaced() {
        // A clock that was wrong when it was issued has been put right.
        let (now, year) = (clock::now(), time::Duration::days(365));
        let certificate = serving(now - year, "10y".parse().unwrap());
        certificate.renew(now + year).unwrap();
        assert!(matches!(certificate.next(now + year), Step::Wait(_)));
        assert!(matches!(certificate.next(now), Step::Deliver(_)));
    }
}
