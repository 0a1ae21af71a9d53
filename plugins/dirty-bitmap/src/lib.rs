//! `qemu:dirty-bitmap:NAME`: what was written since a bitmap was clear. Status 1: dirty.
//!
//! The host works it out by itself, from the rule. One that does not know rules asks for every
//! range: then bits come from the host in pieces that grow while they yield few spans, so that a
//! sparse bitmap costs few calls and a dense one no more bits than there is room for.

#![forbid(unsafe_code)]

use outport_sdk::{
    ByteRange, Context, ContextProvider, ContextRules, Error, Info, Keep, NodeView, Result, Rule,
    Span, Status,
};
use serde::Deserialize;

/// Bits of the first and of the largest piece.
const PIECE_MIN: u64 = 1 << 15;
const PIECE_MAX: u64 = 1 << 22;

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

/// Spans of granules, joined where they are alike.
struct Spans {
    list: Vec<Span>,
    max: usize,
}

impl Spans {
    /// One more run; `false`: there is no room for it.
    fn push(&mut self, len: u64, status: u64) -> bool {
        let full = self.list.len() == self.max;
        match self.list.last_mut() {
            Some(last) if last.status == status => last.len += len,
            _ if full => return false,
            _ => self.list.push(Span { len, status }),
        }
        true
    }

    /// The runs of the first `count` bits, in granules; `false`: they did not all fit.
    fn push_bits(&mut self, bits: &[u8], count: u64) -> bool {
        let mut left = count;
        for chunk in bits.chunks(8) {
            let mut padded = [0; 8];
            padded[..chunk.len()].copy_from_slice(chunk);
            let mut word = u64::from_le_bytes(padded);
            let mut rest = left.min(64);
            left -= rest;
            while rest > 0 {
                let set = word & 1;
                let run = if set == 1 {
                    word.trailing_ones()
                } else {
                    word.trailing_zeros()
                };
                let run = u64::from(run).min(rest);
                if !self.push(run, set * DIRTY) {
                    return false;
                }
                word = word.checked_shr(run as u32).unwrap_or(0);
                rest -= run;
            }
        }
        true
    }
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
        let mut spans = Spans {
            list: Vec::new(),
            max: max_spans as usize,
        };
        let first = range.offset / self.granularity;
        let end = range.end().div_ceil(self.granularity);
        let (mut at, mut piece) = (first, PIECE_MIN);
        while at < end {
            let next = end.min(at + piece);
            let from = (at * self.granularity).max(range.offset);
            let to = (next * self.granularity).min(range.end());
            let bits = view.bitmap_bits(&self.bitmap, ByteRange::new(from, to - from))?;
            if !spans.push_bits(&bits, next - at) {
                break;
            }
            at = next;
            piece = PIECE_MAX.min(piece * 2);
        }
        // So far in granules; the first may have begun before the range.
        for span in &mut spans.list {
            span.len *= self.granularity;
        }
        if let (true, Some(span)) = (at == end, spans.list.last_mut()) {
            span.len -= end * self.granularity - range.end();
        }
        if let Some(span) = spans.list.first_mut() {
            span.len -= range.offset - first * self.granularity;
        }
        Ok(Status {
            spans: spans.list,
            keep: Keep::UntilWrite,
        })
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
