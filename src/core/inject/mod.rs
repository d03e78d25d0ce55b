//! What a pod needs to have its certificate, put into manifests as text, or into one pod as a JSON patch.
//!
//! A manifest is edited where something is put in, and nowhere else: comments, order, quotes and layout stay. What was
//! edited is read again and compared with what it should be, and is not given out otherwise.

mod admission;
mod edit;
mod part;
mod pod;
mod tree;

use std::fmt;

use serde_json::{Value, json};

pub use self::admission::{Became, Rules, Verdict, review};
use self::edit::{Edit, Put, Sheet};
pub use self::part::Part;
pub use self::pod::{
    AGENT, Addition, Agent, CERTIFICATES, CERTIFICATES_PATH, CREDENTIALS, CREDENTIALS_PATH, Decision, FILES,
    Fault, METRICS, Place, SOCKET, SOCKET_PATH, SWITCH, Step, What, Wish, lacks, switch,
};
use self::tree::{Anchors, Kind, Node, Tree};
use crate::core::documents::{Document, Documents};
use crate::core::inspect::one_line;

/// Manifests with what was put in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injected {
    /// All of them, byte for byte as they were but for that.
    pub text: String,
    /// The objects that make pods, in the order of the text.
    pub objects: Vec<Object>,
}

/// An object that makes pods, or is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Counted from 1.
    pub document: usize,
    /// Counted from 1, in the text.
    pub line: usize,
    /// Such as Deployment.
    pub kind: &'static str,
    /// Where it says to be.
    pub namespace: Option<String>,
    /// As it is called, or as those that it names begin.
    pub name: Option<String>,
    /// What was done with it.
    pub outcome: Outcome,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_deref().unwrap_or("without a name");
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{name}", self.kind),
            None => write!(f, "{} {name}", self.kind),
        }
    }
}

/// What was done with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// This was put in.
    Changed(Vec<String>),
    /// It had everything.
    Complete,
    /// It says that it is to be left alone.
    OptedOut,
    /// It says nothing of its pods' containers, as a patch may.
    NoPod,
}

/// Why nothing was put in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Counted from 1; 0 for a text that holds none.
    pub document: usize,
    /// Counted from 1, in the text.
    pub line: usize,
    /// In words.
    pub reason: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "document {}, line {}: {}", self.document, self.line, self.reason)
    }
}

impl std::error::Error for Error {}

/// Puts what pods lack into all objects of a text that make some.
pub fn into_manifests(text: &[u8], wish: &Wish) -> Result<Injected, Error> {
    if matches!(text, [0xff, 0xfe, ..] | [0xfe, 0xff, ..]) {
        let reason = "the text is UTF-16; save it as UTF-8".to_owned();
        return Err(Error { document: 1, line: 1, reason });
    }
    let mut work = Work { wish, document: 0, lines: 0, objects: Vec::new() };
    let mut out = String::with_capacity(text.len() + 4096);
    let (mut done, mut lines_done) = (0, 0);
    let text = std::str::from_utf8(text).map_err(|error| {
        let before = &text[..error.valid_up_to()];
        let document = Documents::new(before).count().max(1);
        Error { document, line: 1 + lines(before), reason: "this is no UTF-8 text".to_owned() }
    })?;
    for document in Documents::new(text.as_bytes()) {
        if !document.has_content {
            work.document += 1;
            continue;
        }
        for (start, end, json) in values_of(&document) {
            work.document += 1;
            let (Some(before), Some(value)) = (text.get(done..start), text.get(start..end)) else { continue };
            out.push_str(before);
            lines_done += lines(before.as_bytes());
            work.lines = lines_done;
            match work.document_of(&Sheet { text: value, json })? {
                Some(edited) => out.push_str(&edited),
                None => out.push_str(value),
            }
            lines_done += lines(value.as_bytes());
            done = end;
        }
    }
    out.push_str(text.get(done..).unwrap_or_default());
    Ok(Injected { text: out, objects: work.objects })
}

/// The same for one pod, as a JSON patch (RFC 6902).
pub fn patch(pod: &Value, additions: &[Addition]) -> Value {
    let mut operations = Vec::new();
    for group in groups(additions) {
        let (holder, key) = group.place.holder();
        let path = ["/spec".to_owned()]
            .into_iter()
            .chain(holder.iter().map(|step| match step {
                Step::Key(key) => format!("/{key}"),
                Step::Index(index) => format!("/{index}"),
            }))
            .chain([format!("/{key}")])
            .collect::<String>();
        let there = pod.pointer(&path).is_some_and(Value::is_array);
        let values: Vec<_> = group.parts.iter().map(Part::json).collect();
        if !there {
            operations.push(json!({ "op": "add", "path": path, "value": values }));
            continue;
        }
        let front = group.place == Place::InitContainers;
        let last = if front { "0" } else { "-" };
        operations.extend(
            values
                .iter()
                .map(|value| json!({ "op": "add", "path": format!("{path}/{last}"), "value": value })),
        );
    }
    Value::Array(operations)
}

/// The values of a document: one, or as many as JSON has behind each other.
fn values_of(document: &Document<'_>) -> Vec<(usize, usize, bool)> {
    let whole = (document.start, document.start + document.text.len());
    if !document.begins_as_json() {
        return vec![(whole.0, whole.1, false)];
    }
    let mut values = serde_json::Deserializer::from_slice(document.body).into_iter::<serde::de::IgnoredAny>();
    let mut ends = Vec::new();
    while let Some(value) = values.next() {
        if value.is_err() {
            // Flow mappings are YAML's alone.
            return vec![(whole.0, whole.1, false)];
        }
        ends.push(values.byte_offset());
    }
    let body = whole.1 - document.body.len();
    let mut begin = whole.0;
    let mut all = Vec::with_capacity(ends.len());
    for (number, end) in ends.iter().enumerate() {
        let end = if number + 1 == ends.len() { whole.1 } else { body + end };
        all.push((begin, end, true));
        begin = end;
    }
    all
}

fn lines(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte == b'\n').count()
}

/// What goes to one place.
struct Group {
    place: Place,
    parts: Vec<Part>,
}

fn groups(additions: &[Addition]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for Addition { place, value } in additions {
        match groups.iter_mut().find(|group| group.place == *place) {
            Some(group) => group.parts.push(value.clone()),
            None => groups.push(Group { place: *place, parts: vec![value.clone()] }),
        }
    }
    groups
}

/// A kind of object that makes pods.
struct Known {
    kind: &'static str,
    /// `extensions` is where most of them lived first.
    groups: &'static [&'static str],
    /// The way to its pod.
    pod: &'static [&'static str],
}

const TEMPLATE: &[&str] = &["spec", "template"];

#[rustfmt::skip]
static KNOWN: [Known; 9] = [
    Known { kind: "Pod",                   groups: &[""],                   pod: &[] },
    Known { kind: "PodTemplate",           groups: &[""],                   pod: &["template"] },
    Known { kind: "ReplicationController", groups: &[""],                   pod: TEMPLATE },
    Known { kind: "Deployment",            groups: &["apps", "extensions"], pod: TEMPLATE },
    Known { kind: "ReplicaSet",            groups: &["apps", "extensions"], pod: TEMPLATE },
    Known { kind: "StatefulSet",           groups: &["apps", "extensions"], pod: TEMPLATE },
    Known { kind: "DaemonSet",             groups: &["apps", "extensions"], pod: TEMPLATE },
    Known { kind: "Job",                   groups: &["batch", "extensions"], pod: TEMPLATE },
    Known { kind: "CronJob",               groups: &["batch", "extensions"], pod: &["spec", "jobTemplate", "spec", "template"] },
];

struct Work<'w> {
    wish: &'w Wish,
    document: usize,
    /// Before the document.
    lines: usize,
    objects: Vec<Object>,
}

/// What a typed list says for its items.
type Inherited<'t> = Option<(&'static Known, &'t str)>;

/// Parts that go to the list `key` of the mapping at `path`.
struct Job {
    path: Vec<Step>,
    key: &'static str,
    parts: Vec<Part>,
    front: bool,
    line: usize,
    who: String,
    dash: usize,
}

impl Work<'_> {
    /// A document with what its objects lack, or `None` for one that stays as it is.
    fn document_of(&mut self, sheet: &Sheet<'_>) -> Result<Option<String>, Error> {
        let mut tree = Tree::read(sheet.text).map_err(|mut error| {
            let line = sheet.text.lines().nth(error.line.saturating_sub(1)).unwrap_or_default();
            if line.contains("{{") {
                error
                    .reason
                    .push_str("; this looks like a template: render it first, as with `helm template`");
            }
            self.error(error.line, &error.reason)
        })?;
        let mut jobs = Vec::new();
        let mut edits = Vec::new();
        {
            let anchors = tree.anchors();
            self.object(sheet, &tree.root, &anchors, None, &mut Vec::new(), &mut jobs)?;
            for job in &jobs {
                edits.extend(self.edits(sheet, &tree, &anchors, job)?);
            }
        }
        let Some(first) = jobs.first() else { return Ok(None) };
        let edited = edit::applied(sheet.text, edits);
        for job in &jobs {
            if let Some(holder) = at_path(&mut tree.root, &job.path) {
                holder.put(job.key, &job.parts, job.front);
            }
        }
        if Tree::read(&edited).is_ok_and(|edited| tree.root.says_as(&edited.root)) {
            return Ok(Some(edited));
        }
        Err(self.error(
            first.line,
            &format!(
                "{}: what is to be put in cannot be written here without changing something else; write the pod's spec as `kubectl create --dry-run=client -o yaml` does",
                first.who
            ),
        ))
    }

    fn error(&self, line: usize, reason: &str) -> Error {
        // Messages of parsers, and names, are foreign text.
        let reason: String = one_line(reason).chars().take(1000).collect();
        Error { document: self.document, line: self.lines + line, reason }
    }

    fn object<'t>(
        &mut self,
        sheet: &Sheet<'_>,
        node: &'t Node<'t>,
        anchors: &Anchors<'t>,
        inherited: Inherited<'t>,
        path: &mut Vec<Step>,
        jobs: &mut Vec<Job>,
    ) -> Result<(), Error> {
        let text = |key: &str| match &anchors.get(node, key)?.kind {
            Kind::Scalar { text, .. } if !text.is_empty() => Some(&**text),
            _ => None,
        };
        let group = text("apiVersion").map(|version| version.split_once('/').map_or("", |(group, _)| group));
        let (kind, group) = match (text("kind"), inherited) {
            (Some(kind), _) => (kind, group.or(inherited.map(|(_, group)| group))),
            (None, Some((known, of_list))) => (known.kind, group.or(Some(of_list))),
            (None, None) => return Ok(()),
        };
        let named = |kind: &str| {
            KNOWN
                .iter()
                .find(|known| known.kind == kind && group.is_some_and(|group| known.groups.contains(&group)))
        };
        let Some(known) = named(kind) else {
            let inherited = match kind.strip_suffix("List") {
                Some("") if group == Some("") => None,
                Some(kind) => match (named(kind), group) {
                    (Some(known), Some(group)) => Some((known, group)),
                    _ => return Ok(()),
                },
                None => return Ok(()),
            };
            if let Some(Kind::Seq { items, .. }) = anchors.get(node, "items").map(|items| &items.kind) {
                path.push(Step::Key("items"));
                for (index, item) in items.iter().enumerate() {
                    path.push(Step::Index(index));
                    if let Some(item) = anchors.follow(item) {
                        self.object(sheet, item, anchors, inherited, path, jobs)?;
                    }
                    path.pop();
                }
                path.pop();
            }
            return Ok(());
        };
        self.workload(sheet, known, node, anchors, path, jobs)
    }

    fn workload<'t>(
        &mut self,
        sheet: &Sheet<'_>,
        known: &'static Known,
        node: &'t Node<'t>,
        anchors: &Anchors<'t>,
        path: &[Step],
        jobs: &mut Vec<Job>,
    ) -> Result<(), Error> {
        let named = |key: &str| match &anchors.get(anchors.get(node, "metadata")?, key)?.kind {
            Kind::Scalar { text, .. } if !text.is_empty() => {
                Some(one_line(text).chars().take(253).collect::<String>())
            }
            _ => None,
        };
        let mut object = Object {
            document: self.document,
            line: self.lines + node.line,
            kind: known.kind,
            namespace: named("namespace"),
            name: named("name").or_else(|| named("generateName")),
            outcome: Outcome::NoPod,
        };
        let who = object.to_string();
        let pod = known.pod.iter().try_fold(node, |at, key| anchors.get(at, key));
        let Some(pod) = pod.filter(|pod| matches!(pod.kind, Kind::Map { .. })) else {
            self.objects.push(object);
            return Ok(());
        };
        let mut value = json!({});
        for key in ["metadata", "spec"] {
            if let Some(node) = anchors.get(pod, key) {
                let built = anchors.value(node);
                value[key] =
                    built.map_err(|error| self.error(error.line, &format!("{who}: {}", error.reason)))?;
            }
        }
        let refuse = |fault: &Fault, advice: &str| {
            let line = line_of(pod, &fault.path, anchors);
            self.error(line, &format!("{who}: {}{advice}", fault.reason))
        };
        object.outcome = match lacks(&value, self.wish).map_err(|fault| refuse(&fault, ""))? {
            Decision::OptedOut => Outcome::OptedOut,
            Decision::NoPod => Outcome::NoPod,
            Decision::NoContainer(fault) => {
                return Err(refuse(
                    &fault,
                    &format!(
                        "; name the one that it is for with --container, or annotate the pod with {SWITCH}: \"false\""
                    ),
                ));
            }
            Decision::Lacks(additions) if additions.is_empty() => Outcome::Complete,
            Decision::Lacks(additions) => {
                let way: Vec<_> = known.pod.iter().copied().chain(["spec"]).map(Step::Key).collect();
                let dash = anchors
                    .get(pod, "spec")
                    .and_then(|spec| sheet.dash(spec, anchors.get(spec, "containers")?))
                    .unwrap_or(0);
                for group in groups(&additions) {
                    let (holder, key) = group.place.holder();
                    jobs.push(Job {
                        path: [path, &way, &holder].concat(),
                        key,
                        parts: group.parts,
                        front: group.place == Place::InitContainers,
                        line: node.line,
                        who: who.clone(),
                        dash,
                    });
                }
                Outcome::Changed(additions.iter().map(ToString::to_string).collect())
            }
        };
        self.objects.push(object);
        Ok(())
    }

    /// Follows the way to a mapping as it is written, and refuses what would change more than is meant.
    fn edits<'t>(
        &self,
        sheet: &Sheet<'_>,
        tree: &'t Tree<'t>,
        anchors: &Anchors<'t>,
        job: &Job,
    ) -> Result<Vec<Edit>, Error> {
        let refuse = |line: usize, what: &str| self.error(line, &format!("{}: {what}", job.who));
        let mut node = &tree.root;
        for step in job.path.iter().map(Some).chain([None]) {
            self.is_its_own(tree, node, job)?;
            if let Some((line, key)) = node.repeated_key() {
                let key: String = key.chars().take(63).collect();
                return Err(refuse(
                    line,
                    &format!("{key} stands here for the second time; take one of them out"),
                ));
            }
            let Some(step) = step else { break };
            let next = match (step, &node.kind) {
                (Step::Key(key), Kind::Map { .. }) => node.pair(key).map(|(_, value)| value),
                (Step::Index(index), Kind::Seq { items, .. }) => items.get(*index),
                _ => None,
            };
            node = next.ok_or_else(|| {
                refuse(node.line, "what is to be changed comes by a merge key (<<); write it out here")
            })?;
        }
        match node.pair(job.key) {
            Some((_, list)) => {
                self.is_its_own(tree, list, job)?;
                if !list.is_null() && !matches!(list.kind, Kind::Seq { .. }) {
                    return Err(refuse(list.line, &format!("{} is no list", job.key)));
                }
            }
            None if anchors.get(node, job.key).is_some() => {
                let what = format!("{} comes by a merge key (<<); write it out here", job.key);
                return Err(refuse(node.line, &what));
            }
            None => {}
        }
        Ok(sheet.put(&Put {
            holder: node,
            key: job.key,
            parts: &job.parts,
            front: job.front,
            depth: job.path.len(),
            dash: job.dash,
        }))
    }

    fn is_its_own(&self, tree: &Tree<'_>, node: &Node<'_>, job: &Job) -> Result<(), Error> {
        let what = if matches!(node.kind, Kind::Alias(_)) {
            "an alias stands here for what is to be changed; write it out"
        } else if tree.is_shared(node) {
            "what is to be changed has an anchor, and an alias elsewhere would change with it; write it out there"
        } else if node.is_tagged() {
            "what is to be changed has a tag (!); take that out"
        } else {
            return Ok(());
        };
        Err(self.error(node.line, &format!("{}: {what}", job.who)))
    }
}

/// The line that a fault speaks of, or the nearest above it.
fn line_of<'t>(pod: &'t Node<'t>, path: &[Step], anchors: &Anchors<'t>) -> usize {
    let (mut node, mut line) = (pod, pod.line);
    for step in path {
        let next = match (step, &node.kind) {
            (Step::Key(key), _) => {
                line = node.pair(key).map_or(line, |(key, _)| key.line);
                anchors.get(node, key)
            }
            (Step::Index(index), Kind::Seq { items, .. }) => {
                line = items.get(*index).map_or(line, |item| item.line);
                items.get(*index).and_then(|item| anchors.follow(item))
            }
            _ => None,
        };
        let Some(next) = next else { break };
        node = next;
    }
    line
}

fn at_path<'n, 'a>(root: &'n mut Node<'a>, path: &[Step]) -> Option<&'n mut Node<'a>> {
    path.iter().try_fold(root, |node, step| match step {
        Step::Key(key) => node.value_mut(key),
        Step::Index(index) => node.item_mut(*index),
    })
}

#[cfg(test)]
mod tests;
