//! The way to an API server, and the weather on it: a proxy that passes on what Mica asks, as Mica's user, or does to it what
//! API servers do on bad days.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Request, Response, StatusCode};
use kube::Client;
use serde_json::json;
use tokio::sync::watch;
use tokio_stream::StreamExt as _;

use super::control_plane::{ControlPlane, client_of, runtime};

/// What happens to requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weather {
    /// Nothing.
    Fair,
    /// Watches end, and what they would go on from is too old (410).
    Expired,
    /// Too many requests (429): come back after so many seconds.
    TooMany(u64),
    /// One in so many is answered by a 500, before or after it was done.
    Errors(u64),
    /// Each takes so long.
    Slow(Duration),
    /// Nothing is answered.
    Silent,
    /// Answers end in the middle.
    Cut,
    /// Whoever changes something hears that somebody else was faster (409).
    Conflicts,
    /// Nothing is permitted any more (403).
    Forbidden,
    /// Connections are refused as by a server that restarts (503).
    Away,
}

/// A way to an API server, for one user.
pub(crate) struct Way {
    address: SocketAddr,
    folder: tempfile::TempDir,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    client: Client,
    weather: watch::Sender<Weather>,
    count: Mutex<u64>,
}

impl Way {
    pub(crate) fn new(plane: &ControlPlane, user: &str) -> Self {
        let shared = Arc::new(Shared {
            client: client_of(&plane.kubeconfig_of(user)),
            weather: watch::Sender::new(Weather::Fair),
            count: Mutex::default(),
        });
        let listener = runtime().block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().fallback(pass).with_state(shared.clone());
        let task = runtime().spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { address, folder: tempfile::tempdir().unwrap(), shared, task }
    }

    /// What Mica finds its way by.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        let path = self.folder.path().join("kubeconfig");
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "test", "user": {}}],
        });
        fs::write(&path, text.to_string()).unwrap();
        path
    }

    /// From now on. What is under way and hangs ends.
    pub(crate) fn weather(&self, weather: Weather) {
        self.shared.weather.send_replace(weather);
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default();
    let is_watch = query.contains("watch=true") || query.contains("watch=1");
    let changes = !matches!(parts.method.as_str(), "GET" | "HEAD");
    let number = {
        let mut count = shared.count.lock().unwrap();
        *count += 1;
        *count
    };
    let mut changed = shared.weather.subscribe();
    let weather = *changed.borrow_and_update();
    let mut is_lost = false;
    match weather {
        Weather::TooMany(seconds) => return status(429, "TooManyRequests", Some(seconds)),
        Weather::Errors(one_in) if number.is_multiple_of(one_in) => {
            if number.is_multiple_of(2 * one_in) {
                return status(500, "InternalError", None);
            }
            is_lost = true;
        }
        Weather::Slow(time) => tokio::time::sleep(time).await,
        Weather::Silent => {
            let _ = tokio::time::timeout(Duration::from_secs(60), changed.changed()).await;
            return status(504, "Timeout", None);
        }
        Weather::Conflicts if changes => return status(409, "Conflict", None),
        Weather::Forbidden => return status(403, "Forbidden", None),
        Weather::Away => return status(503, "ServiceUnavailable", None),
        Weather::Expired if query.contains("resourceVersion=") && is_watch => {
            return status(410, "Expired", None);
        }
        _ => {}
    }
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let mut onward = http::Request::builder()
        .method(parts.method)
        .uri(parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str));
    for name in [http::header::CONTENT_TYPE, http::header::ACCEPT] {
        if let Some(value) = parts.headers.get(&name) {
            onward = onward.header(name, value);
        }
    }
    let onward = onward.body(kube::client::Body::from(body.to_vec())).unwrap();
    let answer = match shared.client.send(onward).await {
        Ok(answer) => answer,
        Err(_) => return status(503, "ServiceUnavailable", None),
    };
    if is_lost {
        return status(500, "InternalError", None);
    }
    let (head, body) = answer.into_parts();
    let body = Body::new(body).into_data_stream();
    let body = match (is_watch, weather) {
        // It ends with the weather that it began in, or says that it is out of date.
        (true, _) => {
            let ends = tokio_stream::wrappers::WatchStream::from_changes(changed).map(|now| match now {
                Weather::Expired => Some(Ok(Bytes::from_static(EXPIRED))),
                Weather::Fair | Weather::Slow(_) | Weather::Conflicts | Weather::Errors(_) => {
                    Some(Ok(Bytes::new()))
                }
                _ => None,
            });
            Body::from_stream(body.map(Some).merge(ends).take_while(Option::is_some).filter_map(|part| part))
        }
        (false, Weather::Cut) => {
            let all = axum::body::to_bytes(Body::from_stream(body), usize::MAX).await.unwrap_or_default();
            let half = all.slice(..all.len() / 2);
            let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
            Body::from_stream(tokio_stream::iter([Ok(half), Err(broken)]))
        }
        (false, _) => Body::from_stream(body),
    };
    let mut response = Response::new(body);
    *response.status_mut() = head.status;
    if let Some(value) = head.headers.get(http::header::CONTENT_TYPE) {
        response.headers_mut().insert(http::header::CONTENT_TYPE, value.clone());
    }
    response
}

const EXPIRED: &[u8] = br#"{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","message":"too old resource version","reason":"Expired","code":410}}
"#;

fn status(code: u16, reason: &str, retry_after: Option<u64>) -> Response<Body> {
    let text = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("{reason}, by the weather"), "reason": reason, "code": code,
    });
    let mut response = Response::new(Body::from(text.to_string()));
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response.headers_mut().insert(http::header::CONTENT_TYPE, "application/json".parse().unwrap());
    if let Some(seconds) = retry_after {
        response.headers_mut().insert(http::header::RETRY_AFTER, seconds.into());
    }
    response
}
