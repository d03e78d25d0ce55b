//! go-spiffe and Go's crypto/x509 as judges; and the proof that they do refuse.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::fixtures::{OpensslCa, deliver};
use crate::parts;

/// Loads and verifies a delivered folder, for servers and for clients; panics when it is refused.
pub(crate) fn accepts(folder: &Path, id: &str) -> String {
    let output = svid(folder, id);
    assert!(output.status.success(), "{}", errors(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What is in a bundle, for example `x509_authorities=2 jwt_authorities=0 sequence=3 refresh_hint=300`; panics when
/// it is refused.
pub(crate) fn bundle(file: &Path, trust_domain: &str, options: &[&str]) -> String {
    let output = program()
        .args(["bundle", "--trust-domain", trust_domain])
        .args(options)
        .arg(file)
        .output()
        .expect("go-spiffe runs");
    assert!(output.status.success(), "{}", errors(&output));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// For each text, whether go-spiffe takes it for a SPIFFE ID. No text may hold a line break.
pub(crate) fn takes_ids(texts: &[&str]) -> Vec<bool> {
    let mut child =
        program().arg("id").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("go-spiffe runs");
    let mut input = child.stdin.take().expect("a pipe");
    let lines = texts.join("\n") + "\n";
    let writer = std::thread::spawn(move || input.write_all(lines.as_bytes()));
    let output = child.wait_with_output().expect("go-spiffe ends");
    writer.join().expect("a thread").expect("all was read");
    let answers: Vec<bool> =
        String::from_utf8_lossy(&output.stdout).lines().map(|line| line.starts_with("ok ")).collect();
    assert_eq!(answers.len(), texts.len(), "{}", errors(&output));
    answers
}

/// An HTTPS server on the loopback address that lets one identity in; it ends with this value.
pub(crate) struct Server {
    child: Child,
    pub(crate) url: String,
}

impl Server {
    pub(crate) fn start(folder: &Path, allowed: &str) -> Self {
        let mut child = program()
            .arg("serve")
            .arg(folder)
            .args(["--allow", allowed])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("go-spiffe runs");
        let mut url = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut url).expect("a line");
        let url = url.trim().to_owned();
        assert!(url.starts_with("https://127.0.0.1:"), "{url:?}");
        Self { child, url }
    }

    /// One request with another delivered folder; `Ok` is the identity that the server saw.
    pub(crate) fn get(&self, folder: &Path, server_id: &str) -> Result<String, String> {
        let output = program()
            .arg("get")
            .arg(folder)
            .args([&self.url, "--server-id", server_id])
            .output()
            .expect("go-spiffe runs");
        let text = String::from_utf8_lossy(&output.stdout);
        match text.trim().strip_prefix("200 ") {
            Some(caller) if output.status.success() => Ok(caller.to_owned()),
            _ => Err(errors(&output)),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn svid(folder: &Path, id: &str) -> Output {
    program().arg("svid").arg(folder).args(["--id", id]).output().expect("go-spiffe runs")
}

fn program() -> Command {
    Command::new(parts::go_spiffe())
}

fn errors(output: &Output) -> String {
    format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr))
}

#[test]
fn it_accepts_a_sound_folder_and_refuses_a_foreign_root_and_another_identity() {
    const ID: &str = "spiffe://fixture/ns/a/sa/b";
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut set = OpensslCa::new().issue(ID);
    deliver(folder.path(), &set);
    assert!(accepts(folder.path(), ID).contains(&format!("serial={}", set.serial)));
    assert!(!svid(folder.path(), "spiffe://fixture/ns/a/sa/c").status.success());

    let roots = folder.path().join("root-cert.pem");
    assert_eq!(bundle(&roots, "fixture", &["--pem"]), "x509_authorities=1");

    set.roots = OpensslCa::new().issue(ID).roots;
    deliver(folder.path(), &set);
    assert!(!svid(folder.path(), ID).status.success());
}

#[test]
fn two_folders_talk_over_mutual_tls() {
    const A: &str = "spiffe://fixture/ns/a/sa/a";
    const B: &str = "spiffe://fixture/ns/a/sa/b";
    let ca = OpensslCa::new();
    let [a, b] = [A, B].map(|id| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        deliver(folder.path(), &ca.issue(id));
        folder
    });
    let server = Server::start(a.path(), B);
    assert_eq!(server.get(b.path(), A).as_deref(), Ok(B));
    server.get(b.path(), B).expect_err("the server is not B");
    server.get(a.path(), A).expect_err("A may not call");
}

#[test]
fn it_judges_spiffe_ids() {
    let texts = ["spiffe://td/a", "spiffe://td/", "http://td/a", "", "spiffe://td"];
    assert_eq!(takes_ids(&texts), [true, false, false, false, true]);
}
