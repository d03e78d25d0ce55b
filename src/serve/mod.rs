//! The gRPC listener: TLS with Mica's own leaf, and the services behind it.

mod health;
pub mod queue;
pub mod tls;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::proto::grpc::health::v1::health_server::HealthServer;
use crate::sys::listen::{Listener, Stream};
use tls::ServingCertificate;

/// Says whether Mica can do its work now.
pub type Ready = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// A handshake takes milliseconds; whoever needs longer is not let in.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// So many handshakes at once; a further one takes the place of the oldest.
const HANDSHAKES: usize = 256;
/// Clients that are there answer a ping after 30 seconds.
const IDLE: Duration = Duration::from_secs(60);

/// Serves until `stop` resolves. Of the files that the process may hold open, less than half are clients.
pub async fn serve(
    listener: TcpListener,
    open_files: usize,
    certificate: Arc<ServingCertificate>,
    ready: Ready,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let (accepted, connections) = mpsc::channel(1);
    let acceptor = TlsAcceptor::from(Arc::new(certificate.config()));
    let incoming = tokio_stream::wrappers::ReceiverStream::new(connections);
    let serving = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(HealthServer::new(health::Health { ready }))
        .serve_with_incoming_shutdown(incoming, stop);
    let listener = Listener::new(listener, HANDSHAKES.min(open_files / 8), HANDSHAKE);
    tokio::select! {
        served = serving => served,
        () = accept(listener, acceptor, open_files / 4, accepted) => Ok(()),
    }
}

/// Accepts for ever: a connection that fails ends nothing but itself.
async fn accept(
    mut listener: Listener,
    acceptor: TlsAcceptor,
    most: usize,
    accepted: mpsc::Sender<Result<TlsStream<Stream>, std::io::Error>>,
) {
    let places = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
    let mut handshakes = JoinSet::new();
    loop {
        let stream = listener.accept().await;
        while handshakes.try_join_next().is_some() {}
        let (acceptor, accepted, places) = (acceptor.clone(), accepted.clone(), places.clone());
        handshakes.spawn(async move {
            let mut stream = match acceptor.accept(stream).await {
                Ok(stream) => stream,
                Err(fault) => return tracing::debug!(%fault, "TLS handshake failed"),
            };
            let Ok(place) = places.try_acquire_owned() else {
                return tracing::warn!(most, "a client is sent away: too many are connected");
            };
            stream.get_mut().0.stay(IDLE, place);
            drop(accepted.send(Ok(stream)).await);
        });
    }
}

impl Connected for Stream {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.get_ref().connect_info()
    }
}
