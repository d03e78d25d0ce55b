//! The second look: a finished certificate is read anew and compared with what it should be, before it leaves. A fault
//! of the builder so becomes an error instead of a certificate.

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
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
    let (rest, found) = X509Certificate::from_der(der).map_err(|_| Error("not X.509"))?;
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
        let (bit, fits, what) = match (extension.oid.as_bytes(), expected.profile) {
            (PROVED_AT, Profile::Workload { proved_at: Some(at), .. }) => {
                (64, !extension.critical && generalized_time(extension.value) == Some(*at), "proved at")
            }
            _ => extension_fits(extension.critical, extension.parsed_extension(), expected),
        };
        if !fits || seen & bit != 0 {
            return Err(Error(what));
        }
        seen |= bit;
    }
    Ok(())
}

fn extension_fits(
    critical: bool,
    found: &ParsedExtension<'_>,
    expected: &Template<'_>,
) -> (u8, bool, &'static str) {
    let ca = expected.profile.is_ca();
    match found {
        ParsedExtension::BasicConstraints(constraints) => {
            let length = matches!(expected.profile, Profile::Intermediate { .. }).then_some(0);
            let fits = critical && constraints.ca == ca && constraints.path_len_constraint == length;
            (1, fits, "basic constraints")
        }
        // keyCertSign and cRLSign are bits 5 and 6, digitalSignature is bit 0; x509-parser counts from the low end.
        ParsedExtension::KeyUsage(usage) => {
            (2, critical && usage.flags == if ca { 0b110_0000 } else { 1 }, "key usage")
        }
        ParsedExtension::ExtendedKeyUsage(usage) => {
            let client = matches!(expected.profile, Profile::Workload { .. });
            let others = usage.any
                || usage.code_signing
                || usage.email_protection
                || usage.time_stamping
                || usage.ocsp_signing
                || !usage.other.is_empty();
            let fits = !ca && usage.server_auth && usage.client_auth == client && !others;
            (4, fits, "extended key usage")
        }
        ParsedExtension::SubjectKeyIdentifier(identifier) => {
            (8, !critical && identifier.0 == expected.key.identifier(), "subject key identifier")
        }
        ParsedExtension::AuthorityKeyIdentifier(identifier) => {
            let fits =
                identifier.key_identifier.as_ref().is_some_and(|k| k.0 == expected.authority_identifier)
                    && identifier.authority_cert_issuer.is_none()
                    && identifier.authority_cert_serial.is_none();
            (16, !critical && fits, "authority key identifier")
        }
        ParsedExtension::SubjectAlternativeName(san) => {
            let fits =
                critical == (expected.subject == EMPTY_NAME) && names_fit(&san.general_names, expected);
            (32, fits, "subject alternative name")
        }
        _ => (0, false, "an extension that no profile has"),
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
