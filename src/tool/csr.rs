//! `mica csr new`.

use serde_json::json;

use super::{Error, Report};
use crate::config::cli::CsrNew;
use crate::core::{csr, pem};
use crate::sys::{files, keys};

const CSR: &str = "csr.pem";
const KEY: &str = "key.pem";

pub(super) fn new(arguments: &CsrNew) -> Result<Report, Error> {
    let CsrNew { identity, out, key_kind, dns } = arguments;
    let key = keys::generate((*key_kind).into())?;
    let csr = csr::workload(&key.signing()?, identity, dns)?;
    let csr = pem::encode(pem::CSR, &csr);
    files::add_to(out, &[(CSR, csr.as_bytes(), 0o644), (KEY, key.to_pem().as_bytes(), 0o600)])?;
    let folder = out.display();
    let text = format!(
        "made a {} key and a CSR for {identity} in {folder} (key.pem, csr.pem)\n\
         next: mica sign {folder}/csr.pem --authority CA-FOLDER --identity {identity} --out {folder}/cert-chain.pem\n",
        key.public().kind()
    );
    let json = json!({
        "made": "csr",
        "folder": out,
        "files": [CSR, KEY],
        "identity": identity.as_str(),
        "dns": dns.iter().map(|name| name.as_str()).collect::<Vec<_>>(),
        "key": key.public().kind().as_str(),
    });
    Ok(Report::new(text, json))
}
