//! The little DER (X.690) that certificates need to be written, and the outlines of what is read: the contents are for
//! x509-parser, where they are more than bytes to compare.

pub(crate) const BOOLEAN: u8 = 0x01;
pub(crate) const INTEGER: u8 = 0x02;
pub(crate) const BIT_STRING: u8 = 0x03;
pub(crate) const OCTET_STRING: u8 = 0x04;
pub(crate) const OID: u8 = 0x06;
pub(crate) const UTF8_STRING: u8 = 0x0c;
pub(crate) const UTC_TIME: u8 = 0x17;
pub(crate) const GENERALIZED_TIME: u8 = 0x18;
pub(crate) const SEQUENCE: u8 = 0x30;
pub(crate) const SET: u8 = 0x31;

/// `[n]` with contents of its own.
pub(crate) const fn explicit(n: u8) -> u8 {
    0xa0 | n
}

/// `[n]` in place of a primitive's own tag.
pub(crate) const fn implicit(n: u8) -> u8 {
    0x80 | n
}

/// DER under construction.
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }

    /// Bytes that are DER already.
    pub(crate) fn raw(&mut self, der: &[u8]) {
        self.0.extend_from_slice(der);
    }

    pub(crate) fn primitive(&mut self, tag: u8, contents: &[u8]) {
        self.0.push(tag);
        self.length(contents.len());
        self.0.extend_from_slice(contents);
    }

    /// A positive INTEGER of at most eight bytes.
    pub(crate) fn unsigned(&mut self, value: u64) {
        self.positive(&value.to_be_bytes());
    }

    /// A positive INTEGER from its big-endian bytes, leading zeros or not.
    pub(crate) fn positive(&mut self, big_endian: &[u8]) {
        let start = big_endian.iter().position(|b| *b != 0).unwrap_or(big_endian.len());
        let digits = &big_endian[start..];
        let sign = digits.first().is_none_or(|b| b & 0x80 != 0);
        self.0.push(INTEGER);
        self.length(digits.len() + usize::from(sign));
        if sign {
            self.0.push(0);
        }
        self.0.extend_from_slice(digits);
    }

    /// A BIT STRING of whole bytes.
    pub(crate) fn bits(&mut self, contents: &[u8]) {
        self.0.push(BIT_STRING);
        self.length(contents.len() + 1);
        self.0.push(0);
        self.0.extend_from_slice(contents);
    }

    pub(crate) fn nested(&mut self, tag: u8, contents: impl FnOnce(&mut Self)) {
        self.0.push(tag);
        let at = self.0.len();
        // Most contents fit the short form; longer ones are moved up by what their length takes.
        self.0.push(0);
        contents(self);
        let length = self.0.len() - at - 1;
        if length < 0x80 {
            self.0[at] = length as u8;
            return;
        }
        let bytes = length.to_be_bytes();
        let digits = &bytes[length.leading_zeros() as usize / 8..];
        self.0[at] = 0x80 | digits.len() as u8;
        let (begin, end) = (at + 1, self.0.len());
        self.0.extend_from_slice(digits);
        self.0.copy_within(begin..end, begin + digits.len());
        self.0[begin..][..digits.len()].copy_from_slice(digits);
    }

    pub(crate) fn sequence(&mut self, contents: impl FnOnce(&mut Self)) {
        self.nested(SEQUENCE, contents);
    }

    fn length(&mut self, length: usize) {
        if length < 0x80 {
            self.0.push(length as u8);
            return;
        }
        let bytes = length.to_be_bytes();
        let skip = length.leading_zeros() as usize / 8;
        self.0.push(0x80 | (bytes.len() - skip) as u8);
        self.0.extend_from_slice(&bytes[skip..]);
    }
}

/// A value that was read.
#[derive(Clone, Copy)]
pub(crate) struct Value<'a> {
    pub(crate) tag: u8,
    pub(crate) contents: &'a [u8],
    /// With its tag and its length.
    pub(crate) whole: &'a [u8],
}

/// Values that stand one behind another, with nothing between them. Their lengths have to be in the shortest form.
pub(crate) struct Values<'a>(&'a [u8]);

impl<'a> Values<'a> {
    pub(crate) fn of(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether all were read. Something that is no value is never read.
    pub(crate) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// The next one, if it has this tag.
    pub(crate) fn one(&mut self, tag: u8) -> Option<Value<'a>> {
        self.next().filter(|value| value.tag == tag)
    }
}

impl<'a> Iterator for Values<'a> {
    type Item = Value<'a>;

    fn next(&mut self) -> Option<Value<'a>> {
        let [tag, length, behind @ ..] = self.0 else { return None };
        // None of what is read has numbers above 30, which take more bytes.
        if tag & 0x1f == 0x1f {
            return None;
        }
        let (length, behind) = match length {
            0..=0x7f => (usize::from(*length), behind),
            0x81..=0x84 => {
                let (digits, behind) = behind.split_at_checked(usize::from(length & 0x7f))?;
                let length = digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit));
                if length < 0x80 || digits[0] == 0 {
                    return None;
                }
                (length, behind)
            }
            _ => return None,
        };
        let (contents, behind) = behind.split_at_checked(length)?;
        let (whole, _) = self.0.split_at(self.0.len() - behind.len());
        self.0 = behind;
        Some(Value { tag: *tag, contents, whole })
    }
}

/// What certificates and CSRs are: something, and a signature on it (RFC 5280 4.1, RFC 2986 4.2).
pub(crate) struct Signed<'a> {
    pub(crate) body: Value<'a>,
    pub(crate) algorithm: Value<'a>,
    pub(crate) signature: &'a [u8],
}

impl<'a> Signed<'a> {
    /// If the three parts are there and nothing else is.
    pub(crate) fn of(der: &'a [u8]) -> Option<Self> {
        let mut parts = sequence(der)?;
        let (body, algorithm) = (parts.one(SEQUENCE)?, parts.one(SEQUENCE)?);
        // All signatures are of whole bytes.
        let signature = parts.one(BIT_STRING)?.contents.strip_prefix(&[0])?;
        parts.is_over().then_some(Self { body, algorithm, signature })
    }
}

/// Extension, RFC 5280 4.1.
pub(crate) struct Extension<'a> {
    pub(crate) oid: &'a [u8],
    /// The contents of the BOOLEAN, if there is one.
    pub(crate) critical: Option<&'a [u8]>,
    pub(crate) value: &'a [u8],
}

impl<'a> Extension<'a> {
    /// If it is one, to its last byte.
    pub(crate) fn of(value: Value<'a>) -> Option<Self> {
        let mut parts = Values::of(value.contents);
        let oid = parts.one(OID)?.contents;
        let mut next = parts.next()?;
        let critical = (next.tag == BOOLEAN).then_some(next.contents);
        if critical.is_some() {
            next = parts.next()?;
        }
        let is_one = value.tag == SEQUENCE && next.tag == OCTET_STRING && parts.is_over();
        is_one.then_some(Self { oid, critical, value: next.contents })
    }
}

/// What a SEQUENCE holds that is all there is.
pub(crate) fn sequence(der: &[u8]) -> Option<Values<'_>> {
    let mut all = Values::of(der);
    let list = all.one(SEQUENCE)?;
    all.is_over().then(|| Values::of(list.contents))
}

/// All values, if nothing is left behind the last.
pub(crate) fn all(contents: &[u8]) -> Option<Vec<Value<'_>>> {
    let mut values = Values::of(contents);
    let found = values.by_ref().collect();
    values.is_over().then_some(found)
}

#[cfg(test)]
mod tests {
    use pkcs8::der::{Decode as _, Header, Reader as _, SliceReader, Tag};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_are_read_one_by_one_and_strictly() {
        let bytes = [0x30, 3, 2, 1, 5, 4, 0];
        let mut values = Values::of(&bytes);
        let first = values.one(SEQUENCE).unwrap();
        assert_eq!((first.contents, first.whole), (&bytes[2..5], &bytes[..5]));
        assert_eq!(values.by_ref().map(|value| value.tag).collect::<Vec<_>>(), [OCTET_STRING]);
        assert!(values.one(SEQUENCE).is_none() && values.is_over());
        let long = [&[4, 0x81, 0x80][..], &[7; 128]].concat();
        assert_eq!(Values::of(&long).next().unwrap().contents, [7; 128]);
        // Cut off, lengths that are longer than need be, without an end, longer than all there is.
        for bad in [
            &[][..],
            &[4],
            &[4, 2, 7],
            &[4, 0x81, 1, 7],
            &[4, 0x82, 0, 0x80],
            &[0x30, 0x80, 0, 0],
            &[4, 0x84, 0xff, 0xff, 0xff, 0xff],
        ] {
            let mut values = Values::of(bad);
            assert!(values.next().is_none() && values.is_over() == bad.is_empty(), "{bad:?}");
        }
    }

    proptest! {
        /// Against the `der` crate, which knows fewer tags.
        #[test]
        fn a_value_is_what_others_read(
            tag: u8,
            length in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..6),
                (0..300_usize).prop_map(|n| if n < 0x80 { vec![n as u8] } else { vec![0x82, (n >> 8) as u8, n as u8] }),
                (0x80..300_usize).prop_map(|n| if n < 0x100 { vec![0x81, n as u8] } else { vec![0x82, 1, n as u8] }),
            ],
            behind in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            let bytes = [&[tag][..], &length, &behind].concat();
            let ours = Values::of(&bytes).next();
            let mut reader = SliceReader::new(&bytes).unwrap();
            let theirs = Header::decode(&mut reader).and_then(|header| reader.read_slice(header.length()));
            match (ours, theirs) {
                (Some(ours), Ok(contents)) => {
                    prop_assert_eq!((ours.tag, ours.contents), (tag, contents));
                    let left = usize::try_from(reader.remaining_len()).unwrap();
                    prop_assert_eq!(ours.whole, &bytes[..bytes.len() - left]);
                }
                (None, Ok(_)) => prop_assert_eq!(tag & 0x1f, 0x1f),
                (Some(_), Err(_)) => prop_assert!(Tag::decode(&mut SliceReader::new(&bytes).unwrap()).is_err()),
                (None, Err(_)) => {}
            }
        }
    }

    #[test]
    fn lengths_take_the_shortest_form() {
        for (length, header) in [
            (0, vec![0x04, 0x00]),
            (127, vec![0x04, 0x7f]),
            (128, vec![0x04, 0x81, 0x80]),
            (255, vec![0x04, 0x81, 0xff]),
            (256, vec![0x04, 0x82, 0x01, 0x00]),
            (65_536, vec![0x04, 0x83, 0x01, 0x00, 0x00]),
        ] {
            let contents = vec![7; length];
            let mut primitive = Writer::with_capacity(0);
            primitive.primitive(OCTET_STRING, &contents);
            let mut nested = Writer::with_capacity(0);
            nested.nested(OCTET_STRING, |w| w.raw(&contents));
            let expected = [header, contents].concat();
            assert_eq!(primitive.finish(), expected);
            assert_eq!(nested.finish(), expected);
        }
    }

    #[test]
    fn integers_are_positive_and_shortest() {
        for (value, expected) in [
            (0, &[2, 1, 0][..]),
            (1, &[2, 1, 1]),
            (127, &[2, 1, 127]),
            (128, &[2, 2, 0, 128]),
            (65_537, &[2, 3, 1, 0, 1]),
        ] {
            let mut writer = Writer::with_capacity(0);
            writer.unsigned(value);
            assert_eq!(writer.finish(), expected);
        }
    }
}
