//! The calls about dirty bitmaps, of a format that keeps them in its images.

use outport_block::Errno;
use outport_block::format::{Call, FormatError, KeptBitmap, Stretch};

use super::WasmFormat;
use crate::bindings::bitmaps;
use crate::counters::CallKind;
use crate::live::run;
use crate::store::Queueing;

/// The guest's functions of `live`, or the end of the call, which never began.
macro_rules! guest {
    ($self:ident, $live:ident) => {
        match &$live.guests.bitmaps {
            Some(guest) => guest,
            None => {
                $self.live = Some($live);
                return $self.no_bitmaps();
            }
        }
    };
}

impl WasmFormat {
    fn no_bitmaps<T>(&self) -> Result<T, FormatError> {
        let name = &self.plugin.about.name;
        Err(FormatError::Refused {
            code: Errno::NotSup,
            message: format!("Images of format '{name}' keep no bitmaps"),
        })
    }

    pub(super) async fn listed_bitmaps(
        &mut self,
        first: u32,
    ) -> Result<Vec<KeptBitmap>, FormatError> {
        let mut live = self.take()?;
        let guest = guest!(self, live);
        let answer = run!(
            live,
            ListBitmaps,
            Queueing::NotNow,
            guest,
            call_list_bitmaps(first)
        );
        let settled = self.settle(live, CallKind::ListBitmaps, answer, bitmaps::listed);
        Ok(settled?.value)
    }

    pub(super) async fn stored_bits(
        &mut self,
        name: String,
        from: u64,
    ) -> Result<Option<Stretch>, FormatError> {
        let mut live = self.take()?;
        let guest = guest!(self, live);
        let answer = run!(
            live,
            ReadBits,
            Queueing::NotNow,
            guest,
            call_read_bits(&name, from)
        );
        let check = |bits| bitmaps::stretch(bits, from);
        Ok(self.settle(live, CallKind::ReadBits, answer, check)?.value)
    }

    pub(super) async fn checked_bitmap(
        &mut self,
        bitmap: KeptBitmap,
        kept: Vec<String>,
    ) -> Result<(), FormatError> {
        let bitmap = bitmaps::to_bitmap(bitmap);
        let mut live = self.take()?;
        let guest = guest!(self, live);
        let answer = run!(
            live,
            CheckBitmap,
            Queueing::NotNow,
            guest,
            call_check_bitmap(&bitmap, &kept)
        );
        self.settle(live, CallKind::CheckBitmap, answer, Ok)?;
        Ok(())
    }

    pub(super) async fn put_bits_away(
        &mut self,
        bitmap: KeptBitmap,
        bits: Stretch,
    ) -> Result<Call<()>, FormatError> {
        let (bitmap, bits) = (bitmaps::to_bitmap(bitmap), bitmaps::to_bits(bits));
        let mut live = self.take()?;
        let guest = guest!(self, live);
        let answer = run!(
            live,
            StoreBits,
            self.queueing,
            guest,
            call_store_bits(&bitmap, &bits)
        );
        self.settle(live, CallKind::StoreBits, answer, Ok)
    }

    pub(super) async fn kept_bitmaps(
        &mut self,
        kept: Vec<KeptBitmap>,
    ) -> Result<Call<bool>, FormatError> {
        let kept: Vec<_> = kept.into_iter().map(bitmaps::to_bitmap).collect();
        let mut live = self.take()?;
        let guest = guest!(self, live);
        let answer = run!(
            live,
            KeepBitmaps,
            self.queueing,
            guest,
            call_keep_bitmaps(&kept)
        );
        self.settle(live, CallKind::KeepBitmaps, answer, Ok)
    }
}
