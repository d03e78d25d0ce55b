//! What the API server says of a token: TokenReview.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo};
use kube::core::Request;
use kube::core::params::PostParams;
use kube::{Client, Resource as _};
use tokio::sync::Semaphore;

use super::{Cluster, PATIENCE, said};
use crate::auth::{Answer, Reviewed, Reviewer};
use crate::core::caller::{Bound, Object};
use crate::core::refusal::{Reason, Refusal};
use crate::core::spiffe::ServiceAccount;

/// So many reviews at once; the others wait for their turn, but not for long.
const PLACES: usize = 32;
/// Every service account is in this group, and nobody else may be.
const GROUP: &str = "system:serviceaccounts";

/// Asks for token reviews.
pub struct TokenReviews {
    client: Client,
    places: Semaphore,
}

impl std::fmt::Debug for TokenReviews {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenReviews")
    }
}

impl TokenReviews {
    /// Of an API server.
    pub fn new(cluster: &Cluster) -> Self {
        Self { client: cluster.client.clone(), places: Semaphore::new(PLACES) }
    }

    async fn ask(&self, token: &str, audience: &str) -> Result<TokenReviewStatus, String> {
        let review = TokenReview {
            spec: TokenReviewSpec { token: token.to_owned(), audiences: Some(vec![audience.to_owned()]) },
            ..TokenReview::default()
        };
        let body = serde_json::to_vec(&review).map_err(|e| e.to_string())?;
        let request = Request::new(TokenReview::url_path(&(), None))
            .create(&PostParams::default(), body)
            .map_err(|e| e.to_string())?;
        // The answer is read here, since kube logs one that it cannot read, and the token may be in it.
        let text = self.client.request_text(request).await.map_err(|fault| said(&fault))?;
        let answer: TokenReview =
            serde_json::from_str(&text).map_err(|fault| format!("no TokenReview: {fault}"))?;
        answer.status.ok_or_else(|| "a TokenReview without a status".to_owned())
    }
}

impl Reviewer for TokenReviews {
    fn review<'a>(&'a self, token: &'a str, audience: &'a str) -> Answer<'a, Result<Reviewed, Refusal>> {
        Box::pin(async move {
            let asked = async {
                let _place = self.places.acquire().await;
                self.ask(token, audience).await
            };
            let fault = match tokio::time::timeout(PATIENCE, asked).await {
                Ok(Ok(status)) => return judge(status, audience),
                Ok(Err(fault)) => fault,
                Err(_) => format!("no answer within {} seconds", PATIENCE.as_secs()),
            };
            let sentence = "the API server cannot be asked about the token now; try again";
            Err(Refusal::new(Reason::VerifierUnavailable, sentence).with_detail(fault))
        })
    }
}

/// Takes an answer for what it says and no more.
fn judge(status: TokenReviewStatus, audience: &str) -> Result<Reviewed, Refusal> {
    let rejected = |detail: String| {
        let sentence = "the API server does not vouch for the token";
        Err(Refusal::new(Reason::TokenRejected, sentence).with_detail(detail))
    };
    if status.authenticated != Some(true) {
        return rejected(status.error.unwrap_or_else(|| "it is not authenticated".to_owned()));
    }
    // A server that knows nothing of audiences names none, and vouches for a token made for somebody else.
    if !status.audiences.as_ref().is_some_and(|audiences| audiences.iter().any(|named| named == audience)) {
        return rejected(format!("it is vouched for, but not for the audience {audience:?}"));
    }
    let user = status.user.unwrap_or_default();
    if !user.groups.as_ref().is_some_and(|groups| groups.iter().any(|group| group == GROUP)) {
        return rejected(format!("the user is not in the group {GROUP}"));
    }
    let Some(account) = user.username.as_deref().and_then(account) else {
        return rejected("the user's name is not system:serviceaccount:<namespace>:<name>".to_owned());
    };
    let bound = Bound {
        pod: object(&user, "pod"),
        node: object(&user, "node"),
        account_uid: user.uid.filter(|uid| !uid.is_empty()),
    };
    Ok(Reviewed { account, bound })
}

fn account(username: &str) -> Option<ServiceAccount> {
    let (namespace, name) = username.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    ServiceAccount::new(namespace, name).ok()
}

/// What the token is bound to, if both its name and its UID are told, each once.
fn object(user: &UserInfo, kind: &str) -> Option<Object> {
    let extra = |what: &str| match user
        .extra
        .as_ref()?
        .get(&format!("authentication.kubernetes.io/{kind}-{what}"))?
        .as_slice()
    {
        [one] if !one.is_empty() => Some(one.clone()),
        _ => None,
    };
    Some(Object { name: extra("name")?, uid: extra("uid")? })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn answer() -> Value {
        json!({
            "authenticated": true,
            "audiences": ["istio-ca"],
            "user": {
                "username": "system:serviceaccount:shop:web", "uid": "u",
                "groups": ["system:serviceaccounts", "system:serviceaccounts:shop", "system:authenticated"],
                "extra": {
                    "authentication.kubernetes.io/credential-id": ["JTI=1"],
                    "authentication.kubernetes.io/pod-name": ["web-1"],
                    "authentication.kubernetes.io/pod-uid": ["p"],
                    "authentication.kubernetes.io/node-name": ["a"],
                    "authentication.kubernetes.io/node-uid": ["n"],
                },
            },
        })
    }

    fn judged(answer: Value) -> Result<Reviewed, Refusal> {
        judge(serde_json::from_value(answer).unwrap(), "istio-ca")
    }

    #[test]
    fn a_good_answer_names_the_account_and_what_the_token_is_bound_to() {
        let reviewed = judged(answer()).unwrap();
        assert_eq!(reviewed.account, ServiceAccount::new("shop", "web").unwrap());
        let object = |name: &str, uid: &str| Some(Object { name: name.to_owned(), uid: uid.to_owned() });
        let bound =
            Bound { account_uid: Some("u".to_owned()), pod: object("web-1", "p"), node: object("a", "n") };
        assert_eq!(reviewed.bound, bound);
        let mut unbound = answer();
        unbound["user"]["extra"] = Value::Null;
        assert_eq!(
            judged(unbound).unwrap().bound,
            Bound { account_uid: Some("u".to_owned()), ..Bound::default() }
        );
        let mut half = answer();
        half["user"]["extra"]["authentication.kubernetes.io/pod-uid"] = json!([]);
        assert_eq!(judged(half).unwrap().bound.pod, None);
    }

    #[test]
    fn every_other_answer_is_a_refusal() {
        for (path, value) in [
            ("/authenticated", json!(false)),
            ("/authenticated", Value::Null),
            ("/audiences", Value::Null),
            ("/audiences", json!([])),
            ("/audiences", json!(["istio-ca.example.org", "api"])),
            ("/user", Value::Null),
            ("/user/groups", Value::Null),
            ("/user/groups", json!(["system:authenticated", "system:serviceaccounts:shop"])),
            ("/user/username", Value::Null),
            ("/user/username", json!("shop:web")),
            ("/user/username", json!("system:serviceaccount:shop")),
            ("/user/username", json!("system:serviceaccount:shop:web:more")),
            ("/user/username", json!("system:serviceaccount::web")),
            ("/user/username", json!("system:serviceaccount:../x:web")),
            ("/user/username", json!("system:node:a")),
        ] {
            let mut answer = answer();
            *answer.pointer_mut(path).unwrap() = value.clone();
            let refusal = judged(answer).expect_err(&format!("{path} {value}"));
            assert_eq!(refusal.reason, Reason::TokenRejected, "{path} {value}");
            assert!(refusal.detail.is_some());
        }
    }
}
