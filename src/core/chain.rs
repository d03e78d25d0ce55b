//! Paths from a leaf to a root (RFC 5280 6), built and verified by webpki.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;
use webpki::ring as algorithms;
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, anchor_from_trusted_cert};

use super::bundle::TrustBundle;
use super::certificate::{self, Certificate};
use super::lifetime::{Validity, shown};
use super::spiffe::SpiffeId;

/// Signatures that are accepted above a leaf.
static ALGORITHMS: &[&dyn rustls::pki_types::SignatureVerificationAlgorithm] = &[
    algorithms::ECDSA_P256_SHA256,
    algorithms::ECDSA_P256_SHA384,
    algorithms::ECDSA_P384_SHA256,
    algorithms::ECDSA_P384_SHA384,
    algorithms::ED25519,
    algorithms::RSA_PKCS1_2048_8192_SHA256,
    algorithms::RSA_PKCS1_2048_8192_SHA384,
    algorithms::RSA_PKCS1_2048_8192_SHA512,
];

/// Longer chains are refused before a signature is checked.
pub const MAX: usize = 8;

/// Why a chain is not good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Nothing to verify.
    #[error("the chain is empty")]
    Empty,
    /// Longer than anyone needs.
    #[error("the chain has {0} certificates; at most {MAX} are looked at")]
    TooLong(usize),
    /// The leaf breaks a rule of X509-SVID.
    #[error("the leaf: {0}")]
    Leaf(certificate::Fault),
    /// The leaf's trust domain is not the expected one.
    #[error("the leaf names {found}, not {expected}")]
    Identity {
        /// Whom the leaf names.
        found: SpiffeId,
        /// Whom it should name.
        expected: SpiffeId,
    },
    /// Before its time.
    #[error(
        "certificate {serial} is not valid before {}; the time asked for is {}", shown(*.not_before), shown(*.at)
    )]
    NotYet {
        /// Which.
        serial: String,
        /// Its first second.
        not_before: OffsetDateTime,
        /// The time asked for.
        at: OffsetDateTime,
    },
    /// After its time.
    #[error(
        "certificate {serial} expired at {}; the time asked for is {}", shown(*.not_after), shown(*.at)
    )]
    Expired {
        /// Which.
        serial: String,
        /// Its last second.
        not_after: OffsetDateTime,
        /// The time asked for.
        at: OffsetDateTime,
    },
    /// A certificate above the leaf breaks a rule of X509-SVID.
    #[error("certificate {serial} above the leaf: {fault}")]
    Above {
        /// Which.
        serial: String,
        /// The rule.
        fault: certificate::Fault,
    },
    /// RFC 5280 4.2.1.9, of a root: webpki looks at those of intermediates only.
    #[error(
        "the root {serial} allows {allowed} certificates between itself and a leaf, and there are {found} [RFC 5280 4.2.1.9]"
    )]
    PathLength {
        /// Which root.
        serial: String,
        /// Its pathLenConstraint.
        allowed: u32,
        /// How many there are.
        found: usize,
    },
    /// No path that holds.
    #[error("no path leads from the leaf to a root of the trust bundle: {0}")]
    Path(String),
}

/// A path that holds.
#[derive(Clone, Debug)]
pub struct Path<'a> {
    /// The certificates between leaf and root, in order.
    pub intermediates: Vec<&'a Certificate>,
    /// Where it ends.
    pub root: &'a Certificate,
}

impl Path<'_> {
    /// What other verifiers refuse, and webpki does not look at: the key usage of CAs (RFC 5280 6.1.4 n) and the path
    /// length of the root.
    fn fault(&self) -> Option<Fault> {
        for certificate in &self.intermediates {
            if let Some(fault) = certificate.signing_faults().into_iter().next() {
                return Some(Fault::Above { serial: certificate.serial_text(), fault });
            }
        }
        let found = self.intermediates.iter().filter(|c| !c.is_self_issued()).count();
        match self.root.path_length {
            Some(allowed) if found as u64 > u64::from(allowed) => {
                Some(Fault::PathLength { serial: self.root.serial_text(), allowed, found })
            }
            _ => None,
        }
    }

    /// When all of it above the leaf is valid.
    pub fn window(&self) -> Validity {
        self.intermediates
            .iter()
            .fold(self.root.validity, |window, certificate| window.and(certificate.validity))
    }
}

/// Verifies a chain, leaf first, as a peer would, and returns every fault that can be told apart.
pub fn verify(
    chain: &[Certificate],
    bundle: &TrustBundle,
    expected: Option<&SpiffeId>,
    at: OffsetDateTime,
) -> Result<SpiffeId, Vec<Fault>> {
    let Some((leaf, above)) = chain.split_first() else { return Err(vec![Fault::Empty]) };
    if chain.len() > MAX {
        return Err(vec![Fault::TooLong(chain.len())]);
    }
    let mut faults: Vec<Fault> = leaf.leaf_faults().into_iter().map(Fault::Leaf).collect();
    if let (Ok(found), Some(expected)) = (leaf.spiffe_id(), expected)
        && found != *expected
    {
        faults.push(Fault::Identity { found, expected: expected.clone() });
    }
    for certificate in chain {
        faults.extend(time_fault(certificate, at));
    }
    match path(leaf, above, bundle, at) {
        Ok(found) => faults.extend(time_fault(found.root, at)),
        // The time has been named above, certificate by certificate.
        Err(_) if faults.iter().any(|f| matches!(f, Fault::NotYet { .. } | Fault::Expired { .. })) => {}
        Err(fault) => faults.push(fault),
    }
    match leaf.spiffe_id() {
        Ok(id) if faults.is_empty() => Ok(id),
        _ => Err(faults),
    }
}

/// Finds the path from a leaf to a root at a time. Where several hold, the one that lasts longest.
pub fn path<'a>(
    leaf: &Certificate,
    above: &'a [Certificate],
    bundle: &'a TrustBundle,
    at: OffsetDateTime,
) -> Result<Path<'a>, Fault> {
    let refused = |e: webpki::Error| Fault::Path(e.to_string());
    let der = CertificateDer::from(leaf.der());
    let leaf = EndEntityCert::try_from(&der).map_err(refused)?;
    let between: Vec<_> = above.iter().map(|c| CertificateDer::from(c.der())).collect();
    let seconds = u64::try_from(at.unix_timestamp()).unwrap_or_default();
    let at = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
    let mut best: Option<Path<'a>> = None;
    let mut last = None;
    for root in bundle.roots() {
        let anchor_der = CertificateDer::from(root.der());
        let anchors = [anchor_from_trusted_cert(&anchor_der).map_err(refused)?];
        match leaf.verify_for_usage(ALGORITHMS, &anchors, &between, at, AnyPurpose, None, None) {
            Ok(verified) => {
                let intermediates = verified
                    .intermediate_certificates()
                    .filter_map(|c| above.iter().find(|a| a.der() == c.der().as_ref()))
                    .collect();
                let found = Path { intermediates, root };
                if let Some(fault) = found.fault() {
                    last = Some(fault);
                    continue;
                }
                if best.as_ref().is_none_or(|best| best.window().not_after < found.window().not_after) {
                    best = Some(found);
                }
            }
            Err(e) => last = Some(refused(e)),
        }
    }
    best.ok_or_else(|| last.unwrap_or(Fault::Empty))
}

fn time_fault(certificate: &Certificate, at: OffsetDateTime) -> Option<Fault> {
    let Validity { not_before, not_after } = certificate.validity;
    if certificate.validity.contains(at) {
        None
    } else if at < not_before {
        Some(Fault::NotYet { serial: certificate.serial_text(), not_before, at })
    } else {
        Some(Fault::Expired { serial: certificate.serial_text(), not_after, at })
    }
}

/// X509-SVID judges the extended key usage (4.4), of the leaf alone; webpki would ask it of one side only.
struct AnyPurpose;

impl ExtendedKeyUsageValidator for AnyPurpose {
    fn validate(&self, _: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}
