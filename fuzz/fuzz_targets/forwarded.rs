//! What a proxy says of its client, and what others add to it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::forwarded::{Error, client_uri};

fuzz_target!(|header: &str| {
    let Ok(uri) = client_uri(header) else { return };
    assert!(header.to_ascii_lowercase().contains("uri"));
    // Whatever is added to a header that is believed, it is not believed for somebody else.
    let more = |behind: &str| client_uri(&format!("{header}{behind}"));
    let is_long = header.len() > 16_000;
    assert!(is_long || more(";URI=spiffe://td/ns/a/sa/b") == Err(Error::Uris(2)));
    assert!(is_long || more(",URI=spiffe://td/ns/a/sa/b") == Err(Error::Elements));
    let quoted = format!("URI=\"{}\"", uri.replace('\\', "\\\\").replace('"', "\\\""));
    assert!(quoted.len() > 16_000 || client_uri(&quoted).as_ref() == Ok(&uri));
});
