//! Files that people write: YAML, read strictly, and faults with the line that they are in. What such a file does not say
//! is decided by what it says elsewhere, so that nothing in it may be passed over.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_saphyr::{Error as Fault, Spanned};

/// Why a file is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// Counted from 1; none where the fault is not in one place of the file.
    pub line: Option<usize>,
    /// What is wrong, and what to do.
    pub reason: String,
}

impl Error {
    pub(super) fn at<T>(place: &Spanned<T>, reason: impl ToString) -> Self {
        Self { line: Some(line(place)), reason: reason.to_string() }
    }

    pub(super) fn whole(reason: impl Into<String>) -> Self {
        Self { line: None, reason: reason.into() }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.reason),
            None => f.write_str(&self.reason),
        }
    }
}

impl std::error::Error for Error {}

/// Where a value stands.
pub(super) fn line<T>(place: &Spanned<T>) -> usize {
    usize::try_from(place.referenced.line()).unwrap_or(0)
}

/// A key without a value says nothing, which is never what was meant.
pub(super) fn said<'de, D: Deserializer<'de>, T: Deserialize<'de>>(value: D) -> Result<Option<T>, D::Error> {
    T::deserialize(value).map(Some)
}

/// Reads a file of at most so many bytes: `what` it is, and what one is called that says nothing.
pub(super) fn read<T: DeserializeOwned>(
    text: &[u8],
    most: usize,
    what: &str,
    nothing: &str,
) -> Result<T, Error> {
    if text.len() > most {
        return Err(Error::whole(format!("the {what} of {} bytes is longer than {most}", text.len())));
    }
    let text = std::str::from_utf8(text).map_err(|fault| {
        let lines = text[..fault.valid_up_to()].iter().filter(|b| **b == b'\n').count();
        Error { line: Some(lines + 1), reason: format!("the {what} is not UTF-8 text") }
    })?;
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 16,
            max_documents: 1,
            max_aliases: 1_000,
            max_anchors: 1_000,
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 20_000,
            max_replay_stack_depth: 4,
        },
        emit_comments: false,
        with_snippet: false,
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        merge_keys: serde_saphyr::options::MergeKeyPolicy::Error,
        strict_booleans: true,
        reject_unsupported_tags: true,
    };
    // A file that was cut short to nothing must not say anything.
    let read: Option<T> = serde_saphyr::from_str_with_options(text, options).map_err(explained)?;
    read.ok_or_else(|| Error::whole(format!("the {what} is empty; write {{}} for one {nothing}")))
}

fn explained(fault: Fault) -> Error {
    let line = fault.location().and_then(|at| usize::try_from(at.line()).ok()).filter(|line| *line > 0);
    let advice = match fault.without_snippet() {
        Fault::UnknownAnchor { .. } => "; a pattern that begins with * has to stand in quotes",
        Fault::MergeKeyNotAllowed { .. } => "; repeat the values instead",
        _ => "",
    };
    let text = fault.without_snippet().to_string();
    // The line is said once.
    let text = match text.rsplit_once(" at line ") {
        Some((head, tail)) if tail.bytes().all(|b| b.is_ascii_digit() || b", column".contains(&b)) => head,
        _ => text.as_str(),
    };
    Error { line, reason: format!("{text}{advice}") }
}
