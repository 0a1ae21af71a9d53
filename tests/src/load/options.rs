//! Words of a load generator's command line.

use std::time::Duration;

/// A number of bytes, or any number: with k, M or G after it, of KiB, MiB or GiB.
///
/// # Errors
/// In words: it is no number.
pub fn bytes(value: &str) -> Result<u64, String> {
    let (digits, unit) = match value.as_bytes().last() {
        Some(b'k' | b'K') => (&value[..value.len() - 1], 1 << 10),
        Some(b'm' | b'M') => (&value[..value.len() - 1], 1 << 20),
        Some(b'g' | b'G') => (&value[..value.len() - 1], 1 << 30),
        _ => (value, 1),
    };
    Ok(digits.parse::<u64>().map_err(|_| "not a size")? * unit)
}

/// A time in seconds, with or without a fraction.
///
/// # Errors
/// In words: it is no number, negative or too large.
pub fn seconds(value: &str) -> Result<Duration, String> {
    let number: f64 = value.parse().map_err(|_| "not a number of seconds")?;
    Duration::try_from_secs_f64(number).map_err(|why| why.to_string())
}
