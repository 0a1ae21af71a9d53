//! DER elements, as far as certificates need them: definite lengths, tags of one byte.
//!
//! Pure and fuzzed. Invariant: an element's parts lie inside it, whatever its bytes claim.

use std::fmt;

/// Universal tags.
pub(crate) mod tag {
    pub(crate) const BOOLEAN: u8 = 0x01;
    pub(crate) const BIT_STRING: u8 = 0x03;
    pub(crate) const OCTET_STRING: u8 = 0x04;
    pub(crate) const OID: u8 = 0x06;
    pub(crate) const UTF8_STRING: u8 = 0x0c;
    pub(crate) const NUMERIC_STRING: u8 = 0x12;
    pub(crate) const PRINTABLE_STRING: u8 = 0x13;
    pub(crate) const TELETEX_STRING: u8 = 0x14;
    pub(crate) const IA5_STRING: u8 = 0x16;
    pub(crate) const UTC_TIME: u8 = 0x17;
    pub(crate) const GENERALIZED_TIME: u8 = 0x18;
    pub(crate) const UNIVERSAL_STRING: u8 = 0x1c;
    pub(crate) const BMP_STRING: u8 = 0x1e;
    pub(crate) const SEQUENCE: u8 = 0x30;
    pub(crate) const SET: u8 = 0x31;
}

/// The bytes are not DER of the expected form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("malformed certificate")
    }
}

/// One element.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Element<'a> {
    pub(crate) tag: u8,
    /// Its content.
    pub(crate) value: &'a [u8],
    /// With tag and length.
    pub(crate) whole: &'a [u8],
}

impl<'a> Element<'a> {
    /// What it contains, if it has this tag.
    pub(crate) fn open(self, tag: u8) -> Result<Elements<'a>, Malformed> {
        self.content(tag).map(Elements)
    }

    /// Its content, if it has this tag.
    pub(crate) fn content(self, tag: u8) -> Result<&'a [u8], Malformed> {
        if self.tag == tag {
            Ok(self.value)
        } else {
            Err(Malformed)
        }
    }
}

/// Elements one after the other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Elements<'a>(pub(crate) &'a [u8]);

impl<'a> Elements<'a> {
    /// The next one, which has to be there.
    pub(crate) fn need(&mut self) -> Result<Element<'a>, Malformed> {
        self.next().unwrap_or(Err(Malformed))
    }

    /// The next one if it has this tag.
    pub(crate) fn optional(&mut self, tag: u8) -> Result<Option<Element<'a>>, Malformed> {
        if self.0.first() == Some(&tag) {
            self.need().map(Some)
        } else {
            Ok(None)
        }
    }

    fn split(&mut self) -> Option<Element<'a>> {
        let bytes = self.0;
        let (tag, rest) = bytes.split_first()?;
        if tag & 0x1f == 0x1f {
            return None;
        }
        let (first, mut rest) = rest.split_first()?;
        let mut len = usize::from(*first);
        if len >= 0x80 {
            let count = len & 0x7f;
            if count == 0 || count > 4 || rest.len() < count {
                return None;
            }
            let (digits, after) = rest.split_at(count);
            len = digits
                .iter()
                .fold(0, |len, digit| len << 8 | usize::from(*digit));
            rest = after;
        }
        let value = rest.get(..len)?;
        let whole = bytes.get(..bytes.len() - rest.len() + len)?;
        self.0 = rest.get(len..)?;
        Some(Element {
            tag: *tag,
            value,
            whole,
        })
    }
}

impl<'a> Iterator for Elements<'a> {
    type Item = Result<Element<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let element = self.split();
        if element.is_none() {
            self.0 = &[];
        }
        Some(element.ok_or(Malformed))
    }
}

/// An object identifier in digits.
pub(crate) fn dotted(oid: &[u8]) -> Result<String, Malformed> {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut number = 0_u64;
    let mut ends = false;
    for byte in oid {
        number = number.checked_mul(128).ok_or(Malformed)? + u64::from(byte & 0x7f);
        ends = byte & 0x80 == 0;
        if !ends {
            continue;
        }
        let done = if text.is_empty() {
            let first = (number / 40).min(2);
            write!(text, "{first}.{}", number - first * 40)
        } else {
            write!(text, ".{number}")
        };
        done.map_err(|_| Malformed)?;
        number = 0;
    }
    if ends { Ok(text) } else { Err(Malformed) }
}
