//! What things cost: printed, not asserted, but that nothing leaks. That stands here to be alone in
//! its process: neighbours need memory too.
//!
//! `cargo test --release -p outport-plugin --test cost -- --ignored --nocapture`

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::hint::black_box;
use std::time::{Duration, Instant};

use outport_block::format::FormatFactory as _;
use outport_plugin::{
    Bundled, CompileCache, Limits, PluginRegistry, PluginSpec, RegistryConfig, precompile,
    sha256_hex,
};
use outport_test_guests::{self as guests, Guest, World};
use support::{
    MemoryFiles, UNIT, add, embedded, open, plugin, reads_its_own_writes, registry, run,
};

fn show(what: &str, each: Duration) {
    println!("{what:<58} {:>10.3} us", each.as_secs_f64() * 1e6);
}

/// The best of several rounds: the machine's noise only adds.
fn best(rounds: u32, count: u32, mut round: impl FnMut()) -> Duration {
    let one = |round: &mut dyn FnMut()| {
        let start = Instant::now();
        round();
        start.elapsed() / count
    };
    (0..rounds)
        .map(|_| one(&mut round))
        .min()
        .unwrap_or_default()
}

/// Resident memory of this process.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[ignore = "prints figures"]
fn calls() {
    const N: u32 = 2000;
    let factory = plugin(&guests::well_behaved(), Limits::default());
    run(async {
        let files = MemoryFiles::new(vec![0; 1 << 20]);
        let mut format = open(&factory, files, true).await.unwrap();
        for (what, calls) in [
            ("resolve, 4 extents", true),
            ("flush, nothing to do", false),
        ] {
            let mut least = Duration::MAX;
            // Many short rounds: one of them is not interrupted.
            for _ in 0..300 {
                let start = Instant::now();
                for _ in 0..N {
                    if calls {
                        black_box(format.resolve(UNIT).await.unwrap());
                    } else {
                        black_box(format.flush().await.unwrap());
                    }
                }
                least = least.min(start.elapsed() / N);
            }
            show(what, least);
        }
    });

    for (bytes, waits) in [(16, 0), (4096, 0), (65536, 0), (16, 1)] {
        let reads = 2000;
        let wasm = Guest::new(World::FormatRo, "reader")
            .body(
                "resolve",
                &format!(
                    "(local $i i32)
                     (loop $l
                       (global.set $top (i32.const 65536))
                       (call $read (i32.const 0) (i64.const 0) (i32.const {bytes})
                                   (i32.const 4096))
                       (local.set $i (i32.add (local.get $i) (i32.const 1)))
                       (br_if $l (i32.lt_u (local.get $i) (i32.const {reads}))))
                     (i32.const 256)"
                ),
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
            let files = MemoryFiles::slow(vec![0; 1 << 20], waits);
            let mut format = open(&factory, files, false).await.unwrap();
            let mut least = Duration::MAX;
            for _ in 0..50 {
                let start = Instant::now();
                black_box(format.resolve(UNIT).await).ok();
                least = least.min(start.elapsed() / reads);
            }
            show(
                &format!("files.read of {bytes} bytes, {waits} waits"),
                least,
            );
        });
    }
}

#[test]
#[ignore = "prints figures"]
fn loading() {
    // A real plugin, if its path is given: the guests of the tests are tiny.
    let (wasm, what) = match std::env::var_os("PLUGIN_WASM") {
        Some(path) => (std::fs::read(path).unwrap(), "PLUGIN_WASM"),
        None => (guests::well_behaved(), "a test guest"),
    };
    println!("{what}: {} bytes of Wasm", wasm.len());
    let mut compiled = Vec::new();
    show(
        "compile",
        best(3, 1, || compiled = precompile(&wasm).unwrap()),
    );
    println!("{} bytes of machine code", compiled.len());
    show(
        "engine and clock",
        best(5, 1, || {
            drop(PluginRegistry::new(RegistryConfig::default()));
        }),
    );

    let (name, kind) = {
        let report = outport_plugin::inspect::check(&wasm).unwrap();
        (report.name.unwrap().leak(), report.kind.unwrap())
    };
    let sha256 = Some(sha256_hex(&wasm));
    show("sha256", best(5, 1, || drop(black_box(sha256_hex(&wasm)))));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.wasm");
    std::fs::write(&path, &wasm).unwrap();
    let spec = PluginSpec {
        id: "x".into(),
        filename: path,
        sha256,
        ..PluginSpec::default()
    };
    let cache = CompileCache::open(&dir.path().join("cache")).unwrap();
    let config = RegistryConfig {
        cache: Some(cache),
        ..RegistryConfig::default()
    };
    let mut registries: Vec<_> = (0..7)
        .map(|_| PluginRegistry::new(config.clone()).unwrap())
        .collect();
    let start = Instant::now();
    registries.pop().unwrap().add(&spec).unwrap();
    show("add: read, hash, compile, store, describe", start.elapsed());
    let cached = best(5, 1, || drop(registries.pop().unwrap().add(&spec).unwrap()));
    show("add again, from the cache", cached);

    let bundled = Bundled {
        name,
        kind,
        wasm: wasm.leak(),
        compiled: embedded(compiled.leak()),
    };
    let config = RegistryConfig {
        bundled: vec![bundled],
        ..RegistryConfig::default()
    };
    let mut registries: Vec<_> = (0..5)
        .map(|_| PluginRegistry::new(config.clone()).unwrap())
        .collect();
    let first = best(5, 1, || {
        drop(registries.pop().unwrap().format(name).unwrap());
    });
    show("bundled: deserialise, hash, link, describe", first);

    let before = resident_kib();
    let registry = PluginRegistry::new(config).unwrap();
    let factory = registry.format(name).unwrap();
    println!(
        "{:<58} {:>10} KiB",
        "engine and a loaded plugin",
        resident_kib() - before
    );
    let make = || run(factory.instantiate(MemoryFiles::new(Vec::new()))).unwrap();
    let runtime = best(5, 100, || (0..100).for_each(|_| run(async {})));
    show("(a tokio runtime, part of the next)", runtime);
    show(
        "instantiate and drop",
        best(5, 100, || (0..100).for_each(|_| drop(make()))),
    );
    let before = resident_kib();
    let instances: Vec<_> = (0..200).map(|_| make()).collect();
    let each = (resident_kib() - before) as f64 / 200.0;
    println!("{:<58} {each:>10.1} KiB", "an idle instance");
    drop(instances);
}

#[test]
fn many_calls_and_many_instances_leak_nothing() {
    let registry = registry();
    let factory = add(&registry, &reads_its_own_writes(), Limits::default());
    let traps = add(&registry, &guests::traps(), Limits::default());
    run(async {
        let mut format = open(&factory, MemoryFiles::new(vec![0; 4096]), true)
            .await
            .unwrap();
        let mut round = async |calls: u32| {
            for _ in 0..calls {
                assert_eq!(format.flush().await.unwrap().txn.len(), 2);
            }
            for _ in 0..calls / 20 {
                let mut doomed = open(&traps, MemoryFiles::new(vec![0; 4096]), false)
                    .await
                    .unwrap();
                assert!(doomed.resolve(UNIT).await.is_err());
            }
        };
        round(2000).await;
        let before = resident_kib();
        round(10_000).await;
        let grown = resident_kib().saturating_sub(before);
        assert!(
            grown < 2048,
            "{grown} KiB more after 10 000 calls and 500 instances"
        );
    });
    assert!(registry.scrape().iter().all(|info| info.instances == 0));
}
