//! The issuer, and with it the serving certificate, is replaced while clients ask.

use std::io::{BufRead as _, BufReader, Lines};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::{istio_command, roots};
use crate::parts;
use crate::serve::authority::{Brought, P256};
use crate::serve::{Mica, Place, output_within, wait_for};

/// A client that asks until it is told to stop, or the test ends.
struct Load {
    child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Load {
    fn start(place: &Place, mica: &Mica, folder: &Path, arguments: &[&str]) -> Self {
        let mut command = istio_command(place, mica, "load");
        command.arg("--certificate").arg(folder).args(arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { input: child.stdin.take(), child, lines }
    }

    fn next(&mut self) -> Value {
        serde_json::from_str(&self.lines.next().unwrap().unwrap()).unwrap()
    }

    /// Waits for certificates of an issuer.
    fn wait_for_issuer(&mut self, name: &str) {
        let issuer = self.next()["issuer"].as_str().unwrap().to_owned();
        assert!(issuer.contains(&format!("CN={name}")), "{issuer}");
    }

    fn stop(mut self) -> Value {
        drop(self.input.take());
        let total = self.next();
        assert!(self.child.wait().unwrap().success(), "{total}");
        total
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The issuer of the serving certificate that a new connection is shown.
fn served_by(place: &Place, mica: &Mica) -> String {
    let mut openssl = parts::openssl();
    openssl.args(["s_client", "-verify_return_error", "-connect", &mica.address("grpc"), "-CAfile"]);
    let output = output_within(openssl.arg(roots(place)).stdin(Stdio::null()), Duration::from_secs(10));
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout).replace("CN = ", "CN=");
    text.lines().find_map(|line| line.strip_prefix("issuer=")).unwrap().to_owned()
}

#[test]
fn three_issuers_in_a_row_fail_no_request_on_kept_connections_or_new_ones() {
    let (place, brought) = (Place::new(), Brought::new());
    place.account("web");
    let authority = brought.intermediate("one", &P256, "30");
    let mica = place.start(&["--authority", authority.to_str().unwrap()]);
    let folder = place.folder("shop", "web");
    let mut kept = Load::start(&place, &mica, &folder, &["--connections", "4", "--in-flight", "4"]);
    let mut fresh = Load::start(&place, &mica, &folder, &["--new-connection-each", "--in-flight", "2"]);
    for load in [&mut kept, &mut fresh] {
        load.wait_for_issuer("one");
    }
    for name in ["two", "three"] {
        brought.intermediate(name, &P256, "30");
        brought.put(name, &authority);
        // Each answer is judged: a leaf of one issuer with the chain of another would not pass.
        for load in [&mut kept, &mut fresh] {
            load.wait_for_issuer(name);
        }
        wait_for(Duration::from_secs(20), "a serving certificate of the new issuer", || {
            served_by(&place, &mica).contains(&format!("CN={name}")).then_some(())
        });
    }
    for (load, least) in [(kept, 100), (fresh, 20)] {
        let total = load.stop();
        assert_eq!(total["failed"], 0, "{total}");
        assert!(total["answered"].as_u64().unwrap() > least, "{total}");
        assert_eq!(total["issuers"].as_object().unwrap().len(), 3, "{total}");
        eprintln!("{total}");
    }
    mica.stop();
}
