//! A policy as its file has it: `docs/policy.md` is the schema for people. Reading is strict, since what a policy does
//! not say is granted or denied by what it says elsewhere.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_saphyr::{Error as Fault, Spanned};

/// The most that is read.
pub const MAX: usize = 1024 * 1024;

/// Why a policy is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Counted from 1; none where the fault is not in one place of the file.
    pub line: Option<usize>,
    /// What is wrong, and what to do.
    pub reason: String,
}

impl Error {
    pub(super) fn at<T>(place: &Spanned<T>, reason: impl ToString) -> Self {
        Self { line: Some(line(place)), reason: reason.to_string() }
    }

    pub(super) fn whole(reason: impl Into<String>) -> Self {
        Self { line: None, reason: reason.into() }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.reason),
            None => f.write_str(&self.reason),
        }
    }
}

impl std::error::Error for Error {}

/// Where a value stands.
pub(super) fn line<T>(place: &Spanned<T>) -> usize {
    usize::try_from(place.referenced.line()).unwrap_or(0)
}

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

/// A key without a value says nothing, which is never what was meant.
fn said<'de, D: Deserializer<'de>, T: Deserialize<'de>>(value: D) -> Result<Option<T>, D::Error> {
    T::deserialize(value).map(Some)
}

impl File {
    pub(super) fn read(text: &[u8]) -> Result<Self, Error> {
        if text.len() > MAX {
            return Err(Error::whole(format!("the policy of {} bytes is longer than {MAX}", text.len())));
        }
        let text = std::str::from_utf8(text).map_err(|fault| {
            let lines = text[..fault.valid_up_to()].iter().filter(|b| **b == b'\n').count();
            Error { line: Some(lines + 1), reason: "the policy is not UTF-8 text".to_owned() }
        })?;
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                max_depth: 16,
                max_documents: 1,
                max_aliases: 1_000,
                max_anchors: 1_000,
                enforce_alias_anchor_ratio: false,
            },
            alias_limits: serde_saphyr::alias_limits! {
                max_total_replayed_events: 20_000,
                max_replay_stack_depth: 4,
            },
            emit_comments: false,
            with_snippet: false,
            duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
            merge_keys: serde_saphyr::options::MergeKeyPolicy::Error,
            strict_booleans: true,
            reject_unsupported_tags: true,
        };
        // A file that was cut short to nothing must not lift every rule.
        let read: Option<Self> = serde_saphyr::from_str_with_options(text, options).map_err(explained)?;
        read.ok_or_else(|| Error::whole("the policy is empty; write {} for one without rules"))
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

fn explained(fault: Fault) -> Error {
    let line = fault.location().and_then(|at| usize::try_from(at.line()).ok()).filter(|line| *line > 0);
    let advice = match fault.without_snippet() {
        Fault::UnknownAnchor { .. } => "; a pattern that begins with * has to stand in quotes",
        Fault::MergeKeyNotAllowed { .. } => "; repeat the values instead",
        _ => "",
    };
    let text = fault.without_snippet().to_string();
    // The line is said once.
    let text = match text.rsplit_once(" at line ") {
        Some((head, tail)) if tail.bytes().all(|b| b.is_ascii_digit() || b", column".contains(&b)) => head,
        _ => text.as_str(),
    };
    Error { line, reason: format!("{text}{advice}") }
}
