//! Tokens over the wire: of Mica's own trial issuer, of keys that OpenSSL made and signs with, and of servers that give
//! keys out over HTTPS, some of them badly.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mica::core::certificate::Certificate;
use mica::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::mtls::{ask, connect, csr, reason};
use super::{Mica, Place, output_within, wait_for};
use crate::fixtures::{OpensslCa, run};
use crate::parts;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const ISSUER: &str = "https://issuer.example.org";

/// Asks for a certificate with these authorization headers.
async fn asked(channel: &Channel, headers: &[&str]) -> Result<Certificate, Status> {
    let mut request = tonic::Request::new(ask(csr(WEB)));
    for header in headers {
        request.metadata_mut().append("authorization", header.parse().unwrap());
    }
    let answer = IstioCertificateServiceClient::new(channel.clone()).create_certificate(request).await?;
    Ok(Certificate::all_from_pem(answer.into_inner().cert_chain[0].as_bytes()).unwrap().remove(0))
}

async fn with(channel: &Channel, token: &str) -> Result<Certificate, Status> {
    asked(channel, &[&format!("Bearer {token}")]).await
}

async fn refused(channel: &Channel, token: &str) -> (String, String) {
    let status = with(channel, token).await.unwrap_err();
    let reason = reason(&status);
    let code = if reason == "VERIFIER_UNAVAILABLE" { Code::Unavailable } else { Code::Unauthenticated };
    assert_eq!(status.code(), code, "{reason}");
    (reason, status.message().to_owned())
}

fn encoded(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A key of a token issuer that OpenSSL made, and signs with.
struct IssuerKey {
    folder: tempfile::TempDir,
    algorithm: &'static str,
}

impl IssuerKey {
    fn new(algorithm: &'static str) -> Self {
        let key = Self { folder: tempfile::tempdir().unwrap(), algorithm };
        let kind = match algorithm {
            "ES256" => vec!["EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
            "ES384" => vec!["EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
            "EdDSA" => vec!["ED25519"],
            "RS384" => vec!["RSA", "-pkeyopt", "rsa_keygen_bits:3072"],
            _ => vec!["RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
        };
        run(key.openssl(&["genpkey", "-out", "key.pem", "-algorithm"]).args(kind));
        key
    }

    fn openssl(&self, arguments: &[&str]) -> Command {
        let mut command = parts::openssl();
        command.args(arguments).current_dir(self.folder.path());
        command
    }

    /// Its public half, as RFC 7517 has it.
    fn jwk(&self, kid: &str) -> Value {
        run(&mut self.openssl(&[
            "pkey",
            "-in",
            "key.pem",
            "-pubout",
            "-outform",
            "DER",
            "-out",
            "public.der",
        ]));
        let public = fs::read(self.folder.path().join("public.der")).unwrap();
        let last = |count: usize| &public[public.len() - count..];
        let mut jwk = match self.algorithm {
            "ES256" => {
                json!({"kty": "EC", "crv": "P-256", "x": encoded(&last(64)[..32]), "y": encoded(&last(64)[32..])})
            }
            "ES384" => {
                json!({"kty": "EC", "crv": "P-384", "x": encoded(&last(96)[..48]), "y": encoded(&last(96)[48..])})
            }
            "EdDSA" => json!({"kty": "OKP", "crv": "Ed25519", "x": encoded(last(32))}),
            _ => {
                let text = run(&mut self.openssl(&["rsa", "-in", "key.pem", "-noout", "-modulus"]));
                let digits = text.trim().strip_prefix("Modulus=").unwrap();
                let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
                let modulus: Vec<u8> = (0..digits.len()).step_by(2).map(byte).collect();
                json!({"kty": "RSA", "n": encoded(modulus), "e": "AQAB"})
            }
        };
        jwk["kid"] = kid.into();
        jwk["use"] = "sig".into();
        jwk
    }

    fn signed(&self, header: &Value, claims: &Value) -> String {
        let message = format!("{}.{}", encoded(header.to_string()), encoded(claims.to_string()));
        let path = |name: &str| self.folder.path().join(name);
        fs::write(path("message"), &message).unwrap();
        let digest = format!("-sha{}", &self.algorithm[2..]);
        let signing: Vec<&str> = match self.algorithm {
            "EdDSA" => {
                vec!["pkeyutl", "-sign", "-inkey", "key.pem", "-rawin", "-in", "message", "-out", "signature"]
            }
            _ => vec!["dgst", &digest, "-sign", "key.pem", "-out", "signature"],
        };
        let mut signing = self.openssl(&signing);
        if self.algorithm.starts_with("PS") {
            signing.args(["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"]);
        }
        if self.algorithm != "EdDSA" {
            signing.arg("message");
        }
        run(&mut signing);
        let mut signature = fs::read(path("signature")).unwrap();
        if self.algorithm.starts_with("ES") {
            signature = fixed(&signature, if self.algorithm == "ES256" { 32 } else { 48 });
        }
        format!("{message}.{}", encoded(signature))
    }

    fn token(&self, kid: &str, claims: &Value) -> String {
        self.signed(&json!({"alg": self.algorithm, "kid": kid}), claims)
    }
}

/// The two integers of an ECDSA signature, as JWS wants them (RFC 7518 3.4).
fn fixed(der: &[u8], length: usize) -> Vec<u8> {
    let mut fixed = Vec::new();
    let mut rest = &der[2..];
    for _ in 0..2 {
        let (number, after) = rest[2..].split_at(usize::from(rest[1]));
        let number = number.strip_prefix(&[0]).unwrap_or(number);
        fixed.extend(std::iter::repeat_n(0, length - number.len()));
        fixed.extend(number);
        rest = after;
    }
    fixed
}

fn claims() -> Value {
    claims_of(ISSUER, "shop", "web")
}

fn claims_of(issuer: &str, namespace: &str, account: &str) -> Value {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    json!({
        "iss": issuer,
        "aud": ["istio-ca"],
        "exp": now + 600,
        "iat": now,
        "nbf": now,
        "sub": format!("system:serviceaccount:{namespace}:{account}"),
        "kubernetes.io": {"namespace": namespace, "serviceaccount": {"name": account, "uid": "u-1"}},
    })
}

fn altered(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn set(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

fn keys_file(place: &Place, keys: &[Value]) -> String {
    let path = place.root.path().join("jwks.json");
    // As editors do it, so that nobody sees half of it.
    fs::write(path.with_extension("new"), set(keys)).unwrap();
    fs::rename(path.with_extension("new"), &path).unwrap();
    path.to_str().unwrap().to_owned()
}

fn trial_token(place: &Place, arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.args(["token", "new"]).args(arguments).arg("--data-dir").arg(place.data());
    output_within(command.stdin(Stdio::null()), Duration::from_secs(10))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trial_token_gets_a_certificate_where_the_server_was_asked_to_take_it() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--trial-tokens"]);
    let output = trial_token(&place, &["shop/web"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let token = String::from_utf8(output.stdout).unwrap();
    let token = token.strip_suffix('\n').unwrap();
    let channel = connect(&mica, &place, None).await;
    let leaf = with(&channel, token).await.unwrap();
    assert_eq!(leaf.uris, [WEB]);
    // A token is proof of the moment: nothing of an earlier one is in the certificate.
    assert_eq!(leaf.proved_at, None);
    for header in [format!("bearer {token}"), format!("BEARER {token}")] {
        asked(&channel, &[&header]).await.unwrap();
    }
    assert_eq!(mica.metric("mica_token_checks_total{how=\"verified\"}"), 1.0);
    assert_eq!(mica.metric("mica_token_checks_total{how=\"remembered\"}"), 2.0);

    // OpenSSL believes it, with the key from the folder.
    let (message, signature) = token.rsplit_once('.').unwrap();
    let path = |name: &str| place.root.path().join(name);
    fs::write(path("message"), message).unwrap();
    fs::write(path("signature"), URL_SAFE_NO_PAD.decode(signature).unwrap()).unwrap();
    let key = place.data().join("trial-issuer/key.pem");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    let said = run(parts::openssl()
        .args(["pkeyutl", "-verify", "-rawin", "-in", "message", "-sigfile", "signature", "-inkey"])
        .arg(key)
        .current_dir(place.root.path()));
    assert!(said.contains("Verified Successfully"), "{said}");

    // Of an account that nobody has, of another audience, and once the server is another.
    let made = |arguments: &[&str]| {
        String::from_utf8(trial_token(&place, arguments).stdout).unwrap().trim().to_owned()
    };
    let (reason, sentence) = refused(&channel, &made(&["shop/nobody"])).await;
    assert_eq!(reason, "ACCOUNT_GONE", "{sentence}");
    let (reason, sentence) = refused(&channel, &made(&["shop/web", "--audience", "x"])).await;
    assert_eq!(
        (reason.as_str(), sentence.as_str()),
        ("TOKEN_AUDIENCE", "the token is for [\"x\"], not for \"istio-ca\"")
    );
    let token = token.to_owned();
    mica.stop();
    assert!(!place.data().join("trial-issuer").exists());

    let mica = place.start(&["--trial-tokens"]);
    let channel = connect(&mica, &place, None).await;
    assert_eq!(refused(&channel, &token).await.0, "TOKEN_KEY_UNKNOWN");
    mica.kill();
    let mica = place.start(&[]);
    let channel = connect(&mica, &place, None).await;
    assert_eq!(refused(&channel, &token).await.0, "CREDENTIAL_UNSUPPORTED");
    let output = trial_token(&place, &["shop/web"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && output.stdout.is_empty(), "{said}");
    assert!(said.contains("`mica serve DIR --trial-tokens`"), "{said}");
    mica.stop();
}

#[test]
fn a_trial_token_goes_to_a_private_file() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--trial-tokens"]);
    let file = place.root.path().join("token");
    let out = file.to_str().unwrap();
    let output = trial_token(&place, &["shop/web", "--out", out, "--ttl", "1h"]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("wrote a token of shop/web for istio-ca to "), "{said}");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let token = fs::read_to_string(&file).unwrap();
    assert!(token.split('.').count() == 3 && !said.contains(token.trim()), "{said}");
    assert_eq!(trial_token(&place, &["shop/web", "--out", out]).status.code(), Some(2));
    assert!(trial_token(&place, &["shop/web", "--out", out, "--force"]).status.success());
    assert_ne!(fs::read_to_string(&file).unwrap(), token);
    for arguments in
        [&["web"][..], &["shop/Web"], &["shop/web", "--ttl", "61m"], &["shop/web", "--ttl", "0s"]]
    {
        let output = trial_token(&place, arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap().lines().count(), 1, "{arguments:?}");
    }
    assert!(!mica.log().contains(token.trim()));
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_openssl_signs_are_verified_by_the_keys_in_a_file() {
    let place = Place::new();
    place.account("web");
    let keys =
        ["ES256", "ES384", "EdDSA", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"].map(IssuerKey::new);
    let jwks: Vec<_> = keys.iter().map(|key| key.jwk(key.algorithm)).collect();
    let file = keys_file(&place, &jwks);
    let mica = place.start(&["--token-issuer", ISSUER, "--token-jwks", &file]);
    let channel = connect(&mica, &place, None).await;
    for key in &keys {
        let token = key.token(key.algorithm, &claims());
        let leaf = with(&channel, &token).await.unwrap_or_else(|e| panic!("{}: {e}", key.algorithm));
        assert_eq!(leaf.uris, [WEB], "{}", key.algorithm);
        // One with another key's name, and one with another algorithm of the same key.
        let other = if key.algorithm == "RS256" { "PS256" } else { "RS256" };
        let (reason, sentence) = refused(&channel, &key.token(other, &claims())).await;
        let is_rsa = key.algorithm.starts_with("RS") || key.algorithm.starts_with("PS");
        let wanted = if is_rsa { "TOKEN_SIGNATURE" } else { "TOKEN_ALGORITHM" };
        assert_eq!(reason, wanted, "{}: {sentence}", key.algorithm);
    }
    let rsa = &keys[3];
    // The public key is no secret, and so no HMAC with it proves anything.
    for algorithm in ["HS256", "none", "ES256K", "RS1"] {
        let token = rsa.signed(&json!({"alg": algorithm, "kid": "RS256"}), &claims());
        assert_eq!(refused(&channel, &token).await.0, "TOKEN_ALGORITHM", "{algorithm}");
    }
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_token_is_said_over_the_wire() {
    let place = Place::new();
    place.account("web");
    let key = IssuerKey::new("ES256");
    let file = keys_file(&place, &[key.jwk("one")]);
    let mica =
        place.start(&["--token-issuer", ISSUER, "--token-jwks", &file, "--token-audience", "istio-ca"]);
    let channel = connect(&mica, &place, None).await;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let sound = key.token("one", &claims());
    let (head, signature) = sound.rsplit_once('.').unwrap();
    let (header, _) = head.split_once('.').unwrap();
    let tampered = format!(
        "{header}.{}.{signature}",
        encoded(altered("sub", json!("system:serviceaccount:shop:db")).to_string())
    );
    let unsigned = format!("{}.{}.", encoded(r#"{"alg":"none"}"#), encoded(claims().to_string()));
    let mut without_expiry = claims();
    without_expiry.as_object_mut().unwrap().remove("exp");
    let mut without_audience = claims();
    without_audience.as_object_mut().unwrap().remove("aud");
    for (token, wanted) in [
        ("x".to_owned(), "TOKEN_MALFORMED"),
        (unsigned, "TOKEN_MALFORMED"),
        (tampered, "TOKEN_SIGNATURE"),
        (key.token("two", &claims()), "TOKEN_KEY_UNKNOWN"),
        (key.token("one", &altered("iss", json!("https://other.example.org"))), "TOKEN_ISSUER"),
        (key.token("one", &altered("iss", json!(format!("{ISSUER}/")))), "TOKEN_ISSUER"),
        (key.token("one", &altered("aud", json!(["kubernetes"]))), "TOKEN_AUDIENCE"),
        (key.token("one", &without_audience), "TOKEN_AUDIENCE"),
        (key.token("one", &altered("exp", json!(now - 1))), "TOKEN_EXPIRED"),
        (key.token("one", &altered("exp", json!("tomorrow"))), "TOKEN_EXPIRED"),
        (key.token("one", &without_expiry), "TOKEN_EXPIRED"),
        (key.token("one", &altered("nbf", json!(now + 120))), "TOKEN_NOT_YET_VALID"),
        (key.token("one", &altered("sub", json!("system:serviceaccount:shop:db"))), "TOKEN_MALFORMED"),
        (key.token("one", &claims_of(ISSUER, "shop", "nobody")), "ACCOUNT_GONE"),
        (key.token("one", &altered("x", json!("y".repeat(9000)))), "TOKEN_MALFORMED"),
    ] {
        let (reason, sentence) = refused(&channel, &token).await;
        assert_eq!(reason, wanted, "{sentence}");
    }
    for headers in [
        &["Bearer"][..],
        &["Bearer "],
        &["Basic eDp5"],
        &["Bearer  x"],
        &["Bearer x y"],
        &["Bearer x,Bearer y"],
        &["Bearer x", "Bearer x"],
        &[&sound],
    ] {
        let status = asked(&channel, headers).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::Unauthenticated, "CREDENTIAL_MALFORMED"),
            "{headers:?}"
        );
    }
    // A bad token is not made good by a good certificate beside it.
    place.leaf("web");
    let channel = connect(&mica, &place, Some(&place.folder("shop", "web"))).await;
    assert_eq!(refused(&channel, "x").await.0, "TOKEN_MALFORMED");
    // And a good one is, after all of these.
    assert_eq!(with(&channel, &sound).await.unwrap().uris, [WEB]);
    let log = mica.log();
    assert!(!log.contains(&sound) && !log.contains(signature), "a token is in the log");
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_ends_with_the_token_its_account_and_its_key() {
    let place = Place::new();
    place.account("web");
    place.account("db");
    let (one, two) = (IssuerKey::new("ES256"), IssuerKey::new("ES256"));
    let file = keys_file(&place, &[one.jwk("one"), two.jwk("two")]);
    let mica = place.start(&["--token-issuer", ISSUER, "--token-jwks", &file]);
    let channel = connect(&mica, &place, None).await;

    let short = one.token("one", &altered("exp", json!(OffsetDateTime::now_utc().unix_timestamp() + 3)));
    with(&channel, &short).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(refused(&channel, &short).await.0, "TOKEN_EXPIRED");

    let of_db = two.token("two", &claims_of(ISSUER, "shop", "db"));
    with(&channel, &of_db).await.unwrap();
    fs::remove_file(place.source().join("db.yaml")).unwrap();
    until_refused(&channel, &of_db, "ACCOUNT_GONE").await;

    let token = one.token("one", &claims());
    with(&channel, &token).await.unwrap();
    keys_file(&place, &[two.jwk("two")]);
    until_refused(&channel, &token, "TOKEN_KEY_UNKNOWN").await;
    with(&channel, &two.token("two", &claims())).await.unwrap();

    // A file that cannot be read takes nothing away; it is told and counted.
    fs::write(&file, "{").unwrap();
    let failures = format!("mica_token_key_failures_total{{issuer=\"{ISSUER}\"}}");
    wait_for(Duration::from_secs(6), "a failure", || (mica.metric(&failures) > 0.0).then_some(()));
    with(&channel, &two.token("two", &claims())).await.unwrap();
    assert!(mica.log().contains("the token issuer's keys cannot be read, the last ones stay"));
    // A secret among the keys is no reason to take the set.
    let mut secret = one.jwk("one");
    secret["d"] = json!("AQAB");
    keys_file(&place, &[two.jwk("two"), secret]);
    wait_for(Duration::from_secs(6), "the secret's line", || {
        mica.log().contains("whoever has read this set can make tokens").then_some(())
    });
    assert_eq!(refused(&channel, &token).await.0, "TOKEN_KEY_UNKNOWN");
    mica.stop();
}

/// A build service's tokens, say, which know nothing of Kubernetes.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_other_issuers_stand_for_the_accounts_that_policy_says() {
    let place = Place::new();
    place.account("web");
    let key = IssuerKey::new("RS256");
    let server = Bad::start();
    let issuer = server.url("");
    let document = json!({"issuer": issuer, "jwks_uri": server.url("/keys")}).to_string();
    server.page("/.well-known/openid-configuration", document);
    server.page("/keys", set(&[key.jwk("one")]));
    let policy = place.root.path().join("policy.yaml");
    let say = |accounts: &[(&str, &str)]| {
        let accounts: Vec<_> = accounts
            .iter()
            .map(|(subject, account)| json!({"subject": subject, "account": account}))
            .collect();
        let text =
            json!({"oidc": [{"issuer": issuer, "audience": "mica", "accounts": accounts}]}).to_string();
        fs::write(policy.with_extension("new"), text).unwrap();
        fs::rename(policy.with_extension("new"), &policy).unwrap();
    };
    say(&[("repo:shop/web:main", "shop/web"), ("repo:shop/gone:main", "shop/gone")]);
    let mica = place.start(&["--policy", policy.to_str().unwrap()]);
    let channel = connect(&mica, &place, None).await;
    let token = |subject: &str, audience: &str| {
        let mut claims = claims();
        claims["iss"] = json!(issuer);
        claims["sub"] = json!(subject);
        claims["aud"] = json!(audience);
        claims.as_object_mut().unwrap().remove("kubernetes.io");
        key.token("one", &claims)
    };
    let good = token("repo:shop/web:main", "mica");
    for _ in 0..2 {
        assert_eq!(with(&channel, &good).await.unwrap().uris, [WEB]);
    }
    assert_eq!(mica.metric("mica_token_checks_total{how=\"remembered\"}"), 1.0);
    for (subject, audience, wanted) in [
        ("repo:shop/web:mai", "mica", "TOKEN_SUBJECT"),
        ("repo:shop/web:main2", "mica", "TOKEN_SUBJECT"),
        ("repo:shop/*", "mica", "TOKEN_SUBJECT"),
        // Of an issuer of this kind the names of accounts mean nothing by themselves.
        ("system:serviceaccount:shop:web", "mica", "TOKEN_SUBJECT"),
        ("repo:shop/web:main", "istio-ca", "TOKEN_AUDIENCE"),
        ("repo:shop/gone:main", "mica", "ACCOUNT_GONE"),
    ] {
        let (reason, sentence) = refused(&channel, &token(subject, audience)).await;
        assert_eq!(reason, wanted, "{sentence}");
    }
    say(&[("repo:shop/other:main", "shop/web")]);
    until_refused(&channel, &good, "TOKEN_SUBJECT").await;
    assert_eq!(with(&channel, &token("repo:shop/other:main", "mica")).await.unwrap().uris, [WEB]);
    mica.stop();
}

async fn until_refused(channel: &Channel, token: &str, wanted: &str) {
    let begun = std::time::Instant::now();
    loop {
        match with(channel, token).await {
            Err(status) => return assert_eq!(reason(&status), wanted),
            Ok(_) => assert!(begun.elapsed() < Duration::from_secs(15), "not refused as {wanted}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn settings_that_go_nowhere_end_the_start() {
    let place = Place::new();
    let key = IssuerKey::new("EdDSA");
    let missing = place.root.path().join("missing.json");
    let missing = missing.to_str().unwrap();
    let bad = place.root.path().join("bad.json");
    let weak = IssuerKey::new("RS256");
    let mut exponent = weak.jwk("w");
    exponent["e"] = json!("Aw");
    for (text, said) in [
        ("{".to_owned(), "no JWK Set"),
        (set(&[]), "no key that verifies tokens"),
        (set(&[exponent]), "exponent 3"),
        (set(&[json!({"kty": "oct", "k": "AAAA", "kid": "s"})]), "secret"),
        (set(&vec![key.jwk("k"); 65]), "at most 64"),
        (" ".repeat(300_000), "longer than 262144 bytes"),
    ] {
        fs::write(&bad, text).unwrap();
        let line = place.refused(&["--token-issuer", ISSUER, "--token-jwks", bad.to_str().unwrap()]);
        assert!(line.contains(said) && line.contains("--token-jwks"), "{line}");
    }
    for (arguments, said) in [
        (&["--token-jwks", missing][..], "--token-issuer"),
        (&["--token-issuer", ISSUER, "--token-jwks", missing], "missing.json: no such file"),
        (&["--token-issuer", ISSUER, "--token-jwks", "http://example.org/jwks"], "is not https"),
        (&["--token-issuer", ISSUER, "--token-jwks", "ftp://127.0.0.1/jwks"], "is not https"),
        (&["--token-issuer", "issuer"], "--token-jwks FILE-or-URL"),
        (&["--token-issuer", "http://issuer.example.org"], "is not https"),
        (&["--token-audience", ""], "--token-audience"),
    ] {
        let line = place.refused(arguments);
        assert!(line.contains(said), "{arguments:?}: {line}");
    }
}

/// What a server answers on each path. Over HTTPS it is OpenSSL's own web server; here it is ours, for the answers that
/// no sound server gives.
type Pages = Arc<Mutex<Vec<(String, String)>>>;

struct Bad {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
    pages: Pages,
}

impl Bad {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let bad =
            Self { address: listener.local_addr().unwrap(), asked: Arc::default(), pages: Arc::default() };
        let (asked, pages) = (bad.asked.clone(), bad.pages.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, asked, pages) = (stream.unwrap(), asked.clone(), pages.clone());
                std::thread::spawn(move || {
                    let mut request = [0; 4096];
                    let read = stream.read(&mut request).unwrap_or(0);
                    let request = String::from_utf8_lossy(&request[..read]).into_owned();
                    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                    asked.fetch_add(1, Ordering::Relaxed);
                    let page = pages
                        .lock()
                        .unwrap()
                        .iter()
                        .find(|(of, _)| *of == path)
                        .map(|(_, page)| page.clone());
                    let _ = match page.as_deref() {
                        None => stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"),
                        Some("hang") => return std::thread::sleep(Duration::from_secs(60)),
                        Some("endless") => {
                            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n{\"keys\":[");
                            while stream.write_all(&[b' '; 4096]).is_ok() {}
                            Ok(())
                        }
                        Some(page) if page.starts_with("HTTP/") => stream.write_all(page.as_bytes()),
                        Some(page) => {
                            write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{page}", page.len())
                        }
                    };
                });
            }
        });
        bad
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn page(&self, path: &str, page: impl Into<String>) {
        let mut pages = self.pages.lock().unwrap();
        pages.retain(|(of, _)| of != path);
        pages.push((path.to_owned(), page.into()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_is_fetched_when_a_token_names_it_and_no_token_makes_mica_ask_for_ever() {
    let place = Place::new();
    place.account("web");
    let (one, two) = (IssuerKey::new("ES256"), IssuerKey::new("EdDSA"));
    let server = Bad::start();
    server.page("/jwks", set(&[one.jwk("one")]));
    let mica = place.start(&["--token-issuer", ISSUER, "--token-jwks", &server.url("/jwks")]);
    let channel = connect(&mica, &place, None).await;
    with(&channel, &one.token("one", &claims())).await.unwrap();
    assert_eq!(server.asked.load(Ordering::Relaxed), 1);

    // At once after a look there is no other: not for one, not for a hundred.
    let strange: Vec<_> = (0..100).map(|n| one.token(&format!("strange{n}"), &claims())).collect();
    for token in &strange {
        assert_eq!(refused(&channel, token).await.0, "TOKEN_KEY_UNKNOWN");
    }
    assert!(server.asked.load(Ordering::Relaxed) <= 2, "{}", server.asked.load(Ordering::Relaxed));
    tokio::time::sleep(Duration::from_secs(11)).await;
    let before = server.asked.load(Ordering::Relaxed);
    server.page("/jwks", set(&[one.jwk("one"), two.jwk("two")]));
    let new = two.token("two", &claims());
    let mut many = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (channel, new) = (channel.clone(), new.clone());
        many.spawn(async move { with(&channel, &new).await.map(|leaf| leaf.uris) });
    }
    while let Some(answer) = many.join_next().await {
        assert_eq!(answer.unwrap().unwrap(), [WEB]);
    }
    assert_eq!(server.asked.load(Ordering::Relaxed), before + 1, "one look serves all who wait for it");
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_gives_no_keys_lets_mica_start_and_its_tokens_are_refused_until_it_does() {
    let place = Place::new();
    place.account("web");
    let key = IssuerKey::new("EdDSA");
    let good = Bad::start();
    good.page("/jwks", set(&[key.jwk("one")]));
    for (page, said) in [
        ("", "no JWK Set"),
        ("HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n", "answered 500"),
        ("endless", "longer than 262144 bytes"),
        ("hang", "no answer within 5s"),
        ("not HTTP", ""),
        (
            &format!("HTTP/1.1 302 Found\r\nlocation: {}\r\ncontent-length: 0\r\n\r\n", good.url("/jwks")),
            "follows nobody",
        ),
    ] {
        let server = Bad::start();
        server.page("/jwks", if page == "not HTTP" { "HTTP/x\r\n\r\n" } else { page });
        let mica = place.start(&["--token-issuer", ISSUER, "--token-jwks", &server.url("/jwks")]);
        let channel = connect(&mica, &place, None).await;
        let token = key.token("one", &claims());
        let (reason, sentence) = refused(&channel, &token).await;
        assert_eq!(reason, "VERIFIER_UNAVAILABLE", "{page}");
        assert!(sentence.contains("cannot be had now"), "{sentence}");
        let log = mica.log();
        assert!(log.contains("its tokens are refused until they can") && log.contains(said), "{page}: {log}");
        assert_eq!(good.asked.load(Ordering::Relaxed), 0, "it was led elsewhere");
        mica.kill();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_says_where_its_keys_are_and_nobody_else_does() {
    let place = Place::new();
    place.account("web");
    let key = IssuerKey::new("EdDSA");
    let server = Bad::start();
    let issuer = server.url("");
    let well_known = "/.well-known/openid-configuration";
    let document = |issuer: &str, keys: &str| json!({"issuer": issuer, "jwks_uri": keys}).to_string();
    server.page("/keys", set(&[key.jwk("one")]));
    let token = key.token("one", &claims_of(&issuer, "shop", "web"));
    for (page, said) in [
        (document("https://other.example.org", &server.url("/keys")), "of the issuer"),
        (document(&issuer, "http://example.org/keys"), "is not https"),
        (document(&issuer, "file:///etc/passwd"), "jwks_uri"),
        (document(&issuer, "/keys"), "jwks_uri"),
        (json!({"issuer": issuer}).to_string(), "does not say"),
        ("[]".to_owned(), "does not say"),
    ] {
        server.page(well_known, page);
        let mica = place.start(&["--token-issuer", &issuer]);
        let channel = connect(&mica, &place, None).await;
        assert_eq!(refused(&channel, &token).await.0, "VERIFIER_UNAVAILABLE", "{said}");
        assert!(mica.log().contains(said), "{said}: {}", mica.log());
        mica.kill();
    }
    server.page(well_known, document(&issuer, &server.url("/keys")));
    let mica = place.start(&["--token-issuer", &issuer]);
    let channel = connect(&mica, &place, None).await;
    assert_eq!(with(&channel, &token).await.unwrap().uris, [WEB]);
    mica.stop();
}

/// OpenSSL's own web server, with a certificate of a root that OpenSSL made.
struct Https {
    child: Child,
    port: u16,
}

impl Https {
    fn start(ca: &OpensslCa, folder: &Path) -> Self {
        // Nobody takes it between here and there, as a rule; if somebody does, the test says so.
        let port = crate::serve::free_port();
        ca.server(folder, "localhost");
        let mut command = parts::openssl();
        command
            .args(["s_server", "-WWW", "-quiet", "-cert", "server.pem", "-key", "server-key.pem", "-accept"])
            .arg(format!("127.0.0.1:{port}"))
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let server = Self { child, port };
        wait_for(Duration::from_secs(5), "the HTTPS server", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        });
        server
    }
}

impl Drop for Https {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_come_over_https_from_a_server_that_the_system_trusts_and_from_no_other() {
    let place = Place::new();
    place.account("web");
    let key = IssuerKey::new("ES384");
    let ca = OpensslCa::new();
    let folder = place.root.path().join("www");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("jwks"), set(&[key.jwk("one")])).unwrap();
    let server = Https::start(&ca, &folder);
    let url = format!("https://localhost:{}/jwks", server.port);
    let token = key.token("one", &claims());
    let start = |roots: &Path, url: &str| -> Mica {
        let mut command = place.command();
        command.args(["--token-issuer", ISSUER, "--token-jwks", url]).env("SSL_CERT_FILE", roots);
        command.env_remove("SSL_CERT_DIR");
        place.start_command(&mut command)
    };

    let mica = start(&ca.root(), &url);
    let channel = connect(&mica, &place, None).await;
    assert_eq!(with(&channel, &token).await.unwrap().uris, [WEB]);
    mica.stop();

    let stranger = OpensslCa::new();
    let other_name = format!("https://127.0.0.1:{}/jwks", server.port);
    for (roots, url) in [(stranger.root(), &url), (ca.root(), &other_name)] {
        let mica = start(&roots, url);
        let channel = connect(&mica, &place, None).await;
        assert_eq!(refused(&channel, &token).await.0, "VERIFIER_UNAVAILABLE");
        let log = mica.log();
        assert!(log.contains("invalid peer certificate"), "{log}");
        mica.kill();
    }
}
