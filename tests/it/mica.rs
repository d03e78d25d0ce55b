//! The built program, and files to give it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A folder that goes when the test ends, in which commands are run.
pub(crate) struct Place {
    folder: tempfile::TempDir,
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).expect("the folder is made");
        fs::write(path, bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// All files below, with what is in them.
    pub(crate) fn everything(&self) -> Vec<(PathBuf, Vec<u8>)> {
        fn walk(folder: &Path, into: &mut Vec<(PathBuf, Vec<u8>)>) {
            for entry in fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    into.push((path.clone(), Vec::new()));
                    walk(&path, into);
                } else {
                    into.push((path.clone(), fs::read(&path).expect("a file")));
                }
            }
        }
        let mut all = Vec::new();
        walk(self.folder.path(), &mut all);
        all.sort();
        all
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mica"));
        command.args(arguments).current_dir(self.folder.path()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MICA_") {
                command.env_remove(name);
            }
        }
        command
    }

    /// Runs `mica` to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Done {
        self.command(arguments).output().expect("mica runs").into()
    }

    /// Runs `mica` with something on standard input.
    pub(crate) fn run_with(&self, input: &[u8], arguments: &[&str]) -> Done {
        use std::io::Write as _;
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("mica runs");
        // A command that refuses early need not read it all.
        let _ = child.stdin.take().expect("its input").write_all(input);
        child.wait_with_output().expect("mica ends").into()
    }

    /// Runs `mica`, which has to succeed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let done = self.run(arguments);
        assert_eq!(done.code, 0, "mica {arguments:?}: {}{}", done.stdout, done.stderr);
        done.stdout
    }

    /// Runs `mica`, which has to succeed and to answer in JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ok(&[arguments, &["--output", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {text}"))
    }

    /// Runs `mica`, which has to refuse as bad input: one line, lower case, nothing written. Gives the line.
    pub(crate) fn refused(&self, arguments: &[&str]) -> String {
        let before = self.everything();
        let done = self.run(arguments);
        assert_eq!(done.code, 2, "mica {arguments:?}: {done:?}");
        assert!(self.everything() == before, "mica {arguments:?} was refused, and wrote something");
        done.one_line()
    }

    /// A root in `root`, an intermediate in `ca`, a CSR in `web` and the certificate for it.
    pub(crate) fn with_ca() -> Self {
        let place = Self::new();
        place.ok(&["root", "new", "--out", "root"]);
        place.ok(&["intermediate", "new", "--root", "root", "--out", "ca"]);
        place.ok(&["csr", "new", "--identity", ID, "--out", "web"]);
        place.ok(&[
            "sign",
            "web/csr.pem",
            "--authority",
            "ca",
            "--identity",
            ID,
            "--out",
            "web/cert-chain.pem",
        ]);
        place
    }
}

/// Whose certificate the tests ask for.
pub(crate) const ID: &str = "spiffe://cluster.local/ns/default/sa/web";

impl Done {
    /// What was said on standard error: one line that begins as all do.
    pub(crate) fn one_line(&self) -> String {
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
        assert!(self.stderr.ends_with('\n') && self.stdout.is_empty(), "{self:?}");
        let line = self.stderr.trim_end();
        assert!(line.chars().all(|c| !c.is_control()), "{line:?}");
        let said =
            line.strip_prefix("mica: ").unwrap_or_else(|| panic!("{line:?} does not begin with mica:"));
        assert!(!said.ends_with('.') && said.len() < 800, "{said:?}");
        said.to_owned()
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}
