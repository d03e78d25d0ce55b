//! `mica agent` as its users run it: the built program beside the built authority.

mod clock;
mod conformance;
mod disk;
mod examples;
mod files;
mod unread;
mod workload_api;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::key::PrivateKey;
use mica::proto::spiffe::X509svidRequest;
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::serve::{Mica, Place, output_within, page, wait_for};

/// A running agent, killed when dropped.
pub(crate) struct Agent {
    child: Child,
    log: PathBuf,
    http: String,
}

/// The command `mica agent` for the authority of a place, without a credential.
pub(crate) fn command(place: &Place, mica: &Mica) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.args(["agent", "--http-address", "127.0.0.1:0", "--log-format", "human"]);
    command.args(["--authority-address", &mica.address("grpc")]);
    command.arg("--authority-roots").arg(place.data().join("root-cert.pem"));
    command.stdin(Stdio::null());
    command
}

/// Starts it and waits until it says where it listens. Agents of different names log apart.
pub(crate) fn start(place: &Place, name: &str, command: &mut Command) -> Agent {
    let log = place.root.path().join(format!("{name}.log"));
    // What an earlier one said is not what is waited for.
    let before = fs::read_to_string(&log).unwrap_or_default().len();
    let file = fs::File::options().create(true).append(true).open(&log).unwrap();
    let mut child = command.stdout(Stdio::null()).stderr(file).spawn().unwrap();
    let http = wait_for(Duration::from_secs(20), "the agent's start", || {
        let text = fs::read_to_string(&log).unwrap();
        if let Some(status) = child.try_wait().unwrap() {
            panic!("the agent ended with {status}: {text}");
        }
        let line = text[before..].lines().find(|line| line.contains("agent runs"))?.to_owned();
        Some(line.split("http=").nth(1)?.split(' ').next()?.to_owned())
    });
    Agent { child, log, http }
}

impl Agent {
    pub(crate) fn page(&self, path: &str) -> (u16, String) {
        page(&self.http, path)
    }

    pub(crate) fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.page("/metrics");
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; it has to end well.
    pub(crate) fn stop(mut self) {
        let status = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status().unwrap();
        assert!(status.success());
        let status = wait_for(Duration::from_secs(10), "the end", || self.child.try_wait().unwrap());
        assert_eq!(status.code(), Some(0), "{}", self.log());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

/// A token of the trial issuer, good for an hour, in a file.
pub(crate) fn token(place: &Place, account: &str) -> PathBuf {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.args(["token", "new", account, "--ttl", "1h"]).arg("--data-dir").arg(place.data());
    let output = output_within(command.stdin(Stdio::null()), Duration::from_secs(10));
    assert!(output.status.success(), "{output:?}");
    let path = place.root.path().join(format!("token-{}", account.replace('/', "-")));
    fs::write(&path, output.stdout).unwrap();
    path
}

/// The leaf in a folder, if the set there is one that peers take.
pub(crate) fn leaf_in(folder: &Path) -> Result<Certificate, String> {
    let folder = fs::canonicalize(folder.join("..data")).map_err(|fault| fault.to_string())?;
    let read = |name: &str| fs::read(folder.join(name)).map_err(|fault| format!("{name}: {fault}"));
    let chain = Certificate::all_from_pem(&read("cert-chain.pem")?).map_err(|fault| fault.to_string())?;
    let roots = TrustBundle::from_pem(&read("root-cert.pem")?).map_err(|fault| fault.to_string())?;
    let key = PrivateKey::from_pem(&read("key.pem")?, None, None).map_err(|fault| fault.to_string())?;
    mica::core::chain::verify(&chain, &roots, None, time::OffsetDateTime::now_utc())
        .map_err(|faults| format!("{faults:?}"))?;
    if key.public().spki() != chain[0].spki {
        return Err("another key".to_owned());
    }
    Ok(chain[0].clone())
}

/// Waits until the leaf in a folder is good and not the one with this serial number.
pub(crate) fn wait_for_another(folder: &Path, serial: &str, within: Duration) -> Certificate {
    wait_for(within, "another good set", || leaf_in(folder).ok().filter(|leaf| leaf.serial_text() != serial))
}

/// Bytes of memory of a process.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// A workload that follows its certificate over the socket, on one stream.
struct Follower {
    told: watch::Receiver<Option<Certificate>>,
    _runtime: Runtime,
}

impl Follower {
    fn of(socket: &Path) -> Self {
        let runtime = Runtime::new().unwrap();
        let (tell, told) = watch::channel(None);
        let socket = socket.to_owned();
        runtime.spawn(async move {
            let request = conformance::with_header(X509svidRequest {}, &["true"]);
            let stream = conformance::client(&socket).await.fetch_x509svid(request).await;
            let mut stream = stream.unwrap().into_inner();
            while let Ok(Some(response)) = stream.message().await {
                let chain = conformance::certificates(&response.svids[0].x509_svid);
                tell.send_replace(chain.into_iter().next());
            }
        });
        Self { told, _runtime: runtime }
    }

    /// The serial number of what it has; none before the first and when its stream has ended.
    fn serial(&self) -> Option<String> {
        self.told.has_changed().ok()?;
        self.told.borrow().as_ref().map(Certificate::serial_text)
    }

    fn wait_for_another(&self, serial: &str, within: Duration) -> String {
        wait_for(within, "another certificate over the socket", || {
            self.serial().filter(|found| found != serial)
        })
    }
}
