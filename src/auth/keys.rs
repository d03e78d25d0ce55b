//! The keys of a token issuer, kept up to date: looked for now and then, and when a token names one that is not known.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use serde::Deserialize;
use time::OffsetDateTime;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::{Answer, KeySource};
use crate::core::inspect::one_line;
use crate::core::spiffe::shortened;
use crate::core::token::jwks::{self, KeySet};
use crate::core::url::{self, Url};
use crate::sys::{clock, fetch, files};

/// How often a server is asked.
pub const FROM_SERVER: Duration = Duration::from_secs(300);
/// How often a file is read.
const FROM_FILE: Duration = Duration::from_secs(5);
/// Nobody makes Mica ask more often than this, whatever tokens they send; and a failure is tried again after it.
const AGAIN: Duration = Duration::from_secs(10);
/// A request waits this long for keys that are being fetched: two documents, each within its own time.
const PATIENCE: Duration = Duration::from_secs(11);

/// Where an issuer's keys come from: a file, a server, or where the issuer itself says. Gives the keys, unread, and whether
/// they are in a file.
pub fn of(issuer: &str, place: Option<&str>) -> Result<(LiveKeys, bool), url::Error> {
    let (source, is_file): (Arc<dyn KeySource>, _) = match place {
        None => (Arc::new(Discovered(issuer.parse()?)), false),
        Some(url) if url.contains("://") => (Arc::new(KeyServer(url.parse()?)), false),
        Some(path) => (Arc::new(KeyFile(path.into())), true),
    };
    Ok((LiveKeys::new(source, if is_file { FROM_FILE } else { FROM_SERVER }), is_file))
}

/// The living keys of one issuer. Keys that an issuer takes away are gone with the next look; a look that fails changes
/// nothing and is told.
pub struct LiveKeys {
    source: Arc<dyn KeySource>,
    every: Duration,
    known: ArcSwap<Known>,
    looks: Mutex<Looks>,
    wanted: Notify,
    looked: watch::Sender<()>,
    failures: AtomicU64,
}

/// What is known of an issuer's keys.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The last good set.
    pub keys: Option<Arc<KeySet>>,
    /// Another number for each other set, of all issuers; 0 without one.
    pub generation: u64,
    /// When they were last seen at their source.
    pub seen_at: Option<OffsetDateTime>,
    /// Why the last look failed, if it did.
    pub fault: Option<String>,
}

#[derive(Debug, Default)]
struct Looks {
    /// When the last one began, or ended if it has.
    last: Option<Instant>,
    under_way: bool,
}

impl LiveKeys {
    /// Keys that nobody has looked for yet.
    pub fn new(source: Arc<dyn KeySource>, every: Duration) -> Self {
        Self {
            source,
            every,
            known: ArcSwap::default(),
            looks: Mutex::default(),
            wanted: Notify::new(),
            looked: watch::Sender::new(()),
            failures: AtomicU64::new(0),
        }
    }

    /// What is known now.
    pub fn known(&self) -> Arc<Known> {
        self.known.load_full()
    }

    /// Which set is known now.
    pub fn generation(&self) -> u64 {
        self.known.load().generation
    }

    /// How many looks have failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Where they come from, for messages.
    pub fn place(&self) -> String {
        self.source.place()
    }

    /// Looks now. The error is also kept, logged and counted.
    pub async fn look(&self) -> Result<(), String> {
        self.began();
        let found = match self.source.fetch().await {
            Ok(text) => KeySet::from_json(&text).map_err(|fault| format!("{}: {fault}", self.place())),
            Err(fault) => Err(fault),
        };
        let before = self.known();
        let now = clock::now();
        let known = match &found {
            Ok(keys) if before.keys.as_deref() == Some(keys) => {
                Known { seen_at: Some(now), fault: None, ..(*before).clone() }
            }
            Ok(keys) => {
                let (place, count) = (self.place(), keys.count());
                tracing::info!(%place, count, "the token issuer's keys were read");
                for key in keys.passed_over() {
                    tracing::warn!(%place, key, "a key of the token issuer is passed over");
                }
                Known {
                    keys: Some(Arc::new(keys.clone())),
                    generation: next_generation(),
                    seen_at: Some(now),
                    fault: None,
                }
            }
            Err(fault) => Known { fault: Some(fault.clone()), ..(*before).clone() },
        };
        if let Err(fault) = &found {
            self.failures.fetch_add(1, Ordering::Relaxed);
            if before.fault.as_ref() != Some(fault) {
                match &before.seen_at {
                    Some(_) => {
                        tracing::warn!(fault, "the token issuer's keys cannot be read, the last ones stay")
                    }
                    None => tracing::warn!(
                        fault,
                        "the token issuer's keys cannot be read, its tokens are refused until they can"
                    ),
                }
            }
        } else if before.fault.is_some() && before.generation == known.generation {
            tracing::info!(place = self.place(), "the token issuer's keys can be read again");
        }
        self.known.store(Arc::new(known));
        self.ended();
        found.map(drop)
    }

    /// Looks for ever. Whoever waits for a look is served by this task alone, so that a caller who hangs up ends none.
    pub async fn keep(&self) {
        // A keeper before this one may have ended in the middle of a look.
        self.looks().under_way = false;
        loop {
            let known = self.known();
            let pause = match (&known.seen_at, &known.fault) {
                (None, None) => Duration::ZERO,
                (_, Some(_)) => self.every.min(AGAIN),
                (Some(_), None) => self.every,
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = self.wanted.notified() => {
                    // Asked for while the last look was about to begin.
                    if self.looks().last.is_some_and(|last| last.elapsed() < AGAIN) {
                        continue;
                    }
                }
            }
            // Told already.
            let _ = self.look().await;
        }
    }

    /// Has the keys looked for once more, unless that was done just now.
    pub async fn look_again(&self) {
        let mut looked = self.looked.subscribe();
        {
            let looks = self.looks();
            if !looks.under_way {
                if looks.last.is_some_and(|last| last.elapsed() < AGAIN) {
                    return;
                }
                self.wanted.notify_one();
            }
        }
        // Whoever waits too long finds what was known before.
        let _ = timeout(PATIENCE, looked.changed()).await;
    }

    fn began(&self) {
        *self.looks() = Looks { last: Some(Instant::now()), under_way: true };
    }

    fn ended(&self) {
        *self.looks() = Looks { last: Some(Instant::now()), under_way: false };
        self.looked.send_replace(());
    }

    fn looks(&self) -> std::sync::MutexGuard<'_, Looks> {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for LiveKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "keys from {}", self.place())
    }
}

/// One row for all issuers, so that what was found with one set is never taken for what another says.
fn next_generation() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// A JWK Set in a file.
#[derive(Debug)]
pub struct KeyFile(pub PathBuf);

impl KeySource for KeyFile {
    fn fetch(&self) -> Answer<'_, Result<Vec<u8>, String>> {
        let path = self.0.clone();
        Box::pin(async move {
            // A file system may hang.
            tokio::task::spawn_blocking(move || files::read(&path, jwks::MAX as u64))
                .await
                .map_err(|e| e.to_string())?
                .map(|text| text.to_vec())
                .map_err(|e| e.to_string())
        })
    }

    fn place(&self) -> String {
        self.0.display().to_string()
    }
}

/// A JWK Set on a server.
#[derive(Debug)]
pub struct KeyServer(pub Url);

impl KeySource for KeyServer {
    fn fetch(&self) -> Answer<'_, Result<Vec<u8>, String>> {
        Box::pin(async { fetch::get(&self.0, jwks::MAX).await.map_err(|e| e.to_string()) })
    }

    fn place(&self) -> String {
        self.0.to_string()
    }
}

/// A JWK Set where the issuer's own document says that it is (OpenID Connect Discovery 1.0).
#[derive(Debug)]
pub struct Discovered(pub Url);

impl Discovered {
    async fn keys(&self) -> Result<Vec<u8>, String> {
        #[derive(Deserialize)]
        struct Document {
            issuer: String,
            jwks_uri: String,
        }
        let issuer = &self.0;
        let at = issuer.discovery().map_err(|e| e.to_string())?;
        let text = fetch::get(&at, jwks::MAX).await.map_err(|e| e.to_string())?;
        let document: Document = serde_json::from_slice(&text)
            .map_err(|e| format!("{at} does not say what the issuer is and where its keys are: {e}"))?;
        // 4.3 of the specification: else anyone's document could stand for anyone's.
        if document.issuer != issuer.as_str() {
            let other = one_line(&shortened(&document.issuer));
            return Err(format!("{at} is of the issuer {other:?}, not {:?}", issuer.as_str()));
        }
        let keys: Url = document.jwks_uri.parse().map_err(|e| format!("the jwks_uri of {at}: {e}"))?;
        // A server elsewhere does not get to choose among the servers of this machine.
        if keys.is_local() && !issuer.is_local() {
            return Err(format!("the jwks_uri of {at} is {keys}, on this machine, and the issuer is not"));
        }
        fetch::get(&keys, jwks::MAX).await.map_err(|e| e.to_string())
    }
}

impl KeySource for Discovered {
    fn fetch(&self) -> Answer<'_, Result<Vec<u8>, String>> {
        Box::pin(self.keys())
    }

    fn place(&self) -> String {
        self.0.discovery().map_or_else(|_| self.0.to_string(), |at| at.to_string())
    }
}

/// A JWK Set that never changes, such as that of an issuer of Mica's own.
#[derive(Debug)]
pub struct FixedKeys {
    /// The set.
    pub set: Vec<u8>,
    /// Where it came from, for messages.
    pub place: String,
}

impl KeySource for FixedKeys {
    fn fetch(&self) -> Answer<'_, Result<Vec<u8>, String>> {
        Box::pin(std::future::ready(Ok(self.set.clone())))
    }

    fn place(&self) -> String {
        self.place.clone()
    }
}
