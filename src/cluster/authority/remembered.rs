//! What shows that the cluster had an authority.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::core::Request;
use kube::core::params::ListParams;
use serde::Deserialize;
use serde_json::json;

use super::{AuthorityError, Failure, Kept, MARKER};
use crate::cluster::call::{Call, Fault, call};
use crate::core::bundle::TrustBundle;
use crate::store::ROOTS;

/// Objects that only an authority makes, wherever they are: what they are called, how they are found.
const TRACES: [(&str, &str, &str); 2] = [
    ("configmaps", "ConfigMap", "metadata.name=istio-ca-root-cert"),
    ("secrets", "secret", "type=istio.io/key-and-cert"),
];
/// So many are looked at together,
const PAGE: u32 = 20;
/// and so many times.
const PAGES: usize = 50;

impl Kept {
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
        match self.create("configmaps", MARKER, &marker).await {
            Ok(()) => Ok(()),
            // What another replica has written down is compared at the next try.
            Err(Fault::Taken(fault)) => Err(Failure::Later(Fault::Taken(fault))),
            Err(fault) => Err(fault.into()),
        }
    }

    /// Something in the cluster, or on this disk, that carries a root.
    pub(super) async fn trace(&self) -> Result<Option<String>, Failure> {
        if self.known.is_some() {
            return Ok(Some("this process, which issues below its root,".to_owned()));
        }
        if self.published()?.is_some() {
            return Ok(Some(self.data.path().join(ROOTS).display().to_string()));
        }
        let traces = if self.as_istio_ca.is_some() { &TRACES[1..] } else { &TRACES[..] };
        let namespace = self.only.as_deref();
        let path =
            namespace.map_or_else(|| "/api/v1".to_owned(), |name| format!("/api/v1/namespaces/{name}"));
        for (resource, kind, selector) in traces {
            let mut params = ListParams::default().fields(selector).limit(PAGE);
            for _ in 0..PAGES {
                let what = Call { verb: "list", resource, namespace, name: None };
                let request = Request::new(format!("{path}/{resource}")).list(&params);
                let page: Page = call(&self.client, what, request).await?;
                if let Some(found) = page.items.iter().find(|item| item.carries_a_root(kind)) {
                    let Metadata { namespace, name } = &found.metadata;
                    return Ok(Some(format!("the {kind} {name} in the namespace {namespace}")));
                }
                match page.metadata.next.filter(|next| !next.is_empty()) {
                    Some(next) => params = params.continue_token(&next),
                    None => break,
                }
            }
        }
        Ok(None)
    }
}

#[derive(Deserialize)]
struct Page {
    #[serde(default)]
    metadata: PageMetadata,
    items: Vec<Item>,
}

#[derive(Default, Deserialize)]
struct PageMetadata {
    #[serde(rename = "continue")]
    next: Option<String>,
}

/// Without the keys.
#[derive(Deserialize)]
struct Item {
    metadata: Metadata,
    #[serde(default)]
    data: Data,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    namespace: String,
    name: String,
}

#[derive(Default, Deserialize)]
struct Data {
    #[serde(rename = "root-cert.pem")]
    roots: Option<String>,
}

impl Item {
    fn carries_a_root(&self, kind: &str) -> bool {
        use base64::Engine as _;
        let Some(text) = &self.data.roots else { return false };
        let text = match kind {
            "ConfigMap" => text.clone().into_bytes(),
            _ => base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_default(),
        };
        TrustBundle::from_pem(&text).is_ok()
    }
}
