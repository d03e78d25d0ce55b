//! What the agent counts.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::Agent;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Identity {
    identity: String,
}

/// Counters of one agent.
#[derive(Debug)]
pub(super) struct Metrics {
    obtained: Counter,
    failed: Family<Reason, Counter>,
    seconds: Histogram,
    file_failures: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            obtained: Counter::default(),
            failed: Family::default(),
            seconds: Histogram::new([0.005, 0.025, 0.1, 0.5, 2.5, 10.0]),
            file_failures: Counter::default(),
        }
    }
}

impl Metrics {
    pub(super) fn obtained(&self) {
        self.obtained.inc();
    }

    pub(super) fn failed(&self, reason: &'static str) {
        self.failed.get_or_create(&Reason { reason }).inc();
    }

    pub(super) fn asked(&self, time: Duration) {
        self.seconds.observe(time.as_secs_f64());
    }

    pub(super) fn file_failure(&self) {
        self.file_failures.inc();
    }

    pub(super) fn register(&self, registry: &mut Registry, agent: &Arc<Agent>) {
        registry.register(
            "mica_agent_certificates_obtained",
            "Certificates that the authority issued to this agent",
            self.obtained.clone(),
        );
        registry.register(
            "mica_agent_failures",
            "Times that a certificate was not obtained, by reason",
            self.failed.clone(),
        );
        registry.register(
            "mica_agent_request_seconds",
            "Time from making a key to the judged answer, failures included",
            self.seconds.clone(),
        );
        registry.register(
            "mica_agent_file_failures",
            "Times that files could not be written",
            self.file_failures.clone(),
        );
        registry.register_collector(Box::new(Holdings(Arc::downgrade(agent))));
    }
}

/// What is held, read when it is asked for.
struct Holdings(Weak<Agent>);

impl fmt::Debug for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("holdings of the agent")
    }
}

impl Collector for Holdings {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(agent) = self.0.upgrade() else { return Ok(()) };
        let all = agent.held.all();
        let gauge = ConstGauge::new(0i64);
        let mut expiry = encoder.encode_descriptor(
            "mica_agent_certificate_expiry_timestamp_seconds",
            "When each identity's certificate ends",
            None,
            gauge.metric_type(),
        )?;
        for (id, svid, _) in &all {
            let Some(svid) = svid else { continue };
            let identity = Identity { identity: id.to_string() };
            ConstGauge::new(svid.not_after().unix_timestamp()).encode(expiry.encode_family(&identity)?)?;
        }
        let mut watchers = encoder.encode_descriptor(
            "mica_agent_watchers",
            "Streams and folders that follow each identity",
            None,
            gauge.metric_type(),
        )?;
        for (id, _, count) in &all {
            let identity = Identity { identity: id.to_string() };
            let count = i64::try_from(*count).unwrap_or(i64::MAX);
            ConstGauge::new(count).encode(watchers.encode_family(&identity)?)?;
        }
        let waiting = all.iter().filter(|(_, svid, _)| svid.is_none()).count();
        let waiting = ConstGauge::new(i64::try_from(waiting).unwrap_or(i64::MAX));
        let descriptor = encoder.encode_descriptor(
            "mica_agent_identities_waiting",
            "Identities that there is no certificate for yet",
            None,
            waiting.metric_type(),
        )?;
        waiting.encode(descriptor)
    }
}
