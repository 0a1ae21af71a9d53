//! What all threads did, and how it is reported.

use serde_json::{Value, json};

use super::{Histogram, Spent, Tally};

/// The sums over all threads of a load generator.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    threads: usize,
    ops: u64,
    errors: u64,
    /// Operations per second: each thread by its own clock.
    per_second: f64,
    /// Of the thread that took longest.
    seconds: f64,
    client_cpu: f64,
    /// As the first thread read it, which is the whole process's.
    server_cpu: Option<f64>,
    latency: Histogram,
}

impl Totals {
    /// Adds up what the threads hand over.
    pub fn of<'a>(threads: impl IntoIterator<Item = (&'a Tally, &'a Spent)>) -> Self {
        let mut totals = Self::default();
        for (tally, spent) in threads {
            let seconds = spent.elapsed.as_secs_f64();
            if totals.threads == 0 {
                totals.server_cpu = spent.server_cpu.map(|cpu| cpu.as_secs_f64());
            }
            totals.threads += 1;
            totals.ops += tally.ops;
            totals.errors += tally.errors;
            totals.per_second += tally.ops as f64 / seconds;
            totals.seconds = totals.seconds.max(seconds);
            totals.client_cpu += spent.client_cpu.as_secs_f64();
            totals.latency.merge(&tally.latency);
        }
        totals
    }

    /// A JSON object of what every load generator reports: operations of `block_size` bytes, and
    /// the latencies that the named shares (0..1) of them kept below.
    pub fn report(&self, block_size: u64, latencies: &[(&str, f64)]) -> Value {
        let per_op = |cpu: f64| rounded(cpu * 1e6 / (self.ops.max(1)) as f64);
        let latency = |(name, share): &(&str, f64)| {
            let microseconds = self.latency.percentile_us(*share);
            ((*name).to_owned(), json!(microseconds))
        };
        json!({
            "ops": self.ops,
            "errors": self.errors,
            "bytes": self.ops * block_size,
            "seconds": rounded(self.seconds),
            "iops": rounded(self.per_second),
            "mb_per_s": rounded(self.per_second * block_size as f64 / 1e6),
            "server_cpu_us_per_op": self.server_cpu.map(per_op),
            "server_busy": self.server_cpu.map(|cpu| rounded(cpu / self.seconds)),
            "client_cpu_us_per_op": per_op(self.client_cpu),
            "latency_us": Value::Object(latencies.iter().map(latency).collect()),
        })
    }

    /// The share of the time (0..1) that a client's thread was busy.
    pub fn client_busy(&self) -> f64 {
        rounded(self.client_cpu / self.seconds / self.threads as f64)
    }
}

/// With three digits after the point.
pub fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
