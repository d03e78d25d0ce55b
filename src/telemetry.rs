//! The log, one line an event on standard error, for people or as JSON; and the one form of metric that the library
//! lacks.

use std::io::IsTerminal as _;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use tracing::Level;
use tracing_subscriber::fmt;
use tracing_subscriber::fmt::format::FmtSpan;

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Sets up the log of the process. Without a format, people get theirs on a terminal and everything else gets JSON.
pub fn start(format: Option<LogFormat>, level: Level) {
    let terminal = std::io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Human } else { LogFormat::Json });
    // A line that cannot be written, as to a full disk, would otherwise be told on standard error, which panics there.
    let builder = fmt().with_writer(std::io::stderr).with_max_level(level).log_internal_errors(false);
    // A span tells how long it took when it ends.
    let builder = builder.with_span_events(FmtSpan::CLOSE);
    match format {
        LogFormat::Human => builder.with_ansi(terminal).with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}

/// A counter without the `_total` that OpenMetrics asks of counters, hence of the type "unknown": Istio's names stay as
/// they are, so that its dashboards and alerts go on working.
#[derive(Clone, Debug, Default)]
pub struct Unsuffixed(Counter);

impl Unsuffixed {
    /// One more.
    pub fn inc(&self) {
        self.0.inc();
    }
}

impl EncodeMetric for Unsuffixed {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        encoder.encode_gauge(&self.0.get())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Unknown
    }
}
