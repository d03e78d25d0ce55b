//! What `mica serve` says on standard output once it runs.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use time::OffsetDateTime;
use time::macros::format_description;

use super::addresses::Addresses;
use super::subjects::First;
use crate::authority::Authority;
use crate::config::cli::Output;
use crate::config::serve::Args;
use crate::reconcile::Progress;
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
pub(super) fn print(args: &Args, output: Output, authority: &Authority, addresses: &Addresses, first: First) {
    let (source, secrets, report) = match first {
        First::Delivered(secrets, report) => {
            (args.source.as_deref().map(plain).unwrap_or_default(), Some(secrets), report)
        }
        First::Known(place, report) => (place, None, report.unwrap_or_default()),
    };
    let secrets = secrets.as_deref();
    let domain = authority.trust_domain();
    let issuer = authority.issuer();
    let root_until = issuer.bundle().roots().iter().map(|root| root.validity.not_after).max();
    let shown = Shown {
        trust_domain: domain.to_string(),
        source,
        identities: report
            .shown
            .iter()
            .map(|(account, until)| Identity {
                id: account.spiffe_id(domain).to_string(),
                not_after: *until,
                folder: secrets
                    .map(|secrets| {
                        secrets.join(account.namespace()).join(format!("istio.{}", account.name()))
                    })
                    .as_deref()
                    .map(plain),
                secret: match secrets {
                    None => Some(format!("{}/istio.{}", account.namespace(), account.name())),
                    Some(_) => None,
                },
            })
            .collect(),
        good: report.good,
        issued: report.issued,
        foreign: report.foreign,
        waiting: report.waiting,
        removed: report.removed,
        secrets: secrets.map(plain),
        roots: plain(&args.data_dir.join(ROOTS)),
        roots_not_after: root_until,
        http: addresses.http.to_string(),
        grpc: addresses.grpc.map(|address| address.to_string()),
    };
    let text = match output {
        Output::Text => shown.text(args),
        Output::Json => serde_json::to_string(&shown).unwrap_or_default() + "\n",
    };
    // Nobody reads it when standard output is closed.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

#[derive(Serialize)]
struct Shown {
    trust_domain: String,
    source: String,
    identities: Vec<Identity>,
    good: usize,
    issued: usize,
    foreign: usize,
    waiting: usize,
    removed: usize,
    secrets: Option<String>,
    roots: String,
    #[serde(with = "time::serde::rfc3339::option")]
    roots_not_after: Option<OffsetDateTime>,
    http: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    grpc: Option<String>,
}

#[derive(Serialize)]
struct Identity {
    id: String,
    #[serde(with = "time::serde::rfc3339")]
    not_after: OffsetDateTime,
    #[serde(skip_serializing_if = "Option::is_none")]
    folder: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
}

impl Shown {
    fn text(&self, args: &Args) -> String {
        let Self { trust_domain, source, identities, good, issued, secrets, roots, .. } = self;
        let version = env!("CARGO_PKG_VERSION");
        let mut lines = vec![format!("mica {version} serves the trust domain {trust_domain}"), String::new()];
        lines.push(match good {
            0 if secrets.is_none() && self.foreign + self.waiting == 0 => format!(
                "Service accounts of {source} get certificates when they ask, for {} by default.",
                args.ttl
            ),
            0 if self.foreign + self.waiting == 0 => format!("No service account was found below {source}."),
            0 => format!("No good identities yet for the accounts below {source}:"),
            _ => format!(
                "{good} {} for the accounts {} {source}; {} issued now, for {}:",
                if *good == 1 { "identity" } else { "identities" },
                if secrets.is_some() { "below" } else { "of" },
                if issued == good { "all".to_owned() } else { issued.to_string() },
                args.ttl
            ),
        });
        let width = identities.iter().map(|identity| identity.id.len()).max().unwrap_or_default();
        for Identity { id, not_after, folder, secret } in identities {
            let place = match (folder, secret) {
                (Some(folder), _) => folder.clone(),
                (None, secret) => format!("secret {}", secret.as_deref().unwrap_or_default()),
            };
            lines.push(format!("  {id:width$}  until {}  {place}", moment(*not_after)));
        }
        if *good > identities.len() {
            let more = good - identities.len();
            lines.push(match secrets {
                Some(secrets) => format!("  and {more} more below {secrets}"),
                None => format!("  and {more} more"),
            });
        }
        for (count, what) in [
            (
                self.foreign,
                "not delivered: their place is taken by something mica did not write; see the log",
            ),
            (self.waiting, "not served yet, and tried again; see the log"),
            (self.removed, "removed, because their accounts are gone"),
        ] {
            if count > 0 {
                lines.push(format!("{count} {what}"));
            }
        }
        lines.push(String::new());
        let until = self.roots_not_after.map(moment).unwrap_or_default();
        lines.push(format!("Roots   {roots}, until {until}"));
        lines.push(format!("Health  http://{0}/readyz, metrics http://{0}/metrics", self.http));
        if let Some(grpc) = &self.grpc {
            lines.push(format!("gRPC    {grpc} (TLS)"));
        }
        if let Some(Identity { folder: Some(folder), .. }) = identities.first() {
            let program = std::env::args().next().unwrap_or_else(|| "mica".to_owned());
            lines.push(String::new());
            lines.push("In a second terminal:".to_owned());
            lines.push(format!("  {program} inspect {folder}"));
            lines.push(format!("  {program} verify {folder} --roots {roots}"));
            lines.push(format!("  openssl verify -CAfile {roots} -untrusted {folder}/cert-chain.pem \\"));
            lines.push(format!("    {folder}/cert-chain.pem"));
        }
        lines.push(String::new());
        lines.push(format!("Following {source}; Ctrl-C stops."));
        lines.push(String::new());
        lines.join("\n")
    }
}

/// Without the dot that the default has in front.
fn plain(path: &Path) -> String {
    path.strip_prefix("./").unwrap_or(path).display().to_string()
}

/// A time as people read it.
pub(super) fn moment(at: OffsetDateTime) -> String {
    at.format(format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z")).unwrap_or_default()
}
