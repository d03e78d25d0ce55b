//! What the running program costs: a cold start beside its floor, memory, idling, one changed file, and the way to the
//! first identity. CPU time as the kernel accounts it to the process. `cargo bench --bench serve`; with
//! `TMPDIR=/dev/shm` without the disk's part, which on a busy machine drowns everything else.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

mod floor;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mica::core::plan::CertificateSet;
use mica::core::spiffe::ServiceAccount;

const ACCOUNTS: usize = 10_000;
const MANY: usize = 100_000;
const NAMESPACES: usize = 100;
const STARTS: u32 = 20;

fn main() {
    cold_start();
    first_identity();
    let empty = memory(0);
    let many = memory(MANY);
    let each = (many - empty) as f64 / MANY as f64;
    println!(
        "{MANY} accounts: {each:.0} bytes each above the empty process of {:.1} MB (at most 1500)",
        empty as f64 / 1e6
    );
}

/// All folders of a cold start, beside a plain loop that writes the same files, and a key and a signature an account.
fn cold_start() {
    let mut ratios = Vec::new();
    for _ in 0..3 {
        let place = Place::new(ACCOUNTS);
        let mica = place.start();
        let spent = floor::of_process(mica.id());
        stop(mica);
        let sets = delivered(&place.secrets());
        let written = tempfile::tempdir().unwrap();
        let writing =
            floor::cpu(|| sets.iter().for_each(|(account, set)| floor::write(written.path(), account, set)));
        let signing = floor::generate_and_sign() * ACCOUNTS as u32;
        let ratio = (spent.as_secs_f64() - writing.as_secs_f64()) / signing.as_secs_f64();
        println!(
            "{ACCOUNTS} accounts from a cold start: {:.0} us of CPU each, of which a plain loop that writes the same \
             files takes {:.0}; what is left is {ratio:.2} times a key and a signature ({:.1} us; at most 1.8)",
            floor::each(spent, ACCOUNTS),
            floor::each(writing, ACCOUNTS),
            floor::each(signing, ACCOUNTS),
        );
        ratios.push(ratio);

        let mica = place.start();
        std::thread::sleep(Duration::from_secs(2));
        let before = floor::of_process(mica.id());
        std::thread::sleep(Duration::from_secs(20));
        let idle = floor::of_process(mica.id()) - before;
        println!(
            "idle with {ACCOUNTS} accounts: {:.4} % of a core (at most 0.1)",
            idle.as_secs_f64() / 20.0 * 100.0
        );
        let before = floor::of_process(mica.id());
        let account =
            "kind: ServiceAccount\napiVersion: v1\nmetadata: {name: late, namespace: namespace-7}\n";
        fs::write(place.source().join("late.yaml"), account).unwrap();
        wait(&place.secrets().join("namespace-7/istio.late/..data"));
        std::thread::sleep(Duration::from_millis(500));
        let changed = floor::of_process(mica.id()) - before;
        println!(
            "one more file with one account: {:.2} ms of CPU, delivery included",
            changed.as_secs_f64() * 1e3
        );
        stop(mica);
    }
    println!("cold start, median of three: {:.2} times a key and a signature", floor::middle(&mut ratios));
}

fn first_identity() {
    let before = floor::children();
    for _ in 0..STARTS {
        let place = Place::new(1);
        let mut mica = place.spawn();
        wait(&place.secrets().join("namespace-0/istio.account-0/..data"));
        mica.kill().unwrap();
        mica.wait().unwrap();
    }
    let each = (floor::children() - before) / STARTS;
    println!(
        "from start to the first identity: {:.1} ms of CPU, mean of {STARTS} (at most 50)",
        each.as_secs_f64() * 1e3
    );
}

/// Resident bytes with so many accounts delivered and nothing to do.
fn memory(accounts: usize) -> u64 {
    let place = Place::new(accounts);
    stop(place.start());
    // A restart: what a Mica needs that has been running, without the garbage of having just minted everything.
    let mica = place.start();
    std::thread::sleep(Duration::from_secs(3));
    let resident = floor::resident(mica.id());
    stop(mica);
    resident
}

struct Place {
    root: tempfile::TempDir,
}

impl Place {
    fn new(accounts: usize) -> Self {
        let place = Self { root: tempfile::tempdir().unwrap() };
        fs::create_dir(place.source()).unwrap();
        for namespace in 0..NAMESPACES.min(accounts) {
            let text: String = (namespace..accounts)
                .step_by(NAMESPACES)
                .map(|n| {
                    format!(
                        "apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: account-{n}\n  \
                         namespace: namespace-{namespace}\n---\n"
                    )
                })
                .collect();
            fs::write(place.source().join(format!("namespace-{namespace}.yaml")), text).unwrap();
        }
        place
    }

    fn source(&self) -> PathBuf {
        self.root.path().join("manifests")
    }

    fn secrets(&self) -> PathBuf {
        self.root.path().join("data/secrets")
    }

    fn spawn(&self) -> Child {
        let data = self.root.path().join("data");
        let _ = fs::remove_file(data.join("addresses.json"));
        Command::new(floor::program())
            .arg("serve")
            .arg(self.source())
            .arg("--data-dir")
            .arg(&data)
            .args(["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(self.root.path().join("log")).unwrap())
            .spawn()
            .unwrap()
    }

    fn start(&self) -> Child {
        let mica = self.spawn();
        wait(&self.root.path().join("data/addresses.json"));
        mica
    }
}

fn wait(path: &Path) {
    let mut looks = 0;
    while !path.exists() {
        std::thread::sleep(Duration::from_millis(2));
        looks += 1;
        assert!(looks < 100_000, "{} does not appear", path.display());
    }
}

fn stop(mut mica: Child) {
    let pid = mica.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(mica.wait().unwrap().success());
}

fn delivered(secrets: &Path) -> Vec<(ServiceAccount, CertificateSet)> {
    (0..ACCOUNTS)
        .map(|n| {
            let (namespace, name) = (format!("namespace-{}", n % NAMESPACES), format!("account-{n}"));
            let folder = secrets.join(&namespace).join(format!("istio.{name}"));
            let read = |file: &str| fs::read_to_string(folder.join(file)).unwrap();
            let set = CertificateSet {
                chain_pem: read("cert-chain.pem"),
                key_pem: read("key.pem").into(),
                roots_pem: read("root-cert.pem").into(),
            };
            (ServiceAccount::new(&namespace, &name).unwrap(), set)
        })
        .collect()
}
