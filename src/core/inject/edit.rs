//! Where and how parts are written into a text, beside what is there.

use std::ops::Range;

use granit_parser::ScalarStyle;

use super::part::{self, Part};
use super::tree::{Kind, Node};

/// A change of a text.
#[derive(Debug)]
pub(super) struct Edit {
    /// What goes.
    pub(super) at: Range<usize>,
    /// What comes in its place.
    pub(super) text: String,
    /// Of changes at one place the one of the inner value comes first.
    depth: usize,
}

/// A document that is edited.
pub(super) struct Sheet<'a> {
    pub(super) text: &'a str,
    /// Everything is quoted.
    pub(super) json: bool,
}

/// What is put into a list, which is a field of a mapping that is written here.
pub(super) struct Put<'t, 'a> {
    pub(super) holder: &'t Node<'a>,
    pub(super) key: &'static str,
    pub(super) parts: &'t [Part],
    pub(super) front: bool,
    pub(super) depth: usize,
    /// How far the items of a list stand to the right of its name, as the pod has it.
    pub(super) dash: usize,
}

impl Sheet<'_> {
    pub(super) fn put(&self, put: &Put<'_, '_>) -> Vec<Edit> {
        let Kind::Map { flow, pairs } = &put.holder.kind else { return Vec::new() };
        match (put.holder.pair(put.key), *flow) {
            (Some((key, list)), flow) => match &list.kind {
                Kind::Seq { flow: false, items } => self.to_block_list(put, key, list, items),
                Kind::Seq { flow: true, items } if !items.is_empty() => self.to_flow_list(put, list, items),
                // Comments may stand in it.
                Kind::Seq { flow: true, .. } if self.text[list.start..list.end].contains('\n') => {
                    let parts: Vec<_> = put.parts.iter().map(|part| part.flow(self.json)).collect();
                    let at = list.end - 1;
                    vec![Edit { at: at..at, text: parts.join(", "), depth: put.depth + 1 }]
                }
                _ if flow => self.in_place_of_nothing(put, key, list),
                _ => self.below(put, key, list),
            },
            (None, true) => self.to_flow_map(put, pairs),
            (None, false) => {
                let lines = part::field(put.key, &Part::List(put.parts.to_vec()), put.dash);
                let at = self.behind(put.holder, put.holder.column);
                vec![self.lines(at, &lines, put.holder.column, put.depth)]
            }
        }
    }

    /// How far the items of a block list stand to the right of its name.
    pub(super) fn dash(&self, holder: &Node<'_>, list: &Node<'_>) -> Option<usize> {
        match &list.kind {
            Kind::Seq { flow: false, items } => self.dash_column(items.first()?)?.checked_sub(holder.column),
            _ => None,
        }
    }

    fn to_block_list(
        &self,
        put: &Put<'_, '_>,
        key: &Node<'_>,
        list: &Node<'_>,
        items: &[Node<'_>],
    ) -> Vec<Edit> {
        let Some(column) = items.first().and_then(|item| self.dash_column(item)) else { return Vec::new() };
        let lines: Vec<_> = put.parts.iter().flat_map(part::item).collect();
        let at = if put.front { self.next_line(key.end) } else { self.behind(list, column + 1) };
        vec![self.lines(at, &lines, column, put.depth + 1)]
    }

    fn to_flow_list(&self, put: &Put<'_, '_>, list: &Node<'_>, items: &[Node<'_>]) -> Vec<Edit> {
        let neighbour = if put.front { items.first() } else { items.last() };
        let Some(neighbour) = neighbour else { return Vec::new() };
        let begin = self.begin_of(neighbour);
        let own_line = self.own_line(begin);
        let parts: Vec<_> = put.parts.iter().map(|part| self.inline(part, own_line, list.start)).collect();
        let between =
            own_line.map_or_else(|| ", ".to_owned(), |margin| format!(",{}{margin}", self.newline()));
        let parts = parts.join(&between);
        let (at, text) = if put.front {
            (begin, format!("{parts}{between}"))
        } else {
            (neighbour.end, format!("{between}{parts}"))
        };
        vec![Edit { at: at..at, text, depth: put.depth + 1 }]
    }

    /// A list that is empty or null, in a flow mapping.
    fn in_place_of_nothing(&self, put: &Put<'_, '_>, key: &Node<'_>, list: &Node<'_>) -> Vec<Edit> {
        let own_line = self.own_line(self.begin_of(key));
        let value = self.inline(&Part::List(put.parts.to_vec()), own_line, put.holder.start);
        let edit = match list.is_unwritten() {
            false => Edit { at: list.start..list.end, text: value, depth: put.depth },
            true => {
                let colon = self.colon_behind(key);
                let text = if colon.is_some() { format!(" {value}") } else { format!(": {value}") };
                let at = colon.unwrap_or(key.end);
                Edit { at: at..at, text, depth: put.depth }
            }
        };
        vec![edit]
    }

    /// A list that is empty or null, in a block mapping.
    fn below(&self, put: &Put<'_, '_>, key: &Node<'_>, list: &Node<'_>) -> Vec<Edit> {
        let column = put.holder.column + put.dash;
        let lines: Vec<_> = put.parts.iter().flat_map(part::item).collect();
        let mut edits = Vec::new();
        if !list.is_unwritten() {
            let spaces =
                self.text[key.end..list.start].bytes().rev().take_while(|byte| *byte == b' ').count();
            edits.push(Edit { at: list.start - spaces..list.end, text: String::new(), depth: put.depth });
        }
        edits.push(self.lines(self.next_line(list.end.max(key.end)), &lines, column, put.depth + 1));
        edits
    }

    fn to_flow_map(&self, put: &Put<'_, '_>, pairs: &[(Node<'_>, Node<'_>)]) -> Vec<Edit> {
        let Some((key, value)) = pairs.last() else { return Vec::new() };
        let own_line = self.own_line(self.begin_of(key));
        let list = self.inline(&Part::List(put.parts.to_vec()), own_line, put.holder.start);
        let name = if self.json { format!("\"{}\"", put.key) } else { put.key.to_owned() };
        let between =
            own_line.map_or_else(|| ", ".to_owned(), |margin| format!(",{}{margin}", self.newline()));
        let at = if value.is_unwritten() { self.colon_behind(key).unwrap_or(key.end) } else { value.end };
        vec![Edit { at: at..at, text: format!("{between}{name}: {list}"), depth: put.depth }]
    }

    /// Over several lines where its neighbour has a line of its own, in JSON.
    fn inline(&self, part: &Part, own_line: Option<&str>, outer: usize) -> String {
        match own_line {
            Some(margin) if self.json => {
                let outer = self.margin(outer);
                let unit = margin.strip_prefix(outer).filter(|unit| !unit.is_empty()).unwrap_or("  ");
                part.pretty(margin, unit).replace('\n', self.newline())
            }
            _ => part.flow(self.json),
        }
    }

    /// Whole lines, put in before what stands at a place.
    fn lines(&self, at: usize, lines: &[String], column: usize, depth: usize) -> Edit {
        let newline = self.newline();
        let mut text: String = lines.iter().map(|line| format!("{:column$}{line}{newline}", "")).collect();
        if at > 0 && !self.text[..at].ends_with(['\n', '\r']) {
            // The text ends without a line break, and goes on to.
            text.truncate(text.len() - newline.len());
            text.insert_str(0, newline);
        }
        Edit { at: at..at, text, depth }
    }

    fn newline(&self) -> &'static str {
        match self.text.find('\n') {
            Some(at) if self.text[..at].ends_with('\r') => "\r\n",
            _ => "\n",
        }
    }

    /// Behind a block value, and behind the comments that stand on its lines or below it from a column on.
    fn behind(&self, value: &Node<'_>, column: usize) -> usize {
        let mut at = match last_scalar(value) {
            Some(last) if is_block(last) => self.end_of_block(last),
            _ => self.next_line(value.end),
        };
        loop {
            let line = &self.text[at..self.next_line(at)];
            let text = line.trim_start_matches(' ');
            if !text.starts_with('#') || line.len() - text.len() < column {
                return at;
            }
            at += line.len();
        }
    }

    /// Blank lines at its end belong to it only if it says that it keeps them.
    fn end_of_block(&self, scalar: &Node<'_>) -> usize {
        // It ends where the next word begins, or the text.
        let content = self.text[..scalar.end].trim_end_matches(' ');
        let end = if content.ends_with('\n') { content.len() } else { self.next_line(scalar.end) };
        let header = self.text[..scalar.start].rfind(['|', '>']).unwrap_or_default();
        let header = self.text[header..].lines().next().unwrap_or_default();
        if header.contains('+') {
            return end;
        }
        let content = self.text[..end].trim_end_matches([' ', '\t', '\r', '\n']).len();
        self.next_line(content)
    }

    /// Where the next line begins, or the text ends.
    fn next_line(&self, at: usize) -> usize {
        self.text[at..].find('\n').map_or(self.text.len(), |end| at + end + 1)
    }

    /// What stands before the first word of a place's line.
    fn margin(&self, at: usize) -> &str {
        let begin = self.text[..at].rfind('\n').map_or(0, |end| end + 1);
        let line = &self.text[begin..at];
        &line[..line.len() - line.trim_start_matches([' ', '\t']).len()]
    }

    /// The margin of a place that has nothing else before it on its line.
    fn own_line(&self, at: usize) -> Option<&str> {
        let begin = self.text[..at].rfind('\n')? + 1;
        let line = &self.text[begin..at];
        line.trim_matches([' ', '\t']).is_empty().then_some(line)
    }

    /// A value's begin, with its anchor and tag.
    fn begin_of(&self, node: &Node<'_>) -> usize {
        let before = &self.text[..node.start];
        let own = before.rfind([',', '[', '{', '\n']).map_or(0, |at| at + 1);
        own + before[own..].len() - before[own..].trim_start().len()
    }

    /// The column of the dash before an item, which may stand on a line above it.
    fn dash_column(&self, item: &Node<'_>) -> Option<usize> {
        let mut end = self.next_line(item.start);
        let mut begin = self.text[..item.start].rfind('\n').map_or(0, |at| at + 1);
        loop {
            let line = &self.text[begin..end];
            let text = line.trim_start_matches(' ');
            if matches!(text.as_bytes(), [b'-'] | [b'-', b' ' | b'\t' | b'\r' | b'\n', ..]) {
                return Some(line.len() - text.len());
            }
            end = begin;
            begin = self.text[..begin.checked_sub(1)?].rfind('\n').map_or(0, |at| at + 1);
        }
    }

    fn colon_behind(&self, key: &Node<'_>) -> Option<usize> {
        let rest = &self.text[key.end..];
        let trimmed = rest.trim_start();
        trimmed.starts_with(':').then(|| key.end + rest.len() - trimmed.len() + 1)
    }
}

/// The scalar that ends a block value.
fn last_scalar<'t, 'a>(value: &'t Node<'a>) -> Option<&'t Node<'a>> {
    match &value.kind {
        Kind::Map { flow: false, pairs } => last_scalar(&pairs.last()?.1),
        Kind::Seq { flow: false, items } => last_scalar(items.last()?),
        Kind::Scalar { .. } => Some(value),
        _ => None,
    }
}

fn is_block(scalar: &Node<'_>) -> bool {
    matches!(scalar.kind, Kind::Scalar { style: ScalarStyle::Literal | ScalarStyle::Folded, .. })
}

/// A text with all its changes.
pub(super) fn applied(text: &str, mut edits: Vec<Edit>) -> String {
    edits.sort_by_key(|edit| (edit.at.start, edit.at.end, std::cmp::Reverse(edit.depth)));
    let mut out = String::with_capacity(text.len() + edits.iter().map(|edit| edit.text.len()).sum::<usize>());
    let mut at = 0;
    for edit in edits {
        out.push_str(text.get(at..edit.at.start).unwrap_or_default());
        out.push_str(&edit.text);
        at = at.max(edit.at.end);
    }
    out.push_str(text.get(at..).unwrap_or_default());
    out
}
