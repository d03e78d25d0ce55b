//! kill -9 at any instant: the next start accepts what is there, with the same root, and delivers whole sets.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::{Place, tree, wait_for};

/// Kills at random instants, as the issue that asked for it counts them.
const KILLS: usize = 200;
const ACCOUNTS: usize = 12;

#[test]
fn two_hundred_kills_lose_nothing() {
    let place = Place::new();
    for n in 0..ACCOUNTS {
        place.account(&format!("a{n}"));
    }
    // Short lives, so that renewals are always under way.
    let arguments = ["--ttl", "10s", "--log-level", "error"];
    let mut random = Random(u64::from(std::process::id()) << 32 | 0x9e37_79b9);
    eprintln!("seed {:#x}", random.0);
    let mut roots: Option<String> = None;
    let (mut during_start, mut ran) = (0, 0);
    for n in 0..KILLS {
        // A third of the kills hit the making of the root, in a new data folder.
        if n < KILLS / 3 {
            let _ = fs::remove_dir_all(place.data());
            roots = None;
        }
        let mut child =
            place.command().args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let started = Instant::now();
        // A start takes some tens of milliseconds: most kills hit it, the others what follows.
        let until = Duration::from_micros(random.below(if n % 4 == 0 { 1_500_000 } else { 60_000 }));
        while started.elapsed() < until {
            std::thread::sleep(Duration::from_micros(200));
        }
        if place.data().join("addresses.json").exists() {
            ran += 1;
        } else {
            during_start += 1;
        }
        child.kill().unwrap();
        let ended = child.wait().unwrap();
        assert!(ended.code().is_none(), "kill {n}: mica had ended by itself with {ended}");
        let published = fs::read_to_string(place.data().join("authority/root-cert.pem")).ok();
        if let Some(root) = &roots {
            assert_eq!(published.as_ref(), Some(root), "kill {n}: another root");
        }
        roots = published.or(roots);
        no_partial_set_is_visible(&place);
        if n < KILLS / 3 {
            // The next start must take what this kill left.
            let before = roots.clone();
            let mica = place.start(&arguments);
            let root = place.root_pem();
            assert!(before.is_none_or(|before| before == root), "kill {n}: another root");
            mica.kill();
        }
    }
    eprintln!("{during_start} kills before mica was ready, {ran} after");
    assert!(during_start > 20 && ran > 20, "the kills have to hit both: {during_start}, {ran}");
    let mica = place.start(&arguments);
    assert_eq!(Some(place.root_pem()), roots);
    for n in 0..ACCOUNTS {
        place.wait_for_account(&format!("a{n}"), Duration::from_secs(5));
    }
    let left = tree(&place.data());
    let litter: Vec<_> = left
        .iter()
        .map(|(path, _)| path.strip_prefix(place.data()).unwrap().display().to_string())
        .filter(|path| path.contains("tmp") || path.starts_with('.'))
        .collect();
    assert!(litter.is_empty(), "left over: {litter:?}");
    mica.stop();
}

/// Whoever opens `..data` sees one whole set whose parts belong together, or nothing.
fn no_partial_set_is_visible(place: &Place) {
    for n in 0..ACCOUNTS {
        let account = format!("a{n}");
        if !place.folder("shop", &account).join("..data").exists() {
            continue;
        }
        match place.try_leaf(&account) {
            Ok(_) => {}
            // Ten seconds pass between kills on a slow machine.
            Err(fault) => assert!(fault.contains("expired"), "{account}: {fault}"),
        }
    }
}

#[test]
fn a_lock_dies_with_its_holder() {
    let place = Place::new();
    place.account("web");
    place.start(&[]).kill();
    assert!(place.data().join("addresses.json").exists(), "a killed mica cannot remove it");
    let mut child = place.command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for(Duration::from_secs(5), "the removal or renewal of addresses.json", || {
        let text = fs::read_to_string(place.data().join("addresses.json")).unwrap_or_default();
        let address = serde_json::from_str::<serde_json::Value>(&text).ok()?["http"].as_str()?.to_owned();
        std::net::TcpStream::connect(address).ok()
    });
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Marsaglia's xorshift: reproducible from the printed seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
