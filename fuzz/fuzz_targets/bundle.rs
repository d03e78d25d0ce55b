//! Trust bundles: PEM, SPIFFE JSON, and maps of them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::bundle::{TrustBundle, map_from_json};

fuzz_target!(|data: &[u8]| {
    for bundle in [TrustBundle::from_pem(data), TrustBundle::from_json(data)].into_iter().flatten() {
        written_and_read_again(&bundle);
    }
    for bundle in map_from_json(data).unwrap_or_default().values() {
        assert_eq!(bundle.refresh_hint, None);
        written_and_read_again(bundle);
    }
});

fn written_and_read_again(bundle: &TrustBundle) {
    assert!(!bundle.roots().is_empty());
    assert!(bundle.roots().iter().all(|root| root.is_ca));
    let again = TrustBundle::from_pem(bundle.pem().as_bytes()).expect("what Mica writes");
    assert!(again.roots() == bundle.roots());
    assert!(bundle.merged(&again).expect("the same twice").same_roots(bundle));
    // A key that Mica does not support has no JWK.
    if let Ok(json) = bundle.to_json() {
        let again = TrustBundle::from_json(json.as_bytes()).expect("what Mica writes");
        assert!(again == *bundle);
    }
}
