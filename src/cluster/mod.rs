//! A Kubernetes API server: which objects live in it, what it says of tokens, and what its keys are.

mod accounts;
mod authority;
mod call;
mod events;
mod federated;
mod keyring;
mod known;
mod lease;
mod live;
mod metrics;
mod namespaces;
mod node_pods;
mod objects;
mod review;
mod roots;
mod secrets;
mod seen;
mod watch;
mod webhook;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::core::Request;
use kube::core::params::GetParams;
use kube::{Api, Client, Config, Resource};
use serde::Deserialize;

pub use accounts::{AccountSource, Wanted};
pub use authority::{AsIstioCa, AuthorityError, ClusterMemory, ClusterStore};
pub use events::{EventReason, Events, Severity};
pub use federated::{FederatedBundles, Foreign, federated_bundles};
pub use keyring::ClusterKeyring;
pub use lease::{Election, Leadership};
pub use namespaces::{Flips, Namespaces};
pub use node_pods::{NODE_PERMISSIONS, NodePods};
pub use objects::Objects;
pub use review::TokenReviews;
pub use roots::{Roots, RootsOptions};
pub use secrets::{SecretWatch, Secrets, Told};
pub use webhook::{INJECT_PERMISSIONS, WebhookTrust};

use crate::auth::{Answer, KeySource};

/// What Mica asks of the API server, as the rules of a cluster role, for the documents.
///
/// `nodes` is only needed for impersonation, `tokenreviews` only for reviews.
pub const PERMISSIONS: &str = "\
- apiGroups: [\"\"]
  resources: [serviceaccounts, pods, nodes]
  verbs: [get, list, watch]
- apiGroups: [\"\"]
  resources: [namespaces]
  verbs: [list, watch]
- apiGroups: [\"\"]
  resources: [configmaps]
  resourceNames: [istio-ca-root-cert]
  verbs: [list, watch, create, patch]
- apiGroups: [certificates.k8s.io]
  resources: [clustertrustbundles]
  resourceNames: [mica.dev:workload:cluster.local]
  verbs: [list, watch, create, patch]
- apiGroups: [certificates.k8s.io]
  resources: [signers]
  resourceNames: [mica.dev/workload]
  verbs: [attest]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
- apiGroups: [\"\"]
  resources: [secrets]
  verbs: [get, list, watch, create, update, delete]
- apiGroups: [authentication.k8s.io]
  resources: [tokenreviews]
  verbs: [create]
- nonResourceURLs: [/openid/v1/jwks, /.well-known/openid-configuration]
  verbs: [get]
";

/// What Mica asks of the API server in the namespace that the authority is kept in, as the rules of a role.
pub const OWN_PERMISSIONS: &str = "\
- apiGroups: [\"\"]
  resources: [secrets]
  resourceNames: [cacerts, istio-ca-secret]
  verbs: [get, watch]
- apiGroups: [\"\"]
  resources: [secrets]
  resourceNames: [mica-jwt-keys]
  verbs: [get, update]
- apiGroups: [\"\"]
  resources: [configmaps]
  resourceNames: [mica-authority]
  verbs: [get]
- apiGroups: [\"\"]
  resources: [secrets, configmaps]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [mica]
  verbs: [get, update]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
";

/// Where the authority is kept, unless something else is said: where Istio keeps it.
const NAMESPACE: &str = "istio-system";

/// As whom Mica writes: the field manager of its objects.
pub const MANAGER: &str = "mica";
/// The label of its objects, with its own namespace for a value.
pub const MANAGED_BY: &str = "mica.dev/managed-by";

/// A single request, waiting for its turn included.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why the API server is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing says where it is.
    #[error(
        "no API server to ask: {0}; set KUBECONFIG to a file that kubectl can use, or run in a pod with a service account"
    )]
    Nowhere(String),
    /// What says where it is cannot be used.
    #[error("the kubeconfig cannot be used: {0}; try `kubectl config view`")]
    Kubeconfig(String),
    /// The way to it cannot be used.
    #[error("the API server at {place} cannot be asked: {fault}")]
    Client {
        /// Its address.
        place: String,
        /// What is wrong.
        fault: String,
    },
    /// It was asked and did not answer well.
    #[error("the API server gave no {what} at {place}: {fault}")]
    Answer {
        /// What was asked for.
        what: &'static str,
        /// From where.
        place: String,
        /// What came instead.
        fault: String,
    },
}

/// A connection to an API server. Nothing is asked until somebody wants to know.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    place: Arc<str>,
    /// Of the pod that this runs in.
    namespace: Option<Arc<str>>,
    watches: watch::Watches,
    /// The only namespace that is asked about.
    only: Option<Arc<str>>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cluster").field(&self.place).finish()
    }
}

impl Cluster {
    /// The API server that a kubeconfig names.
    pub async fn named(kubeconfig: &Path) -> Result<Self, Error> {
        let read = async {
            let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
        };
        match read.await {
            Ok(config) => Self::new(config),
            // As below.
            Err(KubeconfigError::Parse(_)) => Err(Error::Kubeconfig("it is no kubeconfig".to_owned())),
            Err(fault) => Err(Error::Kubeconfig(fault.to_string())),
        }
    }

    /// The API server that `KUBECONFIG` or `~/.kube/config` names, or the one of the pod that this runs in.
    pub async fn find() -> Result<Self, Error> {
        let missing = match Config::from_kubeconfig(&KubeConfigOptions::default()).await {
            Ok(config) => return Self::new(config),
            Err(KubeconfigError::ReadConfig(fault, path)) if fault.kind() == io::ErrorKind::NotFound => {
                format!("there is no {}", path.display())
            }
            Err(KubeconfigError::FindPath) => "there is no home folder".to_owned(),
            // What the reader says of it shows lines of the file, which may hold keys and tokens.
            Err(KubeconfigError::Parse(_)) => {
                return Err(Error::Kubeconfig("it is no kubeconfig".to_owned()));
            }
            Err(fault) => return Err(Error::Kubeconfig(fault.to_string())),
        };
        match Config::incluster() {
            Ok(config) => {
                let namespace = config.default_namespace.as_str().into();
                Ok(Self { namespace: Some(namespace), ..Self::new(config)? })
            }
            Err(fault) => Err(Error::Nowhere(format!("{missing}, and this is no pod: {fault}"))),
        }
    }

    /// The API server of a configuration.
    pub fn new(mut config: Config) -> Result<Self, Error> {
        let place: Arc<str> = config.cluster_url.to_string().trim_end_matches('/').into();
        config.connect_timeout = Some(PATIENCE);
        // Whoever asks decides whether to ask again.
        config.default_retry = false;
        let client = Client::try_from(config)
            .map_err(|fault| Error::Client { place: place.to_string(), fault: fault.to_string() })?;
        Ok(Self { client, place, namespace: None, only: None, watches: watch::Watches::default() })
    }

    /// Its address.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// With another namespace of Mica's own.
    pub fn within(self, namespace: &str) -> Self {
        Self { namespace: Some(namespace.into()), ..self }
    }

    /// The namespace that is Mica's own: that of its pod, unless something else was said.
    pub fn namespace(&self) -> &str {
        self.namespace.as_deref().unwrap_or(NAMESPACE)
    }

    /// One of which only this namespace, and its own, are asked about.
    pub fn only(self, namespace: &str) -> Self {
        Self { only: Some(namespace.into()), ..self }
    }

    /// What is in all namespaces, or in the only one.
    fn all<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        match &self.only {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    /// The issuer of its service account tokens.
    pub async fn issuer(&self) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Discovery {
            issuer: String,
        }
        let (what, place) = ("token issuer", format!("{}/.well-known/openid-configuration", self.place));
        let text = match self.get("/.well-known", "openid-configuration").await {
            Ok(text) => text,
            Err(fault) => return Err(Error::Answer { what, place, fault }),
        };
        serde_json::from_str(&text).map(|found: Discovery| found.issuer).map_err(|fault| Error::Answer {
            what,
            place,
            fault: fault.to_string(),
        })
    }

    async fn get(&self, folder: &str, name: &str) -> Result<String, String> {
        let request = Request::new(folder).get(name, &GetParams::default()).map_err(|e| e.to_string())?;
        in_time(self.client.request_text(request)).await
    }
}

impl KeySource for Cluster {
    fn fetch(&self) -> Answer<'_, Result<Vec<u8>, String>> {
        Box::pin(async {
            let keys = self.get("/openid/v1", "jwks").await;
            keys.map(String::into_bytes).map_err(|fault| format!("{}: {fault}", KeySource::place(self)))
        })
    }

    fn place(&self) -> String {
        format!("{}/openid/v1/jwks", self.place)
    }
}

async fn in_time<T>(asked: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(fault)) => Err(said(&fault)),
        Err(_) => Err(format!("no answer within {} seconds", PATIENCE.as_secs())),
    }
}

/// What went wrong, in one line: the API server's own words where it has said something, else all causes, since the
/// outermost error alone says only that there was one.
fn said(fault: &(dyn std::error::Error + 'static)) -> String {
    let mut text = fault.to_string();
    let mut next = Some(fault);
    while let Some(cause) = next {
        if let Some(kube::Error::Api(status)) = cause.downcast_ref() {
            return format!("{} ({})", status.message, status.code);
        }
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    text
}
