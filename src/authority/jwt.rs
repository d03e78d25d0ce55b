//! JWT-SVIDs: the same door, with keys of its own.

use std::sync::Arc;
use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::sleep;

use super::{Authority, Bundles, Cause};
use crate::core::jwt_svid::{self, Audience, Claims};
use crate::core::key;
use crate::core::keyring::{KIND, Keyring};
use crate::core::lifetime::Lifetime;
use crate::core::spiffe::SpiffeId;
use crate::store::KeyringStore;
use crate::sys::{clock, keys};

/// What others have changed, and whether a key is due, is looked for this often.
const LOOK: Duration = Duration::from_secs(10);
/// Somebody else writes between reading and writing so many times at most, before the next look.
const TRIES: usize = 4;

/// What is ordered.
#[derive(Clone, Copy, Debug)]
pub struct JwtOrder<'a> {
    /// Whom the token names.
    pub id: &'a SpiffeId,
    /// Whom it is for.
    pub audience: &'a Audience,
    /// How long it is good.
    pub lifetime: Lifetime,
}

/// A token, and until when it is good.
pub struct JwtGrant {
    /// JWS compact serialization.
    pub token: String,
    /// The first second at which it is not good any more.
    pub expires: OffsetDateTime,
}

impl std::fmt::Debug for JwtGrant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a token until {}", self.expires)
    }
}

/// Why no token was issued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    /// There are no keys yet, or no more.
    #[error("there is no key for JWT-SVIDs now")]
    NoKey,
    /// No name for the token.
    #[error(transparent)]
    Keys(#[from] keys::Error),
    /// The key would not sign.
    #[error(transparent)]
    Key(#[from] key::Error),
}

impl JwtError {
    /// What [`JwtError::reason`] can be.
    pub(super) const REASONS: [&'static str; 3] = ["no_key", "no_randomness", "signing"];

    /// A short fixed name.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoKey => "no_key",
            Self::Keys(_) => "no_randomness",
            Self::Key(_) => "signing",
        }
    }
}

/// Why a key was not made.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Keys(#[from] keys::Error),
    #[error(transparent)]
    Key(#[from] key::Error),
    #[error("{0}")]
    Store(String),
}

impl Authority {
    /// The one door, for tokens. The log has all of one but itself.
    pub fn issue_jwt(
        &self,
        order: &JwtOrder<'_>,
        now: OffsetDateTime,
        cause: &Cause<'_>,
    ) -> Result<JwtGrant, JwtError> {
        let issued = self.sign_jwt(order, now);
        let (grant, kid, jti) = issued.inspect_err(|e| self.metrics.token_failed(e.reason()))?;
        self.metrics.token_issued();
        let Cause { why, authenticator, source, trace } = cause;
        tracing::info!(
            identity = %order.id,
            kid,
            jti,
            audiences = order.audience.count(),
            expires = grant.expires.format(&Rfc3339).unwrap_or_default(),
            why,
            authenticator,
            source = source.map(tracing::field::display),
            trace = trace.map(tracing::field::display),
            "JWT-SVID issued"
        );
        Ok(grant)
    }

    fn sign_jwt(
        &self,
        order: &JwtOrder<'_>,
        now: OffsetDateTime,
    ) -> Result<(JwtGrant, String, String), JwtError> {
        let keyring = self.keyring.load_full();
        let key = keyring.as_ref().and_then(|keyring| keyring.active(now)).ok_or(JwtError::NoKey)?;
        let jti = jwt_svid::jti(keys::random_bytes()?);
        // A key outlives the longest of its tokens, so no bound of its own is needed here.
        let lifetime = order.lifetime.min(jwt_svid::LONGEST);
        let claims = Claims { id: order.id, audience: order.audience, now, lifetime, jti: &jti };
        let token = jwt_svid::token(key.signing(), key.kid(), &claims)?;
        Ok((JwtGrant { token, expires: claims.expires() }, key.kid().to_owned(), jti))
    }

    /// The number that was last published; 0 if there was none.
    fn sequence(&self) -> u64 {
        self.bundles.borrow().own.as_ref().and_then(|own| own.sequence).unwrap_or(0)
    }

    /// Whether another bundle was published with that number.
    fn contradicts(&self, keyring: &Keyring) -> bool {
        let own = self.bundles.borrow().own.clone();
        own.is_some_and(|own| {
            own.sequence == Some(keyring.sequence())
                && keyring.bundle(self.issuer().bundle()).is_some_and(|kept| kept.content() != own.content())
        })
    }

    /// Publishes what is kept, unless it is older than what was published, or numbered with other roots.
    fn take(&self, keyring: Option<Keyring>) {
        let floor = self.sequence();
        let Some(keyring) = keyring else { return };
        let Some(own) = keyring.bundle(self.issuer().bundle()) else {
            return tracing::debug!(
                sequence = keyring.sequence(),
                "the trust bundle of this number is of other roots"
            );
        };
        if keyring.sequence() < floor {
            return tracing::debug!(
                sequence = keyring.sequence(),
                floor,
                "the number of the trust bundle is an older one"
            );
        }
        if keyring.sequence() == floor && self.keyring.load().is_some() {
            return;
        }
        // Published before it signs.
        self.bundles.send_modify(|bundles| {
            *bundles = Arc::new(Bundles { own: Some(Arc::new(own)), ..Bundles::clone(bundles) });
        });
        self.keyring.store(Some(Arc::new(keyring)));
    }
}

/// Keeps the keys of JWT-SVIDs, and the number of the bundle that they are published in.
pub struct Keeper<S> {
    authority: Arc<Authority>,
    store: S,
    /// Whether this process led when it last looked.
    leads: bool,
    /// The number that was kept when this was last looked at, whatever it was published with.
    kept: u64,
    /// What was last said to be wrong.
    fault: Option<String>,
}

impl<S: KeyringStore> Keeper<S> {
    /// Nothing is done before the first look.
    pub fn new(authority: Arc<Authority>, store: S) -> Self {
        Self { authority, store, leads: false, kept: 0, fault: None }
    }

    /// Looks for ever.
    pub async fn keep(mut self) {
        loop {
            self.look().await;
            tokio::select! {
                () = sleep(LOOK) => {}
                () = self.authority.replaced.notified() => {}
            }
        }
    }

    /// Takes what others have changed, and changes what is due.
    pub async fn look(&mut self) {
        match self.turn().await.map_err(|fault| fault.to_string()) {
            Ok(()) if self.fault.take().is_some() => tracing::info!("the keys of JWT-SVIDs are kept again"),
            Ok(()) => {}
            Err(fault) if self.fault.as_ref() == Some(&fault) => {}
            Err(fault) => {
                tracing::error!(fault, "the keys of JWT-SVIDs cannot be kept; trying again");
                self.fault = Some(fault);
            }
        }
    }

    async fn turn(&mut self) -> Result<(), Fault> {
        for _ in 0..TRIES {
            let number = self.store.numbered_from().await.map_err(Fault::Store)?;
            let before = self.store.read().await.map_err(Fault::Store)?;
            let leads = self.store.leads();
            if self.store.numbered_from().await.map_err(Fault::Store)? != number {
                continue;
            }
            // Put back to what it was, under a number that it gets from elsewhere.
            let kept = before.as_ref().map_or(0, Keyring::sequence);
            let went_back = before.is_some() && kept < self.kept;
            let before = before.map(|before| before.numbered_from(number.unwrap_or(0)));
            let issuer = self.authority.issuer();
            let floor = self.authority.sequence().max(number.unwrap_or(0));
            if before.is_some() && !leads {
                self.leads = false;
                self.kept = kept;
                // Whoever leads and knows it numbers it anew by the next look. One who does not has published nothing else.
                self.authority.take(before.filter(|_| !went_back));
                return Ok(());
            }
            // What is found may have been restored from a backup: others have seen greater numbers then.
            let may_be_older = number.is_none() && !self.leads;
            let anew = before
                .as_ref()
                .is_some_and(|before| may_be_older || went_back || self.authority.contradicts(before));
            let fresh = || keys::generate(KIND).map_err(Fault::from);
            let next = Keyring::next(before.as_ref(), issuer.bundle(), clock::now(), floor, anew, fresh)?;
            let Some(next) = next else {
                self.kept = kept;
                self.authority.take(before);
                return Ok(());
            };
            match self.store.write(&next).await {
                Ok(true) => {
                    self.leads = leads;
                    self.kept = next.sequence();
                    let (sequence, keys) = (next.sequence(), next.keys().len());
                    tracing::info!(sequence, keys, "the trust bundle has a new number");
                    self.authority.take(Some(next));
                    return Ok(());
                }
                Ok(false) => {}
                // What is there is better than nothing.
                Err(fault) => {
                    self.authority.take(before.filter(|_| !went_back));
                    return Err(Fault::Store(fault));
                }
            }
        }
        Err(Fault::Store("somebody else keeps on changing them".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use serde_json::Value;

    use super::*;
    use crate::core::bundle::TrustBundle;
    use crate::core::certificate::Certificate;
    use crate::core::issuer::{self, Issuer};
    use crate::core::key::KeyKind;
    use crate::core::profile::Profile;
    use crate::core::published::Published;
    use crate::core::spiffe::TrustDomain;

    /// What replicas share: the secret, and the number in the lease.
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<(Option<String>, u64)>>);

    impl Shared {
        fn lock(&self) -> MutexGuard<'_, (Option<String>, u64)> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    struct Store {
        shared: Shared,
        leads: bool,
    }

    impl KeyringStore for Store {
        async fn read(&mut self) -> Result<Option<Keyring>, String> {
            Ok(self.shared.lock().0.as_ref().map(|text| Keyring::from_json(text.as_bytes()).unwrap()))
        }

        async fn write(&mut self, keyring: &Keyring) -> Result<bool, String> {
            self.shared.lock().0 = Some(keyring.to_json().to_string());
            Ok(true)
        }

        fn leads(&self) -> bool {
            self.leads
        }

        async fn numbered_from(&self) -> Result<Option<u64>, String> {
            Ok(Some(self.shared.lock().1))
        }
    }

    fn issuer() -> Issuer {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let (organization, domain) = ("example".parse().unwrap(), TrustDomain::parse("example.org").unwrap());
        let profile = Profile::Root { organization: &organization, trust_domain: &domain };
        let serial = keys::serial_number().unwrap();
        let root = issuer::root(&key, &profile, "1y".parse().unwrap(), clock::now(), serial).unwrap();
        let root = Certificate::from_der(root.der()).unwrap();
        Issuer::new(
            Arc::new(key),
            std::slice::from_ref(&root),
            TrustBundle::new([root.clone()]).unwrap(),
            &domain,
        )
        .unwrap()
    }

    struct Replica(Keeper<Store>);

    impl Replica {
        fn new(issuer: &Issuer, shared: &Shared, leads: bool) -> Self {
            let authority = Authority::new(TrustDomain::parse("example.org").unwrap(), issuer.clone());
            Self(Keeper::new(Arc::new(authority), Store { shared: shared.clone(), leads }))
        }

        /// What it publishes after a look.
        async fn look(&mut self) -> Published {
            self.0.look().await;
            let own = self.0.authority.bundles().borrow().own.clone();
            Published::clone(&own.expect("a bundle"))
        }
    }

    #[tokio::test]
    async fn what_was_put_back_under_another_number_is_numbered_anew() {
        let (issuer, shared) = (issuer(), Shared::default());
        let (mut leader, mut other) =
            (Replica::new(&issuer, &shared, true), Replica::new(&issuer, &shared, false));
        let first = leader.look().await;
        assert_eq!(other.look().await, first);
        let older = shared.lock().0.take();
        let second = leader.look().await;
        assert_eq!(other.look().await, second);
        assert_ne!(second.jwt, first.jwt);
        let newer = shared.lock().0.clone().unwrap();

        // Somebody begins to lead, and only one has heard of it when the secret is put back.
        let number = second.sequence.unwrap() + 1_000_000;
        shared.lock().1 = number;
        assert_eq!(other.look().await, Published { sequence: Some(number), ..second.clone() });
        assert_eq!(shared.lock().0.as_ref(), Some(&newer), "nothing is written for that");
        shared.lock().0 = older;
        assert_eq!(other.look().await.jwt, second.jwt, "one number is one bundle");
        let third = leader.look().await;
        assert!(third.sequence > Some(number) && third.jwt == first.jwt, "{third:?}");
        assert_eq!(other.look().await, third);

        // And somebody who led before writes what all would take for what has the lease's number.
        let number = third.sequence.unwrap() + 1_000_000;
        shared.lock().1 = number;
        assert_eq!(leader.look().await.sequence, Some(number));
        let mut late: Value = serde_json::from_str(&newer).unwrap();
        late["sequence"] = (number - 1).into();
        shared.lock().0 = Some(late.to_string());
        let fourth = leader.look().await;
        assert!(fourth.sequence > Some(number) && fourth.jwt == second.jwt, "{fourth:?}");
        assert_eq!(other.look().await, fourth);

        // One who leads and does not know what was there before is followed, too.
        shared.lock().1 = fourth.sequence.unwrap() + 1_000_000;
        shared.lock().0 = Some(newer);
        let fifth = Replica::new(&issuer, &shared, true).look().await;
        assert!(fifth.sequence > fourth.sequence, "{fifth:?}");
        assert_eq!(other.look().await, fourth);
        assert_eq!(other.look().await, fifth);
    }
}
