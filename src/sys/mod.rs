//! The only room that asks the operating system directly: for time, randomness, files and events.
#![expect(clippy::disallowed_methods, reason = "this room is where the banned calls are meant to be")]

pub mod clock;
pub mod dir;
pub mod files;
pub mod keys;
pub mod tree;
pub mod watch;
