//! The gRPC port as foreign clients see it: gRPC for Go, OpenSSL, and some that only want to be in the way.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::authority::{Brought, P256};
use super::{Mica, Place, output_within, wait_for};
use crate::parts;

fn health(place: &Place, mica: &Mica, arguments: &[&str]) -> Command {
    let mut command = Command::new(parts::go_spiffe());
    command.arg("health").arg(mica.address("grpc"));
    command.arg("--roots").arg(place.data().join("root-cert.pem")).args(arguments);
    command
}

pub(super) fn asked(place: &Place, mica: &Mica, arguments: &[&str]) -> Output {
    output_within(&mut health(place, mica, arguments), Duration::from_secs(20))
}

fn is_serving(place: &Place, mica: &Mica) {
    let output = asked(place, mica, &["--name", "istiod.istio-system.svc"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "SERVING\n", "{output:?}");
}

/// Ends with the test.
struct Watching {
    child: Child,
    answers: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Watching {
    fn start(place: &Place, mica: &Mica) -> Self {
        let mut command = health(place, mica, &["--name", "localhost", "--watch"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut watching = Self { child, answers };
        assert_eq!(watching.answers.next().unwrap().unwrap(), "SERVING");
        watching
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_foreign_client_hears_of_health_by_every_name_and_by_tls_1_2_and_1_3() {
    let place = Place::new();
    let mica = place.start(&[]);
    for name in [
        "istiod.istio-system.svc",
        "istio-ca",
        "istio-ca.istio-system.svc",
        "localhost",
        "127.0.0.1",
        "[::1]",
    ] {
        for version in [&[][..], &["--tls12"]] {
            let output = asked(&place, &mica, &[&["--name", name], version].concat());
            assert_eq!(String::from_utf8_lossy(&output.stdout), "SERVING\n", "{name} {version:?} {output:?}");
        }
    }
    let output = asked(&place, &mica, &["--name", "example.org"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("example.org"));
    let output = asked(&place, &mica, &["--name", "localhost", "--service", "x"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("NotFound"), "{output:?}");
    let mut openssl = parts::openssl();
    openssl.args(["s_client", "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0", "-connect", &mica.address("grpc")]);
    let output = output_within(openssl.stdin(Stdio::null()), Duration::from_secs(10));
    assert!(String::from_utf8_lossy(&output.stderr).contains("alert"), "{output:?}");
    mica.stop();
}

#[test]
fn a_client_that_watches_does_not_hold_up_the_stop() {
    let place = Place::new();
    let mica = place.start(&[]);
    let mut watching = Watching::start(&place, &mica);
    let started = Instant::now();
    let log = mica.log_path();
    mica.stop();
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(!std::fs::read_to_string(log).unwrap().contains("without waiting"));
    assert!(watching.answers.next().is_none());
}

#[test]
fn a_new_issuer_reaches_new_connections_and_leaves_those_that_live() {
    let (place, brought) = (Place::new(), Brought::new());
    let folder = brought.intermediate("one", &P256, "30");
    let mica = place.start(&["--authority", folder.to_str().unwrap()]);
    let shown = || {
        let mut openssl = parts::openssl();
        openssl.args(["s_client", "-showcerts", "-connect", &mica.address("grpc")]);
        let output = output_within(openssl.stdin(Stdio::null()), Duration::from_secs(10));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let mut watching = Watching::start(&place, &mica);
    assert!(shown().contains("CN = one") || shown().contains("CN=one"), "{}", shown());
    brought.intermediate("two", &P256, "30");
    brought.put("two", &folder);
    wait_for(Duration::from_secs(20), "a certificate of the new issuer", || {
        let shown = shown();
        (shown.contains("CN = two") || shown.contains("CN=two")).then_some(())
    });
    is_serving(&place, &mica);
    assert!(watching.child.try_wait().unwrap().is_none());
    mica.stop();
}

fn in_the_way(address: SocketAddr, n: usize) -> TcpStream {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20)).unwrap();
    let said: &[u8] = match n % 4 {
        0 => b"",
        1 => b"GET / HTTP/1.1\r\n\r\n",
        // The beginning of a hello of TLS that never goes on.
        2 => &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3],
        _ => &[0xff; 64],
    };
    let _ = stream.write_all(said);
    stream
}

#[test]
fn silent_and_babbling_clients_do_not_keep_others_out() {
    let place = Place::new();
    let mica = place.start(&[]);
    let address: SocketAddr = mica.address("grpc").parse().unwrap();
    let started = Instant::now();
    // Where the queue of the kernel is full for a moment, a client waits a second: so many at a time.
    let crowd: Vec<_> = (0..20)
        .map(|_| std::thread::spawn(move || (0..500).map(|n| in_the_way(address, n)).collect::<Vec<_>>()))
        .collect();
    let crowd: Vec<_> = crowd.into_iter().flat_map(|part| part.join().unwrap()).collect();
    eprintln!("10,000 connections in {:?}", started.elapsed());
    let started = Instant::now();
    is_serving(&place, &mica);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    place.account("web");
    place.wait_for_account("web", Duration::from_secs(2));
    drop(crowd);
    mica.stop();
}

#[test]
fn slow_clients_of_either_port_leave_mica_the_files_it_needs() {
    let place = Place::new();
    place.account("web");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 256 && exec \"$0\" \"$@\""]);
    command.arg(place.command().get_program()).args(place.command().get_args());
    let mica = place.start_command(command.stdin(Stdio::null()));
    let mut crowd = Vec::new();
    for of in ["grpc", "http"] {
        let address: SocketAddr = mica.address(of).parse().unwrap();
        for _ in 0..400 {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).unwrap();
            let _ = stream.write_all(b"GET /livez HTTP/1.1\r\n");
            crowd.push(stream);
        }
    }
    place.account("db");
    place.wait_for_account("db", Duration::from_secs(2));
    is_serving(&place, &mica);
    assert_eq!(mica.page("/readyz").0, 200);
    // Those that are still there are sent away.
    let last = crowd.last_mut().unwrap();
    last.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert!(matches!(last.read(&mut [0; 64]), Ok(0) | Err(_)));
    assert!(!mica.log().contains("cannot accept"));
    mica.stop();
}
