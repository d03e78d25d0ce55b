//! Who holds which bundle: the evidence that a root may stand on when it is to be retired. A consumer that acknowledges
//! has said so itself; one that was given a bundle and says nothing is counted apart.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tonic::Code;

use super::{Agent, Error};
use crate::client;
use crate::core::spiffe::{SpiffeId, TrustDomain};
use crate::proto::mica::v1::Holder;

/// What changed is told this late.
const CHANGED: Duration = Duration::from_secs(10);
/// And what did not is told again, since the authority forgets it after a quarter of an hour.
const AGAIN: Duration = Duration::from_secs(300);
/// The authority takes so many.
const MOST: usize = 1_024;

/// SHA-256 of a bundle's X.509 authorities ([`crate::core::bundle::TrustBundle::digest`]).
pub type Digest = [u8; 32];

/// All consumers of the agent.
#[derive(Default)]
pub struct Holders {
    held: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    /// By consumer, and what it has of each trust domain.
    consumers: BTreeMap<u64, (SpiffeId, BTreeMap<TrustDomain, Has>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Has {
    bundle: Digest,
    acknowledged: bool,
}

/// How many consumers of an identity hold one bundle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Said so.
    pub acknowledged: u32,
    /// Were given it.
    pub given: u32,
}

/// One consumer: a stream, or a folder of files. What it holds is forgotten with it.
pub struct Consumer {
    number: u64,
    all: Arc<Holders>,
}

impl Holders {
    /// A consumer that holds nothing yet.
    pub fn join(self: &Arc<Self>, id: &SpiffeId) -> Consumer {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.consumers.insert(number, (id.clone(), BTreeMap::new()));
        Consumer { number, all: self.clone() }
    }

    /// By identity, trust domain and bundle.
    pub fn counts(&self) -> BTreeMap<(SpiffeId, TrustDomain, Digest), Count> {
        let mut counts: BTreeMap<_, Count> = BTreeMap::new();
        for (id, has) in self.state().consumers.values() {
            for (domain, has) in has {
                let count = counts.entry((id.clone(), domain.clone(), has.bundle)).or_default();
                match has.acknowledged {
                    true => count.acknowledged += 1,
                    false => count.given += 1,
                }
            }
        }
        counts
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Consumer {
    /// It was sent a bundle. What it acknowledged before, it may still hold: only its own word changes that.
    pub fn given(&self, domain: &TrustDomain, bundle: Digest) {
        self.set(domain, Has { bundle, acknowledged: false });
    }

    /// It says that it holds a bundle.
    pub fn acknowledged(&self, domain: &TrustDomain, bundle: Digest) {
        self.set(domain, Has { bundle, acknowledged: true });
    }

    fn set(&self, domain: &TrustDomain, now: Has) {
        let mut state = self.all.state();
        let Some((_, has)) = state.consumers.get_mut(&self.number) else { return };
        if now.acknowledged || has.get(domain).is_none_or(|before| !before.acknowledged) {
            has.insert(domain.clone(), now);
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.all.state().consumers.remove(&self.number);
    }
}

/// Tells the authority, for ever. One that does not want to know, as Istio's, is not told.
pub async fn report(agent: Arc<Agent>) {
    let (mut told, mut since) = (BTreeMap::new(), Duration::ZERO);
    loop {
        tokio::time::sleep(CHANGED).await;
        since += CHANGED;
        let counts = agent.holders.counts();
        if counts == told && (since < AGAIN || counts.is_empty()) {
            continue;
        }
        let holder = |((id, domain, bundle), count): (&(SpiffeId, TrustDomain, Digest), &Count)| Holder {
            identity: id.to_string(),
            trust_domain: domain.to_string(),
            bundle: bundle.to_vec(),
            acknowledged: count.acknowledged,
            given: count.given,
        };
        let holders = counts.iter().take(MOST).map(holder).collect();
        let wish = agent.own_wish();
        let held = wish.id.as_ref().and_then(|id| agent.held.current(id)).flatten();
        match agent.asker.report(&wish, held.as_deref(), holders).await {
            Ok(()) => (told, since) = (counts, Duration::ZERO),
            Err(Error::Client(client::Error::Denied { denial, .. }))
                if denial.code == Code::Unimplemented =>
            {
                return std::future::pending().await;
            }
            Err(fault) => tracing::debug!(%fault, "who holds which bundle cannot be told"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_of_a_consumer_counts_more_than_what_it_was_sent() {
        let holders = Arc::new(Holders::default());
        let domain = TrustDomain::parse("example.org").unwrap();
        let id = SpiffeId::parse("spiffe://example.org/a").unwrap();
        let consumer = holders.join(&id);
        let count = |bundle| holders.counts().get(&(id.clone(), domain.clone(), bundle)).copied();
        assert_eq!(count([1; 32]), None);
        consumer.given(&domain, [1; 32]);
        assert_eq!(count([1; 32]), Some(Count { acknowledged: 0, given: 1 }));
        consumer.acknowledged(&domain, [1; 32]);
        // Sent, but not yet acknowledged: it holds the one before as far as is known.
        consumer.given(&domain, [2; 32]);
        assert_eq!(count([1; 32]), Some(Count { acknowledged: 1, given: 0 }));
        assert_eq!(count([2; 32]), None);
        consumer.acknowledged(&domain, [2; 32]);
        assert_eq!(count([2; 32]), Some(Count { acknowledged: 1, given: 0 }));
        drop(consumer);
        assert!(holders.counts().is_empty());
    }
}
