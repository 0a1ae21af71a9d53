//! Making new images: creation options, layout, and what `measure` answers.
//!
//! A new image is laid out without a gap:
//!
//! ```text
//! header | refcount table | refcount blocks | L1 | L2 tables ... | data ...
//!                                                `-- preallocation --'
//! ```
//!
//! Everything but the header is queued in stage `prepare`, the header alone in
//! stage `mapping`: until all tables are durable the file has no magic number,
//! so a creation that was cut short is no image at all.
//!
//! Invariant: what is queued stays below [`QUEUED_BYTES_MAX`]; runs of zeroes
//! are ranges and cost nothing.

mod header;
mod layout;
mod options;

use outport_sdk::{ByteRange, Errno, Error, Measurement, Result, Stage, Txn};

use self::layout::Layout;
use self::options::{Options, Preallocation};
use crate::refcount;
use crate::table::COPIED;

/// Table bytes that one creation may queue. Preallocated tables take 8 bytes a
/// cluster and wait in the host's memory until the call returns; this is enough
/// for 1 TiB in clusters of 64 KiB.
const QUEUED_BYTES_MAX: u64 = 192 << 20;

/// Bytes handed over at a time: half of what one `write` may carry.
const CHUNK_LEN: usize = 1 << 20;

/// Slot of the image file, and of the external data file if there is one.
const IMAGE: u32 = 0;
const DATA_FILE: u32 = 1;

/// JSON Schema of the creation options: QEMU's `BlockdevCreateOptionsQcow2`,
/// without the members that name nodes (`driver`, `file`), and with `data-file`
/// as the name to store in the header.
pub(crate) fn create_schema() -> &'static str {
    options::SCHEMA
}

/// How large a new image would be, as `qemu-img measure` has it.
pub(crate) fn measure(options: &str) -> Result<Measurement> {
    let options = Options::parse(options)?;
    let full = Layout::measured(&options)?;
    let required = match options.preallocation {
        Preallocation::Falloc | Preallocation::Full => full.len()?,
        Preallocation::Off | Preallocation::Metadata => full.metadata_len()?,
    };
    Ok(Measurement {
        required,
        fully_allocated: full.len()?,
    })
}

/// Queue a new image in slot 0 (and the length of the data file in slot 1).
pub(crate) fn create(txn: &mut dyn Txn, options: &str) -> Result<()> {
    let options = Options::parse(options)?;
    options.validate_for_creation()?;
    let layout = Layout::created(&options)?;
    if layout.queued_len()? > QUEUED_BYTES_MAX {
        return Err(Error::new(
            Errno::Efbig,
            format!(
                "Preallocating the metadata of this image takes {} MiB of tables in one \
                 transaction, and {} MiB are allowed: use a larger cluster size or \
                 preallocation=off",
                layout.queued_len()? >> 20,
                QUEUED_BYTES_MAX >> 20
            ),
        ));
    }
    let header = header::encode(&options, &layout)?;

    // A block device, or a file that was not emptied, still holds old bytes.
    let stale = txn.size(IMAGE)?;
    if stale > 0 {
        txn.zero(
            IMAGE,
            Stage::Prepare,
            ByteRange::new(0, layout.cluster_size),
        )?;
    }
    txn.grow(IMAGE, layout.len()?)?;
    queue_refcounts(txn, &layout)?;
    queue_mapping(txn, &layout)?;
    queue_data(txn, &options, &layout, stale)?;
    txn.write(IMAGE, Stage::Mapping, 0, &header)
}

/// The refcount table, and blocks that count every cluster of the layout once.
fn queue_refcounts(txn: &mut dyn Txn, layout: &Layout) -> Result<()> {
    let table = layout.refcount_table;
    let blocks = layout.refcount_blocks;
    let pointers = (0..blocks.clusters).map(|i| blocks.cluster_offset(layout, i));
    queue_words(txn, layout, table.offset(layout)?, table.clusters, pointers)?;

    let per_block = layout.refcount_entries();
    for index in 0..blocks.clusters {
        let offset = blocks.cluster_offset(layout, index)?;
        let counted = layout
            .clusters()?
            .saturating_sub(index.saturating_mul(per_block));
        let mut block = vec![0; usize_of(layout.cluster_size)?];
        for entry in 0..usize_of(counted.min(per_block))? {
            refcount::set(&mut block, entry, layout.refcount_order, 1);
        }
        txn.write(IMAGE, Stage::Prepare, offset, &block)?;
    }
    Ok(())
}

/// The L1 table, and with preallocation the L2 tables.
fn queue_mapping(txn: &mut dyn Txn, layout: &Layout) -> Result<()> {
    let (l1, l2) = (layout.l1_table, layout.l2_tables);
    if l2.clusters == 0 {
        return match l1.range(layout)? {
            range if range.len > 0 => txn.zero(IMAGE, Stage::Prepare, range),
            _ => Ok(()),
        };
    }
    let tables = (0..l2.clusters).map(|i| Ok(l2.cluster_offset(layout, i)? | COPIED));
    queue_words(txn, layout, l1.offset(layout)?, l1.clusters, tables)?;

    // With a data file a guest cluster lies at its own offset; in an image with
    // subclusters none of them is allocated yet: only the space is.
    let data = layout.data;
    let entries = (0..layout.guest_clusters).flat_map(|i| {
        let offset = match layout.external_data {
            true => i
                .checked_mul(layout.cluster_size)
                .ok_or_else(layout::too_large),
            false => data.cluster_offset(layout, i),
        };
        let bitmap = layout.extended_l2.then_some(Ok(0));
        std::iter::once(offset.map(|offset| offset | COPIED)).chain(bitmap)
    });
    queue_words(txn, layout, l2.offset(layout)?, l2.clusters, entries)
}

/// What guest data the layout preallocates.
fn queue_data(txn: &mut dyn Txn, options: &Options, layout: &Layout, stale: u64) -> Result<()> {
    let allocate = matches!(
        options.preallocation,
        Preallocation::Falloc | Preallocation::Full
    );
    if layout.external_data {
        // What is mapped is whole: the last cluster, or the last subcluster.
        let unit = match layout.l2_tables.clusters {
            0 => 1,
            _ if layout.extended_l2 => layout.cluster_size / 32,
            _ => layout.cluster_size,
        };
        let len = options
            .size
            .checked_next_multiple_of(unit)
            .ok_or_else(layout::too_large)?;
        txn.grow(DATA_FILE, len)?;
        if allocate && len > 0 {
            txn.zero(DATA_FILE, Stage::Prepare, ByteRange::new(0, len))?;
        }
        return Ok(());
    }
    let range = layout.data.range(layout)?;
    if range.len > 0 && (allocate || stale > range.offset) {
        txn.zero(IMAGE, Stage::Prepare, range)?;
    }
    Ok(())
}

/// Queue big-endian words from `offset`, and zeroes up to `clusters` clusters.
fn queue_words(
    txn: &mut dyn Txn,
    layout: &Layout,
    offset: u64,
    clusters: u64,
    words: impl Iterator<Item = Result<u64>>,
) -> Result<()> {
    let end = ByteRange::new(offset, layout.bytes(clusters)?).end();
    let mut at = offset;
    let mut chunk = Vec::with_capacity(CHUNK_LEN.min(usize_of(end - offset)?));
    for word in words {
        chunk.extend_from_slice(&word?.to_be_bytes());
        if chunk.len() >= CHUNK_LEN {
            txn.write(IMAGE, Stage::Prepare, at, &chunk)?;
            at = at.saturating_add(chunk.len() as u64);
            chunk.clear();
        }
    }
    if !chunk.is_empty() {
        txn.write(IMAGE, Stage::Prepare, at, &chunk)?;
        at = at.saturating_add(chunk.len() as u64);
    }
    match end.checked_sub(at) {
        None | Some(0) => Ok(()),
        Some(rest) => txn.zero(IMAGE, Stage::Prepare, ByteRange::new(at, rest)),
    }
}

fn usize_of(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| layout::too_large())
}
