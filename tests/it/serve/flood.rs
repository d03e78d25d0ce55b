//! Clients that want to be in the way of others, in HTTP/2: each time the next honest request succeeds, and Mica has not
//! grown.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mica::client::bench::{self, Call, Load};
use mica::proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use prost::bytes::Bytes;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Code;
use tonic::codegen::http::Request;

use super::mtls::{ask, connect, csr, reason};
use super::{Mica, Place};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const PATH: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// What an attack may leave behind, with all that a debug build and its allocator keep.
const GROWTH: u64 = 48 << 20;

/// A running Mica with one account that has its certificate.
struct Victim {
    place: Place,
    mica: Mica,
    before: u64,
}

impl Victim {
    async fn new() -> Self {
        let place = Place::new();
        place.account("web");
        let mica = place.start(&[]);
        place.leaf("web");
        let mut victim = Self { place, mica, before: 0 };
        victim.honest().await;
        victim.before = victim.resident();
        victim
    }

    fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.mica.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    async fn honest(&self) {
        let folder = self.place.folder("shop", "web");
        let channel = connect(&self.mica, &self.place, Some(&folder)).await;
        let started = Instant::now();
        IstioCertificateServiceClient::new(channel).create_certificate(ask(csr(WEB))).await.unwrap();
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }

    async fn stands(self) {
        self.stands_within(GROWTH).await;
    }

    async fn stands_within(self, growth: u64) {
        self.honest().await;
        let after = self.resident();
        assert!(after < self.before + growth, "{} bytes, before {}", after, self.before);
        assert!(!self.mica.log().contains("panic"), "{}", self.mica.log());
        self.mica.stop();
    }

    /// A connection with the account's certificate, ready for HTTP/2.
    async fn dial(&self) -> TlsStream<TcpStream> {
        dial(self.mica.address("grpc"), self.tls()).await.unwrap()
    }

    fn tls(&self) -> TlsConnector {
        let mut store = rustls::RootCertStore::empty();
        let roots = self.place.root_pem();
        store.add_parsable_certificates(CertificateDer::pem_slice_iter(roots.as_bytes()).map(Result::unwrap));
        let folder = self.place.folder("shop", "web");
        let chain = CertificateDer::pem_file_iter(folder.join("cert-chain.pem")).unwrap().map(Result::unwrap);
        let key = PrivateKeyDer::from_pem_file(folder.join("key.pem")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(store)
            .with_client_auth_cert(chain.collect(), key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        TlsConnector::from(Arc::new(config))
    }
}

async fn dial(address: String, tls: TlsConnector) -> Result<TlsStream<TcpStream>, String> {
    let tcp = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
    tls.connect(ServerName::try_from("localhost").unwrap(), tcp).await.map_err(|e| e.to_string())
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// RFC 9113 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A gRPC call's header, in HPACK without compression.
fn header() -> Vec<u8> {
    let mut block = vec![0x83, 0x87, 0x04, PATH.len() as u8];
    block.extend(PATH.as_bytes());
    block.extend([0x01, 9]);
    block.extend(b"localhost");
    block.extend([0x0f, 0x10, 16]);
    block.extend(b"application/grpc");
    block
}

async fn hello(stream: &mut TlsStream<TcpStream>) {
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
    stream.flush().await.unwrap();
}

/// Writes until everything is written or the server has had enough, and then hears it say so.
async fn until_it_hangs_up(stream: TlsStream<TcpStream>, frames: impl Iterator<Item = Vec<u8>>) -> bool {
    let (mut reading, mut writing) = tokio::io::split(stream);
    let ended = async {
        let mut answers = [0; 16 * 1024];
        while matches!(reading.read(&mut answers).await, Ok(1..)) {}
    };
    let writing = async {
        for frame in frames {
            if writing.write_all(&frame).await.is_err() {
                return;
            }
        }
        let _ = writing.flush().await;
        std::future::pending().await
    };
    tokio::time::timeout(Duration::from_secs(20), async {
        tokio::select! { () = ended => {} () = writing => {} }
    })
    .await
    .is_ok()
}

/// CVE-2023-44487: requests that are taken back as soon as they are made cost the server and not the client.
#[tokio::test(flavor = "multi_thread")]
async fn rapid_resets_end_their_connection_cve_2023_44487() {
    let victim = Victim::new().await;
    for _ in 0..4 {
        let mut stream = victim.dial().await;
        hello(&mut stream).await;
        let resets = (0..100_000u32).map(|n| {
            let id = 2 * n + 1;
            let mut both = frame(HEADERS, END_HEADERS, id, &header());
            both.extend(frame(RST_STREAM, 0, id, &8u32.to_be_bytes()));
            both
        });
        assert!(until_it_hangs_up(stream, resets).await);
    }
    victim.stands().await;
}

/// CVE-2024-2758 and its siblings in other servers: a header that never ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_header_without_an_end_ends_its_connection_cve_2024_2758() {
    let victim = Victim::new().await;
    for piece in [0, 1, 1_000, 16_000] {
        let mut stream = victim.dial().await;
        hello(&mut stream).await;
        // A literal header that is said to be 2^24 bytes long.
        let begin = [header(), vec![0x00, 1, b'x', 0x7f, 0x81, 0xff, 0xff, 0x07]].concat();
        let frames = std::iter::once(frame(HEADERS, 0, 1, &begin))
            .chain((0..200_000).map(|_| frame(CONTINUATION, 0, 1, &vec![b'a'; piece])));
        assert!(until_it_hangs_up(stream, frames).await, "{piece}");
    }
    victim.stands().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_what_is_answered_at_once_do_not_fill_the_memory() {
    let victim = Victim::new().await;
    for kind in [PING, SETTINGS] {
        let mut stream = victim.dial().await;
        hello(&mut stream).await;
        let payload: &[u8] = if kind == PING { &[7; 8] } else { &[] };
        // Nobody reads the answers.
        let flood = async {
            for _ in 0..2_000_000 {
                if stream.write_all(&frame(kind, 0, 0, payload)).await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(5), flood).await;
        assert!(victim.resident() < victim.before + GROWTH);
    }
    victim.stands().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_streams_of_one_who_does_not_count_are_refused() {
    let victim = Victim::new().await;
    let mut stream = victim.dial().await;
    hello(&mut stream).await;
    let begun = (0..10_000u32).map(|n| frame(HEADERS, END_HEADERS, 2 * n + 1, &header()));
    assert!(until_it_hangs_up(stream, begun).await);
    victim.stands().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_message_or_header_is_refused_and_costs_nothing() {
    let victim = Victim::new().await;
    let folder = victim.place.folder("shop", "web");
    let mut client =
        IstioCertificateServiceClient::new(connect(&victim.mica, &victim.place, Some(&folder)).await);
    for length in [17 << 10, 65 << 10, 1 << 20, 5 << 20] {
        let refused = client.create_certificate(ask("x".repeat(length))).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{length}: {refused}");
        assert_eq!(reason(&refused), "CSR_MALFORMED");
        assert!(length < 64 << 10 || refused.message().contains("longer than"), "{refused}");
    }
    for length in [17 << 10, 100 << 10] {
        let mut request = tonic::Request::new(ask(csr(WEB)));
        request
            .metadata_mut()
            .insert("authorization", format!("Bearer {}", "x".repeat(length)).parse().unwrap());
        assert!(client.create_certificate(request).await.is_err());
        // The connection may be on its way out; the same client goes on all the same.
        let mut tries = 0;
        while let Err(fault) = client.create_certificate(ask(csr(WEB))).await {
            tries += 1;
            assert!(fault.code() == Code::Cancelled && tries < 10, "{fault}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    victim.stands().await;
}

/// Answers that nobody takes, and requests that nobody ends, on connections that are kept alive.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_taken_or_not_ended_has_its_time() {
    let victim = Victim::new().await;
    let message = {
        use prost::Message as _;
        let asked = ask(csr(WEB)).encode_to_vec();
        let mut message = vec![0];
        message.extend((asked.len() as u32).to_be_bytes());
        message.extend(asked);
        Bytes::from(message)
    };
    let mut clients = tokio::task::JoinSet::new();
    for ended in [true, false] {
        let (stream, message) = (victim.dial().await, message.clone());
        clients.spawn(async move {
            let (mut client, mut connection) = h2::client::Builder::new()
                .initial_window_size(0)
                .handshake::<_, Bytes>(stream)
                .await
                .unwrap();
            let mut pings = connection.ping_pong().unwrap();
            let mut driver = tokio::task::JoinSet::new();
            driver.spawn(async move {
                let _ = connection.await;
            });
            let mut held = Vec::new();
            for _ in 0..100 {
                client = client.ready().await.unwrap();
                let request = Request::post(format!("https://localhost{PATH}"))
                    .header("content-type", "application/grpc")
                    .header("te", "trailers")
                    .body(())
                    .unwrap();
                let (answer, mut sending) = client.send_request(request, false).unwrap();
                sending.send_data(if ended { message.clone() } else { message.slice(..9) }, ended).unwrap();
                held.push((answer, sending));
            }
            let begun = Instant::now();
            while driver.try_join_next().is_none() {
                let _ = pings.ping(h2::Ping::opaque()).await;
                tokio::time::sleep(Duration::from_millis(500)).await;
                assert!(begun.elapsed() < Duration::from_secs(60), "ended: {ended}");
            }
            assert!(begun.elapsed() > Duration::from_secs(20), "ended: {ended}, {:?}", begun.elapsed());
        });
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    victim.honest().await;
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    victim.stands().await;
}

/// HPACK says in one byte what takes a hundred to remember.
#[tokio::test(flavor = "multi_thread")]
async fn headers_that_are_small_on_the_wire_are_not_large_in_memory() {
    let victim = Victim::new().await;
    // Put into the table of headers once, and from then on one byte each.
    let learnt = [header(), vec![0x40, 1, b'x', 0]].concat();
    let many = [header(), vec![0x80 | 62; 450]].concat();
    let mut held = Vec::new();
    for _ in 0..40 {
        let mut stream = victim.dial().await;
        hello(&mut stream).await;
        let mut frames = frame(HEADERS, END_HEADERS, 1, &learnt);
        for n in 1..128 {
            frames.extend(frame(HEADERS, END_HEADERS, 2 * n + 1, &many));
        }
        stream.write_all(&frames).await.unwrap();
        stream.flush().await.unwrap();
        held.push(stream);
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    // Without a bound on fields it took 236 MB.
    victim.stands_within(2 * GROWTH).await;
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_thousand_at_once_are_answered_or_told_to_come_again() {
    let victim = Victim::new().await;
    let requests: Vec<_> = (0..8).map(|_| ask(csr(WEB))).collect();
    let load = Load {
        connections: 160,
        in_flight: 20_000,
        duration: Duration::from_secs(600),
        requests: 20_000,
        rate: None,
        new_connections: false,
    };
    let (address, tls) = (victim.mica.address("grpc"), victim.tls());
    let dial = move || dial(address.clone(), tls.clone());
    let outcome = bench::put(dial, Call::new("localhost", None, &requests), &load).await;
    eprintln!("{outcome:?}");
    let full = "RESOURCE_EXHAUSTED QUEUE_FULL";
    assert!(outcome.failed.keys().all(|why| why == full), "{:?}", outcome.failed);
    assert_eq!(outcome.granted + outcome.failures(), 20_000);
    assert!(outcome.granted >= 8_192, "{outcome:?}");
    let peak = victim.resident();
    assert!(peak < victim.before + 400 * (1 << 20), "{peak}");
    victim.honest().await;
    victim.mica.stop();
}
