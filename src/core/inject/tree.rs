//! A YAML document with the places of its values, read to be edited and not to be interpreted.

use std::collections::{HashMap, HashSet};

use granit_parser::{Event, Parser, ScalarStyle, Span, StructureStyle};
use serde_json::{Map, Value};

use super::part::Part;

/// How deep mappings and sequences may lie within each other. Kubernetes' own deepest schemas need about 40.
const MAX_DEPTH: usize = 100;
/// Values in a document.
const MAX_NODES: usize = 2_000_000;
/// Values in one pod, once its aliases are followed.
const MAX_POD: usize = 100_000;

/// Why a document cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Error {
    /// Counted from 1.
    pub(super) line: usize,
    pub(super) reason: String,
}

/// A value, and where it stands.
#[derive(Debug)]
pub(super) struct Node<'a> {
    /// Bytes; of a block collection from its first value's begin to its last value's end.
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) line: usize,
    /// Counted from 0; of a block mapping where its keys begin.
    pub(super) column: usize,
    /// 0 for none.
    pub(super) anchor: usize,
    tag: Option<Box<str>>,
    pub(super) kind: Kind<'a>,
}

#[derive(Debug)]
pub(super) enum Kind<'a> {
    Scalar { text: std::borrow::Cow<'a, str>, style: ScalarStyle },
    Alias(usize),
    Map { flow: bool, pairs: Vec<(Node<'a>, Node<'a>)> },
    Seq { flow: bool, items: Vec<Node<'a>> },
}

impl<'a> Node<'a> {
    /// A value that is there by not being written.
    pub(super) fn is_unwritten(&self) -> bool {
        self.start == self.end && matches!(self.kind, Kind::Scalar { style: ScalarStyle::Plain, .. })
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { text, style: ScalarStyle::Plain } if is_null(text))
    }

    pub(super) fn is_tagged(&self) -> bool {
        self.tag.is_some()
    }

    /// A key as it is written in this mapping, with its value.
    pub(super) fn pair(&self, wanted: &str) -> Option<(&Node<'a>, &Node<'a>)> {
        let Kind::Map { pairs, .. } = &self.kind else { return None };
        pairs.iter().find(|(key, _)| key.is_text(wanted)).map(|(key, value)| (key, value))
    }

    pub(super) fn value_mut(&mut self, wanted: &str) -> Option<&mut Node<'a>> {
        let Kind::Map { pairs, .. } = &mut self.kind else { return None };
        pairs.iter_mut().find(|(key, _)| key.is_text(wanted)).map(|(_, value)| value)
    }

    pub(super) fn item_mut(&mut self, index: usize) -> Option<&mut Node<'a>> {
        let Kind::Seq { items, .. } = &mut self.kind else { return None };
        items.get_mut(index)
    }

    fn is_text(&self, wanted: &str) -> bool {
        matches!(&self.kind, Kind::Scalar { text, .. } if text == wanted)
    }

    fn is_merge(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { text, style: ScalarStyle::Plain } if text == "<<")
    }

    /// The line of a key that is written twice.
    pub(super) fn repeated_key(&self) -> Option<(usize, &str)> {
        let Kind::Map { pairs, .. } = &self.kind else { return None };
        let mut seen = HashSet::with_capacity(pairs.len());
        pairs.iter().find_map(|(key, _)| match &key.kind {
            Kind::Scalar { text, .. } if !key.is_merge() && !seen.insert(text) => Some((key.line, &**text)),
            _ => None,
        })
    }

    /// Makes it what it should be once something is put in: the end of a list, or its begin.
    pub(super) fn put(&mut self, key: &'static str, parts: &[Part], front: bool) {
        let new: Vec<_> = parts.iter().map(Node::of).collect();
        let Kind::Map { pairs, .. } = &mut self.kind else { return };
        match pairs.iter_mut().find(|(found, _)| found.is_text(key)) {
            Some((_, Node { kind: Kind::Seq { items, .. }, .. })) => {
                let at = if front { 0 } else { items.len() };
                items.splice(at..at, new);
            }
            Some((_, value)) => *value = Node::made(Kind::Seq { flow: false, items: new }),
            None => {
                let list = Node::made(Kind::Seq { flow: false, items: new });
                pairs.push((Node::of(&Part::text(key)), list));
            }
        }
    }

    fn of(part: &Part) -> Self {
        let plain = |text: String| Kind::Scalar { text: text.into(), style: ScalarStyle::Plain };
        Self::made(match part {
            Part::Text(text) => Kind::Scalar { text: text.clone().into(), style: ScalarStyle::DoubleQuoted },
            Part::Number(number) => plain(number.to_string()),
            Part::Flag(flag) => plain(flag.to_string()),
            Part::Map(fields) => Kind::Map {
                flow: true,
                pairs: fields
                    .iter()
                    .map(|(name, value)| (Self::of(&Part::text(*name)), Self::of(value)))
                    .collect(),
            },
            Part::List(items) => Kind::Seq { flow: true, items: items.iter().map(Self::of).collect() },
        })
    }

    fn made(kind: Kind<'a>) -> Self {
        Self { start: 0, end: 0, line: 0, column: 0, anchor: 0, tag: None, kind }
    }

    /// Whether both say the same, wherever and however it is written. Keys may stand in another order only where
    /// `self` has them last.
    pub(super) fn says_as(&self, other: &Node<'_>) -> bool {
        self.anchor == other.anchor
            && self.tag == other.tag
            && match (&self.kind, &other.kind) {
                (Kind::Scalar { .. }, Kind::Scalar { .. }) => self.scalar() == other.scalar(),
                (Kind::Alias(one), Kind::Alias(another)) => one == another,
                (Kind::Map { pairs: ones, .. }, Kind::Map { pairs: others, .. }) => {
                    ones.len() == others.len()
                        && ones
                            .iter()
                            .zip(others)
                            .all(|(one, another)| one.0.says_as(&another.0) && one.1.says_as(&another.1))
                }
                (Kind::Seq { items: ones, .. }, Kind::Seq { items: others, .. }) => {
                    ones.len() == others.len()
                        && ones.iter().zip(others).all(|(one, another)| one.says_as(another))
                }
                _ => false,
            }
    }

    fn scalar(&self) -> Value {
        match &self.kind {
            Kind::Scalar { text, style: ScalarStyle::Plain } if self.tag.is_none() => plain(text),
            Kind::Scalar { text, .. } => Value::from(&**text),
            _ => Value::Null,
        }
    }
}

/// What a scalar without quotes is to Kubernetes.
fn plain(text: &str) -> Value {
    let is_one_of = |words: [&str; 4]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    if is_null(text) {
        return Value::Null;
    }
    if is_one_of(["true", "yes", "on", "y"]) {
        return Value::Bool(true);
    }
    if is_one_of(["false", "no", "off", "n"]) {
        return Value::Bool(false);
    }
    if text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.')) {
        if let Ok(number) = text.parse::<i64>() {
            return Value::from(number);
        }
        if let Some(number) = text.parse().ok().and_then(serde_json::Number::from_f64) {
            return Value::Number(number);
        }
    }
    Value::from(text)
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// One document.
pub(super) struct Tree<'a> {
    /// Null for a document that holds nothing.
    pub(super) root: Node<'a>,
    /// The anchors that an alias names.
    aliased: HashSet<usize>,
}

impl<'a> Tree<'a> {
    /// Reads a text that holds one document.
    pub(super) fn read(text: &'a str) -> Result<Self, Error> {
        let options = granit_parser::options! {
            emit_comments: false,
            flow_nesting_limit: MAX_DEPTH,
            block_nesting_limit: MAX_DEPTH,
        };
        let parser = Parser::new_from_str_with_options(text, options);
        let mut reader = Reader { text, parser, line: 1, nodes: 0, aliased: HashSet::new() };
        let root = loop {
            match reader.next()? {
                (Event::StreamStart | Event::DocumentStart(..), _) => {}
                (Event::DocumentEnd | Event::StreamEnd, _) => {
                    return Ok(Self { root: Node::of(&Part::text("")), aliased: HashSet::new() });
                }
                (event, span) => break reader.node(event, span, 0)?,
            }
        };
        loop {
            match reader.next()? {
                (Event::DocumentEnd, _) => {}
                (Event::StreamEnd, _) => return Ok(Self { root, aliased: reader.aliased }),
                _ => return Err(reader.fault("a second document begins here without \"---\"")),
            }
        }
    }

    /// Whether an alias elsewhere stands for this value too.
    pub(super) fn is_shared(&self, node: &Node<'_>) -> bool {
        self.aliased.contains(&node.anchor)
    }

    /// What aliases stand for.
    pub(super) fn anchors(&self) -> Anchors<'_> {
        let mut found = HashMap::new();
        if !self.aliased.is_empty() {
            let mut open = vec![&self.root];
            while let Some(node) = open.pop() {
                if self.aliased.contains(&node.anchor) {
                    found.insert(node.anchor, node);
                }
                match &node.kind {
                    Kind::Map { pairs, .. } => {
                        pairs.iter().for_each(|(key, value)| open.extend([key, value]))
                    }
                    Kind::Seq { items, .. } => open.extend(items),
                    Kind::Scalar { .. } | Kind::Alias(_) => {}
                }
            }
        }
        Anchors(found)
    }
}

struct Reader<'a> {
    text: &'a str,
    parser: Parser<'a, granit_parser::StrInput<'a>>,
    line: usize,
    nodes: usize,
    aliased: HashSet<usize>,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Span), Error> {
        match self.parser.next_event() {
            Some(Ok((event, span))) => {
                self.line = span.start.line();
                Ok((event, span))
            }
            Some(Err(error)) => Err(Error {
                line: error.marker().line(),
                reason: format!("column {}: {}", error.marker().col() + 1, error.info()),
            }),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    fn fault(&self, reason: impl Into<String>) -> Error {
        Error { line: self.line, reason: reason.into() }
    }

    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Result<Node<'a>, Error> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(self.fault(format!(
                "this document holds more than {MAX_NODES} values, more than a list of ten thousand workloads; cut it into several"
            )));
        }
        if depth > MAX_DEPTH {
            return Err(self.fault(format!("this lies more than {MAX_DEPTH} levels deep")));
        }
        let range = span.byte_range().unwrap_or_default();
        let mut node = Node {
            start: range.start,
            end: range.end,
            line: span.start.line(),
            column: span.start.col(),
            anchor: 0,
            tag: None,
            kind: Kind::Alias(0),
        };
        let tag;
        (node.kind, node.anchor, tag) = match event {
            Event::Alias(anchor) => {
                self.aliased.insert(anchor);
                (Kind::Alias(anchor), 0, None)
            }
            Event::Scalar(text, style, anchor, tag) => (Kind::Scalar { text, style }, anchor, tag),
            Event::MappingStart(style, anchor, tag) => {
                let mut pairs = Vec::new();
                let last = loop {
                    let (event, span) = self.next()?;
                    if event == Event::MappingEnd {
                        break span;
                    }
                    let key = self.node(event, span, depth + 1)?;
                    let (event, span) = self.next()?;
                    if event == Event::MappingEnd {
                        return Err(self.fault("a key has no value"));
                    }
                    let value = self.node(event, span, depth + 1)?;
                    node.end = node.end.max(key.end).max(value.end);
                    pairs.push((key, value));
                };
                let flow = style == StructureStyle::Flow;
                if flow {
                    node.end = last.byte_range().unwrap_or_default().end;
                }
                (Kind::Map { flow, pairs }, anchor, tag)
            }
            Event::SequenceStart(style, anchor, tag) => {
                let mut items = Vec::new();
                let last = loop {
                    let (event, span) = self.next()?;
                    if event == Event::SequenceEnd {
                        break span;
                    }
                    let item = self.node(event, span, depth + 1)?;
                    node.end = node.end.max(item.end);
                    items.push(item);
                };
                let flow = style == StructureStyle::Flow;
                if flow {
                    node.end = last.byte_range().unwrap_or_default().end;
                }
                (Kind::Seq { flow, items }, anchor, tag)
            }
            _ => return Err(self.fault("a value is missing")),
        };
        node.tag = tag.map(|tag| tag.to_string().into_boxed_str());
        if node.start > node.end || self.text.get(node.start..node.end).is_none() {
            return Err(self.fault("this cannot be placed"));
        }
        Ok(node)
    }
}

/// What aliases stand for.
pub(super) struct Anchors<'t>(HashMap<usize, &'t Node<'t>>);

impl<'t> Anchors<'t> {
    /// What a value is, once aliases are followed. An alias always stands behind its anchor, but may stand within it.
    pub(super) fn follow(&self, node: &'t Node<'t>) -> Option<&'t Node<'t>> {
        let mut node = node;
        for _ in 0..MAX_DEPTH {
            match &node.kind {
                Kind::Alias(anchor) => node = self.0.get(anchor)?,
                _ => return Some(node),
            }
        }
        None
    }

    /// The value of a key, also of one that a merge key brings.
    pub(super) fn get(&self, map: &'t Node<'t>, wanted: &str) -> Option<&'t Node<'t>> {
        // Merges that merge each other's doubles would be followed for ever.
        let mut left = 10_000;
        self.look(map, wanted, &mut left)
    }

    fn look(&self, map: &'t Node<'t>, wanted: &str, left: &mut usize) -> Option<&'t Node<'t>> {
        let Kind::Map { pairs, .. } = &self.follow(map)?.kind else { return None };
        if let Some((_, value)) = pairs.iter().find(|(key, _)| key.is_text(wanted)) {
            return self.follow(value);
        }
        *left = left.checked_sub(1)?;
        pairs.iter().filter(|(key, _)| key.is_merge()).find_map(|(_, from)| {
            let from = self.follow(from)?;
            match &from.kind {
                Kind::Seq { items, .. } => items.iter().find_map(|item| self.look(item, wanted, left)),
                _ => self.look(from, wanted, left),
            }
        })
    }

    /// What a value says, aliases and merge keys followed.
    pub(super) fn value(&self, node: &'t Node<'t>) -> Result<Value, Error> {
        let mut left = MAX_POD;
        self.built(node, 0, &mut left)
    }

    fn built(&self, node: &'t Node<'t>, depth: usize, left: &mut usize) -> Result<Value, Error> {
        let fault = |reason: String| Error { line: node.line, reason };
        *left = left.checked_sub(1).ok_or_else(|| {
            fault(format!("with its aliases followed, this pod holds more than {MAX_POD} values"))
        })?;
        if depth > MAX_DEPTH {
            return Err(fault(format!(
                "with its aliases followed, this lies more than {MAX_DEPTH} levels deep"
            )));
        }
        Ok(match &node.kind {
            Kind::Scalar { .. } => node.scalar(),
            Kind::Alias(_) => {
                let target =
                    self.follow(node).ok_or_else(|| fault("this alias stands for itself".to_owned()))?;
                self.built(target, depth + 1, left)?
            }
            Kind::Seq { items, .. } => Value::Array(
                items.iter().map(|item| self.built(item, depth + 1, left)).collect::<Result<_, _>>()?,
            ),
            Kind::Map { pairs, .. } => {
                let mut map = Map::new();
                for (key, value) in pairs.iter().filter(|(key, _)| !key.is_merge()) {
                    let value = self.built(value, depth + 1, left)?;
                    if let Some(Kind::Scalar { text, .. }) = self.follow(key).map(|key| &key.kind) {
                        map.insert(text.clone().into_owned(), value);
                    }
                }
                for (_, from) in pairs.iter().filter(|(key, _)| key.is_merge()) {
                    let sources = match self.built(from, depth + 1, left)? {
                        Value::Array(sources) => sources,
                        source => vec![source],
                    };
                    for source in sources {
                        let Value::Object(source) = source else {
                            return Err(fault(
                                "a merge key (<<) takes a mapping, or a list of some".to_owned(),
                            ));
                        };
                        for (key, value) in source {
                            map.entry(key).or_insert(value);
                        }
                    }
                }
                Value::Object(map)
            }
        })
    }
}
