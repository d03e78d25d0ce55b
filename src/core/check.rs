//! The second look: a finished certificate is read anew and compared with what it should be, before it leaves. A fault
//! of the builder so becomes an error instead of a certificate.

use time::{Date, OffsetDateTime};
use x509_parser::oid_registry::{
    OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER, OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_EXTENDED_KEY_USAGE,
    OID_X509_EXT_KEY_USAGE, OID_X509_EXT_SUBJECT_ALT_NAME, OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
};

use super::certificate::{EMPTY_NAME, generalized_time, trimmed};
use super::der::{self, Extension, Signed, Value, Values};
use super::lifetime::Validity;
use super::profile::{PROVED_AT, Profile, Template};

/// What is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the minted certificate does not fit its profile ({0}); it was not handed out")]
pub struct Error(&'static str);

/// Compares a certificate with its template, field by field; the signature alone is not verified again, since an
/// issuer has proved itself.
pub(crate) fn check(der: &[u8], expected: &Template<'_>) -> Result<(), Error> {
    let Signed { body, algorithm, .. } = Signed::of(der).ok_or(Error("not X.509"))?;
    let mut fields = Values::of(body.contents);
    let mut next = |what, fits: &dyn Fn(Value<'_>) -> bool| {
        fields.next().filter(|field| fits(*field)).ok_or(Error(what))
    };
    next("version", &|field| field.whole == [0xa0, 3, 2, 1, 2])?;
    next("serial number", &|field| {
        let digits = field.contents;
        let is_positive = digits.first().is_some_and(|b| *b < 0x80);
        field.tag == der::INTEGER && is_positive && trimmed(digits) == trimmed(expected.serial.bytes())
    })?;
    next("signature algorithm", &|field| {
        field.whole == expected.signature_algorithm && field.whole == algorithm.whole
    })?;
    next("issuer", &|field| field.whole == expected.issuer)?;
    next("validity", &|field| {
        let Validity { not_before, not_after } = expected.validity;
        not_before <= not_after && moments(field) == Some([not_before, not_after])
    })?;
    next("subject", &|field| field.whole == expected.subject)?;
    next("public key", &|field| field.whole == expected.key.spki())?;
    let extensions = next("extensions", &|field| field.tag == der::explicit(3))?;
    if !fields.is_over() {
        return Err(Error("fields behind the extensions"));
    }
    let mut extensions = der::sequence(extensions.contents).ok_or(Error("extensions"))?;
    let mut seen = 0;
    for extension in extensions.by_ref() {
        let (bit, fits, what) = extension_fits(extension, expected).ok_or(Error("an extension's form"))?;
        if !fits || seen & bit != 0 {
            return Err(Error(what));
        }
        seen |= bit;
    }
    let wanted = match expected.profile {
        Profile::Root { .. } | Profile::Intermediate { .. } => 0b011_1011,
        Profile::Workload { proved_at: Some(_), .. } => 0b111_1111,
        Profile::Workload { .. } | Profile::Serving { .. } => 0b011_1111,
    };
    if seen != wanted || !extensions.is_over() {
        return Err(Error("number of extensions"));
    }
    Ok(())
}

/// RFC 5280 4.1.2.5.
fn moments(validity: Value<'_>) -> Option<[OffsetDateTime; 2]> {
    let mut times = Values::of(validity.contents);
    let mut next = || {
        let time = times.next()?;
        match time.tag {
            der::UTC_TIME => utc_time(time.contents),
            _ => generalized_time(time.whole),
        }
    };
    let found = [next()?, next()?];
    (validity.tag == der::SEQUENCE && times.is_over()).then_some(found)
}

/// YYMMDDhhmmssZ, of the years 1950 to 2049 (RFC 5280 4.1.2.5.1).
fn utc_time(text: &[u8]) -> Option<OffsetDateTime> {
    let (digits, b"Z") = text.split_at_checked(12)? else { return None };
    let mut numbers = [0; 6];
    for (number, digits) in numbers.iter_mut().zip(digits.chunks_exact(2)) {
        for digit in digits {
            *number = *number * 10 + digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        }
    }
    let [year, month, day, hour, minute, second] = numbers;
    let year = if year < 50 { 2000 } else { 1900 } + i32::from(year);
    let day = Date::from_calendar_date(year, month.try_into().ok()?, day).ok()?;
    Some(day.with_hms(hour, minute, second).ok()?.assume_utc())
}

/// A bit of its own, whether it is what it should be, and its name. What is the same in all certificates of a profile is
/// compared with the DER of RFC 5280 4.2.1, written out here.
fn extension_fits(found: Value<'_>, expected: &Template<'_>) -> Option<(u8, bool, &'static str)> {
    const SERVER: &[u8] = &[0x30, 10, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1];
    const SERVER_AND_CLIENT: &[u8] =
        &[0x30, 20, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1, 6, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2];
    let Extension { oid, critical, value } = Extension::of(found)?;
    // X.690 11.5: what is so by default is not written.
    let critical = match critical {
        None => false,
        Some([0xff]) => true,
        Some(_) => return None,
    };
    Some(if oid == OID_X509_EXT_BASIC_CONSTRAINTS.as_bytes() {
        let wanted: &[u8] = match expected.profile {
            Profile::Root { .. } => &[0x30, 3, 1, 1, 0xff],
            Profile::Intermediate { .. } => &[0x30, 6, 1, 1, 0xff, 2, 1, 0],
            Profile::Workload { .. } | Profile::Serving { .. } => &[0x30, 0],
        };
        (1, critical && value == wanted, "basic constraints")
    } else if oid == OID_X509_EXT_KEY_USAGE.as_bytes() {
        // keyCertSign and cRLSign, or digitalSignature.
        let wanted = if expected.profile.is_ca() { [3, 2, 1, 0b0000_0110] } else { [3, 2, 7, 0b1000_0000] };
        (2, critical && value == wanted, "key usage")
    } else if oid == OID_X509_EXT_EXTENDED_KEY_USAGE.as_bytes() {
        let fits = match expected.profile {
            Profile::Root { .. } | Profile::Intermediate { .. } => false,
            Profile::Workload { .. } => value == SERVER_AND_CLIENT,
            Profile::Serving { .. } => value == SERVER,
        };
        (4, !critical && fits, "extended key usage")
    } else if oid == OID_X509_EXT_SUBJECT_KEY_IDENTIFIER.as_bytes() {
        let fits = value.strip_prefix(&[4, 20]) == Some(&expected.key.identifier());
        (8, !critical && fits, "subject key identifier")
    } else if oid == OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER.as_bytes() {
        let fits = der::sequence(value).is_some_and(|mut found| {
            let identifier = found.one(der::implicit(0));
            found.is_over() && identifier.is_some_and(|found| found.contents == expected.authority_identifier)
        });
        (16, !critical && fits, "authority key identifier")
    } else if oid == OID_X509_EXT_SUBJECT_ALT_NAME.as_bytes() {
        let fits = critical == (expected.subject == EMPTY_NAME) && names_fit(value, expected);
        (32, fits, "subject alternative name")
    } else if oid == PROVED_AT
        && let Profile::Workload { proved_at: Some(at), .. } = expected.profile
    {
        (64, !critical && generalized_time(value) == Some(*at), "proved at")
    } else {
        (0, false, "an extension that no profile has")
    })
}

/// GeneralNames, RFC 5280 4.2.1.6.
fn names_fit(value: &[u8], expected: &Template<'_>) -> bool {
    const DNS: u8 = 0x82;
    const URI: u8 = 0x86;
    const ADDRESS: u8 = 0x87;
    let Some(mut found) = der::sequence(value) else { return false };
    let mut next_is = |tag, name: &[u8]| found.one(tag).is_some_and(|found| found.contents == name);
    let fits = match expected.profile {
        Profile::Root { trust_domain, .. } | Profile::Intermediate { trust_domain, .. } => {
            next_is(URI, trust_domain.id().as_str().as_bytes())
        }
        Profile::Workload { id, dns, .. } => {
            !id.path().is_empty()
                && next_is(URI, id.as_str().as_bytes())
                && dns.iter().all(|name| next_is(DNS, name.as_str().as_bytes()))
        }
        Profile::Serving { dns, addresses } => {
            dns.iter().all(|name| next_is(DNS, name.as_str().as_bytes()))
                && addresses.iter().all(|address| match address {
                    ::core::net::IpAddr::V4(v4) => next_is(ADDRESS, &v4.octets()),
                    ::core::net::IpAddr::V6(v6) => next_is(ADDRESS, &v6.octets()),
                })
        }
    };
    fits && found.is_over()
}

#[cfg(test)]
mod tests {
    use pkcs8::der::Decode as _;
    use pkcs8::der::asn1::UtcTime;
    use proptest::prelude::*;
    use time::macros::datetime;

    use super::super::certificate::SerialNumber;
    use super::super::der::Writer;
    use super::super::key::KeyKind;
    use super::super::lifetime::Validity;
    use super::super::profile::DnsName;
    use super::super::spiffe::{SpiffeId, TrustDomain};
    use super::*;
    use crate::sys::keys;

    proptest! {
        /// Against the `der` crate, which knows nothing before 1970.
        #[test]
        fn a_time_is_what_others_read(text in "([0-9][0-9](0[0-9]|1[0-3])[0-3][0-9][0-2][0-9][0-6][0-9][0-6][0-9]Z?|[0-9]{10,14}.?)") {
            let mut der = Writer::with_capacity(20);
            der.primitive(der::UTC_TIME, text.as_bytes());
            let theirs = UtcTime::from_der(&der.finish()).ok();
            let theirs = theirs.map(|time| OffsetDateTime::UNIX_EPOCH + time.to_unix_duration());
            let ours = utc_time(text.as_bytes()).filter(|time| *time >= OffsetDateTime::UNIX_EPOCH);
            prop_assert_eq!(ours, theirs);
        }
    }

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
        assert_eq!(check(&longer, &of(&plain)), Err(Error("not X.509")));
        assert_eq!(check(&longer[..100], &of(&plain)), Err(Error("not X.509")));
    }
}
