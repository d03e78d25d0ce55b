//! The word of a proxy in front (`x-forwarded-client-cert`).
//!
//! It counts only of proxies that policy names by their SPIFFE ID and that have proved themselves by mutual TLS; where they
//! are on the network proves nothing, loopback included. Anybody else who sends the header is refused, rather than served
//! as itself: the key in the CSR is then some client's behind it, which would get the proxy's identity.

use std::sync::Arc;

use time::OffsetDateTime;

use super::{Answer, Authenticator, CertificateAuthenticator, Evidence};
use crate::core::caller::{Caller, Proof};
use crate::core::forwarded::client_uri;
use crate::core::refusal::{Reason, Refusal};
use crate::core::spiffe::{ServiceAccount, SpiffeId, TrustDomain};

const HEADER: &str = "x-forwarded-client-cert";

/// Whether a proxy's word counts.
pub type Trusted = Box<dyn Fn(&SpiffeId) -> bool + Send + Sync>;

/// Takes the word of trusted proxies.
pub struct ForwardedAuthenticator {
    certificates: Arc<CertificateAuthenticator>,
    trusted: Trusted,
    trust_domain: TrustDomain,
}

impl ForwardedAuthenticator {
    /// Proxies prove themselves to `certificates`; clients are of the trust domain.
    pub fn new(
        certificates: Arc<CertificateAuthenticator>,
        trusted: Trusted,
        trust_domain: TrustDomain,
    ) -> Self {
        Self { certificates, trusted, trust_domain }
    }

    fn caller(&self, evidence: &Evidence<'_>, now: OffsetDateTime) -> Result<Caller, Refusal> {
        let unknown = |sentence: String| Refusal::new(Reason::ForwarderUnknown, sentence);
        if evidence.peer.certificates.is_empty() {
            let sentence = format!(
                "{HEADER} came over a connection without a certificate; it counts only of proxies that policy names"
            );
            return Err(unknown(sentence));
        }
        let (proxy, _) = self.certificates.peer(evidence.peer, now)?;
        if !(self.trusted)(&proxy) {
            let sentence = format!("{HEADER} came from {proxy}, which policy does not name as a forwarder");
            return Err(unknown(sentence));
        }
        let malformed = |sentence: String| Refusal::new(Reason::ForwardedMalformed, sentence);
        let mut values = evidence.metadata.get_all(HEADER).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(malformed(format!("{HEADER} came more than once")));
        };
        let value = value.to_str().map_err(|_| malformed(format!("{HEADER} is not ASCII")))?;
        let uri = client_uri(value).map_err(|fault| malformed(fault.to_string()))?;
        let id = SpiffeId::parse_workload(&uri).map_err(|fault| malformed(format!("{HEADER}: {fault}")))?;
        if *id.trust_domain() != self.trust_domain {
            let (found, own) = (id.trust_domain(), &self.trust_domain);
            return Err(malformed(format!("{HEADER} names the trust domain {found}, not {own}")));
        }
        let account = ServiceAccount::of(&id)
            .ok_or_else(|| malformed(format!("{HEADER} names {id}, which is no service account")))?;
        Ok(Caller { account, proof: Proof::Forwarded { proxy } })
    }
}

impl Authenticator for ForwardedAuthenticator {
    fn applies(&self, evidence: &Evidence<'_>) -> bool {
        evidence.metadata.contains_key(HEADER)
    }

    fn judge<'a>(
        &'a self,
        evidence: &'a Evidence<'_>,
        now: OffsetDateTime,
    ) -> Answer<'a, Result<Caller, Refusal>> {
        Box::pin(std::future::ready(self.caller(evidence, now)))
    }
}
