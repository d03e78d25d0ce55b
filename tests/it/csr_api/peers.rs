//! What was issued for CSRs, in the hands of those who use it: rustls, OpenSSL, go-spiffe and two Envoys.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

use super::{WEB, istio_command, said, start};
use crate::envoy::Mesh;
use crate::fixtures::{Set, deliver, serial};
use crate::parts;
use crate::serve::{Mica, Place, wait_for};

const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";

/// Gets a certificate for an account by a CSR.
fn got(place: &Place, mica: &Mica, account: &str, kind: &str) -> PathBuf {
    let out = place.root.path().join(format!("{account}-{kind}"));
    let mut command = istio_command(place, mica, "create");
    command.arg("--certificate").arg(place.folder("shop", account));
    let said = said(command.args(["--key-kind", kind, "--out"]).arg(&out));
    assert_eq!(said.code, 0, "{said:?}");
    out
}

/// OpenSSL as a server that asks for a certificate and verifies it.
struct OpensslServer(Child);

impl OpensslServer {
    fn start(folder: &Path, version: &str) -> (Self, u16) {
        let port = crate::serve::free_port();
        let mut openssl = parts::openssl();
        openssl.args([
            "s_server",
            "-accept",
            &port.to_string(),
            "-www",
            "-Verify",
            "3",
            "-verify_return_error",
        ]);
        openssl.arg(version).arg("-cert").arg(folder.join("cert-chain.pem"));
        openssl.arg("-cert_chain").arg(folder.join("cert-chain.pem"));
        openssl.arg("-key").arg(folder.join("key.pem")).arg("-CAfile").arg(folder.join("root-cert.pem"));
        let child = openssl.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for(Duration::from_secs(10), "OpenSSL", || TcpStream::connect(("127.0.0.1", port)).ok());
        (Self(child), port)
    }
}

impl Drop for OpensslServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// rustls with the certificate of a folder, which verifies its peer's chain and leaves the name to SPIFFE.
fn rustls_get(folder: &Path, port: u16) -> Result<String, Box<dyn std::error::Error>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(folder.join("root-cert.pem"))? {
        roots.add(root?)?;
    }
    let inner =
        rustls::client::WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()?;
    let chain =
        CertificateDer::pem_file_iter(folder.join("cert-chain.pem"))?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(folder.join("key.pem"))?;
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Nameless(inner)))
        .with_client_auth_cert(chain, key)?;
    let mut tcp = TcpStream::connect(("127.0.0.1", port))?;
    tcp.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut tls = rustls::ClientConnection::new(Arc::new(config), "db".try_into()?)?;
    let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    // OpenSSL ends without a word.
    let _ = stream.read_to_string(&mut answer);
    Ok(answer)
}

#[derive(Debug)]
struct Nameless(Arc<rustls::client::WebPkiServerVerifier>);

impl rustls::client::danger::ServerCertVerifier for Nameless {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        name: &rustls::pki_types::ServerName<'_>,
        ocsp: &[u8],
        now: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        use rustls::CertificateError::{NotValidForName, NotValidForNameContext};
        match self.0.verify_server_cert(leaf, above, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                Ok(rustls::client::danger::ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[test]
fn rustls_openssl_and_go_shake_hands_with_every_kind_of_key() {
    let (place, mica, _) = start(&[]);
    place.account("db");
    place.wait_for_account("db", Duration::from_secs(2));
    for kind in ["p256", "p384", "ed25519", "rsa2048"] {
        let (web, db) = (got(&place, &mica, "web", kind), got(&place, &mica, "db", kind));
        for version in ["-tls1_2", "-tls1_3"] {
            let (_server, port) = OpensslServer::start(&db, version);
            let answer = rustls_get(&web, port).unwrap_or_else(|fault| panic!("{kind} {version}: {fault}"));
            assert!(answer.starts_with("HTTP/1.0 200"), "{kind} {version}: {answer:?}");
        }
        let server = crate::go_spiffe::Server::start(&db, WEB);
        assert_eq!(server.get(&web, DB).as_deref(), Ok(WEB), "{kind}");
    }
    // OpenSSL's verification is one: a stranger's certificate is not let in.
    let (stranger, other, _) = start(&[]);
    let theirs = got(&stranger, &other, "web", "p256");
    fs::copy(place.data().join("root-cert.pem"), theirs.join("root-cert.pem")).unwrap();
    let (_server, port) = OpensslServer::start(&place.root.path().join("db-p256"), "-tls1_3");
    assert!(!rustls_get(&theirs, port).unwrap_or_default().starts_with("HTTP/1.0 200"));
    other.stop();
    mica.stop();
}

/// Two Envoys, which take what was asked for from delivered folders.
fn mesh(place: &Place, mica: &Mica, kind: &str) -> (Mesh, [tempfile::TempDir; 2]) {
    let [web, db] = ["web", "db"].map(|account| {
        let from = got(place, mica, account, kind);
        let read = |name: &str| fs::read_to_string(from.join(name)).unwrap();
        let (chain, key, roots) = (read("cert-chain.pem"), read("key.pem"), read("root-cert.pem"));
        let folder = tempfile::tempdir().unwrap();
        deliver(folder.path(), &Set { serial: serial(&chain), chain, key, roots });
        folder
    });
    (Mesh::start((db.path(), DB), (web.path(), WEB)), [web, db])
}

#[test]
fn two_envoys_talk_with_what_they_asked_for() {
    let (place, mica, _) = start(&[]);
    place.account("db");
    place.wait_for_account("db", Duration::from_secs(2));
    for kind in ["p256", "rsa2048"] {
        let (mesh, _folders) = mesh(&place, &mica, kind);
        wait_for(Duration::from_secs(10), "an answer through both", || {
            matches!(mesh.get(), Ok(200)).then_some(())
        });
    }
    // As docs/csr-api.md says: an Envoy speaks TLS 1.2 to its upstreams, and in that takes no P-384 unless it is told to.
    let (mesh, _folders) = mesh(&place, &mica, "p384");
    assert_eq!(mesh.get().unwrap(), 503);
    assert!(mesh.client.stat(".ssl.connection_error").0 > 0);
    mica.stop();
}
