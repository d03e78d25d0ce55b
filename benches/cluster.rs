//! What the secrets of a cluster cost beside their floor: a bare writer with the same client, concurrency and watches that
//! creates as many secrets of the same size on the same API server, in turns. `cargo bench --bench cluster`; needs the
//! parts that the tests have (`tests/run parts`).
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]
#![allow(dead_code, unused_imports, reason = "the tests' control plane has more than a bench needs")]

#[path = "../tests/it/cluster/control_plane.rs"]
mod control_plane;
mod floor;
#[path = "../tests/it/parts.rs"]
mod parts;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use control_plane::{ControlPlane, runtime};
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret, ServiceAccount};
use kube::api::{DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, ResourceExt as _};
use mica::cluster::{OWN_PERMISSIONS, PERMISSIONS};
use mica::sink::Sink as _;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;

const NAMESPACES: usize = 100;
/// Even, so that each of the two is as often the first, and Mica the last, whose secrets the restart finds.
const ROUNDS: usize = 4;
const NEWCOMERS: usize = 60;
const AT_ONCE: usize = mica::cluster::Secrets::AT_ONCE;

fn main() {
    let accounts = std::env::var("MICA_BENCH_ACCOUNTS").map_or(10_000, |text| text.parse().unwrap());
    let plane = ControlPlane::start();
    plane.allow("mica", &serde_saphyr::from_str(PERMISSIONS).unwrap());
    plane.allow_in(control_plane::HOME, "mica", &serde_saphyr::from_str(OWN_PERMISSIONS).unwrap());
    let client = plane.client();
    let mica = Mica::start(&plane);
    std::thread::sleep(Duration::from_secs(3));
    let empty = floor::resident(mica.child.id());
    mica.stop();

    let names: Vec<_> =
        (0..accounts).map(|n| (format!("bench-{}", n % NAMESPACES), format!("account-{n}"))).collect();
    let begun = Instant::now();
    runtime().block_on(make_accounts(&client, &names));
    println!("{accounts} accounts in {NAMESPACES} namespaces were made in {:?}", begun.elapsed());
    let template = {
        let mica = Mica::start(&plane);
        let (namespace, name) = &names[0];
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let secret = runtime().block_on(secrets.get(&format!("istio.{name}"))).unwrap();
        mica.stop();
        secret
    };

    let mut ratios = Vec::new();
    let bare_writer = || {
        runtime().block_on(clear(&client));
        runtime().block_on(bare_writer(&client, &names, &template))
    };
    for round in 0..ROUNDS {
        let first = (round % 2 == 1).then(bare_writer);
        runtime().block_on(clear(&client));
        let begun = Instant::now();
        let mica = Mica::start(&plane);
        let cold = begun.elapsed();
        let counted = mica.metric("mica_identities{state=\"good\"}");
        assert!(counted >= accounts as f64, "{counted}");
        let (spent, resident, peak) = (
            floor::of_process(mica.child.id()),
            floor::resident(mica.child.id()),
            floor::peak(mica.child.id()),
        );
        mica.stop();
        let bare = first.unwrap_or_else(bare_writer);
        println!(
            "{accounts} accounts, cold: {cold:.1?} beside {bare:.1?} of a bare writer, {:.2} times (at most 1.3); \
             {:.0} us of CPU each; {:.1} MB above the empty process of {:.1} MB, {:.1} MB at most (at most 64)",
            cold.as_secs_f64() / bare.as_secs_f64(),
            floor::each(spent, accounts),
            (resident - empty) as f64 / 1e6,
            empty as f64 / 1e6,
            (peak - empty) as f64 / 1e6,
        );
        ratios.push(cold.as_secs_f64() / bare.as_secs_f64());
    }
    println!("cold, median of {ROUNDS}: {:.2} times a bare writer", floor::middle(&mut ratios));

    let before = asked(&client);
    let begun = Instant::now();
    let mica = Mica::start(&plane);
    let ready = begun.elapsed();
    let after = asked(&client);
    let more = |verb: &str| after.get(verb).unwrap_or(&0) - before.get(verb).unwrap_or(&0);
    println!(
        "a restart: ready after {ready:.1?}, with {} pages of secrets and {} single reads; {} secrets written (at most 0); \
         {:.0} bytes for each account (at most 1500)",
        more("LIST"),
        more("GET"),
        more("POST") + more("PUT"),
        (floor::resident(mica.child.id()) - empty) as f64 / accounts as f64,
    );

    let mut with_mica = runtime().block_on(newcomers(&client, "with-mica", None));
    mica.stop();
    let mut bare = runtime().block_on(newcomers(&client, "bare", Some(&template)));
    let (with_mica, bare) = (floor::middle(&mut with_mica), floor::middle(&mut bare));
    println!(
        "a new account has its secret after {with_mica:.1} ms, median of {NEWCOMERS}; a bare watch that creates one takes \
         {bare:.1} ms: {:.2} times (at most 1.5)",
        with_mica / bare
    );
}

/// `mica serve --kube`, ready.
struct Mica {
    child: Child,
    place: tempfile::TempDir,
}

impl Mica {
    fn start(plane: &ControlPlane) -> Self {
        let place = tempfile::tempdir().unwrap();
        let child = Command::new(floor::program())
            .args(["serve", "--kube", "--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"])
            .arg("--data-dir")
            .arg(place.path().join("data"))
            .env("KUBECONFIG", plane.kubeconfig_of("mica"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(place.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut mica = Self { child, place };
        while !mica.place.path().join("data/addresses.json").exists() {
            if mica.child.try_wait().unwrap().is_some() {
                panic!("{}", fs::read_to_string(mica.place.path().join("log")).unwrap());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        mica
    }

    fn metric(&self, name: &str) -> f64 {
        use std::io::{Read as _, Write as _};
        let addresses: serde_json::Value =
            serde_json::from_slice(&fs::read(self.place.path().join("data/addresses.json")).unwrap())
                .unwrap();
        let mut stream = std::net::TcpStream::connect(addresses["http"].as_str().unwrap()).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap();
        line.parse().unwrap()
    }

    fn stop(mut self) {
        let status = Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success() && self.child.wait().unwrap().success());
    }
}

impl Drop for Mica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn make_accounts(client: &Client, names: &[(String, String)]) {
    for n in 0..NAMESPACES {
        let namespace: Namespace =
            serde_json::from_value(json!({"metadata": {"name": format!("bench-{n}")}})).unwrap();
        Api::all(client.clone()).create(&PostParams::default(), &namespace).await.unwrap();
    }
    let client = client.clone();
    at_once(names, move |(namespace, name)| {
        let client = client.clone();
        async move {
            let account: ServiceAccount =
                serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
            Api::namespaced(client, &namespace).create(&PostParams::default(), &account).await.unwrap();
        }
    })
    .await;
}

/// So many at once as Mica has.
async fn at_once<W>(names: &[(String, String)], work: impl Fn((String, String)) -> W + Clone + Send + 'static)
where
    W: Future<Output = ()> + Send + 'static,
{
    let queue = Arc::new(Mutex::new(names.iter().cloned().collect::<VecDeque<_>>()));
    let mut workers = JoinSet::new();
    for _ in 0..AT_ONCE {
        let (queue, work) = (queue.clone(), work.clone());
        workers.spawn(async move {
            loop {
                let Some(next) = queue.lock().unwrap().pop_front() else { return };
                work(next).await;
            }
        });
    }
    workers.join_all().await;
}

async fn clear(client: &Client) {
    let all: Api<Namespace> = Api::all(client.clone());
    for namespace in all.list(&ListParams::default()).await.unwrap() {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), &namespace.name_any());
        let ours = ListParams::default().fields("type=istio.io/key-and-cert");
        secrets.delete_collection(&DeleteParams::default(), &ours).await.unwrap();
    }
}

/// Reads the accounts and creates a secret for each, with Mica's watches open beside it.
async fn bare_writer(client: &Client, names: &[(String, String)], template: &Secret) -> Duration {
    let begun = Instant::now();
    let mut watches = JoinSet::new();
    let (accounts, pods, secrets) = (client.clone(), client.clone(), client.clone());
    let (listed, is_listed) = tokio::sync::oneshot::channel();
    watches.spawn(async move {
        let api: Api<PartialObjectMeta<ServiceAccount>> = Api::all(accounts);
        let mut listed = Some(listed);
        let mut events = std::pin::pin!(watcher(api, watcher::Config::default()));
        while let Some(event) = events.next().await {
            if matches!(event, Ok(watcher::Event::InitDone))
                && let Some(listed) = listed.take()
            {
                let _ = listed.send(());
            }
        }
    });
    watches.spawn(async move {
        let mut events = std::pin::pin!(watcher(Api::<Pod>::all(pods), watcher::Config::default()));
        while events.next().await.is_some() {}
    });
    watches.spawn(async move {
        let config = watcher::Config::default().fields("type=istio.io/key-and-cert");
        let mut events = std::pin::pin!(watcher(Api::<Secret>::all(secrets), config));
        while events.next().await.is_some() {}
    });
    is_listed.await.unwrap();
    let (client, template) = (client.clone(), template.clone());
    at_once(names, move |(namespace, name)| {
        let (client, secret) = (client.clone(), like(&template, &name));
        async move {
            Api::namespaced(client, &namespace).create(&PostParams::default(), &secret).await.unwrap();
        }
    })
    .await;
    begun.elapsed()
}

fn like(template: &Secret, account: &str) -> Secret {
    let mut secret = template.clone();
    let metadata = &template.metadata;
    secret.metadata = kube::core::ObjectMeta {
        name: Some(format!("istio.{account}")),
        annotations: metadata.annotations.clone(),
        labels: metadata.labels.clone(),
        // The garbage collector does not run here.
        owner_references: metadata.owner_references.clone(),
        ..kube::core::ObjectMeta::default()
    };
    secret
}

/// How long each newcomer waits for its secret, in milliseconds. Without a template somebody else creates it.
async fn newcomers(client: &Client, prefix: &str, template: Option<&Secret>) -> Vec<f64> {
    let namespace = "bench-0";
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let mut creating = JoinSet::new();
    if let Some(template) = template {
        let (template, secrets, all) = (
            template.clone(),
            secrets.clone(),
            Api::<PartialObjectMeta<ServiceAccount>>::all(client.clone()),
        );
        creating.spawn(async move {
            let mut events = std::pin::pin!(watcher(all, watcher::Config::default()));
            while let Some(event) = events.next().await {
                if let Ok(watcher::Event::Apply(account)) = event {
                    let secret = like(&template, &account.name_any());
                    secrets.create(&PostParams::default(), &secret).await.unwrap();
                }
            }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    let from = secrets.list(&ListParams::default().limit(1)).await.unwrap();
    let version = from.metadata.resource_version.unwrap();
    let mut events = std::pin::pin!(secrets.watch(&WatchParams::default(), &version).await.unwrap());
    let mut waits = Vec::new();
    for n in 0..NEWCOMERS {
        let name = format!("{prefix}-{n}");
        let account: ServiceAccount = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
        let begun = Instant::now();
        accounts.create(&PostParams::default(), &account).await.unwrap();
        loop {
            match events.next().await.unwrap().unwrap() {
                WatchEvent::Added(secret) if secret.name_any() == format!("istio.{name}") => break,
                _ => {}
            }
        }
        waits.push(begun.elapsed().as_secs_f64() * 1e3);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    waits
}

/// How often the API server was asked for something about secrets, by verb.
fn asked(client: &Client) -> BTreeMap<String, u64> {
    let request =
        kube::core::Request::new("").get("metrics", &kube::core::params::GetParams::default()).unwrap();
    let page = runtime().block_on(client.request_text(request)).unwrap();
    let mut found = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
        if line.contains("resource=\"secrets\"") {
            let verb = line.split("verb=\"").nth(1).unwrap().split('"').next().unwrap();
            let count = line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
            *found.entry(verb.to_owned()).or_default() += count as u64;
        }
    }
    found
}
