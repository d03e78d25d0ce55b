//! `mica csr request`.

use serde_json::json;

use super::{Error, Report, connect, made, name_of, read};
use crate::client::{Credential, Wanted};
use crate::config::cli::CsrRequest;
use crate::core::certificate::Certificate;
use crate::core::csr::{CheckedCsr, nameless};
use crate::core::granted::Granted;
use crate::core::inspect::{distance, one_line};
use crate::core::key::{PrivateKey, PublicKey};
use crate::core::pem;
use crate::core::spiffe::SpiffeId;
use crate::sys::{clock, files, keys};

const CHAIN: &str = "cert-chain.pem";
const KEY: &str = "key.pem";
const ROOTS: &str = "root-cert.pem";

pub(super) fn request(arguments: &CsrRequest) -> Result<Report, Error> {
    let CsrRequest { connect, out, ttl, identity, impersonate, .. } = arguments;
    let asked = Asked::new(arguments)?;
    // A certificate that has no place to go is better not issued.
    files::has_room(out, if asked.key.is_some() { &[KEY, ROOTS, CHAIN] } else { &[ROOTS, CHAIN] })?;
    let (target, roots_name) = connect::target(connect)?;
    let expected = match (&target.credential, identity.as_ref().or(impersonate.as_ref())) {
        (_, Some(named)) => Some(named.clone()),
        (Credential::Certificate(folder), None) => holder(folder)?,
        _ => None,
    };
    let (address, known) = (target.address.to_string(), target.roots.clone());
    let wanted = Wanted {
        csr: asked.csr.clone(),
        lifetime: *ttl,
        impersonated: impersonate.clone(),
        exact: arguments.exact_lifetime,
        trace: None,
    };
    let answer = connect::with(target, async |client| client.create_certificate(&wanted).await)?;
    let now = clock::now();
    let granted = Granted::checked(&answer, &asked.public, expected.as_ref(), None, now)
        .map_err(|fault| Error::Answer { address, fault: fault.to_string() })?;

    let (chain_pem, roots_pem) = (granted.chain_pem(), granted.bundle.pem().clone());
    let key_pem = asked.key.as_ref().map(PrivateKey::to_pem);
    let mut set: Vec<(&str, &[u8], u32)> = Vec::new();
    set.extend(key_pem.as_ref().map(|pem| (KEY, pem.as_bytes(), 0o600)));
    set.push((ROOTS, roots_pem.as_bytes(), 0o644));
    set.push((CHAIN, chain_pem.as_bytes(), 0o644));
    files::add_to(out, &set)?;

    let leaf = &granted.chain[0];
    let (facts, described) = made(leaf, now);
    let names: Vec<&str> = set.iter().map(|(name, ..)| *name).collect();
    let same = granted.bundle.same_roots(&known);
    let json = json!({
        "granted": true,
        "folder": out,
        "files": names,
        "intermediates": granted.chain.len() - 1,
        "same_roots": same,
        "certificate": described,
    });
    let text = format!("granted, in {} ({})\n{facts}", name_of(out), names.join(", "));
    let mut report = Report::new(text, json);
    if !same {
        report.notes.push(format!(
            "the authority's trust bundle, now in {}, differs from {roots_name}; keep the newer one",
            name_of(&out.join(ROOTS))
        ));
    }
    if let Some(uri) = asked.uri.filter(|uri| *uri != granted.id.as_str()) {
        report.notes.push(format!("the CSR asked for {}, which was not given", one_line(&uri)));
    }
    let given = (leaf.validity.not_after - now).whole_seconds();
    if let Some(ttl) = ttl
        // Full seconds, and a clock that is not quite the authority's.
        && given + 5 < i64::try_from(ttl.duration().as_secs()).unwrap_or(i64::MAX)
    {
        let how = match arguments.exact_lifetime {
            true => "the authority's own certificate ends then",
            false => {
                "to spread renewals, or because the authority's own certificate ends then; --exact-lifetime forbids the first"
            }
        };
        report.notes.push(format!("{ttl} was asked for, {} was given: {how}", distance(given)));
    }
    Ok(report)
}

/// What is sent, and who holds its key.
struct Asked {
    csr: String,
    public: PublicKey,
    /// Of a new key alone.
    key: Option<PrivateKey>,
    /// Whom a CSR made elsewhere asks for.
    uri: Option<String>,
}

impl Asked {
    fn new(arguments: &CsrRequest) -> Result<Self, Error> {
        let Some(path) = &arguments.csr else {
            let key = keys::generate(arguments.key_kind.into())?;
            let csr = pem::encode(pem::CSR, &nameless(&key.signing()?)?);
            return Ok(Self { csr, public: key.public().clone(), key: Some(key), uri: None });
        };
        let text = read(path)?;
        let failed = |fault| Error::Csr { name: name_of(path), fault };
        let checked = CheckedCsr::from_pem(&text).map_err(failed)?;
        // Without the text that may stand around it, which the authority need not see.
        let blocks = pem::blocks(&text).map_err(|fault| failed(fault.into()))?;
        let csr = blocks.first().map(|block| pem::encode(pem::CSR, &block.der)).unwrap_or_default();
        Ok(Self { csr, public: checked.key().clone(), key: None, uri: checked.requested().uri.clone() })
    }
}

/// Whose a certificate is.
fn holder(folder: &std::path::Path) -> Result<Option<SpiffeId>, Error> {
    let found = files::read_named(folder, &[CHAIN], super::MAX_FILE)?;
    let chain = found.get(CHAIN).and_then(|text| Certificate::all_from_pem(text).ok()).unwrap_or_default();
    Ok(chain.first().and_then(|leaf| leaf.spiffe_id().ok()))
}
