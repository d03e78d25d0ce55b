//! The service accounts that Kubernetes manifests name. Pure: text in, accounts and faults out.
//!
//! YAML and JSON are read alike. A document that cannot be read costs its own accounts and nobody else's: the text is
//! cut into documents before any of it is parsed. Only the few fields that matter are kept, and nothing of a
//! document's values but names goes into a fault, since manifests hold secrets too.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::yaml;
use crate::core::documents::{Document, Documents};
use crate::core::spiffe::ServiceAccount;

/// Faults told one by one; a hostile text may hold millions.
const MAX_FAULTS: usize = 100;

/// What a text names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifests {
    /// In the order of the text, so the same one may come again.
    pub accounts: Vec<ServiceAccount>,
    /// What could not be read or was refused.
    pub faults: Vec<Fault>,
}

/// Why a document gave less than it should have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Counted from 1.
    pub document: usize,
    /// In words, with the line in the file where one is known.
    pub reason: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "document {}: {}", self.document, self.reason)
    }
}

/// Reads all documents of a file.
pub fn accounts_in(text: &[u8]) -> Manifests {
    let mut found = Found { text, document: 0, manifests: Manifests::default(), unlisted: 0 };
    if matches!(text, [0xff, 0xfe, ..] | [0xfe, 0xff, ..]) {
        found.document = 1;
        found.fault("the text is UTF-16; save it as UTF-8");
        return found.finish();
    }
    for document in Documents::new(text) {
        read_document(&document, &mut found);
    }
    found.finish()
}

struct Found<'a> {
    text: &'a [u8],
    document: usize,
    manifests: Manifests,
    unlisted: usize,
}

impl Found<'_> {
    fn fault(&mut self, reason: impl Into<String>) {
        let faults = &mut self.manifests.faults;
        if faults.len() < MAX_FAULTS {
            faults.push(Fault { document: self.document, reason: reason.into() });
        } else {
            self.unlisted += 1;
        }
    }

    /// A fault at a place of the document's text; lines are counted from 1.
    fn fault_at(&mut self, document: &Document<'_>, line: usize, column: usize, reason: &str) {
        if self.manifests.faults.len() == MAX_FAULTS {
            self.unlisted += 1;
            return;
        }
        if line == 0 {
            return self.fault(plain(reason));
        }
        let line = line + lines(&self.text[..document.start]);
        self.fault(format!("line {line}, column {column}: {}", plain(reason)));
    }

    fn finish(mut self) -> Manifests {
        if self.unlisted > 0 {
            self.manifests.faults.push(Fault {
                document: self.document,
                reason: format!("{} more faults up to here", self.unlisted),
            });
        }
        self.manifests
    }
}

fn lines(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte == b'\n').count()
}

/// Messages of parsers are foreign text: one line, bounded, nothing that steers a terminal.
fn plain(message: &str) -> String {
    let line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
    line.trim().to_owned()
}

/// Counts the document, or the several that JSON may hold.
fn read_document(document: &Document<'_>, found: &mut Found<'_>) {
    found.document += 1;
    if !document.has_content {
        return;
    }
    let text = match std::str::from_utf8(document.text) {
        Ok(text) => text,
        Err(error) => {
            let before = &document.text[..error.valid_up_to()];
            let column = before.iter().rev().take_while(|byte| **byte != b'\n').count();
            found.fault_at(document, 1 + lines(before), 1 + column, "this is no UTF-8 text");
            return;
        }
    };
    if document.begins_as_json() {
        read_json(document, text, found);
        return;
    }
    match yaml::read(text) {
        Ok(object) => collect_document(object, found),
        Err(error) => found.fault_at(document, error.line, error.column, &error.reason),
    }
}

/// JSON is YAML, but many values may follow each other, tabs may indent, and its own parser is the faster one.
fn read_json(document: &Document<'_>, text: &str, found: &mut Found<'_>) {
    let mut values = Vec::new();
    let mut fault = None;
    for value in serde_json::Deserializer::from_slice(document.body).into_iter::<Field<Object>>() {
        match value {
            Ok(value) => values.push(value),
            Err(error) => fault = Some(error),
        }
    }
    // Flow mappings are YAML's alone.
    if fault.is_some()
        && let Ok(object) = yaml::read(text)
    {
        collect_document(object, found);
        return;
    }
    let mut values = values.into_iter().peekable();
    while let Some(value) = values.next() {
        collect_document(value, found);
        if values.peek().is_some() || fault.is_some() {
            found.document += 1;
        }
    }
    if let Some(error) = fault {
        let reason = error.to_string();
        let reason = reason.split(" at line ").next().unwrap_or_default();
        let skipped = document.text.len() - document.body.len();
        let line = error.line() + lines(&document.text[..skipped]);
        found.fault_at(document, line, error.column().max(1), reason);
    }
}

fn collect_document(object: Field<Object<'_>>, found: &mut Found<'_>) {
    // A document that is no mapping, or says of no kind to be, is some other program's.
    if let Field::Is(object) = object
        && !matches!(object.kind, Field::Absent)
    {
        collect(object, None, &Place::Document, found);
    }
}

/// Where in a document an object is.
enum Place<'a> {
    Document,
    Item(&'a Place<'a>, usize),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Document => Ok(()),
            Self::Item(list @ Self::Item(..), index) => write!(f, "{list}.items[{index}]"),
            Self::Item(Self::Document, index) => write!(f, "items[{index}]"),
        }
    }
}

/// What a typed list says for its items.
type Inherited = (&'static Known, Group);

fn collect(object: Object<'_>, inherited: Option<Inherited>, place: &Place<'_>, found: &mut Found<'_>) {
    let refuse = |found: &mut Found<'_>, kind: &str, reason: &dyn fmt::Display| {
        found.fault(match place {
            Place::Document => format!("{kind}: {reason}"),
            place => format!("{place}: {kind}: {reason}"),
        });
    };
    let kind = match (object.kind, inherited) {
        (Field::Is(kind), _) => kind,
        (Field::Absent, Some((known, _))) => Kind::One(known),
        (Field::Absent, None) => return refuse(found, "object", &"it carries no kind"),
        (Field::Wrong(what), _) => {
            return refuse(found, "object", &format_args!("kind is {what}, not text"));
        }
    };
    let (name, known) = match kind {
        Kind::Other => return,
        Kind::List => ("List", None),
        Kind::Typed(known) => ("list", Some(known)),
        Kind::One(known) => (known.kind, Some(known)),
    };
    let group = match (object.group, inherited) {
        (Field::Is(group), _) => group,
        (Field::Absent, Some((_, group))) => group,
        (Field::Absent, None) => return refuse(found, name, &"it carries no apiVersion"),
        (Field::Wrong(what), _) => {
            return refuse(found, name, &format_args!("apiVersion is {what}, not text"));
        }
    };
    let of_our_group = match known {
        Some(known) => known.groups.contains(&group),
        None => group == Group::Core,
    };
    if !of_our_group {
        return;
    }
    if let Kind::List | Kind::Typed(_) = kind {
        let items = match object.items {
            Field::Is(items) => items,
            Field::Absent => return,
            Field::Wrong(what) => {
                return refuse(found, name, &format_args!("items is {what}, not a list"));
            }
        };
        let inherited = known.map(|known| (known, group));
        for (index, item) in items.into_iter().enumerate() {
            let place = Place::Item(place, index);
            match item {
                Field::Is(item) => collect(item, inherited, &place, found),
                Field::Absent => {}
                Field::Wrong(what) => {
                    found.fault(format!("{place} is {what}, not an object"));
                }
            }
        }
        return;
    }
    let Some(known) = known else { return };
    match account_of(object.metadata, object.spec, object.template, known.names) {
        Ok(Some(account)) => found.manifests.accounts.push(account),
        Ok(None) => {}
        Err(reason) => refuse(found, name, &reason),
    }
}

fn account_of(
    metadata: Field<Metadata<'_>>,
    spec: Field<Spec<'_>>,
    template: Field<Template<'_>>,
    names: Names,
) -> Result<Option<ServiceAccount>, String> {
    let metadata = metadata.mapping("metadata")?.unwrap_or_default();
    let name = match names {
        Names::Itself => metadata.name.text("metadata.name")?.ok_or("it has no metadata.name")?,
        Names::Pod => match spec.mapping("spec")? {
            Some(pod) => account_of_pod(pod)?,
            None => return Ok(None),
        },
        Names::Template => match pod_of(template, "template")? {
            Some(pod) => account_of_pod(*pod)?,
            None => return Ok(None),
        },
        Names::SpecTemplate => {
            let spec = spec.mapping("spec")?.unwrap_or_default();
            match pod_of(spec.template, "spec.template")? {
                Some(pod) => account_of_pod(*pod)?,
                None => return Ok(None),
            }
        }
        Names::JobTemplate => {
            let spec = spec.mapping("spec")?.unwrap_or_default();
            match pod_of(spec.job_template, "spec.jobTemplate")? {
                Some(job) => match pod_of(job.template, "spec.jobTemplate.spec.template")? {
                    Some(pod) => account_of_pod(*pod)?,
                    None => return Ok(None),
                },
                None => return Ok(None),
            }
        }
    };
    let namespace = metadata.namespace.text("metadata.namespace")?;
    ServiceAccount::new(namespace.as_deref().unwrap_or("default"), &name)
        .map(Some)
        .map_err(|error| error.to_string())
}

/// The `spec` of a pod template or of a job template.
fn pod_of<'a>(template: Field<Template<'a>>, path: &str) -> Result<Option<Box<Spec<'a>>>, String> {
    match template.mapping(path)? {
        Some(template) => template.spec.mapping(format_args!("{path}.spec")),
        None => Ok(None),
    }
}

fn account_of_pod(pod: Spec<'_>) -> Result<Cow<'_, str>, String> {
    if let Some(name) = pod.service_account_name.text("serviceAccountName")? {
        return Ok(name);
    }
    let older = pod.service_account.text("serviceAccount")?;
    Ok(older.unwrap_or(Cow::Borrowed("default")))
}

// What is read of an object.

#[derive(Deserialize, Default)]
#[serde(default)]
struct Object<'a> {
    #[serde(rename = "apiVersion")]
    group: Field<Group>,
    kind: Field<Kind>,
    #[serde(borrow)]
    metadata: Field<Metadata<'a>>,
    #[serde(borrow)]
    spec: Field<Spec<'a>>,
    #[serde(borrow)]
    template: Field<Template<'a>>,
    #[serde(borrow)]
    items: Field<Vec<Field<Object<'a>>>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Metadata<'a> {
    #[serde(borrow)]
    name: Field<Cow<'a, str>>,
    #[serde(borrow)]
    namespace: Field<Cow<'a, str>>,
}

/// Of a pod, of a job, or of what makes them.
#[derive(Deserialize, Default)]
#[serde(default)]
struct Spec<'a> {
    #[serde(rename = "serviceAccountName", borrow)]
    service_account_name: Field<Cow<'a, str>>,
    #[serde(rename = "serviceAccount", borrow)]
    service_account: Field<Cow<'a, str>>,
    #[serde(borrow)]
    template: Field<Template<'a>>,
    #[serde(rename = "jobTemplate", borrow)]
    job_template: Field<Template<'a>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Template<'a> {
    #[serde(borrow)]
    spec: Field<Box<Spec<'a>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    Core,
    Apps,
    Batch,
    Extensions,
    Other,
}

#[derive(Clone, Copy)]
enum Kind {
    One(&'static Known),
    /// Its items need not say what they are.
    Typed(&'static Known),
    List,
    Other,
}

/// A built-in kind that names accounts.
struct Known {
    kind: &'static str,
    /// `extensions` is where most of them lived first.
    groups: &'static [Group],
    names: Names,
}

/// Where a kind names its account.
#[derive(Clone, Copy)]
enum Names {
    Itself,
    Pod,
    Template,
    SpecTemplate,
    JobTemplate,
}

const fn known(kind: &'static str, groups: &'static [Group], names: Names) -> Known {
    Known { kind, groups, names }
}

const CORE: &[Group] = &[Group::Core];
const APPS: &[Group] = &[Group::Apps, Group::Extensions];
const BATCH: &[Group] = &[Group::Batch, Group::Extensions];

static KNOWN: [Known; 10] = [
    known("ServiceAccount", CORE, Names::Itself),
    known("Pod", CORE, Names::Pod),
    known("PodTemplate", CORE, Names::Template),
    known("ReplicationController", CORE, Names::SpecTemplate),
    known("Deployment", APPS, Names::SpecTemplate),
    known("ReplicaSet", APPS, Names::SpecTemplate),
    known("StatefulSet", APPS, Names::SpecTemplate),
    known("DaemonSet", APPS, Names::SpecTemplate),
    known("Job", BATCH, Names::SpecTemplate),
    known("CronJob", BATCH, Names::JobTemplate),
];

/// A field of which a manifest may make anything. A custom resource is free to call a number `spec`, so that is no
/// fault until the object's kind is known.
#[derive(Default)]
enum Field<T> {
    /// Or null.
    #[default]
    Absent,
    /// What it is instead, in words.
    Wrong(String),
    Is(T),
}

impl<T> Field<T> {
    fn mapping(self, path: impl fmt::Display) -> Result<Option<T>, String> {
        match self {
            Self::Is(value) => Ok(Some(value)),
            Self::Absent => Ok(None),
            Self::Wrong(what) => Err(format!("{path} is {what}, not a mapping")),
        }
    }
}

impl<'a> Field<Cow<'a, str>> {
    /// Kubernetes takes an empty text for none.
    fn text(self, path: &str) -> Result<Option<Cow<'a, str>>, String> {
        match self {
            Self::Is(text) if text.is_empty() => Ok(None),
            Self::Is(text) => Ok(Some(text)),
            Self::Absent => Ok(None),
            Self::Wrong(what) => Err(format!("{path} is {what}, not text; put it in quotes")),
        }
    }
}

/// What a field may be made of.
trait Shape<'de>: Sized {
    fn of_text(_: Cow<'de, str>) -> Option<Self> {
        None
    }

    fn of_map<A: MapAccess<'de>>(mut map: A) -> Result<Option<Self>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn of_list<A: SeqAccess<'de>>(mut list: A) -> Result<Option<Self>, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

impl<'de: 'a, 'a> Shape<'de> for Cow<'a, str> {
    fn of_text(text: Cow<'de, str>) -> Option<Self> {
        Some(text)
    }
}

impl<'de> Shape<'de> for Group {
    fn of_text(text: Cow<'de, str>) -> Option<Self> {
        Some(match text.split_once('/') {
            None if text.starts_with('v') => Self::Core,
            Some(("apps", _)) => Self::Apps,
            Some(("batch", _)) => Self::Batch,
            Some(("extensions", _)) => Self::Extensions,
            _ => Self::Other,
        })
    }
}

impl<'de> Shape<'de> for Kind {
    fn of_text(text: Cow<'de, str>) -> Option<Self> {
        let named = |kind: &str| KNOWN.iter().find(|known| known.kind == kind);
        Some(match (named(&text), text.strip_suffix("List")) {
            (Some(known), _) => Self::One(known),
            (None, Some("")) => Self::List,
            (None, Some(kind)) => named(kind).map_or(Self::Other, Self::Typed),
            (None, None) => Self::Other,
        })
    }
}

impl<'de, T: Shape<'de>> Shape<'de> for Vec<Field<T>> {
    fn of_list<A: SeqAccess<'de>>(mut list: A) -> Result<Option<Self>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Some(items))
    }
}

macro_rules! mapping {
    ($($shape:ty),*) => {$(
        impl<'de: 'a, 'a> Shape<'de> for $shape {
            fn of_map<A: MapAccess<'de>>(map: A) -> Result<Option<Self>, A::Error> {
                Self::deserialize(MapAccessDeserializer::new(map)).map(Some)
            }
        }
    )*};
}

mapping!(Object<'a>, Metadata<'a>, Spec<'a>, Box<Spec<'a>>, Template<'a>);

impl<'de, T: Shape<'de>> Deserialize<'de> for Field<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FieldVisitor(PhantomData))
    }
}

struct FieldVisitor<T>(PhantomData<T>);

impl<T> FieldVisitor<T> {
    fn of_text<'de>(text: Cow<'de, str>) -> Field<T>
    where
        T: Shape<'de>,
    {
        // The text itself is left out: it may be anything.
        T::of_text(text).map_or_else(|| Field::Wrong("text".to_owned()), Field::Is)
    }
}

impl<'de, T: Shape<'de>> Visitor<'de> for FieldVisitor<T> {
    type Value = Field<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Field::Absent)
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(Field::Absent)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Field::Wrong(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Field::Wrong(format!("the number {value}")))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Field::Wrong(format!("the number {value}")))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Self::Value, E> {
        Ok(Field::Wrong(format!("the number {value}")))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Self::Value, E> {
        Ok(Field::Wrong(format!("the number {value}")))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Field::Wrong(format!("the number {value}")))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Self::of_text(Cow::Owned(text.to_owned())))
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Self::of_text(Cow::Borrowed(text)))
    }

    fn visit_string<E>(self, text: String) -> Result<Self::Value, E> {
        Ok(Self::of_text(Cow::Owned(text)))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        let value = T::of_map(map)?;
        Ok(value.map_or_else(|| Field::Wrong("a mapping".to_owned()), Field::Is))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        let value = T::of_list(list)?;
        Ok(value.map_or_else(|| Field::Wrong("a list".to_owned()), Field::Is))
    }
}

#[cfg(test)]
mod tests;
