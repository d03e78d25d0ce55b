//! A secret as it is kept: what Mica reads of it and writes into it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::Secret;
use kube::Resource;
use kube::core::ObjectMeta;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use zeroize::Zeroizing;

use crate::cluster::MANAGED_BY;
use crate::core::certificate::Certificate;
use crate::core::plan::{CertificateSet, Good};
use crate::core::spiffe::ServiceAccount;
use crate::sink::Error;

/// The type of the secrets of Istio's CA.
pub(super) const TYPE: &str = "istio.io/key-and-cert";
/// Whose secret it is, as Istio's CA notes it.
const ACCOUNT: &str = "istio.io/service-account.name";
/// For people and tools: when it ends, when it is renewed, and which it is.
const NOT_AFTER: &str = "mica.dev/not-after";
const RENEW_AT: &str = "mica.dev/renew-at";
const SERIAL: &str = "mica.dev/serial";
const PREFIX: &str = "istio.";
const CHAIN: &str = "cert-chain.pem";
const KEY: &str = "key.pem";
const ROOTS: &str = "root-cert.pem";

/// The name of an account's secret.
pub(super) fn name(account: &ServiceAccount) -> String {
    format!("{PREFIX}{}", account.name())
}

/// A new secret.
pub(super) fn new(
    account: &ServiceAccount,
    set: &CertificateSet,
    own: &str,
    uid: &str,
) -> Result<Value, Error> {
    let mut object = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "type": TYPE,
        "metadata": {"namespace": account.namespace(), "name": name(account)},
    });
    fill(&mut object, account, set, own, uid)?;
    Ok(object)
}

/// Puts a set into a secret. What others have added stays.
pub(super) fn fill(
    object: &mut Value,
    account: &ServiceAccount,
    set: &CertificateSet,
    own: &str,
    uid: &str,
) -> Result<(), Error> {
    mark(object, account, set, own, uid)?;
    let data = map(&mut object["data"]);
    for (key, text) in [(CHAIN, set.chain_pem.as_str()), (KEY, &set.key_pem), (ROOTS, &set.roots_pem)] {
        data.insert(key.to_owned(), STANDARD.encode(text).into());
    }
    Ok(())
}

/// Marks a secret with a good set as Mica's own.
pub(super) fn mark(
    object: &mut Value,
    account: &ServiceAccount,
    set: &CertificateSet,
    own: &str,
    uid: &str,
) -> Result<(), Error> {
    let leaf =
        Certificate::all_from_pem(set.chain_pem.as_bytes()).ok().and_then(|chain| chain.into_iter().next());
    let leaf = leaf.ok_or(Error::Changed)?;
    let good = Good::of(leaf.validity, &leaf.serial);
    let moment = |at: time::OffsetDateTime| {
        at.replace_nanosecond(0).unwrap_or(at).format(&Rfc3339).unwrap_or_default()
    };
    let metadata = map(&mut object["metadata"]);
    let annotations = map(metadata.entry("annotations").or_insert(Value::Null));
    for (key, text) in [
        (ACCOUNT, account.name().to_owned()),
        (NOT_AFTER, moment(good.not_after)),
        (RENEW_AT, moment(good.renew_at)),
        (SERIAL, leaf.serial_text()),
    ] {
        annotations.insert(key.to_owned(), text.into());
    }
    map(metadata.entry("labels").or_insert(Value::Null)).insert(MANAGED_BY.to_owned(), own.into());
    let owners = metadata.entry("ownerReferences").or_insert(Value::Null);
    let mut all = owners.as_array_mut().map(std::mem::take).unwrap_or_default();
    all.retain(|owner| owner["kind"] != "ServiceAccount");
    all.push(json!({"apiVersion": "v1", "kind": "ServiceAccount", "name": account.name(), "uid": uid}));
    *owners = all.into();
    Ok(())
}

/// Of a secret what Mica wants to know.
#[derive(Clone, Deserialize)]
pub(super) struct Stored {
    metadata: ObjectMeta,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    data: Option<BTreeMap<String, Hidden>>,
}

/// Base64 of what may be a key.
#[derive(Clone, Deserialize)]
#[serde(from = "String")]
struct Hidden(Zeroizing<String>);

impl From<String> for Hidden {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

/// Whether a secret has the marks of Mica's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marks {
    Whole,
    Missing,
    /// Its owner is an account of the same name that is no more.
    Another,
}

impl Stored {
    pub(super) fn of(object: &Value) -> Result<Self, Error> {
        Self::deserialize(object)
            .map_err(|fault| Error::Api { doing: "reading its secret", fault: fault.to_string() })
    }

    /// The account whose secret it is, by its name.
    pub(super) fn account(&self) -> Option<ServiceAccount> {
        let name = self.metadata.name.as_deref()?.strip_prefix(PREFIX)?;
        ServiceAccount::new(self.metadata.namespace.as_deref()?, name).ok()
    }

    /// As a number; the API server says that they grow.
    pub(super) fn version(&self) -> u64 {
        self.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
    }

    /// Istio's or Mica's, or why it is neither.
    pub(super) fn is_ours(&self, account: &ServiceAccount, own: &str) -> Result<(), String> {
        let name = name(account);
        if self.kind != TYPE {
            return Err(format!("the secret {name} has the type {:?}, not {TYPE}", self.kind));
        }
        match self.label() {
            // Whatever else somebody has edited.
            Some(label) if label == own => Ok(()),
            Some(other) => Err(format!(
                "the label {MANAGED_BY} of the secret {name} says that the mica in the namespace {other:?} keeps it"
            )),
            None if self.names(account) => Ok(()),
            None => Err(format!("the annotation {ACCOUNT} of the secret {name} is not {}", account.name())),
        }
    }

    fn names(&self, account: &ServiceAccount) -> bool {
        let noted = self.metadata.annotations.as_ref().and_then(|all| all.get(ACCOUNT));
        noted.is_some_and(|noted| noted == account.name())
    }

    pub(super) fn marks(&self, account: &ServiceAccount, own: &str, uid: Option<&str>) -> Marks {
        let owner =
            self.metadata.owner_references.iter().flatten().find(|owner| owner.kind == "ServiceAccount");
        match (owner, uid) {
            (Some(owner), Some(uid)) if owner.uid != uid => return Marks::Another,
            (Some(_), _) => {}
            (None, _) => return Marks::Missing,
        }
        let annotations = self.metadata.annotations.as_ref();
        let has = |key: &&str| annotations.is_some_and(|all| all.contains_key(*key));
        if self.label() == Some(own) && self.names(account) && [NOT_AFTER, RENEW_AT, SERIAL].iter().all(has) {
            Marks::Whole
        } else {
            Marks::Missing
        }
    }

    fn label(&self) -> Option<&str> {
        self.metadata.labels.as_ref()?.get(MANAGED_BY).map(String::as_str)
    }

    /// When its leaf expires, if it has one.
    pub(super) fn not_after(&self) -> Option<OffsetDateTime> {
        let set = self.set().ok()?;
        let chain = Certificate::all_from_pem(set.chain_pem.as_bytes()).ok()?;
        Some(chain.first()?.validity.not_after)
    }

    /// The set in it, or what is wrong with it.
    pub(super) fn set(&self) -> Result<CertificateSet, String> {
        let text = |key: &str| {
            let encoded =
                self.data.as_ref().and_then(|data| data.get(key)).ok_or(format!("{key} is missing"))?;
            let bytes =
                Zeroizing::new(STANDARD.decode(encoded.0.as_bytes()).map_err(|e| format!("{key}: {e}"))?);
            match std::str::from_utf8(&bytes) {
                Ok(text) => Ok(Zeroizing::new(text.to_owned())),
                Err(_) => Err(format!("{key} is no text")),
            }
        };
        let (chain, key, roots) = (text(CHAIN)?, text(KEY)?, text(ROOTS)?);
        Ok(CertificateSet { chain_pem: chain.to_string(), key_pem: key, roots_pem: roots.as_str().into() })
    }
}

impl std::fmt::Debug for Stored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "secret {:?}/{:?}", self.metadata.namespace, self.metadata.name)
    }
}

impl Resource for Stored {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind(_: &()) -> Cow<'_, str> {
        <Secret as Resource>::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        <Secret as Resource>::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        <Secret as Resource>::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        <Secret as Resource>::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// What is there, or an empty one.
fn map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    value.as_object_mut().unwrap_or_else(|| unreachable!("it was made one above"))
}
