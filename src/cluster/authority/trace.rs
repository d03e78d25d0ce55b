//! What shows that the cluster had an authority.

use kube::core::Request;
use kube::core::params::ListParams;
use serde::Deserialize;

use super::{Failure, Kept};
use crate::cluster::call::{Call, call};
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
                let page: Page = call(&self.home.client, what, request).await?;
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
