//! `mica inspect`.

use std::path::PathBuf;

use super::{Error, MAX_FILE, Report, name_of, one_standard_input, passphrase, read};
use crate::config::cli::Inspect;
use crate::core::inspect::{self, Input};
use crate::sys::{clock, files};

pub(super) fn inspect(arguments: &Inspect) -> Result<Report, Error> {
    let standard_input = [PathBuf::from("-")];
    let paths = if arguments.files.is_empty() { &standard_input[..] } else { &arguments.files };
    one_standard_input(paths.iter().map(PathBuf::as_path))?;
    let passphrase = passphrase(arguments.passphrase_file.as_deref())?;
    let mut inputs = Vec::new();
    for path in paths {
        if files::is_folder(path) {
            let folder = name_of(path);
            let found = files::read_folder(path, MAX_FILE)?;
            if found.is_empty() {
                return Err(Error::Usage(format!(
                    "{folder} holds no files; name a folder with certificates"
                )));
            }
            inputs.extend(found.into_iter().map(|(name, bytes)| Input {
                folder: Some(folder.trim_end_matches('/').to_owned()),
                name,
                bytes,
            }));
        } else {
            inputs.push(Input { folder: None, name: name_of(path), bytes: read(path)? });
        }
    }
    let now = arguments.at.unwrap_or_else(clock::now);
    let inspection = inspect::inspect(&inputs, passphrase.as_deref().map(Vec::as_slice), now)?;
    let json = serde_json::to_value(&inspection).map_err(|e| Error::Usage(e.to_string()))?;
    Ok(Report::new(inspection.to_string(), json))
}
