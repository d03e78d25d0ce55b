//! The reconcile plan: who should have what, what is there, what time it is, and so what to do.

use std::fmt;
use std::sync::Arc;

use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::bundle::TrustBundle;
use super::certificate::Certificate;
use super::chain;
use super::key::PrivateKey;
use super::lifetime::{Lifetime, Validity};
use super::rotation::renew_at;
use super::spiffe::SpiffeId;

/// What a workload mounts. Always written and read as one whole.
#[derive(Clone, PartialEq, Eq)]
pub struct CertificateSet {
    /// The leaf and its intermediates, without the root.
    pub chain_pem: String,
    /// The leaf's key, PKCS#8.
    pub key_pem: Zeroizing<String>,
    /// The trust bundle.
    pub roots_pem: Arc<str>,
}

impl fmt::Debug for CertificateSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("certificate set")
    }
}

/// A set that was judged to be good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Good {
    /// When its renewal begins.
    pub renew_at: OffsetDateTime,
    /// When its leaf expires.
    pub not_after: OffsetDateTime,
}

impl Good {
    /// Of a leaf that was just issued.
    pub fn of(validity: Validity, serial: &[u8]) -> Self {
        Self { renew_at: renew_at(validity, serial), not_after: validity.not_after }
    }
}

/// Judges a delivered set as its reader and its peers would. The error says, in words, why it is not good.
pub fn judge(
    set: &CertificateSet,
    id: &SpiffeId,
    bundle: &TrustBundle,
    now: OffsetDateTime,
) -> Result<Good, String> {
    if *set.roots_pem != **bundle.pem() {
        return Err("root-cert.pem is not this authority's trust bundle".to_owned());
    }
    let chain =
        Certificate::all_from_pem(set.chain_pem.as_bytes()).map_err(|e| format!("cert-chain.pem: {e}"))?;
    chain::verify(&chain, bundle, Some(id), now).map_err(|faults| {
        let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
        format!("cert-chain.pem: {}", faults.join("; "))
    })?;
    let leaf = &chain[0];
    let key =
        PrivateKey::from_pem(set.key_pem.as_bytes(), None, None).map_err(|e| format!("key.pem: {e}"))?;
    if key.public().spki() != leaf.spki {
        return Err("key.pem does not belong to the leaf in cert-chain.pem".to_owned());
    }
    Ok(Good::of(leaf.validity, &leaf.serial))
}

/// What is known of one account's place in a sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// Nothing is there.
    Absent,
    /// Something is there that Mica did not write, and will not touch: why.
    Foreign(String),
    /// Mica's own, of an account that is not served any more and may still use it until its leaf expires, then.
    Released(OffsetDateTime),
    /// Mica's own, and not good: why.
    Bad(String),
    /// Good, and without the marks that Mica gives to its own: another CA's, which Mica takes over as it is.
    Unmarked(Good),
    /// Mica's own, and good.
    Good(Good),
}

/// Why a certificate is issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The account had none.
    New,
    /// Its time had come.
    Renewal,
    /// What was there was not good.
    Repair(String),
}

impl Why {
    /// A short fixed name, for metrics.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Renewal => "renewal",
            Self::Repair(_) => "repair",
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Repair(fault) => write!(f, "repair: {fault}"),
            other => f.write_str(other.as_str()),
        }
    }
}

/// What to do about one account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Issue a certificate and deliver it.
    Deliver(Why),
    /// Give Mica's marks to what is there, and leave it else as it is.
    Mark(Good),
    /// Take away what was delivered.
    Remove,
    /// Leave it, and look again then.
    Wait(OffsetDateTime),
    /// Leave it.
    Nothing,
}

/// How renewals are planned.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The lifetime of a leaf.
    pub lifetime: Lifetime,
    /// The last moment of everything above the leaves, which no leaf outlives.
    pub issuer_not_after: OffsetDateTime,
}

/// Decides for one account. `desired` is whether it should have an identity. While it is not `settled` who is, what was
/// delivered is kept, and kept good: a file that cannot be read may name its account.
pub fn step(desired: bool, settled: bool, observed: &Observed, now: OffsetDateTime, policy: &Policy) -> Step {
    match (desired || !settled, observed) {
        (_, Observed::Foreign(_)) | (false, Observed::Absent) => Step::Nothing,
        (true, Observed::Absent) if !desired => Step::Nothing,
        // Whoever wants it again says so, and it is looked at again.
        (true, Observed::Released(_)) => Step::Nothing,
        (false, Observed::Released(not_after)) if now < *not_after => Step::Wait(*not_after),
        (false, _) => Step::Remove,
        (true, Observed::Absent) => Step::Deliver(Why::New),
        (true, Observed::Bad(fault)) => Step::Deliver(Why::Repair(fault.clone())),
        (true, Observed::Unmarked(good)) if now < good.renew_at => Step::Mark(*good),
        (true, Observed::Good(good)) if now < good.renew_at => Step::Wait(good.renew_at),
        (true, Observed::Good(good) | Observed::Unmarked(good)) => {
            // Near the end of its issuer a new leaf would end when the old one does, and the next half of what is
            // left would be shorter each time: renewing without gain, ever faster.
            let gained = Validity::below(None, now, policy.lifetime).not_after.min(policy.issuer_not_after)
                - good.not_after;
            let expired = now >= good.not_after + time::Duration::SECOND;
            if expired || gained > time::Duration::ZERO {
                Step::Deliver(Why::Renewal)
            } else {
                Step::Wait(good.not_after + time::Duration::SECOND)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use time::macros::datetime;

    const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);
    const HOUR: Duration = Duration::from_secs(3_600);

    fn policy() -> Policy {
        Policy { lifetime: Lifetime::from_secs(86_400), issuer_not_after: NOW + 1_000 * HOUR }
    }

    #[test]
    fn each_situation_has_its_step() {
        let fresh = Observed::Good(Good { renew_at: NOW + HOUR, not_after: NOW + 10 * HOUR });
        let due = Observed::Good(Good { renew_at: NOW, not_after: NOW + 10 * HOUR });
        let bad = || Observed::Bad("gone".to_owned());
        let theirs = Good { renew_at: NOW + HOUR, not_after: NOW + 10 * HOUR };
        let foreign = Observed::Foreign("theirs".to_owned());
        for (desired, settled, observed, expected) in [
            (true, true, Observed::Absent, Step::Deliver(Why::New)),
            (true, false, Observed::Absent, Step::Deliver(Why::New)),
            (true, true, bad(), Step::Deliver(Why::Repair("gone".to_owned()))),
            (true, true, fresh.clone(), Step::Wait(NOW + HOUR)),
            (true, true, due.clone(), Step::Deliver(Why::Renewal)),
            (true, true, foreign.clone(), Step::Nothing),
            (false, true, foreign, Step::Nothing),
            (false, true, Observed::Absent, Step::Nothing),
            (false, true, bad(), Step::Remove),
            (false, true, fresh, Step::Remove),
            (false, false, due, Step::Deliver(Why::Renewal)),
            (false, false, bad(), Step::Deliver(Why::Repair("gone".to_owned()))),
            (false, false, Observed::Absent, Step::Nothing),
            (true, true, Observed::Unmarked(theirs), Step::Mark(theirs)),
            (true, true, Observed::Unmarked(Good { renew_at: NOW, ..theirs }), Step::Deliver(Why::Renewal)),
            (false, true, Observed::Unmarked(theirs), Step::Remove),
            (false, true, Observed::Released(NOW + HOUR), Step::Wait(NOW + HOUR)),
            (false, true, Observed::Released(NOW), Step::Remove),
            (true, true, Observed::Released(NOW + HOUR), Step::Nothing),
        ] {
            assert_eq!(
                step(desired, settled, &observed, NOW, &policy()),
                expected,
                "{desired} {settled} {observed:?}"
            );
        }
    }

    #[test]
    fn a_dying_issuer_causes_no_renewals_without_gain() {
        let not_after = NOW + 10 * HOUR;
        let due = Observed::Good(Good { renew_at: NOW, not_after });
        let dying = Policy { issuer_not_after: not_after, ..policy() };
        let end = not_after + time::Duration::SECOND;
        assert_eq!(step(true, true, &due, NOW, &dying), Step::Wait(end));
        // A time that has come is nothing to wait for: the loop would spin.
        assert_eq!(step(true, true, &due, end, &dying), Step::Deliver(Why::Renewal));
    }

    #[test]
    fn a_plan_that_was_carried_out_plans_nothing_more() {
        let validity = Validity::below(None, NOW, policy().lifetime);
        let delivered = Observed::Good(Good::of(validity, &[7; 16]));
        assert!(matches!(step(true, true, &delivered, NOW, &policy()), Step::Wait(at) if at > NOW));
    }
}
