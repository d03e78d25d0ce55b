//! JWT-SVID (30 to 37).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mica::core::jwt_svid::validate::validate;
use mica::core::jwt_svid::{Audience, Claims, token};
use mica::core::key::{JwsKey, KeyKind};
use mica::core::published::{JwtAuthority, Published};
use mica::core::refusal::Reason;
use mica::core::spiffe::SpiffeId;
use mica::sys::keys;
use serde_json::{Value, json};
use time::Duration;

use super::{ID, NOW, Rule, domain};

pub(super) const RULES: &[Rule] = &[
    ("30", "a token has the compact form, and no other is taken [JWT-SVID 1, 5.1]", || {
        let signer = Signer::new();
        let text = signer.made();
        assert_eq!(text.split('.').count(), 3);
        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)));
        let parts: Vec<&str> = text.split('.').collect();
        let form = json!({"protected": parts[0], "payload": parts[1], "signature": parts[2]});
        let general =
            json!({"payload": parts[1], "signatures": [{"protected": parts[0], "signature": parts[2]}]});
        for other in [form.to_string(), general.to_string(), format!("{text}."), format!("{text}=")] {
            assert!(signer.judge(&other).is_err(), "{other}");
        }
        signer.judge(&text).expect("it is taken");
    }),
    ("31", "alg is one of RS, ES and PS, and is judged before anything else [2.1, 4]", || {
        let signer = Signer::new();
        assert_eq!(header(&signer.made())["alg"], "ES256");
        for alg in ["none", "HS256", "HS512", "EdDSA", "ES256K", "es256", "ML-DSA-44", ""] {
            let text = signer.signed(&json!({"alg": alg, "kid": "k"}), &claims());
            assert!(signer.judge(&text).is_err(), "{alg}");
        }
        assert!(signer.judge(&signer.signed(&json!({"kid": "k"}), &claims())).is_err());
    }),
    ("32", "the header has alg, kid and typ alone; typ is JWT or JOSE [2, 2.2, 2.3]", || {
        let signer = Signer::new();
        let made = header(&signer.made());
        assert_eq!(made, json!({"alg": "ES256", "kid": "k", "typ": "JWT"}));
        for (name, value) in
            [("x5c", json!([])), ("jwk", json!({})), ("jku", json!("https://a")), ("crit", json!(["exp"]))]
        {
            let mut other = made.clone();
            other[name] = value;
            assert!(signer.judge(&signer.signed(&other, &claims())).is_err(), "{name}");
        }
        for (typ, good) in [("JWT", true), ("JOSE", true), ("jwt", false), ("at+jwt", false), ("", false)] {
            let mut other = made.clone();
            other["typ"] = typ.into();
            assert_eq!(signer.judge(&signer.signed(&other, &claims())).is_ok(), good, "{typ}");
        }
    }),
    ("33", "sub is the SPIFFE ID [3.1]", || {
        let signer = Signer::new();
        assert_eq!(payload(&signer.made())["sub"], ID);
        for sub in [json!("web"), json!("https://a/b"), json!("spiffe://td/a/"), json!(1), Value::Null] {
            signer.refuses("sub", &sub);
        }
    }),
    ("34", "aud has one value at least, and who is not among them refuses [3.2]", || {
        let signer = Signer::new();
        assert_eq!(payload(&signer.made())["aud"], json!(["db"]));
        let none = Audience::new(Vec::new(), &domain()).expect_err("it is refused");
        assert_eq!(none.reason, Reason::AudienceRefused);
        for aud in [json!([]), json!(["web"]), json!("web"), json!(1), json!([1]), Value::Null] {
            signer.refuses("aud", &aud);
        }
    }),
    ("35", "exp is there, and who finds none, or one that is over, refuses [3.3, 4]", || {
        let signer = Signer::new();
        assert_eq!(payload(&signer.made())["exp"], json!(NOW.unix_timestamp() + 300));
        for exp in [Value::Null, json!("9999999999"), json!(NOW.unix_timestamp()), json!(-1), json!([])] {
            signer.refuses("exp", &exp);
        }
        let text = signer.made();
        let at = |after: Duration| validate(&text, "db", NOW + after, |_| Some(&*signer.set));
        assert!(at(Duration::seconds(299)).is_ok() && at(Duration::seconds(300)).is_err());
    }),
    ("36", "in the bundle a key has use jwt-svid and a kid, and no other is taken [6.1, 6.2]", || {
        let signer = Signer::new();
        let set: Value = serde_json::from_str(&signer.set).expect("JSON");
        let key = &set["keys"][0];
        assert_eq!((&key["use"], &key["kid"], &key["kty"]), (&"jwt-svid".into(), &"k".into(), &"EC".into()));
        assert!(key.get("d").is_none() && key.get("x5c").is_none());
        let text = signer.made();
        for (name, value) in
            [("use", json!("x509-svid")), ("use", json!("sig")), ("use", Value::Null), ("kid", Value::Null)]
        {
            let mut other = set.clone();
            match value {
                Value::Null => drop(other["keys"][0].as_object_mut().expect("a key").remove(name)),
                value => other["keys"][0][name] = value,
            }
            let other = other.to_string();
            assert!(validate(&text, "db", NOW, |_| Some(&*other)).is_err(), "{other}");
        }
    }),
    (
        "36b",
        "claims of our own are registered ones; no audience is as wide as a trust domain [3, 3.2]",
        || {
            let signer = Signer::new();
            let made = payload(&signer.made());
            let names: Vec<_> = made.as_object().expect("claims").keys().map(String::as_str).collect();
            assert_eq!(names, ["aud", "exp", "iat", "jti", "sub"]);
            for wide in ["spiffe://cluster.local", "spiffe://cluster.local/"] {
                assert!(Audience::new(vec![wide.to_owned()], &domain()).is_err(), "{wide}");
            }
            let mut more = claims();
            more["https://example.org/roles"] = json!(["a"]);
            signer
                .judge(&signer.signed(&json!({"alg": "ES256", "kid": "k"}), &more))
                .expect("others may have more");
        },
    ),
];

struct Signer {
    key: JwsKey,
    set: String,
}

impl Signer {
    fn new() -> Self {
        let key = keys::generate(KeyKind::P256).expect("a key");
        let jwt = vec![JwtAuthority::es256("k", key.public())];
        Self { key: key.jws().expect("a key"), set: Published { jwt, ..Published::default() }.jwks() }
    }

    fn made(&self) -> String {
        let id = SpiffeId::parse(ID).expect("an ID");
        let audience = Audience::new(vec!["db".to_owned()], &domain()).expect("an audience");
        let lifetime = "5m".parse().expect("a duration");
        let claims = Claims { id: &id, audience: &audience, now: NOW, lifetime, jti: "j" };
        token(&self.key, "k", &claims).expect("a token")
    }

    fn signed(&self, header: &Value, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        let signature = self.key.sign(message.as_bytes()).expect("a signature");
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn judge(&self, text: &str) -> Result<(), String> {
        validate(text, "db", NOW, |_| Some(&*self.set)).map(drop).map_err(|fault| fault.to_string())
    }

    /// A good token with another value of one claim, or without it.
    fn refuses(&self, name: &str, value: &Value) {
        let header = json!({"alg": "ES256", "kid": "k"});
        self.judge(&self.signed(&header, &claims())).expect("it is good");
        let mut other = claims();
        match value {
            Value::Null => drop(other.as_object_mut().expect("claims").remove(name)),
            value => other[name] = value.clone(),
        }
        assert!(self.judge(&self.signed(&header, &other)).is_err(), "{name} {value}");
    }
}

fn claims() -> Value {
    json!({"aud": ["db"], "exp": NOW.unix_timestamp() + 60, "sub": ID})
}

fn header(token: &str) -> Value {
    part(token, 0)
}

fn payload(token: &str) -> Value {
    part(token, 1)
}

fn part(token: &str, at: usize) -> Value {
    let part = token.split('.').nth(at).expect("a part");
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).expect("base64url")).expect("JSON")
}
