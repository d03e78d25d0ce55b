//! What the benches hold Mica against: the signature, the files, and the kernel's own accounts of CPU time.
#![allow(dead_code, reason = "each bench needs some of it")]

use std::ffi::OsString;
use std::fs;
use std::hint::black_box;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use mica::core::plan::CertificateSet;
use mica::core::spiffe::ServiceAccount;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};

/// The program that is measured: the one that cargo builds with the benches, which has what tests need in it, or that of
/// `cargo build --release`, whose path `MICA_PROGRAM` gives.
pub(crate) fn program() -> OsString {
    std::env::var_os("MICA_PROGRAM").unwrap_or_else(|| env!("CARGO_BIN_EXE_mica").into())
}

/// A delivered folder's names and its atomic publication, and nothing else. Nothing is synced, as Mica's is not.
pub(crate) fn write(root: &Path, account: &ServiceAccount, set: &CertificateSet) {
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

/// What a P-256 key and a signature cost with ring.
pub(crate) fn generate_and_sign() -> Duration {
    const ROUNDS: u32 = 20_000;
    let random = SystemRandom::new();
    let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, key.as_ref(), &random).unwrap();
    let spent = cpu(|| {
        for _ in 0..ROUNDS {
            let _ = black_box(EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random));
            let _ = black_box(key.sign(&random, &[7; 300]));
        }
    });
    spent / ROUNDS
}

/// CPU time of this process while it works.
pub(crate) fn cpu(work: impl FnOnce()) -> Duration {
    let now = || {
        let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
    };
    let start = now();
    work();
    now() - start
}

/// CPU time of all children that have ended, in the kernel's ticks of 10 ms.
pub(crate) fn children() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[13].parse::<u64>().unwrap() + fields[14].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

/// CPU time of a living process' threads, exact.
pub(crate) fn of_process(pid: u32) -> Duration {
    fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .map(|task| {
            let text = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap_or_default();
            Duration::from_nanos(text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default())
        })
        .sum()
}

/// Resident bytes of a process.
pub(crate) fn resident(pid: u32) -> u64 {
    status(pid, "VmRSS:")
}

/// The most that was ever resident of a process.
pub(crate) fn peak(pid: u32) -> u64 {
    status(pid, "VmHWM:")
}

fn status(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

pub(crate) fn each(spent: Duration, count: usize) -> f64 {
    spent.as_secs_f64() * 1e6 / count as f64
}

pub(crate) fn middle(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
