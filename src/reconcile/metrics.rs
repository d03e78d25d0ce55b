//! What the loop counts.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::core::plan::Why;
use crate::telemetry::Unsuffixed;

/// How an account stands that should have an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum State {
    /// It has a good one.
    Good,
    /// It has none, or none that is good, yet.
    Waiting,
    /// Its place is taken by something that Mica did not write.
    Foreign,
}

impl EncodeLabelValue for State {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        let name = match self {
            Self::Good => "good",
            Self::Waiting => "waiting",
            Self::Foreign => "foreign",
        };
        EncodeLabelValue::encode(&name, encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Of {
    state: State,
}

/// Counters and gauges of the loop.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    identities: Family<Of, Gauge>,
    failures: Counter,
    refused: Counter,
    created: Unsuffixed,
    deleted: Unsuffixed,
    repaired: Unsuffixed,
}

impl Metrics {
    /// Registers all of them. Istio's names are those of its controller of secrets, kept without `_total`.
    pub fn register(&self, registry: &mut Registry) {
        for state in [State::Good, State::Waiting, State::Foreign] {
            drop(self.identities.get_or_create(&Of { state }));
        }
        registry.register("mica_identities", "Accounts by how they stand", self.identities.clone());
        registry.register(
            "mica_delivery_failures",
            "Attempts to read, deliver or remove an identity that failed",
            self.failures.clone(),
        );
        registry.register(
            "mica_delivery_wishes_refused",
            "Annotations and DNS names of accounts that were not granted, each time something was delivered without them",
            self.refused.clone(),
        );
        registry.register(
            "citadel_secret_controller_svc_acc_created_cert_count",
            "Identities delivered because an account came, since the start",
            self.created.clone(),
        );
        registry.register(
            "citadel_secret_controller_svc_acc_deleted_cert_count",
            "Identities removed because an account went, since the start",
            self.deleted.clone(),
        );
        registry.register(
            "citadel_secret_controller_secret_deleted_cert_count",
            "Identities delivered again because what was delivered was gone or not good, since the start",
            self.repaired.clone(),
        );
    }

    /// Nothing is known yet: what another loop has counted is over.
    pub(super) fn begin(&self) {
        for state in [State::Good, State::Waiting, State::Foreign] {
            self.identities.get_or_create(&Of { state }).set(0);
        }
    }

    pub(super) fn delivered(&self, why: &Why) {
        match why {
            Why::New => self.created.inc(),
            Why::Repair(_) => self.repaired.inc(),
            Why::Renewal => {}
        }
    }

    pub(super) fn removed(&self) {
        self.deleted.inc();
    }

    pub(super) fn failed(&self) {
        self.failures.inc();
    }

    pub(super) fn refused(&self, wishes: usize) {
        self.refused.inc_by(wishes as u64);
    }

    pub(super) fn moved(&self, from: Option<State>, to: Option<State>) {
        if from == to {
            return;
        }
        if let Some(state) = from {
            self.identities.get_or_create(&Of { state }).dec();
        }
        if let Some(state) = to {
            self.identities.get_or_create(&Of { state }).inc();
        }
    }
}
