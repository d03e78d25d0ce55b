//! Where a request belongs among others: the identifiers of W3C Trace Context, and of B3, which Zipkin's clients send.
//!
//! What comes from elsewhere is two numbers of fixed length and a wish. Nothing else is read, and nothing is passed on.

use std::fmt;

/// Of one trace; never all zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId([u8; 16]);

impl TraceId {
    /// None for zeros.
    pub fn new(bytes: [u8; 16]) -> Option<Self> {
        (bytes != [0; 16]).then_some(Self(bytes))
    }

    /// As they are sent.
    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The part that is random in every version of the standard.
    pub fn randomness(&self) -> u64 {
        let [.., a, b, c, d, e, f, g] = self.0;
        u64::from_be_bytes([0, a, b, c, d, e, f, g])
    }

    /// B3 has shorter ones as well.
    fn parse(text: &str) -> Option<Self> {
        match text.len() {
            32 => Self::new(digits(text)?),
            16 => {
                let mut long = [0; 16];
                long[8..].copy_from_slice(&digits::<8>(text)?);
                Self::new(long)
            }
            _ => None,
        }
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Of one span; never all zeros.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpanId([u8; 8]);

impl SpanId {
    /// None for zeros.
    pub fn new(bytes: [u8; 8]) -> Option<Self> {
        (bytes != [0; 8]).then_some(Self(bytes))
    }

    /// As they are sent.
    pub fn bytes(&self) -> &[u8; 8] {
        &self.0
    }

    fn parse(text: &str) -> Option<Self> {
        Self::new(digits(text)?)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A span of ours, as what follows from it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Its trace.
    pub trace: TraceId,
    /// Itself.
    pub span: SpanId,
    /// Whether the trace is recorded.
    pub sampled: bool,
}

impl Context {
    /// The value of the header `traceparent`.
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-{:02x}", self.trace, self.span, u8::from(self.sampled))
    }
}

/// A span of somebody else's, as a request tells of it. Nobody vouches for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its trace.
    pub trace: TraceId,
    /// Itself.
    pub span: SpanId,
    /// Whether the trace should be recorded, if that is said.
    pub sampled: Option<bool>,
}

impl Parent {
    /// What the headers say: W3C's before B3's, and of B3's the single one before the others.
    pub fn read<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        Self::w3c(&header).or_else(|| header("b3").and_then(b3)).or_else(|| {
            let (trace, span) = (header("x-b3-traceid")?, header("x-b3-spanid")?);
            let sampled = match (header("x-b3-flags"), header("x-b3-sampled")) {
                (Some("1"), _) | (_, Some("1" | "true")) => Some(true),
                (_, Some("0" | "false")) => Some(false),
                _ => None,
            };
            Some(Self { trace: TraceId::parse(trace)?, span: SpanId::parse(span)?, sampled })
        })
    }

    /// What `traceparent` alone says.
    pub fn w3c<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        let text = header("traceparent")?;
        let mut parts = text.split('-');
        let [version, trace, span, flags] = [parts.next()?, parts.next()?, parts.next()?, parts.next()?];
        let [version] = digits::<1>(version)?;
        // A later version may say more.
        if version == 0xff || (version == 0 && parts.next().is_some()) || trace.len() != 32 {
            return None;
        }
        let [flags] = digits::<1>(flags)?;
        let (trace, span) = (TraceId::parse(trace)?, SpanId::parse(span)?);
        Some(Self { trace, span, sampled: Some(flags & 1 == 1) })
    }
}

fn b3(text: &str) -> Option<Parent> {
    let mut parts = text.split('-');
    let (trace, span) = (TraceId::parse(parts.next()?)?, SpanId::parse(parts.next()?)?);
    let sampled = match parts.next() {
        None => None,
        Some("1" | "d") => Some(true),
        Some("0") => Some(false),
        Some(_) => return None,
    };
    Some(Parent { trace, span, sampled })
}

/// Exactly so many bytes, in the lower case that the standards ask for.
fn digits<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if text.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    fn read(headers: &[(&str, &str)]) -> Option<Parent> {
        Parent::read(|name| headers.iter().find(|(known, _)| *known == name).map(|(_, value)| *value))
    }

    fn w3c(value: &str) -> Option<Parent> {
        read(&[("traceparent", value)])
    }

    #[test]
    fn a_traceparent_is_read_as_the_standard_has_it() {
        let text = format!("00-{TRACE}-{SPAN}-01");
        let parent = w3c(&text).unwrap();
        assert_eq!((parent.trace.to_string(), parent.span.to_string()), (TRACE.into(), SPAN.into()));
        assert_eq!(parent.sampled, Some(true));
        let Parent { trace, span, .. } = parent;
        assert_eq!(Context { trace, span, sampled: true }.traceparent(), text);
        assert_eq!(w3c(&format!("00-{TRACE}-{SPAN}-02")).unwrap().sampled, Some(false));
        assert!(w3c(&format!("cc-{TRACE}-{SPAN}-01-what-the-future-has")).is_some());
        for bad in [
            String::new(),
            "00".to_owned(),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}-01", &TRACE[16..]),
            format!("00-{TRACE}-{TRACE}-01"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{TRACE}-{SPAN}-é"),
            format!("00-{}-{SPAN}-01", TRACE.repeat(9)),
        ] {
            assert_eq!(w3c(&bad), None, "{bad}");
        }
    }

    #[test]
    fn b3_is_read_in_both_forms() {
        let single = |value: &str| read(&[("b3", value)]);
        let sampled = |value: &str| single(&format!("{TRACE}-{SPAN}{value}")).map(|parent| parent.sampled);
        assert_eq!(sampled(""), Some(None));
        assert_eq!(sampled("-1"), Some(Some(true)));
        assert_eq!(sampled("-d"), Some(Some(true)));
        assert_eq!(sampled("-0-05e3ac9a4f6e3b90"), Some(Some(false)));
        assert_eq!(sampled("-2"), None);
        // Only a decision.
        assert_eq!(single("0"), None);
        let short = single(&format!("{SPAN}-{SPAN}-1")).unwrap();
        assert_eq!(short.trace.to_string(), format!("{}{SPAN}", "0".repeat(16)));

        let several = |name, value| {
            read(&[("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN), (name, value)]).unwrap().sampled
        };
        assert_eq!(several("x-b3-sampled", "1"), Some(true));
        assert_eq!(several("x-b3-sampled", "false"), Some(false));
        assert_eq!(several("x-b3-flags", "1"), Some(true));
        assert_eq!(several("x-other", "1"), None);
        assert_eq!(read(&[("x-b3-traceid", TRACE)]), None);
        // W3C's comes first.
        let both = read(&[("traceparent", &format!("00-{TRACE}-{SPAN}-00")), ("b3", "0")]);
        assert_eq!(both.unwrap().sampled, Some(false));
    }
}
