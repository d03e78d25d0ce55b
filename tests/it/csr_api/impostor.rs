//! An authority whose answers are wrong, each in its own way: `mica csr request` takes none of them.

use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mica::core::authority_files;
use mica::core::certificate::Certificate;
use mica::core::csr::CheckedCsr;
use mica::core::issuer::{Issuer, Order};
use mica::core::key::{KeyKind, PublicKey};
use mica::core::profile::Profile;
use mica::core::spiffe::{SpiffeId, TrustDomain};
use mica::proto::istio::v1::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use mica::proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use mica::sys::{files, keys};
use prost_types::value::Kind;
use time::{Duration, OffsetDateTime};
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

use crate::mica::{Done, ID, Place};
use crate::parts;
use crate::serve::wait_for;
use std::process::Stdio;

type Answer = Box<dyn Fn(&PublicKey) -> Result<Vec<String>, Status> + Send>;

#[derive(Clone)]
struct Impostor(Arc<Mutex<Answer>>);

#[tonic::async_trait]
impl IstioCertificateService for Impostor {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let csr = CheckedCsr::from_pem(request.into_inner().csr.as_bytes()).unwrap();
        let cert_chain = self.0.lock().unwrap()(csr.key())?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

/// The CA in a folder of the place.
fn issuer(place: &Place, folder: &str) -> Issuer {
    let found = files::read_named(&place.path(folder), &authority_files::NAMES, 1 << 20).unwrap();
    authority_files::issuer(&found, None, &TrustDomain::parse("cluster.local").unwrap()).unwrap()
}

fn issued(issuer: &Issuer, profile: Profile<'_>, key: &PublicKey, at: OffsetDateTime) -> String {
    let order = Order { profile, key, lifetime: "1h".parse().unwrap() };
    let issued = issuer.issue(&order, at, keys::serial_number().unwrap()).unwrap();
    Certificate::from_der(issued.der()).unwrap().to_pem()
}

fn leaf(issuer: &Issuer, id: &str, key: &PublicKey, at: OffsetDateTime) -> String {
    let id = SpiffeId::parse(id).unwrap();
    issued(issuer, Profile::Workload { id: &id, dns: &[], proved_at: None }, key, at)
}

/// A place with a CA, an impostor that its root vouches for, and the address of it.
async fn start(first: Answer) -> (Place, Impostor, String) {
    let place = Place::with_ca();
    let impostor = Impostor(Arc::new(Mutex::new(first)));
    let address = serve(&place, impostor.clone()).await;
    (place, impostor, address)
}

async fn serve(place: &Place, authority: impl IstioCertificateService) -> String {
    place.ok(&["root", "new", "--out", "other"]);
    place.write("token", "a.b.c");
    let key = keys::generate(KeyKind::P256).unwrap();
    let serving = Profile::Serving { dns: &["localhost".parse().unwrap()], addresses: &[] };
    let issuer = issuer(place, "ca");
    let chain = issued(&issuer, serving, key.public(), OffsetDateTime::now_utc())
        + &issuer.chain().iter().map(Certificate::to_pem).collect::<String>();
    let tls = ServerTlsConfig::new().identity(Identity::from_pem(chain, key.to_pem().as_bytes()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = Server::builder()
        .tls_config(tls)
        .unwrap()
        .add_service(IstioCertificateServiceServer::new(authority))
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener));
    tokio::spawn(server);
    address
}

fn ask(place: &Place, address: &str, more: &[&str]) -> Done {
    let arguments = ["csr", "request", "--address", address, "--name", "localhost", "--token-file", "token"];
    let roots = ["--roots", "root/root-cert.pem", "--out", "out"];
    tokio::task::block_in_place(|| place.run(&[&arguments[..], &roots, more].concat()))
}

#[tokio::test(flavor = "multi_thread")]
async fn no_wrong_answer_is_written_down() {
    let (place, impostor, address) = start(Box::new(|_| Ok(Vec::new()))).await;
    let now = OffsetDateTime::now_utc();
    let (ca, root, other) = (issuer(&place, "ca"), issuer(&place, "root"), issuer(&place, "other"));
    let [above, bundle, foreign] =
        ["ca/ca-cert.pem", "root/root-cert.pem", "other/root-cert.pem"].map(|name| place.read(name));
    let another = keys::generate(KeyKind::P256).unwrap().public().clone();
    let domain = TrustDomain::parse("cluster.local").unwrap();
    let organization = "x".parse().unwrap();

    type Wrong<'a> = (&'a str, &'a str, Answer);
    let own = |issuer: &Issuer| {
        let issuer = issuer.clone();
        move |key: &PublicKey| leaf(&issuer, ID, key, now)
    };
    let wrong: Vec<Wrong<'_>> = vec![
        ("nothing", "0 elements", Box::new(|_| Ok(Vec::new()))),
        ("a bundle alone", "1 elements", {
            let bundle = bundle.clone();
            Box::new(move |_| Ok(vec![bundle.clone()]))
        }),
        ("no bundle", "no CA", {
            let (own, above) = (own(&ca), above.clone());
            Box::new(move |key| Ok(vec![above.clone(), own(key)]))
        }),
        ("an empty bundle", "no PEM block", {
            let (own, above) = (own(&ca), above.clone());
            Box::new(move |key| Ok(vec![own(key), above.clone(), String::new()]))
        }),
        ("two certificates in one element", "element 1 holds 2 certificates", {
            let (own, above, bundle) = (own(&ca), above.clone(), bundle.clone());
            Box::new(move |key| Ok(vec![own(key) + &above, bundle.clone()]))
        }),
        ("garbage", "element 1", {
            let bundle = bundle.clone();
            Box::new(move |_| Ok(vec!["garbage".to_owned(), bundle.clone()]))
        }),
        ("another key", "another key", {
            let (ca, above, bundle, another) = (ca.clone(), above.clone(), bundle.clone(), another);
            Box::new(move |_| Ok(vec![leaf(&ca, ID, &another, now), above.clone(), bundle.clone()]))
        }),
        ("another identity", "/sa/other", {
            let (ca, above, bundle) = (ca.clone(), above.clone(), bundle.clone());
            let id = "spiffe://cluster.local/ns/default/sa/other";
            Box::new(move |key| Ok(vec![leaf(&ca, id, key, now), above.clone(), bundle.clone()]))
        }),
        ("a missing intermediate", "no path", {
            let (own, bundle) = (own(&ca), bundle.clone());
            Box::new(move |key| Ok(vec![own(key), bundle.clone()]))
        }),
        ("another's bundle", "no path", {
            let (own, above, foreign) = (own(&ca), above.clone(), foreign.clone());
            Box::new(move |key| Ok(vec![own(key), above.clone(), foreign.clone()]))
        }),
        ("another's leaf", "no path", {
            let (own, bundle) = (own(&other), bundle.clone());
            Box::new(move |key| Ok(vec![own(key), bundle.clone()]))
        }),
        ("an expired leaf", "expired", {
            let (root, bundle) = (root.clone(), bundle.clone());
            // The root is backdated by two minutes, and none of its leaves begins before it.
            Box::new(move |key| {
                let id = SpiffeId::parse(ID).unwrap();
                let profile = Profile::Workload { id: &id, dns: &[], proved_at: None };
                let order = Order { profile, key, lifetime: "10s".parse().unwrap() };
                let issued = root.issue(&order, now - Duration::seconds(60), keys::serial_number().unwrap());
                Ok(vec![Certificate::from_der(issued.unwrap().der()).unwrap().to_pem(), bundle.clone()])
            })
        }),
        ("a CA", "leaf", {
            let (root, bundle) = (root.clone(), bundle.clone());
            Box::new(move |key| {
                let profile = Profile::Intermediate { organization: &organization, trust_domain: &domain };
                Ok(vec![issued(&root, profile, key, now), bundle.clone()])
            })
        }),
    ];
    for (what, part, answer) in wrong {
        *impostor.0.lock().unwrap() = answer;
        let before = place.everything();
        let done = ask(&place, &address, &["--identity", ID]);
        assert_eq!(done.code, 1, "{what}: {done:?}");
        let line = done.one_line();
        assert!(line.contains("nothing was written") && line.contains(part), "{what}: {line}");
        assert!(place.everything() == before, "{what}");
    }

    // The same answers, made right.
    let (own, above) = (own(&ca), above);
    let two = bundle + &foreign;
    *impostor.0.lock().unwrap() = Box::new(move |key| Ok(vec![own(key), above.clone(), two.clone()]));
    let done = ask(&place, &address, &["--identity", ID]);
    assert_eq!(done.code, 0, "{done:?}");
    assert!(done.stderr.contains("out/root-cert.pem, differs from root/root-cert.pem"), "{done:?}");
    assert!(place.ok(&["verify", "out"]).starts_with("good: "));
}

/// An agent that was not told who it is has it from its own credential, and from the authority only what that says.
#[tokio::test(flavor = "multi_thread")]
async fn an_agents_first_answer_is_of_whom_its_credential_is() {
    let (place, impostor, address) = start(Box::new(|_| Ok(Vec::new()))).await;
    let issuer = issuer(&place, "ca");
    let own_key = keys::generate(KeyKind::P256).unwrap();
    let [above, bundle] = ["ca/ca-cert.pem", "root/root-cert.pem"].map(|name| place.read(name));
    place
        .write("own/cert-chain.pem", leaf(&issuer, ID, own_key.public(), OffsetDateTime::now_utc()) + &above);
    place.write("own/key.pem", own_key.to_pem().as_bytes());
    let token = |sub: &str| {
        let encoded = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let claims = serde_json::json!({ "sub": sub }).to_string();
        format!("{}.{}.{}", encoded(r#"{"alg":"ES256"}"#), encoded(&claims), encoded("signature"))
    };
    place.write("of-web", token("system:serviceaccount:default:web"));
    place.write("of-ci", token("repo:example/shop:ref:refs/heads/main"));
    place.write("opaque", "opaque");
    let says = |id: &'static str| -> Answer {
        let (issuer, above, bundle) = (issuer.clone(), above.clone(), bundle.clone());
        Box::new(move |key| {
            let leaf = leaf(&issuer, id, key, OffsetDateTime::now_utc());
            Ok(vec![leaf, above.clone(), bundle.clone()])
        })
    };
    let other = "spiffe://cluster.local/ns/default/sa/other";
    let logs = crate::serve::Place::new();
    let begin = |flag: &str, credential: &str| {
        let mut agent = place.command(&["agent", "--http-address", "127.0.0.1:0", "--log-format", "human"]);
        agent.args(["--authority-address", &address, "--authority-name", "localhost"]);
        agent.args(["--authority-roots", "root/root-cert.pem", flag, credential]);
        agent.arg("--files").arg(place.path(&format!("files-{credential}")));
        crate::agent::start(&logs, credential, &mut agent)
    };
    let soon = std::time::Duration::from_secs(5);
    for (flag, credential, shown) in [
        ("--token-file", "of-web", "a token of the service account default/web"),
        ("--certificate", "own", &format!("a certificate of {ID}")),
    ] {
        *impostor.0.lock().unwrap() = says(other);
        tokio::task::block_in_place(|| {
            let agent = begin(flag, credential);
            let failures = "mica_agent_failures_total{reason=\"answer\"}";
            let why = wait_for(soon, "a refusal", || {
                agent.log().lines().find(|line| line.contains("what peers would refuse")).map(str::to_owned)
            });
            assert!(why.contains(other) && why.contains(shown), "{why}");
            wait_for(soon, "it to be counted", || (agent.metric(failures) > 0.0).then_some(()));
            assert!(!place.path(&format!("files-{credential}/cert-chain.pem")).exists());
            *impostor.0.lock().unwrap() = says(ID);
            wait_for(soon, "a certificate", || (agent.page("/readyz").0 == 200).then_some(()));
            assert!(agent.log().contains(&format!("certificate obtained identity={ID}")), "{}", agent.log());
            agent.stop();
        });
    }
    // These name no service account, so only the authority knows whose they are.
    *impostor.0.lock().unwrap() = says(other);
    for credential in ["of-ci", "opaque"] {
        tokio::task::block_in_place(|| {
            let agent = begin("--token-file", credential);
            wait_for(soon, "a certificate", || (agent.page("/readyz").0 == 200).then_some(()));
            agent.stop();
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_authoritys_refusals_and_silences_are_told_apart() {
    let (place, impostor, address) = start(Box::new(|_| Err(Status::internal("CSR signing error")))).await;
    let asked = |parts: &[&str], code: i32| {
        let done = ask(&place, &address, &[]);
        assert_eq!(done.code, code, "{done:?}");
        let line = done.one_line();
        assert!(parts.iter().all(|part| line.contains(part)), "{parts:?}: {line}");
    };
    // As istiod: no reason.
    asked(&["says no: INTERNAL: CSR signing error"], 1);
    *impostor.0.lock().unwrap() = Box::new(|_| Err(Status::unauthenticated("one\nline\u{1b}[31m")));
    asked(&["says no: UNAUTHENTICATED: one"], 1);
    *impostor.0.lock().unwrap() = Box::new(|_| panic!("the impostor falls over"));
    asked(&["broke", "try again"], 2);
    assert!(!place.path("out").exists());
}

#[test]
fn a_server_that_speaks_tls_and_no_http2_is_told_so() {
    let place = Place::with_ca();
    place.write("token", "a.b.c");
    place.ok(&["csr", "new", "--identity", ID, "--out", "serving"]);
    place.ok(&[
        "sign",
        "serving/csr.pem",
        "--authority",
        "ca",
        "--identity",
        ID,
        "--dns",
        "localhost",
        "--out",
        "chain",
    ]);
    let port = crate::serve::free_port();
    let mut openssl = parts::openssl();
    openssl.args(["s_server", "-quiet", "-accept", &port.to_string(), "-cert"]).arg(place.path("chain"));
    openssl.arg("-cert_chain").arg(place.path("chain")).arg("-key").arg(place.path("serving/key.pem"));
    let mut server =
        openssl.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let done = wait_for(std::time::Duration::from_secs(5), "OpenSSL", || {
        let done = place.run(&[
            "csr",
            "request",
            "--address",
            &format!("localhost:{port}"),
            "--roots",
            "root/root-cert.pem",
            "--token-file",
            "token",
            "--out",
            "out",
        ]);
        Some(done).filter(|done| !done.stderr.contains("connection refused"))
    });
    let _ = server.kill();
    let _ = server.wait();
    assert_eq!(done.code, 2, "{done:?}");
    assert!(done.one_line().contains("does not speak HTTP/2"), "{done:?}");
}

/// An authority as Istio's: it has no call but this one, and names whom it is asked for.
struct OneByOne(Issuer, String);

#[tonic::async_trait]
impl IstioCertificateService for OneByOne {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let asked = request.into_inner();
        let csr = CheckedCsr::from_pem(asked.csr.as_bytes()).unwrap();
        let wanted = asked.metadata.and_then(|mut all| all.fields.remove("ImpersonatedIdentity"));
        let Some(Kind::StringValue(id)) = wanted.and_then(|value| value.kind) else {
            return Err(Status::unauthenticated("not the agent's own"));
        };
        let mut cert_chain = vec![leaf(&self.0, &id, csr.key(), OffsetDateTime::now_utc())];
        cert_chain.extend(self.0.chain().iter().map(Certificate::to_pem));
        cert_chain.push(self.1.clone());
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_knows_no_call_for_several_is_asked_one_by_one() {
    let place = Place::with_ca();
    let authority = OneByOne(issuer(&place, "ca"), place.read("root/root-cert.pem"));
    let address = serve(&place, authority).await;
    let entries: String = (0..20)
        .map(|n| {
            format!(
                "- {{identity: spiffe://cluster.local/ns/many/sa/a{n}, match: {{uid: {}}}}}\n",
                10_000 + n
            )
        })
        .collect();
    place.write("workloads.yaml", format!("workloads:\n{entries}"));
    let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_mica"))
        .current_dir(place.path(""))
        .args(["agent", "--http-address", "127.0.0.1:0", "--authority-address", &address])
        .args(["--authority-name", "localhost", "--authority-roots", "root/root-cert.pem"])
        .args(["--identity", "spiffe://cluster.local/ns/many/sa/agent", "--token-file", "token"])
        .args(["--workloads", "workloads.yaml", "--socket", "agent.sock", "--files", "files"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    tokio::task::block_in_place(|| {
        wait_for(std::time::Duration::from_secs(20), "the certificates", || {
            let has = |n| crate::agent::leaf_in(&place.path(&format!("files/many/istio.a{n}"))).is_ok();
            (0..20).all(has).then_some(())
        });
    });
    agent.kill().unwrap();
    agent.wait().unwrap();
}
