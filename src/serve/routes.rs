//! Which service a request is for, by its path, `/<service>/<method>` (gRPC over HTTP/2). tonic's own router does the same
//! by way of one for web pages, which costs a dozen allocations a request.

use std::convert::Infallible;
use std::future::{Future, Ready, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::body::Incoming;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;

/// Services, each under its name. Clones share them.
#[derive(Debug)]
pub(super) struct Routes<R>(Arc<R>);

impl Routes<Nobody> {
    pub(super) fn new() -> Self {
        Self(Arc::new(Nobody))
    }
}

impl<R> Routes<R> {
    /// These, and one more.
    pub(super) fn with<S>(self, service: S) -> Routes<Or<S, R>> {
        Routes(Arc::new(Or { service, others: self }))
    }
}

impl<R> Clone for Routes<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R: Route> Route for Routes<R> {
    type Answering = R::Answering;

    fn answer(&self, request: Request<Incoming>) -> Self::Answering {
        self.0.answer(request)
    }
}

type Answer = Result<Response<Body>, Infallible>;

/// Answers a request, or leaves it to somebody else.
pub(super) trait Route {
    type Answering: Future<Output = Answer> + Send + Unpin + 'static;

    fn answer(&self, request: Request<Incoming>) -> Self::Answering;
}

/// One service, and others for what is not its own.
#[derive(Debug)]
pub(super) struct Or<S, R> {
    service: S,
    others: Routes<R>,
}

impl<S, R> Route for Or<S, R>
where
    // Those that tonic generates are always ready.
    S: Service<Request<Incoming>, Response = Response<Body>, Error = Infallible> + NamedService + Clone,
    S::Future: Send + Unpin + 'static,
    R: Route,
{
    type Answering = Either<S::Future, R::Answering>;

    fn answer(&self, request: Request<Incoming>) -> Self::Answering {
        let path = request.uri().path().strip_prefix('/').and_then(|path| path.strip_prefix(S::NAME));
        if path.is_some_and(|method| method.starts_with('/')) {
            Either::Own(self.service.clone().call(request))
        } else {
            Either::Others(self.others.answer(request))
        }
    }
}

/// For what no service has.
#[derive(Debug)]
pub(super) struct Nobody;

impl Route for Nobody {
    type Answering = Ready<Answer>;

    fn answer(&self, _: Request<Incoming>) -> Self::Answering {
        ready(Ok(Status::unimplemented("no such service").into_http()))
    }
}

/// An answer of one of two.
pub(super) enum Either<S, R> {
    Own(S),
    Others(R),
}

impl<S, R> Future for Either<S, R>
where
    S: Future<Output = Answer> + Unpin,
    R: Future<Output = Answer> + Unpin,
{
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        match &mut *self {
            Self::Own(answering) => Pin::new(answering).poll(cx),
            Self::Others(answering) => Pin::new(answering).poll(cx),
        }
    }
}
