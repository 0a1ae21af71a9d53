//! What a toy does wrong when it is told to.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::oneshot;

use crate::Errno;
use crate::format::{Extent, FormatError, Placement};

/// Changes an answer.
type Change<T> = Box<dyn FnOnce(&mut Vec<T>) + Send>;

/// A call of the seam.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Call {
    Activate,
    Resolve,
    Prepare,
    Commit,
    Abort,
    Discard,
    Reclaim,
    Flush,
    StoreBits,
}

/// What happens at the next such call.
pub(in super::super) enum Act {
    /// It traps, after its work.
    Trap,
    /// It says no.
    Refuse(Errno),
    /// It waits first: told when it began, and until it may go on.
    Hang(oneshot::Sender<()>, oneshot::Receiver<()>),
    /// It panics at once, as a mistake of the host's would.
    Panic,
    /// Its extents are changed.
    Extents(Change<Extent>),
    /// Its placements are changed.
    Placements(Change<Placement>),
}

/// A mistake in how it orders its writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(in super::super) enum Bug {
    None,
    /// The table is written with the counts, before the payload.
    MapsEarly,
    /// A discarded cluster is handed out at once.
    ReusesEarly,
    /// Only the first cluster of an intent is placed: slow, but no mistake.
    PlacesOne,
    /// Its checks never get anywhere.
    ChecksForEver,
}

/// The plan.
#[derive(Default)]
pub(in super::super) struct Faults {
    plan: Mutex<VecDeque<(Call, Act)>>,
    bug: AtomicU8,
    /// Set: it keeps bitmaps, and these are those that were kept as consistent, with the number of
    /// stretches that were put away for each.
    pub(in super::super) kept: Mutex<Option<Vec<(String, usize)>>>,
}

impl Faults {
    /// Once, at the next such call that nothing is planned for yet.
    pub(in super::super) fn plan(&self, call: Call, act: Act) {
        self.plan.lock().unwrap().push_back((call, act));
    }

    pub(in super::super) fn set_bug(&self, bug: Bug) {
        self.bug.store(bug as u8, Ordering::Relaxed);
    }

    pub(super) fn has_bug(&self, bug: Bug) -> bool {
        self.bug.load(Ordering::Relaxed) == bug as u8
    }

    pub(super) fn take(&self, call: Call) -> Option<Act> {
        let mut plan = self.plan.lock().unwrap();
        let at = plan.iter().position(|(c, _)| *c == call)?;
        plan.remove(at).map(|(_, act)| act)
    }

    /// Before the work: wait or refuse. Gives what is to be done after it.
    pub(super) async fn before(&self, call: Call) -> Result<Option<Act>, FormatError> {
        match self.take(call) {
            Some(Act::Hang(began, go_on)) => {
                let _ = began.send(());
                let _ = go_on.await;
                Ok(None)
            }
            Some(Act::Refuse(e)) => Err(super::refused(e)),
            Some(Act::Panic) => panic!("a planted panic"),
            other => Ok(other),
        }
    }
}
