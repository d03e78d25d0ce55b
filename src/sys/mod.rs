//! The only room that asks the operating system directly: for time, randomness, files and events.
#![expect(clippy::disallowed_methods, reason = "this room is where the banned calls are meant to be")]

pub mod clock;
pub mod dir;
pub mod fetch;
pub mod files;
pub mod keys;
pub mod listen;
pub mod tree;
pub mod watch;

/// What this machine calls itself; in a pod, the pod's name.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Why the system refused, as the middle of a sentence: "no such file or directory".
pub(crate) fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error ").next().unwrap_or_default();
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}
