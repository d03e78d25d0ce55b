//! PEM texts of any kind.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::pem;

fuzz_target!(|data: &[u8]| {
    let Ok(blocks) = pem::blocks(data) else { return };
    let lines = data.split(|byte| *byte == b'\n').count();
    let mut text = String::new();
    let mut last = 0;
    for block in &blocks {
        assert!(last < block.line && block.line < lines);
        last = block.line;
        pem::encode_into(&mut text, &block.label, &block.der);
    }
    let again = pem::blocks(text.as_bytes()).expect("what Mica writes");
    assert_eq!(again.len(), blocks.len());
    for (one, other) in again.iter().zip(&blocks) {
        assert_eq!((&one.label, &one.der[..]), (&other.label, &other.der[..]));
    }
});
