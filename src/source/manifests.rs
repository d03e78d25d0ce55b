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
    let mut documents = Documents { text, position: 0 };
    while let Some(document) = documents.next() {
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

/// One document of a text, its `---` and any directives included.
struct Document<'a> {
    start: usize,
    text: &'a [u8],
    /// Without its `---` line's marker, if that is all there is before it; where JSON would begin.
    body: &'a [u8],
    /// False if there is nothing but comments.
    has_content: bool,
}

/// Cuts a text at the lines that mark documents, which no document can contain (YAML 1.2, 9.1.2).
struct Documents<'a> {
    text: &'a [u8],
    position: usize,
}

impl<'a> Documents<'a> {
    fn next(&mut self) -> Option<Document<'a>> {
        let mut start = self.position;
        let mut marked = false;
        let mut has_content = false;
        let mut body = start;
        let mut at = start;
        while at < self.text.len() {
            let rest = &self.text[at..];
            let end = rest
                .iter()
                .position(|byte| matches!(byte, b'\n' | b'\r'))
                .map_or(self.text.len(), |end| at + end + 1);
            let line = &self.text[at..end];
            let bom = if line.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
            let line = &line[bom..];
            if is_marker(line, b"---") {
                if marked || has_content {
                    self.position = at;
                    return Some(self.document(start, at, body, has_content));
                }
                marked = true;
                body = at + bom + 3;
                has_content = !is_blank(&line[3..]);
                if bom > 0 {
                    start = at + bom;
                }
            } else if is_marker(line, b"...") {
                if marked || has_content {
                    let document = self.document(start, at, body, has_content);
                    self.position = end;
                    return Some(document);
                }
                start = end;
                body = end;
            } else if !has_content && !is_blank(line) && (marked || line.first() != Some(&b'%')) {
                has_content = true;
                if bom > 0 && !marked {
                    start = at + bom;
                    body = start;
                }
            }
            at = end;
        }
        self.position = at;
        (marked || has_content).then(|| self.document(start, at, body, has_content))
    }

    fn document(&self, start: usize, end: usize, body: usize, has_content: bool) -> Document<'a> {
        Document { start, text: &self.text[start..end], body: &self.text[body..end], has_content }
    }
}

fn is_marker(line: &[u8], marker: &[u8; 3]) -> bool {
    line.strip_prefix(marker)
        .is_some_and(|rest| matches!(rest.first(), None | Some(b' ' | b'\t' | b'\r' | b'\n')))
}

/// White space and comments alone.
fn is_blank(line: &[u8]) -> bool {
    let line = line.trim_ascii_start();
    matches!(line.first(), None | Some(b'#'))
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
    if document.body.trim_ascii_start().first() == Some(&b'{') {
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
mod tests {
    use super::*;

    /// The accounts of a text without faults, as `namespace/name`.
    #[track_caller]
    fn names(text: &str) -> Vec<String> {
        let found = accounts_in(text.as_bytes());
        assert_eq!(found.faults, [], "in {text}");
        found.accounts.iter().map(ToString::to_string).collect()
    }

    /// The accounts and faults of a text.
    fn read(text: impl AsRef<[u8]>) -> (Vec<String>, Vec<String>) {
        let found = accounts_in(text.as_ref());
        (
            found.accounts.iter().map(ToString::to_string).collect(),
            found.faults.iter().map(ToString::to_string).collect(),
        )
    }

    fn account(name: &str) -> String {
        format!("apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: {name}\n")
    }

    #[test]
    fn a_service_account_names_itself() {
        assert_eq!(names(&account("web")), ["default/web"]);
        assert_eq!(
            names("{apiVersion: v1, kind: ServiceAccount, metadata: {name: web, namespace: shop}}"),
            ["shop/web"]
        );
        for none in ["", "null", "~", "''"] {
            assert_eq!(names(&format!("{}  namespace: {none}\n", account("web"))), ["default/web"]);
        }
    }

    #[test]
    fn every_built_in_workload_names_the_account_of_its_pods() {
        let pod = "{spec: {serviceAccountName: web, containers: []}}";
        let job = format!("{{spec: {{template: {pod}}}}}");
        for (version, kind, body) in [
            ("v1", "Pod", "spec: {serviceAccountName: web}".to_owned()),
            ("v1", "PodTemplate", format!("template: {pod}")),
            ("v1", "ReplicationController", format!("spec: {{template: {pod}}}")),
            ("apps/v1", "Deployment", format!("spec: {{template: {pod}}}")),
            ("extensions/v1beta1", "Deployment", format!("spec: {{template: {pod}}}")),
            ("apps/v1beta2", "ReplicaSet", format!("spec: {{template: {pod}}}")),
            ("apps/v1", "StatefulSet", format!("spec: {{template: {pod}}}")),
            ("apps/v1", "DaemonSet", format!("spec: {{template: {pod}}}")),
            ("batch/v1", "Job", format!("spec: {{template: {pod}}}")),
            ("batch/v1", "CronJob", format!("spec: {{jobTemplate: {job}}}")),
        ] {
            let head = format!("apiVersion: {version}\nkind: {kind}\n");
            let metadata = "metadata: {generateName: x-, namespace: shop}\n";
            assert_eq!(names(&format!("{head}{metadata}{body}")), ["shop/web"], "{kind}");
            // The order of keys says nothing.
            assert_eq!(names(&format!("{body}\n{metadata}{head}")), ["shop/web"], "{kind}");
            let unnamed = body.replace("serviceAccountName: web", "serviceAccountName: ''");
            assert_eq!(names(&format!("{head}{metadata}{unnamed}")), ["shop/default"], "{kind}");
            let older = body.replace("serviceAccountName", "serviceAccount");
            assert_eq!(names(&format!("{head}{metadata}{older}")), ["shop/web"], "{kind}");
            for foreign in ["example.com/v1", "apps.example.com/v1", "other/v1"] {
                let head = format!("apiVersion: {foreign}\nkind: {kind}\n");
                assert_eq!(names(&format!("{head}{metadata}{body}")), [""; 0], "{kind}");
            }
        }
    }

    #[test]
    fn the_newer_name_of_the_field_wins() {
        assert_eq!(
            names("{apiVersion: v1, kind: Pod, spec: {serviceAccount: old, serviceAccountName: new}}"),
            ["default/new"]
        );
    }

    #[test]
    fn what_makes_no_pod_makes_no_account() {
        for text in [
            "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}",
            "{apiVersion: v1, kind: ConfigMap, data: {kind: ServiceAccount}}",
            "{apiVersion: apps/v1, kind: Deployment, spec: {replicas: 1}}",
            "{apiVersion: v1, kind: ReplicationController, spec: {template: null}}",
            "{apiVersion: v1, kind: Pod, metadata: {name: x}}",
            "{apiVersion: example.com/v1, kind: Odd, metadata: 7, spec: text, template: [1], items: {a: b}}",
            "{apiVersion: example.com/v1, kind: ServiceAccount, metadata: {name: web}}",
            "{apiVersion: example.com/v1, kind: FooList, items: [{metadata: {name: web}}]}",
            "{replicas: 3, image: {tag: x}}",
            "- hosts: all\n  tasks: []\n",
            "just text",
            "42",
            "kind: 42",
            "kind:",
        ] {
            match text {
                "kind: 42" => assert_eq!(read(text).1.len(), 1),
                _ => assert_eq!(names(text), [""; 0], "{text}"),
            }
        }
    }

    #[test]
    fn lists_typed_and_nested() {
        let text = "
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: ServiceAccountList
  items:
  - metadata: {name: a}
  - {apiVersion: apps/v1, kind: Deployment, spec: {template: {spec: {serviceAccountName: b}}}}
- apiVersion: v1
  kind: List
  items:
  - {apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: ServiceAccount, metadata: {name: c}}]}
- apiVersion: apps/v1
  kind: DeploymentList
  items:
  - metadata: {namespace: shop}
    spec: {template: {spec: {}}}
- apiVersion: v1
  kind: PodList
  items: [{spec: {serviceAccountName: d}}]
- apiVersion: v1
  kind: ConfigMapList
  items: [{data: {}}]
";
        let all = ["default/a", "default/b", "default/c", "shop/default", "default/d"];
        assert_eq!(names(text), all);
        for empty in ["null", "[]"] {
            assert_eq!(names(&format!("{{apiVersion: v1, kind: List, items: {empty}}}")), [""; 0]);
        }
    }

    #[test]
    fn a_bad_item_costs_nothing_but_itself() {
        let (accounts, faults) = read(
            "apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: ServiceAccount, metadata: {name: a}}
- {apiVersion: v1, kind: ServiceAccount, metadata: {name: Upper_Case}}
- {metadata: {name: b}}
- 7
-
- {apiVersion: v1, kind: ServiceAccountList, items: [{metadata: {name: c, namespace: '-'}}, {metadata: {name: d}}]}
- {kind: ServiceAccount, metadata: {name: e}}
",
        );
        assert_eq!(accounts, ["default/a", "default/d"]);
        assert_eq!(
            faults,
            [
                "document 1: items[1]: ServiceAccount: service account \"Upper_Case\" is no Kubernetes name: 1 to 253 of a-z, 0-9, '-' and '.', each part beginning and ending with a letter or digit",
                "document 1: items[2]: object: it carries no kind",
                "document 1: items[3] is the number 7, not an object",
                "document 1: items[5].items[0]: ServiceAccount: namespace \"-\" is no Kubernetes name: 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
                "document 1: items[6]: ServiceAccount: it carries no apiVersion",
            ]
        );
    }

    #[test]
    fn values_that_kubernetes_would_refuse_are_named() {
        for (text, told) in [
            ("{apiVersion: v1, kind: ServiceAccount}", "ServiceAccount: it has no metadata.name"),
            ("{apiVersion: v1, kind: ServiceAccount, metadata: {generateName: x-}}", "no metadata.name"),
            ("{apiVersion: v1, kind: ServiceAccount, metadata: [a]}", "metadata is a list, not a mapping"),
            (
                "{apiVersion: v1, kind: ServiceAccount, metadata: {name: 17}}",
                "metadata.name is the number 17, not text; put it in quotes",
            ),
            (
                "{apiVersion: v1, kind: ServiceAccount, metadata: {name: on}}",
                "metadata.name is true, not text",
            ),
            (
                "{apiVersion: v1, kind: ServiceAccount, metadata: {name: {a: b}}}",
                "metadata.name is a mapping, not text",
            ),
            (
                "{apiVersion: v1, kind: ServiceAccount, metadata: {name: ../x}}",
                "service account \"../x\" is no",
            ),
            (
                "{apiVersion: v1, kind: Pod, metadata: {namespace: a.b}, spec: {}}",
                "Pod: namespace \"a.b\" is no",
            ),
            (
                "{apiVersion: v1, kind: Pod, spec: {serviceAccountName: 1.5}}",
                "serviceAccountName is the number 1.5",
            ),
            ("{apiVersion: v1, kind: Pod, spec: text}", "spec is text, not a mapping"),
            (
                "{apiVersion: apps/v1, kind: Deployment, spec: {template: {spec: [1]}}}",
                "spec.template.spec is a list",
            ),
            (
                "{apiVersion: batch/v1, kind: CronJob, spec: {jobTemplate: {spec: {template: 1}}}}",
                "spec.jobTemplate.spec.template is the number 1",
            ),
            ("{apiVersion: v1, kind: List, items: {}}", "List: items is a mapping, not a list"),
            ("{apiVersion: 1, kind: List}", "List: apiVersion is the number 1, not text"),
            ("{kind: Pod}", "Pod: it carries no apiVersion"),
        ] {
            let (accounts, faults) = read(text);
            assert_eq!(accounts, [""; 0], "{text}");
            assert_eq!(faults.len(), 1, "{text}: {faults:?}");
            assert!(faults[0].contains(told), "{text}: {faults:?}");
            // The same in JSON, where the text is JSON too.
            let json = serde_saphyr::from_str::<serde_json::Value>(text).unwrap();
            assert!(read(json.to_string()).1[0].contains(told), "{json}");
        }
    }

    #[test]
    fn documents_are_cut_as_yaml_says_and_counted() {
        let (a, b) = (account("a"), account("b"));
        let bad = "kind: [\n";
        for (text, accounts, document) in [
            (format!("{a}---\n{b}"), 2, 0),
            (format!("---\n{a}---\n{b}---\n"), 2, 0),
            (format!("--- # first\n{a}--- \n{b}..."), 2, 0),
            (format!("---\n{bad}---\n{b}"), 1, 1),
            (format!("{a}---\n{bad}---\n{b}"), 2, 2),
            (format!("---\n---\n---\n{bad}---\n{b}"), 1, 3),
            (format!("# only a comment\n\n---\n{bad}---\n{b}"), 1, 1),
            (format!("%YAML 1.2\n# x\n---\n{a}...\n%YAML 1.2\n---\n{b}...\n{bad}"), 2, 3),
            (format!("{a}...\n{b}"), 2, 0),
            (format!("{a}...\n# comment\n...\n---\n{b}---\n{bad}"), 2, 3),
            (format!("\u{feff}---\n{a}\u{feff}---\n{b}"), 2, 0),
            (format!("\u{feff}{a}"), 1, 0),
            (format!("--- {{apiVersion: v1, kind: ServiceAccount, metadata: {{name: a}}}}\n---\n{b}"), 2, 0),
            ("---\n# nothing\n...\n".to_owned(), 0, 0),
            ("--- |\n  text\n---\n- list\n---\n'quoted'\n".to_owned(), 0, 0),
            (format!("a: |\n  ---\n  {bad}---\n{b}"), 1, 0),
        ] {
            for text in [text.clone(), text.replace('\n', "\r\n"), text.replace('\n', "\r")] {
                let found = accounts_in(text.as_bytes());
                assert_eq!(found.accounts.len(), accounts, "{text:?}: {:?}", found.faults);
                let faulty: Vec<_> = found.faults.iter().map(|fault| fault.document).collect();
                let expected: Vec<_> = (document > 0).then_some(document).into_iter().collect();
                assert_eq!(faulty, expected, "{text:?}: {:?}", found.faults);
            }
        }
        assert_eq!(names("---not a marker: 1\n"), [""; 0]);
    }

    #[test]
    fn a_fault_tells_the_line_in_the_file() {
        let text = format!("{}---\n# comment\na: b\nc: ]\n", account("a"));
        let (_, faults) = read(&text);
        assert_eq!(faults.len(), 1);
        assert!(faults[0].starts_with("document 2: line 8, column "), "{faults:?}");
        assert!(!faults[0].contains('\n'));

        let (_, faults) = read(format!("{}---\n{{\n  \"a\": 1,\n  \"b\" 2\n}}\n", account("a")));
        assert!(faults[0].starts_with("document 2: line 8, column "), "{faults:?}");
    }

    #[test]
    fn a_fault_shows_nothing_of_a_secret() {
        let (_, faults) =
            read("apiVersion: v1\nkind: Secret\nstringData:\n  password: hunter2\n  other: 'hunter2\n");
        assert_eq!(faults.len(), 1);
        assert!(!faults[0].contains("hunter2"), "{faults:?}");
    }

    #[test]
    fn aliases_and_merge_keys_are_followed() {
        let text = "
apiVersion: v1
kind: List
metadata: &shop {namespace: shop}
items:
- &first
  apiVersion: v1
  kind: ServiceAccount
  metadata: {<<: *shop, name: &name web}
- {apiVersion: v1, kind: Pod, metadata: *shop, spec: {serviceAccountName: *name}}
- <<: *first
  metadata: {name: other}
- *first
";
        assert_eq!(names(text), ["shop/web", "shop/web", "default/other", "shop/web"]);
        // An anchor ends with its document.
        let (_, faults) = read("a: &a 1\n---\nb: *a\n");
        assert_eq!(faults.len(), 1);
    }

    #[test]
    fn many_aliases_of_one_anchor_are_no_bomb() {
        let mut text = "apiVersion: v1\nkind: List\nlabels: &l {app: x}\nitems:\n".to_owned();
        for i in 0..5_000 {
            text += &format!(
                "- {{apiVersion: v1, kind: ServiceAccount, metadata: {{name: a{i}, labels: *l}}}}\n"
            );
        }
        assert_eq!(names(&text).len(), 5_000);
    }

    #[test]
    fn a_bomb_of_aliases_is_refused_soon() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for i in 1..12 {
            let nine = vec![format!("*a{}", i - 1); 10].join(", ");
            text += &format!("a{i}: &a{i} [{nine}]\n");
        }
        text += &format!("apiVersion: v1\nkind: List\nitems: *a11\n---\n{}", account("a"));
        let (accounts, faults) = read(&text);
        assert_eq!(accounts, ["default/a"]);
        assert_eq!(faults.len(), 1);
        assert!(faults[0].contains("alias"), "{faults:?}");
    }

    #[test]
    fn depth_is_bounded() {
        for (open, close) in [("[", "]"), ("{a: ", "}"), ("- ", ""), ("{\"a\":", "}")] {
            for depth in [1_000, 1_000_000] {
                let text = format!("{}x{}\n---\n{}", open.repeat(depth), close.repeat(depth), account("a"));
                let (accounts, faults) = read(text);
                assert_eq!(accounts, ["default/a"], "{open}");
                assert_eq!(faults.len(), 1, "{open}");
            }
            let text = format!("{}1{}", open.repeat(60), close.repeat(60));
            assert_eq!(names(&text), [""; 0]);
        }
        let mut block = String::new();
        for depth in 0..2_000 {
            block += &format!("{}a:\n", " ".repeat(depth));
        }
        assert_eq!(read(block).1.len(), 1);
        let lists = 90;
        let list = "{\"apiVersion\":\"v1\",\"kind\":\"List\",\"items\":[".repeat(lists / 2);
        let text = format!(
            "{list}{{\"apiVersion\":\"v1\",\"kind\":\"ServiceAccount\",\"metadata\":{{\"name\":\"a\"}}}}{}",
            "]}".repeat(lists / 2)
        );
        assert_eq!(names(&text), ["default/a"]);
    }

    #[test]
    fn json_of_every_shape() {
        let one = r#"{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"name":"a","annotations":{"n":1e999,"big":123456789012345678901234567890,"u":"\ud83d\ude00","t":"a\tb"}}}"#;
        assert_eq!(names(one), ["default/a"]);
        assert_eq!(names(&format!("\t{one}\n\n{one}{one}\n")), ["default/a"; 3]);
        assert_eq!(
            names(
                "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"ServiceAccount\",\n\t\"metadata\": {\"name\": \"a\"}\n}\n"
            ),
            ["default/a"]
        );

        let (accounts, faults) = read(format!("{one}\n{{\"kind\": \n---\n{one}\n---\nkind: ["));
        assert_eq!(accounts, ["default/a"; 2]);
        assert_eq!(faults.len(), 2);
        assert!(faults[0].starts_with("document 2: line 3, "), "{faults:?}");
        assert!(faults[1].starts_with("document 4: "), "{faults:?}");
    }

    #[test]
    fn repeated_keys_are_refused_only_where_a_name_would_be_in_doubt() {
        for twice in ["kind: Pod", "metadata: {name: b}", "apiVersion: v1"] {
            let (accounts, faults) = read(format!("{}{twice}\n", account("a")));
            assert_eq!(accounts, [""; 0]);
            assert!(faults[0].contains("duplicate"), "{faults:?}");
        }
        let (accounts, faults) =
            read(r#"{"apiVersion":"v1","kind":"Pod","kind":"ServiceAccount","metadata":{"name":"a"}}"#);
        assert_eq!((accounts.len(), faults.len()), (0, 1));
        assert_eq!(names(&format!("{}data: {{x: 1, x: 2}}\n", account("a"))), ["default/a"]);
    }

    #[test]
    fn odd_values_elsewhere_do_no_harm() {
        let odd = "data:
  number: 1e999
  nan: .nan
  hex: 0x7fffffffffffffffffffffffffffffffffff
  binary: !!binary /w==
  custom: !Custom {a: 1}
  tagged: !Ref text
  ? [complex, key]
  : value
  1: number
  ~: null
  text: |
    ---
     x: [
  folded: >-
    {{ template }}
";
        assert_eq!(names(&format!("{}{odd}", account("a"))), ["default/a"]);
    }

    #[test]
    fn text_that_is_no_utf_8_costs_its_own_document() {
        let mut text = account("a").into_bytes();
        text.extend(b"---\na: b\nx: \xff\n---\n");
        text.extend(account("b").bytes());
        let (accounts, faults) = read(text);
        assert_eq!(accounts, ["default/a", "default/b"]);
        assert_eq!(faults, ["document 2: line 7, column 4: this is no UTF-8 text"]);
        let (_, faults) = read(b"\xff\xfea\0");
        assert_eq!(faults, ["document 1: the text is UTF-16; save it as UTF-8"]);
        assert_eq!(read([0; 100]).1.len(), 1);
    }

    #[test]
    fn more_faults_than_anyone_reads_are_counted() {
        let text = "---\n[\n".repeat(1_000) + "---\n" + &account("a");
        let found = accounts_in(text.as_bytes());
        assert_eq!(found.accounts.len(), 1);
        assert_eq!(found.faults.len(), MAX_FAULTS + 1);
        assert_eq!(found.faults[MAX_FAULTS].reason, "900 more faults up to here");
    }

    #[test]
    fn a_text_cut_anywhere_is_read_without_panic_and_keeps_whole_documents() {
        let text = format!(
            "---\n{}---\n{{\"apiVersion\":\"v1\",\"kind\":\"ServiceAccount\",\"metadata\":{{\"name\":\"ü\"}}}}\n---\nx: &a ['é', *a]\n",
            account("first")
        );
        let whole = text.find("---\n{").unwrap() + 3;
        for end in 0..text.len() {
            let found = accounts_in(&text.as_bytes()[..end]);
            if end >= whole {
                assert_eq!(found.accounts[0].name(), "first");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "(---|\\.\\.\\.|[a-z&*!|>%@`\"'{}\\[\\],:?#~ \n\r\t-]){0,60}") {
            accounts_in(text.as_bytes());
        }

        #[test]
        fn no_bytes_make_it_panic(text in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            accounts_in(&text);
        }

        #[test]
        fn a_bad_document_disturbs_no_other(
            bad in "[a-z&*!|>@\"'{}\\[\\],:?#~ \n-]{0,40}",
            before in 0..3usize,
            after in 0..3usize,
        ) {
            let text = format!(
                "{}---\n{}\n{}",
                format!("---\n{}", account("a")).repeat(before),
                bad.replace("---", "--"),
                format!("---\n{}", account("b")).repeat(after),
            );
            let found = accounts_in(text.as_bytes());
            let named = |name| found.accounts.iter().filter(|account| account.name() == name).count();
            proptest::prop_assert_eq!(named("a"), before);
            proptest::prop_assert_eq!(named("b"), after);
        }
    }
}
