//! Two monitors that change the same nodes at once.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::*;

/// A daemon with three monitors, the image `a` below the `blkdebug` node `d`, which holds it up,
/// and the image `b`. Both images have a persistent bitmap.
struct Race {
    daemon: Daemon,
    one: Qmp,
    two: Qmp,
    /// Lets go what is held up.
    three: Qmp,
}

impl Race {
    fn new() -> Self {
        let second = "socket,id=n2,path={}/qmp2,server=on,wait=off";
        let third = "socket,id=n3,path={}/qmp3,server=on,wait=off";
        let daemon = Daemon::start(&[
            "--chardev",
            second,
            "--monitor",
            "n2",
            "--chardev",
            third,
            "--monitor",
            "n3",
        ]);
        let at = |name: &str| Qmp::negotiated(&daemon.path(name));
        let (mut one, two, three) = (at("qmp"), at("qmp2"), at("qmp3"));
        for image in ["a", "b"] {
            let image = daemon.text(image);
            qemu_img(&["create", "-q", "-f", "qcow2", &image, "16M"]);
            qemu_img(&["bitmap", "--add", &image, "kept"]);
        }
        let file = json!({"driver": "file", "filename": daemon.text("a")});
        let debug = json!({"driver": "blkdebug", "node-name": "d", "image": file});
        one.ok("blockdev-add", debug);
        Self {
            daemon,
            one,
            two,
            three,
        }
    }

    /// Both images were for reading, and are being reopened for writing.
    fn reopening() -> Self {
        let mut race = Self::new();
        for name in ["a", "b"] {
            let image = race.image(name, true);
            race.one.ok("blockdev-add", image);
        }
        let both = json!({"options": [race.image("a", false), race.image("b", false)]});
        race.begin("flush_to_disk", "blockdev-reopen", &both);
        race
    }

    /// The definition of an image.
    fn image(&self, name: &str, read_only: bool) -> Value {
        let file = match name {
            "a" => json!("d"),
            // Named, so that it can be spelled out again.
            _ => json!({"driver": "file", "node-name": "bf", "filename": self.daemon.text(name)}),
        };
        json!({"driver": "qcow2", "node-name": name, "file": file, "read-only": read_only})
    }

    /// Monitor one asks for something that waits at `event` of `d`.
    fn begin(&mut self, event: &str, command: &str, arguments: &Value) {
        let hold = json!({"node-name": "d", "event": event, "tag": "held"});
        self.one.ok("x-blkdebug-break", hold);
        let line = json!({"execute": command, "arguments": arguments});
        self.one.send(format!("{line}\n").as_bytes());
        let three = &mut self.three;
        eventually("it is held up", || {
            let debug = three.ok("x-query-blkdebug", json!({"node-name": "d"}));
            debug["suspended"] == json!(["held"])
        });
    }

    /// Lets it go on; its answer.
    fn finish(&mut self) -> Value {
        let resume = json!({"node-name": "d"});
        self.three.ok("x-blkdebug-resume", resume);
        self.one.answer().unwrap()
    }

    /// What an image says of its bitmap: whether somebody has it in use.
    fn is_marked(&self, image: &str) -> bool {
        let output = Command::new("qemu-img")
            .args(["info", "-U", "--output=json", &self.daemon.text(image)])
            .output()
            .unwrap();
        let info: Value = serde_json::from_slice(&output.stdout).unwrap();
        let flags = &info["format-specific"]["data"]["bitmaps"][0]["flags"];
        flags.as_array().unwrap().contains(&json!("in-use"))
    }
}

#[test]
fn a_node_that_is_reopened_is_not_deleted() {
    if !has("qemu-img") {
        return;
    }
    let mut race = Race::reopening();
    // The first one is open, and marks its bitmap; the second one is planned.
    for name in ["a", "b"] {
        let said = race.two.err("blockdev-del", json!({"node-name": name}));
        assert_eq!(said, format!("Node {name} is in use"));
    }
    assert_eq!(race.finish(), json!({"return": {}}));
    assert!(race.is_marked("b"), "it is written now");
    for name in ["a", "b"] {
        race.two.ok("blockdev-del", json!({"node-name": name}));
        assert!(!race.is_marked(name), "{name} is closed");
    }
}

#[test]
fn a_second_reopen_comes_after_the_first() {
    if !has("qemu-img") {
        return;
    }
    let mut race = Race::reopening();
    let back = json!({"execute": "blockdev-reopen",
        "arguments": {"options": [race.image("b", true)]}});
    race.two.send(format!("{back}\n").as_bytes());
    assert_eq!(race.finish(), json!({"return": {}}));
    assert_eq!(race.two.answer(), Some(json!({"return": {}})));
    let nodes = race.two.ok("query-named-block-nodes", json!({}));
    let read_only = |name: &str| {
        let mut nodes = nodes.as_array().unwrap().iter();
        nodes.find(|it| it["node-name"] == name).unwrap()["ro"].clone()
    };
    assert_eq!(
        (read_only("a"), read_only("b")),
        (json!(false), json!(true))
    );
    assert!(race.is_marked("a") && !race.is_marked("b"));
}

#[test]
fn a_node_that_changes_hands_is_not_deleted() {
    if !has("qemu-img") {
        return;
    }
    let mut race = Race::new();
    let image = race.image("a", false);
    race.one.ok("blockdev-add", image.clone());
    let leave = json!({"node-name": "a", "active": false});
    race.begin("flush_to_disk", "blockdev-set-active", &leave);
    let said = race.two.err("blockdev-del", json!({"node-name": "a"}));
    assert_eq!(said, "Node a is in use");
    assert_eq!(race.finish(), json!({"return": {}}));
    assert!(!race.is_marked("a"));
    race.two.ok("blockdev-del", json!({"node-name": "a"}));
}
