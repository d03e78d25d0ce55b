//! `mica explain`: what would be answered to a request, and why.

use std::path::Path;

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Error, MAX_FILE, Report, connect, name_of, read};
use crate::client::ExplainResponse;
use crate::client::Wanted;
use crate::config::cli::{Connect, Explain};
use crate::core::caller::{Bound, Caller, Proof};
use crate::core::certificate::Certificate;
use crate::core::csr::CheckedCsr;
use crate::core::inspect::one_line;
use crate::core::lifetime::{Lifetime, shown};
use crate::core::policy::{self, Ask, Limits, Policy, Step};
use crate::core::refusal::{Reason, Refusal};
use crate::core::spiffe::{ServiceAccount, SpiffeId, TrustDomain};
use crate::core::token::Token;
use crate::core::token::jwks::KeySet;
use crate::sys::{clock, files};

pub(super) fn explain(arguments: &Explain) -> Result<Report, Error> {
    match (&arguments.roots, &arguments.data_dir) {
        (None, None) => here(arguments),
        _ => there(arguments),
    }
}

/// By the policy file, without a running authority.
fn here(arguments: &Explain) -> Result<Report, Error> {
    let now = arguments.at.unwrap_or_else(clock::now);
    let policy = policy_of(arguments)?;
    let csr = arguments.csr.as_deref().map(read).transpose()?;
    let mut steps = Vec::new();
    let (caller, domain) = match caller(arguments, &policy, now)? {
        Ok(known) => known,
        Err(refusal) => {
            steps.push(Step { name: "caller", verdict: Err(refusal) });
            return Ok(told(steps, None));
        }
    };
    let by = match &caller.proof {
        Proof::Token { .. } => "a token".to_owned(),
        Proof::Oidc { issuer } => format!("a token of {issuer}"),
        _ => "a certificate".to_owned(),
    };
    steps.push(Step { name: "caller", verdict: Ok(format!("{}, by {by}", caller.account)) });
    let impersonated = arguments.impersonate.as_ref().map(|id| named(id, Some(&domain))).transpose()?;
    let checked = csr.as_ref().map(|csr| CheckedCsr::from_pem(csr)).transpose();
    let (key, dns, uri) = match &checked {
        Ok(Some(csr)) => {
            let requested = csr.requested();
            (Some(csr.key().kind()), requested.dns.as_slice(), requested.uri.clone())
        }
        _ => (None, [].as_slice(), None),
    };
    if csr.is_some() {
        let sound = "its signature fits its key, and it asks for nothing that nobody may have".to_owned();
        steps.push(Step {
            name: "csr",
            verdict: checked.as_ref().map(|_| sound).map_err(|fault| fault.clone().into()),
        });
    }
    let ask = Ask {
        caller: &caller,
        impersonated: impersonated.as_ref(),
        key,
        dns,
        lifetime: arguments.lifetime,
        now,
    };
    steps.extend(policy.explain(&ask));
    let account = impersonated.as_ref().unwrap_or(&caller.account);
    let id = account.spiffe_id(&domain);
    let longest = policy.longest(account);
    let mut facts = json!({
        "identity": id.as_str(),
        "authenticator": caller.proof.name(),
        "longest_lifetime": longest.value.duration().as_secs(),
        "longest_lifetime_from": longest.origin.located(),
    });
    if let Ok(decision) = policy.decide(&ask) {
        facts["lifetime"] = decision.lifetime.value.duration().as_secs().into();
        facts["lifetime_from"] = decision.lifetime.origin.located().into();
        facts["spread"] = decision.spread.to_string().into();
        facts["dns_names"] = json!(decision.dns.iter().map(|name| name.as_str()).collect::<Vec<_>>());
        facts["dns_names_left_out"] =
            decision.left_out.iter().map(|(name, why)| json!({ "name": name, "why": why.name() })).collect();
        facts["renewable_until"] = json!(decision.renewable_until.map(rfc3339));
    }
    let head = policy.decide(&ask).ok().map(|decision| format!("{id}, for {}", decision.lifetime.value));
    let mut report = told(steps, Some((head.unwrap_or_else(|| id.to_string()), facts)));
    if let Some(uri) = uri.filter(|uri| *uri != id.as_str()) {
        let uri = one_line(&uri);
        report.notes.push(format!("the CSR names {uri}; what is issued names {id} all the same"));
    }
    if policy.token_review(&caller.account) && matches!(caller.proof, Proof::Token { .. }) {
        report.notes.push(format!(
            "whether the API server vouches for the token of {} is not known here",
            caller.account
        ));
    }
    Ok(report)
}

fn policy_of(arguments: &Explain) -> Result<Policy, Error> {
    let limits = Limits {
        lifetime: arguments.ttl,
        longest: arguments.max_ttl,
        own_names: arguments.dns_names.iter().map(ToString::to_string).collect(),
    };
    let Some(file) = &arguments.policy else {
        return Policy::new(&limits).map_err(|fault| Error::Usage(fault.to_string()));
    };
    let text = files::read_given(file, policy::MAX as u64)?;
    Policy::parse(&text, &limits)
        .map_err(|fault| Error::Usage(format!("the policy {}: {fault}", name_of(file))))
}

/// Who asks, as far as can be told here; a refusal if a running authority would not believe it either.
fn caller(
    arguments: &Explain,
    policy: &Policy,
    now: OffsetDateTime,
) -> Result<Result<(Caller, TrustDomain), Refusal>, Error> {
    if let Some(id) = &arguments.identity {
        let account = named(id, None)?;
        let caller = Caller { proof: by_token(policy, &account, Bound::default()), account };
        return Ok(Ok((caller, id.trust_domain().clone())));
    }
    if let Some(folder) = &arguments.certificate {
        return holder(folder, now);
    }
    let (Some(file), Some(keys)) = (&arguments.token_file, &arguments.token_jwks) else {
        return Err(Error::Usage(
            "nobody can tell whose the token is without its issuer's keys; give them with --token-jwks, or ask a running authority with --roots or --data-dir".to_owned(),
        ));
    };
    let text = read(keys)?;
    let keys = KeySet::from_json(&text)
        .map_err(|fault| Error::Usage(format!("the keys in {}: {fault}", name_of(keys))))?;
    let text = files::read_given(file, MAX_FILE)?;
    let text = std::str::from_utf8(text.trim_ascii())
        .map_err(|_| Error::Usage(format!("{} holds no token: it is not text", name_of(file))))?;
    Ok(of_token(arguments, policy, text, &keys, now).map(|caller| (caller, arguments.trust_domain.clone())))
}

/// By a token that counts: if the API server is to vouch for it, as if it did.
fn by_token(policy: &Policy, account: &ServiceAccount, bound: Bound) -> Proof {
    Proof::Token { reviewed: policy.token_review(account), bound: bound.into() }
}

fn of_token(
    arguments: &Explain,
    policy: &Policy,
    text: &str,
    keys: &KeySet,
    now: OffsetDateTime,
) -> Result<Caller, Refusal> {
    let token = Token::read(text)?;
    let issuer = token.issuer()?.to_owned();
    if arguments.token_issuer.as_ref() == Some(&issuer) {
        let claims = keys.verify(token)?;
        claims.check(&arguments.token_audience, now)?;
        let subject = claims.service_account()?;
        let proof = by_token(policy, &subject.account, subject.bound);
        return Ok(Caller { account: subject.account, proof });
    }
    let Some(known) = policy.oidc().iter().find(|known| known.issuer == issuer) else {
        let issuer = one_line(&issuer);
        let sentence = format!(
            "the token is of the issuer {issuer:?}, which neither --token-issuer nor the policy names"
        );
        return Err(Refusal::new(Reason::TokenIssuer, sentence));
    };
    let claims = keys.verify(token)?;
    claims.check(&known.audience, now)?;
    let subject = claims.subject()?;
    let account = known.account(subject).cloned().ok_or_else(|| {
        let sentence = format!("no account is set up for the token's subject {:?}", one_line(subject));
        Refusal::new(Reason::TokenSubject, sentence)
    })?;
    Ok(Caller { account, proof: Proof::Oidc { issuer: issuer.into() } })
}

/// Who renews a certificate. Whether it leads to a root is what `mica verify` is for.
fn holder(folder: &Path, now: OffsetDateTime) -> Result<Result<(Caller, TrustDomain), Refusal>, Error> {
    const CHAIN: &str = "cert-chain.pem";
    let name = name_of(&folder.join(CHAIN));
    let found = files::read_named(folder, &[CHAIN], MAX_FILE)?;
    let text = found.get(CHAIN).ok_or_else(|| Error::Usage(format!("{name} is not there")))?;
    let chain =
        Certificate::all_from_pem(text).map_err(|fault| Error::Certificates { name: name.clone(), fault })?;
    let leaf = chain.first().ok_or_else(|| Error::Usage(format!("{name} holds no certificate")))?;
    let id = leaf.spiffe_id().map_err(|fault| Error::Usage(format!("{name}: {fault}")))?;
    if now > leaf.validity.not_after {
        let sentence = format!("the certificate of {id} expired at {}", shown(leaf.validity.not_after));
        return Ok(Err(Refusal::new(Reason::CertificateExpired, sentence)));
    }
    let proved_at = leaf.proved_at.unwrap_or_else(|| leaf.validity.issued_at());
    let caller = Caller { account: named(&id, None)?, proof: Proof::Certificate { proved_at } };
    Ok(Ok((caller, id.trust_domain().clone())))
}

/// The account that an identity names.
fn named(id: &SpiffeId, domain: Option<&TrustDomain>) -> Result<ServiceAccount, Error> {
    if let Some(domain) = domain.filter(|domain| *domain != id.trust_domain()) {
        return Err(Error::Usage(format!("{id} is not of the caller's trust domain {domain}")));
    }
    ServiceAccount::of(id).ok_or_else(|| {
        Error::Usage(format!(
            "{id} names no service account; write spiffe://{}/ns/<namespace>/sa/<account>",
            id.trust_domain()
        ))
    })
}

/// Verdict, steps and facts.
fn told(steps: Vec<Step>, about: Option<(String, Value)>) -> Report {
    let refusal = steps.iter().find_map(|step| step.verdict.as_ref().err());
    let good = refusal.is_none();
    let (head, facts) = about.unwrap_or_else(|| ("whoever asks would not be believed".to_owned(), json!({})));
    let mut text = format!("{}: {head}\n", if good { "granted" } else { "denied" });
    for Step { name, verdict } in &steps {
        match verdict {
            Ok(answer) => text.push_str(&format!("  ok  {name:<9} {}\n", one_line(answer))),
            Err(refusal) => {
                let detail = refusal.detail.as_ref().map(|detail| format!(" ({detail})")).unwrap_or_default();
                let line = format!("{}: {}{detail}", refusal.reason.name(), refusal.sentence);
                text.push_str(&format!("  no  {name:<9} {}\n", one_line(&line)));
            }
        }
    }
    let mut json = json!({
        "granted": good,
        "reason": refusal.map(|refusal| refusal.reason.name()),
        "sentence": refusal.map(|refusal| &refusal.sentence),
        "steps": steps.iter().map(|Step { name, verdict }| match verdict {
            Ok(answer) => json!({ "step": name, "ok": true, "answer": answer }),
            Err(refusal) => json!({
                "step": name,
                "ok": false,
                "reason": refusal.reason.name(),
                "sentence": refusal.sentence,
                "detail": refusal.detail,
            }),
        }).collect::<Vec<_>>(),
    });
    if let (Value::Object(all), Value::Object(facts)) = (&mut json, facts) {
        all.extend(facts);
    }
    Report { good, ..Report::new(text, json) }
}

/// By a running authority.
fn there(arguments: &Explain) -> Result<Report, Error> {
    let csr = match &arguments.csr {
        Some(file) => String::from_utf8(read(file)?.to_vec())
            .map_err(|_| Error::Usage(format!("{} holds no CSR: it is not text", name_of(file))))?,
        None => String::new(),
    };
    let wanted = Wanted {
        csr,
        lifetime: arguments.lifetime,
        impersonated: arguments.impersonate.clone(),
        exact: false,
        trace: None,
    };
    let (target, _) = connect::target(&Connect {
        address: arguments.address.clone(),
        roots: arguments.roots.clone(),
        data_dir: arguments.data_dir.clone(),
        name: arguments.name.clone(),
        token_file: arguments.token_file.clone(),
        certificate: arguments.certificate.clone(),
    })?;
    let answer = connect::with(target, async |client| client.explain(&wanted).await)?;
    Ok(answered(&answer))
}

fn answered(answer: &ExplainResponse) -> Report {
    let seconds = |seconds: i64| Lifetime::from_secs(u64::try_from(seconds).unwrap_or(0));
    let until =
        answer.renewable_until.as_ref().and_then(|at| OffsetDateTime::from_unix_timestamp(at.seconds).ok());
    let head = if answer.granted { "granted" } else { "denied" };
    let mut text = format!("{head}: {}\n", one_line(&answer.identity));
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            text.push_str(&format!("  {name:<13} {}\n", one_line(&value)));
        }
    };
    if !answer.granted {
        line("why", format!("{}: {}", answer.reason, answer.sentence));
    }
    line("authenticator", answer.authenticator.clone());
    let lifetime = |value: i64, from: &str| match value {
        0 => String::new(),
        value => format!("{} ({from})", seconds(value)),
    };
    line("lifetime", lifetime(answer.lifetime, &answer.lifetime_from));
    line("longest", lifetime(answer.longest_lifetime, &answer.longest_lifetime_from));
    line("dns", answer.dns_names.join(", "));
    line(
        "renewable",
        until.map(|at| format!("by certificate alone until {}", shown(at))).unwrap_or_default(),
    );
    let told = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let some = |value: i64| (value > 0).then_some(value);
    let json = json!({
        "granted": answer.granted,
        "reason": told(&answer.reason),
        "sentence": told(&answer.sentence),
        "identity": told(&answer.identity),
        "authenticator": told(&answer.authenticator),
        "lifetime": some(answer.lifetime),
        "lifetime_from": told(&answer.lifetime_from),
        "longest_lifetime": some(answer.longest_lifetime),
        "longest_lifetime_from": told(&answer.longest_lifetime_from),
        "dns_names": answer.dns_names,
        "renewable_until": until.map(rfc3339),
    });
    Report { good: answer.granted, ..Report::new(text, json) }
}

fn rfc3339(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests write the files that the command reads")]
mod tests {
    use std::fs;

    use clap::Parser as _;

    use super::*;
    use crate::config::cli::{Cli, Command};
    use crate::core::key::IssuerKey as _;
    use crate::core::token::trial;
    use crate::sys::keys;

    fn explained(line: &[&str]) -> Result<Report, Error> {
        let cli = Cli::parse_from(["mica", "explain"].iter().chain(line));
        let Command::Explain(arguments) = cli.command else { panic!("{line:?}") };
        explain(&arguments)
    }

    #[test]
    fn a_token_is_judged_by_the_keys_of_its_issuer() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let key = keys::generate(trial::KEY_KIND).unwrap().signing().unwrap();
        let account = ServiceAccount::new("payments", "ledger").unwrap();
        let day = "24h".parse().unwrap();
        let token = trial::token(&key, &account, "istio-ca", clock::now(), day, [0; 16]).unwrap();
        fs::write(path("token"), format!("{token}\n")).unwrap();
        fs::write(path("keys"), trial::jwks(key.public())).unwrap();
        let subject = "system:serviceaccount:payments:ledger";
        let policy = format!(
            "accounts: {{payments/ledger: {{lifetime: 10m}}, ci/deploy: {{lifetime: 20m}}}}\noidc: [{{issuer: '{}', audience: istio-ca, accounts: [{{subject: '{subject}', account: ci/deploy}}]}}]\n",
            trial::ISSUER
        );
        fs::write(path("policy"), policy).unwrap();
        let (token, keys, policy) = (path("token"), path("keys"), path("policy"));
        let base = ["--policy", &policy, "--token-file", &token, "--token-jwks", &keys];

        let report = explained(&[&base[..], &["--token-issuer", trial::ISSUER]].concat()).unwrap();
        assert!(report.good, "{}", report.text);
        assert_eq!(report.json["identity"], "spiffe://cluster.local/ns/payments/sa/ledger");
        assert_eq!((&report.json["lifetime"], &report.json["authenticator"]), (&json!(600), &json!("token")));

        // The same token, of an issuer that the policy names.
        let report = explained(&[&base[..], &["--trust-domain", "example.org"]].concat()).unwrap();
        assert_eq!(report.json["identity"], "spiffe://example.org/ns/ci/sa/deploy");
        assert_eq!(
            (&report.json["lifetime"], &report.json["authenticator"]),
            (&json!(1_200), &json!("oidc"))
        );

        let denied = |more: &[&str]| {
            let report = explained(&[&base[2..], more].concat()).unwrap();
            assert!(!report.good && report.text.starts_with("denied: "), "{}", report.text);
            report.json["reason"].as_str().unwrap().to_owned()
        };
        assert_eq!(denied(&[]), "TOKEN_ISSUER");
        assert_eq!(denied(&["--token-issuer", "https://other"]), "TOKEN_ISSUER");
        let issuer = ["--token-issuer", trial::ISSUER];
        assert_eq!(denied(&[&issuer[..], &["--token-audience", "other"]].concat()), "TOKEN_AUDIENCE");
        assert_eq!(denied(&[&issuer[..], &["--at", "2099-01-01T00:00:00Z"]].concat()), "TOKEN_EXPIRED");
        let other = keys::generate(trial::KEY_KIND).unwrap();
        fs::write(&keys, trial::jwks(other.public())).unwrap();
        assert_eq!(denied(&issuer), "TOKEN_KEY_UNKNOWN");
        fs::write(&token, "a.b").unwrap();
        assert_eq!(denied(&issuer), "TOKEN_MALFORMED");
        fs::write(&keys, "{}").unwrap();
        assert!(matches!(explained(&[&base[..], &issuer].concat()), Err(Error::Usage(_))));
    }

    #[test]
    fn a_bad_csr_is_denied_for_what_is_wrong_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("csr.pem");
        fs::write(&path, "none").unwrap();
        let id = "spiffe://cluster.local/ns/a/sa/b";
        let report = explained(&["--identity", id, "--csr", path.to_str().unwrap()]).unwrap();
        assert_eq!((report.good, &report.json["reason"]), (false, &json!("CSR_MALFORMED")));
    }

    #[test]
    fn an_answer_is_shown_with_all_that_it_says() {
        let answer = ExplainResponse {
            granted: true,
            identity: "spiffe://cluster.local/ns/a/sa/b".to_owned(),
            authenticator: "certificate".to_owned(),
            lifetime: 3_600,
            lifetime_from: "the policy".to_owned(),
            longest_lifetime: 7_200,
            longest_lifetime_from: "--max-ttl".to_owned(),
            dns_names: vec!["b.a.svc".to_owned()],
            renewable_until: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 0 }),
            ..ExplainResponse::default()
        };
        let report = answered(&answer);
        assert!(report.good);
        assert_eq!(
            report.text,
            "granted: spiffe://cluster.local/ns/a/sa/b\n  authenticator certificate\n  lifetime      1h (the policy)\n  longest       2h (--max-ttl)\n  dns           b.a.svc\n  renewable     by certificate alone until 2027-01-15 08:00:00 UTC\n"
        );
        assert_eq!(report.json["renewable_until"], "2027-01-15T08:00:00Z");
        let denied = ExplainResponse {
            reason: "A".to_owned(),
            sentence: "b".to_owned(),
            ..ExplainResponse::default()
        };
        let report = answered(&denied);
        assert!(!report.good && report.text.contains("why           A: b\n"), "{}", report.text);
    }
}
