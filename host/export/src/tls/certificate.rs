//! What the daemon wants to know of a certificate, beside whether it is genuine.
//!
//! Pure and fuzzed. Signatures and chains are rustls' affair; here are the facts that QEMU's
//! checks and authorization policies ask for.

use std::fmt;
use std::net::IpAddr;

use super::der::{Element, Elements, Malformed, tag};

/// Object identifiers of extensions.
const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 19];
const KEY_USAGE: &[u8] = &[0x55, 0x1d, 15];
const PURPOSES: &[u8] = &[0x55, 0x1d, 37];
const ALT_NAMES: &[u8] = &[0x55, 0x1d, 17];

/// Bits of a key usage, as they lie in its first byte.
pub(crate) const DIGITAL_SIGNATURE: u8 = 0x80;
pub(crate) const CERTIFICATE_SIGN: u8 = 0x04;

/// Purposes.
pub(crate) const SERVER_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 1];
pub(crate) const CLIENT_AUTH: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 2];
pub(crate) const ANY_PURPOSE: &[u8] = &[0x55, 0x1d, 37, 0];

/// Alternative names that are looked at: more than any honest certificate has.
const ALT_NAMES_MAX: usize = 1024;

/// A subject alternative name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AltName {
    /// Host.
    Dns(String),
    /// Mail address.
    Email(String),
    /// URI, such as a SPIFFE id.
    Uri(String),
    /// Address.
    Ip(IpAddr),
}

/// As policies see it: `KIND:value`.
impl fmt::Display for AltName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => write!(f, "DNS:{name}"),
            Self::Email(name) => write!(f, "EMAIL:{name}"),
            Self::Uri(name) => write!(f, "URI:{name}"),
            Self::Ip(address) => write!(f, "IP:{address}"),
        }
    }
}

/// A value that a certificate insists on or mentions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stated<T> {
    pub(crate) critical: bool,
    pub(crate) value: T,
}

/// A certificate, taken apart.
#[derive(Debug)]
pub struct Certificate<'a> {
    /// What the subject's SEQUENCE contains.
    pub subject: &'a [u8],
    /// What the issuer's SEQUENCE contains.
    pub issuer: &'a [u8],
    /// Seconds since 1970.
    pub not_before: i64,
    /// Seconds since 1970.
    pub not_after: i64,
    pub(crate) is_ca: Option<bool>,
    pub(crate) key_usage: Option<Stated<u8>>,
    pub(crate) purposes: Option<Stated<Vec<&'a [u8]>>>,
    /// Alternative names; `None`: it has no such extension.
    pub alt_names: Option<Vec<AltName>>,
}

impl<'a> Certificate<'a> {
    /// Takes DER apart.
    ///
    /// # Errors
    /// It is no certificate.
    pub fn parse(der: &'a [u8]) -> Result<Self, Malformed> {
        let mut outer = Elements(der).need()?.open(tag::SEQUENCE)?;
        let mut parts = outer.need()?.open(tag::SEQUENCE)?;
        parts.optional(0xa0)?;
        let _serial = parts.need()?;
        let _algorithm = parts.need()?;
        let issuer = parts.need()?.content(tag::SEQUENCE)?;
        let mut validity = parts.need()?.open(tag::SEQUENCE)?;
        let mut certificate = Self {
            issuer,
            not_before: seconds(validity.need()?)?,
            not_after: seconds(validity.need()?)?,
            subject: parts.need()?.content(tag::SEQUENCE)?,
            is_ca: None,
            key_usage: None,
            purposes: None,
            alt_names: None,
        };
        let _key = parts.need()?;
        parts.optional(0x81)?;
        parts.optional(0x82)?;
        if let Some(extensions) = parts.optional(0xa3)? {
            for extension in Elements(extensions.value).need()?.open(tag::SEQUENCE)? {
                certificate.extension(extension?)?;
            }
        }
        Ok(certificate)
    }

    fn extension(&mut self, extension: Element<'a>) -> Result<(), Malformed> {
        let mut parts = extension.open(tag::SEQUENCE)?;
        let oid = parts.need()?.content(tag::OID)?;
        let critical = parts.optional(tag::BOOLEAN)?;
        let critical = critical.is_some_and(|it| it.value != [0]);
        let value = parts.need()?.content(tag::OCTET_STRING)?;
        let mut value = Elements(value);
        match oid {
            BASIC_CONSTRAINTS => {
                let mut parts = value.need()?.open(tag::SEQUENCE)?;
                let is_ca = parts.optional(tag::BOOLEAN)?;
                self.is_ca = Some(is_ca.is_some_and(|it| it.value != [0]));
            }
            KEY_USAGE => {
                let bits = value.need()?.content(tag::BIT_STRING)?;
                let value = bits.get(1).copied().unwrap_or(0);
                self.key_usage = Some(Stated { critical, value });
            }
            PURPOSES => {
                let purposes = value.need()?.open(tag::SEQUENCE)?;
                let purposes = purposes.map(|it| it?.content(tag::OID));
                self.purposes = Some(Stated {
                    critical,
                    value: purposes.collect::<Result<_, _>>()?,
                });
            }
            ALT_NAMES => {
                let names = value.need()?.open(tag::SEQUENCE)?.take(ALT_NAMES_MAX);
                let names = names.map(|it| it.map(alt_name));
                let names = names.collect::<Result<Vec<_>, _>>()?;
                self.alt_names = Some(names.into_iter().flatten().collect());
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether it is valid at this time.
    #[must_use]
    pub fn is_valid_at(&self, seconds: i64) -> bool {
        (self.not_before..=self.not_after).contains(&seconds)
    }

    /// Whether the key may be used so; what is not stated is allowed.
    pub(crate) fn may(&self, usage: u8) -> bool {
        let stated = self.key_usage.as_ref();
        stated.is_none_or(|it| it.value & usage != 0)
    }

    /// The last common name, if it is plain text: what was a host's name before alternative names.
    pub(crate) fn common_name(&self) -> Option<String> {
        let mut found = None;
        for rdn in Elements(self.subject) {
            for attribute in rdn.ok()?.open(tag::SET).ok()? {
                let mut parts = attribute.ok()?.open(tag::SEQUENCE).ok()?;
                let oid = parts.need().ok()?.value;
                let value = parts.need().ok()?;
                if oid == [0x55, 4, 3] {
                    found = std::str::from_utf8(value.value).ok().map(str::to_owned);
                }
            }
        }
        found
    }
}

/// `GeneralName`, of the kinds that policies know.
fn alt_name(name: Element<'_>) -> Option<AltName> {
    let text = || std::str::from_utf8(name.value).ok().map(str::to_owned);
    match name.tag {
        0x81 => text().map(AltName::Email),
        0x82 => text().map(AltName::Dns),
        0x86 => text().map(AltName::Uri),
        0x87 => match (
            <[u8; 4]>::try_from(name.value),
            <[u8; 16]>::try_from(name.value),
        ) {
            (Ok(four), _) => Some(AltName::Ip(IpAddr::from(four))),
            (_, Ok(sixteen)) => Some(AltName::Ip(IpAddr::from(sixteen))),
            _ => None,
        },
        _ => None,
    }
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`.
fn seconds(time: Element<'_>) -> Result<i64, Malformed> {
    let digits = time.value.strip_suffix(b"Z").ok_or(Malformed)?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return Err(Malformed);
    }
    let number = |bytes: &[u8]| bytes.iter().fold(0, |n, b| n * 10 + i64::from(b - b'0'));
    let (year, rest) = match (time.tag, digits.len()) {
        (tag::UTC_TIME, 12) => match number(&digits[..2]) {
            year @ 50.. => (1900 + year, &digits[2..]),
            year => (2000 + year, &digits[2..]),
        },
        (tag::GENERALIZED_TIME, 14) => (number(&digits[..4]), &digits[4..]),
        _ => return Err(Malformed),
    };
    let part = |at: usize| number(&rest[at..at + 2]);
    let (month, day) = (part(0), part(2));
    if !(1..=12).contains(&month) {
        return Err(Malformed);
    }
    let days = days_from_civil(year, month, day);
    Ok(((days * 24 + part(4)) * 60 + part(6)) * 60 + part(8))
}

/// Days since 1970, in the Gregorian calendar; years begin in March, so that leap days end them.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds_since_1970() {
        let at = |tag, text: &str| {
            let value = text.as_bytes();
            let whole = value;
            seconds(Element { tag, value, whole })
        };
        assert_eq!(at(tag::UTC_TIME, "700101000000Z"), Ok(0));
        assert_eq!(at(tag::UTC_TIME, "240229120000Z"), Ok(1_709_208_000));
        assert_eq!(
            at(tag::GENERALIZED_TIME, "20500101000000Z"),
            Ok(2_524_608_000)
        );
        assert_eq!(at(tag::UTC_TIME, "491231235959Z"), Ok(2_524_607_999));
        assert_eq!(at(tag::UTC_TIME, "7001010000Z"), Err(Malformed));
        assert_eq!(at(tag::UTC_TIME, "701301000000Z"), Err(Malformed));
    }
}
