//! The rules of a `blkdebug` node: a small state machine, without I/O.
//!
//! An event moves the state and arms rules; an armed rule fails the requests that fit it, until an
//! event arms others. Where several rules answer one event, the one that was given first wins.

use crate::{ByteRange, Errno};

/// Bytes of the sectors that rules name.
const SECTOR: u64 = 512;

/// The state that everything starts in.
const FIRST_STATE: i64 = 1;

/// A place in the life of a request, by QEMU's name (`BlkdebugEvent`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event(u8);

macro_rules! events {
    ($($NAME:ident = $name:literal),* $(,)?) => {
        #[allow(clippy::upper_case_acronyms, reason = "they become constants")]
        #[allow(non_camel_case_types, reason = "they become constants")]
        enum Index { $($NAME),* }

        /// QEMU names more places than this block layer has: those are accepted and never come.
        #[allow(missing_docs, reason = "the names are QEMU's")]
        impl Event {
            $(pub const $NAME: Self = Self(Index::$NAME as u8);)*

            /// All names, in QEMU's order.
            pub const NAMES: &'static [&'static str] = &[$($name),*];
        }
    };
}

events! {
    L1_UPDATE = "l1_update",
    L1_GROW_ALLOC_TABLE = "l1_grow_alloc_table",
    L1_GROW_WRITE_TABLE = "l1_grow_write_table",
    L1_GROW_ACTIVATE_TABLE = "l1_grow_activate_table",
    L2_LOAD = "l2_load",
    L2_UPDATE = "l2_update",
    L2_UPDATE_COMPRESSED = "l2_update_compressed",
    L2_ALLOC_COW_READ = "l2_alloc_cow_read",
    L2_ALLOC_WRITE = "l2_alloc_write",
    READ_AIO = "read_aio",
    READ_BACKING_AIO = "read_backing_aio",
    READ_COMPRESSED = "read_compressed",
    WRITE_AIO = "write_aio",
    WRITE_COMPRESSED = "write_compressed",
    VMSTATE_LOAD = "vmstate_load",
    VMSTATE_SAVE = "vmstate_save",
    COW_READ = "cow_read",
    COW_WRITE = "cow_write",
    REFTABLE_LOAD = "reftable_load",
    REFTABLE_GROW = "reftable_grow",
    REFTABLE_UPDATE = "reftable_update",
    REFBLOCK_LOAD = "refblock_load",
    REFBLOCK_UPDATE = "refblock_update",
    REFBLOCK_UPDATE_PART = "refblock_update_part",
    REFBLOCK_ALLOC = "refblock_alloc",
    REFBLOCK_ALLOC_HOOKUP = "refblock_alloc_hookup",
    REFBLOCK_ALLOC_WRITE = "refblock_alloc_write",
    REFBLOCK_ALLOC_WRITE_BLOCKS = "refblock_alloc_write_blocks",
    REFBLOCK_ALLOC_WRITE_TABLE = "refblock_alloc_write_table",
    REFBLOCK_ALLOC_SWITCH_TABLE = "refblock_alloc_switch_table",
    CLUSTER_ALLOC = "cluster_alloc",
    CLUSTER_ALLOC_BYTES = "cluster_alloc_bytes",
    CLUSTER_FREE = "cluster_free",
    FLUSH_TO_OS = "flush_to_os",
    FLUSH_TO_DISK = "flush_to_disk",
    PWRITEV_RMW_HEAD = "pwritev_rmw_head",
    PWRITEV_RMW_AFTER_HEAD = "pwritev_rmw_after_head",
    PWRITEV_RMW_TAIL = "pwritev_rmw_tail",
    PWRITEV_RMW_AFTER_TAIL = "pwritev_rmw_after_tail",
    PWRITEV = "pwritev",
    PWRITEV_ZERO = "pwritev_zero",
    PWRITEV_DONE = "pwritev_done",
    EMPTY_IMAGE_PREPARE = "empty_image_prepare",
    L1_SHRINK_WRITE_TABLE = "l1_shrink_write_table",
    L1_SHRINK_FREE_L2_CLUSTERS = "l1_shrink_free_l2_clusters",
    COR_WRITE = "cor_write",
    CLUSTER_ALLOC_SPACE = "cluster_alloc_space",
    NONE = "none",
}

impl Event {
    /// The event of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let at = Self::NAMES.iter().position(|other| *other == name)?;
        u8::try_from(at).ok().map(Self)
    }
}

/// What a request does (`BlkdebugIOType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are QEMU's")]
pub enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

/// One `inject-error` rule.
#[derive(Clone, Copy, Debug)]
pub struct InjectError {
    /// What arms it; [`Event::NONE`]: armed from the start.
    pub event: Event,
    /// Only in this state; 0: in any.
    pub state: i64,
    /// What it fails; `None`: everything but block status.
    pub iotype: Option<IoType>,
    /// With which error; `None`: requests pass, and the rule counts as used.
    pub errno: Option<Errno>,
    /// Only requests that touch this sector.
    pub sector: Option<u64>,
    /// Only one request.
    pub once: bool,
    /// Without giving way to other requests first.
    pub immediately: bool,
}

/// One `set-state` rule.
#[derive(Clone, Copy, Debug)]
pub struct SetState {
    /// What triggers it.
    pub event: Event,
    /// Only in this state; 0: in any.
    pub state: i64,
    /// The state afterwards.
    pub new_state: i64,
}

/// A request is to be held up.
#[derive(Clone, Debug)]
struct Break {
    event: Event,
    tag: String,
}

/// What a request is to fail with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Injected {
    pub(super) errno: Errno,
    pub(super) immediately: bool,
}

/// All rules of a node, and the state they are in.
#[derive(Debug)]
pub(super) struct Rules {
    state: i64,
    set: Vec<SetState>,
    /// With a number each, by which `armed` names them.
    inject: Vec<(usize, InjectError)>,
    armed: Vec<usize>,
    breaks: Vec<Break>,
}

impl Rules {
    pub(super) fn new(set: Vec<SetState>, inject: Vec<InjectError>) -> Self {
        let mut rules = Self {
            state: FIRST_STATE,
            set,
            inject: inject.into_iter().enumerate().collect(),
            armed: Vec::new(),
            breaks: Vec::new(),
        };
        rules.fire(Event::NONE);
        rules
    }

    /// Is there nothing that could ever happen?
    pub(super) fn are_idle(&self) -> bool {
        self.inject.is_empty() && self.set.is_empty() && self.breaks.is_empty()
    }

    pub(super) const fn state(&self) -> i64 {
        self.state
    }

    /// An event happened. Returns the tag under which the request is to be held up.
    pub(super) fn fire(&mut self, event: Event) -> Option<String> {
        let fits = |of: Event, state: i64| of == event && (state == 0 || state == self.state);
        let arming = self.inject.iter().filter(|(_, r)| fits(r.event, r.state));
        let arming: Vec<_> = arming.map(|(number, _)| *number).collect();
        if !arming.is_empty() {
            self.armed = arming;
        }
        if let Some(rule) = self.set.iter().find(|r| fits(r.event, r.state)) {
            self.state = rule.new_state;
        }
        let at = self.breaks.iter().position(|b| b.event == event)?;
        Some(self.breaks.remove(at).tag)
    }

    /// A request is about to be passed on; flushes have no range.
    pub(super) fn check(&mut self, iotype: IoType, range: ByteRange) -> Option<Injected> {
        let fits = |rule: &InjectError| {
            let kind = match rule.iotype {
                Some(wanted) => wanted == iotype,
                None => iotype != IoType::BlockStatus,
            };
            let touched = range.align_out(SECTOR);
            kind && rule.sector.is_none_or(|sector| {
                let start = sector.saturating_mul(SECTOR);
                !range.is_empty() && (touched.offset()..touched.end()).contains(&start)
            })
        };
        let armed = self.armed.iter().find_map(|number| {
            let rule = self.inject.iter().find(|(other, _)| other == number)?;
            fits(&rule.1).then_some(*rule)
        });
        let (number, rule) = armed?;
        if rule.once {
            self.inject.retain(|(other, _)| *other != number);
            self.armed.retain(|other| *other != number);
        }
        rule.errno.map(|errno| Injected {
            errno,
            immediately: rule.immediately,
        })
    }

    pub(super) fn add_break(&mut self, event: Event, tag: &str) {
        let tag = tag.to_owned();
        self.breaks.push(Break { event, tag });
    }

    /// Forgets breaks that were not met yet; `None`: all. Returns how many.
    pub(super) fn remove_breaks(&mut self, tag: Option<&str>) -> usize {
        let before = self.breaks.len();
        let keep = |b: &Break| tag.is_some_and(|tag| tag != b.tag);
        self.breaks.retain(keep);
        before - self.breaks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EIO: Option<Injected> = Some(Injected {
        errno: Errno::Io,
        immediately: false,
    });

    fn inject(event: Event) -> InjectError {
        InjectError {
            event,
            state: 0,
            iotype: None,
            errno: Some(Errno::Io),
            sector: None,
            once: false,
            immediately: false,
        }
    }

    fn first() -> ByteRange {
        ByteRange::between(0, 4096)
    }

    #[test]
    fn a_rule_is_armed_by_its_event_and_fails_what_fits() {
        let once = InjectError {
            once: true,
            sector: Some(7),
            iotype: Some(IoType::Read),
            ..inject(Event::READ_AIO)
        };
        let mut rules = Rules::new(Vec::new(), vec![once]);
        assert_eq!(rules.check(IoType::Read, first()), None);
        rules.fire(Event::READ_AIO);
        assert_eq!(rules.check(IoType::Write, first()), None);
        assert_eq!(rules.check(IoType::Read, ByteRange::between(0, 3584)), None);
        assert_eq!(
            rules.check(IoType::Read, ByteRange::between(3600, 3601)),
            EIO
        );
        assert_eq!(rules.check(IoType::Read, first()), None);
        assert!(rules.are_idle());
    }

    #[test]
    fn the_first_rule_of_an_event_wins_and_the_state_decides() {
        let set = |state, new_state| SetState {
            event: Event::WRITE_AIO,
            state,
            new_state,
        };
        let in_two = InjectError {
            state: 2,
            errno: Some(Errno::NoSpc),
            ..inject(Event::READ_AIO)
        };
        let mut rules = Rules::new(
            vec![set(1, 2), set(1, 3), set(2, 1)],
            vec![in_two, inject(Event::NONE)],
        );
        assert_eq!(rules.check(IoType::Flush, ByteRange::default()), EIO);
        assert_eq!(rules.check(IoType::BlockStatus, first()), None);
        rules.fire(Event::READ_AIO);
        rules.fire(Event::WRITE_AIO);
        assert_eq!(rules.state(), 2);
        assert_eq!(
            rules.check(IoType::Read, first()),
            EIO,
            "still the old rule"
        );
        rules.fire(Event::READ_AIO);
        let errno = rules.check(IoType::Read, first()).map(|i| i.errno);
        assert_eq!(errno, Some(Errno::NoSpc));
        rules.fire(Event::WRITE_AIO);
        assert_eq!(rules.state(), 1);
    }

    #[test]
    fn a_break_holds_one_request() {
        let mut rules = Rules::new(Vec::new(), Vec::new());
        rules.add_break(Event::PWRITEV, "a");
        rules.add_break(Event::PWRITEV, "b");
        assert!(!rules.are_idle());
        assert_eq!(rules.fire(Event::PWRITEV_DONE), None);
        assert_eq!(rules.fire(Event::PWRITEV).as_deref(), Some("a"));
        assert_eq!(rules.remove_breaks(Some("a")), 0);
        assert_eq!(rules.remove_breaks(None), 1);
        assert_eq!(rules.fire(Event::PWRITEV), None);
    }

    #[test]
    fn events_have_qemus_names() {
        assert_eq!(Event::named("pwritev_done"), Some(Event::PWRITEV_DONE));
        assert_eq!(Event::named("none"), Some(Event::NONE));
        assert_eq!(Event::named("nosuch"), None);
    }
}
