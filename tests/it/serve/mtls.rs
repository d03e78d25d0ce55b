//! Renewal with a certificate: TLS shows that the client holds its key, each request that the certificate is good.

use mica::core::certificate::Certificate;
use mica::core::key::KeyKind;
use mica::core::spiffe::SpiffeId;
use mica::proto::google::rpc;
use mica::proto::istio::v1::auth::istio_ca_service_client::IstioCaServiceClient;
use mica::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use mica::proto::istio::v1::auth::{IstioCertificateRequest, Request};
use prost::Message as _;
use tonic::transport::{Certificate as Pem, Channel, ClientTlsConfig, Identity};
use tonic::{Code, Status};

use super::{Mica, Place};
use std::fs;

/// With the set in a folder, or without a certificate.
pub(crate) async fn connect(mica: &Mica, place: &Place, folder: Option<&std::path::Path>) -> Channel {
    let mut tls =
        ClientTlsConfig::new().ca_certificate(Pem::from_pem(place.root_pem())).domain_name("localhost");
    if let Some(folder) = folder {
        let read = |name: &str| fs::read(folder.join(name)).unwrap();
        tls = tls.identity(Identity::from_pem(read("cert-chain.pem"), read("key.pem")));
    }
    let address = format!("https://{}", mica.address("grpc"));
    Channel::from_shared(address).unwrap().tls_config(tls).unwrap().connect().await.unwrap()
}

/// PEM, of a new P-256 key.
pub(crate) fn csr(id: &str) -> String {
    let key = mica::sys::keys::generate(KeyKind::P256).unwrap().signing().unwrap();
    let der = mica::core::csr::workload(&key, &SpiffeId::parse(id).unwrap(), &[]).unwrap();
    mica::core::pem::encode(mica::core::pem::CSR, &der)
}

pub(crate) fn ask(csr: String) -> IstioCertificateRequest {
    IstioCertificateRequest { csr, validity_duration: 3_600, metadata: None }
}

/// The stable reason of a refusal.
pub(crate) fn reason(status: &Status) -> String {
    let details = rpc::Status::decode(status.details()).unwrap();
    assert_eq!((details.code, details.message.as_str()), (status.code().into(), status.message()));
    let info = rpc::ErrorInfo::decode(&*details.details[0].value).unwrap();
    assert_eq!(info.domain, "mica.dev");
    info.reason
}

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

#[tokio::test(flavor = "multi_thread")]
async fn a_delivered_certificate_is_renewed_for_its_own_identity_and_no_other() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&[]);
    place.leaf("web");
    let channel = connect(&mica, &place, Some(&place.folder("shop", "web"))).await;
    let mut client = IstioCertificateServiceClient::new(channel.clone());

    for asked in [WEB, "spiffe://cluster.local/ns/shop/sa/other"] {
        let chain = client.create_certificate(ask(csr(asked))).await.unwrap().into_inner().cert_chain;
        assert_eq!(chain.len(), 2);
        assert_eq!(chain[1], place.root_pem());
        let leaf = Certificate::all_from_pem(chain[0].as_bytes()).unwrap().remove(0);
        assert_eq!(leaf.uris, [WEB]);
        // The delivered certificate was the last proof of another kind.
        assert_eq!(leaf.proved_at, Some(place.leaf("web").validity.issued_at()));
    }

    let mut old = IstioCaServiceClient::new(channel);
    let request = |id: &str| Request { csr_pem: csr(id).into_bytes(), node_agent_credentials: None };
    let answer = old.handle_csr(request(WEB)).await.unwrap().into_inner();
    assert!(answer.is_approved);
    let leaf = Certificate::all_from_pem(&answer.signed_cert_chain).unwrap().remove(0);
    assert_eq!(leaf.uris, [WEB]);
    let refused = old.handle_csr(request("spiffe://cluster.local/ns/shop/sa/other")).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "CSR_IDENTITY"));
    mica.stop();
}

/// What a trace exporter will send is already what the log tells at the level debug.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_one_span_with_its_phases() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&["--log-level", "debug", "--log-format", "json"]);
    place.leaf("web");
    let channel = connect(&mica, &place, Some(&place.folder("shop", "web"))).await;
    let mut request = tonic::Request::new(ask(csr(WEB)));
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("00-{trace}-b7ad6b7169203331-01");
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    IstioCertificateServiceClient::new(channel).create_certificate(request).await.unwrap();
    let log = mica.log();
    mica.stop();
    let ended = log.lines().filter(|line| line.contains("\"message\":\"close\""));
    let ended: Vec<serde_json::Value> = ended.map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<_> = ended
        .iter()
        .filter(|line| line["target"] == "mica::serve::requests")
        .map(|line| line["span"]["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["authenticate", "liveness", "authorize", "sign", "request"], "{log}");
    assert!(ended.iter().any(|line| line["span"]["trace"] == trace), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_a_certificate_without_a_credential() {
    let place = Place::new();
    place.account("web");
    let mica = place.start(&[]);
    let mut client = IstioCertificateServiceClient::new(connect(&mica, &place, None).await);
    let refused = client.create_certificate(ask(csr(WEB))).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unauthenticated, "NO_CREDENTIAL"));
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_outlives_neither_its_account_nor_its_certificate() {
    let place = Place::new();
    place.account("web");
    place.account("db");
    let mica = place.start(&["--ttl", "10s"]);
    place.leaf("web");
    // What is renewed in the folder is not what the connection was made with.
    let copy = tempfile::tempdir().unwrap();
    for name in ["cert-chain.pem", "key.pem"] {
        fs::copy(place.folder("shop", "web").join(name), copy.path().join(name)).unwrap();
    }
    let channel = connect(&mica, &place, Some(copy.path())).await;
    let other = connect(&mica, &place, Some(&place.folder("shop", "db"))).await;
    let request = || IstioCertificateRequest { validity_duration: 10, ..ask(csr(WEB)) };
    let mut client = IstioCertificateServiceClient::new(channel);
    client.create_certificate(request()).await.unwrap();

    fs::remove_file(place.source().join("db.yaml")).unwrap();
    let mut client_of_db = IstioCertificateServiceClient::new(other);
    let refused =
        super::wait_for(std::time::Duration::from_secs(5), "the refusal of a removed account", || {
            let answer = tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(client_of_db.create_certificate(request()))
            });
            answer.err()
        });
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unauthenticated, "ACCOUNT_GONE"));

    tokio::time::sleep(std::time::Duration::from_secs(11)).await;
    let refused = client.create_certificate(request()).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unauthenticated, "CERTIFICATE_EXPIRED"));
    mica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_authority_is_told_so() {
    let (place, stranger) = (Place::new(), Place::new());
    for place in [&place, &stranger] {
        place.account("web");
    }
    let (mica, other) = (place.start(&[]), stranger.start(&[]));
    let mut client = IstioCertificateServiceClient::new(
        connect(&mica, &place, Some(&stranger.folder("shop", "web"))).await,
    );
    let refused = client.create_certificate(ask(csr(WEB))).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unauthenticated, "CERTIFICATE_FOREIGN"));
    mica.stop();
    other.stop();
}
