//! Federation (SPIFFE_Federation.md): this trust domain's bundle for others to fetch, and theirs fetched.

mod certificate;
mod endpoint;
mod fetch;

pub use certificate::{Certificate, Files};
pub use endpoint::{Endpoint, Metrics, serve};
pub use fetch::{Fetched, Fetcher};
