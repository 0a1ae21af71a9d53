//! The spelling of a distinguished name that QEMU's rules compare with (spec qmp.md 5.5).
//!
//! GnuTLS makes that text for QEMU, and operators have it in their rules; so this is a function
//! from bytes to exactly that text, compared live with QEMU's by a test. RDNs stand in the order
//! of the certificate. Invariant: two names with the same text are the same to every rule, so what
//! cannot be spelled is an error, never an approximation.

use std::fmt::Write as _;

use super::der::{Element, Elements, Malformed, dotted, tag};

/// Why a name has no text; whoever bears it is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not DER.
    #[error("the distinguished name is malformed")]
    Malformed,
    /// No part at all.
    #[error("the distinguished name is empty")]
    Empty,
    /// A part without characters: GnuTLS refuses the whole name.
    #[error("a part of the distinguished name is empty")]
    EmptyPart,
    /// Rules are text, and this is none.
    #[error("the distinguished name is not UTF-8")]
    NotText,
}

impl From<Malformed> for NameError {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// Strings that an attribute may be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `DirectoryString`: one of several.
    Directory,
    Printable,
    Ia5,
    Numeric,
}

/// Attributes that have a name. All others are told by number and in hexadecimal digits.
const ATTRIBUTES: [(&str, &str, Kind); 35] = [
    ("2.5.4.3", "CN", Kind::Directory),
    ("2.5.4.4", "surName", Kind::Directory),
    ("2.5.4.5", "serialNumber", Kind::Printable),
    ("2.5.4.6", "C", Kind::Printable),
    ("2.5.4.7", "L", Kind::Directory),
    ("2.5.4.8", "ST", Kind::Directory),
    ("2.5.4.9", "street", Kind::Directory),
    ("2.5.4.10", "O", Kind::Directory),
    ("2.5.4.11", "OU", Kind::Directory),
    ("2.5.4.12", "title", Kind::Directory),
    ("2.5.4.13", "description", Kind::Directory),
    ("2.5.4.15", "businessCategory", Kind::Directory),
    ("2.5.4.17", "postalCode", Kind::Directory),
    ("2.5.4.20", "telephoneNumber", Kind::Printable),
    ("2.5.4.41", "name", Kind::Directory),
    ("2.5.4.42", "givenName", Kind::Directory),
    ("2.5.4.43", "initials", Kind::Directory),
    ("2.5.4.44", "generationQualifier", Kind::Directory),
    ("2.5.4.46", "dnQualifier", Kind::Printable),
    ("2.5.4.65", "pseudonym", Kind::Directory),
    ("0.9.2342.19200300.100.1.1", "UID", Kind::Directory),
    ("0.9.2342.19200300.100.1.25", "DC", Kind::Ia5),
    ("1.2.840.113549.1.9.1", "EMAIL", Kind::Ia5),
    // It has no name, but it is text.
    (
        "1.2.840.113549.1.9.7",
        "1.2.840.113549.1.9.7",
        Kind::Directory,
    ),
    (
        "1.3.6.1.4.1.311.60.2.1.1",
        "jurisdictionOfIncorporationLocalityName",
        Kind::Directory,
    ),
    (
        "1.3.6.1.4.1.311.60.2.1.2",
        "jurisdictionOfIncorporationStateOrProvinceName",
        Kind::Directory,
    ),
    (
        "1.3.6.1.4.1.311.60.2.1.3",
        "jurisdictionOfIncorporationCountryName",
        Kind::Printable,
    ),
    ("1.3.6.1.5.5.7.9.2", "placeOfBirth", Kind::Directory),
    ("1.3.6.1.5.5.7.9.3", "gender", Kind::Printable),
    ("1.3.6.1.5.5.7.9.4", "countryOfCitizenship", Kind::Printable),
    ("1.3.6.1.5.5.7.9.5", "countryOfResidence", Kind::Printable),
    ("1.2.643.3.131.1.1", "INN", Kind::Numeric),
    ("1.2.643.100.1", "OGRN", Kind::Numeric),
    ("1.2.643.100.3", "SNILS", Kind::Numeric),
    ("1.2.643.100.5", "OGRNIP", Kind::Numeric),
];

/// The text of a `Name`, given what its SEQUENCE contains.
///
/// # Errors
/// It has no text.
pub fn spell(name: &[u8]) -> Result<String, NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    let mut text = Vec::new();
    for rdn in Elements(name) {
        let mut between = if text.is_empty() { None } else { Some(b',') };
        for attribute in rdn?.open(tag::SET)? {
            let mut parts = attribute?.open(tag::SEQUENCE)?;
            let oid = dotted(parts.need()?.content(tag::OID)?)?;
            let value = parts.need()?;
            text.extend(between);
            between = Some(b'+');
            spell_attribute(&oid, value, &mut text)?;
        }
    }
    String::from_utf8(text).map_err(|_| NameError::NotText)
}

fn spell_attribute(oid: &str, value: Element<'_>, out: &mut Vec<u8>) -> Result<(), NameError> {
    let known = ATTRIBUTES.iter().find(|(other, ..)| *other == oid);
    let text = match known {
        Some((_, name, kind)) => {
            out.extend_from_slice(name.as_bytes());
            decode(*kind, value)?
        }
        None => {
            out.extend_from_slice(oid.as_bytes());
            None
        }
    };
    out.push(b'=');
    match text {
        Some(text) => escape(&text, out),
        None => {
            out.push(b'#');
            out.extend_from_slice(hex(value.whole).as_bytes());
        }
    }
    Ok(())
}

/// The characters of a value, in the encoding that rules have; `None`: it is not a string of its
/// attribute.
fn decode(kind: Kind, value: Element<'_>) -> Result<Option<Vec<u8>>, NameError> {
    let fits = match kind {
        Kind::Directory => matches!(
            value.tag,
            tag::UTF8_STRING
                | tag::PRINTABLE_STRING
                | tag::TELETEX_STRING
                | tag::BMP_STRING
                | tag::UNIVERSAL_STRING
        ),
        Kind::Printable => value.tag == tag::PRINTABLE_STRING,
        Kind::Ia5 => value.tag == tag::IA5_STRING,
        Kind::Numeric => value.tag == tag::NUMERIC_STRING,
    };
    if !fits {
        return Ok(None);
    }
    if value.value.is_empty() {
        return Err(NameError::EmptyPart);
    }
    let numbers = || Some(format!("#{}", hex(value.value)).into_bytes());
    Ok(match value.tag {
        tag::BMP_STRING => match wide(value.value) {
            Some(text) if text.contains('\0') => None,
            Some(text) => Some(text.into_bytes()),
            None => numbers(),
        },
        // What T.61 means beyond ASCII is anybody's guess, and nobody decodes UCS-4.
        tag::TELETEX_STRING if !value.value.iter().all(|b| matches!(b, b' '..=b'~')) => numbers(),
        tag::UNIVERSAL_STRING => numbers(),
        _ if value.value.contains(&0) => None,
        _ => Some(value.value.to_vec()),
    })
}

/// Big-endian UTF-16; an odd byte at the end is not looked at.
fn wide(bytes: &[u8]) -> Option<String> {
    let (units, _) = bytes.as_chunks::<2>();
    let units = units.iter().map(|unit| u16::from_be_bytes(*unit));
    char::decode_utf16(units).collect::<Result<_, _>>().ok()
}

/// RFC 4514's escapes.
fn escape(text: &[u8], out: &mut Vec<u8>) {
    for (at, byte) in text.iter().enumerate() {
        let special = match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => true,
            b'#' => at == 0,
            b' ' => at == 0 || at + 1 == text.len(),
            _ => false,
        };
        if special {
            out.push(b'\\');
        }
        out.push(*byte);
    }
}

/// Lower-case digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tlv(tag: u8, value: &[u8]) -> Vec<u8> {
        [&[tag, value.len() as u8], value].concat()
    }

    fn rdn(attributes: &[(&[u8], u8, &[u8])]) -> Vec<u8> {
        let attributes = attributes.iter().map(|(oid, tag, value)| {
            let parts = [tlv(tag::OID, oid), tlv(*tag, value)].concat();
            tlv(tag::SEQUENCE, &parts)
        });
        tlv(tag::SET, &attributes.collect::<Vec<_>>().concat())
    }

    const CN: &[u8] = &[0x55, 4, 3];
    const O: &[u8] = &[0x55, 4, 10];

    #[test]
    fn parts_stand_in_the_certificates_order() {
        let name = [
            rdn(&[(&[0x55, 4, 6], tag::PRINTABLE_STRING, b"GB")]),
            rdn(&[
                (CN, tag::UTF8_STRING, b"a"),
                (O, tag::BMP_STRING, b"\0x\0,"),
            ]),
            rdn(&[(&[0x2a, 3, 4, 5], tag::UTF8_STRING, b"w1")]),
        ];
        let text = spell(&name.concat()).unwrap();
        assert_eq!(text, "C=GB,CN=a+O=x\\,,1.2.3.4.5=#0c027731");
    }

    #[test]
    fn what_is_not_text_is_told_in_digits_or_not_at_all() {
        let one = |tag, value| spell(&rdn(&[(O, tag, value)]));
        assert_eq!(one(tag::TELETEX_STRING, b"no\xe9").unwrap(), "O=\\#6e6fe9");
        assert_eq!(one(tag::UTF8_STRING, b"a\0").unwrap(), "O=#0c026100");
        assert_eq!(one(tag::UTF8_STRING, b" a #  ").unwrap(), "O=\\ a # \\ ");
        assert_eq!(one(tag::UTF8_STRING, b""), Err(NameError::EmptyPart));
        assert_eq!(one(tag::UTF8_STRING, b"\xff"), Err(NameError::NotText));
        assert_eq!(spell(b""), Err(NameError::Empty));
        assert_eq!(spell(b"\x31\x05\x30"), Err(NameError::Malformed));
    }
}
