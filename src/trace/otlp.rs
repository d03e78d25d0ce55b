//! OTLP, in protobuf.

use std::sync::Arc;

use prost::Message as _;

use super::export::Origin;
use super::{Kind, Record, Value};
use crate::proto::opentelemetry::proto::collector::trace::v1::ExportTraceServiceRequest;
use crate::proto::opentelemetry::proto::common::v1::any_value;
use crate::proto::opentelemetry::proto::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use crate::proto::opentelemetry::proto::resource::v1::Resource;
use crate::proto::opentelemetry::proto::trace::v1::span::SpanKind;
use crate::proto::opentelemetry::proto::trace::v1::status::StatusCode;
use crate::proto::opentelemetry::proto::trace::v1::{ResourceSpans, ScopeSpans, Span, Status};

const VERSION: &str = env!("CARGO_PKG_VERSION");

pub(super) fn encode(origin: &Origin, records: &[Arc<Record>]) -> Vec<u8> {
    let text = |key: &str, value: &str| attribute(key, &Value::Text(value.to_owned().into()));
    let attributes = vec![
        text("service.name", origin.service),
        text("service.version", VERSION),
        text("service.instance.id", &origin.instance),
    ];
    let scope = InstrumentationScope { name: "mica".to_owned(), version: VERSION.to_owned() };
    let spans = ScopeSpans { scope: Some(scope), spans: records.iter().map(|record| span(record)).collect() };
    let all = ResourceSpans { resource: Some(Resource { attributes }), scope_spans: vec![spans] };
    ExportTraceServiceRequest { resource_spans: vec![all] }.encode_to_vec()
}

fn span(record: &Record) -> Span {
    let start = u64::try_from(record.begun.unix_timestamp_nanos()).unwrap_or_default();
    let took = u64::try_from(record.took.as_nanos()).unwrap_or(u64::MAX);
    let failed = |reason: &str| Status { message: reason.to_owned(), code: StatusCode::Error.into() };
    Span {
        trace_id: record.trace.bytes().to_vec(),
        span_id: record.span.bytes().to_vec(),
        parent_span_id: record.parent.map(|parent| parent.bytes().to_vec()).unwrap_or_default(),
        name: record.name.to_string(),
        kind: match record.kind {
            Kind::Internal => SpanKind::Internal,
            Kind::Server => SpanKind::Server,
            Kind::Client => SpanKind::Client,
        }
        .into(),
        start_time_unix_nano: start,
        end_time_unix_nano: start.saturating_add(took),
        attributes: record.attributes.iter().map(|(key, value)| attribute(key, value)).collect(),
        status: record.failed.map(failed),
        // Sampled.
        flags: 1,
    }
}

fn attribute(key: &str, value: &Value) -> KeyValue {
    let value = match value {
        Value::Text(text) => any_value::Value::StringValue(text.to_string()),
        Value::Number(number) => any_value::Value::IntValue(*number),
    };
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}
