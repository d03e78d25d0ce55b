//! HTTP for operators and probes: `/livez`, `/readyz`, `/metrics`.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::header::{CONNECTION, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::sys::listen::{Listener, Stream};

/// Says whether Mica can do its work now; the error says, for people, why not.
pub type Ready = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// An answer takes milliseconds; whoever needs longer is not waited for.
const REQUEST: Duration = Duration::from_secs(10);
/// So many requests at once; a further one takes the place of the oldest.
const REQUESTS: usize = 64;

/// Serves until `stop` resolves. Of the files that the process may hold open, at most an eighth are clients.
pub async fn serve(
    listener: TcpListener,
    open_files: usize,
    registry: Arc<Registry>,
    ready: Ready,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(move || async move { readiness(&ready) }))
        .route("/metrics", get(move || async move { metrics(&registry) }))
        .layer(map_response(last));
    let door = Door(Listener::new(listener, REQUESTS.min(open_files / 8), REQUEST));
    axum::serve(door, routes).with_graceful_shutdown(stop).await
}

struct Door(Listener);

impl axum::serve::Listener for Door {
    type Io = Stream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Stream, SocketAddr) {
        loop {
            let stream = self.0.accept().await;
            if let Ok(address) = stream.get_ref().peer_addr() {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// One request a connection, since its time is short.
async fn last(mut response: Response) -> Response {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

fn readiness(ready: &Ready) -> Response {
    match ready() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

fn metrics(registry: &Registry) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
