//! A Kubernetes control plane: etcd, an API server and a controller manager on free ports of the loopback address, with
//! keys of its own. No nodes and no kubelets: tests make the objects of nodes and pods, and say what became of them.
//!
//! All of it ends with the thread that started it, which ends with the process, however that ends.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, ServiceAccount};
use kube::api::{Api, DeleteParams, GetParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, Resource, ResourceExt as _};
use mica::core::caller::Object;
use mica::core::pem;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::parts;

/// Where the authority is kept, and everything else that is Mica's own.
pub(crate) const HOME: &str = "istio-system";
/// Whose tokens the API server makes.
pub(crate) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
/// What the API server writes down.
const AUDITED: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Metadata, users: [mica, 'system:serviceaccount:istio-system:mica']}
- {level: None}
";
/// A start takes three to five seconds on a quiet machine.
const START: Duration = Duration::from_secs(90);

/// What every test of a cluster runs its requests on.
pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    })
}

/// A running control plane, ended when dropped.
pub(crate) struct ControlPlane {
    folder: PathBuf,
    etcd_port: u16,
    api_port: u16,
    ca: CertifiedIssuer<'static, KeyPair>,
    running: Mutex<Vec<(&'static str, Child)>>,
    client: OnceLock<Client>,
    // When this is closed, the folder goes.
    _folder_guard: ChildStdin,
}

impl ControlPlane {
    /// The one that tests share, which may not stop it.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<ControlPlane> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    /// One of one's own.
    pub(crate) fn start() -> Self {
        let begun = Instant::now();
        let folder = tempfile::tempdir().unwrap().keep();
        let plane = Self {
            etcd_port: free_port(),
            api_port: free_port(),
            ca: authority(),
            running: Mutex::default(),
            client: OnceLock::new(),
            _folder_guard: guard(&folder),
            folder,
        };
        plane.write_keys();
        plane.start_etcd();
        plane.start_api_server();
        // It waits for the API server by itself.
        plane.start_controller_manager();
        plane.wait_until_ready();
        plane.create::<Namespace>(None, &json!({"metadata": {"name": HOME}}));
        eprintln!("a control plane is ready after {:?}", begun.elapsed());
        plane
    }

    /// May do everything.
    pub(crate) fn client(&self) -> Client {
        self.client.get_or_init(|| client_of(&self.kubeconfig("admin"))).clone()
    }

    /// Where the API server listens.
    pub(crate) fn api_address(&self) -> std::net::SocketAddr {
        (Ipv4Addr::LOCALHOST, self.api_port).into()
    }

    /// The path of a kubeconfig for a user, who is made and may do nothing unless told so.
    pub(crate) fn kubeconfig_of(&self, user: &str) -> PathBuf {
        if !self.kubeconfig(user).exists() {
            self.write_kubeconfig(user, None);
        }
        self.kubeconfig(user)
    }

    /// Whether a user has been made.
    pub(crate) fn knows(&self, user: &str) -> bool {
        self.kubeconfig(user).exists()
    }

    /// Lets a user do what the rules of a cluster role say.
    pub(crate) fn allow(&self, user: &str, rules: &Value) {
        let role = json!({"metadata": {"name": user}, "rules": rules});
        self.create::<k8s_openapi::api::rbac::v1::ClusterRole>(None, &role);
        let binding = json!({
            "metadata": {"name": user},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": user},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        });
        self.create::<k8s_openapi::api::rbac::v1::ClusterRoleBinding>(None, &binding);
    }

    /// Lets a user do what the rules of a role say, in one namespace.
    pub(crate) fn allow_in(&self, namespace: &str, user: &str, rules: &Value) {
        let role = json!({"metadata": {"name": user}, "rules": rules});
        self.create::<k8s_openapi::api::rbac::v1::Role>(Some(namespace), &role);
        let binding = json!({
            "metadata": {"name": user},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": user},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
        });
        self.create::<k8s_openapi::api::rbac::v1::RoleBinding>(Some(namespace), &binding);
    }

    /// A namespace of a name that no other test has.
    pub(crate) fn namespace(&self) -> TestNamespace<'_> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        self.named_namespace(&format!("test-{}", MADE.fetch_add(1, Ordering::Relaxed)))
    }

    pub(crate) fn named_namespace(&self, name: &str) -> TestNamespace<'_> {
        let name = name.to_owned();
        self.make_namespace(&name);
        TestNamespace { plane: self, name }
    }

    pub(crate) fn make_namespace(&self, name: &str) {
        self.create::<Namespace>(None, &json!({"metadata": {"name": name}}));
    }

    /// Makes the object of a node.
    pub(crate) fn node(&self, name: &str) -> Object {
        named(&self.create::<Node>(None, &json!({"metadata": {"name": name}})))
    }

    pub(crate) fn delete_node(&self, name: &str) {
        runtime().block_on(async {
            Api::<Node>::all(self.client()).delete(name, &DeleteParams::default()).await.unwrap();
        });
    }

    pub(crate) fn stop_api_server(&self) {
        self.stop("kube-apiserver");
    }

    pub(crate) fn start_api_server(&self) {
        let path = |name: &str| self.folder.join(name).into_os_string();
        let mut command = self.program("kube-apiserver");
        command
            .arg(format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port))
            .args(["--bind-address=127.0.0.1", "--advertise-address=127.0.0.1"])
            .args(["--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.202.0.0/24"])
            .arg(format!("--secure-port={}", self.api_port))
            .args(["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"])
            .arg(format!("--service-account-issuer={ISSUER}"))
            .arg("--profiling=false");
        fs::write(self.folder.join("audit-policy.yaml"), AUDITED).unwrap();
        for (flag, file) in [
            ("audit-policy-file", "audit-policy.yaml"),
            ("audit-log-path", "audit.log"),
            ("tls-cert-file", "kube-apiserver.crt"),
            ("tls-private-key-file", "kube-apiserver.key"),
            ("client-ca-file", "ca.crt"),
            ("service-account-key-file", "sa.key"),
            ("service-account-signing-key-file", "sa.key"),
        ] {
            command.arg(format!("--{flag}={}", path(file).display()));
        }
        self.run("kube-apiserver", command);
    }

    /// Keeps what the cluster is now.
    pub(crate) fn back_up(&self) {
        self.stop("kube-apiserver");
        self.stop("etcd");
        let (from, to) = (self.folder.join("etcd"), self.folder.join("etcd-backup"));
        let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
        assert!(copied.success());
        self.start_etcd();
        self.start_api_server();
        self.wait_until_ready();
    }

    /// Makes the cluster what it was when it was backed up.
    pub(crate) fn restore(&self) {
        self.stop("kube-apiserver");
        self.stop("etcd");
        fs::remove_dir_all(self.folder.join("etcd")).unwrap();
        fs::rename(self.folder.join("etcd-backup"), self.folder.join("etcd")).unwrap();
        self.start_etcd();
        self.start_api_server();
        self.wait_until_ready();
    }

    pub(crate) fn wait_until_ready(&self) {
        let client = self.client();
        let begun = Instant::now();
        loop {
            let request = kube::core::Request::new("").get("readyz", &GetParams::default()).unwrap();
            let said = runtime().block_on(async {
                tokio::time::timeout(Duration::from_secs(2), client.request_text(request)).await
            });
            if matches!(&said, Ok(Ok(text)) if text == "ok") {
                return;
            }
            let mut impatient = false;
            self.running.lock().unwrap().retain_mut(|(name, child)| match child.try_wait().unwrap() {
                None => true,
                // It gives a busy API server ten seconds.
                Some(_) if *name == "kube-controller-manager" => {
                    impatient = true;
                    false
                }
                Some(status) => panic!("{name} ended with {status}: {}", self.log(name)),
            });
            if impatient {
                self.start_controller_manager();
            }
            assert!(begun.elapsed() < START, "not ready: {said:?}\n{}", self.log("kube-apiserver"));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The last lines that a part has logged.
    pub(crate) fn log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.folder.join(format!("{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// What a user has asked for, which is that of `manifests/` or the one named mica.
    pub(crate) fn audit(&self, user: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.folder.join("audit.log")).unwrap_or_default();
        // The last line may not be whole yet.
        let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.filter(|event| event["user"]["username"] == user).collect()
    }

    fn start_etcd(&self) {
        let client = format!("http://127.0.0.1:{}", self.etcd_port);
        let peer = format!("http://127.0.0.1:{}", free_port());
        let mut command = self.program("etcd");
        // What is written need not outlive the machine.
        command.args(["--name", "default", "--unsafe-no-fsync", "--logger", "zap", "--log-level", "warn"]);
        command.arg("--data-dir").arg(self.folder.join("etcd"));
        for flag in ["--listen-client-urls", "--advertise-client-urls"] {
            command.args([flag, &client]);
        }
        for flag in ["--listen-peer-urls", "--initial-advertise-peer-urls"] {
            command.args([flag, &peer]);
        }
        command.args(["--initial-cluster", &format!("default={peer}")]);
        self.run("etcd", command);
    }

    fn start_controller_manager(&self) {
        let mut command = self.program("kube-controller-manager");
        let kubeconfig = self.kubeconfig("kube-controller-manager");
        command
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .args(["--leader-elect=false", "--secure-port=0"])
            .arg("--controllers=namespace-controller,serviceaccount-controller");
        self.run("kube-controller-manager", command);
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(parts::kubernetes(name));
        command.current_dir(&self.folder).env("HOME", &self.folder).stdin(Stdio::null());
        command
    }

    fn run(&self, name: &'static str, mut command: Command) {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join(format!("{name}.log")))
            .unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let child = spawn_from_a_thread_that_stays(command);
        self.running.lock().unwrap().push((name, child));
    }

    fn stop(&self, name: &str) {
        let mut running = self.running.lock().unwrap();
        let at = running.iter().position(|(running, _)| *running == name).unwrap();
        let (_, mut child) = running.remove(at);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn write_keys(&self) {
        fs::write(self.folder.join("ca.crt"), pem::encode(pem::CERTIFICATE, self.ca.der())).unwrap();
        // RSA, as everywhere: its tokens are signed with RS256.
        let made = parts::openssl()
            .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"])
            .arg(self.folder.join("sa.key"))
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let (certificate, key) = self.issue("kube-apiserver", None, &["127.0.0.1", "localhost"]);
        fs::write(self.folder.join("kube-apiserver.crt"), certificate).unwrap();
        fs::write(self.folder.join("kube-apiserver.key"), key).unwrap();
        self.write_kubeconfig("admin", Some("system:masters"));
        self.write_kubeconfig("kube-controller-manager", Some("system:masters"));
    }

    fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.join(format!("{user}.kubeconfig"))
    }

    fn write_kubeconfig(&self, user: &str, group: Option<&str>) {
        use base64::Engine as _;
        let base64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let (certificate, key) = self.issue(user, group, &[]);
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{}", self.api_port),
                "certificate-authority-data": base64(&pem::encode(pem::CERTIFICATE, self.ca.der())),
            }}],
            "users": [{"name": "test", "user": {
                "client-certificate-data": base64(&certificate),
                "client-key-data": base64(&key),
            }}],
        });
        fs::write(self.kubeconfig(user), text.to_string()).unwrap();
    }

    fn issue(&self, name: &str, group: Option<&str>, names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        (
            pem::encode(pem::CERTIFICATE, certificate.der()),
            pem::encode(pem::PRIVATE_KEY, &key.serialize_der()),
        )
    }

    pub(crate) fn create<K>(&self, namespace: Option<&str>, object: &Value) -> K
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + std::fmt::Debug,
    {
        let client = self.client();
        let object: kube::api::DynamicObject = serde_json::from_value(object.clone()).unwrap();
        let resource = kube::api::ApiResource::erase::<K>(&());
        let api: Api<kube::api::DynamicObject> = match namespace {
            Some(namespace) => Api::namespaced_with(client, namespace, &resource),
            None => Api::all_with(client, &resource),
        };
        let made =
            runtime().block_on(api.create(&PostParams::default(), &object)).unwrap_or_else(|e| panic!("{e}"));
        serde_json::from_value(serde_json::to_value(made).unwrap()).unwrap()
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for (_, mut child) in self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner).drain(..)
        {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A namespace, and what a test makes in it.
pub(crate) struct TestNamespace<'a> {
    plane: &'a ControlPlane,
    pub(crate) name: String,
}

impl TestNamespace<'_> {
    pub(crate) fn account(&self, name: &str) -> Object {
        named(&self.plane.create::<ServiceAccount>(Some(&self.name), &json!({"metadata": {"name": name}})))
    }

    pub(crate) fn delete_account(&self, name: &str) {
        self.delete::<ServiceAccount>(name);
    }

    /// A node of this test's own.
    pub(crate) fn node(&self, name: &str) -> Object {
        self.plane.node(&format!("{}-{name}", self.name))
    }

    /// A pod that runs on a node.
    pub(crate) fn pod(&self, name: &str, account: &str, node: &Object) -> Object {
        let pod = named(&self.plane.create::<Pod>(
            Some(&self.name),
            &json!({
                "metadata": {"name": name},
                "spec": {
                    "serviceAccountName": account,
                    "nodeName": node.name,
                    "automountServiceAccountToken": false,
                    "containers": [{"name": "main", "image": "none"}],
                },
            }),
        ));
        self.phase(name, "Running");
        pod
    }

    /// Says what became of a pod, as its kubelet would.
    pub(crate) fn phase(&self, pod: &str, phase: &str) {
        let patch = Patch::Merge(json!({"status": {"phase": phase}}));
        let pods: Api<Pod> = Api::namespaced(self.plane.client(), &self.name);
        runtime().block_on(pods.patch_status(pod, &PatchParams::default(), &patch)).unwrap();
    }

    /// At once, as when its kubelet says that it has ended.
    pub(crate) fn delete_pod(&self, name: &str) {
        self.delete::<Pod>(name);
    }

    /// A token of an account for an audience, bound to a pod if one is given, as a kubelet asks for it.
    pub(crate) fn token(&self, account: &str, audience: &str, pod: Option<&Object>) -> String {
        let mut spec = json!({"audiences": [audience], "expirationSeconds": 3600});
        if let Some(pod) = pod {
            spec["boundObjectRef"] =
                json!({"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid});
        }
        let request: TokenRequest =
            serde_json::from_value(json!({"metadata": {}, "spec": spec, "status": null}))
                .unwrap_or_else(|e| panic!("{e}"));
        let accounts: Api<ServiceAccount> = Api::namespaced(self.plane.client(), &self.name);
        runtime()
            .block_on(accounts.create_token_request(account, &PostParams::default(), &request))
            .unwrap()
            .status
            .unwrap()
            .token
            .unwrap()
    }

    fn delete<K>(&self, name: &str)
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let api: Api<K> = Api::namespaced(self.plane.client(), &self.name);
        runtime().block_on(api.delete(name, &DeleteParams::default().grace_period(0))).unwrap();
    }
}

fn named(object: &impl Resource<DynamicType = ()>) -> Object {
    Object { name: object.name_any(), uid: object.uid().unwrap() }
}

pub(super) fn client_of(kubeconfig: &Path) -> Client {
    runtime().block_on(async {
        let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        Client::try_from(config).unwrap()
    })
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "test");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Below those that the kernel gives to whoever asks for any, so that nobody else has it a moment later; processes that
/// start together begin far from each other.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let begin = u16::try_from(std::process::id() % 120 * 100).unwrap();
    loop {
        let port = 20_000 + (begin + NEXT.fetch_add(1, Ordering::Relaxed)) % 12_000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// The kernel ends them with the thread they come from, and a test's thread ends with the test.
pub(super) fn spawn_from_a_thread_that_stays(command: Command) -> Child {
    type Order = (Command, mpsc::Sender<std::io::Result<Child>>);
    static ORDERS: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();
    let orders = ORDERS.get_or_init(|| {
        let (orders, taken) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in taken {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (answer, answered) = mpsc::channel();
    orders.lock().unwrap().send((command, answer)).unwrap();
    answered.recv().unwrap().unwrap_or_else(|e| panic!("setpriv of util-linux: {e}"))
}

/// Removes the folder when what it gives is closed, which the end of this process does too.
fn guard(folder: &Path) -> ChildStdin {
    let mut command = Command::new("setsid");
    command.args(["sh", "-c", "read line; sleep 0.5; rm -rf \"$0\""]).arg(folder).current_dir("/");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap().stdin.take().unwrap()
}
