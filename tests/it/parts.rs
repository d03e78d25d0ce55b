//! Where the foreign programs are that judge what Mica made. A missing one fails its tests: a skipped test is a
//! green light nobody earned.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Envoy's program.
pub(crate) fn envoy() -> PathBuf {
    find("envoy")
}

/// OpenSSL's command line.
pub(crate) fn openssl() -> Command {
    Command::new(find("openssl"))
}

/// The program that runs others with another clock.
pub(crate) fn faketime() -> PathBuf {
    find("faketime")
}

/// The program in `tests/parts/go-spiffe`; its head says what it takes.
pub(crate) fn go_spiffe() -> PathBuf {
    find("go-spiffe")
}

/// One of go-spiffe's own examples, such as `spiffe-tls/client`.
pub(crate) fn go_spiffe_example(name: &str) -> PathBuf {
    let first = find("go-spiffe-examples");
    first.ancestors().nth(2).unwrap().join(name)
}

/// The program in `tests/parts/py-spiffe`; its head says what it does.
pub(crate) fn py_spiffe() -> PathBuf {
    find("py-spiffe")
}

/// The program in `tests/parts/rust-spiffe`; its head says what it does.
pub(crate) fn rust_spiffe() -> PathBuf {
    find("rust-spiffe")
}

/// The program in `tests/parts/istio-client`, made of istio.io/api and grpc-go; its head says what it takes.
pub(crate) fn istio_client() -> PathBuf {
    find("istio-client")
}

/// The command line for gRPC.
pub(crate) fn grpcurl() -> PathBuf {
    find("grpcurl")
}

/// Zipkin: where it listens is in the environment variable `QUERY_PORT`.
pub(crate) fn zipkin() -> PathBuf {
    find("zipkin")
}

/// A collector of the OpenTelemetry project's, `tests/parts/otel-collector`; its head says what it takes.
pub(crate) fn otel_collector() -> PathBuf {
    find("otel-collector")
}

/// A program of Kubernetes' control plane, etcd among them.
pub(crate) fn kubernetes(name: &str) -> PathBuf {
    find("kubernetes").with_file_name(name)
}

fn find(name: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parts/part");
    let output = Command::new(&script)
        .args(["path", name])
        .output()
        .unwrap_or_else(|error| panic!("{}: {error}", script.display()));
    assert!(
        output.status.success(),
        "{name} is missing: run tests/run parts\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}

#[test]
fn every_part_is_there_and_runs() {
    let of_a_node = |name| Command::new(find("kubernetes-node").with_file_name(name));
    for (mut program, argument) in [
        (Command::new(envoy()), "--version"),
        (openssl(), "version"),
        (Command::new(go_spiffe()), "id"),
        (Command::new(py_spiffe()), "--help"),
        (Command::new(faketime()), "--version"),
        (Command::new(grpcurl()), "-version"),
        (Command::new(otel_collector()), "--version"),
        (Command::new(find("java")), "-version"),
        (Command::new(find("prometheus")), "--version"),
        (Command::new(find("prometheus").with_file_name("promtool")), "--version"),
        (Command::new(kubernetes("etcd")), "--version"),
        (Command::new(kubernetes("kube-apiserver")), "--version"),
        (Command::new(kubernetes("kube-controller-manager")), "--version"),
        (of_a_node("kubelet"), "--version"),
        (of_a_node("kube-scheduler"), "--version"),
        (of_a_node("kube-proxy"), "--version"),
        (of_a_node("coredns"), "-version"),
        (of_a_node("pause"), "-v"),
        (Command::new(find("containerd")), "--version"),
    ] {
        let output = program
            .arg(argument)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("{program:?}: {error}"));
        assert!(output.status.success(), "{program:?}: {output:?}");
    }
    // It has no such question, and takes seconds to start.
    assert!(find("zipkin").with_file_name("zipkin.jar").exists());
}
