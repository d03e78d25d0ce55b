//! The header `:authority` of requests on a Unix socket. Many clients put the socket's path there, which is no authority of
//! a URI, and the HTTP/2 library would end their requests for it. Nobody here asks for it, so what it may not contain is
//! replaced before the library reads it, byte for byte: lengths and both ends' header tables stay as they are
//! (RFC 9113 section 4.1, RFC 7541 section 6).

const PREFACE: u64 = 24;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Its place in the static table, which not every client uses.
const AUTHORITY: u8 = 1;
const NAME: &[u8] = b":authority";

/// Where in what a client sends the next byte is.
#[derive(Debug)]
pub(super) struct Cleaner {
    frame: Frame,
    field: Field,
}

#[derive(Clone, Copy, Debug)]
enum Frame {
    /// So many bytes that are of no interest; then the head of a frame.
    Other(u64),
    Head {
        bytes: [u8; 9],
        filled: usize,
    },
    /// A header block, after so many bytes of padding's length and priority, until so many bytes of padding are left.
    Block {
        skipped: u8,
        padded: bool,
        left: u32,
        padding: u32,
        ends: bool,
    },
}

#[derive(Clone, Copy, Debug)]
enum Field {
    Begin,
    /// The rest of a number that nothing depends on, and what follows it.
    Number {
        strings: u8,
    },
    Length {
        strings: u8,
        authority: bool,
    },
    LongLength {
        strings: u8,
        authority: bool,
        length: u64,
        shift: u32,
    },
    Text {
        strings: u8,
        authority: bool,
        left: u64,
    },
}

impl Cleaner {
    pub(super) fn new() -> Self {
        Self { frame: Frame::Other(PREFACE), field: Field::Begin }
    }

    /// What comes next on the connection.
    pub(super) fn clean(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let done = match self.frame {
                Frame::Other(left) => {
                    let done = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    self.frame = Frame::Other(left - done as u64).or_head();
                    done
                }
                Frame::Head { bytes: mut head, filled } => {
                    head[filled] = bytes[0];
                    self.frame = if filled == 8 {
                        begun(head)
                    } else {
                        Frame::Head { bytes: head, filled: filled + 1 }
                    };
                    1
                }
                Frame::Block { .. } => {
                    self.in_block(&mut bytes[0]);
                    1
                }
            };
            bytes = &mut bytes[done..];
        }
    }

    fn in_block(&mut self, byte: &mut u8) {
        let Frame::Block { mut skipped, mut padded, mut left, mut padding, ends } = self.frame else {
            return;
        };
        left -= 1;
        if padded {
            padded = false;
            padding = u32::from(*byte);
        } else if skipped > 0 {
            skipped -= 1;
        } else if left >= padding {
            self.field = self.field.after(byte);
        }
        self.frame = Frame::Block { skipped, padded, left, padding, ends };
        if left == 0 {
            self.frame = Frame::Other(0).or_head();
            if ends {
                self.field = Field::Begin;
            }
        }
    }
}

impl Frame {
    fn or_head(self) -> Self {
        match self {
            Self::Other(0) => Self::Head { bytes: [0; 9], filled: 0 },
            other => other,
        }
    }
}

/// The frame that a head begins.
fn begun(head: [u8; 9]) -> Frame {
    let [a, b, c, kind, flags, ..] = head;
    let length = u32::from_be_bytes([0, a, b, c]);
    let first = kind == HEADERS;
    if length == 0 || !(first || kind == CONTINUATION) {
        return Frame::Other(u64::from(length)).or_head();
    }
    let has = |flag: u8| first && flags & flag != 0;
    Frame::Block {
        skipped: if has(PRIORITY) { 5 } else { 0 },
        padded: has(PADDED),
        left: length,
        padding: 0,
        ends: flags & END_HEADERS != 0,
    }
}

impl Field {
    /// Where the next byte is, after this one.
    fn after(self, byte: &mut u8) -> Self {
        match self {
            Self::Begin => begin(*byte),
            Self::Number { strings } if *byte & 0x80 == 0 => Self::next(strings, false),
            Self::Number { .. } => self,
            Self::Length { strings, authority } => {
                // What is in Huffman's code is left as it is. A name may be the one until it is another.
                let plain = *byte & 0x80 == 0;
                let authority = match strings {
                    1 => authority && plain,
                    _ => plain && usize::from(*byte) == NAME.len(),
                };
                match *byte & 0x7f {
                    0x7f => Self::LongLength { strings, authority, length: 0x7f, shift: 0 },
                    length => Self::text(strings, authority, u64::from(length)),
                }
            }
            Self::LongLength { strings, authority, length, shift } => {
                // Longer than any frame: whatever it means, the library ends the connection for it.
                let more = u64::from(*byte & 0x7f).checked_shl(shift).unwrap_or(0);
                let length = length.saturating_add(more);
                if *byte & 0x80 == 0 {
                    Self::text(strings, authority, length)
                } else {
                    Self::LongLength { strings, authority, length, shift: shift.saturating_add(7) }
                }
            }
            Self::Text { strings: 1, authority, left } => {
                if authority && !byte.is_ascii_alphanumeric() && *byte != b'.' {
                    *byte = b'-';
                }
                Self::text(1, authority, left - 1)
            }
            Self::Text { strings, authority, left } => {
                let said =
                    authority && usize::try_from(left).is_ok_and(|left| *byte == NAME[NAME.len() - left]);
                Self::text(strings, said, left - 1)
            }
        }
    }

    fn text(strings: u8, authority: bool, left: u64) -> Self {
        match left {
            0 => Self::next(strings - 1, authority && strings == 2),
            left => Self::Text { strings, authority, left },
        }
    }

    /// So many strings are to come: a name and a value, or a value.
    fn next(strings: u8, authority: bool) -> Self {
        match strings {
            0 => Self::Begin,
            strings => Self::Length { strings, authority },
        }
    }
}

/// The first byte of a field.
fn begin(byte: u8) -> Field {
    let (mask, literal) = match byte {
        0x80.. => (0x7f, false),
        0x40.. => (0x3f, true),
        0x20.. => (0x1f, false),
        _ => (0x0f, true),
    };
    let index = byte & mask;
    let strings = match (literal, index) {
        (false, _) => 0,
        (true, 0) => 2,
        (true, _) => 1,
    };
    if index == mask { Field::Number { strings } } else { Field::next(strings, index == AUTHORITY) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAD: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    /// A field of the static table's name, not in Huffman's code.
    fn field(first: u8, value: &[u8]) -> Vec<u8> {
        let mut made = vec![first];
        match u8::try_from(value.len()) {
            Ok(length) if length < 0x7f => made.push(length),
            _ => made.extend([0x7f, u8::try_from(value.len() - 0x7f).unwrap()]),
        }
        made.extend(value);
        made
    }

    /// Read whole and byte by byte.
    fn cleaned(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut whole = [LEAD, &frames.concat()].concat();
        let mut pieces = whole.clone();
        Cleaner::new().clean(&mut whole);
        let mut cleaner = Cleaner::new();
        pieces.iter_mut().for_each(|byte| cleaner.clean(std::slice::from_mut(byte)));
        assert_eq!(whole, pieces);
        whole[LEAD.len()..].to_vec()
    }

    #[test]
    fn a_path_becomes_a_name() {
        let path = b"tmp%2Fagent.sock";
        let settings = frame(4, 0, &[0x41, 3, b'%', b'/', b'%', 0]);
        for first in [0x41, 0x01, 0x11] {
            // `:method: POST`, `:path`, a literal name, a long index.
            let before = [&[0x83][..], &field(0x44, b"/a%b")].concat();
            let after = [&[0x40, 1, b'%', 1, b'%', 0x0f, 0x22, 1, b'%'][..], &[0xff, 0x01]].concat();
            let block = |value: &[u8]| [before.clone(), field(first, value), after.clone()].concat();
            let long = [&b"/"[..], &[b'%'; 200]].concat();
            let frames = [
                settings.clone(),
                frame(HEADERS, END_HEADERS, &block(path)),
                frame(0, 1, b"\x41\x03%/%"),
                frame(HEADERS, END_HEADERS, &block(&long)),
            ];
            let expected = [
                settings.clone(),
                frame(HEADERS, END_HEADERS, &block(b"tmp-2Fagent.sock")),
                frame(0, 1, b"\x41\x03%/%"),
                frame(HEADERS, END_HEADERS, &block(&[b'-'; 201])),
            ];
            assert_eq!(cleaned(&frames), expected.concat());
        }
    }

    #[test]
    fn the_name_may_be_spelled_out() {
        let made = |value: &[u8]| {
            let block =
                [&field(0x40, NAME)[..], &field(0, value)[1..], &field(0x40, b":authoritx"), b"\x01%"]
                    .concat();
            [frame(HEADERS, END_HEADERS, &block)]
        };
        assert_eq!(cleaned(&made(b"tmp%2Fa.sock")), made(b"tmp-2Fa.sock").concat());
    }

    #[test]
    fn padding_priority_and_continuations_are_followed() {
        let made = |value: &[u8; 4]| {
            let block = field(0x41, value);
            let (one, two) = block.split_at(4);
            let head = [&[2][..], &[0x41, 1, b'%', 0, 0], one, b"%%"].concat();
            [
                frame(HEADERS, PADDED | PRIORITY, &head),
                frame(CONTINUATION, END_HEADERS, two),
                frame(HEADERS, END_HEADERS, &field(0x41, value)),
            ]
        };
        assert_eq!(cleaned(&made(b"/a/%")), made(b"-a--").concat());
    }

    #[test]
    fn what_is_in_huffmans_code_stays() {
        let frames = [frame(HEADERS, END_HEADERS, &[0x41, 0x82, b'%', b'%', 0x84])];
        assert_eq!(cleaned(&frames), frames.concat());
    }

    proptest::proptest! {
        #[test]
        fn nothing_breaks_it(frames in proptest::collection::vec(
            (0..10_u8, proptest::num::u8::ANY, proptest::collection::vec(proptest::num::u8::ANY, 0..40)), 0..6,
        )) {
            let frames: Vec<_> = frames.iter().map(|(kind, flags, payload)| frame(*kind, *flags, payload)).collect();
            let _ = cleaned(&frames);
        }
    }
}
