//! The wiring: which source, sink and store a running Mica has, and which tasks.

mod addresses;
pub mod agent;
mod report;
pub mod serve;
mod subjects;
mod tokens;
