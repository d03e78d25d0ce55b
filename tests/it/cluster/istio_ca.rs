//! Manifests of istio-ca 0.2.10, with Mica's image.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use mica::core::certificate::Certificate;
use serde_json::Value;

use super::control_plane::ControlPlane;
use super::manifests::{good, kubeconfig_of_account};
use super::node::Node;
use crate::parts;
use crate::serve::{Mica, Place, output_within, wait_for};

const OWN: &str = "istio-system";
const ACCOUNT: &str = "istio-ca-service-account";

/// A cluster to which the manifests were applied.
struct Applied {
    plane: ControlPlane,
    place: Place,
    kubeconfig: PathBuf,
}

impl Applied {
    fn new() -> Self {
        let (plane, place) = (ControlPlane::start(), Place::new());
        good(&plane, &["apply", "--validate=strict", "--filename=tests/it/cluster/istio-ca-0.2.10.yaml"]);
        symlink(env!("CARGO_BIN_EXE_mica"), place.root.path().join("istio_ca")).unwrap();
        let kubeconfig = kubeconfig_of_account(&plane, OWN, ACCOUNT, place.root.path());
        Self { plane, place, kubeconfig }
    }

    fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let namespace = format!("--namespace={namespace}");
        let arguments = ["get", kind, name, &namespace, "--output=json", "--ignore-not-found"];
        serde_json::from_str(&good(&self.plane, &arguments)).ok()
    }

    fn secret(&self, namespace: &str, name: &str, key: &str) -> Option<String> {
        use base64::Engine as _;
        let secret = self.get("secret", namespace, name)?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(secret["data"][key].as_str()?).unwrap();
        Some(String::from_utf8(bytes).unwrap())
    }

    /// The program as a pod runs it: by its name of then, with the rights of its account.
    fn command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(self.place.root.path().join("istio_ca"));
        command.args(arguments).stdin(Stdio::null());
        command.env("KUBECONFIG", &self.kubeconfig).env("MICA_DATA_DIR", self.place.data());
        command.env("MICA_HTTP_ADDRESS", "127.0.0.1:0");
        command
    }

    /// What the Deployment says, but for the port, which others on this machine may have.
    fn arguments(&self) -> Vec<String> {
        let deployment = self.get("deployment", OWN, "istio-ca").unwrap();
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["command"], serde_json::json!(["/usr/local/bin/istio_ca"]));
        let mut arguments: Vec<String> = serde_json::from_value(container["args"].clone()).unwrap();
        let port = crate::serve::free_port();
        arguments.push(format!("--grpc-port={port}"));
        arguments
    }

    fn start(&self, arguments: &[String]) -> Mica {
        self.place.start_command(&mut self.command(arguments))
    }

    /// The certificate that a service account's token gets, by the name that the manifest gives the server.
    fn certificate(&self, mica: &Mica, account: &str) -> Certificate {
        let token = self.place.root.path().join("token");
        let arguments = ["create", "token", account, "--namespace=default", "--audience=istio-ca"];
        fs::write(&token, good(&self.plane, &arguments).trim()).unwrap();
        let out = self.place.root.path().join(format!("set-{}", mica.pid()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        command.args(["csr", "request", "--name", "istio-ca", "--address"]);
        command.arg(mica.address("grpc").replace("0.0.0.0", "127.0.0.1"));
        command.arg("--roots").arg(self.place.data().join("root-cert.pem"));
        command.arg("--token-file").arg(token).arg("--out").arg(&out);
        let done = output_within(&mut command, Duration::from_secs(20));
        assert!(done.status.success(), "{done:?} {}", mica.log());
        let chain = fs::read(out.join("cert-chain.pem")).unwrap();
        Certificate::all_from_pem(&chain).unwrap().remove(0)
    }
}

fn minutes(certificate: &Certificate) -> i64 {
    (certificate.validity.not_after - certificate.validity.not_before).whole_minutes()
}

#[test]
fn its_manifests_run_with_only_the_image_changed() {
    let applied = Applied::new();
    let arguments = applied.arguments();
    let mica = applied.start(&arguments);
    assert_eq!(mica.page("/readyz").0, 200);

    // A root as istio-ca made one, where and as it kept it.
    let secret = applied.get("secret", OWN, "istio-ca-secret").unwrap();
    assert_eq!(secret["type"], "istio.io/ca-root");
    let root = applied.secret(OWN, "istio-ca-secret", "ca-cert.pem").unwrap();
    assert!(applied.secret(OWN, "istio-ca-secret", "ca-key.pem").unwrap().contains("PRIVATE KEY"));
    let made = Certificate::all_from_pem(root.as_bytes()).unwrap().remove(0);
    assert!(made.subject_text().contains("O=k8s.cluster.local"), "{}", made.subject_text());
    assert_eq!(minutes(&made), 2 + 8760 * 60);

    // A secret for each account, everywhere, as sidecars mount it; deleted, it comes again.
    let chain = |namespace: &str| applied.secret(namespace, "istio.default", "cert-chain.pem");
    let first = wait_for(Duration::from_secs(10), "a secret", || chain("default"));
    wait_for(Duration::from_secs(10), "another namespace's", || chain("kube-system"));
    let secret = applied.get("secret", "default", "istio.default").unwrap();
    assert_eq!(secret["type"], "istio.io/key-and-cert");
    assert_eq!(secret["metadata"]["annotations"]["istio.io/service-account.name"], "default");
    let delivered = Certificate::all_from_pem(first.as_bytes()).unwrap().remove(0);
    assert_eq!(delivered.uris, ["spiffe://cluster.local/ns/default/sa/default"]);
    assert_eq!(applied.secret("default", "istio.default", "root-cert.pem").unwrap().trim(), root.trim());
    good(&applied.plane, &["delete", "secret", "istio.default", "--namespace=default"]);
    wait_for(Duration::from_secs(15), "the secret again", || {
        chain("default").filter(|chain| *chain != first)
    });

    let leaf = applied.certificate(&mica, "default");
    assert_eq!(leaf.uris, ["spiffe://cluster.local/ns/default/sa/default"]);
    // An hour, shortened a little so that renewals come evenly.
    assert!((45..=62).contains(&minutes(&leaf)), "{}", minutes(&leaf));

    // It says what differs, once, and asks for nothing that it may not have.
    let log = mica.log();
    assert_eq!(log.matches("runs with the flags of istio-ca 0.2.10").count(), 1, "{log}");
    for line in log.lines() {
        assert!(!line.contains("\"WARN\"") && !line.contains("\"ERROR\""), "{line}");
    }
    mica.stop();

    // It is the same one after a start on another node.
    fs::remove_dir_all(applied.place.data()).unwrap();
    let mica = applied.start(&arguments);
    assert_eq!(applied.place.root_pem().trim(), root.trim());
    mica.stop();

    // A root that is there and cannot be used is not replaced.
    let patch = r#"{"data": {"ca-key.pem": "eA=="}}"#;
    let namespace = format!("--namespace={OWN}");
    good(
        &applied.plane,
        &["patch", "secret", "istio-ca-secret", &namespace, "--type=merge", "--patch", patch],
    );
    let ended = output_within(&mut applied.command(&arguments), Duration::from_secs(30));
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.code() == Some(2) && said.contains("istio-ca-secret"), "{said}");
    assert_eq!(applied.secret(OWN, "istio-ca-secret", "ca-cert.pem").unwrap(), root);
}

#[test]
fn a_root_that_istio_ca_left_is_taken_over() {
    let applied = Applied::new();
    let [key, root] = ["ca-key.pem", "ca-cert.pem"].map(|name| applied.place.root.path().join(name));
    rsa_root(&key, &root);
    let [from_key, from_root] = [&key, &root].map(|path| format!("--from-file={}", path.display()));
    let namespace = format!("--namespace={OWN}");
    let arguments = ["create", "secret", "generic", "istio-ca-secret", &namespace, "--type=istio.io/ca-root"];
    good(&applied.plane, &[&arguments[..], &[&from_key, &from_root]].concat());
    let mica = applied.start(&applied.arguments());
    let leaf = applied.certificate(&mica, "default");
    let above = Certificate::all_from_pem(&fs::read(&root).unwrap()).unwrap().remove(0);
    assert_eq!(leaf.issuer_text(), above.subject_text());
    assert_eq!(applied.place.root_pem().trim(), fs::read_to_string(&root).unwrap().trim());
    mica.stop();
}

#[test]
fn an_authority_is_brought_in_files_that_lie_apart_and_followed() {
    let applied = Applied::new();
    let folder = applied.place.root.path();
    let make = |from: &str, into: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        command
            .args(["intermediate", "new", "--root"])
            .arg(folder.join(from))
            .arg("--out")
            .arg(folder.join(into));
        assert!(command.output().unwrap().status.success());
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    assert!(
        command.args(["root", "new", "--out"]).arg(folder.join("root")).output().unwrap().status.success()
    );
    make("root", "one");
    make("root", "two");
    let apart = [
        ("--signing-cert", "a/signing.crt", "ca-cert.pem"),
        ("--signing-key", "b/signing.key", "ca-key.pem"),
        ("--cert-chain", "a/chain.crt", "cert-chain.pem"),
        ("--root-cert", "c/root.crt", "root-cert.pem"),
    ];
    let lay = |from: &str| {
        for (_, to, name) in apart {
            fs::create_dir_all(folder.join(to).parent().unwrap()).unwrap();
            fs::copy(folder.join(from).join(name), folder.join(to)).unwrap();
        }
    };
    lay("one");
    let arguments: Vec<String> =
        apart.iter().map(|(flag, to, _)| format!("{flag}={}", folder.join(to).display())).collect();
    let mica = applied.start(&arguments);
    // No port was asked for.
    let addresses: Value =
        serde_json::from_slice(&fs::read(applied.place.data().join("addresses.json")).unwrap()).unwrap();
    assert!(addresses.get("grpc").is_none() && addresses["http"].is_string(), "{addresses}");
    assert!(!mica.report().contains("gRPC"), "{}", mica.report());
    let root = fs::read_to_string(folder.join("root/root-cert.pem")).unwrap();
    assert_eq!(applied.place.root_pem().trim(), root.trim());
    assert!(applied.get("secret", OWN, "istio-ca-secret").is_none());
    lay("two");
    wait_for(Duration::from_secs(10), "the next intermediate", || {
        mica.log().contains("the authority has a new issuer below the same root").then_some(())
    });
    mica.stop();

    // A file that is not there is named.
    fs::remove_file(folder.join("b/signing.key")).unwrap();
    let ended = output_within(&mut applied.command(&arguments), Duration::from_secs(20));
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.code() == Some(2) && said.contains("b/signing.key"), "{said}");
}

/// A root as istio-ca made them: RSA, its key in PKCS#1.
fn rsa_root(key: &Path, root: &Path) {
    let openssl = |command: &mut Command| {
        let done = command.output().unwrap();
        assert!(done.status.success(), "{done:?}");
    };
    openssl(parts::openssl().args(["genrsa", "-traditional", "-out"]).arg(key).arg("2048"));
    openssl(
        parts::openssl()
            .args(["req", "-x509", "-new", "-days", "365", "-subj", "/O=k8s.cluster.local", "-key"])
            .arg(key)
            .args(["-addext", "keyUsage=critical,keyCertSign", "-out"])
            .arg(root),
    );
    assert!(fs::read_to_string(key).unwrap().contains("BEGIN RSA PRIVATE KEY"));
}

#[test]
fn on_a_real_node_istio_cas_pod_gives_way_to_micas_and_the_root_stays() {
    let node = &Node::start();
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    let mut make = Command::new(checkout.join("packaging/rootfs"));
    assert!(make.arg(env!("CARGO_BIN_EXE_mica")).arg(&root).output().unwrap().status.success());
    node.cluster(["image", "localhost/mica:0.1.0", root.to_str().unwrap(), "/usr/local/bin/mica"]);
    let apply = |path: &str| {
        node.kubectl(&["apply", "--validate=strict", "--filename", checkout.join(path).to_str().unwrap()])
    };
    let read = |kind: &str, namespace: &str, name: &str, field: &str| -> Option<String> {
        let namespace = format!("--namespace={namespace}");
        let arguments = ["get", kind, name, &namespace, "--output=json", "--ignore-not-found"];
        let object: Value = serde_json::from_str(&node.kubectl(&arguments)).ok()?;
        object["data"][field].as_str().map(str::to_owned)
    };
    let soon = Duration::from_secs(90);

    apply("tests/it/cluster/istio-ca-0.2.10.yaml");
    node.rolled_out(OWN, "istio-ca");
    let chain = || read("secret", "default", "istio.default", "cert-chain.pem");
    let first = wait_for(soon, "a secret of istio-ca's pod", chain);
    let roots = read("secret", OWN, "istio-ca-secret", "ca-cert.pem").unwrap();
    let namespace = format!("--namespace={OWN}");
    node.kubectl(&["delete", "deployment", "istio-ca", &namespace, "--wait"]);

    // Both replicas become ready within the restricted standard, without a volume, and with these rights.
    apply("manifests/");
    node.rolled_out(OWN, "mica");
    let text =
        wait_for(soon, "the roots", || read("configmap", "default", "istio-ca-root-cert", "root-cert.pem"));
    use base64::Engine as _;
    let before = base64::engine::general_purpose::STANDARD.decode(&roots).unwrap();
    assert_eq!(text.trim(), String::from_utf8(before).unwrap().trim());
    assert_eq!(read("secret", OWN, "istio-ca-secret", "ca-cert.pem").unwrap(), roots);
    // What the old one gave is good, and stays as it is.
    assert_eq!(chain().unwrap(), first);
    node.kubectl(&["delete", "secret", "istio.default", "--namespace=default"]);
    wait_for(soon, "the secret from Mica's pod", || chain().filter(|chain| *chain != first));
}
