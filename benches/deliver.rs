//! What delivering costs beside its floor, a plain loop that writes the same files in the same atomic way: CPU time of
//! the process, in turns within one run. `cargo bench --bench deliver`; with `TMPDIR=/dev/shm` without the disk's part.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a bench may fail, and its floor writes as any program would"
)]

mod floor;

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
        let written =
            floor::cpu(|| accounts.iter().for_each(|account| floor::write(place.path(), account, &set)));
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
        let delivered = floor::cpu(|| {
            runtime.block_on(sink.announce(&accounts)).unwrap();
            all(&sink);
        });
        let renewed = floor::cpu(|| all(&sink));
        floors.push(floor::each(written, ACCOUNTS));
        renewals.push(floor::each(renewed, ACCOUNTS));
        ratios.push(delivered.as_secs_f64() / written.as_secs_f64());
    }
    println!(
        "{ACCOUNTS} accounts delivered, against a plain loop: {:.2} times (floor {:.1} us each); a renewal {:.1} us",
        floor::middle(&mut ratios),
        floor::middle(&mut floors),
        floor::middle(&mut renewals)
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
    let before = floor::resident(std::process::id());
    let mut opened = None;
    let opening =
        floor::cpu(|| opened = Some(FolderSink::open(&data, &secrets, Access::mode(0o600)).unwrap()));
    let sink = opened.unwrap();
    let reading = floor::cpu(|| {
        runtime.block_on(async {
            for account in sink.recorded() {
                sink.read(&account).await.unwrap();
            }
        });
    });
    let watching = floor::cpu(|| {
        let told =
            runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), sink.disturbed()).await });
        assert!(told.is_err(), "nothing was changed: {:?}", told.unwrap().len());
    });
    println!(
        "{MANY} accounts: {:.0} bytes each; opening {:.1} us, reading {:.1} us, watching {:.1} us each",
        (floor::resident(std::process::id()) - before) as f64 / MANY as f64,
        floor::each(opening, MANY),
        floor::each(reading, MANY),
        floor::each(watching, MANY)
    );
    let idle = floor::cpu(|| {
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
