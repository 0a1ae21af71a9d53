//! `throttle-group` objects: limits that `throttle` nodes share.
//!
//! Pure but for the group itself, which lives in the block layer.

use outport_block::filter::throttle::{Limits, Rate, Rates};
use outport_qmp::Error;
use outport_qmp::types::block_filter::ThrottleGroupProperties;
use serde_json::{Map, Value};

/// Rates and bursts are no larger than this.
const VALUE_MAX: i64 = 1_000_000_000_000_000;

/// Seconds that a burst may last.
const LENGTH_MAX: i64 = u32::MAX as i64;

/// The limits that properties describe: those of `limits`, or else the single ones (`x-...`).
///
/// # Errors
/// In QEMU's words.
pub(crate) fn limits(properties: &ThrottleGroupProperties) -> Result<Limits, Error> {
    let members = match serde_json::to_value(properties) {
        Ok(Value::Object(members)) => members,
        _ => Map::default(),
    };
    let values = Values(members);
    values.check_single()?;
    let bps = values.rates("bps");
    let iops = values.rates("iops");
    let size = values.get("iops-size");
    for (total, read, write) in [
        (bps[0].average, bps[1].average, bps[2].average),
        (bps[0].max, bps[1].max, bps[2].max),
        (iops[0].average, iops[1].average, iops[2].average),
        (iops[0].max, iops[1].max, iops[2].max),
    ] {
        if total != 0 && (read != 0 || write != 0) {
            return Err(Error::generic(
                "bps/iops/max total values and read/write values cannot be used at the same time",
            ));
        }
    }
    if size != 0 && iops.iter().all(|rate| rate.average == 0) {
        return Err(Error::generic("iops size requires an iops value to be set"));
    }
    let rates = |all: [Asked; 3]| -> Result<Rates, Error> {
        let [total, read, write] = all;
        Ok(Rates {
            total: total.check()?,
            read: read.check()?,
            write: write.check()?,
        })
    };
    Ok(Limits {
        bps: rates(bps)?,
        iops: rates(iops)?,
        iops_size: u64::try_from(size).unwrap_or(0),
    })
}

/// Units and kinds of request that have limits, as the members of `limits` are named.
const MEMBERS: [&str; 19] = [
    "bps-read",
    "bps-read-max",
    "bps-read-max-length",
    "bps-total",
    "bps-total-max",
    "bps-total-max-length",
    "bps-write",
    "bps-write-max",
    "bps-write-max-length",
    "iops-read",
    "iops-read-max",
    "iops-read-max-length",
    "iops-size",
    "iops-total",
    "iops-total-max",
    "iops-total-max-length",
    "iops-write",
    "iops-write-max",
    "iops-write-max-length",
];

/// The value of a property: all limits, or a single one (`x-...`).
pub(super) fn told(members: Map<String, Value>, name: &str) -> Value {
    let values = Values(members);
    match name.strip_prefix("x-") {
        Some(single) => values.get(single).into(),
        None => {
            let limits = MEMBERS.map(|member| (member.to_owned(), values.get(member).into()));
            Value::Object(limits.into_iter().collect())
        }
    }
}

/// The properties by name.
struct Values(Map<String, Value>);

/// A rate as it was asked for.
#[derive(Clone, Copy)]
struct Asked {
    average: i64,
    max: i64,
    length: i64,
}

impl Values {
    fn given(&self, name: &str) -> Option<i64> {
        self.0.get("limits")?.get(name)?.as_i64()
    }

    fn single(&self, name: &str) -> Option<i64> {
        self.0.get(&format!("x-{name}"))?.as_i64()
    }

    fn get(&self, name: &str) -> i64 {
        let default = i64::from(name.ends_with("-length"));
        self.given(name)
            .or_else(|| self.single(name))
            .unwrap_or(default)
    }

    /// The single properties, and the lengths of bursts, have limits of their own.
    fn check_single(&self) -> Result<(), Error> {
        for (name, value) in &self.0 {
            match value.as_i64() {
                Some(value) if name.ends_with("-length") && !(0..=LENGTH_MAX).contains(&value) => {
                    // "therange" is QEMU's.
                    return Err(Error::generic(format!(
                        "{name} value must be in therange [0, {LENGTH_MAX}]"
                    )));
                }
                Some(..0) => return Err(Error::generic("Property values cannot be negative")),
                _ => {}
            }
        }
        let lengths = self.0.get("limits").and_then(Value::as_object);
        let lengths = lengths.into_iter().flatten();
        for (name, value) in lengths.filter(|(name, _)| name.ends_with("-length")) {
            if !value
                .as_i64()
                .is_some_and(|value| (0..=LENGTH_MAX).contains(&value))
            {
                return Err(Error::generic(format!(
                    "{name} value must be in the range [0, {LENGTH_MAX}]"
                )));
            }
        }
        Ok(())
    }

    /// All requests, reads, writes.
    fn rates(&self, unit: &str) -> [Asked; 3] {
        ["total", "read", "write"].map(|which| Asked {
            average: self.get(&format!("{unit}-{which}")),
            max: self.get(&format!("{unit}-{which}-max")),
            length: self.get(&format!("{unit}-{which}-max-length")),
        })
    }
}

impl Asked {
    fn check(self) -> Result<Rate, Error> {
        let Self {
            average,
            max,
            length,
        } = self;
        let refused = |why: &str| Err(Error::generic(why));
        if ![average, max]
            .iter()
            .all(|value| (0..=VALUE_MAX).contains(value))
        {
            return refused("bps/iops/max values must be within [0, 1000000000000000]");
        }
        if length == 0 {
            return refused("the burst length cannot be 0");
        }
        if length > 1 && max == 0 {
            return refused("burst length set without burst rate");
        }
        if max > 0 && length > VALUE_MAX / max {
            return refused("burst length too high for this burst rate");
        }
        if max > 0 && average == 0 {
            return refused("bps_max/iops_max require corresponding bps/iops values");
        }
        if max > 0 && max < average {
            return refused("bps_max/iops_max cannot be lower than bps/iops");
        }
        // Nothing is negative any more.
        let positive = |value: i64| u64::try_from(value).unwrap_or(0);
        Ok(Rate {
            average: positive(average),
            max: positive(max),
            burst_length: positive(length),
        })
    }
}
