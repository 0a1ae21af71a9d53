//! One model for each thing that threads share without a lock.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use loom::cell::UnsafeCell;
use loom::thread;

use crate::completion::OpFuture;
use crate::gate::Gate;
use crate::map::Leaf;
use crate::marked::Marked;
use crate::sync::{AtomicBool, AtomicU64, AtomicUsize, Mutex, Ordering};
use crate::tickets::Tickets;

type Model = fn();

pub(crate) const ALL: &[(&str, Model)] = &[
    ("a_flush_covers_what_was_written_before_it", flush_covers),
    ("a_round_that_failed_covers_nobody", failed_round),
    ("freed_space_is_reused_after_its_users_left", grace),
    ("a_closed_gate_keeps_everyone_out", closed_gate),
    ("a_leaf_shows_entries_of_its_own_part", leaf_given_away),
    ("a_leaf_in_line_shows_its_own_part", leaf_filled),
    (
        "whoever_passes_the_gate_marks_what_was_published",
        published,
    ),
    ("a_write_that_a_reader_missed_is_marked", missed_write),
    ("a_copy_has_what_was_marked_meanwhile", copied),
    ("a_write_changes_the_version", version),
    ("work_that_moved_is_woken_where_it_is", moved_work),
];

// === flush tickets ===

/// Two words that are written, and their copies on a disk.
#[derive(Default)]
struct Disk {
    running: Mutex<()>,
    tickets: Tickets,
    written: [AtomicU64; 2],
    durable: [AtomicU64; 2],
    /// The next round fails.
    fails: AtomicBool,
}

impl Disk {
    /// As `Image::flush` does it; the memory of the words is ordered by the tickets alone.
    fn flush(&self) -> bool {
        let ticket = self.tickets.take();
        let _running = self.running.lock().unwrap();
        if self.tickets.covers(&ticket) {
            return true;
        }
        let round = self.tickets.begin();
        if self.fails.swap(false, Ordering::Relaxed) {
            return false;
        }
        for (from, to) in self.written.iter().zip(&self.durable) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.tickets.ended_well(&round);
        true
    }

    fn write_and_flush(&self, at: usize) {
        self.written[at].store(1, Ordering::Relaxed);
        if self.flush() {
            assert_eq!(self.durable[at].load(Ordering::Relaxed), 1, "word {at}");
        }
    }
}

fn with_disk(fails: bool) {
    let disk = Arc::new(Disk {
        fails: AtomicBool::new(fails),
        ..Disk::default()
    });
    let others = [0, 1].map(|at| {
        let disk = disk.clone();
        thread::spawn(move || disk.write_and_flush(at))
    });
    // A third one, so that two can wait for the same round.
    disk.flush();
    for other in others {
        other.join().unwrap();
    }
}

fn flush_covers() {
    with_disk(false);
}

fn failed_round() {
    with_disk(true);
}

// === the gate ===

/// Bytes of a freed place, which whoever has it next overwrites.
struct Place(UnsafeCell<u64>);

// SAFETY: loom reports two threads that use the cell at once; that is what the model is for.
unsafe impl Sync for Place {}
// SAFETY: as above.
unsafe impl Send for Place {}

impl Place {
    fn new() -> Arc<Self> {
        Arc::new(Self(UnsafeCell::new(7)))
    }

    fn read(&self) {
        self.0.with(|at| {
            // SAFETY: loom has checked that nobody writes meanwhile.
            assert_eq!(unsafe { *at }, 7);
        });
    }

    fn reuse(&self) {
        // SAFETY: loom has checked that nobody else looks at it.
        self.0.with_mut(|at| unsafe { *at = 8 });
    }
}

/// Two grace periods: who slept through the first counts in the second.
fn grace() {
    let gate = Arc::new(Gate::default());
    let mapped = Arc::new(AtomicUsize::new(0));
    let places = [Place::new(), Place::new(), Place::new()];
    let reader = {
        let (gate, mapped, places) = (gate.clone(), mapped.clone(), places.clone());
        thread::spawn(move || {
            let pass = gate.try_enter().expect("nobody closes it");
            places[mapped.load(Ordering::Acquire)].read();
            drop(pass);
        })
    };
    for (turn, freed) in places.iter().take(2).enumerate() {
        mapped.store(turn + 1, Ordering::Release);
        let token = gate.begin_grace();
        if !gate.grace_over(token) {
            break;
        }
        freed.reuse();
    }
    reader.join().unwrap();
}

fn closed_gate() {
    let gate = Arc::new(Gate::default());
    let place = Place::new();
    let reader = {
        let (gate, place) = (gate.clone(), place.clone());
        thread::spawn(move || {
            if let Some(pass) = gate.try_enter() {
                place.read();
                drop(pass);
            }
        })
    };
    assert!(gate.shut());
    if gate.in_flight() == 0 {
        place.reuse();
    }
    reader.join().unwrap();
}

// === the extent map's leaves ===

fn check_leaf(leaf: &Leaf, part: u64) {
    let Some(reading) = leaf.read(part) else {
        return;
    };
    let seen = [0, 1].map(|at| reading.entry(at, 0));
    if reading.is_whole() {
        assert!(
            seen.iter().all(|entry| *entry == 0 || *entry == part + 1),
            "part {part} shows {seen:?}"
        );
    }
}

fn leaf_given_away() {
    let leaf = Arc::new(Leaf::default());
    leaf.become_index(0);
    leaf.fill(0, 1, 1, 0);
    let reader = {
        let leaf = leaf.clone();
        thread::spawn(move || check_leaf(&leaf, 0))
    };
    leaf.become_index(1);
    leaf.fill(0, 1, 2, 0);
    reader.join().unwrap();
}

fn leaf_filled() {
    let leaf = Arc::new(Leaf::default());
    leaf.become_index(0);
    leaf.fill(0, 2, 1, 0);
    let reader = {
        let leaf = leaf.clone();
        thread::spawn(move || {
            check_leaf(&leaf, 0);
            check_leaf(&leaf, 1);
        })
    };
    leaf.become_index(1);
    leaf.fill(0, 2, 2, 0);
    reader.join().unwrap();
}

// === what writes mark ===

/// One bit of a bitmap.
type Bit = AtomicBool;

fn set(bit: &Bit) -> bool {
    bit.swap(true, Ordering::SeqCst);
    true
}

fn published() {
    let marked = Arc::new(Marked::<Bit>::default());
    let bit = Arc::new(Bit::new(false));
    let writer = {
        let (marked, bit) = (marked.clone(), bit.clone());
        thread::spawn(move || {
            if marked.is_on() {
                marked.mark_all(set, || false);
                assert!(bit.load(Ordering::Relaxed), "the mark is lost");
            }
        })
    };
    marked.publish(vec![bit]);
    writer.join().unwrap();
}

fn copied() {
    let marked = Arc::new(Marked::<Bit>::default());
    let old = Arc::new(Bit::new(false));
    marked.publish(vec![old.clone()]);
    let writer = {
        let marked = marked.clone();
        thread::spawn(move || marked.mark_all(set, || false))
    };
    let new = Arc::new(Bit::new(old.load(Ordering::SeqCst)));
    marked.publish_copies(vec![new.clone()], || {
        if old.load(Ordering::SeqCst) {
            set(&new);
        }
    });
    writer.join().unwrap();
    assert!(new.load(Ordering::Relaxed), "the mark is lost");
}

/// The file is behind a lock, as in the kernel.
fn missed_write() {
    let marked = Arc::new(Marked::<Bit>::default());
    let (old, new) = (Arc::new(Bit::new(false)), Arc::new(Bit::new(false)));
    marked.publish(vec![old.clone()]);
    let file = Arc::new(Mutex::new(0));
    let writer = {
        let (marked, file) = (marked.clone(), file.clone());
        thread::spawn(move || {
            *file.lock().unwrap() = 1;
            if marked.is_on() {
                marked.mark_all(set, || false);
            }
        })
    };
    marked.publish(vec![old.clone(), new.clone()]);
    let seen = *file.lock().unwrap();
    writer.join().unwrap();
    assert!(old.load(Ordering::Relaxed));
    assert!(seen == 1 || new.load(Ordering::Relaxed), "seen by nobody");
}

fn version() {
    let marked = Arc::new(Marked::<Bit>::default());
    marked.version();
    let file = Arc::new(Mutex::new(0));
    let writer = {
        let (marked, file) = (marked.clone(), file.clone());
        thread::spawn(move || {
            *file.lock().unwrap() = 1;
            if marked.is_on() {
                marked.mark_all(set, || false);
            }
        })
    };
    let before = marked.version();
    let seen = *file.lock().unwrap();
    writer.join().unwrap();
    assert!(seen == 1 || marked.version() != before, "not told");
}

// === what abandoned work waits for ===

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn poll(future: &mut OpFuture, woken: &Arc<Woken>) -> Poll<i32> {
    let waker = Waker::from(woken.clone());
    Future::poll(Pin::new(future), &mut Context::from_waker(&waker))
}

/// Work whose requester left is polled by another task while its operation completes.
fn moved_work() {
    let (mut future, done) = OpFuture::new();
    let (requester, finisher) = (Arc::new(Woken::default()), Arc::new(Woken::default()));
    assert!(poll(&mut future, &requester).is_pending());
    let kernel = thread::spawn(move || done.set(512));
    let finish = {
        let finisher = finisher.clone();
        thread::spawn(move || poll(&mut future, &finisher))
    };
    let moved = finish.join().unwrap();
    kernel.join().unwrap();
    match moved {
        Poll::Ready(result) => assert_eq!(result, 512),
        Poll::Pending => assert_eq!(finisher.0.load(Ordering::Relaxed), 1, "never woken"),
    }
}
