//! One connection: TCP, then TLS with a look at why it failed.

use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::{Resumption, WantsClientCert, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{CertificateError, ClientConfig, ConfigBuilder, RootCertStore};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::http::Uri;
use tonic::codegen::{BoxFuture, Context, Poll, Service};

use super::{Address, Credential, Error, Target};
use crate::core::certificate::Certificate;
use crate::core::key::PrivateKey;
use crate::core::lifetime::shown;
use crate::sys::{files, reason};

const CONNECT: Duration = Duration::from_secs(5);
const HANDSHAKE: Duration = Duration::from_secs(10);
const CHAIN: &str = "cert-chain.pem";
const KEY: &str = "key.pem";

/// Makes connections to one address.
#[derive(Clone)]
pub(super) struct Dial {
    address: Address,
    name: ServerName<'static>,
    verifier: Arc<WebPkiServerVerifier>,
    credential: Credential,
}

impl Dial {
    pub(super) fn new(target: &Target) -> Result<Self, Error> {
        let name = target.name.clone().unwrap_or_else(|| target.address.host.clone());
        let name = ServerName::try_from(name.clone()).map_err(|_| Error::Name(name))?;
        let mut store = RootCertStore::empty();
        for root in target.roots.roots() {
            store
                .add(CertificateDer::from(root.der().to_owned()))
                .map_err(|fault| Error::Roots(fault.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider)
            .build()
            .map_err(|fault| Error::Roots(fault.to_string()))?;
        Ok(Self { address: target.address.clone(), name, verifier, credential: target.credential.clone() })
    }

    pub(super) async fn connect(self) -> Result<TokioIo<TlsStream<TcpStream>>, Error> {
        let address = self.address.to_string();
        let config = self.config()?;
        let slow = |what, within| Error::Slow { address: address.clone(), what, within };
        let tcp = timeout(CONNECT, TcpStream::connect((self.address.host.as_str(), self.address.port)))
            .await
            .map_err(|_| slow("let us connect", CONNECT))?
            .map_err(|fault| Error::Connect { address: address.clone(), reason: reason(&fault) })?;
        // Not a fault of the connection: it is only slower.
        let _ = tcp.set_nodelay(true);
        let handshake = TlsConnector::from(Arc::new(config)).connect(self.name.clone(), tcp);
        let tls = timeout(HANDSHAKE, handshake)
            .await
            .map_err(|_| slow("end the TLS handshake", HANDSHAKE))?
            .map_err(|fault| self.explained(&fault))?;
        if tls.get_ref().1.alpn_protocol() != Some(b"h2") {
            let fault = "it offers no h2 in TLS".to_owned();
            return Err(Error::Protocol { address, expected: "HTTP/2", fault });
        }
        Ok(TokioIo::new(tls))
    }

    /// TLS 1.2 and 1.3. Sessions are not resumed: a resumed one would show a certificate that has been replaced since.
    fn config(&self) -> Result<ClientConfig, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls =
            |fault: rustls::Error| Error::Tls { address: self.address.to_string(), fault: fault.to_string() };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(tls)?
            .with_webpki_verifier(self.verifier.clone());
        let mut config = match &self.credential {
            Credential::Certificate(folder) => {
                let (chain, key) = certificate_in(folder)?;
                showing(builder, &chain, &key).map_err(|fault| Error::Certificate {
                    folder: folder.display().to_string(),
                    fault: match fault {
                        rustls::Error::InconsistentKeys(_) => {
                            format!("{KEY} does not belong to the first certificate of {CHAIN}")
                        }
                        fault => fault.to_string(),
                    },
                })?
            }
            Credential::Held(chain, key) => showing(builder, chain, key).map_err(tls)?,
            Credential::None | Credential::Token(_) => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// What a failed handshake means.
    fn explained(&self, fault: &std::io::Error) -> Error {
        let address = self.address.to_string();
        let inner = fault.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let seconds = |at: &rustls::pki_types::UnixTime| {
            i64::try_from(at.as_secs())
                .ok()
                .and_then(|at| time::OffsetDateTime::from_unix_timestamp(at).ok())
                .map_or_else(|| "an unknown time".to_owned(), shown)
        };
        match inner {
            Some(rustls::Error::InvalidCertificate(certificate)) => match certificate {
                CertificateError::NotValidForNameContext { presented, .. } => Error::OtherName {
                    address,
                    name: self.name.to_str().into_owned(),
                    presented: names(presented),
                },
                CertificateError::NotValidForName => Error::OtherName {
                    address,
                    name: self.name.to_str().into_owned(),
                    presented: "others".to_owned(),
                },
                // A signature that does not fit is what an issuer of the same name and another key leaves.
                CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                    Error::Foreign { address }
                }
                CertificateError::ExpiredContext { not_after, .. } => {
                    Error::Time { address, when: format!("expired at {}", seconds(not_after)) }
                }
                CertificateError::Expired => Error::Time { address, when: "has expired".to_owned() },
                CertificateError::NotValidYetContext { not_before, .. } => {
                    Error::Time { address, when: format!("is not valid before {}", seconds(not_before)) }
                }
                CertificateError::NotValidYet => Error::Time { address, when: "is not valid yet".to_owned() },
                other => Error::Tls { address, fault: rustls::Error::from(other.clone()).to_string() },
            },
            Some(rustls::Error::InvalidMessage(message)) => {
                Error::Protocol { address, expected: "TLS", fault: format!("{message:?}") }
            }
            Some(rustls::Error::AlertReceived(alert)) => {
                Error::Tls { address, fault: format!("it refused with the alert {alert:?}") }
            }
            Some(other) => Error::Tls { address, fault: other.to_string() },
            None if fault.kind() == std::io::ErrorKind::UnexpectedEof => {
                Error::Tls { address, fault: "it closed the connection during the handshake".to_owned() }
            }
            None => Error::Tls { address, fault: reason(fault) },
        }
    }
}

impl Service<Uri> for Dial {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = Error;
    type Future = BoxFuture<Self::Response, Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        Box::pin(self.clone().connect())
    }
}

fn showing(
    builder: ConfigBuilder<ClientConfig, WantsClientCert>,
    chain: &[Certificate],
    key: &PrivateKey,
) -> Result<ClientConfig, rustls::Error> {
    let chain = chain.iter().map(|certificate| CertificateDer::from(certificate.der().to_owned())).collect();
    builder.with_client_auth_cert(chain, PrivateKeyDer::Pkcs8(key.pkcs8().to_owned().into()))
}

/// The certificate in a folder, of one set where the folder is published as a whole.
fn certificate_in(folder: &std::path::Path) -> Result<(Vec<Certificate>, PrivateKey), Error> {
    let refused = |fault: String| Error::Certificate { folder: folder.display().to_string(), fault };
    let found = files::read_named(folder, &[CHAIN, KEY], crate::core::pem::MAX as u64)
        .map_err(|fault| refused(fault.to_string()))?;
    let file = |name: &str| found.get(name).ok_or_else(|| refused(format!("{name} is missing")));
    let chain =
        Certificate::all_from_pem(file(CHAIN)?).map_err(|fault| refused(format!("{CHAIN}: {fault}")))?;
    let public = chain.first().and_then(|leaf| leaf.key().ok());
    let key = PrivateKey::from_pem(file(KEY)?, None, public.as_ref())
        .map_err(|fault| refused(format!("{KEY}: {fault}")))?;
    Ok((chain, key))
}

/// rustls gives names as `DnsName("a")` and `IpAddress(127.0.0.1)`.
fn names(presented: &[String]) -> String {
    let bare = |name: &String| {
        let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(name);
        inner.trim_matches('"').to_owned()
    };
    match presented {
        [] => "nobody".to_owned(),
        names => names.iter().map(bare).collect::<Vec<_>>().join(", "),
    }
}
