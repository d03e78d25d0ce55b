//! The bundle endpoint: the newest bundle for whoever asks.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::header::{CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::Certificate;
use crate::authority::Authority;
use crate::sys::listen::{Listener, Stream};

/// From the first packet to the last byte.
const REQUEST: Duration = Duration::from_secs(10);
/// So many connections at once; a further one takes the place of the oldest.
const REQUESTS: usize = 128;

/// What it counts.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    served: Counter,
}

impl Metrics {
    /// Registers it.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "mica_bundle_endpoint_served",
            "Times that the trust bundle was fetched from the bundle endpoint",
            self.served.clone(),
        );
    }
}

/// What is served, and as whom.
#[derive(Clone)]
pub struct Endpoint {
    /// Whose bundle.
    pub authority: Arc<Authority>,
    /// By what it is known.
    pub certificate: Arc<Certificate>,
    /// What is counted.
    pub metrics: Metrics,
}

/// Serves until `stop` resolves. Of the files that the process may hold open, at most an eighth are clients.
pub async fn serve(
    listener: TcpListener,
    open_files: usize,
    endpoint: Endpoint,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    let acceptor = TlsAcceptor::from(Arc::new(endpoint.certificate.config()));
    let routes =
        Router::new().route("/", get(move || async move { endpoint.answer() })).layer(map_response(last));
    let (accepted, connections) = mpsc::channel(1);
    let listener = Listener::new(listener, REQUESTS.min(open_files / 8), REQUEST);
    let door = Door { connections, address };
    tokio::select! {
        served = axum::serve(door, routes).with_graceful_shutdown(stop) => served,
        () = accept(listener, acceptor, accepted) => Ok(()),
    }
}

/// For ever: a connection that fails ends nothing but itself.
async fn accept(mut listener: Listener, acceptor: TlsAcceptor, accepted: mpsc::Sender<TlsStream<Stream>>) {
    let mut handshakes = JoinSet::new();
    loop {
        let stream = listener.accept().await;
        while handshakes.try_join_next().is_some() {}
        let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
        handshakes.spawn(async move {
            match acceptor.accept(stream).await {
                Ok(stream) => drop(accepted.send(stream).await),
                Err(fault) => tracing::debug!(%fault, "TLS handshake of the bundle endpoint failed"),
            }
        });
    }
}

impl Endpoint {
    fn answer(&self) -> Response {
        let own = self.authority.bundles().borrow().own.clone();
        // Never an empty one in place of one that is not known yet.
        let Some(own) = own.filter(|own| !own.x509.is_empty()) else {
            return (StatusCode::SERVICE_UNAVAILABLE, "the trust bundle has no number yet\n").into_response();
        };
        match own.to_json() {
            Ok(text) => {
                self.metrics.served.inc();
                ([(CONTENT_TYPE, "application/json")], text).into_response()
            }
            Err(fault) => {
                tracing::error!(%fault, "the trust bundle cannot be written as JSON");
                StatusCode::INTERNAL_SERVER_ERROR.into_response()
            }
        }
    }
}

/// One request a connection, since its time is short.
async fn last(mut response: Response) -> Response {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

struct Door {
    connections: mpsc::Receiver<TlsStream<Stream>>,
    address: SocketAddr,
}

impl axum::serve::Listener for Door {
    type Io = TlsStream<Stream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TlsStream<Stream>, SocketAddr) {
        match self.connections.recv().await {
            Some(stream) => (stream, self.address),
            // Whoever accepts has ended, and with it everything.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}
