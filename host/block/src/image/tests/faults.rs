//! Plugins that break their contract, and clients that go away.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::sync::oneshot;

use super::disk::{Disk, Setup};
use super::toy::{Act, Call};
use crate::engine::buffer::Buf;
use crate::format::{Extent, FaultKind, Location};
use crate::image::overlay::DIRTY_MAX;
use crate::image::{Change, ImageEvent, ImageState};
use crate::{ByteRange, Errno};

fn state(disk: &Disk) -> ImageState {
    disk.node.image().unwrap().state()
}

fn faults(disk: &Disk) -> Vec<FaultKind> {
    let reported = disk.factory.reported.lock().unwrap();
    reported.iter().map(|f| f.kind).collect()
}

fn plan(disk: &Disk, call: Call, act: Act) {
    disk.factory.faults.plan(call, act);
}

/// A disk with data in its first 64 KiB, and nothing in the map.
async fn disk() -> Disk {
    let mut disk = Disk::new(Setup::default()).await;
    disk.write(0, &[7; 65536], false).await.unwrap();
    disk.reopen().await;
    disk
}

async fn read(disk: &Disk, at: u64) -> Result<u8, Errno> {
    let buf = disk.node.read(at, Buf::zeroed(512)).await?;
    Ok(buf.as_slice()[0])
}

/// Poll once and leave.
async fn begin<F: Future + ?Sized>(work: &mut Pin<Box<F>>) -> bool {
    std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx).is_ready())).await
}

fn hang(disk: &Disk, call: Call) -> (oneshot::Receiver<()>, oneshot::Sender<()>) {
    let (began, wait) = oneshot::channel();
    let (go_on, until) = oneshot::channel();
    plan(disk, call, Act::Hang(began, until));
    (wait, go_on)
}

// === traps ===

#[tokio::test]
async fn a_trap_in_resolve_is_tried_again_on_a_fresh_instance() {
    let disk = disk().await;
    plan(&disk, Call::Resolve, Act::Trap);
    assert_eq!(read(&disk, 4096).await, Ok(7));
    assert_eq!(state(&disk), ImageState::Healthy);
    assert_eq!(faults(&disk), [FaultKind::Trap]);
}

#[tokio::test]
async fn a_second_fault_within_the_window_fails_the_node() {
    let disk = disk().await;
    plan(&disk, Call::Resolve, Act::Trap);
    plan(&disk, Call::Resolve, Act::Trap);
    assert_eq!(read(&disk, 4096).await, Err(Errno::Io));
    assert_eq!(state(&disk), ImageState::Failed);
    assert_eq!(read(&disk, 4096).await, Err(Errno::Io));
    let told = disk.told.all();
    assert!(
        told.iter().any(|event| matches!(
            event,
            ImageEvent::State {
                state: ImageState::Failed,
                ..
            }
        )),
        "{told:?}"
    );
    disk.node.close().await.unwrap();
}

#[tokio::test]
async fn a_trap_in_prepare_is_tried_again_and_leaks_nothing() {
    let mut disk = disk().await;
    plan(&disk, Call::Prepare, Act::Trap);
    disk.write(100_000, &[1; 8192], false).await.unwrap();
    disk.compare_all().await;
    disk.reopen().await;
    disk.compare_all().await;
    assert_eq!(disk.check().await, 0);
}

#[tokio::test]
async fn tokens_of_a_fresh_instance_may_be_those_of_the_last_one() {
    let mut disk = disk().await;
    let image = disk.node.image().unwrap().clone();
    // A reservation that is neither committed nor aborted when the trap comes.
    let intent = crate::format::WriteIntent {
        range: ByteRange::between(131_072, 135_168),
        kind: crate::format::WriteKind::Data,
        stored_len: 0,
    };
    let prepared = image.prepare(intent).await.unwrap();
    plan(&disk, Call::Prepare, Act::Trap);
    disk.write(100_000, &[1; 8192], false).await.unwrap();
    assert_eq!(faults(&disk), [FaultKind::Trap]);
    let (p, _) = prepared.placements[0];
    let committed = image.commit(vec![p], prepared.generation).await;
    assert_eq!(committed, Err(crate::image::turn::Uncommitted::Stale));
    disk.compare_all().await;
}

#[tokio::test]
async fn a_trap_in_commit_refuses_writes_and_reads_go_on() {
    let mut disk = disk().await;
    disk.write(80_000, &[3; 100], false).await.unwrap();
    let before = disk.model.clone();
    plan(&disk, Call::Commit, Act::Trap);
    let refused = disk.write(100_000, &[1; 8192], false).await;
    assert_eq!(refused, Err(Errno::Io));
    disk.model = before;
    assert_eq!(state(&disk), ImageState::WritesRefused);
    assert_eq!(disk.write(0, &[9], false).await, Err(Errno::Io));
    disk.model[0] = 7;
    disk.compare_all().await;
    // What was acknowledged before is still made durable.
    disk.node.flush().await.unwrap();
    disk.node.close().await.unwrap();
    disk.open_again().await;
    disk.compare_all().await;
    let leaked = disk.check().await;
    assert!(leaked > 0, "the space of the refused write");
}

#[tokio::test]
async fn a_refusal_is_no_fault() {
    let mut disk = disk().await;
    plan(&disk, Call::Prepare, Act::Refuse(Errno::Access));
    let refused = disk.write(100_000, &[1; 10], false).await;
    assert_eq!(refused, Err(Errno::Access));
    plan(&disk, Call::Commit, Act::Refuse(Errno::Access));
    let refused = disk.write(100_000, &[1; 10], false).await;
    assert_eq!(refused, Err(Errno::Access));
    disk.write(100_000, &[1; 10], false).await.unwrap();
    disk.compare_all().await;
    assert_eq!(
        (state(&disk), faults(&disk).len()),
        (ImageState::Healthy, 0)
    );
}

#[tokio::test]
async fn a_trap_while_space_is_given_back_leaks_or_not_but_goes_on() {
    let mut disk = disk().await;
    disk.discard(ByteRange::between(0, 32768)).await.unwrap();
    plan(&disk, Call::Reclaim, Act::Trap);
    disk.node.flush().await.unwrap();
    disk.node.flush().await.unwrap();
    disk.compare_all().await;
    disk.reopen().await;
    assert_eq!(disk.check().await, 0);
}

// === lies ===

fn lie(change: impl FnOnce(&mut Vec<Extent>) + Send + 'static) -> Act {
    Act::Extents(Box::new(change))
}

fn raw(offset: u64) -> Location {
    Location::Raw {
        slot: 0,
        offset,
        in_place: true,
    }
}

#[tokio::test]
async fn lies_about_extents_are_seen_and_the_next_instance_is_asked() {
    let lies: Vec<(&str, Act)> = vec![
        ("outside of the file", lie(|e| e[1].at = raw(1 << 40))),
        ("on metadata", lie(|e| e[1].at = raw(0))),
        ("twice", lie(|e| e[1].at = e[2].at)),
        ("in another file", {
            let at = Location::Raw {
                slot: 5,
                offset: 0,
                in_place: false,
            };
            lie(move |e| e[1].at = at)
        }),
        (
            "with a gap",
            lie(|e| {
                e.remove(1);
            }),
        ),
        ("nothing", lie(Vec::clear)),
        ("elsewhere", lie(|e| drop(e.drain(..30)))),
    ];
    for (what, act) in lies {
        let mut disk = disk().await;
        // So that this session knows where metadata is.
        disk.write(200_000, &[5; 10], false).await.unwrap();
        disk.node
            .image()
            .unwrap()
            .map
            .invalidate(ByteRange::between(0, 1 << 30));
        plan(&disk, Call::Resolve, act);
        assert_eq!(read(&disk, 4096).await, Ok(7), "{what}");
        let kinds = faults(&disk);
        assert_eq!(kinds, [FaultKind::BadExtent], "{what}");
        assert_eq!(state(&disk), ImageState::Healthy);
        disk.compare_all().await;
        disk.write(0, &[1; 20_000], false).await.unwrap();
        disk.reopen().await;
        disk.compare_all().await;
    }
}

#[tokio::test]
async fn a_lying_placement_is_seen_before_anything_is_written_there() {
    for offset in [0, 65536] {
        let mut disk = disk().await;
        disk.compare_all().await;
        disk.write(200_000, &[5; 10], false).await.unwrap();
        let file = std::fs::read(disk.path()).unwrap();
        // On metadata, or on the data of another guest range.
        let Location::Raw { offset: data, .. } = location_of(&disk, 8192) else {
            panic!("not mapped");
        };
        let target = if offset == 0 { 512 } else { data };
        let lie = Act::Placements(Box::new(move |p| p[0].offset = target));
        plan(&disk, Call::Prepare, lie);
        disk.write(120_000, &[6; 10], false).await.unwrap();
        assert_eq!(faults(&disk), [FaultKind::BadExtent]);
        let now = std::fs::read(disk.path()).unwrap();
        let range = target as usize..target as usize + 512;
        assert_eq!(file[range.clone()], now[range]);
        disk.compare_all().await;
    }
}

fn location_of(disk: &Disk, guest: u64) -> Location {
    use crate::image::map::Place;
    let run = disk
        .node
        .image()
        .unwrap()
        .map
        .run(ByteRange::between(guest, guest + 1));
    match run.place {
        Place::Raw {
            slot,
            offset,
            in_place,
        } => Location::Raw {
            slot,
            offset,
            in_place,
        },
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_commit_that_maps_elsewhere_refuses_writes() {
    for lie in [
        lie(|e| e[0].at = raw(1 << 20)),
        lie(Vec::clear),
        lie(|e| e[0].at = Location::Zero),
    ] {
        let mut disk = disk().await;
        let before = disk.model.clone();
        plan(&disk, Call::Commit, lie);
        let refused = disk.write(120_000, &[6; 10], false).await;
        assert_eq!(refused, Err(Errno::Io));
        disk.model = before;
        assert_eq!(state(&disk), ImageState::WritesRefused);
        disk.compare_all().await;
        // Nothing of the lie reached the file.
        disk.node.close().await.unwrap();
        disk.open_again().await;
        disk.compare_all().await;
    }
}

// === clients that go away ===

#[tokio::test]
async fn a_reader_that_leaves_in_the_middle_of_a_call_faults_nobody() {
    let disk = disk().await;
    let (began, go_on) = hang(&disk, Call::Resolve);
    let node = disk.node.clone();
    let mut reading = Box::pin(async move { node.read(0, Buf::zeroed(512)).await });
    assert!(!begin(&mut reading).await);
    began.await.unwrap();
    drop(reading);
    go_on.send(()).unwrap();
    assert_eq!(read(&disk, 8192).await, Ok(7));
    let instances = disk
        .factory
        .instances
        .load(std::sync::atomic::Ordering::Relaxed);
    // One for each of the two opens: the call was finished, not repeated.
    assert_eq!((instances, faults(&disk).len()), (2, 0));
}

#[tokio::test]
async fn a_writer_that_leaves_is_finished_for_the_others() {
    for call in [Call::Prepare, Call::Commit] {
        let mut disk = disk().await;
        let (began, go_on) = hang(&disk, call);
        let node = disk.node.clone();
        let mut leaving = Box::pin(async move {
            let buf = Buf::from_slice(&[1; 4096]);
            node.write(131_072, &buf, false).await
        });
        let mut began = began;
        while began.try_recv().is_err() {
            assert!(!begin(&mut leaving).await);
            tokio::task::yield_now().await;
        }
        // It leads the batch that the others wait for.
        let node = disk.node.clone();
        let other = tokio::spawn(async move {
            let buf = Buf::from_slice(&[2; 4096]);
            node.write(163_840, &buf, false).await
        });
        tokio::task::yield_now().await;
        drop(leaving);
        go_on.send(()).unwrap();
        assert_eq!(other.await.unwrap(), Ok(()), "{call:?}");
        disk.model[163_840..163_840 + 4096].fill(2);
        // Closing waits for what was abandoned.
        disk.node.close().await.unwrap();
        disk.open_again().await;
        disk.model[131_072..131_072 + 4096].fill(1);
        disk.compare_all().await;
        assert_eq!(disk.check().await, 0);
    }
}

#[tokio::test]
async fn a_flush_that_is_dropped_loses_nothing() {
    let mut disk = disk().await;
    disk.write(131_072, &[1; 4096], false).await.unwrap();
    let (began, go_on) = hang(&disk, Call::Flush);
    let node = disk.node.clone();
    let mut flushing = Box::pin(async move { node.flush().await });
    assert!(!begin(&mut flushing).await);
    began.await.unwrap();
    drop(flushing);
    go_on.send(()).unwrap();
    disk.write(163_840, &[2; 4096], false).await.unwrap();
    disk.node.flush().await.unwrap();
    disk.open_again().await;
    disk.compare_all().await;
    assert_eq!(disk.check().await, 0);
}

#[tokio::test]
async fn a_flush_that_panics_covers_nobody() {
    let mut disk = disk().await;
    disk.write(131_072, &[1; 4096], false).await.unwrap();
    let image = disk.node.image().unwrap().clone();
    plan(&disk, Call::Flush, Act::Panic);
    // Both ask for a flush before the round begins that panics.
    let held = image.flusher.hold().await;
    let flush = || {
        let node = disk.node.clone();
        tokio::spawn(async move { node.flush().await })
    };
    let (first, second) = (flush(), flush());
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    drop(held);
    assert!(first.await.unwrap_err().is_panic());
    assert_eq!(second.await.unwrap(), Ok(()));
    assert!(image.flusher.is_settled(), "the second flush wrote nothing");
    disk.open_again().await;
    disk.compare_all().await;
    assert_eq!(disk.check().await, 0);
}

#[tokio::test]
async fn a_request_that_was_never_polled_never_happened() {
    let disk = disk().await;
    drop(disk.node.flush());
    drop(disk.node.discard(ByteRange::between(0, 65536)));
    disk.compare_all().await;
}

// === space ===

#[tokio::test]
async fn space_that_is_on_its_way_back_is_waited_for() {
    let mut disk = Disk::new(Setup {
        // One cluster of metadata and sixteen of data.
        capacity: 17,
        ..Setup::default()
    })
    .await;
    disk.write(0, &[1; 65536], false).await.unwrap();
    let before = disk.model.clone();
    let full = disk.write(131_072, &[2; 4096], false).await;
    assert_eq!(full, Err(Errno::NoSpc));
    disk.model = before;
    disk.compare_all().await;
    disk.discard(ByteRange::between(0, 4096)).await.unwrap();
    disk.write(131_072, &[3; 4096], false).await.unwrap();
    // Also while others write, and keep the overlay dirty.
    disk.discard(ByteRange::between(4096, 40_960))
        .await
        .unwrap();
    for i in 0..9 {
        let at = 135_168 + i * 4096;
        disk.write(at, &[4; 4096], false).await.unwrap();
    }
    disk.reopen().await;
    disk.compare_all().await;
    assert_eq!(disk.check().await, 0);
}

#[tokio::test]
async fn freed_space_is_not_reused_while_somebody_may_be_reading_it() {
    let mut disk = Disk::new(Setup {
        capacity: 17,
        ..Setup::default()
    })
    .await;
    disk.write(0, &[1; 65536], false).await.unwrap();
    let image = disk.node.image().unwrap().clone();
    let pass = image.gate.try_enter().unwrap();
    disk.discard(ByteRange::between(0, 4096)).await.unwrap();
    disk.node.flush().await.unwrap();
    disk.node.flush().await.unwrap();
    let node = disk.node.clone();
    let writing = tokio::spawn(async move {
        let buf = Buf::from_slice(&[2; 4096]);
        node.write(131_072, &buf, false).await
    });
    for _ in 0..50 {
        tokio::task::yield_now().await;
        assert!(!writing.is_finished());
    }
    drop(pass);
    assert_eq!(writing.await.unwrap(), Ok(()));
}

#[tokio::test]
async fn a_shrink_does_not_cut_what_was_placed_since() {
    let mut disk = Disk::new(Setup::default()).await;
    disk.write(0, &[1; 65536], false).await.unwrap();
    disk.write(200_000, &[2; 30_000], false).await.unwrap();
    disk.node.flush().await.unwrap();
    // The cut is asked for here, and made by the next flush.
    disk.resize(65536).await;
    disk.resize(131_072).await;
    disk.write(65536, &[3; 65536], false).await.unwrap();
    disk.node.flush().await.unwrap();
    disk.compare_all().await;
    disk.reopen().await;
    disk.compare_all().await;
    assert_eq!(disk.check().await, 0);
}

#[tokio::test]
async fn metadata_in_memory_is_bounded() {
    // Every cluster's entry lies in a page of its own.
    let cluster = 512;
    let stride = cluster * 512;
    let pages = 5000;
    let mut disk = Disk::new(Setup {
        bits: 9,
        size: stride * pages,
        capacity: 90_000,
        ..Setup::default()
    })
    .await;
    disk.model = Vec::new();
    let image = Arc::clone(disk.node.image().unwrap());
    let buf = Buf::from_slice(&[1; 512]);
    let mut most = 0;
    for page in 0..pages {
        disk.node.write(page * stride, &buf, false).await.unwrap();
        most = most.max(image.files.overlay().active_bytes());
    }
    assert!(most <= DIRTY_MAX + (1 << 20), "{most}");
    assert!(most >= DIRTY_MAX / 2, "the test wrote too little: {most}");
}

#[tokio::test]
async fn an_image_that_is_closed_is_not_opened_again() {
    let disk = disk().await;
    let image = disk.node.image().unwrap();
    disk.node.close().await.unwrap();
    let before = std::fs::read(disk.path()).unwrap();
    let told = |done: crate::error::Result<()>| done.unwrap_err().to_string();
    let change = Change {
        writable: Some(true),
        ..Change::default()
    };
    for said in [
        told(image.reopen(change).await),
        told(image.activate(true).await),
        told(image.inactivate().await),
    ] {
        assert!(said.ends_with("is closed"), "{said}");
    }
    assert_eq!(std::fs::read(disk.path()).unwrap(), before);
}
