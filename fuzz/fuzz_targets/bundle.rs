//! Trust bundles: PEM, SPIFFE JSON, maps of them, and those of other trust domains.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::bundle::{TrustBundle, map_from_json};
use mica::core::published::Published;

fuzz_target!(|data: &[u8]| {
    for bundle in [TrustBundle::from_pem(data), TrustBundle::from_json(data)].into_iter().flatten() {
        written_and_read_again(&bundle);
    }
    for bundle in map_from_json(data).unwrap_or_default().values() {
        assert_eq!(bundle.refresh_hint, None);
        written_and_read_again(bundle);
    }
    if let Ok(bundle) = Published::from_json(data)
        && let Ok(json) = bundle.to_json()
    {
        let again = Published::from_json(json.as_bytes()).expect("what Mica writes");
        assert!(again == bundle && again.content() == bundle.content());
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
