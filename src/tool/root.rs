//! `mica root new`.

use serde_json::json;

use super::{Error, Report, key_pem, made, passphrase};
use crate::config::cli::RootNew;
use crate::core::authority_files::{CA_CERT, CA_KEY, CERT_CHAIN, ROOT_CERT};
use crate::core::certificate::Certificate;
use crate::core::issuer;
use crate::core::profile::{Organization, Profile};
use crate::sys::{clock, files, keys};

pub(super) fn new(arguments: &RootNew) -> Result<Report, Error> {
    let RootNew { out, key_kind, lifetime, organization, trust_domain, passphrase_file } = arguments;
    let passphrase = passphrase(passphrase_file.as_deref())?;
    let organization: Organization = match organization {
        Some(organization) => organization.clone(),
        None => trust_domain.as_str().parse()?,
    };
    let key = keys::generate((*key_kind).into())?;
    let now = clock::now();
    let root = issuer::root(
        &key.signing()?,
        &Profile::Root { organization: &organization, trust_domain },
        *lifetime,
        now,
        keys::serial_number()?,
    )?;
    let root = Certificate::from_der(root.der()).map_err(issuer::Error::from)?;
    let pem = root.to_pem();
    let key_pem = key_pem(&key, passphrase.as_deref().map(Vec::as_slice))?;
    files::write_set(
        out,
        &[
            (CA_CERT, pem.as_bytes(), 0o644),
            (CERT_CHAIN, pem.as_bytes(), 0o644),
            (ROOT_CERT, pem.as_bytes(), 0o644),
            (CA_KEY, key_pem.as_bytes(), 0o600),
        ],
    )?;
    let (facts, certificate) = made(&root, now);
    let folder = out.display();
    let text = format!(
        "made a root of {trust_domain} in {folder} (ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem)\n{facts}\
         next: mica intermediate new --root {folder} --out CA-FOLDER\n"
    );
    let protected = passphrase.is_some();
    let json = json!({
        "made": "root",
        "folder": out,
        "files": [CA_CERT, CA_KEY, CERT_CHAIN, ROOT_CERT],
        "trust_domain": trust_domain.as_str(),
        "key_protected": protected,
        "certificate": certificate,
    });
    Ok(Report::new(text, json))
}
