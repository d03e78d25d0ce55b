//! Objects as they are read: of each only what is kept. A pod of the API server takes kilobytes, and ten thousand of them
//! are read in pages of five hundred.

use std::borrow::Cow;
use std::marker::PhantomData;

use kube::Resource;
use kube::core::ObjectMeta;
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::core::policy::Wishes;
use crate::core::selection;

/// Something of the kind `K`.
#[derive(Deserialize)]
#[serde(from = "Wire", bound = "")]
pub(super) struct Seen<K> {
    /// Name, namespace, UID and resource version, and nothing else.
    metadata: ObjectMeta,
    /// When it is to be gone, in seconds since 1970.
    pub(super) deleted_at: Option<i64>,
    /// Of a pod: where it runs.
    pub(super) node: Option<String>,
    /// Of a pod: as whom it runs.
    pub(super) account: Option<String>,
    /// Of a pod: whether it has failed or succeeded, and so runs no longer.
    pub(super) ended: bool,
    /// Of an account: what it says of being delivered to.
    pub(super) deliver: Option<bool>,
    /// And of what is delivered.
    pub(super) wishes: Option<Box<Wishes>>,
    kind: PhantomData<fn() -> K>,
}

impl<K> Seen<K> {
    pub(super) fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    pub(super) fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    pub(super) fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }
}

// Derived, it would ask the same of K.
impl<K> Clone for Seen<K> {
    fn clone(&self) -> Self {
        Self {
            metadata: self.metadata.clone(),
            deleted_at: self.deleted_at,
            node: self.node.clone(),
            account: self.account.clone(),
            ended: self.ended,
            deliver: self.deliver,
            wishes: self.wishes.clone(),
            kind: PhantomData,
        }
    }
}

impl<K> std::fmt::Debug for Seen<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} {}", self.namespace(), self.name(), self.uid())
    }
}

impl<K: Resource<DynamicType = ()>> Resource for Seen<K> {
    type DynamicType = ();
    type Scope = K::Scope;

    fn kind(_: &()) -> Cow<'_, str> {
        K::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        K::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        K::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        K::plural(&())
    }

    /// Where a pod runs, and as whom, is not metadata.
    fn metadata_api() -> bool {
        K::kind(&()) != "Pod"
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[derive(Deserialize)]
struct Wire {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    namespace: Option<String>,
    name: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    deletion_timestamp: Option<String>,
    labels: Said,
    annotations: Said,
}

/// Of labels or annotations what Mica reads.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Said {
    #[serde(rename = "mica.dev/deliver")]
    deliver: Option<String>,
    #[serde(rename = "mica.dev/ttl")]
    ttl: Option<String>,
    #[serde(rename = "mica.dev/key-kind")]
    key_kind: Option<String>,
    #[serde(rename = "mica.dev/dns-names")]
    dns_names: Option<String>,
}

impl Said {
    fn wishes(&self) -> Option<Box<Wishes>> {
        // It is refused as what it is.
        let short = |text: &Option<String>| match text {
            Some(text) if text.len() > LONGEST_WISH => Some("(too long)".to_owned()),
            text => text.clone(),
        };
        let [ttl, key_kind, dns_names] = [&self.ttl, &self.key_kind, &self.dns_names].map(short);
        let wishes = Wishes { ttl, key_kind, dns_names };
        (wishes != Wishes::default()).then(|| Box::new(wishes))
    }
}

/// So much of an annotation is read.
const LONGEST_WISH: usize = 4096;

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    node_name: Option<String>,
    service_account_name: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    phase: Option<String>,
}

impl<K> From<Wire> for Seen<K> {
    fn from(wire: Wire) -> Self {
        let Metadata { namespace, name, uid, resource_version, deletion_timestamp, labels, annotations } =
            wire.metadata;
        Self {
            metadata: ObjectMeta { namespace, name, uid, resource_version, ..ObjectMeta::default() },
            // One that cannot be read is long past.
            deleted_at: deletion_timestamp
                .map(|at| OffsetDateTime::parse(&at, &Rfc3339).map_or(0, OffsetDateTime::unix_timestamp)),
            node: wire.spec.node_name,
            account: wire.spec.service_account_name,
            ended: matches!(wire.status.phase.as_deref(), Some("Failed" | "Succeeded")),
            wishes: annotations.wishes(),
            deliver: selection::deliver(labels.deliver.as_deref(), annotations.deliver.as_deref()),
            kind: PhantomData,
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};

    use super::*;

    #[test]
    fn of_a_pod_only_what_is_needed_is_kept() {
        let pod: Seen<Pod> = serde_json::from_str(
            r#"{"kind": "Pod", "metadata": {"name": "web-1", "namespace": "shop", "uid": "u", "resourceVersion": "7",
                "labels": {"a": "b"}, "managedFields": [{"manager": "x"}], "deletionTimestamp": "1970-01-01T00:01:00Z"},
                "spec": {"nodeName": "n", "serviceAccountName": "web", "containers": [{"name": "c"}]},
                "status": {"phase": "Failed", "podIP": "10.0.0.1"}}"#,
        )
        .unwrap();
        assert_eq!((pod.namespace(), pod.name(), pod.uid()), ("shop", "web-1", "u"));
        assert_eq!(pod.meta().resource_version.as_deref(), Some("7"));
        assert_eq!((pod.meta().labels.as_ref(), pod.meta().managed_fields.as_ref()), (None, None));
        assert_eq!((pod.node.as_deref(), pod.account.as_deref()), (Some("n"), Some("web")));
        assert_eq!((pod.deleted_at, pod.ended), (Some(60), true));
        let other: Seen<Pod> = serde_json::from_str(
            r#"{"metadata": {"deletionTimestamp": "soon"}, "status": {"phase": "Unknown"}}"#,
        )
        .unwrap();
        assert_eq!((other.deleted_at, other.ended), (Some(0), false));
    }

    #[test]
    fn accounts_and_nodes_are_asked_for_by_their_metadata_alone() {
        assert!(Seen::<ServiceAccount>::metadata_api() && Seen::<Node>::metadata_api());
        assert!(!Seen::<Pod>::metadata_api());
        assert_eq!(Seen::<Pod>::url_path(&(), Some("shop")), "/api/v1/namespaces/shop/pods");
    }
}
