//! Asking the authority, with whatever credential there is.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;
use tonic::{Code, Streaming};
use zeroize::Zeroizing;

use super::held::Svid;
use crate::client::{self, Address, Client, Credential, MAX_TOKEN, Target, Wanted};
use crate::core::bundle::{self, TrustBundle};
use crate::core::certificate::Certificate;
use crate::core::csr::{self, nameless};
use crate::core::granted::{self, Claim, Granted};
use crate::core::key::{self, KeyKind, PrivateKey};
use crate::core::lifetime::Lifetime;
use crate::core::pem;
use crate::core::rotation::renew_at;
use crate::core::spiffe::SpiffeId;
use crate::proto::mica::v1::agent_service_client::AgentServiceClient;
use crate::proto::mica::v1::{
    CreateJwtSvidRequest, CreateJwtSvidResponse, Holder, ReportHoldersRequest, WatchBundlesRequest,
    WatchBundlesResponse,
};
use crate::sys::{clock, files, keys};
use crate::trace::Span;

const MAX_ROOTS: u64 = 1 << 20;
/// The authority's roots that were read this long ago may have changed.
const LOOK_AT_ROOTS: Duration = Duration::from_secs(1);

/// Why there is no certificate, or not one that peers would take.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer, or a denial.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The roots to know the authority by.
    #[error(transparent)]
    Roots(#[from] files::Error),
    /// Likewise.
    #[error("{path} is no trust bundle: {fault}")]
    Bundle {
        /// The file.
        path: String,
        /// What is wrong with it.
        fault: bundle::Error,
    },
    /// A key could not be made.
    #[error(transparent)]
    Keys(#[from] keys::Error),
    /// Nor used.
    #[error(transparent)]
    Key(#[from] key::Error),
    /// A CSR could not be made.
    #[error(transparent)]
    Csr(#[from] csr::Error),
    /// What came is not what was asked for, or nothing that peers would take.
    #[error("{address} answered with what peers would refuse, so it is not taken: {fault}")]
    Answer {
        /// Who.
        address: String,
        /// What is wrong with it.
        fault: granted::Error,
    },
    /// Neither a token nor a certificate can be shown.
    #[error(
        "there is nothing to ask with; give a token with --token-file, or a certificate with --certificate"
    )]
    NoCredential,
}

impl Error {
    /// A short fixed name, for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Client(client::Error::Denied { denial, .. }) => denial.code_name(),
            Self::Client(client) if is_unshown(client) => "credential",
            Self::NoCredential => "credential",
            Self::Client(_) => "connection",
            Self::Roots(_) | Self::Bundle { .. } => "roots",
            Self::Keys(_) | Self::Key(_) | Self::Csr(_) => "key",
            Self::Answer { .. } => "answer",
        }
    }
}

/// Where the authority is, and how it is known.
#[derive(Clone, Debug)]
pub struct Authority {
    /// Its gRPC port.
    pub address: Address,
    /// Whom its certificate has to be for, if not the address's host.
    pub name: Option<String>,
    /// The file of its trust bundle.
    pub roots: PathBuf,
}

/// What an identity is asked for with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// A token, read for each request.
    pub token: Option<PathBuf>,
    /// A folder with a certificate, used until there is one of the agent's own, and then that one. The token is shown
    /// when neither is taken.
    pub certificate: Option<PathBuf>,
}

/// One identity that is to be had.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Whom the certificate has to name; none for whomever the credential says.
    pub id: Option<SpiffeId>,
    /// Whether the credential is another's, who may ask for it.
    pub impersonated: bool,
    /// What to show.
    pub credentials: Credentials,
}

/// Asks.
pub struct Asker {
    authority: Authority,
    lifetime: Option<Lifetime>,
    kind: KeyKind,
    /// For all that is asked with tokens.
    shared: Mutex<Option<Shared>>,
    /// Tells this agent's reports from those of others of the same account.
    reporter: String,
    /// The authority knows no call for several certificates.
    one_by_one: AtomicBool,
}

/// A connection that shows no certificate.
struct Shared {
    client: Client,
    /// As they are written: what it was made with,
    roots: Zeroizing<Vec<u8>>,
    /// and when that was last looked at.
    looked: Instant,
}

impl Asker {
    /// Asks for certificates of a lifetime, or of the authority's default, for keys of a kind.
    pub fn new(authority: Authority, lifetime: Option<Lifetime>, kind: KeyKind) -> Self {
        let random = keys::random_bytes().map_or(0, u64::from_ne_bytes);
        let reporter = format!("{random:016x}");
        Self {
            authority,
            lifetime,
            kind,
            shared: Mutex::default(),
            reporter,
            one_by_one: AtomicBool::new(false),
        }
    }

    /// Where the authority is.
    pub fn address(&self) -> String {
        self.authority.address.to_string()
    }

    /// Whether what was typed can be used: the address, and a trust bundle that is there from the start.
    pub fn check(&self) -> Result<(), Error> {
        self.target(&self.written_roots()?, Credential::None).map(drop)
    }

    /// Whether the authority knows a call for several certificates, as far as is known.
    pub fn may_ask_for_several(&self) -> bool {
        !self.one_by_one.load(Ordering::Relaxed)
    }

    /// Makes a key and has it certified, most often below roots that are known.
    pub async fn certificate(
        &self,
        wish: &Wish,
        held: Option<&Svid>,
        known: Option<&TrustBundle>,
        span: &Span,
    ) -> Result<(Svid, TrustBundle), Error> {
        let (key, wanted) = self.wanted(wish, span)?;
        let ask = |client: Client| {
            let mut wanted = wanted.clone();
            let mut call = self.call(span, "istio.v1.auth.IstioCertificateService", "CreateCertificate");
            // Where it is not known whom the answer has to be of, what is shown says it.
            let claim = wish.id.is_none().then(|| claim_of(client.credential())).flatten();
            async move {
                wanted.trace = call.context();
                let answer = client.create_certificate(&wanted).await;
                answered(&mut call, answer.as_ref().err());
                Ok((answer?, claim))
            }
        };
        let (answer, claim) = self.with(wish, held, ask).await?;
        self.judged(wish, key, &answer, claim, known, span)
    }

    /// The same for several at once, all of them others', for whom the same token speaks. None of an authority that knows
    /// no such call, and is asked for one after the other.
    pub async fn certificates(
        &self,
        wishes: &[(&Wish, &Span)],
        known: Option<&TrustBundle>,
    ) -> Result<Option<Vec<Result<(Svid, TrustBundle), Error>>>, Error> {
        let token = wishes.first().and_then(|(wish, _)| wish.credentials.token.clone());
        let client = self.client(Credential::Token(token.ok_or(Error::NoCredential)?)).await?;
        let (mut keys, mut all, mut calls) = (Vec::new(), Vec::new(), Vec::new());
        for (wish, span) in wishes {
            let (key, mut wanted) = self.wanted(wish, span)?;
            let call = self.call(span, "mica.v1.AgentService", "CreateCertificates");
            wanted.trace = call.context();
            keys.push(key);
            all.push(wanted);
            calls.push(call);
        }
        let answers = client.create_certificates(&all).await;
        for (n, call) in calls.iter_mut().enumerate() {
            let error = match &answers {
                Ok(answers) => answers.get(n).and_then(|answer| answer.as_ref().err()),
                Err(error) => Some(error),
            };
            answered(call, error);
        }
        drop(calls);
        let answers = match answers {
            Err(client::Error::Denied { denial, .. }) if denial.code == Code::Unimplemented => {
                self.one_by_one.store(true, Ordering::Relaxed);
                return Ok(None);
            }
            answers => answers?,
        };
        let judged = wishes
            .iter()
            .zip(keys)
            .zip(answers)
            .map(|(((wish, span), key), answer)| self.judged(wish, key, &answer?, None, known, span));
        Ok(Some(judged.collect()))
    }

    /// A new key, and what is asked for with it.
    fn wanted(&self, wish: &Wish, span: &Span) -> Result<(PrivateKey, Wanted), Error> {
        let _part = span.part("key");
        let key = keys::generate(self.kind)?;
        let csr = pem::encode(pem::CSR, &nameless(&key.signing()?)?);
        let impersonated = wish.id.clone().filter(|_| wish.impersonated);
        Ok((key, Wanted { csr, lifetime: self.lifetime, impersonated, exact: false, trace: None }))
    }

    /// What peers would take of an answer.
    fn judged(
        &self,
        wish: &Wish,
        key: PrivateKey,
        answer: &[String],
        claim: Option<Claim>,
        known: Option<&TrustBundle>,
        span: &Span,
    ) -> Result<(Svid, TrustBundle), Error> {
        let _part = span.part("judge");
        let now = clock::now();
        let granted = Granted::checked(answer, key.public(), wish.id.as_ref(), known, now)
            .and_then(|granted| claim.map_or(Ok(()), |claim| granted.is_of(&claim)).map(|()| granted))
            .map_err(|fault| Error::Answer { address: self.address(), fault })?;
        let leaf = &granted.chain[0];
        let renew_at = renew_at(leaf.validity, &leaf.serial);
        let svid = Svid {
            id: granted.id,
            chain: granted.chain,
            key: Arc::new(key),
            renew_at,
            trace: span.context(),
        };
        Ok((svid, granted.bundle))
    }

    /// Has the authority sign a JWT-SVID.
    pub async fn jwt(
        &self,
        wish: &Wish,
        held: Option<&Svid>,
        audience: &[String],
        span: &Span,
    ) -> Result<CreateJwtSvidResponse, Error> {
        let message = CreateJwtSvidRequest {
            audience: audience.to_vec(),
            impersonated_identity: match (&wish.id, wish.impersonated) {
                (Some(id), true) => id.to_string(),
                _ => String::new(),
            },
        };
        let ask = |client: Client| {
            let message = message.clone();
            let mut call = self.call(span, "mica.v1.AgentService", "CreateJwtSvid");
            async move {
                let mut service = AgentServiceClient::new(client.channel());
                let request = client.traced(message, call.context())?;
                let answer = service.create_jwt_svid(request).await;
                let answer = answer.map(tonic::Response::into_inner).map_err(|status| client.fault(&status));
                answered(&mut call, answer.as_ref().err());
                answer
            }
        };
        self.with(wish, held, ask).await
    }

    /// Follows the bundles until the authority, or the way to it, ends the stream.
    pub async fn bundles(&self, wish: &Wish, held: Option<&Svid>) -> Result<Followed, Error> {
        let ask = |client: Client| async move {
            let request = client.request(WatchBundlesRequest {})?;
            let answer = AgentServiceClient::new(client.channel()).watch_bundles(request).await;
            let stream = answer.map_err(|status| client.fault(&status))?.into_inner();
            // It may be another authority than the one that did not.
            self.one_by_one.store(false, Ordering::Relaxed);
            Ok(Followed { client, stream })
        };
        self.with(wish, held, ask).await
    }

    /// Tells which bundles the agent's consumers hold.
    pub async fn report(&self, wish: &Wish, held: Option<&Svid>, holders: Vec<Holder>) -> Result<(), Error> {
        let message = ReportHoldersRequest { holders, reporter: self.reporter.clone() };
        let ask = |client: Client| {
            let message = message.clone();
            async move {
                let mut service = AgentServiceClient::new(client.channel());
                let answer = service.report_holders(client.request(message)?).await;
                answer.map(drop).map_err(|status| client.fault(&status))
            }
        };
        self.with(wish, held, ask).await
    }

    fn call(&self, span: &Span, service: &'static str, method: &'static str) -> Span {
        let mut call = span.call(service, method);
        call.set("server.address", self.authority.address.host());
        call.count("server.port", self.authority.address.port().into());
        call
    }

    /// Asks with one credential after the other, as long as the authority says of them that it does not know who asks.
    async fn with<T, F>(
        &self,
        wish: &Wish,
        held: Option<&Svid>,
        ask: impl Fn(Client) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, client::Error>>,
    {
        let mut refused = None;
        for credential in credentials(wish, held) {
            let asked = match self.client(credential).await {
                Ok(client) => ask(client).await.map_err(Error::from),
                Err(error) => Err(error),
            };
            match asked {
                Err(error) if is_of_credential(&error) => refused = Some(error),
                settled => return settled,
            }
        }
        Err(refused.unwrap_or(Error::NoCredential))
    }

    fn written_roots(&self) -> Result<Zeroizing<Vec<u8>>, files::Error> {
        files::read(&self.authority.roots, MAX_ROOTS)
    }

    fn target(&self, roots: &[u8], credential: Credential) -> Result<Target, Error> {
        let Authority { address, name, roots: path } = self.authority.clone();
        let roots = TrustBundle::from_pem(roots)
            .map_err(|fault| Error::Bundle { path: path.display().to_string(), fault })?;
        Ok(Target { address, roots, name, credential })
    }

    async fn client(&self, credential: Credential) -> Result<Client, Error> {
        if !matches!(credential, Credential::Token(_)) {
            return Ok(Client::connect(self.target(&self.written_roots()?, credential)?).await?);
        }
        // Held while connecting: many who ask at once share one connection.
        let mut shared = self.shared.lock().await;
        if let Some(known) = shared.as_ref().filter(|known| known.looked.elapsed() < LOOK_AT_ROOTS) {
            return Ok(known.client.showing(credential));
        }
        let (roots, looked) = (self.written_roots()?, Instant::now());
        let client = match &*shared {
            Some(known) if known.roots == roots => known.client.clone(),
            _ => Client::connect(self.target(&roots, Credential::None)?).await?,
        };
        *shared = Some(Shared { client: client.clone(), roots, looked });
        Ok(client.showing(credential))
    }
}

/// The bundles as they change.
pub struct Followed {
    client: Client,
    stream: Streaming<WatchBundlesResponse>,
}

impl Followed {
    /// All bundles, anew; none when the authority has ended the stream.
    pub async fn next(&mut self) -> Result<Option<WatchBundlesResponse>, Error> {
        Ok(self.stream.message().await.map_err(|status| self.client.fault(&status))?)
    }
}

/// Of whom a credential is, if that can be told.
fn claim_of(credential: &Credential) -> Option<Claim> {
    match credential {
        Credential::None => None,
        Credential::Token(path) => {
            let text = files::read_given(path, MAX_TOKEN).ok()?;
            Claim::of_token(std::str::from_utf8(text.trim_ascii()).ok()?)
        }
        Credential::Certificate(folder) => {
            let text = files::read(&folder.join("cert-chain.pem"), MAX_ROOTS).ok()?;
            Claim::of_certificate(Certificate::all_from_pem(&text).ok()?.first()?)
        }
        Credential::Held(chain, _) => Claim::of_certificate(chain.first()?),
    }
}

/// Whether what there is cannot be shown.
fn is_unshown(error: &client::Error) -> bool {
    use client::Error::{Certificate, File, Token};
    matches!(error, Token { .. } | Certificate { .. } | File(_))
}

/// What a call's span says in the end.
fn answered(call: &mut Span, error: Option<&client::Error>) {
    let denial = error.and_then(client::Error::denial);
    if error.is_none() || denial.is_some() {
        let code = denial.map_or(Code::Ok, |denial| denial.code);
        call.count("rpc.grpc.status_code", i32::from(code).into());
    }
    if error.is_some() {
        let reason = if error.is_some_and(is_unshown) { "credential" } else { "connection" };
        call.fail(denial.map_or(reason, client::Denial::code_name));
    }
    if let Some(reason) = denial.and_then(|denial| denial.reason.as_deref()) {
        call.set("mica.reason", reason);
    }
}

/// What can be shown, in the order in which it is tried.
fn credentials(wish: &Wish, held: Option<&Svid>) -> Vec<Credential> {
    let Credentials { token, certificate } = &wish.credentials;
    let mut all = Vec::new();
    if let Some(folder) = certificate {
        if let Some(svid) = held.filter(|svid| svid.not_after() > clock::now()) {
            all.push(Credential::Held(svid.chain.clone(), svid.key.clone()));
        }
        all.push(Credential::Certificate(folder.clone()));
    }
    all.extend(token.clone().map(Credential::Token));
    all
}

/// Whether another credential may fare better.
fn is_of_credential(error: &Error) -> bool {
    match error {
        Error::Client(client::Error::Denied { denial, .. }) => {
            matches!(denial.code, Code::Unauthenticated | Code::PermissionDenied)
        }
        Error::Client(
            client::Error::Token { .. }
            | client::Error::File(_)
            | client::Error::Certificate { .. }
            | client::Error::Tls { .. },
        ) => true,
        _ => false,
    }
}
