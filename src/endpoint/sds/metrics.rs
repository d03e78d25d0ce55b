//! What SDS counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Resource {
    resource: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Counters of one endpoint.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    streams: Family<Method, Gauge>,
    sent: Family<Resource, Counter>,
    acknowledged: Family<Resource, Counter>,
    rejected: Family<Resource, Counter>,
    refused: Family<Reason, Counter>,
}

impl Metrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register("mica_sds_streams", "Open streams of proxies, by method", self.streams.clone());
        registry.register("mica_sds_sent", "Resources that were sent to proxies, by kind", self.sent.clone());
        registry.register(
            "mica_sds_acknowledged",
            "Resources that proxies said they took, by kind",
            self.acknowledged.clone(),
        );
        registry.register(
            "mica_sds_rejected",
            "Resources that proxies said they did not take, by kind",
            self.rejected.clone(),
        );
        registry.register(
            "mica_sds_names_refused",
            "Names that proxies asked for and got nothing by, by reason",
            self.refused.clone(),
        );
    }

    /// Counts a stream for as long as what is returned lives.
    pub(super) fn stream(&self, method: &'static str) -> Open {
        let streams = self.streams.get_or_create_owned(&Method { method });
        streams.inc();
        Open(streams)
    }

    pub(super) fn sent(&self, resource: &'static str) {
        self.sent.get_or_create(&Resource { resource }).inc();
    }

    pub(super) fn acknowledged(&self, resource: &'static str) {
        self.acknowledged.get_or_create(&Resource { resource }).inc();
    }

    pub(super) fn rejected(&self, resource: &'static str) {
        self.rejected.get_or_create(&Resource { resource }).inc();
    }

    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }
}

/// One open stream.
#[derive(Debug)]
pub(super) struct Open(Gauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}
