//! Kubernetes manifests, broken ones above all: whatever a document holds, its neighbours keep their accounts.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::spiffe::ServiceAccount;
use mica::source::manifests::accounts_in;

const GOOD: &[u8] = b"apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: neighbour, namespace: near}\n";

fuzz_target!(|data: &[u8]| {
    let found = accounts_in(data);
    for account in &found.accounts {
        assert_eq!(ServiceAccount::new(account.namespace(), account.name()).as_ref(), Ok(account));
    }
    for fault in &found.faults {
        assert!(fault.document >= 1 && !fault.reason.is_empty() && !fault.reason.contains('\n'));
    }
    // The first bytes of a file say how it is encoded.
    if matches!(data, [0xfe | 0xff, ..]) {
        return;
    }
    let neighbour = ServiceAccount::new("near", "neighbour").expect("a sound name");
    let before = accounts_in(&[GOOD, b"---\n", data].concat());
    assert_eq!(before.accounts.first(), Some(&neighbour));
    // Comments before a `---` belong to the document that it opens; something that is none ends what they stand in.
    let after = accounts_in(&[data, b"\nx: y\n---\n", GOOD].concat());
    assert_eq!(after.accounts.last(), Some(&neighbour));
});
