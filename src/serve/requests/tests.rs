#![expect(clippy::disallowed_methods, reason = "the test changes the policy's file")]

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use prometheus_client::registry::Registry;
use tonic::metadata::MetadataMap;

use super::super::Connected;
use super::super::agent::{Agent, Agents};
use super::*;
use crate::auth::{Answer, Peer};
use crate::core::bundle::TrustBundle;
use crate::core::caller::Bound;
use crate::core::certificate::Certificate;
use crate::core::issuer::Issuer;
use crate::core::key::KeyKind;
use crate::core::pem;
use crate::core::policy::Limits;
use crate::proto::istio::v1::auth::IstioCertificateRequest;
use crate::proto::mica::v1::agent_service_server::AgentService as _;
use crate::proto::mica::v1::certificate_answer::Answer::{Granted, Refused};
use crate::proto::mica::v1::{CertificateRequest, CreateCertificatesRequest};
use crate::sys::keys;

/// A cluster in which everybody lives on one node, and whose answer about it takes so long that policy has changed.
struct Slow {
    policy: Arc<LivingPolicy>,
    file: PathBuf,
}

fn ready<'a, T: Send + 'a>(value: T) -> Answer<'a, T> {
    Box::pin(std::future::ready(value))
}

fn here() -> Object {
    Object { name: "here".to_owned(), uid: "1".to_owned() }
}

impl Authenticator for Arc<Slow> {
    fn applies(&self, _: &Evidence<'_>) -> bool {
        true
    }

    fn judge<'a>(&'a self, _: &'a Evidence<'_>, _: OffsetDateTime) -> Answer<'a, Result<Caller, Refusal>> {
        let bound = Bound { account_uid: None, pod: Some(here()), node: Some(here()) };
        let proof = Proof::Token { reviewed: false, bound: Arc::new(bound) };
        ready(Ok(Caller { account: ServiceAccount::new("mesh", "proxy").unwrap(), proof }))
    }
}

impl Liveness for Slow {
    fn account<'a>(&'a self, _: &'a ServiceAccount, _: Option<&'a str>) -> Answer<'a, Life> {
        ready(Life::Alive)
    }

    fn pod<'a>(&'a self, _: &'a str, _: &'a Object) -> Answer<'a, Life> {
        ready(Life::Alive)
    }
}

impl Nodes for Slow {
    fn runs<'a>(&'a self, _: &'a Object, _: &'a ServiceAccount) -> Answer<'a, Result<bool, String>> {
        ready(Ok(true))
    }

    fn node_of<'a>(
        &'a self,
        _: &'a ServiceAccount,
        _: &'a Object,
    ) -> Answer<'a, Result<Option<Object>, String>> {
        Box::pin(async {
            let mut changes = self.policy.changes();
            fs::write(&self.file, "impersonators: [mesh/proxy]\naccounts: {shop/web: {deny: true}}\n")
                .unwrap();
            changes.changed().await.unwrap();
            Ok(Some(here()))
        })
    }
}

fn authority() -> Arc<Authority> {
    let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
    let (organization, trust_domain) = ("Example".parse().unwrap(), "cluster.local".parse().unwrap());
    let profile = Profile::Root { organization: &organization, trust_domain: &trust_domain };
    let serial = keys::serial_number().unwrap();
    let root = issuer::root(&key, &profile, "1d".parse().unwrap(), clock::now(), serial).unwrap();
    let root = Certificate::from_der(root.der()).unwrap();
    let bundle = TrustBundle::new([root.clone()]).unwrap();
    let issuer = Issuer::new(Arc::new(key), &[root], bundle, &trust_domain).unwrap();
    Arc::new(Authority::new(trust_domain, issuer))
}

/// A cluster in which everybody lives on one node, and that says nothing of `stuck`.
struct Silent;

impl Nodes for Silent {
    fn runs<'a>(&'a self, _: &'a Object, account: &'a ServiceAccount) -> Answer<'a, Result<bool, String>> {
        if account.name() == "stuck" { Box::pin(std::future::pending()) } else { ready(Ok(true)) }
    }

    fn node_of<'a>(
        &'a self,
        _: &'a ServiceAccount,
        _: &'a Object,
    ) -> Answer<'a, Result<Option<Object>, String>> {
        ready(Ok(Some(here())))
    }
}

fn slow(folder: &tempfile::TempDir) -> Arc<Slow> {
    let file = folder.path().join("policy.yaml");
    fs::write(&file, "impersonators: [mesh/proxy]\n").unwrap();
    let hour = "1h".parse().unwrap();
    let limits = Limits { lifetime: hour, longest: hour, own_names: Vec::new() };
    Arc::new(Slow { policy: Arc::new(LivingPolicy::open(Some(&file), limits).unwrap()), file })
}

/// The proxy's, in one of these clusters.
fn requests(nodes: Arc<dyn Nodes>, slow: &Arc<Slow>) -> Requests {
    Requests::new(
        authority(),
        vec![Box::new(slow.clone())],
        slow.clone(),
        Some(nodes),
        slow.policy.clone(),
        Queue::new(1, 10),
        Metrics::register(&mut Registry::default()),
    )
}

#[tokio::test(start_paused = true)]
async fn one_of_several_that_takes_too_long_leaves_what_was_granted() {
    let folder = tempfile::tempdir().unwrap();
    let requests = requests(Arc::new(Silent), &slow(&folder));
    let (_alive, stopped) = tokio::sync::watch::channel(());
    let service = Agent { agents: Agents::new(Arc::new(requests)), stopped };
    let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
    let csr = pem::encode(pem::CSR, &crate::core::csr::nameless(&key).unwrap());
    let request = |name: &str| {
        let id = format!("spiffe://cluster.local/ns/shop/sa/{name}");
        let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(id)) };
        let fields = [("ImpersonatedIdentity".to_owned(), value)].into();
        let (csr, metadata) = (csr.clone(), Some(prost_types::Struct { fields }));
        let request = Some(IstioCertificateRequest { csr, validity_duration: 0, metadata });
        CertificateRequest { request, ..Default::default() }
    };
    let requests = ["web", "stuck", "late"].map(request).into();
    let mut request = tonic::Request::new(CreateCertificatesRequest { requests });
    let peer = Arc::new(Peer::new(Ipv4Addr::LOCALHOST.into(), Vec::new()));
    request.extensions_mut().insert(Connected { peer, unanswered: Arc::default() });
    let begun = Instant::now();
    let answers = service.create_certificates(request).await.unwrap().into_inner().answers;
    assert!((19..25).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    let told = answers.into_iter().map(|one| match one.answer.unwrap() {
        Granted(granted) => Ok(granted.cert_chain.len()),
        Refused(refused) => Err(Code::from(refused.code)),
    });
    let told: Vec<_> = told.collect();
    assert_eq!(told, [Ok(2), Err(Code::ResourceExhausted), Err(Code::ResourceExhausted)]);
}

#[tokio::test]
async fn a_policy_that_changes_while_the_cluster_is_asked_counts() {
    let folder = tempfile::tempdir().unwrap();
    let slow = slow(&folder);
    let (requests, policy) = (requests(slow.clone(), &slow), &slow.policy);
    let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
    let csr = pem::encode(pem::CSR, &crate::core::csr::nameless(&key).unwrap());
    let impersonated = Some("spiffe://cluster.local/ns/shop/sa/web".to_owned());
    let ask = Ask {
        method: "CreateCertificate",
        csr: Some(csr.as_bytes()),
        lifetime: None,
        wishes: Ok(Wishes { impersonated, exact: false }),
        names_itself: false,
    };
    let peer = Peer::new(Ipv4Addr::LOCALHOST.into(), Vec::new());
    let metadata = MetadataMap::new();
    let evidence = Evidence { peer: &peer, metadata: &metadata };
    let granted = tokio::select! {
        () = policy.follow() => unreachable!("it is followed for ever"),
        granted = requests.grant(&ask, &evidence) => granted,
    };
    assert_eq!(granted.unwrap_err().reason, Reason::IdentityDenied);
}
