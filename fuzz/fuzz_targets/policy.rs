//! Policies, and what they decide: never more than they say.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use mica::core::caller::{Bound, Caller, Proof};
use mica::core::key::KeyKind;
use mica::core::lifetime::Lifetime;
use mica::core::policy::{Ask, Limits, MAX, Policy};
use mica::core::spiffe::ServiceAccount;

fuzz_target!(|text: &[u8]| {
    let limits = Limits {
        lifetime: Lifetime::from_secs(86_400),
        longest: Lifetime::from_secs(90 * 86_400),
        own_names: vec!["istiod.istio-system.svc".to_owned()],
    };
    let Ok(policy) = Policy::parse(text, &limits) else { return };
    assert!(text.len() <= MAX);
    let now = time::OffsetDateTime::UNIX_EPOCH + time::Duration::days(20_000);
    let dns = ["istiod.istio-system.svc", "a.b.svc", "*", "", "x.example.org"].map(str::to_owned);
    let bound = Arc::new(Bound::default());
    for (namespace, name) in
        [("istio-system", "istiod"), ("payments", "ledger"), ("quarantine", "a"), ("b", "a")]
    {
        let account = ServiceAccount::new(namespace, name).expect("an account");
        for proof in [
            Proof::Token { reviewed: false, bound: bound.clone() },
            Proof::Certificate { proved_at: now - time::Duration::days(10) },
        ] {
            let caller = Caller { account: account.clone(), proof };
            for lifetime in [None, Some(Lifetime::from_secs(3_600)), Some(Lifetime::from_secs(u64::MAX / 4))]
            {
                let key = Some(KeyKind::P256);
                let ask = Ask { caller: &caller, impersonated: None, key, dns: &dns, lifetime, now };
                let Ok(decision) = policy.decide(&ask) else { continue };
                assert_eq!(decision.account, account);
                assert!(decision.lifetime.value <= decision.longest.value);
                assert!(lifetime.is_none_or(|asked| asked == decision.lifetime.value));
                for name in &decision.dns {
                    assert!(
                        name.as_str() != "istiod.istio-system.svc"
                            && dns.iter().any(|asked| asked == name.as_str())
                    );
                }
                assert!(decision.renewable_until.is_none_or(|until| until > now));
            }
        }
    }
});
