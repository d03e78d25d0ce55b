//! The answer to a CSR, judged as the strictest of its readers and its peers would.

use time::OffsetDateTime;

use super::bundle::{self, TrustBundle};
use super::certificate::{self, Certificate};
use super::chain;
use super::key::PublicKey;
use super::spiffe::SpiffeId;

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
    /// One certificate in each element, but for the last, which is the trust bundle.
    pub fn checked(
        answer: &[String],
        key: &PublicKey,
        expected: Option<&SpiffeId>,
        now: OffsetDateTime,
    ) -> Result<Self, Error> {
        let Some((bundle, above)) = answer.split_last().filter(|(_, above)| !above.is_empty()) else {
            return Err(Error::Elements(answer.len()));
        };
        let bundle = TrustBundle::from_pem(bundle.as_bytes())?;
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
