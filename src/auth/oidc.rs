//! Token issuers that policy names, whose subjects stand for accounts by exact match.

use std::sync::Arc;

use super::keys;
use super::token::{Issuer, Subjects};
use crate::core::policy::OidcIssuer;

/// The issuers, with their keys where those of `before` have the same source: a change of who stands for whom is no reason
/// to forget them.
pub fn issuers(said: &[OidcIssuer], before: &[Arc<Issuer>]) -> Vec<Arc<Issuer>> {
    said.iter().filter_map(|said| issuer(said, before)).map(Arc::new).collect()
}

fn issuer(said: &OidcIssuer, before: &[Arc<Issuer>]) -> Option<Issuer> {
    let keys = match keys::of(&said.issuer, said.jwks.as_deref()) {
        Ok((keys, _)) => keys,
        Err(fault) => {
            let issuer = &said.issuer;
            tracing::error!(issuer, %fault, "the tokens of an issuer in the policy are not taken");
            return None;
        }
    };
    let known = before.iter().find(|one| *one.name == said.issuer && one.keys.place() == keys.place());
    let mapped = said.clone();
    Some(Issuer {
        name: said.issuer.as_str().into(),
        audience: said.audience.clone(),
        keys: known.map_or_else(|| Arc::new(keys), |known| known.keys.clone()),
        subjects: Subjects::Mapped(Box::new(move |subject| mapped.account(subject).cloned())),
    })
}
