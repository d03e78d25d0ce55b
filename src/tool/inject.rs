//! `mica inject`.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Error, Report, name_of, one_standard_input};
use crate::config::cli::Inject;
use crate::config::inject::{InjectMode, Typed};
use crate::core::documents::Documents;
use crate::core::inject::{Object, Outcome, SWITCH, Wish, into_manifests};
use crate::sys::files;

/// The most that is read of a file of manifests.
const MAX_MANIFESTS: u64 = 64 << 20;

pub(super) fn inject(arguments: &Inject) -> Result<Report, Error> {
    let wish = wish(arguments)?;
    one_standard_input(arguments.filenames.iter().map(PathBuf::as_path))?;
    let mut texts = Vec::new();
    let mut objects = Vec::new();
    for path in &arguments.filenames {
        let name = name_of(path);
        let text = files::read_given(path, MAX_MANIFESTS)?;
        let done =
            into_manifests(&text, &wish).map_err(|fault| Error::Inject { name: name.clone(), fault })?;
        texts.push(done.text);
        objects.extend(done.objects.into_iter().map(|object| (name.clone(), object)));
    }
    let changed = objects.iter().filter(|(_, object)| matches!(object.outcome, Outcome::Changed(_))).count();
    let manifests = joined(&texts);
    let json = json!({
        "changed": changed,
        "objects": objects.iter().map(|(name, object)| described(name, object)).collect::<Vec<_>>(),
        "manifests": if arguments.check { None } else { Some(&manifests) },
    });
    let text = if arguments.check { told(&objects, changed) } else { manifests };
    let mut report = Report { good: !arguments.check || changed == 0, ..Report::new(text, json) };
    if objects.is_empty() {
        let names: Vec<_> = arguments.filenames.iter().map(|path| name_of(path)).collect();
        report.notes.push(format!("nothing in {} makes pods, so nothing is to be put in", names.join(", ")));
    }
    if !arguments.check {
        report.notes.extend(objects.iter().filter(|(_, object)| object.outcome == Outcome::OptedOut).map(
            |(name, object)| {
                format!("{name}, line {}: {object} is left alone, as its {SWITCH} says", object.line)
            },
        ));
    }
    Ok(report)
}

fn wish(arguments: &Inject) -> Result<Wish, Error> {
    let Inject { mode, container, image, authority_address, files, token_audience, .. } = arguments;
    if authority_address.is_some() && *mode != InjectMode::Agent {
        let fault = "--authority-address says something of an agent; give it with --mode agent";
        return Err(Error::Usage(fault.to_owned()));
    }
    if token_audience.is_some() && *mode == InjectMode::Secret {
        let fault = "--token-audience says something of an agent; give it with --mode agent or --mode token";
        return Err(Error::Usage(fault.to_owned()));
    }
    let typed = Typed {
        prefix: "--",
        mode: *mode,
        container: container.as_deref(),
        image: image.as_deref(),
        files: files.as_deref(),
        metrics: arguments.metrics_address,
        otlp: arguments.trace_otlp.as_ref(),
        zipkin: arguments.trace_zipkin.as_ref(),
        authority: authority_address.as_deref().unwrap_or("mica.istio-system.svc:15012"),
        audience: token_audience.as_deref().unwrap_or("istio-ca"),
    };
    typed.wish().map_err(Error::Usage)
}

fn told(objects: &[(String, Object)], changed: usize) -> String {
    let mut text = String::new();
    for (name, object) in objects {
        if let Outcome::Changed(parts) = &object.outcome {
            text.push_str(&format!("{name}, line {}: {object} lacks: {}\n", object.line, parts.join(", ")));
        }
    }
    let count = |n: usize| if n == 1 { "1 object".to_owned() } else { format!("{n} objects") };
    text.push_str(&match changed {
        0 => "nothing would change\n".to_owned(),
        _ => format!("{changed} of {} would change\n", count(objects.len())),
    });
    text
}

fn described(name: &str, object: &Object) -> Value {
    let (outcome, added) = match &object.outcome {
        Outcome::Changed(parts) => ("changed", parts.as_slice()),
        Outcome::Complete => ("complete", &[][..]),
        Outcome::OptedOut => ("opted out", &[][..]),
        Outcome::NoPod => ("no pod", &[][..]),
    };
    json!({
        "file": name,
        "document": object.document,
        "line": object.line,
        "kind": object.kind,
        "namespace": object.namespace,
        "name": object.name,
        "outcome": outcome,
        "added": added,
    })
}

/// Several files as one, of which each stays a document, or several, of its own.
fn joined(texts: &[String]) -> String {
    let [first, rest @ ..] = texts else { return String::new() };
    let json =
        texts.iter().all(|text| Documents::new(text.as_bytes()).all(|document| document.begins_as_json()));
    let mut all = String::new();
    if !json && !rest.is_empty() && first.trim_start().starts_with('{') {
        // Who reads this takes it for JSON otherwise.
        all.push_str("---\n");
    }
    all.push_str(first);
    for text in rest {
        if !all.is_empty() && !all.ends_with('\n') {
            all.push('\n');
        }
        let marked = text.trim_start_matches('\u{feff}').starts_with("---");
        if text.trim_start_matches('\u{feff}').starts_with('%') {
            all.push_str("...\n");
        } else if !json && !marked {
            all.push_str("---\n");
        }
        all.push_str(text.trim_start_matches('\u{feff}'));
    }
    all
}
