//! Plugins that break their contract: each is stopped, named, and never entered
//! again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use outport_block::Errno;
use outport_block::format::{FaultKind, FormatError, FormatFactory as _, Stage, TxnOp};
use outport_plugin::{FaultEvent, Limits, PluginRegistry, RegistryConfig};
use outport_test_guests::{self as guests, Guest, World};
use support::{MemoryFiles, UNIT, add, open, plugin, run};

fn files() -> Arc<MemoryFiles> {
    MemoryFiles::new(vec![0; 4096])
}

/// The fault of `resolve`, and that every later call is a fault too.
fn resolve_fault(wasm: &[u8], limits: Limits) -> (FaultKind, String) {
    let factory = plugin(wasm, limits);
    run(async {
        let mut format = open(&factory, files(), false).await.unwrap();
        let fault = match format.resolve(UNIT).await {
            Err(FormatError::Fault(fault)) => fault,
            other => panic!("{other:?}"),
        };
        for _ in 0..2 {
            match format.facts().await {
                Err(FormatError::Fault(again)) => {
                    assert_eq!(again.kind, fault.kind);
                    assert!(again.message.starts_with("The instance is gone"), "{again}");
                }
                other => panic!("a dead instance answered: {other:?}"),
            }
        }
        // A new one works.
        let mut fresh = open(&factory, files(), false).await.unwrap();
        assert_eq!(fresh.facts().await.unwrap(), "{}");
        (fault.kind, fault.message)
    })
}

#[test]
fn a_trap_is_a_fault_and_the_instance_is_never_entered_again() {
    let (kind, message) = resolve_fault(&guests::traps(), Limits::default());
    assert_eq!(kind, FaultKind::Trap);
    assert!(message.starts_with("resolve trapped: "), "{message}");
}

#[test]
fn a_panic_brings_its_message_along() {
    let (kind, message) = resolve_fault(&guests::panics(), Limits::default());
    assert_eq!(kind, FaultKind::Trap);
    assert!(
        message.contains("The plugin said: panicked at header.rs:7: no L1 table"),
        "{message}"
    );
}

#[test]
fn a_stack_overflow_is_a_trap_with_the_function_s_name() {
    let (kind, message) = resolve_fault(&guests::recurses(), Limits::default());
    assert_eq!(kind, FaultKind::Trap);
    assert!(message.contains("[in deep < "), "{message}");
}

#[test]
fn a_spin_ends_at_its_deadline() {
    let limits = Limits {
        call_time_max: Some(Duration::from_millis(20)),
        ..Limits::default()
    };
    let (kind, message) = resolve_fault(&guests::spins(), limits);
    assert_eq!(kind, FaultKind::Deadline);
    assert!(message.contains("call-time-max-ms"), "{message}");
}

#[test]
fn a_hog_hits_its_memory_limit_by_name() {
    let limits = Limits {
        memory_max: 8 << 20,
        ..Limits::default()
    };
    let (kind, message) = resolve_fault(&guests::hogs(), limits);
    assert_eq!(kind, FaultKind::Memory);
    assert!(message.contains("memory-max"), "{message}");
}

#[test]
fn a_plugin_that_starts_too_large_is_refused_with_the_limit_s_name() {
    let wasm = Guest::new(World::FormatRo, "fat").pages(200).component();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fat.wasm");
    std::fs::write(&path, wasm).unwrap();
    let limits = Limits {
        memory_max: 7 << 20,
        ..Limits::default()
    };
    let e = support::registry()
        .add(&support::spec("fat", &path, limits))
        .unwrap_err();
    assert!(
        e.to_string().contains("more memory than memory-max allows"),
        "{e}"
    );
}

#[test]
fn an_extent_that_overflows_is_a_bad_extent() {
    let (kind, message) = resolve_fault(&guests::lies_about_extents(), Limits::default());
    assert_eq!(kind, FaultKind::BadExtent, "{message}");
}

#[test]
fn lists_past_the_limit_or_past_memory_are_bad_answers() {
    let (kind, message) = resolve_fault(&guests::huge_list(), Limits::default());
    assert_eq!(kind, FaultKind::BadAnswer);
    assert!(
        message.contains("20000 extents; the limit is 16384"),
        "{message}"
    );
    let (kind, message) = resolve_fault(&guests::list_out_of_bounds(), Limits::default());
    assert_eq!(kind, FaultKind::BadAnswer, "{message}");
}

#[test]
fn a_list_past_what_may_cross_is_refused_before_it_is_copied() {
    let wasm = Guest::new(World::FormatRo, "bulk")
        .pages(400)
        .body(
            "resolve",
            "(i32.store (i32.const 260) (i32.const 131072))
             (i32.store (i32.const 264) (i32.const 200000)) (i32.const 256)",
        )
        .component();
    let (kind, message) = resolve_fault(&wasm, Limits::default());
    assert_eq!(kind, FaultKind::BadAnswer);
    assert!(message.contains("fuel"), "{message}");
}

#[test]
fn an_enum_out_of_range_is_a_bad_answer() {
    let wasm = Guest::new(World::FormatRo, "enums")
        .body(
            "resolve",
            "(i32.store8 (i32.const 288) (i32.const 99)) (i32.const 256)",
        )
        .component();
    let (kind, message) = resolve_fault(&wasm, Limits::default());
    assert_eq!(kind, FaultKind::BadAnswer, "{message}");
}

#[test]
fn a_log_flood_is_cut_and_changes_nothing() {
    let factory = plugin(&guests::floods_the_log(), Limits::default());
    run(async {
        let mut format = open(&factory, files(), false).await.unwrap();
        assert_eq!(format.resolve(UNIT).await.unwrap().len(), 4);
    });
}

#[test]
fn a_transaction_flood_is_refused_in_words_and_writes_nothing() {
    let factory = plugin(&guests::floods_the_transaction(), Limits::default());
    run(async {
        let mut format = open(&factory, files(), true).await.unwrap();
        match format.flush().await {
            Err(FormatError::Refused { code, message }) => {
                assert_eq!(code, Errno::NoMem);
                assert!(message.contains("16384 writes"), "{message}");
            }
            other => panic!("{other:?}"),
        }
        // An orderly refusal: the instance lives, and queues nothing old.
        assert!(format.close().await.unwrap().txn.is_empty());
    });
}

#[test]
fn a_read_out_of_bounds_is_refused_to_the_plugin() {
    let factory = plugin(&guests::reads_out_of_bounds(), Limits::default());
    run(async {
        let mut format = open(&factory, files(), false).await.unwrap();
        let e = format.resolve(UNIT).await.unwrap_err();
        assert_eq!(e.errno(), Errno::Inval);
        assert!(e.to_string().contains("2^63 - 1"), "{e}");
        assert_eq!(format.facts().await.unwrap(), "{}");
    });
}

#[test]
fn metadata_reads_of_one_call_have_a_budget() {
    let wasm = Guest::new(World::FormatRo, "reader")
        .body(
            "resolve",
            "(loop $l
               (global.set $top (i32.const 65536))
               (call $read (i32.const 0) (i64.const 0) (i32.const 16) (i32.const 4096))
               (br_if $l (i32.eqz (i32.load8_u (i32.const 4096)))))
             (i32.const 4096)",
        )
        .component();
    let factory = plugin(
        &wasm,
        Limits {
            call_time_max: None,
            ..Limits::default()
        },
    );
    let files = files();
    run(async {
        let mut format = open(&factory, files.clone(), false).await.unwrap();
        let e = format.resolve(UNIT).await.unwrap_err();
        assert_eq!(e.errno(), Errno::NoMem, "{e}");
    });
    assert_eq!(
        files.reads.load(std::sync::atomic::Ordering::Relaxed),
        65536
    );
}

#[test]
fn calls_that_may_not_queue_are_told_so() {
    let queue = "(call $grow (i32.const 0) (i64.const 512) (i32.const 4096)) (i32.const 4096)";
    let wasm = Guest::new(World::Format, "eager")
        .body("resolve", queue)
        .body("flush", queue)
        .component();
    let factory = plugin(&wasm, Limits::default());
    run(async {
        let mut format = open(&factory, files(), true).await.unwrap();
        assert_eq!(
            format.resolve(UNIT).await.unwrap_err().errno(),
            Errno::Inval
        );
        assert_eq!(
            format.flush().await.unwrap().txn,
            [TxnOp::Grow { slot: 0, size: 512 }]
        );
        let mut format = open(&factory, files(), false).await.unwrap();
        assert_eq!(format.flush().await.unwrap_err().errno(), Errno::RoFs);
    });
}

#[test]
fn what_a_trapping_call_queued_is_gone() {
    let wasm = Guest::new(World::Format, "half")
        .body(
            "flush",
            "(call $write (i32.const 0) (i32.const 1) (i64.const 0)
                          (i32.const 0) (i32.const 16) (i32.const 4096)) unreachable",
        )
        .body(
            "close",
            "(i32.store16 (i32.const 5000) (i32.const 0x800))
             (call $write (i32.const 0) (i32.const 1) (i64.const 8)
                          (i32.const 5000) (i32.const 2) (i32.const 4096)) (i32.const 4096)",
        )
        .component();
    let factory = plugin(&wasm, Limits::default());
    run(async {
        let mut format = open(&factory, files(), true).await.unwrap();
        assert!(matches!(format.flush().await, Err(FormatError::Fault(_))));
        let mut format = open(&factory, files(), true).await.unwrap();
        let data = vec![0, 8];
        let op = TxnOp::Write {
            slot: 0,
            stage: Stage::Mapping,
            offset: 8,
            data,
        };
        assert_eq!(format.close().await.unwrap().txn, [op]);
    });
}

#[test]
fn a_reported_fault_is_counted_and_announced() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::<FaultEvent>::new()));
    let ours = Arc::clone(&seen);
    let registry = PluginRegistry::new(RegistryConfig {
        on_fault: Some(Arc::new(move |e| ours.lock().unwrap().push(e.clone()))),
        ..RegistryConfig::default()
    })
    .unwrap();
    let factory = add(&registry, &guests::traps(), Limits::default());
    run(async {
        let mut format = open(&factory, files(), false).await.unwrap();
        let Err(FormatError::Fault(fault)) = format.resolve(UNIT).await else {
            panic!()
        };
        factory.report_fault("disk0", &fault);
    });
    let seen = seen.lock().unwrap();
    assert_eq!(
        (seen.len(), &*seen[0].plugin, seen[0].user.to_string()),
        (1, "traps", "node 'disk0'".to_owned())
    );
    let info = &registry.query()[0];
    assert!(
        info.faults.contains(&(FaultKind::Trap, 1)),
        "{:?}",
        info.faults
    );
    assert_eq!(info.instances, 0);
}

#[test]
fn every_named_guest_has_a_test_here() {
    let this = [
        include_str!("faults.rs"),
        include_str!("calls.rs"),
        include_str!("policies.rs"),
        include_str!("contexts.rs"),
    ]
    .concat();
    for (name, _) in guests::ALL {
        let called = format!(
            "guests::{}()",
            match *name {
                "list-out-of-memory-bounds" => "list_out_of_bounds".into(),
                name => name.replace('-', "_"),
            }
        );
        assert!(this.contains(&called), "no test for guest '{name}'");
    }
}
