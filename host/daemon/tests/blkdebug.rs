//! `blkdebug`: QSD's sentences and what clients see of the rules, compared live; and held requests.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use support::*;

/// A node over the file `f`.
fn debug(name: &str, more: Value) -> (&'static str, Value) {
    (
        "blockdev-add",
        with(
            json!({"driver": "blkdebug", "node-name": name, "image": "f"}),
            &more,
        ),
    )
}

fn null() -> (&'static str, Value) {
    let options = json!({"driver": "null-co", "node-name": "f", "size": 1 << 20});
    ("blockdev-add", options)
}

#[test]
fn errors_are_those_of_qsd() {
    let folder = tempfile::tempdir().unwrap();
    let mut requests = vec![null(), debug("b", json!({}))];
    let configs = [
        "[foo]\nx = \"1\"",
        "[inject-error]\nevent = \"nosuch\"",
        "[inject-error]\nerrno = \"5\"",
        "[inject-error]\nevent = \"read_aio\"\nzz = \"5\"",
        "garbage",
        "[inject-error]\nevent=\"read_aio\"",
        "[inject-error]\nevent = \"read_aio\"\nsector = \"x\"",
        "[inject-error]\nevent = \"read_aio\"\nonce = \"maybe\"",
        "[inject-error]\nevent = \"read_aio\"\niotype = \"zz\"",
        "[set-state \"x\"]\n event = \"read_aio\"\n new_state = \"2\"\n# c\n",
        "[set-state]\nnew_state = \"3\"",
        "[inject-error]\nevent = \"read_aio\"\nerrno = \"-3\"",
        "[inject-error]\nevent = \"read_aio\"\nonce",
        "",
    ];
    for (number, config) in configs.iter().enumerate() {
        let path = folder.path().join(number.to_string());
        std::fs::write(&path, format!("{config}\n")).unwrap();
        requests.push(debug(&format!("c{number}"), json!({"config": path})));
    }
    let options = [
        json!({"config": "/nonexistent/rules"}),
        json!({"align": 3}),
        json!({"align": -1}),
        json!({"align": 4096, "max-transfer": 5000}),
        json!({"max-transfer": 1000}),
        json!({"max-transfer": 4_294_967_296_u64}),
        json!({"align": 4096, "opt-write-zero": 512}),
        json!({"align": 4096, "max-write-zero": 512}),
        json!({"align": 4096, "opt-discard": 512}),
        json!({"align": 4096, "opt-discard": 8192, "max-discard": 12288}),
        json!({"align": 4096, "max-discard": 5000}),
        json!({"align": 1_099_511_627_776_u64}),
        json!({"inject-error": [{"event": "zz"}]}),
        json!({"inject-error": [{}]}),
        json!({"inject-error": [{"event": "read_aio", "iotype": "zz"}]}),
        json!({"inject-error": [{"event": "read_aio", "errno": -5}]}),
        json!({"inject-error": [{"event": "read_aio", "sector": -2}]}),
        json!({"set-state": [{"event": "read_aio"}]}),
        json!({"set-state": [{"event": "read_aio", "new_state": -1}]}),
        json!({"take-child-perms": ["zz"]}),
        json!({"take-child-perms": ["write"], "unshare-child-perms": ["write"]}),
    ];
    for (number, more) in options.into_iter().enumerate() {
        requests.push(debug(&format!("o{number}"), more));
    }
    // The last one takes write and shares it with nobody.
    requests.push(debug("late", json!({})));
    requests.push(debug("taker", json!({"take-child-perms": ["write"]})));
    requests.push(("blockdev-del", json!({"node-name": "f"})));
    same(&requests);
}

/// Requests of one client to one daemon; the lines that say how they ended.
fn outcomes(socket: &str, requests: &[&str]) -> Vec<String> {
    let commands = requests.iter().flat_map(|request| ["-c", request]);
    let output = Command::new("qemu-io")
        .args(["-f", "raw", "-t", "none"])
        .arg(format!("nbd+unix:///e?socket={socket}"))
        .args(commands)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr);
    let lines = text.lines().filter(|line| !line.ends_with("ops/sec)"));
    lines.map(str::to_owned).collect()
}

/// Sets up an export of a node over `rules`.
fn exported(qmp: &mut Qmp, folder: &str, rules: &Value, raw: bool) -> String {
    let path = format!("{folder}/file");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let socket = format!("{folder}/nbd");
    qmp.ok(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": path, "discard": "unmap"}),
    );
    let (command, mut options) = debug("b", rules.clone());
    options["discard"] = "unmap".into();
    qmp.ok(command, options);
    if raw {
        let options = json!({"driver": "raw", "node-name": "r", "file": "b", "discard": "unmap"});
        qmp.ok("blockdev-add", options);
    }
    let address = json!({"type": "unix", "data": {"path": socket}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    qmp.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": if raw { "r" } else { "b" },
            "name": "e", "writable": true}),
    );
    socket
}

#[test]
fn clients_see_what_clients_of_qsd_see() {
    if !has(QSD) || !has("qemu-io") {
        return;
    }
    let inject = |rule: Value| json!({"inject-error": [rule]});
    // Not after a read that fails: QSD cuts its client off.
    let situations = [
        (inject(json!({"event": "none"})), vec!["write 0 4k"]),
        (inject(json!({"event": "none"})), vec!["read 0 4k"]),
        (
            inject(json!({"event": "none", "sector": 8})),
            vec![
                "write 0 4k",
                "write 4k 4k",
                "write 4k 512",
                "write 5k 512",
                "write 3k 2k",
            ],
        ),
        (
            inject(json!({"event": "none", "iotype": "discard", "errno": 28})),
            vec!["write 0 4k", "discard 64k 64k", "write -z 64k 64k"],
        ),
        (
            inject(json!({"event": "none", "iotype": "write-zeroes", "once": true})),
            vec!["discard 64k 64k", "write -z 64k 64k", "write -z 64k 64k"],
        ),
        (
            inject(json!({"event": "write_aio", "iotype": "write", "errno": 28, "once": true})),
            vec!["write 0 4k", "write 0 4k", "read 0 4k"],
        ),
        (
            inject(json!({"event": "pwritev", "iotype": "write", "errno": 1})),
            vec!["write 0 4k", "read 0 4k"],
        ),
        (
            inject(json!({"event": "pwritev_done", "iotype": "write"})),
            vec!["write 0 4k", "write 0 4k", "read 0 4k"],
        ),
        (
            inject(json!({"event": "pwritev_zero", "iotype": "write"})),
            vec!["write 0 4k", "write -z 64k 64k", "write 0 4k"],
        ),
        (
            inject(json!({"event": "flush_to_os", "iotype": "write"})),
            vec!["write 0 4k", "flush", "write 0 4k"],
        ),
        (
            inject(json!({"event": "flush_to_disk", "iotype": "write"})),
            vec!["write 0 4k", "flush", "write 0 4k"],
        ),
        (
            inject(json!({"event": "read_aio"})),
            vec!["write 0 4k", "read 0 4k"],
        ),
        (
            inject(json!({"event": "read_aio", "errno": 0})),
            vec!["read 0 4k", "write 0 4k"],
        ),
        (
            json!({"set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
                "inject-error": [{"event": "write_aio", "state": 2, "once": true}]}),
            vec!["write 0 4k", "write 0 4k", "write 0 4k"],
        ),
        (
            json!({"set-state": [{"event": "write_aio", "new_state": 2},
                    {"event": "write_aio", "new_state": 3}],
                "inject-error": [{"event": "write_aio", "state": 3}]}),
            vec!["write 0 4k", "write 0 4k", "write 0 4k"],
        ),
        (
            json!({"set-state": [{"event": "write_aio", "new_state": 2},
                    {"event": "write_aio", "new_state": 3}],
                "inject-error": [{"event": "write_aio", "state": 2}]}),
            vec!["write 0 4k", "write 0 4k", "write 0 4k"],
        ),
        (
            json!({"inject-error": [
                {"event": "write_aio", "iotype": "write", "once": true, "errno": 28},
                {"event": "write_aio", "iotype": "write", "errno": 1}]}),
            vec!["write 0 4k", "write 0 4k"],
        ),
        (
            json!({"align": 4096, "inject-error": [{"event": "none", "sector": 0}]}),
            vec!["write 4k 4k", "write 512 512", "write 1k 8k"],
        ),
        (
            json!({"max-transfer": 4096, "inject-error": [{"event": "none", "sector": 16,
                "iotype": "write"}]}),
            vec!["write 0 8k", "write 8k 4k", "write 0 16k"],
        ),
    ];
    for (rules, requests) in situations {
        for raw in [false, true] {
            let [ours, theirs] = [Daemon::start(&[]), Daemon::qsd(&[]).unwrap()].map(|daemon| {
                let folder = daemon.text("");
                let socket = exported(&mut daemon.qmp(), folder.trim_end_matches('/'), &rules, raw);
                outcomes(&socket, &requests)
            });
            assert_eq!(ours, theirs, "raw: {raw}, {rules}");
        }
    }
}

struct Client(Child);

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A client in the background.
fn client(socket: &str, requests: &[&str]) -> Client {
    let commands = requests.iter().flat_map(|request| ["-c", request]);
    let child = Command::new("qemu-io")
        .args(["-f", "raw", "-t", "none"])
        .arg(format!("nbd+unix:///e?socket={socket}"))
        .args(commands)
        .stdout(Stdio::null())
        .spawn();
    Client(child.unwrap())
}

#[test]
fn a_held_request_waits_for_its_tag_and_for_nothing_else() {
    if !has("qemu-io") {
        return;
    }
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let folder = daemon.text("");
    let socket = exported(&mut qmp, folder.trim_end_matches('/'), &json!({}), true);
    let at = |tag: &str| json!({"node-name": "b", "event": "write_aio", "tag": tag});
    qmp.ok("x-blkdebug-break", at("a"));
    qmp.ok("x-blkdebug-break", at("never"));
    let mut held = client(&socket, &["write -P 9 0 4k"]);
    let query = |qmp: &mut Qmp| qmp.ok("x-query-blkdebug", json!({"node-name": "b"}));
    eventually("the request is held", || {
        query(&mut qmp)["suspended"] == json!(["a"])
    });
    qmp.ok(
        "x-blkdebug-remove-break",
        json!({"node-name": "b", "tag": "never"}),
    );
    // Commands and other clients go on.
    assert_eq!(
        outcomes(&socket, &["write 8k 4k"])[0],
        "wrote 4096/4096 bytes at offset 8192"
    );
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    let list = qmp.ok("query-block-exports", json!({}));
    assert_eq!(list[0]["shutting-down"], json!(true));
    assert_eq!(
        qmp.err("blockdev-del", json!({"node-name": "r"})),
        "Node r is in use"
    );
    assert_eq!(
        qmp.err("x-blkdebug-resume", json!({"node-name": "b", "tag": "zz"})),
        "No request with tag 'zz' is held up"
    );
    assert_eq!(
        qmp.err("x-blkdebug-resume", json!({"node-name": "f"})),
        "Node 'f' is not a blkdebug node"
    );
    qmp.ok("x-blkdebug-resume", json!({"node-name": "b", "tag": "a"}));
    eventually("the export is gone", || {
        qmp.ok("query-block-exports", json!({})) == json!([])
    });
    assert_eq!(
        std::fs::read(daemon.path("file")).unwrap()[0],
        9,
        "the write was done"
    );
    held.0.wait().unwrap();
}

#[test]
fn the_end_of_the_daemon_lets_everyone_go() {
    if !has("qemu-io") {
        return;
    }
    let mut daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let folder = daemon.text("");
    let socket = exported(&mut qmp, folder.trim_end_matches('/'), &json!({}), false);
    let at = json!({"node-name": "b", "event": "pwritev_done", "tag": "a"});
    qmp.ok("x-blkdebug-break", at);
    let _held = client(&socket, &["write 0 4k"]);
    eventually("the request is held", || {
        qmp.ok("x-query-blkdebug", json!({"node-name": "b"}))["suspended"] == json!(["a"])
    });
    qmp.ok("quit", json!({}));
    assert!(daemon.wait().success());
}
