//! From what was typed to a running authority.

use std::path::{Path, PathBuf};

use super::{Error, bundle_from, name_of, read};
use crate::client::{Address, Client, Credential, Target};
use crate::config::cli::Connect;
use crate::core::inspect::one_line;
use crate::sys::files;

const ADDRESSES: &str = "addresses.json";
const ROOTS: &str = "root-cert.pem";

/// Where the authority is, what it has to show, and who asks; and what the trust bundle's file is called.
pub(super) fn target(arguments: &Connect) -> Result<(Target, String), Error> {
    let Connect { address, roots, data_dir, name, token_file, certificate } = arguments;
    let (address, roots) = match (data_dir, roots) {
        (Some(data), _) => (published(data)?, data.join(ROOTS)),
        (None, Some(roots)) => (address.parse()?, roots.clone()),
        // clap asks for one of the two.
        (None, None) => {
            return Err(Error::Usage("give the authority's trust bundle with --roots".to_owned()));
        }
    };
    let bundle = bundle_from(&roots, &read(&roots)?, None)?;
    let credential = match (token_file, certificate) {
        (Some(file), _) => Credential::Token(file.clone()),
        (None, Some(folder)) => Credential::Certificate(folder.clone()),
        (None, None) => Credential::None,
    };
    Ok((Target { address, roots: bundle, name: name.clone(), credential }, name_of(&roots)))
}

/// Does with a connection what has to be done, on this thread.
pub(super) fn with<T>(
    target: Target,
    work: impl AsyncFnOnce(Client) -> Result<T, crate::client::Error>,
) -> Result<T, Error> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    Ok(runtime.block_on(async { work(Client::connect(target).await?).await })?)
}

/// Where the Mica that holds a data folder listens.
fn published(data: &Path) -> Result<Address, Error> {
    let path: PathBuf = data.join(ADDRESSES);
    let text = match files::read(&path, 4096) {
        Err(files::Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::Usage(format!(
                "no mica serves {}: it holds no {ADDRESSES}; start one with `mica serve DIR --data-dir {0}`, or give --address and --roots",
                name_of(data)
            )));
        }
        other => other?,
    };
    let address = serde_json::from_slice::<serde_json::Value>(&text)
        .ok()
        .and_then(|value| value.get("grpc")?.as_str().map(str::to_owned))
        .ok_or_else(|| {
            Error::Usage(format!(
                "{} does not say where gRPC is served; give --address and --roots",
                one_line(&path.display().to_string())
            ))
        })?;
    Ok(address.parse::<Address>()?.reachable())
}
