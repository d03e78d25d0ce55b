//! SDS: what is said on its streams, and what Envoy makes of it. The service is the real one, on a Unix socket; what is
//! held and who is entitled to it is put there by the tests.

mod envoy;
mod protocol;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mica::agent::{Agent, Asker, Authorities, Authority, Bundles, Svid, Wishes};
use mica::attest::{Attestor, Entitled, Refused};
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::issuer::{self, Issuer, Order};
use mica::core::key::KeyKind;
use mica::core::profile::Profile;
use mica::core::spiffe::{SpiffeId, TrustDomain};
use mica::endpoint::{self, Endpoint, sds};
use mica::sys::peer::Process;
use mica::sys::{clock, keys};
use prometheus_client::registry::Registry;
use tokio::runtime::Runtime;
use tokio::sync::watch;

const OWN: &str = "example.org";
const WEB: &str = "spiffe://example.org/web";
const OTHER: &str = "spiffe://example.org/other";

/// An authority of one trust domain.
pub(crate) struct Ca {
    pub(crate) domain: TrustDomain,
    pub(crate) issuer: Issuer,
}

impl Ca {
    pub(crate) fn new(domain: &str) -> Self {
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
        let id = SpiffeId::parse(id).unwrap();
        let key = keys::generate(KeyKind::P256).unwrap();
        let order = Order {
            profile: Profile::Workload { id: &id, dns: &[], proved_at: None },
            key: key.public(),
            lifetime: "1h".parse().unwrap(),
        };
        let leaf = self.issuer.issue(&order, clock::now(), keys::serial_number().unwrap()).unwrap();
        let leaf = Certificate::from_der(leaf.der()).unwrap();
        let renew_at = leaf.validity.not_after;
        Arc::new(Svid { id, chain: vec![leaf], key: Arc::new(key), renew_at, trace: None })
    }
}

/// Says of every process what it was told to say.
struct Says {
    said: Mutex<Result<Vec<Entitled>, Refused>>,
    changes: watch::Sender<()>,
}

#[tonic::async_trait]
impl Attestor for Says {
    async fn attest(&self, _: &Process) -> Result<Vec<Entitled>, Refused> {
        self.said.lock().unwrap().clone()
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
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
        let said = Mutex::new(Ok(entitled(&[WEB])));
        let says = Arc::new(Says { said, changes: watch::Sender::new(()) });
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("sds.sock");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut registry = Registry::default();
        let endpoint = Endpoint { agent: agent.clone(), attestor: says.clone() };
        let service = sds::service(endpoint.clone(), &mut registry);
        let listener = UnixListener::bind(&socket).unwrap();
        runtime.spawn(endpoint::serve(listener, 4096, endpoint, service, std::future::pending()));
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
        *self.says.said.lock().unwrap() = said;
    }

    /// And tells streams of it.
    fn say_aloud(&self, said: Result<Vec<Entitled>, Refused>) {
        self.say(said);
        self.says.changes.send_replace(());
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    /// The value of one series.
    fn metric(&self, series: &str) -> u64 {
        let text = self.metrics();
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

fn address(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}
