//! Mica: a certificate authority for workload mTLS identity.
//!
//! The rooms, lowest rank first; `tests/layering.rs` keeps the direction.

pub mod core;
pub mod source;
pub mod sys;
