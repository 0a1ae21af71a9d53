//! Floats as C's `%.17g` prints them, which is what QEMU sends.

/// Digits that tell any two doubles apart.
const SIGNIFICANT: i32 = 17;

/// `0.10000000000000001`, `100000`, `1.8446744073709552e+19`: 17 significant digits, no trailing
/// zeroes, an exponent only where it would be below -4 or above 16. `value` is finite.
pub(super) fn to_text(value: f64) -> String {
    let scientific = format!("{value:.*e}", 16);
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or_default();
    if !(-4..SIGNIFICANT).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{}e{sign}{:02}", trimmed(mantissa), exponent.abs());
    }
    let decimals = usize::try_from(SIGNIFICANT - 1 - exponent).unwrap_or_default();
    trimmed(&format!("{value:.decimals$}")).to_owned()
}

/// Without the zeroes that end a fraction.
fn trimmed(text: &str) -> &str {
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_as_qsd_does() {
        let cases = [
            (0.1, "0.10000000000000001"),
            (1e5, "100000"),
            (-0.0, "-0"),
            (1e-7, "9.9999999999999995e-08"),
            (0.0001, "0.0001"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (1e16, "10000000000000000"),
            (1e17, "1e+17"),
            (1.5e300, "1.5000000000000001e+300"),
            (5e-324, "4.9406564584124654e-324"),
            (18_446_744_073_709_551_616.0, "1.8446744073709552e+19"),
        ];
        for (value, want) in cases {
            assert_eq!(to_text(value), want);
        }
    }
}
