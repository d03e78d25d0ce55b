//! The keys that a token issuer gives out.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::token::jwks::{KeySet, MAX};

fuzz_target!(|data: &[u8]| {
    let Ok(keys) = KeySet::from_json(data) else { return };
    assert!(data.len() <= MAX && (1..=64).contains(&keys.count()));
    assert!(keys == KeySet::from_json(data).expect("the same twice"));
});
