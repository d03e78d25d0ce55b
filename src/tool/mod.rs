//! The tools: most make, read and judge offline; some ask a running authority. Each command is one function from what was
//! typed to a [`Report`].

mod bench;
mod bundle;
mod connect;
mod csr;
mod explain;
mod inject;
mod inspect;
mod intermediate;
mod reference;
mod request;
mod root;
mod sign;
mod token;
mod verify;

use std::path::Path;

use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::client;
use crate::config::cli::{
    BundleCommand, Command, CsrCommand, IntermediateCommand, RootCommand, TokenCommand,
};
use crate::core::bundle::{self as core_bundle, TrustBundle};
use crate::core::certificate::Certificate;
use crate::core::inspect::{distance, one_line};
use crate::core::issuer;
use crate::core::key::PrivateKey;
use crate::core::lifetime::shown;
use crate::core::spiffe::TrustDomain;
use crate::core::{authority_files, certificate, csr as core_csr, inject as core_inject, key, pem, profile};
use crate::sys::{files, keys};

/// The most that is read of a file.
const MAX_FILE: u64 = pem::MAX as u64;

/// What a command has to say.
pub struct Report {
    /// For people.
    pub text: String,
    /// For machines.
    pub json: Value,
    /// What a user should know besides the result; one line each, for standard error.
    pub notes: Vec<String>,
    /// False if the answer is no.
    pub good: bool,
    /// Why an authority said no; one line, for standard error.
    pub denial: Option<String>,
}

impl Report {
    fn new(text: String, json: Value) -> Self {
        Self { text, json, notes: Vec::new(), good: true, denial: None }
    }

    /// What an authority said in place of an answer.
    fn denied(fault: &client::Error, denial: &client::Denial) -> Self {
        let json = json!({
            "granted": false,
            "code": denial.code_name(),
            "reason": denial.reason,
            "sentence": denial.sentence,
        });
        let denial = Some(fault.to_string());
        Self { good: false, denial, ..Self::new(String::new(), json) }
    }
}

/// Why a command did nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error(transparent)]
    File(#[from] files::Error),
    /// No key or serial number was made.
    #[error(transparent)]
    Make(#[from] keys::Error),
    /// A key.
    #[error(transparent)]
    Key(#[from] key::Error),
    /// Nothing was issued.
    #[error("{folder}: {fault}")]
    Issue {
        /// The folder of the CA.
        folder: String,
        /// Why not.
        fault: issuer::Error,
    },
    /// A new certificate that is not right.
    #[error(transparent)]
    Mint(#[from] issuer::Error),
    /// A CSR.
    #[error("{name}: {fault}")]
    Csr {
        /// Which.
        name: String,
        /// What is wrong with it.
        fault: core_csr::Error,
    },
    /// A CSR of our own.
    #[error(transparent)]
    MakeCsr(#[from] core_csr::Error),
    /// A CA's folder.
    #[error("{folder}: {fault}")]
    Authority {
        /// Which.
        folder: String,
        /// What is wrong with it.
        fault: authority_files::Error,
    },
    /// A private key's file.
    #[error("{name}: {fault}")]
    PrivateKey {
        /// Which.
        name: String,
        /// What is wrong with it.
        fault: key::Error,
    },
    /// A file of certificates.
    #[error("{name}: {fault}")]
    Certificates {
        /// Which.
        name: String,
        /// What is wrong with it.
        fault: certificate::Error,
    },
    /// A trust bundle.
    #[error("{name}: {fault}")]
    Bundle {
        /// Which.
        name: String,
        /// What is wrong with it.
        fault: core_bundle::Error,
    },
    /// Manifests that nothing can be put into.
    #[error("{name}: {fault}")]
    Inject {
        /// Which.
        name: String,
        /// Why not.
        fault: core_inject::Error,
    },
    /// A running authority.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// What a running authority answered is not right.
    #[error("what {address} answered is not right, and nothing was written: {fault}")]
    Answer {
        /// Who answered.
        address: String,
        /// What is wrong with it.
        fault: String,
    },
    /// The system did not let us wait for an answer.
    #[error("cannot wait for answers from the network: {0}")]
    Runtime(std::io::Error),
    /// Something that cannot be looked at.
    #[error(transparent)]
    Inspect(#[from] crate::core::inspect::Error),
    /// An O that does not fit.
    #[error("{0}; give another with --organization")]
    Organization(#[from] profile::OrganizationError),
    /// No trial issuer.
    #[error(transparent)]
    Trial(#[from] crate::auth::trial::Error),
    /// What was asked for does not go together.
    #[error("{0}")]
    Usage(String),
}

impl Error {
    /// Whether the answer is no: something was asked for, came back, and was found wanting.
    pub fn is_no(&self) -> bool {
        matches!(self, Self::Answer { .. })
    }

    /// Whether the fault is Mica's own, and no input's.
    pub fn is_ours(&self) -> bool {
        match self {
            Self::Issue { fault, .. } | Self::Mint(fault) => {
                matches!(fault, issuer::Error::Check(_) | issuer::Error::Read(_))
            }
            Self::Make(fault) => !matches!(fault, keys::Error::Rsa(_)),
            Self::MakeCsr(_) => true,
            _ => false,
        }
    }
}

/// Runs a command; `None` for one that is no tool.
pub fn run(command: Command) -> Option<Result<Report, Error>> {
    let done = match command {
        Command::Serve(_) | Command::Agent(_) | Command::IstioCa(_) => return None,
        Command::Root(RootCommand::New(arguments)) => root::new(&arguments),
        Command::Intermediate(IntermediateCommand::New(arguments)) => intermediate::new(&arguments),
        Command::Csr(CsrCommand::New(arguments)) => csr::new(&arguments),
        Command::Token(TokenCommand::New(arguments)) => token::new(&arguments),
        Command::Csr(CsrCommand::Request(arguments)) => request::request(&arguments),
        Command::Explain(arguments) => explain::explain(&arguments),
        Command::Bench(arguments) => bench::bench(&arguments),
        Command::Inject(arguments) => inject::inject(&arguments),
        Command::Sign(arguments) => sign::sign(&arguments),
        Command::Inspect(arguments) => inspect::inspect(&arguments),
        Command::Verify(arguments) => verify::verify(&arguments),
        Command::Bundle(BundleCommand::Merge(arguments)) => bundle::merge(&arguments),
        Command::Bundle(BundleCommand::Convert(arguments)) => bundle::convert(&arguments),
        Command::Bundle(BundleCommand::List(arguments)) => bundle::list(&arguments),
        Command::Completions(arguments) => Ok(reference::completions(&arguments)),
        Command::Man(arguments) => reference::man(&arguments),
    };
    Some(match done {
        Err(Error::Client(fault)) => match fault.denial() {
            Some(denial) => Ok(Report::denied(&fault, denial)),
            None => Err(fault.into()),
        },
        done => done,
    })
}

/// What to call a path in messages.
fn name_of(path: &Path) -> String {
    if path == Path::new("-") { "standard input".to_owned() } else { one_line(&path.display().to_string()) }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    Ok(files::read_given(path, MAX_FILE)?)
}

/// Standard input can be read once.
fn one_standard_input<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<(), Error> {
    if paths.into_iter().filter(|path| *path == Path::new("-")).count() > 1 {
        return Err(Error::Usage(
            "standard input (-) is named twice, and can be read once; name a file instead".to_owned(),
        ));
    }
    Ok(())
}

/// The passphrase in a file, if one was named.
fn passphrase(path: Option<&Path>) -> Result<Option<Zeroizing<Vec<u8>>>, Error> {
    Ok(path.map(files::read_passphrase).transpose()?)
}

/// A private key as PEM, protected if there is a passphrase.
fn key_pem(key: &PrivateKey, passphrase: Option<&[u8]>) -> Result<Zeroizing<String>, Error> {
    match passphrase {
        None => Ok(key.to_pem()),
        Some(passphrase) => {
            let (salt, iv) = (keys::random_bytes()?, keys::random_bytes()?);
            Ok(Zeroizing::new(key.to_encrypted_pem(passphrase, salt, iv)?))
        }
    }
}

/// The files of an authority that stand in a folder.
fn authority(folder: &Path) -> Result<std::collections::BTreeMap<String, Zeroizing<Vec<u8>>>, Error> {
    Ok(files::read_named(folder, &authority_files::NAMES, MAX_FILE)?)
}

/// The trust domain that the CA in a folder says it is of. What is wrong with it is found out later.
fn trust_domain_of(files: &std::collections::BTreeMap<String, Zeroizing<Vec<u8>>>) -> Option<TrustDomain> {
    let text = files.get(authority_files::CA_CERT).or_else(|| files.get("tls.crt"))?;
    let certificates = Certificate::all_from_pem(text).ok()?;
    Some(certificates.first()?.spiffe_id().ok()?.trust_domain().clone())
}

/// A trust bundle in either form; of a map the named one.
fn bundle_from(path: &Path, bytes: &[u8], trust_domain: Option<&TrustDomain>) -> Result<TrustBundle, Error> {
    let name = name_of(path);
    let failed = |fault| Error::Bundle { name: name.clone(), fault };
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return TrustBundle::from_pem(bytes).map_err(failed);
    }
    let is_map = serde_json::from_slice::<Value>(bytes).is_ok_and(|v| v.get("trust_domains").is_some());
    if !is_map {
        return TrustBundle::from_json(bytes).map_err(failed);
    }
    let mut map = core_bundle::map_from_json(bytes).map_err(failed)?;
    let named: Vec<String> = map.keys().map(ToString::to_string).collect();
    match trust_domain {
        Some(domain) => map.remove(domain).ok_or_else(|| {
            Error::Usage(format!("{name} holds no bundle of {domain}; it holds {}", named.join(", ")))
        }),
        None => Err(Error::Usage(format!(
            "{name} holds the bundles of several trust domains; choose one with --trust-domain: {}",
            named.join(", ")
        ))),
    }
}

/// What is said of a certificate that was just made.
fn made(certificate: &Certificate, now: time::OffsetDateTime) -> (String, Value) {
    let not_after = certificate.validity.not_after;
    let left = distance((not_after - now).whole_seconds());
    let key = certificate.key().map(|key| key.kind().to_string()).unwrap_or_default();
    let mut text = String::new();
    for (label, value) in [
        ("identity", certificate.uris.join(", ")),
        ("dns", certificate.dns.join(", ")),
        ("subject", certificate.subject_text()),
        ("key", key.clone()),
        ("valid until", format!("{} (for {left})", shown(not_after))),
        ("serial", certificate.serial_text()),
        ("fingerprint", format!("sha256 {}", certificate.fingerprint())),
    ] {
        if !value.is_empty() {
            text.push_str(&format!("  {label:<12} {}\n", one_line(&value)));
        }
    }
    let rfc3339 = |at: time::OffsetDateTime| {
        at.format(&time::format_description::well_known::Rfc3339).unwrap_or_default()
    };
    let json = json!({
        "spiffe_id": certificate.uris.first(),
        "dns": certificate.dns,
        "subject": certificate.subject_text(),
        "issuer": certificate.issuer_text(),
        "key": key,
        "serial": certificate.serial_text(),
        "not_before": rfc3339(certificate.validity.not_before),
        "not_after": rfc3339(not_after),
        "sha256": certificate.fingerprint(),
    });
    (text, json)
}
