//! The admission webhook: an API server asks over TLS what a pod that is being made lacks.
//!
//! API servers show no certificate, so nobody is known here. Nothing is told that was not in the question, and nothing
//! is changed but by the API server, which takes the answer for its own.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::tls::ServingCertificate;
use super::{Connection, HANDSHAKE, HANDSHAKES, accept};
use crate::core::inject::{Became, Rules, review};
use crate::sys::listen::Listener;

/// An API server takes no object of more than 3 MiB, and stores none of more than 1.5 MiB.
const LARGEST: usize = 2 << 20;
/// A request and its answer; API servers themselves wait 10 s, if nothing else is said.
const REQUEST: Duration = Duration::from_secs(10);
/// So many connections, shared fairly between sources.
const CONNECTIONS: usize = 64;

/// What pods get, and what became of those that were asked about.
#[derive(Debug)]
pub struct Injector {
    rules: Rules,
    reviews: Family<Outcome, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// Of a question that is none.
const MALFORMED: &str = "malformed";

impl Injector {
    /// Nothing is counted yet.
    pub fn new(rules: Rules) -> Self {
        Self { rules, reviews: Family::default() }
    }

    /// Registers what is counted.
    pub fn register(&self, registry: &mut Registry) {
        for outcome in Became::ALL.map(Became::name).into_iter().chain([MALFORMED]) {
            drop(self.reviews.get_or_create(&Outcome { outcome }));
        }
        registry.register("mica_pod_reviews", "Pods that the API server asked about", self.reviews.clone());
    }

    fn answer(&self, body: &[u8]) -> Response {
        let verdict = match review(body, &self.rules) {
            Ok(verdict) => verdict,
            Err(fault) => {
                self.reviews.get_or_create(&Outcome { outcome: MALFORMED }).inc();
                return (StatusCode::BAD_REQUEST, format!("{fault}\n")).into_response();
            }
        };
        let outcome = verdict.became.name();
        self.reviews.get_or_create(&Outcome { outcome }).inc();
        match &verdict.fault {
            Some(fault) => tracing::warn!(fault, "a pod is refused, since it contradicts what it is to have"),
            None => tracing::debug!(outcome, "a pod was asked about"),
        }
        ([(CONTENT_TYPE, "application/json")], verdict.answer.to_string()).into_response()
    }
}

/// Serves until `stop` resolves.
pub async fn serve(
    listener: TcpListener,
    open_files: usize,
    certificate: &Arc<ServingCertificate>,
    injector: Arc<Injector>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let mut tls = certificate.config();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (accepted, connections) = mpsc::channel(1);
    let routes = Router::new().route("/inject", post(asked)).with_state(injector).layer(map_response(last));
    let address = listener.local_addr()?;
    let serving =
        axum::serve(Door { connections, address }, routes).with_graceful_shutdown(stop).into_future();
    let listener = Listener::new(listener, HANDSHAKES.min(open_files / 8), HANDSHAKE);
    let (acceptor, terms) = (TlsAcceptor::from(Arc::new(tls)), (CONNECTIONS.min(open_files / 8), REQUEST));
    let mut handshakes = JoinSet::new();
    let hand_over = async move |connection| drop(accepted.send(connection).await);
    tokio::select! {
        served = serving => served,
        () = accept(listener, acceptor, terms, &mut handshakes, hand_over) => Ok(()),
    }
}

async fn asked(State(injector): State<Arc<Injector>>, body: Body) -> Response {
    let read = tokio::time::timeout(REQUEST, axum::body::to_bytes(body, LARGEST)).await;
    match read {
        Ok(Ok(body)) => injector.answer(&body),
        Ok(Err(_)) => {
            injector.reviews.get_or_create(&Outcome { outcome: MALFORMED }).inc();
            (StatusCode::PAYLOAD_TOO_LARGE, "this is longer than any pod\n").into_response()
        }
        Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
    }
}

/// One request a connection, so that none is lost on one that Mica has just given up.
async fn last(mut response: Response) -> Response {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

struct Door {
    connections: mpsc::Receiver<Connection>,
    address: std::net::SocketAddr,
}

impl axum::serve::Listener for Door {
    type Io = Connection;
    type Addr = IpAddr;

    async fn accept(&mut self) -> (Connection, IpAddr) {
        match self.connections.recv().await {
            Some(connection) => {
                let source = connection.known.peer.source;
                (connection, source)
            }
            // Whoever accepts has ended, and with it this.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<IpAddr> {
        Ok(self.address.ip())
    }
}
