//! The policy over the wire: what it grants and refuses, and that it may change while Mica runs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mica::core::certificate::Certificate;
use mica::core::key::KeyKind;
use mica::core::spiffe::SpiffeId;
use mica::proto::istio::v1::auth::IstioCertificateRequest;
use mica::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use prost_types::value::Kind;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::mtls::{connect, reason};
use super::{Mica, Place, wait_for};

/// A running Mica with a policy, and the accounts `shop/web` and `shop/db`.
struct Governed {
    place: Place,
    mica: Mica,
}

impl Governed {
    fn new(policy: &str) -> Self {
        let place = Place::new();
        place.account("web");
        place.account("db");
        let file = file(&place);
        fs::write(&file, policy).unwrap();
        let mica = place.start(&["--policy", file.to_str().unwrap(), "--log-level", "debug"]);
        Self { place, mica }
    }

    /// As an editor replaces a file.
    fn replace(&self, policy: &str) {
        let next = self.place.root.path().join("next");
        fs::write(&next, policy).unwrap();
        fs::rename(&next, file(&self.place)).unwrap();
    }

    async fn as_account(&self, account: &str) -> Channel {
        self.place.leaf(account);
        connect(&self.mica, &self.place, Some(&self.place.folder("shop", account))).await
    }

    fn wait_for_log(&self, text: &str) {
        wait_for(Duration::from_secs(10), text, || self.mica.log().contains(text).then_some(()));
    }

    fn metric(&self, line: &str) -> bool {
        self.mica.page("/metrics").1.lines().any(|found| found == line)
    }
}

fn file(place: &Place) -> PathBuf {
    place.root.path().join("policy.yaml")
}

/// What is asked for, which is by default a P-256 key, the default lifetime, no names.
#[derive(Clone, Copy)]
struct Asked<'a> {
    kind: KeyKind,
    seconds: i64,
    dns: &'a [&'a str],
    exact: bool,
}

const PLAIN: Asked<'_> = Asked { kind: KeyKind::P256, seconds: 0, dns: &[], exact: false };

async fn ask(channel: &Channel, asked: Asked<'_>) -> Result<Certificate, Status> {
    let key = mica::sys::keys::generate(asked.kind).unwrap().signing().unwrap();
    let dns: Vec<_> = asked.dns.iter().map(|name| name.parse().unwrap()).collect();
    let id = SpiffeId::parse("spiffe://cluster.local/ns/any/sa/any").unwrap();
    let der = mica::core::csr::workload(&key, &id, &dns).unwrap();
    let exact = prost_types::Value { kind: Some(Kind::BoolValue(true)) };
    let request = IstioCertificateRequest {
        csr: mica::core::pem::encode(mica::core::pem::CSR, &der),
        validity_duration: asked.seconds,
        metadata: asked
            .exact
            .then(|| prost_types::Struct { fields: [("ExactLifetime".to_owned(), exact)].into() }),
    };
    let answer = IstioCertificateServiceClient::new(channel.clone()).create_certificate(request).await?;
    Ok(Certificate::all_from_pem(answer.into_inner().cert_chain[0].as_bytes()).unwrap().remove(0))
}

async fn refusal(channel: &Channel, asked: Asked<'_>) -> (Code, String, String) {
    let status = ask(channel, asked).await.unwrap_err();
    (status.code(), reason(&status), status.message().to_owned())
}

/// From issue to expiry, in seconds.
fn lifetime(certificate: &Certificate) -> i64 {
    (certificate.validity.not_after - certificate.validity.issued_at()).whole_seconds()
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_lifetimes_and_names_are_as_the_policy_says() {
    let governed = Governed::new(
        "keys: [p256]\nspread: 0%\nnamespaces:\n  shop:\n    lifetime: 1h\n    longest_lifetime: 2h\n    dns: ['*.{namespace}.svc', '*.istio-system.svc', localhost]\naccounts:\n  shop/db:\n    keys: [p384, ed25519]\n    dns: []\n",
    );
    let (web, db) = (governed.as_account("web").await, governed.as_account("db").await);

    assert_eq!(lifetime(&ask(&web, PLAIN).await.unwrap()), 3_600);
    assert_eq!(lifetime(&ask(&web, Asked { seconds: 7_200, ..PLAIN }).await.unwrap()), 7_200);
    let (code, reason, sentence) = refusal(&web, Asked { seconds: 7_201, ..PLAIN }).await;
    assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "LIFETIME_TOO_LONG"));
    assert!(sentence.contains("7201s is longer than 2h, the longest for shop/web"), "{sentence}");
    assert!(sentence.contains("ask for at most 7200 seconds"), "{sentence}");

    let (code, reason, sentence) = refusal(&db, PLAIN).await;
    assert_eq!((code, reason.as_str()), (Code::InvalidArgument, "KEY_REFUSED"));
    assert!(
        sentence.contains("a p256 key is not allowed for shop/db") && sentence.contains("p384, ed25519"),
        "{sentence}"
    );
    ask(&db, Asked { kind: KeyKind::P384, ..PLAIN }).await.unwrap();
    assert_eq!(refusal(&web, Asked { kind: KeyKind::P384, ..PLAIN }).await.1, "KEY_REFUSED");

    let dns =
        &["web.shop.svc", "web.other.svc", "istiod.istio-system.svc", "localhost", "x.istio-system.svc"];
    let leaf = ask(&web, Asked { dns, ..PLAIN }).await.unwrap();
    assert_eq!(leaf.dns, ["web.shop.svc", "x.istio-system.svc"]);
    assert_eq!(leaf.uris, ["spiffe://cluster.local/ns/shop/sa/web"]);
    assert_eq!(
        ask(&db, Asked { kind: KeyKind::P384, dns, ..PLAIN }).await.unwrap().dns,
        Vec::<String>::new()
    );
    governed.wait_for_log("DNS names that the CSR asks for are left out");
    assert!(governed.metric("mica_dns_names_left_out_total{reason=\"own\"} 4"));
    assert!(governed.metric("mica_dns_names_left_out_total{reason=\"not_granted\"} 4"));
    governed.mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_policy_counts_for_the_next_request_and_a_bad_one_never() {
    let governed = Governed::new("spread: 0%\nlifetime: 1h\n");
    let web = governed.as_account("web").await;
    assert_eq!(lifetime(&ask(&web, PLAIN).await.unwrap()), 3_600);
    assert!(governed.metric("mica_policy_stale 0"));

    governed.replace("spread: 0%\nlifetime: 2h\n");
    governed.wait_for_log("the changed policy is in force");
    assert_eq!(lifetime(&ask(&web, PLAIN).await.unwrap()), 7_200);

    governed.replace("spread: 0%\nlifetime: 3h\ndenny: true\n");
    governed.wait_for_log("the changed policy is not taken, the one before stays");
    assert!(
        governed.mica.log().contains("policy.yaml: line 3: unknown field `denny`"),
        "{}",
        governed.mica.log()
    );
    assert_eq!(lifetime(&ask(&web, PLAIN).await.unwrap()), 7_200);
    assert!(governed.metric("mica_policy_stale 1") && governed.metric("mica_policy_reload_failures_total 1"));
    // Once, however often it is looked at.
    std::thread::sleep(Duration::from_millis(6_500));
    assert_eq!(governed.mica.log().matches("the changed policy is not taken").count(), 1);

    governed.replace("accounts:\n  shop/web: {deny: true}\n");
    wait_for(Duration::from_secs(10), "the gauge", || governed.metric("mica_policy_stale 0").then_some(()));
    let (code, reason, sentence) = refusal(&web, PLAIN).await;
    assert_eq!((code, reason.as_str()), (Code::PermissionDenied, "IDENTITY_DENIED"));
    assert_eq!(sentence, "shop/web is denied by the policy of account shop/web");
    // Where the file says so is the log's alone.
    governed.wait_for_log("the policy of account shop/web, line 2");
    ask(&governed.as_account("db").await, PLAIN).await.unwrap();
    governed.mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_in_a_config_map_is_followed() {
    let place = Place::new();
    place.account("web");
    let volume = place.root.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let publish = |name: &str, policy: &str| {
        fs::create_dir(volume.join(name)).unwrap();
        fs::write(volume.join(name).join("policy.yaml"), policy).unwrap();
        symlink(name, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    };
    publish("..1", "{}");
    symlink("..data/policy.yaml", volume.join("policy.yaml")).unwrap();
    let mica = place.start(&["--policy", volume.join("policy.yaml").to_str().unwrap()]);
    place.leaf("web");
    let web = connect(&mica, &place, Some(&place.folder("shop", "web"))).await;
    ask(&web, PLAIN).await.unwrap();
    publish("..2", "deny: true\n");
    fs::remove_dir_all(volume.join("..1")).unwrap();
    wait_for(Duration::from_secs(10), "the new policy", || {
        mica.log().contains("the changed policy is in force").then_some(())
    });
    assert_eq!(refusal(&web, PLAIN).await.1, "IDENTITY_DENIED");
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn lifetimes_are_shortened_for_an_even_load_unless_that_is_not_wished() {
    let governed = Governed::new("spread: 25%\n");
    let web = governed.as_account("web").await;
    let mut granted = Vec::new();
    for _ in 0..50 {
        granted.push(lifetime(&ask(&web, PLAIN).await.unwrap()));
    }
    assert!(granted.iter().all(|seconds| (64_800..=86_400).contains(seconds)), "{granted:?}");
    // Renewals in different minutes: two minutes of life are one until the renewal.
    let minutes: std::collections::BTreeSet<_> = granted.iter().map(|seconds| seconds / 120).collect();
    assert!(minutes.len() >= 45, "{minutes:?}");
    for seconds in [0, 3_600] {
        let exact = ask(&web, Asked { exact: true, seconds, ..PLAIN }).await.unwrap();
        assert_eq!(lifetime(&exact), if seconds == 0 { 86_400 } else { seconds });
    }
    governed.mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_renews_only_as_long_as_the_policy_says() {
    let governed = Governed::new("renewal: 0s\n");
    let web = governed.as_account("web").await;
    let (code, reason, sentence) = refusal(&web, PLAIN).await;
    assert_eq!((code, reason.as_str()), (Code::Unauthenticated, "RENEWED_TOO_LONG"));
    assert!(
        sentence.ends_with("renews without it for 0s at most (the policy); authenticate with a token once"),
        "{sentence}"
    );
    governed.replace("renewal: 1h\n");
    governed.wait_for_log("the changed policy is in force");
    ask(&web, PLAIN).await.unwrap();
    governed.mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_word_of_a_proxy_counts_while_the_policy_names_it() {
    let governed = Governed::new("forwarders: ['spiffe://cluster.local/ns/shop/sa/web']\n");
    let forward = async |channel: &Channel| {
        let request = super::mtls::ask(super::mtls::csr("spiffe://cluster.local/ns/shop/sa/db"));
        let mut request = tonic::Request::new(request);
        let header = "URI=spiffe://cluster.local/ns/shop/sa/db".parse().unwrap();
        request.metadata_mut().insert("x-forwarded-client-cert", header);
        let answer = IstioCertificateServiceClient::new(channel.clone()).create_certificate(request).await?;
        Ok::<_, Status>(
            Certificate::all_from_pem(answer.into_inner().cert_chain[0].as_bytes()).unwrap().remove(0),
        )
    };
    let (web, db) = (governed.as_account("web").await, governed.as_account("db").await);
    assert_eq!(forward(&web).await.unwrap().uris, ["spiffe://cluster.local/ns/shop/sa/db"]);
    assert_eq!(reason(&forward(&db).await.unwrap_err()), "FORWARDER_UNKNOWN");
    governed.replace("{}");
    governed.wait_for_log("the changed policy is in force");
    assert_eq!(reason(&forward(&web).await.unwrap_err()), "FORWARDER_UNKNOWN");
    governed.mica.stop();
}

#[test]
fn a_bad_policy_is_no_start() {
    let place = Place::new();
    let file = file(&place);
    let refused = |place: &Place, file: &Path| place.refused(&["--policy", file.to_str().unwrap()]);
    let line = refused(&place, &file);
    assert!(line.contains("policy.yaml") && line.contains("no such file"), "{line}");
    fs::write(&file, "lifetime: 24h\nlongest_lifetime: 1h\n").unwrap();
    let line = refused(&place, &file);
    assert!(
        line.contains("policy.yaml: line 1: the lifetime is 24h (the policy, line 1), longer than"),
        "{line}"
    );
    // Before anything was made.
    assert!(!place.data().exists());
}
