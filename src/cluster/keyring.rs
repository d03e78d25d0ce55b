//! The keys of JWT-SVIDs, kept in the cluster for all replicas: the secret `mica-jwt-keys`. The one that leads changes it,
//! the others follow; whoever finds none makes it.

use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::core::Request;
use kube::core::params::{GetParams, PostParams};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::call::{Call, Fault, call};
use super::lease::Leadership;
use super::{Cluster, MANAGER};
use crate::core::keyring::Keyring;
use crate::store::KeyringStore;

/// Its name.
const SECRET: &str = "mica-jwt-keys";
/// Its type, so that nothing of somebody else's is taken for it.
const KIND: &str = "mica.dev/jwt-keys";
/// The key in it.
const FILE: &str = "jwt-keys.json";

/// The keys in a secret.
pub struct ClusterKeyring {
    client: Client,
    namespace: String,
    leadership: Leadership,
    /// Of what was read last; none if it was not there.
    version: Option<String>,
}

impl ClusterKeyring {
    /// In the namespace that is Mica's own.
    pub fn new(cluster: &Cluster, leadership: Leadership) -> Self {
        let (client, namespace) = (cluster.client.clone(), cluster.namespace().to_owned());
        Self { client, namespace, leadership, version: None }
    }

    fn call(&self, verb: &'static str) -> Call<'_> {
        Call { verb, resource: "secrets", namespace: Some(&self.namespace), name: Some(SECRET) }
    }

    fn path(&self) -> String {
        format!("/api/v1/namespaces/{}/secrets", self.namespace)
    }

    fn object(&self, keyring: &Keyring) -> Value {
        let about =
            "The keys that Mica signs JWT-SVIDs with. Deleting it ends the tokens of the last minutes.";
        let mut object = json!({
            "apiVersion": "v1", "kind": "Secret", "type": KIND,
            "metadata": {
                "name": SECRET, "namespace": self.namespace,
                "annotations": {"kubernetes.io/description": about},
            },
            "stringData": {FILE: keyring.to_json().as_str()},
        });
        if let Some(version) = &self.version {
            object["metadata"]["resourceVersion"] = version.as_str().into();
        }
        object
    }
}

impl KeyringStore for ClusterKeyring {
    async fn read(&mut self) -> Result<Option<Keyring>, String> {
        let request = Request::new(self.path()).get(SECRET, &GetParams::default());
        let secret: Secret = match call(&self.client, self.call("get"), request).await {
            Ok(secret) => secret,
            Err(Fault::Absent(_)) => {
                self.version = None;
                return Ok(None);
            }
            Err(fault) => return Err(fault.to_string()),
        };
        let namespace = &self.namespace;
        let kind = secret.type_.as_deref().unwrap_or_default();
        if kind != KIND {
            return Err(format!(
                "the secret {SECRET} in the namespace {namespace} is of the type {kind:?}, not {KIND:?}, so somebody else keeps something there; delete it"
            ));
        }
        self.version = secret.metadata.resource_version;
        let text = secret.data.and_then(|mut data| data.remove(FILE)).map(|text| Zeroizing::new(text.0));
        match Keyring::from_json(text.as_deref().map_or(&[][..], |text| text)) {
            Ok(keyring) => Ok(Some(keyring)),
            Err(fault) => {
                tracing::error!(%namespace, secret = SECRET, %fault, "the keys of JWT-SVIDs cannot be read: new ones are made");
                Ok(None)
            }
        }
    }

    async fn write(&mut self, keyring: &Keyring) -> Result<bool, String> {
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        let body = Zeroizing::new(self.object(keyring).to_string().into_bytes()).to_vec();
        let (verb, request) = match self.version {
            None => ("create", Request::new(self.path()).create(&params, body)),
            Some(_) => ("update", Request::new(self.path()).replace(SECRET, &params, body)),
        };
        match call::<serde::de::IgnoredAny>(&self.client, self.call(verb), request).await {
            Ok(_) => Ok(true),
            Err(Fault::Taken(_) | Fault::Absent(_)) => Ok(false),
            Err(fault) => Err(fault.to_string()),
        }
    }

    fn leads(&self) -> bool {
        self.leadership.may_write()
    }

    async fn numbered_from(&self) -> Result<Option<u64>, String> {
        self.leadership.numbered_from().await
    }
}
