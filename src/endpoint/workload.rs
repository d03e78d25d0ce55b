//! The SPIFFE Workload API (SPIFFE_Workload_API.md): its X.509 and JWT profiles.

mod caller;
mod stream;
mod tokens;

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::timeout;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::Endpoint;
use super::bounds::LARGEST_MESSAGE;
use crate::core::jwt_svid::validate::validate;
use crate::core::spiffe::SpiffeId;
use crate::proto::spiffe::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer};
use crate::proto::spiffe::{
    JwtBundlesRequest, Jwtsvid, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, WitBundlesRequest, WitBundlesResponse, WitsvidRequest, WitsvidResponse,
    X509BundlesRequest, X509svidRequest,
};
use crate::sys::clock;
use caller::Caller;
use stream::{Following, JwtBundles, Responses, X509Bundles, X509Svids};
use tokens::Tokens;

/// What has not been obtained yet is waited for so long; then the caller is told to come again.
const FIRST: Duration = Duration::from_secs(5);
/// As many audiences of one token; one is what the standard recommends.
const AUDIENCES: usize = 16;

/// The service, for callers that [`guarded`] lets through.
pub(super) fn service(endpoint: Endpoint) -> SpiffeWorkloadApiServer<impl SpiffeWorkloadApi> {
    SpiffeWorkloadApiServer::new(WorkloadApi { endpoint, tokens: Tokens::default() })
        .max_decoding_message_size(LARGEST_MESSAGE)
}

/// Refuses what does not have the header that browsers cannot send (SPIFFE_Workload_Endpoint 3).
pub(super) fn guarded(request: Request<()>) -> Result<Request<()>, Status> {
    match has_header(request.metadata()) {
        true => Ok(request),
        false => {
            Err(Status::invalid_argument("the metadata workload.spiffe.io has to be there once, and true"))
        }
    }
}

fn has_header(metadata: &MetadataMap) -> bool {
    let mut values = metadata.get_all("workload.spiffe.io").iter();
    values.next().is_some_and(|value| value.as_bytes() == b"true") && values.next().is_none()
}

/// Answers workloads.
struct WorkloadApi {
    endpoint: Endpoint,
    tokens: Tokens,
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for WorkloadApi {
    type FetchX509SVIDStream = Responses<X509Svids>;
    type FetchX509BundlesStream = Responses<X509Bundles>;
    type FetchJWTBundlesStream = Responses<JwtBundles>;
    type FetchWITSVIDStream = tokio_stream::Empty<Result<WitsvidResponse, Status>>;
    type FetchWITBundlesStream = tokio_stream::Empty<Result<WitBundlesResponse, Status>>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.follow(request).await
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        self.follow(request).await
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        self.follow(request).await
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        let JwtsvidRequest { audience, spiffe_id } = request.get_ref();
        if audience.is_empty() || audience.iter().any(String::is_empty) {
            return Err(Status::invalid_argument("no audience; name whom the token is for"));
        }
        if audience.len() > AUDIENCES {
            return Err(Status::invalid_argument(format!(
                "more than {AUDIENCES} audiences; ask for a token for each"
            )));
        }
        let mut entitled = self.endpoint.entitled(request.extensions()).await?;
        if !spiffe_id.is_empty() {
            let asked = SpiffeId::parse(spiffe_id)
                .map_err(|fault| Status::invalid_argument(format!("spiffe_id: {fault}")))?;
            entitled.retain(|it| it.id == asked);
            if entitled.is_empty() {
                return Err(Status::permission_denied("no identity issued"));
            }
        }
        let mut svids = Vec::new();
        for it in entitled {
            let svid = self.tokens.get(&self.endpoint.agent, &it.id, audience).await?;
            let hint = it.hint.unwrap_or_default();
            svids.push(Jwtsvid { spiffe_id: it.id.to_string(), svid, hint });
        }
        Ok(Response::new(JwtsvidResponse { svids }))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        let ValidateJwtsvidRequest { audience, svid } = request.get_ref();
        for (name, value) in [("audience", audience), ("svid", svid)] {
            if value.is_empty() {
                return Err(Status::invalid_argument(format!("{name} is empty")));
            }
        }
        self.endpoint.entitled(request.extensions()).await?;
        let mut bundles = self.endpoint.agent.held.bundles();
        let bundles = match timeout(FIRST, bundles.wait_for(Option::is_some)).await {
            Ok(Ok(bundles)) => bundles.clone(),
            _ => None,
        };
        let bundles = bundles.ok_or_else(|| Status::unavailable(caller::NO_BUNDLES))?;
        let keys = |domain: &_| bundles.domains.get(domain).and_then(|it| it.jwt.as_deref());
        let (id, claims) = validate(svid, audience, clock::now(), keys)
            .map_err(|fault| Status::invalid_argument(fault.to_string()))?;
        let claims = Some(structure(claims.members()));
        Ok(Response::new(ValidateJwtsvidResponse { spiffe_id: id.to_string(), claims }))
    }

    async fn fetch_witsvid(
        &self,
        _: Request<WitsvidRequest>,
    ) -> Result<Response<Self::FetchWITSVIDStream>, Status> {
        Err(Status::unimplemented("there are no WIT-SVIDs here"))
    }

    async fn fetch_wit_bundles(
        &self,
        _: Request<WitBundlesRequest>,
    ) -> Result<Response<Self::FetchWITBundlesStream>, Status> {
        Err(Status::unimplemented("there are no WIT-SVIDs here"))
    }
}

impl WorkloadApi {
    async fn follow<K: stream::Kind, T: Send>(
        &self,
        request: Request<T>,
    ) -> Result<Response<Responses<K>>, Status> {
        let caller = Caller::new(&self.endpoint, request.extensions()).await?;
        Ok(Response::new(Following::begin(caller, FIRST).await?.into_responses()))
    }
}

fn structure(members: &serde_json::Map<String, serde_json::Value>) -> prost_types::Struct {
    let fields = members.iter().map(|(name, member)| (name.clone(), value(member)));
    prost_types::Struct { fields: fields.collect::<HashMap<_, _>>().into_iter().collect() }
}

fn value(json: &serde_json::Value) -> prost_types::Value {
    use prost_types::value::Kind;
    use serde_json::Value;
    let kind = match json {
        Value::Null => Kind::NullValue(0),
        Value::Bool(is) => Kind::BoolValue(*is),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(all) => {
            Kind::ListValue(prost_types::ListValue { values: all.iter().map(value).collect() })
        }
        Value::Object(members) => Kind::StructValue(structure(members)),
    };
    prost_types::Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_there_once_and_true() {
        for (values, taken) in [
            (&["true"][..], true),
            (&[], false),
            (&["True"], false),
            (&["TRUE"], false),
            (&["1"], false),
            (&[""], false),
            (&["false"], false),
            (&["true,true"], false),
            (&["true", "true"], false),
            (&["true", "false"], false),
        ] {
            let mut request = Request::new(());
            for value in values {
                request.metadata_mut().append("workload.spiffe.io", value.parse().unwrap());
            }
            assert_eq!(guarded(request).is_ok(), taken, "{values:?}");
        }
    }

    #[test]
    fn claims_are_told_whole() {
        let claims = serde_json::json!({"a": [null, true, 1.5, "x", {"b": 2}]});
        let told = structure(claims.as_object().unwrap());
        let text = format!("{told:?}");
        for part in
            ["NullValue", "BoolValue(true)", "NumberValue(1.5)", "StringValue(\"x\")", "NumberValue(2.0)"]
        {
            assert!(text.contains(part), "{text}");
        }
    }
}
