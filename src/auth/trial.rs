//! The issuer of Mica's own whose tokens are for trials: a key in the data folder while a server runs that was asked for
//! it. Whoever can read that key can be any account.

use std::path::{Path, PathBuf};

use crate::core::key::{self, PrivateKey, SigningKey};
use crate::core::pem;
use crate::core::token::trial;
use crate::sys::dir::{self, Access, Dir};
use crate::sys::keys;

/// Its folder, within the data folder.
pub const FOLDER: &str = "trial-issuer";
const KEY: &str = "key.pem";

/// Why there is no such issuer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No server has made one here.
    #[error(
        "{} is not there: no server with this data folder issues certificates for trial tokens; start one with `mica serve DIR --trial-tokens`, or name its data folder with --data-dir",
        .0.display()
    )]
    None(PathBuf),
    /// Others could have read it.
    #[error("{} has the mode {mode:04o}, so others may make tokens with it; start the server again, which makes another", path.display())]
    Exposed {
        /// Which.
        path: PathBuf,
        /// As found.
        mode: u32,
    },
    /// Not a key of Mica's.
    #[error("{}: {fault}; start the server again, which makes another", path.display())]
    Key {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        fault: key::Error,
    },
    /// A folder.
    #[error(transparent)]
    Folder(#[from] dir::Error),
    /// No key was made.
    #[error(transparent)]
    Make(#[from] keys::Error),
}

/// Makes another key and forgets the one before, whose tokens are worth nothing from then on. Gives the JWK Set.
pub fn make(data: &Dir) -> Result<String, Error> {
    let key = keys::generate(trial::KEY_KIND)?;
    let set = trial::jwks(key.public());
    data.replace_dir(FOLDER, Access::mode(0o700), |folder| {
        folder.write_new_synced(KEY, key.to_pem().as_bytes(), Access::mode(0o600))?;
        Ok::<_, Error>(())
    })?;
    Ok(set)
}

/// Takes the key away, so that nobody makes tokens which nobody takes.
pub fn withdraw(data: &Dir) -> Result<(), Error> {
    if data.find(FOLDER)?.is_none() {
        return Ok(());
    }
    let folder = data.subdir(FOLDER)?;
    if folder.find(KEY)?.is_some() {
        folder.unlink(KEY)?;
    }
    Ok(data.rmdir(FOLDER)?)
}

/// The key, for making tokens.
pub fn open(data: &Path) -> Result<SigningKey, Error> {
    let path = data.join(FOLDER);
    let absent = |fault: dir::Error| match fault.is_absent() {
        true => Error::None(path.clone()),
        false => Error::Folder(fault),
    };
    let folder = Dir::open_trusted(data, None).and_then(|data| data.subdir(FOLDER)).map_err(absent)?;
    let (text, facts) = folder.read(KEY, pem::MAX).map_err(absent)?;
    let path = path.join(KEY);
    if facts.mode() & 0o077 != 0 {
        return Err(Error::Exposed { path, mode: facts.mode() });
    }
    PrivateKey::from_pem(&zeroize::Zeroizing::new(text), None, None)
        .and_then(|key| key.signing())
        .map_err(|fault| Error::Key { path, fault })
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;
    use crate::core::key::IssuerKey as _;
    use crate::core::spiffe::ServiceAccount;
    use crate::core::token::Token;
    use crate::core::token::jwks::KeySet;

    #[test]
    fn a_token_is_good_for_the_account_until_another_key_is_made() {
        let place = tempfile::tempdir().unwrap();
        let data = Dir::open_trusted(place.path(), None).unwrap();
        assert!(matches!(open(place.path()), Err(Error::None(_))));
        let set = make(&data).unwrap();
        let now = datetime!(2026-11-23 09:00:00 UTC);
        let account = ServiceAccount::new("bookinfo", "details").unwrap();
        let lifetime = "10m".parse().unwrap();
        let made =
            |key: &SigningKey| trial::token(key, &account, "istio-ca", now, lifetime, [1; 16]).unwrap();
        let token = made(&open(place.path()).unwrap());
        let keys = KeySet::from_json(set.as_bytes()).unwrap();
        let claims = keys.verify(Token::read(&token).unwrap()).unwrap();
        assert_eq!(claims.check("istio-ca", now).unwrap(), datetime!(2026-11-23 09:10:00 UTC));
        assert_eq!(claims.service_account().unwrap().account, account);

        let first = open(place.path()).unwrap().public().clone();
        let other = KeySet::from_json(make(&data).unwrap().as_bytes()).unwrap();
        assert_ne!(*open(place.path()).unwrap().public(), first);
        assert!(other.verify(Token::read(&token).unwrap()).is_err());

        withdraw(&data).unwrap();
        withdraw(&data).unwrap();
        assert!(matches!(open(place.path()), Err(Error::None(_))));
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    #[allow(clippy::disallowed_methods)]
    fn a_key_that_others_may_read_makes_no_token() {
        use std::os::unix::fs::PermissionsExt as _;
        let place = tempfile::tempdir().unwrap();
        make(&Dir::open_trusted(place.path(), None).unwrap()).unwrap();
        let path = place.path().join(FOLDER).join(KEY);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(open(place.path()), Err(Error::Exposed { mode: 0o640, .. })));
    }
}
