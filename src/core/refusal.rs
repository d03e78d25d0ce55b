//! Why a request for a certificate is refused: one table of stable reasons, each with its gRPC code.

use std::fmt;

/// Whose names the reasons are.
pub const DOMAIN: &str = "mica.dev";

/// What a caller is told, and what only the log is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Stable.
    pub reason: Reason,
    /// For people, in one sentence without a full stop; nothing that the caller may not know.
    pub sentence: String,
    /// The rest of the story, for the log alone.
    pub detail: Option<String>,
}

impl Refusal {
    /// A reason and its sentence.
    pub fn new(reason: Reason, sentence: impl Into<String>) -> Self {
        Self { reason, sentence: sentence.into(), detail: None }
    }

    /// With what only the log is told.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for Refusal {}

/// The gRPC codes that the CSR services answer with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// No, bad or stale credential; a failed impersonation.
    Unauthenticated,
    /// What is asked for can be had by nobody.
    InvalidArgument,
    /// Sound, but not this caller's to have.
    PermissionDenied,
    /// The queue is full; to be tried again.
    ResourceExhausted,
    /// Mica cannot know, or cannot sign, now; to be tried again.
    Unavailable,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident, $name:literal, $code:ident;)+) => {
        /// A stable reason, sent as `reason` of `google.rpc.ErrorInfo` in the domain [`DOMAIN`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Reason {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// As it is sent.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// The code it is sent with.
            pub const fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code,)+ }
            }
        }
    };
}

reasons! {
    /// The request came with no credential.
    NoCredential, "NO_CREDENTIAL", Unauthenticated;
    /// The authorization header is not `Bearer` and a token, or comes more than once.
    CredentialMalformed, "CREDENTIAL_MALFORMED", Unauthenticated;
    /// No authenticator is set up for this kind of credential.
    CredentialUnsupported, "CREDENTIAL_UNSUPPORTED", Unauthenticated;

    /// The token is not a JWT of a service account.
    TokenMalformed, "TOKEN_MALFORMED", Unauthenticated;
    /// The token's algorithm is not an asymmetric one that its key is for.
    TokenAlgorithm, "TOKEN_ALGORITHM", Unauthenticated;
    /// No key of the issuer has the token's key identifier.
    TokenKeyUnknown, "TOKEN_KEY_UNKNOWN", Unauthenticated;
    /// The token's signature does not fit.
    TokenSignature, "TOKEN_SIGNATURE", Unauthenticated;
    /// The token is of another issuer.
    TokenIssuer, "TOKEN_ISSUER", Unauthenticated;
    /// The token is not for this audience, or for none.
    TokenAudience, "TOKEN_AUDIENCE", Unauthenticated;
    /// The token has expired, or does not say when it does.
    TokenExpired, "TOKEN_EXPIRED", Unauthenticated;
    /// The token's time has not come.
    TokenNotYetValid, "TOKEN_NOT_YET_VALID", Unauthenticated;
    /// The API server does not vouch for the token.
    TokenRejected, "TOKEN_REJECTED", Unauthenticated;
    /// The token's subject is mapped to no account.
    TokenSubject, "TOKEN_SUBJECT", Unauthenticated;

    /// The client certificate is no workload's X509-SVID.
    CertificateMalformed, "CERTIFICATE_MALFORMED", Unauthenticated;
    /// The client certificate does not lead to this authority's trust bundle.
    CertificateForeign, "CERTIFICATE_FOREIGN", Unauthenticated;
    /// The client certificate has expired.
    CertificateExpired, "CERTIFICATE_EXPIRED", Unauthenticated;
    /// The client certificate's time has not come.
    CertificateNotYetValid, "CERTIFICATE_NOT_YET_VALID", Unauthenticated;
    /// The client certificate was renewed too long without another proof.
    RenewedTooLong, "RENEWED_TOO_LONG", Unauthenticated;

    /// The forwarded client certificate header is not one element with one URI.
    ForwardedMalformed, "FORWARDED_MALFORMED", Unauthenticated;
    /// The peer is no proxy whose word counts.
    ForwarderUnknown, "FORWARDER_UNKNOWN", Unauthenticated;

    /// The account does not exist.
    AccountGone, "ACCOUNT_GONE", Unauthenticated;
    /// The account is another one of the same name.
    AccountReplaced, "ACCOUNT_REPLACED", Unauthenticated;
    /// The pod that the token was made for does not exist, or is another one of the same name.
    PodGone, "POD_GONE", Unauthenticated;

    /// The caller may not ask for others.
    ImpersonatorUnknown, "IMPERSONATOR_UNKNOWN", Unauthenticated;
    /// The caller's proof is no token that is bound to a pod on a node.
    ImpersonatorUnbound, "IMPERSONATOR_UNBOUND", Unauthenticated;
    /// The impersonated identity is no service account of this trust domain.
    ImpersonatedMalformed, "IMPERSONATED_MALFORMED", Unauthenticated;
    /// No living pod of the impersonated identity runs on the caller's node.
    ImpersonatedElsewhere, "IMPERSONATED_ELSEWHERE", Unauthenticated;

    /// The CSR cannot be read, or there is not exactly one.
    CsrMalformed, "CSR_MALFORMED", InvalidArgument;
    /// The CSR's signature does not fit its key.
    CsrSignature, "CSR_SIGNATURE", InvalidArgument;
    /// The CSR asks to be a CA.
    CsrCa, "CSR_CA", InvalidArgument;
    /// The CSR asks for several URIs.
    CsrUris, "CSR_URIS", InvalidArgument;
    /// The CSR names nobody (HandleCSR alone).
    CsrNames, "CSR_NAMES", InvalidArgument;
    /// The key is unsound, or of a kind that nobody or this identity may not have.
    KeyRefused, "KEY_REFUSED", InvalidArgument;
    /// The lifetime is longer than this identity may have.
    LifetimeTooLong, "LIFETIME_TOO_LONG", InvalidArgument;
    /// A signer was named, and there is only one.
    CertSignerUnsupported, "CERT_SIGNER_UNSUPPORTED", InvalidArgument;
    /// The request's metadata has a value of another kind than its key wants.
    MetadataMalformed, "METADATA_MALFORMED", InvalidArgument;

    /// No audience for a JWT-SVID, too many, or one that is none.
    AudienceRefused, "AUDIENCE_REFUSED", InvalidArgument;
    /// A report of who holds which bundle that cannot be read, or is too long.
    ReportMalformed, "REPORT_MALFORMED", InvalidArgument;

    /// The identity is denied by policy.
    IdentityDenied, "IDENTITY_DENIED", PermissionDenied;
    /// The CSR names somebody else (HandleCSR alone).
    CsrIdentity, "CSR_IDENTITY", PermissionDenied;

    /// Too many requests are waiting.
    QueueFull, "QUEUE_FULL", ResourceExhausted;

    /// The caller watches the bundles too many times from one place.
    TooManyWatches, "TOO_MANY_WATCHES", ResourceExhausted;

    /// Whether the account or pod lives cannot be known now.
    LivenessUnknown, "LIVENESS_UNKNOWN", Unavailable;
    /// The issuer's keys, or the API server, cannot be asked now.
    VerifierUnavailable, "VERIFIER_UNAVAILABLE", Unavailable;
    /// The authority cannot sign now.
    IssuerUnusable, "ISSUER_UNUSABLE", Unavailable;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_of_the_form_of_an_error_info() {
        // google.rpc.ErrorInfo: [A-Z][A-Z0-9_]+[A-Z0-9], at most 63.
        for reason in Reason::ALL {
            let name = reason.name();
            assert!(name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_') && name.len() <= 63, "{name}");
            assert!(!name.starts_with('_') && !name.ends_with('_'), "{name}");
        }
        let mut names: Vec<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Reason::ALL.len());
    }
}
