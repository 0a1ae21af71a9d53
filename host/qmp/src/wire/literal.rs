//! What the text of a string or a number means.

use serde_json::{Number, Value};

/// Why a literal has no meaning; the words follow `JSON parse error, `.
pub(super) type Complaint = String;

/// Whether `text` is a number by JSON's grammar.
pub(super) fn is_number(text: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let text = text.strip_prefix('-').unwrap_or(text);
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (text, None),
    };
    let (whole, fraction) = match mantissa.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (mantissa, None),
    };
    let exponent = exponent.map(|text| text.strip_prefix(['+', '-']).unwrap_or(text));
    digits(whole)
        && (whole == "0" || !whole.starts_with('0'))
        && fraction.is_none_or(digits)
        && exponent.is_none_or(digits)
}

/// The value of a number: of 64 bits with a sign, without one, or else a float.
pub(super) fn number(text: &str) -> Result<Value, Complaint> {
    if let Ok(signed) = text.parse::<i64>() {
        return Ok(signed.into());
    }
    if let Ok(unsigned) = text.parse::<u64>() {
        return Ok(unsigned.into());
    }
    // QEMU lets 1E400 in and echoes it as `inf`, which is not JSON.
    let float = text.parse().ok().and_then(Number::from_f64);
    float
        .map(Value::Number)
        .ok_or_else(|| format!("number '{text}' is out of range"))
}

/// The value of a string, from what stands between its quotes.
pub(super) fn string(raw: &[u8]) -> Result<String, Complaint> {
    let mut bytes = Vec::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((&byte, after)) = rest.split_first() {
        rest = match byte {
            b'\\' => escape(after, &mut bytes)?,
            // NUL as modified UTF-8 spells it; any other overlong sequence is refused below.
            0xc0 if after.first() == Some(&0x80) => {
                bytes.push(0);
                &after[1..]
            }
            _ => {
                bytes.push(byte);
                after
            }
        };
    }
    String::from_utf8(bytes).map_err(|_| "invalid UTF-8 sequence in string".into())
}

/// Reads an escape sequence after its backslash; returns what follows it.
fn escape<'r>(rest: &'r [u8], bytes: &mut Vec<u8>) -> Result<&'r [u8], Complaint> {
    let invalid = || Complaint::from("invalid escape sequence in string");
    let (&letter, rest) = rest.split_first().ok_or_else(invalid)?;
    let meaning = match letter {
        b'b' => 8,
        b'f' => 12,
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'"' | b'\'' | b'\\' | b'/' => letter,
        b'u' => {
            let (meaning, rest) = unicode(rest)?;
            bytes.extend_from_slice(meaning.encode_utf8(&mut [0; 4]).as_bytes());
            return Ok(rest);
        }
        _ => return Err(invalid()),
    };
    bytes.push(meaning);
    Ok(rest)
}

/// Reads `XXXX`, or `XXXX\uXXXX` for a character above U+FFFF.
fn unicode(rest: &[u8]) -> Result<(char, &[u8]), Complaint> {
    let (first, mut rest) =
        hex4(rest).ok_or_else(|| Complaint::from("invalid escape sequence in string"))?;
    let mut code = first;
    if (0xd800..0xdc00).contains(&first)
        && let Some((second, after)) = rest.strip_prefix(b"\\u").and_then(hex4)
        && (0xdc00..0xe000).contains(&second)
    {
        code = 0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00);
        rest = after;
    }
    match char::from_u32(code) {
        Some(meaning) => Ok((meaning, rest)),
        None => Err(format!("\\u{first:04x} is not a valid Unicode character")),
    }
}

fn hex4(rest: &[u8]) -> Option<(u32, &[u8])> {
    let (digits, rest) = rest.split_at_checked(4)?;
    let digit = |code: u32, byte: &u8| Some(code << 4 | char::from(*byte).to_digit(16)?);
    Some((digits.iter().try_fold(0, digit)?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_the_grammar() {
        for good in ["0", "-0", "10", "1.5", "0.0", "1e5", "-1.0E-400"] {
            assert!(is_number(good), "{good}");
        }
        for bad in [
            "", "-", "01", "1.", ".5", "1e", "1e+", "--1", "+1", "1_0", "0x1", "1.5.5",
        ] {
            assert!(!is_number(bad), "{bad}");
        }
    }

    #[test]
    fn integers_keep_64_bits() {
        assert_eq!(number("-9223372036854775808").unwrap(), i64::MIN);
        assert_eq!(number("18446744073709551615").unwrap(), u64::MAX);
        assert_eq!(
            number("18446744073709551616").unwrap(),
            18_446_744_073_709_551_616.0
        );
        assert_eq!(number("-0").unwrap(), 0);
        assert_eq!(
            number("1E400").unwrap_err(),
            "number '1E400' is out of range"
        );
    }

    #[test]
    fn escapes_and_modified_utf8() {
        let raw = b"\\b\\f\\n\\r\\t\\\"\\'\\\\\\/\\u00e9\\ud83d\\ude00\\u0000\xc0\x80\xc3\xa9";
        assert_eq!(
            string(raw).unwrap(),
            "\u{8}\u{c}\n\r\t\"'\\/\u{e9}\u{1f600}\0\0\u{e9}"
        );
    }

    #[test]
    fn malformed_strings_have_qemus_words() {
        let cases: [(&[u8], &str); 9] = [
            (b"\\q", "invalid escape sequence in string"),
            (b"\\u12", "invalid escape sequence in string"),
            (b"\\u12g4", "invalid escape sequence in string"),
            (b"\\ud83d", "\\ud83d is not a valid Unicode character"),
            (
                b"\\ud83d\\u0041",
                "\\ud83d is not a valid Unicode character",
            ),
            (b"\\udc00", "\\udc00 is not a valid Unicode character"),
            (b"\xc0\x81", "invalid UTF-8 sequence in string"),
            (b"\xed\xa0\x80", "invalid UTF-8 sequence in string"),
            (b"\xc0", "invalid UTF-8 sequence in string"),
        ];
        for (raw, want) in cases {
            assert_eq!(string(raw).unwrap_err(), want);
        }
    }
}
