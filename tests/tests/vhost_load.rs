//! libblkio's Rust core against our exports: every kind of ring, one to four queues, waiting for
//! calls and looking for completions. What it writes, it reads.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use outport_tests::{Daemon, Server, TempImage, check_image, run};
use serde_json::{Value, json};

fn daemon(image: &TempImage, iothreads: &[&str]) -> Daemon {
    let mut daemon = Daemon::builder(Server::Outport).start();
    daemon.add_node("disk", image);
    let mut export = json!({"type": "vhost-user-blk", "id": "disk", "node-name": "disk",
        "writable": true, "num-queues": 4,
        "addr": {"type": "unix", "path": daemon.path("blk.sock")}});
    if !iothreads.is_empty() {
        for id in iothreads {
            daemon
                .qmp
                .ok("object-add", json!({"qom-type": "iothread", "id": id}));
        }
        export["iothread"] = json!(iothreads);
    }
    daemon.qmp.ok("block-export-add", export);
    daemon
}

fn load(daemon: &Daemon, args: &str) -> Value {
    let socket = daemon.path("blk.sock");
    let fixed = ["--unix", socket.to_str().unwrap()];
    let all: Vec<&str> = fixed.into_iter().chain(args.split_whitespace()).collect();
    let said = run(env!("CARGO_BIN_EXE_vhost-load"), &all);
    serde_json::from_str(&said).expect("vhost-load prints JSON")
}

fn verify(image: &TempImage, iothreads: &[&str]) {
    let daemon = daemon(image, iothreads);
    let mut seed = 0;
    for queues in 1..=4 {
        for rings in ["", "--packed", "--no-event-idx", "--packed --no-event-idx"] {
            for poll in ["", "--poll"] {
                seed += 1;
                let args = format!(
                    "--op verify --bs 4k --qd 24 --size 4M --queues {queues} --seed {seed} \
                     {rings} {poll}"
                );
                let report = load(&daemon, &args);
                assert_eq!(
                    report["ops"],
                    1024 / queues * queues * 2,
                    "{args}: {report}"
                );
                assert_eq!(report["errors"], 0, "{args}: {report}");
                assert_eq!(report["wrong"], 0, "{args}: {report}");
            }
        }
    }
    daemon.stop();
    if image.format() == "qcow2" {
        check_image(image.path(), "after the guest");
    }
}

#[test]
fn every_ring_and_number_of_queues_on_raw() {
    verify(&TempImage::zeroes(8 << 20), &["a", "b"]);
}

#[test]
fn every_ring_and_number_of_queues_on_qcow2() {
    verify(&TempImage::qcow2(8 << 20, ""), &[]);
}

#[test]
fn a_load_is_measured() {
    let image = TempImage::random(4 << 20, 1);
    let daemon = daemon(&image, &[]);
    let pid = daemon.pid();
    for args in [
        "--op read --bs 4k --qd 32",
        "--op read --bs 128k --qd 4 --order sequential",
        "--op write --bs 4k --qd 1 --queues 2",
    ] {
        let report = load(&daemon, &format!("{args} --seconds 0.2 --pid {pid}"));
        assert_eq!(report["errors"], 0, "{args}: {report}");
        assert!(report["ops"].as_u64() > Some(0), "{args}: {report}");
        assert!(
            report["server_cpu_us_per_op"].is_number(),
            "{args}: {report}"
        );
    }
    daemon.stop();
}
