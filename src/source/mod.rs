//! Who should have an identity.

pub mod manifests;
mod yaml;
