//! SPIFFE IDs, trust domains and service accounts: what is taken is taken byte for byte, and nothing else is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mica::core::spiffe::{MAX_ID, MAX_TRUST_DOMAIN, ServiceAccount, SpiffeId, TrustDomain};

fuzz_target!(|text: &str| {
    if let Ok(domain) = TrustDomain::parse(text) {
        assert_eq!(domain.as_str(), text);
        assert!(!text.is_empty() && text.len() <= MAX_TRUST_DOMAIN);
        let id = domain.id();
        assert_eq!(SpiffeId::parse(id.as_str()).as_ref(), Ok(&id));
        assert_eq!(id.path(), "");
    }
    if let Ok(id) = SpiffeId::parse(text) {
        assert_eq!(id.as_str(), text);
        assert_eq!(id.to_string(), text);
        assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
        assert!(text.len() <= MAX_ID);
        assert!(!text["spiffe://".len()..].contains(['%', '?', '#', '@', ':']));
        assert!(!text.ends_with('/'));
        assert!(id.path().split('/').skip(1).all(|part| !matches!(part, "" | "." | "..")));
        assert_eq!(SpiffeId::parse_workload(text).is_ok(), !id.path().is_empty());
        if let Some(account) = ServiceAccount::of(&id) {
            assert_eq!(account.spiffe_id(id.trust_domain()), id);
        }
    }
    if let Some((namespace, name)) = text.split_once('\n')
        && let Ok(account) = ServiceAccount::new(namespace, name)
    {
        assert_eq!((account.namespace(), account.name()), (namespace, name));
        let domain = TrustDomain::parse("td").expect("a trust domain");
        assert_eq!(ServiceAccount::of(&account.spiffe_id(&domain)), Some(account));
    }
});
