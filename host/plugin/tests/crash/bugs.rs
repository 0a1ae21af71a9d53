//! Deliberate mistakes in the order of writes, which the crash images must show.

use std::sync::Arc;

use outport_block::ByteRange;
use outport_block::format::{
    Call, CheckReport, Child, DiscardKind, Extent, Fault, Format, FormatError, FormatFactory,
    FormatFiles, FormatFuture, Geometry, Grant, Placement, Repair, SlotRange, Stage, TxnOp,
    WriteIntent,
};
use outport_block::trace::Event;

/// The recording of a host that flushes once where it must flush twice: the last flush before
/// each mark stays.
pub(crate) fn without_first_barriers(events: &[Event]) -> Vec<Event> {
    let mut out = Vec::new();
    let mut covered = false;
    for event in events.iter().rev() {
        match event {
            Event::Mark(_) => covered = false,
            Event::Flushed(_) if covered => continue,
            Event::Flushed(_) => covered = true,
            _ => {}
        }
        out.push(event.clone());
    }
    out.reverse();
    out
}

/// The recording of a disk that forgets: no flush ever ends.
pub(crate) fn without_barriers(events: &[Event]) -> Vec<Event> {
    let ends = |event: &&Event| matches!(event, Event::Flushed(_));
    events.iter().filter(|e| !ends(e)).cloned().collect()
}

/// The same plugin, but all that it queues is of stage `prepare`.
pub(crate) fn maps_early(factory: Arc<dyn FormatFactory>) -> Arc<dyn FormatFactory> {
    Arc::new(Faulty(factory, Bug::Hasty))
}

/// The same plugin, but opening an image for writing leaves no marks on it, and nobody stores its
/// bitmaps.
pub(crate) fn marks_nothing(factory: Arc<dyn FormatFactory>) -> Arc<dyn FormatFactory> {
    Arc::new(Faulty(factory, Bug::Silent))
}

#[derive(Clone, Copy)]
enum Bug {
    Hasty,
    Silent,
}

struct Faulty(Arc<dyn FormatFactory>, Bug);

impl FormatFactory for Faulty {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn writable(&self) -> bool {
        self.0.writable()
    }

    fn instantiate(&self, files: Arc<dyn FormatFiles>) -> FormatFuture<'_, Box<dyn Format>> {
        Box::pin(async move {
            let format = self.0.instantiate(files).await?;
            Ok(Box::new(Spoiled(format, self.1)) as Box<dyn Format>)
        })
    }

    fn report_fault(&self, node_name: &str, fault: &Fault) {
        self.0.report_fault(node_name, fault);
    }
}

struct Spoiled(Box<dyn Format>, Bug);

/// What the call queued, too early.
fn early<'a, T: Send + 'a>(bug: Bug, call: FormatFuture<'a, Call<T>>) -> FormatFuture<'a, Call<T>> {
    Box::pin(async move {
        let mut call: Call<T> = call.await?;
        let hasty = matches!(bug, Bug::Hasty);
        for op in call.txn.iter_mut().filter(|_| hasty) {
            if let TxnOp::Write { stage, .. } | TxnOp::Zero { stage, .. } = op {
                *stage = Stage::Prepare;
            }
        }
        Ok::<_, FormatError>(call)
    })
}

impl Format for Spoiled {
    fn open<'a>(&'a mut self, options: &'a str, writable: bool) -> FormatFuture<'a, Vec<Child>> {
        self.0.open(options, writable)
    }

    fn activate(&mut self, grants: Vec<Grant>) -> FormatFuture<'_, Call<Geometry>> {
        match self.1 {
            Bug::Hasty => early(self.1, self.0.activate(grants)),
            Bug::Silent => Box::pin(async move {
                let mut call = self.0.activate(grants).await?;
                call.txn.clear();
                Ok(call)
            }),
        }
    }

    fn resolve(&mut self, range: ByteRange) -> FormatFuture<'_, Vec<Extent>> {
        self.0.resolve(range)
    }

    fn read_special(&mut self, id: u64, range: ByteRange) -> FormatFuture<'_, Vec<u8>> {
        self.0.read_special(id, range)
    }

    fn facts(&mut self) -> FormatFuture<'_, String> {
        self.0.facts()
    }

    fn prepare_write(
        &mut self,
        intents: Vec<WriteIntent>,
    ) -> FormatFuture<'_, Call<Vec<Placement>>> {
        early(self.1, self.0.prepare_write(intents))
    }

    fn commit_write(&mut self, tokens: Vec<u64>) -> FormatFuture<'_, Call<Vec<Extent>>> {
        early(self.1, self.0.commit_write(tokens))
    }

    fn abort_write(&mut self, tokens: Vec<u64>) -> FormatFuture<'_, Call<()>> {
        early(self.1, self.0.abort_write(tokens))
    }

    fn discard(
        &mut self,
        range: ByteRange,
        kind: DiscardKind,
    ) -> FormatFuture<'_, Call<Vec<Extent>>> {
        early(self.1, self.0.discard(range, kind))
    }

    fn reclaim(&mut self, freed: Vec<SlotRange>) -> FormatFuture<'_, Call<()>> {
        early(self.1, self.0.reclaim(freed))
    }

    fn flush(&mut self) -> FormatFuture<'_, Call<()>> {
        early(self.1, self.0.flush())
    }

    fn resize(&mut self, size: u64) -> FormatFuture<'_, Call<Geometry>> {
        early(self.1, self.0.resize(size))
    }

    fn check(
        &mut self,
        fix: Repair,
        cursor: u64,
    ) -> FormatFuture<'_, Call<(CheckReport, Option<u64>)>> {
        early(self.1, self.0.check(fix, cursor))
    }

    fn close(&mut self) -> FormatFuture<'_, Call<()>> {
        early(self.1, self.0.close())
    }

    fn create<'a>(&'a mut self, options: &'a str) -> FormatFuture<'a, Call<()>> {
        early(self.1, self.0.create(options))
    }
}
