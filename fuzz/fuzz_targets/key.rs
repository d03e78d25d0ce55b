//! Private keys that users bring, without a passphrase: deriving a key from one is slow by design.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::key::PrivateKey;

fuzz_target!(|data: &[u8]| {
    for key in [PrivateKey::from_pem(data, None, None), PrivateKey::from_pkcs8(data, None)] {
        let Ok(key) = key else { continue };
        let again = PrivateKey::from_pem(key.to_pem().as_bytes(), None, None).expect("what Mica writes");
        assert_eq!(again.public().spki(), key.public().spki());
        assert!(!format!("{key:?}").contains("PRIVATE"));
    }
});
