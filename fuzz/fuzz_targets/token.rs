//! What a stranger sends as a token: any text, and any claims below a signature that fits.
#![no_main]

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use libfuzzer_sys::fuzz_target;
use mica::core::key::{IssuerKey as _, PrivateKey, SigningKey};
use mica::core::token::jwks::KeySet;
use mica::core::token::{MAX, Token, trial};

static KEY: LazyLock<SigningKey> = LazyLock::new(|| {
    let pem = include_bytes!("../corpus/key/ed25519.pem");
    PrivateKey::from_pem(pem, None, None).and_then(|key| key.signing()).expect("the key of the corpus")
});
static KEYS: LazyLock<KeySet> =
    LazyLock::new(|| KeySet::from_json(trial::jwks(KEY.public()).as_bytes()).expect("the key's set"));

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(token) = Token::read(text)
    {
        assert!(text.len() <= MAX && text.is_ascii());
        let _ = token.issuer();
        // Nobody has the key but this file.
        assert!(KEYS.verify(token).is_err(), "a token is believed that nobody signed");
    }

    let message =
        format!("{}.{}", URL_SAFE_NO_PAD.encode(r#"{"alg":"EdDSA"}"#), URL_SAFE_NO_PAD.encode(data));
    let signature = URL_SAFE_NO_PAD.encode(KEY.sign(message.as_bytes()).expect("a signature"));
    let text = format!("{message}.{signature}");
    let Ok(token) = Token::read(&text) else { return };
    let claims = KEYS.verify(token).expect("a signature that fits");
    let now = time::OffsetDateTime::UNIX_EPOCH + time::Duration::days(20_000);
    if let Ok(expires) = claims.check("istio-ca", now) {
        assert!(expires > now);
    }
    if let Ok(subject) = claims.service_account() {
        let (namespace, name) = (subject.account.namespace(), subject.account.name());
        assert_eq!(claims.subject(), Ok(format!("system:serviceaccount:{namespace}:{name}").as_str()));
    }
});
