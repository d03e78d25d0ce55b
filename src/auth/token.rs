//! Tokens in the `authorization` header: of service accounts, and of other issuers whose subjects stand for accounts.
//!
//! A token's own `iss` chooses the issuer, and so the keys that it is verified with. What was found out about it is
//! remembered for five minutes at most, and never past its expiry or a change of the issuer's keys. Whether account and
//! pod live is not remembered: that is asked at each request by whoever asked this.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use http::header::AUTHORIZATION;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use ring::digest::{SHA256, digest};
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Duration, timeout};
use tonic::metadata::MetadataMap;

use super::keys::LiveKeys;
use super::{Answer, Authenticator, Evidence, Reviewer};
use crate::core::caller::{Bound, Caller, Proof};
use crate::core::inspect::one_line;
use crate::core::refusal::{Reason, Refusal};
use crate::core::spiffe::{ServiceAccount, shortened};
use crate::core::token::{Claims, Token};
use crate::sys::clock;

/// How long a verdict is remembered at most, in seconds.
const KEPT: i64 = 300;
/// How many verdicts are remembered at most, of all issuers.
const VERDICTS: usize = 65_536;
/// Requests meet in one of these, each with a lock that is held for a look-up.
const SHARDS: usize = 16;
/// A clock that was set back by more makes what was remembered worthless, in seconds.
const BACK: i64 = 60;

/// Whose tokens are taken.
pub struct Issuer {
    /// Their `iss`, compared byte for byte.
    pub name: Arc<str>,
    /// What has to be among their `aud`.
    pub audience: String,
    /// What they are verified with.
    pub keys: Arc<LiveKeys>,
    /// Whom they stand for.
    pub subjects: Subjects,
}

/// Whom an issuer's tokens stand for.
pub enum Subjects {
    /// The service account that `sub` names.
    ServiceAccounts {
        /// Whether a token has to tell the UID of the account, without which it is not told from a later one of the name.
        uids: bool,
    },
    /// The account that each subject is mapped to, if it is.
    Mapped(Map),
}

/// The account of a subject.
pub type Map = Box<dyn Fn(&str) -> Option<ServiceAccount> + Send + Sync>;

/// Which tokens of service accounts the API server is asked about.
pub struct Review {
    /// Who asks it.
    pub reviewer: Arc<dyn Reviewer>,
    /// Whether it is asked about this account's.
    pub wanted: Box<dyn Fn(&ServiceAccount) -> bool + Send + Sync>,
}

/// Judges the tokens of some issuers.
pub struct Tokens {
    issuers: ArcSwap<Issuers>,
    taken: watch::Sender<()>,
    review: Option<Review>,
    verdicts: Verdicts,
    checks: Family<Check, Counter>,
}

#[derive(Default)]
struct Issuers {
    /// Another number for each other list.
    edition: u64,
    /// Of service accounts; none while it is not known whose those are.
    own: Option<Vec<Arc<Issuer>>>,
    mapped: Vec<Arc<Issuer>>,
    all: Vec<Arc<Issuer>>,
}

impl Issuers {
    fn new(before: &Self, own: Option<Vec<Arc<Issuer>>>, mapped: Vec<Arc<Issuer>>) -> Self {
        let all = own.iter().flatten().chain(&mapped).cloned().collect();
        Self { edition: before.edition + 1, own, mapped, all }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Check {
    how: &'static str,
}

impl Tokens {
    /// Does not know yet whose tokens to take.
    pub fn new(review: Option<Review>) -> Arc<Self> {
        Arc::new(Self {
            issuers: ArcSwap::default(),
            taken: watch::Sender::new(()),
            review,
            verdicts: Verdicts::default(),
            checks: Family::default(),
        })
    }

    /// Takes the tokens of these issuers of service accounts from now on. What was found out about others is forgotten. Of
    /// two with the same name the first counts.
    pub fn take(&self, own: Vec<Arc<Issuer>>) {
        self.issuers.rcu(|now| Issuers::new(now, Some(own.clone()), now.mapped.clone()));
        self.taken.send_replace(());
    }

    /// The same for those issuers whose subjects stand for accounts. One that is also an issuer of service accounts counts
    /// as that.
    pub fn take_mapped(&self, mapped: Vec<Arc<Issuer>>) {
        self.issuers.rcu(|now| Issuers::new(now, now.own.clone(), mapped.clone()));
        self.taken.send_replace(());
    }

    /// The issuers whose subjects stand for accounts.
    pub fn mapped(&self) -> Vec<Arc<Issuer>> {
        self.issuers.load().mapped.clone()
    }

    /// Waits until it is known whose tokens are taken.
    pub async fn settled(&self) {
        let mut taken = self.taken.subscribe();
        while self.issuers.load().own.is_none() {
            // The sender lives as long as this.
            let _ = taken.changed().await;
        }
    }

    /// Keeps the keys of the issuers up to date, and memory free of what is over, for ever.
    pub async fn keep(&self) {
        const SWEEP: Duration = Duration::from_secs(30);
        let mut taken = self.taken.subscribe();
        loop {
            // Ends them when it goes.
            let mut keepers = JoinSet::new();
            taken.mark_unchanged();
            for issuer in &self.issuers.load().all {
                let keys = issuer.keys.clone();
                keepers.spawn(async move { keys.keep().await });
            }
            while timeout(SWEEP, taken.changed()).await.is_err() {
                self.verdicts.sweep(clock::now().unix_timestamp());
            }
        }
    }

    /// Registers what is counted.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        for how in ["remembered", "verified", "reviewed"] {
            let _ = self.checks.get_or_create(&Check { how });
        }
        registry.register(
            "mica_token_checks",
            "Tokens found good: remembered, verified or reviewed",
            self.checks.clone(),
        );
        registry.register_collector(Box::new(OfKeys(self.clone())));
    }

    async fn caller(&self, metadata: &MetadataMap, now: OffsetDateTime) -> Result<Caller, Refusal> {
        let text = bearer(metadata)?;
        let mut key = [0; 32];
        key.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
        let issuers = self.issuers.load_full();
        if let Some(caller) = self.verdicts.find(&key, issuers.edition, now.unix_timestamp())
            && (matches!(caller.proof, Proof::Token { reviewed: true, .. } | Proof::Oidc { .. })
                || !self.is_reviewed(&caller.account))
        {
            self.counted("remembered");
            return Ok(caller);
        }
        let token = Token::read(text)?;
        let issuer = chosen(&issuers, &token)?;
        let (claims, generation) = verified(issuer, token).await?;
        let expires = claims.check(&issuer.audience, now)?;
        let caller = match &issuer.subjects {
            Subjects::ServiceAccounts { uids } => self.service_account(issuer, &claims, *uids, text).await?,
            Subjects::Mapped(map) => mapped(issuer, &claims, map)?,
        };
        self.counted(match caller.proof {
            Proof::Token { reviewed: true, .. } => "reviewed",
            _ => "verified",
        });
        let from = now.unix_timestamp();
        let verdict = Verdict {
            caller: caller.clone(),
            from,
            until: expires.unix_timestamp().min(from + KEPT),
            edition: issuers.edition,
            generation,
            keys: issuer.keys.clone(),
        };
        self.verdicts.put(key, verdict);
        Ok(caller)
    }

    async fn service_account(
        &self,
        issuer: &Issuer,
        claims: &Claims,
        uids: bool,
        text: &str,
    ) -> Result<Caller, Refusal> {
        let subject = claims.service_account()?;
        let (account, bound) = (subject.account, subject.bound);
        if uids && bound.account_uid.is_none() {
            let sentence =
                format!("the token does not tell the UID of {account}, as those of {} do", issuer.name);
            return Err(Refusal::new(Reason::TokenMalformed, sentence));
        }
        let reviewed = match &self.review {
            Some(review) if subject.bound_elsewhere.is_some() || (review.wanted)(&account) => {
                let said = review.reviewer.review(text, &issuer.audience).await?;
                agrees(&said.account, &said.bound, &account, &bound)?;
                true
            }
            _ => false,
        };
        if let (Some(what), false) = (subject.bound_elsewhere, reviewed) {
            let sentence = format!(
                "the token is bound to {what}, and only the API server knows whether that still exists"
            );
            return Err(Refusal::new(Reason::TokenRejected, sentence));
        }
        Ok(Caller { account, proof: Proof::Token { reviewed, bound: Arc::new(bound) } })
    }

    fn is_reviewed(&self, account: &ServiceAccount) -> bool {
        self.review.as_ref().is_some_and(|review| (review.wanted)(account))
    }

    fn counted(&self, how: &'static str) {
        self.checks.get_or_create(&Check { how }).inc();
    }
}

impl Authenticator for Arc<Tokens> {
    fn applies(&self, evidence: &Evidence<'_>) -> bool {
        evidence.metadata.as_ref().contains_key(AUTHORIZATION)
    }

    fn judge<'a>(
        &'a self,
        evidence: &'a Evidence<'_>,
        now: OffsetDateTime,
    ) -> Answer<'a, Result<Caller, Refusal>> {
        Box::pin(self.caller(evidence.metadata, now))
    }
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.issuers.load().all.iter().map(|issuer| issuer.name.clone()).collect();
        write!(f, "tokens of {names:?}")
    }
}

/// The one token of the one header (RFC 6750 2.1).
fn bearer(metadata: &MetadataMap) -> Result<&str, Refusal> {
    let refused = |sentence: &str| Err(Refusal::new(Reason::CredentialMalformed, sentence));
    let mut values = metadata.as_ref().get_all(AUTHORIZATION).iter();
    let (value, None) = (values.next(), values.next()) else {
        return refused("the authorization header comes more than once");
    };
    let value = value.map(|value| value.as_bytes()).filter(|value| value.is_ascii()).unwrap_or_default();
    match value.split_at_checked("Bearer ".len()) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty() => {
            // All of it at once is faster than up to the first, which is hardly ever there.
            let is_one = token.iter().fold(true, |one, byte| one & !matches!(byte, b' ' | b','));
            match str::from_utf8(token) {
                Ok(token) if is_one => Ok(token),
                _ => refused("the authorization header has more than one token"),
            }
        }
        _ => refused("the authorization header is not `Bearer` and a token"),
    }
}

fn chosen<'a>(issuers: &'a Issuers, token: &Token<'_>) -> Result<&'a Arc<Issuer>, Refusal> {
    let all = &issuers.all;
    if all.is_empty() && issuers.own.is_some() {
        let sentence = "tokens are not taken here: no issuer of them is set up";
        return Err(Refusal::new(Reason::CredentialUnsupported, sentence));
    }
    let name = token.issuer()?;
    all.iter().find(|issuer| *issuer.name == *name).ok_or_else(|| {
        if issuers.own.is_none() {
            let sentence = "whose tokens are taken is not known yet; try again";
            return Refusal::new(Reason::VerifierUnavailable, sentence);
        }
        let sentence = format!(
            "the token is of the issuer {:?}, whose tokens are not taken here",
            one_line(&shortened(name))
        );
        let known: Vec<_> = all.iter().map(|issuer| &*issuer.name).collect();
        Refusal::new(Reason::TokenIssuer, sentence)
            .with_detail(format!("taken are those of {}", known.join(", ")))
    })
}

/// Believes a token that a key of the issuer has signed; says by which of the issuer's sets.
async fn verified(issuer: &Issuer, token: Token<'_>) -> Result<(Claims, u64), Refusal> {
    let mut known = issuer.keys.known();
    if !known.keys.as_ref().is_some_and(|keys| keys.knows(&token)) {
        issuer.keys.look_again().await;
        known = issuer.keys.known();
    }
    let Some(keys) = &known.keys else {
        let sentence = format!("the keys of the token's issuer {} cannot be had now; try again", issuer.name);
        let refusal = Refusal::new(Reason::VerifierUnavailable, sentence);
        return Err(match &known.fault {
            Some(fault) => refusal.with_detail(fault.clone()),
            None => refusal,
        });
    };
    match keys.verify(token) {
        Ok(claims) => Ok((claims, known.generation)),
        Err(fault) => {
            let refusal = Refusal::from(fault);
            Err(match &known.fault {
                // The key that is missed may be in the set that cannot be read.
                Some(fault) if refusal.reason == Reason::TokenKeyUnknown => {
                    refusal.with_detail(fault.clone())
                }
                _ => refusal,
            })
        }
    }
}

fn mapped(issuer: &Issuer, claims: &Claims, map: &Map) -> Result<Caller, Refusal> {
    let subject = claims.subject()?;
    let account = map(subject).ok_or_else(|| {
        let shown = one_line(&shortened(subject));
        let sentence = format!("no account is set up for the token's subject {shown:?} of {}", issuer.name);
        Refusal::new(Reason::TokenSubject, sentence)
    })?;
    Ok(Caller { account, proof: Proof::Oidc { issuer: issuer.name.clone() } })
}

/// The API server and the token have to tell the same story.
fn agrees(
    said_account: &ServiceAccount,
    said: &Bound,
    account: &ServiceAccount,
    bound: &Bound,
) -> Result<(), Refusal> {
    let differs = |what: &str| {
        let sentence = format!("the API server says that the token is of another {what} than the token does");
        Err(Refusal::new(Reason::TokenRejected, sentence))
    };
    if said_account != account {
        return differs("account");
    }
    match (&said.account_uid, &bound.account_uid) {
        (Some(one), Some(other)) if one != other => return differs("account"),
        _ => {}
    }
    match (&said.pod, &bound.pod) {
        (Some(one), Some(other)) if one != other => differs("pod"),
        _ => Ok(()),
    }
}

/// What was found out about tokens, by their digest. Two maps a shard, so that the older half goes at once and nothing
/// has to be ordered; a map that was never filled takes no memory.
struct Verdicts {
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Default)]
struct Shard {
    young: HashMap<[u8; 32], Verdict>,
    old: HashMap<[u8; 32], Verdict>,
}

struct Verdict {
    caller: Caller,
    from: i64,
    until: i64,
    edition: u64,
    generation: u64,
    keys: Arc<LiveKeys>,
}

impl Default for Verdicts {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()) }
    }
}

impl Verdicts {
    fn find(&self, key: &[u8; 32], edition: u64, now: i64) -> Option<Caller> {
        let shard = self.shard(key);
        let verdict = shard.young.get(key).or_else(|| shard.old.get(key))?;
        (verdict.edition == edition && verdict.holds(now)).then(|| verdict.caller.clone())
    }

    fn put(&self, key: [u8; 32], verdict: Verdict) {
        let mut shard = self.shard(&key);
        if shard.young.len() >= VERDICTS / SHARDS / 2 {
            shard.old = std::mem::take(&mut shard.young);
        }
        shard.old.remove(&key);
        shard.young.insert(key, verdict);
    }

    /// Forgets what no longer holds, and gives the memory back.
    fn sweep(&self, now: i64) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            let Shard { young, old } = &mut *shard;
            for map in [young, old] {
                map.retain(|_, verdict| verdict.holds(now));
                if map.len() < map.capacity() / 4 {
                    map.shrink_to_fit();
                }
            }
        }
    }

    fn shard(&self, key: &[u8; 32]) -> std::sync::MutexGuard<'_, Shard> {
        self.shards[usize::from(key[0]) % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Verdict {
    fn holds(&self, now: i64) -> bool {
        (self.from - BACK..self.until).contains(&now) && self.generation == self.keys.generation()
    }
}

/// What there is to say of each issuer's keys.
#[derive(Debug)]
struct OfKeys(Arc<Tokens>);

impl Collector for OfKeys {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let issuers = self.0.issuers.load();
        if issuers.all.is_empty() {
            return Ok(());
        }
        let now = clock::now();
        let kind = ConstCounter::new(0u64).metric_type();
        let help = "Times that a token issuer's keys could not be read";
        let mut failures = encoder.encode_descriptor("mica_token_key_failures", help, None, kind)?;
        for issuer in &issuers.all {
            let labels = [("issuer", &*issuer.name)];
            ConstCounter::new(issuer.keys.failures()).encode(failures.encode_family(&labels)?)?;
        }
        let kind = ConstGauge::new(0i64).metric_type();
        let help = "Seconds since a token issuer's keys were last read";
        let mut ages = encoder.encode_descriptor("mica_token_key_age_seconds", help, None, kind)?;
        for issuer in &issuers.all {
            let labels = [("issuer", &*issuer.name)];
            if let Some(seen_at) = issuer.keys.known().seen_at {
                ConstGauge::new((now - seen_at).whole_seconds().max(0))
                    .encode(ages.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use time::macros::datetime;

    use super::*;
    use crate::auth::keys::FROM_SERVER;
    use crate::auth::{KeySource, Peer, Reviewed, oidc};
    use crate::core::caller::Object;
    use crate::core::key::{IssuerKey as _, SigningKey};
    use crate::core::policy::{Limits, Policy};
    use crate::core::token::trial;
    use crate::sys::keys;

    const NOW: OffsetDateTime = datetime!(2026-11-23 09:00:00 UTC);

    /// An issuer whose set can be changed.
    #[derive(Default)]
    struct Source {
        set: Mutex<String>,
        looks: AtomicUsize,
    }

    impl KeySource for Source {
        fn fetch(&self) -> Answer<'_, Result<Vec<u8>, String>> {
            self.looks.fetch_add(1, Ordering::Relaxed);
            let set = self.set.lock().unwrap().clone();
            let found = if set.is_empty() { Err("nobody is there".to_owned()) } else { Ok(set.into_bytes()) };
            Box::pin(std::future::ready(found))
        }

        fn place(&self) -> String {
            "a test".to_owned()
        }
    }

    fn key() -> SigningKey {
        keys::generate(trial::KEY_KIND).unwrap().signing().unwrap()
    }

    fn account(name: &str) -> ServiceAccount {
        ServiceAccount::new("shop", name).unwrap()
    }

    fn made(key: &SigningKey, name: &str, id: u8) -> String {
        trial::token(key, &account(name), "istio-ca", NOW, "1h".parse().unwrap(), [id; 16]).unwrap()
    }

    async fn issuer(source: &Arc<Source>, uids: bool) -> Arc<Issuer> {
        let keys = LiveKeys::new(source.clone(), FROM_SERVER);
        let _ = keys.look().await;
        Arc::new(Issuer {
            name: trial::ISSUER.into(),
            audience: "istio-ca".to_owned(),
            keys: Arc::new(keys),
            subjects: Subjects::ServiceAccounts { uids },
        })
    }

    async fn with(review: Option<Review>, key: &SigningKey) -> (Arc<Tokens>, Arc<Source>) {
        let source = Arc::new(Source::default());
        *source.set.lock().unwrap() = trial::jwks(key.public());
        let tokens = Tokens::new(review);
        tokens.take(vec![issuer(&source, false).await]);
        (tokens, source)
    }

    async fn judged(tokens: &Arc<Tokens>, token: &str, now: OffsetDateTime) -> Result<Caller, Reason> {
        let mut metadata = MetadataMap::new();
        metadata.insert("authorization", format!("Bearer {token}").parse().unwrap());
        let peer = Peer::new([127, 0, 0, 1].into(), Vec::new());
        let evidence = Evidence { peer: &peer, metadata: &metadata };
        assert!(tokens.applies(&evidence));
        tokens.judge(&evidence, now).await.map_err(|refusal| refusal.reason)
    }

    fn checks(tokens: &Tokens, how: &'static str) -> u64 {
        tokens.checks.get_or_create(&Check { how }).get()
    }

    #[tokio::test]
    async fn a_verdict_is_remembered_for_five_minutes_and_never_past_the_token() {
        let key = key();
        let (tokens, _) = with(None, &key).await;
        let token = made(&key, "web", 1);
        let minutes = time::Duration::minutes;
        for (at, verified) in [(0, 1), (4, 1), (5, 2), (9, 2), (58, 3), (59, 3)] {
            let caller = judged(&tokens, &token, NOW + minutes(at)).await.unwrap();
            assert_eq!(caller.account, account("web"));
            assert_eq!(checks(&tokens, "verified"), verified, "{at} minutes later");
        }
        assert_eq!(judged(&tokens, &token, NOW + minutes(60)).await, Err(Reason::TokenExpired));
        // A clock that was set back says nothing about when.
        judged(&tokens, &token, NOW + minutes(30)).await.unwrap();
        assert_eq!(checks(&tokens, "verified"), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn a_verdict_ends_with_its_key_and_with_its_issuer() {
        let (one, two) = (key(), key());
        let (tokens, source) = with(None, &one).await;
        let token = made(&one, "web", 1);
        judged(&tokens, &token, NOW).await.unwrap();
        *source.set.lock().unwrap() = trial::jwks(two.public());
        let keys = tokens.issuers.load().all[0].keys.clone();
        keys.look().await.unwrap();
        assert_eq!(judged(&tokens, &token, NOW).await, Err(Reason::TokenKeyUnknown));

        let token = made(&two, "web", 1);
        judged(&tokens, &token, NOW).await.unwrap();
        // The same set once more is no other.
        keys.look().await.unwrap();
        judged(&tokens, &token, NOW).await.unwrap();
        assert_eq!(checks(&tokens, "remembered"), 1);
        tokens.take(Vec::new());
        assert_eq!(judged(&tokens, &token, NOW).await, Err(Reason::CredentialUnsupported));
        tokens.take(vec![issuer(&source, true).await]);
        assert_eq!(judged(&tokens, &token, NOW).await, Err(Reason::TokenMalformed), "it tells no UID");
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_looked_for_once_for_all_who_wait_and_not_for_ever() {
        let (one, two) = (key(), key());
        let (tokens, source) = with(None, &one).await;
        *source.set.lock().unwrap() = trial::jwks(two.public());
        let keeper = tokens.clone();
        let mut keepers = JoinSet::new();
        keepers.spawn(async move { keeper.keep().await });
        let token = made(&two, "web", 1);
        // Just looked.
        assert_eq!(judged(&tokens, &token, NOW).await, Err(Reason::TokenKeyUnknown));
        tokio::time::sleep(Duration::from_secs(11)).await;
        let mut asked = JoinSet::new();
        for _ in 0..50 {
            let (tokens, token) = (tokens.clone(), token.clone());
            asked.spawn(async move { judged(&tokens, &token, NOW).await.is_ok() });
        }
        while let Some(answer) = asked.join_next().await {
            assert!(answer.unwrap());
        }
        assert_eq!(source.looks.load(Ordering::Relaxed), 2);

        // Nobody there: the last set stays, and a first one is missed.
        source.set.lock().unwrap().clear();
        tokio::time::sleep(Duration::from_secs(301)).await;
        assert_eq!(tokens.issuers.load().all[0].keys.failures(), 1);
        judged(&tokens, &token, NOW).await.unwrap();
        tokens.take(vec![issuer(&source, false).await]);
        assert_eq!(judged(&tokens, &token, NOW).await, Err(Reason::VerifierUnavailable));
        *source.set.lock().unwrap() = trial::jwks(two.public());
        tokio::time::sleep(Duration::from_secs(11)).await;
        judged(&tokens, &token, NOW).await.unwrap();
    }

    /// An API server that says what it is told to.
    #[derive(Default)]
    struct Server {
        asked: AtomicUsize,
        rejects: AtomicBool,
        other: AtomicBool,
    }

    impl Reviewer for Server {
        fn review<'a>(&'a self, _: &'a str, audience: &'a str) -> Answer<'a, Result<Reviewed, Refusal>> {
            assert_eq!(audience, "istio-ca");
            self.asked.fetch_add(1, Ordering::Relaxed);
            let name = if self.other.load(Ordering::Relaxed) { "other" } else { "web" };
            let said = match self.rejects.load(Ordering::Relaxed) {
                true => Err(Refusal::new(Reason::TokenRejected, "no")),
                false => Ok(Reviewed { account: account(name), bound: Bound::default() }),
            };
            Box::pin(std::future::ready(said))
        }
    }

    #[tokio::test]
    async fn the_api_server_is_asked_where_that_is_wanted_and_has_the_last_word() {
        let key = key();
        let server = Arc::new(Server::default());
        let wanted = Arc::new(AtomicBool::new(false));
        let asks = wanted.clone();
        let wanted_now = Box::new(move |_: &ServiceAccount| asks.load(Ordering::Relaxed));
        let review = Review { reviewer: server.clone(), wanted: wanted_now };
        let (tokens, _) = with(Some(review), &key).await;
        let token = made(&key, "web", 1);
        let reviewed = |caller: Caller| matches!(caller.proof, Proof::Token { reviewed: true, .. });
        assert!(!reviewed(judged(&tokens, &token, NOW).await.unwrap()));
        // A policy that comes to want it finds that the verdict is not enough.
        wanted.store(true, Ordering::Relaxed);
        assert!(reviewed(judged(&tokens, &token, NOW).await.unwrap()));
        assert!(reviewed(judged(&tokens, &token, NOW).await.unwrap()));
        assert_eq!(server.asked.load(Ordering::Relaxed), 1, "its word is remembered");
        server.rejects.store(true, Ordering::Relaxed);
        for _ in 0..2 {
            assert_eq!(judged(&tokens, &made(&key, "web", 2), NOW).await, Err(Reason::TokenRejected));
        }
        assert_eq!(server.asked.load(Ordering::Relaxed), 3, "a no is not remembered");
        server.rejects.store(false, Ordering::Relaxed);
        server.other.store(true, Ordering::Relaxed);
        assert_eq!(judged(&tokens, &made(&key, "web", 3), NOW).await, Err(Reason::TokenRejected));
        // Bad tokens never get that far.
        let tampered = token.replace('.', "x.");
        assert!(judged(&tokens, &tampered, NOW).await.is_err());
        assert_eq!(server.asked.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn the_api_server_and_the_token_tell_the_same_story() {
        let pod = |uid: &str| Some(Object { name: "p".to_owned(), uid: uid.to_owned() });
        let bound = Bound { account_uid: Some("u".to_owned()), pod: pod("1"), node: None };
        let (web, db) = (account("web"), account("db"));
        assert!(agrees(&web, &bound, &web, &bound).is_ok());
        assert!(agrees(&web, &Bound::default(), &web, &bound).is_ok());
        for (account, said) in [
            (&db, bound.clone()),
            (&web, Bound { account_uid: Some("v".to_owned()), ..bound.clone() }),
            (&web, Bound { pod: pod("2"), ..bound.clone() }),
        ] {
            assert!(agrees(account, &said, &web, &bound).is_err(), "{said:?}");
        }
    }

    #[tokio::test]
    async fn the_subjects_of_other_issuers_stand_for_accounts_by_exact_match() {
        let key = key();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("jwks.json");
        crate::sys::files::write_public(&file, trial::jwks(key.public()).as_bytes(), false).unwrap();
        let policy = format!(
            "oidc:\n- issuer: {}\n  jwks: {}\n  audience: istio-ca\n  accounts:\n  - {{subject: \"system:serviceaccount:shop:web\", account: prod/web}}\n",
            trial::ISSUER,
            file.display()
        );
        let [lifetime, longest] = ["24h", "90d"].map(|text| text.parse().unwrap());
        let limits = Limits { lifetime, longest, own_names: Vec::new() };
        let policy = Policy::parse(policy.as_bytes(), &limits).unwrap();
        let issuers = oidc::issuers(policy.oidc(), &[]);
        issuers[0].keys.look().await.unwrap();
        let tokens = Tokens::new(None);
        assert_eq!(judged(&tokens, &made(&key, "web", 1), NOW).await, Err(Reason::VerifierUnavailable));
        tokens.take_mapped(issuers.clone());
        for _ in 0..2 {
            let caller = judged(&tokens, &made(&key, "web", 1), NOW).await.unwrap();
            assert_eq!(caller.account, ServiceAccount::new("prod", "web").unwrap());
            assert_eq!(caller.proof, Proof::Oidc { issuer: trial::ISSUER.into() });
        }
        for name in ["web2", "we", "w.eb"] {
            assert_eq!(judged(&tokens, &made(&key, name, 1), NOW).await, Err(Reason::TokenSubject), "{name}");
        }
        assert_eq!(tokens.mapped().len(), 1);
        tokens.take(Vec::new());
        judged(&tokens, &made(&key, "web", 1), NOW).await.unwrap();
        tokens.take_mapped(Vec::new());
        assert_eq!(judged(&tokens, &made(&key, "web", 1), NOW).await, Err(Reason::CredentialUnsupported));
        // The keys are the same ones after a change of the policy, and are not of another source.
        let again = oidc::issuers(policy.oidc(), &issuers);
        assert!(Arc::ptr_eq(&again[0].keys, &issuers[0].keys));
        assert!(!Arc::ptr_eq(&oidc::issuers(policy.oidc(), &[])[0].keys, &issuers[0].keys));
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded_and_goes_when_it_is_over() {
        let key = key();
        let (tokens, _) = with(None, &key).await;
        let keys = tokens.issuers.load().all[0].keys.clone();
        let caller = judged(&tokens, &made(&key, "web", 1), NOW).await.unwrap();
        let now = NOW.unix_timestamp();
        let verdict = || Verdict {
            caller: caller.clone(),
            from: now,
            until: now + KEPT,
            edition: 1,
            generation: keys.generation(),
            keys: keys.clone(),
        };
        let name = |number: u32| {
            let mut name = [0; 32];
            name.copy_from_slice(digest(&SHA256, &number.to_be_bytes()).as_ref());
            name
        };
        let verdicts = Verdicts::default();
        let held = || -> (usize, usize) {
            let of = |shard: &Mutex<Shard>| {
                let shard = shard.lock().unwrap();
                (shard.young.len() + shard.old.len(), shard.young.capacity() + shard.old.capacity())
            };
            verdicts.shards.iter().map(of).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
        };
        assert_eq!(held(), (0, 0));
        for number in 0..200_000 {
            verdicts.put(name(number), verdict());
        }
        assert!((VERDICTS / 4..=VERDICTS).contains(&held().0), "{held:?}", held = held());
        assert!(verdicts.find(&name(199_999), 1, now).is_some());
        assert!(verdicts.find(&name(0), 1, now).is_none());
        assert!(verdicts.find(&name(199_999), 2, now).is_none());
        verdicts.sweep(now + KEPT);
        assert_eq!(held(), (0, 0));
    }
}
