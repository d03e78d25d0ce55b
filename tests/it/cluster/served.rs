//! `mica serve --kube`, asked over gRPC with the API server's own tokens.

use std::process::{Command, Stdio};
use std::time::Duration;

use super::control_plane::ControlPlane;
use super::knowledge::permitted;
use crate::serve::{Mica, Place, output_within};

/// `mica serve --kube` as its users start it, with the permissions that the documents list.
fn command(place: &Place, plane: &ControlPlane) -> Command {
    permitted(plane);
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.args(["serve", "--kube", "--data-dir"]).arg(place.data());
    command.args(["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]);
    command.env("KUBECONFIG", plane.kubeconfig_of("mica")).stdin(Stdio::null());
    command
}

fn start(place: &Place, plane: &ControlPlane, arguments: &[&str]) -> Mica {
    place.start_command(command(place, plane).args(arguments))
}

#[test]
fn what_a_cluster_cannot_have_is_refused() {
    let (place, plane) = (Place::new(), ControlPlane::shared());
    let refused = |command: &mut Command| {
        let output = output_within(command, Duration::from_secs(20));
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    for (arguments, said) in [
        (&["--secrets", "x"][..], "mica: --secrets is of no use with --kube"),
        (&["--secrets-group", "1"], "mica: --secrets-group is of no use with --kube"),
        (&["manifests"], "mica: the folder manifests and --kube were given"),
    ] {
        let error = refused(command(&place, plane).args(arguments));
        assert!(error.starts_with(said), "{error}");
    }
    let error = refused(
        command(&place, plane).env("KUBECONFIG", place.root.path().join("none")).env("HOME", "/none"),
    );
    assert!(error.starts_with("mica: no API server to ask: ") && error.lines().count() == 1, "{error}");
    // What is in it is nobody's to read in a log.
    let broken = place.root.path().join("broken");
    std::fs::write(&broken, "users:\n- {name: x, user: {token: very-secret}\n").unwrap();
    let error = refused(command(&place, plane).env("KUBECONFIG", &broken));
    assert!(error.starts_with("mica: the kubeconfig cannot be used: "), "{error}");
    assert!(error.lines().count() == 1 && !error.contains("secret"), "{error}");
    assert!(!place.data().exists());
}

#[test]
fn it_is_ready_when_all_accounts_and_pods_are_known() {
    let (place, plane) = (Place::new(), ControlPlane::shared());
    let mica = start(&place, plane, &[]);
    assert_eq!(mica.page("/readyz").0, 200);
    assert!(mica.report().contains("Service accounts of https://127.0.0.1:"), "{}", mica.report());
    mica.stop();
}
