//! The second look: a finished certificate is read anew and compared with what it should be, before it leaves. A fault
//! of the builder so becomes an error instead of a certificate.

use x509_parser::certificate::X509CertificateParser;
use x509_parser::extensions::{AuthorityKeyIdentifier, GeneralName, SubjectAlternativeName, X509Extension};
use x509_parser::nom::Parser as _;
use x509_parser::oid_registry::{
    OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_EXTENDED_KEY_USAGE,
    OID_X509_EXT_KEY_USAGE, OID_X509_EXT_SUBJECT_ALT_NAME, OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
};
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Version;

use super::certificate::{EMPTY_NAME, generalized_time, trimmed, validity_of};
use super::profile::{PROVED_AT, Profile, Template};

/// What is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the minted certificate does not fit its profile ({0}); it was not handed out")]
pub struct Error(&'static str);

/// Compares a certificate with its template, field by field; the signature alone is not verified again, since an
/// issuer has proved itself.
pub(crate) fn check(der: &[u8], expected: &Template<'_>) -> Result<(), Error> {
    let mut parser = X509CertificateParser::new().with_deep_parse_extensions(false);
    let (rest, found) = parser.parse(der).map_err(|_| Error("not X.509"))?;
    let tbs = &found.tbs_certificate;
    let validity = validity_of(&found).map_err(|_| Error("validity"))?;
    let algorithm = |found: &x509_parser::x509::AlgorithmIdentifier<'_>| {
        expected.signature_algorithm.get(4..).is_some_and(|rest| rest.starts_with(found.algorithm.as_bytes()))
    };
    for (fits, what) in [
        (rest.is_empty(), "bytes behind it"),
        (tbs.version == X509Version::V3, "version"),
        (trimmed(tbs.raw_serial()) == trimmed(expected.serial.bytes()), "serial number"),
        (tbs.raw_serial().first().is_some_and(|b| *b < 0x80), "sign of the serial number"),
        (algorithm(&tbs.signature) && algorithm(&found.signature_algorithm), "signature algorithm"),
        (tbs.issuer.as_raw() == expected.issuer, "issuer"),
        (validity == expected.validity && validity.not_before <= validity.not_after, "validity"),
        (tbs.subject.as_raw() == expected.subject, "subject"),
        (tbs.subject_pki.raw == expected.key.spki(), "public key"),
        (tbs.issuer_uid.is_none() && tbs.subject_uid.is_none(), "unique identifiers"),
    ] {
        if !fits {
            return Err(Error(what));
        }
    }
    let wanted = match expected.profile {
        Profile::Root { .. } | Profile::Intermediate { .. } => 5,
        Profile::Workload { proved_at: Some(_), .. } => 7,
        Profile::Workload { .. } | Profile::Serving { .. } => 6,
    };
    if tbs.extensions().len() != wanted {
        return Err(Error("number of extensions"));
    }
    let mut seen = 0u8;
    for extension in tbs.extensions() {
        let (bit, fits, what) = extension_fits(extension, expected);
        if !fits || seen & bit != 0 {
            return Err(Error(what));
        }
        seen |= bit;
    }
    Ok(())
}

/// What is the same in all certificates of a profile is compared with the DER of RFC 5280 4.2.1, written out here.
fn extension_fits(found: &X509Extension<'_>, expected: &Template<'_>) -> (u8, bool, &'static str) {
    const SERVER: [u8; 10] = [6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1];
    const CLIENT: [u8; 10] = [6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2];
    let X509Extension { oid, critical, value, .. } = found;
    if *oid == OID_X509_EXT_BASIC_CONSTRAINTS {
        let wanted: &[u8] = match expected.profile {
            Profile::Root { .. } => &[0x30, 3, 1, 1, 0xff],
            Profile::Intermediate { .. } => &[0x30, 6, 1, 1, 0xff, 2, 1, 0],
            Profile::Workload { .. } | Profile::Serving { .. } => &[0x30, 0],
        };
        (1, *critical && *value == wanted, "basic constraints")
    } else if *oid == OID_X509_EXT_KEY_USAGE {
        // keyCertSign and cRLSign, or digitalSignature.
        let wanted = if expected.profile.is_ca() { [3, 2, 1, 0b0000_0110] } else { [3, 2, 7, 0b1000_0000] };
        (2, *critical && *value == wanted, "key usage")
    } else if *oid == OID_X509_EXT_EXTENDED_KEY_USAGE {
        let fits = match expected.profile {
            Profile::Root { .. } | Profile::Intermediate { .. } => false,
            Profile::Workload { .. } => *value == [&[0x30, 20], &SERVER[..], &CLIENT[..]].concat(),
            Profile::Serving { .. } => *value == [&[0x30, 10], &SERVER[..]].concat(),
        };
        (4, !critical && fits, "extended key usage")
    } else if *oid == OID_X509_EXT_SUBJECT_KEY_IDENTIFIER {
        let fits = value.strip_prefix(&[4, 20]) == Some(&expected.key.identifier());
        (8, !critical && fits, "subject key identifier")
    } else if *oid == OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER {
        let fits = AuthorityKeyIdentifier::from_der(value).is_ok_and(|(rest, identifier)| {
            rest.is_empty()
                && identifier.key_identifier.is_some_and(|k| k.0 == expected.authority_identifier)
                && identifier.authority_cert_issuer.is_none()
                && identifier.authority_cert_serial.is_none()
        });
        (16, !critical && fits, "authority key identifier")
    } else if *oid == OID_X509_EXT_SUBJECT_ALT_NAME {
        let fits = *critical == (expected.subject == EMPTY_NAME)
            && SubjectAlternativeName::from_der(value)
                .is_ok_and(|(rest, names)| rest.is_empty() && names_fit(&names.general_names, expected));
        (32, fits, "subject alternative name")
    } else if oid.as_bytes() == PROVED_AT
        && let Profile::Workload { proved_at: Some(at), .. } = expected.profile
    {
        (64, !critical && generalized_time(value) == Some(*at), "proved at")
    } else {
        (0, false, "an extension that no profile has")
    }
}

fn names_fit(found: &[GeneralName<'_>], expected: &Template<'_>) -> bool {
    let mut found = found.iter();
    let mut next_is = |wanted: GeneralName<'_>| found.next() == Some(&wanted);
    let fits = match expected.profile {
        Profile::Root { trust_domain, .. } | Profile::Intermediate { trust_domain, .. } => {
            next_is(GeneralName::URI(trust_domain.id().as_str()))
        }
        Profile::Workload { id, dns, .. } => {
            !id.path().is_empty()
                && next_is(GeneralName::URI(id.as_str()))
                && dns.iter().all(|name| next_is(GeneralName::DNSName(name.as_str())))
        }
        Profile::Serving { dns, addresses } => {
            dns.iter().all(|name| next_is(GeneralName::DNSName(name.as_str())))
                && addresses.iter().all(|address| match address {
                    ::core::net::IpAddr::V4(v4) => next_is(GeneralName::IPAddress(&v4.octets())),
                    ::core::net::IpAddr::V6(v6) => next_is(GeneralName::IPAddress(&v6.octets())),
                })
        }
    };
    fits && found.next().is_none()
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::super::certificate::SerialNumber;
    use super::super::der::Writer;
    use super::super::key::KeyKind;
    use super::super::lifetime::Validity;
    use super::super::profile::DnsName;
    use super::super::spiffe::{SpiffeId, TrustDomain};
    use super::*;
    use crate::sys::keys;

    /// With a signature that nobody looks at here.
    fn written(template: &Template<'_>) -> Vec<u8> {
        let mut der = Writer::with_capacity(1_000);
        der.sequence(|w| {
            w.raw(&template.to_der());
            w.raw(template.signature_algorithm);
            w.bits(&[7; 64]);
        });
        der.finish()
    }

    /// A certificate is held against another template than the one that it was made from: each difference is found.
    #[test]
    fn a_certificate_that_is_not_what_was_ordered_is_not_handed_out() {
        let id = |name: &str| SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{name}")).unwrap();
        let (web, db) = (id("web"), id("db"));
        let dns: [DnsName; 2] = ["a.example".parse().unwrap(), "b.example".parse().unwrap()];
        let addresses: [::core::net::IpAddr; 1] = [[10, 0, 0, 1].into()];
        let (organization, trust_domain) =
            ("o".parse().unwrap(), TrustDomain::parse("cluster.local").unwrap());
        let (root, intermediate) = (
            Profile::Root { organization: &organization, trust_domain: &trust_domain },
            Profile::Intermediate { organization: &organization, trust_domain: &trust_domain },
        );
        let at = datetime!(2026-01-02 03:04:05 UTC);
        let workload = |id, dns, proved_at| Profile::Workload { id, dns, proved_at };
        let plain = workload(&web, &[], None);
        let serving = Profile::Serving { dns: &dns, addresses: &addresses };
        let profiles = [
            &root,
            &intermediate,
            &plain,
            &workload(&db, &[], None),
            &workload(&web, &dns, None),
            &workload(&web, &dns[..1], None),
            &workload(&web, &[], Some(at)),
            &workload(&web, &[], Some(at + time::Duration::SECOND)),
            &serving,
            &Profile::Serving { dns: &dns, addresses: &[] },
            &Profile::Serving { dns: &dns[..1], addresses: &addresses },
        ];
        let keys = [keys::generate(KeyKind::P256).unwrap(), keys::generate(KeyKind::P256).unwrap()];
        let [own, other] = keys.map(|key| key.public().clone());
        let (mine, others) = (KeyKind::P256.signature_algorithm(), KeyKind::Ed25519.signature_algorithm());
        let validity = Validity { not_before: at, not_after: at + time::Duration::HOUR };
        let name = root.subject(&own);
        let of = |profile| Template {
            profile,
            serial: SerialNumber::from_random([1; 16]),
            signature_algorithm: mine,
            issuer: &name,
            authority_identifier: &[1; 20],
            validity,
            subject: EMPTY_NAME,
            key: &own,
        };
        for (made, number) in profiles.iter().zip(0..) {
            let der = written(&of(made));
            for (expected, other) in profiles.iter().zip(0..) {
                assert_eq!(check(&der, &of(expected)).is_ok(), number == other, "{number} {other}");
            }
        }
        let der = written(&of(&plain));
        let later = Validity { not_after: at + time::Duration::DAY, ..validity };
        for (expected, what) in [
            (Template { serial: SerialNumber::from_random([2; 16]), ..of(&plain) }, "serial number"),
            (Template { signature_algorithm: others, ..of(&plain) }, "signature algorithm"),
            (Template { issuer: EMPTY_NAME, ..of(&plain) }, "issuer"),
            (Template { authority_identifier: &[2; 20], ..of(&plain) }, "authority key identifier"),
            (Template { validity: later, ..of(&plain) }, "validity"),
            (Template { subject: &name, ..of(&plain) }, "subject"),
            (Template { key: &other, ..of(&plain) }, "public key"),
        ] {
            assert_eq!(check(&der, &expected), Err(Error(what)));
        }
        let mut longer = der.clone();
        longer.push(0);
        assert_eq!(check(&longer, &of(&plain)), Err(Error("bytes behind it")));
        assert_eq!(check(&longer[..100], &of(&plain)), Err(Error("not X.509")));
    }
}
