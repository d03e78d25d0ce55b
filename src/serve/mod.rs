//! The gRPC listener: TLS with Mica's own leaf, and the services behind it.

mod health;
pub mod tls;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;

use crate::proto::grpc::health::v1::health_server::HealthServer;
use tls::ServingCertificate;

/// Says whether Mica can do its work now.
pub type Ready = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// A handshake takes milliseconds; whoever needs longer is not let in.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// So many handshakes at once; further connections wait in the kernel's queue.
const HANDSHAKES: usize = 256;

/// Serves until `stop` resolves.
pub async fn serve(
    listener: TcpListener,
    certificate: Arc<ServingCertificate>,
    ready: Ready,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let (accepted, connections) = mpsc::channel(HANDSHAKES);
    let acceptor = TlsAcceptor::from(Arc::new(certificate.config()));
    let incoming = tokio_stream::wrappers::ReceiverStream::new(connections);
    let serving = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(HealthServer::new(health::Health { ready }))
        .serve_with_incoming_shutdown(incoming, stop);
    tokio::select! {
        served = serving => served,
        () = accept(listener, acceptor, accepted) => Ok(()),
    }
}

/// Accepts for ever: a connection that fails ends nothing but itself.
async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    accepted: mpsc::Sender<Result<TlsStream<TcpStream>, std::io::Error>>,
) {
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        if handshakes.len() >= HANDSHAKES {
            handshakes.join_next().await;
        }
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(fault) => {
                // Such as too many open files, which passes.
                tracing::warn!(%fault, "cannot accept a connection on the gRPC port");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
        handshakes.spawn(async move {
            match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => drop(accepted.send(Ok(stream)).await),
                Ok(Err(fault)) => tracing::debug!(%fault, "TLS handshake failed"),
                Err(_) => tracing::debug!("TLS handshake timed out"),
            }
        });
    }
}
