//! One document from a server: bounded in time and length, never led elsewhere.

use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT, LOCATION, USER_AGENT};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::CertificateDer;

use crate::core::inspect::one_line;
use crate::core::spiffe::shortened;
use crate::core::url::Url;

/// From the first packet to the last byte.
const WITHIN: Duration = Duration::from_secs(5);

/// Why there is no document.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No certificates to check the server's with.
    #[error("cannot read the system's trust roots: {0}; install ca-certificates, or set SSL_CERT_FILE")]
    Roots(String),
    /// Somewhere on the way.
    #[error("cannot fetch {url}: {fault}")]
    Failed {
        /// From where.
        url: String,
        /// What happened.
        fault: String,
    },
    /// Not in time.
    #[error("cannot fetch {0}: no answer within {WITHIN:?}")]
    Late(String),
    /// Another answer than the document.
    #[error("cannot fetch {url}: the server answered {status}")]
    Status {
        /// From where.
        url: String,
        /// The answer.
        status: StatusCode,
    },
    /// To be asked elsewhere.
    #[error(
        "cannot fetch {url}: the server says that it is at {to}, and mica follows nobody; name that place itself"
    )]
    Elsewhere {
        /// From where.
        url: String,
        /// The other place.
        to: String,
    },
    /// Too long.
    #[error("cannot fetch {url}: it is longer than {limit} bytes")]
    TooLong {
        /// From where.
        url: String,
        /// The bound.
        limit: usize,
    },
}

/// Who a server of https has to be.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Whom the system's trust roots vouch for, by the URL's host.
    System,
    /// Whom these roots vouch for, by the URL's host.
    Roots(Vec<CertificateDer<'static>>),
    /// Whom this one takes.
    Verifier(Arc<dyn ServerCertVerifier>),
}

/// Fetches a document. Nothing of the connection is kept, since the next one is minutes away; the system's trust roots
/// are read each time, so that a change of theirs counts.
pub async fn get(url: &Url, limit: usize) -> Result<Vec<u8>, Error> {
    get_from(url, limit, Trust::System).await
}

/// The same, of a server that is known otherwise.
pub async fn get_from(url: &Url, limit: usize, trust: Trust) -> Result<Vec<u8>, Error> {
    tokio::time::timeout(WITHIN, fetch(url, limit, trust))
        .await
        .unwrap_or_else(|_| Err(Error::Late(url.to_string())))
}

async fn fetch(url: &Url, limit: usize, trust: Trust) -> Result<Vec<u8>, Error> {
    let failed = |fault: String| Error::Failed { url: url.to_string(), fault };
    let connector = connector(url, trust).await.map_err(|fault| match fault {
        Unconnected::Roots(fault) => Error::Roots(fault),
        Unconnected::Other(fault) => failed(fault),
    })?;
    let client: Client<_, Empty<&[u8]>> = Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(0)
        .http1_max_buf_size(64 * 1024)
        .build(connector);
    let request = Request::get(url.uri().clone())
        .header(ACCEPT, "application/jwk-set+json, application/json")
        .header(USER_AGENT, concat!("mica/", env!("CARGO_PKG_VERSION")))
        .body(Empty::new())
        .map_err(|e| failed(e.to_string()))?;
    let response = client.request(request).await.map_err(|e| failed(chain(&e)))?;
    let status = response.status();
    if status.is_redirection() {
        let to =
            response.headers().get(LOCATION).map(|to| String::from_utf8_lossy(to.as_bytes()).into_owned());
        let to = one_line(&shortened(&to.unwrap_or_else(|| "another place".to_owned())));
        return Err(Error::Elsewhere { url: url.to_string(), to });
    }
    if status != StatusCode::OK {
        return Err(Error::Status { url: url.to_string(), status });
    }
    match Limited::new(response.into_body(), limit).collect().await {
        Ok(body) => Ok(body.to_bytes().to_vec()),
        Err(fault) if fault.is::<LengthLimitError>() => Err(Error::TooLong { url: url.to_string(), limit }),
        Err(fault) => Err(failed(chain(&*fault))),
    }
}

/// Why nobody can be connected to.
pub(super) enum Unconnected {
    /// The system's trust roots cannot be read.
    Roots(String),
    /// Anything else.
    Other(String),
}

/// Connects to where a URL points, by TLS if it says so. The system's trust roots are those of now.
pub(super) async fn connector(url: &Url, trust: Trust) -> Result<HttpsConnector<HttpConnector>, Unconnected> {
    let ring = rustls::crypto::ring::default_provider();
    let builder = HttpsConnectorBuilder::new();
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(WITHIN));
    Ok(match (url.uri().scheme_str(), trust) {
        (Some("https"), Trust::Roots(roots)) => {
            let mut store = rustls::RootCertStore::empty();
            for root in roots {
                store.add(root).map_err(|e| Unconnected::Other(e.to_string()))?;
            }
            let config = rustls::ClientConfig::builder_with_provider(ring.into())
                .with_safe_default_protocol_versions()
                .map_err(|e| Unconnected::Other(e.to_string()))?
                .with_root_certificates(store)
                .with_no_client_auth();
            builder.with_tls_config(config).https_only().enable_http1().wrap_connector(tcp)
        }
        (Some("https"), Trust::Verifier(verifier)) => {
            let config = rustls::ClientConfig::builder_with_provider(ring.into())
                .with_safe_default_protocol_versions()
                .map_err(|e| Unconnected::Other(e.to_string()))?
                .dangerous()
                .with_custom_certificate_verifier(verifier)
                .with_no_client_auth();
            builder.with_tls_config(config).https_only().enable_http1().wrap_connector(tcp)
        }
        (Some("https"), Trust::System) => {
            // Some hundred certificates are parsed here.
            tokio::task::spawn_blocking(move || builder.with_provider_and_native_roots(ring))
                .await
                .map_err(|e| Unconnected::Other(e.to_string()))?
                .map_err(|e| Unconnected::Roots(super::reason(&e)))?
                .https_only()
                .enable_http1()
                .wrap_connector(tcp)
        }
        _ => {
            // No TLS, and so nothing to trust.
            let none = rustls::ClientConfig::builder_with_provider(ring.into())
                .with_safe_default_protocol_versions()
                .map_err(|e| Unconnected::Other(e.to_string()))?
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
            builder.with_tls_config(none).https_or_http().enable_http1().wrap_connector(tcp)
        }
    })
}

/// The outermost error says little; what says something is below it.
pub(super) fn chain(fault: &dyn std::error::Error) -> String {
    let mut text = fault.to_string();
    let mut below = fault.source();
    while let Some(fault) = below {
        let said = fault.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        below = fault.source();
    }
    one_line(&text)
}
