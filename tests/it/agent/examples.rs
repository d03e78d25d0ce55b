//! go-spiffe's own example programs, as they are: where the socket is, where servers listen and who is let in is written
//! into them, so each example has namespaces of its own in which `/tmp` is the agent's folder. An agent knows them by
//! their users, as their documents say. Its authority is of the trust domain and the paths that they want, which a Mica
//! would not give them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mica::core::certificate::Certificate;
use mica::core::csr::CheckedCsr;
use mica::core::issuer::Order;
use mica::core::jwt_svid::{self, Audience, Claims};
use mica::core::key::{JwsKey, KeyKind, PublicKey};
use mica::core::profile::Profile;
use mica::core::published::{JwtAuthority, Published};
use mica::core::spiffe::SpiffeId;
use mica::proto::istio::v1::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use mica::proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use mica::proto::mica::v1::agent_service_server::{AgentService, AgentServiceServer};
use mica::proto::mica::v1::{
    Bundle, CreateCertificatesRequest, CreateCertificatesResponse, CreateJwtSvidRequest,
    CreateJwtSvidResponse, ReportHoldersRequest, ReportHoldersResponse, WatchBundlesRequest,
    WatchBundlesResponse,
};
use mica::sys::{clock, keys};
use prost_types::Timestamp;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

use super::{Agent, start};
use crate::parts;
use crate::sds::Ca;
use crate::serve::{Place, output_within, wait_for};

const DOMAIN: &str = "example.org";
/// Users without a name.
const SERVER: u32 = 64_001;
const CLIENT: u32 = 64_002;
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn each_client_of_go_spiffes_examples_gets_its_answer_from_its_server() {
    let world = World::new();
    for (example, answer, seen) in [
        ("spiffe-tls", "Server says: \"Hello client\\n\"", "Client says: \"Hello server\\n\""),
        ("spiffe-http", "Success!!!", "Request received"),
        ("spiffe-grpc", "Hello world", "Received: world"),
        ("spiffe-jwt", "Success!!!", "sub:spiffe://example.org/client"),
    ] {
        let server = world.start(&format!("{example}/server"), SERVER);
        let said = server.answers(&world, example, CLIENT);
        assert!(said.contains(answer), "{example}: {said}");
        let log =
            wait_for(PATIENCE, "the server's log", || Some(server.log()).filter(|log| log.contains(seen)));
        // The servers let in the client alone, and those of JWTs whoever has a token.
        if example != "spiffe-jwt" {
            let refused = server.asked(&world, example, SERVER).unwrap_err();
            assert!(!refused.contains(answer), "{example}: {refused}");
        }
        eprintln!("{example}: {}: {}", said.trim(), log.lines().last().unwrap());
    }
}

#[test]
fn go_spiffes_example_with_a_proxy_in_between_gets_its_answer() {
    let example = "spiffe-jwt-using-proxy";
    let world = World::new();
    let server = world.start(&format!("{example}/server"), SERVER);
    let _proxy = server.beside(world.program(&format!("{example}/proxy")), SERVER);
    assert!(server.answers(&world, example, CLIENT).contains("Success!!!"));
    // They share a log.
    let log = server.log();
    assert!(log.contains("GET /") && log.contains("Request received"), "{log}");
}

#[test]
fn go_spiffes_watcher_sees_certificates_and_keys() {
    let world = World::new();
    let watcher = world.start("spiffe-watcher", CLIENT);
    for seen in [
        "SVID updated for \"spiffe://example.org/client\"",
        "jwt bundle updated \"example.org\": {\"keys\":[{",
    ] {
        wait_for(PATIENCE, seen, || watcher.log().contains(seen).then_some(()));
    }
}

/// An authority, and an agent that has the two identities of the examples.
struct World {
    /// What `/tmp` is for the examples.
    folder: PathBuf,
    _agent: Agent,
    _runtime: Runtime,
    _place: Place,
}

impl World {
    fn new() -> Self {
        let place = Place::new();
        let root = place.root.path();
        let folder = root.join("tmp");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        let authority = Authority::new();
        let runtime = Runtime::new().unwrap();
        fs::write(root.join("roots.pem"), authority.ca.issuer.bundle().pem().as_bytes()).unwrap();
        let address = runtime.block_on(authority.serve());
        let entry = |name: &str, uid: u32| {
            let token = root.join(format!("token-{name}"));
            fs::write(&token, name).unwrap();
            format!(
                "- identity: spiffe://{DOMAIN}/{name}\n  match: {{uid: {uid}}}\n  tokenFile: {}\n",
                token.display()
            )
        };
        let workloads = format!("workloads:\n{}{}", entry("server", SERVER), entry("client", CLIENT));
        fs::write(root.join("workloads.yaml"), workloads).unwrap();
        let mut agent = Command::new(env!("CARGO_BIN_EXE_mica"));
        agent.args(["agent", "--http-address", "127.0.0.1:0", "--log-format", "human"]);
        agent.args(["--authority-address", &address, "--authority-name", "localhost"]);
        agent.arg("--authority-roots").arg(root.join("roots.pem"));
        agent.arg("--token-file").arg(root.join("token-client"));
        agent.arg("--workloads").arg(root.join("workloads.yaml"));
        agent.arg("--socket").arg(folder.join("agent.sock")).stdin(Stdio::null());
        let agent = start(&place, "agent", &mut agent);
        Self { folder, _agent: agent, _runtime: runtime, _place: place }
    }

    /// A copy that other users may run.
    fn program(&self, example: &str) -> String {
        let name = example.replace('/', "-");
        let copy = self.folder.join(&name);
        if !copy.exists() {
            fs::copy(parts::go_spiffe_example(example), copy).unwrap();
        }
        format!("/tmp/{name}")
    }

    /// Starts a program in namespaces of its own.
    fn start(&self, example: &str, uid: u32) -> Running {
        let program = self.program(example);
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--propagation", "private", "--", "sh", "-c"]);
        command.arg("ip link set lo up && mount --bind \"$0\" /tmp && exec \"$@\"").arg(&self.folder);
        Running::start(
            command.args(as_user(uid)).arg(program),
            &self.folder.join(format!("{}.log", example.replace('/', "-"))),
        )
    }
}

fn as_user(uid: u32) -> [String; 5] {
    ["setpriv", "--clear-groups", &format!("--regid={uid}"), &format!("--reuid={uid}"), "--"]
        .map(str::to_owned)
}

/// A running example, killed when dropped.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn start(command: &mut Command, log: &Path) -> Self {
        let file = fs::File::options().create(true).append(true).open(log).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().unwrap();
        Self { child, log: log.to_owned() }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// A program in the same namespaces.
    fn command(&self, program: String, uid: u32) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--mount", "--target", &self.child.id().to_string(), "--"]);
        command.args(as_user(uid)).arg(program).stdin(Stdio::null());
        command
    }

    fn beside(&self, program: String, uid: u32) -> Self {
        Self::start(&mut self.command(program, uid), &self.log)
    }

    /// What the example's client says in the end, once its server listens.
    fn answers(&self, world: &World, example: &str, uid: u32) -> String {
        let mut why = String::new();
        let begun = std::time::Instant::now();
        while begun.elapsed() < PATIENCE {
            match self.asked(world, example, uid) {
                Ok(said) => return said,
                Err(said) => why = said,
            }
        }
        panic!("{example}: {why}\n{}", self.log());
    }

    fn asked(&self, world: &World, example: &str, uid: u32) -> Result<String, String> {
        let mut client = self.command(world.program(&format!("{example}/client")), uid);
        let output = output_within(&mut client, Duration::from_secs(40));
        let said = String::from_utf8(output.stderr).unwrap();
        if output.status.success() { Ok(said) } else { Err(said) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Gives whoever shows a token the identity that the token says.
#[derive(Clone)]
struct Authority {
    ca: Arc<Ca>,
    key: Arc<(JwsKey, PublicKey)>,
}

impl Authority {
    const KID: &str = "one";

    fn new() -> Self {
        let key = keys::generate(KeyKind::P256).unwrap();
        let key = (key.jws().unwrap(), key.public().clone());
        Self { ca: Arc::new(Ca::new(DOMAIN)), key: Arc::new(key) }
    }

    /// Where it listens.
    async fn serve(&self) -> String {
        let key = keys::generate(KeyKind::P256).unwrap();
        let serving = Profile::Serving { dns: &["localhost".parse().unwrap()], addresses: &[] };
        let chain = self.issued(serving, key.public());
        let tls = ServerTlsConfig::new().identity(Identity::from_pem(chain, key.to_pem().as_bytes()));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::builder()
            .tls_config(tls)
            .unwrap()
            .add_service(IstioCertificateServiceServer::new(self.clone()))
            .add_service(AgentServiceServer::new(self.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        address
    }

    fn issued(&self, profile: Profile<'_>, key: &PublicKey) -> String {
        let order = Order { profile, key, lifetime: "1h".parse().unwrap() };
        let issued = self.ca.issuer.issue(&order, clock::now(), keys::serial_number().unwrap()).unwrap();
        Certificate::from_der(issued.der()).unwrap().to_pem()
    }
}

fn caller<T>(request: &Request<T>) -> Result<SpiffeId, Status> {
    let token =
        request.metadata().get("authorization").and_then(|it| it.to_str().ok()?.strip_prefix("Bearer "));
    let token = token.ok_or_else(|| Status::unauthenticated("no token"))?;
    Ok(SpiffeId::parse(&format!("spiffe://{DOMAIN}/{token}")).unwrap())
}

#[tonic::async_trait]
impl IstioCertificateService for Authority {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let id = caller(&request)?;
        let csr = CheckedCsr::from_pem(request.into_inner().csr.as_bytes()).unwrap();
        let leaf = self.issued(Profile::Workload { id: &id, dns: &[], proved_at: None }, csr.key());
        let cert_chain = vec![leaf, self.ca.issuer.bundle().pem().to_string()];
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

#[tonic::async_trait]
impl AgentService for Authority {
    type WatchBundlesStream =
        std::pin::Pin<Box<dyn tokio_stream::Stream<Item = Result<WatchBundlesResponse, Status>> + Send>>;

    async fn create_certificates(
        &self,
        _: Request<CreateCertificatesRequest>,
    ) -> Result<Response<CreateCertificatesResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn create_jwt_svid(
        &self,
        request: Request<CreateJwtSvidRequest>,
    ) -> Result<Response<CreateJwtSvidResponse>, Status> {
        let id = caller(&request)?;
        let audience = Audience::new(request.into_inner().audience, &self.ca.domain).unwrap();
        let lifetime = "5m".parse().unwrap();
        let claims = Claims { id: &id, audience: &audience, now: clock::now(), lifetime, jti: "x" };
        let svid = jwt_svid::token(&self.key.0, Self::KID, &claims).unwrap();
        let expires_at = Some(Timestamp { seconds: claims.expires().unix_timestamp(), nanos: 0 });
        Ok(Response::new(CreateJwtSvidResponse { svid, spiffe_id: id.to_string(), expires_at }))
    }

    async fn watch_bundles(
        &self,
        _: Request<WatchBundlesRequest>,
    ) -> Result<Response<Self::WatchBundlesStream>, Status> {
        let jwt = vec![JwtAuthority::es256(Self::KID, &self.key.1)];
        let bundle = Bundle {
            trust_domain: DOMAIN.to_owned(),
            sequence: 1,
            x509_authorities: self
                .ca
                .issuer
                .bundle()
                .roots()
                .iter()
                .map(|root| root.der().to_vec())
                .collect(),
            jwt_authorities: Published { jwt, ..Default::default() }.jwks().into_bytes(),
            refresh_hint: None,
        };
        let told = WatchBundlesResponse { bundles: vec![bundle], renew_issued_before: None };
        let for_ever = tokio_stream::once(Ok(told)).chain(tokio_stream::pending());
        Ok(Response::new(Box::pin(for_ever)))
    }

    async fn report_holders(
        &self,
        _: Request<ReportHoldersRequest>,
    ) -> Result<Response<ReportHoldersResponse>, Status> {
        Ok(Response::new(ReportHoldersResponse {}))
    }
}
