//! Finds out what bytes are: PEM, DER, SPIFFE JSON, or a Kubernetes object that holds such things.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use zeroize::Zeroizing;

use super::{BundleFacts, Error, Input};
use crate::core::bundle::{self, TrustBundle};
use crate::core::certificate::Certificate;
use crate::core::csr::Claims;
use crate::core::key::PrivateKey;
use crate::core::pem;

/// Everything that was found.
#[derive(Default)]
pub(super) struct Reading {
    pub(super) sets: Vec<Set>,
    pub(super) found: Vec<Found>,
    pub(super) notes: Vec<String>,
}

/// Things that belong together: the files of a folder, the values of a Secret, all files given by name.
pub(super) struct Set {
    /// The folder or Secret.
    pub(super) name: Option<String>,
    /// Its files, as they are.
    pub(super) files: Vec<(String, Zeroizing<Vec<u8>>)>,
}

pub(super) struct Found {
    pub(super) set: usize,
    /// The file or the Secret's key.
    pub(super) file: String,
    /// The same for people.
    pub(super) source: String,
    pub(super) thing: Thing,
}

pub(super) enum Thing {
    Certificate(Box<Certificate>),
    Csr(Vec<u8>),
    /// As PEM, to be opened with what else is known.
    PrivateKey(Zeroizing<String>),
    /// Encrypted in OpenSSL's old way.
    OldPrivateKey,
    /// A SubjectPublicKeyInfo.
    PublicKey(Vec<u8>),
    Bundle(BundleFacts, Vec<String>),
}

pub(super) fn read(inputs: &[Input]) -> Result<Reading, Error> {
    let mut reading = Reading::default();
    for input in inputs {
        let set = match reading.sets.iter().position(|set| set.name == input.folder) {
            Some(set) => set,
            None => reading.set(input.folder.clone()),
        };
        let source = match &input.folder {
            Some(folder) => format!("{folder}/{}", input.name),
            None => input.name.clone(),
        };
        reading.sets[set].files.push((input.name.clone(), input.bytes.clone()));
        let result = reading.bytes(set, &input.name, &source, &input.bytes);
        match result {
            Ok(()) => {}
            // A folder may hold a README; a file that was named is meant.
            Err(_) if input.folder.is_some() && !is_ours(&input.name) => {
                reading.notes.push(format!("{source} is nothing that mica reads, and was passed over"));
            }
            Err(fault) => return Err(Error { source_name: source, fault }),
        }
    }
    if reading.found.is_empty() {
        let source_name = inputs
            .first()
            .map_or_else(String::new, |input| input.folder.clone().unwrap_or_else(|| input.name.clone()));
        return Err(Error { source_name, fault: "there is nothing in it that mica reads".to_owned() });
    }
    Ok(reading)
}

/// Whether a name promises something that has to be readable.
fn is_ours(name: &str) -> bool {
    [".pem", ".crt", ".cer", ".key", ".csr"].iter().any(|end| name.ends_with(end))
}

impl Reading {
    fn set(&mut self, name: Option<String>) -> usize {
        self.sets.push(Set { name, files: Vec::new() });
        self.sets.len() - 1
    }

    fn push(&mut self, set: usize, file: &str, source: &str, thing: Thing) {
        self.found.push(Found { set, file: file.to_owned(), source: source.to_owned(), thing });
    }

    fn bytes(&mut self, set: usize, file: &str, source: &str, bytes: &[u8]) -> Result<(), String> {
        if bytes.len() > pem::MAX {
            return Err(pem::Error::TooLong(bytes.len()).to_string());
        }
        if bytes.first() == Some(&0x30) && std::str::from_utf8(bytes).is_err() {
            return self.der(set, file, source, bytes);
        }
        let start = bytes.trim_ascii_start();
        if start.starts_with(b"{") {
            return self.json(set, file, source, bytes);
        }
        // A Secret's YAML may hold PEM in clear (stringData), so it is asked about first.
        let text = std::str::from_utf8(bytes).unwrap_or_default();
        if text.lines().any(|line| line.starts_with("kind:")) {
            return self.yaml(text);
        }
        if bytes.windows(11).any(|window| window == b"-----BEGIN ") {
            return self.pem(set, file, source, bytes);
        }
        Err(match bytes.trim_ascii() {
            [] => "it is empty".to_owned(),
            _ => "it is neither PEM nor DER, nor a SPIFFE bundle (JSON), nor a Kubernetes Secret".to_owned(),
        })
    }

    fn pem(&mut self, set: usize, file: &str, source: &str, text: &[u8]) -> Result<(), String> {
        for block in pem::blocks(text).map_err(|e| e.to_string())? {
            let line = block.line;
            let thing = match block.label.as_str() {
                pem::CERTIFICATE => Certificate::from_der(&block.der)
                    .map(|certificate| Thing::Certificate(Box::new(certificate)))
                    .map_err(|e| format!("line {line}: {e}"))?,
                pem::CSR | "NEW CERTIFICATE REQUEST" => Thing::Csr(block.der.to_vec()),
                "PUBLIC KEY" => Thing::PublicKey(block.der.to_vec()),
                label if label.ends_with("PRIVATE KEY") && block.headers => Thing::OldPrivateKey,
                label if label.ends_with("PRIVATE KEY") => {
                    Thing::PrivateKey(Zeroizing::new(pem::encode(label, &block.der)))
                }
                // `openssl ecparam -genkey` writes it before the key, which says the same again.
                "EC PARAMETERS" => continue,
                other => return Err(format!("line {line}: a {other} is nothing that mica reads")),
            };
            self.push(set, file, source, thing);
        }
        Ok(())
    }

    fn der(&mut self, set: usize, file: &str, source: &str, der: &[u8]) -> Result<(), String> {
        let thing = match Certificate::from_der(der) {
            Ok(certificate) => Thing::Certificate(Box::new(certificate)),
            Err(_) if Claims::of(der).is_ok() => Thing::Csr(der.to_owned()),
            Err(fault) => {
                let label = if PrivateKey::from_pkcs8(der, None).is_ok() {
                    pem::PRIVATE_KEY
                } else if pkcs8::EncryptedPrivateKeyInfoRef::try_from(der).is_ok() {
                    pem::ENCRYPTED_PRIVATE_KEY
                } else {
                    return Err(format!("it is DER, but no certificate, CSR or PKCS#8 key ({fault})"));
                };
                Thing::PrivateKey(Zeroizing::new(pem::encode(label, der)))
            }
        };
        self.push(set, file, source, thing);
        Ok(())
    }

    fn json(&mut self, set: usize, file: &str, source: &str, text: &[u8]) -> Result<(), String> {
        let value: Value = serde_json::from_slice(text).map_err(|e| format!("it is not JSON: {e}"))?;
        if value.get("trust_domains").is_some() {
            let map = bundle::map_from_json(text).map_err(|e| e.to_string())?;
            for (name, bundle) in map {
                let keys = value
                    .get("trust_domains")
                    .and_then(|map| map.get(name.as_str()))
                    .and_then(|document| document.get("keys"));
                self.bundle(set, file, source, Some(name.to_string()), keys, Some(bundle));
            }
            return Ok(());
        }
        if value.get("keys").is_some() {
            let bundle = match TrustBundle::from_json(text) {
                Ok(bundle) => Some(bundle),
                Err(bundle::Error::Empty) => None,
                Err(other) => return Err(other.to_string()),
            };
            self.bundle(set, file, source, None, value.get("keys"), bundle);
            return Ok(());
        }
        self.kubernetes(&value)
    }

    fn bundle(
        &mut self,
        set: usize,
        file: &str,
        source: &str,
        trust_domain: Option<String>,
        keys: Option<&Value>,
        bundle: Option<TrustBundle>,
    ) {
        let keys = keys.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let ours = |key: &&Value| key.get("use").and_then(Value::as_str) == Some("x509-svid");
        let mut problems = Vec::new();
        for (key, number) in keys.iter().zip(1..).filter(|(key, _)| ours(key)) {
            if key.get("kid").is_some() {
                problems.push(format!(
                    "key {number} has a kid, which an X.509 key must not have [X509-SVID 6.1]"
                ));
            }
            match key.get("x5c").and_then(Value::as_array).map(Vec::len) {
                Some(1) => {}
                Some(n) => problems.push(format!(
                    "key {number} has {n} certificates in x5c instead of one; only the first counts [X509-SVID 6.1]"
                )),
                None => problems.push(format!("key {number} has no x5c, so it is passed over [X509-SVID 6.2]")),
            }
        }
        let roots = bundle.as_ref().map(TrustBundle::roots).unwrap_or_default();
        if roots.is_empty() {
            problems.push(
                "it holds no X.509 root, so whoever uses it trusts nobody [Trust Domain and Bundle 4.1.3]"
                    .to_owned(),
            );
        }
        let facts = BundleFacts {
            trust_domain,
            sequence: bundle.as_ref().and_then(|bundle| bundle.sequence),
            refresh_hint: bundle.as_ref().and_then(|bundle| bundle.refresh_hint),
            roots: roots.len(),
            passed_over: keys.iter().filter(|key| !ours(key)).count(),
        };
        self.push(set, file, source, Thing::Bundle(facts, problems));
        for root in roots {
            self.push(set, file, source, Thing::Certificate(Box::new(root.clone())));
        }
    }

    fn yaml(&mut self, text: &str) -> Result<(), String> {
        // The reader's own words may repeat values, which may be keys.
        let documents: Vec<Value> = serde_saphyr::from_multiple(text).map_err(|fault| {
            let line = fault.location().map(|at| format!(" at line {}", at.line())).unwrap_or_default();
            format!("it looks like YAML, and cannot be read as such{line}")
        })?;
        documents
            .iter()
            .filter(|document| !document.is_null())
            .try_for_each(|document| self.kubernetes(document))
    }

    fn kubernetes(&mut self, object: &Value) -> Result<(), String> {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
        let kind = text(object.get("kind"));
        if kind.ends_with("List") {
            let items = object.get("items").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            return items.iter().try_for_each(|item| {
                // The items of a typed list do not repeat its kind.
                let mut item = item.clone();
                if let Some(fields) = item.as_object_mut() {
                    fields.entry("kind").or_insert_with(|| kind.trim_end_matches("List").into());
                }
                self.kubernetes(&item)
            });
        }
        if kind != "Secret" && kind != "ConfigMap" {
            return Err(match kind.as_str() {
                "" => "it is JSON or YAML, but no SPIFFE bundle and no Kubernetes Secret".to_owned(),
                other => format!(
                    "a Kubernetes {other:?} holds nothing that mica reads; give a Secret or ConfigMap"
                ),
            });
        }
        let metadata = object.get("metadata");
        let name = text(metadata.and_then(|metadata| metadata.get("name")));
        let place = match text(metadata.and_then(|metadata| metadata.get("namespace"))) {
            namespace if namespace.is_empty() => name,
            namespace => format!("{namespace}/{name}"),
        };
        let title = match text(object.get("type")) {
            kind_of if kind_of.is_empty() => format!("{} {place}", kind.to_lowercase()),
            kind_of => format!("secret {place} ({kind_of})"),
        };
        let set = self.set(Some(title.clone()));
        for (field, encoded) in [("data", kind == "Secret"), ("stringData", false)] {
            let values = object.get(field).and_then(Value::as_object);
            for (file, value) in values.into_iter().flatten() {
                let value = match value {
                    // An empty value, as YAML may write it.
                    Value::Null => "",
                    Value::String(text) => text,
                    _ => return Err(format!("{title}: {file} is no text")),
                };
                let bytes = Zeroizing::new(if encoded {
                    let dense: Zeroizing<String> =
                        Zeroizing::new(value.chars().filter(|c| !c.is_ascii_whitespace()).collect());
                    STANDARD.decode(dense.as_bytes()).map_err(|_| format!("{title}: {file} is not base64"))?
                } else {
                    value.as_bytes().to_owned()
                });
                let source = format!("{title}, {file}");
                self.sets[set].files.push((file.clone(), bytes.clone()));
                // Istio leaves the parts that a kind of Secret does not have empty.
                if bytes.trim_ascii().is_empty() {
                    continue;
                }
                match self.bytes(set, file, &source, &bytes) {
                    Ok(()) => {}
                    Err(_) if !is_ours(file) => {
                        self.notes.push(format!("{source} is nothing that mica reads, and was passed over"));
                    }
                    Err(fault) => return Err(format!("{title}, {file}: {fault}")),
                }
            }
        }
        Ok(())
    }
}
