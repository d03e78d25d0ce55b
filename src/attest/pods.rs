//! Once for a node: a process has the identity of the service account of the pod that it is in.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::{Attestor, Entitled, Refused};
use crate::core::cgroup;
use crate::core::spiffe::{ServiceAccount, SpiffeId};
use crate::sys::peer::{self, Process};

/// An agent that does not know its own trust domain yet is waited for so long.
const KNOWN: Duration = Duration::from_secs(5);

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its service account.
    pub account: ServiceAccount,
    /// Neither failed nor succeeded, and not on its way out.
    pub runs: bool,
}

/// Knows the pods of this node.
#[tonic::async_trait]
pub trait Pods: Send + Sync + 'static {
    /// The pod with a UID, if it is one of this node's; an error says why that cannot be known now.
    async fn pod(&self, uid: &str) -> Result<Option<Pod>, String>;

    /// Tells when some pod has come, changed or gone.
    fn changes(&self) -> watch::Receiver<()>;
}

/// Processes have the identity of their pods.
pub struct OfPods {
    pods: Arc<dyn Pods>,
    /// The agent's own, whose trust domain is that of all.
    own: watch::Receiver<Option<SpiffeId>>,
    /// Where the kubelet has its control groups, which an agent in a pod knows by its own.
    above: String,
}

impl OfPods {
    /// By the word of whoever knows the pods.
    pub fn new(pods: Arc<dyn Pods>, own: watch::Receiver<Option<SpiffeId>>) -> Self {
        let above = cgroup::above(&peer::own_control_groups()).to_owned();
        Self { pods, own, above }
    }

    async fn account(&self, uid: &str) -> Result<ServiceAccount, Refused> {
        match self.pods.pod(uid).await {
            Ok(Some(Pod { account, runs: true })) => Ok(account),
            Ok(Some(_)) => Err(Refused::Unknown(format!("its pod {uid} has ended, or is about to"))),
            Ok(None) => Err(Refused::Unknown(format!("its pod {uid} is not known on this node"))),
            Err(fault) => Err(Refused::Unavailable(format!("its pod {uid} cannot be looked up: {fault}"))),
        }
    }
}

#[tonic::async_trait]
impl Attestor for OfPods {
    async fn attest(&self, caller: &Process) -> Result<Vec<Entitled>, Refused> {
        let groups = caller.control_groups().map_err(|fault| match fault {
            peer::Error::Io { .. } => Refused::Unavailable(fault.to_string()),
            other => Refused::Unknown(other.to_string()),
        })?;
        let container = cgroup::container(&groups, &self.above)
            .ok_or_else(|| Refused::Unknown("it is in no pod, by its control groups".to_owned()))?;
        let account = self.account(&container.pod).await?;
        let mut own = self.own.clone();
        let own = match timeout(KNOWN, own.wait_for(Option::is_some)).await {
            Ok(Ok(own)) => own.clone(),
            _ => None,
        };
        let unknown = || Refused::Unavailable("the authority has not yet said who the agent is".to_owned());
        let own = own.ok_or_else(unknown)?;
        if !caller.is_alive() {
            return Err(Refused::Unknown("it has ended".to_owned()));
        }
        Ok(vec![Entitled { id: account.spiffe_id(own.trust_domain()), hint: None }])
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.pods.changes()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tokio::net::UnixStream;

    use super::*;
    use crate::sys::peer::Moment;

    struct Known(BTreeMap<&'static str, Pod>, watch::Sender<()>);

    #[tonic::async_trait]
    impl Pods for Known {
        async fn pod(&self, uid: &str) -> Result<Option<Pod>, String> {
            match uid {
                "away" => Err("no answer".to_owned()),
                uid => Ok(self.0.get(uid).cloned()),
            }
        }

        fn changes(&self) -> watch::Receiver<()> {
            self.1.subscribe()
        }
    }

    #[tokio::test]
    async fn a_pod_that_runs_has_its_account_and_a_process_without_one_has_nothing() {
        let account = ServiceAccount::new("shop", "web").unwrap();
        let pod = |runs| Pod { account: account.clone(), runs };
        let known =
            Known(BTreeMap::from([("runs", pod(true)), ("ended", pod(false))]), watch::Sender::new(()));
        let (_own, own) = watch::channel(Some(SpiffeId::parse("spiffe://example.org/agent").unwrap()));
        let attestor = OfPods::new(Arc::new(known), own);
        assert_eq!(attestor.account("runs").await, Ok(account.clone()));
        for uid in ["ended", "unknown"] {
            assert!(matches!(attestor.account(uid).await, Err(Refused::Unknown(_))), "{uid}");
        }
        assert!(matches!(attestor.account("away").await, Err(Refused::Unavailable(_))));
        // This test runs in no pod.
        let (one, _other) = UnixStream::pair().unwrap();
        let us = Process::at_other_end(&one, Moment::now()).unwrap();
        let refused = attestor.attest(&us).await.unwrap_err();
        assert!(matches!(&refused, Refused::Unknown(why) if why.contains("pod")), "{refused}");
    }
}
