//! What agents need beyond a certificate: several at once, JWT-SVIDs, bundles as they change, and a place to say who holds
//! which.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use prost_types::Timestamp;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_stream::Stream;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Request, Response, Status};

use super::codes::{refused, status};
use super::holders::{Count, Holder, Holders, Reporter};
use super::istio::{CREATE_CERTIFICATES, answer, ask, peer};
use super::requests::{JwtAsk, Requests};
use crate::auth::{Evidence, Peer};
use crate::authority::{Bundles, Grant};
use crate::core::caller::Caller;
use crate::core::published::Published;
use crate::core::refusal::{Code, Reason, Refusal};
use crate::core::spiffe::{ServiceAccount, SpiffeId, TrustDomain, shortened};
use crate::core::window;
use crate::proto::mica::v1::agent_service_server::AgentService;
use crate::proto::mica::v1::certificate_answer::Answer;
use crate::proto::mica::v1::{self as api};

/// The path of the method that answers with many certificates.
pub(super) const CREATE_CERTIFICATES_PATH: &str = "/mica.v1.AgentService/CreateCertificates";
/// The path of the method that is listened to for ever.
pub(super) const WATCH_BUNDLES_PATH: &str = "/mica.v1.AgentService/WatchBundles";
/// Certificates in one call.
pub(super) const MOST_AT_ONCE: usize = 16;
/// An agent's calls are half of its window.
const _: () = assert!(window::MOST / 2 <= MOST_AT_ONCE);
/// Those that were not granted by then are refused, so that the others are answered before the connection's patience ends.
const PATIENCE: Duration = Duration::from_secs(20);
/// Whether those who listen may still do so is asked again this often.
const LOOK: Duration = Duration::from_secs(60);
/// So many listen at once as one account, from one place.
const MOST_WATCHES: usize = 64;
/// Lines of one report.
const MOST_HOLDERS: usize = 1_024;
/// Of those who speak of themselves alone: one for each bundle that they hold.
const MOST_OF_ONE: usize = 16;
const LONGEST_NAME: usize = 64;

/// Answers agents.
pub struct Agents {
    requests: Arc<Requests>,
    holders: Holders,
    watches: Arc<Watches>,
}

/// How many listen, by who and where they are.
type Watches = Mutex<HashMap<(ServiceAccount, IpAddr), usize>>;

impl Agents {
    /// With the same authenticators and policy as for certificates.
    pub fn new(requests: Arc<Requests>) -> Arc<Self> {
        Arc::new(Self { requests, holders: Holders::default(), watches: Arc::default() })
    }

    /// Who holds which bundle.
    pub fn holders(&self) -> &Holders {
        &self.holders
    }

    /// Registers what is known of agents.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        registry.register_collector(Box::new(Known(self.clone())));
    }

    fn admits(&self, caller: &Caller, identity: &SpiffeId) -> Result<ServiceAccount, Refusal> {
        let account = ServiceAccount::of(identity)
            .filter(|_| identity.trust_domain() == self.requests.authority().trust_domain())
            .ok_or_else(|| malformed(format!("{identity} is no service account of this trust domain")))?;
        if account == caller.account || self.requests.is_impersonator(&caller.account) {
            return Ok(account);
        }
        let sentence = format!(
            "{} may speak of its own consumers alone, not of those of {account}; it is none of the policy's impersonators",
            caller.account
        );
        Err(Refusal::new(Reason::ImpersonatorUnknown, sentence))
    }

    /// What of a report counts.
    fn read(&self, caller: &Caller, report: api::ReportHoldersRequest) -> Result<Vec<Holder>, Refusal> {
        let own = self.requests.authority().trust_domain().as_str();
        let most = match self.requests.is_impersonator(&caller.account) {
            true => MOST_HOLDERS,
            false => MOST_OF_ONE,
        };
        let all = report.holders.into_iter().filter(|holder| holder.trust_domain == own);
        let mut read = Vec::new();
        for holder in all {
            if read.len() == most {
                return Err(malformed(format!("there are more than {most} lines in it")));
            }
            let identity =
                SpiffeId::parse_workload(&holder.identity).map_err(|e| malformed(e.to_string()))?;
            let bundle = holder
                .bundle
                .try_into()
                .map_err(|_| malformed("a bundle is not named by its SHA-256".to_owned()))?;
            let count = Count { acknowledged: holder.acknowledged.into(), given: holder.given.into() };
            read.push(Holder { identity: self.admits(caller, &identity)?, bundle, count });
        }
        Ok(read)
    }
}

impl std::fmt::Debug for Agents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Agents")
    }
}

/// The service, until `stopped` hears that the sender is gone.
#[derive(Clone)]
pub(super) struct Agent {
    pub(super) agents: Arc<Agents>,
    pub(super) stopped: watch::Receiver<()>,
}

impl Agent {
    /// One of several requests, which may be a part of a trace of its own.
    async fn grant(
        &self,
        caller: &mut Option<Caller>,
        one: api::CertificateRequest,
        evidence: &Evidence<'_>,
    ) -> Result<Grant, Refusal> {
        let asked = one.request.unwrap_or_default();
        let ask = ask(CREATE_CERTIFICATES, &asked);
        let requests = &self.agents.requests;
        let traceparent: Option<AsciiMetadataValue> = one.traceparent.parse().ok();
        let Some(traceparent) = traceparent.filter(|text| !text.is_empty()) else {
            return requests.grant_to(caller, &ask, evidence).await;
        };
        let mut metadata = evidence.metadata.clone();
        metadata.insert("traceparent", traceparent);
        requests.grant_to(caller, &ask, &Evidence { peer: evidence.peer, metadata: &metadata }).await
    }
}

#[tonic::async_trait]
impl AgentService for Agent {
    type WatchBundlesStream = Told;

    async fn create_certificates(
        &self,
        request: Request<api::CreateCertificatesRequest>,
    ) -> Result<Response<api::CreateCertificatesResponse>, Status> {
        let begun = Instant::now();
        let (metadata, extensions, asked) = request.into_parts();
        let evidence = Evidence { peer: peer(&extensions)?, metadata: &metadata };
        let requests = &self.agents.requests;
        let refuse = |caller: Option<&Caller>, refusal: &Refusal| {
            requests.answered(CREATE_CERTIFICATES, caller, Some(refusal), begun, evidence.peer.source, None);
        };
        let count = asked.requests.len();
        if count > MOST_AT_ONCE {
            let sentence =
                format!("the call has {count} requests, and at most {MOST_AT_ONCE} are taken at once");
            let refusal = Refusal::new(Reason::CsrMalformed, sentence);
            refuse(None, &refusal);
            return Err(status(&refusal));
        }
        let mut answers = Vec::with_capacity(count);
        // One after the other: whoever asks for many at once has one place in the queue, as all others have.
        for one in asked.requests {
            let mut caller = None;
            let granted = timeout_at(begun + PATIENCE, self.grant(&mut caller, one, &evidence)).await;
            let granted = granted.unwrap_or_else(|_| {
                let sentence = "this request and those before it took too long; try again with this one";
                let refusal = Refusal::new(Reason::QueueFull, sentence);
                refuse(caller.as_ref(), &refusal);
                Err(refusal)
            });
            let answer = match granted {
                Ok(grant) => Answer::Granted(answer(&grant)),
                // The others come with the same credential.
                Err(refusal) if caller.is_none() && answers.is_empty() => return Err(status(&refusal)),
                Err(refusal) => Answer::Refused(refused(&refusal)),
            };
            answers.push(api::CertificateAnswer { answer: Some(answer) });
        }
        Ok(Response::new(api::CreateCertificatesResponse { answers }))
    }

    async fn create_jwt_svid(
        &self,
        request: Request<api::CreateJwtSvidRequest>,
    ) -> Result<Response<api::CreateJwtSvidResponse>, Status> {
        let (metadata, extensions, asked) = request.into_parts();
        let evidence = Evidence { peer: peer(&extensions)?, metadata: &metadata };
        let ask = JwtAsk {
            method: "CreateJwtSvid",
            audience: asked.audience,
            impersonated: Some(asked.impersonated_identity).filter(|id| !id.is_empty()),
        };
        let token =
            self.agents.requests.grant_jwt(ask, &evidence).await.map_err(|refusal| status(&refusal))?;
        Ok(Response::new(api::CreateJwtSvidResponse {
            svid: token.grant.token,
            spiffe_id: token.id.to_string(),
            expires_at: Some(timestamp(token.grant.expires)),
        }))
    }

    async fn watch_bundles(
        &self,
        request: Request<api::WatchBundlesRequest>,
    ) -> Result<Response<Told>, Status> {
        let (metadata, extensions, _) = request.into_parts();
        let peer = peer(&extensions)?.clone();
        let evidence = Evidence { peer: &peer, metadata: &metadata };
        let requests = &self.agents.requests;
        let caller = requests.admit("WatchBundles", &evidence).await.map_err(|refusal| status(&refusal))?;
        let place = Place::take(&self.agents.watches, &caller.account, peer.source)
            .map_err(|refusal| status(&refusal))?;
        let mut bundles = requests.authority().bundles();
        if bundles.borrow().own.is_none() {
            let sentence = "the trust bundle has no number yet; try again";
            return Err(status(&Refusal::new(Reason::IssuerUnusable, sentence)));
        }
        bundles.mark_changed();
        let watching = Watching {
            requests: requests.clone(),
            account: caller.account,
            peer,
            metadata,
            bundles,
            stopped: self.stopped.clone(),
            next_look: Instant::now() + LOOK,
            _place: place,
        };
        Ok(Response::new(Told(Some(Box::pin(watching.next())))))
    }

    async fn report_holders(
        &self,
        request: Request<api::ReportHoldersRequest>,
    ) -> Result<Response<api::ReportHoldersResponse>, Status> {
        let (metadata, extensions, report) = request.into_parts();
        let evidence = Evidence { peer: peer(&extensions)?, metadata: &metadata };
        let method = "ReportHolders";
        let taken = async {
            let caller = self.agents.requests.admit(method, &evidence).await?;
            if report.reporter.len() > LONGEST_NAME {
                return Err(malformed(format!("its reporter is longer than {LONGEST_NAME} bytes")));
            }
            let name = report.reporter.clone();
            let holders = self.agents.read(&caller, report)?;
            let reporter = Reporter { account: caller.account, source: evidence.peer.source, name };
            self.agents.holders.take(reporter, holders);
            Ok(())
        };
        taken.await.map_err(|refusal| status(&refusal))?;
        Ok(Response::new(api::ReportHoldersResponse {}))
    }
}

fn malformed(fault: String) -> Refusal {
    Refusal::new(Reason::ReportMalformed, format!("the report cannot be used: {}", shortened(&fault)))
}

/// What one who listens is told.
pub(super) struct Told(Option<Pin<Box<dyn Future<Output = Next> + Send>>>);

/// The next message and who waits for those after it, or why there are none.
type Next = Result<(Watching, api::WatchBundlesResponse), Status>;

impl Stream for Told {
    type Item = Result<api::WatchBundlesResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(next) = &mut self.0 else { return Poll::Ready(None) };
        let Poll::Ready(next) = next.as_mut().poll(cx) else { return Poll::Pending };
        Poll::Ready(Some(match next {
            Ok((watching, message)) => {
                self.0 = Some(Box::pin(watching.next()));
                Ok(message)
            }
            Err(end) => {
                self.0 = None;
                Err(end)
            }
        }))
    }
}

/// One who listens, and by what it was let in.
struct Watching {
    requests: Arc<Requests>,
    account: ServiceAccount,
    peer: Arc<Peer>,
    metadata: MetadataMap,
    bundles: watch::Receiver<Arc<Bundles>>,
    stopped: watch::Receiver<()>,
    next_look: Instant,
    _place: Place,
}

impl Watching {
    async fn next(mut self) -> Next {
        loop {
            tokio::select! {
                // The sender lives as long as the authority.
                _ = self.bundles.changed() => {
                    let bundles = self.bundles.borrow_and_update().clone();
                    let message = told(&bundles, self.requests.authority().trust_domain());
                    return Ok((self, message));
                }
                _ = self.stopped.changed() => {
                    return Err(Status::unavailable("the authority stops; ask another replica, or again"));
                }
                () = sleep_until(self.next_look) => {
                    self.next_look = Instant::now() + LOOK;
                    self.look().await?;
                }
            }
        }
    }

    /// Whether it would be let in again with what it came with. What cannot be known now changes nothing.
    async fn look(&self) -> Result<(), Status> {
        let evidence = Evidence { peer: &self.peer, metadata: &self.metadata };
        let Err(refusal) = self.requests.try_admit(&evidence, &mut None).await else { return Ok(()) };
        if matches!(refusal.reason.code(), Code::Unavailable | Code::ResourceExhausted) {
            return Ok(());
        }
        let (account, reason) = (&self.account, refusal.reason.name());
        tracing::info!(%account, reason, source = %self.peer.source, "who follows the bundles has to come again");
        Err(status(&refusal))
    }
}

fn told(bundles: &Bundles, own: &TrustDomain) -> api::WatchBundlesResponse {
    let own = bundles.own.iter().map(|bundle| (own, bundle));
    let all = own.chain(&bundles.federated);
    api::WatchBundlesResponse {
        bundles: all.map(|(trust_domain, bundle)| message(trust_domain, bundle)).collect(),
        renew_issued_before: bundles.renew_issued_before.map(timestamp),
    }
}

fn message(trust_domain: &TrustDomain, bundle: &Published) -> api::Bundle {
    let hint = bundle.refresh_hint.and_then(|seconds| i64::try_from(seconds).ok());
    api::Bundle {
        trust_domain: trust_domain.to_string(),
        sequence: bundle.sequence.unwrap_or(0),
        x509_authorities: bundle.x509.iter().map(|root| root.der().to_vec()).collect(),
        jwt_authorities: bundle.jwks().into_bytes(),
        refresh_hint: hint.map(|seconds| prost_types::Duration { seconds, nanos: 0 }),
    }
}

fn timestamp(at: OffsetDateTime) -> Timestamp {
    Timestamp { seconds: at.unix_timestamp(), nanos: i32::try_from(at.nanosecond()).unwrap_or(0) }
}

/// A place among those who listen.
struct Place {
    watches: Arc<Watches>,
    of: (ServiceAccount, IpAddr),
}

impl Place {
    fn take(watches: &Arc<Watches>, account: &ServiceAccount, source: IpAddr) -> Result<Self, Refusal> {
        let of = (account.clone(), source);
        let mut all = lock(watches);
        let open = all.entry(of.clone()).or_default();
        if *open >= MOST_WATCHES {
            let sentence =
                format!("{account} follows the bundles {MOST_WATCHES} times from {source}; end one of them");
            return Err(Refusal::new(Reason::TooManyWatches, sentence));
        }
        *open += 1;
        drop(all);
        Ok(Self { watches: watches.clone(), of })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = lock(&self.watches);
        let left = all.get_mut(&self.of).map_or(0, |open| {
            *open -= 1;
            *open
        });
        if left == 0 {
            all.remove(&self.of);
        }
    }
}

fn lock(watches: &Watches) -> MutexGuard<'_, HashMap<(ServiceAccount, IpAddr), usize>> {
    watches.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What depends on the time of the scrape.
#[derive(Debug)]
struct Known(Arc<Agents>);

impl Collector for Known {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let agents = &self.0;
        let mut gauge = |name: &str, help: &str, value: usize| {
            let gauge = ConstGauge::new(u64::try_from(value).unwrap_or(u64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        let watches = lock(&agents.watches).values().sum();
        gauge("mica_bundle_watches", "Agents that follow the trust bundles over gRPC", watches)?;
        let reporters = agents.holders.reporters();
        gauge("mica_bundle_reporters", "Agents that say who holds which trust bundle", reporters)?;
        let own = agents.requests.authority().bundles().borrow().own.clone();
        let current = own.map(|own| own.x509_digest());
        let mut counts = [Count::default(); 2];
        for (bundle, count) in agents.holders.all() {
            let sum = &mut counts[usize::from(Some(bundle) != current)];
            sum.acknowledged += count.acknowledged;
            sum.given += count.given;
        }
        let help = "Consumers by the roots that they hold: the current or other ones, and whether they said so themselves";
        let mut family = encoder.encode_descriptor(
            "mica_bundle_holders",
            help,
            None,
            ConstGauge::new(0u64).metric_type(),
        )?;
        for (holds, count) in ["current", "other"].into_iter().zip(counts) {
            for (how, count) in [("acknowledged", count.acknowledged), ("given", count.given)] {
                let labels = [("holds", holds), ("how", how)];
                ConstGauge::new(count).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}
