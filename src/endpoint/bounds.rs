//! What callers may hold of the agent's memory, each connection and all together. Streams stay open for as long as their
//! workloads live, so that it is not time that bounds them but their number, and a stream holds one answer at most.

use std::time::Duration;

use tonic::Status;
use tonic::codegen::http::Request;

use crate::serve::gate::Gate;
use crate::sys::listen::{Place, Places};
use crate::sys::peer::Process;

/// A JWT-SVID to validate fits, and so does what Envoy tells of itself when it asks for a secret.
pub(super) const LARGEST_MESSAGE: usize = 64 * 1024;
/// Callers show no credentials in headers.
pub(super) const LARGEST_HEADER: u32 = 8 * 1024;
/// Requests at once on one connection. Clients wait with more.
pub(super) const STREAMS: u32 = 128;
/// What clients may send of one request before it is read, and of all on a connection.
pub(super) const WINDOWS: (u32, u32) = (LARGEST_MESSAGE as u32, 128 * 1024);
/// Requests that a client takes back before they were looked at, and those that break rules, before it is sent away.
pub(super) const RESETS: (usize, usize) = (32, 128);
/// Until an answer begins; a stream may then go on for ever.
pub(super) const BEGUN: Duration = Duration::from_secs(30);
/// Requests of all connections that are not done. Then the user with the most, and its process with the most, has no
/// room for one more.
const MOST: usize = 8_192;

/// Room for requests. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Room(Places<u32, u32>);

impl Room {
    pub(super) fn new() -> Self {
        Self::of(MOST)
    }

    fn of(most: usize) -> Self {
        Self(Places::new(most))
    }
}

impl Gate for Room {
    type Held = Place<u32, u32>;

    fn enter<B>(&self, request: &Request<B>) -> Result<Self::Held, Status> {
        // Set by the listener, for every connection.
        let caller = request.extensions().get::<Process>();
        caller.and_then(|caller| self.0.take_for(caller.uid, caller.pid)).ok_or_else(|| {
            let full =
                "too many requests are open on the agent's socket, most of them of this user; try again";
            Status::unavailable(full)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::Future as _;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::task::{Context, Poll};

    use tonic::body::Body;
    use tonic::codegen::Service;
    use tonic::codegen::http::Response;

    use super::*;

    #[derive(Clone)]
    struct Silent;

    impl Service<Request<()>> for Silent {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::future::Pending<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<()>) -> Self::Future {
            std::future::pending()
        }
    }

    #[tokio::test]
    async fn who_takes_all_the_room_leaves_some_to_others() {
        let mut service = Room::of(4).before(Silent);
        let (one, _) = std::os::unix::net::UnixStream::pair().unwrap();
        let handle = Arc::new(one.into());
        let mut ask = |uid, pid| {
            let caller = Process { pid, uid, gid: 0, handle: Arc::clone(&handle) };
            let mut answering = service.call(Request::builder().extension(caller).body(()).unwrap());
            let mut cx = Context::from_waker(std::task::Waker::noop());
            match Pin::new(&mut answering).poll(&mut cx) {
                Poll::Pending => Some(answering),
                Poll::Ready(Ok(response)) => {
                    let status = Status::from_header_map(response.headers()).unwrap();
                    assert_eq!(status.code(), tonic::Code::Unavailable);
                    None
                }
            }
        };
        let mut held: Vec<_> = (0..4).map(|_| ask(1000, 1).unwrap()).collect();
        assert!(ask(1000, 1).is_none());
        // Another process of the user, then another user.
        held.push(ask(1000, 2).unwrap());
        held.push(ask(1001, 3).unwrap());
        assert!(ask(1000, 1).is_none());
        held.clear();
        held.extend((0..4).map(|_| ask(1000, 1).unwrap()));
    }
}
