//! Jobs and transactions, beside QSD's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use serde_json::{Value, json};
use support::*;

/// States that a job passed through, as events told them, up to `last`.
#[track_caller]
fn states(qmp: &mut Qmp, id: &str, last: &str) -> Vec<String> {
    let mut states = Vec::new();
    while states.last().is_none_or(|state| state != last) {
        let data = qmp.event("JOB_STATUS_CHANGE");
        assert_eq!(data["id"], id);
        states.push(data["status"].as_str().unwrap().to_owned());
    }
    states
}

fn create(id: &str, options: &Value) -> Value {
    json!({"job-id": id, "options": options})
}

const SUCCESS: [&str; 5] = ["created", "running", "waiting", "pending", "concluded"];
const FAILURE: [&str; 4] = ["created", "running", "aborting", "concluded"];

/// Creates something at both and compares states, listing and what verbs answer at the end.
#[track_caller]
fn compare_creation(options: &Value, want: &[&str]) {
    let run = |daemon: &Daemon| {
        file(&daemon.path("f"), 0);
        let mut qmp = daemon.qmp();
        let node = json!({"driver": "file", "node-name": "f", "filename": daemon.text("f")});
        qmp.ok("blockdev-add", node);
        let folder = daemon.text("");
        let options = options
            .to_string()
            .replace("{}", folder.trim_end_matches('/'));
        let options = serde_json::from_str(&options).unwrap();
        let mut told = vec![qmp.execute("blockdev-create", create("c0", &options))];
        assert_eq!(states(&mut qmp, "c0", "concluded"), want);
        told.push(qmp.ok("query-jobs", json!({})));
        for verb in ["cancel", "pause", "resume", "complete", "finalize"] {
            told.push(qmp.execute(&format!("job-{verb}"), json!({"id": "c0"})));
        }
        told.push(qmp.execute("blockdev-create", create("c0", &options)));
        told.push(qmp.ok("query-block-jobs", json!({})));
        qmp.ok("job-dismiss", json!({"id": "c0"}));
        assert_eq!(states(&mut qmp, "c0", "null"), ["null"]);
        told.push(qmp.execute("job-dismiss", json!({"id": "c0"})));
        let told = json!(told).to_string();
        told.replace(folder.trim_end_matches('/'), "{}")
    };
    let ours = run(&Daemon::start(&[]));
    if let Some(qsd) = Daemon::qsd(&[]) {
        assert_eq!(ours, run(&qsd), "{options}");
    }
}

#[test]
fn creations_go_as_qsds_go() {
    compare_creation(
        &json!({"driver": "qcow2", "file": "f", "size": 1 << 20}),
        &SUCCESS,
    );
    let small = json!({"driver": "qcow2", "file": "f", "size": 1 << 20, "cluster-size": 5});
    compare_creation(&small, &FAILURE);
    compare_creation(
        &json!({"driver": "qcow2", "file": "zz", "size": 1}),
        &FAILURE,
    );
    let made = json!({"driver": "file", "filename": "{}/new", "size": 1000});
    compare_creation(&made, &SUCCESS);
    let nowhere = json!({"driver": "file", "filename": "/nonexistent/d/f", "size": 1000});
    compare_creation(&nowhere, &FAILURE);
}

#[test]
fn verbs_and_transactions_are_refused_in_qsds_words() {
    let job = |verb: &'static str| (verb, json!({"id": "zz"}));
    let actions = |actions: Value| ("transaction", json!({"actions": actions}));
    let options = |options: Value| ("blockdev-create", create("c0", &options));
    compare(
        &[],
        &[
            job("job-cancel"),
            job("job-pause"),
            job("job-resume"),
            job("job-complete"),
            job("job-finalize"),
            job("job-dismiss"),
            options(json!({"driver": "null-co"})),
            options(json!({"driver": "raw"})),
            options(json!({"driver": "host_device"})),
            (
                "blockdev-create",
                create(
                    "1bad",
                    &json!({"driver": "file", "filename": "/x",
                "size": 1}),
                ),
            ),
            (
                "blockdev-create",
                create(
                    "",
                    &json!({"driver": "file", "filename": "/x",
                "size": 1}),
                ),
            ),
            actions(json!([])),
            actions(json!([{"type": "abort", "data": {}}])),
            actions(json!([{"type": "abort"}])),
            actions(json!([{"type": "nosuch", "data": {}}])),
            actions(json!([{"type": "abort", "data": {"x": 1}}])),
            ("transaction", json!({})),
            (
                "transaction",
                json!({"actions": [], "properties": {"completion-mode": "grouped"}}),
            ),
            (
                "transaction",
                json!({"actions": [], "properties": {"completion-mode": "zz"}}),
            ),
            // With an action, QSD 10.0 refuses `grouped`; QEMU 11.1 does not, and nor does ours.
        ],
    );
}

/// Pseudo-random numbers (xorshift): the same ones each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[test]
fn creations_cancelled_at_any_time_end_in_qemus_order() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    file(&daemon.path("f"), 0);
    let node = json!({"driver": "file", "node-name": "f", "filename": daemon.text("f")});
    qmp.ok("blockdev-add", node);
    let options = json!({"driver": "qcow2", "file": "f", "size": 64 << 30, "cluster-size": 4096,
        "preallocation": "metadata"});
    let mut random = Random(0x0051_0b0a_7e5e_ed01);
    let (mut cancelled, mut succeeded) = (0, 0);
    for round in 0..60 {
        // Several pause and cancel verbs at random distances; who comes late is refused.
        qmp.ok("blockdev-create", create("c", &options));
        let delay = random.below(1 << (round % 16));
        std::thread::sleep(std::time::Duration::from_micros(delay));
        let paused = random.below(2) == 0;
        if paused {
            qmp.execute("job-pause", json!({"id": "c"}));
        }
        let answer = qmp.execute("job-cancel", json!({"id": "c"}));
        let was_cancelled = answer.get("return").is_some();
        let want: &[&str] = match was_cancelled {
            true => &FAILURE,
            false => &SUCCESS,
        };
        assert_eq!(states(&mut qmp, "c", "concluded"), want, "{answer}");
        let job = qmp.ok("query-jobs", json!({}))[0].clone();
        assert_eq!(job["current-progress"], 1);
        if was_cancelled {
            cancelled += 1;
            assert_eq!(job["error"], "Operation canceled");
        } else {
            succeeded += 1;
            let desc = answer["error"]["desc"].as_str().unwrap();
            let want = "Job 'c' in state 'concluded' cannot accept command verb 'cancel'";
            assert_eq!(desc, want);
        }
        qmp.ok("job-dismiss", json!({"id": "c"}));
        assert_eq!(states(&mut qmp, "c", "null"), ["null"]);
    }
    assert!(
        cancelled > 0,
        "{cancelled} cancelled, {succeeded} succeeded"
    );
    // Nothing of it is left: the node is free, and an image can be made in it.
    qmp.ok(
        "blockdev-create",
        create(
            "c",
            &json!({"driver": "qcow2", "file": "f",
        "size": 1 << 20}),
        ),
    );
    assert_eq!(states(&mut qmp, "c", "concluded"), SUCCESS);
    qmp.ok("blockdev-del", json!({"node-name": "f"}));
    qemu_img(&["check", "-f", "qcow2", &daemon.text("f")]);
}

#[test]
fn a_daemon_killed_while_it_creates_leaves_an_image_or_none() {
    let mut random = Random(0x0051_0b0a_7e5e_ed02);
    let options = json!({"driver": "qcow2", "file": "f", "size": 1_u64 << 40});
    for round in 0..12 {
        let mut daemon = Daemon::start(&[]);
        file(&daemon.path("f"), 0);
        let mut qmp = daemon.qmp();
        let node = json!({"driver": "file", "node-name": "f", "filename": daemon.text("f")});
        qmp.ok("blockdev-add", node);
        qmp.ok("blockdev-create", create("c", &options));
        let delay = random.below(1 << (round + 3));
        std::thread::sleep(std::time::Duration::from_micros(delay));
        daemon.signal("KILL");
        assert!(!daemon.wait().success());
        // A header is written only when what it points to is there.
        let image = std::fs::read(daemon.path("f")).unwrap();
        if image.starts_with(b"QFI\xfb") {
            qemu_img(&["check", "-f", "qcow2", &daemon.text("f")]);
        }
    }
}

#[test]
fn quit_ends_jobs_before_it_is_answered() {
    let mut daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let options = json!({"driver": "file", "filename": daemon.text("new"), "size": 4096});
    qmp.ok("blockdev-create", create("c", &options));
    qmp.ok("quit", json!({}));
    let states = states(&mut qmp, "c", "null");
    let ended: [&[&str]; 2] = [&SUCCESS, &FAILURE];
    let (_, rest) = states.split_last().unwrap();
    assert!(ended.iter().any(|want| rest == *want), "{states:?}");
    assert_eq!(qmp.answer(), None);
    assert!(daemon.wait().success());
}
