//! Several NBD servers, places that are given back, statistics, descriptors over QMP.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use support::*;

fn serving(options: &str) -> (Daemon, Qmp) {
    let daemon = Daemon::start(&[
        "--blockdev",
        "null-co,node-name=n,size=1048576",
        "--nbd-server",
        &format!("addr.type=unix,addr.path={{}}/nbd{options}"),
    ]);
    let qmp = daemon.qmp();
    (daemon, qmp)
}

fn export(id: &str) -> Value {
    json!({"type": "nbd", "id": id, "node-name": "n", "name": id, "writable": true})
}

#[test]
fn servers_are_started_used_and_stopped_by_id() {
    let (daemon, mut qmp) = serving("");
    let unix = |name: &str| json!({"type": "unix", "data": {"path": daemon.path(name)}});
    let inet = json!({"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}});
    qmp.ok(
        "nbd-server-start",
        json!({"id": "tcp", "addr": inet, "max-connections": 3}),
    );
    qmp.ok(
        "nbd-server-start",
        json!({"id": "two", "addr": unix("two")}),
    );
    assert_eq!(
        qmp.err("nbd-server-start", json!({"addr": unix("x")})),
        "NBD server already running"
    );
    assert_eq!(
        qmp.err("nbd-server-start", json!({"id": "two", "addr": unix("x")})),
        "NBD server 'two' already running"
    );
    assert_eq!(
        qmp.err("nbd-server-start", json!({"id": "1x", "addr": unix("x")})),
        "Parameter 'id' expects an identifier"
    );
    // One name on each server: they know nothing of each other.
    for (id, server) in [("a", None), ("b", Some("two")), ("c", Some("tcp"))] {
        let mut wanted = export(id);
        wanted["name"] = json!("disk");
        if let Some(server) = server {
            wanted["server"] = json!(server);
        }
        qmp.ok("block-export-add", wanted);
    }
    let mut wanted = export("d");
    wanted["server"] = json!("nosuch");
    assert_eq!(
        qmp.err("block-export-add", wanted),
        "NBD server 'nosuch' not running"
    );
    let servers = qmp.ok("query-nbd-servers", json!({}));
    assert_eq!(servers[0]["exports"], json!(["a"]));
    assert_eq!(servers[0]["max-connections"], 100);
    assert_eq!(servers[0]["handshake-max-seconds"], 10);
    assert_eq!(
        servers[0]["addr"],
        json!({"type": "unix", "path": daemon.path("nbd")})
    );
    assert_eq!(servers[2]["id"], "two");
    // The port that was chosen.
    let port: u16 = servers[1]["addr"]["port"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    assert_ne!(port, 0);
    std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();

    let mut first = Nbd::enter(&daemon.path("nbd"), "disk").unwrap();
    let mut second = Nbd::enter(&daemon.path("two"), "disk").unwrap();
    let connected = || {
        let servers = daemon_servers(&daemon);
        servers[0]["connections"] == 1 && servers[2]["connections"] == 1
    };
    drop(qmp);
    eventually("both are counted", connected);
    let mut qmp = daemon.qmp();
    qmp.ok("nbd-server-stop", json!({"id": "two"}));
    assert_eq!(qmp.event("BLOCK_EXPORT_DELETED"), json!({"id": "b"}));
    assert!(second.is_cut());
    assert_eq!(first.read(0, 512), Some(vec![0; 512]), "another server's");
    assert!(!daemon.path("two").exists());
    assert_eq!(
        qmp.err("nbd-server-stop", json!({"id": "two"})),
        "NBD server 'two' not running"
    );
    qmp.ok("nbd-server-stop", json!({}));
    assert!(first.is_cut());
    assert_eq!(qmp.ok("query-nbd-servers", json!({}))[0]["id"], "tcp");
    assert_eq!(
        qmp.err("nbd-server-stop", json!({})),
        "NBD server not running"
    );
}

/// Asks over a monitor connection of its own.
fn daemon_servers(daemon: &Daemon) -> Value {
    daemon.qmp().ok("query-nbd-servers", json!({}))
}

#[test]
fn clients_beyond_the_limit_wait_and_get_the_place_that_is_given_back() {
    let (daemon, mut qmp) = serving(",max-connections=2");
    qmp.ok("block-export-add", export("e"));
    let first = Nbd::enter(&daemon.path("nbd"), "e").unwrap();
    let _second = Nbd::enter(&daemon.path("nbd"), "e").unwrap();
    let path = daemon.path("nbd");
    let third = std::thread::spawn(move || Nbd::enter(&path, "e").unwrap());
    // It hangs in the backlog: the daemon has two clients, and still has when asked again.
    for _ in 0..20 {
        assert_eq!(qmp.ok("query-nbd-servers", json!({}))[0]["connections"], 2);
        assert_eq!(qmp.ok("query-export-stats", json!({}))[0]["clients"], 2);
    }
    assert!(!third.is_finished());
    drop(first);
    let mut third = third.join().unwrap();
    assert_eq!(third.read(0, 512), Some(vec![0; 512]));
    assert_eq!(qmp.ok("query-export-stats", json!({}))[0]["connections"], 3);
}

#[test]
fn an_export_may_be_full_and_gives_places_back() {
    let (daemon, mut qmp) = serving("");
    let mut narrow = export("narrow");
    narrow["max-connections"] = json!(1);
    qmp.ok("block-export-add", narrow);
    qmp.ok("block-export-add", export("wide"));
    for _ in 0..3 {
        let mut only = Nbd::enter(&daemon.path("nbd"), "narrow").unwrap();
        assert!(
            Nbd::enter(&daemon.path("nbd"), "narrow").is_none(),
            "it is full"
        );
        assert!(Nbd::enter(&daemon.path("nbd"), "wide").is_some());
        assert_eq!(only.read(0, 512), Some(vec![0; 512]));
        drop(only);
        eventually("the place is free", || {
            qmp.ok("query-export-stats", json!({}))[1]["clients"] == 0
        });
    }
}

#[test]
fn what_was_done_is_counted() {
    let (daemon, mut qmp) = serving("");
    qmp.ok("block-export-add", export("e"));
    let mut client = Nbd::enter(&daemon.path("nbd"), "e").unwrap();
    for _ in 0..10 {
        client.read(0, 4096).unwrap();
    }
    assert!(client.read(1 << 20, 512).is_none(), "past the end");
    let stats = qmp.ok("query-export-stats", json!({}));
    let mut expected = json!({"id": "e", "node-name": "n", "clients": 1, "connections": 1,
        "rd-bytes": 40960, "wr-bytes": 0, "rd-operations": 10, "wr-operations": 0,
        "flush-operations": 0, "unmap-operations": 0, "errors": 1, "waited-operations": 0,
        "in-flight": 0, "waited-total-time-ns": 0});
    assert_eq!(stats, json!([expected.clone()]));
    // Another export of the node, on another thread.
    qmp.ok("object-add", json!({"qom-type": "iothread", "id": "io"}));
    let mut other = export("f");
    other["iothread"] = json!("io");
    qmp.ok("block-export-add", other);
    let mut second = Nbd::enter(&daemon.path("nbd"), "f").unwrap();
    second.read(0, 512).unwrap();
    let reads = |qmp: &mut Qmp| {
        let nodes = qmp.ok("query-blockstats", json!({"query-nodes": true}));
        assert_eq!(nodes[0]["node-name"], "n");
        nodes[0]["stats"]["rd_operations"].clone()
    };
    assert_eq!(reads(&mut qmp), 11);
    drop(client);
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    assert_eq!(reads(&mut qmp), 11, "an export that is gone still counts");
    assert_eq!(qmp.ok("query-blockstats", json!({})), json!([]));
    expected["id"] = json!("f");
    assert_eq!(
        qmp.ok("query-export-stats", json!({}))[0]["rd-operations"],
        1
    );
}

#[test]
fn node_statistics_have_qsds_shape() {
    let Some(theirs) = Daemon::qsd(&[]) else {
        return;
    };
    let ours = Daemon::start(&[]);
    let asked = |mut qmp: Qmp| {
        let null = json!({"driver": "null-co", "node-name": "n"});
        qmp.ok("blockdev-add", null);
        let raw = json!({"driver": "raw", "node-name": "r", "file": "n"});
        qmp.ok("blockdev-add", raw);
        let plain = qmp.ok("query-blockstats", json!({}));
        (
            plain,
            qmp.ok("query-blockstats", json!({"query-nodes": true})),
        )
    };
    assert_eq!(asked(ours.qmp()), asked(theirs.qmp()));
}

/// Sends a command with descriptors beside it.
fn send_with(monitor: &UnixStream, command: &Value, descriptors: &[BorrowedFd<'_>]) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(20))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    let line = format!("{command}\n");
    let bytes = [IoSlice::new(line.as_bytes())];
    let sent = sendmsg(monitor, &bytes, &mut control, SendFlags::empty()).unwrap();
    assert_eq!(sent, line.len());
}

#[test]
fn a_passed_listener_serves() {
    let daemon = Daemon::start(&["--blockdev", "null-co,node-name=n,size=1048576"]);
    let mut qmp = daemon.qmp();
    let path = daemon.path("passed");
    let listener = UnixListener::bind(&path).unwrap();
    let no_descriptor = qmp.err("getfd", json!({"fdname": "l"}));
    assert_eq!(no_descriptor, "No file descriptor supplied via SCM_RIGHTS");
    let getfd = |name: &str| json!({"execute": "getfd", "arguments": {"fdname": name}});
    send_with(qmp.stream(), &getfd("1l"), &[listener.as_fd()]);
    assert_eq!(
        qmp.answer().unwrap()["error"]["desc"],
        "Parameter 'fdname' expects a name not starting with a digit"
    );
    send_with(qmp.stream(), &getfd("l"), &[listener.as_fd()]);
    assert_eq!(qmp.answer().unwrap()["return"], json!({}));
    drop(listener);
    let address = json!({"type": "fd", "data": {"str": "l"}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    qmp.ok("block-export-add", export("e"));
    let mut client = Nbd::enter(&path, "e").unwrap();
    assert_eq!(client.read(0, 512), Some(vec![0; 512]));
    // It was used up.
    assert_eq!(
        qmp.err("closefd", json!({"fdname": "l"})),
        "File descriptor named 'l' not found"
    );
    qmp.ok("nbd-server-stop", json!({}));
    // A name that is given again closes what had it; a file is no socket.
    let file = tempfile::tempfile().unwrap();
    send_with(qmp.stream(), &getfd("f"), &[file.as_fd()]);
    assert_eq!(qmp.answer().unwrap()["return"], json!({}));
    let address = json!({"type": "fd", "data": {"str": "f"}});
    assert_eq!(
        qmp.err("nbd-server-start", json!({"addr": address})),
        "File descriptor 'f' is not a socket"
    );
}

#[test]
fn a_file_in_a_set_is_a_node() {
    let daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path={}/nbd"]);
    let mut qmp = daemon.qmp();
    let secret = daemon.path("secret");
    std::fs::write(&secret, vec![7; 65536]).unwrap();
    let file = std::fs::File::open(&secret).unwrap();
    std::fs::remove_file(&secret).unwrap();
    let add = json!({"execute": "add-fd", "arguments": {"fdset-id": 3, "opaque": "disk"}});
    send_with(qmp.stream(), &add, &[file.as_fd()]);
    let added = qmp.answer().unwrap()["return"].clone();
    assert_eq!(added["fdset-id"], 3);
    let sets = json!([{"fdset-id": 3, "fds": [{"fd": added["fd"], "opaque": "disk"}]}]);
    assert_eq!(qmp.ok("query-fdsets", json!({})), sets);
    let node = |name: &str, id: u32, read_only: bool| {
        json!({"driver": "file", "node-name": name, "filename": format!("/dev/fdset/{id}"),
            "read-only": read_only})
    };
    assert_eq!(
        qmp.err("blockdev-add", node("x", 9, true)),
        "Could not open '/dev/fdset/9': No such file or directory"
    );
    assert_eq!(
        qmp.err("blockdev-add", node("x", 3, false)),
        "Could not open '/dev/fdset/3': Permission denied"
    );
    qmp.ok("blockdev-add", node("n", 3, true));
    assert_eq!(
        qmp.err("remove-fd", json!({"fdset-id": 3, "fd": 9999})),
        "File descriptor named 'fdset-id:3, fd:9999' not found"
    );
    qmp.ok("remove-fd", json!({"fdset-id": 3}));
    assert_eq!(
        qmp.err("remove-fd", json!({"fdset-id": 3})),
        "File descriptor named 'fdset-id:3' not found"
    );
    // The node has its own copy.
    let mut wanted = export("e");
    wanted["writable"] = json!(false);
    qmp.ok("block-export-add", wanted);
    let mut client = Nbd::enter(&daemon.path("nbd"), "e").unwrap();
    assert_eq!(client.read(0, 4096), Some(vec![7; 4096]));
    assert_eq!(
        qmp.err("add-fd", json!({})),
        "No file descriptor supplied via SCM_RIGHTS"
    );
}

#[test]
fn descriptors_that_nobody_takes_do_not_pile_up() {
    let daemon = Daemon::start(&[]);
    let open = || {
        std::fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
            .unwrap()
            .count()
    };
    let mut qmp = daemon.qmp();
    let file = tempfile::tempfile().unwrap();
    let before = open();
    let version = json!({"execute": "query-version"});
    for _ in 0..50 {
        send_with(qmp.stream(), &version, &[file.as_fd(); 3]);
        assert!(qmp.answer().unwrap().get("return").is_some());
    }
    assert!(open() <= before + 16, "{before} became {}", open());
    drop(qmp);
    eventually("they go with the client", || open() <= before);
}
