//! The wiring: which source, sink and store a running Mica has, and which tasks.

mod report;
pub mod serve;
