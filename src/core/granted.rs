//! The answer to a CSR, judged as the strictest of its readers and its peers would.

use std::fmt;

use time::OffsetDateTime;

use super::bundle::{self, TrustBundle};
use super::certificate::{self, Certificate};
use super::chain;
use super::key::PublicKey;
use super::spiffe::{ServiceAccount, SpiffeId};
use super::token::Token;

/// Why an answer is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too few elements.
    #[error("it holds {0} elements, and a leaf and a trust bundle are two")]
    Elements(usize),
    /// The last element.
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// Another element cannot be read.
    #[error("element {number}: {fault}")]
    Unreadable {
        /// Which, from 1.
        number: usize,
        /// What is wrong.
        fault: certificate::Error,
    },
    /// Another element is more than one certificate.
    #[error("element {number} holds {count} certificates, not one")]
    Several {
        /// Which, from 1.
        number: usize,
        /// So many.
        count: usize,
    },
    /// Somebody else's.
    #[error("the certificate is for another key than the one that was sent")]
    OtherKey,
    /// What peers would refuse.
    #[error("{}", shown(.0))]
    Chain(Vec<chain::Fault>),
    /// What peers would refuse that know more than the authority has told.
    #[error("its chain leads to none of the roots that peers hold: {}", shown(.0))]
    Unknown(Vec<chain::Fault>),
    /// Somebody else's than the credential.
    #[error("the certificate names {found}, and what was shown for it is {claim}")]
    Stranger {
        /// Whom the leaf names.
        found: SpiffeId,
        /// Of whom the credential is.
        claim: Claim,
    },
}

/// Of whom a credential is by its own word, which proves nothing and has to be that of the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// A service account, of whatever trust domain.
    Token(ServiceAccount),
    /// This very identity.
    Certificate(SpiffeId),
}

impl Claim {
    /// Of a token; none if it is not of a service account.
    pub fn of_token(text: &str) -> Option<Self> {
        Token::read(text).ok()?.claimed_account().ok().map(Self::Token)
    }

    /// Of a certificate; none if that is no SVID.
    pub fn of_certificate(leaf: &Certificate) -> Option<Self> {
        leaf.spiffe_id().ok().map(Self::Certificate)
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(account) => write!(f, "a token of the service account {account}"),
            Self::Certificate(id) => write!(f, "a certificate of {id}"),
        }
    }
}

/// An answer that is what it should be.
#[derive(Debug)]
pub struct Granted {
    /// The leaf, then its intermediates.
    pub chain: Vec<Certificate>,
    /// The trust bundle that came with it.
    pub bundle: TrustBundle,
    /// Whom the leaf names.
    pub id: SpiffeId,
}

impl Granted {
    /// One certificate in each element, but for the last, which is the trust bundle: most often one that is known, and need
    /// not be read again.
    pub fn checked(
        answer: &[String],
        key: &PublicKey,
        expected: Option<&SpiffeId>,
        known: Option<&TrustBundle>,
        now: OffsetDateTime,
    ) -> Result<Self, Error> {
        let Some((bundle, above)) = answer.split_last().filter(|(_, above)| !above.is_empty()) else {
            return Err(Error::Elements(answer.len()));
        };
        let bundle = TrustBundle::from_pem_or_known(bundle, known)?;
        let mut chain = Vec::new();
        for (element, number) in above.iter().zip(1..) {
            let certificates = Certificate::all_from_pem(element.as_bytes())
                .map_err(|fault| Error::Unreadable { number, fault })?;
            let [certificate] = <[Certificate; 1]>::try_from(certificates)
                .map_err(|several| Error::Several { number, count: several.len() })?;
            chain.push(certificate);
        }
        if chain[0].spki != key.spki() {
            return Err(Error::OtherKey);
        }
        let id = chain::verify(&chain, &bundle, expected, now).map_err(Error::Chain)?;
        Ok(Self { chain, bundle, id })
    }

    /// Whether it is of whom the credential is that was shown for it.
    pub fn is_of(&self, claim: &Claim) -> Result<(), Error> {
        let same = match claim {
            Claim::Token(account) => ServiceAccount::of(&self.id).as_ref() == Some(account),
            Claim::Certificate(id) => self.id == *id,
        };
        match same {
            true => Ok(()),
            false => Err(Error::Stranger { found: self.id.clone(), claim: claim.clone() }),
        }
    }

    /// The leaf and its intermediates.
    pub fn chain_pem(&self) -> String {
        self.chain.iter().map(Certificate::to_pem).collect()
    }
}

/// Whether those accept a chain who hold other roots of the trust domain than came with it.
pub fn accepted_by(
    chain: &[Certificate],
    id: &SpiffeId,
    roots: &TrustBundle,
    now: OffsetDateTime,
) -> Result<(), Error> {
    chain::verify(chain, roots, Some(id), now).map(drop).map_err(Error::Unknown)
}

fn shown(faults: &[chain::Fault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use time::macros::datetime;

    use super::super::issuer::{Issuer, Order, root};
    use super::super::key::{KeyKind, PrivateKey};
    use super::super::profile::Profile;
    use super::super::spiffe::TrustDomain;
    use super::*;
    use crate::sys::keys;

    const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);

    fn domain() -> TrustDomain {
        TrustDomain::parse("cluster.local").unwrap()
    }

    fn id(name: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{name}")).unwrap()
    }

    fn authority() -> Issuer {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let organization = "example".parse().unwrap();
        let profile = Profile::Root { organization: &organization, trust_domain: &domain() };
        let made = root(&key, &profile, "10y".parse().unwrap(), NOW, keys::serial_number().unwrap()).unwrap();
        let made = Certificate::from_der(made.der()).unwrap();
        let bundle = TrustBundle::new([made.clone()]).unwrap();
        Issuer::new(Arc::new(key), &[made], bundle, &domain()).unwrap()
    }

    fn leaf(issuer: &Issuer, key: &PrivateKey, name: &str) -> String {
        let id = id(name);
        let profile = Profile::Workload { id: &id, dns: &[], proved_at: None };
        let order = Order { profile, key: key.public(), lifetime: "1h".parse().unwrap() };
        let issued = issuer.issue(&order, NOW, keys::serial_number().unwrap()).unwrap();
        Certificate::from_der(issued.der()).unwrap().to_pem()
    }

    #[test]
    fn what_peers_would_refuse_is_refused() {
        let (ours, other) = (authority(), authority());
        let key = keys::generate(KeyKind::P256).unwrap();
        let roots = ours.bundle().pem().to_string();
        let web = leaf(&ours, &key, "web");
        let judged = |answer: &[String], at| {
            let judged = |known| {
                let granted = Granted::checked(answer, key.public(), Some(&id("web")), known, at);
                granted.map(|granted| (granted.id, granted.bundle.sequence))
            };
            let anew = judged(None);
            let mut numbered = TrustBundle::clone(ours.bundle());
            numbered.sequence = Some(7);
            assert_eq!(judged(Some(&numbered)), anew);
            assert_eq!(judged(Some(other.bundle())), anew);
            anew.map(|(id, _)| id)
        };
        assert_eq!(judged(&[web.clone(), roots.clone()], NOW), Ok(id("web")));

        assert_eq!(judged(&[], NOW), Err(Error::Elements(0)));
        assert_eq!(judged(std::slice::from_ref(&web), NOW), Err(Error::Elements(1)));
        let both = format!("{web}{web}");
        assert_eq!(judged(&[both, roots.clone()], NOW), Err(Error::Several { number: 1, count: 2 }));
        assert!(matches!(
            judged(&["-".to_owned(), roots.clone()], NOW),
            Err(Error::Unreadable { number: 1, .. })
        ));
        assert!(matches!(judged(&[web.clone(), String::new()], NOW), Err(Error::Bundle(_))));
        // A leaf where the roots belong.
        assert!(matches!(judged(&[web.clone(), web.clone()], NOW), Err(Error::Bundle(_))));
        let chain = |answer: &[String], at| matches!(judged(answer, at), Err(Error::Chain(_)));
        assert!(chain(&[web.clone(), other.bundle().pem().to_string()], NOW), "another root");
        assert!(chain(&[leaf(&ours, &key, "db"), roots.clone()], NOW), "somebody else's");
        assert!(chain(&[web.clone(), roots.clone()], NOW + time::Duration::hours(2)), "expired");
        assert!(chain(&[web.clone(), roots.clone()], NOW - time::Duration::hours(2)), "not yet valid");
        let theirs = keys::generate(KeyKind::P256).unwrap();
        assert_eq!(judged(&[leaf(&ours, &theirs, "web"), roots.clone()], NOW), Err(Error::OtherKey));
    }

    #[test]
    fn an_answer_is_of_whom_the_credential_is() {
        let ours = authority();
        let key = keys::generate(KeyKind::P256).unwrap();
        let answer = [leaf(&ours, &key, "web"), ours.bundle().pem().to_string()];
        let granted = Granted::checked(&answer, key.public(), None, None, NOW).unwrap();
        let account = |namespace, name| Claim::Token(ServiceAccount::new(namespace, name).unwrap());
        assert_eq!(granted.is_of(&account("shop", "web")), Ok(()));
        assert_eq!(granted.is_of(&Claim::Certificate(id("web"))), Ok(()));
        let elsewhere = SpiffeId::parse("spiffe://example.org/ns/shop/sa/web").unwrap();
        for other in [
            account("shop", "db"),
            account("web", "shop"),
            Claim::Certificate(id("db")),
            Claim::Certificate(elsewhere),
        ] {
            assert!(matches!(granted.is_of(&other), Err(Error::Stranger { .. })), "{other}");
        }
    }

    #[test]
    fn tokens_of_service_accounts_claim_one_and_others_nobody() {
        let token = |claims: &str| {
            let encoded = super::super::jwt_svid::encoded;
            Claim::of_token(&format!("{}.{}.eA", encoded(r#"{"alg":"ES256"}"#), encoded(claims)))
        };
        let web = Claim::Token(ServiceAccount::new("shop", "web").unwrap());
        assert_eq!(token(r#"{"sub":"system:serviceaccount:shop:web"}"#), Some(web));
        for other in [
            r#"{"sub":"repo:example/shop"}"#,
            r#"{"sub":"system:serviceaccount:shop"}"#,
            r#"{"sub":"system:serviceaccount:shop:web:x"}"#,
            r#"{"sub":"system:node:a"}"#,
            r#"{"sub":7}"#,
            "{}",
            "",
        ] {
            assert_eq!(token(other), None, "{other}");
        }
        assert_eq!(Claim::of_token("opaque"), None);
    }

    /// The authority has gone over to a root that peers do not hold yet.
    #[test]
    fn a_chain_to_a_root_that_peers_do_not_hold_is_refused() {
        let (ours, next) = (authority(), authority());
        let key = keys::generate(KeyKind::P256).unwrap();
        let answer = [leaf(&next, &key, "web"), next.bundle().pem().to_string()];
        let granted = Granted::checked(&answer, key.public(), None, None, NOW).unwrap();
        let held = ours.bundle();
        assert!(matches!(accepted_by(&granted.chain, &granted.id, held, NOW), Err(Error::Unknown(_))));
        let both = held.merged(next.bundle()).unwrap();
        assert_eq!(accepted_by(&granted.chain, &granted.id, &both, NOW), Ok(()));
    }
}
