//! The flags of `mica serve`. Each can also be set by the environment variable `MICA_<FLAG>`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::inject::{InjectMode, Typed, mounted, reachable};
use super::istio_ca::IstioCa;
use super::trace::{otlp, zipkin};
use crate::core::inject::Wish;
use crate::core::key::KeyKind;
use crate::core::lifetime::Lifetime;
use crate::core::profile::DnsName;
use crate::core::spiffe::{TrustDomain, is_dns_subdomain, is_namespace};
use crate::core::url::Collector;
use crate::telemetry::LogFormat;

const EXAMPLES: &str = "\
Examples:
  mica serve examples/bookinfo
  mica serve manifests/ --trust-domain example.org --ttl 1h
  mica serve manifests/ --token-issuer https://kubernetes.default.svc.cluster.local --token-jwks jwks.json
  mica serve manifests/ --authority /etc/mica/ca --secrets /var/lib/mica/secrets --secrets-group 1337 --secrets-mode 0640
  mica serve --kube --authority /etc/mica/ca --data-dir /var/lib/mica --grpc-address 0.0.0.0:15012

Each flag can also be set by the environment variable MICA_<FLAG>, such as MICA_TRUST_DOMAIN.";

/// Run the authority: service accounts in, rotating certificates out.
///
/// Reads the service accounts from the Kubernetes manifests below DIR (ServiceAccounts, and the accounts of pods and
/// workloads), makes a root on the first start, and keeps a certificate, a key and the trust bundle for each account in
/// <SECRETS>/<namespace>/istio.<account>/, which proxies mount. Changes below DIR are followed within two seconds.
///
/// With --kube the accounts are those of a Kubernetes cluster: each has a Secret istio.<account>, which its pods mount,
/// and gets certificates when it asks for them with a token.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Folder of Kubernetes manifests (.yaml, .yml, .json), nested as you like
    #[arg(value_name = "DIR", env = "MICA_DIR", hide_env = true)]
    pub source: Option<PathBuf>,

    /// Serve the accounts of a cluster: its API server is the one of KUBECONFIG or ~/.kube/config, or of the pod that
    /// mica runs in
    #[arg(long, env = "MICA_KUBE", hide_env = true)]
    pub kube: bool,

    /// Namespace that the authority is kept in, in the cluster [default: the one of the pod that mica runs in, else
    /// istio-system]
    #[arg(
        long,
        value_name = "NAME",
        requires = "kube",
        value_parser = namespace,
        env = "MICA_NAMESPACE",
        hide_env = true
    )]
    pub namespace: Option<String>,

    /// Namespaces to watch, and no others [default: all]
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        requires = "kube",
        value_parser = namespace,
        env = "MICA_WATCH_NAMESPACES",
        hide_env = true
    )]
    pub watch_namespaces: Vec<String>,

    /// Whether namespaces are served that no label ca.istio.io/override or ca.istio.io/env says anything about
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = true,
        action = clap::ArgAction::Set,
        requires = "kube",
        env = "MICA_NAMESPACES_BY_DEFAULT",
        hide_env = true
    )]
    pub namespaces_by_default: bool,

    /// ConfigMap to keep in each namespace that is served, with the roots as its root-cert.pem; none keeps none
    #[arg(
        long,
        value_name = "NAME",
        default_value = "istio-ca-root-cert",
        value_parser = config_map,
        requires = "kube",
        env = "MICA_ROOT_CONFIG_MAP",
        hide_env = true
    )]
    pub root_config_map: String,

    /// Whether to keep the ClusterTrustBundle mica.dev:workload:<TRUST_DOMAIN> (certificates.k8s.io/v1)
    #[arg(
        long,
        value_name = "BOOL",
        default_value_t = true,
        action = clap::ArgAction::Set,
        requires = "kube",
        env = "MICA_CLUSTER_TRUST_BUNDLE",
        hide_env = true
    )]
    pub cluster_trust_bundle: bool,

    /// Folder for the authority's own state; made if missing, and held by one mica at a time
    #[arg(long, value_name = "DIR", default_value = "./.mica", env = "MICA_DATA_DIR", hide_env = true)]
    pub data_dir: PathBuf,

    /// Folder to deliver to [default: <DATA_DIR>/secrets]
    #[arg(long, value_name = "DIR", env = "MICA_SECRETS", hide_env = true)]
    pub secrets: Option<PathBuf>,

    /// Trust domain of every identity
    #[arg(
        long,
        value_name = "NAME",
        default_value = "cluster.local",
        env = "MICA_TRUST_DOMAIN",
        hide_env = true
    )]
    pub trust_domain: TrustDomain,

    /// Lifetime of the certificates, from 10s up (s, m, h, d or y)
    #[arg(long, value_name = "DURATION", default_value = "24h", env = "MICA_TTL", hide_env = true)]
    pub ttl: Lifetime,

    /// Longest lifetime that may be asked for (s, m, h, d or y)
    #[arg(long, value_name = "DURATION", default_value = "90d", env = "MICA_MAX_TTL", hide_env = true)]
    pub max_ttl: Lifetime,

    /// Who may have which certificate over the gRPC port (YAML); read again when it changes [default: each account its
    /// own identity, without DNS names]
    #[arg(long, value_name = "FILE", env = "MICA_POLICY", hide_env = true)]
    pub policy: Option<PathBuf>,

    /// Kind of the keys that are made for the accounts
    #[arg(long, value_name = "KIND", default_value = "p256", env = "MICA_KEY_KIND", hide_env = true)]
    pub key_kind: MadeKind,

    /// Bring your own CA: a folder of ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem, or of tls.crt, tls.key
    /// and ca.crt; a new intermediate below the same root is taken while running
    #[arg(long, value_name = "DIR", env = "MICA_AUTHORITY", hide_env = true)]
    pub authority: Option<PathBuf>,

    /// File whose first line is the passphrase of the brought CA's key
    #[arg(long, value_name = "FILE", requires = "authority", env = "MICA_PASSPHRASE_FILE", hide_env = true)]
    pub passphrase_file: Option<PathBuf>,

    /// Owner of the delivered files, as a number [default: whoever runs mica]
    #[arg(long, value_name = "UID", env = "MICA_SECRETS_OWNER", hide_env = true)]
    pub secrets_owner: Option<u32>,

    /// Group of the delivered files, as a number [default: whoever runs mica]
    #[arg(long, value_name = "GID", env = "MICA_SECRETS_GROUP", hide_env = true)]
    pub secrets_group: Option<u32>,

    /// Mode of the delivered files; their folders can be entered by those who can read them
    #[arg(
        long,
        value_name = "MODE",
        default_value = "0600",
        value_parser = mode,
        env = "MICA_SECRETS_MODE",
        hide_env = true
    )]
    pub secrets_mode: u32,

    /// Where the gRPC services listen, over TLS; port 0 picks a free one
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:15012",
        env = "MICA_GRPC_ADDRESS",
        hide_env = true
    )]
    pub grpc_address: SocketAddr,

    /// Where /livez, /readyz and /metrics listen, over plain HTTP; port 0 picks a free one
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:15014",
        env = "MICA_HTTP_ADDRESS",
        hide_env = true
    )]
    pub http_address: SocketAddr,

    /// Where the SPIFFE bundle endpoint listens, over TLS, for other trust domains; port 0 picks a free one [default: none]
    #[arg(long, value_name = "ADDRESS", env = "MICA_BUNDLE_ADDRESS", hide_env = true)]
    pub bundle_address: Option<SocketAddr>,

    /// Certificate of the bundle endpoint, leaf first (PEM), for https_web; read again when it changes [default: an
    /// X509-SVID of the trust domain's own, for https_spiffe]
    #[arg(
        long,
        value_name = "FILE",
        requires_all = ["bundle_address", "bundle_key"],
        env = "MICA_BUNDLE_CERTIFICATE",
        hide_env = true
    )]
    pub bundle_certificate: Option<PathBuf>,

    /// Key of that certificate (PEM)
    #[arg(
        long,
        value_name = "FILE",
        requires_all = ["bundle_address", "bundle_certificate"],
        env = "MICA_BUNDLE_KEY",
        hide_env = true
    )]
    pub bundle_key: Option<PathBuf>,

    /// Which other trust domains' bundles are fetched, and from where (YAML); read again when it changes
    #[arg(long, value_name = "FILE", env = "MICA_FEDERATION", hide_env = true)]
    pub federation: Option<PathBuf>,

    /// ConfigMap to keep in each namespace that is served, with those bundles as SPIFFE JSON [default: none]
    #[arg(
        long,
        value_name = "NAME",
        value_parser = config_map,
        requires_all = ["kube", "federation"],
        env = "MICA_FEDERATED_CONFIG_MAP",
        hide_env = true
    )]
    pub federated_config_map: Option<String>,

    /// DNS names and addresses of the gRPC port's certificate
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        default_values_t = default_names(),
        env = "MICA_DNS_NAMES",
        hide_env = true
    )]
    pub dns_names: Vec<ServingName>,

    /// Issuer of the service account tokens to take, as their iss says it; without --token-jwks an https URL whose
    /// .well-known/openid-configuration says where its keys are [default: none; the API server's and its keys with --kube]
    #[arg(long, value_name = "ISSUER", env = "MICA_TOKEN_ISSUER", hide_env = true)]
    pub token_issuer: Option<String>,

    /// File or https URL of that issuer's public keys (a JWK Set)
    #[arg(
        long,
        value_name = "FILE-OR-URL",
        requires = "token_issuer",
        env = "MICA_TOKEN_JWKS",
        hide_env = true
    )]
    pub token_jwks: Option<String>,

    /// What has to be among the aud of service account tokens
    #[arg(
        long,
        value_name = "NAME",
        default_value = "istio-ca",
        value_parser = clap::builder::NonEmptyStringValueParser::new(),
        env = "MICA_TOKEN_AUDIENCE",
        hide_env = true
    )]
    pub token_audience: String,

    /// Take a service account's token only if the API server vouches for it, too (TokenReview; needs --kube)
    #[arg(long, requires = "kube", env = "MICA_TOKEN_REVIEW", hide_env = true)]
    pub token_review: bool,

    /// Take the tokens that `mica token new` makes, for trials: whoever can read the data folder can be any account
    #[arg(long, env = "MICA_TRIAL_TOKENS", hide_env = true)]
    pub trial_tokens: bool,

    /// Where spans go.
    #[command(flatten)]
    pub trace: super::trace::Args,

    /// How the log is written [default: human on a terminal, else json]
    #[arg(long, value_name = "FORMAT", value_enum, env = "MICA_LOG_FORMAT", hide_env = true)]
    pub log_format: Option<LogFormat>,

    /// What is logged: error, warn, info or debug
    #[arg(long, value_name = "LEVEL", default_value = "info", env = "MICA_LOG_LEVEL", hide_env = true)]
    pub log_level: tracing::Level,

    /// Where the API server asks what pods that are being made lack, over TLS (an admission webhook) [default: none]
    #[arg(long, value_name = "ADDRESS", requires = "kube", env = "MICA_INJECT_ADDRESS", hide_env = true)]
    pub inject_address: Option<SocketAddr>,

    /// DNS names and addresses of that port's certificate [default: mica-inject.<NAMESPACE>.svc]
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        requires = "inject_address",
        env = "MICA_INJECT_DNS_NAMES",
        hide_env = true
    )]
    pub inject_dns_names: Vec<ServingName>,

    /// MutatingWebhookConfiguration whose caBundle is kept, or none
    #[arg(
        long,
        value_name = "NAME",
        default_value = "mica-inject",
        value_parser = webhook,
        env = "MICA_INJECT_WEBHOOK",
        hide_env = true
    )]
    pub inject_webhook: String,

    /// What pods get from that port, as of `mica inject --mode`
    #[arg(
        long,
        value_name = "MODE",
        value_enum,
        default_value_t = InjectMode::Secret,
        env = "MICA_INJECT_MODE",
        hide_env = true
    )]
    pub inject_mode: InjectMode,

    /// The container that it is for, as of `mica inject --container` [default: istio-proxy; with --inject-mode token
    /// mica-agent]
    #[arg(
        long,
        value_name = "NAME",
        requires = "inject_address",
        value_parser = clap::builder::NonEmptyStringValueParser::new(),
        env = "MICA_INJECT_CONTAINER",
        hide_env = true
    )]
    pub inject_container: Option<String>,

    /// With --inject-mode agent: its image, as of `mica inject --image` [default: localhost/mica:<this version>]
    #[arg(
        long,
        value_name = "IMAGE",
        requires = "inject_address",
        value_parser = clap::builder::NonEmptyStringValueParser::new(),
        env = "MICA_INJECT_IMAGE",
        hide_env = true
    )]
    pub inject_image: Option<String>,

    /// With --inject-mode agent: where it keeps files too, as of `mica inject --files` [default: none]
    #[arg(
        long,
        value_name = "DIR",
        requires = "inject_address",
        value_parser = mounted,
        env = "MICA_INJECT_FILES",
        hide_env = true
    )]
    pub inject_files: Option<String>,

    /// With --inject-mode agent: where its /livez, /readyz and /metrics listen, as of `mica inject --metrics-address`
    /// [default: a port of loopback]
    #[arg(
        long,
        value_name = "ADDRESS",
        requires = "inject_address",
        value_parser = reachable,
        env = "MICA_INJECT_METRICS_ADDRESS",
        hide_env = true
    )]
    pub inject_metrics_address: Option<SocketAddr>,

    /// With --inject-mode agent: its --trace-otlp, as of `mica inject` [default: none]
    #[arg(
        long,
        value_name = "URL",
        requires = "inject_address",
        value_parser = otlp,
        env = "MICA_INJECT_TRACE_OTLP",
        hide_env = true
    )]
    pub inject_trace_otlp: Option<Collector>,

    /// With --inject-mode agent: its --trace-zipkin, as of `mica inject` [default: none]
    #[arg(
        long,
        value_name = "URL",
        requires = "inject_address",
        value_parser = zipkin,
        env = "MICA_INJECT_TRACE_ZIPKIN",
        hide_env = true
    )]
    pub inject_trace_zipkin: Option<Collector>,

    /// What else `mica istio-ca` asks for.
    #[arg(skip)]
    pub istio_ca: Option<Box<IstioCa>>,
}

/// Where the service accounts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// In a folder of manifests.
    Folder(&'a Path),
    /// In a cluster.
    Cluster,
}

impl Args {
    /// Where the service accounts are, unless what was typed contradicts itself.
    pub fn origin(&self) -> Result<Origin<'_>, String> {
        match (&self.source, self.kube) {
            (Some(folder), false) => return Ok(Origin::Folder(folder)),
            (Some(folder), true) => {
                let folder = folder.display();
                return Err(format!(
                    "the folder {folder} and --kube were given: service accounts come from one of them"
                ));
            }
            (None, false) => {
                return Err(
                    "no service accounts were given: name a folder of manifests, such as `mica serve examples/bookinfo`, or add --kube".to_owned(),
                );
            }
            (None, true) => {}
        }
        if self.trial_tokens {
            return Err(
                "--trial-tokens is not for clusters: leave it out, and take the tokens that the cluster makes"
                    .to_owned(),
            );
        }
        if let (Some(name), root) = (self.federated_config_map(), self.root_config_map())
            && Some(name) == root
        {
            return Err(format!(
                "--federated-config-map {name} is the name of the ConfigMap of the roots: give another"
            ));
        }
        let delivery = [
            ("--secrets", self.secrets.is_some()),
            ("--secrets-owner", self.secrets_owner.is_some()),
            ("--secrets-group", self.secrets_group.is_some()),
        ];
        if let Some((flag, _)) = delivery.iter().find(|(_, given)| *given) {
            return Err(format!("{flag} is of no use with --kube, which delivers no files; leave it out"));
        }
        if self.cluster_trust_bundle && !self.trust_domain.is_dns_subdomain() {
            return Err(format!(
                "--trust-domain {} cannot be in the name of a ClusterTrustBundle, since it is no DNS subdomain: give another one, or --cluster-trust-bundle false",
                self.trust_domain
            ));
        }
        Ok(Origin::Cluster)
    }

    /// What pods get from the admission webhook in a cluster whose Mica is in a namespace, if there is one.
    pub fn injection(&self, namespace: &str) -> Result<Option<Wish>, String> {
        let typed = Typed {
            prefix: "--inject-",
            mode: self.inject_mode,
            container: self.inject_container.as_deref(),
            image: self.inject_image.as_deref(),
            files: self.inject_files.as_deref(),
            metrics: self.inject_metrics_address,
            otlp: self.inject_trace_otlp.as_ref(),
            zipkin: self.inject_trace_zipkin.as_ref(),
            authority: &format!("mica.{namespace}.svc:15012"),
            audience: &self.token_audience,
        };
        self.inject_address.map(|_| typed.wish()).transpose()
    }

    /// The names of its certificate.
    pub fn inject_names(&self, namespace: &str) -> Vec<ServingName> {
        if self.inject_dns_names.is_empty() {
            let name = format!("mica-inject.{namespace}.svc");
            return name.parse().map(ServingName::Dns).into_iter().collect();
        }
        self.inject_dns_names.clone()
    }

    /// The MutatingWebhookConfiguration to keep, if there is one.
    pub fn inject_webhook(&self) -> Option<&str> {
        self.inject_address?;
        Some(self.inject_webhook.as_str()).filter(|name| *name != NONE)
    }

    /// The name of the ConfigMap that the roots are distributed in, if they are.
    pub fn root_config_map(&self) -> Option<&str> {
        Some(self.root_config_map.as_str()).filter(|name| *name != NONE)
    }

    /// The name of the ConfigMap that the bundles of other trust domains are distributed in, if they are.
    pub fn federated_config_map(&self) -> Option<&str> {
        self.federated_config_map.as_deref().filter(|name| *name != NONE)
    }
}

/// In place of a name: there is to be none.
const NONE: &str = "none";

/// The kinds of keys that Mica makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MadeKind {
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
    /// Ed25519; Envoy takes it only where its signature_algorithms name it.
    Ed25519,
}

impl From<MadeKind> for KeyKind {
    fn from(kind: MadeKind) -> Self {
        match kind {
            MadeKind::P256 => Self::P256,
            MadeKind::P384 => Self::P384,
            MadeKind::Ed25519 => Self::Ed25519,
        }
    }
}

/// A name or an address that clients reach Mica by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServingName {
    /// A DNS name.
    Dns(DnsName),
    /// An IP address.
    Address(IpAddr),
}

impl std::str::FromStr for ServingName {
    type Err = crate::core::profile::DnsNameError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        name.parse().map(Self::Address).or_else(|_| name.parse().map(Self::Dns))
    }
}

impl std::fmt::Display for ServingName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dns(name) => name.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// What istiod and istio-ca are reached by, and this machine.
pub(super) fn default_names() -> Vec<ServingName> {
    ["istiod.istio-system.svc", "istio-ca", "istio-ca.istio-system.svc", "localhost"]
        .into_iter()
        .filter_map(|name| name.parse().ok().map(ServingName::Dns))
        .chain([Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()].map(ServingName::Address))
        .collect()
}

fn namespace(name: &str) -> Result<String, String> {
    if is_namespace(name) {
        Ok(name.to_owned())
    } else {
        Err("no namespace can have this name: give 1 to 63 of a-z, 0-9 and -, with none of them - at an end"
            .to_owned())
    }
}

fn webhook(name: &str) -> Result<String, String> {
    match name {
        "" => Ok(NONE.to_owned()),
        name if is_dns_subdomain(name) => Ok(name.to_owned()),
        _ => {
            Err("no MutatingWebhookConfiguration can have this name: give a DNS subdomain, or none"
                .to_owned())
        }
    }
}

fn config_map(name: &str) -> Result<String, String> {
    match name {
        "" => Ok(NONE.to_owned()),
        name if is_dns_subdomain(name) => Ok(name.to_owned()),
        _ => Err("no ConfigMap can have this name: give a DNS subdomain, or none".to_owned()),
    }
}

pub(super) fn mode(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| mode & !0o777 == 0)
        .ok_or_else(|| format!("{text:?} is no file mode; give one in octal, such as 0600 or 0640"))
}
