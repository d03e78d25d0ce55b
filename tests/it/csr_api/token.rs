//! Callers with a token, here of the trial issuer.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use mica::client::{Client, Credential, Target, Wanted};
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;

use super::{WEB, istio, request, said, start};
use crate::serve::{Mica, Place, mtls, output_within};

const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";

/// A Mica that takes trial tokens, with one of an account.
fn with_token(account: &str) -> (Place, Mica, PathBuf) {
    let (place, mica, _) = start(&["--trial-tokens"]);
    let file = token(&place, account);
    (place, mica, file)
}

fn token(place: &Place, account: &str) -> PathBuf {
    let file = place.root.path().join(account.replace('/', "-"));
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_mica"));
    command
        .args(["token", "new", account, "--data-dir"])
        .arg(place.data())
        .arg("--out")
        .arg(&file)
        .arg("--force");
    let output = output_within(&mut command, Duration::from_secs(10));
    assert!(output.status.success(), "{output:?}");
    file
}

#[test]
fn a_token_gets_a_certificate_and_that_renews_itself() {
    let (place, mica, file) = with_token("shop/web");
    let file = file.to_str().unwrap();
    for version in ["--tls12", "--tls13"] {
        for (verb, kind) in
            [("create", "p256"), ("create", "rsa2048"), ("create", "ed25519"), ("handle", "p384")]
        {
            let arguments =
                [version, "--key-kind", kind, "--san", WEB, "--expect", WEB, "--token-file", file];
            let said = istio(&place, &mica, verb, &arguments);
            assert_eq!(said.code, 0, "{verb} {arguments:?}: {said:?}");
        }
    }
    let first = request(&place, &["--token-file", file, "--out", "one", "--identity", WEB]);
    assert_eq!(first.code, 0, "{first:?}");
    let second = request(&place, &["--certificate", "one", "--out", "two"]);
    assert_eq!(second.code, 0, "{second:?}");
    let leaf = |folder: &str| {
        let text = fs::read(place.root.path().join(folder).join("cert-chain.pem")).unwrap();
        Certificate::all_from_pem(&text).unwrap().remove(0)
    };
    // The token was the last proof but for certificates, and the renewed certificate says so.
    assert_eq!(
        (leaf("one").proved_at, leaf("two").proved_at),
        (None, Some(leaf("one").validity.issued_at()))
    );
    for folder in ["one", "two"] {
        crate::go_spiffe::accepts(&place.root.path().join(folder), WEB);
    }
    mica.stop();
}

#[test]
fn a_bad_token_is_refused_by_name_and_nothing_beside_it_helps() {
    let (place, mica, file) = with_token("shop/web");
    let good = fs::read_to_string(&file).unwrap();
    let bearer = format!("Bearer {}", good.trim());
    let unsigned = good.trim().rsplit_once('.').unwrap().0.to_owned() + ".";
    let forged = format!("{unsigned}{}", "A".repeat(86));
    let folder = place.folder("shop", "web");
    for (arguments, reason) in [
        (vec!["--token", "x"], "TOKEN_MALFORMED"),
        (vec!["--token", "a.b.c"], "TOKEN_MALFORMED"),
        (vec!["--token", unsigned.as_str()], "TOKEN_MALFORMED"),
        (vec!["--token", forged.as_str()], "TOKEN_SIGNATURE"),
        (vec!["--authorization", "Basic YTpi"], "CREDENTIAL_MALFORMED"),
        (vec!["--authorization", ""], "CREDENTIAL_MALFORMED"),
        (
            vec!["--authorization", bearer.as_str(), "--authorization", bearer.as_str()],
            "CREDENTIAL_MALFORMED",
        ),
    ] {
        // Alone, and beside a certificate that would be taken.
        for with in [None, Some(&folder)] {
            let mut command = super::istio_command(&place, &mica, "create");
            command.args(&arguments).args(with.map(|_| "--certificate")).args(with);
            let said = said(&mut command);
            assert_eq!((said.code, said.text("code")), (1, "Unauthenticated"), "{arguments:?}: {said:?}");
            assert_eq!(said.text("reason"), reason, "{arguments:?}: {said:?}");
        }
    }
    // A token decides, whoever's certificate the connection has.
    let (stranger, other, theirs) = start(&[]);
    let mut command = super::istio_command(&place, &mica, "create");
    command.args(["--expect", WEB, "--token-file"]).arg(&file).arg("--certificate").arg(theirs);
    assert_eq!(said(&mut command).code, 0);
    drop(stranger);
    other.kill();
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_is_read_for_each_request_on_one_connection() {
    let (place, mica, file) = with_token("shop/web");
    place.account("db");
    place.wait_for_account("db", Duration::from_secs(2));
    let client = Client::connect(Target {
        address: mica.address("grpc").parse().unwrap(),
        roots: TrustBundle::from_pem(place.root_pem().as_bytes()).unwrap(),
        name: Some("istiod.istio-system.svc".to_owned()),
        credential: Credential::Token(file.clone()),
    })
    .await
    .unwrap();
    let wanted = Wanted { csr: mtls::csr(WEB), ..Wanted::default() };
    for (account, id) in [("shop/web", WEB), ("shop/db", DB)] {
        fs::copy(token(&place, account), place.root.path().join("next")).unwrap();
        fs::rename(place.root.path().join("next"), &file).unwrap();
        let answer = client.create_certificate(&wanted).await.unwrap();
        let leaf = Certificate::all_from_pem(answer[0].as_bytes()).unwrap().remove(0);
        assert_eq!(leaf.uris, [id]);
    }
    mica.stop();
}
