//! A policy as its file has it: `docs/policy.md` is the schema for people. Reading is strict, since what a policy does
//! not say is granted or denied by what it says elsewhere.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_saphyr::Spanned;

pub use crate::core::settings::Error;
pub(super) use crate::core::settings::line;
use crate::core::settings::{self, said};

/// The most that is read.
pub const MAX: usize = 1024 * 1024;

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    #[serde(deserialize_with = "said")]
    pub(super) lifetime: Option<Spanned<String>>,
    #[serde(deserialize_with = "said")]
    pub(super) longest_lifetime: Option<Spanned<String>>,
    #[serde(deserialize_with = "said")]
    pub(super) renewal: Option<Spanned<String>>,
    #[serde(deserialize_with = "said")]
    pub(super) spread: Option<Spanned<String>>,
    #[serde(deserialize_with = "said")]
    pub(super) keys: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(deserialize_with = "said")]
    pub(super) dns: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(deserialize_with = "said")]
    pub(super) deny: Option<Spanned<bool>>,
    #[serde(deserialize_with = "said")]
    pub(super) token_review: Option<Spanned<bool>>,
    #[serde(deserialize_with = "said")]
    pub(super) jwt: Option<Spanned<bool>>,
    #[serde(deserialize_with = "said")]
    pub(super) jwt_lifetime: Option<Spanned<String>>,
    pub(super) impersonators: Vec<Spanned<String>>,
    pub(super) forwarders: Vec<Spanned<String>>,
    pub(super) oidc: Vec<Oidc>,
    pub(super) namespaces: BTreeMap<String, Spanned<Rules>>,
    pub(super) accounts: BTreeMap<String, Spanned<Rules>>,
}

/// What may be said of all, of a namespace, or of an account.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Rules {
    #[serde(deserialize_with = "said")]
    pub(super) lifetime: Option<Spanned<String>>,
    #[serde(deserialize_with = "said")]
    pub(super) longest_lifetime: Option<Spanned<String>>,
    #[serde(deserialize_with = "said")]
    pub(super) renewal: Option<Spanned<String>>,
    #[serde(deserialize_with = "said")]
    pub(super) spread: Option<Spanned<String>>,
    #[serde(deserialize_with = "said")]
    pub(super) keys: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(deserialize_with = "said")]
    pub(super) dns: Option<Spanned<Vec<Spanned<String>>>>,
    #[serde(deserialize_with = "said")]
    pub(super) deny: Option<Spanned<bool>>,
    #[serde(deserialize_with = "said")]
    pub(super) token_review: Option<Spanned<bool>>,
    #[serde(deserialize_with = "said")]
    pub(super) jwt: Option<Spanned<bool>>,
    #[serde(deserialize_with = "said")]
    pub(super) jwt_lifetime: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Oidc {
    pub(super) issuer: Spanned<String>,
    #[serde(default, deserialize_with = "said")]
    pub(super) jwks: Option<Spanned<String>>,
    pub(super) audience: Spanned<String>,
    pub(super) accounts: Spanned<Vec<Mapped>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mapped {
    pub(super) subject: Spanned<String>,
    pub(super) account: Spanned<String>,
}

impl File {
    pub(super) fn read(text: &[u8]) -> Result<Self, Error> {
        settings::read(text, MAX, "policy", "without rules")
    }

    /// What it says of all.
    pub(super) fn rules(&mut self) -> Rules {
        Rules {
            lifetime: self.lifetime.take(),
            longest_lifetime: self.longest_lifetime.take(),
            renewal: self.renewal.take(),
            spread: self.spread.take(),
            keys: self.keys.take(),
            dns: self.dns.take(),
            deny: self.deny.take(),
            token_review: self.token_review.take(),
            jwt: self.jwt.take(),
            jwt_lifetime: self.jwt_lifetime.take(),
        }
    }
}
