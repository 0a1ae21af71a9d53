//! Our `nbd` node speaks TLS with other people's servers, and says why not as QEMU does.

use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::pki::Profile;
use super::support::{Daemon, Qmp, eventually, has, with};
use super::{Served, World, free_port};

/// nbdkit's memory plugin; killed with the test.
pub(crate) struct Kit {
    child: Child,
    pub(crate) port: u16,
}

impl Kit {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let port = free_port();
        let child = Command::new("nbdkit")
            .args(["-f", "-i", "localhost", "-p", &port.to_string()])
            .args(arguments)
            .args(["memory", "1M"])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("nbdkit listens", || {
            std::net::TcpStream::connect(("localhost", port)).is_ok()
        });
        Self { child, port }
    }
}

impl Drop for Kit {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Adds an `nbd` node and removes it again; what is said if it fails.
pub(crate) fn try_node(qmp: &mut Qmp, port: u16, more: &Value) -> Result<(), String> {
    let node = json!({"driver": "nbd", "node-name": "n", "export": "x", "read-only": true,
        "server": {"type": "inet", "host": "localhost", "port": port.to_string()}});
    let answer = qmp.execute("blockdev-add", with(node, more));
    match answer["error"]["desc"].as_str() {
        Some(sentence) => Err(sentence.to_owned()),
        None => {
            qmp.ok("blockdev-del", json!({"node-name": "n"}));
            Ok(())
        }
    }
}

#[test]
fn servers_are_believed_as_qemu_believes_them() {
    if !(has("qemu-storage-daemon") && has("nbdkit")) {
        return;
    }
    let world = World::new();
    world.server("old-style", &Profile::leaf("localhost", 1));
    world.server("old", &Profile::server().expired());
    let theirs = Served::by(Daemon::qsd(&[]).unwrap(), &world, json!({}));
    let certificates = |name: &str| format!("--tls-certificates={}", world.path(name).display());
    let plain = Kit::start(&["--tls=off"]);
    let kit = Kit::start(&[
        "--tls=require",
        "--tls-verify-peer",
        &certificates("server"),
    ]);
    let by_name = Kit::start(&["--tls=require", &certificates("old-style")]);
    let expired = Kit::start(&["--tls=require", &certificates("old")]);
    let good = json!({"tls-creds": "good"});
    let cases = [
        (theirs.port, good.clone(), true),
        (kit.port, good.clone(), true),
        (by_name.port, good.clone(), true),
        (expired.port, good.clone(), false),
        (plain.port, good.clone(), false),
        (kit.port, json!({}), false),
        (kit.port, json!({"tls-creds": "distrusting"}), false),
        (kit.port, json!({"tls-creds": "careless"}), true),
        (
            theirs.port,
            json!({"tls-creds": "good", "tls-hostname": "other"}),
            false,
        ),
        (
            theirs.port,
            json!({"tls-creds": "good", "tls-hostname": "localhost"}),
            true,
        ),
        (theirs.port, json!({"tls-creds": "own"}), false),
        (theirs.port, json!({"tls-creds": "nosuch"}), false),
        (theirs.port, json!({"tls-creds": "az"}), false),
    ];
    let az = ["--object", "authz-simple,id=az,identity=x"];
    let mut said = Vec::new();
    for daemon in [Daemon::start(&az), Daemon::qsd(&az).unwrap()] {
        let mut qmp = daemon.qmp();
        for id in ["good", "distrusting"] {
            qmp.ok("object-add", world.object(id, id, "client"));
        }
        qmp.ok("object-add", world.object("own", "server", "server"));
        let careless = with(
            world.object("careless", "good", "client"),
            &json!({"verify-peer": false}),
        );
        qmp.ok("object-add", careless);
        let cases = cases.iter();
        said.push(
            cases
                .map(|(port, more, _)| try_node(&mut qmp, *port, more))
                .collect::<Vec<_>>(),
        );
    }
    for (number, (port, more, wanted)) in cases.iter().enumerate() {
        assert_eq!(said[0][number].is_ok(), *wanted, "{port} {more}: {said:?}");
        assert_eq!(said[0][number], said[1][number], "{port} {more}");
    }
}

#[test]
fn a_server_that_refuses_the_client_is_an_error_in_words() {
    if !has("nbdkit") {
        return;
    }
    let world = World::new();
    let certificates = format!("--tls-certificates={}", world.path("server").display());
    let kit = Kit::start(&["--tls=require", "--tls-verify-peer", &certificates]);
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    for id in ["strange", "nobody", "expired"] {
        qmp.ok("object-add", world.object(id, id, "client"));
        let said = try_node(&mut qmp, kit.port, &json!({"tls-creds": id})).unwrap_err();
        assert!(
            said.starts_with("Failed to read option reply: ") || said.contains("TLS"),
            "{id}: {said}"
        );
    }
}

#[test]
fn bytes_go_both_ways_through_an_encrypted_node() {
    if !(has("qemu-storage-daemon") && has("nbdkit") && has("nbdcopy")) {
        return;
    }
    let world = World::new();
    let certificates = format!("--tls-certificates={}", world.path("server").display());
    let kit = Kit::start(&["--tls=require", "--tls-verify-peer", &certificates]);
    let daemon = Daemon::start(&[]);
    let mut qmp = daemon.qmp();
    qmp.ok("object-add", world.object("good", "good", "client"));
    let server = json!({"type": "inet", "host": "localhost", "port": kit.port.to_string()});
    qmp.ok(
        "blockdev-add",
        json!({"driver": "nbd", "node-name": "n", "tls-creds": "good", "server": server}),
    );
    let socket = daemon.text("s");
    qmp.ok(
        "nbd-server-start",
        json!({"addr": {"type": "unix", "data": {"path": socket}}}),
    );
    qmp.ok(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "n", "writable": true}),
    );
    let content: Vec<u8> = (0..1_u32 << 20)
        .map(|n| (n ^ n >> 7 ^ n >> 13) as u8)
        .collect();
    let (from, back) = (daemon.text("from"), daemon.text("back"));
    std::fs::write(&from, &content).unwrap();
    let uri = format!("nbd+unix:///n?socket={socket}");
    for (source, target) in [(&from, &uri), (&uri, &back)] {
        let copied = Command::new("timeout")
            .args(["60", "nbdcopy", source, target])
            .status();
        assert!(copied.unwrap().success(), "{source} {target}");
    }
    assert!(std::fs::read(back).unwrap() == content);
}

#[test]
fn a_server_without_a_name_cannot_be_believed() {
    if !has("qemu-storage-daemon") {
        return;
    }
    let world = World::new();
    let theirs = Daemon::qsd(&[]).unwrap();
    let mut their_qmp = theirs.qmp();
    their_qmp.ok("object-add", world.object("tls0", "server", "server"));
    let socket = theirs.text("s");
    let address = json!({"type": "unix", "data": {"path": socket}});
    let start = json!({"addr": address, "tls-creds": "tls0"});
    their_qmp.ok("nbd-server-start", start);
    let node = json!({"driver": "null-co", "node-name": "n", "size": 1 << 20});
    their_qmp.ok("blockdev-add", node);
    let export = json!({"type": "nbd", "id": "x", "node-name": "n", "name": "x"});
    their_qmp.ok("block-export-add", export);
    let mut said = Vec::new();
    for daemon in [Daemon::start(&[]), Daemon::qsd(&[]).unwrap()] {
        let mut qmp = daemon.qmp();
        qmp.ok("object-add", world.object("good", "good", "client"));
        let node = json!({"driver": "nbd", "node-name": "n", "export": "x", "read-only": true,
            "tls-creds": "good", "server": {"type": "unix", "path": socket}});
        said.push(qmp.err("blockdev-add", node.clone()));
        qmp.ok(
            "blockdev-add",
            with(node, &json!({"tls-hostname": "localhost"})),
        );
    }
    assert_eq!(said[0], said[1]);
}
