//! A whole Kubernetes with a node that runs pods, as `tests/cluster` makes it: each with namespaces and a door of its
//! own, so that any number run side by side.
//!
//! It is gone when this process is, however it ends: `tests/cluster run` holds the other end of a pipe.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::control_plane::spawn_from_a_thread_that_stays;
use crate::serve::wait_for;

/// What takes a second on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// A running node, gone when dropped.
pub(crate) struct Node {
    folder: PathBuf,
    // When its standard input is closed, the node goes.
    running: Child,
}

impl Node {
    /// The one that tests share, which may not stop its parts.
    pub(crate) fn shared() -> &'static Self {
        static SHARED: OnceLock<Node> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    /// One of one's own.
    pub(crate) fn start() -> Self {
        let begun = Instant::now();
        let folder = tempfile::Builder::new().prefix("mica-node-").tempdir().unwrap().keep();
        // Not in the folder, which goes when it fails.
        let mut log = tempfile::tempfile().unwrap();
        // Of a session of its own, so that what ends this process by its group does not end that one before its time.
        let mut command = Command::new("setsid");
        command.arg(script()).arg("run").env("MICA_CLUSTER", &folder);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log.try_clone().unwrap());
        let mut running = command.spawn().unwrap();
        let said = BufReader::new(running.stdout.take().unwrap()).lines().next();
        let node = Self { folder, running };
        if !matches!(&said, Some(Ok(line)) if line.starts_with("export KUBECONFIG=")) {
            let mut text = String::new();
            log.rewind().unwrap();
            log.read_to_string(&mut text).unwrap();
            panic!("tests/cluster run: {said:?}\n{text}");
        }
        eprintln!("a node is ready after {:?}", begun.elapsed());
        node
    }

    /// Where it is kept.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// `tests/cluster` for this node; it has to succeed. What it said.
    pub(crate) fn cluster<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> String {
        self.try_cluster(arguments).unwrap_or_else(|error| panic!("{error}"))
    }

    /// `tests/cluster kubectl`, which has to succeed. What it said.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).unwrap_or_else(|error| panic!("{error}"))
    }

    pub(crate) fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        self.try_cluster(["kubectl"].iter().chain(arguments))
    }

    /// Applies objects.
    pub(crate) fn apply(&self, objects: &[Value]) {
        let mut child = self
            .command()
            .args(["kubectl", "apply", "--filename=-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": objects});
        child.stdin.take().unwrap().write_all(list.to_string().as_bytes()).unwrap();
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}\n{list:#}", String::from_utf8_lossy(&done.stderr));
    }

    /// Waits until a deployment is as it was last said to be.
    pub(crate) fn rolled_out(&self, namespace: &str, deployment: &str) {
        let namespace = format!("--namespace={namespace}");
        let deployment = format!("deployment/{deployment}");
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        self.until(&["rollout", "status", &namespace, &deployment, &timeout]);
    }

    /// Waits until a pod has ended: its phase, and what it has said.
    pub(crate) fn ended(&self, namespace: &str, pod: &str) -> (String, String) {
        let namespace = format!("--namespace={namespace}");
        let begun = Instant::now();
        loop {
            let phase = self.kubectl(&["get", "pod", pod, &namespace, "--output=jsonpath={.status.phase}"]);
            let said = || self.try_kubectl(&["logs", pod, &namespace]).unwrap_or_else(|error| error);
            if phase == "Succeeded" || phase == "Failed" {
                return (phase, said());
            }
            if begun.elapsed() > PATIENCE {
                panic!("{}{}", said(), self.kubectl(&["describe", "pod", pod, &namespace]));
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// A command of kubectl's that waits; when it does so in vain, what there is to see is shown.
    fn until(&self, arguments: &[&str]) {
        if let Err(error) = self.try_kubectl(arguments) {
            let all = self.try_kubectl(&["get", "events,pods", "--all-namespaces", "--output=wide"]);
            panic!("{error}\n{}", all.unwrap_or_else(|error| error));
        }
    }

    /// Makes an image of a program with its libraries.
    pub(crate) fn image(&self, name: &str, program: &Path) {
        self.cluster([OsStr::new("image"), OsStr::new(name), program.as_os_str()]);
    }

    /// The first container of a pod, as containerd calls it.
    pub(crate) fn container(&self, namespace: &str, pod: &str) -> String {
        let namespace = format!("--namespace={namespace}");
        let id = "--output=jsonpath={.status.containerStatuses[0].containerID}";
        let id = self.kubectl(&["get", "pod", pod, &namespace, id]);
        id.strip_prefix("containerd://").unwrap_or_else(|| panic!("{pod}: {id:?}")).to_owned()
    }

    /// A command in a container, which takes neither a kubelet nor an API server.
    pub(crate) fn inside(&self, container: &str, arguments: &[impl AsRef<OsStr>]) -> Command {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("test-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let mut command = self.command();
        command.args(["exec", "ctr", "--namespace=k8s.io", "tasks", "exec", "--exec-id", &name, container]);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// A command on the node, in no pod.
    pub(crate) fn outside(&self, arguments: &[impl AsRef<OsStr>]) -> Command {
        let mut command = self.command();
        command.arg("exec").args(arguments).stdin(Stdio::null());
        command
    }

    /// Ends all processes of a pod, as the kernel does when it has no memory, and the pod.
    pub(crate) fn kill(&self, namespace: &str, pod: &str) {
        let id = &self.container(namespace, pod);
        let namespace = format!("--namespace={namespace}");
        self.cluster(["exec", "ctr", "--namespace=k8s.io", "tasks", "kill", "--signal=SIGKILL", id]);
        self.kubectl(&["delete", "pod", pod, &namespace, "--force", "--grace-period=0"]);
    }

    /// Waits until the API server answers.
    pub(crate) fn answers(&self) {
        wait_for(PATIENCE, "the API server", || self.try_kubectl(&["get", "--raw=/readyz"]).ok());
    }

    /// A door from the machine to an address in the cluster.
    pub(crate) fn door(&self, address: &str) -> Door {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(script()).args(["forward", address]);
        command.env("MICA_CLUSTER", &self.folder).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = spawn_from_a_thread_that_stays(command);
        let said = BufReader::new(child.stdout.take().unwrap()).lines().next();
        let address = said.unwrap_or_else(|| panic!("no door to {address}")).unwrap().parse().unwrap();
        Door { address, child }
    }

    fn try_cluster<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<String, String> {
        let mut command = self.command();
        let done = command.args(arguments).stdin(Stdio::null()).output().unwrap();
        if done.status.success() {
            return Ok(String::from_utf8(done.stdout).unwrap());
        }
        Err(format!(
            "{command:?}: {}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr)
        ))
    }

    fn command(&self) -> Command {
        let mut command = Command::new(script());
        command.env("MICA_CLUSTER", &self.folder);
        command
    }
}

/// A way into the cluster, closed when dropped.
pub(crate) struct Door {
    pub(crate) address: SocketAddr,
    child: Child,
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for what in [
                &["get", "pods,leases,events", "--all-namespaces", "--output=wide"][..],
                &[
                    "logs",
                    "--namespace=istio-system",
                    "--selector=app.kubernetes.io/name=mica",
                    "--prefix",
                    "--tail=60",
                ],
            ] {
                eprintln!("{}", self.try_kubectl(what).unwrap_or_else(|error| error));
            }
        }
        drop(self.running.stdin.take());
        let _ = self.running.wait();
    }
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster")
}
