//! Whose tokens a running Mica takes.

use std::sync::Arc;
use std::time::Duration;

use super::serve::Error;
use crate::auth::keys::{self, FROM_SERVER, FixedKeys, LiveKeys};
use crate::auth::token::{Issuer, Review, Subjects, Tokens};
use crate::auth::{LivingPolicy, oidc, trial};
use crate::cluster::{Cluster, TokenReviews};
use crate::config::serve::Args;
use crate::core::spiffe::ServiceAccount;
use crate::core::token::trial::ISSUER;
use crate::sys::dir::Dir;

/// While the API server has never answered, it is asked again after so long, then twice as long, and so on.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// At most so long.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// The issuers that the flags name, and the trial issuer, made or withdrawn.
pub(super) async fn issuers(args: &Args, data: &Dir) -> Result<Vec<Arc<Issuer>>, Error> {
    let fault = |e: trial::Error| Error::Fault(e.to_string());
    let mut issuers = Vec::new();
    if let Some(name) = &args.token_issuer {
        let keys = living(name, args.token_jwks.as_deref()).await.map_err(Error::Usage)?;
        issuers.push(service_accounts(name, args, keys));
    }
    if args.trial_tokens {
        let set = trial::make(data).map_err(fault)?.into_bytes();
        let place = data.path().join(trial::FOLDER).display().to_string();
        let keys = LiveKeys::new(Arc::new(FixedKeys { set, place }), FROM_SERVER);
        keys.look().await.map_err(Error::Fault)?;
        issuers.push(service_accounts(ISSUER, args, keys));
        tracing::warn!("trial tokens are taken: whoever can read the data folder can be any account");
    } else {
        trial::withdraw(data).map_err(fault)?;
    }
    Ok(issuers)
}

/// A file has to be good now; a server may come later.
async fn living(issuer: &str, jwks: Option<&str>) -> Result<LiveKeys, String> {
    let (keys, is_file) = keys::of(issuer, jwks).map_err(|e| match jwks {
        None => format!("--token-issuer: {e}; or give the issuer's keys with --token-jwks FILE-or-URL"),
        Some(_) => format!("--token-jwks: {e}"),
    })?;
    if is_file {
        keys.look().await.map_err(|e| format!("--token-jwks: {e}"))?;
    }
    Ok(keys)
}

fn service_accounts(name: &str, args: &Args, keys: LiveKeys) -> Arc<Issuer> {
    Arc::new(Issuer {
        name: name.into(),
        audience: args.token_audience.clone(),
        keys: Arc::new(keys),
        // A folder of manifests knows no UIDs to compare them with.
        subjects: Subjects::ServiceAccounts { uids: args.kube },
    })
}

/// Takes the tokens of a cluster's API server for ever, and those of another issuer of them from then on. What the flags
/// name counts instead: the issuer, and where its keys are.
pub(super) async fn follow(args: &Args, cluster: Cluster, tokens: &Tokens) -> Result<(), Error> {
    let own_keys = || LiveKeys::new(Arc::new(cluster.clone()), FROM_SERVER);
    if let Some(name) = &args.token_issuer {
        let keys = match &args.token_jwks {
            Some(place) => living(name, Some(place)).await.map_err(Error::Usage)?,
            None => own_keys(),
        };
        tokens.take(vec![service_accounts(name, args, keys)]);
        return std::future::pending().await;
    }
    let mut known = None;
    let mut pause = FIRST_PAUSE;
    loop {
        match cluster.issuer().await {
            Ok(name) => {
                pause = FROM_SERVER;
                if known.as_ref() != Some(&name) {
                    tracing::info!(issuer = name, "the tokens of this issuer are taken");
                    tokens.take(vec![service_accounts(&name, args, own_keys())]);
                    known = Some(name);
                }
            }
            Err(fault) => {
                pause = if known.is_some() { FROM_SERVER } else { (pause * 2).min(LONGEST_PAUSE) };
                tracing::warn!(%fault, "the issuer of the cluster's tokens cannot be asked for");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// Takes the tokens of the issuers that policy names, as it names them now, for ever.
pub(super) async fn follow_policy(policy: &LivingPolicy, tokens: &Tokens) {
    let mut changes = policy.changes();
    let mut known = None;
    loop {
        let said = policy.current().oidc().to_vec();
        if known.as_ref() != Some(&said) {
            tokens.take_mapped(oidc::issuers(&said, &tokens.mapped()));
            known = Some(said);
        }
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// The API server's word on tokens: on all, or on those for which policy wants it, and on those that only it can judge.
pub(super) fn review(args: &Args, cluster: &Cluster, policy: Arc<LivingPolicy>) -> Review {
    let all = args.token_review;
    let wanted = Box::new(move |account: &ServiceAccount| all || policy.current().token_review(account));
    Review { reviewer: Arc::new(TokenReviews::new(cluster)), wanted }
}
