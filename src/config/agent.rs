//! The flags of `mica agent`. Each can also be set by the environment variable `MICA_<FLAG>`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::serve::{MadeKind, mode};
use crate::core::lifetime::Lifetime;
use crate::core::spiffe::SpiffeId;
use crate::sys::process::{Signal, signal_named};
use crate::telemetry::LogFormat;

/// Where the socket is, if no place is given for it and no files are wanted.
pub const SOCKET: &str = "/run/mica/agent.sock";

const EXAMPLES: &str = "\
Examples:
  mica agent --authority-address istiod.istio-system.svc:15012 --authority-roots /var/run/secrets/istio/root-cert.pem \\
    --token-file /var/run/secrets/tokens/istio-token
  mica agent --authority-address ca.example.org:15012 --authority-roots /etc/mica/roots.pem \\
    --token-file /etc/mica/token --certificate /etc/certs --files /etc/certs -- systemctl reload nginx
  mica agent --authority-roots .mica/root-cert.pem --token-file token --socket ./agent.sock

Each flag can also be set by the environment variable MICA_<FLAG>, such as MICA_TOKEN_FILE.";

/// Keep the certificates of workloads fresh, beside them or once per node.
///
/// Makes the keys itself, asks the authority for certificates, renews them in time, and hands them to workloads on a Unix
/// socket and in files. A certificate that is still good is kept through any outage of the authority.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Host and gRPC port of the authority
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:15012",
        env = "MICA_AUTHORITY_ADDRESS",
        hide_env = true
    )]
    pub authority_address: String,

    /// The authority's trust bundle (PEM), which its certificate has to lead to; read again when it changes
    #[arg(long, value_name = "FILE", env = "MICA_AUTHORITY_ROOTS", hide_env = true)]
    pub authority_roots: PathBuf,

    /// Name that the authority's certificate has to be for [default: the host of --authority-address]
    #[arg(long, value_name = "NAME", env = "MICA_AUTHORITY_NAME", hide_env = true)]
    pub authority_name: Option<String>,

    /// File with a token to ask with, such as a projected service account token; read for each request
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "certificate",
        env = "MICA_TOKEN_FILE",
        hide_env = true
    )]
    pub token_file: Option<PathBuf>,

    /// Folder with a certificate to ask with (cert-chain.pem, key.pem), used until the agent has one of its own, and then
    /// that one; the token is shown when neither is taken
    #[arg(long, value_name = "DIR", env = "MICA_CERTIFICATE", hide_env = true)]
    pub certificate: Option<PathBuf>,

    /// Whom the certificate has to name [default: whomever the token or certificate says]
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse_workload, env = "MICA_IDENTITY", hide_env = true)]
    pub identity: Option<SpiffeId>,

    /// Lifetime to ask for (s, m, h, d or y) [default: the authority's]
    #[arg(long, value_name = "DURATION", env = "MICA_TTL", hide_env = true)]
    pub ttl: Option<Lifetime>,

    /// Kind of the keys that are made
    #[arg(long, value_name = "KIND", default_value = "p256", env = "MICA_KEY_KIND", hide_env = true)]
    pub key_kind: MadeKind,

    /// Unix socket of Envoy's SDS and the SPIFFE Workload API, for processes of the agent's own user, or for those of
    /// --workloads [default: /run/mica/agent.sock, or none with --files alone]
    #[arg(long, value_name = "PATH", env = "MICA_SOCKET", hide_env = true)]
    pub socket: Option<PathBuf>,

    /// Which processes are which workloads (YAML), by user, group, binary or systemd unit; read again when it changes
    #[arg(long, value_name = "FILE", env = "MICA_WORKLOADS", hide_env = true)]
    pub workloads: Option<PathBuf>,

    /// Serve all pods of this node, each with the identity of its service account; the authority has to allow it (policy:
    /// impersonators). The API server is found as with `mica serve --kube`
    #[arg(long, conflicts_with_all = ["workloads", "files"], env = "MICA_NODE", hide_env = true)]
    pub node: bool,

    /// What the API server calls this node [default: the name of this machine]
    #[arg(long, value_name = "NAME", requires = "node", env = "MICA_NODE_NAME", hide_env = true)]
    pub node_name: Option<String>,

    /// Folder to keep the certificate, its key and the trust bundle in; what another agent left there is taken over
    #[arg(long, value_name = "DIR", env = "MICA_FILES", hide_env = true)]
    pub files: Option<PathBuf>,

    /// What chain, key and trust bundle are called there
    #[arg(
        long,
        value_name = "CHAIN,KEY,ROOTS",
        value_delimiter = ',',
        num_args = 1,
        requires = "files",
        default_value = "cert-chain.pem,key.pem,root-cert.pem",
        value_parser = file_name,
        env = "MICA_FILE_NAMES",
        hide_env = true
    )]
    pub file_names: Vec<String>,

    /// Owner of the files, as a number [default: whoever runs the agent]
    #[arg(long, value_name = "UID", requires = "files", env = "MICA_FILES_OWNER", hide_env = true)]
    pub files_owner: Option<u32>,

    /// Group of the files, as a number [default: whoever runs the agent]
    #[arg(long, value_name = "GID", requires = "files", env = "MICA_FILES_GROUP", hide_env = true)]
    pub files_group: Option<u32>,

    /// Mode of the files; their folders can be entered by those who can read them
    #[arg(
        long,
        value_name = "MODE",
        default_value = "0600",
        value_parser = mode,
        env = "MICA_FILES_MODE",
        hide_env = true
    )]
    pub files_mode: u32,

    /// Signal for the process of --pid-file after the files have changed: HUP, INT, TERM, USR1, USR2 or WINCH
    #[arg(
        long,
        value_name = "NAME",
        requires_all = ["files", "pid_file"],
        value_parser = signal,
        env = "MICA_SIGNAL",
        hide_env = true
    )]
    pub signal: Option<Signal>,

    /// File with the number of the process for --signal
    #[arg(long, value_name = "FILE", requires = "signal", env = "MICA_PID_FILE", hide_env = true)]
    pub pid_file: Option<PathBuf>,

    /// Where /livez, /readyz and /metrics listen, over plain HTTP; port 0 picks a free one
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:15020",
        env = "MICA_HTTP_ADDRESS",
        hide_env = true
    )]
    pub http_address: SocketAddr,

    /// Where spans go.
    #[command(flatten)]
    pub trace: super::trace::Args,

    /// How the log is written [default: human on a terminal, else json]
    #[arg(long, value_name = "FORMAT", value_enum, env = "MICA_LOG_FORMAT", hide_env = true)]
    pub log_format: Option<LogFormat>,

    /// What is logged: error, warn, info or debug
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "MICA_LOG_LEVEL", hide_env = true)]
    pub log_level: tracing::Level,

    /// Program to run, without a shell, after the files have changed
    #[arg(last = true, value_name = "PROGRAM", requires = "files", conflicts_with = "signal")]
    pub program: Vec<OsString>,
}

fn signal(name: &str) -> Result<Signal, String> {
    signal_named(name).ok_or_else(|| format!("{name:?} is none of HUP, INT, TERM, USR1, USR2 and WINCH"))
}

fn file_name(name: &str) -> Result<String, String> {
    if name.is_empty() || name.starts_with("..") || name == "." || name.contains('/') {
        return Err(format!("{name:?} is no name for a file in the folder"));
    }
    Ok(name.to_owned())
}
