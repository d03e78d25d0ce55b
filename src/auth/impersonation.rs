//! Node impersonation: a proxy that serves all pods of a node, such as ztunnel, asks for their identities with its own
//! token.

use super::{Answer, Life, Liveness, Nodes};
use crate::core::caller::{Caller, Object, Proof};
use crate::core::refusal::{Reason, Refusal};
use crate::core::spiffe::{ServiceAccount, SpiffeId, TrustDomain};

/// What it takes to know who may be whom.
pub struct Impersonation<'a> {
    /// Where pods run.
    pub nodes: &'a dyn Nodes,
    /// Which accounts live.
    pub liveness: &'a dyn Liveness,
    /// The only one whose identities can be had.
    pub trust_domain: &'a TrustDomain,
    /// Whether policy lets the caller ask for others.
    pub is_impersonator: bool,
}

impl std::fmt::Debug for Impersonation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Impersonation")
            .field("is_impersonator", &self.is_impersonator)
            .finish_non_exhaustive()
    }
}

impl Impersonation<'_> {
    /// The account whose certificate the caller gets, when it asks for the identity `wanted`.
    ///
    /// The caller may ask for others and proves itself by a token that is bound to a pod of its own, which runs on
    /// the node that the token names; and on that very node runs a pod of the account that is asked for. Running means
    /// neither failed nor succeeded. The caller's own account and pod have been found alive before.
    pub async fn judge(&self, caller: &Caller, wanted: &str) -> Result<ServiceAccount, Refusal> {
        // From what costs nothing to what the cluster has to be asked for.
        let Proof::Token { bound, .. } = &caller.proof else {
            let sentence = "others can be asked for with a service account token only";
            return Err(Refusal::new(Reason::ImpersonatorUnbound, sentence)
                .with_detail(format!("the proof is {}", caller.proof.name())));
        };
        if !self.is_impersonator {
            let sentence = format!("{} may not ask for the identity of others", caller.account);
            return Err(Refusal::new(Reason::ImpersonatorUnknown, sentence));
        }
        let (Some(pod), Some(node)) = (&bound.pod, &bound.node) else {
            let sentence = "others can be asked for with a token only that is bound to a pod on a node";
            return Err(Refusal::new(Reason::ImpersonatorUnbound, sentence));
        };
        let account = self.account(wanted)?;
        let place = known(self.nodes.node_of(&caller.account, pod)).await?;
        if place.as_ref() != Some(node) {
            let sentence = "the pod that the token is bound to does not run on the token's node";
            return Err(Refusal::new(Reason::ImpersonatorUnbound, sentence).with_detail(format!(
                "pod {}: token {}, cluster {}",
                pod.name,
                place_of(Some(node)),
                place_of(place.as_ref())
            )));
        }
        if !known(self.nodes.runs(node, &account)).await? {
            let sentence = format!("no running pod of {account} is on the caller's node");
            return Err(Refusal::new(Reason::ImpersonatedElsewhere, sentence)
                .with_detail(format!("node {}", node.name)));
        }
        match self.liveness.account(&account, None).await {
            Life::Alive => Ok(account),
            Life::Unknown(why) => Err(unknown(why)),
            Life::Gone | Life::Replaced => {
                let sentence = format!("service account {account} does not exist");
                Err(Refusal::new(Reason::AccountGone, sentence))
            }
        }
    }

    fn account(&self, wanted: &str) -> Result<ServiceAccount, Refusal> {
        let malformed = |sentence: String| Refusal::new(Reason::ImpersonatedMalformed, sentence);
        let id = SpiffeId::parse_workload(wanted).map_err(|fault| malformed(fault.to_string()))?;
        if id.trust_domain() != self.trust_domain {
            return Err(malformed(format!("{id} is not of the trust domain {}", self.trust_domain)));
        }
        ServiceAccount::of(&id)
            .ok_or_else(|| malformed(format!("{id} is not /ns/<namespace>/sa/<service account>")))
    }
}

async fn known<T>(answer: Answer<'_, Result<T, String>>) -> Result<T, Refusal> {
    answer.await.map_err(unknown)
}

fn unknown(why: String) -> Refusal {
    let sentence = "who runs on the caller's node cannot be known now; try again";
    Refusal::new(Reason::LivenessUnknown, sentence).with_detail(why)
}

fn place_of(node: Option<&Object>) -> String {
    node.map_or_else(|| "nowhere".to_owned(), |node| format!("{} ({})", node.name, node.uid))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::core::caller::Bound;

    /// One node, on which `mesh/ztunnel` runs as pod z and `shop/web` too.
    struct Cluster {
        place: Result<Option<Object>, String>,
        runs: Result<bool, String>,
        life: Life,
    }

    impl Nodes for Cluster {
        fn runs<'a>(
            &'a self,
            node: &'a Object,
            account: &'a ServiceAccount,
        ) -> Answer<'a, Result<bool, String>> {
            let here = *node == object("a") && *account == web();
            Box::pin(std::future::ready(self.runs.clone().map(|runs| runs && here)))
        }

        fn node_of<'a>(
            &'a self,
            account: &'a ServiceAccount,
            pod: &'a Object,
        ) -> Answer<'a, Result<Option<Object>, String>> {
            assert_eq!((account, pod), (&ztunnel(), &object("z")));
            Box::pin(std::future::ready(self.place.clone()))
        }
    }

    impl Liveness for Cluster {
        fn account<'a>(&'a self, account: &'a ServiceAccount, uid: Option<&'a str>) -> Answer<'a, Life> {
            assert_eq!((account, uid), (&web(), None));
            Box::pin(std::future::ready(self.life.clone()))
        }

        fn pod<'a>(&'a self, _: &'a str, _: &'a Object) -> Answer<'a, Life> {
            unreachable!()
        }
    }

    const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

    fn object(name: &str) -> Object {
        Object { name: name.to_owned(), uid: format!("{name}-uid") }
    }

    fn web() -> ServiceAccount {
        ServiceAccount::new("shop", "web").unwrap()
    }

    fn ztunnel() -> ServiceAccount {
        ServiceAccount::new("mesh", "ztunnel").unwrap()
    }

    fn good() -> Cluster {
        Cluster { place: Ok(Some(object("a"))), runs: Ok(true), life: Life::Alive }
    }

    fn token(account: ServiceAccount, pod: Option<Object>, node: Option<Object>) -> Caller {
        let bound = Arc::new(Bound { account_uid: Some("u".to_owned()), pod, node });
        Caller { account, proof: Proof::Token { reviewed: false, bound } }
    }

    fn caller() -> Caller {
        token(ztunnel(), Some(object("z")), Some(object("a")))
    }

    fn judged(cluster: &Cluster, caller: &Caller, wanted: &str) -> Result<ServiceAccount, Reason> {
        let trust_domain = TrustDomain::parse("cluster.local").unwrap();
        let impersonation = Impersonation {
            nodes: cluster,
            liveness: cluster,
            trust_domain: &trust_domain,
            is_impersonator: caller.account == ztunnel(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(impersonation.judge(caller, wanted)).map_err(|refusal| refusal.reason)
    }

    #[test]
    fn a_trusted_account_gets_the_identity_of_a_pod_beside_its_own() {
        assert_eq!(judged(&good(), &caller(), WEB), Ok(web()));
    }

    #[test]
    fn only_a_named_account_with_a_token_of_a_pod_on_a_node_may_ask() {
        let (pod, node) = (Some(object("z")), Some(object("a")));
        let forged = Caller {
            account: ztunnel(),
            proof: Proof::Certificate { proved_at: time::OffsetDateTime::UNIX_EPOCH },
        };
        for (caller, reason) in [
            (token(web(), pod.clone(), node.clone()), Reason::ImpersonatorUnknown),
            (
                token(ServiceAccount::new("shop", "ztunnel").unwrap(), pod.clone(), node.clone()),
                Reason::ImpersonatorUnknown,
            ),
            (token(ztunnel(), None, node.clone()), Reason::ImpersonatorUnbound),
            (token(ztunnel(), pod.clone(), None), Reason::ImpersonatorUnbound),
            (forged, Reason::ImpersonatorUnbound),
        ] {
            assert_eq!(judged(&good(), &caller, WEB), Err(reason), "{caller:?}");
        }
    }

    #[test]
    fn the_identity_asked_for_is_an_account_of_this_trust_domain() {
        for wanted in [
            "",
            "web",
            "spiffe://example.org/ns/shop/sa/web",
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/shop/sa/web/",
            "spiffe://cluster.local/ns/shop/sa/web/more",
            "spiffe://cluster.local/shop/web",
            "spiffe://cluster.local.evil/ns/shop/sa/web",
            "SPIFFE://cluster.local/ns/shop/sa/web",
        ] {
            assert_eq!(judged(&good(), &caller(), wanted), Err(Reason::ImpersonatedMalformed), "{wanted:?}");
        }
    }

    #[test]
    fn the_caller_s_pod_runs_on_the_node_that_the_token_names() {
        let another = Object { name: "a".to_owned(), uid: "another".to_owned() };
        for place in [None, Some(object("b")), Some(another)] {
            let cluster = Cluster { place: Ok(place), ..good() };
            assert_eq!(judged(&cluster, &caller(), WEB), Err(Reason::ImpersonatorUnbound));
        }
    }

    #[test]
    fn the_identity_asked_for_runs_beside_it_and_exists() {
        let elsewhere = Cluster { runs: Ok(false), ..good() };
        assert_eq!(judged(&elsewhere, &caller(), WEB), Err(Reason::ImpersonatedElsewhere));
        let db = "spiffe://cluster.local/ns/shop/sa/db";
        assert_eq!(judged(&good(), &caller(), db), Err(Reason::ImpersonatedElsewhere));
        let gone = Cluster { life: Life::Gone, ..good() };
        assert_eq!(judged(&gone, &caller(), WEB), Err(Reason::AccountGone));
    }

    #[test]
    fn what_cannot_be_known_is_asked_again_by_the_client() {
        let why = || "away".to_owned();
        for cluster in [
            Cluster { place: Err(why()), ..good() },
            Cluster { runs: Err(why()), ..good() },
            Cluster { life: Life::Unknown(why()), ..good() },
        ] {
            assert_eq!(judged(&cluster, &caller(), WEB), Err(Reason::LivenessUnknown));
        }
    }
}
