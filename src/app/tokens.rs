//! Whose tokens a running Mica takes.

use std::sync::Arc;

use super::serve::Error;
use crate::auth::keys::{self, FROM_SERVER, FixedKeys, LiveKeys};
use crate::auth::token::{Issuer, Subjects};
use crate::auth::trial;
use crate::config::serve::Args;
use crate::core::token::trial::ISSUER;
use crate::sys::dir::Dir;

/// The issuers that the flags name, and the trial issuer, made or withdrawn.
pub(super) async fn issuers(args: &Args, data: &Dir) -> Result<Vec<Arc<Issuer>>, Error> {
    let fault = |e: trial::Error| Error::Fault(e.to_string());
    let mut issuers = Vec::new();
    if let Some(name) = &args.token_issuer {
        let keys = living(name, args.token_jwks.as_deref()).await.map_err(Error::Usage)?;
        issuers.push(service_accounts(name, &args.token_audience, keys));
    }
    if args.trial_tokens {
        let set = trial::make(data).map_err(fault)?.into_bytes();
        let place = data.path().join(trial::FOLDER).display().to_string();
        let keys = LiveKeys::new(Arc::new(FixedKeys { set, place }), FROM_SERVER);
        keys.look().await.map_err(Error::Fault)?;
        issuers.push(service_accounts(ISSUER, &args.token_audience, keys));
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

fn service_accounts(name: &str, audience: &str, keys: LiveKeys) -> Arc<Issuer> {
    Arc::new(Issuer {
        name: name.into(),
        audience: audience.to_owned(),
        keys: Arc::new(keys),
        // A folder of manifests knows no UIDs to compare them with.
        subjects: Subjects::ServiceAccounts { uids: false },
    })
}
