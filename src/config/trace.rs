//! Where spans are sent to, by whichever process.

use crate::core::url::{self, Collector};
use crate::trace::Options;

/// The flags of tracing.
#[derive(Clone, Debug, clap::Args)]
// Another `Args` has the name of its group.
#[group(skip)]
pub struct Args {
    /// Send spans to an OpenTelemetry collector, by OTLP over HTTP; without a path to /v1/traces
    #[arg(long, value_name = "URL", value_parser = otlp, env = "MICA_TRACE_OTLP", hide_env = true)]
    pub trace_otlp: Option<Collector>,

    /// Send spans to Zipkin, as JSON of version 2; without a path to /api/v2/spans
    #[arg(long, value_name = "URL", value_parser = zipkin, env = "MICA_TRACE_ZIPKIN", hide_env = true)]
    pub trace_zipkin: Option<Collector>,

    /// The part of the traces beginning here that is recorded, from 0 to 1; others say it of theirs
    #[arg(
        long,
        value_name = "RATIO",
        default_value = "1",
        value_parser = ratio,
        env = "MICA_TRACE_SAMPLE",
        hide_env = true
    )]
    pub trace_sample: f64,
}

impl Args {
    /// As the tracer takes them.
    pub fn options(&self) -> Options {
        let Self { trace_otlp, trace_zipkin, trace_sample } = self.clone();
        Options { otlp: trace_otlp, zipkin: trace_zipkin, sample: trace_sample }
    }
}

pub(super) fn otlp(text: &str) -> Result<Collector, url::Error> {
    Collector::new(text, "/v1/traces")
}

pub(super) fn zipkin(text: &str) -> Result<Collector, url::Error> {
    Collector::new(text, "/api/v2/spans")
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok().filter(|ratio| (0.0..=1.0).contains(ratio));
    ratio.ok_or_else(|| format!("{text:?} is no number from 0 to 1"))
}
