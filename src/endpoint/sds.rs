//! Envoy's Secret Discovery Service, version 3: certificates and roots, pushed as they change.

mod caller;
mod metrics;
mod resource;
mod stream;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

use super::Endpoint;
use crate::proto::xds::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource,
};
use crate::proto::xds::envoy::service::secret::v3::secret_discovery_service_server::{
    SecretDiscoveryService, SecretDiscoveryServiceServer,
};
use caller::Caller;
use metrics::Metrics;
use resource::{Shelf, TYPE_URL};
use stream::{Asked, Conversation, Found, Holds, Names, News, Protocol, Responses, Wanted};

/// An Envoy lists its extensions, which takes 36 KiB, and whatever it was told to say of itself.
const MAX_REQUEST: usize = 256 * 1024;
/// A single request waits this long for a certificate that is being obtained.
const FETCH: Duration = Duration::from_secs(10);

/// The service, for the endpoint's listener.
pub fn service(
    endpoint: Endpoint,
    registry: &mut Registry,
) -> SecretDiscoveryServiceServer<impl SecretDiscoveryService> {
    let shared = Arc::new(Shared::default());
    shared.metrics.register(registry);
    SecretDiscoveryServiceServer::new(Sds { endpoint, shared }).max_decoding_message_size(MAX_REQUEST)
}

/// Answers proxies.
struct Sds {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

/// What all streams share.
#[derive(Default)]
struct Shared {
    metrics: Metrics,
    shelf: Shelf,
}

#[tonic::async_trait]
impl SecretDiscoveryService for Sds {
    type DeltaSecretsStream = Responses<Delta>;
    type StreamSecretsStream = Responses<StateOfTheWorld>;

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        self.stream(request).await
    }

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        self.stream(request).await
    }

    async fn fetch_secrets(
        &self,
        request: Request<DiscoveryRequest>,
    ) -> Result<Response<DiscoveryResponse>, Status> {
        let mut caller = self.caller(request.extensions()).await?;
        if !caller.is_known() {
            return Err(Status::unavailable("the caller cannot be attested now; try again"));
        }
        let asked = StateOfTheWorld::asked(request.into_inner());
        asked.check_type()?;
        let Names::Whole(names) = asked.names else { return Err(Status::internal("names are missing")) };
        let wanted = Wanted::of(names)?;
        let found = async {
            loop {
                let found = Found::look(&mut caller, &wanted);
                if found.waiting.is_empty() {
                    return Ok(found);
                }
                caller.changed().await?;
            }
        };
        let found = timeout(FETCH, found).await.unwrap_or_else(|_| {
            Err(Status::unavailable("the certificate has not been obtained yet; try again"))
        })?;
        found.complain(&caller, &self.shared, &mut BTreeSet::new());
        if let Some(refusal) = found.nothing_but_refused() {
            return Err(refusal);
        }
        for (_, made) in &found.ready {
            self.shared.metrics.sent(made.kind);
        }
        let news = News { all: &found.ready, changed: &found.ready, removed: &[] };
        StateOfTheWorld::response(news, String::new())
            .map(Response::new)
            .ok_or_else(|| Status::not_found("there is no bundle of that trust domain here"))
    }
}

impl Sds {
    async fn caller(&self, extensions: &tonic::Extensions) -> Result<Caller, Status> {
        Caller::new(&self.endpoint, &self.shared, extensions).await
    }

    async fn stream<P: Protocol>(
        &self,
        request: Request<Streaming<P::Request>>,
    ) -> Result<Response<Responses<P>>, Status> {
        let caller = self.caller(request.extensions()).await?;
        let conversation = Conversation::new(self.shared.clone(), caller, request.into_inner());
        Ok(Response::new(Responses::of(conversation)))
    }
}

/// Each response is all that there is.
struct StateOfTheWorld;

impl Protocol for StateOfTheWorld {
    const METHOD: &'static str = "StreamSecrets";
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn asked(request: DiscoveryRequest) -> Asked {
        Asked {
            type_url: request.type_url,
            names: Names::Whole(request.resource_names),
            holds: Holds::Version(request.version_info),
            nonce: request.response_nonce,
            error: request.error_detail.map(|status| status.message),
        }
    }

    /// What is gone cannot be told: a response without it means nothing for a secret.
    fn response(news: News<'_>, nonce: String) -> Option<DiscoveryResponse> {
        (!news.changed.is_empty()).then(|| DiscoveryResponse {
            version_info: resource::version(news.all),
            resources: news.all.iter().map(|(_, made)| made.any()).collect(),
            type_url: TYPE_URL.to_owned(),
            nonce,
        })
    }
}

/// Each response is what has changed.
struct Delta;

impl Protocol for Delta {
    const METHOD: &'static str = "DeltaSecrets";
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn asked(request: DeltaDiscoveryRequest) -> Asked {
        Asked {
            type_url: request.type_url,
            names: Names::Changed {
                subscribe: request.resource_names_subscribe,
                unsubscribe: request.resource_names_unsubscribe,
            },
            holds: Holds::Versions(request.initial_resource_versions.into_iter().collect()),
            nonce: request.response_nonce,
            error: request.error_detail.map(|status| status.message),
        }
    }

    fn response(news: News<'_>, nonce: String) -> Option<DeltaDiscoveryResponse> {
        let resource = |(name, made): &(String, Arc<resource::Made>)| Resource {
            name: name.clone(),
            version: made.version.clone(),
            resource: Some(made.any()),
        };
        Some(DeltaDiscoveryResponse {
            system_version_info: String::new(),
            resources: news.changed.iter().map(resource).collect(),
            type_url: TYPE_URL.to_owned(),
            nonce,
            removed_resources: news.removed.to_vec(),
        })
    }
}
