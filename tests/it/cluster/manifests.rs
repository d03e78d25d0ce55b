//! What `manifests/` and the examples beside it say, on a real API server.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use mica::cluster::{NODE_PERMISSIONS, OWN_PERMISSIONS, PERMISSIONS};
use serde_json::{Value, json};

use super::control_plane::{ControlPlane, runtime};
use super::served::Client as Asking;
use crate::parts;
use crate::serve::{Mica, Place, wait_for};

const OWN: &str = "istio-system";
const MICA: &str = "system:serviceaccount:istio-system:mica";
/// Who is in it may do everything, as far as RBAC goes.
const ALLOWED: &str = "test:allowed";

/// A control plane on which `manifests/` was applied.
fn plane() -> &'static ControlPlane {
    static PLANE: OnceLock<ControlPlane> = OnceLock::new();
    PLANE.get_or_init(|| {
        let plane = ControlPlane::start();
        let said = good(&plane, &["apply", "--validate=strict", "--filename=manifests/"]);
        assert!(said.lines().skip(1).all(|line| line.ends_with(" created")), "{said}");
        plane
    })
}

fn checkout() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub(super) fn kubectl(plane: &ControlPlane, arguments: &[&str]) -> Output {
    let home = plane.kubeconfig_of("admin");
    Command::new(parts::kubernetes("kubectl"))
        .args(arguments)
        .current_dir(checkout())
        .env("KUBECONFIG", &home)
        .env("HOME", home.parent().unwrap())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

pub(super) fn good(plane: &ControlPlane, arguments: &[&str]) -> String {
    let output = kubectl(plane, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "kubectl {arguments:?}: {said}");
    // What is deprecated or misspelt is only warned of; so is that tests make the namespace otherwise.
    for line in said.lines().filter(|line| line.contains("Warning")) {
        assert!(line.contains("namespaces/istio-system is missing"), "kubectl {arguments:?}: {line}");
    }
    String::from_utf8(output.stdout).unwrap()
}

/// A kubeconfig with the token of a service account, as its pods have it.
pub(super) fn kubeconfig_of_account(
    plane: &ControlPlane,
    namespace: &str,
    account: &str,
    folder: &Path,
) -> PathBuf {
    let token = good(plane, &["create", "token", account, &format!("--namespace={namespace}")]);
    let text = std::fs::read(plane.kubeconfig_of("admin")).unwrap();
    let mut kubeconfig: Value = serde_json::from_slice(&text).unwrap();
    kubeconfig["users"][0]["user"] = json!({"token": token.trim()});
    let path = folder.join("account.kubeconfig");
    std::fs::write(&path, kubeconfig.to_string()).unwrap();
    path
}

/// An object as the API server has it.
fn object(kind: &str, name: &str) -> Value {
    let namespace = format!("--namespace={OWN}");
    serde_json::from_str(&good(plane(), &["get", kind, name, &namespace, "--output=json"])).unwrap()
}

/// The admin, who speaks as somebody else.
fn client_as(plane: &ControlPlane, user: &str, groups: &[&str]) -> Client {
    let kubeconfig = Kubeconfig::read_from(plane.kubeconfig_of("admin")).unwrap();
    runtime().block_on(async {
        let options = KubeConfigOptions::default();
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
        config.auth_info.impersonate = Some(user.to_owned());
        config.auth_info.impersonate_groups = Some(groups.iter().map(|group| (*group).to_owned()).collect());
        Client::try_from(config).unwrap()
    })
}

/// What the API server answers; of a refusal the code and the words.
pub(super) fn ask(client: &Client, method: &str, path: &str, body: &Value) -> Result<Value, (u16, String)> {
    let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let request = http::Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", kind)
        .body(if body.is_null() { Vec::new() } else { serde_json::to_vec(body).unwrap() })
        .unwrap();
    match runtime().block_on(client.request(request)) {
        Ok(answer) => Ok(answer),
        Err(kube::Error::Api(status)) => Err((status.code, status.message)),
        Err(fault) => panic!("{method} {path}: {fault}"),
    }
}

fn secret(name: &str, kind: &str, account: Option<&str>) -> Value {
    let annotations: Value = account.map(|account| json!({"istio.io/service-account.name": account})).into();
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": kind,
        "metadata": {"name": name, "annotations": annotations},
    })
}

#[test]
fn everything_applies_with_strict_validation_in_the_order_of_its_files_and_again() {
    let plane = plane();
    good(plane, &["apply", "--validate=strict", "--filename=manifests/"]);
    // No pod is replaced by what says the same.
    assert_eq!(object("deployment", "mica")["metadata"]["generation"], 1);
    for what in ["--filename=manifests/", "--kustomize=manifests/"] {
        let said = good(plane, &["apply", "--server-side", "--validate=strict", what]);
        assert!(said.lines().count() > 12, "{said}");
    }
    // The examples are made of it. What is in a namespace cannot be tried before that is there.
    for namespace in ["shop", "mica-agent"] {
        plane.named_namespace(namespace);
    }
    for example in ["replace-istio-ca", "replace-istiod-ca", "one-namespace", "inject", "node-agent"] {
        let folder = format!("examples/{example}");
        let built = good(plane, &["kustomize", &folder]);
        assert!(built.contains("kind: Deployment"), "{built}");
        let kustomize = format!("--kustomize={folder}");
        good(plane, &["apply", "--dry-run=server", "--server-side", "--validate=strict", &kustomize]);
    }
    // A misspelt field does not pass.
    let text = std::fs::read_to_string(checkout().join("manifests/50-deployment.yaml")).unwrap();
    let wrong = tempfile::tempdir().unwrap().path().with_extension("yaml");
    std::fs::write(&wrong, text.replace("readinessProbe:", "readynessProbe:")).unwrap();
    let refused =
        kubectl(plane, &["apply", "--server-side", "--validate=strict", "-f", wrong.to_str().unwrap()]);
    assert!(!refused.status.success());
}

#[test]
fn the_rules_are_those_that_the_program_says_it_needs() {
    let sorted = |rules: &Value| {
        let mut rules: Vec<String> = rules.as_array().unwrap().iter().map(ToString::to_string).collect();
        rules.sort();
        rules
    };
    for (kind, said) in [("clusterrole", PERMISSIONS), ("role", OWN_PERMISSIONS)] {
        let said: Value = serde_saphyr::from_str(said).unwrap();
        assert_eq!(sorted(&object(kind, "mica")["rules"]), sorted(&said), "{kind}");
    }
    let text = std::fs::read_to_string(checkout().join("examples/node-agent/rbac.yaml")).unwrap();
    let roles: Vec<Value> = text
        .split("\n---\n")
        .map(|document| serde_saphyr::from_str::<Value>(document).unwrap())
        .filter(|object| object["kind"].as_str().unwrap().ends_with("Role"))
        .collect();
    let said: Value = serde_saphyr::from_str(NODE_PERMISSIONS).unwrap();
    assert_eq!(roles.len(), 1, "{roles:?}");
    assert_eq!(roles[0]["rules"], said);
}

#[test]
fn the_document_gives_a_reason_for_every_rule() {
    let document = std::fs::read_to_string(checkout().join("docs/kubernetes.md")).unwrap();
    let section = document.split_once("## Permissions").unwrap().1.split("\n## ").next().unwrap();
    let (everywhere, own) = section.split_once("by the Role:").unwrap();
    for (text, rules, namespace) in [(everywhere, PERMISSIONS, None), (own, OWN_PERMISSIONS, Some(OWN))] {
        let rules: Value = serde_saphyr::from_str(rules).unwrap();
        let granted: BTreeSet<_> =
            grants(&rules, namespace).into_iter().map(|grant| (grant.resource, grant.verb)).collect();
        let mut told = BTreeSet::new();
        for row in text.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            assert!(cells.len() == 6 && cells[3..5].iter().all(|cell| !cell.is_empty()), "{row}");
            for verb in cells[2].split('`').skip(1).step_by(2) {
                told.insert((cells[1].trim_matches('`').to_owned(), verb.to_owned()));
            }
        }
        assert_eq!(told, granted);
    }
}

#[test]
fn one_namespace_needs_no_right_to_the_secrets_of_others() {
    let plane = &ControlPlane::start();
    good(plane, &["apply", "--server-side", "--force-conflicts", "--kustomize=examples/one-namespace"]);
    let [admin, mica] = [plane.client(), client_as(plane, MICA, &["system:serviceaccounts"])];
    let secrets = |namespace: &str| format!("/api/v1/namespaces/{namespace}/secrets");
    ask(&mica, "GET", &secrets("shop"), &Value::Null).unwrap();
    for namespace in ["default", "kube-system"] {
        assert_eq!(ask(&mica, "GET", &secrets(namespace), &Value::Null).unwrap_err().0, 403);
    }
    let place = Place::new();
    let running = place.start_command(&mut deployed(plane, &place));
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web"}});
    for namespace in ["default", "shop"] {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        ask(&admin, "POST", &path, &account).unwrap();
    }
    let there = |path: String| ask(&admin, "GET", &path, &Value::Null).ok();
    wait_for(Duration::from_secs(20), "a secret", || there(format!("{}/istio.web", secrets("shop"))));
    wait_for(Duration::from_secs(20), "the roots", || {
        there("/api/v1/namespaces/shop/configmaps/istio-ca-root-cert".to_owned())
    });
    assert!(there(format!("{}/istio.web", secrets("default"))).is_none());
    running.stop();
    let denied: Vec<_> =
        denied(plane).into_iter().filter(|event| event["impersonatedUser"].is_null()).collect();
    assert!(denied.is_empty(), "{denied:#?}");
}

pub(super) fn denied(plane: &ControlPlane) -> Vec<Value> {
    plane.audit(MICA).into_iter().filter(|event| event["responseStatus"]["code"] == 403).collect()
}

#[test]
fn its_pods_pass_the_restricted_standard_and_lesser_ones_do_not() {
    let template = object("deployment", "mica")["spec"]["template"].clone();
    let admin = plane().client();
    let path = format!("/api/v1/namespaces/{OWN}/pods?dryRun=All");
    let create = |change: &dyn Fn(&mut Value)| {
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "mica-0", "labels": template["metadata"]["labels"]},
            "spec": template["spec"],
        });
        change(&mut pod["spec"]);
        ask(&admin, "POST", &path, &pod)
    };
    create(&|_| {}).unwrap();
    for change in [
        (|spec| spec["securityContext"] = json!({})) as fn(&mut Value),
        |spec| spec["containers"][0]["securityContext"]["capabilities"] = json!({}),
        |spec| spec["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = true.into(),
        |spec| spec["hostNetwork"] = true.into(),
    ] {
        let (code, said) = create(&change).unwrap_err();
        assert!(code == 403 && said.contains("PodSecurity"), "{said}");
    }
}

#[test]
fn services_and_probes_lead_to_ports_that_the_pod_has() {
    let template = object("deployment", "mica")["spec"]["template"].clone();
    let container = &template["spec"]["containers"][0];
    let ports = container["ports"].as_array().unwrap();
    let number = |name: &Value| {
        let port =
            ports.iter().find(|port| port["name"] == *name).unwrap_or_else(|| panic!("no port {name}"));
        port["containerPort"].as_u64().unwrap()
    };
    let arguments: Vec<_> =
        container["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    for (name, flag) in [("grpc", "--grpc-address"), ("http", "--http-address")] {
        assert!(arguments.contains(&&*format!("{flag}=0.0.0.0:{}", number(&name.into()))), "{arguments:?}");
    }
    let service = object("service", "mica");
    let leads: Vec<_> = service["spec"]["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|port| (port["port"].as_u64().unwrap(), number(&port["targetPort"])))
        .collect();
    assert_eq!(leads, [(15012, 15012), (8060, 15012), (15014, 15014)]);
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        assert_eq!(number(&container[probe]["httpGet"]["port"]), 15014, "{probe}");
    }
    // All that choose pods choose these.
    for selector in [
        &service["spec"]["selector"],
        &object("networkpolicy", "mica")["spec"]["podSelector"]["matchLabels"],
        &object("poddisruptionbudget", "mica")["spec"]["selector"]["matchLabels"],
        &object("deployment", "mica")["spec"]["selector"]["matchLabels"],
    ] {
        assert_eq!(*selector, template["metadata"]["labels"]);
    }
    // A name that clients have, and that is not in the certificate, would be refused by them.
    let names = arguments.iter().find_map(|word| word.strip_prefix("--dns-names=")).unwrap();
    for name in ["mica.istio-system.svc", "istio-ca.istio-system.svc", "istio-ca", "istiod.istio-system.svc"]
    {
        assert!(names.split(',').any(|named| named == name), "{name}");
    }
}

#[test]
fn whoever_has_micas_token_writes_nothing_but_what_mica_writes() {
    let plane = plane();
    let admin = plane.client();
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": {"name": "allowed"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": ALLOWED}],
    });
    ask(&admin, "POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &role).unwrap();
    let mica = client_as(plane, MICA, &[ALLOWED]);
    let somebody = client_as(plane, "system:serviceaccount:istio-system:other", &[ALLOWED]);
    let space = plane.namespace();
    let (shop, own) = (format!("/api/v1/namespaces/{}", space.name), format!("/api/v1/namespaces/{OWN}"));
    let [theirs, ours] = [&shop, &own].map(|namespace| format!("{namespace}/secrets"));
    let bundles = "/apis/certificates.k8s.io/v1/clustertrustbundles".to_owned();

    let delivered =
        |account: &str| secret(&format!("istio.{account}"), "istio.io/key-and-cert", Some(account));
    let config = |name: &str, data: Value| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data});
    let roots = |name: &str| config(name, json!({"root-cert.pem": "roots"}));
    // An API server begins to judge a moment after it was told the policy.
    for (path, body) in [(&theirs, secret("x", "Opaque", None)), (&format!("{shop}/configmaps"), roots("x"))]
    {
        wait_for(Duration::from_secs(20), "the policies", || {
            ask(&mica, "POST", &format!("{path}?dryRun=All"), &body).err()
        });
    }

    let granted = |method: &str, path: &str, body: Value| {
        ask(&mica, method, path, &body).unwrap_or_else(|(_, said)| panic!("{method} {path}: {said}"));
    };
    let refused = |method: &str, path: &str, body: Value| {
        let Err((code, said)) = ask(&mica, method, path, &body) else { panic!("{method} {path} {body}") };
        assert!(code == 403 && said.contains("ValidatingAdmissionPolicy 'mica-"), "{method} {path}: {said}");
        // It is about Mica alone.
        let tried = if path.contains('?') { path.to_owned() } else { format!("{path}?dryRun=All") };
        if let Err((_, said)) = ask(&somebody, method, &tried, &body) {
            panic!("{method} {path} is refused to others too: {said}");
        }
    };
    let there = |path: &str, body: Value| ask(&admin, "POST", path, &body).unwrap();

    // The secrets of accounts.
    granted("POST", &theirs, delivered("web"));
    granted("POST", &ours, delivered("default"));
    granted("PATCH", &format!("{theirs}/istio.web"), json!({"data": {"key.pem": "eA=="}}));
    granted("DELETE", &format!("{theirs}/istio.web"), Value::Null);
    refused("POST", &theirs, secret("web", "istio.io/key-and-cert", Some("web")));
    refused("POST", &theirs, secret("istio.web", "istio.io/key-and-cert", Some("db")));
    refused("POST", &theirs, secret("istio.web", "istio.io/key-and-cert", None));
    refused("POST", &theirs, secret("istio.web", "Opaque", Some("web")));
    refused("POST", &theirs, secret("istio.web", "istio.io/ca-root", Some("web")));
    refused("POST", &theirs, secret("istio-ca-secret", "istio.io/ca-root", None));
    // Another's of such a name is left alone.
    there(&theirs, secret("istio.taken", "Opaque", Some("taken")));
    refused("PATCH", &format!("{theirs}/istio.taken"), json!({"data": {"key.pem": "eA=="}}));
    refused("DELETE", &format!("{theirs}/istio.taken"), Value::Null);
    there(&theirs, secret("password", "Opaque", None));
    refused("PATCH", &format!("{theirs}/password"), json!({"data": {"a": "eA=="}}));
    refused("DELETE", &format!("{theirs}/password"), Value::Null);
    // One whose annotation somebody has taken off or changed is repaired, and not made another's.
    there(&theirs, secret("istio.bare", "istio.io/key-and-cert", Some("other")));
    let annotated =
        |account: &str| json!({"metadata": {"annotations": {"istio.io/service-account.name": account}}});
    granted("PATCH", &format!("{theirs}/istio.bare"), annotated("bare"));
    refused("PATCH", &format!("{theirs}/istio.bare"), annotated("web"));

    // The authority: made, never changed.
    granted("POST", &format!("{ours}?dryRun=All"), secret("istio-ca-secret", "istio.io/ca-root", None));
    refused("POST", &format!("{ours}?dryRun=All"), secret("istio-ca-secret", "Opaque", None));
    refused("POST", &ours, secret("cacerts", "Opaque", None));
    there(&ours, secret("istio-ca-secret", "istio.io/ca-root", None));
    refused("PATCH", &format!("{ours}/istio-ca-secret"), json!({"data": {"ca-key.pem": "eA=="}}));
    refused("DELETE", &format!("{ours}/istio-ca-secret"), Value::Null);
    ask(&admin, "DELETE", &format!("{ours}/istio-ca-secret"), &Value::Null).unwrap();

    // The keys of JWT-SVIDs: made and changed, and of a type that is nobody else's.
    refused("POST", &theirs, secret("mica-jwt-keys", "mica.dev/jwt-keys", None));
    refused("POST", &format!("{ours}?dryRun=All"), secret("mica-jwt-keys", "Opaque", None));
    granted("POST", &ours, secret("mica-jwt-keys", "mica.dev/jwt-keys", None));
    granted("PATCH", &format!("{ours}/mica-jwt-keys"), json!({"data": {"jwt-keys.json": "eA=="}}));
    refused("DELETE", &format!("{ours}/mica-jwt-keys"), Value::Null);

    // The roots, and the memory of them.
    let maps = [&shop, &own].map(|namespace| format!("{namespace}/configmaps"));
    granted("POST", &maps[0], roots("istio-ca-root-cert"));
    granted("PATCH", &format!("{}/istio-ca-root-cert", maps[0]), json!({"data": {"root-cert.pem": "x"}}));
    granted("POST", &format!("{}?dryRun=All", maps[1]), roots("mica-authority"));
    granted("POST", &format!("{}?dryRun=All", maps[0]), roots("mica-federated-bundles"));
    // In Mica's own namespace nobody else's word counts.
    let (foreign, bundles_of) = (format!("{}?dryRun=All", maps[1]), roots("mica-federated-bundles"));
    granted("POST", &foreign, bundles_of.clone());
    let (code, said) = wait_for(Duration::from_secs(20), "its policy", || {
        ask(&somebody, "POST", &foreign, &bundles_of).err()
    });
    assert!(code == 403 && said.contains("nobody but mica writes"), "{said}");
    refused("POST", &maps[0], roots("mica-authority"));
    refused("POST", &maps[0], roots("kube-root-ca.crt"));
    refused(
        "PATCH",
        &format!("{}/kube-root-ca.crt", there_is(&admin, &maps[0])),
        json!({"data": {"x": "y"}}),
    );
    let key = "-----BEGIN EC PRIVATE KEY-----";
    refused(
        "POST",
        &format!("{}?dryRun=All", maps[1]),
        config("istio-ca-root-cert", json!({"root-cert.pem": key})),
    );

    // Its trust bundle alone.
    let pem = std::fs::read_to_string(plane.kubeconfig_of("admin").with_file_name("ca.crt")).unwrap();
    let bundle = |name: &str, signer: Option<&str>| {
        json!({
            "apiVersion": "certificates.k8s.io/v1", "kind": "ClusterTrustBundle", "metadata": {"name": name},
            "spec": {"signerName": signer, "trustBundle": pem},
        })
    };
    granted("POST", &bundles, bundle("mica.dev:workload:cluster.local", Some("mica.dev/workload")));
    let path = format!("{bundles}/mica.dev:workload:cluster.local");
    granted("PATCH", &path, json!({"metadata": {"labels": {"a": "b"}}}));
    granted("DELETE", &path, Value::Null);
    refused("POST", &bundles, bundle("roots", None));
    refused("POST", &bundles, bundle("example.org:other:x", Some("example.org/other")));
}

/// The path of the config maps of a namespace in which there is one of Kubernetes' own.
fn there_is(admin: &Client, path: &str) -> String {
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-root-ca.crt"}});
    ask(admin, "POST", path, &map).unwrap();
    path.to_owned()
}

#[test]
fn the_image_holds_the_program_and_what_it_needs_and_comes_out_the_same_again() {
    let folder = tempfile::tempdir().unwrap();
    let build = |name: &str, flags: &[&str]| -> PathBuf {
        let archive = folder.path().join(name);
        let made = Command::new(checkout().join("packaging/image"))
            .args(flags)
            .arg(env!("CARGO_BIN_EXE_mica"))
            .arg(&archive)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        archive
    };
    let archive = build("a.tar", &[]);
    let again = build("b.tar", &[]);
    let digest =
        |path: &Path| parts::openssl().args(["dgst", "-sha256", "-r"]).arg(path).output().unwrap().stdout;
    assert_eq!(digest(&archive)[..64], digest(&again)[..64]);

    let config = |archive: &Path, into: &Path| {
        std::fs::create_dir(into).unwrap();
        untar(archive, into);
        let read = |file: &Path| -> Value { serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap() };
        let blob = |of: &Value| {
            let digest = of["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap().to_owned();
            let path = into.join("blobs/sha256").join(&digest);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), of["size"].as_u64().unwrap());
            let said = parts::openssl().args(["dgst", "-sha256", "-r"]).arg(&path).output().unwrap().stdout;
            assert!(said.starts_with(digest.as_bytes()), "{digest}");
            path
        };
        let manifest = read(&blob(&read(&into.join("index.json"))["manifests"][0]));
        (read(&blob(&manifest["config"])), blob(&manifest["layers"][0]))
    };
    let (mica, layer) = config(&archive, &folder.path().join("mica"));
    assert_eq!(mica["config"]["User"], "65532:65532");
    assert_eq!(mica["config"]["Entrypoint"], json!(["/usr/local/bin/mica"]));
    let (istio_ca, _) = config(&build("c.tar", &["--istio-ca"]), &folder.path().join("istio-ca"));
    assert_eq!(istio_ca["config"]["Entrypoint"], json!(["/usr/local/bin/istio_ca", "--self-signed-ca"]));

    // As that user in that root, under both names.
    let root = folder.path().join("root");
    std::fs::create_dir(&root).unwrap();
    untar(&layer, &root);
    for called in ["mica --version", "istio_ca version", "istio_ca --help"] {
        let (name, argument) = called.split_once(' ').unwrap();
        let mut command = Command::new("chroot");
        command.arg("--userspec=65532:65532").arg(&root).arg(format!("/usr/local/bin/{name}")).arg(argument);
        let said = command.output().unwrap();
        assert!(said.status.success(), "{called}: {said:?}");
        let is_istio_ca = String::from_utf8_lossy(&said.stdout).contains("--self-signed-ca-org");
        assert_eq!(is_istio_ca, called == "istio_ca --help");
    }
    // No shell, nothing to run but Mica.
    let programs: Vec<_> = std::fs::read_dir(root.join("usr/local/bin")).unwrap().collect();
    assert!(programs.len() == 2 && !root.join("bin").exists() && !root.join("usr/bin").exists());
}

fn untar(archive: &Path, into: &Path) {
    let done = Command::new("tar").arg("-C").arg(into).arg("-xf").arg(archive).output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

/// One thing that a rule grants.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Grant {
    /// None for all of them.
    namespace: Option<&'static str>,
    group: String,
    resource: String,
    /// None for all of them.
    name: Option<String>,
    verb: String,
}

fn grants(rules: &Value, namespace: Option<&'static str>) -> Vec<Grant> {
    let texts = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().map(|text| text.as_str().unwrap().to_owned()).collect()
    };
    let mut found = Vec::new();
    for rule in rules.as_array().unwrap() {
        let mut names: Vec<_> = texts(&rule["resourceNames"]).into_iter().map(Some).collect();
        if names.is_empty() {
            names.push(None);
        }
        for verb in texts(&rule["verbs"]) {
            let grant = |group: &str, resource: &str, name: &Option<String>| Grant {
                namespace,
                group: group.to_owned(),
                resource: resource.to_owned(),
                name: name.clone(),
                verb: verb.clone(),
            };
            found.extend(texts(&rule["nonResourceURLs"]).iter().map(|path| grant("", path, &None)));
            for group in texts(&rule["apiGroups"]) {
                for resource in texts(&rule["resources"]) {
                    found.extend(names.iter().map(|name| grant(&group, &resource, name)));
                }
            }
        }
    }
    found
}

impl Grant {
    /// Whether whoever asks has it, by whatever role.
    fn is_held_by(&self, client: &Client) -> bool {
        let Self { namespace, group, resource, name, verb } = self;
        let spec = if resource.starts_with('/') {
            json!({"nonResourceAttributes": {"path": resource, "verb": verb}})
        } else {
            json!({"resourceAttributes": {
                "namespace": namespace, "group": group, "resource": resource, "name": name, "verb": verb,
            }})
        };
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec,
        });
        let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
        ask(client, "POST", path, &review).unwrap()["status"]["allowed"] == true
    }

    /// Whether a request that the API server has answered needed it.
    fn is_used_by(&self, event: &Value) -> bool {
        let of = &event["objectRef"];
        let is = |value: &Value, wanted: &str| value.as_str().unwrap_or_default() == wanted;
        if self.resource.starts_with('/') {
            return is(&event["requestURI"], &self.resource) && is(&event["verb"], &self.verb);
        }
        // What is applied and was not there is made.
        let makes = is(&event["verb"], "patch") && event["responseStatus"]["code"] == 201;
        (is(&event["verb"], &self.verb) || self.verb == "create" && makes)
            && is(&of["resource"], &self.resource)
            && is(&of["apiGroup"], &self.group)
            && self.namespace.is_none_or(|namespace| is(&of["namespace"], namespace))
            && self.name.as_ref().is_none_or(|name| is(&of["name"], name))
    }
}

/// Mica as the Deployment starts it, with the rights of its account, on free ports.
pub(super) fn deployed(plane: &ControlPlane, place: &Place) -> Command {
    let namespace = format!("--namespace={OWN}");
    let text = good(plane, &["get", "deployment", "mica", &namespace, "--output=json"]);
    let deployment: Value = serde_json::from_str(&text).unwrap();
    let arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"].clone();
    let arguments: Vec<String> = serde_json::from_value(arguments).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    for argument in arguments {
        match argument.split_once('=') {
            Some((flag @ ("--grpc-address" | "--http-address"), _)) => {
                command.arg(format!("{flag}=127.0.0.1:0"))
            }
            // Where it is asked is a test's to say.
            Some(("--inject-address", _)) => &mut command,
            Some(("--data-dir", _)) => command.arg("--data-dir").arg(place.data()),
            _ => command.arg(argument),
        };
    }
    let policy = place.root.path().join("policy.yaml");
    std::fs::write(&policy, "impersonators: [shop/proxy]\n").unwrap();
    command.arg("--policy").arg(policy).arg("--token-review");
    let kubeconfig = kubeconfig_of_account(plane, OWN, "mica", place.root.path());
    command.env("KUBECONFIG", kubeconfig).stdin(Stdio::null());
    command
}

#[test]
fn with_these_rules_mica_does_its_whole_job_uses_every_one_and_says_which_it_lacks() {
    let plane = &ControlPlane::start();
    good(plane, &["apply", "--server-side", "--force-conflicts", "--filename=manifests/"]);
    let admin = plane.client();
    let place = Place::new();
    let mica = place.start_command(&mut deployed(plane, &place));
    let shop = plane.named_namespace("shop");
    shop.account("web");
    let secrets = "/api/v1/namespaces/shop/secrets";
    let chain = |account: &str| {
        let secret = ask(&admin, "GET", &format!("{secrets}/istio.{account}"), &Value::Null).ok()?;
        secret["data"]["cert-chain.pem"].as_str().map(str::to_owned)
    };
    let soon = Duration::from_secs(20);

    // Secrets come, come again, are mended, go, and are left alone where they are another's.
    let first = wait_for(soon, "a secret", || chain("web"));
    let garbage = json!({"data": {"cert-chain.pem": "eA=="}});
    ask(&admin, "PATCH", &format!("{secrets}/istio.web"), &garbage).unwrap();
    let second =
        wait_for(soon, "a good one", || chain("web").filter(|chain| *chain != first && chain != "eA=="));
    ask(&admin, "DELETE", &format!("{secrets}/istio.web"), &Value::Null).unwrap();
    wait_for(soon, "the secret again", || chain("web").filter(|chain| *chain != second));
    shop.account("gone");
    wait_for(soon, "a secret", || chain("gone"));
    let gone = shop.token("gone", "istio-ca", None);
    shop.delete_account("gone");
    wait_for(soon, "its end", || chain("gone").is_none().then_some(()));
    ask(&admin, "POST", secrets, &secret("istio.taken", "Opaque", None)).unwrap();
    shop.account("taken");

    // Tokens of the living and the dead, and a proxy's for others.
    let client = Asking::new(&mica, &place);
    shop.account("proxy");
    let node = shop.node("a");
    let [pod, proxy] = ["web", "proxy"].map(|account| shop.pod(&format!("{account}-1"), account, &node));
    let token = shop.token("web", "istio-ca", Some(&pod));
    let web = "spiffe://cluster.local/ns/shop/sa/web";
    assert_eq!(client.identity(&token).unwrap(), web);
    let for_others = shop.token("proxy", "istio-ca", Some(&proxy));
    assert_eq!(client.impersonated(&for_others, web).unwrap(), web);
    client.impersonated(&for_others, "spiffe://cluster.local/ns/shop/sa/nobody").unwrap_err();
    client.identity(&gone).unwrap_err();
    shop.delete_pod("web-1");
    wait_for(soon, "a refusal", || client.identity(&token).err());

    // The keys of JWT-SVIDs are there, and are made anew where they are damaged.
    let keys = format!("/api/v1/namespaces/{OWN}/secrets/mica-jwt-keys");
    wait_for(soon, "keys", || ask(&admin, "GET", &keys, &Value::Null).ok());
    ask(&admin, "PATCH", &keys, &json!({"data": {"jwt-keys.json": "eA=="}})).unwrap();

    let namespace = format!("--namespace={OWN}");
    let rules = |kind: &str| -> Value {
        let text = good(plane, &["get", kind, "mica", &namespace, "--output=json"]);
        serde_json::from_str::<Value>(&text).unwrap()["rules"].clone()
    };
    let (everywhere, own) = (rules("clusterrole"), rules("role"));
    let mut granted = grants(&everywhere, None);
    granted.extend(grants(&own, Some(OWN)));
    // Not asked by a request of its own, but by the API server when a bundle is written.
    granted.retain(|grant| grant.resource != "signers");
    let unused = || -> Vec<Grant> {
        let events = plane.audit(MICA);
        granted.iter().filter(|grant| !events.iter().any(|event| grant.is_used_by(event))).cloned().collect()
    };
    let begun = std::time::Instant::now();
    while !unused().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(30), "granted and not used: {:#?}", unused());
        std::thread::sleep(Duration::from_millis(200));
    }
    mica.stop();
    let denied = denied(plane);
    assert!(denied.is_empty(), "{denied:#?}");

    // Without one of them, Mica says which. What other roles grant too is not missed.
    let itself = client_as(plane, MICA, &["system:serviceaccounts", "system:authenticated"]);
    let mut elsewhere = Vec::new();
    for (kind, scope, rules) in [("clusterroles", None, &everywhere), ("roles", Some(OWN), &own)] {
        let folder = scope.map(|name| format!("/namespaces/{name}")).unwrap_or_default();
        let role = format!("/apis/rbac.authorization.k8s.io/v1{folder}/{kind}/mica");
        for at in 0..rules.as_array().unwrap().len() {
            // What is there already would not have to be made.
            for path in MADE {
                let _ = ask(&admin, "DELETE", path, &Value::Null);
            }
            let mut left = rules.clone();
            let lost = grants(&json!([left.as_array_mut().unwrap().remove(at)]), scope);
            ask(&admin, "PATCH", &role, &json!({"rules": left})).unwrap();
            let begun = std::time::Instant::now();
            let missing = loop {
                let missing: Vec<_> = lost.iter().filter(|grant| !grant.is_held_by(&itself)).collect();
                if !missing.is_empty() || begun.elapsed() > Duration::from_secs(3) {
                    break missing;
                }
                std::thread::sleep(Duration::from_millis(50));
            };
            if missing.is_empty() {
                elsewhere.extend(lost.iter().map(|grant| grant.resource.clone()));
            } else {
                let asks = |mica: &Mica| {
                    let client = Asking::new(mica, &place);
                    let token = shop.token("web", "istio-ca", None);
                    let _ = client.identity(&token);
                    let _ = client.impersonated(&for_others, "spiffe://cluster.local/ns/shop/sa/nobody");
                };
                says_what_it_lacks(plane, &missing, asks);
            }
            ask(&admin, "PATCH", &role, &json!({"rules": rules})).unwrap();
        }
    }
    // Clusters let every service account see these two, and a Mica for one namespace has no other right to its own secrets.
    elsewhere.dedup();
    assert_eq!(elsewhere, ["/openid/v1/jwks", "/.well-known/openid-configuration", "secrets"]);
}

/// What Mica makes once.
const MADE: [&str; 4] = [
    "/apis/certificates.k8s.io/v1/clustertrustbundles/mica.dev:workload:cluster.local",
    "/api/v1/namespaces/shop/configmaps/istio-ca-root-cert",
    "/api/v1/namespaces/istio-system/configmaps/mica-authority",
    "/apis/coordination.k8s.io/v1/namespaces/istio-system/leases/mica",
];

/// Starts a Mica, which has to say in its log which permission it lacks, if need be when it is asked.
fn says_what_it_lacks(plane: &ControlPlane, missing: &[&Grant], asks: impl Fn(&Mica)) {
    let place = Place::new();
    let log = place.root.path().join("log");
    let mut command = deployed(plane, &place);
    let is_for_requests = missing.iter().all(|grant| ["tokenreviews", "nodes"].contains(&&*grant.resource));
    let said = || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let is_said = |line: &str| {
            // Of a signer the API server speaks in other words.
            let names = |grant: &&Grant| line.contains(grant.resource.replace("signers", "attest").as_str());
            (line.contains("cannot") || line.contains("forbidden")) && missing.iter().any(names)
        };
        text.lines().any(is_said)
    };
    let end = |said: bool| assert!(said, "{missing:?} {}", std::fs::read_to_string(&log).unwrap_or_default());
    if is_for_requests {
        let mica = place.start_command(&mut command);
        asks(&mica);
        end(said());
        return mica.stop();
    }
    let mut child =
        command.stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    let begun = std::time::Instant::now();
    while !said() && begun.elapsed() < Duration::from_secs(30) && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = child.kill();
    let _ = child.wait();
    end(said());
}
