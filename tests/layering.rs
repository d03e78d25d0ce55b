//! Which room may import which, read from the sources. There is no list of exceptions: a file that does not fit its
//! row is moved, or takes what it needs as an argument from `app`, or the row is changed with a reason.
//!
//! Needs nothing but the standard library, so that it also runs alone in a second: `tests/run layering`.

// It reads the sources, and is not one of them.
#![allow(clippy::disallowed_methods)]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

struct Room {
    name: &'static str,
    rank: u8,
    /// `core`: all of it. `store::`: what stands in its `mod.rs`, that is the trait, and no implementation.
    /// `store::dir`: that file, and what stands in `mod.rs`.
    may: &'static [&'static str],
}

#[rustfmt::skip]
const ROOMS: &[Room] = &[
    Room { name: "core",      rank: 0, may: &[] },
    Room { name: "proto",     rank: 0, may: &[] },
    Room { name: "sys",       rank: 1, may: &["core"] },
    Room { name: "telemetry", rank: 1, may: &[] },
    // Spans, and what sends them.
    Room { name: "trace",     rank: 2, may: &["core", "proto", "sys"] },
    Room { name: "store",     rank: 3, may: &["core", "sys"] },
    Room { name: "source",    rank: 3, may: &["core", "sys"] },
    Room { name: "sink",      rank: 3, may: &["core", "sys"] },
    Room { name: "authority", rank: 4, may: &["core", "sys", "telemetry", "store::"] },
    Room { name: "reconcile", rank: 5, may: &["core", "sys", "telemetry", "authority", "source::", "sink::"] },
    Room { name: "auth",      rank: 5, may: &["core", "sys", "telemetry", "authority"] },
    // Implements the traits of others on an API server.
    Room { name: "cluster",   rank: 6, may: &["core", "sys", "telemetry", "attest::", "auth::", "source::", "sink::", "store::"] },
    Room { name: "serve",     rank: 6, may: &["core", "sys", "telemetry", "trace::", "proto", "authority", "auth"] },
    // Bundles of this and of other trust domains, over HTTPS.
    Room { name: "federation", rank: 6, may: &["core", "sys", "authority"] },
    Room { name: "admin",     rank: 6, may: &["core", "sys", "telemetry"] },
    // The client's side of the CSR API: what the commands that ask a running Mica share.
    Room { name: "client",    rank: 6, may: &["core", "sys", "proto"] },
    // Who is at the other end of the agent's socket.
    Room { name: "attest",    rank: 5, may: &["core", "sys", "telemetry"] },
    // Keeps what workloads have, and asks the authority for it.
    Room { name: "agent",     rank: 7, may: &["core", "sys", "telemetry", "trace::", "proto", "client", "sink"] },
    // The agent's socket. Health is asked for there, and requests are let in, as at the authority's port.
    Room { name: "endpoint",  rank: 8, may: &["core", "sys", "telemetry", "trace::", "proto", "attest::", "client::", "agent", "serve::gate", "serve::health"] },
    Room { name: "config",    rank: 7, may: &["core", "sys", "telemetry", "trace::", "store::", "source::", "sink::", "authority::", "reconcile::", "serve::", "admin::"] },
    // As app is for the running programs: each command takes what was typed.
    Room { name: "tool",      rank: 9, may: &["core", "sys", "client", "auth", "config"] },
    Room { name: "app",       rank: 9, may: &["core", "proto", "sys", "telemetry", "trace", "store", "source", "sink", "authority", "auth", "cluster", "reconcile", "serve", "federation", "admin", "client", "attest", "agent", "endpoint", "config"] },
    // Of core, how to keep a line one line.
    Room { name: "main",      rank: 10, may: &["core::inspect", "telemetry", "tool", "config", "app"] },
    // lib.rs lists the rooms and does nothing else.
    Room { name: "lib",       rank: 10, may: &[] },
];

/// Words that have no place in `core`, with the one file that may use them.
#[rustfmt::skip]
const IMPURE: &[(&str, Option<&str>)] = &[
    ("async", None), ("await", None), ("tokio", None), ("tracing", None),
    ("std::env", None), ("std::fs", None), ("std::net", None), ("std::process", None), ("std::thread", None),
    ("SystemTime", None), ("Instant", None), ("now_utc", None), ("now_local", None),
    // ring draws the nonce of each ECDSA signature itself and insists on being handed this.
    ("SystemRandom", Some("key.rs")),
];

#[test]
fn rooms_import_only_what_their_row_allows() {
    let faults: Vec<String> = sources().iter().flat_map(misplaced_imports).collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn core_decides_and_does_nothing() {
    let faults: Vec<String> = sources().iter().flat_map(impure_words).collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn every_row_points_downwards() {
    for room in ROOMS {
        for entry in room.may {
            let target = entry.split("::").next().unwrap_or(entry);
            let below = rank(target).unwrap_or_else(|| panic!("{}: no room {target}", room.name));
            assert!(below < room.rank, "{} may not have {entry}", room.name);
        }
    }
}

/// A reader that finds nothing would keep the tests above green for ever.
#[test]
fn the_reader_catches_what_it_is_for() {
    let caught = |path: &str, text: &str| {
        let source = Source::new(path, text, &["store/dir.rs", "store/mod.rs"]);
        let mut all = misplaced_imports(&source);
        all.extend(impure_words(&source));
        all
    };
    for (path, text, wanted) in [
        ("core/a.rs", "\nuse crate::store::Store;", "src/core/a.rs:2"),
        ("store/dir.rs", "use crate::sink::Sink;", "crate::sink::Sink"),
        ("source/mod.rs", "use crate::{core::plan, sink};", "crate::sink"),
        ("sys/mod.rs", "use crate::{\n  core::{a, b as c},\n  app::{self, x},\n};", "src/sys/mod.rs:3"),
        ("serve/mod.rs", "fn f() { crate::admin::page() }", "crate::admin::page"),
        ("authority/mod.rs", "use crate::store::dir::Dir;", "crate::store::dir"),
        ("sink/folder.rs", "use super::super::source;", "source"),
        ("telemetry.rs", "use super::app;", "app"),
        ("main.rs", "use mica::store;", "crate::store"),
        ("core/a.rs", "use crate::Nothing;", "crate::Nothing"),
        ("attic/mod.rs", "", "attic"),
        ("core/a.rs", "use std::{fmt, fs};", "std::fs"),
        ("core/a.rs", "let t = std::time::SystemTime::now();", "SystemTime"),
        ("core/a.rs", "async fn f() {}", "async"),
        ("core/mint.rs", "use ring::rand::SystemRandom;", "SystemRandom"),
        ("core/a.rs", "tracing::info!(\"\")", "tracing"),
    ] {
        let faults = caught(path, text);
        assert!(faults.iter().any(|fault| fault.contains(wanted)), "{path}: {text:?} gave {faults:?}");
    }
    for (path, text) in [
        ("core/a.rs", "use crate::core::key; // crate::app"),
        ("core/a.rs", "/// [`crate::app`], tokio\nconst A: &str = \"crate::app std::fs\";"),
        ("core/a.rs", "#[cfg(test)]\nmod tests { use crate::app; fn f() { std::fs::read(\"}\") } }"),
        ("core/a.rs", "fn f<'a>(c: char) -> &'a str { if c == '\"' { \"\" } else { r#\"\" tokio\"# } }"),
        ("core/key.rs", "use ring::rand::SystemRandom;"),
        ("authority/mod.rs", "use crate::store::{self, Store, open};\nuse crate::core::spiffe;"),
        ("tool/sign.rs", "use crate::config::cli::Sign;"),
        ("store/dir.rs", "use super::Store;"),
        ("core/a.rs", "use std::{fmt, sync::Arc};"),
    ] {
        assert_eq!(caught(path, text), Vec::<String>::new(), "{path}: {text:?}");
    }
}

struct Source {
    /// Below `src/`.
    path: String,
    /// Without comments, texts and tests, line for line.
    code: String,
    /// All sources, to tell a room's files from its items.
    files: Vec<String>,
}

impl Source {
    fn new(path: &str, text: &str, files: &[impl AsRef<str>]) -> Self {
        Self {
            path: path.to_owned(),
            code: without_tests(&without_comments_and_texts(text)),
            files: files.iter().map(|file| file.as_ref().to_owned()).collect(),
        }
    }

    /// `store/dir.rs` gives `["store", "dir"]`, `store/mod.rs` gives `["store"]`.
    fn module(&self) -> Vec<&str> {
        self.path.trim_end_matches(".rs").split('/').filter(|part| *part != "mod").collect()
    }

    fn room(&self) -> &str {
        self.module()[0]
    }

    fn is_file_of(&self, room: &str, name: &str) -> bool {
        let [file, folder] = [format!("{room}/{name}.rs"), format!("{room}/{name}/")];
        self.files.iter().any(|known| *known == file || known.starts_with(&folder))
    }

    fn at(&self, offset: usize) -> String {
        let line = self.code[..offset].matches('\n').count() + 1;
        format!("src/{}:{line}", self.path)
    }
}

fn misplaced_imports(source: &Source) -> Vec<String> {
    let name = source.room();
    let Some(room) = ROOMS.iter().find(|room| room.name == name) else {
        return vec![format!(
            "src/{}: {name} has no row in ROOMS of tests/layering.rs; give it a rank and say what it may import",
            source.path
        )];
    };
    let mut faults = Vec::new();
    for (offset, path) in crate_paths(source) {
        let target = path[0].as_str();
        let file = path.get(1).filter(|file| source.is_file_of(target, file.as_str()));
        let allowed = target == name
            || room.may.iter().any(|entry| match entry.split_once("::") {
                None => *entry == target,
                Some((head, only)) => head == target && file.is_none_or(|file| file.as_str() == only),
            });
        if allowed {
            continue;
        }
        let mut fault = format!("{}: crate::{}: ", source.at(offset), path.join("::"));
        let _ = match rank(target) {
            None => write!(fault, "{target} is no room; what rooms share belongs to one of a lower rank"),
            Some(below) if below >= room.rank => write!(
                fault,
                "{name} (rank {}) may not import {target} (rank {below}); move what both need to a lower room, or let app hand it in",
                room.rank
            ),
            Some(_) if file.is_some() && room.may.contains(&format!("{target}::").as_str()) => {
                write!(
                    fault,
                    "{name} may not name an implementation of {target}; take it as {target}'s trait from app"
                )
            }
            Some(_) => write!(
                fault,
                "{target} is not in the row of {name}; let app hand it in as a value, a trait or a closure"
            ),
        };
        faults.push(fault);
    }
    faults
}

fn impure_words(source: &Source) -> Vec<String> {
    if source.room() != "core" {
        return Vec::new();
    }
    let mut faults = Vec::new();
    for (offset, word) in words(&source.code) {
        // `use std::{fmt, fs}` has to be read as `std::fmt` and `std::fs`.
        let mut names = vec![word.to_owned()];
        if word == "std" {
            names = paths_at(&source.code, offset)
                .into_iter()
                .filter_map(|(_, path)| path.get(1).map(|next| format!("std::{next}")))
                .collect();
        }
        for name in names {
            let Some((banned, exempt)) = IMPURE.iter().find(|(banned, _)| *banned == name) else {
                continue;
            };
            if exempt.is_some_and(|file| source.path == format!("core/{file}")) {
                continue;
            }
            let advice = match (*banned, exempt) {
                ("std::net", _) => "addresses as values are in ::core::net".to_owned(),
                (_, Some(file)) => format!("only core/{file} may hold it"),
                _ => "take the time, the number or the bytes as an argument; sys asks the machine".to_owned(),
            };
            faults.push(format!("{}: {banned}: core is pure; {advice}", source.at(offset)));
        }
    }
    faults
}

/// Every path from the crate's root, without the root: `["store", "dir", "Dir"]`.
fn crate_paths(source: &Source) -> Vec<(usize, Vec<String>)> {
    let depth = source.module().len();
    let roots: &[&str] = match source.room() {
        "main" => &["mica"],
        _ => &["crate", "super"],
    };
    let mut found = Vec::new();
    for (offset, word) in words(&source.code) {
        let before = source.code[..offset].trim_end();
        if !roots.contains(&word) || before.ends_with("::") || before.ends_with('.') {
            continue;
        }
        for (at, path) in paths_at(&source.code, offset) {
            let ups = path.iter().take_while(|part| *part == "super").count();
            let rest = match word {
                "super" if ups == depth => &path[ups..],
                "super" => continue,
                _ => &path[1..],
            };
            if let Some(first) = rest.first()
                && !matches!(first.as_str(), "self" | "*")
            {
                found.push((at, rest.to_vec()));
            }
        }
    }
    found
}

/// The paths that begin at `offset`, groups in braces multiplied out, each with the offset of its last part.
fn paths_at(code: &str, offset: usize) -> Vec<(usize, Vec<String>)> {
    fn tree(code: &str, mut at: usize, path: &[String], found: &mut Vec<(usize, Vec<String>)>) -> usize {
        let mut path = path.to_vec();
        let mut last = at;
        loop {
            at = skip_space(code, at);
            let rest = &code[at..];
            if rest.starts_with('{') {
                at += 1;
                loop {
                    at = skip_space(code, tree(code, at, &path, found));
                    match code[at..].chars().next() {
                        Some(',') => at += 1,
                        Some('}') => return at + 1,
                        _ => return at,
                    }
                }
            }
            let part: String = match rest.starts_with('*') {
                true => "*".to_owned(),
                false => rest.chars().take_while(|c| is_word(*c)).collect(),
            };
            if part.is_empty() {
                break;
            }
            last = at;
            at += part.len();
            path.push(part);
            let next = skip_space(code, at);
            if !code[next..].starts_with("::") {
                break;
            }
            at = next + 2;
        }
        if !path.is_empty() {
            found.push((last, path));
        }
        let renamed = skip_space(code, at);
        if let Some(rest) = code[renamed..].strip_prefix("as ") {
            let name = rest.chars().take_while(|c| is_word(*c)).count();
            return renamed + "as ".len() + name;
        }
        at
    }
    let mut found = Vec::new();
    tree(code, offset, &[], &mut found);
    found
}

fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.split(|c: char| !is_word(c))
        .filter(|word| !word.is_empty())
        .map(|word| (word.as_ptr() as usize - code.as_ptr() as usize, word))
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn skip_space(code: &str, at: usize) -> usize {
    at + (code[at..].len() - code[at..].trim_start().len())
}

/// Blanks out, byte for byte, what the compiler does not read as code.
fn without_comments_and_texts(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let raw = rest[0] == b'r' && (at == 0 || !is_word(char::from(bytes[at - 1])));
        let hashes = rest.iter().skip(1).take_while(|b| **b == b'#').count();
        let length = if rest.starts_with(b"//") {
            find(rest, b"\n").unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            let mut depth = 0;
            let mut end = 0;
            while end < rest.len() {
                match &rest[end..] {
                    [b'/', b'*', ..] => (depth, end) = (depth + 1, end + 2),
                    [b'*', b'/', ..] => (depth, end) = (depth - 1, end + 2),
                    _ => end += 1,
                }
                if depth == 0 {
                    break;
                }
            }
            end
        } else if raw && rest.get(1 + hashes) == Some(&b'"') {
            let closing = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
            let body = 2 + hashes;
            find(&rest[body..], &closing).map_or(rest.len(), |end| body + end + closing.len())
        } else if rest[0] == b'"' {
            let mut end = 1;
            while end < rest.len() && rest[end] != b'"' {
                end += if rest[end] == b'\\' { 2 } else { 1 };
            }
            (end + 1).min(rest.len())
        } else if rest[0] == b'\'' {
            // A character, or a lifetime: 'a' or 'a.
            match rest {
                [_, b'\\', ..] => find(&rest[3..], b"'").map_or(rest.len(), |end| end + 4),
                _ => {
                    let width = text[at + 1..].chars().next().map_or(1, char::len_utf8);
                    if rest.get(1 + width) == Some(&b'\'') { width + 2 } else { 0 }
                }
            }
        } else {
            0
        };
        blank(&mut code[at..at + length]);
        at += length.max(1);
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// Blanks out each item under `#[cfg(test)]`.
fn without_tests(text: &str) -> String {
    const MARK: &[u8] = b"#[cfg(test)]";
    let mut code = text.as_bytes().to_vec();
    let mut at = 0;
    while let Some(found) = find(&code[at..], MARK) {
        let start = at + found;
        let mut depth = 0;
        let mut end = start + MARK.len();
        while end < code.len() {
            match code[end] {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            end += 1;
            if depth == 0 && matches!(code[end - 1], b'}' | b';') {
                break;
            }
        }
        blank(&mut code[start..end]);
        at = end;
    }
    String::from_utf8_lossy(&code).into_owned()
}

fn blank(bytes: &mut [u8]) {
    for byte in bytes.iter_mut().filter(|byte| **byte != b'\n') {
        *byte = b' ';
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

fn rank(room: &str) -> Option<u8> {
    ROOMS.iter().find(|row| row.name == room).map(|row| row.rank)
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    let names: Vec<String> = files
        .iter()
        .map(|file| file.strip_prefix(&root).unwrap_or(file).to_string_lossy().into_owned())
        .collect();
    assert!(names.iter().any(|name| name.starts_with("core/")), "found no sources below {}", root.display());
    names
        .iter()
        .zip(&files)
        // `mod tests;` under #[cfg(test)] has a file of its own.
        .filter(|(name, _)| !name.ends_with("/tests.rs"))
        .map(|(name, file)| {
            let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{name}: {error}"));
            Source::new(name, &text, &names)
        })
        .collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries {
        let path = entry.unwrap_or_else(|error| panic!("{}: {error}", folder.display())).path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
