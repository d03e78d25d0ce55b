//! Where Mica listens, for programs: a file that is there only while it does.

use std::net::SocketAddr;

use crate::sys::dir::{Access, Dir, Error};

const FILE: &str = "addresses.json";

/// The addresses that were bound.
pub(super) struct Addresses {
    /// None where there are no gRPC services.
    pub(super) grpc: Option<SocketAddr>,
    pub(super) http: SocketAddr,
    /// None where no API server asks about pods.
    pub(super) inject: Option<SocketAddr>,
    /// None where there is no bundle endpoint.
    pub(super) bundle: Option<SocketAddr>,
}

impl Addresses {
    /// Writes them into the data folder, whose lock the caller holds.
    pub(super) fn publish(&self, data: &Dir) -> Result<(), Error> {
        let mut text = serde_json::json!({"http": self.http.to_string()});
        if let Some(grpc) = self.grpc {
            text["grpc"] = grpc.to_string().into();
        }
        if let Some(inject) = self.inject {
            text["inject"] = inject.to_string().into();
        }
        if let Some(bundle) = self.bundle {
            text["bundle"] = bundle.to_string().into();
        }
        data.replace(FILE, format!("{text}\n").as_bytes(), Access::mode(0o644))
    }

    /// Takes them back; those of a Mica that was killed, too.
    pub(super) fn withdraw(data: &Dir) -> Result<(), Error> {
        match data.unlink(FILE) {
            Err(e) if !e.is_absent() => Err(e),
            _ => Ok(()),
        }
    }
}
