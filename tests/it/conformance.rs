//! The rules of the SPIFFE standards that a certificate authority has to keep, by the numbers of Mica's checklist of
//! them: SPIFFE-ID (1 to 12b), X509-SVID (13 to 29), Trust Domain and Bundle (42 to 49), and in files of their own JWT-SVID
//! (30 to 36b) and Federation (70 to 79). The section of the standard
//! stands with each. Hostile inputs are built with rcgen, which Mica does not mint with.

mod federation;
mod tokens;

use std::collections::BTreeSet;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use mica::core::bundle::{self, TrustBundle, map_from_json};
use mica::core::certificate::{Certificate, Fault, SerialNumber};
use mica::core::chain::{self, verify};
use mica::core::csr::{self, CheckedCsr};
use mica::core::issuer::{self, Issuer, Order};
use mica::core::key::{KeyKind, PrivateKey};
use mica::core::lifetime::Lifetime;
use mica::core::profile::Profile;
use mica::core::spiffe::{MAX_ID, MAX_TRUST_DOMAIN, ServiceAccount, SpiffeId, TrustDomain};
use mica::sys::keys;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer as RcgenIssuer, KeyPair, KeyUsagePurpose, SanType,
};
use serde_json::{Value, json};
use time::macros::datetime;
use time::{Duration, OffsetDateTime};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509Version};

const NOW: OffsetDateTime = datetime!(2026-01-02 03:04:05 UTC);
const ID: &str = "spiffe://cluster.local/ns/default/sa/web";

type Rule = (&'static str, &'static str, fn());

/// Number, what it asks, and how Mica keeps it.
const RULES: &[Rule] = &[
    ("1", "the scheme is spiffe, in lower case [SPIFFE-ID 2]", || {
        for id in
            ["SPIFFE://td/a", "Spiffe://td/a", "https://td/a", "spiffe:/td/a", "spiffe:td/a", "//td/a", ""]
        {
            assert!(SpiffeId::parse(id).is_err(), "{id:?}");
        }
        assert!(world().leaf.uris[0].starts_with("spiffe://"));
        assert!(account().spiffe_id(&domain()).as_str().starts_with("spiffe://"));
    }),
    ("2", "the trust domain is not empty [SPIFFE-ID 2.1]", || {
        assert!(SpiffeId::parse("spiffe://").is_err() && SpiffeId::parse("spiffe:///a").is_err());
        assert!(TrustDomain::parse("").is_err());
    }),
    ("3", "no query and no fragment, not even empty ones [SPIFFE-ID 2]", || {
        for end in ["?", "#", "?a=b", "#a", "/a?", "/a#", "/a?b", "/a#b"] {
            assert!(SpiffeId::parse(&format!("spiffe://td{end}")).is_err(), "{end:?}");
        }
    }),
    ("4", "no userinfo and no port [SPIFFE-ID 2.1]", || {
        for host in ["u@td", "u:p@td", "@td", "td:80", "td:"] {
            assert!(SpiffeId::parse(&format!("spiffe://{host}/a")).is_err(), "{host:?}");
            assert!(TrustDomain::parse(host).is_err(), "{host:?}");
        }
    }),
    ("5", "the trust domain is of a-z, 0-9, dot, hyphen and underscore [SPIFFE-ID 2.1]", || {
        for byte in 0..=255u8 {
            let name = format!("a{}b", char::from(byte));
            let allowed = matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
            assert_eq!(TrustDomain::parse(&name).is_ok(), allowed, "{name:?}");
            // A slash begins the path.
            let id = SpiffeId::parse(&format!("spiffe://{name}/x"));
            assert_eq!(id.is_ok(), allowed || byte == b'/', "{name:?}");
        }
    }),
    ("6", "no percent-encoding in the trust domain [SPIFFE-ID 2.1]", || {
        for host in ["%74d", "t%64", "td%2e", "%"] {
            assert!(SpiffeId::parse(&format!("spiffe://{host}/a")).is_err(), "{host:?}");
        }
    }),
    ("7", "a trust domain that looks like an address is a name like any other [SPIFFE-ID 2.1]", || {
        for host in ["1.2.3.4", "01.2.3.4", "a..b", ".", "-", "_"] {
            let id = SpiffeId::parse(&format!("spiffe://{host}/x")).expect("it is taken");
            assert_eq!(id.trust_domain().as_str(), host, "and not changed");
        }
        assert!(SpiffeId::parse("spiffe://[::1]/x").is_err());
        let (one, other) = (TrustDomain::parse("1.2.3.4"), TrustDomain::parse("01.2.3.4"));
        assert_ne!(one, other);
    }),
    (
        "8",
        "path segments of letters, digits, dot, hyphen, underscore; none empty, . or .. [SPIFFE-ID 2.2]",
        || {
            for byte in 0..=255u8 {
                let id = format!("spiffe://td/a{}b", char::from(byte));
                let allowed = byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'/');
                assert_eq!(SpiffeId::parse(&id).is_ok(), allowed, "{id:?}");
            }
            for path in ["/", "//", "/a/", "/a//b", "/.", "/..", "/a/../b", "/a/.", "/%2e%2e/a", "/%41"] {
                assert!(SpiffeId::parse(&format!("spiffe://td{path}")).is_err(), "{path:?}");
            }
            for path in ["/...", "/.a", "/a..", "/A/a"] {
                assert!(SpiffeId::parse(&format!("spiffe://td{path}")).is_ok(), "{path:?}");
            }
            assert_ne!(
                SpiffeId::parse("spiffe://td/A"),
                SpiffeId::parse("spiffe://td/a"),
                "case counts in a path"
            );
        },
    ),
    ("9", "2,048 bytes are accepted, and longer ones never made [SPIFFE-ID 2.3]", || {
        let of = |length: usize| format!("spiffe://td/{}", "a".repeat(length - "spiffe://td/".len()));
        assert_eq!(MAX_ID, 2_048);
        assert!(SpiffeId::parse(&of(2_048)).is_ok() && SpiffeId::parse(&of(2_049)).is_err());
        let longest = ServiceAccount::new(&"n".repeat(63), &"a".repeat(253)).expect("Kubernetes allows it");
        let widest = TrustDomain::parse(&"d".repeat(255)).expect("it is allowed");
        assert!(longest.spiffe_id(&widest).as_str().len() < MAX_ID);
        let long = SpiffeId::parse(&of(2_048)).expect("it is allowed");
        let w = World::of("td");
        let leaf = issue(&w.issuer, Profile::Workload { id: &long, dns: &[], proved_at: None }, "1h");
        assert_eq!(verify(&[leaf, w.ca], w.issuer.bundle(), Some(&long), NOW), Ok(long));
    }),
    ("10", "a trust domain is at most 255 bytes [SPIFFE-ID 2.3]", || {
        assert_eq!(MAX_TRUST_DOMAIN, 255);
        assert!(
            TrustDomain::parse(&"a".repeat(255)).is_ok() && TrustDomain::parse(&"a".repeat(256)).is_err()
        );
    }),
    (
        "11",
        "a signing authority carries its own ID: its trust domain's, without a path [SPIFFE-ID 3.1]",
        || {
            let w = world();
            for ca in [&w.root, &w.ca] {
                assert_eq!(ca.spiffe_id(), Ok(domain().id()));
                assert_eq!(domain().id().path(), "");
            }
        },
    ),
    ("12", "identity and public key are inside what is signed [SPIFFE-ID 3.2]", || {
        let w = world();
        let at = |part: &[u8]| w.leaf.der().windows(part.len()).position(|window| window == part);
        let key = w.leaf_key.public().spki();
        for at in [at(b"/sa/web").map(|at| at + 6), at(key).map(|at| at + key.len() - 1)] {
            let mut der = w.leaf.der().to_vec();
            der[at.expect("it is there")] ^= 1;
            let Ok(changed) = Certificate::from_der(&der) else { continue };
            assert!(verify(&[changed, w.ca.clone()], w.issuer.bundle(), None, NOW).is_err());
        }
    }),
    ("12b", "an identity document is of a type with a specification: X.509 [SPIFFE-ID 3.3]", || {
        let w = world();
        for certificate in [&w.root, &w.ca, &w.leaf] {
            assert_eq!(parsed(certificate).version(), X509Version::V3);
            assert!(certificate.to_pem().starts_with("-----BEGIN CERTIFICATE-----\n"));
        }
    }),
    ("13", "exactly one URI, and others are refused and never chosen among [X509-SVID 2]", || {
        assert_eq!(world().leaf.uris, [ID]);
        refuses_leaf(Fault::Uris(2), |p| p.subject_alt_names.push(uri("spiffe://cluster.local/b")));
        refuses_leaf(Fault::NoUri, |p| p.subject_alt_names = vec![SanType::DnsName(ia5("a.b"))]);
        refuses_leaf(Fault::NoUri, |p| p.subject_alt_names.clear());
        for uris in [&[ID, ID][..], &[ID, "spiffe://cluster.local/b"], &[ID, "https://example.org"]] {
            let key = key_pair();
            let mut params = CertificateParams::default();
            params.subject_alt_names = uris.iter().map(|text| uri(text)).collect();
            let csr = params.serialize_request(&key).expect("a CSR");
            assert!(matches!(CheckedCsr::from_der(csr.der()), Err(csr::Error::Uris(2))));
        }
    }),
    ("14", "other names beside the URI are allowed [X509-SVID 2]", || {
        let w = world();
        let id = account().spiffe_id(&domain());
        let profile = Profile::Workload {
            id: &id,
            dns: &["web.default.svc".parse().expect("a name")],
            proved_at: None,
        };
        let leaf = issue(&w.issuer, profile, "1h");
        assert_eq!((leaf.uris.len(), &leaf.dns[..]), (1, &["web.default.svc".to_owned()][..]));
        assert_eq!(verify(&[leaf, w.ca.clone()], w.issuer.bundle(), Some(&id), NOW), Ok(id));
    }),
    ("15", "a workload's identity has a path [X509-SVID 3.1]", || {
        refuses_leaf(Fault::NoPath(domain().id()), |p| {
            p.subject_alt_names = vec![uri("spiffe://cluster.local")]
        });
        let w = world();
        let id = domain().id();
        let order = Order {
            profile: Profile::Workload { id: &id, dns: &[], proved_at: None },
            key: w.leaf_key.public(),
            lifetime: hour(),
        };
        assert!(w.issuer.issue(&order, NOW, serial()).is_err(), "such a certificate is not minted");
        assert!(SpiffeId::parse_workload("spiffe://cluster.local").is_err());
    }),
    ("16", "with an empty subject the names are critical [X509-SVID 3.1]", || {
        let leaf = world().leaf;
        assert!(leaf.subject == [0x30, 0] && leaf.names_critical);
        refuses_leaf(Fault::NamesNotCritical, |p| {
            let names = [&[0x30, 42, 0x86, 40][..], ID.as_bytes()].concat();
            p.subject_alt_names.clear();
            p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 17], names));
        });
    }),
    ("17", "a CA is an identity without a path, in the trust domain of its leaves [X509-SVID 3.2]", || {
        let w = world();
        assert!(w.root.signing_faults().is_empty() && w.ca.signing_faults().is_empty());
        assert_eq!(w.ca.spiffe_id().map(|id| id.trust_domain().clone()), Ok(domain()));
        let with_path = |p: &mut CertificateParams| p.subject_alt_names = vec![uri(ID)];
        refuses_ca(|fault| matches!(fault, Fault::SigningPath(_)), with_path);
        let other = SpiffeId::parse("spiffe://example.org/a").expect("an ID");
        let order = Order {
            profile: Profile::Workload { id: &other, dns: &[], proved_at: None },
            key: w.leaf_key.public(),
            lifetime: hour(),
        };
        assert!(matches!(w.issuer.issue(&order, NOW, serial()), Err(issuer::Error::Foreign { .. })));
    }),
    ("18", "a CA's certificate authenticates nobody [X509-SVID 3.2]", || {
        let w = world();
        for ca in [&w.root, &w.ca] {
            let faults =
                verify(std::slice::from_ref(ca), w.issuer.bundle(), None, NOW).expect_err("it is refused");
            assert!(faults.contains(&chain::Fault::Leaf(Fault::LeafCa)), "{faults:?}");
            assert_eq!(ca.extended, None);
        }
        // What Mica itself serves with is a leaf of its own, which names no workload.
        let dns = ["localhost".parse().expect("a name")];
        let serving = issue(&w.issuer, Profile::Serving { dns: &dns, addresses: &[] }, "1h");
        assert!(!serving.is_ca && serving.uris.is_empty() && serving.spki != w.ca.spki);
        assert!(serving.extended.is_some_and(|usage| usage.server && !usage.client));
    }),
    ("19", "cA is true of CAs and false of workloads; a path length is allowed [X509-SVID 4.1]", || {
        let w = world();
        assert!(w.root.is_ca && w.ca.is_ca && !w.leaf.is_ca);
        assert_eq!((w.root.path_length, w.ca.path_length), (None, Some(0)));
        refuses_leaf(Fault::LeafCa, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        refuses_ca(|fault| *fault == Fault::NotCa, |p| p.is_ca = IsCa::ExplicitNoCa);
        refuses_ca(|fault| *fault == Fault::NotCa, |p| p.is_ca = IsCa::NoCa);
    }),
    ("20", "no name constraints on URIs, at which widely used verifiers stumble [X509-SVID 4.2]", || {
        let w = world();
        for certificate in [&w.root, &w.ca, &w.leaf] {
            assert!(!has_extension(certificate, "2.5.29.30"));
        }
    }),
    ("21", "the key usage is there and critical [X509-SVID 4.3]", || {
        let w = world();
        for certificate in [&w.root, &w.ca, &w.leaf] {
            assert!(certificate.usage.is_some_and(|usage| usage.critical));
        }
        refuses_leaf(Fault::NoUsage, |p| p.key_usages.clear());
        refuses_leaf(Fault::UsageNotCritical, |p| {
            p.key_usages.clear();
            p.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 15], vec![3, 2, 7, 0x80]));
        });
        refuses_ca(|fault| *fault == Fault::NoUsage, |p| p.key_usages.clear());
        refuses_ca(
            |fault| *fault == Fault::UsageNotCritical,
            |p| {
                p.key_usages.clear();
                p.custom_extensions
                    .push(CustomExtension::from_oid_content(&[2, 5, 29, 15], vec![3, 2, 1, 6]));
            },
        );
    }),
    ("22", "CAs have keyCertSign, and no digitalSignature [X509-SVID 4.3, appendix A]", || {
        let w = world();
        for ca in [&w.root, &w.ca] {
            assert!(ca.usage.is_some_and(|usage| usage.cert_sign && !usage.digital_signature));
        }
        refuses_ca(|fault| *fault == Fault::NoCertSign, |p| p.key_usages = vec![KeyUsagePurpose::CrlSign]);
    }),
    ("23", "workloads have digitalSignature, and neither keyCertSign nor cRLSign [X509-SVID 4.3]", || {
        let usage = world().leaf.usage.expect("it has one");
        assert!(usage.digital_signature && !usage.cert_sign && !usage.crl_sign);
        refuses_leaf(Fault::NoDigitalSignature, |p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement]);
        refuses_leaf(Fault::LeafCertSign, |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign));
        refuses_leaf(Fault::LeafCrlSign, |p| p.key_usages.push(KeyUsagePurpose::CrlSign));
    }),
    ("24", "an extended key usage of a workload has serverAuth and clientAuth [X509-SVID 4.4]", || {
        assert!(world().leaf.extended.is_some_and(|usage| usage.server && usage.client));
        for one in [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth] {
            refuses_leaf(Fault::ExtendedUsage, |p| p.extended_key_usages = vec![one]);
        }
        let none = foreign(|p| p.extended_key_usages.clear());
        assert!(none.verify().is_ok(), "one without it is sound");
    }),
    ("25", "CAs have no extended key usage [X509-SVID 4.4]", || {
        let w = world();
        assert!(w.root.extended.is_none() && w.ca.extended.is_none());
    }),
    ("26", "RFC 5280: serials, times, key identifiers, and the whole path [X509-SVID 5.1]", || {
        let w = world();
        let mut serials = BTreeSet::new();
        for _ in 0..1_000 {
            let serial = keys::serial_number().expect("randomness");
            assert!(serial.bytes()[0] < 0x80 && serials.insert(*serial.bytes()), "positive and unique");
        }
        assert!(*SerialNumber::from_random([0; 16]).bytes() > [0; 16]);
        for certificate in [&w.root, &w.ca, &w.leaf] {
            let raw = parsed(certificate).raw_serial().to_vec();
            assert!((1..=20).contains(&raw.len()) && raw[0] < 0x80);
            assert!(certificate.key_identifier.is_some());
        }
        assert_eq!(w.leaf.authority_identifier, w.ca.key_identifier);
        assert_eq!(w.ca.authority_identifier, w.root.key_identifier);
        assert_eq!((&w.leaf.issuer, &w.ca.issuer), (&w.ca.subject, &w.root.subject));
        let id = account().spiffe_id(&domain());
        let greedy = issue(&w.issuer, Profile::Workload { id: &id, dns: &[], proved_at: None }, "10y");
        assert_eq!(greedy.validity.not_after, w.ca.validity.not_after, "none outlives its issuer");
        // UTCTime up to 2049, GeneralizedTime from 2050 on, in one certificate.
        let late = World::at("cluster.local", datetime!(2049-12-31 12:00:00 UTC));
        let der = late.leaf.der();
        let has = |part: &[u8]| der.windows(part.len()).any(|window| window == part);
        assert!(has(b"\x17\x0d491231115800Z") && has(b"\x18\x0f20500101120000Z"));
        // The path: signatures, times, names, lengths.
        let bundle = w.issuer.bundle();
        let chain = [w.leaf.clone(), w.ca.clone()];
        assert!(verify(&chain, bundle, None, NOW).is_ok());
        assert!(verify(&chain[..1], bundle, None, NOW).is_err(), "no intermediate");
        assert!(verify(&chain, world().issuer.bundle(), None, NOW).is_err(), "another root");
        assert!(verify(&[], bundle, None, NOW).is_err());
        for at in
            [w.leaf.validity.not_before - Duration::SECOND, w.leaf.validity.not_after + Duration::SECOND]
        {
            assert!(verify(&chain, bundle, None, at).is_err(), "{at}");
        }
        let mut der = w.leaf.der().to_vec();
        *der.last_mut().expect("bytes") ^= 1;
        let forged = Certificate::from_der(&der).expect("it can be read");
        assert!(verify(&[forged, w.ca.clone()], bundle, None, NOW).is_err(), "a signature");
        let below = foreign_below(|p| p.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)), |_| {}, |_| {});
        assert!(below.verify().is_err(), "a root of path length 0 with an intermediate below it");
        let expired = foreign_below(|_| {}, |p| p.not_after = NOW - Duration::SECOND, |_| {});
        assert!(expired.verify().is_err(), "an expired intermediate");
    }),
    ("27", "the vectors of go-spiffe, made anew [X509-SVID 5.2]", || {
        let good_leaf_only = foreign(|_| {});
        assert_eq!(good_leaf_only.verify(), Ok(SpiffeId::parse(ID).expect("an ID")));
        let good_leaf_and_intermediate = foreign_below(|_| {}, |_| {}, |_| {});
        assert!(good_leaf_and_intermediate.verify().is_ok());
        for (name, fault, change) in [
            (
                "wrong-leaf-ca-true",
                Fault::LeafCa,
                (|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)) as Change,
            ),
            ("wrong-leaf-cert-sign", Fault::LeafCertSign, |p| {
                p.key_usages.push(KeyUsagePurpose::KeyCertSign)
            }),
            ("wrong-leaf-crl-sign", Fault::LeafCrlSign, |p| p.key_usages.push(KeyUsagePurpose::CrlSign)),
            ("wrong-leaf-empty-id", Fault::NoUri, |p| p.subject_alt_names.clear()),
            ("wrong-leaf-no-digital-signature", Fault::NoDigitalSignature, |p| {
                p.key_usages = vec![KeyUsagePurpose::KeyEncipherment];
            }),
        ] {
            let faults = foreign(change).verify().expect_err(name);
            assert!(faults.contains(&chain::Fault::Leaf(fault)), "{name}: {faults:?}");
        }
        let no_ca: Change = |p| p.is_ca = IsCa::NoCa;
        let no_key_cert_sign: Change = |p| p.key_usages = vec![KeyUsagePurpose::CrlSign];
        for (name, change) in
            [("wrong-intermediate-no-ca", no_ca), ("wrong-intermediate-no-key-cert-sign", no_key_cert_sign)]
        {
            assert!(foreign_below(|_| {}, change, |_| {}).verify().is_err(), "{name}");
        }
        let leaf = world().leaf;
        let corrupt = leaf.to_pem().replacen("\nMII", "\nMIJ", 1);
        assert!(Certificate::all_from_pem(corrupt.as_bytes()).is_err(), "corrupt-cert");
        let key = world().leaf_key.to_pem().replacen("\nMI", "\nMJ", 1);
        assert!(PrivateKey::from_pem(key.as_bytes(), None, None).is_err(), "corrupt-key");
        assert!(Certificate::all_from_pem(b"not pem").is_err(), "not-pem");
    }),
    ("28", "a bundle's entry: use x509-svid, no kid, one certificate in x5c [X509-SVID 6.1]", || {
        for kind in [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519] {
            let root = World::root(kind, "cluster.local", NOW).0;
            let document = written(&TrustBundle::new([root.clone()]).expect("a bundle"));
            let key = &document["keys"][0];
            assert_eq!((&key["use"], key.get("kid")), (&json!("x509-svid"), None));
            assert_eq!(key["x5c"], json!([STANDARD.encode(root.der())]), "one, standard base64 with padding");
            assert!(root.is_self_issued());
        }
    }),
    ("29", "entries without x5c are passed over, and so is all but its first value [X509-SVID 6.2]", || {
        let (one, other) = (world().root, world().root);
        let entry = |root: &Certificate| {
            written(&TrustBundle::new([root.clone()]).expect("a bundle"))["keys"][0].clone()
        };
        let mut bare = entry(&one);
        bare.as_object_mut().expect("an object").remove("x5c");
        let mut several = entry(&one);
        several["x5c"] = json!([STANDARD.encode(one.der()), STANDARD.encode(other.der()), "*"]);
        let read = TrustBundle::from_json(json!({ "keys": [bare, several] }).to_string().as_bytes());
        assert_eq!(read.expect("a bundle").roots(), [one]);
    }),
    ("42", "a JWK Set, with whatever else may be in it [Trust Domain and Bundle 4, 4.1]", || {
        let bundle = world().issuer.bundle().clone();
        let mut document = written(&bundle);
        assert!(document.is_object() && document["keys"].is_array());
        document["something"] = json!({ "new": true });
        document["keys"][0]["alg"] = json!("ES256");
        document["keys"][0]["something"] = json!([]);
        assert!(read(&document).expect("a bundle").same_roots(&bundle));
        for text in ["[]", "null", "1", "\"a\"", "", "{", "{}"] {
            assert!(TrustBundle::from_json(text.as_bytes()).is_err(), "{text:?}");
        }
    }),
    ("43", "the sequence is an integer of 64 bits, and is not kept when the content changes [4.1.1]", || {
        let mut bundle = TrustBundle::clone(world().issuer.bundle());
        assert!(written(&bundle).get("spiffe_sequence").is_none(), "none is made up");
        bundle.sequence = Some(u64::MAX);
        assert_eq!(written(&bundle)["spiffe_sequence"], json!(u64::MAX));
        assert_eq!(read(&written(&bundle)).expect("a bundle").sequence, Some(u64::MAX));
        for wrong in [json!(-1), json!(1.5), json!("1")] {
            let mut document = written(&bundle);
            document["spiffe_sequence"] = wrong;
            assert!(read(&document).is_err());
        }
        let merged = bundle.merged(world().issuer.bundle()).expect("a bundle");
        assert_eq!(merged.sequence, None, "only its publisher knows the next");
    }),
    ("44", "the refresh hint is in whole seconds [4.1.2]", || {
        let mut bundle = TrustBundle::clone(world().issuer.bundle());
        bundle.refresh_hint = Some(300);
        assert_eq!(written(&bundle)["spiffe_refresh_hint"], json!(300));
        assert_eq!(read(&written(&bundle)).expect("a bundle").refresh_hint, Some(300));
        let mut document = written(&bundle);
        document["spiffe_refresh_hint"] = json!("5m");
        assert!(read(&document).is_err());
    }),
    ("45", "keys has to be there; none usable is nobody trusted, and is never published [4.1.3]", || {
        assert!(matches!(read(&json!({ "spiffe_sequence": 1 })), Err(bundle::Error::Json(_))));
        assert_eq!(read(&json!({ "keys": [] })), Err(bundle::Error::Empty));
        assert_eq!(read(&json!({ "keys": [{ "use": "jwt-svid", "kty": "EC" }] })), Err(bundle::Error::Empty));
        // There is no empty bundle to publish by accident.
        assert_eq!(TrustBundle::new([]), Err(bundle::Error::Empty));
        assert!(TrustBundle::from_pem(b"").is_err());
    }),
    ("46", "unknown kty and use are passed over; use is case-sensitive [4.1.3, 4.2]", || {
        let w = world();
        let good = written(w.issuer.bundle())["keys"][0].clone();
        assert!(good["kty"].is_string() && good["use"].is_string());
        let with = |name: &str, value: &str| {
            let mut entry = good.clone();
            entry[name] = json!(value);
            entry
        };
        let odd =
            [with("kty", "quantum"), with("use", "wit-svid"), with("use", "X509-SVID"), json!({}), json!(1)];
        assert_eq!(read(&json!({ "keys": odd })), Err(bundle::Error::Empty));
        let all: Vec<Value> = odd.into_iter().chain([good]).collect();
        assert!(read(&json!({ "keys": all })).expect("a bundle").same_roots(w.issuer.bundle()));
    }),
    ("47", "a map of bundles has each name once, and its refresh hints do not count [5.1.1, 6.3]", || {
        let mut bundle = TrustBundle::clone(world().issuer.bundle());
        bundle.refresh_hint = Some(1);
        let document = written(&bundle);
        let map = |text: String| map_from_json(text.as_bytes());
        let read =
            map(json!({ "trust_domains": { "a": document, "b": document } }).to_string()).expect("a map");
        assert_eq!(read.len(), 2);
        assert!(read.values().all(|bundle| bundle.refresh_hint.is_none()));
        assert!(map(format!("{{\"trust_domains\": {{\"a\": {document}, \"a\": {document}}}}}")).is_err());
        assert!(map("{}".to_owned()).is_err());
        assert!(map(json!({ "trust_domains": { "A": document } }).to_string()).is_err());
    }),
    ("48", "one root is not shared by several trust domains [6.2]", || {
        let w = World::of("cluster.local");
        let key = Arc::new(w.ca_key.signing().expect("a key"));
        let other = TrustDomain::parse("example.org").expect("a name");
        let refused = Issuer::new(key, &[w.ca], TrustBundle::clone(w.issuer.bundle()), &other);
        assert!(matches!(refused, Err(issuer::Error::TrustDomain { .. })));
    }),
    (
        "49",
        "without a refresh hint none is made up, so that the consumer's own five minutes hold [6.1]",
        || {
            let bundle = TrustBundle::clone(world().issuer.bundle());
            assert!(written(&bundle).get("spiffe_refresh_hint").is_none());
            assert_eq!(read(&written(&bundle)).expect("a bundle").refresh_hint, None);
        },
    ),
];

/// What the checklist has in its sections 2.1, 2.2, 2.5, 2.3 and 2.8.
const NUMBERS: &[&str] = &[
    "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "12b", "13", "14", "15", "16", "17", "18",
    "19", "20", "21", "22", "23", "24", "25", "26", "27", "28", "29", "42", "43", "44", "45", "46", "47",
    "48", "49", "30", "31", "32", "33", "34", "35", "36", "36b", "70", "71", "72", "73", "73b", "74", "75",
    "76", "77", "78", "78b", "79",
];

#[test]
fn every_rule_is_kept() {
    let rules = || RULES.iter().chain(tokens::RULES).chain(federation::RULES);
    let numbers: Vec<&str> = rules().map(|(number, ..)| *number).collect();
    assert_eq!(numbers, NUMBERS, "a rule is missing, or there twice");
    let mut broken = Vec::new();
    for (number, what, check) in rules() {
        if std::panic::catch_unwind(check).is_err() {
            broken.push(format!("{number}: {what}"));
        }
    }
    assert!(broken.is_empty(), "broken, see above:\n{}", broken.join("\n"));
}

/// A root, an intermediate and a leaf, all of Mica's own.
struct World {
    root: Certificate,
    ca: Certificate,
    ca_key: PrivateKey,
    issuer: Issuer,
    leaf: Certificate,
    leaf_key: PrivateKey,
}

fn world() -> World {
    World::of("cluster.local")
}

impl World {
    fn of(trust_domain: &str) -> Self {
        Self::at(trust_domain, NOW)
    }

    fn at(trust_domain: &str, now: OffsetDateTime) -> Self {
        let (root, top) = Self::root(KeyKind::P256, trust_domain, now);
        let trust_domain = TrustDomain::parse(trust_domain).expect("a name");
        let organization = "conformance".parse().expect("an organization");
        let [ca_key, leaf_key] = [(); 2].map(|()| keys::generate(KeyKind::P256).expect("a key"));
        let order = Order {
            profile: Profile::Intermediate { organization: &organization, trust_domain: &trust_domain },
            key: ca_key.public(),
            lifetime: "1y".parse().expect("a duration"),
        };
        let ca = top.issue(&order, now, serial()).expect("an intermediate");
        let ca = Certificate::from_der(ca.der()).expect("a certificate");
        let signing = Arc::new(ca_key.signing().expect("a key"));
        let bundle = TrustBundle::clone(top.bundle());
        let issuer =
            Issuer::new(signing, std::slice::from_ref(&ca), bundle, &trust_domain).expect("an issuer");
        let id = account().spiffe_id(&trust_domain);
        let order = Order {
            profile: Profile::Workload { id: &id, dns: &[], proved_at: None },
            key: leaf_key.public(),
            lifetime: "24h".parse().expect("a duration"),
        };
        let leaf = issuer.issue(&order, now, serial()).expect("a leaf");
        let leaf = Certificate::from_der(leaf.der()).expect("a certificate");
        Self { root, ca, ca_key, issuer, leaf, leaf_key }
    }

    fn root(kind: KeyKind, trust_domain: &str, now: OffsetDateTime) -> (Certificate, Issuer) {
        let trust_domain = TrustDomain::parse(trust_domain).expect("a name");
        let organization = "conformance".parse().expect("an organization");
        let key = keys::generate(kind).and_then(|key| Ok(key.signing()?)).expect("a key");
        let profile = Profile::Root { organization: &organization, trust_domain: &trust_domain };
        let lifetime = "10y".parse().expect("a duration");
        let root = issuer::root(&key, &profile, lifetime, now, serial()).expect("a root");
        let root = Certificate::from_der(root.der()).expect("a certificate");
        let bundle = TrustBundle::new([root.clone()]).expect("a bundle");
        let issuer = Issuer::new(Arc::new(key), std::slice::from_ref(&root), bundle, &trust_domain)
            .expect("an issuer");
        (root, issuer)
    }
}

fn domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").expect("a name")
}

fn account() -> ServiceAccount {
    ServiceAccount::new("default", "web").expect("a service account")
}

fn hour() -> Lifetime {
    Lifetime::from_secs(3_600)
}

fn serial() -> SerialNumber {
    keys::serial_number().expect("randomness")
}

fn issue(issuer: &Issuer, profile: Profile<'_>, lifetime: &str) -> Certificate {
    let key = keys::generate(KeyKind::P256).expect("a key");
    let order = Order { profile, key: key.public(), lifetime: lifetime.parse().expect("a duration") };
    let issued = issuer.issue(&order, NOW, serial()).expect("a certificate");
    Certificate::from_der(issued.der()).expect("a certificate")
}

fn parsed(certificate: &Certificate) -> X509Certificate<'_> {
    X509Certificate::from_der(certificate.der()).expect("a certificate").1
}

fn has_extension(certificate: &Certificate, oid: &str) -> bool {
    parsed(certificate).extensions().iter().any(|extension| extension.oid.to_id_string() == oid)
}

fn written(bundle: &TrustBundle) -> Value {
    serde_json::from_str(&bundle.to_json().expect("JSON")).expect("JSON")
}

fn read(document: &Value) -> Result<TrustBundle, bundle::Error> {
    TrustBundle::from_json(document.to_string().as_bytes())
}

/// What rcgen is told to do differently.
type Change = fn(&mut CertificateParams);

/// A chain that Mica did not make.
struct Foreign {
    chain: Vec<Certificate>,
    bundle: TrustBundle,
}

impl Foreign {
    fn verify(&self) -> Result<SpiffeId, Vec<chain::Fault>> {
        verify(&self.chain, &self.bundle, None, NOW)
    }
}

fn key_pair() -> KeyPair {
    KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key")
}

fn ia5(text: &str) -> rcgen::string::Ia5String {
    text.try_into().expect("ASCII")
}

fn uri(text: &str) -> SanType {
    SanType::URI(ia5(text))
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = NOW - Duration::DAY;
    params.not_after = NOW + Duration::DAY;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf_params() -> CertificateParams {
    let mut params = ca_params("");
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.subject_alt_names = vec![uri(ID)];
    params
}

fn certificate(made: rcgen::Certificate) -> Certificate {
    Certificate::from_der(made.der()).expect("a certificate")
}

/// A leaf right below a root, changed before it is signed.
fn foreign(change: impl FnOnce(&mut CertificateParams)) -> Foreign {
    let key = key_pair();
    let params = ca_params("root");
    let root = certificate(params.self_signed(&key).expect("a root"));
    let issuer = RcgenIssuer::new(params, key);
    let mut params = leaf_params();
    change(&mut params);
    let leaf = certificate(params.signed_by(&key_pair(), &issuer).expect("a leaf"));
    Foreign { chain: vec![leaf], bundle: TrustBundle::new([root]).expect("a bundle") }
}

/// A root, an intermediate and a leaf, each changed before it is signed.
fn foreign_below(
    change_root: impl FnOnce(&mut CertificateParams),
    change_ca: impl FnOnce(&mut CertificateParams),
    change_leaf: impl FnOnce(&mut CertificateParams),
) -> Foreign {
    let (root_key, ca_key) = (key_pair(), key_pair());
    let mut root_params = ca_params("root");
    change_root(&mut root_params);
    let root = certificate(root_params.self_signed(&root_key).expect("a root"));
    let root_issuer = RcgenIssuer::new(root_params, root_key);
    let mut params = ca_params("intermediate");
    change_ca(&mut params);
    let ca = certificate(params.signed_by(&ca_key, &root_issuer).expect("an intermediate"));
    let ca_issuer = RcgenIssuer::new(params, ca_key);
    let mut params = leaf_params();
    change_leaf(&mut params);
    let leaf = certificate(params.signed_by(&key_pair(), &ca_issuer).expect("a leaf"));
    Foreign { chain: vec![leaf, ca], bundle: TrustBundle::new([root]).expect("a bundle") }
}

/// A leaf with this one change is refused, for this reason; without the change it is good.
fn refuses_leaf(fault: Fault, change: impl FnOnce(&mut CertificateParams)) {
    assert!(foreign(|_| {}).verify().is_ok());
    let faults = foreign(change).verify().expect_err("it is refused");
    assert!(faults.contains(&chain::Fault::Leaf(fault.clone())), "{fault:?} is not in {faults:?}");
}

/// A CA with this one change makes no issuer for this reason, and no chain through it holds.
fn refuses_ca(is_fault: fn(&Fault) -> bool, change: fn(&mut CertificateParams)) {
    assert!(foreign_below(|_| {}, |_| {}, |_| {}).verify().is_ok());
    let through = foreign_below(|_| {}, change, |_| {});
    assert!(through.verify().is_err(), "a chain through it holds");
    let key = keys::generate(KeyKind::P256).expect("a key");
    let mut params = ca_params("self");
    change(&mut params);
    let made = certificate(params.self_signed(&key.signing().expect("a key")).expect("a CA"));
    let root = TrustBundle::new([world().root]).expect("a bundle");
    let signing = Arc::new(key.signing().expect("a key"));
    match Issuer::new(signing, &[made], root, &domain()) {
        Err(issuer::Error::Certificate { fault, .. }) => assert!(is_fault(&fault), "{fault:?}"),
        other => panic!("{other:?}"),
    }
}
