//! The SPIFFE Workload API, to clients that others wrote, and on bad days.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use super::{command, start, token};
use crate::parts;
use crate::serve::{Place, wait_for};

const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

/// A workload of go-spiffe's: it makes requests to itself all the time.
struct Workload {
    child: Child,
    told: BufReader<ChildStdout>,
}

impl Workload {
    fn start(socket: &Path) -> Self {
        let mut child = Command::new(parts::go_spiffe())
            .args(["workload", "--audience", "somebody"])
            .arg(socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let told = BufReader::new(child.stdout.take().unwrap());
        Self { child, told }
    }

    /// How many requests there were, over how many certificates, and how many tokens; all of them were good.
    fn ask(&mut self) -> (u64, u64, u64) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        let mut line = String::new();
        self.told.read_line(&mut line).unwrap();
        let number = |name: &str| -> u64 {
            let found = line.split(' ').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
            found.unwrap_or_else(|| panic!("go-spiffe ended: {line:?}")).trim().parse().unwrap()
        };
        assert!(line.starts_with(&format!("id={SERVER} ")), "{line}");
        (number("requests"), number("serials"), number("tokens"))
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ten_rotations_fail_no_request_of_go_spiffes_sources() {
    let place = Place::new();
    place.account("server");
    let flags = ["--ttl", "10s", "--trial-tokens"];
    let mica = place.start(&flags);
    let grpc = mica.address("grpc");
    let socket = place.root.path().join("agent.sock");
    let token = token(&place, "shop/server");
    let mut begin = command(&place, &mica);
    // The certificate that the agent has outlives the trial token, which the authority forgets when it is killed.
    begin.arg("--socket").arg(&socket).arg("--token-file").arg(token);
    begin.arg("--certificate").arg(place.root.path().join("none"));
    let agent = start(&place, "agent", &mut begin);
    let mut workload = Workload::start(&socket);
    let mut rotated = |serials: u64| {
        wait_for(Duration::from_secs(60), "more certificates", || (workload.ask().1 >= serials).then_some(()))
    };
    rotated(4);
    agent.kill();
    assert!(socket.exists(), "it is left over");
    let agent = start(&place, "agent", &mut begin);
    rotated(7);
    mica.kill();
    std::thread::sleep(Duration::from_secs(2));
    let _mica = place.start_at(&grpc, &flags);
    rotated(11);
    let (requests, _, tokens) = workload.ask();
    assert!(requests > 100 && tokens > 100, "{requests} requests, {tokens} tokens");
    workload.end();
    agent.stop();
    assert!(!socket.exists(), "it goes with a clean stop");
}

#[test]
fn ten_thousand_connections_leave_the_socket_to_others() {
    let place = Place::new();
    place.account("server");
    let mica = place.start(&["--trial-tokens"]);
    let socket = place.root.path().join("agent.sock");
    let token = token(&place, "shop/server");
    let mut begin = command(&place, &mica);
    begin.arg("--socket").arg(&socket).arg("--token-file").arg(token);
    let agent = start(&place, "agent", &mut begin);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    assert!(limit.current.is_none_or(|most| most > 4_000), "too few open files for this test: {limit:?}");
    // Half of them at a time, as far as this process may; none of them says anything, some say half of something.
    let mut held = Vec::new();
    for round in 0..10_000 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        if round % 3 == 0 {
            let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        }
        held.push(stream);
        if held.len() >= 3_000 {
            held.drain(..1_000);
        }
    }
    let mut workload = Workload::start(&socket);
    wait_for(Duration::from_secs(60), "requests", || (workload.ask().0 >= 10).then_some(()));
    workload.end();
    let resident = resident(agent.pid());
    drop(held);
    assert!(resident < 200 << 20, "{resident} bytes are resident");
    agent.stop();
}

/// Bytes of memory.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}
