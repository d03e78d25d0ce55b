//! `mica serve --kube`, asked over gRPC with the API server's own tokens.

use std::process::{Command, Stdio};
use std::time::Duration;

use mica::core::caller::Object;
use mica::core::certificate::Certificate;
use mica::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use serde_json::json;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::control_plane::{ControlPlane, ISSUER, TestNamespace, runtime};
use super::knowledge::{permissions, permit, permitted};
use crate::agent;
use crate::serve::mtls::{ask, connect, csr, reason};
use crate::serve::{Mica, Place, output_within, wait_for};

/// `mica serve --kube` as its users start it, with the permissions that the documents list.
pub(super) fn command(place: &Place, plane: &ControlPlane) -> Command {
    command_at(place, plane, "127.0.0.1:0")
}

/// The same, with its HTTP port at an address.
pub(super) fn command_at(place: &Place, plane: &ControlPlane, http: &str) -> Command {
    permitted(plane);
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.args(["serve", "--kube", "--data-dir"]).arg(place.data());
    command.args(["--grpc-address", "127.0.0.1:0", "--http-address", http]);
    command.env("KUBECONFIG", plane.kubeconfig_of("mica")).stdin(Stdio::null());
    command
}

pub(super) fn start(place: &Place, plane: &ControlPlane, arguments: &[&str]) -> Mica {
    place.start_command(command(place, plane).args(arguments))
}

/// The metrics of one that has answered a request, about somebody whom no watch has told of.
pub(crate) fn metrics_page() -> String {
    let (place, plane) = (Place::new(), ControlPlane::shared());
    let file = crate::serve::federation::federation(&place, "trust_domains: {}");
    let federation = ["--federation", &file, "--federated-config-map", "mica-federated-bundles"];
    let inject = ["--inject-address=127.0.0.1:0", "--inject-webhook=none"];
    let mica = start(&place, plane, &[&federation[..], &inject].concat());
    let namespace = plane.namespace();
    namespace.account("web");
    let token = namespace.token("web", "istio-ca", None);
    namespace.delete_account("web");
    Client::new(&mica, &place).wait_for_refusal(&token, "ACCOUNT_GONE");
    let page = mica.page("/metrics").1;
    mica.stop();
    page
}

/// A workload's connection.
pub(super) struct Client(Channel);

impl Client {
    pub(super) fn new(mica: &Mica, place: &Place) -> Self {
        Self(runtime().block_on(connect(mica, place, None)))
    }

    /// The URI of the certificate that a token gets.
    pub(super) fn identity(&self, token: &str) -> Result<String, Status> {
        self.ask(Some(token), None)
    }

    /// That of the certificate that a token gets for another one.
    pub(super) fn impersonated(&self, token: &str, wanted: &str) -> Result<String, Status> {
        self.ask(Some(token), Some(wanted))
    }

    /// Whether and why that is refused.
    fn not_impersonated(&self, token: &str, wanted: &str) -> (Code, String) {
        let status = self.impersonated(token, wanted).unwrap_err();
        (status.code(), reason(&status))
    }

    fn ask(&self, token: Option<&str>, wanted: Option<&str>) -> Result<String, Status> {
        let chain = self.answer(token, wanted)?;
        let leaf = Certificate::all_from_pem(chain[0].as_bytes()).unwrap().remove(0);
        assert_eq!(leaf.uris.len(), 1);
        Ok(leaf.uris[0].clone())
    }

    /// The leaf, and all above it, that a token gets, PEM.
    pub(super) fn pem(&self, token: &str) -> Result<Vec<String>, Status> {
        self.answer(Some(token), None)
    }

    fn answer(&self, token: Option<&str>, wanted: Option<&str>) -> Result<Vec<String>, Status> {
        let mut asked = ask(csr("spiffe://cluster.local/ns/some/sa/body"));
        asked.metadata = wanted.map(|wanted| {
            let kind = Some(prost_types::value::Kind::StringValue(wanted.to_owned()));
            let value = prost_types::Value { kind };
            prost_types::Struct { fields: [("ImpersonatedIdentity".to_owned(), value)].into() }
        });
        let mut request = tonic::Request::new(asked);
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let mut client = IstioCertificateServiceClient::new(self.0.clone());
        Ok(runtime().block_on(client.create_certificate(request))?.into_inner().cert_chain)
    }

    /// The code and the reason of a refusal.
    fn refused(&self, token: &str) -> (Code, String) {
        let status = self.identity(token).unwrap_err();
        (status.code(), reason(&status))
    }

    fn wait_for_refusal(&self, token: &str, wanted: &str) {
        wait_for(Duration::from_secs(5), wanted, || {
            self.identity(token).err().filter(|status| reason(status) == wanted)
        });
    }
}

fn unauthenticated(reason: &str) -> (Code, String) {
    (Code::Unauthenticated, reason.to_owned())
}

fn id(namespace: &TestNamespace<'_>, account: &str) -> String {
    format!("spiffe://cluster.local/ns/{}/sa/{account}", namespace.name)
}

/// A pod of the account `web` on a node, and a token as its agent has it.
fn workload(namespace: &TestNamespace<'_>) -> (Object, String) {
    namespace.account("web");
    let node = namespace.node("a");
    let pod = namespace.pod("web-1", "web", &node);
    let token = namespace.token("web", "istio-ca", Some(&pod));
    (pod, token)
}

#[test]
fn what_a_cluster_cannot_have_is_refused() {
    let (place, plane) = (Place::new(), ControlPlane::shared());
    let refused = |command: &mut Command| {
        let output = output_within(command, Duration::from_secs(20));
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    for (arguments, said) in [
        (&["--secrets", "x"][..], "mica: --secrets is of no use with --kube"),
        (&["--secrets-group", "1"], "mica: --secrets-group is of no use with --kube"),
        (&["manifests"], "mica: the folder manifests and --kube were given"),
        (&["--trial-tokens"], "mica: --trial-tokens is not for clusters"),
    ] {
        let error = refused(command(&place, plane).args(arguments));
        assert!(error.starts_with(said), "{error}");
    }
    let error = refused(
        command(&place, plane).env("KUBECONFIG", place.root.path().join("none")).env("HOME", "/none"),
    );
    assert!(error.starts_with("mica: no API server to ask: ") && error.lines().count() == 1, "{error}");
    // What is in it is nobody's to read in a log.
    let broken = place.root.path().join("broken");
    std::fs::write(&broken, "users:\n- {name: x, user: {token: very-secret}\n").unwrap();
    let error = refused(command(&place, plane).env("KUBECONFIG", &broken));
    assert!(error.starts_with("mica: the kubeconfig cannot be used: "), "{error}");
    assert!(error.lines().count() == 1 && !error.contains("secret"), "{error}");
    assert!(!place.data().exists());
}

#[test]
fn it_is_ready_when_all_accounts_and_pods_are_known() {
    let (place, plane) = (Place::new(), ControlPlane::shared());
    let mica = start(&place, plane, &[]);
    assert_eq!(mica.page("/readyz").0, 200);
    assert!(mica.report().contains("accounts of https://127.0.0.1:"), "{}", mica.report());
    mica.stop();
}

#[test]
fn a_token_gets_a_certificate_while_its_account_and_its_pod_live() {
    let (place, plane) = (Place::new(), ControlPlane::shared());
    let mica = start(&place, plane, &[]);
    let client = Client::new(&mica, &place);

    let namespace = plane.namespace();
    let (pod, token) = workload(&namespace);
    assert_eq!(client.identity(&token).unwrap(), id(&namespace, "web"));
    let unbound = namespace.token("web", "istio-ca", None);
    assert_eq!(client.identity(&unbound).unwrap(), id(&namespace, "web"));
    let foreign = namespace.token("web", "example.org", Some(&pod));
    assert_eq!(client.refused(&foreign), unauthenticated("TOKEN_AUDIENCE"));
    // The audience that the API server takes for itself.
    let api = namespace.token("web", ISSUER, Some(&pod));
    assert_eq!(client.refused(&api), unauthenticated("TOKEN_AUDIENCE"));

    namespace.delete_pod("web-1");
    client.wait_for_refusal(&token, "POD_GONE");
    assert_eq!(client.identity(&unbound).unwrap(), id(&namespace, "web"));
    let again = namespace.pod("web-1", "web", &namespace.node("b"));
    assert_ne!(again.uid, pod.uid);
    assert_eq!(client.refused(&token), unauthenticated("POD_GONE"));
    let fresh = namespace.token("web", "istio-ca", Some(&again));
    assert_eq!(client.identity(&fresh).unwrap(), id(&namespace, "web"));

    namespace.delete_account("web");
    client.wait_for_refusal(&fresh, "ACCOUNT_GONE");
    client.wait_for_refusal(&unbound, "ACCOUNT_GONE");
    namespace.account("web");
    client.wait_for_refusal(&unbound, "ACCOUNT_REPLACED");
    let fresh = namespace.token("web", "istio-ca", None);
    assert_eq!(client.identity(&fresh).unwrap(), id(&namespace, "web"));
    mica.stop();
}

#[test]
fn with_token_review_the_api_server_vouches_for_each_token() {
    let (place, plane) = (Place::new(), ControlPlane::shared());
    let mica = start(&place, plane, &["--token-review"]);
    let client = Client::new(&mica, &place);
    let namespace = plane.namespace();
    let (pod, token) = workload(&namespace);
    assert_eq!(client.identity(&token).unwrap(), id(&namespace, "web"));
    assert_eq!(mica.metric("mica_token_checks_total{how=\"reviewed\"}"), 1.0);
    let foreign = namespace.token("web", "example.org", Some(&pod));
    assert_eq!(client.refused(&foreign), unauthenticated("TOKEN_AUDIENCE"));
    namespace.delete_pod("web-1");
    client.wait_for_refusal(&token, "POD_GONE");
    mica.stop();
}

#[test]
fn an_outage_of_the_api_server_is_one_of_what_is_not_known_alone() {
    let plane = ControlPlane::start();
    let place = Place::new();
    let mica = start(&place, &plane, &[]);
    let client = Client::new(&mica, &place);
    let namespace = plane.namespace();
    let (_, known) = workload(&namespace);
    namespace.account("late");
    let late = namespace.token("late", "istio-ca", None);
    namespace.delete_account("late");
    client.wait_for_refusal(&late, "ACCOUNT_GONE");
    assert_eq!(client.identity(&known).unwrap(), id(&namespace, "web"));

    plane.stop_api_server();
    for _ in 0..3 {
        assert_eq!(client.identity(&known).unwrap(), id(&namespace, "web"));
        std::thread::sleep(Duration::from_millis(600));
    }
    assert_eq!(client.refused(&late), (Code::Unavailable, "LIVENESS_UNKNOWN".to_owned()));
    assert_eq!(mica.page("/readyz").0, 200);

    plane.start_api_server();
    plane.wait_until_ready();
    client.wait_for_refusal(&late, "ACCOUNT_GONE");
    assert_eq!(client.identity(&known).unwrap(), id(&namespace, "web"));
    // Told by the watch, which has come back by itself.
    namespace.delete_pod("web-1");
    wait_for(Duration::from_secs(30), "the end of the pod", || {
        client.identity(&known).err().filter(|status| reason(status) == "POD_GONE")
    });
    mica.stop();
}

#[test]
fn a_start_without_the_api_server_waits_for_it() {
    let plane = ControlPlane::start();
    let namespace = plane.namespace();
    let (_, token) = workload(&namespace);
    let place = Place::new();
    permitted(&plane);
    plane.stop_api_server();
    let mica = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(2));
            plane.start_api_server();
        });
        start(&place, &plane, &[])
    });
    assert!(mica.log().contains("the authority cannot be read yet; trying again"), "{}", mica.log());
    assert_eq!(Client::new(&mica, &place).identity(&token).unwrap(), id(&namespace, "web"));
    mica.stop();
}

#[test]
fn a_policy_says_for_whom_the_api_server_vouches() {
    let (place, plane) = (Place::new(), ControlPlane::shared());
    let namespace = plane.namespace();
    let (_, token) = workload(&namespace);
    namespace.account("strict");
    let policy = place.root.path().join("policy.yaml");
    let text = format!("accounts: {{{}/strict: {{token_review: true}}}}\n", namespace.name);
    std::fs::write(&policy, text).unwrap();
    let mica = start(&place, plane, &["--policy", policy.to_str().unwrap()]);
    let client = Client::new(&mica, &place);
    let strict = namespace.token("strict", "istio-ca", None);
    assert_eq!(client.identity(&token).unwrap(), id(&namespace, "web"));
    assert_eq!(mica.metric("mica_token_checks_total{how=\"verified\"}"), 1.0);
    assert_eq!(client.identity(&strict).unwrap(), id(&namespace, "strict"));
    assert_eq!(mica.metric("mica_token_checks_total{how=\"reviewed\"}"), 1.0);
    mica.stop();
}

#[test]
fn where_policy_wants_a_review_nobody_but_the_api_server_makes_a_token_good() {
    let plane = ControlPlane::start();
    let (place, namespace) = (Place::new(), plane.namespace());
    let policy = place.root.path().join("policy.yaml");
    let rules = format!(
        "namespaces: {{{0}: {{token_review: true}}}}\naccounts: {{{0}/web: {{token_review: false}}}}\n",
        namespace.name
    );
    std::fs::write(&policy, rules).unwrap();
    let arguments = ["--policy", policy.to_str().unwrap()];
    let mica = start(&place, &plane, &arguments);
    let client = Client::new(&mica, &place);

    // Of each pair one was found good before what it stands for went.
    let node = namespace.node("a");
    for name in ["web", "strict", "left"] {
        namespace.account(name);
    }
    let pod = namespace.pod("strict-1", "strict", &node);
    let of_pod = [(); 2].map(|()| namespace.token("strict", "istio-ca", Some(&pod)));
    let of_account = [(); 2].map(|()| namespace.token("left", "istio-ca", None));
    for (token, account) in [(&of_pod[0], "strict"), (&of_account[0], "left")] {
        assert_eq!(client.identity(token).unwrap(), id(&namespace, account));
    }
    assert_eq!(mica.metric("mica_token_checks_total{how=\"reviewed\"}"), 2.0);
    namespace.delete_pod("strict-1");
    namespace.delete_account("left");
    client.wait_for_refusal(&of_pod[0], "POD_GONE");
    client.wait_for_refusal(&of_account[0], "ACCOUNT_GONE");
    // The API server may learn of it a little later than Mica.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(client.refused(&of_pod[1]), unauthenticated("TOKEN_REJECTED"));
    assert_eq!(client.refused(&of_account[1]), unauthenticated("TOKEN_REJECTED"));

    let [known, late] = [(); 2].map(|()| namespace.token("strict", "istio-ca", None));
    let easy = namespace.token("web", "istio-ca", None);
    assert_eq!(client.identity(&known).unwrap(), id(&namespace, "strict"));
    plane.stop_api_server();
    assert_eq!(client.refused(&late), (Code::Unavailable, "VERIFIER_UNAVAILABLE".to_owned()));
    assert_eq!(client.identity(&known).unwrap(), id(&namespace, "strict"));
    assert_eq!(client.identity(&easy).unwrap(), id(&namespace, "web"));
    plane.start_api_server();
    plane.wait_until_ready();
    assert_eq!(client.identity(&late).unwrap(), id(&namespace, "strict"));
    mica.stop();

    // Not being let ask is no verdict on the token.
    let mut rules = permissions();
    rules.as_array_mut().unwrap().retain(|rule| rule["resources"] != json!(["tokenreviews"]));
    permit(&plane, "unheard", &rules);
    let kubeconfig = plane.kubeconfig_of("unheard");
    let mica = place.start_command(command(&place, &plane).args(arguments).env("KUBECONFIG", kubeconfig));
    let client = Client::new(&mica, &place);
    assert_eq!(client.refused(&known), (Code::Unavailable, "VERIFIER_UNAVAILABLE".to_owned()));
    assert_eq!(client.identity(&easy).unwrap(), id(&namespace, "web"));
    assert!(mica.log().contains("tokenreviews"), "{}", mica.log());
    mica.stop();
}

/// A proxy on node a, and who runs where.
struct Mesh<'a> {
    namespace: TestNamespace<'a>,
    place: Place,
    mica: Mica,
    client: Client,
    nodes: [Object; 2],
    proxy: Object,
    token: String,
}

impl<'a> Mesh<'a> {
    fn start(plane: &'a ControlPlane) -> Self {
        let namespace = plane.namespace();
        for name in ["proxy", "web", "db", "other"] {
            namespace.account(name);
        }
        let nodes = [namespace.node("a"), namespace.node("b")];
        let proxy = namespace.pod("proxy-1", "proxy", &nodes[0]);
        let token = namespace.token("proxy", "istio-ca", Some(&proxy));
        let place = Place::new();
        let policy = place.root.path().join("policy.yaml");
        std::fs::write(&policy, format!("impersonators: [{}/proxy]\n", namespace.name)).unwrap();
        let mica = start(&place, plane, &["--policy", policy.to_str().unwrap()]);
        let client = Client::new(&mica, &place);
        Self { namespace, place, mica, client, nodes, proxy, token }
    }
}

#[test]
fn a_proxy_gets_the_identities_of_pods_that_run_on_its_node_and_no_others() {
    let plane = ControlPlane::shared();
    let Mesh { namespace, place: _place, mica, client, nodes: [a, b], proxy, token } = &Mesh::start(plane);
    let [web, db, other] = ["web", "db", "other"].map(|name| id(namespace, name));
    // At once, whether or not a watch has told of the pod.
    namespace.pod("web-1", "web", a);
    assert_eq!(client.impersonated(token, &web).unwrap(), web);
    // Its own needs no such right.
    assert_eq!(client.identity(token).unwrap(), id(namespace, "proxy"));
    assert_eq!(client.impersonated(token, "").unwrap(), id(namespace, "proxy"));

    namespace.pod("db-1", "db", b);
    assert_eq!(client.not_impersonated(token, &db), unauthenticated("IMPERSONATED_ELSEWHERE"));
    assert_eq!(client.not_impersonated(token, &other), unauthenticated("IMPERSONATED_ELSEWHERE"));
    for wanted in [
        web.replace("cluster.local", "example.org"),
        "web".to_owned(),
        web.replace("/sa/", "/account/"),
        format!("{web}/more"),
    ] {
        assert_eq!(
            client.not_impersonated(token, &wanted),
            unauthenticated("IMPERSONATED_MALFORMED"),
            "{wanted}"
        );
    }
    // An account that policy does not name, and a token that is bound to no pod.
    let pod = namespace.pod("other-1", "other", a);
    let untrusted = namespace.token("other", "istio-ca", Some(&pod));
    assert_eq!(client.not_impersonated(&untrusted, &web), unauthenticated("IMPERSONATOR_UNKNOWN"));
    let unbound = namespace.token("proxy", "istio-ca", None);
    assert_eq!(client.not_impersonated(&unbound, &web), unauthenticated("IMPERSONATOR_UNBOUND"));

    for phase in ["Failed", "Succeeded"] {
        let name = format!("db-{}", phase.to_lowercase());
        namespace.pod(&name, "db", a);
        wait_for(Duration::from_secs(3), "the pod", || client.impersonated(token, &db).ok());
        namespace.phase(&name, phase);
        wait_for(Duration::from_secs(3), phase, || {
            let refused = client.impersonated(token, &db).err()?;
            (reason(&refused) == "IMPERSONATED_ELSEWHERE").then_some(())
        });
    }
    namespace.delete_pod("web-1");
    wait_for(Duration::from_secs(3), "the end of the pod", || {
        let refused = client.impersonated(token, &web).err()?;
        (reason(&refused) == "IMPERSONATED_ELSEWHERE").then_some(())
    });

    // The proxy's own pod runs no longer, though it is there.
    namespace.pod("web-2", "web", a);
    wait_for(Duration::from_secs(3), "the next pod", || client.impersonated(token, &web).ok());
    namespace.phase(&proxy.name, "Failed");
    wait_for(Duration::from_secs(3), "the end of the proxy", || {
        let refused = client.impersonated(token, &web).err()?;
        (reason(&refused) == "IMPERSONATOR_UNBOUND").then_some(())
    });
    assert!(mica.log().contains("IMPERSONATOR_UNBOUND"));
}

#[test]
fn an_agent_has_the_identities_of_many_pods_in_few_calls_and_one_that_is_refused_holds_up_nobody() {
    let plane = ControlPlane::shared();
    let Mesh { namespace, place, mica, nodes: [a, b], token, .. } = &Mesh::start(plane);
    let names: Vec<String> = (0..40).map(|n| format!("many-{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        namespace.account(name);
        // One of them runs elsewhere.
        namespace.pod(&format!("{name}-1"), name, if n == 7 { b } else { a });
    }
    let path = |name: &str| place.root.path().join(name);
    let entries = (names.iter().enumerate())
        .map(|(n, name)| format!("- identity: {}\n  match: {{uid: {}}}\n", id(namespace, name), 10_000 + n));
    std::fs::write(path("workloads.yaml"), format!("workloads:\n{}", entries.collect::<String>())).unwrap();
    std::fs::write(path("token"), token).unwrap();
    let mut command = agent::command(place, mica);
    command.arg("--token-file").arg(path("token")).arg("--workloads").arg(path("workloads.yaml"));
    command.arg("--socket").arg(path("agent.sock")).arg("--files").arg(path("files"));
    let agent = agent::start(place, "agent", &mut command);
    let held = |name: &String| {
        let folder = path("files").join(&namespace.name).join(format!("istio.{name}"));
        agent::leaf_in(&folder).ok().map(|leaf| leaf.uris[0].clone())
    };
    let expected: Vec<_> =
        names.iter().enumerate().map(|(n, name)| (n != 7).then(|| id(namespace, name))).collect();
    wait_for(Duration::from_secs(20), "the certificates", || {
        let all: Vec<_> = names.iter().map(held).collect();
        (all == expected && agent.log().contains("IMPERSONATED_ELSEWHERE")).then_some(())
    });
    let granted = |method: &str| {
        mica.metric(&format!("mica_requests_granted_total{{method=\"{method}\",authenticator=\"token\"}}"))
    };
    // Most of them in calls for several, and none twice.
    let (several, alone) = (granted("CreateCertificates"), granted("CreateCertificate"));
    assert!(several >= 30.0 && several + alone == 40.0, "{several} {alone}");
}

#[test]
fn a_proxy_on_another_machine_of_the_same_name_gets_nobody() {
    let plane = ControlPlane::shared();
    let Mesh { namespace, place: _place, mica: _mica, client, nodes: [a, _], token, .. } =
        &Mesh::start(plane);
    let web = id(namespace, "web");
    namespace.pod("web-1", "web", a);
    assert_eq!(client.impersonated(token, &web).unwrap(), web);
    plane.delete_node(&a.name);
    plane.node(&a.name);
    wait_for(Duration::from_secs(3), "the next node", || {
        let refused = client.impersonated(token, &web).err()?;
        (reason(&refused) == "IMPERSONATOR_UNBOUND").then_some(())
    });
}

#[test]
fn a_certificate_is_no_proof_for_asking_for_others() {
    let plane = ControlPlane::shared();
    let mesh = Mesh::start(plane);
    let (namespace, web) = (&mesh.namespace, id(&mesh.namespace, "web"));
    namespace.pod("web-1", "web", &mesh.nodes[0]);
    assert_eq!(mesh.client.impersonated(&mesh.token, &web).unwrap(), web);
    // A certificate of the proxy's, got with the token that would do.
    let set = place_certificate(&mesh);
    let channel = runtime().block_on(connect(&mesh.mica, &mesh.place, Some(set.path())));
    let client = Client(channel);
    assert_eq!(client.ask(None, None).unwrap(), id(namespace, "proxy"));
    let refused = client.ask(None, Some(&web)).unwrap_err();
    assert_eq!((refused.code(), reason(&refused)), unauthenticated("IMPERSONATOR_UNBOUND"));
}

/// Gets one for the proxy's token, and keeps it with its key.
fn place_certificate(mesh: &Mesh<'_>) -> tempfile::TempDir {
    let made = mica::sys::keys::generate(mica::core::key::KeyKind::P256).unwrap();
    let id = id(&mesh.namespace, "proxy").parse().unwrap();
    let der = mica::core::csr::workload(&made.signing().unwrap(), &id, &[]).unwrap();
    let mut request = tonic::Request::new(ask(mica::core::pem::encode(mica::core::pem::CSR, &der)));
    request.metadata_mut().insert("authorization", format!("Bearer {}", mesh.token).parse().unwrap());
    let mut client = IstioCertificateServiceClient::new(mesh.client.0.clone());
    let chain = runtime().block_on(client.create_certificate(request)).unwrap().into_inner().cert_chain;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("cert-chain.pem"), chain[..chain.len() - 1].concat()).unwrap();
    std::fs::write(folder.path().join("key.pem"), made.to_pem().as_bytes()).unwrap();
    folder
}
