//! One piece of work: look at some accounts, decide, and carry it out.

use std::sync::Arc;

use time::OffsetDateTime;
use tokio::sync::watch;

use super::{Metrics, News, Options, Terms};
use crate::authority::{self, Authority, Cause};
use crate::core::certificate::Certificate;
use crate::core::issuer::Order;
use crate::core::key::PublicKey;
use crate::core::lifetime::Lifetime;
use crate::core::plan::{CertificateSet, Good, Observed, Policy, Step, Why, judge, step};
use crate::core::policy::Delivery;
use crate::core::profile::Profile;
use crate::core::refusal::Refusal;
use crate::core::spiffe::ServiceAccount;
use crate::sink::{self, Found, Sink};
use crate::sys::{clock, keys};

/// An account to be worked on, and what is known of it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) account: ServiceAccount,
    pub(super) desired: bool,
    /// Whether it may be taken from those who should not have it.
    pub(super) settled: bool,
    /// None when it has to be looked at.
    pub(super) observed: Option<Observed>,
    /// It is not repaired before.
    pub(super) repair_at: OffsetDateTime,
}

/// What became of a job.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) account: ServiceAccount,
    /// What is there now, as far as it is known.
    pub(super) observed: Option<Observed>,
    pub(super) outcome: Outcome,
}

#[derive(Debug)]
pub(super) enum Outcome {
    Delivered(Why, Good),
    Marked(Good),
    Removed,
    /// It is to be left as it is until then.
    Wait(OffsetDateTime),
    Nothing,
    /// It would be delivered, if anything could be issued.
    NoIssuer(Why),
    Failed(Fault),
    /// Mica stops.
    Stopped,
}

/// Why an account was not served.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Sink(#[from] sink::Error),
    #[error(transparent)]
    Authority(#[from] authority::Error),
    #[error(transparent)]
    Keys(#[from] keys::Error),
    /// It is denied.
    #[error("{}", .0.sentence)]
    Refused(Refusal),
}

/// Judges what a sink finds.
#[derive(Clone)]
pub struct Judge {
    authority: Arc<Authority>,
    terms: Terms,
}

impl Judge {
    /// By the trust bundle and the trust domain of an authority, and by what accounts ask for and are granted.
    pub fn new(authority: Arc<Authority>, terms: Terms) -> Self {
        Self { authority, terms }
    }

    /// Whether what was found for an account is good.
    pub fn observed(&self, account: &ServiceAccount, found: Found) -> Observed {
        match found {
            Found::Absent => Observed::Absent,
            Found::Foreign(why) => Observed::Foreign(why),
            Found::Released(not_after) => Observed::Released(not_after),
            Found::Damaged(fault) => Observed::Bad(fault),
            // A key that others could read is not worth keeping.
            Found::Set(found) if found.loose.is_some() => Observed::Bad(found.loose.unwrap_or_default()),
            Found::Set(found) => {
                let id = account.spiffe_id(self.authority.trust_domain());
                let bundle = self.authority.issuer().bundle().clone();
                let judged = judge(&found.set, &id, &bundle, clock::now());
                match judged.and_then(|good| self.meets_wishes(account, &found.set).map(|()| good)) {
                    Ok(good) if found.marked => Observed::Good(good),
                    Ok(good) => Observed::Unmarked(good),
                    Err(fault) => Observed::Bad(fault),
                }
            }
        }
    }
}

impl Judge {
    /// Whether it has what the account has asked for and is granted. What it has beyond that is no reason for another.
    fn meets_wishes(&self, account: &ServiceAccount, set: &CertificateSet) -> Result<(), String> {
        let Ok(Delivery { key: (kind, is_asked), dns, .. }) = (self.terms)(account) else { return Ok(()) };
        if dns.is_empty() && !is_asked {
            return Ok(());
        }
        let chain = Certificate::all_from_pem(set.chain_pem.as_bytes()).map_err(|fault| fault.to_string())?;
        let leaf = chain.first().ok_or("the chain is empty")?;
        let key = PublicKey::from_spki(&leaf.spki).map_err(|fault| fault.to_string())?;
        if is_asked && key.kind() != kind {
            return Err(format!("its key is a {} key, and the account asks for {kind}", key.kind()));
        }
        match dns.iter().find(|name| !leaf.dns.iter().any(|had| had.eq_ignore_ascii_case(name.as_str()))) {
            Some(name) => Err(format!("it does not name {name}, which the account asks for")),
            None => Ok(()),
        }
    }
}

/// Who does the work.
pub(super) struct Worker<S> {
    pub(super) authority: Arc<Authority>,
    pub(super) judge: Judge,
    pub(super) sink: Arc<S>,
    pub(super) options: Options,
    pub(super) metrics: Metrics,
    pub(super) stop: watch::Receiver<bool>,
}

impl<S: Sink> Worker<S> {
    /// Looks at accounts, plans, and carries the plan out, one account after the other. `usable`: the issuer can issue.
    pub(super) async fn work(self: Arc<Self>, jobs: Vec<Job>, usable: bool) -> Vec<Done> {
        let issuer_not_after = self.authority.issuer().window().not_after;
        let mut done = Vec::with_capacity(jobs.len());
        let mut planned = Vec::with_capacity(jobs.len());
        for job in jobs {
            let Job { account, desired, settled, observed, repair_at } = job;
            let observed = match observed {
                Some(observed) => observed,
                None => match self.sink.read(&account).await {
                    Ok(found) => self.judge.observed(&account, found),
                    Err(fault) => {
                        done.push(Done { account, observed: None, outcome: Outcome::Failed(fault.into()) });
                        continue;
                    }
                },
            };
            let now = clock::now();
            let terms = (self.options.terms)(&account);
            // One that gets nothing new keeps what it has.
            let lifetime = terms.as_ref().map_or(Lifetime::from_secs(0), |terms| terms.lifetime);
            let policy = Policy { lifetime, issuer_not_after };
            let step = match step(desired, settled, &observed, now, &policy) {
                Step::Deliver(Why::Repair(_)) if now < repair_at => Step::Wait(repair_at),
                step => step,
            };
            planned.push((account, observed, step, terms));
        }
        let fresh: Vec<_> = planned
            .iter()
            .filter(|(_, _, step, _)| usable && *step == Step::Deliver(Why::New))
            .map(|(account, ..)| account.clone())
            .collect();
        if let Err(fault) = self.sink.announce(&fresh).await {
            tracing::error!(%fault, "cannot record who is about to be served");
        }
        for (account, observed, step, terms) in planned {
            let outcome = match step {
                _ if *self.stop.borrow() => Outcome::Stopped,
                Step::Deliver(why) if !usable => Outcome::NoIssuer(why),
                Step::Deliver(why) => match terms {
                    Ok(terms) => match self.deliver(&account, &why, &terms).await {
                        Ok(good) => Outcome::Delivered(why, good),
                        Err(fault) => Outcome::Failed(fault),
                    },
                    Err(refusal) => Outcome::Failed(Fault::Refused(refusal)),
                },
                Step::Mark(good) => match self.sink.mark(&account).await {
                    Ok(()) => Outcome::Marked(good),
                    Err(fault) => Outcome::Failed(fault.into()),
                },
                Step::Remove => match self.sink.remove(&account).await {
                    Ok(()) => Outcome::Removed,
                    Err(fault) => Outcome::Failed(fault.into()),
                },
                Step::Wait(at) => Outcome::Wait(at),
                Step::Nothing => Outcome::Nothing,
            };
            done.push(Done { account, observed: Some(observed), outcome });
        }
        done
    }

    async fn deliver(&self, account: &ServiceAccount, why: &Why, terms: &Delivery) -> Result<Good, Fault> {
        for refused in &terms.refused {
            tracing::warn!(%account, refused, "the account asks for more than it may have, and gets the default");
            (self.options.tell)(account, News::Refused(refused));
        }
        self.metrics.refused(terms.refused.len());
        let key = keys::generate(terms.key.0)?;
        let id = account.spiffe_id(self.authority.trust_domain());
        let order = Order {
            profile: Profile::Workload { id: &id, dns: &terms.dns, proved_at: None },
            key: key.public(),
            lifetime: terms.lifetime,
        };
        let grant = self.authority.issue(&order, clock::now(), &Cause::own(&why.to_string()))?;
        let set = CertificateSet {
            chain_pem: grant.chain_pem(),
            key_pem: key.to_pem(),
            roots_pem: grant.issuer.bundle().pem().clone(),
        };
        match why {
            Why::New => self.sink.create(account, &set).await?,
            Why::Renewal | Why::Repair(_) => self.sink.publish(account, &set).await?,
        }
        Ok(Good::of(grant.issued.validity, grant.issued.serial.bytes()))
    }
}
