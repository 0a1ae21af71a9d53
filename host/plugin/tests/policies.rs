//! Policies: asked as components, and always a denial when they break.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use outport_block::Errno;
use outport_block::authz::{ConfigFiles, Decision, Facts, Grant, Peer, Policy as _};
use outport_block::format::{FaultKind, FormatError};
use outport_plugin::{Limits, PluginKind, User, WasmPolicy};
use outport_test_guests::{self as guests, Guest, World};
use support::{Host, run};

async fn open(host: &Host, files: Arc<dyn ConfigFiles>) -> WasmPolicy {
    let factory = host.registry.policy("p0").unwrap();
    factory.open("az", "{}", files).await.unwrap()
}

/// One file that the test changes.
#[derive(Default)]
struct Rules(Mutex<Vec<u8>>);

impl Rules {
    fn say(&self, rules: &str) {
        *self.0.lock().unwrap() = rules.as_bytes().to_vec();
    }
}

impl ConfigFiles for Rules {
    fn read(&self, name: &str) -> Result<Vec<u8>, Errno> {
        match name {
            "rules" => Ok(self.0.lock().unwrap().clone()),
            _ => Err(Errno::Access),
        }
    }

    fn generation(&self, _name: &str) -> Result<u64, Errno> {
        Ok(1)
    }
}

fn rules() -> Arc<Rules> {
    Arc::default()
}

fn facts() -> Facts {
    Facts {
        peer: Peer {
            identity: "CN=somebody with a long name,O=Example".into(),
            address: Some("192.0.2.1:10809".into()),
            uid: Some(1000),
            ..Peer::default()
        },
        export_name: Some("disk".into()),
        wants_write: true,
    }
}

fn reason(decision: Decision) -> String {
    match decision {
        Decision::Deny(reason) => reason,
        Decision::Allow(grant) => panic!("it was let in: {grant:?}"),
    }
}

#[test]
fn a_policy_is_found_by_id_and_by_name_and_is_no_format() {
    let host = Host::new(&guests::admits(), Limits::default());
    assert_eq!(host.info.kind, PluginKind::Authz);
    assert!(host.registry.policy("admits").is_ok());
    assert!(host.registry.format("admits").is_err());
    assert!(host.registry.format_names().is_empty());
    let none = host.registry.policy("nobody").unwrap_err();
    assert_eq!(
        none.to_string(),
        "There is no authorization plugin 'nobody'"
    );
    run(async {
        let policy = open(&host, rules()).await;
        let open = Decision::Allow(Grant::default());
        assert_eq!(policy.decide(&facts()).await, open);
        assert_eq!(policy.is_allowed(&facts()).await, open);
        assert!(host.registry.remove("p0").is_err(), "it is in use");
    });
    host.registry.remove("p0").unwrap();
}

#[test]
fn a_policy_can_be_inspected() {
    let report = outport_plugin::inspect::check(&guests::admits()).unwrap();
    assert!(report.is_fit(), "{report}");
    assert_eq!(report.kind, Some(PluginKind::Authz));
    assert_eq!(report.name.as_deref(), Some("admits"));
    assert_eq!(report.options, ["lazy"]);
}

#[test]
fn every_way_to_break_is_a_denial_an_event_and_a_count() {
    let limits = Limits {
        call_time_max: Some(Duration::from_millis(20)),
        memory_max: 4 << 20,
    };
    for (wasm, kind) in [
        (guests::policy_traps(), FaultKind::Trap),
        (guests::policy_spins(), FaultKind::Deadline),
        (guests::policy_hogs(), FaultKind::Memory),
        (guests::policy_lies(), FaultKind::BadAnswer),
    ] {
        let host = Host::new(&wasm, limits);
        run(async {
            for ask_identity in [false, true] {
                let policy = open(&host, rules()).await;
                host.seen.lock().unwrap().clear();
                let ask = || async {
                    match ask_identity {
                        true => policy.is_allowed(&facts()).await,
                        false => policy.decide(&facts()).await,
                    }
                };
                let first = reason(ask().await);
                assert!(first.contains(kind.word()), "{kind:?}: {first}");
                let second = reason(ask().await);
                assert!(second.starts_with("The plugin is broken"), "{second}");
                let seen = host.seen.lock().unwrap();
                assert_eq!(seen.len(), 1, "the second was not even asked");
                assert_eq!(
                    (seen[0].kind, &seen[0].user),
                    (kind, &User::Object("az".into()))
                );
            }
        });
        let info = host.registry.scrape().remove(0);
        assert!(info.faults.contains(&(kind, 2)), "{:?}", info.faults);
        assert_eq!(info.instances, 0, "a broken instance is gone");
    }
}

#[test]
fn an_orderly_error_is_a_denial_and_the_instance_lives() {
    let host = Host::new(&guests::policy_errs(), Limits::default());
    run(async {
        let policy = open(&host, rules()).await;
        assert_eq!(reason(policy.decide(&facts()).await), "busy");
        assert_eq!(reason(policy.is_allowed(&facts()).await), "busy");
        assert_eq!(host.registry.scrape()[0].instances, 1);
    });
    assert!(host.seen.lock().unwrap().is_empty());
}

#[test]
fn a_broken_policy_is_loaded_anew_after_its_pause() {
    let host = Host::new(&guests::obeys(), Limits::default());
    let files = rules();
    run(async {
        let policy = open(&host, files.clone()).await;
        files.say("x");
        assert!(reason(policy.decide(&facts()).await).contains("trap"));
        files.say("a");
        let started = Instant::now();
        let mut denials = 0;
        while let Decision::Deny(reason) = policy.decide(&facts()).await {
            assert!(reason.starts_with("The plugin is broken"), "{reason}");
            denials += 1;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(denials > 0, "there was a pause");
        assert!(started.elapsed() < Duration::from_secs(20));
    });
}

#[test]
fn a_changed_file_counts_at_the_next_decision() {
    let host = Host::new(&guests::obeys(), Limits::default());
    let files = rules();
    run(async {
        let policy = open(&host, files.clone()).await;
        let grant = |rules| {
            files.say(rules);
            let policy = &policy;
            async move { policy.decide(&facts()).await }
        };
        assert_eq!(grant("a").await, Decision::Allow(Grant::default()));
        let Decision::Allow(reader) = grant("r").await else {
            panic!("denied")
        };
        assert!(reader.read_only);
        let Decision::Allow(short) = grant("t").await else {
            panic!("denied")
        };
        assert_eq!(short.expires_after, Some(Duration::from_millis(100)));
        let Decision::Allow(slow) = grant("l").await else {
            panic!("denied")
        };
        assert_eq!(slow.iops_max.unwrap().get(), 20);
        assert_eq!(reason(grant("n").await), "told to");
    });
}

#[test]
fn options_are_checked_and_bad_ones_leave_the_old() {
    let picky = Guest::new(World::Authz, "picky")
        .body("open", "(i32.const 128)")
        .component();
    let host = Host::new(&picky, Limits::default());
    run(async {
        let factory = host.registry.policy("picky").unwrap();
        let refused = factory.open("az", r#"{"x": 1}"#, rules()).await;
        let message = match refused {
            Err(FormatError::Refused { message, .. }) => message,
            other => panic!("{other:?}"),
        };
        assert_eq!(message, "Parameter 'x' is unexpected");
        let policy = open(&host, rules()).await;
        assert!(policy.reconfigure(r#"{"lazy": 5}"#).await.is_err());
        assert!(matches!(policy.decide(&facts()).await, Decision::Allow(_)));
        policy.reconfigure(r#"{"lazy": true}"#).await.unwrap();
        policy.close().await;
        assert_eq!(
            reason(policy.decide(&facts()).await),
            "The policy has no valid configuration"
        );
        policy.reconfigure("{}").await.unwrap();
        assert!(matches!(policy.decide(&facts()).await, Decision::Allow(_)));
    });
}

#[test]
fn a_question_that_is_dropped_midway_leaves_nothing_behind() {
    let host = Host::new(&guests::policy_spins(), Limits::default());
    run(async {
        let policy = open(&host, rules()).await;
        let facts = facts();
        let asked = policy.decide(&facts);
        let gave_up = tokio::time::timeout(Duration::from_millis(30), asked).await;
        assert!(gave_up.is_err());
        assert_eq!(host.registry.scrape()[0].instances, 0);
        policy.reconfigure("{}").await.unwrap();
    });
}
