//! The keys of JWT-SVIDs in the data folder.

use zeroize::Zeroizing;

use super::KeyringStore;
use crate::core::keyring::{Keyring, MAX};
use crate::sys::dir::{Access, Dir};

/// Within the data folder.
const FILE: &str = "jwt-keys.json";

/// The keys in a file. Losing it ends tokens of minutes, and nothing else: so what cannot be read is made anew, and never
/// keeps certificates from being issued.
pub struct FolderKeyring {
    data: Dir,
}

impl FolderKeyring {
    /// Takes the data folder, whose lock the caller holds.
    pub fn new(data: Dir) -> Self {
        Self { data }
    }
}

impl KeyringStore for FolderKeyring {
    async fn read(&mut self) -> Result<Option<Keyring>, String> {
        let (text, facts) = match self.data.read(FILE, MAX) {
            Ok((text, facts)) => (Zeroizing::new(text), facts),
            Err(e) if e.is_absent() => return Ok(None),
            Err(e) => return Err(e.to_string()),
        };
        let file = self.data.path().join(FILE).display().to_string();
        match Keyring::from_json(&text) {
            Ok(keyring) if facts.mode() & 0o077 == 0 => Ok(Some(keyring)),
            Ok(keyring) => {
                let mode = format!("{:04o}", facts.mode());
                tracing::error!(file, mode, "others may read the keys of JWT-SVIDs: new ones are made");
                Ok(Some(keyring.without_keys()))
            }
            Err(fault) => {
                tracing::error!(file, %fault, "the keys of JWT-SVIDs cannot be read: new ones are made");
                Ok(None)
            }
        }
    }

    async fn write(&mut self, keyring: &Keyring) -> Result<bool, String> {
        let text = keyring.to_json();
        self.data.replace(FILE, text.as_bytes(), Access::mode(0o600)).map_err(|e| e.to_string())?;
        Ok(true)
    }

    fn leads(&self) -> bool {
        true
    }

    async fn numbered_from(&self) -> Result<Option<u64>, String> {
        Ok(None)
    }
}
