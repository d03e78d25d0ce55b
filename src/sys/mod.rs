//! The only room that asks the operating system directly: for time, randomness, files and events.
#![expect(clippy::disallowed_methods, reason = "this room is where the banned calls are meant to be")]

pub mod clock;
pub mod dir;
pub mod fetch;
pub mod files;
pub mod keys;
pub mod listen;
pub mod peer;
pub mod post;
pub mod process;
pub mod socket;
pub mod tree;
pub mod watch;

/// Why the system refused, as the middle of a sentence: "no such file or directory".
pub(crate) fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error ").next().unwrap_or_default();
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

/// The name of this machine, which is that of the pod in one; empty if it has none that can be read.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}
