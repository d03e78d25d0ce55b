//! Federation (70 to 79): what can be shown without a network. The rest is in `tests/it/serve/federation.rs`, by the tests
//! that stand with each rule there: go-spiffe on the other side.

use std::collections::BTreeMap;

use mica::core::bundle::map_from_json;
use mica::core::federation::{self, Foreign, Next, Profile, compare, read, refresh};
use mica::core::jwt_svid::LONGEST;
use mica::core::jwt_svid::validate::validate;
use mica::core::key::KeyKind;
use mica::core::keyring::{AHEAD, Keyring, PERIOD, REFRESH_HINT};
use mica::core::published::Published;
use mica::core::spiffe::TrustDomain;
use mica::sys::keys;
use serde_json::{Value, json};

use super::{NOW, Rule, World, domain, world};

pub(super) const RULES: &[Rule] = &[
    ("70", "both profiles are there, on both sides [Federation 5]", || {
        let web = said("url: 'https://a/', profile: https_web").expect("it is taken");
        assert_eq!(web.profile, Profile::Web { roots: None });
        let spiffe = "url: 'https://a/', profile: https_spiffe, endpoint: 'spiffe://a/b', bundle: c";
        assert!(matches!(said(spiffe).expect("it is taken").profile, Profile::Spiffe { .. }));
        proved_by("go_spiffe_fetches_the_bundle_by_web_pki_and_the_certificate_may_change");
        proved_by("go_spiffe_fetches_the_bundle_from_an_endpoint_known_by_its_svid");
        proved_by("the_endpoint_asks_nobody_for_a_certificate_and_serves_nothing_else");
    }),
    (
        "71",
        "URL, profile and trust domain are named; the endpoint's ID and first bundle too [5.1, 5.2.2.2]",
        || {
            for missing in ["url: 'https://a/'", "profile: https_web", ""] {
                assert!(said(missing).is_err(), "{missing}");
            }
            for half in ["endpoint: 'spiffe://a/b'", "bundle: c"] {
                assert!(
                    said(&format!("url: 'https://a/', profile: https_spiffe, {half}")).is_err(),
                    "{half}"
                );
            }
            // The first bundle may be in the form that is published.
            let published = published();
            let text = published.to_json().expect("JSON");
            assert_eq!(Published::from_json(text.as_bytes()).expect("a bundle"), published);
        },
    ),
    ("72", "the URL is https, without userinfo [5.2.1.1, 5.2.2.1]", || {
        for url in [
            "http://a/",
            "http://localhost/",
            "https://u@a/",
            "https://u:p@a/",
            "https://@a/",
            "spiffe://a",
            "",
        ] {
            assert!(said(&format!("url: '{url}', profile: https_web")).is_err(), "{url}");
        }
        said("url: 'https://a:8443/b?c', profile: https_web").expect("it is taken");
    }),
    ("73", "the server asks for no client's certificate or credential [5.2.1.3, 5.2.2.3]", || {
        proved_by("the_endpoint_asks_nobody_for_a_certificate_and_serves_nothing_else");
    }),
    ("73b", "https_web needs no more than URL, profile and trust domain [5.2.1.2-4]", || {
        said("url: 'https://a/', profile: https_web").expect("it is taken");
        proved_by(
            "a_bundle_of_go_spiffes_is_fetched_by_web_pki_newer_ones_alone_and_is_there_after_a_restart",
        );
    }),
    ("74", "GET gives the newest bundle, UTF-8, application/json [5.2.1.3]", || {
        let published = published();
        let text = published.to_json().expect("JSON");
        let document: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(document["keys"].as_array().expect("keys").len(), 2);
        assert_eq!(document["spiffe_sequence"], json!(published.sequence));
        proved_by("go_spiffe_fetches_the_bundle_from_an_endpoint_known_by_its_svid");
    }),
    (
        "75",
        "https_spiffe: the X509-SVID of the ID; what was fetched counts later on [5.2.2.3, 5.2.2.4]",
        || {
            proved_by("a_bundle_of_go_spiffes_is_fetched_by_its_svid_and_later_by_what_was_fetched");
        },
    ),
    ("76", "redirects may be left unfollowed, and none is remembered [5.2.1.3-4]", || {
        proved_by("an_empty_bundle_is_taken_at_its_word_and_no_other_odd_answer_is");
    }),
    ("77", "keys are published 3 to 5 hints before use, and until nothing of theirs is valid [4.1]", || {
        assert!(AHEAD.as_secs() >= 5 * REFRESH_HINT);
        let w = World::of("cluster.local");
        let roots = w.issuer.bundle();
        let step = |before: Option<&Keyring>, now| {
            Keyring::next(before, roots, now, 0, false, || keys::generate(KeyKind::P256)).expect("keys")
        };
        let first = step(None, NOW).expect("a state");
        let kid = first.active(NOW).expect("a key").kid().to_owned();
        let soon = NOW + PERIOD - AHEAD;
        let second = step(Some(&first), soon).expect("another key");
        let has = |state: &Keyring, kid: &str| state.keys().iter().any(|key| key.kid() == kid);
        let next = second.keys()[1].kid().to_owned();
        assert!(has(&second, &kid) && second.active(soon).expect("a key").kid() == kid);
        let used = soon + AHEAD;
        assert_eq!(second.active(used).expect("a key").kid(), next);
        // What the first has signed last is good for so long.
        let over = used + LONGEST.duration();
        assert!(step(Some(&second), over).is_none(), "the first is still published");
        let published = second.bundle(roots).expect("a bundle");
        assert_eq!(published.jwt.len(), 2);
    }),
    ("78", "polled at the hint, five minutes without; ordered by the sequence [4.1, 4.2, 6.2]", || {
        let of = |sequence, refresh_hint| Published { sequence, refresh_hint, ..Published::default() };
        assert_eq!(refresh(Some(&of(None, Some(77)))).as_secs(), 77);
        assert_eq!(refresh(Some(&of(None, None))).as_secs(), 300);
        assert_eq!(compare(Some(&of(Some(2), None)), &of(Some(1), None)), Next::Older);
        assert_eq!(compare(Some(&of(Some(2), None)), &of(Some(3), None)), Next::Newer);
        proved_by(
            "a_bundle_of_go_spiffes_is_fetched_by_web_pki_newer_ones_alone_and_is_there_after_a_restart",
        );
    }),
    ("78b", "without a sequence the one that was fetched last counts [4.2]", || {
        let of = |refresh_hint| Published { refresh_hint, ..Published::default() };
        assert_eq!(compare(Some(&of(Some(1))), &of(Some(2))), Next::Newer);
        assert_eq!(compare(None, &of(None)), Next::Newer);
    }),
    ("79", "bundles of different trust domains are never merged [4.2, 5.1, 7.3]", || {
        assert!(
            read(b"trust_domains: {cluster.local: {url: 'https://a/', profile: https_web}}", &domain())
                .is_err()
        );
        let [one, other] = ["cluster.local", "example.org"].map(World::of);
        let bundles = |name: &str| {
            let json = |world: &World| {
                serde_json::from_str::<Value>(&world.issuer.bundle().to_json().expect("JSON")).expect("JSON")
            };
            let map = json!({"trust_domains": {"cluster.local": json(&one), "example.org": json(&other)}});
            map_from_json(map.to_string().as_bytes()).expect("a map")
                [&TrustDomain::parse(name).expect("a name")]
                .clone()
        };
        assert!(bundles("cluster.local").same_roots(one.issuer.bundle()));
        assert!(bundles("example.org").same_roots(other.issuer.bundle()));
        // A token is judged by the keys of its subject's trust domain, and by no others.
        let asked = |known: &TrustDomain| -> Option<&'static str> {
            assert_eq!(known.as_str(), "example.org");
            None
        };
        let part = |value: Value| {
            use base64::Engine as _;
            base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string())
        };
        let claims = json!({"sub": "spiffe://example.org/a", "aud": ["b"], "exp": 9_999_999_999u64});
        let token = format!("{}.{}.AA", part(json!({"alg": "ES256", "kid": "k"})), part(claims));
        assert!(validate(&token, "b", NOW, asked).is_err());
        proved_by(
            "a_bundle_of_go_spiffes_is_fetched_by_web_pki_newer_ones_alone_and_is_there_after_a_restart",
        );
    }),
];

fn said(of: &str) -> Result<Foreign, federation::Error> {
    let text = format!("trust_domains: {{example.org: {{{of}}}}}");
    let read: BTreeMap<_, _> = read(text.as_bytes(), &domain())?;
    Ok(read.into_values().next().expect("one"))
}

fn published() -> Published {
    let w = world();
    let next = Keyring::next(None, w.issuer.bundle(), NOW, 0, false, || keys::generate(KeyKind::P256));
    let state = next.expect("keys").expect("a state");
    state.bundle(w.issuer.bundle()).expect("a bundle")
}

/// What only a network shows is shown by a test of this name.
fn proved_by(test: &str) {
    let all = include_str!("../serve/federation.rs");
    assert!(all.contains(&format!("#[test]\nfn {test}()")), "there is no test {test}");
}
