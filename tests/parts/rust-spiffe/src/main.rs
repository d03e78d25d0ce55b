//! A workload as the users of the crate `spiffe` write it: it makes requests to itself all the time, until standard input
//! ends.
//!
//! Each request is a connection of its own, under mutual TLS; the first that fails ends the program, and so does a token
//! that is not good. A token that cannot be fetched because nobody answers is counted. A line of standard input is answered
//! with what there was so far.
//!
//! `spiffe-rustls` refuses handshakes from the moment on when the source has something new until it has converted it. Such a
//! request is counted as pending and made again.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use spiffe::{JwtSource, JwtSvid, SpiffeId, X509Source};
use spiffe_rustls::{authorizer, mtls_client, mtls_server};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector};

type Fault = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [flag, audience, socket] = arguments.as_slice() else {
        eprintln!("usage: rust-spiffe --audience NAME SOCKET");
        std::process::exit(2);
    };
    assert_eq!(flag, "--audience");
    if let Err(fault) = work(audience, &format!("unix:{socket}")).await {
        eprintln!("rust-spiffe: {fault}");
        std::process::exit(1);
    }
}

async fn work(audience: &str, endpoint: &str) -> Result<(), Fault> {
    let patience = Duration::from_secs(30);
    let x509_source = X509Source::builder().endpoint(endpoint).initial_sync_timeout(patience).build().await?;
    let jwt_source = JwtSource::builder().endpoint(endpoint).initial_sync_timeout(patience).build().await?;
    let id = x509_source.svid()?.spiffe_id().clone();

    let allowed = || authorizer::exact([id.to_string()]);
    let server = mtls_server(x509_source.clone()).authorize(allowed()?).build()?;
    let (client, status) = mtls_client(x509_source.clone()).authorize(allowed()?).build_with_status()?;
    let connector = TlsConnector::from(Arc::new(client));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(serve(listener, TlsAcceptor::from(Arc::new(server))));

    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut tick = interval(Duration::from_millis(50));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut certificates = HashSet::new();
    let (mut requests, mut pending, mut tokens, mut missed) = (0, 0, 0, 0);
    loop {
        tokio::select! {
            line = lines.next_line() => {
                if line?.is_none() {
                    return Ok(());
                }
                let serials = certificates.len();
                println!("id={id} requests={requests} serials={serials} tokens={tokens} missed={missed} pending={pending}");
            }
            _ = tick.tick() => {
                let before = status.current();
                match timeout(Duration::from_secs(10), request(&connector, address)).await? {
                    Ok(certificate) => {
                        requests += 1;
                        certificates.insert(certificate);
                    }
                    Err(_) if !before.available || status.current().source_revision != before.source_revision => {
                        pending += 1;
                        continue;
                    }
                    Err(fault) => return Err(format!("request {requests}: {fault}").into()),
                }
                if token_is_good(&jwt_source, &id, audience).await? { tokens += 1 } else { missed += 1 }
            }
        }
    }
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor) -> Result<(), Fault> {
    loop {
        let (plain, _) = listener.accept().await?;
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let answered = async {
                let mut stream = acceptor.accept(plain).await?;
                stream.write_all(b"hello").await?;
                stream.shutdown().await
            };
            // The client misses its answer, and ends.
            if let Err(fault) = answered.await {
                eprintln!("server: {fault}");
            }
        });
    }
}

/// The certificate that the server had.
async fn request(connector: &TlsConnector, address: SocketAddr) -> Result<Vec<u8>, Fault> {
    let plain = TcpStream::connect(address).await?;
    let mut stream = connector.connect("localhost".try_into()?, plain).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    if answer != "hello" {
        return Err(format!("the answer is {answer:?}").into());
    }
    let chain = stream.get_ref().1.peer_certificates().ok_or("no certificate")?;
    Ok(chain[0].to_vec())
}

/// False where it cannot be fetched now; what is fetched is judged with the bundle of the source.
async fn token_is_good(source: &JwtSource, id: &SpiffeId, audience: &str) -> Result<bool, Fault> {
    let fetched = match timeout(Duration::from_secs(5), source.fetch_jwt_svid([audience])).await {
        // Whatever the library makes of a socket that is away; the test counts how often.
        Err(_) | Ok(Err(_)) => return Ok(false),
        Ok(Ok(fetched)) => fetched,
    };
    let judged = JwtSvid::parse_and_validate(fetched.token(), source, &[audience])?;
    if judged.spiffe_id() != id {
        return Err(format!("the token is for {}, not for {id}", judged.spiffe_id()).into());
    }
    Ok(true)
}
