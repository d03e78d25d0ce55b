//! Tokens, and the word of proxies. The issuer's keys were made for this; whoever signs with them is the issuer, whoever
//! does not is an attacker who knows everything that is public.

use std::io::ErrorKind;
use std::net::TcpListener;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use mica::core::pem;
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair,
    RsaPublicKeyComponents,
};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};

use super::forge::{Ca, sequence, tlv, uri};
use super::{Answer, Ask, Cut, DB, Expected, Own, Row, Stage, WEB, unauthenticated};
use crate::fixtures::run;
use crate::parts;

pub(super) const ISSUER: &str = "https://issuer.example.org";
const REBORN: &str = "spiffe://cluster.local/ns/shop/sa/reborn";

const MALFORMED: Expected = unauthenticated("TOKEN_MALFORMED");
const ALGORITHM: Expected = unauthenticated("TOKEN_ALGORITHM");
const KEY_UNKNOWN: Expected = unauthenticated("TOKEN_KEY_UNKNOWN");
const SIGNATURE: Expected = unauthenticated("TOKEN_SIGNATURE");
const AUDIENCE: Expected = unauthenticated("TOKEN_AUDIENCE");
const EXPIRED: Expected = unauthenticated("TOKEN_EXPIRED");
const EARLY: Expected = unauthenticated("TOKEN_NOT_YET_VALID");
const WRONG_ISSUER: Expected = unauthenticated("TOKEN_ISSUER");
const CREDENTIAL: Expected = unauthenticated("CREDENTIAL_MALFORMED");
const GONE: Expected = unauthenticated("ACCOUNT_GONE");
const FORWARDED: Expected = unauthenticated("FORWARDED_MALFORMED");
const FORWARDER: Expected = unauthenticated("FORWARDER_UNKNOWN");

#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    // What the others differ from.
    ("a token", |s| claims(s, json!({})), Own(WEB)),
    ("a token without claims of Kubernetes' own", |s| claims(s, json!({"kubernetes.io": null})), Own(WEB)),

    // For whom.
    ("a token for another audience", |s| claims(s, json!({"aud": ["vault"]})), AUDIENCE),
    ("a token for the API server", |s| claims(s, json!({"aud": "https://kubernetes.default.svc.cluster.local"})), AUDIENCE),
    ("a token for no audience", |s| claims(s, json!({"aud": null})), AUDIENCE),
    ("a token for an empty audience", |s| claims(s, json!({"aud": ""})), AUDIENCE),
    ("a token for an empty list of audiences", |s| claims(s, json!({"aud": []})), AUDIENCE),
    ("a token for other audiences too", |s| claims(s, json!({"aud": ["vault", "istio-ca"]})), Own(WEB)),
    ("a token for an audience in one text", |s| claims(s, json!({"aud": "istio-ca"})), Own(WEB)),
    ("a token for an audience in upper case", |s| claims(s, json!({"aud": ["Istio-CA"]})), AUDIENCE),
    ("a token for an audience that begins the same", |s| claims(s, json!({"aud": ["istio-ca2", "istio-"]})), AUDIENCE),
    ("a token for several audiences in one text", |s| claims(s, json!({"aud": "vault istio-ca"})), AUDIENCE),
    ("a token for an audience that is an object", |s| claims(s, json!({"aud": {"istio-ca": true}})), AUDIENCE),
    ("a token for an audience in a list of a list", |s| claims(s, json!({"aud": [["istio-ca"]]})), AUDIENCE),
    ("a token for an audience and a number", |s| claims(s, json!({"aud": ["istio-ca", 1]})), AUDIENCE),

    // Until when.
    ("a token that has expired", |s| claims(s, json!({"exp": now() - 1})), EXPIRED),
    ("a token that does not say when it expires", |s| raw_claims(s, |c| { c.remove("exp"); }), EXPIRED),
    ("a token that expires at null", |s| raw_claims(s, |c| { c.insert("exp".to_owned(), Value::Null); }), EXPIRED),
    ("a token whose expiry is a text", |s| claims(s, json!({"exp": (now() + 600).to_string()})), EXPIRED),
    ("a token whose expiry has a fraction", |s| claims(s, json!({"exp": now() as f64 + 600.5})), Own(WEB)),
    ("a token whose expiry is beyond all years", |s| claims(s, json!({"exp": 1e300})), EXPIRED),
    ("a token whose expiry is the largest number", |s| claims(s, json!({"exp": i64::MAX})), EXPIRED),
    ("a token whose expiry is larger than that", |s| claims(s, json!({"exp": u64::MAX})), EXPIRED),
    ("a token whose expiry is negative", |s| claims(s, json!({"exp": -1})), EXPIRED),
    ("a token whose expiry is zero", |s| claims(s, json!({"exp": 0})), EXPIRED),
    ("a token whose expiry is true", |s| claims(s, json!({"exp": true})), EXPIRED),
    ("a token whose expiry is a list", |s| claims(s, json!({"exp": [now() + 600]})), EXPIRED),
    ("a token whose expiry is written Exp", |s| raw_claims(s, |c| { let at = c.remove("exp").unwrap(); c.insert("Exp".to_owned(), at); }), EXPIRED),
    ("a token that is not yet valid", |s| claims(s, json!({"nbf": now() + 3_000})), EARLY),
    ("a token whose beginning is a text", |s| claims(s, json!({"nbf": "now"})), MALFORMED),
    ("a token that was issued tomorrow", |s| claims(s, json!({"iat": now() + 86_400})), EARLY),

    // By whom.
    ("a token of another issuer", |s| claims(s, json!({"iss": "https://other.example.org"})), WRONG_ISSUER),
    ("a token of the issuer with a slash behind it", |s| claims(s, json!({"iss": format!("{ISSUER}/")})), WRONG_ISSUER),
    ("a token of the issuer in upper case", |s| claims(s, json!({"iss": ISSUER.to_uppercase()})), WRONG_ISSUER),
    ("a token of no issuer", |s| claims(s, json!({"iss": null})), WRONG_ISSUER),
    ("a token of a list of issuers", |s| claims(s, json!({"iss": [ISSUER]})), WRONG_ISSUER),
    ("a token of Mica's own trial issuer, which is off", |s| claims(s, json!({"iss": mica::core::token::trial::ISSUER})), WRONG_ISSUER),

    // Its algorithm and its key.
    ("a token of ECDSA", |s| s.bearer(&s.issuer.ecdsa(HEADER_ES, &claims_of(json!({})))), Own(WEB)),
    ("a token without a key's name, which one key fits", |s| header(s, json!({"alg": "RS256"})), Own(WEB)),
    ("alg none, without a signature", |s| s.bearer(&format!("{}.", part_of(json!({"alg": "none"})))), MALFORMED),
    ("alg none, with a signature", |s| header(s, json!({"alg": "none", "kid": "rsa"})), ALGORITHM),
    ("alg nOnE", |s| header(s, json!({"alg": "nOnE", "kid": "rsa"})), ALGORITHM),
    ("no alg", |s| header(s, json!({"kid": "rsa"})), MALFORMED),
    ("an alg that is a number", |s| header(s, json!({"alg": 256, "kid": "rsa"})), ALGORITHM),
    ("an alg that is a list", |s| header(s, json!({"alg": ["RS256"], "kid": "rsa"})), ALGORITHM),
    ("HS256 with the public key's PEM for a secret", |s| hs256(s, s.issuer.public_pem.as_bytes()), ALGORITHM),
    ("HS256 with the public key's DER for a secret", |s| hs256(s, &s.issuer.public_der), ALGORITHM),
    ("HS256 with the published modulus for a secret", |s| hs256(s, s.issuer.jwks["keys"][0]["n"].as_str().unwrap().as_bytes()), ALGORITHM),
    ("HS256 with an empty secret", |s| hs256(s, b""), ALGORITHM),
    ("ES256 in the header of an RSA key's token", |s| header(s, json!({"alg": "ES256", "kid": "rsa"})), ALGORITHM),
    ("RS512 with a key that is for RS256", |s| header(s, json!({"alg": "RS512", "kid": "rsa"})), ALGORITHM),
    ("RS256 in lower case", |s| header(s, json!({"alg": "rs256", "kid": "rsa"})), ALGORITHM),
    ("a key that nobody knows", |s| header(s, json!({"alg": "RS256", "kid": "other"})), KEY_UNKNOWN),
    ("a key named by a path", |s| header(s, json!({"alg": "RS256", "kid": "../../../dev/null"})), KEY_UNKNOWN),
    ("a key named by a query", |s| header(s, json!({"alg": "RS256", "kid": "' OR 1=1 --"})), KEY_UNKNOWN),
    ("a key named by a number", |s| header(s, json!({"alg": "RS256", "kid": 1})), MALFORMED),
    ("a header with crit", |s| header(s, json!({"alg": "RS256", "kid": "rsa", "crit": ["exp"], "exp": 1})), MALFORMED),
    ("a header with an empty crit", |s| header(s, json!({"alg": "RS256", "kid": "rsa", "crit": []})), MALFORMED),
    ("another type of token", |s| header(s, json!({"alg": "RS256", "kid": "rsa", "typ": "secevent+jwt"})), MALFORMED),
    ("an encrypted token", |s| s.bearer("eyJhbGciOiJkaXIiLCJlbmMiOiJBMTI4R0NNIn0.AAAA.AAAA.AAAA.AAAA"), MALFORMED),
    ("the attacker's own key in the header", |s| elsewhere(s, |attacker, _| json!({"alg": "RS256", "kid": "rsa", "jwk": attacker.jwks["keys"][0]}), false), SIGNATURE),
    ("the attacker's own keys at an address in the header", address_of_keys, SIGNATURE),
    ("the attacker's own certificate in the header", |s| elsewhere(s, |attacker, _| json!({"alg": "RS256", "kid": "rsa", "x5c": [STANDARD.encode(&attacker.public_der)]}), false), SIGNATURE),
    ("an address in the header of a good token, where nobody looks", |s| elsewhere(s, |_, place| json!({"alg": "RS256", "kid": "rsa", "jku": place, "x5u": place}), true), Own(WEB)),
    ("the key's name with the attacker's signature", |s| s.bearer(&Issuer::new().rsa(&HEADER_RS.parse().unwrap(), &claims_of(json!({})))), SIGNATURE),

    // Its signature and its form.
    ("other claims under a good signature", |s| changed(s, |[h, _, g]| format!("{h}.{}.{g}", encoded(claims_for("db")))), SIGNATURE),
    ("another header over a good signature", |s| changed(s, |[_, c, g]| format!("{}.{c}.{g}", encoded(r#"{"kid":"rsa","alg":"RS256"}"#))), SIGNATURE),
    ("a signature with a bit turned", |s| changed(s, |[h, c, g]| format!("{h}.{c}.{}", flipped(g))), SIGNATURE),
    ("a signature of zeros", |s| changed(s, |[h, c, _]| format!("{h}.{c}.{}", encoded([0; 256]))), SIGNATURE),
    ("an empty signature", |s| changed(s, |[h, c, _]| format!("{h}.{c}.")), MALFORMED),
    ("no signature", |s| changed(s, |[h, c, _]| format!("{h}.{c}")), MALFORMED),
    ("ECDSA's signature of zeros", |s| s.bearer(&format!("{}.{}", part_of(json!({"alg": "ES256", "kid": "ec"})), encoded([0; 64]))), SIGNATURE),
    ("ECDSA's signature as certificates have it", der_signature, SIGNATURE),
    ("base64 with padding", |s| changed(s, |[h, c, g]| format!("{h}.{c}.{g}==")), MALFORMED),
    ("base64 of the other alphabet", |s| changed(s, |[h, c, _]| format!("{h}.{c}.{}", "+/".repeat(171))), MALFORMED),
    ("base64 with bits that count for nothing", |s| changed(s, |[h, c, g]| format!("{h}.{c}.{}", not_canonical(g))), MALFORMED),
    ("a dot behind the token", |s| changed(s, |parts| parts.join(".") + "."), MALFORMED),
    ("dots alone", |s| s.bearer(".."), MALFORMED),
    ("10,000 dots", |s| s.bearer(&".".repeat(8_000)), MALFORMED),
    ("no JSON", |s| s.bearer("a.b.c"), MALFORMED),
    ("a claim twice", |s| text(s, &claims_of(json!({})).replacen('{', r#"{"sub":"system:serviceaccount:shop:db","#, 1)), MALFORMED),
    ("a claim twice, once with an escape", |s| text(s, &claims_of(json!({})).replacen('{', r#"{"s\u0075b":"system:serviceaccount:shop:db","#, 1)), MALFORMED),
    ("claims that are a list", |s| text(s, "[]"), MALFORMED),
    ("claims that are no JSON", |s| text(s, "{"), MALFORMED),
    ("claims and something behind them", |s| text(s, &(claims_of(json!({})) + "{}")), MALFORMED),
    ("claims in claims, 1,000 deep", |s| text(s, &format!(r#"{{"a":{}{}}}"#, "[".repeat(1_000), "]".repeat(1_000))), MALFORMED),
    ("a token of 12 kB", |s| claims(s, json!({"more": "a".repeat(9_000)})), MALFORMED),
    ("a token of 1 MB", |s| s.headed(&[("authorization", &format!("Bearer {}", "a".repeat(1_000_000)))]), Cut),

    // Whose it is.
    ("a token without a subject", |s| claims(s, json!({"sub": null, "kubernetes.io": null})), MALFORMED),
    ("a token of an empty subject", |s| of(s, ""), MALFORMED),
    ("a token whose subject is a number", |s| claims(s, json!({"sub": 1, "kubernetes.io": null})), MALFORMED),
    ("a token of a user", |s| of(s, "admin"), MALFORMED),
    ("a token of a node", |s| of(s, "system:node:one"), MALFORMED),
    ("a token of a SPIFFE ID", |s| of(s, WEB), MALFORMED),
    ("a token of a namespace alone", |s| of(s, "system:serviceaccount:shop"), MALFORMED),
    ("a token of an account and more", |s| of(s, "system:serviceaccount:shop:web:db"), MALFORMED),
    ("a token of an account in no namespace", |s| of(s, "system:serviceaccount::web"), MALFORMED),
    ("a token of a namespace that goes up", |s| of(s, "system:serviceaccount:..:web"), MALFORMED),
    ("a token of a namespace in upper case", |s| of(s, "system:serviceaccount:SHOP:web"), MALFORMED),
    ("a token of a namespace that is encoded", |s| of(s, "system:serviceaccount:%2e%2e:web"), MALFORMED),
    ("a token of an account with a path", |s| of(s, "system:serviceaccount:shop:web/../db"), MALFORMED),
    ("a token of an account with a NUL", |s| of(s, "system:serviceaccount:shop:web\0"), MALFORMED),
    ("a token of an account with a new line", |s| of(s, "system:serviceaccount:shop:web\n{\"level\":\"ERROR\"}"), MALFORMED),
    ("a token of an account in other letters that look the same", |s| of(s, "system:serviceaccount:shop:wеb"), MALFORMED),
    ("a token whose subject is another account than Kubernetes' claim", |s| claims(s, json!({"sub": "system:serviceaccount:shop:db"})), MALFORMED),
    ("a token whose namespace is another than Kubernetes' claim", |s| claims(s, json!({"sub": "system:serviceaccount:other:web"})), MALFORMED),
    ("a token whose claim of Kubernetes is a text", |s| claims(s, json!({"kubernetes.io": "web"})), MALFORMED),
    ("a token whose claim of Kubernetes is empty", |s| claims(s, json!({"kubernetes.io": {}})), MALFORMED),
    ("a token of a pod whose name is a path", |s| claims(s, json!({"kubernetes.io": {"namespace": "shop", "serviceaccount": {"name": "web", "uid": "u"}, "pod": {"name": "../pods/other", "uid": "u"}}})), MALFORMED),
    ("a token that is bound to a Secret", |s| claims(s, json!({"kubernetes.io": {"namespace": "shop", "serviceaccount": {"name": "web", "uid": "u"}, "secret": {"name": "s", "uid": "u"}}})), unauthenticated("TOKEN_REJECTED")),
    ("a token of an account that never was", |s| of(s, "system:serviceaccount:shop:nobody"), GONE),
    ("a token of an account of another namespace", |s| of(s, "system:serviceaccount:other:web"), GONE),
    ("a token of an account that was removed, which was good before", |s| s.bearer(&s.gone_token), GONE),
    // A folder of manifests knows no UIDs, so the new account is the old one; with an API server it is ACCOUNT_REPLACED.
    ("a token of an account that was removed and came again", |s| s.bearer(&s.reborn_token), Own(REBORN)),

    // How it is sent.
    ("a scheme in lower case", |s| s.headed(&[("authorization", &format!("bearer {}", s.issuer.token("web")))]), Own(WEB)),
    ("two tokens in two headers", |s| s.headed(&[("authorization", &format!("Bearer {}", s.issuer.token("web"))), ("authorization", "Bearer a.b.c")]), CREDENTIAL),
    ("the same token in two headers", |s| { let t = format!("Bearer {}", s.issuer.token("web")); s.headed(&[("authorization", &t), ("authorization", &t)]) }, CREDENTIAL),
    ("two tokens in one header", |s| s.headed(&[("authorization", &format!("Bearer a.b.c, Bearer {}", s.issuer.token("web")))]), CREDENTIAL),
    ("a password", |s| s.headed(&[("authorization", "Basic d2ViOndlYg==")]), CREDENTIAL),
    ("a scheme without a token", |s| s.headed(&[("authorization", "Bearer")]), CREDENTIAL),
    ("a scheme and a space", |s| s.headed(&[("authorization", "Bearer ")]), CREDENTIAL),
    ("an empty header", |s| s.headed(&[("authorization", "")]), CREDENTIAL),
    ("a token without its scheme", |s| s.headed(&[("authorization", &s.issuer.token("web"))]), CREDENTIAL),
    ("a token in another header", |s| s.headed(&[("x-authorization", &format!("Bearer {}", s.issuer.token("web")))]), unauthenticated("NO_CREDENTIAL")),

    // Several credentials: the first kind decides, and no other makes it good.
    ("web's certificate and db's token", |s| s.both(&s.web, &format!("Bearer {}", s.issuer.token("db"))), Own(DB)),
    ("a good certificate and a token that has expired", |s| s.both(&s.web, &format!("Bearer {}", s.issuer.rsa(&HEADER_RS.parse().unwrap(), &claims_of(json!({"exp": 1}))))), EXPIRED),
    ("a good certificate and a token that is none", |s| s.both(&s.web, "Bearer x"), MALFORMED),
    ("a good certificate and a password", |s| s.both(&s.web, "Basic d2ViOndlYg=="), CREDENTIAL),
    ("a good certificate and a token of an account that is gone", |s| s.both(&s.web, &format!("Bearer {}", s.gone_token)), GONE),
    ("a token and the certificate of a CA", |s| s.both(&s.ca.intermediate(|_| ()).itself(), &format!("Bearer {}", s.issuer.token("web"))), Own(WEB)),
    ("a bad token and the word of a proxy", |s| s.send(Ask { identity: Some(s.gateway.clone()), headers: vec![("authorization", "Bearer x".to_owned()), (XFCC, format!("URI={DB}"))], ..s.ask() }), MALFORMED),

    // The word of a proxy.
    ("the word of a proxy", |s| word(s, &format!("URI={DB}")), Own(DB)),
    ("the word of a proxy with everything that Envoy writes", |s| word(s, &format!("By=spiffe://cluster.local/ns/shop/sa/gateway;Hash=00;Subject=\"CN=a,O=\\\"b;URI=c\\\"\";URI={DB};DNS=a;DNS=b")), Own(DB)),
    ("the word of nobody", |s| said(s, None, &[&format!("URI={DB}")]), FORWARDER),
    ("the word of web, which is no proxy, for db", |s| said(s, Some(s.web.clone()), &[&format!("URI={DB}")]), FORWARDER),
    ("the word of web for itself", |s| said(s, Some(s.web.clone()), &[&format!("URI={WEB}")]), FORWARDER),
    ("an empty word of web", |s| said(s, Some(s.web.clone()), &[""]), FORWARDER),
    ("the word of a proxy that a stranger vouches for", |s| said(s, Some(Ca::pretended(&s.place).leaf(|p| p.subject_alt_names = vec![uri(GATEWAY)])), &[&format!("URI={DB}")]), unauthenticated("CERTIFICATE_FOREIGN")),
    ("the word of a proxy whose certificate has expired", |s| said(s, Some(s.ca.leaf(|p| { p.subject_alt_names = vec![uri(GATEWAY)]; p.not_after = OffsetDateTime::now_utc() - Duration::seconds(2) })), &[&format!("URI={DB}")]), unauthenticated("CERTIFICATE_EXPIRED")),
    ("the word of a proxy's proxy", |s| word(s, &format!("URI={WEB},By=a;URI={DB}")), FORWARDED),
    ("the word of a proxy in two headers", |s| said(s, Some(s.gateway.clone()), &[&format!("URI={WEB}"), &format!("URI={DB}")]), FORWARDED),
    ("the word of a proxy for two URIs", |s| word(s, &format!("URI={WEB};URI={DB}")), FORWARDED),
    ("the word of a proxy for two URIs in other letters", |s| word(s, &format!("URI={WEB};uri={DB}")), FORWARDED),
    ("the word of a proxy for no URI", |s| word(s, "Subject=\"CN=db\";DNS=db.shop.svc"), FORWARDED),
    ("the word of a proxy for a URI in a subject", |s| word(s, &format!("Subject=\"URI={DB}\"")), FORWARDED),
    ("the word of a proxy, cut off in a quotation", |s| word(s, &format!("URI={DB};Subject=\"CN=a")), FORWARDED),
    ("the word of a proxy, with a key that nobody knows", |s| word(s, &format!("URI={DB};Role=admin")), FORWARDED),
    ("an empty word of a proxy", |s| word(s, ""), FORWARDED),
    ("the word of a proxy for another trust domain", |s| word(s, "URI=spiffe://example.org/ns/shop/sa/db"), FORWARDED),
    ("the word of a proxy for a path that goes up", |s| word(s, "URI=spiffe://cluster.local/ns/shop/sa/../sa/db"), FORWARDED),
    ("the word of a proxy for a path that is encoded", |s| word(s, "URI=spiffe://cluster.local/ns/shop/sa%2fdb"), FORWARDED),
    ("the word of a proxy for no service account", |s| word(s, "URI=spiffe://cluster.local/db"), FORWARDED),
    ("the word of a proxy for an account that is gone", |s| word(s, "URI=spiffe://cluster.local/ns/shop/sa/gone"), GONE),
];

const XFCC: &str = "x-forwarded-client-cert";
pub(super) const GATEWAY: &str = "spiffe://cluster.local/ns/shop/sa/gateway";
const HEADER_RS: &str = r#"{"alg":"RS256","kid":"rsa"}"#;
const HEADER_ES: &str = r#"{"alg":"ES256","kid":"ec"}"#;

/// An issuer of service account tokens.
pub(super) struct Issuer {
    rsa: RsaKeyPair,
    ec: EcdsaKeyPair,
    public_pem: String,
    public_der: Vec<u8>,
    pub(super) jwks: Value,
}

impl Issuer {
    pub(super) fn new() -> Self {
        let mut openssl = parts::openssl();
        let key = run(openssl.args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]));
        let rsa = RsaKeyPair::from_pkcs8(&pem::blocks(key.as_bytes()).unwrap()[0].der).unwrap();
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let ec = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8.as_ref(), &random).unwrap();
        let RsaPublicKeyComponents::<Vec<u8>> { n, e } = rsa.public().into();
        let public_der = super::csrs::rsa(&n, &e);
        let point = &ec.public_key().as_ref()[1..];
        let jwks = json!({"keys": [
            {
                "kty": "RSA", "kid": "rsa", "alg": "RS256", "use": "sig",
                "n": encoded(&n), "e": encoded(&e),
            },
            {"kty": "EC", "crv": "P-256", "kid": "ec", "x": encoded(&point[..32]), "y": encoded(&point[32..])},
        ]});
        Self { rsa, ec, public_pem: pem::encode("PUBLIC KEY", &public_der), public_der, jwks }
    }

    /// A good token of an account.
    pub(super) fn token(&self, account: &str) -> String {
        self.rsa(&HEADER_RS.parse().unwrap(), &claims_for(account))
    }

    fn rsa(&self, header: &Value, claims: &str) -> String {
        let message = format!("{}.{}", encoded(header.to_string()), encoded(claims));
        let mut signature = vec![0; self.rsa.public().modulus_len()];
        self.rsa.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message.as_bytes(), &mut signature).unwrap();
        format!("{message}.{}", encoded(signature))
    }

    fn ecdsa(&self, header: &str, claims: &str) -> String {
        let message = format!("{}.{}", encoded(header), encoded(claims));
        let signature = self.ec.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
        format!("{message}.{}", encoded(signature))
    }
}

impl Stage {
    /// With a token and nothing else.
    pub(super) fn bearer(&self, token: &str) -> Answer {
        // Whoever has the signature has the token, but for what can be guessed.
        if let Some((_, signature)) = token.rsplit_once('.').filter(|(_, signature)| signature.len() > 40) {
            self.is_secret(signature);
        }
        self.headed(&[("authorization", &format!("Bearer {token}"))])
    }

    /// With these headers and no certificate.
    pub(super) fn headed(&self, headers: &[(&'static str, &str)]) -> Answer {
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        self.send(Ask { identity: None, headers, ..self.ask() })
    }

    pub(super) fn both(&self, identity: &super::Identity, authorization: &str) -> Answer {
        let headers = vec![("authorization", authorization.to_owned())];
        self.send(Ask { identity: Some(identity.clone()), headers, ..self.ask() })
    }
}

fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

fn encoded(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Web's claims as Kubernetes makes them, with others in their place; null leaves one out.
pub(super) fn claims_of(other: Value) -> String {
    let mut claims = json!({
        "aud": ["istio-ca"], "iss": ISSUER, "exp": now() + 600, "iat": now(), "nbf": now(), "jti": "1f0c",
        "sub": "system:serviceaccount:shop:web",
        "kubernetes.io": {
            "namespace": "shop",
            "serviceaccount": {"name": "web", "uid": "b7a0"},
            "pod": {"name": "web-1", "uid": "c1d2"},
            "node": {"name": "one", "uid": "e3f4"},
        },
    });
    let members = claims.as_object_mut().unwrap();
    for (name, value) in other.as_object().unwrap() {
        match value {
            Value::Null => drop(members.remove(name)),
            value => drop(members.insert(name.clone(), value.clone())),
        }
    }
    claims.to_string()
}

fn claims_for(account: &str) -> String {
    let kubernetes = json!({"namespace": "shop", "serviceaccount": {"name": account, "uid": "b7a0"}});
    claims_of(json!({"sub": format!("system:serviceaccount:shop:{account}"), "kubernetes.io": kubernetes}))
}

/// A good token with other claims.
pub(super) fn claims(stage: &Stage, other: Value) -> Answer {
    text(stage, &claims_of(other))
}

pub(super) fn raw_claims(stage: &Stage, change: fn(&mut serde_json::Map<String, Value>)) -> Answer {
    let mut claims: Value = claims_of(json!({})).parse().unwrap();
    change(claims.as_object_mut().unwrap());
    text(stage, &claims.to_string())
}

/// A token of the issuer with this for its claims.
pub(super) fn text(stage: &Stage, claims: &str) -> Answer {
    stage.bearer(&stage.issuer.rsa(&HEADER_RS.parse().unwrap(), claims))
}

/// A token of the issuer with this subject.
pub(super) fn of(stage: &Stage, subject: &str) -> Answer {
    claims(stage, json!({"sub": subject, "kubernetes.io": null}))
}

/// A token of the issuer's RSA key with another header.
fn header(stage: &Stage, header: Value) -> Answer {
    stage.bearer(&stage.issuer.rsa(&header, &claims_of(json!({}))))
}

/// Header and claims, before a signature.
fn part_of(header: Value) -> String {
    format!("{}.{}", encoded(header.to_string()), encoded(claims_of(json!({}))))
}

fn hs256(stage: &Stage, secret: &[u8]) -> Answer {
    let message = part_of(json!({"alg": "HS256", "kid": "rsa"}));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), message.as_bytes());
    stage.bearer(&format!("{message}.{}", encoded(tag)))
}

/// A header that names keys elsewhere, which nobody may go and get. Signed by the issuer or by the attacker.
fn elsewhere(stage: &Stage, header: fn(&Issuer, &str) -> Value, good: bool) -> Answer {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("http://{}/keys", listener.local_addr().unwrap());
    let attacker = Issuer::new();
    let signer = if good { &stage.issuer } else { &attacker };
    let answer = stage.bearer(&signer.rsa(&header(&attacker, &place), &claims_of(json!({}))));
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "the address was asked");
    answer
}

/// The attacker's own keys, at an address that only its token names.
pub(super) fn address_of_keys(stage: &Stage) -> Answer {
    elsewhere(stage, |_, place| json!({"alg": "RS256", "kid": "rsa", "jku": place, "x5u": place}), false)
}

/// A good token with its three parts changed.
fn changed(stage: &Stage, change: fn([&str; 3]) -> String) -> Answer {
    let token = stage.issuer.token("web");
    let parts: Vec<_> = token.split('.').collect();
    stage.bearer(&change(parts.try_into().unwrap()))
}

fn flipped(signature: &str) -> String {
    let mut bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
    bytes[100] ^= 1;
    encoded(bytes)
}

/// The same bytes to a decoder that is not strict: 256 bytes leave four bits of the last letter.
fn not_canonical(signature: &str) -> String {
    const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (rest, last) = signature.split_at(signature.len() - 1);
    let at = LETTERS.find(last).unwrap();
    assert_eq!(at % 16, 0, "{signature}");
    format!("{rest}{}", &LETTERS[at + 1..at + 2])
}

fn der_signature(stage: &Stage) -> Answer {
    let token = stage.issuer.ecdsa(HEADER_ES, &claims_of(json!({})));
    let (message, signature) = token.rsplit_once('.').unwrap();
    let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    // A byte of zeros more is never too many for a reader that is not strict.
    let number = |bytes: &[u8]| tlv(2, &[&[0], bytes].concat());
    let der = sequence(&[number(&signature[..32]), number(&signature[32..])]);
    stage.bearer(&format!("{message}.{}", encoded(der)))
}

/// The word of the proxy that policy names.
fn word(stage: &Stage, word: &str) -> Answer {
    said(stage, Some(stage.gateway.clone()), &[word])
}

pub(super) fn said(stage: &Stage, identity: Option<super::Identity>, words: &[&str]) -> Answer {
    let headers = words.iter().map(|word| (XFCC, (*word).to_owned())).collect();
    stage.send(Ask { identity, headers, ..stage.ask() })
}
