//! `mica token new`.

use serde_json::json;
use time::Duration;

use super::{Error, Report};
use crate::auth::trial as issuer;
use crate::config::cli::TokenNew;
use crate::core::lifetime::shown;
use crate::core::token::trial;
use crate::sys::{clock, files, keys};

pub(super) fn new(arguments: &TokenNew) -> Result<Report, Error> {
    let TokenNew { account, data_dir, ttl, audience, out, force } = arguments;
    let key = issuer::open(data_dir)?;
    let now = clock::now();
    let token = trial::token(&key, account, audience, now, *ttl, keys::random_bytes()?)?;
    let expires = now + Duration::try_from(ttl.duration()).unwrap_or_default();
    let mut json = json!({
        "made": "token",
        "account": account.to_string(),
        "audience": audience,
        "issuer": trial::ISSUER,
        "expires": expires.format(&time::format_description::well_known::Rfc3339).unwrap_or_default(),
    });
    let text = match out {
        None => {
            json["token"] = token.as_str().into();
            format!("{token}\n")
        }
        Some(file) => {
            files::write_private(file, format!("{token}\n").as_bytes(), *force)?;
            json["file"] = json!(file);
            format!(
                "wrote a token of {account} for {audience} to {}, good until {}\n",
                file.display(),
                shown(expires)
            )
        }
    };
    Ok(Report::new(text, json))
}
