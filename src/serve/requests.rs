//! Requests for certificates, whichever protocol they came by: who asks, may they, and then the authority's one door.

use std::sync::Arc;

use time::OffsetDateTime;
use tokio::time::Instant;
use tracing::Instrument as _;

use super::metrics::Metrics;
use super::queue::Queue;
use crate::auth::{Authenticator, Evidence, Life, Liveness};
use crate::authority::{self, Authority, Cause, Grant};
use crate::core::caller::{Bound, Caller, Proof};
use crate::core::csr::{self, CheckedCsr};
use crate::core::issuer::{self, Order};
use crate::core::lifetime::Lifetime;
use crate::core::profile::Profile;
use crate::core::refusal::{Reason, Refusal};
use crate::core::spiffe::ServiceAccount;
use crate::sys::clock;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// By which call.
    pub method: &'static str,
    /// PEM.
    pub csr: &'a [u8],
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

/// Judges requests, and grants what may be granted.
pub struct Requests {
    authority: Arc<Authority>,
    authenticators: Vec<Box<dyn Authenticator>>,
    liveness: Arc<dyn Liveness>,
    limits: (Lifetime, Lifetime),
    queue: Queue,
    pub(super) metrics: Metrics,
}

impl Requests {
    /// With the authenticators in their order: the first that applies decides.
    pub fn new(
        authority: Arc<Authority>,
        authenticators: Vec<Box<dyn Authenticator>>,
        liveness: Arc<dyn Liveness>,
        limits: (Lifetime, Lifetime),
        queue: Queue,
        metrics: Metrics,
    ) -> Self {
        Self { authority, authenticators, liveness, limits, queue, metrics }
    }

    /// Issues what is asked for, or says why not. Each request is one span with its phases, one line in the log, and one
    /// more in the metrics.
    pub async fn grant(&self, ask: &Ask<'_>, evidence: &Evidence<'_>) -> Result<Grant, Refusal> {
        let begun = Instant::now();
        let span = tracing::debug_span!("request", method = ask.method, source = %evidence.peer.source);
        let mut caller = None;
        let work = self.try_grant(ask, evidence, &mut caller).instrument(span);
        let granted =
            self.queue.run(self.queue.flow(evidence), work).await.unwrap_or_else(|full| Err(full.into()));
        let authenticator = caller.as_ref().map(|caller: &Caller| caller.proof.name());
        self.metrics.answered(ask.method, authenticator, granted.as_ref().err(), begun.elapsed());
        if let Err(refusal) = &granted {
            let account = caller.map(|caller| caller.account);
            tracing::warn!(
                method = ask.method,
                reason = refusal.reason.name(),
                sentence = refusal.sentence,
                detail = refusal.detail,
                account = account.as_ref().map(tracing::field::display),
                authenticator,
                source = %evidence.peer.source,
                "request refused"
            );
        }
        granted
    }

    async fn try_grant(
        &self,
        ask: &Ask<'_>,
        evidence: &Evidence<'_>,
        known: &mut Option<Caller>,
    ) -> Result<Grant, Refusal> {
        let now = clock::now();
        let caller = self.authenticate(evidence, now).await?;
        let caller = known.insert(caller);
        let identity = self.identity(caller, ask.wishes.as_ref().map_err(Clone::clone)?)?;
        let csr = CheckedCsr::from_pem(ask.csr).map_err(unusable_csr)?;
        self.compare(ask, &csr, &identity)?;
        let (default, longest) = self.limits;
        let lifetime = ask.lifetime.unwrap_or(default);
        if lifetime > longest {
            let sentence = format!("a lifetime of {lifetime} was asked for; the longest is {longest}");
            return Err(Refusal::new(Reason::LifetimeTooLong, sentence));
        }
        let id = identity.spiffe_id(self.authority.trust_domain());
        let proved_at = match caller.proof {
            Proof::Certificate { proved_at } => Some(proved_at),
            _ => None,
        };
        let order =
            Order { profile: Profile::Workload { id: &id, dns: &[], proved_at }, key: csr.key(), lifetime };
        let cause = Cause {
            why: "request",
            authenticator: Some(caller.proof.name()),
            source: Some(evidence.peer.source),
        };
        self.authority.issue(&order, now, &cause).map_err(unusable_issuer)
    }

    /// Who is asking, and that it lives.
    async fn authenticate(&self, evidence: &Evidence<'_>, now: OffsetDateTime) -> Result<Caller, Refusal> {
        let Some(authenticator) = self.authenticators.iter().find(|a| a.applies(evidence)) else {
            let sentence = "no credential came with the request; send a service account token as \
                            `authorization: Bearer …`, or connect with a certificate of this authority";
            return Err(Refusal::new(Reason::NoCredential, sentence));
        };
        let caller = authenticator.judge(evidence, now).await?;
        self.lives(&caller).await?;
        Ok(caller)
    }

    async fn lives(&self, caller: &Caller) -> Result<(), Refusal> {
        let nothing = Bound::default();
        let bound = match &caller.proof {
            Proof::Token { bound, .. } => bound,
            _ => &nothing,
        };
        let account = &caller.account;
        let unknown = |what: String, why: String| {
            let sentence = format!("whether {what} lives cannot be known now; try again");
            Err(Refusal::new(Reason::LivenessUnknown, sentence).with_detail(why))
        };
        match self.liveness.account(account, bound.account_uid.as_deref()).await {
            Life::Alive => {}
            Life::Gone => {
                let sentence = format!("the service account {account} does not exist");
                return Err(Refusal::new(Reason::AccountGone, sentence));
            }
            Life::Replaced => {
                let sentence = format!(
                    "the service account {account} is another one than the token's, which was deleted; get a new token"
                );
                return Err(Refusal::new(Reason::AccountReplaced, sentence));
            }
            Life::Unknown(why) => return unknown(format!("the service account {account}"), why),
        }
        let Some(pod) = &bound.pod else { return Ok(()) };
        match self.liveness.pod(account.namespace(), pod).await {
            Life::Alive => Ok(()),
            Life::Gone | Life::Replaced => {
                let (namespace, name) = (account.namespace(), &pod.name);
                let sentence =
                    format!("the pod {namespace}/{name} that the token was made for does not exist");
                Err(Refusal::new(Reason::PodGone, sentence))
            }
            Life::Unknown(why) => unknown(format!("the pod {}/{}", account.namespace(), pod.name), why),
        }
    }

    /// Whom the certificate will name.
    fn identity(&self, caller: &Caller, wishes: &Wishes) -> Result<ServiceAccount, Refusal> {
        match wishes.impersonated {
            None => Ok(caller.account.clone()),
            Some(_) => {
                let sentence = format!("{} may not ask for others", caller.account);
                Err(Refusal::new(Reason::ImpersonatorUnknown, sentence))
            }
        }
    }

    /// The CSR gives its key alone. What it names is compared, never signed.
    fn compare(&self, ask: &Ask<'_>, csr: &CheckedCsr, identity: &ServiceAccount) -> Result<(), Refusal> {
        let requested = csr.requested();
        let id = identity.spiffe_id(self.authority.trust_domain());
        let own = requested.uri.as_deref().is_none_or(|uri| uri == id.as_str());
        if ask.names_itself {
            let named = requested.uri.is_some() || !requested.dns.is_empty() || !requested.others.is_empty();
            if !named {
                let sentence = format!("the CSR names nobody; it has to name {id}");
                return Err(Refusal::new(Reason::CsrNames, sentence));
            }
            if !own || !requested.dns.is_empty() || !requested.others.is_empty() {
                let sentence = format!("the CSR asks for other names than {id}, which is the caller's");
                return Err(Refusal::new(Reason::CsrIdentity, sentence));
            }
        } else if !own {
            self.metrics.another_identity();
            let asked = requested.uri.as_deref().unwrap_or_default();
            tracing::info!(asked, given = %id, "the CSR names another identity than the caller's, which it gets");
        }
        Ok(())
    }
}

fn unusable_csr(fault: csr::Error) -> Refusal {
    let reason = match &fault {
        csr::Error::Signature => Reason::CsrSignature,
        csr::Error::Ca => Reason::CsrCa,
        csr::Error::Uris(_) => Reason::CsrUris,
        csr::Error::Key(_) => Reason::KeyRefused,
        _ => Reason::CsrMalformed,
    };
    Refusal::new(reason, fault.to_string())
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
