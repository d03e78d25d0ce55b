//! The SPIFFE Workload API, to clients that others wrote, and on bad days.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use super::{command, resident, start, token};
use crate::parts;
use crate::serve::{Place, wait_for};

const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/server";

/// A workload of somebody's library: it makes requests to itself all the time.
struct Workload {
    library: &'static str,
    child: Child,
    told: BufReader<ChildStdout>,
}

/// What a workload has had; all of it was good.
struct Had {
    requests: u64,
    /// Certificates.
    serials: u64,
    tokens: u64,
    /// Tokens that could not be fetched, because nobody answered.
    missed: u64,
}

impl Workload {
    fn of_go_spiffe(socket: &Path) -> Self {
        let mut command = Command::new(parts::go_spiffe());
        command.arg("workload");
        Self::start("go-spiffe", command, socket)
    }

    fn of_each_library(socket: &Path) -> [Self; 3] {
        [
            Self::of_go_spiffe(socket),
            Self::start("py-spiffe", Command::new(parts::py_spiffe()), socket),
            Self::start("rust-spiffe", Command::new(parts::rust_spiffe()), socket),
        ]
    }

    fn start(library: &'static str, mut command: Command, socket: &Path) -> Self {
        command.args(["--audience", "somebody"]).arg(socket);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let told = BufReader::new(child.stdout.take().unwrap());
        Self { library, child, told }
    }

    fn ask(&mut self) -> Had {
        let library = self.library;
        let asked = self.child.stdin.as_mut().unwrap().write_all(b"\n");
        let mut line = String::new();
        self.told.read_line(&mut line).unwrap();
        assert!(asked.is_ok() && line.starts_with(&format!("id={SERVER} ")), "{library} ended: {line:?}");
        let number = |name: &str| -> u64 {
            let found = line.split(' ').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
            found.unwrap_or_else(|| panic!("{library}: no {name} in {line:?}")).trim().parse().unwrap()
        };
        Had {
            requests: number("requests"),
            serials: number("serials"),
            tokens: number("tokens"),
            missed: number("missed"),
        }
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
fn ten_rotations_fail_no_request_of_three_libraries() {
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
    let mut workloads = Workload::of_each_library(&socket);
    let mut each_has = |what: &str, enough: &dyn Fn(usize, &Had) -> bool| {
        for (number, workload) in workloads.iter_mut().enumerate() {
            let what = format!("{what} of {}", workload.library);
            wait_for(Duration::from_secs(60), &what, || enough(number, &workload.ask()).then_some(()));
        }
        workloads.each_mut().map(Workload::ask)
    };
    for had in each_has("certificates", &|_, had| had.serials >= 4) {
        assert_eq!(had.missed, 0);
    }
    agent.kill();
    assert!(socket.exists(), "it is left over");
    let agent = start(&place, "agent", &mut begin);
    // Each library comes back in its own time: until then its tokens, and nothing else, are missing.
    let killed = each_has("more certificates", &|_, _| true);
    let back = each_has("more certificates and tokens", &|number, had| {
        had.serials >= 7 && had.tokens >= killed[number].tokens + 20
    });
    mica.kill();
    std::thread::sleep(Duration::from_secs(2));
    let _mica = place.start_at(&grpc, &flags);
    let last = each_has("the last certificates", &|_, had| had.serials >= 11);
    for (back, last) in back.iter().zip(&last) {
        assert_eq!(back.missed, last.missed, "the authority is not needed for a token that is held");
        assert!(
            last.requests > 100 && last.tokens > 100,
            "{} requests, {} tokens",
            last.requests,
            last.tokens
        );
    }
    for workload in workloads {
        workload.end();
    }
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
    let mut workload = Workload::of_go_spiffe(&socket);
    wait_for(Duration::from_secs(60), "requests", || (workload.ask().requests >= 10).then_some(()));
    workload.end();
    let resident = resident(agent.pid());
    drop(held);
    assert!(resident < 200 << 20, "{resident} bytes are resident");
    agent.stop();
}
