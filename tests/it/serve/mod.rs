//! `mica serve` as its users run it: the built program, real folders, real signals.

pub(crate) mod agent;
pub(crate) mod authority;
pub(crate) mod clock;
mod delivery;
pub(crate) mod disk;
pub(crate) mod federation;
mod flood;
mod grpc;
mod kills;
mod lifecycle;
pub(crate) mod mtls;
mod policy;
mod rotation;
mod tokens;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;

pub(crate) use crate::cluster::control_plane::free_port;

/// A contract of seconds gets this much more on a busy machine.
pub(crate) const SLACK: Duration = Duration::from_secs(8);

/// A place to run Mica in: a source folder, a data folder.
pub(crate) struct Place {
    pub(crate) root: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self { root: tempfile::tempdir().unwrap() };
        fs::create_dir(place.source()).unwrap();
        place
    }

    pub(crate) fn source(&self) -> PathBuf {
        self.root.path().join("manifests")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.root.path().join("data")
    }

    pub(crate) fn folder(&self, namespace: &str, account: &str) -> PathBuf {
        self.data().join("secrets").join(namespace).join(format!("istio.{account}"))
    }

    /// Writes a manifest with one account in the namespace `shop`.
    pub(crate) fn account(&self, name: &str) {
        let text =
            format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: shop}}\n");
        fs::write(self.source().join(format!("{name}.yaml")), text).unwrap();
    }

    /// The command `mica serve` for this place, on free ports.
    pub(crate) fn command(&self) -> Command {
        self.command_at("127.0.0.1:0")
    }

    fn command_at(&self, grpc: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        command.arg("serve").arg(self.source()).arg("--data-dir").arg(self.data());
        command.args(["--grpc-address", grpc, "--http-address", "127.0.0.1:0"]);
        command.stdin(Stdio::null());
        command
    }

    /// Starts it where clients of an earlier one look for it.
    pub(crate) fn start_at(&self, grpc: &str, arguments: &[&str]) -> Mica {
        self.start_command(self.command_at(grpc).args(arguments))
    }

    /// Starts it and waits until it says where it listens.
    pub(crate) fn start(&self, arguments: &[&str]) -> Mica {
        self.start_command(self.command().args(arguments))
    }

    pub(crate) fn start_command(&self, command: &mut Command) -> Mica {
        let log = self.root.path().join("log");
        let report = self.root.path().join("report");
        // A killed one leaves it behind, and what is waited for is the new one's.
        let _ = fs::remove_file(self.data().join("addresses.json"));
        let child = command
            .stdout(fs::File::create(&report).unwrap())
            .stderr(fs::File::options().create(true).append(true).open(&log).unwrap())
            .spawn()
            .unwrap();
        let mut mica = Mica { child, data: self.data(), log, report };
        mica.wait_until_listening();
        mica
    }

    /// Runs it to its end, which has to come by itself.
    pub(crate) fn refused(&self, arguments: &[&str]) -> String {
        let output = output_within(self.command().args(arguments), Duration::from_secs(20));
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{error}");
        let last = error.lines().last().unwrap_or_default().to_owned();
        assert!(last.starts_with("mica: "), "{error}");
        last
    }

    pub(crate) fn root_pem(&self) -> String {
        fs::read_to_string(self.data().join("root-cert.pem")).unwrap()
    }

    /// The set delivered for an account of `shop`, judged by the core's verifier.
    pub(crate) fn leaf(&self, account: &str) -> Certificate {
        self.try_leaf(account).unwrap()
    }

    pub(crate) fn try_leaf(&self, account: &str) -> Result<Certificate, String> {
        let folder = self.folder("shop", account).join("..data");
        // Once opened, the set stays the same.
        let folder = fs::canonicalize(folder).map_err(|e| e.to_string())?;
        let read = |name: &str| fs::read(folder.join(name)).map_err(|e| format!("{name}: {e}"));
        let set = mica::core::plan::CertificateSet {
            chain_pem: String::from_utf8(read("cert-chain.pem")?).map_err(|e| e.to_string())?,
            key_pem: String::from_utf8(read("key.pem")?).map_err(|e| e.to_string())?.into(),
            roots_pem: String::from_utf8(read("root-cert.pem")?).map_err(|e| e.to_string())?.into(),
        };
        let roots = fs::read(self.data().join("root-cert.pem")).map_err(|e| e.to_string())?;
        let bundle = TrustBundle::from_pem(&roots).map_err(|e| e.to_string())?;
        let id = format!("spiffe://cluster.local/ns/shop/sa/{account}").parse().unwrap();
        mica::core::plan::judge(&set, &id, &bundle, time::OffsetDateTime::now_utc())?;
        Ok(Certificate::all_from_pem(set.chain_pem.as_bytes()).unwrap().remove(0))
    }

    pub(crate) fn serial(&self, account: &str) -> String {
        self.leaf(account).serial_text()
    }

    /// Waits until an account's set is good and not the one with this serial number.
    pub(crate) fn wait_for_another(&self, account: &str, serial: &str, within: Duration) -> String {
        wait_for(within, &format!("another good set for {account}"), || {
            self.try_leaf(account).ok().map(|leaf| leaf.serial_text()).filter(|found| found != serial)
        })
    }

    pub(crate) fn wait_for_account(&self, account: &str, within: Duration) -> String {
        self.wait_for_another(account, "", within)
    }
}

/// A running Mica, killed when dropped.
pub(crate) struct Mica {
    child: Child,
    data: PathBuf,
    log: PathBuf,
    report: PathBuf,
}

impl Mica {
    fn wait_until_listening(&mut self) {
        let start = Instant::now();
        while !self.data.join("addresses.json").exists() {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("mica ended with {status}: {}", self.log());
            }
            assert!(start.elapsed() < Duration::from_secs(30), "mica does not start: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn address(&self, of: &str) -> String {
        let text = fs::read(self.data.join("addresses.json")).unwrap();
        let addresses: serde_json::Value = serde_json::from_slice(&text).unwrap();
        addresses[of].as_str().unwrap().to_owned()
    }

    /// An HTTP page: its status and its text.
    pub(crate) fn page(&self, path: &str) -> (u16, String) {
        page(&self.address("http"), path)
    }

    /// The value of a metric, by its name with labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.page("/metrics");
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
            .unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.log.clone()
    }

    /// What it said on standard output, in one write, once it had published its addresses.
    pub(crate) fn report(&self) -> String {
        wait_for(Duration::from_secs(10), "the report", || {
            fs::read_to_string(&self.report).ok().filter(|report| !report.is_empty())
        })
    }

    /// Its data folder.
    pub(crate) fn data(&self) -> PathBuf {
        self.data.clone()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How long its threads have worked in all.
    pub(crate) fn worked(&self) -> Duration {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        // A hundred a second on every Linux.
        Duration::from_millis(10 * ticks)
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// SIGTERM; it has to end well.
    pub(crate) fn stop(mut self) {
        self.signal("-TERM");
        let status = wait_for(Duration::from_secs(10), "the end", || self.child.try_wait().unwrap());
        assert_eq!(status.code(), Some(0), "{}", self.log());
        assert!(!self.data.join("addresses.json").exists());
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Mica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

pub(crate) fn page(address: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

pub(crate) fn wait_for<T>(within: Duration, what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(start.elapsed() < within + SLACK, "no {what} within {within:?} and {SLACK:?} more");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub(crate) fn output_within(command: &mut Command, within: Duration) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > within {
            child.kill().unwrap();
            panic!("did not end: {:?}", child.wait_with_output().unwrap());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

/// Everything below a folder but Mica's locks, each with a digest of its contents, to be compared.
pub(crate) fn tree(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let facts = fs::symlink_metadata(&path).unwrap();
            if facts.is_dir() {
                folders.push(path);
            } else if facts.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                found.push((path, format!("-> {}", target.display())));
            } else if !path.ends_with(".mica.lock") && !path.ends_with("lock") {
                let digest = ring::digest::digest(&ring::digest::SHA256, &fs::read(&path).unwrap());
                found.push((path, format!("{digest:?}")));
            }
        }
    }
    found.sort();
    found
}
