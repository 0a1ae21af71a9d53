//! Pre-shared keys: libnbd, QEMU and nbdkit with ours, and ours with theirs.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::node::{Kit, try_node};
use super::support::{Daemon, has, with};
use super::{COPIED, World, copy_there_and_back, free_port};

/// Directories with `keys.psk`: `own` has alice and qemu, `other` has alice with another key.
pub(crate) fn keys(world: &World) {
    let make = |name: &str, users: &[&str]| {
        let folder = world.path(name);
        std::fs::create_dir_all(&folder).unwrap();
        for user in users {
            let done = Command::new("psktool")
                .args(["-u", user, "-p"])
                .arg(folder.join("keys.psk"))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            assert!(done.unwrap().success());
        }
    };
    make("own", &["alice", "qemu"]);
    make("other", &["alice", "mallory"]);
}

fn object(id: &str, dir: &Path, endpoint: &str) -> Value {
    json!({"qom-type": "tls-creds-psk", "id": id, "dir": dir, "endpoint": endpoint})
}

/// Serves a null node as `x` to who knows a key; the port.
pub(crate) fn serve(daemon: &Daemon, world: &World) -> u16 {
    let mut qmp = daemon.qmp();
    let port = free_port();
    let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20,
        "read-zeroes": true});
    qmp.ok("blockdev-add", node);
    qmp.ok("object-add", object("tls0", &world.path("own"), "server"));
    let address = json!({"type": "inet",
        "data": {"host": "localhost", "port": port.to_string(), "ipv6": false}});
    let start = json!({"addr": address, "tls-creds": "tls0", "tls-authz": "nosuch"});
    qmp.ok("nbd-server-start", start);
    let export = json!({"type": "nbd", "id": "e", "node-name": "n", "name": "x"});
    qmp.ok("block-export-add", export);
    port
}

#[test]
fn libnbd_and_qemu_are_served_if_they_know_the_key() {
    if !(has("psktool") && has("nbdinfo") && has("qemu-img")) {
        return;
    }
    let world = World::new();
    keys(&world);
    let daemon = Daemon::start(&[]);
    let port = serve(&daemon, &world);
    for (folder, user, admitted) in [
        ("own", "alice", true),
        ("own", "qemu", true),
        ("other", "alice", false),
        ("other", "mallory", false),
    ] {
        let file = world.path(folder).join("keys.psk");
        let uri = format!(
            "nbds://{user}@localhost:{port}/x?tls-psk-file={}",
            file.display()
        );
        let info = Command::new("timeout")
            .args(["20", "nbdinfo", "--size", &uri])
            .output()
            .unwrap();
        assert_eq!(info.status.success(), admitted, "{folder} {user}: {info:?}");
        for priority in [
            "NORMAL",
            "NORMAL:-VERS-TLS1.3",
            "NORMAL:-VERS-ALL:+VERS-TLS1.3",
        ] {
            let object = format!(
                "tls-creds-psk,id=t,endpoint=client,priority={priority},username={user},dir={}",
                world.path(folder).display()
            );
            let node = format!("driver=nbd,host=localhost,port={port},export=x,tls-creds=t");
            let info = Command::new("qemu-img")
                .args(["info", "--object", &object, "--image-opts", &node])
                .output()
                .unwrap();
            assert_eq!(
                info.status.success(),
                admitted,
                "{user} {priority}: {info:?}"
            );
        }
    }
    // Who has a certificate and no key is a stranger.
    let uri = format!(
        "nbds://localhost:{port}/x?tls-certificates={}",
        world.path("good").display()
    );
    let info = Command::new("timeout")
        .args(["20", "nbdinfo", "--size", &uri])
        .output();
    assert!(!info.unwrap().status.success());
}

#[test]
fn bytes_arrive_as_they_were_sent() {
    if !(has("psktool") && has("nbdcopy")) {
        return;
    }
    let world = World::new();
    keys(&world);
    let daemon = Daemon::start(&[]);
    let port = serve(&daemon, &world);
    let mut qmp = daemon.qmp();
    std::fs::write(world.path("raw"), vec![0; COPIED]).unwrap();
    let file = json!({"driver": "file", "node-name": "raw", "filename": world.path("raw")});
    qmp.ok("blockdev-add", file);
    let export = json!({"type": "nbd", "id": "raw", "node-name": "raw", "writable": true});
    qmp.ok("block-export-add", export);
    let keys = world.path("own").join("keys.psk");
    let uri = format!(
        "nbds://alice@localhost:{port}/raw?tls-psk-file={}",
        keys.display()
    );
    copy_there_and_back(&world, &uri, &["4096", "1048576"]);
}

#[test]
fn our_node_shows_its_key_to_qemu_and_nbdkit() {
    if !(has("psktool") && has("nbdkit") && has("qemu-storage-daemon")) {
        return;
    }
    let world = World::new();
    keys(&world);
    let theirs = Daemon::qsd(&[]).unwrap();
    let qemu = serve(&theirs, &world);
    let file = world.path("own").join("keys.psk");
    let file = format!("--tls-psk={}", file.display());
    let kit = Kit::start(&["--tls=require", &file]);
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    for (id, folder, user) in [("own", "own", "alice"), ("other", "other", "alice")] {
        let client = object(id, &world.path(folder), "client");
        qmp.ok("object-add", with(client, &json!({"username": user})));
    }
    let old = with(
        object("old", &world.path("own"), "client"),
        &json!({"priority": "NORMAL:-VERS-TLS1.3"}),
    );
    qmp.ok("object-add", old);
    for port in [qemu, kit.port] {
        for (id, admitted) in [("own", true), ("old", true), ("other", false)] {
            let done = try_node(&mut qmp, port, &json!({"tls-creds": id}));
            assert_eq!(done.is_ok(), admitted, "{port} {id}: {done:?}");
        }
    }
}

#[test]
fn mistakes_have_qemus_words() {
    if !(has("psktool") && has("qemu-storage-daemon")) {
        return;
    }
    let world = World::new();
    keys(&world);
    std::fs::create_dir_all(world.path("junk")).unwrap();
    std::fs::write(world.path("junk/keys.psk"), "junk\nalice:zz\n").unwrap();
    let own = |endpoint: &str| object("t", &world.path("own"), endpoint);
    let cases = [
        own("server"),
        own("client"),
        with(own("client"), &json!({"username": "alice"})),
        with(own("client"), &json!({"username": "nosuch"})),
        with(own("server"), &json!({"username": "alice"})),
        object("t", &world.path("junk"), "server"),
        with(
            object("t", &world.path("junk"), "client"),
            &json!({"username": "alice"}),
        ),
        object("t", Path::new("/nonexistent"), "server"),
        json!({"qom-type": "tls-creds-psk", "id": "t", "endpoint": "server"}),
    ];
    let said = [Daemon::start(&[]), Daemon::qsd(&[]).unwrap()].map(|daemon| {
        let mut qmp = daemon.qmp();
        cases.each_ref().map(|case| {
            let answer = qmp.execute("object-add", case.clone());
            let error = answer["error"]["desc"].as_str().map(str::to_owned);
            if error.is_none() {
                qmp.ok("object-del", json!({"id": "t"}));
            }
            error
        })
    });
    assert_eq!(said[0], said[1]);
    assert!(said[0].iter().flatten().count() >= 5);
}
