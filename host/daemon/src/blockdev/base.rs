//! The options that all drivers have, with their defaults and what children inherit.

use outport_qmp::Error;
use outport_qmp::types::block_core::{
    BlockdevDetectZeroesOptions, BlockdevDiscardOptions, BlockdevOptions,
};

/// What an inline child takes from its parent where it says nothing itself.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Inherited {
    pub(crate) read_only: bool,
    pub(crate) auto_read_only: bool,
    pub(crate) direct: bool,
    pub(crate) no_flush: bool,
    pub(crate) force_share: bool,
    /// Formats decide for themselves what is freed, so their files obey.
    pub(crate) unmap: bool,
    /// Somebody else has the image for now. Backing nodes take it over, files do not.
    pub(crate) inactive: bool,
}

/// The options of one node.
#[derive(Clone, Copy, Debug)]
pub(super) struct Common {
    pub(super) read_only: bool,
    pub(super) auto_read_only: bool,
    pub(super) direct: bool,
    pub(super) no_flush: bool,
    pub(super) force_share: bool,
    pub(super) unmap: bool,
    pub(super) active: bool,
    /// What the parent said, without the node's own options.
    inherited_inactive: bool,
    pub(super) detect_zeroes: BlockdevDetectZeroesOptions,
}

impl Common {
    /// # Errors
    /// Options that contradict each other, or that are not served.
    pub(super) fn of(options: &BlockdevOptions, inherited: &Inherited) -> Result<Self, Error> {
        let cache = options.cache.clone().unwrap_or_default();
        let common = Self {
            read_only: options.read_only.unwrap_or(inherited.read_only),
            auto_read_only: options.auto_read_only.unwrap_or(inherited.auto_read_only),
            direct: cache.direct.unwrap_or(inherited.direct),
            no_flush: cache.no_flush.unwrap_or(inherited.no_flush),
            force_share: options.force_share.unwrap_or(inherited.force_share),
            unmap: match options.discard {
                Some(discard) => discard == BlockdevDiscardOptions::Unmap,
                None => inherited.unmap,
            },
            active: options.active.unwrap_or(!inherited.inactive),
            inherited_inactive: inherited.inactive,
            detect_zeroes: options
                .detect_zeroes
                .unwrap_or(BlockdevDetectZeroesOptions::Off),
        };
        if common.detect_zeroes == BlockdevDetectZeroesOptions::Unmap && !common.unmap {
            return Err(Error::generic(
                "setting detect-zeroes to unmap is not allowed without setting discard operation \
                 to unmap",
            ));
        }
        if common.force_share && !common.read_only {
            return Err(Error::generic(
                "force-share=on can only be used with read-only images",
            ));
        }
        Ok(common)
    }

    /// What the file of a format inherits.
    pub(super) fn for_storage(&self) -> Inherited {
        Inherited {
            unmap: true,
            ..self.for_filter()
        }
    }

    /// What the child of a `raw` node inherits.
    pub(super) fn for_filter(&self) -> Inherited {
        Inherited {
            read_only: self.read_only,
            auto_read_only: self.auto_read_only,
            direct: self.direct,
            no_flush: self.no_flush,
            force_share: self.force_share,
            unmap: self.unmap,
            inactive: self.inherited_inactive,
        }
    }

    /// What a backing node inherits: it is only read.
    pub(super) fn for_backing(&self) -> Inherited {
        Inherited {
            read_only: true,
            auto_read_only: false,
            unmap: false,
            inactive: !self.active,
            ..self.for_filter()
        }
    }
}
