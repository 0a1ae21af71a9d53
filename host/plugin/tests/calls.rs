//! Calls into a plugin that behaves, and what its neighbours notice of them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use outport_block::format::{
    FaultKind, FormatError, FormatFactory as _, Location, Repair, Stage, TxnOp,
};
use outport_block::{ByteRange, Errno};
use outport_plugin::{Limits, PluginKind};
use outport_test_guests::{self as guests, Guest, World};
use support::{MemoryFiles, UNIT, add, open, plugin, reads_its_own_writes, registry, run};

fn files() -> Arc<MemoryFiles> {
    MemoryFiles::new((0..=255).cycle().take(4096).collect())
}

#[test]
fn every_call_of_the_contract_answers() {
    let registry = registry();
    let factory = add(&registry, &guests::well_behaved(), Limits::default());
    assert!(factory.writable() && factory.creates());
    assert_eq!(factory.name(), "well-behaved");
    run(async {
        assert_eq!(factory.probe(&[0; 100_000], 1 << 20).await.unwrap(), 77);
        assert!(factory.create_schema().await.is_ok());
        assert_eq!(factory.measure("{}").await.unwrap().required, 1 << 20);

        let mut f = factory.instantiate(files()).await.unwrap();
        assert!(f.open("{\"lazy\":true}", true).await.unwrap().is_empty());
        assert_eq!(f.activate(Vec::new()).await.unwrap().value.size, 1 << 20);
        let extents = f.resolve(UNIT).await.unwrap();
        assert_eq!(extents.len(), 4);
        assert_eq!(extents[1].range, ByteRange::between(65536, 131_072));
        let at = Location::Raw {
            slot: 0,
            offset: (1 << 20) + 65536,
            in_place: true,
        };
        assert_eq!(extents[1].at, at);
        assert_eq!(
            f.read_special(1, ByteRange::between(0, 512)).await.unwrap(),
            [0; 512]
        );
        assert!(f.prepare_write(Vec::new()).await.unwrap().value.is_empty());
        assert_eq!(f.commit_write(vec![1, 2]).await.unwrap().value.len(), 4);
        f.abort_write(vec![1]).await.unwrap();
        f.reclaim(Vec::new()).await.unwrap();
        f.flush().await.unwrap();
        f.resize(1 << 20).await.unwrap();
        let (report, next) = f.check(Repair::default(), 0).await.unwrap().value;
        assert_eq!((report.corruptions, next), (0, None));
        f.create("{}").await.unwrap();
        f.close().await.unwrap();
    });
    let info = &registry.query()[0];
    assert_eq!(info.kind, PluginKind::FormatFull);
    let resolve = info
        .calls
        .iter()
        .find(|c| c.call.word() == "resolve")
        .unwrap();
    assert_eq!(resolve.count, 1);
}

#[test]
fn options_are_checked_by_the_host_in_qemu_s_words() {
    let factory = plugin(&guests::well_behaved(), Limits::default());
    run(async {
        for (options, said) in [
            ("{\"x\":1}", "Parameter 'x' is unexpected"),
            (
                "{\"lazy\":1}",
                "Invalid parameter type for 'lazy', expected: boolean",
            ),
            ("[", "The options are no JSON object"),
        ] {
            let mut format = factory.instantiate(files()).await.unwrap();
            let e = format.open(options, false).await.unwrap_err();
            assert!(e.to_string().starts_with(said), "{e}");
            assert_eq!(e.errno(), Errno::Inval);
        }
    });
}

#[test]
fn a_read_only_format_refuses_writes_and_survives() {
    let factory = plugin(
        &Guest::new(World::FormatRo, "ro").component(),
        Limits::default(),
    );
    assert!(!factory.writable());
    run(async {
        let mut format = factory.instantiate(files()).await.unwrap();
        assert_eq!(
            format.open("{}", true).await.unwrap_err().errno(),
            Errno::RoFs
        );
        format.open("{}", false).await.unwrap();
        assert_eq!(
            format.commit_write(vec![1]).await.unwrap_err().errno(),
            Errno::RoFs
        );
        let check = format.check(Repair::default(), 0).await.unwrap_err();
        assert_eq!(
            check.to_string(),
            "This image format does not support checks"
        );
        assert_eq!(
            format.create("{}").await.unwrap_err().errno(),
            Errno::NotSup
        );
        format.flush().await.unwrap();
        assert_eq!(format.resolve(UNIT).await.unwrap().len(), 4);
    });
}

/// A guest whose `flush` queues "ABCD" at 10, reads 8..18 back, and queues what
/// it read at 100.
#[test]
fn a_call_reads_what_it_has_queued() {
    let factory = plugin(&reads_its_own_writes(), Limits::default());
    for waits in [0, 3] {
        let bytes: Vec<u8> = (0..200).collect();
        run(async {
            let files = MemoryFiles::slow(bytes, waits);
            let mut format = open(&factory, files, true).await.unwrap();
            let txn = format.flush().await.unwrap().txn;
            let data = b"\x08\x09ABCD\x0e\x0f\x10\x11".to_vec();
            let op = TxnOp::Write {
                slot: 0,
                stage: Stage::Mapping,
                offset: 100,
                data,
            };
            assert_eq!(txn.get(1), Some(&op));
            assert_eq!(txn.len(), 2);
        });
    }
}

#[test]
fn damage_reaches_the_node() {
    let wasm = Guest::new(World::FormatRo, "doctor")
        .with(r#"(data (i32.const 5000) "L1 overlaps")"#)
        .body(
            "resolve",
            "(call $corrupt (i32.const 5000) (i32.const 11) (i32.const 1) (i64.const 7)
                            (i32.const 0) (i64.const 0) (i32.const 1)) (i32.const 256)",
        )
        .component();
    let factory = plugin(&wasm, Limits::default());
    let files = files();
    run(async {
        let mut format = open(&factory, files.clone(), false).await.unwrap();
        format.resolve(UNIT).await.unwrap();
    });
    assert_eq!(
        *files.corruptions.lock().unwrap(),
        ["L1 overlaps fatal=true"]
    );
}

/// The neighbour's turns are counted: no clock, no race. A plugin that spins
/// for N ticks must have yielded N - 1 times, and after each of them everybody
/// else had a turn.
#[test]
fn a_spinning_plugin_lets_its_neighbours_run() {
    let ms = 60;
    let limits = Limits {
        call_time_max: Some(Duration::from_millis(ms)),
        ..Limits::default()
    };
    let factory = plugin(&guests::spins(), limits);
    let turns = Arc::new(AtomicUsize::new(0));
    run(async {
        let mut format = open(&factory, files(), false).await.unwrap();
        let counted = Arc::clone(&turns);
        let neighbour = tokio::spawn(async move {
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        });
        let spun = tokio::spawn(async move { format.resolve(UNIT).await });
        let fault = spun.await.unwrap().unwrap_err();
        assert!(matches!(fault, FormatError::Fault(f) if f.kind == FaultKind::Deadline));
        neighbour.abort();
    });
    let ticks = usize::try_from(limits.call_ticks().unwrap()).unwrap();
    let turns = turns.load(Ordering::Relaxed);
    assert!(turns >= ticks - 1, "{turns} turns in {ticks} ticks");
}

/// I/O of a neighbour must be seen at each yield, not at every 61st turn: a
/// datagram that arrives during the spin is answered long before its end.
#[test]
fn a_spinning_plugin_lets_the_io_driver_run() {
    let limits = Limits {
        call_time_max: Some(Duration::from_millis(60)),
        ..Limits::default()
    };
    let factory = plugin(&guests::spins(), limits);
    run(async {
        let mut format = open(&factory, files(), false).await.unwrap();
        let (ours, theirs) = tokio::net::UnixDatagram::pair().unwrap();
        let echoes = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&echoes);
        let echo = tokio::spawn(async move {
            let mut buf = [0; 8];
            loop {
                let n = theirs.recv(&mut buf).await.unwrap();
                theirs.send(&buf[..n]).await.unwrap();
            }
        });
        let client = tokio::spawn(async move {
            let mut buf = [0; 8];
            loop {
                ours.send(b"ping").await.unwrap();
                ours.recv(&mut buf).await.unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        let spun = tokio::spawn(async move { format.resolve(UNIT).await });
        assert!(spun.await.unwrap().is_err());
        echo.abort();
        client.abort();
        let echoes = echoes.load(Ordering::Relaxed);
        assert!(echoes >= 5, "{echoes} round trips in 30 ticks");
    });
}

#[test]
fn without_a_deadline_a_long_call_ends_by_itself() {
    // About a tenth of a second and more: many ticks, none of them fatal.
    let wasm = Guest::new(World::FormatRo, "slow")
        .body(
            "resolve",
            "(local $i i64)
             (loop $l
               (local.set $i (i64.add (local.get $i) (i64.const 1)))
               (br_if $l (i64.lt_u (local.get $i) (i64.const 200000000))))
             (i32.const 256)",
        )
        .component();
    let factory = plugin(
        &wasm,
        Limits {
            call_time_max: None,
            ..Limits::default()
        },
    );
    run(async {
        let mut format = open(&factory, files(), false).await.unwrap();
        assert_eq!(format.resolve(UNIT).await.unwrap().len(), 4);
    });
}

#[test]
fn calls_after_a_long_idle_time_are_not_trapped() {
    let limits = Limits {
        call_time_max: Some(Duration::from_millis(1)),
        ..Limits::default()
    };
    let factory = plugin(&guests::well_behaved(), limits);
    run(async {
        let mut format = open(&factory, files(), false).await.unwrap();
        for _ in 0..3 {
            // Past the time after which the ticker parks.
            tokio::time::sleep(Duration::from_millis(150)).await;
            assert_eq!(format.resolve(UNIT).await.unwrap().len(), 4);
        }
    });
}

/// Waiting for a slow disk is not the plugin's running time: this call waits
/// through more ticks than it may run.
#[test]
fn waiting_for_a_file_does_not_count() {
    struct Slow(Arc<MemoryFiles>);
    impl outport_block::format::FormatFiles for Slow {
        fn size(&self, slot: u32) -> Result<u64, Errno> {
            self.0.size(slot)
        }
        fn try_read(&self, _: u32, _: u64, _: &mut [u8]) -> Option<Result<(), Errno>> {
            None
        }
        fn read(
            &self,
            _: u32,
            _: u64,
            len: usize,
        ) -> std::pin::Pin<Box<dyn Future<Output = Result<Vec<u8>, Errno>> + Send + '_>> {
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(7)).await;
                Ok(vec![0; len])
            })
        }
        fn next_data(&self, _: u32, _: u64) -> Result<Option<ByteRange>, Errno> {
            Ok(None)
        }
        fn corrupt(&self, _: &str, _: Option<u64>, _: Option<u64>, _: bool) {}
        fn node_name(&self) -> &str {
            "slow0"
        }
    }
    let wasm = Guest::new(World::FormatRo, "patient")
        .body(
            "resolve",
            "(local $i i32)
             (loop $l
               (call $read (i32.const 0) (i64.const 0) (i32.const 16) (i32.const 4096))
               (local.set $i (i32.add (local.get $i) (i32.const 1)))
               (br_if $l (i32.lt_u (local.get $i) (i32.const 30))))
             (i32.const 256)",
        )
        .component();
    let limits = Limits {
        call_time_max: Some(Duration::from_millis(20)),
        ..Limits::default()
    };
    let factory = plugin(&wasm, limits);
    run(async {
        let mut format = open(&factory, Arc::new(Slow(files())), false)
            .await
            .unwrap();
        assert_eq!(format.resolve(UNIT).await.unwrap().len(), 4);
    });
}

#[test]
fn a_future_dropped_midway_takes_the_instance_with_it() {
    let registry = registry();
    let factory = add(&registry, &reads_its_own_writes(), Limits::default());
    run(async {
        let files = MemoryFiles::slow(vec![0; 200], 1000);
        let mut format = open(&factory, files, true).await.unwrap();
        assert_eq!(registry.scrape()[0].instances, 1);
        {
            let mut call = format.flush();
            let mut cx = Context::from_waker(Waker::noop());
            assert!(matches!(call.as_mut().poll(&mut cx), Poll::Pending));
        }
        assert_eq!(registry.scrape()[0].instances, 0);
        match format.flush().await {
            Err(FormatError::Fault(fault)) => {
                assert!(
                    fault.message.contains("dropped before it returned"),
                    "{fault}"
                );
            }
            other => panic!("{other:?}"),
        }
        let mut fresh = open(&factory, MemoryFiles::new(vec![0; 200]), true)
            .await
            .unwrap();
        assert_eq!(fresh.flush().await.unwrap().txn.len(), 2);
    });
}

#[test]
fn a_call_may_move_between_threads() {
    let factory = plugin(&reads_its_own_writes(), Limits::default());
    let mut format = run(open(&factory, MemoryFiles::new(vec![0; 200]), true)).unwrap();
    for _ in 0..4 {
        format = std::thread::spawn(move || {
            assert_eq!(run(format.flush()).unwrap().txn.len(), 2);
            format
        })
        .join()
        .unwrap();
    }
}
