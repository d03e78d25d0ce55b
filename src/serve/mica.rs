//! Mica's own service: what Istio's protocol cannot carry.

use std::sync::Arc;

use prost_types::Timestamp;
use tonic::{Request, Response, Status};

use super::codes::status;
use super::istio::{lifetime, peer};
use super::requests::{Ask, Explained, Requests, Wishes};
use crate::auth::Evidence;
use crate::core::lifetime::Lifetime;
use crate::core::policy::{Decision, Of};
use crate::proto::mica::v1::identity_service_server::IdentityService;
use crate::proto::mica::v1::{ExplainRequest, ExplainResponse};

/// Answers for it.
pub(super) struct Identity {
    pub(super) requests: Arc<Requests>,
}

#[tonic::async_trait]
impl IdentityService for Identity {
    /// A caller is told of its own requests alone: it is authenticated as for the request itself.
    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        let (metadata, extensions, asked) = request.into_parts();
        let evidence = Evidence { peer: peer(&extensions)?, metadata: &metadata };
        let ask = Ask {
            method: "Explain",
            csr: Some(asked.csr.as_bytes()).filter(|csr| !csr.is_empty()),
            lifetime: lifetime(asked.validity_duration),
            wishes: Ok(Wishes {
                impersonated: Some(asked.impersonated_identity).filter(|id| !id.is_empty()),
                exact: false,
            }),
            names_itself: false,
        };
        let explained = self.requests.explain(&ask, &evidence).await.map_err(|refusal| status(&refusal))?;
        Ok(Response::new(told(explained)))
    }
}

fn told(explained: Explained) -> ExplainResponse {
    let Explained { caller, trust_domain, verdict } = explained;
    let mut answer = ExplainResponse::default();
    if let Some(caller) = &caller {
        answer.authenticator = caller.proof.name().to_owned();
        answer.identity = caller.account.spiffe_id(&trust_domain).to_string();
    }
    match verdict {
        Err(refusal) => {
            answer.reason = refusal.reason.name().to_owned();
            answer.sentence = refusal.sentence;
        }
        Ok(Decision { account, lifetime, longest, dns, renewable_until, .. }) => {
            answer.granted = true;
            answer.identity = account.spiffe_id(&trust_domain).to_string();
            (answer.lifetime, answer.lifetime_from) = shown(&lifetime);
            (answer.longest_lifetime, answer.longest_lifetime_from) = shown(&longest);
            answer.dns_names = dns.iter().map(ToString::to_string).collect();
            answer.renewable_until =
                renewable_until.map(|at| Timestamp { seconds: at.unix_timestamp(), nanos: 0 });
        }
    }
    answer
}

fn shown(lifetime: &Of<Lifetime>) -> (i64, String) {
    let seconds = lifetime.value.duration().as_secs();
    (i64::try_from(seconds).unwrap_or(i64::MAX), lifetime.origin.to_string())
}
