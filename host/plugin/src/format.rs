//! [`WasmFormat`]: `block::format::Format` over one instance.
//!
//! Runs on the iothread whose request missed; one call at a time. Invariants:
//! a call that did not return `ok` leaves nothing queued, and after a fault
//! every later call answers with a fault until the node makes a new instance.

mod bitmaps;

use std::sync::Arc;

use outport_block::format::{
    Call, CheckReport, Child, DiscardKind, Extent, Fault, FaultKind, Format, FormatError,
    FormatFuture, Geometry, Grant, KeptBitmap, Placement, Repair, SlotRange, Stretch, WriteIntent,
};
use outport_block::{ByteRange, Errno};

use crate::bindings::{Malformed, convert, types};
use crate::counters::CallKind;
use crate::fault;
use crate::live::{Live, run};
use crate::plugin::Plugin;
use crate::store::Queueing;
use crate::world::Formats;

/// One image, opened by one instance of a plugin.
#[derive(Debug)]
pub struct WasmFormat {
    plugin: Arc<Plugin<Formats>>,
    /// None: a call runs, or the instance is gone.
    live: Option<Box<Live<Formats>>>,
    /// Why it is gone.
    gone: Option<Fault>,
    /// Whether calls that may queue writes may do so now.
    queueing: Queueing,
}

/// What wasmtime returns for a call of the contract.
type Answer<T> = wasmtime::Result<Result<T, types::Error>>;

impl WasmFormat {
    pub(crate) fn new(live: Box<Live<Formats>>) -> Self {
        let plugin = Arc::clone(&live.plugin);
        Self {
            plugin,
            live: Some(live),
            gone: None,
            queueing: Queueing::ReadOnly,
        }
    }

    /// The instance, for the time of one call.
    fn take(&mut self) -> Result<Box<Live<Formats>>, FormatError> {
        self.live.take().ok_or_else(|| {
            FormatError::Fault(match &self.gone {
                Some(fault) => Fault {
                    kind: fault.kind,
                    message: format!("The instance is gone after: {}", fault.message),
                },
                None => Fault {
                    kind: FaultKind::Trap,
                    message: "The instance is gone: a call was dropped before it returned".into(),
                },
            })
        })
    }

    /// The end of a call: the answer is checked, then the instance is kept.
    fn settle<T, U>(
        &mut self,
        mut live: Box<Live<Formats>>,
        kind: CallKind,
        answer: Answer<T>,
        check: impl FnOnce(T) -> Result<U, Malformed>,
    ) -> Result<Call<U>, FormatError> {
        let error = match answer {
            Ok(Ok(value)) => match check(value) {
                Ok(value) => {
                    let txn = std::mem::take(&mut live.store.data_mut().call.txn);
                    self.live = Some(live);
                    return Ok(Call { value, txn });
                }
                Err(what) => fault::malformed(kind.word(), what),
            },
            Ok(Err(e)) => {
                live.store.data_mut().call.txn = Vec::new();
                self.live = Some(live);
                return Err(convert::refused(e));
            }
            Err(e) => fault::failed(kind.word(), &e, live.store.data()),
        };
        self.gone = Some(match &error {
            FormatError::Fault(fault) => fault.clone(),
            refused @ FormatError::Refused { .. } => Fault {
                kind: FaultKind::Memory,
                message: refused.to_string(),
            },
        });
        Err(error)
    }

    fn read_only<T>(&self) -> Result<T, FormatError> {
        let message = format!("Format '{}' cannot write images", self.plugin.about.name);
        Err(FormatError::Refused {
            code: Errno::RoFs,
            message,
        })
    }
}

/// The writer of `live`, or the end of the call: a format without one never
/// takes its instance that far.
macro_rules! writer {
    ($self:ident) => {{
        if $self.plugin.exports.writer.is_none() {
            return $self.read_only();
        }
        $self.take()?
    }};
    ($self:ident, $live:ident) => {
        match &$live.guests.writer {
            Some(writer) => writer,
            None => return $self.read_only(),
        }
    };
}

impl Format for WasmFormat {
    fn open<'a>(&'a mut self, options: &'a str, writable: bool) -> FormatFuture<'a, Vec<Child>> {
        Box::pin(async move {
            if writable && self.plugin.exports.writer.is_none() {
                return self.read_only();
            }
            let options = if options.is_empty() { "{}" } else { options };
            self.plugin.about.check_options(options)?;
            self.queueing = if writable {
                Queueing::Allowed
            } else {
                Queueing::ReadOnly
            };
            let mut live = self.take()?;
            let reader = &live.guests.reader;
            let answer = run!(
                live,
                Open,
                Queueing::NotNow,
                reader,
                call_open(options, writable)
            );
            Ok(self
                .settle(live, CallKind::Open, answer, convert::children)?
                .value)
        })
    }

    fn activate(&mut self, grants: Vec<Grant>) -> FormatFuture<'_, Call<Geometry>> {
        Box::pin(async move {
            let grants = convert::to_grants(grants);
            let mut live = self.take()?;
            let reader = &live.guests.reader;
            let answer = run!(
                live,
                Activate,
                self.queueing,
                reader,
                call_activate(&grants)
            );
            self.settle(live, CallKind::Activate, answer, convert::geometry)
        })
    }

    fn resolve(&mut self, range: ByteRange) -> FormatFuture<'_, Vec<Extent>> {
        Box::pin(async move {
            let range = convert::to_range(range);
            let mut live = self.take()?;
            let reader = &live.guests.reader;
            let answer = run!(live, Resolve, Queueing::NotNow, reader, call_resolve(range));
            Ok(self
                .settle(live, CallKind::Resolve, answer, convert::extents)?
                .value)
        })
    }

    fn read_special(&mut self, id: u64, range: ByteRange) -> FormatFuture<'_, Vec<u8>> {
        Box::pin(async move {
            let asked = convert::to_range(range);
            let mut live = self.take()?;
            let reader = &live.guests.reader;
            let answer = run!(
                live,
                ReadSpecial,
                Queueing::NotNow,
                reader,
                call_read_special(id, asked)
            );
            let check = |bytes| convert::special(bytes, range);
            Ok(self
                .settle(live, CallKind::ReadSpecial, answer, check)?
                .value)
        })
    }

    fn facts(&mut self) -> FormatFuture<'_, String> {
        Box::pin(async move {
            let mut live = self.take()?;
            let reader = &live.guests.reader;
            let answer = run!(live, Info, Queueing::NotNow, reader, call_info());
            Ok(self
                .settle(live, CallKind::Info, answer, convert::json)?
                .value)
        })
    }

    fn prepare_write(
        &mut self,
        intents: Vec<WriteIntent>,
    ) -> FormatFuture<'_, Call<Vec<Placement>>> {
        Box::pin(async move {
            let count = intents.len();
            let intents = convert::to_intents(intents);
            let mut live = writer!(self);
            let writer = writer!(self, live);
            let answer = run!(
                live,
                PrepareWrite,
                self.queueing,
                writer,
                call_prepare_write(&intents)
            );
            let check = |list| convert::placements(list, count);
            self.settle(live, CallKind::PrepareWrite, answer, check)
        })
    }

    fn commit_write(&mut self, tokens: Vec<u64>) -> FormatFuture<'_, Call<Vec<Extent>>> {
        Box::pin(async move {
            let mut live = writer!(self);
            let writer = writer!(self, live);
            let answer = run!(
                live,
                CommitWrite,
                self.queueing,
                writer,
                call_commit_write(&tokens)
            );
            self.settle(live, CallKind::CommitWrite, answer, convert::extents)
        })
    }

    fn abort_write(&mut self, tokens: Vec<u64>) -> FormatFuture<'_, Call<()>> {
        Box::pin(async move {
            let mut live = writer!(self);
            let writer = writer!(self, live);
            let answer = run!(
                live,
                AbortWrite,
                self.queueing,
                writer,
                call_abort_write(&tokens)
            );
            self.settle(live, CallKind::AbortWrite, answer, Ok)
        })
    }

    fn discard(
        &mut self,
        range: ByteRange,
        kind: DiscardKind,
    ) -> FormatFuture<'_, Call<Vec<Extent>>> {
        Box::pin(async move {
            let (range, kind) = (convert::to_range(range), convert::to_discard(kind));
            let mut live = writer!(self);
            let writer = writer!(self, live);
            let answer = run!(
                live,
                Discard,
                self.queueing,
                writer,
                call_discard(range, kind)
            );
            self.settle(live, CallKind::Discard, answer, convert::extents)
        })
    }

    fn reclaim(&mut self, freed: Vec<SlotRange>) -> FormatFuture<'_, Call<()>> {
        Box::pin(async move {
            let freed = convert::to_freed(freed);
            let mut live = writer!(self);
            let writer = writer!(self, live);
            let answer = run!(live, Reclaim, self.queueing, writer, call_reclaim(&freed));
            self.settle(live, CallKind::Reclaim, answer, Ok)
        })
    }

    fn flush(&mut self) -> FormatFuture<'_, Call<()>> {
        Box::pin(async move {
            if self.plugin.exports.writer.is_none() {
                return Ok(Call {
                    value: (),
                    txn: Vec::new(),
                });
            }
            let mut live = self.take()?;
            let writer = writer!(self, live);
            let answer = run!(live, Flush, self.queueing, writer, call_flush());
            self.settle(live, CallKind::Flush, answer, Ok)
        })
    }

    fn resize(&mut self, size: u64) -> FormatFuture<'_, Call<Geometry>> {
        Box::pin(async move {
            let mut live = writer!(self);
            let writer = writer!(self, live);
            let answer = run!(live, Resize, self.queueing, writer, call_resize(size));
            self.settle(live, CallKind::Resize, answer, convert::geometry)
        })
    }

    fn check(
        &mut self,
        fix: Repair,
        cursor: u64,
    ) -> FormatFuture<'_, Call<(CheckReport, Option<u64>)>> {
        Box::pin(async move {
            if self.plugin.exports.writer.is_none() {
                // QEMU's words for `bdrv_check` of a format without one.
                let message = "This image format does not support checks".to_owned();
                return Err(FormatError::Refused {
                    code: Errno::NotSup,
                    message,
                });
            }
            let fix = convert::to_repair(fix);
            let mut live = self.take()?;
            let writer = writer!(self, live);
            let answer = run!(live, Check, self.queueing, writer, call_check(fix, cursor));
            let check = |(report, next)| Ok((convert::report(report), next));
            self.settle(live, CallKind::Check, answer, check)
        })
    }

    fn close(&mut self) -> FormatFuture<'_, Call<()>> {
        Box::pin(async move {
            if self.plugin.exports.writer.is_none() {
                return Ok(Call {
                    value: (),
                    txn: Vec::new(),
                });
            }
            let mut live = self.take()?;
            let writer = writer!(self, live);
            let answer = run!(live, Close, self.queueing, writer, call_close());
            self.settle(live, CallKind::Close, answer, Ok)
        })
    }

    fn create<'a>(&'a mut self, options: &'a str) -> FormatFuture<'a, Call<()>> {
        Box::pin(async move {
            let mut live = self.take()?;
            let Some(creator) = &live.guests.creator else {
                self.live = Some(live);
                let message = format!("Format '{}' cannot make images", self.plugin.about.name);
                return Err(FormatError::Refused {
                    code: Errno::NotSup,
                    message,
                });
            };
            let answer = run!(
                live,
                Create,
                Queueing::Allowed,
                creator,
                call_create(options)
            );
            self.settle(live, CallKind::Create, answer, Ok)
        })
    }

    fn take_over(&mut self) -> FormatFuture<'_, ()> {
        Box::pin(async move {
            let mut live = self.take()?;
            let Some(guest) = &live.guests.takeover else {
                self.live = Some(live);
                return Ok(());
            };
            let answer = run!(live, TakeOver, Queueing::NotNow, guest, call_take_over());
            self.settle(live, CallKind::TakeOver, answer, Ok)?;
            Ok(())
        })
    }

    fn keeps_bitmaps(&self) -> bool {
        self.plugin.exports.bitmaps.is_some()
    }

    fn list_bitmaps(&mut self, first: u32) -> FormatFuture<'_, Vec<KeptBitmap>> {
        Box::pin(self.listed_bitmaps(first))
    }

    fn read_bits(&mut self, name: String, from: u64) -> FormatFuture<'_, Option<Stretch>> {
        Box::pin(self.stored_bits(name, from))
    }

    fn check_bitmap(&mut self, bitmap: KeptBitmap, kept: Vec<String>) -> FormatFuture<'_, ()> {
        Box::pin(self.checked_bitmap(bitmap, kept))
    }

    fn store_bits(&mut self, bitmap: KeptBitmap, bits: Stretch) -> FormatFuture<'_, Call<()>> {
        Box::pin(self.put_bits_away(bitmap, bits))
    }

    fn keep_bitmaps(&mut self, bitmaps: Vec<KeptBitmap>) -> FormatFuture<'_, Call<bool>> {
        Box::pin(self.kept_bitmaps(bitmaps))
    }
}
