//! Who is asking: authenticators, and what they ask in turn.
//!
//! An [`Authenticator`] judges one kind of credential. The first that applies to a request decides, so that a bad
//! credential is never made good by another one beside it. What the authenticators cannot know by themselves they ask
//! through small traits: whether an object lives ([`Liveness`]), what an issuer's keys are ([`KeySource`]), what the API
//! server says of a token ([`Reviewer`]), who runs on a node ([`Nodes`]).

mod accounts;
mod certificate;
mod forwarded;
mod impersonation;
pub mod keys;
pub mod oidc;
mod policy;
pub mod token;
pub mod trial;

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tonic::metadata::MetadataMap;

use crate::core::caller::{Bound, Caller, Object};
use crate::core::refusal::Refusal;
use crate::core::spiffe::ServiceAccount;

pub use accounts::Accounts;
pub use certificate::CertificateAuthenticator;
pub use forwarded::{ForwardedAuthenticator, Trusted};
pub use impersonation::Impersonation;
pub use policy::LivingPolicy;

/// An answer that may have to be waited for.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What came with a request. None of it is believed yet.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// Who is at the other end of the connection.
    pub peer: &'a Peer,
    /// The request's metadata.
    pub metadata: &'a MetadataMap,
}

/// The other end of a connection. All that is known is where it is, and that it holds the key of its first certificate.
#[derive(Debug)]
pub struct Peer {
    /// Where the connection comes from.
    pub source: IpAddr,
    /// The certificates of the TLS handshake, leaf first; empty without any.
    pub certificates: Vec<CertificateDer<'static>>,
    /// What was found out about them the last time.
    judged: Mutex<Option<Arc<certificate::Judged>>>,
}

impl Peer {
    /// A peer whose certificates nobody has judged yet.
    pub fn new(source: IpAddr, certificates: Vec<CertificateDer<'static>>) -> Self {
        Self { source, certificates, judged: Mutex::new(None) }
    }
}

/// Judges one kind of credential.
pub trait Authenticator: Send + Sync {
    /// Whether a request carries the kind of credential that this one judges.
    fn applies(&self, evidence: &Evidence<'_>) -> bool;

    /// Who is asking. Errors have the code `UNAUTHENTICATED`, or `UNAVAILABLE` where that cannot be known now.
    fn judge<'a>(
        &'a self,
        evidence: &'a Evidence<'_>,
        now: OffsetDateTime,
    ) -> Answer<'a, Result<Caller, Refusal>>;
}

/// Whether a Kubernetes object lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Life {
    /// It does, and is the one that was meant.
    Alive,
    /// It does not.
    Gone,
    /// There is one of its name, with another UID.
    Replaced,
    /// That cannot be known now, and why.
    Unknown(String),
}

/// Knows which service accounts and pods live. Answers from memory where it can.
pub trait Liveness: Send + Sync {
    /// Whether an account lives, and is the one with the UID, if one is given.
    fn account<'a>(&'a self, account: &'a ServiceAccount, uid: Option<&'a str>) -> Answer<'a, Life>;

    /// Whether a pod lives.
    fn pod<'a>(&'a self, namespace: &'a str, pod: &'a Object) -> Answer<'a, Life>;
}

/// Where the public keys of a token issuer come from.
pub trait KeySource: Send + Sync {
    /// The JWK Set (RFC 7517) as it is now; an error says what could not be had, from where and why.
    fn fetch(&self) -> Answer<'_, Result<Vec<u8>, String>>;

    /// Where that is, for messages.
    fn place(&self) -> String;
}

/// What the API server says of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reviewed {
    /// Whose it is.
    pub account: ServiceAccount,
    /// What it is bound to.
    pub bound: Bound,
}

/// Asks the API server about a token (TokenReview).
pub trait Reviewer: Send + Sync {
    /// Whose token it is, for this audience. Refusals are `TokenRejected`, or `VerifierUnavailable` without an answer.
    fn review<'a>(&'a self, token: &'a str, audience: &'a str) -> Answer<'a, Result<Reviewed, Refusal>>;
}

/// Knows who runs on which node.
pub trait Nodes: Send + Sync {
    /// Whether a pod of the account that has neither failed nor succeeded runs on the node; an error says why that cannot
    /// be known.
    fn runs<'a>(&'a self, node: &'a Object, account: &'a ServiceAccount) -> Answer<'a, Result<bool, String>>;

    /// The node that a living pod runs on, if the pod lives and has neither failed nor succeeded, and is of the account.
    fn node_of<'a>(
        &'a self,
        account: &'a ServiceAccount,
        pod: &'a Object,
    ) -> Answer<'a, Result<Option<Object>, String>>;
}
