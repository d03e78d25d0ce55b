//! The client's side of the CSR API: connecting to a running Mica and asking it.

pub mod bench;

use prost::Message as _;
use tonic::Code;

use crate::proto::google::rpc;

/// The stable reason in a status's details, if they are a Mica's.
fn reason_of(details: &[u8]) -> Option<String> {
    let status = rpc::Status::decode(details).ok()?;
    status.details.iter().find_map(|any| rpc::ErrorInfo::decode(&any.value[..]).ok()).map(|info| info.reason)
}

fn code_name(code: Code) -> String {
    format!("{code:?}")
}
