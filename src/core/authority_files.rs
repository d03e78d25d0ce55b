//! A CA as a folder of files: Istio's four plug-in files, or the three of a Kubernetes TLS Secret. This takes their
//! contents; whoever calls has read them.
//!
//! A folder holds one form only. Files of both are refused, even where one form is whole: it would be a guess which CA
//! is meant, and the wrong one signs for a root that nobody trusts.

use std::collections::BTreeMap;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::bundle::{self, TrustBundle};
use super::certificate::{self, Certificate};
use super::issuer::{self, Issuer};
use super::key::{self, PrivateKey};
use super::spiffe::TrustDomain;

/// The CA's certificate, in the four-file form.
pub const CA_CERT: &str = "ca-cert.pem";
/// The CA's key.
pub const CA_KEY: &str = "ca-key.pem";
/// The CA's certificate and those above it. A root among them is left out of what is delivered.
pub const CERT_CHAIN: &str = "cert-chain.pem";
/// The trust bundle.
pub const ROOT_CERT: &str = "root-cert.pem";

/// All names that a folder of an authority may use.
pub const NAMES: [&str; 7] = [CA_CERT, CA_KEY, CERT_CHAIN, ROOT_CERT, "tls.crt", "tls.key", "ca.crt"];

const FORMS: &str = "an authority is ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem, or tls.crt, tls.key and ca.crt";

/// Why files make no authority. Each names the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not all files of a form, or none.
    #[error("{} missing; {FORMS}", are(.0))]
    Missing(Vec<&'static str>),
    /// Files of both forms.
    #[error("both {0} and {1} are there, so it is not clear which CA is meant; {FORMS}: take one set away")]
    Mixed(&'static str, &'static str),
    /// A file of certificates cannot be read.
    #[error("{name}: {fault}")]
    Certificates {
        /// Which file.
        name: &'static str,
        /// What is wrong with it.
        fault: certificate::Error,
    },
    /// The trust bundle cannot be read.
    #[error("{name}: {fault}; it has to hold the root that the CA's certificate leads to")]
    Roots {
        /// Which file.
        name: &'static str,
        /// What is wrong with it.
        fault: bundle::Error,
    },
    /// The key cannot be read, or the certificate's key is not allowed.
    #[error("{name}: {fault}")]
    Key {
        /// Which file.
        name: &'static str,
        /// What is wrong with it.
        fault: key::Error,
    },
    /// The key is another's.
    #[error(
        "{key} does not belong to {certificate} (serial {serial}); check which of the two was replaced, and put back the other's partner"
    )]
    KeyMismatch {
        /// The file of the key.
        key: &'static str,
        /// The file of the certificate.
        certificate: &'static str,
        /// The certificate's serial number.
        serial: String,
    },
    /// The one above is in none of the files.
    #[error(
        "{certificate} was issued by {issuer:?}, whose certificate is neither in {above} nor in {roots}; add it to {above} if it is an intermediate, to {roots} if it is the root"
    )]
    NoIssuer {
        /// The file of the certificate.
        certificate: &'static str,
        /// The name of the one above.
        issuer: String,
        /// Where an intermediate is expected.
        above: &'static str,
        /// Where the root is expected.
        roots: &'static str,
    },
    /// The parts are well, and the CA is not.
    #[error("{name}: {fault}")]
    Issuer {
        /// The file that holds the CA's certificate.
        name: &'static str,
        /// What is wrong with the CA.
        fault: Box<issuer::Error>,
    },
}

/// One form's names.
struct Form {
    certificate: &'static str,
    key: &'static str,
    above: &'static str,
    roots: &'static str,
}

const ISTIO: Form = Form { certificate: CA_CERT, key: CA_KEY, above: CERT_CHAIN, roots: ROOT_CERT };
const KUBERNETES: Form = Form { certificate: "tls.crt", key: "tls.key", above: "tls.crt", roots: "ca.crt" };

impl Form {
    fn names(&self) -> Vec<&'static str> {
        let mut names = vec![self.certificate, self.key];
        if self.above != self.certificate {
            names.push(self.above);
        }
        names.push(self.roots);
        names
    }
}

/// Makes an issuer of the files of a folder, by their names; others are passed over. The CA has to be the trust
/// domain's, unless its certificate names none.
pub fn issuer(
    files: &BTreeMap<String, Zeroizing<Vec<u8>>>,
    passphrase: Option<&[u8]>,
    trust_domain: &TrustDomain,
) -> Result<Issuer, Error> {
    let form = form(files)?;
    let bytes = |name: &str| files.get(name).map_or(&[][..], |bytes| bytes.as_slice());
    let certificates = |name: &'static str| {
        Certificate::all_from_pem(bytes(name)).map_err(|fault| Error::Certificates { name, fault })
    };
    let mut chain = certificates(form.certificate)?;
    // Istio's self-signed CA leaves this file empty.
    if form.above != form.certificate && !bytes(form.above).trim_ascii().is_empty() {
        for certificate in certificates(form.above)? {
            if !chain.contains(&certificate) {
                chain.push(certificate);
            }
        }
    }
    let roots =
        TrustBundle::from_pem(bytes(form.roots)).map_err(|fault| Error::Roots { name: form.roots, fault })?;
    let public = chain[0].key().map_err(|fault| Error::Key { name: form.certificate, fault })?;
    let key = PrivateKey::from_pem(bytes(form.key), passphrase, Some(&public))
        .map_err(|fault| Error::Key { name: form.key, fault })?;
    if *key.public() != public {
        return Err(Error::KeyMismatch {
            key: form.key,
            certificate: form.certificate,
            serial: chain[0].serial_text(),
        });
    }
    let signing = key.signing().map_err(|fault| Error::Key { name: form.key, fault })?;
    if let Some(orphan) = orphan(&chain, &roots) {
        return Err(Error::NoIssuer {
            certificate: if *orphan == chain[0] { form.certificate } else { form.above },
            issuer: orphan.issuer_text(),
            above: form.above,
            roots: form.roots,
        });
    }
    Issuer::new(Arc::new(signing), &chain, roots, trust_domain)
        .map_err(|fault| Error::Issuer { name: form.certificate, fault: Box::new(fault) })
}

/// Walks from the CA's certificate up, by names, and returns the one whose issuer is not there.
fn orphan<'a>(chain: &'a [Certificate], roots: &TrustBundle) -> Option<&'a Certificate> {
    let mut at = &chain[0];
    for _ in chain {
        if roots.roots().iter().any(|root| root == at || root.subject == at.issuer) {
            return None;
        }
        match chain.iter().find(|above| above.subject == at.issuer && *above != at) {
            Some(above) => at = above,
            None => return Some(at),
        }
    }
    // A ring of names; the signatures will tell.
    None
}

fn form(files: &BTreeMap<String, Zeroizing<Vec<u8>>>) -> Result<&'static Form, Error> {
    let there = |form: &Form| form.names().into_iter().find(|name| files.contains_key(*name));
    let form = match (there(&ISTIO), there(&KUBERNETES)) {
        (Some(one), Some(other)) => return Err(Error::Mixed(one, other)),
        (None, Some(_)) => &KUBERNETES,
        _ => &ISTIO,
    };
    let missing: Vec<_> = form.names().into_iter().filter(|name| !files.contains_key(*name)).collect();
    if missing.is_empty() { Ok(form) } else { Err(Error::Missing(missing)) }
}

fn are(names: &[&str]) -> String {
    match names {
        [] => "nothing is".to_owned(),
        [one] => format!("{one} is"),
        [rest @ .., last] => format!("{} and {last} are", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::issuer::{Order, root};
    use crate::core::key::KeyKind;
    use crate::core::profile::Profile;
    use crate::sys::keys;
    use time::OffsetDateTime;
    use time::macros::datetime;

    const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);

    type Files = BTreeMap<String, Zeroizing<Vec<u8>>>;

    fn files(files: &[(&str, &str)]) -> Files {
        files.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec().into())).collect()
    }

    fn domain() -> TrustDomain {
        TrustDomain::parse("cluster.local").unwrap()
    }

    /// A root and an intermediate below it.
    struct Pair {
        root: Certificate,
        root_key: PrivateKey,
        ca: Certificate,
        ca_key: PrivateKey,
    }

    fn pair() -> Pair {
        let (root_key, ca_key) =
            (keys::generate(KeyKind::P256).unwrap(), keys::generate(KeyKind::Ed25519).unwrap());
        let organization = "example".parse().unwrap();
        let signing = root_key.signing().unwrap();
        let profile = Profile::Root { organization: &organization, trust_domain: &domain() };
        let serial = || keys::serial_number().unwrap();
        let made = root(&signing, &profile, "10y".parse().unwrap(), NOW, serial()).unwrap();
        let root = Certificate::from_der(made.der()).unwrap();
        let bundle = TrustBundle::new([root.clone()]).unwrap();
        let issuer = Issuer::new(Arc::new(signing), std::slice::from_ref(&root), bundle, &domain()).unwrap();
        let order = Order {
            profile: Profile::Intermediate { organization: &organization, trust_domain: &domain() },
            key: ca_key.public(),
            lifetime: "1y".parse().unwrap(),
        };
        let ca = Certificate::from_der(issuer.issue(&order, NOW, serial()).unwrap().der()).unwrap();
        Pair { root, root_key, ca, ca_key }
    }

    fn istio(pair: &Pair) -> Files {
        files(&[
            (CA_CERT, &pair.ca.to_pem()),
            (CA_KEY, &pair.ca_key.to_pem()),
            (CERT_CHAIN, &(pair.ca.to_pem() + &pair.root.to_pem())),
            (ROOT_CERT, &pair.root.to_pem()),
        ])
    }

    fn refused(files: &Files) -> String {
        issuer(files, None, &domain()).unwrap_err().to_string()
    }

    #[test]
    fn both_forms_make_the_same_issuer_with_the_root_stripped() {
        let pair = pair();
        let kubernetes = files(&[
            ("tls.crt", &(pair.ca.to_pem() + &pair.root.to_pem())),
            ("tls.key", &pair.ca_key.to_pem()),
            ("ca.crt", &pair.root.to_pem()),
        ]);
        for files in [istio(&pair), kubernetes] {
            let issuer = issuer(&files, None, &domain()).unwrap();
            assert_eq!(issuer.chain(), std::slice::from_ref(&pair.ca));
            assert_eq!(issuer.bundle().roots(), std::slice::from_ref(&pair.root));
        }
    }

    #[test]
    fn a_root_alone_needs_no_chain() {
        let pair = pair();
        let root = pair.root.to_pem();
        for chain in ["", "\n", &root] {
            let key = pair.root_key.to_pem();
            let files = files(&[(CA_CERT, &root), (CA_KEY, &key), (CERT_CHAIN, chain), (ROOT_CERT, &root)]);
            assert!(issuer(&files, None, &domain()).unwrap().chain().is_empty());
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let pair = pair();
        for name in [CA_CERT, CA_KEY, CERT_CHAIN, ROOT_CERT] {
            let mut files = istio(&pair);
            files.remove(name);
            assert!(refused(&files).starts_with(&format!("{name} is missing; an authority is ca-cert.pem")));
        }
        assert!(refused(&files(&[("ca.crt", ""), ("x", "")])).starts_with("tls.crt and tls.key are missing"));
        assert!(
            refused(&Files::new())
                .starts_with("ca-cert.pem, ca-key.pem, cert-chain.pem and root-cert.pem are missing")
        );
    }

    #[test]
    fn files_of_both_forms_are_refused() {
        let mut both = istio(&pair());
        both.insert("tls.key".to_owned(), Zeroizing::default());
        assert!(refused(&both).starts_with("both ca-cert.pem and tls.key are there"));
    }

    #[test]
    fn each_fault_names_its_file() {
        let (one, other) = (pair(), pair());
        let with = |name: &str, text: &str| {
            let mut files = istio(&one);
            files.insert(name.to_owned(), text.as_bytes().to_vec().into());
            refused(&files)
        };
        let cut = &one.ca.to_pem()[..100];
        assert!(with(CA_CERT, cut).starts_with("ca-cert.pem: the CERTIFICATE block that begins at line 1"));
        assert!(with(CA_CERT, "").starts_with("ca-cert.pem: no PEM block found"));
        assert!(with(CERT_CHAIN, cut).starts_with("cert-chain.pem: "));
        assert!(with(ROOT_CERT, "").starts_with("root-cert.pem: "));
        assert!(with(CA_KEY, "").starts_with("ca-key.pem: expected one private key, found 0"));
        assert!(
            with(CA_KEY, &other.ca_key.to_pem()).starts_with("ca-key.pem does not belong to ca-cert.pem")
        );
        assert!(with(ROOT_CERT, &other.root.to_pem()).contains("was issued by \"O=example, CN=Mica root "));
        let locked = one.ca_key.to_encrypted_pem(b"secret", [1; 16], [2; 16]).unwrap();
        assert!(with(CA_KEY, &locked).contains("ca-key.pem: the private key is protected by a passphrase"));
    }

    #[test]
    fn a_passphrase_opens_the_key() {
        let pair = pair();
        let mut files = istio(&pair);
        let locked = pair.ca_key.to_encrypted_pem(b"secret", [1; 16], [2; 16]).unwrap();
        files.insert(CA_KEY.to_owned(), locked.into_bytes().into());
        assert!(issuer(&files, Some(b"secret"), &domain()).is_ok());
        assert!(issuer(&files, Some(b"Secret"), &domain()).is_err());
    }
}
