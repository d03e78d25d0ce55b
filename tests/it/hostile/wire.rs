//! Below the request: protobuf, gRPC, HTTP/2, TLS. Web has a good certificate, and sends what no client should.

use std::io::Read as _;
use std::net::TcpStream;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use mica::proto::istio::v1::auth as istio;
use prost::Message as _;
use prost::bytes::Bytes;
use rustls::pki_types::ServerName;
use tonic::codegen::Service as _;
use tonic::codegen::http::{HeaderMap, HeaderValue, Method, Request};
use tonic::{Code, Status};

use super::{Answer, Cut, Expected, Http, Issued, Own, Row, Stage, TOO_LARGE, WEB, answer_of, invalid, spki};
use crate::parts;
use crate::serve::{mtls, output_within};

const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const INTERNAL: Expected = Expected::Status(Code::Internal);
const UNIMPLEMENTED: Expected = Expected::Status(Code::Unimplemented);

#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    // What the others differ from.
    ("a request made by hand", |s| call(s, |_| ()), Own(WEB)),
    ("a request in frames made by hand", |s| frames(s, &headers(PATH)), Own(WEB)),
    ("a request of a client that waits for the server's settings", patient, Own(WEB)),

    // Protobuf.
    ("no bytes of a message", |s| message(s, |_| Vec::new()), invalid("CSR_MALFORMED")),
    ("a message of garbage", |s| message(s, |_| vec![0xff; 100]), INTERNAL),
    ("a message cut off", |s| message(s, |m| m[..m.len() - 1].to_vec()), INTERNAL),
    ("a CSR of the wrong wire type", |s| message(s, |_| vec![0x08, 0x01]), INTERNAL),
    ("a lifetime of the wrong wire type", |s| message(s, |m| [&m[..], &[0x1a, 1, 0]].concat()), INTERNAL),
    ("a CSR longer than the message", |s| message(s, |_| vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]), INTERNAL),
    ("a number of eleven bytes", |s| message(s, |m| [&m[..], &[0x18], &[0xff; 10], &[1]].concat()), INTERNAL),
    ("a CSR of DER, which is no text", |s| message(s, |_| [&[0x0a, 3][..], &[0x30, 0x82, 0xff]].concat()), INTERNAL),
    ("fields that nobody knows", |s| message(s, |m| [&m[..], &[0x7a, 3, 1, 2, 3], &[0xf8, 0x07, 1]].concat()), Own(WEB)),
    ("a field with the number zero", |s| message(s, |m| [&m[..], &[0, 1]].concat()), INTERNAL),
    ("a group that has no end", |s| message(s, |m| [&m[..], &[0x7b]].concat()), INTERNAL),
    ("groups in groups, 10,000 deep", |s| message(s, |m| [&m[..], &[0x7b; 10_000]].concat()), INTERNAL),
    ("two CSRs in one message, of which the last counts", |s| message(s, |m| [istio::IstioCertificateRequest { csr: "first".to_owned(), ..Default::default() }.encode_to_vec(), m].concat()), Own(WEB)),

    // gRPC's frames.
    ("no message at all", |s| call(s, |c| c.body.clear()), INTERNAL),
    ("trailers alone", |s| call(s, |c| { c.body.clear(); c.trailers = true }), INTERNAL),
    ("trailers behind the message", |s| call(s, |c| c.trailers = true), Own(WEB)),
    ("a message shorter than it says", |s| call(s, |c| c.body.truncate(100)), INTERNAL),
    ("a message that says it has 4 GB", says_4_gb, TOO_LARGE),
    ("a message over the limit", |s| message(s, |_| vec![0; 100_000]), TOO_LARGE),
    ("a message that says it is compressed", |s| call(s, |c| c.body[0] = 1), INTERNAL),
    ("a message compressed in a way that nobody takes", |s| call(s, |c| { c.body[0] = 1; c.header("grpc-encoding", "gzip") }), UNIMPLEMENTED),
    ("a message with a flag that does not exist", |s| call(s, |c| c.body[0] = 0x80), INTERNAL),
    ("a deadline that is none", |s| call(s, |c| c.header("grpc-timeout", "soon")), Own(WEB)),
    ("a deadline of 10,000 years", |s| call(s, |c| c.header("grpc-timeout", "99999999H")), Own(WEB)),
    ("a trace that is none", |s| call(s, |c| c.header("traceparent", "00-é-x")), Own(WEB)),
    ("Istio's name of the cluster, which counts for nothing", |s| call(s, |c| c.header("clusterid", "../../other")), Own(WEB)),

    // HTTP.
    ("another content type", |s| call(s, |c| c.set("content-type", "application/json")), Http(415)),
    ("a content type that begins like gRPC's", |s| call(s, |c| c.set("content-type", "application/grpc-web")), Http(415)),
    ("no content type", |s| call(s, |c| c.headers.retain(|(name, _)| *name != "content-type")), Http(415)),
    ("GET", |s| call(s, |c| c.method = Method::GET), Http(405)),
    ("PUT", |s| call(s, |c| c.method = Method::PUT), Http(405)),
    ("a service that does not exist", |s| path(s, "/istio.v1.auth.Nothing/CreateCertificate"), UNIMPLEMENTED),
    ("a method that does not exist", |s| path(s, "/istio.v1.auth.IstioCertificateService/Nothing"), UNIMPLEMENTED),
    ("a method in other letters", |s| path(s, &PATH.to_lowercase()), UNIMPLEMENTED),
    ("a method of another service", |s| path(s, "/istio.v1.auth.IstioCAService/CreateCertificate"), UNIMPLEMENTED),
    ("a method of another package", |s| path(s, "/istio.v1.auth2.IstioCertificateService/CreateCertificate"), UNIMPLEMENTED),
    ("a method with a slash behind it", |s| path(s, &format!("{PATH}/")), UNIMPLEMENTED),
    ("a method with two slashes before it", |s| path(s, &format!("/{PATH}")), UNIMPLEMENTED),
    ("a method by way of another folder", |s| path(s, &format!("/x/..{PATH}")), UNIMPLEMENTED),
    ("a method whose slash is encoded", |s| path(s, "/istio.v1.auth.IstioCertificateService%2FCreateCertificate"), UNIMPLEMENTED),
    ("a method with an encoded letter", |s| path(s, "/istio.v1.auth.IstioCertificateService/%43reateCertificate"), UNIMPLEMENTED),
    ("a query behind the method, which counts for nothing", |s| path(s, &format!("{PATH}?identity=db")), Own(WEB)),
    ("a path of 60 kB", |s| path(s, &format!("/{}", "a".repeat(60_000))), Http(431)),
    ("a header of 1 MB", |s| call(s, |c| c.header("x-large", &"a".repeat(1_000_000))), Cut),
    ("100 headers", |s| call(s, |c| (0..100).for_each(|_| c.header("x-many", "x"))), Http(431)),
    ("10,000 headers", |s| call(s, |c| (0..10_000).for_each(|_| c.header("x-many", "x"))), Cut),
    ("a method without its first slash", |s| frames(s, &headers(&PATH[1..])), Cut),
    ("no method", |s| frames(s, &headers("")), Cut),
    ("two methods", |s| frames(s, &[headers(PATH), field(":path", PATH)].concat()), Cut),
    ("a header in upper case", |s| frames(s, &[headers(PATH), field("X-Upper", "x")].concat()), Cut),
    ("a header that ends the line", |s| frames(s, &[headers(PATH), field("x-split", "a\r\nauthorization: b")].concat()), Cut),
    ("a header of HTTP/1.1", |s| frames(s, &[headers(PATH), field("transfer-encoding", "chunked")].concat()), Cut),
    ("HTTP/1.1", |s| said(tls(s, &[], format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\n\r\n").as_bytes())), Cut),
    ("HTTP/1.1 where it was agreed on", |s| said(tls(s, &[b"http/1.1"], b"GET / HTTP/1.1\r\n\r\n")), Cut),
    ("HTTP/2 that was not agreed on", |s| unagreed(s), Own(WEB)),

    // TLS.
    ("HTTP/2 in plain text", |s| said(plain(s, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")), Cut),
    ("HTTP/1.1 in plain text", |s| said(plain(s, b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")), Cut),
    ("a hello of SSL 2", |s| said(plain(s, &[0x80, 0x2e, 1, 0, 2, 0, 0x15, 0, 0, 0, 0x10, 1, 0, 0x80])), Cut),
    ("a record longer than any", |s| said(plain(s, &[&[0x16, 3, 1, 0xff, 0xff][..], &[1; 70_000]].concat())), Cut),
    ("a hello that is none", babble, Cut),
    ("TLS 1.1", tls_1_1, Cut),
];

/// An HTTP request: an honest one until a row changes it.
struct Call {
    method: Method,
    path: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    trailers: bool,
}

impl Call {
    fn header(&mut self, name: &'static str, value: &str) {
        self.headers.push((name, value.to_owned()));
    }

    fn set(&mut self, name: &'static str, value: &str) {
        self.headers.retain(|(other, _)| *other != name);
        self.header(name, value);
    }
}

fn call(stage: &Stage, change: impl FnOnce(&mut Call)) -> Answer {
    call_with(stage, &[b"h2"], change)
}

/// Without ALPN, as clients that know what is there may do.
fn unagreed(stage: &Stage) -> Answer {
    call_with(stage, &[], |_| ())
}

pub(super) fn path(stage: &Stage, path: &str) -> Answer {
    call(stage, |call| call.path = path.to_owned())
}

/// With other bytes for the message.
pub(super) fn message(stage: &Stage, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Answer {
    call(stage, |call| {
        let message = change(call.body[5..].to_vec());
        call.body = framed(&message);
    })
}

/// The same, sent to another path.
pub(super) fn message_to(stage: &Stage, path: &str, message: &[u8]) -> Answer {
    call(stage, |call| (call.path, call.body) = (path.to_owned(), framed(message)))
}

pub(super) fn says_4_gb(stage: &Stage) -> Answer {
    call(stage, |call| call.body[1..5].fill(0xff))
}

/// The beginning of TLS, and then nothing that is.
pub(super) fn babble(stage: &Stage) -> Answer {
    said(plain(stage, &[0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0]))
}

fn framed(message: &[u8]) -> Vec<u8> {
    [&[0], &(message.len() as u32).to_be_bytes()[..], message].concat()
}

fn call_with(stage: &Stage, alpn: &[&[u8]], change: impl FnOnce(&mut Call)) -> Answer {
    let asked = mtls::ask(mtls::csr(WEB));
    let (spki, lifetime) = (spki(&asked.csr), asked.validity_duration);
    let mut call = Call {
        method: Method::POST,
        path: PATH.to_owned(),
        headers: vec![("content-type", "application/grpc".to_owned()), ("te", "trailers".to_owned())],
        body: framed(&asked.encode_to_vec()),
        trailers: false,
    };
    change(&mut call);
    let mut request = Request::builder().method(call.method).uri(call.path);
    for (name, value) in &call.headers {
        request = request.header(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    let trailers =
        call.trailers.then(|| Ok(HeaderMap::from_iter([("x-last".parse().unwrap(), "x".parse().unwrap())])));
    let body = Full::new(Bytes::from(call.body)).with_trailers(std::future::ready(trailers));
    let request = request.body(tonic::body::Body::new(body)).unwrap();
    stage.runtime.block_on(async {
        let mut channel = stage.connect(Some(&stage.web), alpn).await.unwrap();
        std::future::poll_fn(|cx| channel.poll_ready(cx)).await.unwrap();
        let answer = match channel.call(request).await {
            Ok(answer) => answer,
            Err(fault) => return Answer::Cut(format!("{fault:?}")),
        };
        if answer.status() != 200 {
            return Answer::Http(answer.status().as_u16());
        }
        let (head, body) = answer.into_parts();
        let body = match body.collect().await {
            Ok(body) => body,
            Err(fault) => return answer_of(fault),
        };
        let status = Status::from_header_map(&head.headers)
            .or_else(|| Status::from_header_map(body.trailers()?))
            .expect("a status of gRPC");
        if status.code() != Code::Ok {
            return Answer::Refused(status);
        }
        let bytes = body.to_bytes();
        let chain = istio::IstioCertificateResponse::decode(&bytes[5..]).unwrap().cert_chain;
        Answer::Issued(Issued { chain, spki, lifetime })
    })
}

/// A header field, as HPACK writes one that is in no table (RFC 7541 6.2.2).
fn field(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| {
        let mut length = vec![text.len().min(127) as u8];
        if text.len() >= 127 {
            let rest = text.len() - 127;
            assert!(rest < 128, "{text}");
            length.push(rest as u8);
        }
        [&length, text.as_bytes()].concat()
    };
    [vec![0], text(name), text(value)].concat()
}

/// Those of an honest request for this path.
pub(super) fn headers(path: &str) -> Vec<u8> {
    [
        field(":method", "POST"),
        field(":scheme", "https"),
        field(":authority", "localhost"),
        field(":path", path),
        field("content-type", "application/grpc"),
        field("te", "trailers"),
    ]
    .concat()
}

/// One request in HTTP/2 frames made by hand, for which http's types would not do.
pub(super) fn frames(stage: &Stage, headers: &[u8]) -> Answer {
    frames_on(stream(stage, &[b"h2"]), headers)
}

/// RFC 9113 3.2: both sides speak as soon as the handshake is done.
fn patient(stage: &Stage) -> Answer {
    let mut tls = stream(stage, &[b"h2"]);
    let mut head = [0; 9];
    tls.read_exact(&mut head).unwrap();
    let mut settings = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    tls.read_exact(&mut settings).unwrap();
    frames_on(tls, &headers(PATH))
}

fn frames_on(mut tls: impl std::io::Read + std::io::Write, headers: &[u8]) -> Answer {
    let asked = mtls::ask(mtls::csr(WEB));
    let (spki, lifetime) = (spki(&asked.csr), asked.validity_duration);
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;
    const GOAWAY: u8 = 7;
    let sent = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(SETTINGS, 0, 0, &[]),
        frame(HEADERS, 4, 1, headers),
        frame(DATA, 1, 1, &framed(&asked.encode_to_vec())),
    ]
    .concat();
    if let Err(fault) = tls.write_all(&sent) {
        return Answer::Cut(fault.to_string());
    }
    let mut data = Vec::new();
    loop {
        let mut head = [0; 9];
        if let Err(fault) = tls.read_exact(&mut head) {
            assert_ne!(fault.kind(), std::io::ErrorKind::WouldBlock, "no answer in time");
            return Answer::Cut(fault.to_string());
        }
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        tls.read_exact(&mut payload).unwrap();
        match (head[3], head[4] & 1 != 0) {
            (RST_STREAM | GOAWAY, _) => return Answer::Cut(format!("frame {} {payload:?}", head[3])),
            (HEADERS, true) if data.is_empty() => {
                return Answer::Refused(Status::unknown("without a message"));
            }
            (HEADERS, true) => break,
            (DATA, _) => data.extend(payload),
            _ => {}
        }
    }
    let chain = istio::IstioCertificateResponse::decode(&data[5..]).unwrap().cert_chain;
    Answer::Issued(Issued { chain, spki, lifetime })
}

type Tls = rustls::StreamOwned<rustls::ClientConnection, TcpStream>;

fn tcp(stage: &Stage) -> TcpStream {
    let tcp = TcpStream::connect(stage.address).unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    tcp.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    tcp
}

fn stream(stage: &Stage, alpn: &[&[u8]]) -> Tls {
    let config = Arc::new(stage.tls(Some(&stage.web), alpn));
    let name = ServerName::try_from("localhost").unwrap();
    rustls::StreamOwned::new(rustls::ClientConnection::new(config, name).unwrap(), tcp(stage))
}

/// What comes back until the server ends the connection.
fn tls(stage: &Stage, alpn: &[&[u8]], sent: &[u8]) -> Vec<u8> {
    exchange(stream(stage, alpn), sent)
}

fn plain(stage: &Stage, sent: &[u8]) -> Vec<u8> {
    exchange(tcp(stage), sent)
}

fn exchange(mut stream: impl std::io::Read + std::io::Write, sent: &[u8]) -> Vec<u8> {
    // The server may have gone before it has read everything.
    let _ = stream.write_all(sent).and_then(|()| stream.flush());
    let mut answer = Vec::new();
    if let Err(fault) = stream.read_to_end(&mut answer) {
        assert_ne!(fault.kind(), std::io::ErrorKind::WouldBlock, "the connection stays");
    }
    answer
}

/// An alert of TLS and a frame of HTTP/2 that ends everything are no answers.
fn said(bytes: Vec<u8>) -> Answer {
    let text = String::from_utf8_lossy(&bytes);
    match text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)) {
        Some(status) => Answer::Http(status.parse().unwrap()),
        None => Answer::Cut(text.into_owned()),
    }
}

fn tls_1_1(stage: &Stage) -> Answer {
    let mut openssl = parts::openssl();
    openssl.args(["s_client", "-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0", "-connect"]);
    openssl.arg(stage.address.to_string()).stdin(Stdio::null());
    let output = output_within(&mut openssl, Duration::from_secs(20));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("alert"), "{said}");
    Answer::Cut(said)
}
