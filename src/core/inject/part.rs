//! What is put into a pod, in the order in which people write it.

use serde_json::{Map, Value};

/// A value that is put in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Text.
    Text(String),
    /// A whole number.
    Number(u64),
    /// Yes or no.
    Flag(bool),
    /// Fields.
    Map(Vec<(&'static str, Part)>),
    /// Items.
    List(Vec<Part>),
}

impl Part {
    /// Text.
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// As JSON has it.
    pub fn json(&self) -> Value {
        match self {
            Self::Text(text) => Value::from(text.as_str()),
            Self::Number(number) => Value::from(*number),
            Self::Flag(flag) => Value::from(*flag),
            Self::Map(fields) => Value::Object(
                fields.iter().map(|(name, value)| ((*name).to_owned(), value.json())).collect::<Map<_, _>>(),
            ),
            Self::List(items) => Value::Array(items.iter().map(Self::json).collect()),
        }
    }

    /// Lines of block YAML, without an indentation of their own.
    pub(super) fn block(&self) -> Vec<String> {
        match self {
            Self::Map(fields) if !fields.is_empty() => {
                fields.iter().flat_map(|(name, value)| field(name, value, 0)).collect()
            }
            Self::List(items) if !items.is_empty() => items.iter().flat_map(item).collect(),
            other => vec![other.flow(false)],
        }
    }

    /// On one line: as JSON, or as YAML with quotes only where they are needed.
    pub(super) fn flow(&self, quoted: bool) -> String {
        let name_of = |name: &str| if quoted { format!("\"{name}\"") } else { name.to_owned() };
        match self {
            Self::Text(text) if !quoted && is_plain(text) => text.clone(),
            Self::Text(text) => Value::from(text.as_str()).to_string(),
            Self::Number(number) => number.to_string(),
            Self::Flag(flag) => flag.to_string(),
            Self::Map(fields) => {
                let fields: Vec<_> = fields
                    .iter()
                    .map(|(name, value)| format!("{}: {}", name_of(name), value.flow(quoted)))
                    .collect();
                format!("{{{}}}", fields.join(", "))
            }
            Self::List(items) => {
                let items: Vec<_> = items.iter().map(|item| item.flow(quoted)).collect();
                format!("[{}]", items.join(", "))
            }
        }
    }

    /// As JSON over several lines, each but the first behind `margin`, a level deeper for each `unit`.
    pub(super) fn pretty(&self, margin: &str, unit: &str) -> String {
        let inner = format!("{margin}{unit}");
        match self {
            Self::Map(fields) if !fields.is_empty() => {
                let fields: Vec<_> = fields
                    .iter()
                    .map(|(name, value)| format!("{inner}\"{name}\": {}", value.pretty(&inner, unit)))
                    .collect();
                format!("{{\n{}\n{margin}}}", fields.join(",\n"))
            }
            Self::List(items) if !items.is_empty() => {
                let items: Vec<_> =
                    items.iter().map(|item| format!("{inner}{}", item.pretty(&inner, unit))).collect();
                format!("[\n{}\n{margin}]", items.join(",\n"))
            }
            other => other.flow(true),
        }
    }
}

/// A field of a block mapping. The items of its list stand `dash` columns to the right of its name.
pub(super) fn field(name: &str, value: &Part, dash: usize) -> Vec<String> {
    let (lines, margin) = match value {
        Part::Map(fields) if !fields.is_empty() => (value.block(), 2),
        Part::List(items) if !items.is_empty() => (value.block(), dash),
        other => return vec![format!("{name}: {}", other.flow(false))],
    };
    let mut all = vec![format!("{name}:")];
    all.extend(lines.into_iter().map(|line| format!("{:margin$}{line}", "")));
    all
}

/// An item of a block sequence.
pub(super) fn item(value: &Part) -> Vec<String> {
    let lines = value.block().into_iter();
    lines
        .enumerate()
        .map(|(number, line)| format!("{}{line}", if number == 0 { "- " } else { "  " }))
        .collect()
}

/// Whether a text means itself without quotes, also to those who read YAML 1.1, and within braces.
fn is_plain(text: &str) -> bool {
    let bytes = text.as_bytes();
    let begins = matches!(bytes, [b'a'..=b'z' | b'A'..=b'Z' | b'/', ..] | [b'-', b'-', b'a'..=b'z', ..]);
    let sound = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-=@:".contains(byte);
    const WORDS: [&str; 9] = ["true", "false", "yes", "no", "on", "off", "y", "n", "null"];
    begins
        && bytes.iter().all(sound)
        && !text.ends_with(':')
        && !WORDS.iter().any(|word| text.eq_ignore_ascii_case(word))
}
