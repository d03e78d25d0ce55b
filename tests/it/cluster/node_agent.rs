//! One agent for a whole node, as `examples/node-agent` deploys it: pods get what is theirs over its socket, by the word of
//! the kernel, the kubelet and the API server.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mica::core::certificate::Certificate;
use mica::core::key::PrivateKey;
use serde_json::{Value, json};

use super::node::Node;
use super::pods::{self, account, confined};
use crate::fixtures::run;
use crate::parts;
use crate::serve::wait_for;

const IMAGE: &str = "localhost/workload:1";
const NAMESPACE: &str = "shop";
const FOLDER: &str = "/run/mica";
const SOCKET: &str = "/run/mica/agent.sock";
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn each_pod_has_its_own_identity_over_the_nodes_socket_for_as_long_as_it_is_there() {
    let node = &Node::start();
    install(node);
    let [a, b] = ["a", "b"].map(|name| {
        node.kubectl(&[
            "wait",
            "--for=condition=Ready",
            "--namespace",
            NAMESPACE,
            "--timeout=90s",
            &format!("pod/{name}"),
        ]);
        node.container(NAMESPACE, name)
    });

    // go-spiffe's sources, and requests between two ends that take all from them.
    for (name, container) in [("a", &a), ("b", &b)] {
        let script =
            format!("(sleep 5; echo; sleep 1) | go-spiffe-check workload --audience somebody {SOCKET}");
        let said = run(&mut node.inside(container, &["/bin/sh", "-c", &script]));
        assert!(said.starts_with(&format!("id={} requests=", id(name))), "{said}");
        assert!(!said.contains("requests=0") && !said.contains("tokens=0"), "{said}");
    }

    let program = parts::grpcurl();
    let program = program.to_str().unwrap();
    let of = |container: &str, wanted: Option<&str>| {
        token(&mut node.inside(container, &token_arguments("grpcurl", wanted)), wanted)
    };
    assert_eq!(of(&a, None), Ok(id("a")));
    assert_eq!(of(&b, None), Ok(id("b")));
    assert_eq!(of(&b, Some("b")), Ok(id("b")));
    for (container, wanted) in [(&b, "a"), (&a, "b"), (&a, "nobody")] {
        let refused = of(container, Some(wanted)).unwrap_err();
        assert!(refused.contains("PermissionDenied"), "{wanted}: {refused}");
    }
    // Root on the node, in no pod.
    for wanted in [None, Some("a")] {
        let refused = token(&mut node.outside(&token_arguments(program, wanted)), wanted).unwrap_err();
        assert!(refused.contains("PermissionDenied"), "{refused}");
    }

    // The same over SDS.
    let secret_of =
        |container: &str, name: &str| secret(&mut node.inside(container, &secret_arguments("grpcurl", name)));
    for (name, container) in [("a", &a), ("b", &b)] {
        assert_eq!(secret_of(container, "default"), Ok(id(name)));
        assert_eq!(secret_of(container, &id(name)), Ok(id(name)));
    }
    for (container, wanted) in [(&b, "a"), (&a, "b"), (&a, "nobody")] {
        let refused = secret_of(container, &id(wanted)).unwrap_err();
        assert!(refused.contains("PermissionDenied"), "{wanted}: {refused}");
    }
    let refused = secret(&mut node.outside(&secret_arguments(program, "default"))).unwrap_err();
    assert!(refused.contains("PermissionDenied"), "{refused}");

    // Its processes live on, since there is no kubelet to end them.
    let [mut kept, mut ended] = [&a, &b].map(|container| Stream::open(node, container));
    assert_eq!((kept.next(), ended.next()), (id("a"), id("b")));
    node.cluster(["stop", "kubelet"]);
    node.kubectl(&[
        "delete",
        "pod",
        "b",
        "--namespace",
        NAMESPACE,
        "--force",
        "--grace-period=0",
        "--wait=false",
    ]);
    let said = ended.end();
    assert!(said.contains("PermissionDenied"), "{said}");
    wait_for(PATIENCE, "a refusal", || of(&b, None).err().filter(|why| why.contains("PermissionDenied")));
    // The API server is asked for a pod that nobody knows once in a second, and who comes in between is told to come back.
    wait_for(PATIENCE, "a refusal over SDS", || {
        secret_of(&b, "default").err().filter(|why| why.contains("PermissionDenied"))
    });
    assert_eq!(of(&a, None), Ok(id("a")));
    assert_eq!(secret_of(&a, "default"), Ok(id("a")));
    assert!(kept.lives());
}

fn id(account: &str) -> String {
    format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/{account}")
}

/// Mica, its agent, and two pods of two accounts.
fn install(node: &Node) {
    pods::image(node);
    let folder = tempfile::tempdir().unwrap();
    let programs = folder.path().join("bin");
    fs::create_dir(&programs).unwrap();
    let busybox = run(Command::new("sh").args(["-c", "command -v busybox"]));
    for (program, names) in [
        (Path::new(busybox.trim()), &["sh", "sleep", "echo"][..]),
        (&parts::go_spiffe(), &["go-spiffe-check"]),
        (&parts::grpcurl(), &["grpcurl"]),
    ] {
        for name in names {
            fs::copy(program, programs.join(name)).unwrap();
        }
    }
    node.cluster(["image".as_ref(), IMAGE.as_ref(), folder.path().as_os_str()]);

    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/node-agent");
    node.kubectl(&["apply", "--kustomize", example.to_str().unwrap()]);
    node.rolled_out("istio-system", "mica");
    let rollout = ["rollout", "status", "daemonset/mica-agent", "--namespace=mica-agent", "--timeout=120s"];
    if let Err(error) = node.try_kubectl(&rollout) {
        let said = node.try_kubectl(&["logs", "--namespace=mica-agent", "daemonset/mica-agent", "--tail=40"]);
        panic!("{error}\n{}", said.unwrap_or_else(|error| error));
    }
    node.apply(&[
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}),
        account(NAMESPACE, "a"),
        account(NAMESPACE, "b"),
        pod("a"),
        pod("b"),
    ]);
}

/// A pod that mounts the agent's folder as `docs/agent.md` says.
fn pod(account: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": NAMESPACE, "name": account},
        "spec": {
            "serviceAccountName": account, "automountServiceAccountToken": false,
            "securityContext": {"runAsUser": 65532, "runAsNonRoot": true},
            "containers": [{
                "name": "workload", "image": IMAGE, "command": ["/bin/sleep", "100000"],
                "securityContext": confined(),
                "volumeMounts": [{"name": "mica", "mountPath": FOLDER, "readOnly": true}],
            }],
            "volumes": [{"name": "mica", "hostPath": {"path": FOLDER, "type": "Directory"}}],
        },
    })
}

fn asking<'a>(program: &'a str, data: &'a str, method: &'a str) -> Vec<&'a str> {
    vec![program, "-plaintext", "-unix", "-H", "workload.spiffe.io: true", "-d", data, SOCKET, method]
}

fn token_arguments(program: &str, wanted: Option<&str>) -> Vec<String> {
    let mut request = json!({"audience": ["somebody"]});
    if let Some(wanted) = wanted {
        request["spiffe_id"] = id(wanted).into();
    }
    let data = request.to_string();
    asking(program, &data, "SpiffeWorkloadAPI/FetchJWTSVID").into_iter().map(str::to_owned).collect()
}

/// Whose token is given.
fn token(command: &mut Command, wanted: Option<&str>) -> Result<String, String> {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        return Err(said);
    }
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let tokens = answer["svids"].as_array().unwrap();
    assert_eq!(tokens.len(), 1, "{wanted:?}");
    Ok(tokens[0]["spiffeId"].as_str().unwrap().to_owned())
}

fn secret_arguments(program: &str, name: &str) -> Vec<String> {
    let data = json!({"resourceNames": [name]}).to_string();
    let method = "envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets";
    asking(program, &data, method).into_iter().map(str::to_owned).collect()
}

/// Whose certificate is given, which has to be one with its key.
fn secret(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let certificate = &answer["resources"][0]["tlsCertificate"];
    let inline = |what: &str| STANDARD.decode(certificate[what]["inlineBytes"].as_str().unwrap()).unwrap();
    let leaf = Certificate::all_from_pem(&inline("certificateChain")).unwrap().remove(0);
    let key = PrivateKey::from_pem(&inline("privateKey"), None, None).unwrap();
    assert_eq!(key.public().spki(), leaf.spki);
    Ok(leaf.spiffe_id().unwrap().to_string())
}

/// `FetchX509SVID` from within a container.
struct Stream {
    child: Child,
    told: BufReader<ChildStdout>,
}

impl Stream {
    fn open(node: &Node, container: &str) -> Self {
        let mut command = node.inside(container, &asking("grpcurl", "{}", "SpiffeWorkloadAPI/FetchX509SVID"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let told = BufReader::new(child.stdout.take().unwrap());
        Self { child, told }
    }

    /// Whose certificate comes next.
    fn next(&mut self) -> String {
        let mut line = String::new();
        while !line.contains("\"spiffeId\"") {
            line.clear();
            assert!(self.told.read_line(&mut line).unwrap() > 0, "{}", self.end());
        }
        line.split('"').nth(3).unwrap().to_owned()
    }

    fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it has ended: why it did.
    fn end(&mut self) -> String {
        wait_for(PATIENCE, "the end of a stream", || self.child.try_wait().unwrap());
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
