//! Renewal with a client certificate (mutual TLS).
//!
//! TLS has shown that the peer holds the key of its certificate, and nothing else. Whether the certificate is one of this
//! authority's, and in its time, is judged at each request, since connections outlive certificates and trust bundles.

use std::sync::{Arc, PoisonError};

use time::OffsetDateTime;

use super::{Answer, Authenticator, Evidence, Peer};
use crate::authority::Authority;
use crate::core::bundle::TrustBundle;
use crate::core::caller::{Caller, Proof};
use crate::core::certificate::Certificate;
use crate::core::chain::{self, Fault};
use crate::core::lifetime::Validity;
use crate::core::refusal::{Reason, Refusal};
use crate::core::spiffe::{ServiceAccount, SpiffeId, TrustDomain};

/// Takes the certificates that this authority's trust bundle vouches for.
pub struct CertificateAuthenticator {
    authority: Arc<Authority>,
}

/// What was found out about a peer's certificates. It holds for one bundle, and while all of the path is valid.
#[derive(Debug)]
pub(super) struct Judged {
    bundle: Arc<TrustBundle>,
    window: Validity,
    id: SpiffeId,
    proved_at: OffsetDateTime,
}

impl CertificateAuthenticator {
    /// Judges by the authority's bundle of the moment.
    pub fn new(authority: Arc<Authority>) -> Self {
        Self { authority }
    }

    /// The identity that a peer has proved by its certificate, and when it last proved itself otherwise.
    pub fn peer(&self, peer: &Peer, now: OffsetDateTime) -> Result<(SpiffeId, OffsetDateTime), Refusal> {
        let issuer = self.authority.issuer();
        let mut last = peer.judged.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(judged) = &*last
            && Arc::ptr_eq(&judged.bundle, issuer.bundle())
            && judged.window.contains(now)
        {
            return Ok((judged.id.clone(), judged.proved_at));
        }
        let judged = judge(peer, issuer.bundle(), self.authority.trust_domain(), now)?;
        let found = (judged.id.clone(), judged.proved_at);
        *last = Some(Arc::new(judged));
        Ok(found)
    }
}

impl Authenticator for Arc<CertificateAuthenticator> {
    fn applies(&self, evidence: &Evidence<'_>) -> bool {
        !evidence.peer.certificates.is_empty()
    }

    fn judge<'a>(
        &'a self,
        evidence: &'a Evidence<'_>,
        now: OffsetDateTime,
    ) -> Answer<'a, Result<Caller, Refusal>> {
        Box::pin(std::future::ready(self.peer(evidence.peer, now).and_then(|(id, proved_at)| {
            let account = ServiceAccount::of(&id).ok_or_else(|| {
                let sentence = format!("the client certificate names {id}, which is no service account");
                Refusal::new(Reason::CertificateMalformed, sentence)
            })?;
            Ok(Caller { account, proof: Proof::Certificate { proved_at } })
        })))
    }
}

fn judge(
    peer: &Peer,
    bundle: &Arc<TrustBundle>,
    trust_domain: &TrustDomain,
    now: OffsetDateTime,
) -> Result<Judged, Refusal> {
    let count = peer.certificates.len();
    if count > chain::MAX {
        let sentence = format!("the client sent {count} certificates; at most {} are looked at", chain::MAX);
        return Err(Refusal::new(Reason::CertificateMalformed, sentence));
    }
    let chain = peer
        .certificates
        .iter()
        .map(|der| Certificate::from_der(der))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| Refusal::new(Reason::CertificateMalformed, format!("the client certificate: {e}")))?;
    let id = chain::verify(&chain, bundle, None, now).map_err(|faults| refusal(&faults))?;
    if id.trust_domain() != trust_domain {
        let sentence = format!(
            "the client certificate is of the trust domain {}, not {trust_domain}",
            id.trust_domain()
        );
        return Err(Refusal::new(Reason::CertificateForeign, sentence));
    }
    let (leaf, above) = (&chain[0], &chain[1..]);
    let path = chain::path(leaf, above, bundle, now).map_err(|fault| refusal(&[fault]))?;
    Ok(Judged {
        window: leaf.validity.and(path.window()),
        bundle: bundle.clone(),
        // Certificates count in whole seconds.
        proved_at: leaf.proved_at.unwrap_or_else(|| leaf.validity.issued_at()).truncate_to_second(),
        id,
    })
}

/// The worst fault names the reason: one that no waiting and no other bundle mends comes first.
fn refusal(faults: &[Fault]) -> Refusal {
    let reason_of = |fault: &Fault| match fault {
        Fault::Empty | Fault::TooLong(_) | Fault::Leaf(_) | Fault::Identity { .. } => {
            Reason::CertificateMalformed
        }
        Fault::Above { .. } | Fault::PathLength { .. } | Fault::Path(_) => Reason::CertificateForeign,
        Fault::Expired { .. } => Reason::CertificateExpired,
        Fault::NotYet { .. } => Reason::CertificateNotYetValid,
    };
    let reason = faults.iter().map(reason_of).min().unwrap_or(Reason::CertificateForeign);
    let said: Vec<_> = faults.iter().map(ToString::to_string).collect();
    Refusal::new(reason, format!("the client certificate: {}", said.join("; ")))
}
