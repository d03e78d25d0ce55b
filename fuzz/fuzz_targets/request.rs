//! What a stranger sends as a request: protobuf of each of the calls, metadata of any depth, and a CSR in it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::csr::CheckedCsr;
use mica::core::refusal::Code;
use mica::proto::istio::v1::auth::{IstioCertificateRequest, Request};
use mica::proto::mica::v1::ExplainRequest;
use mica::serve::wishes;
use prost::Message as _;

fuzz_target!(|data: &[u8]| {
    if let Ok(asked) = IstioCertificateRequest::decode(data) {
        match wishes(asked.metadata.as_ref()) {
            Ok(wishes) => assert!(wishes.impersonated.is_none_or(|id| !id.is_empty())),
            Err(refusal) => assert_eq!(refusal.reason.code(), Code::InvalidArgument),
        }
        let _ = CheckedCsr::from_pem(asked.csr.as_bytes());
        // A number that is none is unlike itself, so bytes are compared.
        let again =
            IstioCertificateRequest::decode(&*asked.encode_to_vec()).expect("what was read is read again");
        assert_eq!((again.csr, again.validity_duration), (asked.csr, asked.validity_duration));
    }
    if let Ok(asked) = Request::decode(data) {
        let _ = CheckedCsr::from_pem(&asked.csr_pem);
    }
    let _ = ExplainRequest::decode(data);
});
