//! `mica sign`.

use std::path::Path;

use serde_json::json;

use super::{Error, Report, authority, made, name_of, passphrase, read, trust_domain_of};
use crate::config::cli::Sign;
use crate::core::authority_files;
use crate::core::certificate::Certificate;
use crate::core::csr::{CheckedCsr, Requested};
use crate::core::inspect::one_line;
use crate::core::issuer::{self, Order};
use crate::core::lifetime::shown;
use crate::core::profile::Profile;
use crate::sys::{clock, files, keys};

pub(super) fn sign(arguments: &Sign) -> Result<Report, Error> {
    let Sign { csr: csr_path, authority: folder, identity, ttl, dns, out, force, passphrase_file } =
        arguments;
    let passphrase = passphrase(passphrase_file.as_deref())?;
    let csr = CheckedCsr::from_pem(&read(csr_path)?)
        .map_err(|fault| Error::Csr { name: name_of(csr_path), fault })?;
    let ca_files = authority(folder)?;
    if let Some(domain) = trust_domain_of(&ca_files)
        && domain != *identity.trust_domain()
    {
        return Err(Error::Usage(format!(
            "identity {identity} is of the trust domain {}, and the CA in {} is of {domain}; give an identity of {domain}, or another CA",
            identity.trust_domain(),
            name_of(folder)
        )));
    }
    let issuer =
        authority_files::issuer(&ca_files, passphrase.as_deref().map(Vec::as_slice), identity.trust_domain())
            .map_err(|fault| Error::Authority { folder: name_of(folder), fault })?;
    let now = clock::now();
    let order = Order {
        profile: Profile::Workload { id: identity, dns, proved_at: None },
        key: csr.key(),
        lifetime: *ttl,
    };
    let issued = issuer
        .issue(&order, now, keys::serial_number()?)
        .map_err(|fault| Error::Issue { folder: name_of(folder), fault })?;
    let certificate = Certificate::from_der(issued.der()).map_err(issuer::Error::from)?;
    let pem = issuer.chain_pem(&issued);
    let to_stdout = out == Path::new("-");
    if !to_stdout {
        files::write_public(out, pem.as_bytes(), *force)?;
    }
    let (facts, described) = made(&certificate, now);
    let shortened = issued.validity.not_after < now + ttl.duration() - time::Duration::SECOND;
    let wanted =
        not_given(csr.requested(), identity.as_str(), dns.iter().map(|name| name.as_str()).collect());
    let json = json!({
        "made": "certificate",
        "file": if to_stdout { None } else { Some(out) },
        "pem": if to_stdout { Some(&pem) } else { None },
        "intermediates": issuer.chain().len(),
        "shortened": shortened,
        "not_given": wanted,
        "certificate": described,
    });
    let text = if to_stdout {
        pem
    } else {
        let with = match issuer.chain().len() {
            0 => "the leaf alone, as the CA is the root".to_owned(),
            1 => "the leaf and its intermediate".to_owned(),
            n => format!("the leaf and {n} intermediates"),
        };
        format!("signed into {} ({with})\n{facts}", out.display())
    };
    let mut report = Report::new(text, json);
    if shortened {
        report.notes.push(format!(
            "shortened from {ttl} to end with the CA, at {}",
            shown(issued.validity.not_after)
        ));
    }
    report
        .notes
        .extend(wanted.iter().map(|wanted| format!("the CSR asked for {wanted}, which was not given")));
    Ok(report)
}

/// What the CSR asked for and did not get.
fn not_given(requested: &Requested, identity: &str, dns: Vec<&str>) -> Vec<String> {
    let mut wanted = Vec::new();
    if let Some(uri) = requested.uri.as_deref().filter(|uri| *uri != identity) {
        wanted.push(format!("the URI {}", one_line(uri)));
    }
    for name in requested.dns.iter().filter(|name| !dns.contains(&name.as_str())) {
        wanted.push(format!("the DNS name {}", one_line(name)));
    }
    wanted.extend(requested.others.iter().map(|name| format!("the name {}", one_line(name))));
    if !requested.subject.is_empty() {
        wanted.push(format!("the subject {}", one_line(&requested.subject)));
    }
    wanted
}
