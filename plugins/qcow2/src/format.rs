//! The plugin contract, call by call.

use outport_sdk::{
    Bits, ByteRange, CheckReport, Child, CreatableFormat, DiscardKind, Errno, Error, Extent, Files,
    Format, Geometry, Grant, Info, KeepsBitmaps, KeptBitmap, Measurement, Placement, Repair,
    Result, SlotRange, Txn, WritableFormat, WriteIntent,
};

use crate::header::{Header, MAGIC};
use crate::image::Qcow2;
use crate::{check, create, options};

impl Format for Qcow2 {
    fn info() -> Info {
        Info {
            name: "qcow2",
            version: env!("CARGO_PKG_VERSION"),
            description: "QEMU's copy-on-write image format, versions 2 and 3",
            options_schema: options::SCHEMA,
        }
    }

    fn probe(head: &[u8], _size: u64) -> u8 {
        match head.first_chunk::<4>() {
            Some(magic) if u32::from_be_bytes(*magic) == MAGIC => {
                if Header::peek_cluster_bits(head).is_ok() {
                    100
                } else {
                    50
                }
            }
            _ => 0,
        }
    }

    fn open(files: &dyn Files, options: &str, writable: bool) -> Result<(Self, Vec<Child>)> {
        Self::open_image(files, options, writable)
    }

    fn activate(&mut self, files: &dyn Files, grants: &[Grant]) -> Result<Geometry> {
        self.settle_children(grants)?;
        self.refresh(files)?;
        Ok(self.geometry())
    }

    fn resolve(&mut self, files: &dyn Files, range: ByteRange) -> Result<Vec<Extent>> {
        self.resolve_range(files, range)
    }

    fn facts(&mut self, files: &dyn Files) -> Result<String> {
        self.refresh(files)?;
        self.facts_json(files)
    }
}

impl WritableFormat for Qcow2 {
    fn take_over(&mut self) -> Result<()> {
        self.takes_over = true;
        Ok(())
    }

    fn activate_writable(&mut self, txn: &mut dyn Txn, grants: &[Grant]) -> Result<Geometry> {
        self.settle_children(grants)?;
        self.change(txn, Self::prepare_for_writing)?;
        Ok(self.geometry())
    }

    fn prepare_write(
        &mut self,
        txn: &mut dyn Txn,
        intents: &[WriteIntent],
    ) -> Result<Vec<Placement>> {
        let first = self.next_token;
        let placements = self.change(txn, |image, txn| image.prepare(txn, intents));
        if placements.is_err() {
            self.forget_tokens_since(first);
        }
        placements
    }

    fn commit_write(&mut self, txn: &mut dyn Txn, tokens: &[u64]) -> Result<Vec<Extent>> {
        let extents = self.change(txn, |image, txn| image.commit(txn, tokens))?;
        self.forget_tokens(tokens);
        Ok(extents)
    }

    fn abort_write(&mut self, txn: &mut dyn Txn, tokens: &[u64]) -> Result<()> {
        self.change(txn, |image, txn| image.abort(txn, tokens))
    }

    fn discard(
        &mut self,
        txn: &mut dyn Txn,
        range: ByteRange,
        kind: DiscardKind,
    ) -> Result<Vec<Extent>> {
        self.change(txn, |image, txn| image.discard_range(txn, range, kind))
    }

    fn reclaim(&mut self, txn: &mut dyn Txn, freed: &[SlotRange]) -> Result<()> {
        self.change(txn, |image, txn| image.reclaim_ranges(txn, freed))
    }

    /// Nothing is held back: every call queues all it changes.
    fn flush(&mut self, _txn: &mut dyn Txn) -> Result<()> {
        Ok(())
    }

    fn resize(&mut self, txn: &mut dyn Txn, size: u64) -> Result<Geometry> {
        self.change(txn, |image, txn| image.resize_to(txn, size))
    }

    fn check(
        &mut self,
        txn: &mut dyn Txn,
        fix: Repair,
        cursor: u64,
    ) -> Result<(CheckReport, Option<u64>)> {
        if (fix.leaks || fix.errors) && !self.writable {
            return Err(Error::new(Errno::Erofs, "The image is open read-only"));
        }
        if !fix.leaks && !fix.errors {
            self.refresh(txn.files())?;
            return check::check_slice(self, txn, fix, cursor);
        }
        if !self.reservations.is_empty() || self.releases.are_under_way() {
            // What they count looks like a leak.
            return Err(Error::new(
                Errno::Ebusy,
                "The image cannot be repaired while writes are in flight; flush it first",
            ));
        }
        self.change(txn, |image, txn| {
            if cursor == 0 {
                image.former = Some(image.regions.clone());
            }
            let slice = check::check_slice(image, txn, fix, cursor)?;
            // Repairs go past our copies.
            if slice.1.is_none() {
                image.after_repair(txn)?;
            } else {
                image.invalidate();
            }
            Ok(slice)
        })
    }

    fn close(&mut self, txn: &mut dyn Txn) -> Result<()> {
        self.change(txn, Self::close_image)
    }
}

impl CreatableFormat for Qcow2 {
    fn create_schema() -> &'static str {
        create::create_schema()
    }

    fn measure(options: &str) -> Result<Measurement> {
        create::measure(options)
    }

    fn create(txn: &mut dyn Txn, options: &str) -> Result<()> {
        create::create(txn, options)
    }
}

impl KeepsBitmaps for Qcow2 {
    fn list_bitmaps(&mut self, files: &dyn Files, first: u32) -> Result<Vec<KeptBitmap>> {
        self.refresh(files)?;
        self.listed_bitmaps(files, first)
    }

    fn read_bits(&mut self, files: &dyn Files, name: &str, from: u64) -> Result<Option<Bits>> {
        self.refresh(files)?;
        self.stored_bits(files, name, from)
    }

    fn check_bitmap(
        &mut self,
        files: &dyn Files,
        bitmap: &KeptBitmap,
        kept: &[String],
    ) -> Result<()> {
        self.refresh(files)?;
        self.may_keep(bitmap, kept)
    }

    fn store_bits(&mut self, txn: &mut dyn Txn, bitmap: &KeptBitmap, bits: &Bits) -> Result<()> {
        let placed = self.change(txn, |image, txn| image.place_bits(txn, bitmap, bits))?;
        self.stage_bits(bitmap, bits, &placed);
        Ok(())
    }

    fn keep_bitmaps(&mut self, txn: &mut dyn Txn, bitmaps: &[KeptBitmap]) -> Result<bool> {
        self.bitmaps.forget_stored();
        let keeping = self.bitmaps.keeping.take();
        let keeping = self.change(txn, |image, txn| image.keep(txn, bitmaps, keeping))?;
        let done = keeping.is_none();
        self.bitmaps.keeping = keeping;
        if done {
            self.bitmaps.staged.clear();
        }
        Ok(done)
    }
}
