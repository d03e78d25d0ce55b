//! What delivering costs beside its floor, a plain loop that writes the same files in the same atomic way: CPU time of
//! the process, in turns within one run. `cargo bench --bench deliver`; with `TMPDIR=/dev/shm` without the disk's part.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a bench may fail, and its floor writes as any program would"
)]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use mica::core::plan::CertificateSet;
use mica::core::spiffe::ServiceAccount;
use mica::sink::Sink as _;
use mica::sink::folder::FolderSink;
use mica::sys::dir::{Access, Dir};

const ROUNDS: usize = 7;
const ACCOUNTS: usize = 2_000;
const MANY: usize = 20_000;
const NAMESPACES: usize = 100;

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let set = CertificateSet {
        chain_pem: "c".repeat(1500),
        key_pem: "k".repeat(241).into(),
        roots_pem: "r".repeat(700).into(),
    };
    let accounts = named(ACCOUNTS);

    let mut ratios = Vec::new();
    let mut floors = Vec::new();
    let mut renewals = Vec::new();
    for _ in 0..ROUNDS {
        let place = tempfile::tempdir().unwrap();
        let floor = cpu(|| accounts.iter().for_each(|account| plain(place.path(), account, &set)));
        drop(place);

        let place = tempfile::tempdir().unwrap();
        let data = Dir::open_trusted(place.path(), None).unwrap();
        let sink = FolderSink::open(&data, &place.path().join("secrets"), Access::mode(0o600)).unwrap();
        let all = |sink: &FolderSink| {
            runtime.block_on(async {
                for account in &accounts {
                    sink.publish(account, &set).await.unwrap();
                }
            });
        };
        let delivered = cpu(|| {
            runtime.block_on(sink.announce(&accounts)).unwrap();
            all(&sink);
        });
        let renewed = cpu(|| all(&sink));
        floors.push(each(floor, ACCOUNTS));
        renewals.push(each(renewed, ACCOUNTS));
        ratios.push(delivered.as_secs_f64() / floor.as_secs_f64());
    }
    println!(
        "{ACCOUNTS} accounts delivered, against a plain loop: {:.2} times (floor {:.1} us each); a renewal {:.1} us",
        middle(&mut ratios),
        middle(&mut floors),
        middle(&mut renewals)
    );

    let place = tempfile::tempdir().unwrap();
    let data = Dir::open_trusted(place.path(), None).unwrap();
    let secrets = place.path().join("secrets");
    {
        let sink = FolderSink::open(&data, &secrets, Access::mode(0o600)).unwrap();
        let accounts = named(MANY);
        runtime.block_on(async {
            sink.announce(&accounts).await.unwrap();
            for account in &accounts {
                sink.publish(account, &set).await.unwrap();
            }
        });
    }
    let before = memory();
    let mut opened = None;
    let opening = cpu(|| opened = Some(FolderSink::open(&data, &secrets, Access::mode(0o600)).unwrap()));
    let sink = opened.unwrap();
    let reading = cpu(|| {
        runtime.block_on(async {
            for account in sink.recorded() {
                sink.read(&account).await.unwrap();
            }
        });
    });
    let watching = cpu(|| {
        let told =
            runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), sink.disturbed()).await });
        assert!(told.is_err(), "nothing was changed: {:?}", told.unwrap().len());
    });
    println!(
        "{MANY} accounts: {:.0} bytes each; opening {:.1} us, reading {:.1} us, watching {:.1} us each",
        (memory() - before) as f64 / MANY as f64,
        each(opening, MANY),
        each(reading, MANY),
        each(watching, MANY)
    );
    let idle = cpu(|| {
        let _ =
            runtime.block_on(async { tokio::time::timeout(Duration::from_secs(10), sink.disturbed()).await });
    });
    println!("idle for 10 s with {MANY} accounts: {:.4} % of a core", idle.as_secs_f64() * 10.0);
}

fn named(count: usize) -> Vec<ServiceAccount> {
    (0..count)
        .map(|n| {
            ServiceAccount::new(&format!("namespace-{}", n % NAMESPACES), &format!("account-{n}")).unwrap()
        })
        .collect()
}

/// The same names and the same atomic publication, and nothing else.
fn plain(root: &Path, account: &ServiceAccount, set: &CertificateSet) {
    let namespace = root.join(account.namespace());
    let mut folder = fs::DirBuilder::new();
    folder.mode(0o700);
    let _ = folder.create(&namespace);
    let place = namespace.join(format!("istio.{}", account.name()));
    folder.create(&place).unwrap();
    let stamped = "..2026_11_23_05_36_16.123456789";
    folder.create(place.join(stamped)).unwrap();
    for (name, bytes) in [
        ("cert-chain.pem", set.chain_pem.as_bytes()),
        ("key.pem", set.key_pem.as_bytes()),
        ("root-cert.pem", set.roots_pem.as_bytes()),
    ] {
        let path = place.join(stamped).join(name);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
        file.write_all(bytes).unwrap();
        symlink(format!("..data/{name}"), place.join(name)).unwrap();
    }
    symlink(stamped, place.join("..data_tmp")).unwrap();
    fs::rename(place.join("..data_tmp"), place.join("..data")).unwrap();
}

fn each(time: Duration, count: usize) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}

fn middle(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn cpu(work: impl FnOnce()) -> Duration {
    let now = || {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    };
    let start = now();
    work();
    now() - start
}

/// Resident bytes of this process.
fn memory() -> usize {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
