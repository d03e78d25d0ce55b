//! The CSR API of the built program, as its clients see it: grpcurl, one made of istio.io/api, Mica's own.

mod client;
mod command;
mod grpcurl;
mod impostor;
mod istio;
mod peers;
mod rotation;
mod token;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::parts;
use crate::serve::{Mica, Place, output_within};

/// Whose certificates are asked for.
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// What a foreign client said.
#[derive(Debug)]
#[expect(dead_code, reason = "what went wrong is shown when a test fails")]
struct Said {
    code: i32,
    json: Value,
    stderr: String,
}

impl Said {
    /// Reads the text of a field.
    fn text(&self, field: &str) -> &str {
        self.json[field].as_str().unwrap_or_else(|| panic!("no {field} in {self:?}"))
    }
}

/// A Mica with the account `shop/web`, and the folder that is delivered to it.
fn start(arguments: &[&str]) -> (Place, Mica, PathBuf) {
    let place = Place::new();
    place.account("web");
    let mica = place.start(arguments);
    place.leaf("web");
    let folder = place.folder("shop", "web");
    (place, mica, folder)
}

fn roots(place: &Place) -> PathBuf {
    place.data().join("root-cert.pem")
}

/// The client made of istio.io/api, asking this Mica.
fn istio_command(place: &Place, mica: &Mica, verb: &str) -> Command {
    let mut command = Command::new(parts::istio_client());
    command.arg(verb).args(["--address", &mica.address("grpc"), "--roots"]).arg(roots(place));
    command.stdin(Stdio::null());
    command
}

fn istio(place: &Place, mica: &Mica, verb: &str, arguments: &[&str]) -> Said {
    said(istio_command(place, mica, verb).args(arguments))
}

/// As the one whose folder it is; it has to be granted.
fn istio_grants(place: &Place, mica: &Mica, verb: &str, folder: &Path, arguments: &[&str]) -> Said {
    let said = said(
        istio_command(place, mica, verb)
            .arg("--certificate")
            .arg(folder)
            .args(["--expect", WEB])
            .args(arguments),
    );
    assert_eq!(said.code, 0, "{verb} {arguments:?}: {said:?}");
    said
}

/// As the one whose folder it is; it has to be refused like this.
fn istio_refuses(
    place: &Place,
    mica: &Mica,
    verb: &str,
    folder: &Path,
    arguments: &[&str],
    how: (&str, &str),
) {
    let said = said(istio_command(place, mica, verb).arg("--certificate").arg(folder).args(arguments));
    assert_eq!(said.code, 1, "{verb} {arguments:?}: {said:?}");
    assert_eq!((said.text("code"), said.text("reason")), how, "{verb} {arguments:?}: {said:?}");
    assert_eq!(said.text("domain"), "mica.dev");
    assert!(!said.text("message").is_empty());
}

fn said(command: &mut Command) -> Said {
    let output = output_within(command, Duration::from_secs(30));
    let stdout = String::from_utf8_lossy(&output.stdout);
    Said {
        code: output.status.code().unwrap_or(-1),
        json: serde_json::from_str(stdout.trim()).unwrap_or(Value::Null),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// `mica csr request`, asking this Mica.
fn request(place: &Place, arguments: &[&str]) -> crate::mica::Done {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
    command.args(["csr", "request", "--data-dir"]).arg(place.data()).args(arguments);
    output_within(command.current_dir(place.root.path()).stdin(Stdio::null()), Duration::from_secs(30)).into()
}
