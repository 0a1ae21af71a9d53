//! `blkdebug` nodes: limits, rules, and the file that may hold rules.

use outport_block::Errno;
use outport_block::filter::blkdebug::{Event, InjectError, IoType, Limits, SetState};
use outport_block::filter::{Blkdebug, Filter};
use outport_qmp::Error;
use outport_qmp::types::block_debug::{
    BlkdebugEvent, BlkdebugIOType, BlkdebugInjectErrorOptions, BlkdebugSetStateOptions,
    BlockPermission, BlockdevOptionsBlkdebug,
};

use super::base::Common;
use super::filters::filter_node;
use super::{Made, Opening, rules_file};
use crate::graph::{Permissions, Use};

/// Requests are not padded to more than this, nor are they longer.
const BYTES_MAX: u64 = i32::MAX as u64;

impl Opening<'_> {
    /// `blkdebug`.
    pub(super) async fn blkdebug(
        &mut self,
        name: &str,
        options: BlockdevOptionsBlkdebug,
        common: &Common,
    ) -> Result<Made, Error> {
        let mut set: Vec<_> = options.set_state.iter().flatten().map(set_state).collect();
        let mut inject: Vec<_> = options
            .inject_error
            .iter()
            .flatten()
            .map(inject_error)
            .collect();
        if let Some(path) = &options.config {
            // What the file says comes first.
            let (file_set, file_inject) =
                self.daemon.unless_it_ends(rules_file::read(path)).await??;
            set.splice(0..0, file_set);
            inject.splice(0..0, file_inject);
        }
        let purpose = Use::Debug {
            take: permissions(options.take_child_perms.as_deref()),
            unshare: permissions(options.unshare_child_perms.as_deref()),
        };
        let (inherited, image) = (common.for_filter(), options.image.clone());
        let child = self.child(name, "image", image, inherited, purpose).await?;
        let limits = limits(&options)?;
        let filter = Filter::Blkdebug(Blkdebug::new(child, limits, set, inject));
        Ok(filter_node(name, "blkdebug", filter, common).into())
    }
}

fn permissions(names: Option<&[BlockPermission]>) -> Permissions {
    let names = names.unwrap_or_default().iter();
    names.fold(Permissions::NONE, |all, one| {
        all.or(match one {
            BlockPermission::ConsistentRead => Permissions::CONSISTENT_READ,
            BlockPermission::Write => Permissions::WRITE,
            BlockPermission::WriteUnchanged => Permissions::WRITE_UNCHANGED,
            BlockPermission::Resize => Permissions::RESIZE,
        })
    })
}

/// The limits, in the order in which QEMU checks them.
fn limits(options: &BlockdevOptionsBlkdebug) -> Result<Limits, Error> {
    let align = match u64::try_from(options.align.unwrap_or(0)) {
        Ok(align) => align,
        Err(_) => {
            return Err(Error::generic(format!(
                "Value '{}' is out of range for parameter 'align'",
                options.align.unwrap_or(0)
            )));
        }
    };
    if align > 0 && (align >= BYTES_MAX || !align.is_power_of_two()) {
        return Err(Error::generic(format!(
            "Cannot meet constraints with align {align}"
        )));
    }
    let align_or = align.max(1);
    let check = |name: &str, value: Option<i32>, unit: u64| {
        let value = i64::from(value.unwrap_or(0));
        match u64::try_from(value) {
            Ok(bytes) if bytes < BYTES_MAX && bytes.is_multiple_of(unit) => Ok(bytes),
            Ok(_) => Err(Error::generic(format!(
                "Cannot meet constraints with {name} {value}"
            ))),
            Err(_) => Err(Error::generic(format!(
                "Value '{value}' is out of range for parameter '{name}'"
            ))),
        }
    };
    let max_transfer = check("max-transfer", options.max_transfer, align_or)?;
    let opt_write_zero = check("opt-write-zero", options.opt_write_zero, align_or)?;
    let unit = opt_write_zero.max(align_or);
    let max_write_zero = check("max-write-zero", options.max_write_zero, unit)?;
    let opt_discard = check("opt-discard", options.opt_discard, align_or)?;
    let unit = opt_discard.max(align_or);
    let max_discard = check("max-discard", options.max_discard, unit)?;
    Ok(Limits {
        align,
        max_transfer,
        opt_write_zero,
        max_write_zero,
        opt_discard,
        max_discard,
    })
}

/// The block layer knows all events by the names that the schema has for them.
fn event(event: BlkdebugEvent) -> Event {
    Event::named(event.as_str()).unwrap_or(Event::NONE)
}

fn set_state(rule: &BlkdebugSetStateOptions) -> SetState {
    SetState {
        event: event(rule.event),
        state: rule.state.unwrap_or(0),
        new_state: rule.new_state,
    }
}

fn inject_error(rule: &BlkdebugInjectErrorOptions) -> InjectError {
    InjectError {
        event: event(rule.event),
        state: rule.state.unwrap_or(0),
        iotype: rule.iotype.map(|iotype| match iotype {
            BlkdebugIOType::Read => IoType::Read,
            BlkdebugIOType::Write => IoType::Write,
            BlkdebugIOType::WriteZeroes => IoType::WriteZeroes,
            BlkdebugIOType::Discard => IoType::Discard,
            BlkdebugIOType::Flush => IoType::Flush,
            BlkdebugIOType::BlockStatus => IoType::BlockStatus,
        }),
        errno: rules_file::errno(rule.errno.unwrap_or(Errno::Io.raw().into())),
        // QEMU takes -1 for "any"; no request touches what is before the start.
        sector: match rule.sector {
            None | Some(-1) => None,
            Some(sector) => Some(u64::try_from(sector).unwrap_or(u64::MAX)),
        },
        once: rule.once.unwrap_or(false),
        immediately: rule.immediately.unwrap_or(false),
    }
}
