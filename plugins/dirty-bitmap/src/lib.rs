//! `qemu:dirty-bitmap:NAME`: what was written since a bitmap was clear. Status 1: dirty.
//!
//! The host works it out by itself, from the rule; one that does not know rules asks for every
//! range.

#![forbid(unsafe_code)]

use outport_sdk::{
    ByteRange, Context, ContextProvider, ContextRules, Error, Info, Keep, NodeView, Result, Rule,
    Span, Status,
};
use serde::Deserialize;

/// Granules of which one answer tells at most.
const PIECE: u64 = 1 << 20;

/// What the status of a dirty range is.
const DIRTY: u64 = 1;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    bitmap: String,
}

/// One bitmap.
#[derive(Debug)]
pub struct DirtyBitmap {
    bitmap: String,
    granularity: u64,
}

impl ContextProvider for DirtyBitmap {
    fn info() -> Info {
        Info {
            name: "dirty-bitmap",
            version: env!("CARGO_PKG_VERSION"),
            description: "qemu:dirty-bitmap:NAME, what was written since a bitmap was clear",
            options_schema: include_str!("options.json"),
        }
    }

    fn open(view: &dyn NodeView, options: &str) -> Result<Self> {
        let options: Options = serde_json::from_str(options)
            .map_err(|e| Error::invalid(format!("Invalid options: {e}")))?;
        let granularity = u64::from(view.bitmap_granularity(&options.bitmap)?);
        if granularity == 0 {
            return Err(Error::invalid("A bitmap without granules"));
        }
        Ok(Self {
            bitmap: options.bitmap,
            granularity,
        })
    }

    fn contexts(&mut self, _view: &dyn NodeView) -> Result<Vec<Context>> {
        Ok(vec![Context {
            name: format!("qemu:dirty-bitmap:{}", self.bitmap),
            wide: false,
            description: format!(
                "What was written since the bitmap '{}' was clear",
                self.bitmap
            ),
        }])
    }

    fn block_status(
        &mut self,
        view: &dyn NodeView,
        _context: &str,
        range: ByteRange,
        max_spans: u32,
    ) -> Result<Status> {
        let granule = self.granularity;
        let first = range.offset / granule;
        let last = range.end().div_ceil(granule).min(first + PIECE);
        let end = range.end().min(last * granule);
        let piece = ByteRange::new(range.offset, end - range.offset);
        let bits = view.bitmap_bits(&self.bitmap, piece)?;
        let spans = (first..last).map(|at| {
            let bit = (at - first) as usize;
            let byte = bits.get(bit / 8).copied().unwrap_or_default();
            let from = range.offset.max(at * granule);
            Span {
                len: end.min((at + 1) * granule) - from,
                status: u64::from(byte >> (bit % 8) & 1) * DIRTY,
            }
        });
        Ok(Status::collect(spans, max_spans, Keep::UntilWrite))
    }
}

impl ContextRules for DirtyBitmap {
    fn rule(&mut self, _context: &str) -> Result<Option<Rule>> {
        Ok(Some(Rule::Bitmap {
            name: self.bitmap.clone(),
            clean: 0,
            dirty: DIRTY,
        }))
    }
}

#[cfg(target_arch = "wasm32")]
outport_sdk::export_contexts!(DirtyBitmap, rules);

#[cfg(test)]
mod tests {
    use super::*;
    use outport_sdk::testing::{TestProvider, TestView};

    /// Granules that are not 512 bytes, a length that they do not divide, and a pattern with runs
    /// of all lengths.
    fn provider(granularity: u32, size: u64) -> (TestProvider<DirtyBitmap>, Vec<bool>) {
        let mut view = TestView::new(size);
        view.add_bitmap("b", granularity);
        let granules = size.div_ceil(u64::from(granularity)) as usize;
        let mut model = vec![false; granules];
        let (mut at, mut run) = (3, 1);
        while at < granules {
            for granule in at..granules.min(at + run) {
                model[granule] = true;
                let offset = granule as u64 * u64::from(granularity);
                view.mark("b", ByteRange::new(offset, 1));
            }
            (at, run) = (at + run + run % 7 + 1, run * 2 % 301);
        }
        let options = "{\"bitmap\": \"b\"}";
        (TestProvider::open(view, options).expect("it opens"), model)
    }

    #[test]
    fn spans_are_the_runs_of_the_bits() {
        let size = 40_000 * 1024 + 512;
        let (mut provider, model) = provider(1024, size);
        for (offset, max) in [
            (0, 1_000_000),
            (512, 5),
            (100 * 1024 + 7, 64),
            (size - 512, 1),
        ] {
            let range = ByteRange::new(offset, size - offset);
            let spans = provider.status("qemu:dirty-bitmap:b", range, max);
            let mut at = offset;
            for span in spans.expect("it answers") {
                let granules = at / 1024..(at + span.len).div_ceil(1024);
                for granule in granules {
                    assert_eq!(u64::from(model[granule as usize]), span.status, "{granule}");
                }
                at += span.len;
            }
            assert_eq!(at, size);
        }
    }

    #[test]
    fn a_bitmap_that_is_not_there_is_refused() {
        let open = |options| TestProvider::<DirtyBitmap>::open(TestView::new(512), options);
        assert!(open("{\"bitmap\": \"b\"}").is_err());
        assert!(open("{}").is_err());
    }
}
