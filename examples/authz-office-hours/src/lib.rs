//! Exports are for writing in office hours, and for reading at other times.
//!
//! ```text
//! object-add {"qom-type": "authz-wasm", "id": "office", "plugin": "authz-office-hours",
//!             "config": {"from": "08:00", "to": "18:00", "days": ["mon", "tue"],
//!                        "utc-offset-minutes": 60, "outside": "deny"}}
//! ```
//!
//! A session does not outlive the hours that it began in: the grant ends with them, and the daemon
//! asks again.

#![forbid(unsafe_code)]

use outport_sdk::{ConfigFiles, Decision, Error, Info, Narrowing, Policy, Request, Result};
use serde::Deserialize;

const MINUTE_MS: u64 = 60_000;
const DAY_MS: u64 = 24 * 60 * MINUTE_MS;

/// The first of January 1970 was one of these.
const THURSDAY: u64 = 3;

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// What clients may do at other times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Outside {
    #[default]
    ReadOnly,
    Deny,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    from: String,
    to: String,
    days: Option<Vec<String>>,
    #[serde(default)]
    utc_offset_minutes: i64,
    #[serde(default)]
    outside: Outside,
}

/// One set of hours.
#[derive(Debug)]
pub struct OfficeHours {
    /// Milliseconds since midnight.
    from: u64,
    to: u64,
    /// By day of the week, Monday first.
    days: [bool; 7],
    offset_ms: i64,
    outside: Outside,
}

impl OfficeHours {
    /// Milliseconds until the hours end; `None`: they are not now.
    fn left(&self, now_ms: u64) -> Option<u64> {
        let local = now_ms.checked_add_signed(self.offset_ms)?;
        let (day, time) = (local / DAY_MS, local % DAY_MS);
        let day = usize::try_from((day + THURSDAY) % 7).ok()?;
        let now = self.days.get(day)? & (self.from..self.to).contains(&time);
        now.then(|| self.to - time)
    }

    /// Milliseconds until they may begin again: at the next quarter of an hour at the latest.
    fn again(now_ms: u64) -> u64 {
        15 * MINUTE_MS - now_ms % (15 * MINUTE_MS)
    }
}

/// "08:30" as milliseconds since midnight; "24:00" is the end of the day.
fn time(text: &str) -> Result<u64> {
    let parsed = text.split_once(':').and_then(|(hours, minutes)| {
        let (hours, minutes): (u64, u64) = (hours.parse().ok()?, minutes.parse().ok()?);
        let ms = (hours * 60 + minutes) * MINUTE_MS;
        (hours <= 24 && minutes < 60 && ms <= DAY_MS).then_some(ms)
    });
    parsed.ok_or_else(|| Error::invalid(format!("'{text}' is no time of the day, such as 08:30")))
}

impl Policy for OfficeHours {
    fn info() -> Info {
        Info {
            name: "authz-office-hours",
            version: env!("CARGO_PKG_VERSION"),
            description: "Writing in office hours, reading at other times",
            options_schema: include_str!("options.json"),
        }
    }

    fn open(_files: &dyn ConfigFiles, options: &str) -> Result<Self> {
        let options: Options =
            serde_json::from_str(options).map_err(|e| Error::invalid(e.to_string()))?;
        let named = options
            .days
            .unwrap_or_else(|| DAYS[..5].iter().map(|day| (*day).into()).collect());
        let (from, to) = (time(&options.from)?, time(&options.to)?);
        outport_sdk::ensure!(from < to, "The hours end before they begin");
        Ok(Self {
            from,
            to,
            days: DAYS.map(|day| named.iter().any(|name| name == day)),
            offset_ms: options.utc_offset_minutes * MINUTE_MS as i64,
            outside: options.outside,
        })
    }

    fn decide(&mut self, _files: &dyn ConfigFiles, request: &Request) -> Result<Decision> {
        let narrowing = match (self.left(request.now_ms), self.outside) {
            (Some(left), _) => Narrowing {
                ttl_ms: left,
                ..Narrowing::default()
            },
            (None, Outside::ReadOnly) => Narrowing {
                read_only: true,
                ttl_ms: Self::again(request.now_ms),
                ..Narrowing::default()
            },
            (None, Outside::Deny) => return Ok(Decision::deny("It is not office hours")),
        };
        Ok(Decision::Allow(narrowing))
    }
}

outport_sdk::export_policy!(OfficeHours);
