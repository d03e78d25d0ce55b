//! Documents sent to one server, one after the other.

use std::io::Cursor;
use std::time::Duration;

use http::Request;
use http::header::{CONTENT_TYPE, USER_AGENT};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::fetch::{Trust, Unconnected, chain, connector};
use crate::core::url::Url;

/// From the first packet to the last byte.
const WITHIN: Duration = Duration::from_secs(5);
/// A connection that nothing was sent on for so long is closed.
const IDLE: Duration = Duration::from_secs(15);
/// What is read of an answer, so that its connection can be used again.
const ANSWER: usize = 64 * 1024;

/// Sends to one place. What fails is not tried again.
#[derive(Debug)]
pub struct Post {
    url: Url,
    content_type: &'static str,
    client: Option<Client<HttpsConnector<HttpConnector>, Body>>,
}

type Body = Full<Cursor<Vec<u8>>>;

impl Post {
    /// To a place, documents of a type. Nothing is connected yet.
    pub fn new(url: Url, content_type: &'static str) -> Self {
        Self { url, content_type, client: None }
    }

    /// Where to.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Sends one document. An error says, in the middle of a sentence, why the server has not taken it.
    pub async fn send(&mut self, document: Vec<u8>) -> Result<(), String> {
        let sent = tokio::time::timeout(WITHIN, self.try_send(document)).await;
        let sent = sent.unwrap_or_else(|_| Err(format!("no answer within {WITHIN:?}")));
        if sent.is_err() {
            // The next connection sees the name's address and the trust roots as they are then.
            self.client = None;
        }
        sent
    }

    async fn try_send(&mut self, document: Vec<u8>) -> Result<(), String> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let connector = connector(&self.url, Trust::System).await.map_err(|fault| match fault {
                    Unconnected::Roots(fault) => format!("the system's trust roots cannot be read: {fault}"),
                    Unconnected::Other(fault) => fault,
                })?;
                let client = Client::builder(TokioExecutor::new())
                    .pool_max_idle_per_host(1)
                    .pool_idle_timeout(IDLE)
                    .pool_timer(TokioTimer::new())
                    .http1_max_buf_size(ANSWER)
                    .build(connector);
                self.client.insert(client)
            }
        };
        let request = Request::post(self.url.uri().clone())
            .header(CONTENT_TYPE, self.content_type)
            .header(USER_AGENT, concat!("mica/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(Cursor::new(document)))
            .map_err(|e| e.to_string())?;
        let response = client.request(request).await.map_err(|e| chain(&e))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER).collect().await;
        match status.is_success() {
            true => body.map(drop).map_err(|e| chain(&*e)),
            false => Err(format!("the server answered {status}")),
        }
    }
}
