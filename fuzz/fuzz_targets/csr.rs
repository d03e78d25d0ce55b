//! What a stranger sends to have certified.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::csr::{CheckedCsr, MAX};
use mica::core::key::PublicKey;
use mica::core::pem;

fuzz_target!(|data: &[u8]| {
    let _ = CheckedCsr::from_pem(data);
    let Ok(csr) = CheckedCsr::from_der(data) else { return };
    assert!(data.len() <= MAX);
    let key = PublicKey::from_spki(csr.key().spki()).expect("a key that was taken is taken again");
    assert_eq!(key.kind(), csr.key().kind());
    let text = pem::encode(pem::CSR, data);
    let again = CheckedCsr::from_pem(text.as_bytes()).expect("the same as PEM");
    assert_eq!(again.requested(), csr.requested());

    // A third of the way in lies what is signed, whatever the kind of key.
    let mut forged = data.to_vec();
    forged[data.len() / 3] ^= 1;
    assert!(CheckedCsr::from_der(&forged).is_err(), "a changed CSR is taken");
});
