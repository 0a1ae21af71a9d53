//! Latencies in log-linear buckets: 32 per power of two, so a percentile is right within 3 %.

const SUB_BITS: u32 = 5;
const SUB: usize = 1 << SUB_BITS;

/// Counts of nanosecond values.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; SUB * 60],
            total: 0,
            max: 0,
        }
    }
}

impl Histogram {
    /// Counts one value.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.counts[index(value)] += 1;
        self.total += 1;
        self.max = self.max.max(value);
    }

    /// Adds another's counts.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// The value below which `share` (0..1) of all lie, in microseconds.
    pub fn percentile_us(&self, share: f64) -> f64 {
        let wanted = (self.total as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && *count > 0 {
                return upper(index).min(self.max) as f64 / 1000.0;
            }
        }
        self.max as f64 / 1000.0
    }
}

fn index(value: u64) -> usize {
    let exponent = 63 - (value | 1).leading_zeros();
    if exponent < SUB_BITS {
        return value as usize;
    }
    let shift = exponent - SUB_BITS;
    (shift as usize + 1) * SUB + ((value >> shift) as usize & (SUB - 1))
}

fn upper(index: usize) -> u64 {
    let (shift, sub) = (index / SUB, (index % SUB) as u64);
    match shift {
        0 => sub,
        _ => ((SUB as u64 + sub + 1) << (shift - 1)) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_within_three_percent() {
        let mut histogram = Histogram::default();
        (1..=100_000u64).for_each(|value| histogram.record(value * 10));
        for share in [0.01, 0.5, 0.9, 0.99, 1.0] {
            let (got, exact) = (histogram.percentile_us(share), share * 1000.0);
            assert!(
                (got - exact).abs() <= exact * 0.032,
                "{share}: {got} for {exact}"
            );
        }
    }
}
