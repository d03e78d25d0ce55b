//! Who asks for a certificate, as an authenticator has proved it.

use std::sync::Arc;

use time::OffsetDateTime;

use super::spiffe::{ServiceAccount, SpiffeId};

/// A service account that has proved itself. Its identity comes from the proof, never from a CSR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Who it is.
    pub account: ServiceAccount,
    /// By what.
    pub proof: Proof,
}

/// How a caller has proved who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A service account token.
    Token {
        /// Whether the API server itself has vouched for it.
        reviewed: bool,
        /// What it is bound to.
        bound: Arc<Bound>,
    },
    /// A certificate of this authority's, in a TLS handshake.
    Certificate {
        /// When the holder of its key, or of one before it, last proved itself otherwise: by a token, or by getting the
        /// certificate delivered.
        proved_at: OffsetDateTime,
    },
    /// A token of another issuer, whose subject policy maps to the account.
    Oidc {
        /// The issuer.
        issuer: Arc<str>,
    },
    /// The word of a proxy that policy names and that has proved itself by mutual TLS.
    Forwarded {
        /// The proxy.
        proxy: SpiffeId,
    },
}

impl Proof {
    /// The authenticator's name, as metrics, logs and explanations give it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Token { reviewed: false, .. } => "token",
            Self::Token { reviewed: true, .. } => "token_review",
            Self::Certificate { .. } => "certificate",
            Self::Oidc { .. } => "oidc",
            Self::Forwarded { .. } => "forwarded",
        }
    }
}

/// The living objects that a token is bound to; empty where it names none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bound {
    /// The service account's UID.
    pub account_uid: Option<String>,
    /// The pod it was projected into.
    pub pod: Option<Object>,
    /// The node that the pod runs on.
    pub node: Option<Object>,
}

/// A Kubernetes object by name and by which of that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}
