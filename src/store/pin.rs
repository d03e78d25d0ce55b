//! The roots that a data folder has known. They are remembered in the authority's folder and published beside it; what
//! was delivered below them tells that there were some, even when both are gone.

use crate::core::bundle::TrustBundle;
use crate::sys::dir::{Access, Dir};

use super::{Error, FOLDER, MAX_FILE, ROOTS};

/// Files that only an authority makes: any of them shows that there was one.
const EVIDENCE: [&str; 2] = [ROOTS, "delivered"];

/// The authority's folder, if it is there; an error if it is gone.
pub(super) fn folder(data: &Dir) -> Result<Option<Dir>, Error> {
    if data.find(FOLDER)?.is_some() {
        return Ok(Some(data.subdir(FOLDER)?));
    }
    for name in EVIDENCE {
        if data.find(name)?.is_some() {
            return Err(Error::Lost {
                data: data.path().to_owned(),
                folder: data.path().join(FOLDER),
                evidence: data.path().join(name),
            });
        }
    }
    Ok(None)
}

/// Wraps a fault of the authority's own state.
pub(super) fn state(data: &Dir, fault: impl ToString) -> Error {
    Error::State { folder: data.path().join(FOLDER), data: data.path().to_owned(), fault: fault.to_string() }
}

/// The roots remembered in the authority's folder.
pub(super) fn known(data: &Dir, folder: &Dir) -> Result<TrustBundle, Error> {
    match folder.read(ROOTS, MAX_FILE) {
        Ok((text, _)) => TrustBundle::from_pem(&text).map_err(|e| state(data, format!("{ROOTS}: {e}"))),
        Err(e) if e.is_absent() => Err(state(data, format!("{ROOTS} is missing"))),
        Err(e) => Err(e.into()),
    }
}

/// Publishes the roots as the data folder's trust bundle. One that speaks of other roots is not overwritten: either it
/// or the authority was put here by somebody.
pub(super) fn publish(data: &Dir, bundle: &TrustBundle) -> Result<(), Error> {
    if check_published(data, bundle)? {
        return Ok(());
    }
    Ok(data.replace(ROOTS, bundle.pem().as_bytes(), Access::mode(0o644))?)
}

/// Whether the roots are the published ones, byte for byte; an error if others are.
pub(super) fn check_published(data: &Dir, bundle: &TrustBundle) -> Result<bool, Error> {
    match data.read(ROOTS, MAX_FILE) {
        Ok((text, _)) if *text == *bundle.pem().as_bytes() => Ok(true),
        Ok((text, _)) => {
            if let Ok(published) = TrustBundle::from_pem(&text)
                && !published.same_roots(bundle)
            {
                let fault = format!(
                    "its root is {}, but {} holds {}",
                    fingerprints(bundle),
                    data.path().join(ROOTS).display(),
                    fingerprints(&published)
                );
                return Err(state(data, fault));
            }
            Ok(false)
        }
        Err(e) if e.is_absent() => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// How people compare roots.
pub fn fingerprints(bundle: &TrustBundle) -> String {
    let all: Vec<_> =
        bundle.roots().iter().map(|root| format!("sha256 {}", &root.fingerprint()[..16])).collect();
    all.join(", ")
}
