//! `mica intermediate new`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;
use zeroize::Zeroizing;

use super::{Error, Report, authority, key_pem, made, name_of, passphrase, trust_domain_of};
use crate::config::cli::IntermediateNew;
use crate::core::authority_files::{self, CA_CERT, CA_KEY, CERT_CHAIN, ROOT_CERT};
use crate::core::certificate::Certificate;
use crate::core::issuer::{self, Order};
use crate::core::lifetime::shown;
use crate::core::profile::{Organization, Profile};
use crate::core::spiffe::TrustDomain;
use crate::core::{csr, pem};
use crate::sys::{clock, files, keys};

/// What the CSR for somebody else's root is called.
const CA_CSR: &str = "ca-csr.pem";
/// Where nothing says otherwise.
const TRUST_DOMAIN: &str = "cluster.local";

pub(super) fn new(arguments: &IntermediateNew) -> Result<Report, Error> {
    match &arguments.root {
        Some(root) => below(root, arguments),
        None => request(arguments),
    }
}

fn below(root: &Path, arguments: &IntermediateNew) -> Result<Report, Error> {
    let failed = |fault| Error::Authority { folder: name_of(root), fault };
    let own_passphrase = passphrase(arguments.passphrase_file.as_deref())?;
    let root_passphrase = passphrase(arguments.root_passphrase_file.as_deref())?;
    let root_files = authority(root)?;
    let trust_domain = match (&arguments.trust_domain, trust_domain_of(&root_files)) {
        (Some(domain), _) => domain.clone(),
        (None, Some(domain)) => domain,
        (None, None) => default_trust_domain()?,
    };
    let issuer =
        authority_files::issuer(&root_files, root_passphrase.as_deref().map(Vec::as_slice), &trust_domain)
            .map_err(|fault| match fault {
                authority_files::Error::Key {
                    name,
                    fault: crate::core::key::Error::Locked,
                } => Error::Usage(format!(
                    "{}: {name}: the private key is protected by a passphrase; give it with --root-passphrase-file",
                    name_of(root)
                )),
                other => failed(other),
            })?;
    let organization = organization(arguments, &trust_domain)?;
    let key = keys::generate(arguments.key_kind.into())?;
    let now = clock::now();
    let order = Order {
        profile: Profile::Intermediate { organization: &organization, trust_domain: &trust_domain },
        key: key.public(),
        lifetime: arguments.lifetime,
    };
    let issued = issuer.issue(&order, now, keys::serial_number()?).map_err(|fault| match fault {
        issuer::Error::PathLength => {
            Error::Usage(format!("{}: {fault}; give the folder of its root with --root", name_of(root)))
        }
        fault => Error::Issue { folder: name_of(root), fault },
    })?;
    let certificate = Certificate::from_der(issued.der()).map_err(issuer::Error::from)?;
    let mut chain = issuer.chain_pem(&issued);
    // The root that it leads to ends the file; readers leave it out of what they deliver.
    let roots = issuer.bundle().roots();
    let top = issuer.chain().last().unwrap_or(issuer.certificate());
    if let Some(root) = roots.iter().find(|root| root.subject == top.issuer || *root == top) {
        chain.push_str(&root.to_pem());
    }
    let roots_pem = issuer.bundle().pem();
    // A CA that would not be loaded is not written. Its key is proved before a passphrase is put on it.
    let ca_pem = certificate.to_pem();
    let proof: BTreeMap<String, Zeroizing<Vec<u8>>> = [
        (CA_CERT, ca_pem.as_bytes()),
        (CA_KEY, key.to_pem().as_bytes()),
        (CERT_CHAIN, chain.as_bytes()),
        (ROOT_CERT, roots_pem.as_bytes()),
    ]
    .into_iter()
    .map(|(name, bytes)| (name.to_owned(), Zeroizing::new(bytes.to_owned())))
    .collect();
    authority_files::issuer(&proof, None, &trust_domain).map_err(failed)?;
    let key_pem = key_pem(&key, own_passphrase.as_deref().map(Vec::as_slice))?;
    let out = &arguments.out;
    files::write_set(
        out,
        &[
            (CA_CERT, ca_pem.as_bytes(), 0o644),
            (CERT_CHAIN, chain.as_bytes(), 0o644),
            (ROOT_CERT, roots_pem.as_bytes(), 0o644),
            (CA_KEY, key_pem.as_bytes(), 0o600),
        ],
    )?;
    let (facts, described) = made(&certificate, now);
    let folder = out.display();
    let text = format!(
        "made an intermediate of {trust_domain} in {folder} (ca-cert.pem, ca-key.pem, cert-chain.pem, root-cert.pem)\n\
         {facts}next: mica serve --authority {folder}, or mica sign CSR --authority {folder}\n"
    );
    let shortened = issued.validity.not_after < now + arguments.lifetime.duration() - time::Duration::SECOND;
    let json = json!({
        "made": "intermediate",
        "folder": out,
        "files": [CA_CERT, CA_KEY, CERT_CHAIN, ROOT_CERT],
        "trust_domain": trust_domain.as_str(),
        "key_protected": own_passphrase.is_some(),
        "shortened": shortened,
        "certificate": described,
    });
    let mut report = Report::new(text, json);
    if shortened {
        report.notes.push(format!(
            "shortened from {} to end with the CA above it, at {}",
            arguments.lifetime,
            shown(issued.validity.not_after)
        ));
    }
    Ok(report)
}

fn request(arguments: &IntermediateNew) -> Result<Report, Error> {
    let passphrase = passphrase(arguments.passphrase_file.as_deref())?;
    let trust_domain = match &arguments.trust_domain {
        Some(domain) => domain.clone(),
        None => default_trust_domain()?,
    };
    let organization = organization(arguments, &trust_domain)?;
    let key = keys::generate(arguments.key_kind.into())?;
    let request = csr::intermediate(&key.signing()?, &organization, &trust_domain)?;
    let request = pem::encode(pem::CSR, &request);
    let key_pem = key_pem(&key, passphrase.as_deref().map(Vec::as_slice))?;
    let out = &arguments.out;
    files::write_set(out, &[(CA_CSR, request.as_bytes(), 0o644), (CA_KEY, key_pem.as_bytes(), 0o600)])?;
    let folder = out.display();
    let text = format!(
        "made a key and a CSR for an intermediate of {trust_domain} in {folder} (ca-key.pem, ca-csr.pem)\n\
         next: have {folder}/ca-csr.pem signed as a CA of path length 0, and put beside ca-key.pem: ca-cert.pem (what comes back), cert-chain.pem (it and those above it) and root-cert.pem (the root)\n"
    );
    let json = json!({
        "made": "intermediate_csr",
        "folder": out,
        "files": [CA_KEY, CA_CSR],
        "trust_domain": trust_domain.as_str(),
        "key_protected": passphrase.is_some(),
    });
    Ok(Report::new(text, json))
}

fn organization(arguments: &IntermediateNew, trust_domain: &TrustDomain) -> Result<Organization, Error> {
    match &arguments.organization {
        Some(organization) => Ok(organization.clone()),
        None => Ok(trust_domain.as_str().parse()?),
    }
}

fn default_trust_domain() -> Result<TrustDomain, Error> {
    TrustDomain::parse(TRUST_DOMAIN).map_err(|e| Error::Usage(e.to_string()))
}
