//! Single requests about one object, and what became of them.

use std::fmt;
use std::time::Duration;

use http::Request;
use kube::Client;
use kube::core::request;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use super::{PATIENCE, said};
use crate::sys::keys;

/// What is asked for, as a role would say it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call<'a> {
    /// `get`, `create` and so on.
    pub(super) verb: &'static str,
    /// In the plural.
    pub(super) resource: &'static str,
    /// None for all of them.
    pub(super) namespace: Option<&'a str>,
    /// None for all of them.
    pub(super) name: Option<&'a str>,
}

impl fmt::Display for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { verb, resource, namespace, name } = self;
        write!(f, "{verb} {resource}")?;
        if let Some(name) = name {
            write!(f, " {name}")?;
        }
        match namespace {
            Some(namespace) => write!(f, " in the namespace {namespace}"),
            None => f.write_str(" in all namespaces"),
        }
    }
}

/// Why there is no good answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// There is no such object.
    Absent(String),
    /// There is one already, or it has changed since it was read.
    Taken(String),
    /// A permission is missing, or the credentials are not good.
    Denied(String),
    /// The API server says that this can never be.
    Wrong(String),
    /// It cannot be asked now, and may have said when it can be.
    Away(String, Option<Duration>),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent(fault)
            | Self::Taken(fault)
            | Self::Denied(fault)
            | Self::Wrong(fault)
            | Self::Away(fault, _) => f.write_str(fault),
        }
    }
}

/// Asks once. The answer is read here, since kube logs one that it cannot read, and keys may be in it.
pub(super) async fn call<T: DeserializeOwned>(
    client: &Client,
    call: Call<'_>,
    request: Result<Request<Vec<u8>>, request::Error>,
) -> Result<T, Fault> {
    let request = request.map_err(|fault| Fault::Wrong(format!("cannot {call}: {fault}")))?;
    let text = match tokio::time::timeout(PATIENCE, client.request_text(request)).await {
        Ok(Ok(text)) => Zeroizing::new(text),
        Ok(Err(fault)) => return Err(judged(call, &fault)),
        Err(_) => {
            let fault = format!("cannot {call}: no answer within {} seconds", PATIENCE.as_secs());
            return Err(Fault::Away(fault, None));
        }
    };
    // What serde says shows what stands there.
    serde_json::from_str(&text).map_err(|fault| {
        let (line, column) = (fault.line(), fault.column());
        Fault::Away(format!("cannot {call}: the answer has a fault at line {line}, column {column}"), None)
    })
}

fn judged(call: Call<'_>, fault: &kube::Error) -> Fault {
    let text = format!("cannot {call}: {}", said(fault));
    let kube::Error::Api(status) = fault else { return Fault::Away(text, None) };
    match status.code {
        404 => Fault::Absent(text),
        409 => Fault::Taken(text),
        401 | 403 => Fault::Denied(format!(
            "the permission to {call} is missing: {} ({})",
            status.message, status.code
        )),
        400 | 405 | 413 | 415 | 422 => Fault::Wrong(text),
        _ => {
            let after = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
            Fault::Away(text, (after > 0).then(|| Duration::from_secs(after.into())))
        }
    }
}

/// About so long, so that those who were let down together do not come back together.
pub(super) fn jittered(about: Duration) -> Duration {
    let [random] = keys::random_bytes().unwrap_or([128]);
    about.mul_f64(0.75 + f64::from(random) / 510.0)
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::http::StatusCode;
    use serde::de::IgnoredAny;
    use serde_json::{Value, json};
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    use super::*;
    use crate::cluster::Cluster;

    const CALL: Call<'_> =
        Call { verb: "get", resource: "secrets", namespace: Some("istio-system"), name: Some("cacerts") };

    async fn answered<T: DeserializeOwned>(code: u16, body: String) -> Result<T, Fault> {
        let mut tasks = JoinSet::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let answer = move || async move { (StatusCode::from_u16(code).unwrap(), body) };
        tasks.spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await.unwrap() });
        let cluster = Cluster::new(kube::Config::new(url.parse().unwrap())).unwrap();
        let request = kube::core::Request::new("/api").get("x", &kube::core::params::GetParams::default());
        call(&cluster.client, CALL, request).await
    }

    #[tokio::test]
    async fn each_answer_is_what_it_says_and_names_the_call() {
        type Kind = fn(&Fault) -> bool;
        let said = |code: u16, more: Value| {
            let mut status = json!({"kind": "Status", "status": "Failure", "message": "why", "code": code});
            status.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            status.to_string()
        };
        let cases: [(u16, Kind); 12] = [
            (404, |fault| matches!(fault, Fault::Absent(_))),
            (409, |fault| matches!(fault, Fault::Taken(_))),
            (401, |fault| matches!(fault, Fault::Denied(_))),
            (403, |fault| matches!(fault, Fault::Denied(_))),
            (400, |fault| matches!(fault, Fault::Wrong(_))),
            (405, |fault| matches!(fault, Fault::Wrong(_))),
            (413, |fault| matches!(fault, Fault::Wrong(_))),
            (422, |fault| matches!(fault, Fault::Wrong(_))),
            (410, |fault| matches!(fault, Fault::Away(_, None))),
            (429, |fault| matches!(fault, Fault::Away(_, None))),
            (500, |fault| matches!(fault, Fault::Away(_, None))),
            (504, |fault| matches!(fault, Fault::Away(_, None))),
        ];
        for (code, is_meant) in cases {
            let fault = answered::<IgnoredAny>(code, said(code, json!({}))).await.err().unwrap();
            assert!(is_meant(&fault), "{code}: {fault:?}");
            let text = fault.to_string();
            assert!(text.contains("get secrets cacerts in the namespace istio-system"), "{text}");
            assert!(text.contains(&format!("why ({code})")), "{text}");
        }
        let busy = said(429, json!({"details": {"retryAfterSeconds": 7}}));
        let fault = answered::<IgnoredAny>(429, busy).await.err().unwrap();
        assert!(matches!(fault, Fault::Away(_, Some(after)) if after == Duration::from_secs(7)), "{fault:?}");
    }

    #[tokio::test]
    async fn an_answer_that_cannot_be_read_is_not_shown() {
        let fault = answered::<u32>(200, "\"very secret\"".to_owned()).await.unwrap_err();
        assert!(matches!(fault, Fault::Away(_, None)), "{fault:?}");
        let text = format!("{fault} {fault:?}");
        assert!(text.contains("the answer has a fault at line 1") && !text.contains("secret\""), "{text}");
        assert!(!text.contains("very"), "{text}");
    }

    #[test]
    fn jitter_stays_within_a_quarter() {
        let second = Duration::from_secs(1);
        let drawn: Vec<_> = (0..1000).map(|_| jittered(second)).collect();
        assert!(drawn.iter().all(|one| *one >= second * 3 / 4 && *one <= second * 5 / 4));
        assert!(drawn.iter().min() < drawn.iter().max());
    }
}
