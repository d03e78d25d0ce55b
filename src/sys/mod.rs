//! What Mica asks the operating system for. No other room opens a file.

pub mod dir;
