use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::json;
use time::macros::datetime;

use super::jwks::KeySet;
use super::*;

const NOW: OffsetDateTime = datetime!(2026-11-23 09:00:00 UTC);
const AUDIENCE: &str = "istio-ca";
const SUB: &str = "system:serviceaccount:bookinfo:details";

fn encoded(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

fn issuer_key() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap()
}

fn issuer_keys() -> KeySet {
    let x = encoded(issuer_key().public_key());
    // Somebody else's, which no token here is signed with.
    let other = encoded(Ed25519KeyPair::from_seed_unchecked(&[8; 32]).unwrap().public_key());
    let set = json!({"keys": [
        {"kty": "OKP", "crv": "Ed25519", "kid": "one", "x": x},
        {"kty": "OKP", "crv": "Ed25519", "kid": "two", "x": other},
    ]});
    KeySet::from_json(set.to_string().as_bytes()).unwrap()
}

/// Signed by the issuer, whatever it says.
fn signed(header: &str, claims: &str) -> String {
    let message = format!("{}.{}", encoded(header), encoded(claims));
    let signature = encoded(issuer_key().sign(message.as_bytes()));
    format!("{message}.{signature}")
}

const HEADER: &str = r#"{"alg":"EdDSA","kid":"one"}"#;

/// As Kubernetes 1.37 makes them, with these claims instead of its own; null leaves one out.
fn claims(other: Value) -> String {
    let now = NOW.unix_timestamp();
    let mut claims = json!({
        "aud": ["istio-ca"],
        "exp": now + 600,
        "iat": now,
        "nbf": now,
        "iss": "https://kubernetes.default.svc.cluster.local",
        "jti": "1f0c",
        "sub": SUB,
        "kubernetes.io": {
            "namespace": "bookinfo",
            "serviceaccount": {"name": "details", "uid": "u-account"},
            "pod": {"name": "details-1", "uid": "u-pod"},
            "node": {"name": "node-1", "uid": "u-node"},
            "warnafter": now + 300,
        },
    });
    for (name, value) in other.as_object().unwrap() {
        match value {
            Value::Null => claims.as_object_mut().unwrap().remove(name),
            value => claims.as_object_mut().unwrap().insert(name.clone(), value.clone()),
        };
    }
    claims.to_string()
}

fn with(other: Value) -> String {
    signed(HEADER, &claims(other))
}

fn judged(text: &str) -> Result<Subject, Fault> {
    let token = Token::read(text)?;
    assert_eq!(token.issuer()?, "https://kubernetes.default.svc.cluster.local");
    let claims = issuer_keys().verify(token)?;
    claims.check(AUDIENCE, NOW)?;
    claims.service_account()
}

#[test]
fn a_sound_token_tells_whose_it_is_and_what_it_is_bound_to() {
    let object = |name: &str, uid: &str| Some(Object { name: name.to_owned(), uid: uid.to_owned() });
    let bound = Bound {
        account_uid: Some("u-account".to_owned()),
        pod: object("details-1", "u-pod"),
        node: object("node-1", "u-node"),
    };
    let account = ServiceAccount::new("bookinfo", "details").unwrap();
    let subject = Subject { account: account.clone(), bound, bound_elsewhere: None };
    assert_eq!(judged(&with(json!({}))), Ok(subject));

    let unbound = Subject { account, bound: Bound::default(), bound_elsewhere: None };
    assert_eq!(judged(&with(json!({"kubernetes.io": null}))), Ok(unbound.clone()));
    let names = json!({"namespace": "bookinfo", "serviceaccount": {"name": "details"}});
    assert_eq!(judged(&with(json!({"kubernetes.io": names}))), Ok(unbound));
}

#[test]
fn what_a_token_may_leave_out_or_write_otherwise() {
    let now = NOW.unix_timestamp();
    for other in [
        json!({"aud": "istio-ca"}),
        json!({"aud": ["x", "istio-ca"]}),
        json!({"nbf": null, "iat": null}),
        json!({"exp": now + 1}),
        json!({"exp": now as f64 + 1.5}),
        json!({"nbf": now + 60, "iat": now + 60}),
        json!({"exp": 253_402_300_799i64}),
    ] {
        assert!(judged(&with(other.clone())).is_ok(), "{other}");
    }
    for header in [
        r#"{"alg":"EdDSA","kid":"one","typ":"JWT"}"#,
        r#"{"alg":"EdDSA","kid":"one","typ":"at+jwt"}"#,
        // Keys that a token brings itself are nothing to us.
        r#"{"alg":"EdDSA","kid":"one","jwk":{"kty":"oct","k":"AA"},"jku":"https://example.org","x5u":"file:///x"}"#,
    ] {
        assert!(judged(&signed(header, &claims(json!({})))).is_ok(), "{header}");
    }
}

#[test]
fn what_a_token_is_bound_to_that_only_the_api_server_knows_is_said() {
    let account = json!({"name": "details", "uid": "u-account"});
    let bound = |claim: Value| judged(&with(json!({"kubernetes.io": claim}))).unwrap();
    let secret =
        json!({"namespace": "bookinfo", "serviceaccount": account, "secret": {"name": "s", "uid": "u"}});
    assert_eq!(bound(secret).bound_elsewhere, Some("a Secret"));
    let node = json!({"namespace": "bookinfo", "serviceaccount": account, "node": {"name": "n", "uid": "u"}});
    assert_eq!(bound(node).bound_elsewhere, Some("a node"));
    // The API server leaves the UID of a node out that it does not know.
    let pod = json!({"name": "p", "uid": "u"});
    let unknown =
        json!({"namespace": "bookinfo", "serviceaccount": account, "pod": pod, "node": {"name": "n"}});
    let unknown = bound(unknown);
    assert_eq!((unknown.bound.node, unknown.bound_elsewhere), (None, None));
}

#[test]
fn hostile_tokens_are_refused_by_what_is_wrong() {
    use Reason::{
        TokenAlgorithm, TokenAudience, TokenExpired, TokenKeyUnknown, TokenMalformed, TokenNotYetValid,
        TokenSignature,
    };
    let now = NOW.unix_timestamp();
    let sound = with(json!({}));
    let parts: Vec<&str> = sound.split('.').collect();
    let [header, body, signature] = parts[..] else { panic!("{sound}") };
    let headed = |header: &str| signed(header, &claims(json!({})));
    let written = |text: &str| signed(HEADER, text);
    let raw = |name: &str, value: &str| {
        let claims = claims(json!({name: null}));
        signed(HEADER, &format!("{},\"{name}\":{value}}}", claims.strip_suffix('}').unwrap()))
    };
    let kubernetes = |claim: Value| with(json!({"kubernetes.io": claim}));
    let details = json!({"name": "details", "uid": "u"});
    let mut longer = URL_SAFE_NO_PAD.decode(signature).unwrap();
    longer.push(0);
    let table: Vec<(&str, String, Reason, &str)> = vec![
        // The compact form.
        ("nothing", String::new(), TokenMalformed, "this has 1"),
        ("one part", header.to_owned(), TokenMalformed, "this has 1"),
        ("no signature", format!("{header}.{body}"), TokenMalformed, "this has 2"),
        ("empty signature", format!("{header}.{body}."), TokenMalformed, "signature is not base64url"),
        ("four parts", format!("{sound}.x"), TokenMalformed, "this has 4"),
        ("JWE", format!("{sound}.x.y"), TokenMalformed, "this has 5"),
        ("empty header", format!(".{body}.{signature}"), TokenMalformed, "header is not base64url"),
        ("empty claims", format!("{header}..{signature}"), TokenMalformed, "claims is not base64url"),
        ("padding", format!("{header}.{body}.{signature}=="), TokenMalformed, "signature is not base64url"),
        ("base64, not base64url", format!("{header}.{body}.+/{signature}"), TokenMalformed, "signature"),
        ("a line break", format!("{header}.{body}\n.{signature}"), TokenMalformed, "claims"),
        ("a space", format!("{header} .{body}.{signature}"), TokenMalformed, "header"),
        ("loose bits", format!("{header}.{body}.{}", loosened(signature)), TokenMalformed, "signature"),
        ("too long", format!("{sound}{}", "A".repeat(MAX)), TokenMalformed, "at most 8192"),
        ("a megabyte", "A".repeat(1 << 20), TokenMalformed, "at most 8192"),
        ("dots", ".".repeat(MAX), TokenMalformed, "this has 8193"),
        // The header.
        ("header a list", headed("[]"), TokenMalformed, "no JSON object"),
        ("header no JSON", headed("{"), TokenMalformed, "header cannot be read"),
        (
            "header no UTF-8",
            format!("{}.{body}.{signature}", encoded(b"{\"alg\":\"\xff\"}")),
            TokenMalformed,
            "header",
        ),
        ("alg twice", headed(r#"{"alg":"EdDSA","alg":"none","kid":"one"}"#), TokenMalformed, "stands twice"),
        ("kid twice", headed(r#"{"alg":"EdDSA","kid":"one","kid":"two"}"#), TokenMalformed, "stands twice"),
        ("crit", headed(r#"{"alg":"EdDSA","kid":"one","crit":["exp"]}"#), TokenMalformed, "crit"),
        ("empty crit", headed(r#"{"alg":"EdDSA","kid":"one","crit":[]}"#), TokenMalformed, "crit"),
        ("crit null", headed(r#"{"alg":"EdDSA","kid":"one","crit":null}"#), TokenMalformed, "crit"),
        ("another typ", headed(r#"{"alg":"EdDSA","kid":"one","typ":"logout+jwt"}"#), TokenMalformed, "typ"),
        ("typ a number", headed(r#"{"alg":"EdDSA","kid":"one","typ":1}"#), TokenMalformed, "typ"),
        ("kid a number", headed(r#"{"alg":"EdDSA","kid":1}"#), TokenMalformed, "kid is 1"),
        ("no alg", headed(r#"{"kid":"one"}"#), TokenMalformed, "no alg"),
        ("alg a number", headed(r#"{"alg":1,"kid":"one"}"#), TokenAlgorithm, "is 1"),
        ("alg null", headed(r#"{"alg":null,"kid":"one"}"#), TokenAlgorithm, "is null"),
        ("alg none", headed(r#"{"alg":"none","kid":"one"}"#), TokenAlgorithm, "none"),
        ("alg nOnE", headed(r#"{"alg":"nOnE","kid":"one"}"#), TokenAlgorithm, "nOnE"),
        ("HS256", headed(r#"{"alg":"HS256","kid":"one"}"#), TokenAlgorithm, "HS256"),
        ("HS512", headed(r#"{"alg":"HS512","kid":"one"}"#), TokenAlgorithm, "HS512"),
        ("ES512", headed(r#"{"alg":"ES512","kid":"one"}"#), TokenAlgorithm, "ES512"),
        ("eddsa in lower case", headed(r#"{"alg":"eddsa","kid":"one"}"#), TokenAlgorithm, "eddsa"),
        ("RS256 with an Ed25519 key", headed(r#"{"alg":"RS256","kid":"one"}"#), TokenAlgorithm, "for EdDSA"),
        ("ES256 with an Ed25519 key", headed(r#"{"alg":"ES256","kid":"one"}"#), TokenAlgorithm, "for EdDSA"),
        ("unknown kid", headed(r#"{"alg":"EdDSA","kid":"three"}"#), TokenKeyUnknown, "\"three\""),
        ("kid in upper case", headed(r#"{"alg":"EdDSA","kid":"ONE"}"#), TokenKeyUnknown, "ONE"),
        ("empty kid", headed(r#"{"alg":"EdDSA","kid":""}"#), TokenKeyUnknown, "\"\""),
        ("kid a path", headed(r#"{"alg":"EdDSA","kid":"../../dev/null"}"#), TokenKeyUnknown, "dev/null"),
        ("no kid, two keys", headed(r#"{"alg":"EdDSA"}"#), TokenKeyUnknown, "2 for EdDSA"),
        ("no kid, no key", headed(r#"{"alg":"RS256"}"#), TokenKeyUnknown, "0 for RS256"),
        // The signature.
        ("another's key", headed(r#"{"alg":"EdDSA","kid":"two"}"#), TokenSignature, "does not fit"),
        (
            "tampered claims",
            format!("{header}.{}.{signature}", encoded(claims(json!({"jti": "2"})))),
            TokenSignature,
            "",
        ),
        (
            "tampered header",
            format!("{}.{body}.{signature}", encoded(format!(" {HEADER}"))),
            TokenSignature,
            "",
        ),
        ("cut signature", format!("{header}.{body}.{}", &signature[..40]), TokenSignature, "does not fit"),
        ("longer signature", format!("{header}.{body}.{}", encoded(&longer)), TokenSignature, "does not fit"),
        ("zeros", format!("{header}.{body}.{}", encoded([0; 64])), TokenSignature, "does not fit"),
        ("none of a signature", format!("{header}.{body}.AA"), TokenSignature, "does not fit"),
        // The claims.
        ("claims a list", written("[1]"), TokenMalformed, "claims cannot be read"),
        ("claims a text", written("\"x\""), TokenMalformed, "claims cannot be read"),
        ("claims no JSON", written("{\"sub\":"), TokenMalformed, "claims cannot be read"),
        ("claims and more", written(&format!("{}{{}}", claims(json!({})))), TokenMalformed, "claims"),
        (
            "nested a thousand deep",
            raw("x", &format!("{}{}", "[".repeat(1000), "]".repeat(1000))),
            TokenMalformed,
            "recursion",
        ),
        ("sub twice", raw("x", &format!("1,\"sub\":\"{SUB}\"")), TokenMalformed, "stands twice"),
        ("exp twice", raw("x", "1,\"exp\":9999999999"), TokenMalformed, "stands twice"),
        ("a name within twice", raw("x", "{\"a\":1,\"a\":1}"), TokenMalformed, "stands twice"),
        // Audience.
        ("no audience", with(json!({"aud": null})), TokenAudience, "no aud"),
        ("audience null", raw("aud", "null"), TokenAudience, "aud is null"),
        ("no audience in the list", with(json!({"aud": []})), TokenAudience, "aud is []"),
        (
            "another audience",
            with(json!({"aud": "kubernetes"})),
            TokenAudience,
            "for \"kubernetes\", not for \"istio-ca\"",
        ),
        ("other audiences", with(json!({"aud": ["a", "b"]})), TokenAudience, "for [\"a\",\"b\"], not for"),
        ("a longer audience", with(json!({"aud": "istio-ca2"})), TokenAudience, ""),
        ("audience in upper case", with(json!({"aud": "ISTIO-CA"})), TokenAudience, ""),
        ("audience a number", with(json!({"aud": 1})), TokenAudience, "aud is 1"),
        ("a number among audiences", with(json!({"aud": ["istio-ca", 1]})), TokenAudience, "a list of texts"),
        ("audience an object", with(json!({"aud": {"istio-ca": true}})), TokenAudience, ""),
        ("a list in the list", with(json!({"aud": [["istio-ca"]]})), TokenAudience, ""),
        // Times.
        ("no expiry", with(json!({"exp": null})), TokenExpired, "no exp"),
        ("expiry null", raw("exp", "null"), TokenExpired, "exp is null"),
        ("expiry a text", with(json!({"exp": (now + 600).to_string()})), TokenExpired, "not a number"),
        ("expiry a list", with(json!({"exp": [now + 600]})), TokenExpired, "not a number"),
        ("expiry true", with(json!({"exp": true})), TokenExpired, "not a number"),
        ("expiry NaN", raw("exp", "NaN"), TokenMalformed, "claims cannot be read"),
        ("expiry Infinity", raw("exp", "Infinity"), TokenMalformed, "claims cannot be read"),
        ("expiry 1e999", raw("exp", "1e999"), TokenMalformed, "claims cannot be read"),
        ("expiry 1e300", raw("exp", "1e300"), TokenExpired, "not a number of seconds"),
        ("expiry of 20 digits", raw("exp", "18446744073709551616"), TokenExpired, "not a number"),
        ("expiry 2^64 - 1", raw("exp", "18446744073709551615"), TokenExpired, "not a number"),
        ("expiry in milliseconds", with(json!({"exp": (now + 600) * 1000})), TokenExpired, "not a number"),
        ("expiry negative", with(json!({"exp": -1})), TokenExpired, "exp is -1"),
        ("expiry 0", with(json!({"exp": 0})), TokenExpired, "1970"),
        ("expired", with(json!({"exp": now - 1})), TokenExpired, "expired at 2026-11-23 08:59:59 UTC"),
        ("expires now", with(json!({"exp": now})), TokenExpired, "expired at"),
        ("expires in less than a second", with(json!({"exp": now as f64 + 0.9})), TokenExpired, "expired at"),
        ("not yet", with(json!({"nbf": now + 61})), TokenNotYetValid, "not valid before 2026-11-23 09:01:01"),
        ("not yet, by a fraction", with(json!({"nbf": now as f64 + 60.5})), TokenNotYetValid, ""),
        ("nbf a text", with(json!({"nbf": "0"})), TokenMalformed, "nbf is \"0\""),
        ("nbf null", raw("nbf", "null"), TokenMalformed, "nbf is null"),
        ("nbf negative", with(json!({"nbf": -5})), TokenMalformed, "nbf is -5"),
        ("nbf huge", raw("nbf", "1e40"), TokenMalformed, "nbf"),
        ("issued later", with(json!({"iat": now + 61})), TokenNotYetValid, "still to come"),
        ("iat a text", with(json!({"iat": "x"})), TokenMalformed, "iat"),
        // Subject.
        ("no subject", with(json!({"sub": null})), TokenMalformed, "no sub"),
        ("empty subject", with(json!({"sub": ""})), TokenMalformed, "no sub"),
        ("subject a number", with(json!({"sub": 1})), TokenMalformed, "sub is 1"),
        ("a user", with(json!({"sub": "system:admin"})), TokenMalformed, "not system:serviceaccount"),
        ("a node", with(json!({"sub": "system:node:n"})), TokenMalformed, "not system:serviceaccount"),
        (
            "a bare account",
            with(json!({"sub": "bookinfo:details"})),
            TokenMalformed,
            "not system:serviceaccount",
        ),
        ("no name", with(json!({"sub": "system:serviceaccount:bookinfo"})), TokenMalformed, "not system:"),
        ("empty name", with(json!({"sub": "system:serviceaccount:bookinfo:"})), TokenMalformed, "sub"),
        (
            "empty namespace",
            with(json!({"sub": "system:serviceaccount::details"})),
            TokenMalformed,
            "namespace",
        ),
        ("five parts", with(json!({"sub": format!("{SUB}:x")})), TokenMalformed, "not system:"),
        (
            "in upper case",
            with(json!({"sub": "system:serviceaccount:bookinfo:Details"})),
            TokenMalformed,
            "Details",
        ),
        ("a path", with(json!({"sub": "system:serviceaccount:bookinfo:../x"})), TokenMalformed, ""),
        ("encoded", with(json!({"sub": "system:serviceaccount:bookinfo:%64etails"})), TokenMalformed, ""),
        ("a line break in it", with(json!({"sub": format!("{SUB}\n")})), TokenMalformed, ""),
        // The claim of Kubernetes.
        ("claim null", kubernetes(json!(1)), TokenMalformed, "kubernetes.io is 1"),
        ("claim empty", kubernetes(json!({})), TokenMalformed, "no kubernetes.io.serviceaccount"),
        (
            "no namespace",
            kubernetes(json!({"serviceaccount": details})),
            TokenMalformed,
            "kubernetes.io.namespace",
        ),
        (
            "another namespace",
            kubernetes(json!({"namespace": "x", "serviceaccount": details})),
            TokenMalformed,
            "claim is of system:serviceaccount:x:details",
        ),
        (
            "another account",
            kubernetes(json!({"namespace": "bookinfo", "serviceaccount": {"name": "y", "uid": "u"}})),
            TokenMalformed,
            "bookinfo:y",
        ),
        (
            "account a text",
            kubernetes(json!({"namespace": "bookinfo", "serviceaccount": "details"})),
            TokenMalformed,
            "not an object",
        ),
        (
            "account without a name",
            kubernetes(json!({"namespace": "bookinfo", "serviceaccount": {"uid": "u"}})),
            TokenMalformed,
            "no kubernetes.io.serviceaccount",
        ),
        (
            "UID a number",
            kubernetes(json!({"namespace": "bookinfo", "serviceaccount": {"name": "details", "uid": 1}})),
            TokenMalformed,
            "is 1",
        ),
        (
            "UID empty",
            kubernetes(json!({"namespace": "bookinfo", "serviceaccount": {"name": "details", "uid": ""}})),
            TokenMalformed,
            "1 to 253",
        ),
        (
            "UID long",
            kubernetes(
                json!({"namespace": "bookinfo", "serviceaccount": {"name": "details", "uid": "u".repeat(254)}}),
            ),
            TokenMalformed,
            "1 to 253",
        ),
        (
            "pod without UID",
            kubernetes(json!({"namespace": "bookinfo", "serviceaccount": details, "pod": {"name": "p"}})),
            TokenMalformed,
            "pod.uid",
        ),
        (
            "pod null",
            kubernetes(json!({"namespace": "bookinfo", "serviceaccount": details, "pod": null})),
            TokenMalformed,
            "pod is null",
        ),
        (
            "pod a path",
            kubernetes(
                json!({"namespace": "bookinfo", "serviceaccount": details, "pod": {"name": "../pods/p", "uid": "u"}}),
            ),
            TokenMalformed,
            "a Kubernetes name",
        ),
        (
            "node with a query",
            kubernetes(
                json!({"namespace": "bookinfo", "serviceaccount": details, "node": {"name": "n?watch=1", "uid": "u"}}),
            ),
            TokenMalformed,
            "a Kubernetes name",
        ),
        (
            "node a text",
            kubernetes(json!({"namespace": "bookinfo", "serviceaccount": details, "node": "n"})),
            TokenMalformed,
            "node",
        ),
    ];
    for (name, text, reason, fragment) in &table {
        let fault = judged(text).expect_err(name);
        let said = fault.to_string();
        assert_eq!(fault.reason(), *reason, "{name}: {said}");
        assert!(said.contains(fragment), "{name}: {said}");
        assert!(said.len() < 500 && !said.contains('\n') && !said.ends_with('.'), "{name}: {said}");
        assert!(text.is_empty() || !said.contains(text.as_str()), "{name}: {said}");
    }
    assert!(table.len() >= 110, "{}", table.len());
}

/// The same bytes, with bits set that nobody reads: another text for the same signature.
fn loosened(signature: &str) -> String {
    let last = signature.chars().next_back().unwrap();
    let next = char::from(last as u8 + 1);
    let loose = format!("{}{next}", &signature[..signature.len() - 1]);
    // 64 bytes leave four bits of the last letter unused, which are zero.
    assert!("AQgw".contains(last), "{signature}");
    loose
}

#[test]
fn the_issuer_that_a_token_names_is_read_before_it_is_believed() {
    let issuer = |other| Token::read(&with(other)).map(|token| token.issuer().map(str::to_owned));
    assert_eq!(issuer(json!({"iss": "x"})), Ok(Ok("x".to_owned())));
    assert_eq!(issuer(json!({"iss": null})).unwrap().unwrap_err().reason(), Reason::TokenIssuer);
    assert_eq!(issuer(json!({"iss": ["x"]})).unwrap().unwrap_err().reason(), Reason::TokenIssuer);
}

#[test]
fn nothing_is_tried_out_where_a_token_names_no_key() {
    let x = encoded(issuer_key().public_key());
    let one = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x}, {"kty": "EC", "crv": "P-256", "x": encoded([1; 32]), "y": encoded([1; 32])}]});
    let keys = KeySet::from_json(one.to_string().as_bytes()).unwrap();
    let text = signed(r#"{"alg":"EdDSA"}"#, &claims(json!({})));
    assert!(keys.verify(Token::read(&text).unwrap()).is_ok());
    let named = with(json!({}));
    let fault = keys.verify(Token::read(&named).unwrap()).unwrap_err();
    assert_eq!(fault, Fault::KeyUnknown("one".to_owned()));
}

proptest::proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "[A-Za-z0-9_.-]{0,200}|\\PC{0,100}") {
        let _ = Token::read(&text);
    }

    #[test]
    fn no_claims_make_it_panic(name in "[a-z.]{1,15}", value in "\\PC{0,40}") {
        let text = signed(HEADER, &format!("{{\"{name}\":{value}}}"));
        if let Ok(token) = Token::read(&text) {
            let claims = issuer_keys().verify(token).unwrap();
            let _ = (claims.check(AUDIENCE, NOW), claims.service_account(), claims.subject());
        }
    }
}
