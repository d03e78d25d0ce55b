//! What the authority counts, under Istio's names where Istio has one.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use time::OffsetDateTime;

use super::{Authority, JwtError};
use crate::sys::clock;
use crate::telemetry::Unsuffixed;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    why: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Counters of the one door.
#[derive(Debug, Default)]
pub struct Metrics {
    issued: Family<Why, Counter>,
    failed: Family<Reason, Counter>,
    all_issued: Unsuffixed,
    all_failed: Unsuffixed,
    tokens: Counter,
    tokens_failed: Family<Reason, Counter>,
    reload_failures: Counter,
    stale: Gauge,
}

impl Metrics {
    pub(super) fn issued(&self, why: &str) {
        let word = why.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default();
        self.issued.get_or_create(&Why { why: word.to_owned() }).inc();
        self.all_issued.inc();
    }

    pub(super) fn failed(&self, reason: &'static str) {
        self.failed.get_or_create(&Reason { reason }).inc();
        self.all_failed.inc();
    }

    pub(super) fn token_issued(&self) {
        self.tokens.inc();
    }

    pub(super) fn token_failed(&self, reason: &'static str) {
        self.tokens_failed.get_or_create(&Reason { reason }).inc();
    }

    /// Counts an authority that was brought anew and could not be taken.
    pub fn reload_failed(&self) {
        self.reload_failures.inc();
        self.stale.set(1);
    }

    /// Takes that the store has what is in use.
    pub fn reloaded(&self) {
        self.stale.set(0);
    }
}

impl Authority {
    /// Registers the authority's metrics.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        let metrics = &self.metrics;
        registry.register(
            "mica_certificates_issued",
            "Certificates issued, by why: new, renewal, repair or serving",
            metrics.issued.clone(),
        );
        registry.register(
            "mica_issue_failures",
            "Certificates not issued, by reason",
            metrics.failed.clone(),
        );
        registry.register("mica_jwt_svids_issued", "JWT-SVIDs issued", metrics.tokens.clone());
        for reason in JwtError::REASONS {
            drop(metrics.tokens_failed.get_or_create(&Reason { reason }));
        }
        registry.register(
            "mica_jwt_svid_failures",
            "JWT-SVIDs that could not be signed, by reason",
            metrics.tokens_failed.clone(),
        );
        registry.register(
            "mica_authority_reload_failures",
            "Changes of the brought authority that were not taken",
            metrics.reload_failures.clone(),
        );
        registry.register(
            "mica_authority_stale",
            "1 while what is in use is not what is kept, since that cannot be used, else 0",
            metrics.stale.clone(),
        );
        registry.register(
            "citadel_server_success_cert_issuance_count",
            "Certificates issued, the gRPC port's own included",
            metrics.all_issued.clone(),
        );
        registry.register(
            "citadel_server_csr_sign_err_count",
            "Certificates that could not be signed",
            metrics.all_failed.clone(),
        );
        registry.register_collector(Box::new(Expiry(self.clone())));
    }
}

/// What depends on the time of the scrape.
struct Expiry(Arc<Authority>);

impl std::fmt::Debug for Expiry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Expiry")
    }
}

impl Collector for Expiry {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let issuer = self.0.issuer();
        let now = clock::now();
        let roots = issuer.bundle().roots().iter().map(|root| root.validity.not_after).min();
        let bundles = self.0.bundles().borrow().clone();
        let sequence = ConstGauge::new(bundles.own.as_ref().and_then(|own| own.sequence).unwrap_or(0));
        let help = "Number of the trust bundle (spiffe_sequence), 0 while there is none";
        sequence.encode(encoder.encode_descriptor(
            "mica_bundle_sequence",
            help,
            None,
            sequence.metric_type(),
        )?)?;
        let ending = ConstGauge::new(u64::from(issuer.is_ending(now)));
        let help = "1 while less than a fifth of the issuer's time, and less than 30 days, are left, else 0";
        ending.encode(encoder.encode_descriptor(
            "mica_authority_ending",
            help,
            None,
            ending.metric_type(),
        )?)?;
        let left = |at: OffsetDateTime| (at - now).whole_seconds();
        for (prefix, what, not_after) in [
            ("citadel_server_root_cert_expiry", "first root to expire", roots.unwrap_or(now)),
            (
                "citadel_server_cert_chain_expiry",
                "issuer, or a certificate above it,",
                issuer.window().not_after,
            ),
        ] {
            let help = format!("When the {what} expires, in seconds since 1970");
            let gauge = ConstGauge::new(not_after.unix_timestamp());
            let name = format!("{prefix}_timestamp");
            gauge.encode(encoder.encode_descriptor(&name, &help, None, gauge.metric_type())?)?;
            let help = format!("Seconds until the {what} expires, negative afterwards");
            let gauge = ConstGauge::new(left(not_after));
            let name = format!("{prefix}_seconds");
            gauge.encode(encoder.encode_descriptor(&name, &help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
