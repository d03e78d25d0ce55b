//! Who may have which certificate: one pure function of what a policy says and of what is asked.
//!
//! Every setting is looked up by itself, the most specific first: the account's, its namespace's, the policy's own, the
//! flag's. Nothing that is asked for is silently made smaller: it is granted, or refused with what may be had. The one
//! exception is DNS names, which old clients ask for without needing them; those not granted are left out and told.

mod dns;
mod file;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use serde_saphyr::Spanned;
use time::OffsetDateTime;

use super::calendar::Spread;
use super::caller::{Caller, Proof};
use super::jwt_svid;
use super::key::KeyKind;
use super::lifetime::{Lifetime, shown};
use super::profile::DnsName;
use super::refusal::{Reason, Refusal};
use super::spiffe::{ServiceAccount, SpiffeId, shortened};
use super::url::Url;
use dns::Pattern;
use file::File;

pub use file::{Error, MAX};

/// Shorter ones would be renewed more often than once in five seconds.
pub const SHORTEST: Lifetime = Lifetime::from_secs(10);
/// How long certificates are renewed without another proof, unless a policy says otherwise.
pub const RENEWAL: Lifetime = Lifetime::from_secs(30 * 86_400);
/// No more DNS names than these are looked at.
pub const MAX_DNS: usize = 64;

const KINDS: [KeyKind; 6] =
    [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa2048, KeyKind::Rsa3072, KeyKind::Rsa4096];

/// What counts where a policy says nothing.
#[derive(Clone, Debug)]
pub struct Limits {
    /// `--ttl`.
    pub lifetime: Lifetime,
    /// `--max-ttl`.
    pub longest: Lifetime,
    /// The names and addresses that Mica itself is reached by (`--dns-names`): no workload ever gets one.
    pub own_names: Vec<String>,
}

/// A value, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Of<T> {
    /// The value.
    pub value: T,
    /// Who says so.
    pub origin: Origin,
}

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The request.
    Asked,
    /// Nobody: what Mica does unless told otherwise.
    BuiltIn,
    /// A flag of `mica serve`.
    Flag(&'static str),
    /// The policy file.
    Policy {
        /// For whom.
        scope: Scope,
        /// In which line.
        line: usize,
    },
}

/// For whom a rule of a policy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All that nothing more specific is said of.
    All,
    /// The accounts of a namespace.
    Namespace(Arc<str>),
    /// One account.
    Account(ServiceAccount),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Asked => f.write_str("the request"),
            Self::BuiltIn => f.write_str("the default"),
            Self::Flag(flag) => f.write_str(flag),
            Self::Policy { scope: Scope::All, .. } => f.write_str("the policy"),
            Self::Policy { scope: Scope::Namespace(name), .. } => write!(f, "the policy of namespace {name}"),
            Self::Policy { scope: Scope::Account(account), .. } => {
                write!(f, "the policy of account {account}")
            }
        }
    }
}

impl Origin {
    /// With the line of the file, for those who may read it.
    pub fn located(&self) -> String {
        match self {
            Self::Policy { line, .. } => format!("{self}, line {line}"),
            _ => self.to_string(),
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Who asks.
    pub caller: &'a Caller,
    /// For whom, if not for itself.
    pub impersonated: Option<&'a ServiceAccount>,
    /// The kind of the key; none to leave it out of the question.
    pub key: Option<KeyKind>,
    /// The DNS names in the CSR.
    pub dns: &'a [String],
    /// The lifetime; none asks for the default.
    pub lifetime: Option<Lifetime>,
    /// The time.
    pub now: OffsetDateTime,
}

/// What is granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whom the certificate names.
    pub account: ServiceAccount,
    /// How long it is valid, before it is shortened for an even load.
    pub lifetime: Of<Lifetime>,
    /// The most that could have been asked for.
    pub longest: Of<Lifetime>,
    /// By how much it may be shortened for an even load.
    pub spread: Spread,
    /// The DNS names that it gets.
    pub dns: Vec<DnsName>,
    /// Those that it was asked for and does not get, and why.
    pub left_out: Vec<(String, LeftOut)>,
    /// When certificates alone no longer are enough for a renewal; none for callers with another proof.
    pub renewable_until: Option<OffsetDateTime>,
}

/// What an account asks for beside its identity, in its annotations. Whoever may write its namespace has written them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// The lifetime.
    pub ttl: Option<String>,
    /// The kind of the key.
    pub key_kind: Option<String>,
    /// DNS names, with commas in between.
    pub dns_names: Option<String>,
}

/// What is delivered to an account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// How long it is valid.
    pub lifetime: Lifetime,
    /// The kind of its key, and whether the account has asked for it.
    pub key: (KeyKind, bool),
    /// The DNS names that it has.
    pub dns: Vec<DnsName>,
    /// What the account has asked for and does not get, and why, in words.
    pub refused: Vec<String>,
}

/// Why a DNS name is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeftOut {
    /// No pattern grants it.
    NotGranted,
    /// Mica itself is reached by it.
    Own,
    /// It is no plain DNS name.
    Malformed,
    /// There are too many.
    TooMany,
}

impl LeftOut {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::NotGranted, Self::Own, Self::Malformed, Self::TooMany];

    /// Its label.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotGranted => "not_granted",
            Self::Own => "own",
            Self::Malformed => "malformed",
            Self::TooMany => "too_many",
        }
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotGranted => f.write_str("no pattern of the policy grants it"),
            Self::Own => f.write_str("it is a name of mica's own (--dns-names)"),
            Self::Malformed => f.write_str("it is no DNS name without wildcards"),
            Self::TooMany => write!(f, "it comes after the first {MAX_DNS}"),
        }
    }
}

/// One question on the way to a decision, and its answer.
#[derive(Clone, Debug)]
pub struct Step {
    /// What was asked, in a word or two.
    pub name: &'static str,
    /// The answer.
    pub verdict: Result<String, Refusal>,
}

/// Tokens of another issuer that stand for accounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcIssuer {
    /// The `iss` of its tokens.
    pub issuer: String,
    /// A file or URL with its keys; by discovery if there is none.
    pub jwks: Option<String>,
    /// The `aud` that its tokens must have.
    pub audience: String,
    accounts: HashMap<String, ServiceAccount>,
}

impl OidcIssuer {
    /// The account that a subject stands for.
    pub fn account(&self, subject: &str) -> Option<&ServiceAccount> {
        self.accounts.get(subject)
    }
}

/// What everybody may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    all: Rules,
    namespaces: HashMap<Arc<str>, Rules>,
    accounts: HashMap<ServiceAccount, Rules>,
    impersonators: Vec<ServiceAccount>,
    forwarders: HashSet<SpiffeId>,
    oidc: Vec<OidcIssuer>,
    /// In lower case.
    own_names: HashSet<String>,
}

/// What counts for an account, looked up once when the policy is read.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rules {
    lifetime: Of<Lifetime>,
    longest: Of<Lifetime>,
    renewal: Of<Lifetime>,
    spread: Of<Spread>,
    keys: Of<Arc<[KeyKind]>>,
    dns: Of<Arc<[Pattern]>>,
    deny: Of<bool>,
    token_review: Of<bool>,
    jwt: Of<bool>,
    jwt_lifetime: Of<Lifetime>,
}

impl Policy {
    /// Without a file: every account may have its own identity, and no DNS name.
    pub fn new(limits: &Limits) -> Result<Self, Error> {
        Self::of(File::default(), limits)
    }

    /// From a file, as `docs/policy.md` has it.
    pub fn parse(text: &[u8], limits: &Limits) -> Result<Self, Error> {
        Self::of(File::read(text)?, limits)
    }

    fn of(mut file: File, limits: &Limits) -> Result<Self, Error> {
        let unsaid = Rules {
            lifetime: Of { value: limits.lifetime, origin: Origin::Flag("--ttl") },
            longest: Of { value: limits.longest, origin: Origin::Flag("--max-ttl") },
            renewal: Of { value: RENEWAL, origin: Origin::BuiltIn },
            spread: Of { value: Spread::WIDEST, origin: Origin::BuiltIn },
            keys: Of { value: Arc::new(KINDS), origin: Origin::BuiltIn },
            dns: Of { value: Arc::new([]), origin: Origin::BuiltIn },
            deny: Of { value: false, origin: Origin::BuiltIn },
            token_review: Of { value: false, origin: Origin::BuiltIn },
            jwt: Of { value: true, origin: Origin::BuiltIn },
            jwt_lifetime: Of { value: jwt_svid::LIFETIME, origin: Origin::BuiltIn },
        };
        let all = unsaid.with(&file.rules(), &Scope::All)?;
        let mut namespaces = HashMap::new();
        for (name, rules) in &file.namespaces {
            ServiceAccount::new(name, "default").map_err(|fault| Error::at(rules, fault))?;
            let name: Arc<str> = name.as_str().into();
            namespaces.insert(name.clone(), all.with(&rules.value, &Scope::Namespace(name))?);
        }
        let mut accounts = HashMap::new();
        for (name, rules) in &file.accounts {
            let account = account(name).map_err(|reason| Error::at(rules, reason))?;
            let above = namespaces.get(account.namespace()).unwrap_or(&all);
            let resolved = above.with(&rules.value, &Scope::Account(account.clone()))?;
            accounts.insert(account, resolved);
        }
        let mut impersonators = Vec::new();
        for name in &file.impersonators {
            impersonators.push(account(&name.value).map_err(|reason| Error::at(name, reason))?);
        }
        let mut forwarders = HashSet::new();
        for id in &file.forwarders {
            forwarders.insert(SpiffeId::parse_workload(&id.value).map_err(|fault| Error::at(id, fault))?);
        }
        Ok(Self {
            all,
            namespaces,
            accounts,
            impersonators,
            forwarders,
            oidc: issuers(&file.oidc)?,
            own_names: limits.own_names.iter().map(|name| name.to_ascii_lowercase()).collect(),
        })
    }

    /// Whether somebody may have a certificate, and which.
    pub fn decide(&self, ask: &Ask<'_>) -> Result<Decision, Refusal> {
        let renewable_until = self.admit(ask)?;
        let account = ask.impersonated.unwrap_or(&ask.caller.account);
        let rules = self.rules(account);
        rules.key(account, ask.key)?;
        let lifetime = rules.lifetime(account, ask.lifetime)?;
        let (dns, left_out) = self.dns(rules, account, ask.dns);
        Ok(Decision {
            account: account.clone(),
            lifetime,
            longest: rules.longest.clone(),
            spread: rules.spread.value,
            dns,
            left_out,
            renewable_until,
        })
    }

    /// Whether somebody may be taken for whom it is or asks for, whatever it wants then; and until when its certificate is
    /// enough for that.
    pub fn admit(&self, ask: &Ask<'_>) -> Result<Option<OffsetDateTime>, Refusal> {
        let own = self.rules(&ask.caller.account);
        own.review(ask.caller)?;
        let renewable_until = own.renewable(ask.caller, ask.now)?;
        self.impersonation(ask)?;
        self.allowed(ask)?;
        Ok(renewable_until)
    }

    /// Whether somebody may have a JWT-SVID, whose, and how long it is good.
    pub fn jwt(&self, ask: &Ask<'_>) -> Result<(ServiceAccount, Of<Lifetime>), Refusal> {
        self.admit(ask)?;
        let account = ask.impersonated.unwrap_or(&ask.caller.account);
        let rules = self.rules(account);
        if !rules.jwt.value {
            let sentence = format!("{account} may have no JWT-SVIDs ({})", rules.jwt.origin);
            return Err(
                Refusal::new(Reason::IdentityDenied, sentence).with_detail(rules.jwt.origin.located())
            );
        }
        Ok((account.clone(), rules.jwt_lifetime.clone()))
    }

    /// What is delivered to an account without being asked for over the network: its wishes count within what it could
    /// ask for. `made` are the kinds of keys that can be made, the default first.
    pub fn deliver(
        &self,
        account: &ServiceAccount,
        wishes: &Wishes,
        made: &[KeyKind],
    ) -> Result<Delivery, Refusal> {
        let rules = self.rules(account);
        rules.denied(account)?;
        let mut refused = Vec::new();
        let mut lifetime = rules.lifetime.value;
        if let Some(text) = &wishes.ttl {
            let asked = text.parse::<Lifetime>().map_err(|fault| fault.to_string()).and_then(|asked| {
                if asked < SHORTEST {
                    return Err(format!(
                        "a lifetime of {asked} is shorter than {SHORTEST}, which is the least"
                    ));
                }
                rules.lifetime(account, Some(asked)).map_err(|refusal| refusal.sentence.to_string())
            });
            match asked {
                Ok(granted) => lifetime = granted.value,
                Err(fault) => refused.push(fault),
            }
        }
        let allowed = made.iter().copied().find(|kind| rules.keys.value.contains(kind));
        let Some(kind) = allowed else {
            let (allowed, origin) = (rules.kinds(), &rules.keys.origin);
            let sentence = format!(
                "nothing can be delivered to {account}: {origin} allows {allowed}, and mica makes none of these keys; allow p256"
            );
            return Err(Refusal::new(Reason::KeyRefused, sentence).with_detail(origin.located()));
        };
        let mut key = (kind, false);
        if let Some(text) = &wishes.key_kind {
            let kind = made.iter().copied().find(|kind| kind.as_str() == text).ok_or_else(|| {
                let made = made.iter().map(|kind| kind.as_str()).collect::<Vec<_>>().join(", ");
                format!("{:?} is no kind of key that mica makes; there are {made}", shortened(text))
            });
            let granted = kind.and_then(|kind| match rules.key(account, Some(kind)) {
                Ok(()) => Ok(kind),
                Err(refusal) => Err(refusal.sentence.to_string()),
            });
            match granted {
                Ok(kind) => key = (kind, true),
                Err(fault) => refused.push(fault),
            }
        }
        let asked: Vec<String> = wishes
            .dns_names
            .iter()
            .flat_map(|names| names.split(','))
            .map(|name| name.trim().to_owned())
            .filter(|name| !name.is_empty())
            .collect();
        let (dns, left_out) = self.dns(rules, account, &asked);
        refused
            .extend(left_out.iter().map(|(name, why)| format!("the DNS name {:?}: {why}", shortened(name))));
        Ok(Delivery { lifetime, key, dns, refused })
    }

    /// The same decision, question by question. Those after a refusal are asked too, so that all is said at once.
    pub fn explain(&self, ask: &Ask<'_>) -> Vec<Step> {
        let caller = ask.caller;
        let own = self.rules(&caller.account);
        let account = ask.impersonated.unwrap_or(&caller.account);
        let rules = self.rules(account);
        let mut steps = Vec::new();
        let mut step = |name, verdict| steps.push(Step { name, verdict });
        step(
            "review",
            own.review(caller).map(|()| match (&caller.proof, own.token_review.value) {
                (Proof::Token { .. }, true) => format!(
                    "the API server has to vouch for the token ({})",
                    own.token_review.origin.located()
                ),
                (Proof::Token { .. }, false) => "the API server need not vouch for the token".to_owned(),
                (_, _) => "not asked with a token".to_owned(),
            }),
        );
        step(
            "renewal",
            own.renewable(caller, ask.now).map(|until| match until {
                Some(until) => format!(
                    "by certificate alone until {} ({}, {})",
                    shown(until),
                    own.renewal.value,
                    own.renewal.origin.located()
                ),
                None => "not asked with a certificate".to_owned(),
            }),
        );
        step(
            "identity",
            self.impersonation(ask).map(|()| match ask.impersonated {
                Some(account) => {
                    format!("{} may ask for {account}, if a pod of it runs on the same node", caller.account)
                }
                None => format!("{account}, the caller's own"),
            }),
        );
        let allowed = |rules: &Rules| format!("not denied ({})", rules.deny.origin.located());
        step("allowed", self.allowed(ask).map(|()| allowed(rules)));
        step(
            "key",
            rules.key(account, ask.key).map(|()| match ask.key {
                Some(kind) => format!("{kind} is among {} ({})", rules.kinds(), rules.keys.origin.located()),
                None => format!("left out; allowed are {} ({})", rules.kinds(), rules.keys.origin.located()),
            }),
        );
        step(
            "lifetime",
            rules.lifetime(account, ask.lifetime).map(|granted| {
                format!(
                    "{} ({}); the longest is {} ({})",
                    granted.value,
                    granted.origin.located(),
                    rules.longest.value,
                    rules.longest.origin.located()
                ) + &match rules.spread.value {
                    Spread::NONE => String::new(),
                    spread => {
                        format!("; up to {spread} less for an even load ({})", rules.spread.origin.located())
                    }
                }
            }),
        );
        let (dns, left_out) = self.dns(rules, account, ask.dns);
        let mut told: Vec<String> =
            dns.iter().map(|name| format!("{name} granted ({})", rules.dns.origin.located())).collect();
        told.extend(left_out.iter().map(|(name, why)| format!("{} left out: {why}", shortened(name))));
        step("dns", Ok(if told.is_empty() { "none asked for".to_owned() } else { told.join("; ") }));
        steps
    }

    /// The most that an account may ask for.
    pub fn longest(&self, account: &ServiceAccount) -> &Of<Lifetime> {
        &self.rules(account).longest
    }

    /// Whether tokens of an account count only if the API server itself vouches for them.
    pub fn token_review(&self, account: &ServiceAccount) -> bool {
        self.rules(account).token_review.value
    }

    /// Whether that is so for any account.
    pub fn wants_review(&self) -> bool {
        self.namespaces
            .values()
            .chain(self.accounts.values())
            .chain([&self.all])
            .any(|rules| rules.token_review.value)
    }

    /// Who may ask for others.
    pub fn impersonators(&self) -> &[ServiceAccount] {
        &self.impersonators
    }

    /// Whether a proxy's word counts for whom it forwards.
    pub fn is_forwarder(&self, proxy: &SpiffeId) -> bool {
        self.forwarders.contains(proxy)
    }

    /// Whether any proxy's does.
    pub fn has_forwarders(&self) -> bool {
        !self.forwarders.is_empty()
    }

    /// The issuers whose tokens stand for accounts.
    pub fn oidc(&self) -> &[OidcIssuer] {
        &self.oidc
    }

    fn rules(&self, account: &ServiceAccount) -> &Rules {
        self.accounts.get(account).or_else(|| self.namespaces.get(account.namespace())).unwrap_or(&self.all)
    }

    fn impersonation(&self, ask: &Ask<'_>) -> Result<(), Refusal> {
        let caller = &ask.caller.account;
        if ask.impersonated.is_none() {
            return Ok(());
        }
        if !self.impersonators.contains(caller) {
            let sentence = format!(
                "{caller} may not ask for other identities; it is none of the policy's impersonators"
            );
            return Err(Refusal::new(Reason::ImpersonatorUnknown, sentence));
        }
        if !matches!(ask.caller.proof, Proof::Token { .. }) {
            let sentence = format!("{caller} may ask for other identities with its token alone");
            return Err(Refusal::new(Reason::ImpersonatorUnbound, sentence));
        }
        Ok(())
    }

    /// Nobody who has a part in it is denied: neither the caller, nor the proxy that speaks for it, nor whom it asks for.
    fn allowed(&self, ask: &Ask<'_>) -> Result<(), Refusal> {
        let proxy = match &ask.caller.proof {
            Proof::Forwarded { proxy } => ServiceAccount::of(proxy),
            _ => None,
        };
        let mut all = [Some(&ask.caller.account), proxy.as_ref(), ask.impersonated].into_iter().flatten();
        all.try_for_each(|account| self.rules(account).denied(account))
    }

    fn dns(
        &self,
        rules: &Rules,
        account: &ServiceAccount,
        asked: &[String],
    ) -> (Vec<DnsName>, Vec<(String, LeftOut)>) {
        let (mut granted, mut left_out) = (Vec::<DnsName>::new(), Vec::new());
        for (at, text) in asked.iter().enumerate() {
            let verdict = match text.parse::<DnsName>() {
                _ if at >= MAX_DNS => Err(LeftOut::TooMany),
                Err(_) => Err(LeftOut::Malformed),
                Ok(name) if self.own_names.contains(&name.as_str().to_ascii_lowercase()) => Err(LeftOut::Own),
                Ok(name) if rules.dns.value.iter().any(|pattern| pattern.grants(&name, account)) => Ok(name),
                Ok(_) => Err(LeftOut::NotGranted),
            };
            match verdict {
                Ok(name) if granted.iter().any(|had| had.as_str().eq_ignore_ascii_case(name.as_str())) => {}
                Ok(name) => granted.push(name),
                Err(why) => left_out.push((text.clone(), why)),
            }
        }
        (granted, left_out)
    }
}

impl Rules {
    /// With what is said of fewer.
    fn with(&self, said: &file::Rules, scope: &Scope) -> Result<Self, Error> {
        fn or<S, T>(
            said: &Option<Spanned<S>>,
            scope: &Scope,
            above: &Of<T>,
            read: impl FnOnce(&Spanned<S>) -> Result<T, Error>,
        ) -> Result<Of<T>, Error>
        where
            T: Clone,
        {
            let Some(said) = said else { return Ok(above.clone()) };
            let origin = Origin::Policy { scope: scope.clone(), line: file::line(said) };
            Ok(Of { value: read(said)?, origin })
        }
        let rules = Self {
            lifetime: or(&said.lifetime, scope, &self.lifetime, at_least_shortest)?,
            longest: or(&said.longest_lifetime, scope, &self.longest, at_least_shortest)?,
            renewal: or(&said.renewal, scope, &self.renewal, read)?,
            spread: or(&said.spread, scope, &self.spread, read)?,
            keys: or(&said.keys, scope, &self.keys, kinds)?,
            dns: or(&said.dns, scope, &self.dns, |names| names.value.iter().map(read).collect())?,
            deny: or(&said.deny, scope, &self.deny, |deny| Ok(deny.value))?,
            token_review: or(&said.token_review, scope, &self.token_review, |wanted| Ok(wanted.value))?,
            jwt: or(&said.jwt, scope, &self.jwt, |allowed| Ok(allowed.value))?,
            jwt_lifetime: or(&said.jwt_lifetime, scope, &self.jwt_lifetime, of_a_token)?,
        };
        rules.check(scope)?;
        Ok(rules)
    }

    /// What is granted unless something is asked for must be something that may be asked for.
    fn check(&self, scope: &Scope) -> Result<(), Error> {
        let (lifetime, longest) = (&self.lifetime, &self.longest);
        if lifetime.value <= longest.value {
            return Ok(());
        }
        let whose = match scope {
            Scope::All => String::new(),
            Scope::Namespace(name) => format!(" of namespace {name}"),
            Scope::Account(account) => format!(" of account {account}"),
        };
        let is_here =
            |of: &Of<Lifetime>| matches!(&of.origin, Origin::Policy { scope: at, .. } if at == scope);
        let line = [lifetime, longest].into_iter().find(|of| is_here(of)).and_then(|of| match of.origin {
            Origin::Policy { line, .. } => Some(line),
            _ => None,
        });
        let advice = match (is_here(lifetime), is_here(longest)) {
            (true, false) => "shorten the lifetime, or give a longest_lifetime beside it",
            (false, true) => "give a lifetime beside the longest_lifetime",
            _ => "shorten the one, or lengthen the other",
        };
        Err(Error {
            line,
            reason: format!(
                "the lifetime{whose} is {} ({}), longer than its longest_lifetime {} ({}); {advice}",
                lifetime.value,
                lifetime.origin.located(),
                longest.value,
                longest.origin.located()
            ),
        })
    }

    fn kinds(&self) -> String {
        self.keys.value.iter().map(|kind| kind.as_str()).collect::<Vec<_>>().join(", ")
    }

    fn review(&self, caller: &Caller) -> Result<(), Refusal> {
        match caller.proof {
            Proof::Token { reviewed: false, .. } if self.token_review.value => Err(Refusal::new(
                Reason::TokenRejected,
                format!(
                    "tokens of {} count only if the API server vouches for them, and it has not been asked",
                    caller.account
                ),
            )
            .with_detail(self.token_review.origin.located())),
            _ => Ok(()),
        }
    }

    fn renewable(&self, caller: &Caller, now: OffsetDateTime) -> Result<Option<OffsetDateTime>, Refusal> {
        let Proof::Certificate { proved_at } = caller.proof else { return Ok(None) };
        let bound = time::Duration::try_from(self.renewal.value.duration()).unwrap_or(time::Duration::MAX);
        let until = proved_at.saturating_add(bound);
        if now < until {
            return Ok(Some(until));
        }
        let sentence = format!(
            "{} was last known by more than its certificate at {}, and renews without it for {} at most ({}); authenticate with a token once",
            caller.account,
            shown(proved_at),
            self.renewal.value,
            self.renewal.origin
        );
        Err(Refusal::new(Reason::RenewedTooLong, sentence).with_detail(self.renewal.origin.located()))
    }

    fn denied(&self, account: &ServiceAccount) -> Result<(), Refusal> {
        if !self.deny.value {
            return Ok(());
        }
        let sentence = format!("{account} is denied by {}", self.deny.origin);
        Err(Refusal::new(Reason::IdentityDenied, sentence).with_detail(self.deny.origin.located()))
    }

    fn key(&self, account: &ServiceAccount, kind: Option<KeyKind>) -> Result<(), Refusal> {
        let Some(kind) = kind.filter(|kind| !self.keys.value.contains(kind)) else { return Ok(()) };
        let (allowed, origin) = (self.kinds(), &self.keys.origin);
        let sentence = format!("a {kind} key is not allowed for {account}; {origin} allows {allowed}");
        Err(Refusal::new(Reason::KeyRefused, sentence).with_detail(origin.located()))
    }

    fn lifetime(&self, account: &ServiceAccount, asked: Option<Lifetime>) -> Result<Of<Lifetime>, Refusal> {
        let Some(asked) = asked else { return Ok(self.lifetime.clone()) };
        if asked <= self.longest.value {
            return Ok(Of { value: asked, origin: Origin::Asked });
        }
        let (longest, origin) = (self.longest.value, &self.longest.origin);
        let sentence = format!(
            "a lifetime of {asked} is longer than {longest}, the longest for {account} ({origin}); ask for at most {} seconds, or for 0 to get {}",
            longest.duration().as_secs(),
            self.lifetime.value
        );
        Err(Refusal::new(Reason::LifetimeTooLong, sentence).with_detail(origin.located()))
    }
}

fn read<T>(text: &Spanned<String>) -> Result<T, Error>
where
    T: std::str::FromStr<Err: ToString>,
{
    text.value.parse().map_err(|fault: T::Err| Error::at(text, fault.to_string()))
}

fn at_least_shortest(text: &Spanned<String>) -> Result<Lifetime, Error> {
    let lifetime: Lifetime = read(text)?;
    if lifetime < SHORTEST {
        return Err(Error::at(
            text,
            format!("a lifetime of {lifetime} is shorter than {SHORTEST}, which is the least"),
        ));
    }
    Ok(lifetime)
}

fn of_a_token(text: &Spanned<String>) -> Result<Lifetime, Error> {
    let lifetime = at_least_shortest(text)?;
    if lifetime > jwt_svid::LONGEST {
        let fault =
            format!("a token that is good for {lifetime} is good for longer than {}", jwt_svid::LONGEST);
        return Err(Error::at(text, fault));
    }
    Ok(lifetime)
}

fn kinds(names: &Spanned<Vec<Spanned<String>>>) -> Result<Arc<[KeyKind]>, Error> {
    if names.value.is_empty() {
        return Err(Error::at(
            names,
            "keys is empty, so nobody could have a certificate; write deny: true if that is meant",
        ));
    }
    let known = || KINDS.map(KeyKind::as_str).join(", ");
    names
        .value
        .iter()
        .map(|name| {
            let kind = KINDS.into_iter().find(|kind| kind.as_str() == name.value);
            kind.ok_or_else(|| {
                Error::at(
                    name,
                    format!("{:?} is no kind of key; there are {}", shortened(&name.value), known()),
                )
            })
        })
        .collect()
}

/// `namespace/name`.
fn account(text: &str) -> Result<ServiceAccount, String> {
    let (namespace, name) = text.split_once('/').ok_or_else(|| {
        format!("{:?} is no account; write namespace/name, such as istio-system/ztunnel", shortened(text))
    })?;
    ServiceAccount::new(namespace, name).map_err(|fault| fault.to_string())
}

fn issuers(said: &[file::Oidc]) -> Result<Vec<OidcIssuer>, Error> {
    let mut issuers: Vec<OidcIssuer> = Vec::new();
    for one in said {
        read::<Url>(&one.issuer)?;
        if issuers.iter().any(|other| other.issuer == one.issuer.value) {
            return Err(Error::at(
                &one.issuer,
                format!("the issuer {} comes twice; put its accounts together", shortened(&one.issuer.value)),
            ));
        }
        if let Some(jwks) = one.jwks.as_ref().filter(|jwks| jwks.value.contains("://")) {
            read::<Url>(jwks)?;
        }
        for text in [Some(&one.audience), one.jwks.as_ref()].into_iter().flatten() {
            if text.value.is_empty() {
                return Err(Error::at(text, "audience and jwks cannot be empty"));
            }
        }
        let mut accounts = HashMap::new();
        for file::Mapped { subject, account: name } in &one.accounts.value {
            if subject.value.is_empty() {
                return Err(Error::at(subject, "a subject cannot be empty"));
            }
            let account = account(&name.value).map_err(|reason| Error::at(name, reason))?;
            if accounts.insert(subject.value.clone(), account).is_some() {
                let subject_shown = shortened(&subject.value);
                return Err(Error::at(
                    subject,
                    format!("the subject {subject_shown:?} comes twice; it stands for one account"),
                ));
            }
        }
        issuers.push(OidcIssuer {
            issuer: one.issuer.value.clone(),
            jwks: one.jwks.as_ref().map(|jwks| jwks.value.clone()),
            audience: one.audience.value.clone(),
            accounts,
        });
    }
    Ok(issuers)
}

#[cfg(test)]
mod tests;
