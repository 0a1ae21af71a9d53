//! Monitors: negotiation, order, several at once, clients that do not read, and the end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use support::*;

#[test]
fn nothing_runs_before_negotiation() {
    let daemon = Daemon::start(&[]);
    let mut qmp = Qmp::connect(&daemon.path("qmp"));
    assert_eq!(
        qmp.err("query-version", json!({})),
        "Expecting capabilities negotiation with 'qmp_capabilities'"
    );
    qmp.ok("qmp_capabilities", json!({"enable": ["oob"]}));
    let version = qmp.ok("query-version", json!({}));
    assert_eq!(version["qemu"]["major"], 11);
    assert!(version["package"].as_str().unwrap().starts_with("outport "));
    assert_eq!(
        qmp.err("qmp_capabilities", json!({})),
        "Capabilities negotiation is already complete, command ignored"
    );
}

#[test]
fn many_commands_in_one_write_are_answered_in_order() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    let mut all = String::new();
    for id in 0..500 {
        all += &json!({"execute": "query-block-exports", "id": id}).to_string();
    }
    qmp.send(all.as_bytes());
    qmp.half_close();
    for id in 0..500 {
        assert_eq!(qmp.answer().unwrap()["id"], id);
    }
    assert_eq!(
        qmp.answer(),
        None,
        "closed after what was asked was answered"
    );
}

#[test]
fn a_second_client_waits_for_the_first_and_negotiates_anew() {
    let daemon = Daemon::start(&[]);
    let first = daemon.qmp();
    let second = UnixStream::connect(daemon.path("qmp")).unwrap();
    second
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let mut byte = [0];
    let waits = std::io::Read::read(&mut &second, &mut byte).unwrap_err();
    assert_eq!(waits.kind(), std::io::ErrorKind::WouldBlock);
    drop(first);
    second.set_read_timeout(Some(DEADLINE)).unwrap();
    assert_eq!(std::io::Read::read(&mut &second, &mut byte).unwrap(), 1);
    assert_eq!(byte, *b"{");
}

#[test]
fn events_reach_every_negotiated_monitor() {
    let daemon = Daemon::start(&[
        "--chardev",
        "socket,id=n,path={}/qmp2,server=on,wait=off",
        "--monitor",
        "n",
        "--blockdev",
        "null-co,node-name=n",
        "--nbd-server",
        "addr.type=unix,addr.path={}/nbd",
        "--export",
        "nbd,id=e,node-name=n",
    ]);
    let mut one = daemon.qmp();
    let mut other = Qmp::negotiated(&daemon.path("qmp2"));
    one.ok("block-export-del", json!({"id": "e"}));
    assert_eq!(one.events.len(), 1, "the event stands before the answer");
    assert_eq!(one.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert_eq!(other.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
}

#[test]
fn quit_deletes_exports_first_and_answers_nothing_after_itself() {
    let mut daemon = Daemon::start(&[
        "--blockdev",
        "null-co,node-name=n",
        "--nbd-server",
        "addr.type=unix,addr.path={}/nbd",
        "--export",
        "nbd,id=e,node-name=n",
    ]);
    let mut qmp = daemon.qmp();
    qmp.send(br#"{"execute": "quit", "id": 1} {"execute": "query-version", "id": 2}"#);
    let answer = qmp.answer().unwrap();
    assert_eq!(answer, json!({"return": {}, "id": 1}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "e"}));
    assert_eq!(qmp.answer(), None);
    assert!(daemon.wait().success());
    assert!(!daemon.path("nbd").exists() && !daemon.path("qmp").exists());
}

#[test]
fn a_client_that_never_reads_is_dropped_and_holds_up_nobody() {
    let daemon = Daemon::start(&[
        "--chardev",
        "socket,id=n,path={}/qmp2,server=on,wait=off",
        "--monitor",
        "n",
    ]);
    let mut other = Qmp::negotiated(&daemon.path("qmp2"));
    let flood = UnixStream::connect(daemon.path("qmp")).unwrap();
    flood
        .set_write_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    (&flood)
        .write_all(b"{\"execute\": \"qmp_capabilities\"}")
        .unwrap();
    // Each answer has some 30 KiB; nobody reads them.
    while (&flood)
        .write_all(b"{\"execute\": \"query-qmp-schema\"}\n")
        .is_ok()
    {}
    other.ok("query-version", json!({}));
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let rss = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    let kib: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 64 << 10, "{kib} KiB resident");
    eventually("it is dropped", || {
        daemon.log().contains("monitor client dropped")
    });
    // Its place is free again.
    daemon.qmp().ok("query-version", json!({}));
}

#[test]
fn garbage_is_survived() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    qmp.send(b"\xff]}{\"execute\": 5}\n[1, 2\xff");
    qmp.send(b"{\"execute\": \"query-version\", \"id\": \"last\"}");
    let mut errors = 0;
    loop {
        let answer = qmp.answer().unwrap();
        if answer["id"] == "last" {
            assert!(answer.get("return").is_some(), "{answer}");
            break;
        }
        assert_eq!(answer["error"]["class"], "GenericError");
        errors += 1;
    }
    assert!(errors >= 3, "{errors}");
}

#[test]
fn a_slow_command_holds_up_only_its_own_monitor() {
    let daemon = Daemon::start(&[
        "--chardev",
        "socket,id=n,path={}/qmp2,server=on,wait=off",
        "--monitor",
        "n",
    ]);
    let mut slow = daemon.qmp();
    let mut other = Qmp::negotiated(&daemon.path("qmp2"));
    let mut object = plugin_object(&daemon, "slow");
    let refusal = slow.err("object-add", object.clone());
    pin(&mut object, &refusal);
    // Compiling it takes a tenth of a second and more; it is tried again if this test was stopped
    // for as long.
    let add = json!({"execute": "object-add", "arguments": object});
    eventually("who asks for less is answered first", || {
        slow.send(add.to_string().as_bytes());
        let arguments = json!({"driver": "null-co", "node-name": "n"});
        other.ok("blockdev-add", arguments);
        let first = slow.has_nothing_to_read();
        assert_eq!(slow.answer().unwrap(), json!({"return": {}}));
        slow.ok("object-del", json!({"id": "slow"}));
        other.ok("blockdev-del", json!({"node-name": "n"}));
        first
    });
}

/// The ids of the answers to messages of a client, while a command of it waits for an NBD server
/// and after that.
fn ids_around_a_command_that_waits(daemon: &Daemon, enable: Value) -> (Vec<Value>, Vec<Value>) {
    let mute = UnixListener::bind(daemon.path("mute")).unwrap();
    let mut qmp = Qmp::connect(&daemon.path("qmp"));
    qmp.ok("qmp_capabilities", json!({"enable": enable}));
    let server = json!({"type": "unix", "path": daemon.text("mute")});
    let add = json!({"driver": "nbd", "node-name": "n", "server": server});
    for message in [
        json!({"execute": "blockdev-add", "arguments": add, "id": "waits"}),
        json!({"execute": "query-version", "id": "in order"}),
        json!({"exec-oob": "query-version", "id": "refused"}),
        json!({"exec-oob": "no-such-command", "id": "unknown"}),
        json!({"exec-oob": 7, "id": "no name"}),
        json!({"exec-oob": "query-version", "execute": "query-version", "id": "both"}),
    ] {
        qmp.send(message.to_string().as_bytes());
    }
    let mut before = Vec::new();
    if enable == json!(["oob"]) {
        before.extend((0..3).map(|_| qmp.answer().unwrap()["id"].clone()));
    }
    drop(mute.accept().unwrap());
    drop(mute);
    let after = (before.len()..6).map(|_| qmp.answer().unwrap()["id"].clone());
    let after = after.collect();
    std::fs::remove_file(daemon.path("mute")).unwrap();
    (before, after)
}

#[test]
fn exec_oob_overtakes_a_command_that_waits() {
    let daemons = [Some(Daemon::start(&[])), Daemon::qsd(&[])];
    for daemon in daemons.into_iter().flatten() {
        let (before, after) = ids_around_a_command_that_waits(&daemon, json!(["oob"]));
        assert_eq!(before, ["refused", "unknown", "no name"]);
        assert_eq!(after, ["waits", "in order", "both"]);
        // Without the capability nothing overtakes.
        let (_, after) = ids_around_a_command_that_waits(&daemon, json!([]));
        let order = ["waits", "in order", "refused", "unknown", "no name", "both"];
        assert_eq!(after, order);
    }
}

#[test]
fn what_was_read_ahead_is_answered_in_order() {
    let daemon = Daemon::start(&[]);
    let mut qmp = Qmp::connect(&daemon.path("qmp"));
    qmp.ok("qmp_capabilities", json!({"enable": ["oob"]}));
    let mut all = String::new();
    for id in 0..500 {
        let long = "x".repeat(id * 32);
        all += &json!({"execute": "query-version", "arguments": {"x": long}, "id": id}).to_string();
    }
    let mut writer = qmp.stream().try_clone().unwrap();
    let sender = std::thread::spawn(move || writer.write_all(all.as_bytes()));
    for id in 0..500 {
        assert_eq!(qmp.answer().unwrap()["id"], id);
    }
    sender.join().unwrap().unwrap();
    qmp.half_close();
    assert_eq!(qmp.answer(), None);
}

#[test]
fn quit_answers_nothing_that_was_read_ahead() {
    let mut daemon = Daemon::start(&[]);
    let mut qmp = Qmp::connect(&daemon.path("qmp"));
    qmp.ok("qmp_capabilities", json!({"enable": ["oob"]}));
    qmp.send(br#"{"execute": "quit", "id": 1} {"execute": "query-version", "id": 2}"#);
    assert_eq!(qmp.answer().unwrap(), json!({"return": {}, "id": 1}));
    assert_eq!(qmp.answer(), None);
    assert!(daemon.wait().success());
}

#[test]
fn the_line_after_a_broken_string_is_a_command() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    qmp.send(b"{\"a\":\"\n");
    assert_eq!(qmp.answer().unwrap()["error"]["class"], "GenericError");
    for _ in 0..2 {
        qmp.ok("query-version", json!({}));
    }
}

#[test]
fn standard_input_is_a_monitor_too() {
    let mut child = Command::new(OUTPORTD)
        .args([
            "--chardev",
            "stdio,id=c",
            "--monitor",
            "chardev=c,pretty=on",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin
        .write_all(b"{'execute': 'qmp_capabilities'}{'execute': 'quit', 'id': 'x'}")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("{\r\n    \"QMP\": {\r\n"), "{said}");
    assert!(said.contains("\"id\": \"x\""), "{said}");
    drop(stdin);
}

/// The backend of a socket in the daemon's folder.
fn socket(daemon: &Daemon, name: &str) -> serde_json::Value {
    let addr = json!({"type": "unix", "data": {"path": daemon.text(name)}});
    json!({"type": "socket", "data": {"addr": addr, "wait": false}})
}

#[test]
fn monitors_come_and_go_at_run_time() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    qmp.ok(
        "chardev-add",
        json!({"id": "c", "backend": socket(&daemon, "second")}),
    );
    let monitor = json!({"qom-type": "monitor-qmp", "id": "mon", "chardev": "c"});
    qmp.ok("object-add", monitor);
    let again = json!({"qom-type": "monitor-qmp", "id": "mon2", "chardev": "c"});
    assert_eq!(
        qmp.err("object-add", again),
        "chardev 'c' is already in use"
    );
    assert_eq!(
        qmp.err("chardev-remove", json!({"id": "c"})),
        "Chardev 'c' is busy"
    );
    let mut second = Qmp::negotiated(&daemon.path("second"));
    assert_eq!(
        second.err("object-del", json!({"id": "mon"})),
        "Cannot delete the current QMP monitor"
    );
    second.ok("query-version", json!({}));
    // Events reach it, too.
    let options = json!({"driver": "file", "filename": daemon.text("f"), "size": 1});
    qmp.ok(
        "blockdev-create",
        json!({"job-id": "j", "options": options}),
    );
    assert_eq!(second.event("JOB_STATUS_CHANGE")["status"], "created");
    qmp.ok("object-del", json!({"id": "mon"}));
    while second.read().is_some() {}
    qmp.ok("chardev-remove", json!({"id": "c"}));
    eventually("its file is gone", || !daemon.path("second").exists());
}

#[test]
fn a_monitor_can_end_with_its_client() {
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    qmp.ok(
        "chardev-add",
        json!({"id": "c", "backend": socket(&daemon, "second")}),
    );
    let monitor = json!({"qom-type": "monitor-qmp", "id": "mon", "chardev": "c",
        "close-action": "delete", "pretty": true});
    qmp.ok("object-add", monitor);
    drop(UnixStream::connect(daemon.path("second")).unwrap());
    eventually("monitor and device are gone", || {
        let chardevs = qmp.ok("query-chardev", json!({}));
        let objects = qmp.ok("qom-list", json!({"path": "/objects"})).to_string();
        chardevs.as_array().unwrap().len() == 1 && !objects.contains("\"mon\"")
    });
}

#[test]
fn character_devices_are_qsds() {
    let unix = |path: &str| json!({"type": "unix", "data": {"path": path}});
    let add = |id: &str, data: serde_json::Value| {
        let backend = json!({"type": "socket", "data": data});
        ("chardev-add", json!({"id": id, "backend": backend}))
    };
    let discards = json!({"type": "null", "data": {}});
    compare(
        &[],
        &[
            add(
                "c1",
                json!({"addr": unix("$D/s1"), "server": true, "wait": false}),
            ),
            add(
                "c1",
                json!({"addr": unix("$D/s2"), "server": true, "wait": false}),
            ),
            add("c2", json!({"addr": unix("$D/none"), "server": false})),
            add(
                "c3",
                json!({"addr": unix("/nonexistent/d/s"), "wait": false}),
            ),
            add(
                "sw",
                json!({"addr": unix("$D/x"), "server": false, "wait": false}),
            ),
            add(
                "tl",
                json!({"addr": unix("$D/x"), "tls-creds": "t", "wait": false}),
            ),
            add("zz", json!({"addr": unix("$D/x"), "zz": 1})),
            ("chardev-add", json!({"id": "n", "backend": discards})),
            (
                "chardev-add",
                json!({"id": "n2", "backend": {"type": "null"}}),
            ),
            (
                "chardev-add",
                json!({"id": "n3", "backend": {"type": "nosuch", "data": {}}}),
            ),
            ("query-chardev", json!({})),
            ("chardev-remove", json!({"id": "zz"})),
            ("chardev-remove", json!({"id": "m"})),
            ("chardev-remove", json!({"id": "c1"})),
            ("chardev-remove", json!({"id": "n"})),
            ("query-chardev", json!({})),
        ],
    );
}
