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
