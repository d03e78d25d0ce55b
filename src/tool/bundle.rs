//! `mica bundle`.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Error, Report, bundle_from, name_of, one_standard_input, read};
use crate::config::cli::{BundleConvert, BundleForm, BundleList, BundleMerge, BundleWrite};
use crate::core::bundle::TrustBundle;
use crate::core::inspect::{Input, distance, inspect, one_line};
use crate::core::spiffe::TrustDomain;
use crate::sys::{clock, files};

pub(super) fn merge(arguments: &BundleMerge) -> Result<Report, Error> {
    let BundleMerge { files, write: how } = arguments;
    one_standard_input(files.iter().map(PathBuf::as_path))?;
    let mut merged: Option<TrustBundle> = None;
    let mut domain = how.trust_domain.clone().map(|domain| (domain, "--trust-domain".to_owned()));
    let mut had_sequence = false;
    for path in files {
        let name = name_of(path);
        let bundle = bundle_from(path, &read(path)?, how.trust_domain.as_ref())?;
        had_sequence |= bundle.sequence.is_some();
        one_domain(&bundle, &name, &mut domain)?;
        merged = Some(match merged {
            None => bundle,
            Some(before) => before.merged(&bundle).map_err(|fault| Error::Bundle { name, fault })?,
        });
    }
    let Some(mut bundle) = merged else {
        return Err(Error::Usage("there is nothing to merge; name the bundles".to_owned()));
    };
    // What is merged is a new state, whose number only its publisher can know.
    bundle.sequence = None;
    bundle.refresh_hint = None;
    let mut report = write(bundle, how)?;
    if had_sequence && how.form == BundleForm::Spiffe && how.sequence.is_none() {
        report.notes.push(
            "the sequence was left out, since the bundle has changed; give the next one with --sequence"
                .to_owned(),
        );
    }
    Ok(report)
}

pub(super) fn convert(arguments: &BundleConvert) -> Result<Report, Error> {
    let BundleConvert { file, write: how } = arguments;
    let bundle = bundle_from(file, &read(file)?, how.trust_domain.as_ref())?;
    write(bundle, how)
}

pub(super) fn list(arguments: &BundleList) -> Result<Report, Error> {
    one_standard_input(arguments.files.iter().map(PathBuf::as_path))?;
    let now = arguments.at.unwrap_or_else(clock::now);
    let mut text = String::new();
    let mut listed = Vec::new();
    for path in &arguments.files {
        let name = name_of(path);
        let bytes = read(path)?;
        // A map names several; each is listed.
        let is_map = serde_json::from_slice::<serde_json::Value>(&bytes)
            .is_ok_and(|value| value.get("trust_domains").is_some());
        if is_map {
            let map = crate::core::bundle::map_from_json(&bytes)
                .map_err(|fault| Error::Bundle { name: name.clone(), fault })?;
            for (domain, bundle) in map {
                list_one(&format!("{name}, {domain}"), &bundle, now, &mut text, &mut listed)?;
            }
        } else {
            list_one(&name, &bundle_from(path, &bytes, None)?, now, &mut text, &mut listed)?;
        }
    }
    Ok(Report::new(text, json!({ "roots": listed })))
}

fn list_one(
    name: &str,
    bundle: &TrustBundle,
    now: time::OffsetDateTime,
    text: &mut String,
    listed: &mut Vec<serde_json::Value>,
) -> Result<(), Error> {
    let count = match bundle.roots().len() {
        1 => "1 root".to_owned(),
        n => format!("{n} roots"),
    };
    let sequence = bundle.sequence.map(|n| format!(", sequence {n}")).unwrap_or_default();
    text.push_str(&format!("{name}: {count}{sequence}\n"));
    for root in bundle.roots() {
        let input = Input { folder: None, name: name.to_owned(), bytes: root.to_pem().into_bytes().into() };
        let found = inspect(&[input], None, now)?;
        let problems: Vec<_> = found.items.iter().flat_map(|item| &item.problems).collect();
        let left = (root.validity.not_after - now).whole_seconds();
        let when = match left {
            ..0 => format!("expired {} ago", distance(left)),
            _ => format!("expires in {}", distance(left)),
        };
        let domain = root.spiffe_id().map(|id| id.trust_domain().to_string()).ok();
        text.push_str(&format!(
            "  {}  {}  {when}  {}\n",
            &root.fingerprint()[..16],
            domain.as_deref().unwrap_or("(no trust domain)"),
            one_line(&root.subject_text()),
        ));
        for problem in &problems {
            text.push_str(&format!("    wrong: {}\n", one_line(problem)));
        }
        listed.push(json!({
            "source": name,
            "trust_domain": domain,
            "subject": root.subject_text(),
            "sha256": root.fingerprint(),
            "not_after": root.validity.not_after.format(&time::format_description::well_known::Rfc3339).ok(),
            "sequence": bundle.sequence,
            "problems": problems,
        }));
    }
    Ok(())
}

/// Bundles of different trust domains are never one (SPIFFE Federation 4.2): each root says which it is of, or the user
/// says it for those that do not.
fn one_domain(
    bundle: &TrustBundle,
    name: &str,
    domain: &mut Option<(TrustDomain, String)>,
) -> Result<(), Error> {
    for root in bundle.roots() {
        match (root.spiffe_id().ok(), &*domain) {
            (Some(id), Some((expected, by))) if id.trust_domain() != expected => {
                return Err(Error::Usage(format!(
                    "{name} is of the trust domain {}, and {by} of {expected}; bundles of different trust domains are not merged, since each would then vouch for the other's identities",
                    id.trust_domain()
                )));
            }
            (Some(id), None) => *domain = Some((id.trust_domain().clone(), name.to_owned())),
            (None, Some((_, by))) if by == "--trust-domain" => {}
            (None, _) => {
                return Err(Error::Usage(format!(
                    "{name}: root {} names no trust domain, so it may be another's; say which it is of with --trust-domain",
                    root.serial_text()
                )));
            }
            (Some(_), Some(_)) => {}
        }
    }
    Ok(())
}

fn write(mut bundle: TrustBundle, how: &BundleWrite) -> Result<Report, Error> {
    let BundleWrite { form, out, force, trust_domain: _, sequence, refresh_hint } = how;
    if *form == BundleForm::Pem && (sequence.is_some() || refresh_hint.is_some()) {
        return Err(Error::Usage(
            "--sequence and --refresh-hint have no place in PEM; add --form spiffe".to_owned(),
        ));
    }
    bundle.sequence = sequence.or(bundle.sequence);
    bundle.refresh_hint = refresh_hint.map(|hint| hint.duration().as_secs()).or(bundle.refresh_hint);
    let written = match form {
        BundleForm::Pem => bundle.pem().to_string(),
        BundleForm::Spiffe => {
            let json =
                bundle.to_json().map_err(|fault| Error::Bundle { name: "the bundle".to_owned(), fault })?;
            format!("{json}\n")
        }
    };
    let to_stdout = out == Path::new("-");
    if !to_stdout {
        files::write_public(out, written.as_bytes(), *force)?;
    }
    let count = match bundle.roots().len() {
        1 => "1 root".to_owned(),
        n => format!("{n} roots"),
    };
    let json = json!({
        "file": if to_stdout { None } else { Some(out) },
        "roots": bundle.roots().len(),
        "sequence": bundle.sequence,
        "refresh_hint": bundle.refresh_hint,
        "bundle": if to_stdout { Some(&written) } else { None },
    });
    let text = if to_stdout { written } else { format!("wrote {count} to {}\n", out.display()) };
    Ok(Report::new(text, json))
}
