//! gRPC health checks, for the server as a whole (the empty service name).

use std::pin::Pin;
use std::time::Duration;

use tokio_stream::wrappers::IntervalStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::Ready;
use crate::proto::grpc::health::v1::health_check_response::ServingStatus;
use crate::proto::grpc::health::v1::health_server;
use crate::proto::grpc::health::v1::{HealthCheckRequest, HealthCheckResponse};

/// Watchers are told of a change this late.
const LOOK: Duration = Duration::from_secs(1);

/// Answers health checks.
pub struct Health {
    /// Asked for each check, and each second for those who watch.
    pub ready: Ready,
}

impl Health {
    fn status(ready: &Ready) -> HealthCheckResponse {
        let status = if ready().is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
        HealthCheckResponse { status: status.into() }
    }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if !request.get_ref().service.is_empty() {
            return Err(Status::not_found("unknown service; ask with the empty name for the whole server"));
        }
        Ok(Response::new(Self::status(&self.ready)))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let known = request.get_ref().service.is_empty();
        let ready = self.ready.clone();
        let mut last = None;
        let changes = IntervalStream::new(tokio::time::interval(LOOK)).filter_map(move |_| {
            let now = if known {
                Self::status(&ready)
            } else {
                HealthCheckResponse { status: ServingStatus::ServiceUnknown.into() }
            };
            (last.replace(now) != Some(now)).then_some(Ok(now))
        });
        Ok(Response::new(Box::pin(changes)))
    }
}
