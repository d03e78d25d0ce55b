//! Mica: a certificate authority for workload mTLS identity.
//!
//! The rooms, lowest rank first; `tests/layering.rs` keeps the direction.

pub mod admin;
pub mod agent;
pub mod app;
pub mod attest;
pub mod auth;
pub mod authority;
pub mod client;
pub mod cluster;
pub mod config;
pub mod core;
pub mod endpoint;
pub mod federation;
pub mod proto;
pub mod reconcile;
pub mod serve;
pub mod sink;
pub mod source;
pub mod store;
pub mod sys;
pub mod telemetry;
pub mod tool;
pub mod trace;
