//! What is counted of the API server.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::live::Found;
use super::objects::Objects;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Resource {
    resource: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

/// Counters of watches and single reads.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    watch_failures: Family<Resource, Counter>,
    reads: Family<Outcome, Counter>,
}

impl Metrics {
    pub(super) fn watched(&self, resource: &str) {
        drop(self.watch_failures.get_or_create(&Resource { resource: resource.to_owned() }));
    }

    pub(super) fn watch_failed(&self, resource: &str) {
        self.watch_failures.get_or_create(&Resource { resource: resource.to_owned() }).inc();
    }

    pub(super) fn read(&self, found: &Found) {
        let outcome = match found {
            Ok(Some(_)) => "found",
            Ok(None) => "none",
            Err(_) => "failed",
        };
        self.reads.get_or_create(&Outcome { outcome }).inc();
    }
}

impl Objects {
    /// Registers what is counted.
    pub fn register(self: &Arc<Self>, registry: &mut Registry) {
        let metrics = self.metrics();
        registry.register(
            "mica_kube_watch_failures",
            "Times that watching the API server failed and was tried again",
            metrics.watch_failures.clone(),
        );
        registry.register(
            "mica_kube_reads",
            "Single reads for what the watches had not told: found, none or failed",
            metrics.reads.clone(),
        );
        registry.register_collector(Box::new(Known(self.clone())));
    }
}

/// How many objects are known now.
#[derive(Debug)]
struct Known(Arc<Objects>);

impl Collector for Known {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let kind = ConstGauge::new(0u64).metric_type();
        let help = "Objects of the API server that are known";
        let mut family = encoder.encode_descriptor("mica_kube_objects", help, None, kind)?;
        for (resource, count) in self.0.counts() {
            ConstGauge::new(count as u64).encode(family.encode_family(&[("resource", resource)])?)?;
        }
        Ok(())
    }
}
