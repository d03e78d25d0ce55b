//! What the CSR services count, under Istio's names where Istio has one.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::istio;
use crate::core::policy;
use crate::core::refusal::{Code, Reason, Refusal};
use crate::telemetry::Unsuffixed;

/// In seconds: from a tenth of a millisecond, which a signature takes, to what no client waits for.
const BUCKETS: [f64; 13] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Granted {
    method: &'static str,
    authenticator: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    method: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LeftOut {
    reason: &'static str,
}

/// Counters of the CSR services.
#[derive(Clone, Debug)]
pub struct Metrics {
    granted: Family<Granted, Counter>,
    refused: Family<Refused, Counter>,
    duration: Family<Method, Histogram>,
    other_identities: Counter,
    left_out: Family<LeftOut, Counter>,
    asked: Unsuffixed,
    unauthenticated: Unsuffixed,
    unreadable: Unsuffixed,
    unnamed: Unsuffixed,
}

impl Metrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            granted: Family::default(),
            refused: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            other_identities: Counter::default(),
            left_out: Family::default(),
            asked: Unsuffixed::default(),
            unauthenticated: Unsuffixed::default(),
            unreadable: Unsuffixed::default(),
            unnamed: Unsuffixed::default(),
        };
        registry.register(
            "mica_requests_granted",
            "Requests for certificates that were granted, by method and authenticator",
            metrics.granted.clone(),
        );
        registry.register(
            "mica_requests_refused",
            "Requests for certificates that were refused, by method and reason",
            metrics.refused.clone(),
        );
        registry.register_with_unit(
            "mica_request_duration",
            "From a request's arrival to its answer, by method",
            Unit::Seconds,
            metrics.duration.clone(),
        );
        registry.register(
            "mica_requests_for_another_identity",
            "Requests whose CSR named another identity than the caller's, which got its own",
            metrics.other_identities.clone(),
        );
        for why in policy::LeftOut::ALL {
            drop(metrics.left_out.get_or_create(&LeftOut { reason: why.name() }));
        }
        registry.register(
            "mica_dns_names_left_out",
            "DNS names that CSRs asked for and that policy does not grant, by reason",
            metrics.left_out.clone(),
        );
        registry.register(
            "citadel_server_csr_count",
            "Requests for certificates, before anything is known of them",
            metrics.asked.clone(),
        );
        registry.register(
            "citadel_server_authentication_failure_count",
            "Requests for certificates whose caller did not prove who it is",
            metrics.unauthenticated.clone(),
        );
        registry.register(
            "citadel_server_csr_parsing_err_count",
            "Requests for certificates whose CSR could not be used",
            metrics.unreadable.clone(),
        );
        registry.register(
            "citadel_server_id_extraction_err_count",
            "Requests for certificates whose CSR had to name somebody and did not",
            metrics.unnamed.clone(),
        );
        metrics
    }

    pub(super) fn answered(
        &self,
        method: &'static str,
        authenticator: Option<&'static str>,
        refusal: Option<&Refusal>,
        duration: Duration,
    ) {
        let for_a_certificate = [istio::CREATE_CERTIFICATE, istio::CREATE_CERTIFICATES, istio::HANDLE_CSR];
        let is_for_a_certificate = for_a_certificate.contains(&method);
        if is_for_a_certificate {
            self.asked.inc();
        }
        self.duration.get_or_create(&Method { method }).observe(duration.as_secs_f64());
        let Some(refusal) = refusal else {
            let authenticator = authenticator.unwrap_or_default();
            self.granted.get_or_create(&Granted { method, authenticator }).inc();
            return;
        };
        self.refused.get_or_create(&Refused { method, reason: refusal.reason.name() }).inc();
        match refusal.reason {
            // Istio's names are for what Istio's methods do.
            _ if !is_for_a_certificate => {}
            Reason::CsrNames => self.unnamed.inc(),
            Reason::CsrMalformed
            | Reason::CsrSignature
            | Reason::CsrCa
            | Reason::CsrUris
            | Reason::KeyRefused => {
                self.unreadable.inc();
            }
            reason if reason.code() == Code::Unauthenticated => self.unauthenticated.inc(),
            _ => {}
        }
    }

    pub(super) fn another_identity(&self) {
        self.other_identities.inc();
    }

    pub(super) fn left_out(&self, reason: &'static str) {
        self.left_out.get_or_create(&LeftOut { reason }).inc();
    }
}
