//! The Workload Endpoint: what the agent serves on its Unix socket (SPIFFE_Workload_Endpoint.md), to processes that it
//! knows by their peer credentials.

mod authority;
mod bounds;
mod listener;
pub mod sds;
mod workload;

use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::{Extensions, Status};

use crate::agent::Agent;
use crate::attest::{Attestor, Entitled, Refused};
use crate::proto::LOCAL_DESCRIPTORS;
use crate::proto::grpc::health::v1::health_server::HealthServer;
use crate::proto::xds::envoy::service::secret::v3::secret_discovery_service_server::{
    SecretDiscoveryService, SecretDiscoveryServiceServer,
};
use crate::serve::gate::Gate as _;
use crate::serve::health::Health;
use crate::sys::peer::Process;
use bounds::Room;

/// Connections at once, if the process may hold twice as many files open.
const CONNECTIONS: usize = 4_096;
/// Streams have no end of their own: at the end of the agent they are cut, and their clients come back to the next one.
const HANG_UP: Duration = Duration::from_millis(500);

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket.
    #[error("the agent's socket: {0}")]
    Socket(#[from] std::io::Error),
    /// What speaks on it.
    #[error("the agent's socket: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The descriptors that reflection tells.
    #[error("the gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// What all services of the socket share.
#[derive(Clone)]
pub struct Endpoint {
    /// What is held.
    pub agent: Arc<Agent>,
    /// Who may have it.
    pub attestor: Arc<dyn Attestor>,
}

impl Endpoint {
    /// Whom the caller of a request is. Asked for each request and again while a stream lives.
    pub async fn entitled(&self, extensions: &Extensions) -> Result<Vec<Entitled>, Status> {
        let caller = extensions
            .get::<Process>()
            .ok_or_else(|| Status::internal("the connection does not say who is at its other end"))?;
        self.attestor.attest(caller).await.map_err(|refused| {
            tracing::warn!(pid = caller.pid, uid = caller.uid, why = %refused, "caller refused");
            match refused {
                // Whoever has no identity learns no more than that.
                Refused::Unknown(_) => Status::permission_denied("no identity issued"),
                Refused::Unavailable(_) => {
                    Status::unavailable("the caller cannot be attested now; try again")
                }
            }
        })
    }
}

/// Serves on a socket that [`crate::sys::socket::Socket::bind`] made, until `stop` resolves. Of the files that the
/// process may hold open, at most half are callers.
pub async fn serve(
    listener: std::os::unix::net::UnixListener,
    open_files: usize,
    endpoint: Endpoint,
    sds: SecretDiscoveryServiceServer<impl SecretDiscoveryService>,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener)?;
    let (accepted, connections) = mpsc::channel(1);
    let incoming = tokio_stream::wrappers::ReceiverStream::new(connections);
    let room = Room::new();
    let reflection = || {
        tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(LOCAL_DESCRIPTORS)
    };
    // The socket is there; what callers are entitled to may still be on its way, and they are told so.
    let health = Health { ready: Arc::new(|| Ok(())) };
    let (stopping, stopped) = oneshot::channel::<()>();
    let serving = Server::builder()
        .timeout(bounds::BEGUN)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .max_concurrent_streams(bounds::STREAMS)
        .initial_stream_window_size(bounds::WINDOWS.0)
        .initial_connection_window_size(bounds::WINDOWS.1)
        .http2_max_header_list_size(bounds::LARGEST_HEADER)
        .http2_max_pending_accept_reset_streams(Some(bounds::RESETS.0))
        .http2_max_local_error_reset_streams(Some(bounds::RESETS.1))
        .add_service(
            room.before(HealthServer::new(health).max_decoding_message_size(bounds::LARGEST_MESSAGE)),
        )
        .add_service(room.before(reflection().build_v1()?.max_decoding_message_size(bounds::LARGEST_MESSAGE)))
        .add_service(
            room.before(reflection().build_v1alpha()?.max_decoding_message_size(bounds::LARGEST_MESSAGE)),
        )
        .add_service(room.before(sds))
        .add_service(InterceptedService::new(room.before(workload::service(endpoint)), workload::guarded))
        .serve_with_incoming_shutdown(incoming, async { drop(stopped.await) });
    tokio::pin!(serving);
    let most = CONNECTIONS.min(open_files / 2);
    tokio::select! {
        served = &mut serving => return Ok(served?),
        () = listener::accept(listener, most, accepted) => {}
        () = stop => {}
    }
    drop(stopping);
    match timeout(HANG_UP, serving).await {
        Ok(served) => Ok(served?),
        Err(_) => Ok(()),
    }
}
