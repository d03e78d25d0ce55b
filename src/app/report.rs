//! What `mica serve` says on standard output once it runs.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use time::OffsetDateTime;
use time::macros::format_description;

use super::serve::Addresses;
use crate::authority::Authority;
use crate::config::serve::Args;
use crate::reconcile::{Progress, Report};
use crate::store::ROOTS;

/// Work of fewer accounts is over before a bar could be read.
const LONG: usize = 500;

/// A bar on standard error, for people, when the work is long.
pub(super) fn progress() -> Progress {
    if !std::io::stderr().is_terminal() {
        return Box::new(|_, _| {});
    }
    let mut bar: Option<ProgressBar> = None;
    Box::new(move |done, total| {
        if total < LONG {
            return;
        }
        let shown = bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{bar:40} {pos} of {len} identities, {eta} left")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr()).with_style(style)
        });
        shown.set_position(done as u64);
        if done == total {
            shown.finish_and_clear();
            bar = None;
        }
    })
}

/// What there is, for whom, until when, where, and what to open next.
pub(super) fn print(
    args: &Args,
    secrets: &Path,
    authority: &Authority,
    addresses: &Addresses,
    report: &Report,
) {
    // Nobody reads it when standard output is closed.
    let _ = std::io::stdout().write_all(text(args, secrets, authority, addresses, report).as_bytes());
}

fn text(
    args: &Args,
    secrets: &Path,
    authority: &Authority,
    addresses: &Addresses,
    report: &Report,
) -> String {
    let domain = authority.trust_domain();
    let source = args.source.display();
    let version = env!("CARGO_PKG_VERSION");
    let mut lines = vec![format!("mica {version} serves the trust domain {domain}"), String::new()];
    lines.push(match (report.good, report.issued) {
        (0, _) if report.foreign + report.waiting > 0 => {
            format!("No good identities yet for the accounts below {source}:")
        }
        (0, _) => format!("No identities: no service account was found below {source}."),
        (good, issued) => format!(
            "{good} {} for the accounts below {source}; {} issued now, for {}:",
            if good == 1 { "identity" } else { "identities" },
            if issued == good { "all".to_owned() } else { issued.to_string() },
            args.ttl
        ),
    });
    let rows: Vec<_> = report
        .shown
        .iter()
        .map(|(account, until)| {
            let folder = secrets.join(account.namespace()).join(format!("istio.{}", account.name()));
            (account.spiffe_id(domain).to_string(), moment(*until), folder.display().to_string())
        })
        .collect();
    let width = rows.iter().map(|(id, _, _)| id.len()).max().unwrap_or_default();
    for (id, until, folder) in &rows {
        lines.push(format!("  {id:width$}  until {until}  {folder}"));
    }
    if report.good > rows.len() {
        lines.push(format!("  and {} more below {}", report.good - rows.len(), secrets.display()));
    }
    for (count, what) in [
        (report.foreign, "not delivered: their place is taken by something mica did not write; see the log"),
        (report.waiting, "not served yet, and tried again; see the log"),
        (report.removed, "removed, because their accounts are gone"),
    ] {
        if count > 0 {
            lines.push(format!("{count} {what}"));
        }
    }
    let roots = args.data_dir.join(ROOTS);
    let issuer = authority.issuer();
    let until = issuer.bundle().roots().iter().map(|root| root.validity.not_after).max();
    lines.push(String::new());
    lines.push(format!("Roots   {}, until {}", roots.display(), until.map(moment).unwrap_or_default()));
    lines.push(format!("Health  http://{0}/readyz, metrics http://{0}/metrics", addresses.http));
    lines.push(format!("gRPC    {} (TLS)", addresses.grpc));
    if let Some((_, _, folder)) = rows.first() {
        let program = std::env::args().next().unwrap_or_else(|| "mica".to_owned());
        lines.push(String::new());
        lines.push("In a second terminal:".to_owned());
        lines.push(format!("  {program} inspect {folder}"));
        lines.push(format!("  {program} verify {folder} --roots {}", roots.display()));
        lines.push(format!("  openssl verify -CAfile {} {folder}/cert-chain.pem", roots.display()));
    }
    lines.push(String::new());
    lines.push(format!("Following {source}; Ctrl-C stops."));
    lines.push(String::new());
    lines.join("\n")
}

/// A time as people read it.
pub(super) fn moment(at: OffsetDateTime) -> String {
    at.format(format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z")).unwrap_or_default()
}
