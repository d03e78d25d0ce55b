//! The namespace that the authority is kept in, and the ConfigMap there that holds the roots it has known.

use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference};
use kube::Client;
use kube::core::Request;
use kube::core::params::{GetParams, PostParams};
use serde_json::json;
use zeroize::Zeroizing;

use super::{AuthorityError, Failure, MARKER};
use crate::cluster::call::{Call, Fault, call};
use crate::cluster::{Cluster, MANAGER};
use crate::core::bundle::TrustBundle;
use crate::store::ROOTS;

/// That namespace.
#[derive(Clone)]
pub(super) struct Home {
    pub(super) client: Client,
    pub(super) namespace: String,
}

impl Home {
    pub(super) fn new(cluster: &Cluster) -> Self {
        Self { client: cluster.client.clone(), namespace: cluster.namespace().to_owned() }
    }

    pub(super) async fn get<T: serde::de::DeserializeOwned>(
        &self,
        resource: &'static str,
        name: &'static str,
    ) -> Result<Option<T>, Fault> {
        let what = Call { verb: "get", resource, namespace: Some(&self.namespace), name: Some(name) };
        let request = Request::new(self.path(resource)).get(name, &GetParams::default());
        match call(&self.client, what, request).await {
            Ok(object) => Ok(Some(object)),
            Err(Fault::Absent(_)) => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Whether it was created, which it is not if there is one.
    pub(super) async fn create(
        &self,
        resource: &'static str,
        name: &'static str,
        object: &serde_json::Value,
    ) -> Result<bool, Failure> {
        let what = Call { verb: "create", resource, namespace: Some(&self.namespace), name: Some(name) };
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        let body = Zeroizing::new(object.to_string().into_bytes());
        let request = Request::new(self.path(resource)).create(&params, body.to_vec());
        match call::<serde::de::IgnoredAny>(&self.client, what, request).await {
            Ok(_) => Ok(true),
            Err(Fault::Taken(_)) => Ok(false),
            Err(Fault::Absent(_)) => {
                Err(AuthorityError::NoNamespace { namespace: self.namespace.clone() }.into())
            }
            Err(fault) => Err(fault.into()),
        }
    }

    /// The roots that the marker holds.
    pub(super) fn roots_of(&self, marker: &ConfigMap) -> Result<TrustBundle, AuthorityError> {
        let bad = |fault: String| AuthorityError::Marker { namespace: self.namespace.clone(), fault };
        let text = marker.data.as_ref().and_then(|data| data.get(ROOTS));
        let text = text.ok_or_else(|| bad(format!("it has no {ROOTS}")))?;
        TrustBundle::from_pem(text.as_bytes()).map_err(|fault| bad(format!("{ROOTS}: {fault}")))
    }

    /// Writes down the roots, before anything is issued below them.
    pub(super) async fn mark(&self, bundle: &TrustBundle) -> Result<(), Failure> {
        let about = "The roots that this cluster has known. Mica refuses to begin with others, and makes no new ones while this is there.";
        let marker = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "immutable": true,
            "metadata": {
                "name": MARKER, "namespace": self.namespace,
                "annotations": {"kubernetes.io/description": about},
            },
            "data": {ROOTS: &**bundle.pem()},
        });
        if self.create("configmaps", MARKER, &marker).await? {
            return Ok(());
        }
        // What another replica has written down is compared at the next try.
        let fault = format!("another replica has just written the ConfigMap {MARKER}");
        Err(Failure::Later(Fault::Taken(fault)))
    }

    /// How the marker is called as a witness.
    pub(super) fn marker(&self) -> String {
        format!("the ConfigMap {MARKER} in the namespace {}", self.namespace)
    }

    /// What an Event is about.
    pub(super) fn reference(&self, kind: &str, name: &str) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some(kind.to_owned()),
            name: Some(name.to_owned()),
            namespace: Some(self.namespace.clone()),
            ..ObjectReference::default()
        }
    }

    fn path(&self, resource: &str) -> String {
        format!("/api/v1/namespaces/{}/{resource}", self.namespace)
    }
}
