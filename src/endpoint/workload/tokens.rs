//! JWT-SVIDs, each for as long as it is good for something: asked for anew when half of its time is over.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use time::OffsetDateTime;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::agent::{self, Agent};
use crate::client;
use crate::core::rotation::Due;
use crate::core::spiffe::SpiffeId;
use crate::sys::clock;

/// So many tokens are kept; then those that end first go.
const MOST: usize = 2_048;
/// So many are asked for at once.
const AT_ONCE: usize = 8;
/// The authority answers within this time, or one that is still good is given.
const ANSWER: Duration = Duration::from_secs(10);

/// A clock that was set back by more is noticed: peers that go by it would take no token of before.
const SET_BACK: Duration = Duration::from_secs(10);

type Key = (SpiffeId, Vec<String>);
/// Who asks for the same while it is asked for waits for the answer.
type Slot = Arc<tokio::sync::Mutex<Option<Token>>>;

/// The tokens that were asked for.
pub(super) struct Tokens {
    kept: Mutex<BTreeMap<Key, (OffsetDateTime, Slot)>>,
    asking: Semaphore,
}

#[derive(Clone)]
struct Token {
    svid: String,
    issued: OffsetDateTime,
    renewal: Due,
    end: Due,
    expires: OffsetDateTime,
}

impl Token {
    /// Whether it is of a time that was, and more of it is left than is over.
    fn is_fresh(&self) -> bool {
        let now = clock::both();
        self.issued <= now.wall + SET_BACK && !self.renewal.left(now).is_zero()
    }
}

impl Default for Tokens {
    fn default() -> Self {
        Self { kept: Mutex::default(), asking: Semaphore::new(AT_ONCE) }
    }
}

impl Tokens {
    /// A token with at least half of its time before it, if the authority can be asked.
    pub(super) async fn get(
        &self,
        agent: &Agent,
        id: &SpiffeId,
        audience: &[String],
    ) -> Result<String, Status> {
        let mut audience = audience.to_vec();
        audience.sort();
        audience.dedup();
        let key = (id.clone(), audience);
        let slot = self.slot(&key);
        let mut held = slot.lock().await;
        if let Some(token) = held.as_ref().filter(|token| token.is_fresh()) {
            return Ok(token.svid.clone());
        }
        match self.ask(agent, &key).await {
            Ok(token) => {
                if let Some((ends, _)) = self.kept().get_mut(&key) {
                    *ends = token.expires;
                }
                Ok(held.insert(token).svid.clone())
            }
            Err(status) => {
                if held.is_none() {
                    self.kept().remove(&key);
                }
                let good = held.as_ref().filter(|token| !token.end.left(clock::both()).is_zero());
                // A denial is the authority's last word; a silence is not.
                match good.filter(|_| status.code() == Code::Unavailable) {
                    Some(token) => Ok(token.svid.clone()),
                    None => Err(status),
                }
            }
        }
    }

    async fn ask(&self, agent: &Agent, (id, audience): &Key) -> Result<Token, Status> {
        let unavailable = || Status::unavailable("the authority has not signed the token; try again");
        let _turn = self.asking.acquire().await.map_err(|_| unavailable())?;
        let asked = clock::both();
        let answer = match timeout(ANSWER, agent.jwt(id, audience)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(fault)) => {
                tracing::warn!(identity = %id, %fault, "JWT-SVID not obtained");
                return Err(told(&fault).unwrap_or_else(unavailable));
            }
            Err(_) => {
                tracing::warn!(identity = %id, fault = "no answer in time", "JWT-SVID not obtained");
                return Err(unavailable());
            }
        };
        let ends = answer.expires_at.and_then(|at| OffsetDateTime::from_unix_timestamp(at.seconds).ok());
        let expires = ends.filter(|ends| *ends > asked.wall && answer.spiffe_id == id.as_str());
        let Some(expires) = expires.filter(|_| !answer.svid.is_empty()) else {
            let fault = "the answer is for somebody else, or of no use";
            tracing::warn!(identity = %id, whose = answer.spiffe_id, fault, "JWT-SVID not obtained");
            return Err(unavailable());
        };
        let half = asked.wall + (expires - asked.wall) / 2;
        let (renewal, end) = (Due::at(half, asked), Due::at(expires, asked));
        Ok(Token { svid: answer.svid, issued: asked.wall, renewal, end, expires })
    }

    fn slot(&self, key: &Key) -> Slot {
        let mut kept = self.kept();
        if let Some((_, slot)) = kept.get(key) {
            return slot.clone();
        }
        if kept.len() >= MOST {
            let now = clock::now();
            kept.retain(|_, (ends, _)| *ends > now);
        }
        if kept.len() >= MOST
            && let Some(first) = kept.iter().min_by_key(|(_, (ends, _))| *ends).map(|(key, _)| key.clone())
        {
            kept.remove(&first);
        }
        let slot = Slot::default();
        kept.insert(key.clone(), (clock::now() + ANSWER * 2, slot.clone()));
        slot
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<Key, (OffsetDateTime, Slot)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a caller hears of a denial: what is its own to change.
fn told(fault: &agent::Error) -> Option<Status> {
    let agent::Error::Client(client::Error::Denied { denial, .. }) = fault else { return None };
    match denial.code {
        Code::InvalidArgument => Some(Status::invalid_argument(denial.sentence.clone())),
        Code::PermissionDenied => Some(Status::permission_denied("the authority issues no JWT-SVID for it")),
        Code::Unimplemented => Some(Status::unimplemented("the authority has no JWT-SVIDs")),
        _ => None,
    }
}
