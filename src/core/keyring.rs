//! The keys that JWT-SVIDs are signed with, and the number of the bundle that they are published in.
//!
//! A key is published before it signs, and after it has signed for as long as a token of it can be good: `prepared`, then
//! in use from a moment that all replicas know, then retired. All that follows from one time in each key and the clock.
//! The number grows with each change of what is published, and is never below the milliseconds since 1970 at that
//! change, which no changes come faster than: so it also grows where an older state, or none, is found.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use zeroize::{Zeroize as _, ZeroizeOnDrop, Zeroizing};

use super::bundle::TrustBundle;
use super::jwt_svid::{LONGEST, encoded};
use super::key::{self, JwsKey, KeyKind, PrivateKey, PublicKey};
use super::published::{JwtAuthority, Published};

/// Consumers of the bundle are told to look again after so many seconds.
pub const REFRESH_HINT: u64 = 300;
/// A key is published so long before it signs: twelve times the hint, of which the standard wants three to five
/// (SPIFFE_Federation 4.1).
pub const AHEAD: Duration = Duration::from_secs(3_600);
/// A key signs for so long,
pub const PERIOD: Duration = Duration::from_secs(86_400);
/// and so much longer while nobody makes the next one.
pub const GRACE: Duration = Duration::from_secs(86_400);
/// Clocks of those who verify may be behind by so much.
const BEHIND: Duration = Duration::from_secs(300);
/// Longer states are refused before they are read.
pub const MAX: usize = 64 * 1024;

/// One of the keys.
pub struct Key {
    kid: String,
    from: OffsetDateTime,
    private: PrivateKey,
    signing: JwsKey,
}

impl Key {
    /// Of a P-256 key, in use from then on.
    pub fn new(private: PrivateKey, from: OffsetDateTime) -> Result<Self, key::Error> {
        let signing = private.jws()?;
        let from = from.replace_nanosecond(0).unwrap_or(from);
        Ok(Self { kid: encoded(private.public().identifier()), from, private, signing })
    }

    /// What tokens call it.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// What signs.
    pub fn signing(&self) -> &JwsKey {
        &self.signing
    }

    /// The public half.
    pub fn public(&self) -> &PublicKey {
        self.private.public()
    }

    /// From when on it signs.
    pub fn from(&self) -> OffsetDateTime {
        self.from
    }

    /// From then on it signs nothing, whoever has not heard of another.
    fn until(&self) -> OffsetDateTime {
        self.from + PERIOD + GRACE
    }

    /// From then on no token of it can be good.
    fn gone(&self) -> OffsetDateTime {
        self.until() + LONGEST.duration() + BEHIND
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "key {:?} from {}", self.kid, self.from)
    }
}

/// All of them. Made anew, never changed.
#[derive(Clone, Debug)]
pub struct Keyring {
    keys: Vec<Arc<Key>>,
    sequence: u64,
    content: String,
}

/// Why a state is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not what Mica writes. Says where, and shows nothing of it.
    #[error("it is no state of JWT keys: the fault is at line {line}, column {column}")]
    Json {
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
    },
    /// One of the keys.
    #[error("a key in it cannot be used: {0}")]
    Key(String),
}

#[derive(Deserialize, Serialize)]
struct Stored {
    sequence: u64,
    content: String,
    keys: Vec<StoredKey>,
}

#[derive(Deserialize, Serialize, ZeroizeOnDrop)]
struct StoredKey {
    /// Seconds since 1970.
    #[zeroize(skip)]
    from: i64,
    /// PKCS#8, base64.
    key: String,
}

impl Keyring {
    /// What has to be kept from now on, if that is something else than before. `floor` is the greatest number that was
    /// published, as far as is known here, and `anew` says that it needs another in any case, as where what was found may
    /// be older than what others have seen.
    pub fn next<E: From<key::Error>>(
        before: Option<&Self>,
        roots: &TrustBundle,
        now: OffsetDateTime,
        floor: u64,
        anew: bool,
        mut fresh: impl FnMut() -> Result<PrivateKey, E>,
    ) -> Result<Option<Self>, E> {
        let known = before.map_or(&[][..], |before| &before.keys);
        // One that would begin much later was made by a clock that has been set back since.
        let is_good = |key: &Key| now < key.gone() && key.from <= now + PERIOD + AHEAD;
        let mut keys: Vec<_> = known.iter().filter(|key| is_good(key)).cloned().collect();
        let newest = keys.iter().map(|key| key.from).max();
        if active(&keys, now).is_none() {
            keys.push(Arc::new(Key::new(fresh()?, now)?));
        } else if newest.is_some_and(|newest| newest + PERIOD <= now + AHEAD) {
            keys.push(Arc::new(Key::new(fresh()?, now + AHEAD)?));
        }
        let mut next = Self { keys, sequence: 0, content: String::new() };
        next.content = next.published(roots).content();
        let last = before.map_or(0, |before| before.sequence);
        if !anew && last >= floor && before.is_some_and(|before| before.content == next.content) {
            return Ok(None);
        }
        next.sequence = next_number(last.max(floor), now);
        Ok(Some(next))
    }

    /// The key that signs now.
    pub fn active(&self, now: OffsetDateTime) -> Option<&Arc<Key>> {
        active(&self.keys, now)
    }

    /// All of them, the oldest first.
    pub fn keys(&self) -> &[Arc<Key>] {
        &self.keys
    }

    /// The bundle's number.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The same keys, and no smaller number.
    pub fn numbered_from(self, number: u64) -> Self {
        Self { sequence: self.sequence.max(number), ..self }
    }

    /// The same number, and no keys: what is left of a state whose keys others may have read.
    pub fn without_keys(&self) -> Self {
        Self { keys: Vec::new(), sequence: self.sequence, content: String::new() }
    }

    /// The bundle that its number is for; none with other roots than it was numbered with.
    pub fn bundle(&self, roots: &TrustBundle) -> Option<Published> {
        let published = self.published(roots);
        (published.content() == self.content).then_some(published)
    }

    fn published(&self, roots: &TrustBundle) -> Published {
        Published {
            x509: roots.roots().to_vec(),
            jwt: self.keys.iter().map(|key| JwtAuthority::es256(&key.kid, key.public())).collect(),
            sequence: Some(self.sequence),
            refresh_hint: Some(REFRESH_HINT),
        }
    }

    /// Reads what [`Keyring::to_json`] wrote.
    pub fn from_json(text: &[u8]) -> Result<Self, Error> {
        // What serde says shows what stands there.
        let stored: Stored = serde_json::from_slice(text)
            .map_err(|fault| Error::Json { line: fault.line(), column: fault.column() })?;
        let mut keys = Vec::new();
        for StoredKey { from, key } in &stored.keys {
            let fault = |fault: String| Error::Key(fault);
            let from = OffsetDateTime::from_unix_timestamp(*from).map_err(|e| fault(e.to_string()))?;
            let mut der = STANDARD.decode(key).map_err(|_| fault("it is not base64".to_owned()))?;
            let private = PrivateKey::from_pkcs8(&der, None).map_err(|e| fault(e.to_string()));
            der.zeroize();
            keys.push(Arc::new(Key::new(private?, from).map_err(|e| fault(e.to_string()))?));
        }
        keys.sort_by_key(|key| key.from);
        Ok(Self { keys, sequence: stored.sequence, content: stored.content })
    }

    /// With the private keys.
    pub fn to_json(&self) -> Zeroizing<String> {
        let key = |key: &Arc<Key>| StoredKey {
            from: key.from.unix_timestamp(),
            key: STANDARD.encode(key.private.pkcs8()),
        };
        let stored = Stored {
            sequence: self.sequence,
            content: self.content.clone(),
            keys: self.keys.iter().map(key).collect(),
        };
        // Numbers and texts alone, which can always be written.
        Zeroizing::new(serde_json::to_string(&stored).unwrap_or_default())
    }
}

/// The number after that one: never below the milliseconds since 1970, so that it also grows where the one before is
/// lost.
pub fn next_number(last: u64, now: OffsetDateTime) -> u64 {
    let clock = u64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
    last.saturating_add(1).max(clock)
}

/// The kind of the keys.
pub const KIND: KeyKind = KeyKind::P256;

/// The newest whose time has come; where a clock was set back, the oldest.
fn active(keys: &[Arc<Key>], now: OffsetDateTime) -> Option<&Arc<Key>> {
    let usable = || keys.iter().filter(|key| now < key.until());
    usable()
        .filter(|key| key.from <= now)
        .max_by_key(|key| key.from)
        .or_else(|| usable().min_by_key(|key| key.from))
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::core::certificate::Certificate;
    use crate::core::issuer;
    use crate::core::profile::Profile;
    use crate::core::spiffe::TrustDomain;
    use crate::sys::keys;

    const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);

    fn roots() -> TrustBundle {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let organization = "example".parse().unwrap();
        let domain = TrustDomain::parse("example.org").unwrap();
        let profile = Profile::Root { organization: &organization, trust_domain: &domain };
        let serial = keys::serial_number().unwrap();
        let root = issuer::root(&key, &profile, "1y".parse().unwrap(), NOW, serial).unwrap();
        TrustBundle::new([Certificate::from_der(root.der()).unwrap()]).unwrap()
    }

    fn next(before: Option<&Keyring>, roots: &TrustBundle, now: OffsetDateTime) -> Option<Keyring> {
        Keyring::next(before, roots, now, 0, false, || keys::generate(KIND)).unwrap()
    }

    /// Hour by hour over ten days, with each token that could be signed.
    #[test]
    fn every_token_is_verified_by_every_bundle_until_it_expires() {
        let roots = roots();
        let mut state = next(None, &roots, NOW).unwrap();
        let mut published_at = std::collections::BTreeMap::new();
        let mut signed: Vec<(OffsetDateTime, String)> = Vec::new();
        let step = Duration::from_secs(600);
        for n in 0..(10 * 144) {
            let now = NOW + step * n;
            if let Some(changed) = next(Some(&state), &roots, now) {
                assert!(changed.sequence() > state.sequence());
                state = changed;
            }
            let bundle = state.bundle(&roots).unwrap();
            assert!((1..=4).contains(&bundle.jwt.len()), "{bundle:?}");
            let kids: Vec<_> = bundle.jwt.iter().map(|key| key.kid().to_owned()).collect();
            for kid in &kids {
                published_at.entry(kid.clone()).or_insert(now);
            }
            let active = state.active(now).unwrap().kid().to_owned();
            // Published long before it signs, but for the first.
            assert!(n == 0 || now - published_at[&active] >= AHEAD || published_at[&active] == NOW);
            signed.push((now + LONGEST.duration(), active));
            signed.retain(|(expires, _)| *expires + BEHIND > now);
            assert!(signed.iter().all(|(_, kid)| kids.contains(kid)));
        }
        assert_eq!(published_at.len(), 11);
    }

    #[test]
    fn a_number_never_goes_back_and_is_no_older_than_the_clock() {
        let roots = roots();
        let clock = |at: OffsetDateTime| u64::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap();
        let first = next(None, &roots, NOW).unwrap();
        assert_eq!(first.sequence(), clock(NOW));
        assert!(next(Some(&first), &roots, NOW + Duration::from_secs(60)).is_none());
        // Who begins to write, and who has seen a greater one.
        let begins = |floor, begins, now| {
            Keyring::next(Some(&first), &roots, now, floor, begins, || keys::generate(KIND)).unwrap()
        };
        assert_eq!(begins(0, true, NOW).unwrap().sequence(), clock(NOW) + 1);
        let later = NOW + Duration::from_secs(60);
        assert_eq!(begins(0, true, later).unwrap().sequence(), clock(later));
        assert_eq!(begins(clock(later) + 5, false, later).unwrap().sequence(), clock(later) + 6);
        // A clock that was set back changes nothing, or by one.
        let back = NOW - Duration::from_secs(7_200);
        assert!(begins(0, false, back).is_none());
        assert_eq!(begins(0, true, back).unwrap().sequence(), clock(NOW) + 1);
        assert_eq!(first.active(back).unwrap().kid(), first.active(NOW).unwrap().kid());
        // With other roots it is another bundle.
        let other = self::roots();
        assert!(first.bundle(&other).is_none());
        assert!(next(Some(&first), &other, NOW).unwrap().bundle(&other).is_some());
    }

    #[test]
    fn a_clock_that_was_far_ahead_leaves_no_key_for_later() {
        let roots = roots();
        let ahead = next(None, &roots, NOW + Duration::from_secs(365 * 86_400)).unwrap();
        let state = next(Some(&ahead), &roots, NOW).unwrap();
        assert_eq!(state.keys().len(), 1);
        assert!(state.active(NOW).is_some() && state.sequence() > ahead.sequence());
    }

    #[test]
    fn it_is_read_as_it_was_written_and_shows_no_key() {
        let roots = roots();
        let state = next(None, &roots, NOW).unwrap();
        let text = state.to_json();
        let read = Keyring::from_json(text.as_bytes()).unwrap();
        assert_eq!(read.bundle(&roots), state.bundle(&roots));
        assert!(next(Some(&read), &roots, NOW).is_none());
        let secret = STANDARD.encode(state.keys()[0].private.pkcs8());
        assert!(text.contains(&secret) && !format!("{state:?}").contains(&secret));
        let cut = text.replace(&secret, &secret[..40]);
        for bad in ["", "{}", "[]", "garbage", &cut] {
            let fault = Keyring::from_json(bad.as_bytes()).unwrap_err();
            assert!(!fault.to_string().contains(&secret[..20]), "{fault}");
        }
        assert!(next(Some(&state.without_keys()), &roots, NOW).unwrap().sequence() > state.sequence());
    }
}
