//! The plain case: an agent with one identity, for the user that it runs as.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::{Attestor, Entitled, Refused};
use crate::core::spiffe::SpiffeId;
use crate::sys::dir::our_user;
use crate::sys::peer::Process;

/// An identity that nobody knows yet is waited for so long.
const KNOWN: Duration = Duration::from_secs(5);

/// Every process of the agent's own user has the agent's own identity.
pub struct OwnUser {
    user: u32,
    identity: watch::Receiver<Option<SpiffeId>>,
    changes: watch::Sender<()>,
}

impl OwnUser {
    /// Of the identity that the agent has, as soon as that is known.
    pub fn new(identity: watch::Receiver<Option<SpiffeId>>) -> Self {
        Self { user: our_user(), identity, changes: watch::Sender::new(()) }
    }
}

#[tonic::async_trait]
impl Attestor for OwnUser {
    async fn attest(&self, caller: &Process) -> Result<Vec<Entitled>, Refused> {
        if caller.uid != self.user {
            return Err(Refused::Unknown(format!(
                "it runs as user {}, and the identity is for user {}, as which the agent runs; give others theirs with --workloads",
                caller.uid, self.user
            )));
        }
        if !caller.is_alive() {
            return Err(Refused::Unknown("it has ended".to_owned()));
        }
        let mut identity = self.identity.clone();
        match timeout(KNOWN, identity.wait_for(Option::is_some)).await {
            Ok(Ok(id)) => Ok(id.iter().map(|id| Entitled { id: id.clone(), hint: None }).collect()),
            _ => Err(Refused::Unavailable("the authority has not yet said who the agent is".to_owned())),
        }
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;
    use crate::sys::peer::Moment;

    #[tokio::test(start_paused = true)]
    async fn the_identity_is_for_the_same_user() {
        let (one, _other) = UnixStream::pair().unwrap();
        let us = Process::at_other_end(&one, Moment::now()).unwrap();
        let (known, identity) = watch::channel(None);
        let attestor = OwnUser::new(identity);
        assert!(matches!(attestor.attest(&us).await, Err(Refused::Unavailable(_))));
        let id = SpiffeId::parse("spiffe://example.org/ns/a/sa/b").unwrap();
        known.send_replace(Some(id.clone()));
        assert_eq!(attestor.attest(&us).await.unwrap(), [Entitled { id, hint: None }]);
        let other = Process { uid: us.uid + 1, ..us };
        assert!(matches!(attestor.attest(&other).await, Err(Refused::Unknown(_))));
    }
}
