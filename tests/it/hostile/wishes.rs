//! Lifetimes, and the metadata of a request. Web asks with its good certificate and a good CSR.

use mica::proto::istio::v1::auth::IstioCertificateRequest;
use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use tonic::Code;

use super::{Answer, Expected, LONGEST, Own, Row, Stage, TOO_LARGE, WEB, invalid, unauthenticated, wire};

const MALFORMED: Expected = invalid("METADATA_MALFORMED");

#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    ("a lifetime of zero", |s| lifetime(s, 0), Own(WEB)),
    ("a negative lifetime", |s| lifetime(s, -1), Own(WEB)),
    ("the least lifetime there is", |s| lifetime(s, i64::MIN), Own(WEB)),
    ("a lifetime of half a minute", |s| lifetime(s, 30), Own(WEB)),
    ("the longest lifetime that is granted", |s| lifetime(s, LONGEST), Own(WEB)),
    ("a lifetime of a second more", |s| lifetime(s, LONGEST + 1), invalid("LIFETIME_TOO_LONG")),
    ("a lifetime that wraps in 32 bits", |s| lifetime(s, (1 << 32) + 3_600), invalid("LIFETIME_TOO_LONG")),
    ("a lifetime that wraps in nanoseconds", |s| lifetime(s, i64::MAX / 1_000_000_000 + 1), invalid("LIFETIME_TOO_LONG")),
    ("the most lifetime there is", |s| lifetime(s, i64::MAX), invalid("LIFETIME_TOO_LONG")),

    ("CertSigner, empty", |s| metadata(s, "CertSigner", text("")), Own(WEB)),
    ("CertSigner, null", |s| metadata(s, "CertSigner", Kind::NullValue(0)), Own(WEB)),
    ("CertSigner without a value", |s| metadata(s, "CertSigner", None), Own(WEB)),
    ("CertSigner", |s| metadata(s, "CertSigner", text("other")), invalid("CERT_SIGNER_UNSUPPORTED")),
    ("CertSigner, a number", |s| metadata(s, "CertSigner", Kind::NumberValue(f64::NAN)), MALFORMED),
    ("CertSigner, a list of one text", |s| metadata(s, "CertSigner", list(1)), MALFORMED),
    ("CertSigner, an object", |s| metadata(s, "CertSigner", nested(1)), MALFORMED),
    ("ImpersonatedIdentity", |s| metadata(s, "ImpersonatedIdentity", text(super::DB)), unauthenticated("IMPERSONATOR_UNKNOWN")),
    ("ImpersonatedIdentity of oneself", |s| metadata(s, "ImpersonatedIdentity", text(WEB)), unauthenticated("IMPERSONATOR_UNKNOWN")),
    ("ImpersonatedIdentity that is none", |s| metadata(s, "ImpersonatedIdentity", text("../../etc")), unauthenticated("IMPERSONATOR_UNKNOWN")),
    ("ImpersonatedIdentity of 60 kB", |s| metadata(s, "ImpersonatedIdentity", text(&"a".repeat(60_000))), unauthenticated("IMPERSONATOR_UNKNOWN")),
    ("ImpersonatedIdentity, a number", |s| metadata(s, "ImpersonatedIdentity", Kind::NumberValue(1.0)), MALFORMED),
    ("ImpersonatedIdentity, true", |s| metadata(s, "ImpersonatedIdentity", Kind::BoolValue(true)), MALFORMED),
    ("ImpersonatedIdentity, a list", |s| metadata(s, "ImpersonatedIdentity", list(2)), MALFORMED),
    ("ImpersonatedIdentity in other letters", |s| metadata(s, "impersonatedidentity", text(super::DB)), Own(WEB)),
    ("ExactLifetime, a text", |s| metadata(s, "ExactLifetime", text("true")), MALFORMED),
    ("keys that nobody knows", |s| metadata(s, "isCA", Kind::BoolValue(true)), Own(WEB)),
    ("a key that is empty", |s| metadata(s, "", text("")), Own(WEB)),
    ("a thousand keys", |s| all(s, (0..1_000).map(|n| (n.to_string(), value(text("x"))))), Own(WEB)),
    ("a list of 10,000 values", |s| metadata(s, "list", list(10_000)), Own(WEB)),
    ("objects in objects, 20 deep", |s| metadata(s, "deep", nested(20)), Own(WEB)),
    // The decoder's own end is at a hundred messages in one another.
    ("objects in objects, 1,000 deep", |s| deep(s, 1_000, &[(1, Some("a")), (5, None)]), Expected::Status(Code::Internal)),
    ("lists in lists, 4,000 deep", |s| deep(s, 4_000, &[(1, None), (6, None)]), Expected::Status(Code::Internal)),
    ("metadata of 1 MB", |s| metadata(s, "large", text(&"a".repeat(1_000_000))), TOO_LARGE),
    ("the lifetime of another in the metadata", |s| metadata(s, "validity_duration", Kind::NumberValue(1e18)), Own(WEB)),
];

fn lifetime(stage: &Stage, seconds: i64) -> Answer {
    let mut ask = stage.ask();
    ask.message.validity_duration = seconds;
    stage.send(ask)
}

fn metadata(stage: &Stage, key: &str, kind: impl Into<Option<Kind>>) -> Answer {
    all(stage, [(key.to_owned(), Value { kind: kind.into() })])
}

fn all(stage: &Stage, fields: impl IntoIterator<Item = (String, Value)>) -> Answer {
    let mut ask = stage.ask();
    let metadata = Some(Struct { fields: fields.into_iter().collect() });
    ask.message = IstioCertificateRequest { metadata, ..ask.message };
    stage.send(ask)
}

fn value(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}

fn text(text: &str) -> Kind {
    Kind::StringValue(text.to_owned())
}

fn list(length: usize) -> Kind {
    Kind::ListValue(ListValue { values: vec![value(text("x")); length] })
}

fn nested(depth: usize) -> Kind {
    (0..depth).fold(text("x"), |inner, _| {
        Kind::StructValue(Struct { fields: [("a".to_owned(), value(inner))].into() })
    })
}

/// A value that holds itself so often, by the fields of one turn from the inside out: an encoder would run out of stack.
fn deep(stage: &Stage, depth: usize, turn: &[(u8, Option<&str>)]) -> Answer {
    let field = |number: u8, content: &[u8]| {
        let mut bytes = vec![number << 3 | 2];
        prost::encoding::encode_varint(content.len() as u64, &mut bytes);
        [&bytes, content].concat()
    };
    let mut value = Vec::new();
    for _ in 0..depth {
        for (number, key) in turn {
            if let Some(key) = key {
                // An entry of a map is a message of key and value.
                value = [field(1, key.as_bytes()), field(2, &value)].concat();
            }
            value = field(*number, &value);
        }
    }
    let entry = [field(1, b"deep"), field(2, &value)].concat();
    wire::message(stage, |message| [message, field(4, &field(1, &entry))].concat())
}
