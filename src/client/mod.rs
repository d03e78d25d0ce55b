//! The client's side of the CSR API: connecting to a running Mica and asking it.
//!
//! Commands show what goes wrong here to people, so every error names the address, what was the matter and the way out.
//! A token is read from its file for each request and a certificate from its folder for each connection, so that a
//! client outlives both.

pub mod bench;
mod dial;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use prost::Message as _;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use tonic::codegen::http::{HeaderValue, Uri};
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::core::bundle::TrustBundle;
use crate::core::certificate::Certificate;
use crate::core::key::PrivateKey;
use crate::core::lifetime::Lifetime;
use crate::core::refusal::DOMAIN;
use crate::core::spiffe::SpiffeId;
use crate::core::trace::Context;
use crate::proto::google::rpc;
use crate::proto::istio::v1::auth::IstioCertificateRequest;
use crate::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
pub use crate::proto::mica::v1::ExplainResponse;
use crate::proto::mica::v1::agent_service_client::AgentServiceClient;
use crate::proto::mica::v1::certificate_answer::Answer;
use crate::proto::mica::v1::identity_service_client::IdentityServiceClient;
use crate::proto::mica::v1::{
    CertificateAnswer, CertificateRequest, CreateCertificatesRequest, ExplainRequest,
};
use crate::sys::files;
use dial::Dial;

/// A server that takes longer to answer is not waited for. Mica itself gives up a little earlier.
const ANSWER: Duration = Duration::from_secs(35);
/// The library's own limit.
const LARGEST_ANSWER: usize = 4 * 1024 * 1024;
/// What a server says is shown so far.
const LONGEST_SENTENCE: usize = 1_024;
/// Of error details.
const ERROR_INFO: &str = "type.googleapis.com/google.rpc.ErrorInfo";
/// Bound tokens of Kubernetes have about a thousand bytes; Mica's port takes headers up to 16 KiB.
pub const MAX_TOKEN: u64 = 12 * 1024;

/// Why there is no answer, or not the wanted one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not an address.
    #[error("address {0:?} is no HOST:PORT; write one such as 127.0.0.1:15012 or [::1]:15012")]
    Address(String),
    /// Not a name.
    #[error("{0:?} is neither a DNS name nor an IP address, so no certificate can be for it")]
    Name(String),
    /// Nobody there.
    #[error("cannot connect to {address}: {reason}; check the address, and that `mica serve` runs there")]
    Connect {
        /// Where.
        address: String,
        /// What the system says.
        reason: String,
    },
    /// Somebody, who says nothing.
    #[error("{address} did not {what} within {} s; check that it is a Mica's gRPC address", .within.as_secs())]
    Slow {
        /// Where.
        address: String,
        /// What was waited for.
        what: &'static str,
        /// For how long.
        within: Duration,
    },
    /// Somebody else.
    #[error(
        "{address} does not speak {expected} ({fault}); give the gRPC address of a Mica, whose default port is 15012"
    )]
    Protocol {
        /// Where.
        address: String,
        /// TLS or HTTP/2.
        expected: &'static str,
        /// What came.
        fault: String,
    },
    /// A serving certificate for another name.
    #[error(
        "the certificate of {address} is not for {name:?} but for {presented}; give one of these with --name, or correct the address"
    )]
    OtherName {
        /// Where.
        address: String,
        /// Who was expected.
        name: String,
        /// Who is there.
        presented: String,
    },
    /// A serving certificate of another CA.
    #[error(
        "the certificate of {address} leads to none of the roots given; give that authority's trust bundle (<data-dir>/root-cert.pem), or correct the address"
    )]
    Foreign {
        /// Where.
        address: String,
    },
    /// A serving certificate at another time.
    #[error(
        "the certificate of {address} {when}; check this machine's clock and that machine's, and the log of the authority"
    )]
    Time {
        /// Where.
        address: String,
        /// Its time.
        when: String,
    },
    /// Another fault of TLS.
    #[error("no TLS connection with {address}: {fault}")]
    Tls {
        /// Where.
        address: String,
        /// What rustls says.
        fault: String,
    },
    /// The roots given cannot be used.
    #[error("the trust bundle given has a root that cannot be used: {0}")]
    Roots(String),
    /// No token to show.
    #[error(
        "the token in {path} cannot be used: {fault}; it is one line, a JWT such as `mica token new` prints"
    )]
    Token {
        /// The file.
        path: String,
        /// What is wrong.
        fault: &'static str,
    },
    /// A file cannot be read.
    #[error("{0}")]
    File(String),
    /// No certificate to show.
    #[error(
        "the certificate in {folder} cannot be shown: {fault}; it is a folder with cert-chain.pem and key.pem"
    )]
    Certificate {
        /// The folder.
        folder: String,
        /// What is wrong.
        fault: String,
    },
    /// It ended before the answer.
    #[error("the connection with {address} broke: {fault}; try again")]
    Broke {
        /// Where.
        address: String,
        /// How.
        fault: String,
    },
    /// The authority says no.
    #[error("{address} says no: {denial}")]
    Denied {
        /// Who.
        address: String,
        /// Why.
        denial: Denial,
    },
}

impl Error {
    /// What the authority said in place of an answer, if it was asked.
    pub fn denial(&self) -> Option<&Denial> {
        match self {
            Self::Denied { denial, .. } => Some(denial),
            _ => None,
        }
    }
}

/// What the authority says in place of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// gRPC's code.
    pub code: Code,
    /// Mica's stable reason, if it is a Mica.
    pub reason: Option<String>,
    /// For people.
    pub sentence: String,
}

impl Denial {
    /// The code as specifications and documents write it.
    pub fn code_name(&self) -> &'static str {
        code_name(self.code)
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code_name())?;
        if let Some(reason) = &self.reason {
            write!(f, " ({reason})")?;
        }
        write!(f, ": {}", self.sentence)
    }
}

impl From<&Status> for Denial {
    fn from(status: &Status) -> Self {
        let sentence = match status.message() {
            "" => "without a word".to_owned(),
            message => message.to_owned(),
        };
        Self { code: status.code(), reason: reason_of(status.details()), sentence }
    }
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
}

impl Address {
    /// One that can be connected to: of a Mica that listens everywhere, the loopback address.
    #[must_use]
    pub fn reachable(mut self) -> Self {
        match self.host.parse() {
            Ok(IpAddr::V4(Ipv4Addr::UNSPECIFIED)) => self.host = Ipv4Addr::LOCALHOST.to_string(),
            Ok(IpAddr::V6(Ipv6Addr::UNSPECIFIED)) => self.host = Ipv6Addr::LOCALHOST.to_string(),
            _ => {}
        }
        self
    }
}

impl Address {
    /// The name or the IP address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl std::str::FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = || Error::Address(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(refused)?;
        let host = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
            Some(Some(host)) if host.parse::<Ipv6Addr>().is_ok() => host,
            Some(_) => return Err(refused()),
            // An IPv6 address without brackets would lose its last part to the port.
            None if host.is_empty() || host.contains([':', '/', '@']) => return Err(refused()),
            None => host,
        };
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(refused)?;
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// Which Mica, and who asks it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where it listens.
    pub address: Address,
    /// Where its certificate has to lead.
    pub roots: TrustBundle,
    /// Whom its certificate has to be for, if that is not the address's host.
    pub name: Option<String>,
    /// Who asks.
    pub credential: Credential,
}

/// What a client shows.
#[derive(Clone, Debug)]
pub enum Credential {
    /// Nothing.
    None,
    /// A file with a token, read for each request.
    Token(PathBuf),
    /// A folder with cert-chain.pem and key.pem, read for each connection.
    Certificate(PathBuf),
    /// A certificate, then its intermediates, and its key.
    Held(Vec<Certificate>, Arc<PrivateKey>),
}

/// Puts a load on a running Mica: the same few requests again and again, with one of these tokens after the other, or else
/// with what the target has.
pub async fn load(
    target: &Target,
    wanted: &[Wanted],
    tokens: &[PathBuf],
    load: &bench::Load,
) -> Result<bench::Outcome, Error> {
    let dial = Dial::new(target)?;
    let authorization = match &target.credential {
        Credential::Token(path) => Some(bearer(path)?),
        _ => None,
    };
    let authorization = authorization.and_then(|value| value.as_encoded_bytes().try_into().ok());
    let shown = |path: &PathBuf| Ok(HeaderValue::from_bytes(bearer(path)?.as_encoded_bytes()).ok());
    let shown = tokens.iter().map(shown).collect::<Result<Option<Vec<_>>, Error>>()?;
    let requests: Vec<_> = wanted.iter().map(Wanted::message).collect();
    let call = bench::Call::new(&target.address.to_string(), authorization, &requests)
        .with_authorizations(shown.unwrap_or_default());
    let connect = move || {
        let dial = dial.clone();
        async move { dial.connect().await.map(TokioIo::into_inner).map_err(|fault| fault.to_string()) }
    };
    Ok(bench::put(connect, call, load).await)
}

/// What a client asks for.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// One PEM CSR.
    pub csr: String,
    /// None for what the authority gives.
    pub lifetime: Option<Lifetime>,
    /// Whom the certificate should name, if not the client itself.
    pub impersonated: Option<SpiffeId>,
    /// Whether the lifetime should not be shortened to spread renewals.
    pub exact: bool,
    /// What the request is a part of.
    pub trace: Option<Context>,
}

impl Wanted {
    /// As it is sent.
    pub fn message(&self) -> IstioCertificateRequest {
        let mut metadata = Struct::default();
        let mut set = |name: &str, kind| metadata.fields.insert(name.to_owned(), Value { kind: Some(kind) });
        if let Some(id) = &self.impersonated {
            set("ImpersonatedIdentity", Kind::StringValue(id.to_string()));
        }
        if self.exact {
            set("ExactLifetime", Kind::BoolValue(true));
        }
        IstioCertificateRequest {
            csr: self.csr.clone(),
            validity_duration: self.seconds(),
            metadata: Some(metadata).filter(|metadata| !metadata.fields.is_empty()),
        }
    }

    fn seconds(&self) -> i64 {
        self.lifetime.map_or(0, |lifetime| i64::try_from(lifetime.duration().as_secs()).unwrap_or(i64::MAX))
    }
}

/// A connection to a running Mica, made anew when it breaks. Clones share it.
#[derive(Clone)]
pub struct Client {
    address: Arc<str>,
    credential: Credential,
    channel: Channel,
}

impl Client {
    /// Connects.
    pub async fn connect(target: Target) -> Result<Self, Error> {
        let address = target.address.to_string();
        let dial = Dial::new(&target)?;
        let uri = |scheme: &str| -> Result<Uri, Error> {
            format!("{scheme}://{address}").parse().map_err(|_| Error::Address(address.clone()))
        };
        // To tonic the connection is a plain one, since TLS is done below it; the server is told the truth.
        let endpoint = Endpoint::from(uri("http")?)
            .origin(uri("https")?)
            .user_agent(concat!("mica/", env!("CARGO_PKG_VERSION")))
            .map_err(|_| Error::Address(address.clone()))?
            .timeout(ANSWER)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .tcp_nodelay(true);
        let channel = endpoint.connect_with_connector(dial).await.map_err(|fault| {
            own(&fault).unwrap_or_else(|| Error::Protocol {
                address: address.clone(),
                expected: "HTTP/2",
                fault: innermost(&fault),
            })
        })?;
        Ok(Self { address: address.into(), credential: target.credential, channel })
    }

    /// Asks for a certificate: the answer is the leaf, its intermediates and the trust bundle, as they came.
    pub async fn create_certificate(&self, wanted: &Wanted) -> Result<Vec<String>, Error> {
        let mut service = IstioCertificateServiceClient::new(self.channel());
        let answer = service.create_certificate(self.traced(wanted.message(), wanted.trace)?).await;
        Ok(answer.map_err(|status| self.fault(&status))?.into_inner().cert_chain)
    }

    /// Asks for several at once: the answer to each, in their order, or why there is none.
    pub async fn create_certificates(
        &self,
        wanted: &[Wanted],
    ) -> Result<Vec<Result<Vec<String>, Error>>, Error> {
        let requests = wanted.iter().map(|wanted| CertificateRequest {
            request: Some(wanted.message()),
            traceparent: wanted.trace.map(|trace| trace.traceparent()).unwrap_or_default(),
        });
        let message = CreateCertificatesRequest { requests: requests.collect() };
        // As much for each as for one that is asked for alone.
        let mut service = AgentServiceClient::new(self.channel())
            .max_decoding_message_size(wanted.len().saturating_mul(LARGEST_ANSWER));
        let answer = service.create_certificates(self.request(message)?).await;
        let answers = answer.map_err(|status| self.fault(&status))?.into_inner().answers;
        if answers.len() != wanted.len() {
            let (asked, answered) = (wanted.len(), answers.len());
            let fault = format!("{asked} certificates were asked for at once, and {answered} answers came");
            return Err(self.protocol(fault));
        }
        let read = |one: CertificateAnswer| match one.answer {
            Some(Answer::Granted(granted)) => Ok(granted.cert_chain),
            Some(Answer::Refused(refused)) => {
                let (code, details) = (refused.code.into(), refused.encode_to_vec());
                let sentence = &refused.message[..refused.message.floor_char_boundary(LONGEST_SENTENCE)];
                Err(self.fault(&Status::with_details(code, sentence, details.into())))
            }
            None => Err(self.protocol("one of several answers is empty".to_owned())),
        };
        Ok(answers.into_iter().map(read).collect())
    }

    fn protocol(&self, fault: String) -> Error {
        Error::Protocol { address: self.address.to_string(), expected: "Mica's protocol", fault }
    }

    /// Asks what a request for a certificate would be answered, and why.
    pub async fn explain(&self, wanted: &Wanted) -> Result<ExplainResponse, Error> {
        let request = ExplainRequest {
            csr: wanted.csr.clone(),
            validity_duration: wanted.seconds(),
            impersonated_identity: wanted.impersonated.as_ref().map(ToString::to_string).unwrap_or_default(),
        };
        let mut service = IdentityServiceClient::new(self.channel());
        let answer = service.explain(self.request(request)?).await;
        Ok(answer.map_err(|status| self.fault(&status))?.into_inner())
    }

    /// The same connection, which shows no certificate, for requests that show another token.
    #[must_use]
    pub fn showing(&self, credential: Credential) -> Self {
        Self { credential, ..self.clone() }
    }

    /// What it shows.
    pub fn credential(&self) -> &Credential {
        &self.credential
    }

    /// For the clients that are generated from the protocols.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A request that shows the token, if there is one.
    pub fn request<T>(&self, message: T) -> Result<tonic::Request<T>, Error> {
        let mut request = tonic::Request::new(message);
        if let Credential::Token(path) = &self.credential {
            request.metadata_mut().insert("authorization", bearer(path)?);
        }
        Ok(request)
    }

    /// A request that also says what it is a part of.
    pub fn traced<T>(&self, message: T, trace: Option<Context>) -> Result<tonic::Request<T>, Error> {
        let mut request = self.request(message)?;
        if let Some(parent) = trace.and_then(|trace| trace.traceparent().parse().ok()) {
            request.metadata_mut().insert("traceparent", parent);
        }
        Ok(request)
    }

    /// What a status means: what the server said, or what happened on the way to it.
    pub fn fault(&self, status: &Status) -> Error {
        let address = self.address.to_string();
        if let Some(own) = own(status) {
            return own;
        }
        match std::error::Error::source(status) {
            None => Error::Denied { address, denial: status.into() },
            Some(source) if source.is::<tonic::TimeoutExpired>() => {
                Error::Slow { address, what: "answer", within: ANSWER }
            }
            Some(source) => Error::Broke { address, fault: innermost(source) },
        }
    }
}

/// The header that a token is shown in. It is never part of an error or of what `Debug` shows.
fn bearer(path: &std::path::Path) -> Result<MetadataValue<tonic::metadata::Ascii>, Error> {
    let refused = |fault| Error::Token { path: path.display().to_string(), fault };
    let text = files::read_given(path, MAX_TOKEN).map_err(|fault| Error::File(fault.to_string()))?;
    let token = text.trim_ascii();
    if token.is_empty() {
        return Err(refused("the file is empty"));
    }
    if !token.iter().all(u8::is_ascii_graphic) {
        return Err(refused("it holds spaces, line breaks or other characters that no token has"));
    }
    let header = zeroize::Zeroizing::new([b"Bearer ", token].concat());
    let mut value = MetadataValue::try_from(&header[..]).map_err(|_| refused("it is no header"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The stable reason in a status's details, if they are a Mica's.
fn reason_of(details: &[u8]) -> Option<String> {
    let status = rpc::Status::decode(details).ok()?;
    status.details.iter().filter(|any| any.type_url == ERROR_INFO).find_map(|any| {
        let info = rpc::ErrorInfo::decode(&any.value[..]).ok()?;
        (info.domain == DOMAIN).then_some(info.reason)
    })
}

/// Our own error, below whatever tonic and hyper have put around it.
fn own(fault: &(dyn std::error::Error + 'static)) -> Option<Error> {
    std::iter::successors(Some(fault), |fault| fault.source())
        .find_map(|fault| fault.downcast_ref::<Error>().cloned())
}

fn innermost(fault: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(Some(fault), |fault| fault.source())
        .last()
        .map_or_else(String::new, |e| e.to_string())
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "tests write the files that a client reads")]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["127.0.0.1:15012", "[::1]:1", "istiod.istio-system.svc:65535"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            ":1",
            "a",
            "a:",
            "a:0",
            "a:65536",
            "::1:1",
            "[::1]",
            "[a]:1",
            "https://a:1",
            "u@a:1",
            "[::1:1",
        ] {
            assert_eq!(text.parse::<Address>(), Err(Error::Address(text.to_owned())));
        }
        for (text, reachable) in
            [("0.0.0.0:1", "127.0.0.1:1"), ("[::]:1", "[::1]:1"), ("10.0.0.1:1", "10.0.0.1:1")]
        {
            assert_eq!(text.parse::<Address>().unwrap().reachable().to_string(), reachable);
        }
    }

    #[test]
    fn a_token_is_one_word_and_is_not_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), " eyJh.bGci.OiJF\n").unwrap();
        let header = bearer(file.path()).unwrap();
        assert_eq!(header.as_bytes(), b"Bearer eyJh.bGci.OiJF");
        assert_eq!(format!("{header:?}"), "Sensitive");
        for text in ["", " \n", "a b", "a\nb", "caf\u{e9}"] {
            std::fs::write(file.path(), text).unwrap();
            let fault = bearer(file.path()).unwrap_err();
            assert!(matches!(fault, Error::Token { .. }), "{fault}");
            assert!(text.trim().is_empty() || !fault.to_string().contains(text));
        }
        std::fs::write(file.path(), "a".repeat(MAX_TOKEN as usize + 1)).unwrap();
        assert!(matches!(bearer(file.path()), Err(Error::File(_))));
    }

    #[test]
    fn a_denial_shows_code_reason_and_sentence() {
        let info = rpc::ErrorInfo {
            reason: "TOKEN_EXPIRED".to_owned(),
            domain: "mica.dev".to_owned(),
            ..Default::default()
        };
        let details = |domain: &str, type_url: &str| {
            let info = rpc::ErrorInfo { domain: domain.to_owned(), ..info.clone() };
            let any = prost_types::Any { type_url: type_url.to_owned(), value: info.encode_to_vec() };
            rpc::Status { code: 16, message: String::new(), details: vec![any] }.encode_to_vec()
        };
        let shown = |details: Vec<u8>| {
            Denial::from(&Status::with_details(Code::Unauthenticated, "it is over", details.into()))
                .to_string()
        };
        let kind = "type.googleapis.com/google.rpc.ErrorInfo";
        assert_eq!(shown(details("mica.dev", kind)), "UNAUTHENTICATED (TOKEN_EXPIRED): it is over");
        // Another's reasons mean something else.
        assert_eq!(shown(details("example.org", kind)), "UNAUTHENTICATED: it is over");
        assert_eq!(shown(details("mica.dev", "type.googleapis.com/x")), "UNAUTHENTICATED: it is over");
        assert_eq!(shown(vec![0xff; 9]), "UNAUTHENTICATED: it is over");
        assert_eq!(Denial::from(&Status::new(Code::Internal, "")).to_string(), "INTERNAL: without a word");
    }
}
