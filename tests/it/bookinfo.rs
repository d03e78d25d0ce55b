//! `examples/bookinfo` from end to end, as somebody runs it who wants to see all of it. What is checked is in the example's
//! own scripts; here it has to hold, and to be able not to.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::cluster::node::Node;
use crate::docs::is_shown;
use crate::serve::wait_for;

/// What takes half a minute on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// It has to have said what the documents show, each of which shows all of it.
fn assert_as_shown<'a>(said: impl Iterator<Item = &'a str>) {
    let good = |line: &&str| line.starts_with("ok  ") || *line == "all of it holds";
    let said: Vec<_> = said.filter(good).collect();
    for document in ["README.md", "examples/bookinfo/README.md"] {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(document)).unwrap();
        let shown: Vec<_> = text.lines().filter(good).collect();
        let same =
            said.len() == shown.len() && said.iter().zip(&shown).all(|(line, shown)| is_shown(line, shown));
        assert!(same && shown.len() > 5, "{said:#?}\n{document} shows\n{shown:#?}");
    }
}

fn command(name: &str) -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/bookinfo").join(name))
}

/// One that was started for a test; it goes when its standard input is closed.
struct Bookinfo {
    state: tempfile::TempDir,
    running: Child,
    held: Option<ChildStdin>,
    said: Vec<String>,
}

impl Bookinfo {
    /// Starts it, and waits until everything was checked.
    fn start(arguments: &[&str]) -> Self {
        let state = tempfile::Builder::new().prefix("bookinfo-").tempdir().unwrap();
        let mut running = command("up")
            .args(arguments)
            .args(["--until-eof", "--mica", env!("CARGO_BIN_EXE_mica"), "--ttl", "30s"])
            .env("BOOKINFO", state.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(state.path().join("errors")).unwrap())
            .spawn()
            .unwrap();
        let held = running.stdin.take();
        let (send, lines) = mpsc::channel();
        let output = BufReader::new(running.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                eprintln!("{line}");
                let _ = send.send(line);
            }
        });
        let mut bookinfo = Self { state, running, held, said: Vec::new() };
        let begun = Instant::now();
        while let Ok(line) = lines.recv_timeout(PATIENCE.saturating_sub(begun.elapsed())) {
            if line == "Until standard input ends." {
                return bookinfo;
            }
            bookinfo.said.push(line);
        }
        panic!("{:?} {}", bookinfo.running.try_wait(), bookinfo.errors());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.state.path().join(name)
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.path("errors")).unwrap_or_default()
    }

    /// Checks all of it once more: what was said.
    fn check(&self) -> Result<String, String> {
        let done = command("check").env("BOOKINFO", self.state.path()).stdin(Stdio::null()).output().unwrap();
        match done.status.success() {
            true => Ok(String::from_utf8_lossy(&done.stdout).into_owned()),
            false => Err(String::from_utf8_lossy(&done.stderr).into_owned()),
        }
    }

    /// The processes that it has started.
    fn processes(&self) -> Vec<u32> {
        let files = fs::read_dir(self.path("run")).unwrap().map(|entry| entry.unwrap().path());
        let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "process"));
        let number =
            |path: PathBuf| fs::read_to_string(path).unwrap().split(' ').next().unwrap().parse().unwrap();
        files.map(number).collect()
    }

    /// Closes its standard input, and waits until it has ended.
    fn end(mut self) {
        drop(self.held.take());
        let status = wait_for(Duration::from_secs(60), "the end", || self.running.try_wait().unwrap());
        assert!(status.success(), "{}", self.errors());
    }
}

impl Drop for Bookinfo {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for entry in fs::read_dir(self.path("logs")).into_iter().flatten().flatten() {
                let text = fs::read_to_string(entry.path()).unwrap_or_default();
                let last: Vec<_> = text.lines().rev().take(20).collect();
                eprintln!("--- {}", entry.file_name().display());
                last.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
        drop(self.held.take());
        let _ = self.running.wait();
    }
}

#[test]
fn bookinfo_runs_as_processes_under_mutual_tls() {
    // Loopback addresses that another run beside this one does not have.
    let number = std::process::id();
    let network = format!("127.{}.{}", 100 + number % 100, number / 100 % 250);
    let bookinfo = Bookinfo::start(&["--network", &network]);
    assert_as_shown(bookinfo.said.iter().map(String::as_str));
    let processes = bookinfo.processes();
    // An authority, six services with an agent and an Envoy each, Zipkin, Prometheus.
    assert_eq!(processes.len(), 21, "{processes:?}");

    // One that lets in too many is found out.
    let callers = bookinfo.path("sidecars/ratings/callers");
    let text = fs::read_to_string(callers.join("callers.yaml")).unwrap();
    let one = text.lines().find(|line| line.contains("sa/reviews-v2\"")).unwrap();
    let text = text.replace(one, &format!("{one}\n{}", one.replace("reviews-v2", "reviews-v1")));
    fs::write(callers.join("new"), text).unwrap();
    fs::rename(callers.join("new"), callers.join("callers.yaml")).unwrap();
    let found = wait_for(Duration::from_secs(60), "a fault that is found", || bookinfo.check().err());
    assert!(found.contains("reviews-v1 asked ratings and was answered 200 instead of 403"), "{found}");

    bookinfo.end();
    for process in processes {
        assert!(!Path::new(&format!("/proc/{process}")).exists(), "{process} still runs");
    }
}

#[test]
fn bookinfo_runs_in_a_cluster_under_mutual_tls() {
    let node = Node::start();
    let state = tempfile::Builder::new().prefix("bookinfo-").tempdir().unwrap();
    let mut up = command("up");
    up.args(["--cluster", "--mica", env!("CARGO_BIN_EXE_mica"), "--ttl", "1m"]);
    up.env("BOOKINFO", state.path()).env("MICA_CLUSTER", node.folder()).stdin(Stdio::null());
    let done = up.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    eprintln!("{said}{}", String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success());
    assert_as_shown(said.lines());
    // Nothing was started anew on the way.
    let restarts = node.kubectl(&[
        "get",
        "pods",
        "--all-namespaces",
        "--output=jsonpath={.items[*].status.containerStatuses[*].restartCount}",
    ]);
    assert!(restarts.split(' ').all(|count| count == "0"), "{restarts}");
}
