//! All kinds of bad weather at once, drawn from a seed, on two replicas with accounts that come and go. When it is fair again,
//! every account has exactly one good secret, and the root is the one of the start.
//!
//! `MICA_STORM_SECONDS=1200 MICA_STORM_SEED=7 cargo test --test it storm` is a longer one.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Secret, ServiceAccount as Account};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt as _};
use mica::core::bundle::TrustBundle;
use mica::core::plan::{CertificateSet, judge};
use mica::core::spiffe::{ServiceAccount, TrustDomain};
use mica::sys::clock;
use serde_json::json;

use super::control_plane::{ControlPlane, runtime};
use super::knowledge::permitted;
use super::weather::{Way, Weather};
use crate::serve::{Mica, Place};

const ACCOUNTS: u64 = 40;
const NAMESPACES: u64 = 4;
/// What the weather has left is mended within this.
const MENDED: Duration = Duration::from_secs(90);
const DELIVERED: &str = "type=istio.io/key-and-cert";

#[test]
fn after_any_storm_every_account_has_one_good_secret_and_the_root_is_the_same() {
    let seconds = number("MICA_STORM_SECONDS", 180);
    let seed = number("MICA_STORM_SEED", 20_261_123);
    eprintln!("a storm of {seconds} s, seed {seed}");
    let mut storm = Storm::begin(seed);
    let root = storm.root();
    let ends = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < ends {
        storm.step();
    }
    storm.calm();
    let begun = Instant::now();
    while let Err(fault) = storm.judge(&root) {
        assert!(begun.elapsed() < MENDED, "seed {seed}: {fault}\n{}", storm.logs());
        std::thread::sleep(Duration::from_millis(500));
    }
    eprintln!("all is well {:?} after {} steps", begun.elapsed(), storm.steps);
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

struct Storm {
    plane: ControlPlane,
    replicas: [Replica; 2],
    draws: u64,
    steps: usize,
    is_backed_up: bool,
}

struct Replica {
    place: Place,
    way: Way,
    mica: Option<Mica>,
}

impl Storm {
    fn begin(seed: u64) -> Self {
        let plane = ControlPlane::start();
        permitted(&plane);
        for n in 0..NAMESPACES {
            plane.make_namespace(&format!("storm-{n}"));
        }
        let replicas = [(); 2].map(|()| Replica::start(&plane));
        let mut storm = Self { plane, replicas, draws: seed.max(1), steps: 0, is_backed_up: false };
        (0..ACCOUNTS).for_each(|n| storm.create(n));
        storm
    }

    /// The same seed draws the same (Marsaglia's xorshift).
    fn draw(&mut self, below: u64) -> u64 {
        self.draws ^= self.draws << 13;
        self.draws ^= self.draws >> 7;
        self.draws ^= self.draws << 17;
        self.draws % below
    }

    fn step(&mut self) {
        self.steps += 1;
        let which = self.draw(2) as usize;
        let number = self.draw(ACCOUNTS);
        match self.draw(24) {
            0 => self.create(number),
            1 | 2 => self.delete_account(number),
            3 | 4 => self.delete_secret(number),
            5 => self.edit(number, &json!({"data": {"cert-chain.pem": "Z2FyYmFnZQ=="}})),
            6 => self.edit(number, &json!({"data": {"key.pem": null}})),
            7 => self.edit(number, &json!({"metadata": {"annotations": null}})),
            8 => {
                self.delete_account(number);
                self.create(number);
            }
            9 if self.draw(3) == 0 => self.replicas[which].kill_and_start(&self.plane),
            10 if self.draw(3) == 0 => self.replicas[which].stop_and_start(&self.plane),
            11 if self.draw(4) == 0 => self.restart_api_server(),
            12 if self.draw(4) == 0 => self.back_up_or_restore(),
            _ => {
                let weather = match self.draw(10) {
                    0 => Weather::Expired,
                    1 => Weather::TooMany(1 + self.draw(2)),
                    2 | 3 => Weather::Errors(1 + self.draw(4)),
                    4 => Weather::Slow(Duration::from_millis(self.draw(3_000))),
                    5 => Weather::Silent,
                    6 => Weather::Cut,
                    7 => Weather::Conflicts,
                    8 => Weather::Forbidden,
                    _ => Weather::Away,
                };
                self.replicas[which].way.weather(weather);
            }
        }
        std::thread::sleep(Duration::from_millis(50 + self.draw(700)));
        // What lasts for ever is no weather.
        if self.draw(3) == 0 {
            self.replicas[self.steps % 2].way.weather(Weather::Fair);
        }
    }

    fn calm(&mut self) {
        for replica in &mut self.replicas {
            replica.way.weather(Weather::Fair);
        }
    }

    fn client(&self) -> Client {
        self.plane.client()
    }

    fn namespace(number: u64) -> String {
        format!("storm-{}", number % NAMESPACES)
    }

    fn accounts(&self, number: u64) -> Api<Account> {
        Api::namespaced(self.client(), &Self::namespace(number))
    }

    fn secrets(&self, number: u64) -> Api<Secret> {
        Api::namespaced(self.client(), &Self::namespace(number))
    }

    fn create(&mut self, number: u64) {
        let account = Account {
            metadata: kube::core::ObjectMeta { name: Some(format!("a{number}")), ..Default::default() },
            ..Default::default()
        };
        tolerate(runtime().block_on(self.accounts(number).create(&PostParams::default(), &account)));
    }

    fn delete_account(&mut self, number: u64) {
        let name = format!("a{number}");
        tolerate(runtime().block_on(self.accounts(number).delete(&name, &DeleteParams::default())));
    }

    fn delete_secret(&mut self, number: u64) {
        let name = format!("istio.a{number}");
        tolerate(runtime().block_on(self.secrets(number).delete(&name, &DeleteParams::default())));
    }

    fn edit(&mut self, number: u64, patch: &serde_json::Value) {
        let name = format!("istio.a{number}");
        let patch = Patch::Merge(patch);
        tolerate(runtime().block_on(self.secrets(number).patch(&name, &PatchParams::default(), &patch)));
    }

    fn restart_api_server(&mut self) {
        self.plane.stop_api_server();
        std::thread::sleep(Duration::from_millis(self.draw(3_000)));
        self.plane.start_api_server();
        self.plane.wait_until_ready();
    }

    /// What happened since the backup has not happened.
    fn back_up_or_restore(&mut self) {
        match self.is_backed_up {
            false => self.plane.back_up(),
            true => self.plane.restore(),
        }
        self.is_backed_up = !self.is_backed_up;
    }

    fn root(&self) -> String {
        let page = Instant::now();
        loop {
            let secrets: Api<Secret> = Api::namespaced(self.client(), "istio-system");
            if let Ok(secret) = runtime().block_on(secrets.get("istio-ca-secret")) {
                return text(&secret, "ca-cert.pem");
            }
            assert!(page.elapsed() < Duration::from_secs(30), "no root was made\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What is not as it should be.
    fn judge(&self, root: &str) -> Result<(), String> {
        if self.root() != root {
            return Err("the root is another one".to_owned());
        }
        let bundle = TrustBundle::from_pem(root.as_bytes()).unwrap();
        let domain = TrustDomain::parse("cluster.local").unwrap();
        let all = ListParams::default();
        let (accounts, secrets) = runtime().block_on(async {
            let (accounts, secrets) = (Api::<Account>::all(self.client()), Api::<Secret>::all(self.client()));
            (accounts.list(&all).await.unwrap(), secrets.list(&all.clone().fields(DELIVERED)).await.unwrap())
        });
        let mut left: BTreeSet<(String, String)> =
            accounts.iter().map(|account| (account.namespace().unwrap(), account.name_any())).collect();
        for secret in &secrets {
            let (namespace, name) = (secret.namespace().unwrap(), secret.name_any());
            let account = name.strip_prefix("istio.").unwrap_or_default().to_owned();
            if !left.remove(&(namespace.clone(), account.clone())) {
                return Err(format!("{namespace}/{name} is nobody's"));
            }
            let uid = accounts
                .iter()
                .find(|a| a.namespace().as_deref() == Some(&namespace) && a.name_any() == account)
                .and_then(kube::ResourceExt::uid);
            let owner = secret.owner_references().first().map(|owner| owner.uid.clone());
            if owner != uid {
                return Err(format!("{namespace}/{name} is of {owner:?}, and the account is {uid:?}"));
            }
            let set = CertificateSet {
                chain_pem: text(secret, "cert-chain.pem"),
                key_pem: text(secret, "key.pem").into(),
                roots_pem: text(secret, "root-cert.pem").into(),
            };
            let id = ServiceAccount::new(&namespace, &account).unwrap().spiffe_id(&domain);
            judge(&set, &id, &bundle, clock::now())
                .map_err(|fault| format!("{namespace}/{name}: {fault}"))?;
        }
        match left.first() {
            None => Ok(()),
            Some(account) => Err(format!("{account:?} and {} others have no secret", left.len() - 1)),
        }
    }

    /// Where the logs of both are, which would go with the test.
    fn logs(&self) -> String {
        let keep = |replica: &Replica| {
            let (_, kept) = tempfile::Builder::new().suffix(".log").tempfile().unwrap().keep().unwrap();
            std::fs::copy(replica.mica.as_ref().unwrap().log_path(), &kept).unwrap();
            kept.display().to_string()
        };
        format!("the logs are {}", self.replicas.iter().map(keep).collect::<Vec<_>>().join(" and "))
    }
}

impl Replica {
    fn start(plane: &ControlPlane) -> Self {
        let mut replica = Self { place: Place::new(), way: Way::new(plane, "mica"), mica: None };
        replica.start_mica();
        replica
    }

    fn start_mica(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        command.args(["serve", "--kube", "--ttl", "30s", "--data-dir"]).arg(self.place.data());
        command.args(["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]);
        command.env("KUBECONFIG", self.way.kubeconfig()).stdin(Stdio::null());
        self.mica = Some(self.place.start_command(&mut command));
    }

    fn kill_and_start(&mut self, _: &ControlPlane) {
        self.way.weather(Weather::Fair);
        self.mica.take().unwrap().kill();
        self.start_mica();
    }

    fn stop_and_start(&mut self, _: &ControlPlane) {
        self.way.weather(Weather::Fair);
        self.mica.take().unwrap().stop();
        self.start_mica();
    }
}

fn text(secret: &Secret, key: &str) -> String {
    let bytes = secret.data.as_ref().and_then(|data| data.get(key)).map(|bytes| bytes.0.clone());
    String::from_utf8(bytes.unwrap_or_default()).unwrap_or_default()
}

/// What is there already, or not any more, is as good.
fn tolerate<T: Debug>(done: kube::Result<T>) {
    match done {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => {}
        Err(fault) => panic!("{fault}"),
    }
}
