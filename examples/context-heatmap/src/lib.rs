//! Which ranges were written in the last minutes: `x-heat:age`.
//!
//! `rotate.py` gives the node a new dirty bitmap each minute (`heat-7`, `heat-8`, ...), stops the
//! one before it and forgets the oldest. This provider puts them together. The status of a range is
//! the age of its last write, in bitmaps: 1 is the newest, 2 the one before; 0 is older than all of
//! them, or never. `heatmap.py` prints it.
//!
//! ```text
//! block-export-add {"type": "nbd", ..., "metadata-contexts": [{"plugin": "context-heatmap"}]}
//! ```

#![forbid(unsafe_code)]

use outport_sdk::{
    ByteRange, Context, ContextProvider, Error, Info, Keep, NodeView, Result, Span, Status,
};
use serde::Deserialize;

const NAME: &str = "x-heat:age";

/// Granules looked at in one answer: a client that asks about a large disk asks again.
const GRANULES_MAX: u64 = 65_536;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    #[serde(default = "heat")]
    prefix: String,
}

fn heat() -> String {
    "heat-".to_owned()
}

/// The bitmaps of one node that belong together.
#[derive(Debug)]
pub struct Heatmap {
    prefix: String,
}

/// The bits of one bitmap for a range.
struct Minute {
    granularity: u64,
    bits: Vec<u8>,
}

impl Minute {
    /// Whether the granule of `offset` is dirty; `start` is where the bits begin.
    fn is_dirty(&self, start: u64, offset: u64) -> bool {
        let bit = offset / self.granularity - start / self.granularity;
        let byte = usize::try_from(bit / 8)
            .ok()
            .and_then(|at| self.bits.get(at));
        byte.is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
    }
}

impl Heatmap {
    /// Names of the bitmaps, the newest first.
    fn names(&self, view: &dyn NodeView) -> Vec<String> {
        let number = |name: &String| name.strip_prefix(&self.prefix)?.parse::<u64>().ok();
        let mut numbered: Vec<_> = view
            .bitmap_names()
            .into_iter()
            .filter_map(|name| Some((number(&name)?, name)))
            .collect();
        numbered.sort_unstable_by(|a, b| b.cmp(a));
        numbered.into_iter().map(|(_, name)| name).collect()
    }
}

impl ContextProvider for Heatmap {
    fn info() -> Info {
        Info {
            name: "context-heatmap",
            version: env!("CARGO_PKG_VERSION"),
            description: "Which ranges were written in the last minutes",
            options_schema: include_str!("options.json"),
        }
    }

    fn open(_view: &dyn NodeView, options: &str) -> Result<Self> {
        let options: Options =
            serde_json::from_str(options).map_err(|e| Error::invalid(e.to_string()))?;
        Ok(Self {
            prefix: options.prefix,
        })
    }

    fn contexts(&mut self, _view: &dyn NodeView) -> Result<Vec<Context>> {
        Ok(vec![Context {
            name: NAME.to_owned(),
            wide: false,
            description: "Age of the last write, in bitmaps; 0: none of them has it".to_owned(),
        }])
    }

    fn block_status(
        &mut self,
        view: &dyn NodeView,
        _context: &str,
        range: ByteRange,
        max_spans: u32,
    ) -> Result<Status> {
        let names = self.names(view);
        let granularities = names.iter().map(|name| view.bitmap_granularity(name));
        let granularities: Vec<u64> = granularities
            .map(|g| Ok(u64::from(g?)))
            .collect::<Result<_>>()?;
        let Some(&step) = granularities.iter().min() else {
            let span = Span {
                len: range.len,
                status: 0,
            };
            return Ok(Status::collect([span], max_spans, Keep::None));
        };
        let range = ByteRange::new(range.offset, range.len.min(GRANULES_MAX * step));
        let mut minutes = Vec::new();
        for (name, granularity) in names.iter().zip(granularities) {
            let bits = view.bitmap_bits(name, range)?;
            minutes.push(Minute { granularity, bits });
        }
        // Up to the next multiple of the finest granularity each.
        let mut at = range.offset;
        let runs = std::iter::from_fn(|| {
            let end = ((at / step + 1) * step).min(range.end());
            let dirty = |minute: &Minute| minute.is_dirty(range.offset, at);
            let age = minutes
                .iter()
                .position(dirty)
                .map_or(0, |age| age as u64 + 1);
            let run = Span {
                len: end.checked_sub(at).filter(|len| *len > 0)?,
                status: age,
            };
            at = end;
            Some(run)
        });
        Ok(Status::collect(runs, max_spans, Keep::None))
    }
}

outport_sdk::export_contexts!(Heatmap);
