//! The living CA. Every certificate that a running Mica issues goes through [`Authority::issue`].

mod bundles;
mod jwt;
mod metrics;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::Notify;
use tokio::sync::watch::Sender;
use tokio::time::Instant;

pub use bundles::Bundles;
pub use jwt::{JwtError, JwtGrant, JwtOrder, Keeper};
pub use metrics::Metrics;

use crate::core::issuer::{self, Issued, Issuer, Order};
use crate::core::keyring::Keyring;
use crate::core::spiffe::TrustDomain;
use crate::core::trace::TraceId;
use crate::sys::{clock, keys};

/// Whether the issuer is about to end is looked at this often,
const LOOK: Duration = Duration::from_secs(60);
/// and said this often.
const REMINDER: Duration = Duration::from_secs(60 * 60);

/// Why nothing was issued.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The issuer would not, or could not.
    #[error(transparent)]
    Issuer(#[from] issuer::Error),
    /// No serial number.
    #[error(transparent)]
    Keys(#[from] keys::Error),
}

impl Error {
    /// A short fixed name.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Issuer(e) => e.reason(),
            Self::Keys(_) => "no_randomness",
        }
    }
}

/// What was issued, with the chain and the bundle of the same moment: one snapshot of the issuer makes all three.
#[derive(Clone, Debug)]
pub struct Grant {
    /// The certificate.
    pub issued: Issued,
    /// Who issued it: its chain and its bundle are the certificate's.
    pub issuer: Arc<Issuer>,
}

impl Grant {
    /// The certificate and its intermediates, PEM.
    pub fn chain_pem(&self) -> String {
        self.issuer.chain_pem(&self.issued)
    }
}

/// Why a certificate is issued, for the log and the metrics.
#[derive(Clone, Copy, Debug)]
pub struct Cause<'a> {
    /// In words, of which the metrics count the first.
    pub why: &'a str,
    /// Who vouched for the caller, if one asked.
    pub authenticator: Option<&'static str>,
    /// Where the caller is.
    pub source: Option<IpAddr>,
    /// The trace that the caller's request belongs to.
    pub trace: Option<TraceId>,
}

impl<'a> Cause<'a> {
    /// Without a caller: Mica issues of itself.
    pub fn own(why: &'a str) -> Self {
        Self { why, authenticator: None, source: None, trace: None }
    }
}

/// The running CA of one trust domain.
pub struct Authority {
    trust_domain: TrustDomain,
    issuer: ArcSwap<Issuer>,
    keyring: ArcSwapOption<Keyring>,
    bundles: Sender<Arc<Bundles>>,
    replaced: Notify,
    metrics: Metrics,
}

impl Authority {
    /// Begins with an issuer.
    pub fn new(trust_domain: TrustDomain, issuer: Issuer) -> Self {
        Self {
            trust_domain,
            issuer: ArcSwap::from_pointee(issuer),
            keyring: ArcSwapOption::empty(),
            bundles: Sender::default(),
            replaced: Notify::new(),
            metrics: Metrics::default(),
        }
    }

    /// The one door.
    pub fn issue(&self, order: &Order<'_>, now: OffsetDateTime, cause: &Cause<'_>) -> Result<Grant, Error> {
        let issuer = self.issuer.load_full();
        let issued = keys::serial_number()
            .map_err(Error::from)
            .and_then(|serial| Ok(issuer.issue(order, now, serial)?))
            .inspect_err(|e| self.metrics.failed(e.reason()))?;
        let Cause { why, authenticator, source, trace } = cause;
        self.metrics.issued(why);
        let identity = order.profile.name();
        let not_after = issued.validity.not_after.format(&Rfc3339).unwrap_or_default();
        tracing::info!(
            %identity,
            serial = %issued.serial,
            %not_after,
            why,
            authenticator,
            source = source.map(tracing::field::display),
            trace = trace.map(tracing::field::display),
            "certificate issued"
        );
        Ok(Grant { issued, issuer })
    }

    /// The issuer as it is now.
    pub fn issuer(&self) -> Arc<Issuer> {
        self.issuer.load_full()
    }

    /// Takes another issuer below the same roots. Nothing that was issued is touched: it stays valid, and those who hear
    /// of it are told to renew.
    pub fn replace(&self, issuer: Issuer) {
        self.issuer.store(Arc::new(issuer));
        self.bundles.send_modify(|bundles| {
            *bundles =
                Arc::new(Bundles { renew_issued_before: Some(clock::now()), ..Bundles::clone(bundles) });
        });
        self.replaced.notify_one();
    }

    /// Says again and again that the issuer is about to end, for ever.
    pub async fn watch_over(&self) {
        let mut said: Option<Instant> = None;
        loop {
            let (issuer, now) = (self.issuer(), clock::now());
            let ends = issuer.window().not_after;
            if !issuer.is_ending(now) {
                said = None;
            } else if said.is_none_or(|said| said.elapsed() >= REMINDER) {
                said = Some(Instant::now());
                let not_after = ends.format(&Rfc3339).unwrap_or_default();
                let hours_left = (ends - now).whole_hours();
                tracing::error!(not_after, hours_left, "the authority ends soon: nothing can be issued then");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Its trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Its counters.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}
