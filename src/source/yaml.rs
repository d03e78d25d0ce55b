//! Reads one YAML document into what is asked of it, passing over the rest without building or interpreting it.
//!
//! serde-saphyr interprets every scalar that it passes over and recurses through it, which costs several times the
//! parsing itself and a stack frame a level. Manifests are mostly passed over. So its parser is used directly here,
//! and it itself only for documents whose asked-for parts hold what needs a memory: aliases, merge keys and tags.

use std::borrow::Cow;
use std::fmt;

use granit_parser::{Event, Parser, ScalarStyle, StrInput};
use serde::de::value::CowStrDeserializer;
use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;

/// How deep mappings and sequences may lie within each other. Kubernetes' own deepest schemas need about 40.
pub(super) const MAX_DEPTH: usize = 100;
/// The same where each level costs stack.
const MAX_DEPTH_WITH_ALIASES: usize = 50;

/// Where and why a document cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Error {
    /// Both counted from 1; 0 where nothing is known.
    pub(super) line: usize,
    pub(super) column: usize,
    /// Tells keys and anchors at most, never values.
    pub(super) reason: String,
}

/// Reads a text that holds one document.
pub(super) fn read<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, Error> {
    let mut reader = Reader::new(text);
    match reader.document() {
        Ok(value) => Ok(value),
        Err(Stop::Beyond) => read_with_aliases(text),
        Err(Stop::Syntax(error)) => Err(error),
        Err(Stop::Said(reason)) => Err(Error { line: reader.line, column: reader.column, reason }),
    }
}

fn read_with_aliases<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, Error> {
    // What a text can hold without aliases; what aliases multiply is bounded by the replay limit.
    let most = text.len().max(100_000);
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH_WITH_ALIASES,
            max_events: most.saturating_mul(2),
            max_nodes: most.saturating_mul(2),
            max_total_scalar_bytes: most.saturating_mul(2),
            max_anchors: most,
            max_aliases: most,
            max_merge_keys: most,
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: most,
        },
        emit_comments: false,
        with_snippet: false,
        // Repeated keys matter where they make a name doubtful, and there serde refuses them.
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::PassThrough,
        ignore_binary_tag_for_string: true,
        non_finite_float_policy: serde_saphyr::options::NonFiniteFloatPolicy::AsString,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let at = error.location();
        Error {
            line: at.map_or(0, |at| usize::try_from(at.line()).unwrap_or(0)),
            column: at.map_or(0, |at| usize::try_from(at.column()).unwrap_or(0)),
            reason: error.without_snippet().to_string(),
        }
    })
}

struct Reader<'de> {
    parser: Parser<'de, StrInput<'de>>,
    line: usize,
    column: usize,
}

/// Why reading ends early.
#[derive(Debug)]
enum Stop {
    Syntax(Error),
    Said(String),
    /// It takes aliases, merge keys or tags.
    Beyond,
}

impl<'de> Reader<'de> {
    fn new(text: &'de str) -> Self {
        let options = granit_parser::options! {
            emit_comments: false,
            flow_nesting_limit: MAX_DEPTH,
            block_nesting_limit: MAX_DEPTH,
        };
        Self { parser: Parser::new_from_str_with_options(text, options), line: 1, column: 1 }
    }

    fn document<T: Deserialize<'de>>(&mut self) -> Result<T, Stop> {
        let root = loop {
            match self.next()? {
                Event::StreamStart | Event::DocumentStart(..) => {}
                root => break root,
            }
        };
        let value = T::deserialize(Node { event: root, reader: self })?;
        // The rest is read for its faults.
        loop {
            match self.next()? {
                Event::DocumentEnd => {}
                Event::StreamEnd => return Ok(value),
                _ => {
                    let reason = "a second document begins here without \"---\"";
                    return Err(Stop::Said(reason.to_owned()));
                }
            }
        }
    }

    fn next(&mut self) -> Result<Event<'de>, Stop> {
        match self.parser.next_event() {
            Some(Ok((event, span))) => {
                self.line = span.start.line();
                self.column = span.start.col() + 1;
                Ok(event)
            }
            Some(Err(error)) => Err(Stop::Syntax(Error {
                line: error.marker().line(),
                column: error.marker().col() + 1,
                reason: error.info(),
            })),
            None => Ok(Event::StreamEnd),
        }
    }

    /// Passes over the rest of the node that an event begins.
    fn skip(&mut self, first: &Event<'de>) -> Result<(), Stop> {
        let mut open = usize::from(opens(first));
        while open > 0 {
            match self.next()? {
                Event::MappingEnd | Event::SequenceEnd => open -= 1,
                event => open += usize::from(opens(&event)),
            }
        }
        Ok(())
    }
}

fn opens(event: &Event<'_>) -> bool {
    matches!(event, Event::MappingStart(..) | Event::SequenceStart(..))
}

impl serde::de::Error for Stop {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Said(message.to_string())
    }
}

impl std::error::Error for Stop {}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Syntax(error) => f.write_str(&error.reason),
            Self::Said(reason) => f.write_str(reason),
            Self::Beyond => f.write_str("aliases, merge keys or tags"),
        }
    }
}

/// A value of which the first event has been taken.
struct Node<'r, 'de> {
    event: Event<'de>,
    reader: &'r mut Reader<'de>,
}

impl<'de> Deserializer<'de> for Node<'_, 'de> {
    type Error = Stop;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        match self.event {
            Event::Scalar(text, ScalarStyle::Plain, _, None) => visit_plain(text, visitor),
            Event::Scalar(text, _, _, None) => visit_text(text, visitor),
            Event::MappingStart(_, _, None) => visitor.visit_map(Mapping(self.reader)),
            Event::SequenceStart(_, _, None) => visitor.visit_seq(Sequence(self.reader)),
            // An empty stream or document holds null.
            Event::DocumentEnd | Event::StreamEnd => visitor.visit_unit(),
            _ => Err(Stop::Beyond),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        match &self.event {
            Event::Scalar(text, ScalarStyle::Plain, _, None) if is_null(text) => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        self.reader.skip(&self.event)?;
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier
    }
}

fn visit_text<'de, V: Visitor<'de>>(text: Cow<'de, str>, visitor: V) -> Result<V::Value, Stop> {
    match text {
        Cow::Borrowed(text) => visitor.visit_borrowed_str(text),
        Cow::Owned(text) => visitor.visit_string(text),
    }
}

/// A scalar without quotes is what it looks like, to Kubernetes too.
fn visit_plain<'de, V: Visitor<'de>>(text: Cow<'de, str>, visitor: V) -> Result<V::Value, Stop> {
    if is_null(&text) {
        return visitor.visit_unit();
    }
    let is_one_of = |words: [&str; 4]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    if is_one_of(["true", "yes", "on", "y"]) {
        return visitor.visit_bool(true);
    }
    if is_one_of(["false", "no", "off", "n"]) {
        return visitor.visit_bool(false);
    }
    // No name begins with a sign or a dot, so other numbers need not be known from names.
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        let radix = match text.as_bytes().get(1) {
            Some(b'x') => 16,
            Some(b'o') => 8,
            Some(b'b') => 2,
            _ => 10,
        };
        let digits = if radix == 10 { &*text } else { &text[2..] };
        if let Ok(number) = u64::from_str_radix(digits, radix) {
            return visitor.visit_u64(number);
        }
        if let Ok(number) = text.parse() {
            return visitor.visit_f64(number);
        }
    }
    visit_text(text, visitor)
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

struct Mapping<'r, 'de>(&'r mut Reader<'de>);

impl<'de> MapAccess<'de> for Mapping<'_, 'de> {
    type Error = Stop;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Stop> {
        loop {
            match self.0.next()? {
                Event::MappingEnd => return Ok(None),
                Event::Scalar(key, style, _, None) if style != ScalarStyle::Plain || key != "<<" => {
                    return seed.deserialize(CowStrDeserializer::new(key)).map(Some);
                }
                // A mapping or sequence for a key is none that is asked for.
                key if opens(&key) => {
                    self.0.skip(&key)?;
                    let value = self.0.next()?;
                    self.0.skip(&value)?;
                }
                _ => return Err(Stop::Beyond),
            }
        }
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Stop> {
        seed.deserialize(Node { event: self.0.next()?, reader: self.0 })
    }
}

struct Sequence<'r, 'de>(&'r mut Reader<'de>);

impl<'de> SeqAccess<'de> for Sequence<'_, 'de> {
    type Error = Stop;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Stop> {
        match self.0.next()? {
            Event::SequenceEnd => Ok(None),
            event => seed.deserialize(Node { event, reader: self.0 }).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[derive(Debug, PartialEq, Eq, serde::Deserialize)]
    struct Asked {
        a: Option<String>,
        #[serde(default)]
        list: Vec<BTreeMap<String, String>>,
    }

    fn asked(text: &str) -> Result<Asked, Stop> {
        Reader::new(text).document()
    }

    #[test]
    fn what_is_not_asked_for_is_passed_over_without_the_slow_way() {
        for rest in [
            "",
            "odd: &x [1, {a: !t y}, z]\n",
            "x: &x 1\ny: *x\n",
            "? {a: b}\n: {a: c}\n? [1]\n: 2\n",
            "x: {<<: {a: b}}\n",
            "x: !Custom {a: b}\n",
        ] {
            let found = asked(&format!("{rest}a: b\nlist: [{{c: d}}]\n")).unwrap();
            assert_eq!(found.a.as_deref(), Some("b"), "{rest}");
            assert_eq!(found.list[0]["c"], "d");
        }
    }

    #[test]
    fn aliases_merge_keys_and_tags_take_the_slow_way_to_the_same_end() {
        for text in [
            "x: &x b\na: *x\n",
            "x: &x {a: b}\n<<: *x\n",
            "a: !!str b\n",
            "!!str a: b\n",
            "x: &x a\n*x : b\n",
        ] {
            assert!(matches!(asked(text), Err(Stop::Beyond)), "{text}");
            assert_eq!(read::<Asked>(text).unwrap().a.as_deref(), Some("b"), "{text}");
        }
    }

    #[test]
    fn both_ways_tell_the_place() {
        for text in ["x: 1\na: b\na: c\n", "x: &x 1\na: *x\nb: }\n", "x: 1\na: }\n", "x: 1\na: *none\n"] {
            let error = read::<Asked>(text).unwrap_err();
            assert!((2..=3).contains(&error.line) && error.column > 0, "{text}: {error:?}");
        }
    }
}
