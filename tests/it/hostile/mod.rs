//! Hostile requests, one after the other, against one running Mica over real TLS.
//!
//! Each row of a table says what is sent and what comes back: a refusal with its code and stable reason, or a certificate
//! for the caller's own identity and nothing more. After each row an honest caller is served; at the end the log, the memory
//! and the counters are looked at.

mod certificates;
mod csrs;
mod explain;
mod forge;
mod lessons;
mod tokens;
mod wire;
mod wishes;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use mica::core::bundle::TrustBundle;
use mica::core::certificate::Certificate;
use mica::core::{chain, pem};
use mica::proto::google::rpc;
use mica::proto::istio::v1::auth as istio;
use mica::proto::istio::v1::auth::istio_ca_service_client::IstioCaServiceClient;
use mica::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use mica::proto::mica::v1::ExplainResponse;
use prost::Message as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use x509_parser::prelude::FromDer as _;

use crate::serve::{Mica, Place, mtls, wait_for};
use forge::Ca;

/// The account that asks in most rows, and another one that is there too.
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";
const POLICY: &str = "
forwarders: ['spiffe://cluster.local/ns/shop/sa/gateway']
namespaces: {shop: {dns: ['*.shop.svc']}}
accounts: {shop/denied: {deny: true}}
";
/// The longest lifetime that Mica is told to grant, in seconds.
const LONGEST: i64 = 48 * 3_600;
const CREATE_CERTIFICATE: &str = "CreateCertificate";
const HANDLE_CSR: &str = "HandleCSR";
const EXPLAIN: &str = "Explain";
/// Of a debug build, with everything that the rows leave behind.
const MEMORY: usize = 64 * 1024 * 1024;

/// What is called, what is sent, what comes back.
type Row = (&'static str, fn(&Stage) -> Answer, Expected);

#[derive(Clone, Copy, Debug)]
enum Expected {
    /// A refusal of Mica's, with its stable reason.
    Refused(Code, &'static str),
    /// A refusal of gRPC's, of what is not yet a request.
    Status(Code),
    /// No gRPC at all.
    Http(u16),
    /// No answer: the stream or the connection ends.
    Cut,
    /// A certificate for this identity, and nothing more.
    Own(&'static str),
    /// Of a question: a certificate for this identity would be granted, and nothing more.
    Granted(&'static str),
    /// Of a question: it would be refused for this stable reason, to a caller with this identity.
    Denied(&'static str, &'static str),
}

use Expected::{Cut, Http, Own};

const TOO_LARGE: Expected = invalid("CSR_MALFORMED");

const fn unauthenticated(reason: &'static str) -> Expected {
    Expected::Refused(Code::Unauthenticated, reason)
}

const fn invalid(reason: &'static str) -> Expected {
    Expected::Refused(Code::InvalidArgument, reason)
}

#[derive(Debug)]
enum Answer {
    Issued(Issued),
    Explained(ExplainResponse),
    Refused(Status),
    Http(u16),
    Cut(String),
}

#[derive(Debug)]
struct Issued {
    chain: Vec<String>,
    /// The SubjectPublicKeyInfo that the CSR carried.
    spki: Vec<u8>,
    /// In seconds, as it was asked for.
    lifetime: i64,
}

/// A running Mica and those who ask it.
struct Stage {
    runtime: tokio::runtime::Runtime,
    place: Place,
    mica: Mica,
    address: SocketAddr,
    /// Mica's own CA in the wrong hands: it signs whatever a row wants.
    ca: Ca,
    issuer: tokens::Issuer,
    web: Identity,
    db: Identity,
    /// A proxy that policy names.
    gateway: Identity,
    /// Of an account that was removed since.
    gone: Identity,
    gone_token: String,
    /// Of one that was removed, and came again.
    reborn_token: String,
    /// What must not stand in the log.
    secrets: RefCell<Vec<String>>,
    turn: Cell<usize>,
}

/// What a client proves itself with in TLS. Nothing in it needs to fit.
#[derive(Clone, Debug)]
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
}

impl Identity {
    fn delivered(place: &Place, account: &str) -> Self {
        let read = |name: &str| fs::read(place.folder("shop", account).join(name)).unwrap();
        Self {
            chain: CertificateDer::pem_slice_iter(&read("cert-chain.pem")).map(Result::unwrap).collect(),
            key: Arc::new(PrivateKeyDer::from_pem_slice(&read("key.pem")).unwrap()),
        }
    }
}

/// One request for a certificate, honest until a row changes it.
struct Ask {
    identity: Option<Identity>,
    headers: Vec<(&'static str, String)>,
    message: istio::IstioCertificateRequest,
}

impl Stage {
    fn new() -> Self {
        let place = Place::new();
        for account in ["web", "db", "gateway", "denied", "gone", "reborn"] {
            place.account(account);
        }
        let issuer = tokens::Issuer::new();
        let file = |name: &str, text: &str| {
            let path = place.root.path().join(name);
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let jwks = file("jwks.json", &issuer.jwks.to_string());
        let policy = file("policy.yaml", POLICY);
        let arguments = ["--token-issuer", tokens::ISSUER, "--token-jwks", &jwks, "--policy", &policy];
        let logged = ["--max-ttl", "48h", "--log-level", "debug", "--log-format", "json"];
        let mica = place.start(&[&arguments[..], &logged].concat());
        place.leaf("web");
        let [web, db, gateway, gone] =
            ["web", "db", "gateway", "gone"].map(|account| Identity::delivered(&place, account));
        let [gone_token, reborn_token] = ["gone", "reborn"].map(|account| issuer.token(account));
        let stage = Self {
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap(),
            address: mica.address("grpc").parse().unwrap(),
            ca: Ca::of_mica(&place),
            place,
            mica,
            issuer,
            web,
            db,
            gateway,
            gone,
            gone_token,
            reborn_token,
            secrets: RefCell::default(),
            turn: Cell::default(),
        };
        let read = |path: std::path::PathBuf| fs::read_to_string(path).unwrap();
        for key in [
            read(stage.place.data().join("authority/ca-key.pem")),
            read(stage.place.folder("shop", "web").join("key.pem")),
        ] {
            // A line of base64 in the middle of it.
            stage.is_secret(key.lines().nth(1).unwrap());
        }
        // Whatever was found out about those that will be gone is found out before.
        for token in [&stage.gone_token, &stage.reborn_token] {
            let answer = stage.bearer(token);
            assert!(matches!(answer, Answer::Issued(_)), "{answer:?}");
        }
        for account in ["gone", "reborn"] {
            fs::remove_file(stage.place.source().join(format!("{account}.yaml"))).unwrap();
        }
        wait_for(Duration::from_secs(5), "the removal", || {
            let left = ["gone", "reborn"].map(|account| stage.place.folder("shop", account).exists());
            (left == [false; 2]).then_some(())
        });
        stage.place.account("reborn");
        stage.place.wait_for_account("reborn", Duration::from_secs(2));
        stage
    }

    /// Is not to be found in the log at the end, nor in an answer.
    fn is_secret(&self, text: &str) {
        assert!(text.len() >= 16, "{text}");
        self.secrets.borrow_mut().push(text.to_owned());
    }

    /// By web's certificate, for web's identity and a new key.
    fn ask(&self) -> Ask {
        Ask { identity: Some(self.web.clone()), headers: Vec::new(), message: mtls::ask(mtls::csr(WEB)) }
    }

    /// With web's certificate and this CSR.
    fn csr(&self, csr: impl Into<String>) -> Answer {
        let mut ask = self.ask();
        ask.message.csr = csr.into();
        self.send(ask)
    }

    /// With this certificate instead of web's.
    fn by(&self, identity: Identity) -> Answer {
        self.send(Ask { identity: Some(identity), ..self.ask() })
    }

    /// Over a connection of its own.
    fn send(&self, ask: Ask) -> Answer {
        let (csr, lifetime) = (ask.message.csr.clone(), ask.message.validity_duration);
        let mut request = Request::new(ask.message);
        for (name, value) in &ask.headers {
            request.metadata_mut().append(*name, value.parse().unwrap());
        }
        self.runtime.block_on(async {
            let channel = match self.connect(ask.identity.as_ref(), &[b"h2"]).await {
                Ok(channel) => channel,
                Err(fault) => return Answer::Cut(fault),
            };
            match IstioCertificateServiceClient::new(channel).create_certificate(request).await {
                Ok(answer) => Answer::Issued(Issued {
                    chain: answer.into_inner().cert_chain,
                    spki: spki(&csr),
                    lifetime,
                }),
                Err(status) => answer_of(status),
            }
        })
    }

    /// By the call of Istio 0.2, which knows no lifetimes.
    fn handle(&self, identity: Option<&Identity>, csr: impl Into<Vec<u8>>) -> Answer {
        let csr_pem: Vec<u8> = csr.into();
        let spki = spki(&String::from_utf8_lossy(&csr_pem));
        self.runtime.block_on(async {
            let channel = self.connect(identity, &[b"h2"]).await.unwrap();
            let request = istio::Request { csr_pem, node_agent_credentials: None };
            match IstioCaServiceClient::new(channel).handle_csr(request).await {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    assert!(answer.is_approved && answer.status.is_none(), "{answer:?}");
                    // The roots are not part of it.
                    let chain = String::from_utf8(answer.signed_cert_chain).unwrap();
                    Answer::Issued(Issued { chain: vec![chain, self.place.root_pem()], spki, lifetime: 0 })
                }
                Err(status) => answer_of(status),
            }
        })
    }

    async fn connect(&self, identity: Option<&Identity>, alpn: &[&[u8]]) -> Result<Channel, String> {
        let tls = Arc::new(self.tls(identity, alpn));
        let endpoint =
            Endpoint::from_static("http://localhost").origin(Uri::from_static("https://localhost"));
        let connected = endpoint.connect_with_connector(Connector { address: self.address, tls }).await;
        connected.map_err(|fault| format!("{fault:?}"))
    }

    /// What a client trusts is Mica alone; what it sends is whatever a row wants.
    fn tls(&self, identity: Option<&Identity>, alpn: &[&[u8]]) -> rustls::ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(self.place.root_pem().as_bytes()) {
            roots.add(root.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut tls = match identity {
            None => tls.with_no_client_auth(),
            Some(Identity { chain, key }) => {
                let key = provider.key_provider.load_private_key(key.clone_key()).unwrap();
                let sent = rustls::sign::CertifiedKey::new(chain.clone(), key);
                tls.with_client_cert_resolver(Arc::new(Unchecked(Arc::new(sent))))
            }
        };
        tls.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        tls
    }

    /// That an answer is what a row says, and that a certificate in it is no more than it should be.
    fn judge(&self, answer: &Answer, expected: Expected) -> Result<(), String> {
        let fits = match (answer, expected) {
            (Answer::Refused(status), Expected::Refused(code, reason)) => {
                if status.details().is_empty() {
                    return Err(format!("refused without a reason: {status:?}"));
                }
                (status.code(), mtls::reason(status).as_str()) == (code, reason)
            }
            (Answer::Refused(status), Expected::Status(code)) => {
                status.code() == code && status.details().is_empty()
            }
            (Answer::Http(found), Http(wanted)) => *found == wanted,
            (Answer::Cut(_), Cut) => true,
            (Answer::Issued(issued), Own(id)) => return self.is_only(issued, id),
            (Answer::Explained(answer), Expected::Granted(id)) => {
                answer.granted
                    && answer.identity == id
                    && answer.reason.is_empty()
                    && (1..=LONGEST).contains(&answer.lifetime)
                    && answer.longest_lifetime == LONGEST
                    && answer.dns_names.is_empty()
            }
            (Answer::Explained(answer), Expected::Denied(reason, id)) => {
                let ExplainResponse { authenticator, sentence, .. } = answer;
                let (identity, reason) = (id.to_owned(), reason.to_owned());
                let (authenticator, sentence) = (authenticator.clone(), sentence.clone());
                let nothing = ExplainResponse::default();
                *answer == ExplainResponse { reason, sentence, identity, authenticator, ..nothing }
            }
            _ => false,
        };
        if fits { Ok(()) } else { Err(format!("{}, instead of {expected:?}", shown(answer))) }
    }

    /// That the certificate is for the identity, the CSR's key and at most the lifetime asked for, and for nothing else.
    fn is_only(&self, issued: &Issued, id: &str) -> Result<(), String> {
        let [leaf, roots] = &issued.chain[..] else { return Err(format!("{} parts", issued.chain.len())) };
        let mut leaves = Certificate::all_from_pem(leaf.as_bytes()).unwrap();
        let (leaf, now) = (leaves.remove(0), OffsetDateTime::now_utc());
        let bundle = TrustBundle::from_pem(roots.as_bytes()).unwrap();
        let allowed = if issued.lifetime > 0 { issued.lifetime } else { 24 * 3_600 };
        let left = (leaf.validity.not_after - now).whole_seconds();
        let (_, parsed) = x509_parser::parse_x509_certificate(leaf.der()).unwrap();
        // Basic constraints, key usages, names, key identifiers, and Mica's own about the last proof.
        let known =
            ["2.5.29.19", "2.5.29.15", "2.5.29.37", "2.5.29.17", "2.5.29.14", "2.5.29.35", forge::PROVED_AT];
        let oids: Vec<_> = parsed.extensions().iter().map(|it| it.oid.to_id_string()).collect();
        let usage = parsed.key_usage().unwrap().unwrap();
        let extended = parsed.extended_key_usage().unwrap().unwrap().value;
        for (holds, what) in [
            (leaves.is_empty(), "one leaf"),
            (*roots == self.place.root_pem(), "the roots"),
            (leaf.uris == [id], "one URI"),
            (leaf.dns.is_empty() && leaf.other_names.is_empty(), "no other names"),
            (leaf.subject_text().is_empty() && leaf.names_critical, "no subject"),
            (!leaf.is_ca && leaf.path_length.is_none(), "CA:FALSE"),
            (usage.critical && usage.value.flags == 1, "digitalSignature alone"),
            (extended.server_auth && extended.client_auth, "both purposes"),
            (extended.other.is_empty() && !extended.any && !extended.code_signing, "no other purposes"),
            (oids.iter().all(|oid| known.contains(&oid.as_str())), "unknown extensions"),
            (leaf.spki == issued.spki, "the CSR's key"),
            (left <= allowed && left <= LONGEST, "no longer than allowed"),
            (left >= allowed / 2 - 60, "about as long as asked"),
            (leaf.validity.not_before >= now - Duration::from_secs(200), "not long before"),
            (
                chain::verify(std::slice::from_ref(&leaf), &bundle, None, now).is_ok(),
                "what the bundle vouches for",
            ),
        ] {
            if !holds {
                return Err(format!("issued without {what}: {leaf:?}, {:?}, {left} s, {oids:?}", leaf.uris));
            }
        }
        Ok(())
    }

    /// An honest caller, over a connection of its own: by turns with a certificate and a token.
    fn is_served(&self) -> Result<(), String> {
        self.turn.set(self.turn.get() + 1);
        let answer = match self.turn.get() % 2 {
            0 => self.send(self.ask()),
            _ => self.bearer(&self.issuer.token("web")),
        };
        self.judge(&answer, Own(WEB)).map_err(|fault| format!("then an honest request: {fault}"))
    }

    /// Plays a table, and counts what the metrics have to have counted. A question is no request, and issues nothing.
    fn play(&self, method: &str, rows: &[Row]) -> Vec<String> {
        let counters =
            ["mica_certificates_issued_total{why=\"request\"}", "mica_requests_for_another_identity_total"];
        let before = counters.map(|counter| self.mica.metric(counter));
        let mut faults = Vec::new();
        let mut refused: BTreeMap<&str, usize> = BTreeMap::new();
        for (name, send, expected) in rows {
            // A row that cannot be played is said among the others.
            let Ok(answer) = catch_unwind(AssertUnwindSafe(|| send(self))) else {
                faults.push(format!("{name}: the test itself panicked"));
                continue;
            };
            if let Err(fault) = self.judge(&answer, *expected) {
                faults.push(format!("{name}: {fault}"));
            }
            if let Expected::Refused(_, reason) = expected {
                *refused.entry(reason).or_default() += 1;
            }
            for secret in &*self.secrets.borrow() {
                if format!("{answer:?}").contains(secret) {
                    faults.push(format!("{name}: the answer repeats a secret"));
                }
            }
            if let Err(fault) = self.is_served() {
                faults.push(format!("{name}: {fault}"));
            }
        }
        if method == EXPLAIN {
            let counted = counters.map(|counter| self.mica.metric(counter));
            // One honest request behind each.
            if counted != [before[0] + rows.len() as f64, before[1]] {
                faults.push(format!("{counted:?} counted, {before:?} before {} questions", rows.len()));
            }
            return faults;
        }
        for (reason, count) in refused {
            let counter = format!("mica_requests_refused_total{{method=\"{method}\",reason=\"{reason}\"}}");
            let counted = self.mica.metric(&counter);
            if counted != count as f64 {
                faults.push(format!("{reason}: {counted} counted, {count} expected"));
            }
        }
        faults
    }

    /// That nothing went wrong which no answer shows; and the end.
    fn ends_well(self) {
        let log = self.mica.log();
        let peak = self.peak();
        eprintln!("at most {} KiB of memory", peak / 1024);
        assert!(peak < MEMORY, "{peak} bytes");
        // Nobody writes a line of it but Mica.
        for line in log.lines() {
            assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "{line}");
        }
        let panics: Vec<_> = log.lines().filter(|line| line.contains("panicked")).collect();
        assert!(panics.is_empty(), "{panics:?}");
        for secret in &*self.secrets.borrow() {
            assert!(!log.contains(secret), "the log has {secret}");
        }
        self.mica.stop();
    }

    /// The most memory that Mica has ever had in use, in bytes.
    fn peak(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.mica.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }
}

#[test]
fn every_hostile_request_is_refused_or_gets_the_callers_own_identity() {
    let stage = Stage::new();
    let tables = [
        (
            CREATE_CERTIFICATE,
            [wire::ROWS, tokens::ROWS, certificates::ROWS, csrs::ROWS, wishes::ROWS, lessons::ROWS].concat(),
        ),
        (HANDLE_CSR, [csrs::HANDLE_CSR, lessons::HANDLE_CSR].concat()),
        (EXPLAIN, explain::ROWS.to_vec()),
    ];
    let (mut names, mut faults) = (BTreeSet::new(), Vec::new());
    for (method, rows) in &tables {
        for (name, ..) in rows {
            assert!(names.insert(*name), "{name}: twice");
        }
        faults.extend(stage.play(method, rows));
    }
    eprintln!("{} rows", names.len());
    assert!(names.len() >= 80);
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    stage.ends_well();
}

/// A status of Mica's, or what tonic makes of a connection that ends.
fn answer_of(status: Status) -> Answer {
    match std::error::Error::source(&status) {
        Some(fault) => Answer::Cut(format!("{fault:?}")),
        None => Answer::Refused(status),
    }
}

fn shown(answer: &Answer) -> String {
    match answer {
        Answer::Issued(issued) => {
            let leaf = Certificate::all_from_pem(issued.chain[0].as_bytes()).unwrap().remove(0);
            format!("issued for {:?}", leaf.uris)
        }
        Answer::Explained(answer) => format!("explained: {answer:?}"),
        Answer::Refused(status) => {
            let reason = rpc::Status::decode(status.details()).ok().filter(|it| !it.details.is_empty());
            let reason = reason.map(|it| rpc::ErrorInfo::decode(&*it.details[0].value).unwrap().reason);
            format!("{:?} {reason:?} {:?}", status.code(), status.message())
        }
        Answer::Http(status) => format!("HTTP {status}"),
        Answer::Cut(fault) => format!("cut: {fault}"),
    }
}

/// Of the first CSR in a text, read without Mica; nothing if there is none.
fn spki(csr: &str) -> Vec<u8> {
    let Some(block) = pem::blocks(csr.as_bytes()).ok().and_then(|blocks| blocks.into_iter().next()) else {
        return Vec::new();
    };
    x509_parser::certification_request::X509CertificationRequest::from_der(&block.der)
        .map(|(_, csr)| csr.certification_request_info.subject_pki.raw.to_owned())
        .unwrap_or_default()
}

/// Sends a certificate without asking whether it fits its key.
#[derive(Debug)]
struct Unchecked(Arc<rustls::sign::CertifiedKey>);

impl rustls::client::ResolvesClientCert for Unchecked {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// TLS as a row wants it, below tonic's client.
#[derive(Clone)]
struct Connector {
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
}

impl tonic::codegen::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { address, tls } = self.clone();
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::try_from("localhost").unwrap();
            Ok(TokioIo::new(tokio_rustls::TlsConnector::from(tls).connect(name, stream).await?))
        })
    }
}
