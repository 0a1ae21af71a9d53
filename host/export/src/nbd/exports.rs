//! What the haggling has to know of exports, and who tells it.
//!
//! The caller owns the exports; the protocol core sees values. An [`ExportInfo`] is made when a
//! client names an export (after authorization, which may have narrowed it) and then belongs to
//! that client's session. Invariant: block sizes are put in order before they are told.

use super::limits::{PAYLOAD_DEFAULT, SWALLOW_MAX};
use super::wire::TransmissionFlags;
use bitflags::bitflags;

bitflags! {
    /// What an export can do for this client.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct ExportFlags: u16 {
        /// Writes are allowed.
        const WRITABLE = 1 << 0;
        /// FLUSH and FUA on one connection cover completed writes of all.
        const MULTI_CONN = 1 << 1;
        /// Seeks are expensive.
        const ROTATIONAL = 1 << 2;
        /// Discards reach the storage.
        const TRIM = 1 << 3;
        /// Ranges can be zeroed without payload.
        const WRITE_ZEROES = 1 << 4;
        /// The export can tell whether zeroing is faster than writing.
        const FAST_ZERO = 1 << 5;
        /// Prefetch is understood.
        const CACHE = 1 << 6;
    }
}

/// The three sizes of `NBD_INFO_BLOCK_SIZE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Requests must be multiples of this: a power of two up to 65536.
    pub minimum: u32,
    /// Requests run best as multiples of this: a power of two.
    pub preferred: u32,
    /// Largest payload of a read or write; `u32::MAX` claims no limit and is cut to our own.
    pub payload_max: u32,
}

impl Default for BlockSizes {
    fn default() -> BlockSizes {
        BlockSizes {
            minimum: 1,
            preferred: 4096,
            payload_max: PAYLOAD_DEFAULT,
        }
    }
}

impl BlockSizes {
    /// The nearest sizes that obey the protocol ("Block size constraints").
    #[must_use]
    pub fn in_order(self) -> BlockSizes {
        let minimum = self.minimum.clamp(1, 0x1_0000).next_power_of_two();
        let preferred = self
            .preferred
            .clamp(minimum.max(512), PAYLOAD_DEFAULT)
            .next_power_of_two();
        // A multiple of the minimum, so that a client can really use the maximum.
        let ours = u32::try_from(SWALLOW_MAX).unwrap_or(PAYLOAD_DEFAULT);
        let payload_max = self.payload_max.clamp(preferred, ours) / minimum * minimum;
        BlockSizes {
            minimum,
            preferred,
            payload_max,
        }
    }
}

/// One metadata context that an export can report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextInfo {
    /// `namespace:leaf`, such as `base:allocation` or `qemu:dirty-bitmap:b0`.
    pub name: String,
    /// Its id on the wire, unique within the export; 0 is `base:allocation`.
    pub id: u32,
    /// Its flags need 64 bits, so only clients with extended headers may have it.
    pub wide: bool,
}

/// One export, as this client gets to see it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExportInfo {
    /// Its canonical name, which may differ from the one that the client used.
    pub name: String,
    /// For humans; empty for none.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// What it can do.
    pub flags: ExportFlags,
    /// How requests should be cut.
    pub block_sizes: BlockSizes,
    /// The export cannot serve requests below its minimum block size: clients which do not ask
    /// for block sizes are refused, and unaligned requests too.
    pub block_size_required: bool,
    /// With TLS by choice, this export is only for clients that chose it.
    pub tls_only: bool,
    /// Contexts on offer.
    pub contexts: Vec<ContextInfo>,
}

impl ExportInfo {
    /// The flags that hold whatever the client negotiated.
    #[must_use]
    pub fn transmission_flags(&self) -> TransmissionFlags {
        use TransmissionFlags as T;
        let mut flags = T::HAS_FLAGS | T::SEND_FLUSH | T::SEND_FUA;
        let has = |flag| self.flags.contains(flag);
        flags.set(T::CAN_MULTI_CONN, has(ExportFlags::MULTI_CONN));
        flags.set(T::ROTATIONAL, has(ExportFlags::ROTATIONAL));
        flags.set(T::SEND_CACHE, has(ExportFlags::CACHE));
        let writable = has(ExportFlags::WRITABLE);
        let zeroes = writable && has(ExportFlags::WRITE_ZEROES);
        flags.set(T::READ_ONLY, !writable);
        flags.set(T::SEND_TRIM, writable && has(ExportFlags::TRIM));
        flags.set(T::SEND_WRITE_ZEROES, zeroes);
        // "MUST be clear if NBD_FLAG_SEND_WRITE_ZEROES is clear".
        flags.set(T::SEND_FAST_ZERO, zeroes && has(ExportFlags::FAST_ZERO));
        flags
    }
}

/// Why an export is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// `NBD_OPT_INFO`: the client looks.
    Info,
    /// `NBD_OPT_GO`: the client enters, and can be told why not.
    Go,
    /// `NBD_OPT_EXPORT_NAME`: the client enters, and can only be cut off.
    ExportName,
    /// `NBD_OPT_LIST_META_CONTEXT`: the client asks what contexts there are.
    ListContexts,
    /// `NBD_OPT_SET_META_CONTEXT`: the client selects contexts.
    SetContexts,
}

/// The answer to a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// This client may use it, in this way.
    Found(Box<ExportInfo>),
    /// There is none of that name, or the client is not to know.
    Unknown,
    /// There is one, and this client may not use it; the text is for its human.
    Denied(String),
    /// The server is going away.
    ShuttingDown,
}

/// A source of exports that can answer at once; [`super::haggle::Haggle::drive`] uses it.
pub trait Exports {
    /// The export of this name; the empty name is the default export.
    fn find(&self, name: &str) -> Option<ExportInfo>;
    /// Visits every export that this client may know of.
    fn list(&self, visit: &mut dyn FnMut(&ExportInfo));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_are_told_in_order() {
        let told = |minimum, preferred, payload_max| {
            let sizes = BlockSizes {
                minimum,
                preferred,
                payload_max,
            }
            .in_order();
            (sizes.minimum, sizes.preferred, sizes.payload_max)
        };
        assert_eq!(told(1, 4096, PAYLOAD_DEFAULT), (1, 4096, PAYLOAD_DEFAULT));
        assert_eq!(told(0, 0, 0), (1, 512, 512));
        assert_eq!(told(4096, 512, 1 << 20), (4096, 4096, 1 << 20));
        assert_eq!(told(3, 5000, u32::MAX), (4, 8192, 256 << 20));
        assert_eq!(
            told(u32::MAX, u32::MAX, 7),
            (65536, PAYLOAD_DEFAULT, PAYLOAD_DEFAULT)
        );
    }

    #[test]
    fn read_only_exports_offer_no_write_class_command() {
        use TransmissionFlags as T;
        let export = ExportInfo {
            flags: !ExportFlags::WRITABLE,
            ..ExportInfo::default()
        };
        let flags = export.transmission_flags();
        assert!(flags.contains(T::READ_ONLY));
        assert!(!flags.intersects(T::SEND_TRIM | T::SEND_WRITE_ZEROES | T::SEND_FAST_ZERO));
        assert!(!flags.intersects(T::SEND_DF | T::BLOCK_STATUS_PAYLOAD));
    }

    #[test]
    fn fast_zero_is_not_offered_without_write_zeroes() {
        let flags = ExportFlags::WRITABLE | ExportFlags::FAST_ZERO;
        let export = ExportInfo {
            flags,
            ..ExportInfo::default()
        };
        assert!(
            !export
                .transmission_flags()
                .contains(TransmissionFlags::SEND_FAST_ZERO)
        );
    }
}
