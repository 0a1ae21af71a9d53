//! Every limit of a plugin, with its reason.
//!
//! Owned by nobody: constants, and [`Limits`], which is copied into each
//! instance when it is made. The operator may change the two fields that cost a
//! legitimate plugin something (memory and time); the rest is the same for all.

use std::time::Duration;

/// How often a running plugin is looked at. A plugin that spins keeps its
/// iothread for at most this long before the neighbours are served; 2 ms is
/// less than a disk seek, and 500 wake-ups a second (only while calls run) cost
/// less than half a percent of a core.
pub const TICK: Duration = Duration::from_millis(2);

/// The ticker goes to sleep after this many ticks without a running call:
/// waking it costs a system call, which a busy node must not pay per call.
pub const IDLE_TICKS: u32 = 50;

/// Linear memory of one instance. A qcow2 image at the size limits of QEMU has
/// 32 MiB of L1 table, 8 MiB of refcount table and 64 MiB of snapshot tables:
/// twice their sum, rounded up. Nothing is committed before it is touched. It
/// also bounds the one instruction that no tick can interrupt: a copy of all of
/// it takes some 30 ms.
pub const MEMORY_MAX: u64 = 256 << 20;

/// The least that `memory-max` may say: the stack and the static data of an
/// empty Rust plugin take more than 1 MiB.
pub const MEMORY_MAX_FLOOR: u64 = 2 << 20;

/// The most that `memory-max` may say: all that a 32-bit memory can be.
pub const MEMORY_MAX_CEILING: u64 = 4 << 30;

/// Time that one call may *run*. Waiting for the disk does not count. A resolve
/// takes microseconds and a slice of a check milliseconds; a second is a bug.
pub const CALL_TIME_MAX: Duration = Duration::from_secs(1);

/// Core instances in one component: the plugin, and the small adapters around it.
pub const INSTANCES_MAX: usize = 32;

/// Tables in one instance: one of the plugin, one per adapter.
pub const TABLES_MAX: usize = 32;

/// Entries of all function pointers of a plugin; large C programs have 20 000.
pub const TABLE_ELEMENTS_MAX: usize = 1 << 16;

/// Linear memories in one component: the plugin's, one of an adapter, and two of
/// the parts that other languages' runtimes bring (JavaScript's has three in
/// all). [`Limits::memory_max`] holds for their sum.
pub const MEMORIES_MAX: usize = 4;

/// Bytes that one crossing from a plugin to the host may carry, as the host
/// would store them: the largest queued write (2 MiB) and its frame, twice.
pub const CROSSING_BYTES_MAX: usize = 4 << 20;

/// One metadata read or one queued write (`host.wit`).
pub const TRANSFER_MAX: usize = 2 << 20;

/// Metadata that one call may read: all tables of the largest legal qcow2
/// image, with room for a refcount rebuild slice.
pub const READ_BYTES_PER_CALL_MAX: u64 = 256 << 20;

/// What a read is charged at least: bounds the number of reads per call (65 536)
/// by the same budget.
pub const READ_CHARGE_MIN: u64 = 4096;

/// Queued effects of one call. A batch of 128 allocating writes queues about
/// five each; the first slice of a creation some thousands.
pub const TXN_OPS_MAX: usize = 16_384;

/// Queued bytes of one call: they stay in the host's memory until the flush.
pub const TXN_BYTES_MAX: usize = 64 << 20;

/// Extents in one answer: an L2 table of 2 MiB clusters has 262 144 entries but
/// tells runs; one of 64 KiB clusters has 8192, twice that is enough for all.
pub const EXTENTS_MAX: usize = 16_384;

/// Placements in one answer: an intent seldom gets more than two, and a batch
/// holds at most as many intents as requests are in flight.
pub const PLACEMENTS_MAX: usize = 4096;

/// Children of one image: a VMDK may be split into that many extents of 2 GiB.
pub const CHILDREN_MAX: usize = 1024;

/// Strings that a plugin hands out as names (children, file references).
pub const NAME_BYTES_MAX: usize = 4096;

/// The name of a dirty bitmap: what QEMU and qcow2 allow.
pub const BITMAP_NAME_BYTES_MAX: usize = 1023;

/// One sentence of a plugin in an error, a log line or a check report.
pub const MESSAGE_BYTES_MAX: usize = 1024;

/// Lines of a check report that are kept.
pub const CHECK_MESSAGES_MAX: usize = 256;

/// The JSON of `info` and of a schema.
pub const JSON_BYTES_MAX: usize = 256 << 10;

/// Log lines that an instance may send at once, and gets back per second.
pub const LOG_BURST: u32 = 32;

/// See [`LOG_BURST`].
pub const LOG_LINES_PER_SECOND: u32 = 8;

/// Corruption reports of one call that are passed on.
pub const CORRUPTIONS_PER_CALL_MAX: u32 = 16;

/// One configuration file of a policy: a list of ten thousand identities with
/// room to grow.
pub const CONFIG_FILE_BYTES_MAX: usize = 1 << 20;

/// Configuration files that one call may read: each costs the control plane a
/// read of the file system.
pub const CONFIG_READS_PER_CALL_MAX: u32 = 16;

/// After its first fault a policy or a provider is not tried again for so long;
/// twice as long after each further one, up to [`BACK_OFF_MAX`].
pub const BACK_OFF_MIN: Duration = Duration::from_millis(100);

/// See [`BACK_OFF_MIN`]: a broken policy costs less than a thousandth of a core.
pub const BACK_OFF_MAX: Duration = Duration::from_secs(30);

/// Contexts that one provider may offer; a connection selects at most 64.
pub const CONTEXTS_MAX: usize = 256;

/// Spans in one answer of a provider, and runs that it may ask for at once.
pub const VIEW_RUNS_MAX: usize = 65_536;

/// A component file. The largest known (a JavaScript policy) has 12 MB.
pub const WASM_BYTES_MAX: u64 = 64 << 20;

/// Plugins that an operator may add.
pub const PLUGINS_MAX: usize = 256;

/// The bytes of the head of a file that `probe` may see.
pub const PROBE_BYTES_MAX: usize = 64 << 10;

/// The limits of one plugin that its operator can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Linear memory, in bytes (`memory-max`).
    pub memory_max: u64,
    /// Running time per call (`call-time-max-ms`); none: no deadline, but a
    /// long call still lets its neighbours run at each tick.
    pub call_time_max: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_max: MEMORY_MAX,
            call_time_max: Some(CALL_TIME_MAX),
        }
    }
}

impl Limits {
    /// Ticks that a call may run; none: for ever.
    #[must_use]
    pub fn call_ticks(&self) -> Option<u64> {
        // One more than fits: the first tick may come right after the start.
        let ticks = |d: Duration| d.as_nanos().div_ceil(TICK.as_nanos()).saturating_add(1);
        self.call_time_max
            .map(|d| u64::try_from(ticks(d)).unwrap_or(u64::MAX))
    }
}

/// Cut `text` at a character boundary so that it has at most `max` bytes, and
/// replace control characters: it goes into logs and replies.
#[must_use]
pub(crate) fn sentence(mut text: String, max: usize) -> String {
    if text.len() > max {
        text.truncate(text.floor_char_boundary(max));
        text.push_str("...");
    }
    if text.contains(char::is_control) {
        text = text.replace(char::is_control, " ");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_counted_in_whole_ticks() {
        let ticks = |ms| {
            Limits {
                call_time_max: Some(Duration::from_millis(ms)),
                ..Limits::default()
            }
            .call_ticks()
        };
        assert_eq!(ticks(0), Some(1));
        assert_eq!(ticks(1), Some(2));
        assert_eq!(ticks(10), Some(6));
        let endless = Limits {
            call_time_max: None,
            ..Limits::default()
        };
        assert_eq!(endless.call_ticks(), None);
    }

    #[test]
    fn a_sentence_is_cut_between_characters_and_holds_no_control() {
        assert_eq!(sentence("a\nb\x1b[31m".into(), 100), "a b [31m");
        assert_eq!(sentence("\u{e4}\u{e4}".into(), 3), "\u{e4}...");
    }
}
