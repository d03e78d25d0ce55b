//! What is said on a stream, in both protocols.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use mica::agent::Svid;
use mica::attest::Refused;
use mica::core::spiffe::SpiffeId;
use mica::proto::xds::envoy::config::core::v3::data_source::Specifier;
use mica::proto::xds::envoy::config::core::v3::{DataSource, Node};
use mica::proto::xds::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, SpiffeCertValidatorConfig, TlsCertificate, secret,
};
use mica::proto::xds::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use mica::proto::xds::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use mica::proto::xds::google::protobuf::Any;
use mica::proto::xds::google::rpc;
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use super::{Ca, OTHER, OWN, Served, WEB, address, entitled, soon};
use crate::docs;

const TYPE: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
const PATIENCE: Duration = Duration::from_secs(20);
/// Whoever has something to say has said it by then.
const SILENCE: Duration = Duration::from_millis(200);

type Whole = Talk<DiscoveryRequest, DiscoveryResponse>;
type Delta = Talk<DeltaDiscoveryRequest, DeltaDiscoveryResponse>;

/// An open stream, seen from the proxy.
struct Talk<Q, A> {
    runtime: tokio::runtime::Handle,
    requests: mpsc::Sender<Q>,
    responses: Streaming<A>,
}

impl<Q, A> Talk<Q, A> {
    fn say(&self, request: Q) {
        self.runtime.block_on(self.requests.send(request)).ok().unwrap();
    }

    fn hear(&mut self) -> A {
        self.end_or_hear().unwrap().expect("the stream goes on")
    }

    fn refused(&mut self) -> Status {
        match self.end_or_hear() {
            Err(status) => status,
            Ok(_) => panic!("no refusal"),
        }
    }

    fn end_or_hear(&mut self) -> Result<Option<A>, Status> {
        let heard = async { timeout(PATIENCE, self.responses.message()).await };
        self.runtime.clone().block_on(heard).expect("an answer in time")
    }

    fn silent(&mut self) {
        let heard = async { timeout(SILENCE, self.responses.message()).await };
        let heard = self.runtime.clone().block_on(heard);
        assert!(heard.is_err(), "something was said");
    }
}

impl Served {
    fn client(&self) -> SecretDiscoveryServiceClient<Channel> {
        let endpoint = Endpoint::from_shared(address(&self.socket)).unwrap();
        SecretDiscoveryServiceClient::new(self.runtime.block_on(endpoint.connect()).unwrap())
    }

    fn whole(&self) -> Whole {
        let (requests, receiver) = mpsc::channel(64);
        let mut client = self.client();
        let answer = self.runtime.block_on(client.stream_secrets(ReceiverStream::new(receiver)));
        let (runtime, responses) = (self.runtime.handle().clone(), answer.unwrap().into_inner());
        Talk { runtime, requests, responses }
    }

    fn delta(&self) -> Delta {
        let (requests, receiver) = mpsc::channel(64);
        let mut client = self.client();
        let answer = self.runtime.block_on(client.delta_secrets(ReceiverStream::new(receiver)));
        let (runtime, responses) = (self.runtime.handle().clone(), answer.unwrap().into_inner());
        Talk { runtime, requests, responses }
    }

    fn fetch(&self, names: &[&str]) -> Result<DiscoveryResponse, Status> {
        let request = wants(names);
        self.runtime.block_on(self.client().fetch_secrets(request)).map(tonic::Response::into_inner)
    }
}

fn texts(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn wants(names: &[&str]) -> DiscoveryRequest {
    let node = Some(Node { id: "proxy".to_owned(), cluster: "test".to_owned() });
    DiscoveryRequest { node, resource_names: texts(names), type_url: TYPE.to_owned(), ..Default::default() }
}

fn takes(names: &[&str], response: &DiscoveryResponse) -> DiscoveryRequest {
    DiscoveryRequest {
        version_info: response.version_info.clone(),
        response_nonce: response.nonce.clone(),
        ..wants(names)
    }
}

fn rejects(names: &[&str], before: &str, response: &DiscoveryResponse) -> DiscoveryRequest {
    DiscoveryRequest {
        version_info: before.to_owned(),
        response_nonce: response.nonce.clone(),
        error_detail: error(),
        ..wants(names)
    }
}

fn error() -> Option<rpc::Status> {
    Some(rpc::Status { code: 13, message: "no such\nkey".to_owned(), details: Vec::new() })
}

fn subscribes(names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: TYPE.to_owned(),
        resource_names_subscribe: texts(names),
        ..Default::default()
    }
}

fn accepts(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { response_nonce: response.nonce.clone(), ..subscribes(&[]) }
}

fn secret(any: &Any) -> Secret {
    assert_eq!(any.type_url, TYPE);
    Secret::decode(any.value.clone()).unwrap()
}

fn bytes(source: Option<&DataSource>) -> String {
    match source.and_then(|source| source.specifier.as_ref()) {
        Some(Specifier::InlineBytes(bytes)) => String::from_utf8(bytes.clone()).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn certificate(any: &Any) -> (String, TlsCertificate) {
    let secret = secret(any);
    match secret.r#type {
        Some(secret::Type::TlsCertificate(certificate)) => (secret.name, certificate),
        other => panic!("{other:?}"),
    }
}

fn context(any: &Any) -> (String, CertificateValidationContext) {
    let secret = secret(any);
    match secret.r#type {
        Some(secret::Type::ValidationContext(context)) => (secret.name, context),
        other => panic!("{other:?}"),
    }
}

fn is_of(any: &Any, name: &str, svid: &Svid) {
    let (found, certificate) = certificate(any);
    assert_eq!(found, name);
    assert_eq!(bytes(certificate.certificate_chain.as_ref()), svid.chain[0].to_pem());
    assert_eq!(bytes(certificate.private_key.as_ref()), *svid.key.to_pem());
}

fn by_name(response: &DeltaDiscoveryResponse) -> HashMap<&str, &str> {
    response.resources.iter().map(|resource| (resource.name.as_str(), resource.version.as_str())).collect()
}

#[test]
fn each_name_gives_what_it_stands_for() {
    let (ca, partner) = (Ca::new(OWN), Ca::new("partner.example"));
    let (served, svid) = Served::with(&ca);
    served.trust(&[&ca, &partner]);
    for name in ["default", WEB] {
        let answer = served.fetch(&[name]).unwrap();
        assert_eq!((answer.resources.len(), answer.type_url.as_str()), (1, TYPE));
        is_of(&answer.resources[0], name, &svid);
        assert_eq!(answer.version_info, format!("{name}={}", svid.chain[0].fingerprint()));
    }
    for (name, of) in [("ROOTCA", &ca), ("spiffe://example.org", &ca), ("spiffe://partner.example", &partner)]
    {
        let answer = served.fetch(&[name]).unwrap();
        let (found, context) = context(&answer.resources[0]);
        assert_eq!(found, name);
        assert_eq!(bytes(context.trusted_ca.as_ref()), **of.bundle().pem());
        assert_eq!(context.custom_validator_config, None);
        // One root: what `openssl x509 -fingerprint -sha256` says of it.
        assert_eq!(answer.version_info, format!("{name}={}", of.bundle().roots()[0].fingerprint()));
    }
    let answer = served.fetch(&["ALL"]).unwrap();
    let (_, context) = context(&answer.resources[0]);
    assert_eq!(context.trusted_ca, None);
    let validator = context.custom_validator_config.unwrap();
    assert_eq!(validator.name, "envoy.tls.cert_validator.spiffe");
    let config = SpiffeCertValidatorConfig::decode(validator.typed_config.unwrap().value).unwrap();
    let trusted: Vec<_> =
        config.trust_domains.iter().map(|d| (d.name.as_str(), bytes(d.trust_bundle.as_ref()))).collect();
    let expected: Vec<_> =
        [&ca, &partner].map(|ca| (ca.domain.as_str(), ca.bundle().pem().to_string())).into();
    assert_eq!(trusted, expected);
}

#[test]
fn whoever_names_nothing_gets_certificate_and_roots() {
    let (served, svid) = Served::with(&Ca::new(OWN));
    let is_both = |resources: Vec<&Any>| {
        is_of(resources[0], "default", &svid);
        assert_eq!((context(resources[1]).0.as_str(), resources.len()), ("ROOTCA", 2));
    };
    is_both(served.fetch(&[]).unwrap().resources.iter().collect());
    is_both(served.fetch(&["*"]).unwrap().resources.iter().collect());
    let mut whole = served.whole();
    whole.say(wants(&[]));
    let response = whole.hear();
    is_both(response.resources.iter().collect());
    whole.say(takes(&[], &response));
    whole.silent();
    let mut delta = served.delta();
    delta.say(subscribes(&[]));
    let response = delta.hear();
    is_both(response.resources.iter().map(|resource| resource.resource.as_ref().unwrap()).collect());
    // Who has named something and names nothing any more wants nothing.
    let mut whole = served.whole();
    whole.say(wants(&["default"]));
    let response = whole.hear();
    whole.say(takes(&[], &response));
    served.hold(&Ca::new(OWN).issue(WEB));
    whole.silent();
}

#[test]
fn a_rotation_is_pushed_and_nothing_else() {
    let ca = Ca::new(OWN);
    let (served, first) = Served::with(&ca);
    let mut whole = served.whole();
    let mut delta = served.delta();
    whole.say(wants(&["default"]));
    delta.say(subscribes(&["default", "ROOTCA"]));
    let mut told = whole.hear();
    is_of(&told.resources[0], "default", &first);
    let mut told_delta = delta.hear();
    assert_eq!(told_delta.resources.len(), 2);
    for _ in 0..10 {
        whole.say(takes(&["default"], &told));
        delta.say(accepts(&told_delta));
        let next = ca.issue(WEB);
        served.hold(&next);
        let heard = whole.hear();
        is_of(&heard.resources[0], "default", &next);
        assert_ne!((&heard.nonce, &heard.version_info), (&told.nonce, &told.version_info));
        told = heard;
        let heard = delta.hear();
        assert_eq!(by_name(&heard), HashMap::from([("default", &*next.chain[0].fingerprint())]));
        assert_ne!(heard.nonce, told_delta.nonce);
        told_delta = heard;
    }
    // What comes with new bundles, and is the same, is not new.
    whole.say(takes(&["default"], &told));
    delta.say(accepts(&told_delta));
    served.trust(&[&ca, &Ca::new("partner.example")]);
    whole.silent();
    delta.silent();
}

#[test]
fn whoever_comes_back_gets_what_differs() {
    let ca = Ca::new(OWN);
    let (served, svid) = Served::with(&ca);
    let versions: HashMap<String, String> = served
        .fetch(&["default", "ROOTCA"])
        .map(|_| [("default", svid.chain[0].fingerprint()), ("ROOTCA", ca.bundle().roots()[0].fingerprint())])
        .unwrap()
        .map(|(name, version)| (name.to_owned(), version))
        .into();
    let single = served.fetch(&["ROOTCA"]).unwrap().version_info;
    let both = served.fetch(&["default", "ROOTCA"]).unwrap().version_info;
    drop(served);

    // Another agent, that holds the same.
    let served = Served::new();
    served.trust(&[&ca]);
    let mut whole = served.whole();
    whole.say(DiscoveryRequest { version_info: single, ..wants(&["ROOTCA"]) });
    whole.silent();
    // The word of the proxy counts, though nothing was sent.
    assert_eq!(served.agent.holders.counts().values().next().unwrap().acknowledged, 1);
    let mut several = served.whole();
    several.say(DiscoveryRequest { version_info: both.clone(), ..wants(&["default", "ROOTCA"]) });
    let mut delta = served.delta();
    delta.say(DeltaDiscoveryRequest {
        initial_resource_versions: versions,
        ..subscribes(&["default", "ROOTCA"])
    });
    delta.silent();
    served.hold(&svid);
    delta.silent();
    let next = ca.issue(WEB);
    served.hold(&next);
    assert_eq!(by_name(&delta.hear()), HashMap::from([("default", &*next.chain[0].fingerprint())]));
    assert_ne!(several.hear().version_info, both);

    // A version is of names as well: of another name there is something to be told.
    let mut other = served.whole();
    other.say(DiscoveryRequest { version_info: both, ..wants(&["spiffe://example.org"]) });
    assert_eq!(other.hear().resources.len(), 1);
}

#[test]
fn a_certificate_that_is_being_obtained_is_waited_for() {
    let ca = Ca::new(OWN);
    let served = Served::new();
    // Not even known who the caller is: that is waited for, too.
    served.say(Err(Refused::Unavailable("the authority is away".to_owned())));
    let (mut whole, mut delta) = (served.whole(), served.delta());
    whole.say(wants(&["default"]));
    delta.say(subscribes(&["ROOTCA", WEB]));
    whole.silent();
    served.trust(&[&ca]);
    delta.silent();
    served.say(Ok(entitled(&[WEB])));
    let roots = delta.hear();
    assert_eq!(by_name(&roots).into_keys().collect::<Vec<_>>(), ["ROOTCA"]);
    assert_eq!(roots.removed_resources, Vec::<String>::new());
    delta.say(accepts(&roots));
    let svid = ca.issue(WEB);
    soon("it is wanted", || !served.agent.held.all().is_empty());
    served.agent.held.put(svid.clone());
    is_of(&whole.hear().resources[0], "default", &svid);
    assert_eq!(by_name(&delta.hear()), HashMap::from([(WEB, &*svid.chain[0].fingerprint())]));
}

#[test]
fn the_name_of_another_workload_gives_nothing() {
    let ca = Ca::new(OWN);
    let (served, svid) = Served::with(&ca);
    served.hold(&ca.issue(OTHER));
    assert_eq!(served.fetch(&[OTHER]).unwrap_err().code(), Code::PermissionDenied);
    let (mut whole, mut delta) = (served.whole(), served.delta());
    whole.say(wants(&[OTHER]));
    let status = whole.refused();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains(OTHER), "{status:?}");
    delta.say(subscribes(&[OTHER]));
    assert_eq!(delta.refused().code(), Code::PermissionDenied);

    // Beside what the caller may have, it disturbs nothing.
    let (mut whole, mut delta) = (served.whole(), served.delta());
    whole.say(wants(&[OTHER, "default", "nonsense"]));
    let response = whole.hear();
    assert_eq!(response.resources.len(), 1);
    is_of(&response.resources[0], "default", &svid);
    delta.say(subscribes(&[OTHER, "default", "nonsense", "spiffe://unknown.example"]));
    let response = delta.hear();
    assert_eq!(by_name(&response).into_keys().collect::<Vec<_>>(), ["default"]);
    let mut removed = response.removed_resources.clone();
    removed.sort();
    assert_eq!(removed, ["nonsense", OTHER, "spiffe://unknown.example"]);
    delta.say(accepts(&response));
    delta.silent();
    assert_eq!(served.metric("mica_sds_names_refused_total{reason=\"forbidden\"}"), 5);
    assert_eq!(served.metric("mica_sds_names_refused_total{reason=\"unknown\"}"), 2);

    // Whoever becomes entitled to it gets it with what comes next.
    served.say(Ok(entitled(&[WEB, OTHER])));
    std::thread::sleep(Duration::from_millis(1100));
    served.hold(&ca.issue(WEB));
    let response = delta.hear();
    assert_eq!(response.resources.len(), 2, "{response:?}");
}

#[test]
fn what_makes_no_sense_is_said_to_make_none() {
    let (served, _) = Served::with(&Ca::new(OWN));
    let long = "x".repeat(5000);
    let many: Vec<String> = (0..200).map(|number| format!("spiffe://example.org/{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for (request, code) in [
        (wants(&["file:/etc/key.pem"]), Code::InvalidArgument),
        (wants(&["spiffe://example.org/a/../b"]), Code::InvalidArgument),
        (wants(&["rootca\u{1b}[2J"]), Code::InvalidArgument),
        (wants(&[&long]), Code::InvalidArgument),
        (wants(&many), Code::ResourceExhausted),
        (
            DiscoveryRequest { type_url: "type.googleapis.com/x.Cluster".to_owned(), ..wants(&["default"]) },
            Code::InvalidArgument,
        ),
        (DiscoveryRequest { version_info: "v".repeat(2 << 20), ..wants(&["default"]) }, Code::OutOfRange),
    ] {
        let mut whole = served.whole();
        whole.say(request.clone());
        let status = whole.refused();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().len() < 800 && !status.message().contains('\u{1b}'), "{status:?}");
        let status = served.runtime.block_on(served.client().fetch_secrets(request)).unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
    }
    // One for each stream is not kept by it for ever.
    soon("all streams are over", || served.metric("mica_sds_streams{method=\"StreamSecrets\"}") == 0);
    served.say(Err(Refused::Unknown("a stranger".to_owned())));
    assert_eq!(served.fetch(&["default"]).unwrap_err().code(), Code::PermissionDenied);
    served.say(Err(Refused::Unavailable("the kubelet sleeps".to_owned())));
    assert_eq!(served.fetch(&["default"]).unwrap_err().code(), Code::Unavailable);
}

#[test]
fn an_acknowledged_bundle_is_held() {
    let ca = Ca::new(OWN);
    let (served, _) = Served::with(&ca);
    let id = SpiffeId::parse(WEB).unwrap();
    let key = (id, ca.domain.clone(), ca.bundle().digest());
    let count = || served.agent.holders.counts().get(&key).copied().unwrap_or_default();
    let (mut whole, mut delta) = (served.whole(), served.delta());
    whole.say(wants(&["ROOTCA"]));
    let response = whole.hear();
    assert_eq!((count().given, count().acknowledged), (1, 0));
    whole.say(takes(&["ROOTCA"], &response));
    soon("one proxy has acknowledged", || (count().given, count().acknowledged) == (0, 1));
    delta.say(subscribes(&["ALL", "default"]));
    let response = delta.hear();
    delta.say(accepts(&response));
    soon("two proxies have acknowledged", || count().acknowledged == 2);
    assert_eq!(served.metric("mica_sds_acknowledged_total{resource=\"bundle\"}"), 1);
    assert_eq!(served.metric("mica_sds_acknowledged_total{resource=\"bundles\"}"), 1);
    // The last of its message.
    let certificates = || served.metric("mica_sds_acknowledged_total{resource=\"certificate\"}");
    soon("its certificate is acknowledged", || certificates() == 1);
    drop((whole, delta));
    soon("nobody holds it any more", || served.agent.holders.counts().is_empty());
}

#[test]
fn what_is_rejected_is_not_said_again() {
    let ca = Ca::new(OWN);
    let (served, _) = Served::with(&ca);
    let (mut whole, mut delta) = (served.whole(), served.delta());
    whole.say(wants(&["default"]));
    let good = whole.hear();
    whole.say(takes(&["default"], &good));
    delta.say(subscribes(&["default"]));
    let heard = delta.hear();
    delta.say(accepts(&heard));
    served.hold(&ca.issue(WEB));
    let bad = whole.hear();
    whole.say(rejects(&["default"], &good.version_info, &bad));
    // It says so again, as on a change of names, which is not another rejection.
    whole.say(rejects(&["default"], &good.version_info, &bad));
    let heard = delta.hear();
    delta.say(DeltaDiscoveryRequest { error_detail: error(), ..accepts(&heard) });
    whole.silent();
    delta.silent();
    assert_eq!(served.metric("mica_sds_rejected_total{resource=\"certificate\"}"), 2);
    let next = ca.issue(WEB);
    served.hold(&next);
    is_of(&whole.hear().resources[0], "default", &next);
    assert_eq!(delta.hear().resources.len(), 1);
}

#[test]
fn what_is_counted_is_documented() {
    let ca = Ca::new(OWN);
    let (served, _) = Served::with(&ca);
    let mut whole = served.whole();
    whole.say(wants(&["default", OTHER]));
    let response = whole.hear();
    whole.say(takes(&["default", OTHER], &response));
    served.hold(&ca.issue(WEB));
    let next = whole.hear();
    whole.say(rejects(&["default", OTHER], &response.version_info, &next));
    soon("it is counted", || served.metric("mica_sds_rejected_total{resource=\"certificate\"}") == 1);
    assert_eq!(docs::families(&served.metrics()), docs::documented_metrics("docs/sds.md"));
}

#[test]
fn an_answer_to_an_older_response_is_none() {
    let ca = Ca::new(OWN);
    let (served, _) = Served::with(&ca);
    let mut whole = served.whole();
    whole.say(wants(&["ROOTCA"]));
    let first = whole.hear();
    whole.say(takes(&["ROOTCA"], &first));
    let other = Ca::new(OWN);
    served.trust(&[&other]);
    let second = whole.hear();
    // Was on its way when the second was: neither its names count nor is it an answer.
    whole.say(takes(&["default"], &first));
    whole.silent();
    let held: Vec<_> = served.agent.holders.counts().into_keys().map(|(.., bundle)| bundle).collect();
    assert_eq!(held, [ca.bundle().digest()]);
    whole.say(takes(&["ROOTCA", "default"], &second));
    assert_eq!(whole.hear().resources.len(), 2);
    let held: Vec<_> = served.agent.holders.counts().into_keys().map(|(.., bundle)| bundle).collect();
    assert_eq!(held, [other.bundle().digest()]);
}

#[test]
fn names_come_and_go() {
    let (served, svid) = Served::with(&Ca::new(OWN));
    let mut whole = served.whole();
    whole.say(wants(&["default"]));
    let response = whole.hear();
    whole.say(takes(&["default", "ROOTCA"], &response));
    let response = whole.hear();
    assert_eq!(response.resources.len(), 2);
    whole.say(takes(&["ROOTCA"], &response));
    whole.silent();
    // Dropped and wanted again, so it is told again, though it is the same.
    whole.say(takes(&["ROOTCA", "default"], &response));
    is_of(&whole.hear().resources[1], "default", &svid);

    let mut delta = served.delta();
    delta.say(subscribes(&["default", "ROOTCA"]));
    let response = delta.hear();
    delta.say(accepts(&response));
    let less = DeltaDiscoveryRequest { resource_names_unsubscribe: texts(&["default"]), ..subscribes(&[]) };
    delta.say(less);
    delta.silent();
    served.hold(&Ca::new(OWN).issue(WEB));
    delta.silent();
    delta.say(subscribes(&["ROOTCA"]));
    let response = delta.hear();
    assert_eq!(by_name(&response).into_keys().collect::<Vec<_>>(), ["ROOTCA"]);
    delta.say(accepts(&response));
    delta.silent();
}

#[test]
fn whoever_loses_its_identity_gets_no_more() {
    let ca = Ca::new(OWN);
    let (served, _) = Served::with(&ca);
    let (mut whole, mut roots) = (served.whole(), served.whole());
    whole.say(wants(&["default"]));
    let response = whole.hear();
    whole.say(takes(&["default"], &response));
    roots.say(wants(&["ROOTCA"]));
    let response = roots.hear();
    roots.say(takes(&["ROOTCA"], &response));
    // It cannot be found out now: the process is the one that was attested.
    served.say(Err(Refused::Unavailable("the kubelet sleeps".to_owned())));
    std::thread::sleep(Duration::from_millis(1100));
    served.hold(&ca.issue(WEB));
    let response = whole.hear();
    whole.say(takes(&["default"], &response));
    served.say(Err(Refused::Unknown("it is nobody now".to_owned())));
    std::thread::sleep(Duration::from_millis(1100));
    served.hold(&ca.issue(WEB));
    assert_eq!(whole.refused().code(), Code::PermissionDenied);
    // Without a certificate to send: as soon as it is so.
    served.say_aloud(Ok(entitled(&[WEB])));
    let mut delta = served.delta();
    delta.say(subscribes(&["default", "ROOTCA"]));
    let response = delta.hear();
    delta.say(accepts(&response));
    served.say_aloud(Ok(entitled(&[OTHER])));
    served.hold(&ca.issue(OTHER));
    assert_eq!(by_name(&delta.hear()).into_keys().collect::<Vec<_>>(), ["default"]);
    served.say_aloud(Err(Refused::Unknown("it is nobody now".to_owned())));
    assert_eq!(delta.refused().code(), Code::PermissionDenied);
    // Its place is gone: it is looked at once.
    served.say(Ok(entitled(&[WEB])));
    let mut delta = served.delta();
    delta.say(subscribes(&["default"]));
    let response = delta.hear();
    delta.say(accepts(&response));
    served.say(Err(Refused::Unknown("it is nobody now".to_owned())));
    served.agent.held.end(&SpiffeId::parse(WEB).unwrap());
    assert_eq!(delta.refused().code(), Code::PermissionDenied);
    // Another identity than before, and the default is that one.
    served.say(Ok(entitled(&[WEB])));
    let mut whole = served.whole();
    served.hold(&ca.issue(WEB));
    let other = ca.issue(OTHER);
    served.hold(&other);
    whole.say(wants(&["default"]));
    let response = whole.hear();
    whole.say(takes(&["default"], &response));
    served.say(Ok(entitled(&[OTHER])));
    served.agent.held.end(&SpiffeId::parse(WEB).unwrap());
    is_of(&whole.hear().resources[0], "default", &other);
}

#[test]
fn a_proxy_that_does_not_answer_gets_the_latest_state_when_it_does() {
    let ca = Ca::new(OWN);
    let (served, first) = Served::with(&ca);
    let mut whole = served.whole();
    whole.say(wants(&["default"]));
    soon("the first was sent", || served.metric("mica_sds_sent_total{resource=\"certificate\"}") == 1);
    let mut last: Arc<Svid> = first.clone();
    for _ in 0..50 {
        last = ca.issue(WEB);
        served.hold(&last);
    }
    let response = whole.hear();
    is_of(&response.resources[0], "default", &first);
    whole.silent();
    whole.say(takes(&["default"], &response));
    let response = whole.hear();
    is_of(&response.resources[0], "default", &last);
    // A proxy that never answers is not left behind for ever.
    let next = ca.issue(WEB);
    served.hold(&next);
    is_of(&whole.hear().resources[0], "default", &next);
    assert_eq!(served.metric("mica_sds_sent_total{resource=\"certificate\"}"), 3);
}

#[test]
fn whoever_asks_no_more_gets_what_it_asked_for() {
    let ca = Ca::new(OWN);
    let served = Served::new();
    let Talk { runtime, requests, responses } = served.whole();
    runtime.block_on(requests.send(wants(&["default", "ROOTCA"]))).unwrap();
    drop(requests);
    served.trust(&[&ca]);
    let svid = ca.issue(WEB);
    soon("it is wanted", || !served.agent.held.all().is_empty());
    served.agent.held.put(svid.clone());
    let mut talk: Whole = Talk { runtime, requests: mpsc::channel(1).0, responses };
    let mut all = Vec::new();
    while let Some(response) = talk.end_or_hear().unwrap() {
        all = response.resources;
    }
    assert_eq!(all.len(), 2);
    is_of(all.iter().find(|any| secret(any).name == "default").unwrap(), "default", &svid);
}

#[test]
fn a_key_is_not_shown() {
    let (served, svid) = Served::with(&Ca::new(OWN));
    let response = served.fetch(&["default"]).unwrap();
    let (_, certificate) = certificate(&response.resources[0]);
    for shown in [format!("{response:?}"), format!("{certificate:?}"), format!("{svid:?}")] {
        assert!(!shown.contains("45, 45, 45") && !shown.contains("BEGIN"), "{shown}");
    }
}
