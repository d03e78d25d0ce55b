//! Requests for certificates, whichever protocol they came by: who asks, may they, and then the authority's one door.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use time::OffsetDateTime;
use tokio::task::block_in_place;
use tokio::time::Instant;
use tonic::Code;
use tracing::{Instrument as _, debug_span};

use super::istio::{CREATE_CERTIFICATE, HANDLE_CSR};
use super::metrics::Metrics;
use super::queue::Queue;
use crate::auth::{Authenticator, Evidence, Impersonation, Life, Liveness, LivingPolicy, Nodes};
use crate::authority::{self, Authority, Cause, Grant, JwtGrant, JwtOrder};
use crate::core::calendar::{Calendar, Spread};
use crate::core::caller::{Caller, Object, Proof};
use crate::core::csr::CheckedCsr;
use crate::core::issuer::{self, Order};
use crate::core::jwt_svid::Audience;
use crate::core::lifetime::Lifetime;
use crate::core::policy::{self, Decision};
use crate::core::profile::Profile;
use crate::core::refusal::{Reason, Refusal};
use crate::core::spiffe::{ServiceAccount, SpiffeId, TrustDomain, shortened};
use crate::core::trace::{Parent, TraceId};
use crate::sys::clock;
use crate::telemetry;
use crate::trace::{Span, Tracer};

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// By which call.
    pub method: &'static str,
    /// PEM; none to leave the key out of the question, which only an explanation does.
    pub csr: Option<&'a [u8]>,
    /// None asks for the default.
    pub lifetime: Option<Lifetime>,
    /// What else; an error where that cannot be read, which only an authenticated caller is told.
    pub wishes: Result<Wishes, Refusal>,
    /// Whether the CSR has to name the caller and nobody else (HandleCSR).
    pub names_itself: bool,
}

/// What a caller may wish besides a key and a lifetime.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Whom the certificate should name, if not the caller.
    pub impersonated: Option<String>,
    /// Whether the lifetime must not be shortened for an even load.
    pub exact: bool,
}

/// A token that is asked for.
#[derive(Clone, Debug)]
pub struct JwtAsk {
    /// By which call.
    pub method: &'static str,
    /// Whom it is for.
    pub audience: Vec<String>,
    /// Whom it should name, if not the caller.
    pub impersonated: Option<String>,
}

/// A token, and whom it names.
#[derive(Debug)]
pub struct Token {
    /// The token.
    pub grant: JwtGrant,
    /// Whom it names.
    pub id: SpiffeId,
}

/// What a request would be answered.
#[derive(Clone, Debug)]
pub struct Explained {
    /// Who asks, if that was proved.
    pub caller: Option<Caller>,
    /// Whose identities are had here.
    pub trust_domain: TrustDomain,
    /// What would be granted, or why nothing.
    pub verdict: Result<Decision, Refusal>,
}

/// Judges requests, and grants what may be granted.
pub struct Requests {
    authority: Arc<Authority>,
    authenticators: Vec<Box<dyn Authenticator>>,
    liveness: Arc<dyn Liveness>,
    nodes: Option<Arc<dyn Nodes>>,
    policy: Arc<LivingPolicy>,
    calendar: Mutex<Calendar>,
    /// Chooses among equal places in it, which nobody needs to be unable to guess.
    draws: RandomState,
    queue: Queue,
    metrics: Metrics,
    tracer: Tracer,
}

impl Requests {
    /// With the authenticators in their order: the first that applies decides. Without `nodes` nobody may ask for others.
    pub fn new(
        authority: Arc<Authority>,
        authenticators: Vec<Box<dyn Authenticator>>,
        liveness: Arc<dyn Liveness>,
        nodes: Option<Arc<dyn Nodes>>,
        policy: Arc<LivingPolicy>,
        queue: Queue,
        metrics: Metrics,
    ) -> Self {
        Self {
            authority,
            authenticators,
            liveness,
            nodes,
            policy,
            calendar: Mutex::default(),
            draws: RandomState::new(),
            queue,
            metrics,
            tracer: Tracer::default(),
        }
    }

    /// With a span for each request, and one for each part of it.
    #[must_use]
    pub fn traced(mut self, tracer: Tracer) -> Self {
        self.tracer = tracer;
        self
    }

    /// Issues what is asked for, or says why not. Each request is one span with one for each phase below it, one line in the
    /// log, and one more in the metrics.
    pub async fn grant(&self, ask: &Ask<'_>, evidence: &Evidence<'_>) -> Result<Grant, Refusal> {
        self.grant_to(&mut None, ask, evidence).await
    }

    /// The same, and tells who asks as soon as that is proved.
    pub(super) async fn grant_to(
        &self,
        caller: &mut Option<Caller>,
        ask: &Ask<'_>,
        evidence: &Evidence<'_>,
    ) -> Result<Grant, Refusal> {
        let begun = Instant::now();
        let (mut told, trace) = self.span(ask.method, evidence);
        let span = debug_span!("request", method = ask.method, source = %evidence.peer.source, trace = trace.map(display));
        let granted = {
            // Pinned here: whoever takes a future by value has it in memory twice.
            let work = pin!(self.try_grant(ask, evidence, caller, &mut told, trace).instrument(span));
            self.queue.run(self.queue.flow(evidence), work).await.unwrap_or_else(|full| Err(full.into()))
        };
        let refusal = granted.as_ref().err();
        self.answered(ask.method, caller.as_ref(), refusal, begun, evidence.peer.source, trace);
        ended(&mut told, caller.as_ref(), refusal);
        if let Ok(grant) = &granted {
            told.set("mica.serial", grant.issued.serial);
        }
        granted
    }

    /// The request's span, and the trace that it belongs to.
    fn span(&self, method: &'static str, evidence: &Evidence<'_>) -> (Span, Option<TraceId>) {
        if !self.tracer.is_on() {
            return (Span::default(), w3c_trace(evidence));
        }
        let parent = Parent::read(|name| header(evidence, name));
        let mut span = self.tracer.answer(parent.as_ref(), service(method), method);
        span.set("client.address", evidence.peer.source);
        let trace = span.trace();
        (span, trace)
    }

    /// Counts a request that was answered, and writes a line about one that was refused.
    pub(super) fn answered(
        &self,
        method: &'static str,
        caller: Option<&Caller>,
        refusal: Option<&Refusal>,
        begun: Instant,
        source: IpAddr,
        trace: Option<TraceId>,
    ) {
        let authenticator = caller.map(|caller| caller.proof.name());
        self.metrics.answered(method, authenticator, refusal, begun.elapsed());
        let Some(refusal) = refusal else { return };
        tracing::warn!(
            method,
            reason = refusal.reason.name(),
            sentence = refusal.sentence,
            detail = refusal.detail,
            account = caller.map(|caller| tracing::field::display(&caller.account)),
            authenticator,
            %source,
            trace = trace.map(display),
            "request refused"
        );
    }

    async fn try_grant(
        &self,
        ask: &Ask<'_>,
        evidence: &Evidence<'_>,
        known: &mut Option<Caller>,
        told: &mut Span,
        trace: Option<TraceId>,
    ) -> Result<Grant, Refusal> {
        let now = clock::now();
        let (decision, csr) = self.judge(ask, evidence, known, told, now).await?;
        let (Some(caller), Some(csr)) = (known, csr) else {
            return Err(Refusal::new(Reason::CsrMalformed, "there is no CSR"));
        };
        let lifetime = self.even(&decision, ask.wishes.as_ref().is_ok_and(|wishes| wishes.exact), now);
        let id = decision.account.spiffe_id(self.authority.trust_domain());
        told.set("mica.identity", &id);
        self.tell(&decision, lifetime, csr.requested().uri.as_deref().filter(|uri| *uri != id.as_str()));
        let proved_at = match caller.proof {
            Proof::Certificate { proved_at } => Some(proved_at),
            _ => None,
        };
        let profile = Profile::Workload { id: &id, dns: &decision.dns, proved_at };
        let order = Order { profile, key: csr.key(), lifetime };
        let cause = Cause {
            why: "request",
            authenticator: Some(caller.proof.name()),
            source: Some(evidence.peer.source),
            trace,
        };
        let _sign = (debug_span!("sign").entered(), told.part("sign"));
        let issue = || {
            // The line about it leaves before the answer, with those about others.
            telemetry::gather(|| self.authority.issue(&order, now, &cause)).map_err(unusable_issuer)
        };
        // An RSA signature takes a millisecond and more: the connections go on, on another thread.
        if self.authority.issuer().signs_slowly() { block_in_place(issue) } else { issue() }
    }

    /// What [`Requests::grant`] would do, and why. Nothing is issued, and nothing booked.
    pub async fn explain(&self, ask: &Ask<'_>, evidence: &Evidence<'_>) -> Result<Explained, Refusal> {
        let mut caller = None;
        let work = async {
            let now = clock::now();
            let judged = self.judge(ask, evidence, &mut caller, &Span::default(), now).await;
            judged.and_then(|(decision, _)| {
                let usable = self.authority.issuer().usable(now);
                usable.map_err(|fault| unusable_issuer(fault.into()))?;
                Ok(decision)
            })
        };
        let verdict = self.queue.run(self.queue.flow(evidence), work).await?;
        // Whoever tries out what a credential is good for leaves a trace.
        tracing::info!(
            account = caller.as_ref().map(|caller: &Caller| tracing::field::display(&caller.account)),
            authenticator = caller.as_ref().map(|caller| caller.proof.name()),
            reason = verdict.as_ref().err().map(|refusal| refusal.reason.name()),
            source = %evidence.peer.source,
            "request explained"
        );
        let trust_domain = self.authority.trust_domain().clone();
        Ok(Explained { caller, trust_domain, verdict })
    }

    /// Signs a token, or says why not; as [`Requests::grant`] does for certificates.
    pub async fn grant_jwt(&self, ask: JwtAsk, evidence: &Evidence<'_>) -> Result<Token, Refusal> {
        let begun = Instant::now();
        let (mut told, trace) = self.span(ask.method, evidence);
        let span = debug_span!("request", method = ask.method, source = %evidence.peer.source, trace = trace.map(display));
        let (method, mut caller) = (ask.method, None);
        let work = self.try_grant_jwt(ask, evidence, &mut caller, &mut told, trace).instrument(span);
        let granted =
            self.queue.run(self.queue.flow(evidence), work).await.unwrap_or_else(|full| Err(full.into()));
        let refusal = granted.as_ref().err();
        self.answered(method, caller.as_ref(), refusal, begun, evidence.peer.source, trace);
        ended(&mut told, caller.as_ref(), refusal);
        granted
    }

    async fn try_grant_jwt(
        &self,
        ask: JwtAsk,
        evidence: &Evidence<'_>,
        known: &mut Option<Caller>,
        told: &mut Span,
        trace: Option<TraceId>,
    ) -> Result<Token, Refusal> {
        let now = clock::now();
        let (caller, identity) =
            self.identify(ask.impersonated.as_deref(), evidence, known, told, now).await?;
        let authorize = (debug_span!("authorize").entered(), told.part("authorize"));
        let impersonated = ask.impersonated.is_some().then_some(&identity);
        let audience = Audience::new(ask.audience, self.authority.trust_domain())?;
        let asked = policy::Ask { caller, impersonated, key: None, dns: &[], lifetime: None, now };
        let (account, lifetime) = self.policy.current().jwt(&asked)?;
        let id = account.spiffe_id(self.authority.trust_domain());
        told.set("mica.identity", &id);
        let cause = Cause {
            why: "request",
            authenticator: Some(caller.proof.name()),
            source: Some(evidence.peer.source),
            trace,
        };
        let order = JwtOrder { id: &id, audience: &audience, lifetime: lifetime.value };
        drop(authorize);
        let _sign = (debug_span!("sign").entered(), told.part("sign"));
        let grant = self.authority.issue_jwt(&order, now, &cause).map_err(|fault| {
            let sentence = "the authority cannot sign tokens now; try again";
            Refusal::new(Reason::IssuerUnusable, sentence).with_detail(fault.to_string())
        })?;
        Ok(Token { grant, id })
    }

    /// Lets somebody in who wants to be issued nothing. Only a refusal is counted and told.
    pub async fn admit(&self, method: &'static str, evidence: &Evidence<'_>) -> Result<Caller, Refusal> {
        let begun = Instant::now();
        let mut known = None;
        let admitted = self.try_admit(evidence, &mut known).await;
        if let Err(refusal) = &admitted {
            let trace = w3c_trace(evidence);
            self.answered(method, known.as_ref(), Some(refusal), begun, evidence.peer.source, trace);
        }
        admitted
    }

    /// The same, and nothing is counted.
    pub(super) async fn try_admit(
        &self,
        evidence: &Evidence<'_>,
        known: &mut Option<Caller>,
    ) -> Result<Caller, Refusal> {
        let work = async {
            let now = clock::now();
            let (caller, _) = self.identify(None, evidence, known, &Span::default(), now).await?;
            let asked = policy::Ask { caller, impersonated: None, key: None, dns: &[], lifetime: None, now };
            self.policy.current().admit(&asked)?;
            Ok(caller.clone())
        };
        self.queue.run(self.queue.flow(evidence), work).await.unwrap_or_else(|full| Err(full.into()))
    }

    /// Whether an account may speak for others.
    pub fn is_impersonator(&self, account: &ServiceAccount) -> bool {
        self.policy.current().impersonators().contains(account)
    }

    /// The authority that grants.
    pub fn authority(&self) -> &Arc<Authority> {
        &self.authority
    }

    /// Who asks, and for whom.
    async fn identify<'a>(
        &self,
        impersonated: Option<&str>,
        evidence: &Evidence<'_>,
        known: &'a mut Option<Caller>,
        told: &Span,
        now: OffsetDateTime,
    ) -> Result<(&'a Caller, ServiceAccount), Refusal> {
        let part = told.part("authenticate");
        let caller = self.authenticate(evidence, now).instrument(debug_span!("authenticate")).await?;
        drop(part);
        let caller = known.insert(caller);
        let part = told.part("liveness");
        self.lives(caller).instrument(debug_span!("liveness")).await?;
        drop(part);
        let identity = match impersonated {
            None => caller.account.clone(),
            Some(wanted) => {
                let _part = told.part("impersonation");
                let identity = self.impersonated(caller, wanted, self.is_impersonator(&caller.account));
                identity.instrument(debug_span!("impersonation")).await?
            }
        };
        Ok((caller, identity))
    }

    /// Everything up to the signature.
    async fn judge(
        &self,
        ask: &Ask<'_>,
        evidence: &Evidence<'_>,
        known: &mut Option<Caller>,
        told: &Span,
        now: OffsetDateTime,
    ) -> Result<(Decision, Option<CheckedCsr>), Refusal> {
        // What cannot be read is told to those alone who are somebody.
        let impersonated = ask.wishes.as_ref().ok().and_then(|wishes| wishes.impersonated.as_deref());
        let (caller, identity) = self.identify(impersonated, evidence, known, told, now).await?;
        let wishes = ask.wishes.as_ref().map_err(Clone::clone)?;
        let _authorize = (debug_span!("authorize").entered(), told.part("authorize"));
        let csr = ask.csr.map(CheckedCsr::from_pem).transpose()?;
        if let Some(csr) = csr.as_ref().filter(|_| ask.names_itself) {
            self.names_itself(csr, &identity)?;
        }
        // As it is now: while the cluster was asked it may have changed.
        let decision = self.policy.current().decide(&policy::Ask {
            caller,
            impersonated: wishes.impersonated.is_some().then_some(&identity),
            key: csr.as_ref().map(|csr| csr.key().kind()),
            dns: csr.as_ref().map_or(&[], |csr| &csr.requested().dns),
            lifetime: ask.lifetime,
            now,
        })?;
        Ok((decision, csr))
    }

    /// The lifetime, shortened so that its renewal meets few others, unless that is not wished.
    fn even(&self, decision: &Decision, exact: bool, now: OffsetDateTime) -> Lifetime {
        let spread = if exact { Spread::NONE } else { decision.spread };
        let draw = self.draws.hash_one(now);
        let mut calendar = self.calendar.lock().unwrap_or_else(PoisonError::into_inner);
        calendar.book(now, decision.lifetime.value, spread, draw)
    }

    fn tell(&self, decision: &Decision, lifetime: Lifetime, other: Option<&str>) {
        let (account, from) = (&decision.account, &decision.lifetime.origin);
        tracing::debug!(%account, lifetime = %decision.lifetime.value, from = from.located(), granted = %lifetime, "lifetime");
        for (_, why) in &decision.left_out {
            self.metrics.left_out(why.name());
        }
        if let Some((name, why)) = decision.left_out.first() {
            let (count, name) = (decision.left_out.len(), shortened(name));
            tracing::info!(%account, count, name, why = why.name(), "DNS names that the CSR asks for are left out");
        }
        if let Some(asked) = other.map(shortened) {
            self.metrics.another_identity();
            tracing::info!(%account, asked, "the CSR names another identity than the caller's, which it gets");
        }
    }

    /// Who is asking.
    async fn authenticate(&self, evidence: &Evidence<'_>, now: OffsetDateTime) -> Result<Caller, Refusal> {
        let Some(authenticator) = self.authenticators.iter().find(|a| a.applies(evidence)) else {
            let sentence = "no credential came with the request; send a service account token as \
                            `authorization: Bearer …`, or connect with a certificate of this authority";
            return Err(Refusal::new(Reason::NoCredential, sentence));
        };
        authenticator.judge(evidence, now).await
    }

    /// That everybody who vouches lives: the account, the pod that its token was made for, the proxy that speaks for it.
    async fn lives(&self, caller: &Caller) -> Result<(), Refusal> {
        let account = &caller.account;
        match &caller.proof {
            Proof::Token { bound, .. } => {
                self.account_lives(account, bound.account_uid.as_deref()).await?;
                match &bound.pod {
                    Some(pod) => self.pod_lives(account.namespace(), pod).await,
                    None => Ok(()),
                }
            }
            Proof::Forwarded { proxy } => {
                if let Some(proxy) = ServiceAccount::of(proxy) {
                    self.account_lives(&proxy, None).await?;
                }
                self.account_lives(account, None).await
            }
            Proof::Certificate { .. } | Proof::Oidc { .. } => self.account_lives(account, None).await,
        }
    }

    async fn account_lives(&self, account: &ServiceAccount, uid: Option<&str>) -> Result<(), Refusal> {
        match self.liveness.account(account, uid).await {
            Life::Alive => Ok(()),
            Life::Gone => {
                let sentence = format!("the service account {account} does not exist");
                Err(Refusal::new(Reason::AccountGone, sentence))
            }
            Life::Replaced => {
                let sentence = format!(
                    "the service account {account} is another one than the token's, which was deleted; get a new token"
                );
                Err(Refusal::new(Reason::AccountReplaced, sentence))
            }
            Life::Unknown(why) => Err(unknown(&format!("the service account {account}"), why)),
        }
    }

    async fn pod_lives(&self, namespace: &str, pod: &Object) -> Result<(), Refusal> {
        let name = &pod.name;
        match self.liveness.pod(namespace, pod).await {
            Life::Alive => Ok(()),
            Life::Gone | Life::Replaced => {
                let sentence =
                    format!("the pod {namespace}/{name} that the token was made for does not exist");
                Err(Refusal::new(Reason::PodGone, sentence))
            }
            Life::Unknown(why) => Err(unknown(&format!("the pod {namespace}/{name}"), why)),
        }
    }

    /// Whom the certificate will name, if not the caller.
    async fn impersonated(
        &self,
        caller: &Caller,
        wanted: &str,
        is_impersonator: bool,
    ) -> Result<ServiceAccount, Refusal> {
        let Some(nodes) = &self.nodes else {
            let sentence =
                "nobody may ask for others here: who runs on which node is known in a cluster only";
            return Err(Refusal::new(Reason::ImpersonatorUnknown, sentence));
        };
        let impersonation = Impersonation {
            nodes: &**nodes,
            liveness: &*self.liveness,
            trust_domain: self.authority.trust_domain(),
            is_impersonator,
        };
        let account = impersonation.judge(caller, wanted).await?;
        tracing::info!(caller = %caller.account, identity = %account, "a proxy asks for the identity of a pod on its node");
        Ok(account)
    }

    /// That a CSR names this identity and nobody else.
    fn names_itself(&self, csr: &CheckedCsr, identity: &ServiceAccount) -> Result<(), Refusal> {
        let requested = csr.requested();
        let id = identity.spiffe_id(self.authority.trust_domain());
        let others = !requested.dns.is_empty() || !requested.others.is_empty();
        match &requested.uri {
            None if !others => {
                let sentence = format!("the CSR names nobody; it has to name {id}");
                Err(Refusal::new(Reason::CsrNames, sentence))
            }
            uri if others || uri.as_ref().is_some_and(|uri| uri != id.as_str()) => {
                let sentence = format!("the CSR asks for other names than {id}, which is the caller's");
                Err(Refusal::new(Reason::CsrIdentity, sentence))
            }
            _ => Ok(()),
        }
    }
}

/// What the request's span says in the end. Who is known may wish to have it recorded.
fn ended(told: &mut Span, caller: Option<&Caller>, refusal: Option<&Refusal>) {
    if let Some(caller) = caller {
        told.trust();
        told.set("mica.authenticator", caller.proof.name());
        told.set("mica.account", &caller.account);
    }
    let code = refusal.map_or(Code::Ok, |refusal| refusal.reason.code().into());
    told.count("rpc.grpc.status_code", i32::from(code).into());
    if let Some(refusal) = refusal {
        told.fail(refusal.reason.name());
    }
}

fn header<'a>(evidence: &Evidence<'a>, name: &str) -> Option<&'a str> {
    evidence.metadata.get(name)?.to_str().ok()
}

/// The trace that the request says that it belongs to, so that a line in the log is found by it.
fn w3c_trace(evidence: &Evidence<'_>) -> Option<TraceId> {
    Parent::w3c(|name| header(evidence, name)).map(|parent| parent.trace)
}

fn service(method: &str) -> &'static str {
    match method {
        HANDLE_CSR => "istio.v1.auth.IstioCAService",
        CREATE_CERTIFICATE => "istio.v1.auth.IstioCertificateService",
        _ => "mica.v1.AgentService",
    }
}

fn unknown(what: &str, why: String) -> Refusal {
    let sentence = format!("whether {what} lives cannot be known now; try again");
    Refusal::new(Reason::LivenessUnknown, sentence).with_detail(why)
}

fn unusable_issuer(fault: authority::Error) -> Refusal {
    let sentence = match &fault {
        authority::Error::Issuer(issuer::Error::Expired(_) | issuer::Error::NotYetValid(_)) => {
            format!("the authority cannot sign now: {fault}")
        }
        _ => "the authority cannot sign now".to_owned(),
    };
    Refusal::new(Reason::IssuerUnusable, sentence).with_detail(fault.to_string())
}

#[cfg(test)]
mod tests;
