//! What an object holds that the roots are distributed in, and who wrote it.

use std::sync::Arc;

use k8s_openapi::api::certificates::v1::ClusterTrustBundle;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::ResourceExt as _;
use kube::core::ObjectMeta;
use ring::digest::{SHA256, digest};

use crate::cluster::{MANAGED_BY, MANAGER};

/// Where a ConfigMap has them, as Istio has it.
pub(super) const KEY: &str = "root-cert.pem";
/// The label that Istio's own has.
pub(super) const LABEL: (&str, &str) = ("istio.io/config", "true");

/// SHA-256 of a bundle's PEM.
pub(super) type Digest = [u8; 32];

/// What is kept of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) uid: Arc<str>,
    /// Greater ones are newer, if it is a number, as it always is.
    version: Option<u64>,
    /// Of the bundle in it; none if there is none, or if the object says wrongly what it is.
    pub(super) digest: Option<Digest>,
    /// Who wrote that; none if it is Mica of this very namespace.
    pub(super) writer: Option<Box<str>>,
}

impl Held {
    /// Of a ConfigMap, by Mica of the namespace `own`.
    pub(super) fn in_config_map(map: &ConfigMap, own: &str) -> Self {
        let text = map.data.as_ref().and_then(|data| data.get(KEY));
        let is_labelled = map.labels().get(LABEL.0).is_some_and(|value| value == LABEL.1);
        let label = format!("f:{}", LABEL.0);
        let fields: [&[&str]; 2] = [&["f:data", "f:root-cert.pem"], &["f:metadata", "f:labels", &label]];
        let fields = if is_labelled { &fields[..1] } else { &fields[1..] };
        Self::new(&map.metadata, text.filter(|_| is_labelled), fields, own)
    }

    /// Of a ClusterTrustBundle for a signer.
    pub(super) fn in_trust_bundle(bundle: &ClusterTrustBundle, signer: &str, own: &str) -> Self {
        let is_ours = bundle.spec.signer_name.as_deref() == Some(signer);
        let fields: [&[&str]; 1] = [&["f:spec", "f:trustBundle"]];
        let text = Some(&bundle.spec.trust_bundle).filter(|_| is_ours);
        Self::new(&bundle.metadata, text, &fields, own)
    }

    fn new(metadata: &ObjectMeta, text: Option<&String>, fields: &[&[&str]], own: &str) -> Self {
        let by = metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY));
        let entries = metadata.managed_fields.as_deref().unwrap_or_default();
        let writer = match writer(entries, fields) {
            MANAGER if by.is_some_and(|by| by == own) => None,
            MANAGER => Some(match by {
                Some(by) => format!("{MANAGER} of the namespace {by}").into(),
                None => MANAGER.into(),
            }),
            other => Some(other.into()),
        };
        Self {
            uid: metadata.uid.as_deref().unwrap_or_default().into(),
            version: metadata.resource_version.as_deref().and_then(|version| version.parse().ok()),
            digest: text.map(|text| digest_of(text)),
            writer,
        }
    }

    /// Whether this was seen before the other one.
    pub(super) fn is_older(&self, other: &Self) -> bool {
        self.version.zip(other.version).is_some_and(|(this, other)| this < other)
    }
}

pub(super) fn digest_of(text: &str) -> Digest {
    let mut sum = Digest::default();
    sum.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
    sum
}

/// Who wrote the fields last; if nobody owns them now, the last other one who wrote anything.
fn writer<'a>(entries: &'a [ManagedFieldsEntry], fields: &[&[&str]]) -> &'a str {
    let owns = |entry: &&ManagedFieldsEntry| {
        let owned = entry.fields_v1.as_ref().map(|owned| &owned.0);
        let has = |path: &&[&str]| path.iter().try_fold(owned?, |owned, field| owned.get(field));
        fields.iter().any(|path| has(path).is_some())
    };
    let is_other = |entry: &&ManagedFieldsEntry| entry.manager.as_deref() != Some(MANAGER);
    let last = |entries: &mut dyn Iterator<Item = &'a ManagedFieldsEntry>| {
        entries.max_by(|a, b| a.time.as_ref().map(|t| t.0).cmp(&b.time.as_ref().map(|t| t.0)))
    };
    last(&mut entries.iter().filter(owns))
        .or_else(|| last(&mut entries.iter().filter(is_other)))
        .and_then(|entry| entry.manager.as_deref())
        .filter(|manager| !manager.is_empty())
        .unwrap_or("an unknown writer")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn entry(manager: &str, at: &str, fields: &Value) -> Value {
        json!({"manager": manager, "operation": "Update", "apiVersion": "v1", "time": at,
            "fieldsType": "FieldsV1", "fieldsV1": fields})
    }

    fn held(labels: &Value, data: &Value, entries: &[Value]) -> Held {
        let map = json!({
            "metadata": {"name": "istio-ca-root-cert", "namespace": "shop", "uid": "u", "resourceVersion": "7",
                "labels": labels, "managedFields": entries},
            "data": data,
        });
        Held::in_config_map(&serde_json::from_value(map).unwrap(), "istio-system")
    }

    #[test]
    fn the_writer_of_what_counts_is_told() {
        let label = json!({"istio.io/config": "true"});
        let ours = json!({"istio.io/config": "true", "mica.dev/managed-by": "istio-system"});
        let theirs = json!({"istio.io/config": "true", "mica.dev/managed-by": "other"});
        let data = json!({"root-cert.pem": "x"});
        let owned = json!({"f:data": {"f:root-cert.pem": {}}});
        let labels = json!({"f:metadata": {"f:labels": {"f:istio.io/config": {}}}});
        let other = json!({"f:metadata": {"f:labels": {"f:more": {}}}});
        let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
        let found = held(&ours, &data, &[entry("mica", early, &owned), entry("kubectl-label", late, &other)]);
        assert_eq!((found.digest, found.writer.as_deref()), (Some(digest_of("x")), None));
        for (labels_now, data, entries, wanted) in [
            (&label, &data, vec![entry("pilot-discovery", early, &owned)], "pilot-discovery"),
            (&theirs, &data, vec![entry("mica", late, &owned)], "mica of the namespace other"),
            (&label, &data, vec![entry("mica", late, &owned)], "mica"),
            (
                &ours,
                &data,
                vec![entry("kubectl-edit", late, &owned), entry("mica", early, &owned)],
                "kubectl-edit",
            ),
            // What is gone is nobody's.
            (
                &ours,
                &json!({}),
                vec![entry("mica", late, &labels), entry("kubectl-patch", early, &other)],
                "kubectl-patch",
            ),
            (&json!({}), &data, vec![entry("mica", late, &owned)], "an unknown writer"),
            (&json!({}), &data, vec![], "an unknown writer"),
            // The label counts, too.
            (
                &json!({"istio.io/config": "false", "mica.dev/managed-by": "istio-system"}),
                &data,
                vec![entry("mica", late, &owned), entry("kubectl-label", early, &labels)],
                "kubectl-label",
            ),
        ] {
            let found = held(labels_now, data, &entries);
            assert_eq!(found.writer.as_deref(), Some(wanted), "{entries:?}");
        }
        assert_eq!(held(&json!({}), &data, &[]).digest, None);
        assert_eq!(held(&label, &json!({}), &[]).digest, None);
    }

    #[test]
    fn versions_are_numbers() {
        let version = |version: &str| {
            let map = json!({"metadata": {"resourceVersion": version}});
            Held::in_config_map(&serde_json::from_value(map).unwrap(), "istio-system")
        };
        assert!(version("9").is_older(&version("10")) && !version("10").is_older(&version("9")));
        assert!(!version("x").is_older(&version("10")) && !version("9").is_older(&version("")));
    }
}
