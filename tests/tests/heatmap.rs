//! `examples/context-heatmap` as its users have it: built, attached, rotated, printed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::process::Command;

use outport_tests::{Daemon, Server, TempImage, python, requires_python_nbd};
use serde_json::json;

const CELL: u64 = 65536;

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_heatmap_shows_what_was_written_and_when() {
    if !requires_python_nbd() {
        return;
    }
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/context-heatmap");
    let mut daemon = Daemon::builder(Server::Outport).nbd().start();
    let plugin = daemon.path("heatmap.wasm");
    let builder = Server::Outport
        .program()
        .with_file_name("outport-plugin-build");
    run(Command::new(builder).arg(&example).arg("-o").arg(&plugin));

    let object = json!({"qom-type": "wasm-plugin", "id": "heat", "filename": plugin,
                        "allow-unpinned": true});
    daemon.qmp.ok("object-add", object);
    let image = TempImage::zeroes(16 * CELL);
    daemon.add_node("disk", &image);
    daemon.add_export_with(
        "disk",
        json!({"writable": true, "metadata-contexts": [{"plugin": "heat"}]}),
    );

    // Another monitor, as the script is another program.
    let monitor = daemon.path("second.sock");
    let chardev = json!({"type": "socket", "data": {"server": true, "wait": false,
        "addr": {"type": "unix", "data": {"path": monitor}}}});
    daemon
        .qmp
        .ok("chardev-add", json!({"id": "second", "backend": chardev}));
    let object = json!({"qom-type": "monitor-qmp", "id": "again", "chardev": "second"});
    daemon.qmp.ok("object-add", object);
    let rotate = || {
        let mut command = Command::new(python());
        command
            .arg(example.join("rotate.py"))
            .arg(&monitor)
            .arg("disk");
        run(command.args(["--once", "--minutes", "3"]));
    };
    let uri = daemon.uri("disk");
    let print = || {
        let mut command = Command::new(python());
        command.arg(example.join("heatmap.py")).arg(&uri);
        run(command.args(["--width", "16"]))
    };
    let write = |daemon: &Daemon, cell: u64| {
        let mut client = daemon.client("disk");
        assert_eq!(client.write(cell * CELL + 100, &[1; 512]).unwrap(), Ok(()));
    };
    assert_eq!(print(), "................\n");
    for cell in [2, 5, 7] {
        rotate();
        write(&daemon, cell);
    }
    write(&daemon, 2);
    assert_eq!(print(), "..1..2.1........\n");
    rotate();
    assert_eq!(print(), "..2..3.2........\n");
    rotate();
    assert_eq!(print(), "..3....3........\n", "the oldest is forgotten");
}
