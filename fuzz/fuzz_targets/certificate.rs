//! Certificates and chains of others.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::chain;

fuzz_target!(|data: &[u8]| {
    if let Ok(certificate) = Certificate::from_der(data) {
        assert_eq!(certificate.der(), data);
        let again = Certificate::all_from_pem(certificate.to_pem().as_bytes()).expect("the same as PEM");
        assert!(again == [certificate.clone()]);
        let _ = (certificate.subject_text(), certificate.issuer_text(), certificate.serial_text());
        let _ = (certificate.key().is_ok(), certificate.signing_faults());
        judge(&[certificate]);
    }
    if let Ok(chain) = Certificate::all_from_pem(data) {
        judge(&chain);
    }
});

fn judge(certificates: &[Certificate]) {
    let roots = certificates.iter().filter(|certificate| certificate.is_ca).cloned();
    let Ok(bundle) = TrustBundle::new(roots) else { return };
    let at = certificates[0].validity.not_before;
    if let Ok(id) = chain::verify(certificates, &bundle, None, at) {
        assert!(certificates[0].leaf_faults().is_empty());
        assert_eq!(certificates[0].spiffe_id().as_ref(), Ok(&id));
        assert!(!certificates[0].is_ca);
    }
}
