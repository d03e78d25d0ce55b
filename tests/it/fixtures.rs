//! Certificates and delivered folders that OpenSSL and a few lines of code made, so that the foreign parts and the
//! code that drives them can be trusted before Mica is.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::parts;

/// A root made by OpenSSL, in a folder that goes with it.
pub(crate) struct OpensslCa {
    folder: tempfile::TempDir,
}

/// What a workload is given.
pub(crate) struct Set {
    pub(crate) chain: String,
    pub(crate) key: String,
    pub(crate) roots: String,
    /// Of the leaf: lower-case hexadecimal.
    pub(crate) serial: String,
}

impl OpensslCa {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let configuration = folder.path().join("root.cnf");
        let text = "[req]\ndistinguished_name=name\nprompt=no\nx509_extensions=root\n[name]\nO=fixture\n[root]\n\
            basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n";
        fs::write(&configuration, text).expect("root.cnf is written");
        let ca = Self { folder };
        run(ca
            .request(&configuration)
            .args(["-days", "3650", "-keyout"])
            .arg(ca.path("ca-key.pem"))
            .arg("-out")
            .arg(ca.path("ca-cert.pem")));
        ca
    }

    /// A fresh key and certificate for one identity, valid for a day.
    pub(crate) fn issue(&self, id: &str) -> Set {
        static ISSUED: AtomicU64 = AtomicU64::new(0);
        let number = ISSUED.fetch_add(1, Ordering::Relaxed);
        let [configuration, key, leaf] =
            ["cnf", "key", "pem"].map(|end| self.path(&format!("{number}.{end}")));
        let text = format!(
            "[req]\ndistinguished_name=name\nprompt=no\nx509_extensions=leaf\n[name]\n[leaf]\n\
            basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
            extendedKeyUsage=serverAuth,clientAuth\nsubjectAltName=critical,URI:{id}\n\
            subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        );
        fs::write(&configuration, text).expect("the leaf's configuration is written");
        run(self
            .request(&configuration)
            .args(["-days", "1", "-subj", "/", "-CA"])
            .arg(self.path("ca-cert.pem"))
            .arg("-CAkey")
            .arg(self.path("ca-key.pem"))
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&leaf));
        let chain = read(&leaf);
        Set { serial: serial(&chain), chain, key: read(&key), roots: read(&self.path("ca-cert.pem")) }
    }

    /// A server's certificate and key for a DNS name, in `server.pem` and `server-key.pem` of a folder.
    pub(crate) fn server(&self, folder: &Path, name: &str) {
        let configuration = self.path("server.cnf");
        let text = format!(
            "[req]\ndistinguished_name=name\nprompt=no\nx509_extensions=leaf\n[name]\n[leaf]\n\
            basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n\
            extendedKeyUsage=serverAuth\nsubjectAltName=critical,DNS:{name}\n\
            subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        );
        fs::write(&configuration, text).expect("the server's configuration is written");
        run(self
            .request(&configuration)
            .args(["-days", "1", "-subj", "/", "-CA"])
            .arg(self.root())
            .arg("-CAkey")
            .arg(self.path("ca-key.pem"))
            .arg("-keyout")
            .arg(folder.join("server-key.pem"))
            .arg("-out")
            .arg(folder.join("server.pem")));
    }

    /// The file of the root.
    pub(crate) fn root(&self) -> PathBuf {
        self.path("ca-cert.pem")
    }

    fn request(&self, configuration: &Path) -> Command {
        let mut openssl = parts::openssl();
        openssl
            .args(["req", "-x509", "-nodes", "-newkey", "ec"])
            .args(["-pkeyopt", "ec_paramgen_curve:P-256", "-config"])
            .arg(configuration);
        openssl
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Publishes as the kubelet does: a hidden folder of its own, `..data` swapped by one rename, names linked through it.
pub(crate) fn deliver(folder: &Path, set: &Set) {
    static DELIVERED: AtomicU64 = AtomicU64::new(0);
    let data = folder.join("..data");
    let old = fs::read_link(&data).ok();
    let name = format!("..set-{}", DELIVERED.fetch_add(1, Ordering::Relaxed));
    fs::create_dir_all(folder.join(&name)).expect("the set's folder is made");
    for (file, text) in [("cert-chain.pem", &set.chain), ("key.pem", &set.key), ("root-cert.pem", &set.roots)]
    {
        fs::write(folder.join(&name).join(file), text).expect("a file of the set is written");
        if !folder.join(file).is_symlink() {
            symlink(Path::new("..data").join(file), folder.join(file)).expect("a name is linked");
        }
    }
    symlink(&name, folder.join("..data_tmp")).expect("the new link is made");
    fs::rename(folder.join("..data_tmp"), &data).expect("the link is swapped");
    if let Some(old) = old {
        fs::remove_dir_all(folder.join(old)).expect("the old set is removed");
    }
}

/// The serial number of the first certificate in a PEM text: lower-case hexadecimal.
pub(crate) fn serial(pem: &str) -> String {
    let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("a certificate in PEM");
    let certificate = block.parse_x509().expect("a certificate");
    format!("{:x}", certificate.tbs_certificate.serial)
}

/// Runs a command that has to succeed, and gives what it wrote.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn openssl_accepts_its_own_fixtures() {
    let ca = OpensslCa::new();
    let folder = tempfile::tempdir().expect("a temporary folder");
    for _ in 0..2 {
        let set = ca.issue("spiffe://fixture/ns/a/sa/b");
        deliver(folder.path(), &set);
        for purpose in ["sslserver", "sslclient"] {
            run(parts::openssl()
                .args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"])
                .arg(folder.path().join("root-cert.pem"))
                .arg(folder.path().join("cert-chain.pem")));
        }
        assert_eq!(serial(&read(&folder.path().join("cert-chain.pem"))), set.serial);
    }
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 5);
}
