//! What is held now: certificates with their keys by SPIFFE ID, and the bundles of all trust domains. Whatever serves
//! workloads reads it here and waits here for what comes next.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};

use crate::core::bundle::TrustBundle;
use crate::core::certificate::Certificate;
use crate::core::key::PrivateKey;
use crate::core::spiffe::{SpiffeId, TrustDomain};
use crate::core::trace::Context;

/// An X509-SVID with its key. Its key does not appear in `Debug`.
pub struct Svid {
    /// Whose.
    pub id: SpiffeId,
    /// The leaf, then its intermediates.
    pub chain: Vec<Certificate>,
    /// The leaf's.
    pub key: Arc<PrivateKey>,
    /// When its renewal begins.
    pub renew_at: OffsetDateTime,
    /// What it was obtained in, if that is traced.
    pub trace: Option<Context>,
}

impl Svid {
    /// When it ends.
    pub fn not_after(&self) -> OffsetDateTime {
        self.chain[0].validity.not_after
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "X509-SVID of {} until {}", self.id, self.not_after())
    }
}

/// What trusts what: the bundle of each trust domain, never merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundles {
    /// The agent's own trust domain.
    pub own: TrustDomain,
    /// Of all trust domains, its own among them.
    pub domains: BTreeMap<TrustDomain, Authorities>,
}

impl Bundles {
    /// Of its own trust domain alone.
    pub fn new(own: TrustDomain, x509: TrustBundle) -> Self {
        let authorities = Authorities { x509: Some(x509), jwt: None };
        Self { domains: BTreeMap::from([(own.clone(), authorities)]), own }
    }

    /// The roots of its own trust domain.
    pub fn roots(&self) -> Option<&TrustBundle> {
        self.domains.get(&self.own)?.x509.as_ref()
    }
}

/// The keys that speak for one trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorities {
    /// None if nothing of that trust domain is to be trusted (SPIFFE_Trust_Domain_and_Bundle 4.1.3).
    pub x509: Option<TrustBundle>,
    /// A JWK Set of keys of use jwt-svid alone; none if the authority has told of none.
    pub jwt: Option<Arc<str>>,
}

/// What one identity has; none while it is being obtained.
pub type Watched = watch::Receiver<Option<Arc<Svid>>>;

/// All that the agent holds.
pub struct Held {
    identities: Mutex<BTreeMap<SpiffeId, Place>>,
    bundles: watch::Sender<Option<Arc<Bundles>>>,
    wanted: mpsc::UnboundedSender<SpiffeId>,
}

struct Place {
    svid: watch::Sender<Option<Arc<Svid>>>,
    /// Kept whether somebody watches it or not.
    pinned: bool,
}

impl Held {
    /// Holds nothing. What is wanted for the first time comes out of the channel.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<SpiffeId>) {
        let (wanted, wants) = mpsc::unbounded_channel();
        (Self { identities: Mutex::default(), bundles: watch::Sender::new(None), wanted }, wants)
    }

    /// Follows one identity, whose caller is entitled to it. What was not held until now is obtained.
    pub fn watch(&self, id: &SpiffeId) -> Watched {
        self.place(id, false)
    }

    /// Has an identity obtained and kept, for as long as nobody says otherwise.
    pub fn pin(&self, id: &SpiffeId) -> Watched {
        self.place(id, true)
    }

    /// Keeps an identity only as long as it is watched.
    pub fn unpin(&self, id: &SpiffeId) {
        if let Some(place) = self.identities().get_mut(id) {
            place.pinned = false;
        }
    }

    /// Follows the bundles; none until the authority has told of them.
    pub fn bundles(&self) -> watch::Receiver<Option<Arc<Bundles>>> {
        self.bundles.subscribe()
    }

    /// Takes a certificate in the place of the one before. An identity that nobody wants any more stays away.
    pub fn put(&self, svid: Arc<Svid>) {
        if let Some(place) = self.identities().get(&svid.id) {
            place.svid.send_replace(Some(svid));
        }
    }

    /// Ends an identity: who watches it sees its channel closed.
    pub fn end(&self, id: &SpiffeId) {
        self.identities().remove(id);
    }

    /// Takes bundles; those who watch hear of it only if they differ.
    pub fn put_bundles(&self, bundles: Bundles) {
        self.bundles.send_if_modified(|held| {
            let changed = held.as_deref() != Some(&bundles);
            if changed {
                *held = Some(Arc::new(bundles));
            }
            changed
        });
    }

    /// What is held of an identity now. None if it is not wanted by anybody any more, and then forgotten.
    pub fn current(&self, id: &SpiffeId) -> Option<Option<Arc<Svid>>> {
        let mut identities = self.identities();
        let place = identities.get(id)?;
        if !place.pinned && place.svid.receiver_count() == 0 {
            identities.remove(id);
            return None;
        }
        Some(place.svid.borrow().clone())
    }

    /// All identities that are held or being obtained, and how many watch each.
    pub fn all(&self) -> Vec<(SpiffeId, Option<Arc<Svid>>, usize)> {
        let identities = self.identities();
        let shown = |(id, place): (&SpiffeId, &Place)| {
            (id.clone(), place.svid.borrow().clone(), place.svid.receiver_count())
        };
        identities.iter().map(shown).collect()
    }

    fn place(&self, id: &SpiffeId, pinned: bool) -> Watched {
        let mut identities = self.identities();
        if let Some(place) = identities.get_mut(id) {
            place.pinned |= pinned;
            return place.svid.subscribe();
        }
        let svid = watch::Sender::new(None);
        let watched = svid.subscribe();
        identities.insert(id.clone(), Place { svid, pinned });
        // Nobody obtains anything any more when the agent ends.
        let _ = self.wanted.send(id.clone());
        watched
    }

    fn identities(&self) -> MutexGuard<'_, BTreeMap<SpiffeId, Place>> {
        self.identities.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
