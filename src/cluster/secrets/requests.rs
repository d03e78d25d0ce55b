//! Single requests about secrets: each with an end, each write only while this replica may write, and fewer the less the
//! API server can do.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http::header::RETRY_AFTER;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use kube::Client;
use kube::client::Body;
use kube::core::Status;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::stored::name;
use crate::cluster::{Leadership, MANAGER, PATIENCE, said};
use crate::core::spiffe::ServiceAccount;
use crate::sink::Error;

/// After so many failures in a row there is one request at a time.
const FAILURES: u32 = 8;
/// And so much time between them.
const PACE: Duration = Duration::from_secs(1);
/// An API server that has too much to do is asked again so often, after the time that it names, of at most so long.
const TRIES: u32 = 5;
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Whether this replica may write is looked at so often.
const LOOK: Duration = Duration::from_millis(100);

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Fault {
    NotFound,
    /// It is another one than was thought, or there is one already.
    Conflict,
    /// Its namespace is being deleted.
    Ending,
    /// In words.
    Other(String),
}

impl Fault {
    pub(super) fn during(self, doing: &'static str) -> Error {
        match self {
            Self::NotFound | Self::Conflict => Error::Changed,
            Self::Ending => Error::Ending,
            Self::Other(fault) => Error::Api { doing, fault },
        }
    }
}

/// Asks the API server.
pub(super) struct Requests {
    client: Client,
    leadership: Leadership,
    /// Failures of the API server itself since it last did anything.
    failures: AtomicU32,
    turn: tokio::sync::Mutex<()>,
    /// It has asked for a pause until then.
    pause: Mutex<Option<Instant>>,
}

impl Requests {
    pub(super) fn new(client: Client, leadership: Leadership) -> Self {
        Self {
            client,
            leadership,
            failures: AtomicU32::new(0),
            turn: tokio::sync::Mutex::new(()),
            pause: Mutex::default(),
        }
    }

    pub(super) async fn get(&self, account: &ServiceAccount) -> Result<Value, Fault> {
        self.ask(&Method::GET, &path(account, &name(account)), None).await
    }

    /// Tells the version of what was written.
    pub(super) async fn create(&self, account: &ServiceAccount, object: &Value) -> Result<u64, Fault> {
        let path = format!("{}?fieldManager={MANAGER}", path(account, ""));
        self.ask(&Method::POST, &path, Some(object)).await.map(|written| version(&written))
    }

    /// Replaces the version that was read. Tells the one that was written.
    pub(super) async fn replace(&self, account: &ServiceAccount, object: &Value) -> Result<u64, Fault> {
        let path = format!("{}?fieldManager={MANAGER}", path(account, &name(account)));
        self.ask(&Method::PUT, &path, Some(object)).await.map(|written| version(&written))
    }

    /// Deletes the version that was read.
    pub(super) async fn delete(&self, account: &ServiceAccount, object: &Value) -> Result<(), Fault> {
        let metadata = &object["metadata"];
        let options = json!({
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "preconditions": {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]},
        });
        self.ask(&Method::DELETE, &path(account, &name(account)), Some(&options)).await.map(|_| ())
    }

    async fn ask(&self, method: &Method, path: &str, body: Option<&Value>) -> Result<Value, Fault> {
        let mut tries = 0;
        loop {
            let _turn = self.turn(method).await;
            let answer = tokio::time::timeout(PATIENCE, self.send(method, path, body)).await;
            let fault = match answer {
                Ok(Ok((status, _, text))) if status.is_success() => {
                    self.failures.store(0, Ordering::Relaxed);
                    return serde_json::from_slice(&text).map_err(|fault| {
                        Fault::Other(format!("the API server answered with no object: {fault}"))
                    });
                }
                Ok(Ok((StatusCode::TOO_MANY_REQUESTS, pause, _))) if tries < TRIES => {
                    tries += 1;
                    self.pause(pause.unwrap_or(PACE));
                    continue;
                }
                Ok(Ok((status, _, text))) => {
                    // Of its own, not of what was asked.
                    if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                        self.failures.fetch_add(1, Ordering::Relaxed);
                    } else {
                        self.failures.store(0, Ordering::Relaxed);
                    }
                    return Err(refused(status, &text));
                }
                Ok(Err(fault)) => said(&fault),
                Err(_) => format!("no answer within {} seconds", PATIENCE.as_secs()),
            };
            self.failures.fetch_add(1, Ordering::Relaxed);
            return Err(Fault::Other(fault));
        }
    }

    async fn send(
        &self,
        method: &Method,
        path: &str,
        body: Option<&Value>,
    ) -> kube::Result<(StatusCode, Option<Duration>, Vec<u8>)> {
        let mut request = Request::builder().method(method).uri(path);
        if body.is_some() {
            request = request.header(http::header::CONTENT_TYPE, "application/json");
        }
        let text = body.map(Value::to_string).unwrap_or_default().into_bytes();
        let request = request.body(Body::from(text)).map_err(kube::Error::HttpError)?;
        let answer = self.client.send(request).await?;
        let pause = answer.headers().get(RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
        let status = answer.status();
        let text = answer.into_body().collect().await?.to_bytes();
        Ok((status, pause.map(Duration::from_secs), text.into()))
    }

    /// Waits until a request may be made. While the API server fails, what is returned is held by one request at a time.
    async fn turn(&self, method: &Method) -> Option<tokio::sync::MutexGuard<'_, ()>> {
        let mut turn = None;
        if self.failures.load(Ordering::Relaxed) >= FAILURES {
            let guard = self.turn.lock().await;
            if self.failures.load(Ordering::Relaxed) >= FAILURES {
                tokio::time::sleep(PACE).await;
                turn = Some(guard);
            }
        }
        loop {
            let pause = *self.pause.lock().unwrap_or_else(PoisonError::into_inner);
            match pause.filter(|until| *until > Instant::now()) {
                Some(until) => tokio::time::sleep_until(until).await,
                None if *method != Method::GET && !self.leadership.may_write() => {
                    tokio::time::sleep(LOOK).await
                }
                None => return turn,
            }
        }
    }

    fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause.min(LONGEST_PAUSE);
        let mut known = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        *known = (*known).max(Some(until));
    }
}

fn refused(status: StatusCode, text: &[u8]) -> Fault {
    let said: Option<Status> = serde_json::from_slice(text).ok();
    let has_cause = |reason: &str| {
        let details = said.as_ref().and_then(|said| said.details.as_ref());
        details.is_some_and(|details| details.causes.iter().any(|cause| cause.reason == reason))
    };
    match status {
        StatusCode::NOT_FOUND => Fault::NotFound,
        StatusCode::CONFLICT => Fault::Conflict,
        StatusCode::FORBIDDEN if has_cause("NamespaceTerminating") => Fault::Ending,
        _ => Fault::Other(match said {
            Some(said) => format!("{} ({})", said.message, status.as_u16()),
            None => format!("the API server answered with {status}"),
        }),
    }
}

/// Names of namespaces and accounts need no escape.
fn path(account: &ServiceAccount, name: &str) -> String {
    let all = format!("/api/v1/namespaces/{}/secrets", account.namespace());
    if name.is_empty() { all } else { format!("{all}/{name}") }
}

fn version(written: &Value) -> u64 {
    written["metadata"]["resourceVersion"].as_str().and_then(|version| version.parse().ok()).unwrap_or(0)
}
