//! The flags of istio-ca 0.2.10, and what they are for `mica serve --kube`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Args as _, CommandFactory as _, FromArgMatches as _};

use super::cli::Cli;
use super::serve::{self, ServingName, default_names};
use crate::core::authority_files::{CA_CERT, CA_KEY, CERT_CHAIN, ROOT_CERT};
use crate::core::lifetime::Lifetime;
use crate::core::policy::SHORTEST;
use crate::core::profile::Organization;
use crate::core::spiffe::is_namespace;

/// Where Mica does something else than istio-ca did, whatever its flags say. Said once in the log, and in the help.
pub const DIFFERENCES: [&str; 7] = [
    "keys are made as P-256, not RSA 1024 (MICA_KEY_KIND)",
    "of a CSR only the key is used, once its signature is verified: no extensions and no subject are copied from it",
    "tokens are the cluster's service account tokens, for the account's own identity alone, not Google's ID tokens for any",
    "certificates are valid two minutes early, or a quarter of their lifetime if that is less, and never longer than the CA",
    "secrets are renewed half way to three quarters through their lifetime, not 60 s before its end",
    "secrets go with their account, and one of another type that has the name is left alone",
    "an istio-ca-secret that cannot be read or written ends the start, and no root is made in its place",
];

const HELP: &str = "\
Examples:
  mica istio-ca --grpc-port=8060 --grpc-hostname=istio-ca --self-signed-ca=true
  mica istio-ca --signing-cert=/etc/cacerts/ca-cert.pem --signing-key=/etc/cacerts/ca-key.pem --root-cert=/etc/cacerts/root-cert.pem --cert-chain=/etc/cacerts/cert-chain.pem

Durations are written 90s, 1h30m, 8760h or 90d.

What differs from istio-ca 0.2.10, for safety:
  - keys are made as P-256, not RSA 1024 (MICA_KEY_KIND)
  - of a CSR only the key is used, once its signature is verified: no extensions and no subject are copied from it
  - tokens are the cluster's service account tokens, for the account's own identity alone, not Google's ID tokens for any
  - certificates are valid two minutes early, or a quarter of their lifetime if that is less, and never longer than the CA
  - secrets are renewed half way to three quarters through their lifetime, not 60 s before its end
  - secrets go with their account, and one of another type that has the name is left alone
  - an istio-ca-secret that cannot be read or written ends the start, and no root is made in its place";

/// Run the authority with the flags of istio-ca 0.2.10.
///
/// For manifests of istio-ca that are to go on with only the image changed; it is also what mica does when it is called
/// istio_ca. It is `mica serve --kube` within the permissions that istio-ca had: it keeps the secrets istio.<account>, and
/// writes no ConfigMaps, no ClusterTrustBundle, no Lease and no Events, so that there should be one replica of it.
/// Whatever else `mica serve` can do is set by its environment variables, such as MICA_HTTP_ADDRESS.
#[derive(Clone, Debug, clap::Args)]
#[command(args_override_self = true, args_conflicts_with_subcommands = true, after_help = HELP)]
pub struct Args {
    /// File of the certificates between the CA's and the root, PEM; may be empty when the CA is the root
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true, value_parser = path)]
    pub cert_chain: PathBuf,

    /// File of the CA's certificate, PEM
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true, value_parser = path)]
    pub signing_cert: PathBuf,

    /// File of the CA's key, PEM
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true, value_parser = path)]
    pub signing_key: PathBuf,

    /// File of the root, PEM
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true, value_parser = path)]
    pub root_cert: PathBuf,

    /// The only namespace to serve [default: that of the environment variable NAMESPACE, else all]
    #[arg(long, value_name = "NAMESPACE", default_value = "", hide_default_value = true)]
    pub namespace: String,

    /// Where the secret istio-ca-secret is; the environment variable NAMESPACE wins
    #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
    pub istio_ca_storage_namespace: String,

    /// What the two above come from.
    #[arg(long = "NAMESPACE", env = "NAMESPACE", default_value = "", hide = true)]
    pub variable: String,

    /// A kubeconfig [default: as for `mica serve --kube`]
    #[arg(long, value_name = "FILE", default_value = "", hide_default_value = true, value_parser = path)]
    pub kube_config: PathBuf,

    /// Keep an authority of Mica's own in the secret istio-ca-secret; --signing-cert, --signing-key, --root-cert and
    /// --cert-chain are then of no effect
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false",
        default_missing_value = "true", value_parser = boolean, action = clap::ArgAction::Set)]
    pub self_signed_ca: bool,

    /// The O of a root that is made
    #[arg(long, value_name = "NAME", default_value = "k8s.cluster.local")]
    pub self_signed_ca_org: Organization,

    /// Lifetime of a root that is made. Workloads have to be given another root before its end: choose it long
    #[arg(long, value_name = "DURATION", default_value = "8760h", value_parser = duration)]
    pub ca_cert_ttl: Duration,

    /// Lifetime of the certificates; none of another lifetime can be asked for, unless MICA_MAX_TTL is longer
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
    pub cert_ttl: Duration,

    /// A name that the gRPC port's certificate is for, beside those of `mica serve`
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    pub grpc_hostname: ServingName,

    /// Port of the gRPC services, on all addresses; 0 or less: none
    #[arg(long, value_name = "PORT", default_value_t = 0, allow_hyphen_values = true)]
    pub grpc_port: i32,

    /// How much is logged: from 2 on as MICA_LOG_LEVEL=debug
    #[arg(short = 'v', long = "v", value_name = "LEVEL", allow_hyphen_values = true, help_heading = GLOG)]
    pub verbosity: Option<i32>,

    /// No effect: the log goes to standard error
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_parser = boolean, action = clap::ArgAction::Set, help_heading = GLOG)]
    pub logtostderr: Option<bool>,

    /// No effect
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
        value_parser = boolean, action = clap::ArgAction::Set, help_heading = GLOG)]
    pub alsologtostderr: Option<bool>,

    /// No effect
    #[arg(long, value_name = "LEVEL", help_heading = GLOG)]
    pub stderrthreshold: Option<String>,

    /// No effect
    #[arg(long, value_name = "PATTERN=N,...", help_heading = GLOG)]
    pub vmodule: Option<String>,

    /// No effect
    #[arg(long = "log_dir", value_name = "DIR", help_heading = GLOG)]
    pub log_dir: Option<String>,

    /// No effect
    #[arg(long = "log_backtrace_at", value_name = "FILE:N", help_heading = GLOG)]
    pub log_backtrace_at: Option<String>,

    /// What to do instead.
    #[command(subcommand)]
    pub command: Option<Command>,
}

const GLOG: &str = "Options of its log";

/// What istio-ca can do beside running.
#[derive(Clone, Copy, Debug, clap::Subcommand)]
pub enum Command {
    /// Print the version
    #[command(after_help = "Example:\n  mica istio-ca version")]
    Version,
}

/// What istio-ca's flags ask of `mica serve --kube` that no flag of its own does.
#[derive(Clone, Debug)]
pub struct IstioCa {
    /// Which API server.
    pub kubeconfig: Option<PathBuf>,
    /// An authority that is brought, by the names its files have in a folder; without it, one is kept in the cluster.
    pub authority: Option<Vec<(&'static str, PathBuf)>>,
    /// Of a root that is made.
    pub organization: Organization,
    /// Of a root that is made.
    pub root_lifetime: Lifetime,
    /// Whether there are gRPC services.
    pub grpc: bool,
    /// Flags that were given and are of no effect.
    pub ignored: Vec<&'static str>,
}

impl Args {
    /// What `mica serve` is to do.
    pub fn serve(&self) -> Result<serve::Args, clap::Error> {
        let lifetime = whole(self.cert_ttl).filter(|lifetime| *lifetime >= SHORTEST).ok_or_else(|| {
            refused(format_args!("--cert-ttl {:?} is shorter than {SHORTEST}", self.cert_ttl))
        })?;
        let root_lifetime = whole(self.ca_cert_ttl).filter(|root| *root > lifetime).ok_or_else(|| {
            let root = self.ca_cert_ttl;
            refused(format_args!("--ca-cert-ttl {root:?} is not longer than --cert-ttl {lifetime}"))
        })?;
        let port = u16::try_from(self.grpc_port.max(0)).map_err(|_| {
            refused(format_args!("--grpc-port {} is no port: they end at 65535", self.grpc_port))
        })?;
        let names: Vec<_> =
            std::iter::once(&self.grpc_hostname).chain(&default_names()).map(ToString::to_string).collect();

        let mut typed: Vec<OsString> = vec!["--kube".into()];
        typed.push(format!("--ttl={lifetime}").into());
        typed.push(format!("--dns-names={}", names.join(",")).into());
        if port > 0 {
            typed.push(format!("--grpc-address=0.0.0.0:{port}").into());
        }
        if self.verbosity.is_some_and(|level| level >= 2) {
            typed.push("--log-level=debug".into());
        }
        // As if they had been typed, so that everything else has its default or its variable.
        let parser = serve::Args::augment_args(clap::Command::new("mica").no_binary_name(true));
        let matches = parser.try_get_matches_from(typed)?;
        let mut args = serve::Args::from_arg_matches(&matches)?;
        if matches.value_source("max_ttl") == Some(ValueSource::DefaultValue) {
            args.max_ttl = lifetime;
        }
        args.namespace = Some(self.storage_namespace()?);
        args.watch_namespaces = self.watched_namespace()?.into_iter().collect();
        // Of the cluster's objects istio-ca wrote secrets alone.
        args.cluster_trust_bundle = false;
        // Nor has it the right to say what it is trusted by.
        args.inject_address = None;
        args.istio_ca = Some(Box::new(IstioCa {
            kubeconfig: given(&self.kube_config),
            authority: self.authority()?,
            organization: self.self_signed_ca_org.clone(),
            root_lifetime,
            grpc: port > 0,
            ignored: self.ignored(),
        }));
        Ok(args)
    }

    fn storage_namespace(&self) -> Result<String, clap::Error> {
        match self.variable.as_str() {
            "" => namespace("--istio-ca-storage-namespace", &self.istio_ca_storage_namespace),
            variable => namespace("the environment variable NAMESPACE", variable),
        }
    }

    fn watched_namespace(&self) -> Result<Option<String>, clap::Error> {
        match (self.namespace.as_str(), self.variable.as_str()) {
            ("", "") => Ok(None),
            ("", variable) => namespace("the environment variable NAMESPACE", variable).map(Some),
            (typed, _) => namespace("--namespace", typed).map(Some),
        }
    }

    /// The four files; none for an authority of Mica's own.
    fn authority(&self) -> Result<Option<Vec<(&'static str, PathBuf)>>, clap::Error> {
        if self.self_signed_ca {
            return Ok(None);
        }
        let mut files = Vec::new();
        for (name, flag, path) in self.files() {
            match given(path) {
                Some(path) => files.push((name, path)),
                None if name == CERT_CHAIN => {}
                None => {
                    return Err(refused(format_args!(
                        "{flag} is missing: give --signing-cert, --signing-key and --root-cert, or --self-signed-ca=true"
                    )));
                }
            }
        }
        Ok(Some(files))
    }

    fn files(&self) -> [(&'static str, &'static str, &Path); 4] {
        [
            (CA_CERT, "--signing-cert", &self.signing_cert),
            (CA_KEY, "--signing-key", &self.signing_key),
            (ROOT_CERT, "--root-cert", &self.root_cert),
            (CERT_CHAIN, "--cert-chain", &self.cert_chain),
        ]
    }

    fn ignored(&self) -> Vec<&'static str> {
        if !self.self_signed_ca {
            return Vec::new();
        }
        self.files().into_iter().filter(|(.., path)| given(path).is_some()).map(|(_, flag, _)| flag).collect()
    }
}

fn given(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

fn namespace(whose: &str, name: &str) -> Result<String, clap::Error> {
    if is_namespace(name) {
        return Ok(name.to_owned());
    }
    Err(refused(format_args!(
        "{whose}: no namespace can have the name {name:?}: give 1 to 63 of a-z, 0-9 and -, with none of them - at an end"
    )))
}

fn whole(duration: Duration) -> Option<Lifetime> {
    // Through the text, whose reader knows the bounds.
    format!("{}s", duration.as_secs()).parse().ok()
}

fn refused(why: std::fmt::Arguments<'_>) -> clap::Error {
    Cli::command().error(ErrorKind::ValueValidation, why)
}

/// An empty path is one that was not given, as for istio-ca.
fn path(text: &str) -> Result<PathBuf, String> {
    Ok(PathBuf::from(text))
}

/// As Go reads it.
fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("it is neither true nor false".to_owned()),
    }
}

/// As Go writes durations: numbers, each with a unit, one after the other. Mica's days and years count too.
fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, f64); 9] = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("µs", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3_600.0),
        ("d", 86_400.0),
        ("y", 365.0 * 86_400.0),
    ];
    let refused = || "it is no duration above zero, such as 90s, 1h30m, 8760h or 90d".to_owned();
    let (mut seconds, mut rest) = (0.0, text);
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(refused)?;
        let (digits, after) = rest.split_at(number);
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, next) = after.split_at(end);
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(refused)?;
        seconds += digits.parse::<f64>().map_err(|_| refused())? * factor;
        rest = next;
    }
    Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero()).ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn parsed(arguments: &[&str]) -> Result<serve::Args, String> {
        let words = ["mica", "istio-ca"].iter().chain(arguments);
        let cli = Cli::try_parse_from(words).map_err(|refused| refused.to_string())?;
        let super::super::cli::Command::IstioCa(args) = cli.command else { panic!("another command") };
        args.serve().map_err(|refused| refused.to_string())
    }

    fn refused(arguments: &[&str]) -> String {
        parsed(arguments).unwrap_err().lines().next().unwrap().to_owned()
    }

    #[test]
    fn the_arguments_of_the_manifest_are_those_of_a_cluster() {
        let args =
            parsed(&["--grpc-port=8060", "--grpc-hostname=istio-ca", "--self-signed-ca=true"]).unwrap();
        assert!(args.kube && args.source.is_none() && args.authority.is_none());
        assert_eq!(args.grpc_address, "0.0.0.0:8060".parse().unwrap());
        assert_eq!((args.ttl, args.max_ttl), (Lifetime::from_secs(3_600), Lifetime::from_secs(3_600)));
        assert_eq!(args.dns_names[0].to_string(), "istio-ca");
        assert_eq!(args.namespace.as_deref(), Some("istio-system"));
        let ours = args.istio_ca.unwrap();
        assert!(args.watch_namespaces.is_empty());
        assert_eq!(ours.organization.as_str(), "k8s.cluster.local");
        assert_eq!(ours.root_lifetime, Lifetime::from_secs(365 * 86_400));
        assert!(ours.grpc && ours.authority.is_none() && ours.kubeconfig.is_none());
    }

    #[test]
    fn the_port_is_none_unless_it_is_one() {
        for port in [&[][..], &["--grpc-port=0"], &["--grpc-port", "-1"], &["--grpc-port=-8060"]] {
            let args = parsed(&[port, &["--self-signed-ca"]].concat()).unwrap();
            assert!(!args.istio_ca.unwrap().grpc, "{port:?}");
        }
        assert!(refused(&["--self-signed-ca", "--grpc-port=65536"]).contains("65536"));
    }

    #[test]
    fn the_last_of_a_flag_counts_and_truth_is_gos() {
        for (truth, is) in
            [("--self-signed-ca", true), ("--self-signed-ca=T", true), ("--self-signed-ca=0", false)]
        {
            let args = parsed(&["--self-signed-ca=false", "--self-signed-ca=true", truth]);
            assert_eq!(args.is_ok(), is, "{truth}");
        }
        assert!(refused(&["--self-signed-ca=yes"]).contains("yes"));
    }

    #[test]
    fn an_authority_that_is_brought_needs_all_but_its_chain() {
        let all = ["--signing-cert=/a/cert.pem", "--signing-key=/b/key.pem", "--root-cert=/c/root.pem"];
        let files = parsed(&all).unwrap().istio_ca.unwrap().authority.unwrap();
        assert_eq!(files[1], (CA_KEY, PathBuf::from("/b/key.pem")));
        assert_eq!(files.len(), 3);
        let chain = [&all[..], &["--cert-chain=/d"]].concat();
        assert_eq!(parsed(&chain).unwrap().istio_ca.unwrap().authority.unwrap().len(), 4);
        for flag in ["--signing-cert", "--signing-key", "--root-cert"] {
            let rest: Vec<_> = all.iter().copied().filter(|typed| !typed.starts_with(flag)).collect();
            assert!(refused(&rest).contains(&format!("{flag} is missing")), "{flag}");
            // An empty value is none.
            assert!(refused(&[&rest[..], &[&format!("{flag}=")]].concat()).contains("is missing"), "{flag}");
        }
        let ours = parsed(&[&chain[..], &["--self-signed-ca"]].concat()).unwrap().istio_ca.unwrap();
        assert!(ours.authority.is_none());
        assert_eq!(ours.ignored, ["--signing-cert", "--signing-key", "--root-cert", "--cert-chain"]);
    }

    #[test]
    fn the_variable_namespace_chooses_both() {
        let ours = |arguments: &[&str]| {
            let args = parsed(&[arguments, &["--self-signed-ca"]].concat()).unwrap();
            (args.namespace.unwrap(), args.watch_namespaces.into_iter().next())
        };
        let both = |storage: &str, watched: Option<&str>| (storage.to_owned(), watched.map(str::to_owned));
        // The flag is the variable's stand-in, since tests run beside each other.
        assert_eq!(ours(&["--NAMESPACE=shop"]), both("shop", Some("shop")));
        assert_eq!(ours(&["--NAMESPACE=shop", "--namespace=web"]), both("shop", Some("web")));
        assert_eq!(
            ours(&["--NAMESPACE=shop", "--istio-ca-storage-namespace=ca"]),
            both("shop", Some("shop"))
        );
        assert_eq!(ours(&["--istio-ca-storage-namespace=ca", "--namespace="]), both("ca", None));
        assert!(refused(&["--self-signed-ca", "--namespace=Shop"]).contains("--namespace"));
        assert!(refused(&["--self-signed-ca", "--NAMESPACE=a/b"]).contains("variable NAMESPACE"));
    }

    #[test]
    fn durations_are_gos_and_micas() {
        for (text, seconds) in [
            ("1h", 3_600.0),
            ("1h30m", 5_400.0),
            ("1.5h", 5_400.0),
            ("8760h0m0s", 31_536_000.0),
            ("90d", 7_776_000.0),
            ("1500ms", 1.5),
            (".5s", 0.5),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs_f64(seconds)), "{text}");
        }
        for text in [
            "",
            "0",
            "0s",
            "1",
            "h",
            "-1h",
            "1 h",
            "1hh",
            "1h1",
            "1.2.3s",
            "1e3s",
            "inf s",
            "9999999999999999y",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lifetimes_that_cannot_be_are_refused() {
        let said = refused(&["--self-signed-ca", "--cert-ttl=9s"]);
        assert!(said.contains("--cert-ttl 9s is shorter than 10s"), "{said}");
        let said = refused(&["--self-signed-ca", "--cert-ttl=2h", "--ca-cert-ttl=1h"]);
        assert!(said.contains("--ca-cert-ttl") && said.contains("--cert-ttl 2h"), "{said}");
        let args = parsed(&["--self-signed-ca", "--cert-ttl=1500ms", "--cert-ttl=200h", "--ca-cert-ttl=1y"]);
        assert_eq!(args.unwrap().max_ttl, Lifetime::from_secs(720_000));
    }

    #[test]
    fn the_flags_of_its_log_are_taken() {
        let args = parsed(&[
            "--self-signed-ca",
            "--logtostderr",
            "--alsologtostderr=false",
            "-v",
            "2",
            "--stderrthreshold=INFO",
            "--vmodule=a=1",
            "--log_dir=/tmp",
            "--log_backtrace_at=:0",
        ]);
        assert_eq!(args.unwrap().log_level, tracing::Level::DEBUG);
        assert_eq!(parsed(&["--self-signed-ca", "--v=1"]).unwrap().log_level, tracing::Level::INFO);
    }

    #[test]
    fn the_help_names_every_difference() {
        for difference in DIFFERENCES {
            assert!(HELP.contains(difference), "{difference}");
        }
    }
}
