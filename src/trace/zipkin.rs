//! Zipkin's JSON, version 2.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::export::Origin;
use super::{Kind, Record, Value};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Span<'a> {
    trace_id: String,
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent_id: Option<String>,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    /// In microseconds, as the duration, which is never 0.
    timestamp: i64,
    duration: i64,
    local_endpoint: Endpoint<'a>,
    tags: BTreeMap<&'a str, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint<'a> {
    service_name: &'a str,
}

pub(super) fn encode(origin: &Origin, records: &[Arc<Record>]) -> Vec<u8> {
    let spans: Vec<_> = records.iter().map(|record| span(origin, record)).collect();
    // Of texts and numbers, so it can always be written.
    serde_json::to_vec(&spans).unwrap_or_default()
}

fn span<'a>(origin: &'a Origin, record: &'a Record) -> Span<'a> {
    let mut tags: BTreeMap<_, _> = record
        .attributes
        .iter()
        .map(|(key, value)| {
            let text = match value {
                Value::Text(text) => text.to_string(),
                Value::Number(number) => number.to_string(),
            };
            (*key, text)
        })
        .collect();
    if let Some(reason) = record.failed {
        // What Zipkin shows red.
        tags.insert("error", reason.to_owned());
    }
    tags.insert("service.instance.id", origin.instance.clone());
    Span {
        trace_id: record.trace.to_string(),
        id: record.span.to_string(),
        parent_id: record.parent.map(|parent| parent.to_string()),
        name: &record.name,
        kind: match record.kind {
            Kind::Internal => None,
            Kind::Server => Some("SERVER"),
            Kind::Client => Some("CLIENT"),
        },
        timestamp: i64::try_from(record.begun.unix_timestamp_nanos() / 1_000).unwrap_or_default(),
        duration: i64::try_from(record.took.as_micros()).unwrap_or(i64::MAX).max(1),
        local_endpoint: Endpoint { service_name: origin.service },
        tags,
    }
}
