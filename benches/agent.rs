//! What the agent costs on its socket. CPU time of the thread that serves, which is one core. `cargo bench --bench agent`,
//! or `cargo bench --bench agent -- SECTION...`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]
#![allow(dead_code, unused_imports, reason = "the tests' control plane has more than a bench needs")]

#[path = "../tests/it/cluster/control_plane.rs"]
mod control_plane;
mod floor;
#[path = "../tests/it/parts.rs"]
mod parts;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use control_plane::ControlPlane;
use mica::agent::{Agent, Asker, Authority, Bundles, Credentials, Svid, Wishes};
use mica::attest::OwnUser;
use mica::client;
use mica::cluster::{OWN_PERMISSIONS, PERMISSIONS};
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::csr::nameless;
use mica::core::granted::Granted;
use mica::core::issuer::{self, Issuer, Order};
use mica::core::key::KeyKind;
use mica::core::pem;
use mica::core::profile::Profile;
use mica::core::spiffe::{ServiceAccount, SpiffeId, TrustDomain};
use mica::core::token::trial;
use mica::endpoint::{self, Endpoint, sds};
use mica::proto::grpc::health::v1::health_client::HealthClient;
use mica::proto::grpc::health::v1::health_server::{Health, HealthServer};
use mica::proto::grpc::health::v1::{HealthCheckRequest, HealthCheckResponse};
use mica::proto::spiffe::X509svidRequest;
use mica::proto::spiffe::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use mica::proto::xds::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use mica::proto::xds::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use mica::sys::{clock, keys};
use prometheus_client::registry::Registry;
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Barrier, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::UdsConnectInfo;
use tonic::transport::{Channel, Endpoint as Remote};
use tonic::{Response, Status};

const PROXIES: usize = 1_000;
const ROTATIONS: usize = 9;
const STREAMS: usize = 1_000;
const MANY: usize = 500;
const ROUNDS: usize = 9;
const ID: &str = "spiffe://example.org/ns/shop/sa/web";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    type Section = (&'static str, fn());
    let sections: [Section; 4] = [("rotation", rotation), ("first", first), ("many", many), ("node", node)];
    for (name, section) in sections {
        if arguments.is_empty() || arguments.iter().any(|a| a == name) {
            section();
        }
    }
}

/// From a new certificate in the agent's hands to the last proxy's word that it took it.
fn rotation() {
    let served = Served::new();
    for delta in [false, true] {
        let clients = Builder::new_current_thread().enable_all().build().unwrap();
        let told = Arc::new(Barrier::new(PROXIES + 1));
        let pause = |ms| clients.block_on(async { tokio::time::sleep(Duration::from_millis(ms)).await });
        for _ in 0..PROXIES {
            let (socket, told) = (served.socket.clone(), told.clone());
            clients.spawn(async move {
                if delta { follow_delta(&socket, &told).await } else { follow(&socket, &told).await }
            });
        }
        clients.block_on(told.wait());
        let mut spent: Vec<Duration> = Vec::new();
        for _ in 0..ROTATIONS {
            // The answers of the round before are read as well.
            let acknowledged = || served.metric("mica_sds_acknowledged_total{resource=\"certificate\"}");
            let mut before = acknowledged();
            loop {
                pause(300);
                let now = acknowledged();
                if std::mem::replace(&mut before, now) == now {
                    break;
                }
            }
            let begun = worked(&served.serving);
            served.hold();
            clients.block_on(told.wait());
            while acknowledged() < before + PROXIES as u64 {
                pause(10);
            }
            spent.push(worked(&served.serving) - begun);
        }
        spent.sort();
        let (protocol, median) = (if delta { "delta" } else { "state of the world" }, spent[ROTATIONS / 2]);
        println!(
            "a rotation to {PROXIES} streams, {protocol}, acknowledgements included: {:.0} ms of CPU ({:.0} to {:.0}; \
             at most 250)",
            ms(median),
            ms(spent[0]),
            ms(spent[ROTATIONS - 1]),
        );
    }
}

/// The first response of a stream whose identity is held, beside a stream that ends at once, with the caller's user
/// compared, through the same library on a socket of the same kind. On one connection, and each on one of its own.
fn first() {
    let (served, bare) = (Served::new(), Bare::new());
    let clients = Builder::new_current_thread().enable_all().build().unwrap();
    for anew in [false, true] {
        let mut ratios = Vec::new();
        let mut spent = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            let one = |serving: &Handle, ask: &dyn Fn()| {
                ask();
                let begun = worked(serving);
                ask();
                (worked(serving) - begun).as_secs_f64() * 1e6 / STREAMS as f64
            };
            let ours = one(&served.serving, &|| clients.block_on(fetch(&served.socket, anew)));
            let theirs = one(&bare.serving, &|| clients.block_on(watch_nothing(&bare.socket, anew)));
            ratios.push(ours / theirs);
            spent[0].push(ours);
            spent[1].push(theirs);
        }
        let [ours, theirs] = spent.each_mut().map(|all| floor::middle(all));
        let connection = if anew { "a new connection" } else { "a kept connection" };
        println!(
            "first response of FetchX509SVID on {connection}: {ours:.1} us of CPU, an empty stream {theirs:.1}: {:.2} \
             times ({:.2} to {:.2}; at most 2)",
            floor::middle(&mut ratios),
            ratios[0],
            ratios[ROUNDS - 1]
        );
    }
}

async fn fetch(socket: &Path, anew: bool) {
    let mut client = SpiffeWorkloadApiClient::new(channel(socket).await);
    for _ in 0..STREAMS {
        if anew {
            client = SpiffeWorkloadApiClient::new(channel(socket).await);
        }
        let mut request = tonic::Request::new(X509svidRequest {});
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
        let mut stream = client.fetch_x509svid(request).await.unwrap().into_inner();
        assert_eq!(stream.message().await.unwrap().unwrap().svids.len(), 1);
    }
}

async fn watch_nothing(socket: &Path, anew: bool) {
    let mut client = HealthClient::new(channel(socket).await);
    for _ in 0..STREAMS {
        if anew {
            client = HealthClient::new(channel(socket).await);
        }
        let mut stream = client.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
        assert!(stream.message().await.unwrap().is_none());
    }
}

/// A service that compares the user at the other end and has nothing to say.
struct Bare {
    serving: Handle,
    _folder: tempfile::TempDir,
    socket: PathBuf,
}

impl Bare {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("bare.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let serving = runtime.handle().clone();
        std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                let (accepted, incoming) = mpsc::channel(1);
                tokio::spawn(async move {
                    while let Ok((stream, _)) = listener.accept().await {
                        accepted.send(Ok::<_, std::io::Error>(stream)).await.unwrap();
                    }
                });
                let incoming = ReceiverStream::new(incoming);
                let service = HealthServer::new(Nothing(rustix::process::getuid().as_raw()));
                tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming).await
            })
        });
        Self { serving, _folder: folder, socket }
    }
}

struct Nothing(u32);

#[tonic::async_trait]
impl Health for Nothing {
    type WatchStream = tokio_stream::Empty<Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        _: tonic::Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn watch(
        &self,
        request: tonic::Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let caller = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
        match caller.is_some_and(|caller| caller.uid() == self.0) {
            true => Ok(Response::new(tokio_stream::empty())),
            false => Err(Status::permission_denied("")),
        }
    }
}

/// All identities of a node, from nothing, beside as many CSRs with as many at once; the authority on one core, the agent
/// or the client that it is compared with on the other. Then what an agent that keeps them holds in memory, and what it
/// does between renewals.
fn many() {
    let place = Place::with_tokens();
    place.compare("with a token of each one's own");
    let (memory, idle) = place.kept();
    println!(
        "an agent that keeps {MANY} identities: {:.1} MB (at most 40), {:.3} % of a core between renewals (at most 0.1)",
        memory as f64 / 1e6,
        idle * 100.0
    );
}

/// The same of an agent that asks for all with its own token, of an authority in a cluster; needs the parts that the tests
/// have (`tests/run parts`).
fn node() {
    let plane = ControlPlane::start();
    Place::of_node(&plane).compare("for whom the token of the node's agent speaks");
}

fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).unwrap();
}

/// An authority, and accounts that are asked for.
struct Place {
    root: tempfile::TempDir,
    authority: Child,
    address: String,
    runtime: Runtime,
    namespace: String,
    /// Whether one token speaks for all.
    of_node: bool,
}

/// What a client does that is no agent.
#[derive(Clone, Copy)]
enum Plain {
    ReadyMade,
    WithKeys,
    Judged,
}

impl Place {
    /// Each account has a token.
    fn with_tokens() -> Self {
        let root = tempfile::tempdir().unwrap();
        let manifests = root.path().join("manifests");
        std::fs::create_dir(&manifests).unwrap();
        let account = |n| {
            format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: a{n}, namespace: many}}\n---\n")
        };
        std::fs::write(manifests.join("all.yaml"), (0..MANY).map(account).collect::<String>()).unwrap();
        let mut command = Command::new(floor::program());
        command.arg("serve").arg(manifests).arg("--trial-tokens");
        Self::start(root, command, "many".to_owned(), false)
    }

    /// Each account has a pod on the node of the one whose token there is.
    fn of_node(plane: &ControlPlane) -> Self {
        plane.allow("mica", &serde_saphyr::from_str(PERMISSIONS).unwrap());
        plane.allow_in(control_plane::HOME, "mica", &serde_saphyr::from_str(OWN_PERMISSIONS).unwrap());
        let (root, namespace) = (tempfile::tempdir().unwrap(), plane.namespace());
        let node = namespace.node("a");
        namespace.account("agent");
        let agent = namespace.pod("agent", "agent", &node);
        for n in 0..MANY {
            namespace.account(&format!("a{n}"));
            namespace.pod(&format!("a{n}"), &format!("a{n}"), &node);
        }
        let policy = root.path().join("policy.yaml");
        std::fs::write(&policy, format!("impersonators: [{}/agent]\n", namespace.name)).unwrap();
        std::fs::write(root.path().join("token-0"), namespace.token("agent", "istio-ca", Some(&agent)))
            .unwrap();
        let mut command = Command::new(floor::program());
        command
            .args(["serve", "--kube", "--policy"])
            .arg(policy)
            .env("KUBECONFIG", plane.kubeconfig_of("mica"));
        Self::start(root, command, namespace.name.clone(), true)
    }

    fn start(root: tempfile::TempDir, mut command: Command, namespace: String, of_node: bool) -> Self {
        let data = root.path().join("data");
        // Each process and thread has the core of the one that makes it.
        pin(0);
        let authority = command
            .arg("--data-dir")
            .arg(&data)
            .args(["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        pin(1);
        let addresses = loop {
            match std::fs::read(data.join("addresses.json")) {
                Ok(text) => break text,
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let addresses: serde_json::Value = serde_json::from_slice(&addresses).unwrap();
        let address = addresses["grpc"].as_str().unwrap().to_owned();
        // The secrets of all accounts are written first.
        std::thread::sleep(Duration::from_secs(if of_node { 20 } else { 1 }));
        let runtime = Builder::new_multi_thread().enable_all().build().unwrap();
        Self { root, authority, address, runtime, namespace, of_node }
    }

    fn compare(&self, how: &str) {
        let mut rows = [
            (Plain::ReadyMade, "ready made", Vec::new()),
            (Plain::WithKeys, "with keys that are made", Vec::new()),
            (Plain::Judged, "with keys that are made and answers that are judged", Vec::new()),
        ];
        let mut spent = Vec::new();
        for _ in 0..ROUNDS {
            let bare = rows.each_ref().map(|(what, ..)| {
                self.renew_tokens();
                self.plain(*what)
            });
            self.renew_tokens();
            let obtained = self.obtained();
            spent.push(ms(obtained));
            for ((.., ratios), bare) in rows.iter_mut().zip(bare) {
                ratios.push(obtained.as_secs_f64() / bare.as_secs_f64());
            }
        }
        println!("{MANY} identities from nothing, {how}: {:.0} ms", floor::middle(&mut spent));
        for (_, what, mut ratios) in rows {
            println!(
                "{MANY} identities from nothing, {how}: {:.2} times {MANY} CSRs {what} ({:.2} to {:.2}; at most 1.1)",
                floor::middle(&mut ratios),
                ratios[0],
                ratios[ROUNDS - 1]
            );
        }
    }

    /// An authority has never seen the tokens of a node that begins: it keeps a verdict for five minutes at most.
    fn renew_tokens(&self) {
        if self.of_node {
            return;
        }
        let key = mica::auth::trial::open(&self.root.path().join("data")).unwrap();
        for n in 0..MANY {
            let account = ServiceAccount::new(&self.namespace, &format!("a{n}")).unwrap();
            let (now, hour) = (clock::now(), "1h".parse().unwrap());
            let random = keys::random_bytes().unwrap();
            let token = trial::token(&key, &account, "istio-ca", now, hour, random).unwrap();
            std::fs::write(self.token(n), token).unwrap();
        }
    }

    fn token(&self, n: usize) -> PathBuf {
        self.root.path().join(format!("token-{}", if self.of_node { 0 } else { n }))
    }

    fn roots(&self) -> PathBuf {
        self.root.path().join("data/root-cert.pem")
    }

    fn id(&self, n: usize) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://cluster.local/ns/{}/sa/a{n}", self.namespace)).unwrap()
    }

    fn target(&self) -> client::Target {
        client::Target {
            address: self.address.parse().unwrap(),
            roots: TrustBundle::from_pem(&std::fs::read(self.roots()).unwrap()).unwrap(),
            name: None,
            credential: client::Credential::Token(self.token(0)),
        }
    }

    /// By the client of `mica bench`, which costs little.
    fn ready_made(&self) -> Duration {
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let csr = pem::encode(pem::CSR, &nameless(&key).unwrap());
        let wanted = |n| client::Wanted {
            csr: csr.clone(),
            impersonated: self.of_node.then(|| self.id(n)),
            ..client::Wanted::default()
        };
        let wanted: Vec<_> = (0..MANY).map(wanted).collect();
        let tokens: Vec<_> = (0..MANY).map(|n| self.token(n)).collect();
        let load = client::bench::Load {
            connections: 1,
            in_flight: 8,
            duration: Duration::from_secs(60),
            requests: MANY as u64,
            rate: None,
            new_connections: false,
        };
        let begun = Instant::now();
        let outcome = self.runtime.block_on(client::load(&self.target(), &wanted, &tokens, &load)).unwrap();
        assert_eq!((outcome.granted, outcome.failures()), (MANY as u64, 0));
        begun.elapsed()
    }

    /// By a client that does nothing else.
    fn plain(&self, what: Plain) -> Duration {
        let next = Arc::new(AtomicUsize::new(0));
        let all: Vec<_> = (0..MANY).map(|n| (self.token(n), self.of_node.then(|| self.id(n)))).collect();
        let made = || {
            let key = keys::generate(KeyKind::P256).unwrap();
            let csr = pem::encode(pem::CSR, &nameless(&key.signing().unwrap()).unwrap());
            (key, csr)
        };
        if matches!(what, Plain::ReadyMade) {
            return self.ready_made();
        }
        let begun = Instant::now();
        self.runtime.block_on(async {
            let client = client::Client::connect(self.target()).await.unwrap();
            let mut lanes = JoinSet::new();
            for _ in 0..8 {
                let (client, next, all) = (client.clone(), next.clone(), all.clone());
                lanes.spawn(async move {
                    while let Some((token, impersonated)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let (key, csr) = made();
                        let wanted = client::Wanted {
                            csr,
                            impersonated: impersonated.clone(),
                            ..client::Wanted::default()
                        };
                        let client = client.showing(client::Credential::Token(token.clone()));
                        let answer = client.create_certificate(&wanted).await.unwrap();
                        if matches!(what, Plain::Judged) {
                            Granted::checked(&answer, key.public(), None, None, clock::now()).unwrap();
                        }
                    }
                });
            }
            lanes.join_all().await;
        });
        begun.elapsed()
    }

    fn obtained(&self) -> Duration {
        let authority = Authority { address: self.address.parse().unwrap(), name: None, roots: self.roots() };
        let credentials = |n| Credentials { token: Some(self.token(n)), certificate: None };
        let others = (0..MANY).filter(|_| !self.of_node).map(|n| (self.id(n), credentials(n))).collect();
        let wishes = Wishes { own: None, credentials: credentials(0), others };
        let begun = Instant::now();
        let (agent, wanted) = Agent::new(Asker::new(authority, None, KeyKind::P256), wishes);
        let agent = Arc::new(agent);
        let watched: Vec<_> = (0..MANY).map(|n| agent.held.pin(&self.id(n))).collect();
        let keeping = self.runtime.spawn(mica::agent::keep(agent, wanted));
        // Not on a thread of its own, which each certificate would wake.
        let waiting = self.runtime.spawn(async move {
            for mut one in watched {
                one.wait_for(Option::is_some).await.unwrap();
            }
        });
        self.runtime.block_on(waiting).unwrap();
        let elapsed = begun.elapsed();
        keeping.abort();
        elapsed
    }

    /// Bytes of memory, and the part of a core.
    fn kept(&self) -> (u64, f64) {
        let path = |name: &str| self.root.path().join(name);
        let entry = |n| {
            let (id, token) = (self.id(n), self.token(n));
            format!("- identity: {id}\n  match: {{uid: {}}}\n  tokenFile: {}\n", 10_000 + n, token.display())
        };
        let entries: String = (0..MANY).map(entry).collect();
        std::fs::write(path("workloads.yaml"), format!("workloads:\n{entries}")).unwrap();
        let mut agent = Command::new(floor::program())
            .args(["agent", "--http-address", "127.0.0.1:0", "--authority-address", &self.address])
            .arg("--authority-roots")
            .arg(self.roots())
            .arg("--token-file")
            .arg(self.token(0))
            .arg("--workloads")
            .arg(path("workloads.yaml"))
            .arg("--socket")
            .arg(path("agent.sock"))
            .arg("--files")
            .arg(path("files"))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let delivered =
            || (0..MANY).all(|n| path("files/many").join(format!("istio.a{n}/cert-chain.pem")).exists());
        while !delivered() {
            std::thread::sleep(Duration::from_millis(100));
        }
        // The first look at a folder that was written reads it.
        std::thread::sleep(Duration::from_secs(25));
        let before = floor::of_process(agent.id());
        std::thread::sleep(Duration::from_secs(40));
        let idle = floor::of_process(agent.id()) - before;
        let memory = floor::resident(agent.id());
        agent.kill().unwrap();
        agent.wait().unwrap();
        (memory, idle.as_secs_f64() / 40.0)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.authority.kill();
        let _ = self.authority.wait();
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// CPU time of the thread that serves.
fn worked(serving: &Handle) -> Duration {
    let (answer, asked) = std::sync::mpsc::channel();
    serving.spawn(async move { answer.send(clock::worked()).unwrap() });
    asked.recv().unwrap()
}

async fn channel(socket: &Path) -> Channel {
    Remote::from_shared(format!("unix://{}", socket.display())).unwrap().connect().await.unwrap()
}

async fn follow(socket: &Path, told: &Barrier) {
    let (say, said) = mpsc::channel(1);
    let names = vec!["default".to_owned()];
    let request = DiscoveryRequest { resource_names: names.clone(), ..Default::default() };
    say.send(request).await.unwrap();
    let mut heard = SecretDiscoveryServiceClient::new(channel(socket).await)
        .stream_secrets(ReceiverStream::new(said))
        .await
        .unwrap()
        .into_inner();
    while let Some(DiscoveryResponse { version_info, nonce, .. }) = heard.message().await.unwrap() {
        let request = DiscoveryRequest {
            version_info,
            response_nonce: nonce,
            resource_names: names.clone(),
            ..Default::default()
        };
        say.send(request).await.unwrap();
        told.wait().await;
    }
}

async fn follow_delta(socket: &Path, told: &Barrier) {
    let (say, said) = mpsc::channel(1);
    let resource_names_subscribe = vec!["default".to_owned()];
    say.send(DeltaDiscoveryRequest { resource_names_subscribe, ..Default::default() }).await.unwrap();
    let mut heard = SecretDiscoveryServiceClient::new(channel(socket).await)
        .delta_secrets(ReceiverStream::new(said))
        .await
        .unwrap()
        .into_inner();
    while let Some(DeltaDiscoveryResponse { nonce, .. }) = heard.message().await.unwrap() {
        say.send(DeltaDiscoveryRequest { response_nonce: nonce, ..Default::default() }).await.unwrap();
        told.wait().await;
    }
}

/// An agent that holds one identity, on a thread of its own, in this process.
struct Served {
    agent: Arc<Agent>,
    issuer: Issuer,
    registry: Registry,
    serving: Handle,
    _folder: tempfile::TempDir,
    socket: PathBuf,
}

impl Served {
    fn new() -> Self {
        let nowhere = Authority {
            address: "127.0.0.1:1".parse().unwrap(),
            name: None,
            roots: PathBuf::from("/nonexistent"),
        };
        let id = SpiffeId::parse(ID).unwrap();
        let wishes = Wishes { own: Some(Some(id.clone())), ..Wishes::default() };
        let (agent, wanted) = Agent::new(Asker::new(nowhere, None, KeyKind::P256), wishes);
        std::mem::forget(wanted);
        let agent = Arc::new(agent);
        let issuer = issuer(id.trust_domain());
        agent.held.put_bundles(Bundles::new(id.trust_domain().clone(), (**issuer.bundle()).clone()));
        agent.held.pin(&id);
        let mut registry = Registry::default();
        let endpoint = Endpoint { agent: agent.clone(), attestor: Arc::new(OwnUser::new(agent.own())) };
        let service = sds::service(endpoint.clone(), &mut registry);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let serving = runtime.handle().clone();
        std::thread::spawn(move || {
            runtime.block_on(endpoint::serve(
                listener,
                8 * PROXIES,
                endpoint,
                service,
                std::future::pending(),
            ))
        });
        let served = Self { agent, issuer, registry, serving, _folder: folder, socket };
        served.hold();
        served
    }

    fn hold(&self) {
        let id = SpiffeId::parse(ID).unwrap();
        let key = keys::generate(KeyKind::P256).unwrap();
        let profile = Profile::Workload { id: &id, dns: &[], proved_at: None };
        let order = Order { profile, key: key.public(), lifetime: "1h".parse().unwrap() };
        let leaf = self.issuer.issue(&order, clock::now(), keys::serial_number().unwrap()).unwrap();
        let leaf = Certificate::from_der(leaf.der()).unwrap();
        let renew_at = leaf.validity.not_after;
        self.agent.held.put(Arc::new(Svid {
            id,
            chain: vec![leaf],
            key: Arc::new(key),
            renew_at,
            trace: None,
        }));
    }

    fn metric(&self, series: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }
}

fn issuer(trust_domain: &TrustDomain) -> Issuer {
    let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
    let organization = "bench".parse().unwrap();
    let profile = Profile::Root { organization: &organization, trust_domain };
    let serial = keys::serial_number().unwrap();
    let root = issuer::root(&key, &profile, "10y".parse().unwrap(), clock::now(), serial).unwrap();
    let root = Certificate::from_der(root.der()).unwrap();
    let bundle = TrustBundle::new([root.clone()]).unwrap();
    Issuer::new(Arc::new(key), &[root], bundle, trust_domain).unwrap()
}
