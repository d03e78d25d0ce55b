//! The admission webhook, asked by a real API server.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::Client;
use mica::cluster::INJECT_PERMISSIONS;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::control_plane::{ControlPlane, runtime};
use super::manifests::{ask, denied, deployed, good};
use crate::serve::{Mica, Place, SLACK, free_port, wait_for};

const WEBHOOK: &str = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/mica-inject";
const SOON: Duration = Duration::from_secs(20);

/// A control plane on which `examples/inject` was applied, and which asks on this machine.
struct Webhook {
    plane: ControlPlane,
    admin: Client,
    place: Place,
    address: String,
}

impl Webhook {
    fn new() -> Self {
        let plane = ControlPlane::start();
        good(&plane, &["apply", "--server-side", "--force-conflicts", "--kustomize=examples/inject"]);
        let admin = plane.client();
        let webhook =
            Self { admin, plane, place: Place::new(), address: format!("127.0.0.1:{}", free_port()) };
        // There is no way from this API server to services.
        let mut object = webhook.object();
        for one in object["webhooks"].as_array_mut().unwrap() {
            assert_eq!(one["clientConfig"]["service"]["name"], "mica-inject");
            one["clientConfig"] = json!({"url": format!("https://{}/inject", webhook.address)});
        }
        ask(&webhook.admin, "PUT", WEBHOOK, &object).unwrap();
        for (name, label) in
            [("shop", "true"), ("other", ""), ("istio-system", "true"), ("kube-system", "true")]
        {
            if ["shop", "other"].contains(&name) {
                webhook.plane.make_namespace(name);
            }
            if !label.is_empty() {
                good(&webhook.plane, &["label", "namespace", name, &format!("mica.dev/inject={label}")]);
            }
        }
        webhook
    }

    fn start(&self, arguments: &[&str]) -> Mica {
        let mut command = deployed(&self.plane, &self.place);
        command.arg(format!("--inject-address={}", self.address));
        command.args(["--inject-dns-names=mica-inject.istio-system.svc,127.0.0.1"]).args(arguments);
        self.place.start_command(&mut command)
    }

    fn object(&self) -> Value {
        ask(&self.admin, "GET", WEBHOOK, &Value::Null).unwrap()
    }

    fn patch(&self, change: impl Fn(&mut Value)) {
        // Others write it too.
        wait_for(SOON, "a write", || {
            let mut object = self.object();
            object["webhooks"].as_array_mut().unwrap().iter_mut().for_each(&change);
            ask(&self.admin, "PUT", WEBHOOK, &object).ok()
        });
    }

    fn is_trusted(&self) -> bool {
        let roots = self.place.root_pem();
        self.object()["webhooks"].as_array().unwrap().iter().all(|one| {
            let bundle = one["clientConfig"]["caBundle"].as_str().unwrap_or_default();
            STANDARD.decode(bundle).unwrap() == roots.as_bytes()
        })
    }

    /// What the API server would make of a pod.
    fn pod(&self, namespace: &str, change: impl FnOnce(&mut Value)) -> Result<Value, (u16, String)> {
        let container = |name: &str| {
            json!({
                "name": name, "image": name,
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
            })
        };
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": {}},
            "spec": {
                "containers": [container("web"), container("istio-proxy")],
                "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            },
        });
        change(&mut pod);
        ask(&self.admin, "POST", &format!("/api/v1/namespaces/{namespace}/pods?dryRun=All"), &pod)
    }

    fn wait_until_injected(&self, when: &str) {
        wait_for(SOON, when, || self.pod("shop", |_| {}).ok().filter(has_certificates));
    }
}

fn mounts<'a>(pod: &'a Value, list: &str, name: &str) -> Vec<&'a str> {
    let containers = pod["spec"][list].as_array().unwrap();
    let container = containers.iter().find(|container| container["name"] == name).unwrap();
    container["volumeMounts"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|mount| mount["name"].as_str().unwrap())
        .collect()
}

fn has_certificates(pod: &Value) -> bool {
    let volumes = pod["spec"]["volumes"].as_array().unwrap();
    let volume = volumes.iter().find(|volume| volume["name"] == "istio-certs");
    let is_mounted = mounts(pod, "containers", "istio-proxy").contains(&"istio-certs");
    assert_eq!(volume.is_some(), is_mounted, "{pod:#}");
    assert!(!mounts(pod, "containers", "web").contains(&"istio-certs"));
    volume.is_some_and(|volume| volume["secret"]["secretName"] == "istio.default")
}

#[test]
fn pods_that_ask_for_it_get_certificates_and_no_others() {
    let webhook = Webhook::new();
    let before = webhook.object();
    let mica = webhook.start(&[]);
    wait_for(SOON, "the caBundles", || webhook.is_trusted().then_some(()));
    webhook.wait_until_injected("a pod with certificates");

    let labelled = |value: &'static str| {
        move |pod: &mut Value| pod["metadata"]["labels"]["mica.dev/inject"] = value.into()
    };
    let injected = |namespace: &str, change: &dyn Fn(&mut Value)| {
        // A namespace's account is made a moment after it.
        let pod = wait_for(SOON, "a pod", || match webhook.pod(namespace, change) {
            Err((403, said)) if said.contains("serviceaccount") => None,
            made => Some(made),
        });
        has_certificates(&pod.unwrap())
    };
    assert!(!injected("other", &|_| {}));
    assert!(injected("other", &labelled("true")));
    assert!(!injected("shop", &labelled("false")));
    for never in ["istio-system", "kube-system"] {
        assert!(!injected(never, &|_| {}));
        assert!(!injected(never, &labelled("true")));
    }
    let bare = |pod: &mut Value| drop(pod["spec"]["containers"].as_array_mut().unwrap().pop());
    assert!(webhook.pod("shop", bare).is_ok());
    let contrary =
        |pod: &mut Value| pod["spec"]["volumes"] = json!([{"name": "istio-certs", "emptyDir": {}}]);
    let (code, said) = webhook.pod("shop", contrary).unwrap_err();
    assert!(code == 422 && said.contains("the volume istio-certs is there"), "{code} {said}");

    // Not even if somebody has the API server ask about them.
    webhook.patch(|one| one["namespaceSelector"] = json!({}));
    wait_for(SOON, "a pod of another namespace", || injected("other", &|_| {}).then_some(()));
    for never in ["istio-system", "kube-system"] {
        assert!(!injected(never, &|_| {}));
    }

    // Nothing was written but what the API server trusts it by.
    let mut after = webhook.object();
    let mut before = before;
    for object in [&mut before, &mut after] {
        object["metadata"]["managedFields"].take();
        object["metadata"]["resourceVersion"].take();
        object["metadata"]["generation"].take();
        for one in object["webhooks"].as_array_mut().unwrap() {
            one["namespaceSelector"].take();
            one["clientConfig"].as_object_mut().unwrap().remove("caBundle");
        }
    }
    assert_eq!(before, after);
    let page = mica.page("/metrics").1;
    for outcome in ["changed", "left_alone", "no_container", "refused"] {
        let line = page
            .lines()
            .find(|line| line.contains(&format!("mica_pod_reviews_total{{outcome=\"{outcome}\"}}")));
        assert!(line.is_some_and(|line| !line.ends_with(" 0")), "{outcome}: {line:?}");
    }
    mica.stop();
    assert!(denied(&webhook.plane).is_empty());
}

#[test]
fn its_trust_is_mended_and_while_it_is_away_pods_wait_or_go_without_as_chosen() {
    let webhook = Webhook::new();
    let mica = webhook.start(&[]);
    wait_for(SOON, "the caBundles", || webhook.is_trusted().then_some(()));
    webhook.wait_until_injected("a pod with certificates");

    let other = std::fs::read(webhook.plane.kubeconfig_of("admin").with_file_name("ca.crt")).unwrap();
    let damage = |bundle: Value| webhook.patch(|one| one["clientConfig"]["caBundle"] = bundle.clone());
    for (what, bundle) in [("another", STANDARD.encode(&other).into()), ("none", Value::Null)] {
        damage(bundle);
        let within = Duration::from_secs(5) + SLACK;
        wait_for(within, &format!("the caBundles after {what}"), || webhook.is_trusted().then_some(()));
    }
    webhook.wait_until_injected("a pod with certificates again");

    mica.stop();
    let (code, said) = wait_for(SOON, "a refusal", || webhook.pod("shop", |_| {}).err());
    assert!(code == 500 && said.contains("failed calling webhook"), "{code} {said}");
    // Others are none of its business.
    assert!(!has_certificates(&webhook.pod("other", |_| {}).unwrap()));
    webhook.patch(|one| one["failurePolicy"] = "Ignore".into());
    let bare = wait_for(SOON, "a pod without", || webhook.pod("shop", |_| {}).ok());
    assert!(!has_certificates(&bare));
    let mica = webhook.start(&[]);
    webhook.wait_until_injected("a pod with certificates after a restart");
    mica.stop();

    // Nobody is fought.
    let mica = webhook.start(&[]);
    wait_for(SOON, "the caBundles", || webhook.is_trusted().then_some(()));
    let log = || std::fs::read_to_string(webhook.place.root.path().join("log")).unwrap();
    wait_for(Duration::from_secs(60), "the end of a fight", || {
        damage(STANDARD.encode(&other).into());
        std::thread::sleep(Duration::from_millis(500));
        log().contains("another writer keeps writing the caBundle").then_some(())
    });
    assert!(!webhook.is_trusted());
    mica.stop();
}

#[test]
fn an_agent_is_put_beside_the_proxy_and_alone_has_the_token() {
    let webhook = Webhook::new();
    good(&webhook.plane, &["label", "namespace", "shop", "pod-security.kubernetes.io/enforce=restricted"]);
    let mica = webhook.start(&[
        "--inject-mode=agent",
        "--inject-files=/etc/certs",
        "--inject-metrics-address=0.0.0.0:15020",
        "--inject-trace-otlp=http://otel-collector.observability:4318",
        "--inject-trace-zipkin=http://zipkin.observability:9411",
    ]);
    wait_for(SOON, "the caBundles", || webhook.is_trusted().then_some(()));
    let with_agent = |pod: &Value| pod["spec"].get("initContainers").is_some();
    let pod = wait_for(SOON, "a pod with an agent", || webhook.pod("shop", |_| {}).ok().filter(with_agent));
    let agent = &pod["spec"]["initContainers"][0];
    assert_eq!((&agent["name"], &agent["restartPolicy"]), (&json!("mica-agent"), &json!("Always")));
    assert_eq!(agent["ports"][0]["name"], "mica-metrics");
    for flag in [
        "--http-address=0.0.0.0:15020",
        "--trace-otlp=http://otel-collector.observability:4318/v1/traces",
        "--trace-zipkin=http://zipkin.observability:9411/api/v2/spans",
    ] {
        assert!(agent["args"].as_array().unwrap().contains(&flag.into()), "{agent}");
    }
    let token = "mica-credentials";
    assert!(mounts(&pod, "initContainers", "mica-agent").contains(&token));
    for container in ["web", "istio-proxy"] {
        assert!(!mounts(&pod, "containers", container).contains(&token));
    }
    assert!(mounts(&pod, "containers", "istio-proxy").contains(&"mica-certs"));
    mica.stop();
}

#[test]
fn the_rules_for_the_webhook_are_those_that_the_program_says_it_needs() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/inject/rbac.yaml")).unwrap();
    let roles: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    let said: Value = serde_saphyr::from_str(INJECT_PERMISSIONS).unwrap();
    assert_eq!(roles[0]["rules"], said);
}

/// A connection to the webhook's port from an address of this machine.
async fn dial(
    address: &str,
    from: [u8; 4],
    roots: &str,
    name: &'static str,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut store = rustls::RootCertStore::empty();
    store.add_parsable_certificates(CertificateDer::pem_slice_iter(roots.as_bytes()).map(Result::unwrap));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(store)
        .with_no_client_auth();
    let socket = TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    let stream = socket.connect(address.parse().unwrap()).await?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name).unwrap(), stream).await
}

#[test]
fn who_floods_the_webhook_keeps_nobody_from_being_answered() {
    let webhook = Webhook::new();
    let mica = webhook.start(&[]);
    wait_for(SOON, "the caBundles", || webhook.is_trusted().then_some(()));
    webhook.wait_until_injected("a pod with certificates");
    let roots = webhook.place.root_pem();
    let address = webhook.address.as_str();
    let (here, elsewhere) = ([127, 0, 0, 1], [127, 0, 0, 2]);
    let said = |request: String| {
        let asked = async {
            let mut stream = dial(address, here, &roots, "mica-inject.istio-system.svc").await.unwrap();
            // It may answer, and hang up, before it has read all.
            let _ = stream.write_all(request.as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8_lossy(&answer).into_owned()
        };
        runtime().block_on(async { tokio::time::timeout(Duration::from_secs(30), asked).await.unwrap() })
    };
    let post = |body: &str| {
        format!("POST /inject HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    for (request, code) in [
        (post("{}"), "400"),
        (post("\u{0}"), "400"),
        (post(&" ".repeat(3 << 20)), "413"),
        ("GET /inject HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), "405"),
        ("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n".to_owned(), "404"),
        // Never sent.
        ("POST /inject HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n".to_owned(), ""),
    ] {
        let answer = said(request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {code}"))
                || (code.is_empty() && !answer.contains("200 OK")),
            "{code}: {answer}"
        );
    }
    // The rest of what is said to others.
    assert!(runtime().block_on(dial(address, here, &roots, "istiod.istio-system.svc")).is_err());

    // Those who only listen, and those who have shaken hands and begun.
    let mut held = Vec::new();
    let silent: Vec<_> = (0..300).map(|_| std::net::TcpStream::connect(address).unwrap()).collect();
    for _ in 0..100 {
        let begun = runtime().block_on(async {
            let mut stream = dial(address, elsewhere, &roots, "mica-inject.istio-system.svc").await?;
            stream.write_all(b"POST /inject HTTP/1.1\r\n").await?;
            Ok::<_, std::io::Error>(stream)
        });
        held.extend(begun);
    }
    for _ in 0..20 {
        assert!(has_certificates(&webhook.pod("shop", |_| {}).unwrap()));
    }
    drop((silent, held));
    assert!(!mica.log().contains("panic"), "{}", mica.log());
    mica.stop();
}
