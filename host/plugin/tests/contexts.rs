//! Metadata contexts: asked as components, and withdrawn when they break.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use outport_block::format::FaultKind;
use outport_block::metacontext::{ContextExtent, ContextProvider as _};
use outport_block::rule::Rule;
use outport_block::view::{Allocation, NodeView, Viewing};
use outport_block::{ByteRange, Errno};
use outport_plugin::{Limits, PluginKind, User, WasmContext};
use outport_test_guests::{self as guests, Guest, World};
use support::{Host, run};

/// A node of one MiB that has nothing to show but a bitmap, all dirty; and its version, 0: unknown.
#[derive(Default)]
struct Plain(AtomicU64);

impl NodeView for Plain {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn allocation(&self, _: ByteRange, _: usize) -> Viewing<'_, Vec<Allocation>> {
        Box::pin(std::future::ready(Err(Errno::Io)))
    }

    fn bitmap_names(&self) -> Vec<String> {
        Vec::new()
    }

    fn bitmap_granularity(&self, name: &str) -> Result<u32, Errno> {
        (name == "b").then_some(512).ok_or(Errno::NoEnt)
    }

    fn bitmap_bits(&self, _: &str, _: ByteRange) -> Result<Vec<u8>, Errno> {
        Err(Errno::NoEnt)
    }

    fn by_rule<'a>(
        &'a self,
        rule: &'a Rule,
        range: ByteRange,
        _: usize,
    ) -> Viewing<'a, Vec<ContextExtent>> {
        let told = match rule {
            Rule::Bitmap { dirty, .. } => Ok(vec![ContextExtent {
                len: range.len(),
                flags: *dirty,
            }]),
            Rule::AllocationDepth => Err(Errno::Io),
        };
        Box::pin(std::future::ready(told))
    }

    fn version(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|version| *version > 0)
    }
}

fn host(wasm: &[u8]) -> Host {
    let limits = Limits {
        call_time_max: Some(Duration::from_millis(20)),
        ..Limits::default()
    };
    let host = Host::new(wasm, limits);
    assert_eq!(host.info.kind, PluginKind::MetadataContext);
    host
}

/// Its only context.
async fn context(host: &Host) -> Arc<WasmContext> {
    context_of(host, Arc::new(Plain::default())).await
}

async fn context_of(host: &Host, node: Arc<Plain>) -> Arc<WasmContext> {
    let factory = host.registry.provider("p0").unwrap();
    let mut contexts = factory.open("e", "{}", node).await.unwrap();
    assert_eq!(contexts.len(), 1);
    contexts.remove(0)
}

fn range() -> ByteRange {
    ByteRange::between(4096, 8192)
}

#[test]
fn a_provider_is_asked() {
    let host = host(&guests::describes());
    run(async {
        let context = context(&host).await;
        assert_eq!((context.name(), context.is_wide()), ("x-test:all", false));
        assert!(context.is_offered());
        let told = context.extents(range(), 10).await.unwrap();
        let long = ContextExtent {
            len: 1 << 40,
            flags: 5,
        };
        assert_eq!(told, [long]);
    });
}

#[test]
fn an_answer_is_kept_while_its_generation_stays() {
    let host = host(&guests::remembers());
    run(async {
        let context = context(&host).await;
        let mut asked = Vec::new();
        for range in [range(), range(), ByteRange::between(0, 4096), range()] {
            asked.push(context.extents(range, 10).await.unwrap()[0].flags);
        }
        assert_eq!(asked, [6, 6, 7, 6]);
    });
    let calls = host.registry.scrape().remove(0).calls;
    let count = |word: &str| calls.iter().find(|c| c.call.word() == word).unwrap().count;
    assert_eq!((count("block-status"), count("generation")), (2, 2));
}

#[test]
fn an_answer_that_holds_until_a_write_is_kept_while_writes_are_counted() {
    let host = host(&guests::holds_until_write());
    let node = Arc::new(Plain::default());
    let asked = run(async {
        let context = context_of(&host, node.clone()).await;
        let mut asked = Vec::new();
        // Nobody counts; then somebody does, and there are writes after the second question.
        for version in [0, 0, 7, 7, 8, 8] {
            node.0.store(version, Ordering::Relaxed);
            asked.push(context.extents(range(), 10).await.unwrap()[0].flags);
        }
        asked
    });
    assert_eq!(asked, [6, 7, 8, 8, 9, 9]);
}

#[test]
fn a_context_with_a_rule_is_not_asked_about() {
    let host = host(&guests::context_rules());
    run(async {
        let context = context(&host).await;
        let told = context.extents(range(), 10).await.unwrap();
        let (len, flags) = (range().len(), 3);
        assert_eq!(told, [ContextExtent { len, flags }]);
    });
    let scraped = host.registry.scrape().remove(0);
    let count = |word: &str| {
        let calls = scraped.calls.iter();
        calls
            .filter(|c| c.call.word() == word)
            .map(|c| c.count)
            .sum::<u64>()
    };
    assert_eq!((count("rule-of"), count("block-status")), (1, 0));
    assert_eq!(scraped.instances, 0, "it said all it had to say");
}

#[test]
fn a_rule_that_cannot_be_is_refused_at_once() {
    for (wasm, kind, said) in [
        (
            guests::rules_lie(),
            FaultKind::BadAnswer,
            "more than 32 bits",
        ),
        (guests::rules_trap(), FaultKind::Trap, "unreachable"),
    ] {
        let host = host(&wasm);
        let factory = host.registry.provider("p0").unwrap();
        let error = run(factory.open("e", "{}", Arc::new(Plain::default()))).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!(host.seen.lock().unwrap()[0].kind, kind);
    }
}

#[test]
fn what_breaks_is_withdrawn_and_comes_back() {
    for (wasm, kind) in [
        (guests::context_traps(), FaultKind::Trap),
        (guests::context_spins(), FaultKind::Deadline),
        (guests::context_lies(), FaultKind::BadAnswer),
    ] {
        let host = host(&wasm);
        run(async {
            let context = context(&host).await;
            assert_eq!(
                context.extents(range(), 10).await,
                Err(Errno::Io),
                "{kind:?}"
            );
            assert!(!context.is_offered());
            assert_eq!(context.extents(range(), 10).await, Err(Errno::Io));
            assert_eq!(
                host.seen.lock().unwrap().len(),
                1,
                "not asked again at once"
            );
            let event = host.seen.lock().unwrap()[0].clone();
            assert_eq!((event.kind, event.user), (kind, User::Export("e".into())));
            // After the pause a fresh instance is asked, and breaks again.
            let started = Instant::now();
            while host.seen.lock().unwrap().len() < 2 {
                assert!(started.elapsed() < Duration::from_secs(20));
                assert_eq!(context.extents(range(), 10).await, Err(Errno::Io));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let info = host.registry.scrape().remove(0);
        assert!(info.faults.contains(&(kind, 2)), "{:?}", info.faults);
    }
}

#[test]
fn an_orderly_error_fails_one_request() {
    let host = host(&guests::context_errs());
    run(async {
        let context = context(&host).await;
        assert_eq!(context.extents(range(), 10).await, Err(Errno::Perm));
        assert!(context.is_offered());
        assert!(host.seen.lock().unwrap().is_empty());
    });
}

#[test]
fn a_busy_provider_holds_nobody_up_for_long() {
    let host = host(&guests::context_spins());
    run(async {
        let context = context(&host).await;
        let started = Instant::now();
        let questions = (0..20).map(|_| context.extents(range(), 10));
        let answers = futures_util::future::join_all(questions).await;
        assert!(answers.iter().all(Result::is_err));
        // One deadline for the one that was asked; the others were turned away.
        assert!(started.elapsed() < Duration::from_secs(10));
        assert_eq!(host.seen.lock().unwrap().len(), 1);
    });
}

#[test]
fn contexts_of_others_are_not_brought() {
    let steals = Guest::new(World::Context, "steals")
        .with(r#"(data (i32.const 4096) "qemu:dirty-bitmap:b")"#)
        .body(
            "contexts",
            "(i32.store (i32.const 600) (i32.const 4096))
             (i32.store (i32.const 604) (i32.const 19))
             (i32.const 576)",
        )
        .component();
    let host = host(&steals);
    run(async {
        let factory = host.registry.provider("steals").unwrap();
        let refused = factory
            .open("e", "{}", Arc::new(Plain::default()))
            .await
            .unwrap_err();
        let said = refused.to_string();
        assert!(said.contains("is not a plugin's"), "{said}");
        assert_eq!(host.seen.lock().unwrap().len(), 1);
    });
    let none = host.registry.provider("x").unwrap_err().to_string();
    assert_eq!(none, "No metadata context plugin with id 'x'");
}
