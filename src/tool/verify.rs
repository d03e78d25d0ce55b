//! `mica verify`.

use std::path::{Path, PathBuf};

use serde_json::json;
use zeroize::Zeroizing;

use super::{Error, MAX_FILE, Report, bundle_from, name_of, one_standard_input, passphrase, read};
use crate::config::cli::Verify;
use crate::core::bundle::TrustBundle;
use crate::core::certificate::{self, Certificate};
use crate::core::chain::{self, Fault};
use crate::core::inspect::{distance, one_line};
use crate::core::key::{self, PrivateKey};
use crate::core::lifetime::shown;
use crate::sys::{clock, files};

pub(super) fn verify(arguments: &Verify) -> Result<Report, Error> {
    let Verify { chain, roots, identity, key, at, passphrase_file } = arguments;
    one_standard_input(
        [chain, roots.as_ref().unwrap_or(chain)].map(PathBuf::as_path).into_iter().take(if roots.is_some() {
            2
        } else {
            1
        }),
    )?;
    let passphrase = passphrase(passphrase_file.as_deref())?;
    let now = at.unwrap_or_else(clock::now);
    let Given { chain_name, chain, roots_name, roots, key } =
        read_given(chain, roots.as_deref(), key.as_deref())?;
    let chain = certificates(&chain_name, &chain)?;
    let trust_domain =
        chain.first().and_then(|leaf| leaf.spiffe_id().ok()).map(|id| id.trust_domain().clone());
    let roots = bundle_from(Path::new(&roots_name), &roots, trust_domain.as_ref())?;
    let verdict = chain::verify(&chain, &roots, identity.as_ref(), now);
    let mut faults: Vec<(String, String)> = verdict
        .as_ref()
        .err()
        .into_iter()
        .flatten()
        .map(|fault| (explained(fault, &chain, &roots), advice(fault).to_owned()))
        .collect();
    if let Some((name, bytes)) = &key {
        faults.extend(key_fault(name, bytes, passphrase.as_deref().map(Vec::as_slice), &chain)?);
    }
    let good = faults.is_empty();
    let leaf = chain.first();
    let not_after = chain.iter().map(|c| c.validity.not_after).min();
    let json = json!({
        "good": good,
        "at": now.format(&time::format_description::well_known::Rfc3339).ok(),
        "spiffe_id": leaf.and_then(|leaf| leaf.spiffe_id().ok()).map(|id| id.to_string()),
        "serial": leaf.map(Certificate::serial_text),
        "key_checked": key.is_some(),
        "faults": faults
            .iter()
            .map(|(fault, advice)| json!({ "fault": fault, "advice": advice }))
            .collect::<Vec<_>>(),
    });
    let mut text = String::new();
    match (verdict, not_after) {
        (Ok(id), Some(not_after)) if good => {
            let left = distance((not_after - now).whole_seconds());
            text.push_str(&format!("good: {id}, until {} (for {left})", shown(not_after)));
            text.push_str(if key.is_some() { ", and the key belongs to it\n" } else { "\n" });
        }
        _ => {
            text.push_str(&format!("not good: {chain_name}\n"));
            for (fault, advice) in &faults {
                text.push_str(&format!("  {}\n    {}\n", one_line(fault), advice));
            }
        }
    }
    Ok(Report { good, ..Report::new(text, json) })
}

/// What is to be judged, and what to call it.
struct Given {
    chain_name: String,
    chain: Zeroizing<Vec<u8>>,
    roots_name: String,
    roots: Zeroizing<Vec<u8>>,
    key: Option<(String, Zeroizing<Vec<u8>>)>,
}

fn read_given(chain: &Path, roots: Option<&Path>, key: Option<&Path>) -> Result<Given, Error> {
    let mut folder = if files::is_folder(chain) { Some(files::read_folder(chain, MAX_FILE)?) } else { None };
    let within = |name: &str| format!("{}/{name}", name_of(chain).trim_end_matches('/'));
    let mut take = |names: [&str; 2]| {
        let folder = folder.as_mut()?;
        names.into_iter().find_map(|name| Some((within(name), folder.remove(name)?)))
    };
    let own_chain = take(["cert-chain.pem", "tls.crt"]);
    let own_roots = take(["root-cert.pem", "ca.crt"]);
    let own_key = take(["key.pem", "tls.key"]);
    let (roots_name, roots) = match (roots, own_roots) {
        (Some(path), _) => (path.display().to_string(), read(path)?),
        (None, Some(own)) => own,
        (None, None) => {
            return Err(Error::Usage(
                "there is nothing to verify against; give the trust bundle with --roots FILE".to_owned(),
            ));
        }
    };
    let (chain_name, chain) = match (own_chain, files::is_folder(chain)) {
        (Some(own), _) => own,
        (None, true) => {
            return Err(Error::Usage(format!(
                "{} holds no cert-chain.pem and no tls.crt; name the file with the chain",
                name_of(chain)
            )));
        }
        (None, false) => (name_of(chain), read(chain)?),
    };
    let key = match (key, own_key) {
        (Some(path), _) => Some((name_of(path), read(path)?)),
        (None, own) => own,
    };
    Ok(Given { chain_name, chain, roots_name, roots, key })
}

/// A chain as PEM, or one certificate as DER.
fn certificates(name: &str, bytes: &[u8]) -> Result<Vec<Certificate>, Error> {
    let failed = |fault| Error::Certificates { name: name.to_owned(), fault };
    if bytes.first() == Some(&0x30) && std::str::from_utf8(bytes).is_err() {
        return Ok(vec![Certificate::from_der(bytes).map_err(failed)?]);
    }
    Certificate::all_from_pem(bytes).map_err(failed)
}

fn key_fault(
    name: &str,
    bytes: &[u8],
    passphrase: Option<&[u8]>,
    chain: &[Certificate],
) -> Result<Option<(String, String)>, Error> {
    let Some(leaf) = chain.first() else { return Ok(None) };
    let public = leaf.key().ok();
    let fault = match PrivateKey::from_pem(bytes, passphrase, public.as_ref()) {
        Ok(key) if key.public().spki() == leaf.spki => return Ok(None),
        // Halves that do not belong together are what a wrong certificate's public half gives, too.
        Ok(_) | Err(key::Error::Private(_)) if public.is_some() => {
            format!("the key in {name} does not belong to the leaf")
        }
        Ok(_) => format!("the key in {name} does not belong to the leaf"),
        Err(fault) => return Err(Error::PrivateKey { name: name.to_owned(), fault }),
    };
    Ok(Some((
        fault,
        "give the key that the certificate was issued for, or have the leaf issued anew".to_owned(),
    )))
}

/// webpki names the kind of a fault; a user wants to hear which certificate.
fn explained(fault: &Fault, chain: &[Certificate], roots: &TrustBundle) -> String {
    if !matches!(fault, Fault::Path(_)) {
        return fault.to_string();
    }
    for (certificate, number) in chain.iter().zip(1..) {
        let issued_by = |other: &Certificate| other.subject == certificate.issuer;
        if roots.roots().iter().any(issued_by) {
            return fault.to_string();
        }
        if !chain.iter().any(|other| other != certificate && issued_by(other)) {
            return format!(
                "certificate {number} was issued by {:?}, which is neither in the chain nor among the roots",
                certificate.issuer_text()
            );
        }
    }
    fault.to_string()
}

fn advice(fault: &Fault) -> &'static str {
    match fault {
        Fault::Empty => "give a file with the leaf and its intermediates",
        Fault::TooLong(_) => "leave out the certificates that do not lead to the root",
        Fault::Leaf(certificate::Fault::LeafCa | certificate::Fault::LeafCertSign) => {
            "put the workload's certificate first; a CA's names no workload"
        }
        Fault::Leaf(_) => "have it issued anew by a CA that keeps the SPIFFE rules, such as `mica sign`",
        Fault::Identity { .. } => "check which workload the file is from, or what --identity says",
        Fault::NotYet { .. } => "check this machine's clock and that of the issuer, or wait",
        Fault::Expired { .. } => {
            "have it renewed; if that should have happened by itself, look why it did not"
        }
        Fault::Above { .. } | Fault::PathLength { .. } => {
            "have the CA between it and the root issued anew, as `mica intermediate new` does"
        }
        Fault::Path(_) => {
            "give the trust bundle of the CA that issued it, and a chain with every intermediate below the root"
        }
    }
}
