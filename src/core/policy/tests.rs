use std::sync::Arc;

use proptest::prelude::*;
use time::Duration;
use time::macros::datetime;

use super::*;
use crate::core::caller::Bound;

const NOW: OffsetDateTime = datetime!(2026-03-01 08:00:00 UTC);

fn limits() -> Limits {
    Limits {
        lifetime: "24h".parse().unwrap(),
        longest: "90d".parse().unwrap(),
        own_names: ["istiod.istio-system.svc", "istio-ca", "127.0.0.1"].map(str::to_owned).to_vec(),
    }
}

fn policy(text: &str) -> Policy {
    Policy::parse(text.as_bytes(), &limits()).unwrap_or_else(|fault| panic!("{fault}\n{text}"))
}

fn refused(text: &str) -> String {
    Policy::parse(text.as_bytes(), &limits()).expect_err(text).to_string()
}

fn named(text: &str) -> ServiceAccount {
    account(text).unwrap()
}

fn caller(name: &str, proof: Proof) -> Caller {
    Caller { account: named(name), proof }
}

fn token(reviewed: bool) -> Proof {
    Proof::Token { reviewed, bound: Arc::new(Bound::default()) }
}

/// As it comes over the wire.
fn seconds(asked: i64) -> Option<Lifetime> {
    u64::try_from(asked).ok().filter(|seconds| *seconds > 0).map(Lifetime::from_secs)
}

/// The example of the documentation.
fn example() -> String {
    let text = include_str!("../../../docs/policy.md");
    let begin = text.find("```yaml\n").unwrap() + "```yaml\n".len();
    text[begin..begin + text[begin..].find("```").unwrap()].to_owned()
}

/// What is asked, in short: who, by what, for whom, with which key, for how long, with which names.
struct Row {
    who: &'static str,
    proof: Proof,
    whom: Option<&'static str>,
    key: Option<KeyKind>,
    seconds: i64,
    dns: &'static [&'static str],
    wanted: Result<(&'static str, &'static str, &'static [&'static str]), (Reason, &'static str)>,
}

#[test]
fn the_example_decides_as_it_says() {
    use KeyKind::{Ed25519, P256, P384, Rsa2048};
    let days = |n| Proof::Certificate { proved_at: NOW - Duration::days(n) };
    let oidc = || Proof::Oidc { issuer: "https://ci.example.org".into() };
    let proxy = SpiffeId::parse("spiffe://cluster.local/ns/edge/sa/gateway").unwrap();
    let forwarded = || Proof::Forwarded { proxy: proxy.clone() };
    let denied = || Proof::Forwarded {
        proxy: SpiffeId::parse("spiffe://cluster.local/ns/quarantine/sa/any").unwrap(),
    };
    let row =
        |who, proof, whom, key, seconds, dns, wanted| Row { who, proof, whom, key, seconds, dns, wanted };
    let none: &[&str] = &[];
    #[rustfmt::skip]
    let table = [
        // Lifetimes: the default, where it comes from, and the longest.
        row("default/web", token(false), None, Some(P256), 0, none, Ok(("24h", "the policy, line ", none))),
        row("default/web", token(false), None, Some(P256), -1, none, Ok(("24h", "the policy, line ", none))),
        row("default/web", token(false), None, Some(P256), i64::MIN, none, Ok(("24h", "the policy, line ", none))),
        row("default/web", token(false), None, Some(P256), 1, none, Ok(("1s", "the request", none))),
        row("default/web", token(false), None, Some(P256), 7 * 86_400, none, Ok(("7d", "the request", none))),
        row("default/web", token(false), None, Some(P256), 7 * 86_400 + 1, none,
            Err((Reason::LifetimeTooLong, "a lifetime of 604801s is longer than 7d, the longest for default/web (the policy); ask for at most 604800 seconds, or for 0 to get 24h"))),
        row("default/web", token(false), None, Some(P256), i64::MAX, none, Err((Reason::LifetimeTooLong, "longer than 7d"))),
        row("payments/api", token(true), None, Some(P256), 0, none, Ok(("1h", "the policy of namespace payments, line ", none))),
        row("payments/api", token(true), None, Some(P256), 4 * 3_600, none, Ok(("4h", "the request", none))),
        row("payments/api", token(true), None, Some(P256), 4 * 3_600 + 1, none,
            Err((Reason::LifetimeTooLong, "longer than 4h, the longest for payments/api (the policy of namespace payments)"))),
        row("payments/ledger", token(true), None, Some(P384), 0, none, Ok(("10m", "the policy of account payments/ledger, line ", none))),
        row("payments/ledger", token(true), None, Some(P384), 4 * 3_600, none, Ok(("4h", "the request", none))),

        // Keys.
        row("default/web", token(false), None, Some(Rsa2048), 0, none,
            Err((Reason::KeyRefused, "a rsa2048 key is not allowed for default/web; the policy allows p256, p384, ed25519"))),
        row("default/web", token(false), None, Some(Ed25519), 0, none, Ok(("24h", "the policy, line ", none))),
        row("payments/ledger", token(true), None, Some(P256), 0, none,
            Err((Reason::KeyRefused, "a p256 key is not allowed for payments/ledger; the policy of account payments/ledger allows p384"))),
        row("payments/ledger", token(true), None, None, 0, none, Ok(("10m", "the policy of account", none))),

        // Names.
        row("default/web", token(false), None, Some(P256), 0, &["web.default.svc"], Ok(("24h", "the policy, line ", none))),
        row("payments/api", token(true), None, Some(P256), 0,
            &["api.payments.svc", "API.payments.svc", "ledger.payments.svc", "api.other.svc", "istiod.istio-system.svc", "*.payments.svc", "", "127.0.0.1"],
            Ok(("1h", "the policy of namespace", &["api.payments.svc", "ledger.payments.svc"]))),
        row("payments/ledger", token(true), None, Some(P384), 0, &["ledger.payments.svc", "ledger.example.org", "api.payments.svc"],
            Ok(("10m", "the policy of account", &["ledger.payments.svc", "ledger.example.org"]))),

        // Denials.
        row("quarantine/any", token(false), None, Some(P256), 0, none,
            Err((Reason::IdentityDenied, "quarantine/any is denied by the policy of namespace quarantine"))),
        row("quarantine/doctor", token(false), None, Some(P256), 0, none, Ok(("24h", "the policy, line ", none))),
        row("payments/old", token(true), None, Some(P256), 0, none,
            Err((Reason::IdentityDenied, "payments/old is denied by the policy of account payments/old"))),
        row("default/web", forwarded(), None, Some(P256), 0, none, Ok(("24h", "the policy, line ", none))),
        row("default/web", denied(), None, Some(P256), 0, none,
            Err((Reason::IdentityDenied, "quarantine/any is denied by the policy of namespace quarantine"))),
        row("payments/old", token(true), None, Some(Rsa2048), i64::MAX, none, Err((Reason::IdentityDenied, "denied"))),

        // Tokens that the API server has to vouch for.
        row("payments/api", token(false), None, Some(P256), 0, none,
            Err((Reason::TokenRejected, "tokens of payments/api count only if the API server vouches for them"))),
        row("payments/api", oidc(), None, Some(P256), 0, none, Ok(("1h", "the policy of namespace", none))),
        row("payments/api", forwarded(), None, Some(P256), 0, none, Ok(("1h", "the policy of namespace", none))),
        row("default/web", token(true), None, Some(P256), 0, none, Ok(("24h", "the policy, line ", none))),

        // Renewals with certificates alone.
        row("default/web", days(0), None, Some(P256), 0, none, Ok(("24h", "the policy, line ", none))),
        row("default/web", days(29), None, Some(P256), 0, none, Ok(("24h", "the policy, line ", none))),
        row("default/web", days(-1), None, Some(P256), 0, none, Ok(("24h", "the policy, line ", none))),
        row("default/web", days(30), None, Some(P256), 0, none,
            Err((Reason::RenewedTooLong, "default/web was last known by more than its certificate at 2026-01-30 08:00:00 UTC, and renews without it for 30d at most (the policy); authenticate with a token once"))),
        row("payments/api", days(1), None, Some(P256), 0, none, Err((Reason::RenewedTooLong, "for 12h at most (the policy of namespace payments)"))),
        row("vm/host", days(30), None, Some(P256), 0, none, Ok(("24h", "the policy, line ", none))),
        row("vm/host", days(365), None, Some(P256), 0, none, Err((Reason::RenewedTooLong, "for 1y at most"))),

        // For others.
        row("istio-system/ztunnel", token(false), Some("default/web"), Some(P256), 0, none, Ok(("24h", "the policy, line ", none))),
        row("istio-system/ztunnel", token(false), Some("payments/ledger"), Some(P384), 0, &["ledger.payments.svc"],
            Ok(("10m", "the policy of account payments/ledger", &["ledger.payments.svc"]))),
        row("istio-system/ztunnel", token(false), Some("payments/old"), Some(P256), 0, none, Err((Reason::IdentityDenied, "payments/old is denied"))),
        row("istio-system/ztunnel", token(false), Some("quarantine/any"), Some(P256), 0, none, Err((Reason::IdentityDenied, "quarantine/any is denied"))),
        row("istio-system/ztunnel", days(0), Some("default/web"), Some(P256), 0, none,
            Err((Reason::ImpersonatorUnbound, "istio-system/ztunnel may ask for other identities with its token alone"))),
        row("istio-system/ztunnel", forwarded(), Some("default/web"), Some(P256), 0, none, Err((Reason::ImpersonatorUnbound, "token alone"))),
        row("istio-system/ztunnel", oidc(), Some("default/web"), Some(P256), 0, none, Err((Reason::ImpersonatorUnbound, "token alone"))),
        row("default/web", token(false), Some("payments/ledger"), Some(P384), 0, none,
            Err((Reason::ImpersonatorUnknown, "default/web may not ask for other identities"))),
        row("default/ztunnel", token(false), Some("default/web"), Some(P256), 0, none, Err((Reason::ImpersonatorUnknown, "default/ztunnel may not"))),
        row("default/web", token(false), Some("default/web"), Some(P256), 0, none, Err((Reason::ImpersonatorUnknown, "may not"))),
    ];
    let policy = policy(&example());
    for (at, row) in table.iter().enumerate() {
        let caller = caller(row.who, row.proof.clone());
        let whom = row.whom.map(named);
        let dns: Vec<_> = row.dns.iter().map(ToString::to_string).collect();
        let ask = Ask {
            caller: &caller,
            impersonated: whom.as_ref(),
            key: row.key,
            dns: &dns,
            lifetime: seconds(row.seconds),
            now: NOW,
        };
        match (policy.decide(&ask), row.wanted) {
            (Ok(decision), Ok((lifetime, origin, names))) => {
                assert_eq!(decision.account, whom.unwrap_or(caller.account), "row {at}");
                assert_eq!(decision.lifetime.value.to_string(), lifetime, "row {at}");
                assert!(
                    decision.lifetime.origin.located().starts_with(origin),
                    "row {at}: {:?}",
                    decision.lifetime
                );
                let granted: Vec<_> = decision.dns.iter().map(DnsName::as_str).collect();
                assert_eq!(granted, names, "row {at}");
                let repeated = dns.iter().filter(|name| name.starts_with("API.")).count();
                assert_eq!(granted.len() + decision.left_out.len() + repeated, dns.len(), "row {at}");
                assert_eq!(
                    decision.renewable_until.is_some(),
                    matches!(caller.proof, Proof::Certificate { .. }),
                    "row {at}"
                );
            }
            (Err(refusal), Err((reason, sentence))) => {
                assert_eq!(refusal.reason, reason, "row {at}");
                assert!(refusal.sentence.contains(sentence), "row {at}: {}", refusal.sentence);
                assert!(!refusal.sentence.contains(", line "), "row {at}: where a file has it is the log's");
            }
            (got, wanted) => panic!("row {at}: {got:?}, not {wanted:?}"),
        }
    }
    assert!(table.len() >= 40);
}

#[test]
fn the_example_is_what_explain_is_shown_with() {
    assert_eq!(example(), include_str!("../../../tests/cli/explain.in/policy.yaml"));
}

#[test]
fn the_example_names_proxies_and_issuers() {
    let policy = policy(&example());
    assert!(policy.is_forwarder(&SpiffeId::parse("spiffe://cluster.local/ns/edge/sa/gateway").unwrap()));
    assert!(!policy.is_forwarder(&SpiffeId::parse("spiffe://cluster.local/ns/edge/sa/other").unwrap()));
    assert!(policy.has_forwarders() && policy.wants_review());
    let [issuer] = policy.oidc() else { panic!("{:?}", policy.oidc()) };
    assert_eq!(issuer.audience, "mica");
    assert_eq!(issuer.account("repo:example/shop:ref:refs/heads/main"), Some(&named("ci/deploy")));
    assert_eq!(issuer.account("repo:example/shop"), None);
    assert!(policy.token_review(&named("payments/api")) && !policy.token_review(&named("default/web")));
}

#[test]
fn the_documentation_lists_every_key() {
    let text = include_str!("../../../docs/policy.md");
    let fault = refused("no_such_key: 1");
    let keys: Vec<_> = fault.split_once("one of ").unwrap().1.split(", ").collect();
    assert!(keys.len() >= 13, "{fault}");
    for key in keys {
        assert!(text.contains(&format!("| `{key}` |")), "{key} has no row in docs/policy.md");
    }
}

#[test]
fn without_a_file_the_flags_count() {
    let policy = Policy::new(&limits()).unwrap();
    assert_eq!(policy, self::policy("{}"));
    let caller = caller("default/web", token(false));
    let dns = ["web.default.svc".to_owned()];
    let ask = Ask {
        caller: &caller,
        impersonated: None,
        key: Some(KeyKind::Rsa4096),
        dns: &dns,
        lifetime: None,
        now: NOW,
    };
    let decision = policy.decide(&ask).unwrap();
    assert_eq!(
        (decision.lifetime.value, decision.lifetime.origin),
        (limits().lifetime, Origin::Flag("--ttl"))
    );
    assert_eq!(
        (decision.longest.value, decision.longest.origin),
        (limits().longest, Origin::Flag("--max-ttl"))
    );
    assert_eq!(decision.spread, Spread::WIDEST);
    assert_eq!(decision.dns, []);
    assert_eq!(decision.left_out, [("web.default.svc".to_owned(), LeftOut::NotGranted)]);
    assert!(!policy.wants_review() && !policy.has_forwarders() && policy.oidc().is_empty());
}

#[test]
fn names_of_micas_own_are_never_granted() {
    let policy = policy(
        "dns: ['*.istio-system.svc', istio-ca, ISTIO-CA-x.y, 127.0.0.1]"
            .replace("ISTIO-CA-x.y", "a.b")
            .as_str(),
    );
    let caller = caller("istio-system/default", token(false));
    let dns = [
        "istiod.istio-system.svc",
        "IstioD.Istio-System.SVC",
        "istio-ca",
        "127.0.0.1",
        "x.istio-system.svc",
        "a.b",
    ];
    let dns = dns.map(str::to_owned);
    let ask = Ask { caller: &caller, impersonated: None, key: None, dns: &dns, lifetime: None, now: NOW };
    let decision = policy.decide(&ask).unwrap();
    assert_eq!(decision.dns.iter().map(DnsName::as_str).collect::<Vec<_>>(), ["x.istio-system.svc", "a.b"]);
    assert!(decision.left_out.iter().all(|(_, why)| *why == LeftOut::Own), "{:?}", decision.left_out);
}

#[test]
fn many_names_are_not_looked_at() {
    let policy = policy("dns: ['*.{namespace}.svc']");
    let caller = caller("default/web", token(false));
    let dns: Vec<_> = (0..1_000).map(|n| format!("n{n}.default.svc")).collect();
    let ask = Ask { caller: &caller, impersonated: None, key: None, dns: &dns, lifetime: None, now: NOW };
    let decision = policy.decide(&ask).unwrap();
    assert_eq!(decision.dns.len(), MAX_DNS);
    assert!(decision.left_out.iter().all(|(_, why)| *why == LeftOut::TooMany));
}

#[test]
fn what_is_wrong_is_said_with_its_line() {
    #[rustfmt::skip]
    let table = [
        ("", "the policy is empty; write {}"),
        ("# nothing\n", "the policy is empty; write {}"),
        ("---\n", "the policy is empty; write {}"),
        ("[]", "line 1: "),
        ("lifetime: 24h\nlifetim: 1h\n", "line 2: unknown field `lifetim`"),
        ("lifetime: 24h\nlifetime: 1h\n", "line 2: duplicate"),
        ("namespaces:\n  a: {}\n  b: {}\n  a: {}\n", "line 4: duplicate"),
        ("accounts:\n  a/b:\n    deny: true\n    deny: false\n", "line 4: duplicate"),
        ("lifetime: 24\n", "line 1: duration \"24\" is not a whole number with one of s, m, h, d, y"),
        ("lifetime:\n", "line 1: "),
        ("lifetime: [1h]\n", "line 1: "),
        ("deny:\n", "line 1: "),
        ("keys:\n", "line 1: "),
        ("lifetime: 9s\n", "line 1: a lifetime of 9s is shorter than 10s"),
        ("longest_lifetime: 0s\n", "line 1: a lifetime of 0s is shorter than 10s"),
        ("\n\nrenewal: never\n", "line 3: duration \"never\""),
        ("spread: 30%\n", "line 1: spread \"30%\" is not a whole number of percent from 0% to 25%"),
        ("keys: []\n", "line 1: keys is empty, so nobody could have a certificate; write deny: true"),
        ("keys:\n  - p256\n  - p521\n", "line 3: \"p521\" is no kind of key; there are p256, p384, ed25519, rsa2048, rsa3072, rsa4096"),
        ("keys: p256\n", "line 1: "),
        ("dns: [a.b, '*']\n", "line 1: DNS pattern \"*\" would grant names under any domain"),
        ("dns:\n  - *.svc\n", "line 2: "),
        ("dns:\n  - *.svc\n", "has to stand in quotes"),
        ("deny: yes\n", "line 1: "),
        ("impersonators: [ztunnel]\n", "line 1: \"ztunnel\" is no account; write namespace/name"),
        ("impersonators: [a/b/c]\n", "line 1: service account \"b/c\" is no Kubernetes name"),
        ("impersonators: ['*/b']\n", "line 1: namespace \"*\" is no Kubernetes name"),
        ("forwarders: [spiffe://cluster.local]\n", "line 1: SPIFFE ID \"spiffe://cluster.local\" names a trust domain"),
        ("forwarders: [Spiffe://a/b]\n", "line 1: SPIFFE ID \"Spiffe://a/b\" does not begin"),
        ("namespaces:\n  Shop:\n    deny: true\n", "namespace \"Shop\" is no Kubernetes name"),
        ("namespaces:\n  shop*:\n    deny: true\n", "namespace \"shop*\" is no Kubernetes name"),
        ("accounts:\n  shop:\n    deny: true\n", "\"shop\" is no account; write namespace/name"),
        ("accounts:\n  shop/web:\n    impersonators: []\n", "line 3: unknown field `impersonators`"),
        ("a: &a {deny: true}\nnamespaces:\n  b:\n    <<: *a\n", "line 1: unknown field"),
        ("namespaces:\n  a: &a {deny: true}\n  b:\n    <<: *a\n", "repeat the values instead"),
        ("lifetime: !!int 5\n", "line 1: "),
        ("{}\n---\n{}\n", ""),
        // What is granted by default must be something that may be had.
        ("lifetime: 91d\n", "line 1: the lifetime is 91d (the policy, line 1), longer than its longest_lifetime 90d (--max-ttl); shorten the lifetime, or give a longest_lifetime beside it"),
        ("longest_lifetime: 1h\n", "line 1: the lifetime is 24h (--ttl), longer than its longest_lifetime 1h (the policy, line 1); give a lifetime beside the longest_lifetime"),
        ("namespaces:\n  a:\n    longest_lifetime: 1h\n", "line 3: the lifetime of namespace a is 24h (--ttl), longer than its longest_lifetime 1h"),
        ("namespaces:\n  a:\n    lifetime: 30m\n    longest_lifetime: 1h\naccounts:\n  a/b:\n    lifetime: 2h\n",
         "line 7: the lifetime of account a/b is 2h (the policy of account a/b, line 7), longer than its longest_lifetime 1h (the policy of namespace a, line 4); shorten the lifetime, or give a longest_lifetime beside it"),
        // Issuers.
        ("oidc:\n  - issuer: https://a\n    audience: x\n", "missing field `accounts`"),
        ("oidc:\n  - issuer: https://a\n    accounts: []\n", "missing field `audience`"),
        ("oidc:\n  - issuer: http://a\n    audience: x\n    accounts: []\n", "line 2: \"http://a\" is not https"),
        ("oidc:\n  - issuer: https://u@a\n    audience: x\n    accounts: []\n", "line 2: "),
        ("oidc:\n  - issuer: http://127.0.0.1.evil.org\n    audience: x\n    accounts: []\n", "line 2: "),
        ("oidc:\n  - issuer: http://[::1].evil.org\n    audience: x\n    accounts: []\n", "line 2: "),
        ("oidc:\n  - issuer: https://a\n    jwks: http://b/keys\n    audience: x\n    accounts: []\n", "line 3: \"http://b/keys\" is not https"),
        ("oidc:\n  - issuer: https://a\n    audience: ''\n    accounts: []\n", "line 3: audience and jwks cannot be empty"),
        ("oidc:\n  - {issuer: https://a, audience: x, accounts: []}\n  - {issuer: https://a, audience: y, accounts: []}\n", "line 3: the issuer https://a comes twice"),
        ("oidc:\n  - issuer: https://a\n    audience: x\n    accounts:\n      - {subject: s, account: a/b}\n      - {subject: s, account: a/c}\n", "line 6: the subject \"s\" comes twice"),
        ("oidc:\n  - issuer: https://a\n    audience: x\n    accounts:\n      - {subject: '', account: a/b}\n", "line 5: a subject cannot be empty"),
        ("oidc:\n  - issuer: https://a\n    audience: x\n    accounts:\n      - {subject: s, account: b}\n", "line 5: \"b\" is no account"),
    ];
    for (text, wanted) in table {
        let fault = refused(text);
        assert!(fault.contains(wanted), "{text:?}: {fault}");
        assert!(!fault.contains('\n') && fault.matches("line ").count() <= 3, "{text:?}: {fault}");
    }
    assert!(
        Policy::parse(b"lifetime: 1h\n\xff\n", &limits())
            .unwrap_err()
            .to_string()
            .contains("line 2: the policy is not UTF-8")
    );
    let contrary = Limits { lifetime: "91d".parse().unwrap(), ..limits() };
    assert!(Policy::new(&contrary).unwrap_err().to_string().contains("91d (--ttl)"));
}

#[test]
fn bombs_are_refused_soon() {
    let mut aliases = "impersonators: &a [a/b, a/b, a/b, a/b, a/b, a/b, a/b, a/b, a/b]\n".to_owned();
    for (name, before) in ["b", "c", "d", "e", "f", "g", "h"].iter().zip(["a", "b", "c", "d", "e", "f", "g"])
    {
        aliases.push_str(&format!("{name}: &{name} [{}]\n", vec![format!("*{before}"); 9].join(",")));
    }
    let aliases_in_place = format!(
        "namespaces:\n  a: &a {{dns: &b [{}]}}\naccounts:\n{}",
        vec!["a.b"; 900].join(","),
        (0..990).map(|n| format!("  a/n{n}: *a\n")).collect::<String>()
    );
    let deep = format!("dns: {}{}", "[".repeat(100_000), "]".repeat(100_000));
    let deep_blocks: String = (0..1_000).map(|n| format!("{}a:\n", " ".repeat(n))).collect();
    let long = format!("# {}\n{{}}", "x".repeat(MAX));
    for text in [&aliases, &aliases_in_place, &deep, &deep_blocks, &long] {
        refused(text);
    }
    // What is just large is taken.
    let large: String =
        (0..10_000).map(|n| format!("  ns-{n}: {{lifetime: 1h, dns: ['*.{{namespace}}.svc']}}\n")).collect();
    policy(&format!("namespaces:\n{large}"));
}

#[test]
fn anchors_stand_for_what_they_name() {
    let policy = policy("namespaces:\n  a: &short {lifetime: 1h}\n  b: *short\n");
    let caller = caller("b/x", token(false));
    let ask = Ask { caller: &caller, impersonated: None, key: None, dns: &[], lifetime: None, now: NOW };
    assert_eq!(policy.decide(&ask).unwrap().lifetime.value.to_string(), "1h");
}

#[test]
fn an_account_takes_back_what_its_namespace_has() {
    let policy = policy(
        "deny: true\ndns: [a.example.org]\nnamespaces:\n  a: {deny: false}\naccounts:\n  a/b: {dns: []}\n  a/c: {deny: true}\n",
    );
    let decide = |name: &str| {
        let caller = caller(name, token(false));
        let dns = ["a.example.org".to_owned()];
        let ask = Ask { caller: &caller, impersonated: None, key: None, dns: &dns, lifetime: None, now: NOW };
        policy.decide(&ask).map(|decision| decision.dns.len()).map_err(|refusal| refusal.reason)
    };
    assert_eq!(decide("other/x"), Err(Reason::IdentityDenied));
    assert_eq!(decide("a/x"), Ok(1));
    assert_eq!(decide("a/b"), Ok(0));
    assert_eq!(decide("a/c"), Err(Reason::IdentityDenied));
}

const ACCOUNTS: [&str; 4] = ["a/x", "a/y", "b/x", "b/y"];

/// Rules of one level as YAML, and what they say: lifetime and longest, in seconds.
fn level() -> impl Strategy<Value = (String, Option<u64>, Option<u64>)> {
    (prop::option::of(10u64..50), prop::option::of(50u64..100), any::<bool>()).prop_map(
        |(lifetime, longest, dns)| {
            let mut said = Vec::new();
            said.extend(lifetime.map(|seconds| format!("lifetime: {seconds}s")));
            said.extend(longest.map(|seconds| format!("longest_lifetime: {seconds}s")));
            if dns {
                said.push(
                    "dns: ['*.{namespace}.svc', '{account}.example.org', '*.istio-system.svc']".to_owned(),
                );
            }
            (format!("{{{}}}", said.join(", ")), lifetime, longest)
        },
    )
}

proptest! {
    #[test]
    fn whatever_is_said_and_asked(
        all in level(),
        of_a in level(),
        of_ax in level(),
        who in 0usize..4,
        whom in prop::option::of(0usize..4),
        seconds in prop_oneof![-5i64..200, any::<i64>()],
        dns in prop::collection::vec("[a-z*]{1,3}\\.(a|b|istio-system|example)\\.(svc|org)|istiod\\.istio-system\\.svc|istio-ca|IstioD\\.istio-system\\.svc|x\\.example\\.org", 0..6),
        reviewed: bool,
        age in 0i64..60,
        by in 0u8..4,
        kind in prop::option::of(0usize..6),
    ) {
        let top = all.0.trim_matches(['{', '}']).replace(", ", "\n").replace("'\n'", "', '");
        let text = format!(
            "{top}\nimpersonators: [b/y]\nkeys: [p256, p384, rsa2048]\nnamespaces:\n  a: {}\naccounts:\n  a/x: {}\n  a/y: {{deny: true}}\n",
            of_a.0, of_ax.0
        );
        let limits = Limits { lifetime: Lifetime::from_secs(30), longest: Lifetime::from_secs(60), ..limits() };
        let policy = Policy::parse(text.as_bytes(), &limits).unwrap_or_else(|fault| panic!("{fault}\n{text}"));
        let proof = match by {
            0 => token(reviewed),
            1 => Proof::Certificate { proved_at: NOW - Duration::days(age) },
            2 => Proof::Oidc { issuer: "https://a".into() },
            _ => Proof::Forwarded { proxy: SpiffeId::parse("spiffe://a/b").unwrap() },
        };
        let caller = caller(ACCOUNTS[who], proof);
        let impersonated = whom.map(|whom| named(ACCOUNTS[whom]));
        let ask = Ask {
            caller: &caller,
            impersonated: impersonated.as_ref(),
            key: kind.map(|kind| KINDS[kind]),
            dns: &dns,
            lifetime: self::seconds(seconds),
            now: NOW,
        };
        let decided = policy.decide(&ask);
        let steps = policy.explain(&ask);
        let first = steps.iter().find_map(|step| step.verdict.as_ref().err());
        prop_assert_eq!(decided.as_ref().err(), first, "explained as decided");
        let Ok(decision) = decided else { return Ok(()) };
        // Never another identity than the asked one.
        let account = impersonated.clone().unwrap_or_else(|| caller.account.clone());
        prop_assert_eq!(&decision.account, &account);
        prop_assert!(account != named("a/y"), "denied");
        if impersonated.is_some() {
            prop_assert_eq!(&caller.account, &named("b/y"));
            prop_assert!(by == 0, "by token alone");
        }
        prop_assert!(by != 1 || age < 30);
        // Never longer than the longest, and never other than asked.
        prop_assert!(decision.lifetime.value <= decision.longest.value);
        if seconds > 0 {
            prop_assert_eq!(decision.lifetime.value.duration().as_secs(), seconds as u64);
        }
        // The most specific wins.
        let levels = match ACCOUNTS.iter().position(|name| named(name) == account) {
            Some(0) => vec![&of_ax, &of_a, &all],
            Some(1) => vec![&of_a, &all],
            _ => vec![&all],
        };
        let longest = levels.iter().find_map(|level| level.2).unwrap_or(60);
        prop_assert_eq!(decision.longest.value.duration().as_secs(), longest);
        if seconds <= 0 {
            let lifetime = levels.iter().find_map(|level| level.1).unwrap_or(30);
            prop_assert_eq!(decision.lifetime.value.duration().as_secs(), lifetime);
        }
        // No name of Mica's own, none of another namespace, none that was not asked for.
        for name in &decision.dns {
            let lower = name.as_str().to_lowercase();
            prop_assert!(dns.contains(&name.as_str().to_owned()));
            prop_assert!(lower != "istiod.istio-system.svc" && lower != "istio-ca");
            let own = format!(".{}.svc", account.namespace());
            prop_assert!(
                lower.ends_with(&own) || lower.ends_with(".istio-system.svc") || lower == format!("{}.example.org", account.name()),
                "{}", lower
            );
        }
    }

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,200}") {
        let _ = Policy::parse(text.as_bytes(), &limits());
    }

    #[test]
    fn no_change_to_the_example_makes_it_panic(at in 0usize..3_000, with in "\\PC|\n|  |: |- |\\*a|&a|<<: ") {
        let mut text = example();
        let at = text.char_indices().map(|(at, _)| at).nth(at % text.chars().count()).unwrap();
        text.insert_str(at, &with);
        let _ = Policy::parse(text.as_bytes(), &limits());
    }
}

#[test]
fn wishes_count_within_what_is_granted() {
    let limits = Limits {
        lifetime: Lifetime::from_secs(86_400),
        longest: Lifetime::from_secs(90 * 86_400),
        own_names: Vec::new(),
    };
    let text = b"keys: [p384, p256]\nnamespaces: {shop: {longest_lifetime: 48h, dns: [\"*.{namespace}.svc\"]}, bank: {deny: true}, old: {keys: [rsa2048]}}";
    let policy = Policy::parse(text, &limits).unwrap();
    let made = [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519];
    let wishes = |ttl: &str, key_kind: &str, dns_names: &str| {
        let said = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Wishes { ttl: said(ttl), key_kind: said(key_kind), dns_names: said(dns_names) }
    };
    let of = |namespace: &str, wishes: &Wishes| {
        policy.deliver(&ServiceAccount::new(namespace, "web").unwrap(), wishes, &made)
    };
    for (asked, hours, key, dns, refused) in [
        (wishes("", "", ""), 24, (KeyKind::P256, false), "", 0),
        (wishes("48h", "p384", "web.shop.svc"), 48, (KeyKind::P384, true), "web.shop.svc", 0),
        (wishes("49h", "ed25519", "web.bank.svc"), 24, (KeyKind::P256, false), "", 3),
        (wishes("9s", "rsa2048", "*.shop.svc, a.shop.svc ,"), 24, (KeyKind::P256, false), "a.shop.svc", 3),
        (wishes("soon", "P256", "(too long)"), 24, (KeyKind::P256, false), "", 3),
    ] {
        let delivery = of("shop", &asked).unwrap();
        let names: Vec<_> = delivery.dns.iter().map(|name| name.as_str()).collect();
        assert_eq!(delivery.lifetime, Lifetime::from_secs(hours * 3_600), "{asked:?}");
        assert_eq!((delivery.key, names.join(",").as_str()), (key, dns), "{asked:?}");
        assert_eq!(delivery.refused.len(), refused, "{asked:?} {:?}", delivery.refused);
    }
    let first_allowed = policy.deliver(
        &ServiceAccount::new("shop", "web").unwrap(),
        &Wishes::default(),
        &[KeyKind::Ed25519, KeyKind::P384],
    );
    assert_eq!(first_allowed.unwrap().key, (KeyKind::P384, false));
    assert_eq!(of("bank", &Wishes::default()).unwrap_err().reason, Reason::IdentityDenied);
    assert_eq!(of("old", &wishes("", "p256", "")).unwrap_err().reason, Reason::KeyRefused);
}
