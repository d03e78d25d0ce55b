//! Everything that needs more than one room, the built program, or a foreign one. One binary, so it links once.

// A test asks the machine directly; what must not is src/.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)]

mod agent;
mod bookinfo;
mod cli;
mod cluster;
mod conformance;
mod csr_api;
mod docs;
mod envoy;
mod fixtures;
mod go_spiffe;
mod hostile;
mod mica;
mod openssl;
mod parts;
mod sds;
mod serve;
mod tool;
mod tracing;
