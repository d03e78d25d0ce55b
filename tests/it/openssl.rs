//! What OpenSSL thinks of what Mica makes, and what Mica takes of what OpenSSL makes.

use crate::fixtures::run;
use crate::mica::{ID, Place};
use crate::parts;

/// OpenSSL in a place.
fn openssl(place: &Place, arguments: &[&str]) -> String {
    run(parts::openssl().args(arguments).current_dir(place.path("")))
}

/// As a strict TLS server and client would judge.
fn strictly_good(place: &Place, chain: &str, roots: &str) {
    for purpose in ["sslserver", "sslclient"] {
        openssl(
            place,
            &["verify", "-x509_strict", "-purpose", purpose, "-CAfile", roots, "-untrusted", chain, chain],
        );
    }
}

#[test]
fn openssl_accepts_every_certificate_and_chain() {
    for kind in ["p256", "p384", "ed25519"] {
        let place = Place::new();
        place.ok(&["root", "new", "--out", "root", "--key-kind", kind]);
        place.ok(&["intermediate", "new", "--root", "root", "--out", "ca", "--key-kind", kind]);
        place.ok(&[
            "csr",
            "new",
            "--identity",
            ID,
            "--dns",
            "web.default",
            "--out",
            "web",
            "--key-kind",
            kind,
        ]);
        for ca in ["root", "ca"] {
            let chain = format!("{ca}-chain.pem");
            let sign = ["sign", "web/csr.pem", "--authority", ca, "--identity", ID, "--out", &chain];
            place.ok(&[&sign[..], &["--dns", "web.default"]].concat());
            strictly_good(&place, &chain, "root/root-cert.pem");
        }
        openssl(&place, &["verify", "-x509_strict", "-CAfile", "root/root-cert.pem", "ca/ca-cert.pem"]);
        let text = openssl(&place, &["x509", "-in", "ca-chain.pem", "-noout", "-text"]);
        for said in [
            "X509v3 Subject Alternative Name: critical\n",
            &format!("URI:{ID}, DNS:web.default\n"),
            "X509v3 Key Usage: critical\n                Digital Signature\n",
            "TLS Web Server Authentication, TLS Web Client Authentication\n",
            "X509v3 Basic Constraints: critical\n                CA:FALSE\n",
        ] {
            assert!(text.contains(said), "{said:?}: {text}");
        }
        let text = openssl(&place, &["x509", "-in", "ca/ca-cert.pem", "-noout", "-text"]);
        assert!(text.contains("CA:TRUE, pathlen:0\n"), "{text}");
    }
}

#[test]
fn openssl_reads_our_keys_and_csrs() {
    for kind in ["p256", "p384", "ed25519"] {
        let place = Place::new();
        place.write("secret", "correct horse\n");
        place.ok(&["csr", "new", "--identity", ID, "--out", "web", "--key-kind", kind]);
        openssl(&place, &["req", "-in", "web/csr.pem", "-verify", "-noout"]);
        let text = openssl(&place, &["req", "-in", "web/csr.pem", "-text", "-noout"]);
        assert!(text.contains(&format!("URI:{ID}")), "{text}");
        openssl(&place, &["pkey", "-in", "web/key.pem", "-check", "-noout"]);
        let public = openssl(&place, &["pkey", "-in", "web/key.pem", "-pubout"]);
        assert_eq!(openssl(&place, &["req", "-in", "web/csr.pem", "-pubkey", "-noout"]), public);
        let protect = ["--passphrase-file", "secret", "--key-kind", kind];
        place.ok(&[&["root", "new", "--out", "root"], &protect[..]].concat());
        openssl(&place, &["pkey", "-in", "root/ca-key.pem", "-passin", "file:secret", "-check", "-noout"]);
        place.ok(&[&["intermediate", "new", "--csr-only", "--out", "ca"], &protect[..]].concat());
        openssl(&place, &["req", "-in", "ca/ca-csr.pem", "-verify", "-noout"]);
        let text = openssl(&place, &["req", "-in", "ca/ca-csr.pem", "-text", "-noout"]);
        assert!(text.contains("CA:TRUE, pathlen:0") && text.contains("URI:spiffe://cluster.local"), "{text}");
    }
}

#[test]
fn an_intermediate_that_openssl_signed_issues() {
    let place = Place::new();
    openssl_root(
        &place,
        &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
        "CA:TRUE,pathlen:1",
        "/O=corp",
    );
    place.ok(&["intermediate", "new", "--csr-only", "--out", "ca"]);
    openssl(
        &place,
        &[
            "x509",
            "-req",
            "-in",
            "ca/ca-csr.pem",
            "-CA",
            "root.pem",
            "-CAkey",
            "root.key",
            "-days",
            "30",
            "-copy_extensions",
            "copyall",
            "-out",
            "ca/ca-cert.pem",
        ],
    );
    // OpenSSL leaves out what the CSR did not ask for.
    place.write("extensions", "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n");
    openssl(
        &place,
        &[
            "x509",
            "-req",
            "-in",
            "ca/ca-csr.pem",
            "-CA",
            "root.pem",
            "-CAkey",
            "root.key",
            "-days",
            "30",
            "-copy_extensions",
            "copyall",
            "-extfile",
            "extensions",
            "-out",
            "ca/ca-cert.pem",
        ],
    );
    place.write("ca/cert-chain.pem", place.read("ca/ca-cert.pem") + &place.read("root.pem"));
    place.write("ca/root-cert.pem", place.read("root.pem"));
    issues(&place, "ca", &[]);
    strictly_good(&place, "chain.pem", "root.pem");
}

/// A root of OpenSSL's in `root.pem` and `root.key`.
fn openssl_root(place: &Place, key: &[&str], constraints: &str, subject: &str) {
    place.write("root.cnf", "[req]\ndistinguished_name=name\n[name]\n");
    let constraints = format!("basicConstraints=critical,{constraints}");
    openssl(
        place,
        &[
            &["req", "-x509", "-nodes", "-config", "root.cnf", "-days", "365", "-subj", subject][..],
            &["-addext", &constraints, "-addext", "keyUsage=critical,keyCertSign,cRLSign"],
            &["-addext", "subjectKeyIdentifier=hash", "-keyout", "root.key", "-out", "root.pem"],
            key,
        ]
        .concat(),
    );
}

/// Puts the root and one form of its key into `ca`, as the plug-in files.
fn plug_in(place: &Place, key: &str) {
    for name in ["ca-cert.pem", "cert-chain.pem", "root-cert.pem"] {
        place.write(&format!("ca/{name}"), place.read("root.pem"));
    }
    place.write("ca/ca-key.pem", place.read(key));
}

fn issues(place: &Place, ca: &str, more: &[&str]) {
    place.ok(&["csr", "new", "--identity", ID, "--out", "web"]);
    let sign = ["sign", "web/csr.pem", "--authority", ca, "--identity", ID, "--out", "chain.pem", "--force"];
    place.ok(&[&sign[..], more].concat());
    std::fs::remove_dir_all(place.path("web")).expect("it is removed");
}

#[test]
fn keys_are_taken_in_every_form_that_openssl_writes() {
    let rsa = |bits| ["-newkey".to_owned(), format!("rsa:{bits}")];
    let ec = |curve: &str| {
        ["-newkey", "ec", "-pkeyopt", &format!("ec_paramgen_curve:{curve}")].map(str::to_owned).to_vec()
    };
    for (key, traditional) in [
        (rsa(2048).to_vec(), true),
        (rsa(3072).to_vec(), false),
        (rsa(4096).to_vec(), false),
        (ec("P-256"), true),
        (ec("P-384"), true),
        (vec!["-newkey".to_owned(), "ed25519".to_owned()], false),
    ] {
        let place = Place::new();
        let key: Vec<_> = key.iter().map(String::as_str).collect();
        openssl_root(&place, &key, "CA:TRUE", "/O=corp");
        place.write("secret", "correct horse");
        let mut forms = vec![("root.key", &[][..])];
        // PKCS#8 with PBES2 (OpenSSL's default and an explicit one), and with SHA-1 below it as older ones wrote.
        openssl(
            &place,
            &["pkcs8", "-topk8", "-in", "root.key", "-passout", "file:secret", "-out", "locked.pem"],
        );
        openssl(
            &place,
            &[
                "pkcs8",
                "-topk8",
                "-v2",
                "aes-128-cbc",
                "-v2prf",
                "hmacWithSHA512",
                "-in",
                "root.key",
                "-passout",
                "file:secret",
                "-out",
                "locked2.pem",
            ],
        );
        let passphrase = &["--passphrase-file", "secret"][..];
        forms.extend([("locked.pem", passphrase), ("locked2.pem", passphrase)]);
        if traditional {
            // PKCS#1 or SEC1.
            openssl(&place, &["pkey", "-in", "root.key", "-traditional", "-out", "traditional.pem"]);
            assert!(!place.read("traditional.pem").contains("BEGIN PRIVATE"));
            forms.push(("traditional.pem", &[]));
        }
        if key.get(1) == Some(&"ec") {
            // Without the public half, and with parameters before it.
            openssl(&place, &["ec", "-in", "root.key", "-no_public", "-out", "half.pem"]);
            forms.push(("half.pem", &[]));
        }
        for (form, more) in forms {
            plug_in(&place, form);
            issues(&place, "ca", more);
            strictly_good(&place, "chain.pem", "root.pem");
            let seen = place.run(&["inspect", "ca"]);
            assert!(seen.stdout.ends_with("nothing is wrong with it\n"), "{key:?} {form}: {}", seen.stdout);
        }
        // DEK-Info: the passphrase is hashed once, with MD5.
        if traditional {
            openssl(
                &place,
                &[
                    "pkey",
                    "-in",
                    "root.key",
                    "-traditional",
                    "-aes128",
                    "-passout",
                    "file:secret",
                    "-out",
                    "old.pem",
                ],
            );
            plug_in(&place, "old.pem");
            let sign = ["sign", "csr", "--authority", "ca", "--identity", ID, "--out", "x"];
            place.ok(&["csr", "new", "--identity", ID, "--out", "w"]);
            place.write("csr", place.read("w/csr.pem"));
            assert!(place.refused(&[&sign[..], passphrase].concat()).contains("openssl pkcs8 -topk8"));
        }
    }
}

#[test]
fn the_issuer_name_is_the_cas_subject_byte_for_byte() {
    // Two DCs, two OUs, one RDN of two attributes, and characters beyond ASCII.
    let subject = "/DC=org/DC=example/O=corp/OU=one/OU=two/OU=c+CN=d/CN=Zoë";
    let place = Place::new();
    place.write("root.cnf", "");
    openssl_root(
        &place,
        &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-multivalue-rdn", "-utf8"],
        "CA:TRUE,pathlen:0",
        subject,
    );
    plug_in(&place, "root.key");
    issues(&place, "ca", &[]);
    strictly_good(&place, "chain.pem", "root.pem");
    let der = |file: &str| {
        let text = place.read(file);
        let (_, pem) = x509_parser::pem::parse_x509_pem(text.as_bytes()).expect("PEM");
        let certificate = pem.parse_x509().expect("a certificate");
        let tbs = &certificate.tbs_certificate;
        (tbs.subject.as_raw().to_vec(), tbs.issuer.as_raw().to_vec())
    };
    let ((subject, _), (_, issuer)) = (der("root.pem"), der("chain.pem"));
    assert_eq!(issuer, subject);
    assert!(subject.windows(4).any(|w| w == "Zoë".as_bytes()), "it is UTF-8");
}

#[test]
fn a_root_with_a_path_length_takes_as_many_below_it() {
    for (constraints, good) in [("CA:TRUE,pathlen:0", false), ("CA:TRUE,pathlen:1", true), ("CA:TRUE", true)]
    {
        let place = Place::new();
        openssl_root(
            &place,
            &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384"],
            constraints,
            "/O=corp",
        );
        plug_in(&place, "root.key");
        let new = ["intermediate", "new", "--root", "ca", "--out", "below"];
        if good {
            place.ok(&new);
            issues(&place, "below", &[]);
            strictly_good(&place, "chain.pem", "root.pem");
        } else {
            assert!(place.refused(&new).contains("path length is 0"));
        }
    }
}

#[test]
fn cas_that_cannot_issue_are_refused_by_what_is_wrong() {
    let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
    for (key, constraints, said) in [
        (&ec[..], "CA:FALSE", "is no CA's"),
        (&["-newkey", "rsa:1024"], "CA:TRUE", "1024 bits"),
        (&["-newkey", "rsa:2048", "-pkeyopt", "rsa_keygen_pubexp:3"], "CA:TRUE", "exponent 3"),
        (&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp521r1"], "CA:TRUE", "P-521"),
        (&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp224r1"], "CA:TRUE", "P-224"),
        (&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"], "CA:TRUE", "secp256k1"),
        (&["-newkey", "ed448"], "CA:TRUE", "Ed448"),
    ] {
        let place = Place::new();
        openssl_root(&place, key, constraints, "/O=corp");
        plug_in(&place, "root.key");
        place.ok(&["csr", "new", "--identity", ID, "--out", "web"]);
        let line =
            place.refused(&["sign", "web/csr.pem", "--authority", "ca", "--identity", ID, "--out", "x"]);
        assert!(line.starts_with("ca: ca-cert.pem: ") || line.starts_with("ca: root-cert.pem: "), "{line}");
        assert!(line.contains(said), "{key:?}: {line}");
        let seen = place.run(&["inspect", "ca/ca-cert.pem"]);
        assert!(seen.code == 0 && seen.stdout.contains(" wrong  "), "{key:?}: {seen:?}");
    }
}

/// A CSR of OpenSSL's, in `bad.pem`.
fn openssl_csr(place: &Place, key: &[&str], more: &[&str]) {
    place.write("csr.cnf", "[req]\ndistinguished_name=name\n[name]\n");
    let request = ["req", "-new", "-nodes", "-config", "csr.cnf", "-subj", "/", "-keyout", "bad.key"];
    openssl(place, &[&request[..], &["-out", "bad.pem"], key, more].concat());
}

#[test]
fn bad_csrs_are_refused_by_what_is_wrong() {
    let place = Place::with_ca();
    let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
    let sign = ["sign", "bad.pem", "--authority", "ca", "--identity", ID, "--out", "x"];
    for (key, more, said) in [
        (&ec[..], &["-addext", "subjectAltName=URI:spiffe://a/b,URI:spiffe://a/c"][..], "asks for 2 URIs"),
        (&ec, &["-addext", "basicConstraints=CA:TRUE"], "CA:TRUE"),
        (&ec, &["-sha1"], "signed with"),
        (&["-newkey", "rsa:1024"], &[], "1024 bits"),
        (&["-newkey", "rsa:2047"], &[], "2047 bits"),
        (&["-newkey", "rsa:2048", "-pkeyopt", "rsa_keygen_pubexp:3"], &[], "exponent 3"),
        (&["-newkey", "rsa:2048", "-sigopt", "rsa_padding_mode:pss"], &[], "signed with"),
        (&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp224r1"], &[], "P-224"),
        (&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp521r1"], &[], "P-521"),
        (&["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"], &[], "secp256k1"),
        (&["-newkey", "ed448"], &[], "Ed448"),
    ] {
        openssl_csr(&place, key, more);
        let line = place.refused(&sign);
        assert!(line.starts_with("bad.pem: ") && line.contains(said), "{key:?} {more:?}: {line}");
        let seen = place.run(&["inspect", "bad.pem"]);
        assert_eq!(seen.code, 0, "{seen:?}");
        // An intermediate may ask to be one.
        assert!(seen.stdout.contains(" wrong  ") || said == "CA:TRUE", "{}", seen.stdout);
    }
    for (key, more) in [
        (&ec[..], &[][..]),
        (&ec, &["-sha384"]),
        (&["-newkey", "rsa:2048"], &["-sha512"]),
        (&["-newkey", "ed25519"], &[]),
    ] {
        openssl_csr(&place, key, more);
        place.ok(&sign);
        std::fs::remove_file(place.path("x")).expect("it is removed");
    }
}

#[test]
fn broken_csrs_are_refused_and_write_nothing() {
    let place = Place::with_ca();
    let sign = ["sign", "bad.pem", "--authority", "ca", "--identity", ID, "--out", "x"];
    let good = place.read("web/csr.pem");
    openssl(&place, &["req", "-in", "web/csr.pem", "-outform", "DER", "-out", "csr.der"]);
    let der = std::fs::read(place.path("csr.der")).expect("it is there");
    let pem = |der: &[u8]| {
        use base64::Engine as _;
        let body = base64::engine::general_purpose::STANDARD.encode(der);
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n")
    };
    let mut forged = der.clone();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    let mut other = der.clone();
    let at = der.windows(3).position(|w| w == b"web").expect("its identity");
    other[at] = b'W';
    let trailing = [&der[..], b"x"].concat();
    for (bytes, said) in [
        (pem(&forged), "its key"),
        (pem(&other), "its key"),
        (pem(&trailing), "bytes follow it"),
        (pem(&der[..der.len() / 2]), "not PKCS#10"),
        (pem(&[]), "not PKCS#10"),
        (good[..good.len() / 2].to_owned(), "cut off"),
        (good.clone() + &good, "found 2"),
        (String::new(), "no PEM block"),
        (place.read("web/cert-chain.pem"), "found 2"),
        (place.read("ca/ca-cert.pem"), "found a CERTIFICATE"),
        (place.read("web/key.pem"), "found a PRIVATE KEY"),
        (pem(&vec![0x30; 20_000]), "longer than"),
        ("-".repeat(100_000), "longer than"),
        (good.replace("REQUEST-----\n", "REQUEST-----\n*"), "not base64"),
    ] {
        place.write("bad.pem", &bytes);
        let line = place.refused(&sign);
        assert!(line.starts_with("bad.pem: ") && line.contains(said), "{said}: {line}");
    }
    // Every cut of it.
    for length in (0..der.len()).step_by(7) {
        place.write("bad.pem", pem(&der[..length]));
        place.refused(&sign);
    }
}

#[test]
fn certificates_that_are_cut_or_changed_are_refused_or_said_to_be_wrong() {
    let place = Place::with_ca();
    openssl(&place, &["x509", "-in", "web/cert-chain.pem", "-outform", "DER", "-out", "leaf.der"]);
    let der = std::fs::read(place.path("leaf.der")).expect("it is there");
    let verify = ["verify", "bad.der", "--roots", "ca/root-cert.pem"];
    for length in (0..der.len()).step_by(11) {
        place.write("bad.der", &der[..length]);
        place.refused(&verify);
        place.refused(&["inspect", "bad.der"]);
    }
    place.write("bad.der", [&der[..], &[0; 70_000]].concat());
    assert!(place.refused(&verify).contains("longer than"));
    for at in (20..der.len()).step_by(13) {
        let mut changed = der.clone();
        changed[at] ^= 0x10;
        place.write("bad.der", &changed);
        let code = place.run(&verify).code;
        assert!(code == 1 || code == 2, "byte {at}: {code}");
    }
}

#[test]
fn sha1_is_said_to_be_weak() {
    let place = Place::new();
    openssl_root(&place, &["-newkey", "rsa:2048"], "CA:TRUE", "/O=corp");
    openssl_csr(&place, &["-newkey", "rsa:2048"], &[]);
    openssl(
        &place,
        &[
            "x509", "-req", "-in", "bad.pem", "-CA", "root.pem", "-CAkey", "root.key", "-sha1", "-out",
            "weak.pem",
        ],
    );
    let seen = place.ok(&["inspect", "weak.pem", "root.pem"]);
    assert!(seen.contains("it is signed with SHA-1, which can be forged"), "{seen}");
}
