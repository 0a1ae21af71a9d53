//! `outport:plugin/node-view`: what a context provider may see of its export's node. It never sees
//! data.

use outport_block::ByteRange;
use outport_block::view::Allocation;

use super::generated::outport::plugin::node_view::{self, Alloc, AllocRun};
use super::refuse;
use super::types::{self, Errno, Error};
use crate::limits::{CROSSING_BYTES_MAX, VIEW_RUNS_MAX};
use crate::store::HostState;

impl node_view::Host for HostState {
    fn size(&mut self) -> u64 {
        self.granted.view.size()
    }

    async fn allocation(
        &mut self,
        range: types::ByteRange,
        max_runs: u32,
    ) -> Result<Vec<AllocRun>, Error> {
        let range = self.inside(range)?;
        let runs_max = VIEW_RUNS_MAX.min(max_runs as usize);
        let runs = self.granted.view.allocation(range, runs_max).await;
        self.call.waited = true;
        let runs = runs.map_err(|e| failed(e, "Allocation"))?;
        let run = |run: Allocation| AllocRun {
            len: run.len,
            state: match (run.zero, run.data) {
                (_, true) => Alloc::Data,
                (true, false) if run.depth > 0 => Alloc::Zero,
                (true, false) => Alloc::Hole,
                (false, false) => Alloc::Unknown,
            },
            depth: run.depth,
        };
        Ok(runs.into_iter().map(run).collect())
    }

    fn bitmap_names(&mut self) -> Vec<String> {
        self.granted.view.bitmap_names()
    }

    fn bitmap_granularity(&mut self, name: String) -> Result<u32, Error> {
        let granularity = self.granted.view.bitmap_granularity(&name);
        granularity.map_err(|e| failed(e, "Bitmap"))
    }

    fn bitmap_bits(&mut self, name: String, range: types::ByteRange) -> Result<Vec<u8>, Error> {
        let range = self.inside(range)?;
        let granularity = self.granted.view.bitmap_granularity(&name);
        let granularity = granularity.map_err(|e| failed(e, "Bitmap"))?;
        let bits = range.len() / u64::from(granularity.max(1));
        if bits / 8 > CROSSING_BYTES_MAX as u64 / 4 {
            return refuse(Errno::Efbig, "Too many bits at once");
        }
        let bits = self.granted.view.bitmap_bits(&name, range);
        bits.map_err(|e| failed(e, "Bitmap"))
    }
}

impl HostState {
    fn inside(&self, range: types::ByteRange) -> Result<ByteRange, Error> {
        let size = self.granted.view.size();
        match ByteRange::new(range.offset, range.len) {
            Some(range) if range.end() <= size => Ok(range),
            _ => refuse(Errno::Einval, "The range is not inside the node"),
        }
    }
}

fn failed(e: outport_block::Errno, what: &str) -> Error {
    Error {
        code: e.into(),
        message: format!("{what}: {e}"),
    }
}
