//! Two real Envoys that talk mutual TLS out of delivered folders:
//!
//! ```text
//! plain HTTP -> client Envoy (folder B) -> mutual TLS -> server Envoy (folder A) -> 200
//! ```
//!
//! Each takes its certificate, key and roots through SDS from files with `watched_directory`, which fires when `..data`
//! is renamed. The client names the files as most people will; the server names them through `..data`, where Envoy's
//! own watch of a file's folder sees nothing and only `watched_directory` does. A connection between the two carries
//! three requests, so handshakes happen all the time.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::parts;

const PATIENCE: Duration = Duration::from_secs(20);

/// A server and a client, each an Envoy of its own.
pub(crate) struct Mesh {
    pub(crate) server: Envoy,
    pub(crate) client: Envoy,
    /// Where the server asks for mutual TLS.
    pub(crate) tls_address: SocketAddr,
    /// Where the client takes plain HTTP.
    pub(crate) plain_address: SocketAddr,
}

/// Where an Envoy has its certificate and its roots from.
#[derive(Clone, Copy)]
pub(crate) enum Secrets<'a> {
    /// From the files `identity.json` and `roots.json` in a folder.
    Files(&'a Path),
    /// Over SDS, from a Unix socket.
    Sds {
        socket: &'a Path,
        /// `GRPC` or `DELTA_GRPC`.
        api: &'a str,
        identity: &'a str,
        roots: &'a str,
    },
}

impl Mesh {
    /// Starts both over SDS.
    pub(crate) fn start_over_sds(server: (Secrets<'_>, &str), client: (Secrets<'_>, &str)) -> Self {
        let ((server, server_id), (client, client_id)) = (server, client);
        let server = Envoy::over_sds("server", &server, &server_resources(&server, client_id));
        let tls_address = server.listener();
        let resources = client_resources(&client, server_id, tls_address);
        let client = Envoy::over_sds("client", &client, &resources);
        let plain_address = client.listener();
        Self { server, client, tls_address, plain_address }
    }

    /// Starts both. Each lets in the other's identity and no other one.
    pub(crate) fn start(server: (&Path, &str), client: (&Path, &str)) -> Self {
        let (server_folder, server_id) = server;
        let (client_folder, client_id) = client;
        let server = Envoy::start("server", server_folder, "..data/", |work| {
            server_resources(&Secrets::Files(work), client_id)
        });
        let tls_address = server.listener();
        let client = Envoy::start("client", client_folder, "", |work| {
            client_resources(&Secrets::Files(work), server_id, tls_address)
        });
        let plain_address = client.listener();
        Self { server, client, tls_address, plain_address }
    }

    /// One request through both: the status.
    pub(crate) fn get(&self) -> io::Result<u16> {
        get(self.plain_address)
    }

    /// Requests from several threads until it is stopped.
    pub(crate) fn load(&self) -> Load {
        Load::start(self.plain_address, Duration::from_millis(2))
    }

    /// Waits until both Envoys hold the certificates with these serial numbers (lower-case hexadecimal).
    pub(crate) fn wait_for_serials(&self, server: &str, client: &str) {
        self.server.wait_for_serial(server);
        self.client.wait_for_serial(client);
    }

    /// The serial number that a new connection is shown, as OpenSSL with the client's certificate sees it.
    pub(crate) fn served_serial(&self, client_folder: &Path) -> String {
        // Opened once, the set is one whole; it is swapped while OpenSSL reads.
        let set = fs::canonicalize(client_folder.join("..data")).expect("a delivered set");
        let file = |name| set.join(name);
        let output = parts::openssl()
            .args(["s_client", "-verify_return_error", "-connect"])
            .arg(self.tls_address.to_string())
            .arg("-CAfile")
            .arg(file("root-cert.pem"))
            .arg("-cert")
            .arg(file("cert-chain.pem"))
            .arg("-key")
            .arg(file("key.pem"))
            .stdin(Stdio::null())
            .output()
            .expect("openssl runs");
        let text = String::from_utf8_lossy(&output.stdout);
        let start = text
            .find("-----BEGIN")
            .unwrap_or_else(|| panic!("no certificate: {}", String::from_utf8_lossy(&output.stderr)));
        crate::fixtures::serial(&text[start..])
    }
}

/// One Envoy with its configuration and log. It ends with this value; when a test fails, its log is shown.
pub(crate) struct Envoy {
    work: tempfile::TempDir,
    child: Child,
    admin: Admin,
}

impl std::ops::Deref for Envoy {
    type Target = Admin;

    fn deref(&self) -> &Admin {
        &self.admin
    }
}

impl Envoy {
    fn start(name: &'static str, folder: &Path, through: &str, resources: impl Fn(&Path) -> Value) -> Self {
        let work = tempfile::tempdir().expect("a temporary folder");
        write_json(&secrets_file(work.path(), "identity"), &identity_secret(folder, through));
        write_json(&secrets_file(work.path(), "roots"), &roots_secret(folder, through));
        let resources = resources(work.path());
        Self::start_in(work, name, &resources)
    }

    /// With the agent as one of its clusters.
    pub(crate) fn over_sds(name: &'static str, secrets: &Secrets<'_>, resources: &Value) -> Self {
        let Secrets::Sds { socket, .. } = secrets else { panic!("not over SDS") };
        let mut resources = resources.clone();
        let clusters = &mut resources["clusters"];
        if clusters.is_null() {
            *clusters = json!([]);
        }
        clusters.as_array_mut().expect("clusters").push(agent(socket));
        Self::start_in(tempfile::tempdir().expect("a temporary folder"), name, &resources)
    }

    fn start_in(work: tempfile::TempDir, name: &'static str, resources: &Value) -> Self {
        let [bootstrap, log, admin_file] =
            ["bootstrap.json", "log", "admin"].map(|file| work.path().join(file));
        write_json(
            &bootstrap,
            &json!({
                "node": { "id": name, "cluster": "test" },
                "admin": { "address": loopback(0) },
                "static_resources": resources,
            }),
        );
        let child = Command::new(parts::envoy())
            .arg("--config-path")
            .arg(&bootstrap)
            .arg("--log-path")
            .arg(&log)
            .arg("--admin-address-path")
            .arg(&admin_file)
            .args(["--concurrency", "1", "--disable-hot-restart"])
            .args(["--log-level", "info", "--file-flush-interval-msec", "100"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(work.path().join("stderr")).expect("a file for errors"))
            .spawn()
            .expect("Envoy starts");
        let unknown = Admin { name, address: SocketAddr::from(([127, 0, 0, 1], 0)) };
        let mut envoy = Self { work, child, admin: unknown };
        envoy.admin.address = envoy.wait("to say where its admin page is", || {
            fs::read_to_string(&admin_file).ok()?.trim().parse().ok()
        });
        envoy.wait("to be live", || {
            let (status, body) = Connection::open(envoy.address).ok()?.get("/ready").ok()?;
            (status == 200 && body.contains("LIVE")).then_some(())
        });
        envoy
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.work.path().join("log")).unwrap_or_default()
    }

    /// The process id: the same one as long as Envoy was not restarted.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process that was started is still there.
    pub(crate) fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

/// What a running Envoy tells of itself.
pub(crate) struct Admin {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
}

impl Admin {
    /// The sum of all counters and gauges whose name ends so, and how many there are.
    pub(crate) fn stat(&self, ending: &str) -> (u64, usize) {
        let page = self.page("/stats");
        let values: Vec<u64> = page
            .lines()
            .filter_map(|line| line.split_once(": "))
            .filter(|(name, _)| name.ends_with(ending))
            .filter_map(|(_, value)| value.parse().ok())
            .collect();
        (values.iter().sum(), values.len())
    }

    /// The serial number of the certificate in use, in lower-case hexadecimal, as Envoy's admin page has it.
    pub(crate) fn serial(&self) -> Option<String> {
        let page: Value = serde_json::from_str(&self.page("/certs")).ok()?;
        let chain = page["certificates"].as_array()?.iter().find_map(|entry| {
            let leaf = entry["cert_chain"].as_array()?.first()?;
            leaf["serial_number"].as_str()
        })?;
        Some(chain.trim_start_matches('0').to_lowercase())
    }

    /// Waits until Envoy holds the certificate with this serial number.
    pub(crate) fn wait_for_serial(&self, serial: &str) {
        self.wait(&format!("to hold {serial}"), || {
            (self.serial().as_deref() == Some(serial.trim_start_matches('0'))).then_some(())
        });
    }

    /// A page of the admin interface.
    pub(crate) fn page(&self, path: &str) -> String {
        let answer = Connection::open(self.address).and_then(|mut connection| connection.get(path));
        match answer {
            Ok((200, body)) => body,
            other => panic!("{}: {path}: {other:?}", self.name),
        }
    }

    pub(crate) fn listener(&self) -> SocketAddr {
        let page = self.page("/listeners?format=json");
        let page: Value = serde_json::from_str(&page).expect("JSON");
        let address = &page["listener_statuses"][0]["local_address"]["socket_address"];
        format!("{}:{}", address["address"].as_str().expect("an address"), address["port_value"])
            .parse()
            .expect("an address")
    }

    pub(crate) fn wait<T>(&self, what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(value) = ready() {
                return value;
            }
            assert!(start.elapsed() < PATIENCE, "Envoy ({}) took more than {PATIENCE:?} {what}", self.name);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            for file in ["stderr", "log"] {
                let text = fs::read_to_string(self.work.path().join(file)).unwrap_or_default();
                eprintln!("--- Envoy ({}), {file}\n{text}", self.admin.name);
            }
        }
    }
}

/// One request: the status.
pub(crate) fn get(address: SocketAddr) -> io::Result<u16> {
    let mut connection = Connection::open(address)?;
    Ok(connection.get("/")?.0)
}

/// Threads that keep asking: half of them over one connection each, half over a new one for each request.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<Report>>,
}

/// What became of the requests.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) answered: usize,
    pub(crate) connections: usize,
    /// Each one a request without a 200.
    pub(crate) failed: Vec<String>,
}

impl Load {
    /// Each thread rests a little after each answer.
    pub(crate) fn start(address: SocketAddr, rest: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicUsize::new(0));
        let threads = (0..4)
            .map(|number| {
                let stop = Arc::clone(&stop);
                let answered = Arc::clone(&answered);
                std::thread::spawn(move || ask(address, number % 2 == 0, rest, &stop, &answered))
            })
            .collect();
        Self { stop, answered, threads }
    }

    /// Waits until this many more requests were answered.
    pub(crate) fn wait_for(&self, requests: usize) {
        let wanted = self.answered.load(Ordering::Relaxed) + requests;
        let start = Instant::now();
        while self.answered.load(Ordering::Relaxed) < wanted {
            assert!(start.elapsed() < PATIENCE, "no {requests} answers in {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn stop(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Report::default();
        for thread in self.threads {
            let report = thread.join().expect("a thread of the load");
            all.answered += report.answered;
            all.connections += report.connections;
            all.failed.extend(report.failed);
        }
        all
    }
}

fn ask(address: SocketAddr, keep: bool, rest: Duration, stop: &AtomicBool, answered: &AtomicUsize) -> Report {
    let mut report = Report::default();
    let mut open: Option<Connection> = None;
    while !stop.load(Ordering::Relaxed) {
        let answer = match open.take() {
            Some(connection) => Ok(connection),
            None => {
                report.connections += 1;
                Connection::open(address)
            }
        }
        .and_then(|mut connection| Ok((connection.get("/")?, connection)));
        match answer {
            Ok(((200, _), connection)) => {
                report.answered += 1;
                answered.fetch_add(1, Ordering::Relaxed);
                open = (keep && !connection.closing).then_some(connection);
            }
            Ok(((status, body), _)) => report.failed.push(format!("{status} {body}")),
            Err(error) => report.failed.push(error.to_string()),
        }
        std::thread::sleep(rest);
    }
    report
}

/// Plain HTTP/1.1, as much of it as Envoy's answers here need.
struct Connection {
    stream: TcpStream,
    closing: bool,
}

impl Connection {
    fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, closing: false })
    }

    fn get(&mut self, path: &str) -> io::Result<(u16, String)> {
        write!(self.stream, "GET {path} HTTP/1.1\r\nhost: test\r\n\r\n")?;
        let mut bytes = Vec::new();
        let head = loop {
            if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            self.more(&mut bytes)?;
        };
        let header = String::from_utf8_lossy(&bytes[..head]).to_lowercase();
        let status = header.split(' ').nth(1).and_then(|code| code.parse().ok());
        let field = |name: &str| header.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        self.closing = field("connection") == Some("close");
        let mut body = bytes.split_off(head + 4);
        if let Some(length) = field("content-length").and_then(|text| text.parse().ok()) {
            while body.len() < length {
                self.more(&mut body)?;
            }
        } else {
            while !body.ends_with(b"0\r\n\r\n") {
                self.more(&mut body)?;
            }
            body = unchunked(&body);
        }
        let status = status.ok_or_else(|| io::Error::other(format!("no status: {header}")))?;
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    fn more(&mut self, bytes: &mut Vec<u8>) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                bytes.extend_from_slice(&buffer[..count]);
                Ok(())
            }
        }
    }
}

fn unchunked(mut chunks: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = chunks.windows(2).position(|window| window == b"\r\n") {
        let size = String::from_utf8_lossy(&chunks[..end]);
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        chunks = &chunks[end + 2..];
        let size = size.min(chunks.len());
        if size == 0 {
            break;
        }
        body.extend_from_slice(&chunks[..size]);
        chunks = chunks.get(size + 2..).unwrap_or_default();
    }
    body
}

pub(crate) fn server_resources(secrets: &Secrets<'_>, client_id: &str) -> Value {
    json!({ "listeners": [inbound(&loopback(0), secrets, client_id)] })
}

pub(crate) fn client_resources(secrets: &Secrets<'_>, server_id: &str, server: SocketAddr) -> Value {
    json!({
        "listeners": [outbound(&loopback(0))],
        "clusters": [peer("STATIC", &loopback(server.port()), secrets, server_id)],
    })
}

/// Where SDS comes from.
fn agent(socket: &Path) -> Value {
    json!({
        "name": "agent",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": "agent",
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": { "pipe": { "path": socket } } } }] }],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": { "http2_protocol_options": {} },
            },
        },
    })
}

/// A listener that asks for mutual TLS with one identity, or any if it is empty, and answers.
pub(crate) fn inbound(address: &Value, secrets: &Secrets<'_>, client_id: &str) -> Value {
    json!({
        "name": "mutual-tls",
        "address": address,
        "filter_chains": [{
            "transport_socket": {
                "name": "envoy.transport_sockets.tls",
                "typed_config": {
                    "@type": tls("DownstreamTlsContext"),
                    "require_client_certificate": true,
                    // A resumed session would not show the new certificate.
                    "disable_stateless_session_resumption": true,
                    "disable_stateful_session_resumption": true,
                    "common_tls_context": common_tls_context(secrets, client_id),
                },
            },
            "filters": [http(&json!({ "direct_response": { "status": 200, "body": { "inline_string": "ok" } } }))],
        }],
    })
}

/// A listener that takes plain HTTP to the peer.
pub(crate) fn outbound(address: &Value) -> Value {
    json!({
        "name": "plain",
        "address": address,
        "filter_chains": [{ "filters": [http(&json!({ "route": { "cluster": "server" } }))] }],
    })
}

/// The peer, which has to have an identity, any if it is empty.
pub(crate) fn peer(kind: &str, address: &Value, secrets: &Secrets<'_>, server_id: &str) -> Value {
    json!({
        "name": "server",
        "type": kind,
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": "server",
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address } }] }],
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": { "http_protocol_options": {} },
                "common_http_protocol_options": { "max_requests_per_connection": 3 },
            },
        },
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": tls("UpstreamTlsContext"),
                "max_session_keys": 0,
                "common_tls_context": common_tls_context(secrets, server_id),
            },
        },
    })
}

fn common_tls_context(secrets: &Secrets<'_>, peer_id: &str) -> Value {
    let (identity, roots) = match secrets {
        Secrets::Files(_) => ("identity", "roots"),
        Secrets::Sds { identity, roots, .. } => (*identity, *roots),
    };
    let matched = match peer_id {
        "" => json!({}),
        id => json!({
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": id } }],
        }),
    };
    json!({
        "tls_certificate_sds_secret_configs": [secret_config(secrets, identity)],
        "combined_validation_context": {
            "default_validation_context": matched,
            "validation_context_sds_secret_config": secret_config(secrets, roots),
        },
    })
}

fn secret_config(secrets: &Secrets<'_>, name: &str) -> Value {
    let source = match secrets {
        Secrets::Files(work) => json!({
            "resource_api_version": "V3",
            "path_config_source": { "path": secrets_file(work, name) },
        }),
        Secrets::Sds { api, .. } => json!({
            "resource_api_version": "V3",
            "api_config_source": {
                "api_type": api,
                "transport_api_version": "V3",
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "agent" } }],
            },
        }),
    };
    json!({ "name": name, "sds_config": source })
}

/// What the file `identity.json` holds, for a certificate in a folder.
pub(crate) fn identity_secret(folder: &Path, through: &str) -> Value {
    json!({ "resources": [{
        "@type": tls("Secret"),
        "name": "identity",
        "tls_certificate": {
            "certificate_chain": { "filename": folder.join(through).join("cert-chain.pem") },
            "private_key": { "filename": folder.join(through).join("key.pem") },
            "watched_directory": { "path": folder },
        },
    }] })
}

/// What the file `roots.json` holds.
pub(crate) fn roots_secret(folder: &Path, through: &str) -> Value {
    json!({ "resources": [{
        "@type": tls("Secret"),
        "name": "roots",
        "validation_context": {
            "trusted_ca": { "filename": folder.join(through).join("root-cert.pem") },
            "watched_directory": { "path": folder },
        },
    }] })
}

fn http(route: &Value) -> Value {
    let mut all = route.clone();
    all["match"] = json!({ "prefix": "/" });
    json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "test",
            "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [all] }] },
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
            }],
        },
    })
}

fn loopback(port: u16) -> Value {
    socket("127.0.0.1", port)
}

pub(crate) fn socket(host: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": host, "port_value": port } })
}

fn tls(message: &str) -> String {
    format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{message}")
}

fn secrets_file(work: &Path, name: &str) -> PathBuf {
    work.join(format!("{name}.json"))
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, value.to_string()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

mod tests {
    use super::*;
    use crate::fixtures::{OpensslCa, deliver};

    const SERVER: &str = "spiffe://fixture/ns/a/sa/server";
    const CLIENT: &str = "spiffe://fixture/ns/a/sa/client";

    #[test]
    fn ten_rotations_under_load_fail_no_request() {
        let ca = OpensslCa::new();
        let [server, client] = [SERVER, CLIENT].map(|id| folder(&ca, id));
        let mut mesh = Mesh::start((server.path(), SERVER), (client.path(), CLIENT));
        let pids = (mesh.server.pid(), mesh.client.pid());
        let load = mesh.load();
        for _ in 0..10 {
            let [new_server, new_client] = [SERVER, CLIENT].map(|id| ca.issue(id));
            deliver(server.path(), &new_server);
            deliver(client.path(), &new_client);
            mesh.wait_for_serials(&new_server.serial, &new_client.serial);
            assert_eq!(mesh.served_serial(client.path()), new_server.serial);
            load.wait_for(50);
        }
        let report = load.stop();
        assert_eq!(report.failed, Vec::<String>::new());
        assert!(report.answered >= 500, "{report:?}");
        assert!(mesh.server.runs() && mesh.client.runs());
        assert_eq!(pids, (mesh.server.pid(), mesh.client.pid()));
        for envoy in [&mesh.server, &mesh.client] {
            let (updates, _) = envoy.stat(".ssl_context_update_by_sds");
            assert!(updates >= 10, "{updates}\n{}", envoy.page("/stats"));
            assert_eq!(envoy.stat(".key_rotation_failed"), (0, 2));
            assert_eq!(envoy.stat("server.hot_restart_epoch"), (0, 1));
        }
        let (handshakes, _) = mesh.server.stat(".ssl.handshake");
        assert!(handshakes > 100, "{handshakes}");
    }

    #[test]
    fn an_identity_that_is_not_the_agreed_one_gets_no_answer() {
        let ca = OpensslCa::new();
        let [server, client] = [SERVER, CLIENT].map(|id| folder(&ca, id));
        let mesh = Mesh::start((server.path(), SERVER), (client.path(), CLIENT));
        assert_eq!(mesh.get().expect("an answer"), 200);

        let mesh = Mesh::start((server.path(), CLIENT), (client.path(), CLIENT));
        assert_eq!(mesh.get().expect("an answer"), 503);
        assert!(mesh.client.stat(".ssl.fail_verify_san").0 > 0);

        let mesh = Mesh::start((server.path(), SERVER), (client.path(), SERVER));
        assert_eq!(mesh.get().expect("an answer"), 503);
        assert!(mesh.server.stat(".ssl.fail_verify_san").0 > 0);
    }

    fn folder(ca: &OpensslCa, id: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        deliver(folder.path(), &ca.issue(id));
        folder
    }
}
