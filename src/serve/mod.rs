//! The gRPC listener: TLS with Mica's own leaf, and the services behind it.

mod agent;
mod bounds;
mod codes;
pub mod gate;
mod gather;
mod grpc;
pub mod health;
pub mod holders;
mod istio;
mod metrics;
mod mica;
pub mod queue;
mod requests;
mod routes;
pub mod tls;
pub mod webhook;

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::codegen::http::Request;

pub use agent::Agents;
pub use istio::wishes;
pub use metrics::Metrics;
pub use requests::{Ask, JwtAsk, Requests, Token, Wishes};

use crate::auth::Peer;
use crate::proto::DESCRIPTORS;
use crate::proto::grpc::health::v1::health_server::HealthServer;
use crate::proto::istio::v1::auth::istio_ca_service_server::IstioCaServiceServer;
use crate::proto::istio::v1::auth::istio_certificate_service_server::IstioCertificateServiceServer;
use crate::proto::mica::v1::agent_service_server::AgentServiceServer;
use crate::proto::mica::v1::identity_service_server::IdentityServiceServer;
use crate::sys::listen::{Listener, Places, Stream};
use crate::telemetry;
use bounds::{Crowd, Terms, Unanswered};
use gate::Gate as _;
use gather::Gather;
use grpc::GrpcOnly;
use routes::{Route, Routes};
use tls::ServingCertificate;

/// Says whether Mica can do its work now.
pub type Ready = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// A handshake takes milliseconds; whoever needs longer is not let in.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// So many handshakes at once; a further one takes the place of the oldest.
const HANDSHAKES: usize = 256;
/// Clients that are there answer a ping after 30 seconds.
const IDLE: Duration = Duration::from_secs(60);

/// Health checks and questions about services are short.
const LARGEST_QUESTION: usize = 4 * 1024;
/// Who asks about services may go on asking for a while.
const REFLECTION: Duration = Duration::from_secs(600);

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The descriptors that reflection tells.
    #[error("the gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves until `stop` resolves. Of the files that the process may hold open, less than half are clients.
pub async fn serve(
    listener: TcpListener,
    open_files: usize,
    certificate: Arc<ServingCertificate>,
    ready: Ready,
    requests: Arc<Requests>,
    agents: Arc<Agents>,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let identity = mica::Identity { requests: requests.clone() };
    let istio = istio::Istio { requests: requests.clone() };
    let (alive, stopped) = watch::channel(());
    let agent = agent::Agent { agents, stopped };
    let crowd = Crowd::new();
    let (asked, looked_up) = (Terms::new(bounds::ANSWERED, &crowd), Terms::new(REFLECTION, &crowd));
    let reflection =
        || tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(DESCRIPTORS);
    let routes =
        Routes::new()
            .with(GrpcOnly(Terms::endless(&crowd).before(
                HealthServer::new(health::Health { ready }).max_decoding_message_size(LARGEST_QUESTION),
            )))
            .with(GrpcOnly(
                looked_up.before(reflection().build_v1()?.max_decoding_message_size(LARGEST_QUESTION)),
            ))
            .with(GrpcOnly(
                looked_up.before(reflection().build_v1alpha()?.max_decoding_message_size(LARGEST_QUESTION)),
            ))
            .with(GrpcOnly(asked.before(
                IdentityServiceServer::new(identity).max_decoding_message_size(bounds::LARGEST_MESSAGE),
            )))
            .with(GrpcOnly(
                asked
                    .clone()
                    .apart(agent::WATCH_BUNDLES_PATH, None, Crowd::new())
                    .apart(
                        agent::CREATE_CERTIFICATES_PATH,
                        Some(bounds::ANSWERED),
                        Crowd::of_large(agent::MOST_AT_ONCE),
                    )
                    .before(
                        AgentServiceServer::new(agent).max_decoding_message_size(bounds::LARGEST_MESSAGE),
                    ),
            ))
            .with(GrpcOnly(asked.clone().counted(&requests, istio::HANDLE_CSR).before(
                IstioCaServiceServer::new(istio.clone()).max_decoding_message_size(bounds::LARGEST_MESSAGE),
            )))
            .with(GrpcOnly(asked.counted(&requests, istio::CREATE_CERTIFICATE).before(
                IstioCertificateServiceServer::new(istio).max_decoding_message_size(bounds::LARGEST_MESSAGE),
            )));
    let acceptor = TlsAcceptor::from(Arc::new(certificate.config()));
    let (going_on, ends) = watch::channel(());
    let mut connections = JoinSet::new();
    let listener = Listener::new(listener, HANDSHAKES.min(open_files / 8), HANDSHAKE);
    let serve = move |stream| connection(stream, routes, ends);
    tokio::select! {
        () = accept(listener, acceptor, (open_files / 4, IDLE), &mut connections, serve) => {}
        () = telemetry::keep_flushed() => {}
        () = stop => {}
    }
    drop((alive, going_on));
    tokio::select! {
        () = async { while connections.join_next().await.is_some() {} } => {}
        () = telemetry::keep_flushed() => {}
    }
    Ok(())
}

/// Accepts for ever, with one task for each connection. One that fails ends nothing but itself; those that are not let in
/// yet end with this.
async fn accept<F: Future<Output = ()> + Send + 'static>(
    mut listener: Listener,
    acceptor: TlsAcceptor,
    (most, idle): (usize, Duration),
    connections: &mut JoinSet<()>,
    serve: impl FnOnce(Connection) -> F + Clone + Send + 'static,
) {
    let places = Places::new(most);
    loop {
        let stream = tokio::select! {
            stream = listener.accept() => stream,
            // It gives its memory back.
            Some(_) = connections.join_next() => continue,
        };
        let (acceptor, places, serve) = (acceptor.clone(), places.clone(), serve.clone());
        connections.spawn(async move {
            let mut stream = match acceptor.accept(stream).await {
                Ok(stream) => stream,
                Err(fault) => return tracing::debug!(%fault, "TLS handshake failed"),
            };
            let source = source(&stream);
            let Some(place) = places.take(source) else {
                return tracing::warn!(most, %source, "a client is sent away: too many are connected");
            };
            stream.get_mut().0.stay(idle, place);
            serve(Connection::new(stream, source)).await;
        });
    }
}

/// Answers the requests of one connection, until it ends.
async fn connection(stream: Connection, routes: Routes<impl Route>, mut ends: watch::Receiver<()>) {
    let known = stream.known.clone();
    let answer = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(known.clone());
        routes.answer(request)
    });
    let mut serving = pin!(
        http2::Builder::new(queue::Tasks)
            .timer(TokioTimer::new())
            .keep_alive_interval(Some(Duration::from_secs(30)))
            .keep_alive_timeout(Duration::from_secs(10))
            .max_concurrent_streams(bounds::STREAMS)
            .initial_stream_window_size(bounds::WINDOWS.0)
            .initial_connection_window_size(bounds::WINDOWS.1)
            .max_header_list_size(bounds::LARGEST_HEADER)
            .max_pending_accept_reset_streams(bounds::RESETS.0)
            .max_local_error_reset_streams(bounds::RESETS.1)
            .serve_connection(TokioIo::new(stream), answer)
    );
    let served = tokio::select! {
        served = &mut serving => served,
        _ = ends.changed() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(fault) = served {
        tracing::debug!(?fault, "a connection ended");
    }
}

/// A connection whose handshake is done.
struct Connection {
    stream: Gather<TlsStream<Stream>>,
    known: Connected,
}

/// What requests are told of their connection.
#[derive(Clone)]
struct Connected {
    peer: Arc<Peer>,
    unanswered: Arc<Unanswered>,
}

impl Connection {
    fn new(stream: TlsStream<Stream>, source: IpAddr) -> Self {
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let certificates = certificates.iter().map(|der| der.clone().into_owned()).collect();
        let peer = Arc::new(Peer::new(source, certificates));
        let unanswered = Arc::<Unanswered>::default();
        Self { stream: Gather::new(stream, unanswered.clone()), known: Connected { peer, unanswered } }
    }
}

fn source(stream: &TlsStream<Stream>) -> IpAddr {
    let unspecified = IpAddr::from(Ipv4Addr::UNSPECIFIED);
    stream.get_ref().0.get_ref().peer_addr().map_or(unspecified, |address| address.ip().to_canonical())
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.known.unanswered.is_overdue() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
