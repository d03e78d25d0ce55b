//! All commands and their flags. Help, completions and man pages come from here.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::inject::{InjectMode, mounted, reachable};
use super::serve::{self, MadeKind, ServingName};
use super::trace::{otlp, zipkin};
use super::{agent, istio_ca};
use crate::core::lifetime::Lifetime;
use crate::core::profile::{DnsName, Organization};
use crate::core::spiffe::{ServiceAccount, SpiffeId, TrustDomain};
use crate::core::url::Collector;

/// A certificate authority for workload mTLS identity
///
/// Mica gives every service account a short-lived SPIFFE certificate, delivers it as files, and renews it for ever.
/// It needs no cluster and no database. The other commands work offline: they make, read and judge certificates, keys
/// and trust bundles.
#[derive(Debug, Parser)]
#[command(
    name = "mica",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = START,
    subcommand_value_name = "COMMAND",
    arg_required_else_help = false
)]
pub struct Cli {
    /// How results are written to standard output; errors are always one line on standard error
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t = Output::Text,
        value_name = "FORM",
        env = "MICA_OUTPUT",
        hide_env = true,
        display_order = 900
    )]
    pub output: Output,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const START: &str = "\
Start here, in a checkout of Mica:
  mica serve examples/bookinfo     give each service account in the folder an identity
  mica inspect .mica/secrets/bookinfo/istio.productpage
                                   look at one, from a second terminal

Durations are written 90s, 15m, 24h, 90d or 10y.
Exit codes: 0 done, 1 the answer is no, 2 wrong usage or bad input, 70 a fault of Mica's.";

/// How a result is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    #[expect(missing_docs, reason = "its arguments bring their own text, which would be replaced")]
    Serve(Box<serve::Args>),
    #[expect(missing_docs, reason = "as above")]
    Agent(Box<agent::Args>),
    #[expect(missing_docs, reason = "as above")]
    IstioCa(Box<istio_ca::Args>),
    /// Make a root CA
    #[command(subcommand)]
    Root(RootCommand),
    /// Make a CA below a root, which signs workload certificates
    #[command(subcommand)]
    Intermediate(IntermediateCommand),
    /// Make a certificate signing request, or have one signed by a running authority
    #[command(subcommand)]
    Csr(CsrCommand),
    /// Sign a CSR into a workload certificate
    ///
    /// Only the public key is taken from the CSR. The identity and DNS names are those given here; what the CSR asked
    /// for and did not get is said on standard error.
    #[command(
        after_help = "Example:\n  mica sign web/csr.pem --authority ca --identity spiffe://cluster.local/ns/default/sa/web --out web/cert-chain.pem"
    )]
    Sign(Sign),
    /// Show what is in certificates, chains, CSRs, keys, bundles and Istio's Secrets, and what is wrong with them
    ///
    /// Takes PEM, DER, SPIFFE JSON bundles, Kubernetes Secrets (YAML or JSON, as kubectl prints them) and folders that
    /// Mica delivered or loads a CA from. Files given together are judged together: a key is matched with the
    /// certificates. Never prints a private key. Exits 0 when everything could be read, even if something is wrong
    /// with it; `mica verify` says yes or no.
    #[command(
        after_help = "Examples:\n  mica inspect .mica/secrets/bookinfo/istio.reviews\n  kubectl get secret istio.default -o yaml | mica inspect -"
    )]
    Inspect(Inspect),
    /// Judge a certificate chain as its peers would
    ///
    /// Checks the path to a root, the validity, the SPIFFE rules, and if given the identity and the key. Exits 0 if it
    /// is good, 1 if it is not, 2 if something cannot be read.
    #[command(
        after_help = "Example:\n  mica verify web/cert-chain.pem --roots ca/root-cert.pem --key web/key.pem --identity spiffe://cluster.local/ns/default/sa/web"
    )]
    Verify(Verify),
    /// Work with trust bundles, as PEM or as SPIFFE JSON
    #[command(subcommand)]
    Bundle(BundleCommand),
    /// Make tokens to try a running authority with
    #[command(subcommand)]
    Token(TokenCommand),
    /// Say why a certificate would be granted or denied, and where its lifetime comes from; nothing is issued
    ///
    /// With --roots or --data-dir a running authority is asked, as whoever the token or certificate shows. Without them
    /// the policy file is read here, and --ttl, --max-ttl and --dns-names stand for the flags of `mica serve`: a policy can
    /// be tried before it is in force. What only a running authority knows, such as whether the account exists, is then
    /// left out. Exits 0 when granted, 1 when denied, 2 if something cannot be read.
    #[command(
        after_help = "Examples:\n  mica explain --policy policy.yaml --identity spiffe://cluster.local/ns/payments/sa/ledger --lifetime 48h\n  mica explain --data-dir .mica --token-file token --csr web/csr.pem"
    )]
    Explain(Box<Explain>),
    /// Put a load on a running authority, and say how fast it answers
    ///
    /// Sends a few CSRs again and again over CreateCertificate, each answered by a certificate that nobody uses, and tells
    /// throughput, latency and refusals, beside the floor measured on this machine: one verified and one made P-256
    /// signature, which every certificate costs. Exits 1 if nothing was granted.
    #[command(
        after_help = "Examples:\n  mica bench --data-dir .mica --token-file token\n  mica bench --address ca.example.org:15012 --roots root-cert.pem --certificate /etc/certs --rate 500 --duration 1m"
    )]
    Bench(Bench),
    /// Put what pods need for their certificates into Kubernetes manifests
    ///
    /// Reads YAML and JSON and writes them to standard output, byte for byte as they were but for what pods lack: in Pods,
    /// the templates of all workloads, and lists of them. What is there already is not put in again. A pod labelled or
    /// annotated mica.dev/inject: "false" is left alone. With --check nothing is written but what would change, and the
    /// exit code is 1 if anything would.
    #[command(
        after_help = "Examples:\n  mica inject -f deployment.yaml | kubectl apply -f -\n  mica inject -f app.yaml --mode agent --container app --image registry.example.org/mica:0.1.0\n  mica inject -f deployment.yaml --check"
    )]
    Inject(Box<Inject>),
    /// Print a shell's completion script
    #[command(
        after_help = "Example:\n  mica completions bash > ~/.local/share/bash-completion/completions/mica"
    )]
    Completions(Completions),
    /// Write the man pages
    #[command(after_help = "Example:\n  mica man --out ~/.local/share/man/man1")]
    Man(Man),
}

/// `mica root`.
#[derive(Debug, Subcommand)]
pub enum RootCommand {
    /// Make a root: its key, its certificate, and the four files that Istio and `mica serve --authority` load
    ///
    /// Writes ca-cert.pem, ca-key.pem (PKCS#8, mode 0600), cert-chain.pem and root-cert.pem. The folder is made if it
    /// is missing and has to be empty; nothing is ever overwritten.
    #[command(
        after_help = "Example:\n  mica root new --out root --passphrase-file secret.txt\n  mica intermediate new --root root --root-passphrase-file secret.txt --out ca"
    )]
    New(RootNew),
}

/// `mica root new`.
#[derive(Debug, Args)]
pub struct RootNew {
    /// The folder to write to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The kind of its key
    #[arg(long, value_name = "KIND", value_enum, default_value_t = MadeKind::P256)]
    pub key_kind: MadeKind,
    /// How long it is valid (s, m, h, d or y)
    #[arg(long, value_name = "DURATION", default_value = "10y", value_parser = lifetime)]
    pub lifetime: Lifetime,
    /// The O of its subject, at most 64 characters [default: the trust domain]
    #[arg(long, value_name = "NAME")]
    pub organization: Option<Organization>,
    /// The trust domain whose root it is
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,
    /// A file whose first line is a passphrase to encrypt the key with (AES-256)
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

/// `mica intermediate`.
#[derive(Debug, Subcommand)]
pub enum IntermediateCommand {
    /// Make an intermediate of path length 0, from a root's folder or as a CSR for somebody else's root
    ///
    /// Writes ca-cert.pem, ca-key.pem (PKCS#8, mode 0600), cert-chain.pem (it and those above it) and root-cert.pem;
    /// with --csr-only ca-key.pem and ca-csr.pem. The folder is made if it is missing and has to be empty.
    #[command(
        after_help = "Examples:\n  mica intermediate new --root root --out ca\n  mica intermediate new --csr-only --trust-domain cluster.local --out ca"
    )]
    New(IntermediateNew),
}

/// `mica intermediate new`.
#[derive(Debug, Args)]
pub struct IntermediateNew {
    /// The root's folder, as `mica root new` writes it
    #[arg(long, value_name = "DIR", required_unless_present = "csr_only", conflicts_with = "csr_only")]
    pub root: Option<PathBuf>,
    /// The folder to write to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Write a key and a CSR for another CA to sign
    #[arg(long)]
    pub csr_only: bool,
    /// The kind of its key
    #[arg(long, value_name = "KIND", value_enum, default_value_t = MadeKind::P256)]
    pub key_kind: MadeKind,
    /// How long it is valid (s, m, h, d or y); shortened where the root ends earlier
    #[arg(long, value_name = "DURATION", default_value = "1y", value_parser = lifetime, conflicts_with = "csr_only")]
    pub lifetime: Lifetime,
    /// The O of its subject, at most 64 characters [default: the trust domain]
    #[arg(long, value_name = "NAME")]
    pub organization: Option<Organization>,
    /// The trust domain whose CA it is [default: the root's, else cluster.local]
    #[arg(long, value_name = "NAME")]
    pub trust_domain: Option<TrustDomain>,
    /// A file whose first line is a passphrase to encrypt the new key with (AES-256)
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// A file whose first line is the passphrase of the root's key
    #[arg(long, value_name = "FILE", conflicts_with = "csr_only")]
    pub root_passphrase_file: Option<PathBuf>,
}

/// `mica csr`.
#[derive(Debug, Subcommand)]
pub enum CsrCommand {
    /// Make a key and a CSR for a workload
    ///
    /// Writes key.pem (PKCS#8, mode 0600) and csr.pem. The folder is made if it is missing; neither file may be there.
    #[command(
        after_help = "Example:\n  mica csr new --identity spiffe://cluster.local/ns/default/sa/web --out web"
    )]
    New(CsrNew),
    /// Ask a running authority for a certificate: for a new key, or for a CSR made elsewhere
    ///
    /// The identity is whoever the token or the certificate shows, not what a CSR says. What comes back is checked
    /// before anything is written: that it is for this key, of that identity, and leads to the trust bundle beside it.
    /// Writes key.pem (PKCS#8, mode 0600; not with --csr), root-cert.pem and cert-chain.pem. The folder is made if it is
    /// missing; none of these files may be there. Exits 1 when the authority says no.
    #[command(
        after_help = "Examples:\n  mica csr request --data-dir .mica --token-file token --out web\n  mica csr request --address istiod.istio-system.svc:15012 --roots root-cert.pem --certificate web --out web-renewed"
    )]
    Request(Box<CsrRequest>),
}

/// Which running Mica to ask, and as whom.
#[derive(Clone, Debug, Args)]
#[command(
    group(ArgGroup::new("authority").args(["roots", "data_dir"]).required(true)),
    group(ArgGroup::new("credential").args(["token_file", "certificate"]).required(true))
)]
pub struct Connect {
    /// Where the authority's gRPC services listen
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:15012")]
    pub address: String,
    /// The trust bundle that the authority's own certificate has to lead to, PEM or SPIFFE JSON
    #[arg(long, value_name = "FILE")]
    pub roots: Option<PathBuf>,
    /// In place of --address and --roots: the data folder of a `mica serve` that runs on this machine
    #[arg(long, value_name = "DIR", conflicts_with = "address")]
    pub data_dir: Option<PathBuf>,
    /// The DNS name or IP address that the authority's certificate has to be for [default: the address's host]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Show a token: a file that holds it, read for each request
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Show a certificate in TLS, as for a renewal: a folder with cert-chain.pem and key.pem
    #[arg(long, value_name = "DIR")]
    pub certificate: Option<PathBuf>,
}

/// `mica bench`.
#[derive(Debug, Args)]
pub struct Bench {
    /// Whom to load.
    #[command(flatten)]
    pub connect: Connect,
    /// Connections that are kept
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub connections: u16,
    /// Requests at once, over all connections
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub in_flight: u16,
    /// How long (s, m, h)
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = lifetime)]
    pub duration: Lifetime,
    /// Requests a second, whatever the answers do [default: each answer makes room for the next request]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000), conflicts_with = "in_flight")]
    pub rate: Option<u32>,
    /// Each request on a connection of its own
    #[arg(long, conflicts_with_all = ["connections", "rate"])]
    pub new_connections: bool,
}

/// `mica csr request`.
#[derive(Debug, Args)]
pub struct CsrRequest {
    /// Whom to ask.
    #[command(flatten)]
    pub connect: Connect,
    /// The folder to write to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The kind of the key
    #[arg(long, value_name = "KIND", value_enum, default_value_t = MadeKind::P256)]
    pub key_kind: MadeKind,
    /// A CSR made elsewhere, PEM, in place of a new key; `-` is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "key_kind")]
    pub csr: Option<PathBuf>,
    /// How long it should be valid (s, m, h, d or y) [default: what the authority gives]
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    pub ttl: Option<Lifetime>,
    /// Ask that the lifetime is not shortened, as it may be to spread renewals
    #[arg(long)]
    pub exact_lifetime: bool,
    /// Take a certificate for this identity alone [default: with --certificate its own, with --impersonate that one]
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse_workload, conflicts_with = "impersonate")]
    pub identity: Option<SpiffeId>,
    /// Ask for another workload's certificate, as a node's proxy does for the pods of its node
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse_workload)]
    pub impersonate: Option<SpiffeId>,
}

/// `mica explain`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("who").args(["identity", "token_file", "certificate"]).required(true)))]
pub struct Explain {
    /// Whom to ask about, as if it had shown a token that counts
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse_workload, conflicts_with_all = ["roots", "data_dir"])]
    pub identity: Option<SpiffeId>,
    /// Whom to ask about: whoever the token in this file shows
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Whom to ask about: whoever renews the certificate in this folder (cert-chain.pem; to show it, also key.pem)
    #[arg(long, value_name = "DIR")]
    pub certificate: Option<PathBuf>,
    /// A CSR, PEM; `-` is standard input [default: any key, no DNS names]
    #[arg(long, value_name = "FILE")]
    pub csr: Option<PathBuf>,
    /// The lifetime to ask for (s, m, h, d or y) [default: none in particular]
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    pub lifetime: Option<Lifetime>,
    /// Ask for another workload's certificate, as a node's proxy does for the pods of its node
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse_workload)]
    pub impersonate: Option<SpiffeId>,

    /// The policy, as `mica serve --policy` takes it [default: none]
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Default lifetime where the policy says none, as of `mica serve` (s, m, h, d or y)
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = lifetime)]
    pub ttl: Lifetime,
    /// Longest lifetime where the policy says none, as of `mica serve` (s, m, h, d or y)
    #[arg(long, value_name = "DURATION", default_value = "90d", value_parser = lifetime)]
    pub max_ttl: Lifetime,
    /// Names and addresses of the authority's own, as of `mica serve`
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_values_t = serve::default_names())]
    pub dns_names: Vec<ServingName>,
    /// Trust domain of the token's account
    #[arg(long, value_name = "NAME", default_value = "cluster.local", conflicts_with = "identity")]
    pub trust_domain: TrustDomain,
    /// The public keys of the token's issuer: a file with a JWK Set
    #[arg(long, value_name = "FILE", requires = "token_file")]
    pub token_jwks: Option<PathBuf>,
    /// The issuer of service account tokens, as of `mica serve` [default: only those that the policy names]
    #[arg(long, value_name = "NAME", requires = "token_file")]
    pub token_issuer: Option<String>,
    /// What has to be among the aud of service account tokens, as of `mica serve`
    #[arg(long, value_name = "NAME", default_value = "istio-ca")]
    pub token_audience: String,
    /// Judge as at this time, such as 2026-01-02T15:04:05Z [default: now]
    #[arg(long, value_name = "RFC3339", value_parser = moment, conflicts_with_all = ["roots", "data_dir"])]
    pub at: Option<OffsetDateTime>,

    /// Ask a running authority: where its gRPC services listen
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:15012", requires = "roots")]
    pub address: String,
    /// Ask a running authority: the trust bundle that its certificate has to lead to, PEM or SPIFFE JSON
    #[arg(long, value_name = "FILE", conflicts_with_all = OFFLINE)]
    pub roots: Option<PathBuf>,
    /// Ask the `mica serve` that runs on this machine with this data folder
    #[arg(long, value_name = "DIR", conflicts_with_all = OFFLINE, conflicts_with_all = ["roots", "address"])]
    pub data_dir: Option<PathBuf>,
    /// The DNS name or IP address that the authority's certificate has to be for [default: the address's host]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}

/// A running authority has its own.
const OFFLINE: [&str; 7] =
    ["policy", "ttl", "max_ttl", "dns_names", "token_jwks", "token_issuer", "token_audience"];

/// `mica csr new`.
#[derive(Debug, Args)]
pub struct CsrNew {
    /// The SPIFFE ID to ask for
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse_workload)]
    pub identity: SpiffeId,
    /// The folder to write to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The kind of the key
    #[arg(long, value_name = "KIND", value_enum, default_value_t = MadeKind::P256)]
    pub key_kind: MadeKind,
    /// A DNS name to ask for; may be repeated
    #[arg(long, value_name = "NAME")]
    pub dns: Vec<DnsName>,
}

/// `mica sign`.
#[derive(Debug, Args)]
pub struct Sign {
    /// The CSR, PEM; `-` is standard input
    #[arg(value_name = "CSR")]
    pub csr: PathBuf,
    /// The CA's folder: Istio's four files or tls.crt, tls.key and ca.crt; <data-dir>/authority is one
    #[arg(long, value_name = "DIR")]
    pub authority: PathBuf,
    /// The SPIFFE ID that the certificate gets, whatever the CSR asks for
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse_workload)]
    pub identity: SpiffeId,
    /// How long it is valid (s, m, h, d or y); shortened where the CA ends earlier
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = lifetime)]
    pub ttl: Lifetime,
    /// A DNS name that the certificate gets; may be repeated
    #[arg(long, value_name = "NAME")]
    pub dns: Vec<DnsName>,
    /// Where the leaf and its intermediates go, PEM; `-` is standard output
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Replace FILE if it is there
    #[arg(long)]
    pub force: bool,
    /// A file whose first line is the passphrase of the CA's key
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

/// `mica inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// Files and folders; `-` is standard input [default: -]
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Judge as at this time, such as 2026-01-02T15:04:05Z [default: now]
    #[arg(long, value_name = "RFC3339", value_parser = moment)]
    pub at: Option<OffsetDateTime>,
    /// A file whose first line is the passphrase of the private keys
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

/// `mica verify`.
#[derive(Debug, Args)]
pub struct Verify {
    /// The chain, leaf first, PEM or DER; or a delivered folder, whose key.pem is checked too; `-` is standard input
    #[arg(value_name = "CHAIN")]
    pub chain: PathBuf,
    /// The trust bundle, PEM or SPIFFE JSON [default, of a folder: its root-cert.pem]
    #[arg(long, value_name = "FILE")]
    pub roots: Option<PathBuf>,
    /// The SPIFFE ID that it should name [default: any]
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse_workload)]
    pub identity: Option<SpiffeId>,
    /// The private key that should belong to it
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Judge as at this time, such as 2026-01-02T15:04:05Z [default: now]
    #[arg(long, value_name = "RFC3339", value_parser = moment)]
    pub at: Option<OffsetDateTime>,
    /// A file whose first line is the passphrase of the key
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

/// `mica bundle`.
#[derive(Debug, Subcommand)]
pub enum BundleCommand {
    /// Make one bundle of several, without repetitions
    ///
    /// Bundles of different trust domains are never merged. A root that names no trust domain (as Istio's own do not)
    /// is only taken with --trust-domain, which says that it belongs there.
    #[command(
        after_help = "Example:\n  mica bundle merge old/root-cert.pem new/root-cert.pem --out root-cert.pem"
    )]
    Merge(BundleMerge),
    /// Write a bundle in the other form
    #[command(
        after_help = "Example:\n  mica bundle convert root-cert.pem --form spiffe --sequence 1 --out bundle.json"
    )]
    Convert(BundleConvert),
    /// List the roots of bundles
    #[command(after_help = "Example:\n  mica bundle list root-cert.pem")]
    List(BundleList),
}

/// `mica bundle merge`.
#[derive(Debug, Args)]
pub struct BundleMerge {
    /// The bundles, PEM or SPIFFE JSON; `-` is standard input
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// How and where it is written.
    #[command(flatten)]
    pub write: BundleWrite,
}

/// `mica bundle convert`.
#[derive(Debug, Args)]
pub struct BundleConvert {
    /// The bundle, PEM or SPIFFE JSON; `-` is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// How and where it is written.
    #[command(flatten)]
    pub write: BundleWrite,
}

/// How a bundle is written.
#[derive(Debug, Args)]
pub struct BundleWrite {
    /// The form to write
    #[arg(long, value_name = "FORM", value_enum, default_value_t = BundleForm::Pem)]
    pub form: BundleForm,
    /// Where it goes; `-` is standard output
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub out: PathBuf,
    /// Replace FILE if it is there
    #[arg(long)]
    pub force: bool,
    /// The trust domain: of roots that name none, and the one to take from a map of bundles
    #[arg(long, value_name = "NAME")]
    pub trust_domain: Option<TrustDomain>,
    /// spiffe_sequence, which has to grow with every change; for --form spiffe [default: as read]
    #[arg(long, value_name = "NUMBER")]
    pub sequence: Option<u64>,
    /// spiffe_refresh_hint: how often consumers should look again (s, m, h, d or y); for --form spiffe [default: as read]
    #[arg(long, value_name = "DURATION", value_parser = lifetime)]
    pub refresh_hint: Option<Lifetime>,
}

/// `mica bundle list`.
#[derive(Debug, Args)]
pub struct BundleList {
    /// The bundles, PEM or SPIFFE JSON; `-` is standard input
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Judge as at this time, such as 2026-01-02T15:04:05Z [default: now]
    #[arg(long, value_name = "RFC3339", value_parser = moment)]
    pub at: Option<OffsetDateTime>,
}

/// The forms of a trust bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BundleForm {
    /// Certificates, one after the other
    Pem,
    /// A JWK Set, as SPIFFE federates it
    Spiffe,
}

/// `mica token`.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a short-lived service account token, for trials
    ///
    /// Prints the token and nothing else. It is signed with the trial issuer's key, which `mica serve DIR --trial-tokens`
    /// keeps in its data folder while it runs; a server without that flag takes no such token, and neither does any other.
    #[command(
        after_help = "Example:\n  mica serve examples/bookinfo --trial-tokens\n  mica token new bookinfo/productpage --ttl 10m --out token"
    )]
    New(TokenNew),
}

/// `mica token new`.
#[derive(Debug, Args)]
pub struct TokenNew {
    /// Whose token it is, as namespace/name
    #[arg(value_name = "ACCOUNT", value_parser = account)]
    pub account: ServiceAccount,
    /// The data folder of the running server
    #[arg(long, value_name = "DIR", default_value = "./.mica")]
    pub data_dir: PathBuf,
    /// How long it is good, up to 1h (s, m or h)
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = trial_lifetime)]
    pub ttl: Lifetime,
    /// Whom it is for, as the server's --token-audience says it
    #[arg(
        long,
        value_name = "NAME",
        default_value = "istio-ca",
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    pub audience: String,
    /// Where it goes instead, mode 0600
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Replace FILE if it is there
    #[arg(long, requires = "out")]
    pub force: bool,
}

/// `mica inject`.
#[derive(Debug, Args)]
pub struct Inject {
    /// The manifests; `-` is standard input; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE", required = true)]
    pub filenames: Vec<PathBuf>,
    /// What pods get
    #[arg(long, value_name = "MODE", value_enum, default_value_t = InjectMode::Secret)]
    pub mode: InjectMode,
    /// The container that it is for [default: istio-proxy; with --mode token mica-agent]
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub container: Option<String>,
    /// Write what would change instead, and exit with 1 if anything would
    #[arg(long)]
    pub check: bool,
    /// With --mode agent: its image [default: localhost/mica:<this version>]
    #[arg(long, value_name = "IMAGE", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub image: Option<String>,
    /// With --mode agent: where the authority's gRPC services listen [default: mica.istio-system.svc:15012]
    #[arg(long, value_name = "HOST:PORT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub authority_address: Option<String>,
    /// With --mode agent: keep files for the container too, at this path of it
    #[arg(long, value_name = "DIR", value_parser = mounted)]
    pub files: Option<String>,
    /// With --mode agent: where its /livez, /readyz and /metrics listen, so that others reach them; the container names
    /// the port mica-metrics [default: a port of loopback]
    #[arg(long, value_name = "ADDRESS", value_parser = reachable)]
    pub metrics_address: Option<SocketAddr>,
    /// With --mode agent: its --trace-otlp, a collector that it sends spans to [default: none]
    #[arg(long, value_name = "URL", value_parser = otlp)]
    pub trace_otlp: Option<Collector>,
    /// With --mode agent: its --trace-zipkin, a Zipkin that it sends spans to [default: none]
    #[arg(long, value_name = "URL", value_parser = zipkin)]
    pub trace_zipkin: Option<Collector>,
    /// With --mode agent or token: whom the token is for, as the server's --token-audience says it [default: istio-ca]
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub token_audience: Option<String>,
}

/// `mica completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

/// The shells that completions are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// bash
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

/// `mica man`.
#[derive(Debug, Args)]
pub struct Man {
    /// The folder to write mica.1, mica-serve.1 and the others to; made if it is missing
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Replace pages that are there
    #[arg(long)]
    pub force: bool,
}

fn lifetime(text: &str) -> Result<Lifetime, String> {
    let lifetime: Lifetime = text.parse().map_err(|e: crate::core::lifetime::Error| e.to_string())?;
    if lifetime == Lifetime::from_secs(0) {
        return Err("it has to be longer than nothing; write one such as 24h".to_owned());
    }
    Ok(lifetime)
}

fn trial_lifetime(text: &str) -> Result<Lifetime, String> {
    const LONGEST: Lifetime = Lifetime::from_secs(3600);
    let lifetime = lifetime(text)?;
    if lifetime > LONGEST {
        return Err(format!("a trial token is good for {LONGEST} at most"));
    }
    Ok(lifetime)
}

fn account(text: &str) -> Result<ServiceAccount, String> {
    let (namespace, name) = text
        .split_once('/')
        .ok_or_else(|| "it is no account; write namespace/name, such as bookinfo/productpage".to_owned())?;
    ServiceAccount::new(namespace, name).map_err(|e| e.to_string())
}

fn moment(text: &str) -> Result<OffsetDateTime, String> {
    OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| "it is no RFC 3339 time; write one such as 2026-01-02T15:04:05Z".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_leaf_command_has_an_example() {
        fn walk(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            if command.has_subcommands() {
                command.get_subcommands().for_each(|sub| walk(sub, &path));
            } else {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.starts_with("Example"), "{path} has no example");
                assert!(help.contains("mica"), "{path}");
            }
        }
        walk(&Cli::command(), "");
    }

    #[test]
    fn every_flag_of_serve_is_also_in_the_environment() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").unwrap();
        for argument in serve.get_arguments() {
            let expected = match argument.get_long() {
                Some("output" | "help" | "version") => continue,
                Some(long) => format!("MICA_{}", long.replace('-', "_").to_uppercase()),
                None => "MICA_DIR".to_owned(),
            };
            assert_eq!(argument.get_env(), Some(expected.as_ref()), "{}", argument.get_id());
        }
    }
}
