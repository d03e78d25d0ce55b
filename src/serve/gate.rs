//! What stands before a service: who is let in holds something, until the last byte of the answer is on its way.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body_util::BodyExt as _;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;

/// Lets requests in.
pub trait Gate: Clone {
    /// What a request holds.
    type Held: Send + Unpin + 'static;

    /// What it holds from now on, or what it is answered instead.
    fn enter<B>(&self, request: &Request<B>) -> Result<Self::Held, Status>;

    /// What its answer becomes.
    fn answered(_held: &Self::Held, response: Response<Body>) -> Response<Body> {
        response
    }

    /// A service with this before it.
    fn before<S>(&self, inner: S) -> Gated<S, Self> {
        Gated { inner, gate: self.clone() }
    }
}

/// A service with a gate before it.
#[derive(Clone, Debug)]
pub struct Gated<S, G> {
    inner: S,
    gate: G,
}

impl<S: NamedService, G> NamedService for Gated<S, G> {
    const NAME: &'static str = S::NAME;
}

impl<S, G, B> Service<Request<B>> for Gated<S, G>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
    S::Future: Unpin,
    G: Gate,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering<S::Future, G>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self.gate.enter(&request) {
            Ok(held) => Answering::Inside(self.inner.call(request), Some(held)),
            Err(status) => Answering::Outside(Some(status)),
        }
    }
}

/// An answer on its way.
#[derive(Debug)]
pub enum Answering<F, G: Gate> {
    /// Of the service.
    Inside(F, Option<G::Held>),
    /// Of the gate.
    Outside(Option<Status>),
}

impl<F, G> Future for Answering<F, G>
where
    F: Future<Output = Result<Response<Body>, Infallible>> + Unpin,
    G: Gate,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (response, held) = match &mut *self {
            Self::Outside(status) => {
                return status.take().map_or(Poll::Pending, |status| Poll::Ready(Ok(status.into_http())));
            }
            Self::Inside(inner, held) => match Pin::new(inner).poll(cx) {
                Poll::Ready(Ok(response)) => (response, held.take()),
                Poll::Pending => return Poll::Pending,
            },
        };
        let response = match &held {
            Some(held) => G::answered(held, response),
            None => response,
        };
        Poll::Ready(Ok(response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                let _until_it_is_dropped = &held;
                frame
            }))
        })))
    }
}
