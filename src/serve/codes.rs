//! How a refusal is told over gRPC: its code, its sentence, and `google.rpc.ErrorInfo` with its stable reason.

use prost::Message as _;
use prost::bytes::Bytes;
use prost_types::Any;
use tonic::Status;

use crate::core::refusal::{Code, DOMAIN, Refusal};
use crate::proto::google::rpc::{self, ErrorInfo};

const ERROR_INFO: &str = "type.googleapis.com/google.rpc.ErrorInfo";
/// Sentences quote what was sent; headers have an end.
const LONGEST_SENTENCE: usize = 1_024;

impl From<Code> for tonic::Code {
    fn from(code: Code) -> Self {
        match code {
            Code::Unauthenticated => Self::Unauthenticated,
            Code::InvalidArgument => Self::InvalidArgument,
            Code::PermissionDenied => Self::PermissionDenied,
            Code::ResourceExhausted => Self::ResourceExhausted,
            Code::Unavailable => Self::Unavailable,
        }
    }
}

/// The status that a caller gets.
pub(super) fn status(refusal: &Refusal) -> Status {
    let refused = refused(refusal);
    let details = Bytes::from(refused.encode_to_vec());
    Status::with_details(refusal.reason.code().into(), refused.message, details)
}

/// The same as a message, for one request of several.
pub(super) fn refused(refusal: &Refusal) -> rpc::Status {
    let mut message = refusal.sentence.clone();
    if message.len() > LONGEST_SENTENCE {
        message.truncate(message.floor_char_boundary(LONGEST_SENTENCE));
        message.push('…');
    }
    let info = ErrorInfo {
        reason: refusal.reason.name().to_owned(),
        domain: DOMAIN.to_owned(),
        metadata: Default::default(),
    };
    rpc::Status {
        code: tonic::Code::from(refusal.reason.code()).into(),
        message,
        details: vec![Any { type_url: ERROR_INFO.to_owned(), value: info.encode_to_vec() }],
    }
}
