//! The client in `src/client`, against the built program.

use std::path::Path;
use std::time::Duration;

use mica::client::{Client, Credential, Error, Target, Wanted};
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::lifetime::Lifetime;

use super::{WEB, start};
use crate::serve::{Mica, Place, mtls, wait_for};

fn target(place: &Place, mica: &Mica, folder: &Path) -> Target {
    Target {
        address: mica.address("grpc").parse().unwrap(),
        roots: TrustBundle::from_pem(place.root_pem().as_bytes()).unwrap(),
        name: None,
        credential: Credential::Certificate(folder.to_owned()),
    }
}

fn wanted() -> Wanted {
    Wanted { csr: mtls::csr(WEB), lifetime: Some(Lifetime::from_secs(3_600)), ..Wanted::default() }
}

fn leaf(answer: &[String]) -> Certificate {
    Certificate::all_from_pem(answer[0].as_bytes()).unwrap().remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_requests_at_once_on_one_connection_are_all_granted() {
    let (place, mica, folder) = start(&[]);
    let client = Client::connect(target(&place, &mica, &folder)).await.unwrap();
    let mut asking = tokio::task::JoinSet::new();
    for _ in 0..640 {
        if asking.len() == 64 {
            asking.join_next().await.unwrap().unwrap();
        }
        let client = client.clone();
        asking.spawn(async move {
            let leaf = leaf(&client.create_certificate(&wanted()).await.unwrap());
            assert_eq!(leaf.uris, [WEB]);
        });
    }
    asking.join_all().await;
    assert!(mica.metric("citadel_server_success_cert_issuance_count") >= 640.0);
    mica.stop();
}

/// Lines are gathered, and each leaves before the answer that it is about; also if the client did not wait for one.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_of_the_log_leaves_before_its_answer_and_soon_without_one() {
    let (place, mica, folder) = start(&[]);
    let client = Client::connect(target(&place, &mica, &folder)).await.unwrap();
    let mut asking = tokio::task::JoinSet::new();
    for n in 0..200 {
        if asking.len() == 8 {
            asking.join_next().await.unwrap().unwrap();
        }
        let (client, log) = (client.clone(), mica.log_path());
        asking.spawn(async move {
            let answer = leaf(&client.create_certificate(&wanted()).await.unwrap());
            let log = std::fs::read_to_string(log).unwrap();
            assert!(log.contains(&answer.serial_text()), "{n}: {}", answer.serial_text());
        });
    }
    asking.join_all().await;
    for n in 0..200 {
        let patience = Duration::from_micros(n * 20);
        let client = Client::connect(target(&place, &mica, &folder)).await.unwrap();
        let _ = tokio::time::timeout(patience, client.create_certificate(&wanted())).await;
        if n % 2 == 0 {
            drop(client);
        }
    }
    let counted = || mica.metric("mica_certificates_issued_total{why=\"request\"}") as usize;
    wait_for(Duration::from_secs(10), "a line about each", || {
        let before = counted();
        std::thread::sleep(Duration::from_millis(200));
        let lines = mica.log().lines().filter(|line| line.contains("\"why\":\"request\"")).count();
        (before > 200 && lines == before && counted() == before).then_some(())
    });
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_outlives_a_restart_and_shows_the_certificate_of_the_day() {
    let (place, mica, folder) = start(&[]);
    let address = mica.address("grpc");
    let mine = place.root.path().join("mine");
    let copy = |from: &Path| {
        std::fs::create_dir_all(&mine).unwrap();
        for name in ["cert-chain.pem", "key.pem"] {
            std::fs::copy(from.join(name), mine.join(name)).unwrap();
        }
    };
    copy(&folder);
    let client = Client::connect(target(&place, &mica, &mine)).await.unwrap();
    client.create_certificate(&wanted()).await.unwrap();
    mica.stop();
    let down = crate::serve::wait_for(Duration::from_secs(5), "the end of the connection", || {
        let answer = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(client.create_certificate(&wanted()))
        });
        Some(answer.unwrap_err()).filter(|fault| !matches!(fault, Error::Broke { .. }))
    });
    assert_eq!(down, Error::Connect { address: address.clone(), reason: "connection refused".to_owned() });

    // Another account's certificate has come into the folder meanwhile.
    place.account("db");
    let mut again = std::process::Command::new(env!("CARGO_BIN_EXE_mica"));
    again.arg("serve").arg(place.source()).arg("--data-dir").arg(place.data());
    again.args(["--grpc-address", &address, "--http-address", "127.0.0.1:0"]);
    let mica = place.start_command(&mut again);
    place.wait_for_account("db", Duration::from_secs(5));
    copy(&place.folder("shop", "db"));
    let answer = client.create_certificate(&wanted()).await.unwrap();
    assert_eq!(leaf(&answer).uris, ["spiffe://cluster.local/ns/shop/sa/db"]);
    mica.stop();
}
