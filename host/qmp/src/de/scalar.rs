//! Scalars: JSON values as they are, or the strings of key=value options.

use serde_json::Value;

use super::Mode;
use super::node::Node;
use crate::error::Error;

impl Node<'_, '_> {
    /// A boolean; in key=value options one of the eight words that QEMU knows.
    pub(super) fn boolean(&self) -> Result<bool, Error> {
        match (self.value, self.mode) {
            (Value::Bool(value), _) => Ok(*value),
            (_, Mode::Typed) => Err(self.invalid_type("boolean")),
            (_, Mode::Keyval) => match self.text()? {
                "on" | "yes" | "true" | "y" => Ok(true),
                "off" | "no" | "false" | "n" => Ok(false),
                _ => Err(self.expects("'on' or 'off'")),
            },
        }
    }

    /// A string. In key=value options anything else is a group of dotted keys.
    pub(super) fn text(&self) -> Result<&str, Error> {
        match (self.value, self.mode) {
            (Value::String(text), _) => Ok(text),
            (Value::Object(_) | Value::Array(_), Mode::Keyval) => {
                let path = self.path.full(self.mode);
                Err(Error::generic(format!(
                    "Parameters '{path}.*' are unexpected"
                )))
            }
            _ => Err(self.invalid_type("string")),
        }
    }

    /// A signed integer of 64 bits. A float is none, whatever its value.
    pub(super) fn signed(&self) -> Result<i64, Error> {
        if self.mode == Mode::Keyval {
            return strtoll(self.text()?).ok_or_else(|| self.expects("integer"));
        }
        self.value
            .as_i64()
            .ok_or_else(|| self.invalid_type("integer"))
    }

    /// An unsigned integer of 64 bits. QEMU reads a negative number as its two's complement,
    /// from the time when it had no unsigned numbers; range checks below and in commands refuse
    /// what results.
    pub(super) fn unsigned(&self) -> Result<u64, Error> {
        if self.mode == Mode::Keyval {
            return strtoull(self.text()?).ok_or_else(|| self.expects("integer"));
        }
        let wrapped = || self.value.as_i64().map(i64::cast_unsigned);
        self.value
            .as_u64()
            .or_else(wrapped)
            .ok_or_else(|| self.expects("uint64"))
    }

    /// An integer of fewer bits; the range is named by the last member only.
    pub(super) fn narrow<W, N: TryFrom<W>>(&self, wide: W, c_type: &str) -> Result<N, Error> {
        N::try_from(wide).map_err(|_| Error::expects(self.path.leaf(), c_type))
    }

    /// A number of bytes; key=value options may put a suffix `k`, `M`, `G`, `T`, `P` or `E` to it.
    pub(super) fn size(&self) -> Result<u64, Error> {
        if self.mode == Mode::Typed {
            return self.unsigned();
        }
        parse_size(self.text()?).ok_or_else(|| self.expects("size"))
    }

    /// A floating-point number.
    pub(super) fn number(&self) -> Result<f64, Error> {
        if self.mode == Mode::Keyval {
            let parsed = self
                .text()?
                .parse::<f64>()
                .ok()
                .filter(|number| number.is_finite());
            return parsed.ok_or_else(|| self.expects("number"));
        }
        self.value
            .as_f64()
            .ok_or_else(|| self.invalid_type("number"))
    }

    pub(super) fn invalid_type(&self, expected: &str) -> Error {
        Error::invalid_type(&self.path.full(self.mode), expected)
    }

    pub(super) fn expects(&self, expected: &str) -> Error {
        Error::expects(&self.path.full(self.mode), expected)
    }
}

/// Magnitude of a C integer literal: `0x` is hexadecimal, a leading `0` octal.
fn magnitude(text: &str) -> Option<u64> {
    let digits = |text: &str, radix| {
        let first = text.bytes().next()?;
        first
            .is_ascii_alphanumeric()
            .then(|| u64::from_str_radix(text, radix).ok())?
    };
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hexadecimal) => digits(hexadecimal, 16),
        None if text.len() > 1 && text.starts_with('0') => digits(&text[1..], 8),
        None => digits(text, 10),
    }
}

/// Splits the sign from an integer as `strtoll(3)` does, white space before it included.
fn sign_of(text: &str) -> (bool, &str) {
    let text = text.trim_ascii_start();
    match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    }
}

fn strtoll(text: &str) -> Option<i64> {
    let (negative, digits) = sign_of(text);
    let magnitude = magnitude(digits)?;
    if negative {
        0i64.checked_sub_unsigned(magnitude)
    } else {
        i64::try_from(magnitude).ok()
    }
}

fn strtoull(text: &str) -> Option<u64> {
    let (negative, digits) = sign_of(text);
    let magnitude = magnitude(digits)?;
    Some(if negative {
        magnitude.wrapping_neg()
    } else {
        magnitude
    })
}

/// `512`, `0x200`, `64k`, `1.5G`: a size as command lines write it, in bytes.
///
/// `None` for anything else, for a fraction that leaves a part of a byte, and past 64 bits.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    if text.starts_with("0x") || text.starts_with("0X") {
        return magnitude(text);
    }
    let (number, shift) = match text.bytes().next_back()?.to_ascii_lowercase() {
        b'b' => (&text[..text.len() - 1], 0),
        b'k' => (&text[..text.len() - 1], 10),
        b'm' => (&text[..text.len() - 1], 20),
        b'g' => (&text[..text.len() - 1], 30),
        b't' => (&text[..text.len() - 1], 40),
        b'p' => (&text[..text.len() - 1], 50),
        b'e' => (&text[..text.len() - 1], 60),
        _ => (text, 0),
    };
    let decimal = |text: &str| -> Option<u64> {
        text.bytes()
            .all(|byte| byte.is_ascii_digit())
            .then(|| text.parse().ok())?
    };
    let unit = 1u64 << shift;
    match number.split_once('.') {
        None => decimal(number)?.checked_mul(unit),
        Some(_) if shift == 0 => None,
        Some((whole, fraction)) => {
            let parts = u128::from(decimal(fraction)?) * u128::from(unit);
            let part = parts / 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
            decimal(whole)?
                .checked_mul(unit)?
                .checked_add(u64::try_from(part).ok()?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_c_literals() {
        assert_eq!(strtoll("0x10"), Some(16));
        assert_eq!(strtoll("-010"), Some(-8));
        assert_eq!(strtoll("-9223372036854775808"), Some(i64::MIN));
        assert_eq!(strtoull("-1"), Some(u64::MAX));
        assert_eq!(strtoull("18446744073709551615"), Some(u64::MAX));
        for bad in [
            "",
            "-",
            "0x",
            "1k",
            "1.5",
            "--1",
            "+-1",
            "18446744073709551616",
            "0x+1",
        ] {
            assert_eq!(strtoull(bad), None, "{bad}");
        }
    }

    #[test]
    fn sizes_take_suffixes() {
        assert_eq!(parse_size("64k"), Some(65_536));
        assert_eq!(parse_size("1.5G"), Some(1_610_612_736));
        assert_eq!(parse_size("0x200"), Some(512));
        assert_eq!(parse_size("8E"), Some(1 << 63));
        for bad in [
            "",
            "k",
            "16E",
            "1.5",
            "-1",
            "1kk",
            ".",
            "1 k",
            "1.99999999999999999999k",
        ] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }
}
