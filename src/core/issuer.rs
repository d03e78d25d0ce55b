//! Minting: an issuer, what is ordered from it, and what it hands out.

use std::fmt;
use std::sync::Arc;

use time::OffsetDateTime;

use super::bundle::TrustBundle;
use super::certificate::{self, Certificate, SerialNumber};
use super::chain;
use super::check::{self, check};
use super::der::Writer;
use super::key::{self, IssuerKey, KeyKind, PublicKey};
use super::lifetime::{Lifetime, Validity, shown};
use super::pem;
use super::profile::{Profile, Template};
use super::spiffe::{ServiceAccount, TrustDomain};

/// Why an issuer cannot be used, or does not issue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The CA's certificate is missing.
    #[error("there is no CA certificate")]
    NoCertificate,
    /// The CA's certificate and key are not a pair.
    #[error(
        "the CA's key does not belong to its certificate (serial {0}); check which of the two files was replaced"
    )]
    KeyMismatch(String),
    /// The CA's certificate breaks a rule.
    #[error("the CA's certificate (serial {serial}): {fault}")]
    Certificate {
        /// Its serial number.
        serial: String,
        /// The rule.
        fault: certificate::Fault,
    },
    /// RFC 5280 4.1.2.4: an issuer has a name.
    #[error("the CA's certificate has an empty subject, so nothing can name it as its issuer")]
    NoSubject,
    /// RFC 5280 4.2.1.2: a CA has a subject key identifier, by which its leaves find it. Only a root may do without.
    #[error("the CA's certificate has no subject key identifier; have it issued anew with one")]
    NoKeyIdentifier,
    /// The CA belongs to another trust domain.
    #[error(
        "the CA's certificate is of the trust domain {found}, not {expected}; set --trust-domain {found}"
    )]
    TrustDomain {
        /// What it says.
        found: TrustDomain,
        /// What is wanted.
        expected: TrustDomain,
    },
    /// The CA's chain does not lead to a root, or a leaf of it would not be accepted.
    #[error("a certificate of this CA would not be accepted by its own trust bundle: {0}")]
    Path(chain::Fault),
    /// The CA's certificate and those above it are never valid together.
    #[error("the CA's certificate and those above it are at no time valid together")]
    NeverValid,
    /// The issuer's time is over.
    #[error(
        "the issuer, or a certificate above it, expired at {}; nothing can be issued below it",
        shown(*.0)
    )]
    Expired(OffsetDateTime),
    /// The issuer's time has not come.
    #[error(
        "the issuer, or a certificate above it, is not valid before {}; check this machine's clock",
        shown(*.0)
    )]
    NotYetValid(OffsetDateTime),
    /// X509-SVID 3.2: a CA signs for its own trust domain.
    #[error("an identity of the trust domain {found} was ordered from a CA of {own}")]
    Foreign {
        /// Whose was ordered.
        found: TrustDomain,
        /// Whose CA it is.
        own: TrustDomain,
    },
    /// RFC 5280 4.2.1.9.
    #[error("the CA's path length is 0, so it cannot sign an intermediate")]
    PathLength,
    /// The key.
    #[error(transparent)]
    Key(#[from] key::Error),
    /// What came out was not what was ordered.
    #[error(transparent)]
    Check(#[from] check::Error),
    /// What came out cannot be read.
    #[error(transparent)]
    Read(#[from] certificate::Error),
}

impl Error {
    /// A short fixed name, for metrics and for callers who may not know more.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Expired(_) => "issuer_expired",
            Self::NotYetValid(_) => "issuer_not_yet_valid",
            Self::Foreign { .. } => "foreign_trust_domain",
            Self::Check(_) | Self::Read(_) => "check_failed",
            Self::Key(_) => "signing_failed",
            _ => "issuer_unusable",
        }
    }
}

/// What is ordered from an issuer.
#[derive(Clone, Debug)]
pub struct Order<'a> {
    /// What it is for, and whom it names.
    pub profile: Profile<'a>,
    /// Whose key it certifies.
    pub key: &'a PublicKey,
    /// For how long, from now; shortened where a certificate above ends earlier.
    pub lifetime: Lifetime,
}

/// A certificate that passed its check. There is no other way to make one.
#[derive(Clone, PartialEq, Eq)]
pub struct Issued {
    der: Vec<u8>,
    /// Its serial number.
    pub serial: SerialNumber,
    /// When it is valid.
    pub validity: Validity,
}

impl Issued {
    /// The certificate.
    pub fn der(&self) -> &[u8] {
        &self.der
    }
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "issued {}", self.serial)
    }
}

/// A CA that has proved itself: its key signs for its certificate, and its leaves lead to its trust bundle.
#[derive(Clone)]
pub struct Issuer {
    key: Arc<dyn IssuerKey>,
    certificate: Certificate,
    authority_identifier: Vec<u8>,
    /// From the CA's certificate up, without the root.
    chain: Vec<Certificate>,
    chain_pem: Arc<str>,
    bundle: Arc<TrustBundle>,
    trust_domain: TrustDomain,
    /// When everything from the CA's certificate up to the root is valid.
    window: Validity,
}

impl Issuer {
    /// Takes a CA's key, its certificate followed by those above it (roots among them are left out), and its roots.
    /// The issuer proves itself by a throwaway leaf that a verifier must accept.
    pub fn new(
        key: Arc<dyn IssuerKey>,
        certificates: &[Certificate],
        bundle: TrustBundle,
        trust_domain: &TrustDomain,
    ) -> Result<Self, Error> {
        let certificate = certificates.first().ok_or(Error::NoCertificate)?;
        let serial = || certificate.serial_text();
        if certificate.spki != key.public().spki() {
            return Err(Error::KeyMismatch(serial()));
        }
        if let Some(fault) = certificate.signing_faults().into_iter().next() {
            return Err(Error::Certificate { serial: serial(), fault });
        }
        if let Ok(id) = certificate.spiffe_id()
            && id.trust_domain() != trust_domain
        {
            return Err(Error::TrustDomain {
                found: id.trust_domain().clone(),
                expected: trust_domain.clone(),
            });
        }
        if certificate.subject == certificate::EMPTY_NAME {
            return Err(Error::NoSubject);
        }
        let authority_identifier = match &certificate.key_identifier {
            Some(identifier) => identifier.clone(),
            // As Istio's roots were until 2020. Who reads an identifier finds none to compare it with.
            None if certificate.is_self_issued() => key.public().identifier().to_vec(),
            None => return Err(Error::NoKeyIdentifier),
        };
        let mut issuer = Self {
            key,
            authority_identifier,
            chain: Vec::new(),
            chain_pem: "".into(),
            window: certificate.validity,
            certificate: certificate.clone(),
            bundle: Arc::new(bundle),
            trust_domain: trust_domain.clone(),
        };
        issuer.prove(certificates, trust_domain)?;
        Ok(issuer)
    }

    /// Mints a leaf that never leaves, and learns from its path what has to be delivered and until when.
    fn prove(&mut self, certificates: &[Certificate], trust_domain: &TrustDomain) -> Result<(), Error> {
        let above: Vec<Certificate> =
            certificates.iter().filter(|c| !self.bundle.roots().contains(c)).cloned().collect();
        // Valid whenever a path is: the path's own window is what is sought.
        let far = Validity {
            not_before: OffsetDateTime::UNIX_EPOCH,
            not_after: OffsetDateTime::UNIX_EPOCH + Lifetime::from_secs(7_900 * 365 * 86_400).duration(),
        };
        let id = ServiceAccount::new("default", "default")
            .map(|account| account.spiffe_id(trust_domain))
            .map_err(|_| Error::NoCertificate)?;
        let key = self.key.public().clone();
        let order = Order {
            profile: Profile::Workload { id: &id, dns: &[], proved_at: None },
            key: &key,
            lifetime: Lifetime::from_secs(0),
        };
        let leaf = self.mint(&order, far, SerialNumber::from_random([1; 16]))?;
        let leaf = Certificate::from_der(&leaf.der)?;
        // A path holds at the latest beginning of its parts, if ever.
        let mut moments: Vec<_> =
            above.iter().chain(self.bundle.roots()).map(|c| c.validity.not_before).collect();
        moments.sort();
        let mut last = Error::NeverValid;
        let mut best: Option<(Vec<Certificate>, Validity)> = None;
        for at in moments {
            match chain::path(&leaf, &above, &self.bundle, at) {
                Ok(path) => {
                    let window = path.window();
                    let longer = best.as_ref().is_none_or(|(_, b)| b.not_after < window.not_after);
                    if window.not_before <= window.not_after && longer {
                        best = Some((path.intermediates.into_iter().cloned().collect(), window));
                    }
                }
                Err(fault) => last = Error::Path(fault),
            }
        }
        let (chain, window) = best.ok_or(last)?;
        self.chain_pem = chain.iter().map(Certificate::to_pem).collect::<String>().into();
        self.chain = chain;
        self.window = window;
        Ok(())
    }

    /// Issues what is ordered.
    pub fn issue(
        &self,
        order: &Order<'_>,
        now: OffsetDateTime,
        serial: SerialNumber,
    ) -> Result<Issued, Error> {
        self.usable(now)?;
        let found = match &order.profile {
            Profile::Root { trust_domain, .. } | Profile::Intermediate { trust_domain, .. } => trust_domain,
            Profile::Workload { id, .. } => id.trust_domain(),
            Profile::Serving { .. } => &self.trust_domain,
        };
        if *found != self.trust_domain {
            return Err(Error::Foreign { found: found.clone(), own: self.trust_domain.clone() });
        }
        if order.profile.is_ca() && self.certificate.path_length == Some(0) {
            return Err(Error::PathLength);
        }
        self.mint(order, Validity::below(Some(self.window), now, order.lifetime), serial)
    }

    /// Whether anything can be issued at a time.
    pub fn usable(&self, now: OffsetDateTime) -> Result<(), Error> {
        if self.window.contains(now) {
            Ok(())
        } else if now < self.window.not_before {
            Err(Error::NotYetValid(self.window.not_before))
        } else {
            Err(Error::Expired(self.window.not_after))
        }
    }

    /// Whether so little of its time is left that somebody should act: a fifth, or 30 days where that is less.
    pub fn is_ending(&self, now: OffsetDateTime) -> bool {
        let life: time::Duration = self.window.not_after - self.window.not_before;
        self.window.not_after - now < (life / 5_i32).min(time::Duration::days(30))
    }

    fn mint(&self, order: &Order<'_>, validity: Validity, serial: SerialNumber) -> Result<Issued, Error> {
        sign(
            &*self.key,
            &Template {
                profile: &order.profile,
                serial,
                signature_algorithm: self.key.public().kind().signature_algorithm(),
                issuer: &self.certificate.subject,
                authority_identifier: &self.authority_identifier,
                validity,
                subject: &order.profile.subject(order.key),
                key: order.key,
            },
        )
    }

    /// The CA's certificate.
    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// What is delivered behind a leaf: the CA's certificate and those above, without the root; empty for a root.
    pub fn chain(&self) -> &[Certificate] {
        &self.chain
    }

    /// Whether it signs and delivers the same as another.
    pub fn is_same(&self, other: &Self) -> bool {
        self.certificate == other.certificate && self.chain == other.chain && self.bundle == other.bundle
    }

    /// The roots.
    pub fn bundle(&self) -> &Arc<TrustBundle> {
        &self.bundle
    }

    /// Whether a signature takes so long that others should not wait for it on the same thread.
    pub fn signs_slowly(&self) -> bool {
        matches!(self.key.public().kind(), KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096)
    }

    /// When it can issue, which no certificate of it outlives.
    pub fn window(&self) -> Validity {
        self.window
    }

    /// A leaf and the certificates between it and the root, as PEM.
    pub fn chain_pem(&self, leaf: &Issued) -> String {
        let mut text = String::with_capacity(leaf.der.len() * 4 / 3 + 100 + self.chain_pem.len());
        pem::encode_into(&mut text, pem::CERTIFICATE, &leaf.der);
        text.push_str(&self.chain_pem);
        text
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "issuer {}", self.certificate.serial_text())
    }
}

/// Makes a root, which is signed by its own key.
pub fn root(
    key: &dyn IssuerKey,
    profile: &Profile<'_>,
    lifetime: Lifetime,
    now: OffsetDateTime,
    serial: SerialNumber,
) -> Result<Issued, Error> {
    let public = key.public();
    let subject = profile.subject(public);
    sign(
        key,
        &Template {
            profile,
            serial,
            signature_algorithm: public.kind().signature_algorithm(),
            issuer: &subject,
            authority_identifier: &public.identifier(),
            validity: Validity::below(None, now, lifetime),
            subject: &subject,
            key: public,
        },
    )
}

/// The one place where a certificate is signed.
fn sign(key: &dyn IssuerKey, template: &Template<'_>) -> Result<Issued, Error> {
    let tbs = template.to_der();
    let signature = key.sign(&tbs)?;
    let mut der = Writer::with_capacity(tbs.len() + signature.len() + 32);
    der.sequence(|w| {
        w.raw(&tbs);
        w.raw(template.signature_algorithm);
        w.bits(&signature);
    });
    let der = der.finish();
    check(&der, template)?;
    Ok(Issued { der, serial: template.serial, validity: template.validity })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::keys;
    use time::macros::datetime;

    const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);

    fn domain() -> TrustDomain {
        TrustDomain::parse("cluster.local").unwrap()
    }

    fn self_signed(kind: KeyKind) -> Issuer {
        let key = keys::generate(kind).unwrap().signing().unwrap();
        let organization = "example".parse().unwrap();
        let profile = Profile::Root { organization: &organization, trust_domain: &domain() };
        let serial = keys::serial_number().unwrap();
        let root = root(&key, &profile, "10y".parse().unwrap(), NOW, serial).unwrap();
        let root = Certificate::from_der(root.der()).unwrap();
        let bundle = TrustBundle::new([root.clone()]).unwrap();
        Issuer::new(Arc::new(key), &[root], bundle, &domain()).unwrap()
    }

    #[test]
    fn a_leaf_of_each_kind_below_each_kind_of_root_is_accepted() {
        for root in [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519] {
            let issuer = self_signed(root);
            for leaf in [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519] {
                let key = keys::generate(leaf).unwrap();
                let id = ServiceAccount::new("a", "b").unwrap().spiffe_id(&domain());
                let order = Order {
                    profile: Profile::Workload {
                        id: &id,
                        dns: &["b.a.svc".parse().unwrap()],
                        proved_at: None,
                    },
                    key: key.public(),
                    lifetime: "24h".parse().unwrap(),
                };
                let issued = issuer.issue(&order, NOW, keys::serial_number().unwrap()).unwrap();
                let leaf = Certificate::from_der(issued.der()).unwrap();
                let root = &issuer.bundle().roots()[0];
                assert_eq!(leaf.key_identifier.as_deref(), Some(&key.public().identifier()[..]));
                assert_eq!(root.key_identifier.as_deref(), Some(&issuer.key.public().identifier()[..]));
                assert_eq!(chain::verify(&[leaf], issuer.bundle(), Some(&id), NOW), Ok(id));
            }
        }
    }

    #[test]
    fn nobody_of_another_trust_domain_is_named() {
        let issuer = self_signed(KeyKind::P256);
        let key = keys::generate(KeyKind::P256).unwrap();
        let other = TrustDomain::parse("example.org").unwrap();
        let id = ServiceAccount::new("a", "b").unwrap().spiffe_id(&other);
        let organization = "example".parse().unwrap();
        for profile in [
            Profile::Workload { id: &id, dns: &[], proved_at: None },
            Profile::Intermediate { organization: &organization, trust_domain: &other },
        ] {
            let order = Order { profile, key: key.public(), lifetime: "24h".parse().unwrap() };
            let refused = issuer.issue(&order, NOW, keys::serial_number().unwrap()).unwrap_err();
            assert_eq!(refused.reason(), "foreign_trust_domain");
        }
    }

    #[test]
    fn an_issuer_outside_its_time_issues_nothing() {
        let issuer = self_signed(KeyKind::P256);
        let key = keys::generate(KeyKind::P256).unwrap();
        let id = ServiceAccount::new("a", "b").unwrap().spiffe_id(&domain());
        let order = Order {
            profile: Profile::Workload { id: &id, dns: &[], proved_at: None },
            key: key.public(),
            lifetime: "90d".parse().unwrap(),
        };
        let issue = |now| issuer.issue(&order, now, keys::serial_number().unwrap());
        let Validity { not_before, not_after } = issuer.window();
        let second = time::Duration::SECOND;
        assert_eq!(issue(not_before - second).unwrap_err(), Error::NotYetValid(not_before));
        assert_eq!(issue(not_after + second).unwrap_err(), Error::Expired(not_after));
        assert_eq!(issue(not_after - second).unwrap().validity.not_after, not_after);
        assert_eq!(issue(not_before).unwrap().validity.not_before, not_before);
    }

    #[test]
    fn an_intermediate_signs_leaves_and_no_intermediates() {
        let root = self_signed(KeyKind::P384);
        let key = keys::generate(KeyKind::P256).unwrap();
        let organization = "example".parse().unwrap();
        let profile = Profile::Intermediate { organization: &organization, trust_domain: &domain() };
        let order = Order { profile, key: key.public(), lifetime: "1y".parse().unwrap() };
        let issued = root.issue(&order, NOW, keys::serial_number().unwrap()).unwrap();
        let certificate = Certificate::from_der(issued.der()).unwrap();
        let signing = Arc::new(key.signing().unwrap());
        let bundle = TrustBundle::clone(root.bundle());
        let with_root = [certificate.clone(), root.certificate().clone()];
        let issuer = Issuer::new(signing.clone(), &with_root, bundle.clone(), &domain()).unwrap();
        assert_eq!(issuer.chain(), std::slice::from_ref(&certificate));
        assert_eq!(issuer.window(), certificate.validity);
        let refused = issuer.issue(&order, NOW, keys::serial_number().unwrap());
        assert_eq!(refused.unwrap_err(), Error::PathLength);
        let other = TrustDomain::parse("example.org").unwrap();
        let refused = Issuer::new(signing, &[certificate], bundle, &other);
        assert!(matches!(refused, Err(Error::TrustDomain { .. })));
    }

    #[test]
    fn a_foreign_key_or_root_makes_no_issuer() {
        let (a, b) = (self_signed(KeyKind::P256), self_signed(KeyKind::P256));
        let refused = |certificates: &Issuer, bundle: &Issuer| {
            let bundle = TrustBundle::clone(bundle.bundle());
            Issuer::new(a.key.clone(), std::slice::from_ref(&certificates.certificate), bundle, &domain())
                .unwrap_err()
        };
        assert!(matches!(refused(&b, &a), Error::KeyMismatch(_)));
        assert!(matches!(refused(&a, &b), Error::Path(_)));
    }
}
