//! What each kind of certificate contains. This room alone builds certificates, and every field is set here.

use ::core::net::IpAddr;
use std::borrow::Cow;

use time::OffsetDateTime;

use super::certificate::{EMPTY_NAME, SerialNumber, hex};
use super::der::{self, Writer};
use super::key::PublicKey;
use super::lifetime::Validity;
use super::spiffe::{SpiffeId, TrustDomain};

/// A DNS name for a certificate: labels of letters, digits and inner hyphens; no wildcard, no trailing dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DnsName(String);

/// Why a text is no DNS name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "DNS name {0:?} is not 1 to 253 of a-z, A-Z, 0-9, '-' and '.', in parts of at most 63 that begin and end with a letter or digit (no wildcard)"
)]
pub struct DnsNameError(String);

impl std::str::FromStr for DnsName {
    type Err = DnsNameError;

    fn from_str(name: &str) -> Result<Self, DnsNameError> {
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if name.len() > 253 || !name.split('.').all(label) {
            return Err(DnsNameError(super::spiffe::shortened(name)));
        }
        Ok(Self(name.to_owned()))
    }
}

impl std::fmt::Display for DnsName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl DnsName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The O of a CA's subject: 1 to 64 characters (RFC 5280 A.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Organization(String);

impl Default for Organization {
    /// For trust domains whose names are too long to be an O.
    fn default() -> Self {
        Self("Mica".to_owned())
    }
}

/// Why a text cannot be the O of a subject.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("organization {0:?} is not 1 to 64 characters without control characters")]
pub struct OrganizationError(String);

impl Organization {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::str::FromStr for Organization {
    type Err = OrganizationError;

    fn from_str(name: &str) -> Result<Self, OrganizationError> {
        if !(1..=64).contains(&name.chars().count()) || name.chars().any(char::is_control) {
            return Err(OrganizationError(super::spiffe::shortened(name)));
        }
        Ok(Self(name.to_owned()))
    }
}

/// What a certificate is for, and whom it names.
#[derive(Clone, Debug)]
pub enum Profile<'a> {
    /// A trust anchor, signed by itself.
    Root {
        /// Its O.
        organization: &'a Organization,
        /// Whose signing authority it is (SPIFFE-ID 3.1).
        trust_domain: &'a TrustDomain,
    },
    /// A CA that signs leaves only (path length 0).
    Intermediate {
        /// Its O.
        organization: &'a Organization,
        /// Whose signing authority it is.
        trust_domain: &'a TrustDomain,
    },
    /// A workload's X509-SVID.
    Workload {
        /// Whom it names.
        id: &'a SpiffeId,
        /// Further names, as policy grants them.
        dns: &'a [DnsName],
        /// For a renewal that was asked for with a certificate alone: when the holder last proved itself otherwise.
        proved_at: Option<OffsetDateTime>,
    },
    /// Mica's own TLS server certificate. It names no workload, so that it can never act as one.
    Serving {
        /// The names it is reached by.
        dns: &'a [DnsName],
        /// The addresses it is reached by.
        addresses: &'a [IpAddr],
    },
}

impl Profile<'_> {
    /// Whether such a certificate signs others.
    pub fn is_ca(&self) -> bool {
        matches!(self, Self::Root { .. } | Self::Intermediate { .. })
    }

    /// Whom it names, for people.
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Self::Serving { dns, .. } => dns.first().map_or("mica", DnsName::as_str).into(),
            Self::Workload { id, .. } => id.as_str().into(),
            Self::Root { trust_domain, .. } | Self::Intermediate { trust_domain, .. } => {
                trust_domain.id().to_string().into()
            }
        }
    }

    /// The subject's DER: empty for leaves, whose names are in the subject alternative name.
    pub(crate) fn subject(&self, key: &PublicKey) -> Cow<'static, [u8]> {
        let (kind, organization) = match self {
            Self::Root { organization, .. } => ("root", organization),
            Self::Intermediate { organization, .. } => ("intermediate", organization),
            Self::Workload { .. } | Self::Serving { .. } => return EMPTY_NAME.into(),
        };
        let common_name = ca_name(kind, key);
        let mut name = Writer::with_capacity(64);
        name.sequence(|w| {
            for (attribute, value) in [(ORGANIZATION, &organization.0), (COMMON_NAME, &common_name)] {
                w.nested(der::SET, |w| {
                    w.sequence(|w| {
                        w.primitive(der::OID, attribute);
                        w.primitive(der::UTF8_STRING, value.as_bytes());
                    });
                });
            }
        });
        name.finish().into()
    }
}

/// The common name of a CA. The key's identifier keeps the names of two CAs of one organization apart, by which path
/// building goes.
pub(crate) fn ca_name(kind: &str, key: &PublicKey) -> String {
    format!("Mica {kind} {}", hex(&key.identifier()[..4]))
}

/// Everything that goes below the signature.
pub(crate) struct Template<'a> {
    pub(crate) profile: &'a Profile<'a>,
    pub(crate) serial: SerialNumber,
    /// Of the issuer's key.
    pub(crate) signature_algorithm: &'static [u8],
    /// The issuer's subject, byte for byte.
    pub(crate) issuer: &'a [u8],
    /// The issuer's subject key identifier.
    pub(crate) authority_identifier: &'a [u8],
    pub(crate) validity: Validity,
    pub(crate) subject: &'a [u8],
    pub(crate) key: &'a PublicKey,
}

impl Template<'_> {
    /// The TBSCertificate (RFC 5280 4.1).
    pub(crate) fn to_der(&self) -> Vec<u8> {
        let mut tbs = Writer::with_capacity(512 + self.key.spki().len());
        tbs.sequence(|w| {
            w.nested(der::explicit(0), |w| w.unsigned(2));
            w.positive(self.serial.bytes());
            w.raw(self.signature_algorithm);
            w.raw(self.issuer);
            w.sequence(|w| {
                moment(w, self.validity.not_before);
                moment(w, self.validity.not_after);
            });
            w.raw(self.subject);
            w.raw(self.key.spki());
            w.nested(der::explicit(3), |w| w.sequence(|w| self.extensions(w)));
        });
        tbs.finish()
    }

    fn extensions(&self, w: &mut Writer) {
        extension(w, BASIC_CONSTRAINTS, true, |w| {
            w.sequence(|w| {
                if self.profile.is_ca() {
                    w.primitive(der::BOOLEAN, &[0xff]);
                }
                if matches!(self.profile, Profile::Intermediate { .. }) {
                    w.unsigned(0);
                }
            });
        });
        let (unused, bits) = if self.profile.is_ca() { (1, 0b0000_0110) } else { (7, 0b1000_0000) };
        extension(w, KEY_USAGE, true, |w| w.primitive(der::BIT_STRING, &[unused, bits]));
        let purposes: &[&[u8]] = match self.profile {
            Profile::Root { .. } | Profile::Intermediate { .. } => &[],
            Profile::Workload { .. } => &[SERVER_AUTH, CLIENT_AUTH],
            Profile::Serving { .. } => &[SERVER_AUTH],
        };
        if !purposes.is_empty() {
            extension(w, EXTENDED_KEY_USAGE, false, |w| {
                w.sequence(|w| purposes.iter().for_each(|purpose| w.primitive(der::OID, purpose)));
            });
        }
        extension(w, SUBJECT_KEY_IDENTIFIER, false, |w| {
            w.primitive(der::OCTET_STRING, &self.key.identifier());
        });
        extension(w, AUTHORITY_KEY_IDENTIFIER, false, |w| {
            w.sequence(|w| w.primitive(der::implicit(0), self.authority_identifier));
        });
        extension(w, SUBJECT_ALTERNATIVE_NAME, self.subject == EMPTY_NAME, |w| {
            w.sequence(|w| self.names(w));
        });
        if let Profile::Workload { proved_at: Some(at), .. } = self.profile {
            extension(w, PROVED_AT, false, |w| w.primitive(der::GENERALIZED_TIME, &digits(*at)));
        }
    }

    fn names(&self, w: &mut Writer) {
        const DNS: u8 = der::implicit(2);
        const URI: u8 = der::implicit(6);
        const ADDRESS: u8 = der::implicit(7);
        let dns = |w: &mut Writer, names: &[DnsName]| {
            names.iter().for_each(|name| w.primitive(DNS, name.as_str().as_bytes()));
        };
        match self.profile {
            Profile::Root { trust_domain, .. } | Profile::Intermediate { trust_domain, .. } => {
                w.primitive(URI, trust_domain.id().as_str().as_bytes());
            }
            Profile::Workload { id, dns: names, .. } => {
                w.primitive(URI, id.as_str().as_bytes());
                dns(w, names);
            }
            Profile::Serving { dns: names, addresses } => {
                dns(w, names);
                for address in *addresses {
                    match address {
                        IpAddr::V4(v4) => w.primitive(ADDRESS, &v4.octets()),
                        IpAddr::V6(v6) => w.primitive(ADDRESS, &v6.octets()),
                    }
                }
            }
        }
    }
}

fn extension(w: &mut Writer, oid: &[u8], critical: bool, value: impl FnOnce(&mut Writer)) {
    w.sequence(|w| {
        w.primitive(der::OID, oid);
        if critical {
            w.primitive(der::BOOLEAN, &[0xff]);
        }
        w.nested(der::OCTET_STRING, value);
    });
}

/// UTCTime up to 2049, GeneralizedTime from 2050 on (RFC 5280 4.1.2.5).
fn moment(w: &mut Writer, at: OffsetDateTime) {
    let utc = (1950..2050).contains(&at.to_offset(time::UtcOffset::UTC).year());
    let digits = digits(at);
    if utc { w.primitive(der::UTC_TIME, &digits[2..]) } else { w.primitive(der::GENERALIZED_TIME, &digits) }
}

/// YYYYMMDDhhmmssZ
fn digits(at: OffsetDateTime) -> [u8; 15] {
    let at = at.to_offset(time::UtcOffset::UTC);
    let (year, month, day) = at.to_calendar_date();
    let (hour, minute, second) = at.to_hms();
    let pairs = [(year / 100) as u8, (year % 100) as u8, u8::from(month), day, hour, minute, second];
    let mut text = [b'Z'; 15];
    for (two, n) in text.as_chunks_mut().0.iter_mut().zip(pairs) {
        *two = [b'0' + n / 10, b'0' + n % 10];
    }
    text
}

/// Mica's own extension, a GeneralizedTime: when the holder of the certificate last proved itself by something other than
/// a certificate. The OID is a UUID in the arc that Microsoft keeps for such,
/// 1.2.840.113556.1.8000.2554.34691.34401.34516.18173.48845.12181384.4418584. X.667's own arc, 2.25, would hold it in one
/// number, and Go refuses certificates with an OID that has a number above 28 bits.
pub(crate) const PROVED_AT: &[u8] = &[
    0x2a, 0x86, 0x48, 0x86, 0xf7, 0x14, 0x01, 0xbe, 0x40, 0x93, 0x7a, 0x82, 0x8f, 0x03, 0x82, 0x8c, 0x61,
    0x82, 0x8d, 0x54, 0x81, 0x8d, 0x7d, 0x82, 0xfd, 0x4d, 0x85, 0xe7, 0xbf, 0x08, 0x82, 0x8d, 0xd8, 0x18,
];
const ORGANIZATION: &[u8] = &[0x55, 0x04, 0x0a];
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const SUBJECT_KEY_IDENTIFIER: &[u8] = &[0x55, 0x1d, 0x0e];
const KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x0f];
const SUBJECT_ALTERNATIVE_NAME: &[u8] = &[0x55, 0x1d, 0x11];
const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
const AUTHORITY_KEY_IDENTIFIER: &[u8] = &[0x55, 0x1d, 0x23];
const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 0x25];
const SERVER_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01];
const CLIENT_AUTH: &[u8] = &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02];

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    #[test]
    fn times_change_their_form_at_2050() {
        let written = |at| {
            let mut w = Writer::with_capacity(20);
            moment(&mut w, at);
            w.finish()
        };
        assert_eq!(written(datetime!(2049-12-31 23:59:59 UTC)), b"\x17\x0d491231235959Z");
        assert_eq!(written(datetime!(2050-01-01 00:00:00 UTC)), b"\x18\x0f20500101000000Z");
        assert_eq!(written(datetime!(2026-01-02 03:04:05 +1)), b"\x17\x0d260102020405Z");
    }

    #[test]
    fn names_that_dns_refuses_are_refused() {
        for name in ["", ".", "a.", ".a", "-a", "a-", "*.a", "a b", "ä", "a_b", &"a".repeat(64)] {
            assert!(name.parse::<DnsName>().is_err(), "{name:?}");
        }
        assert!("istiod.istio-system.svc".parse::<DnsName>().is_ok());
        assert!("".parse::<Organization>().is_err() && "a\nb".parse::<Organization>().is_err());
    }
}
