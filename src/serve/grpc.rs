//! gRPC alone. tonic takes a POST of `application/grpc` and anything else for the same; what a browser can be made to send
//! to a server that it has a certificate for is refused here, as gRPC over HTTP/2 wants it.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::header::{ALLOW, CONTENT_TYPE};
use tonic::codegen::http::{HeaderValue, Method, Request, Response, StatusCode};
use tonic::server::NamedService;

/// Agents send ten. On the wire one more can be a byte, while it is kept it is a hundred.
const MOST_HEADERS: usize = 64;

/// A service that hears nothing but gRPC.
#[derive(Clone, Debug)]
pub(super) struct GrpcOnly<S>(pub(super) S);

impl<S: NamedService> NamedService for GrpcOnly<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, B> Service<Request<B>> for GrpcOnly<S>
where
    S: Service<Request<B>, Response = Response<Body>, Error = Infallible>,
    S::Future: Unpin,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match refused(&request) {
            Some(refusal) => Answering::Refused(Some(refusal)),
            None => Answering::Asked(self.0.call(request)),
        }
    }
}

fn refused<B>(request: &Request<B>) -> Option<Response<Body>> {
    let mut response = Response::new(Body::empty());
    if request.headers().len() > MOST_HEADERS {
        *response.status_mut() = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        return Some(response);
    }
    if request.method() != Method::POST {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
        return Some(response);
    }
    let mut types = request.headers().get_all(CONTENT_TYPE).iter();
    let is_grpc = |kind: &HeaderValue| {
        let rest = kind.as_bytes().strip_prefix(b"application/grpc");
        rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    };
    if !types.next().is_some_and(is_grpc) || types.next().is_some() {
        *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return Some(response);
    }
    None
}

/// What comes of a request.
pub(super) enum Answering<F> {
    Asked(F),
    Refused(Option<Response<Body>>),
}

impl<F> Future for Answering<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Asked(answer) => Pin::new(answer).poll(cx),
            Self::Refused(refusal) => Poll::Ready(Ok(refusal.take().unwrap_or_default())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_grpc_is_refused() {
        let status = |method: Method, types: &[&'static str]| {
            let mut request = Request::builder().method(method).uri("/a.B/C");
            for kind in types {
                request = request.header(CONTENT_TYPE, *kind);
            }
            refused(&request.body(()).unwrap()).map(|refusal| refusal.status().as_u16())
        };
        for kind in ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"] {
            assert_eq!(status(Method::POST, &[kind]), None, "{kind}");
            assert_eq!(status(Method::GET, &[kind]), Some(405), "{kind}");
        }
        for kind in ["", "text/plain", "application/grpc-web", "application/grpcx", "Application/json"] {
            assert_eq!(status(Method::POST, &[kind]), Some(415), "{kind}");
        }
        assert_eq!(status(Method::POST, &[]), Some(415));
        assert_eq!(status(Method::POST, &["application/grpc", "text/plain"]), Some(415));
        assert_eq!(status(Method::POST, &["application/grpc"; MOST_HEADERS + 1]), Some(431));
    }
}
