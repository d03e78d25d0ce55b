//! SDS: what is said on its streams, and what Envoy makes of it. The service is the real one, on a Unix socket; what is
//! held and who is entitled to it is put there by the tests.

mod envoy;
mod protocol;

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use mica::agent::{Agent, Asker, Authorities, Authority, Bundles, Svid, Wishes};
use mica::attest::{Attestor, Entitled, Refused};
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::issuer::{self, Issuer, Order};
use mica::core::key::KeyKind;
use mica::core::profile::Profile;
use mica::core::spiffe::{SpiffeId, TrustDomain};
use mica::endpoint::{Endpoint, sds};
use mica::sys::peer::Process;
use mica::sys::{clock, keys};
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::Connected;

const OWN: &str = "example.org";
const WEB: &str = "spiffe://example.org/web";
const OTHER: &str = "spiffe://example.org/other";

/// An authority of one trust domain.
struct Ca {
    domain: TrustDomain,
    issuer: Issuer,
}

impl Ca {
    fn new(domain: &str) -> Self {
        let domain = TrustDomain::parse(domain).unwrap();
        let key = keys::generate(KeyKind::P256).unwrap().signing().unwrap();
        let organization = "sds".parse().unwrap();
        let profile = Profile::Root { organization: &organization, trust_domain: &domain };
        let lifetime = "10y".parse().unwrap();
        let root =
            issuer::root(&key, &profile, lifetime, clock::now(), keys::serial_number().unwrap()).unwrap();
        let root = Certificate::from_der(root.der()).unwrap();
        let bundle = TrustBundle::new([root.clone()]).unwrap();
        let issuer = Issuer::new(Arc::new(key), &[root], bundle, &domain).unwrap();
        Self { domain, issuer }
    }

    fn bundle(&self) -> TrustBundle {
        (**self.issuer.bundle()).clone()
    }

    fn issue(&self, id: &str) -> Arc<Svid> {
        self.issue_for(id, KeyKind::P256)
    }

    fn issue_for(&self, id: &str, kind: KeyKind) -> Arc<Svid> {
        let id = SpiffeId::parse(id).unwrap();
        let key = keys::generate(kind).unwrap();
        let order = Order {
            profile: Profile::Workload { id: &id, dns: &[], proved_at: None },
            key: key.public(),
            lifetime: "1h".parse().unwrap(),
        };
        let leaf = self.issuer.issue(&order, clock::now(), keys::serial_number().unwrap()).unwrap();
        let leaf = Certificate::from_der(leaf.der()).unwrap();
        let renew_at = leaf.validity.not_after;
        Arc::new(Svid { id, chain: vec![leaf], key: Arc::new(key), renew_at })
    }
}

/// Says of every process what it was told to say.
struct Says(Mutex<Result<Vec<Entitled>, Refused>>);

#[tonic::async_trait]
impl Attestor for Says {
    async fn attest(&self, _: &Process) -> Result<Vec<Entitled>, Refused> {
        self.0.lock().unwrap().clone()
    }
}

/// An agent's socket with SDS behind it, for a caller who is [`WEB`] until something else is said.
struct Served {
    runtime: Runtime,
    agent: Arc<Agent>,
    says: Arc<Says>,
    registry: Registry,
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
        let (agent, wanted) = Agent::new(Asker::new(nowhere, None, KeyKind::P256), Wishes::default());
        // Whoever asked would be the one to obtain what is wanted; here that are the tests.
        std::mem::forget(wanted);
        let agent = Arc::new(agent);
        let says = Arc::new(Says(Mutex::new(Ok(entitled(&[WEB])))));
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("sds.sock");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut registry = Registry::default();
        let endpoint = Endpoint { agent: agent.clone(), attestor: says.clone() };
        let service = sds::service(endpoint, &mut registry);
        let listener = runtime.block_on(async { UnixListener::bind(&socket).unwrap() });
        let accepted = UnixListenerStream::new(listener).map(|stream| stream.map(Accepted));
        let server = tonic::transport::Server::builder().add_service(service);
        runtime.spawn(server.serve_with_incoming(accepted));
        Self { runtime, agent, says, registry, _folder: folder, socket }
    }

    /// As after the first answer of an authority.
    fn with(ca: &Ca) -> (Self, Arc<Svid>) {
        let served = Self::new();
        served.agent.held.put_bundles(Bundles::new(ca.domain.clone(), ca.bundle()));
        let svid = ca.issue(WEB);
        served.hold(&svid);
        (served, svid)
    }

    fn hold(&self, svid: &Arc<Svid>) {
        self.agent.held.pin(&svid.id);
        self.agent.held.put(svid.clone());
    }

    /// The bundles of these, the first being the agent's own.
    fn trust(&self, cas: &[&Ca]) {
        let x509 = |ca: &Ca| Authorities { x509: Some(ca.bundle()), jwt: None };
        let domains = cas.iter().map(|ca| (ca.domain.clone(), x509(ca))).collect();
        self.agent.held.put_bundles(Bundles { own: cas[0].domain.clone(), domains });
    }

    fn say(&self, said: Result<Vec<Entitled>, Refused>) {
        *self.says.0.lock().unwrap() = said;
    }

    /// The value of one series.
    fn metric(&self, series: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }
}

fn entitled(ids: &[&str]) -> Vec<Entitled> {
    ids.iter().map(|id| Entitled { id: SpiffeId::parse(id).unwrap(), hint: None }).collect()
}

/// Waits for something that is about to be so.
fn soon(what: &str, mut so: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "not in 20 seconds: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A connection, of the process that runs the tests.
struct Accepted(UnixStream);

impl Connected for Accepted {
    type ConnectInfo = Process;

    fn connect_info(&self) -> Process {
        let own = rustix::process::getpid();
        let handle = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()).unwrap();
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Process { pid: std::process::id(), uid, gid, handle: Arc::new(handle) }
    }
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn address(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}
