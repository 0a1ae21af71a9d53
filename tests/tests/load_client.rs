//! The load client of the benchmark counts what the server did, and harms nothing it only reads.

use outport_tests::{Daemon, TempImage, assert_same, pattern, run};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// Runs nbd-load against export `disk`; its report.
fn load(daemon: &Daemon, args: &str) -> Value {
    let socket = daemon
        .nbd()
        .path()
        .to_str()
        .expect("temp paths are UTF-8")
        .to_owned();
    let pid = daemon.pid().to_string();
    let fixed = [
        "--unix",
        &socket,
        "--export",
        "disk",
        "--pid",
        &pid,
        "--seconds",
        "0.2",
    ];
    let all: Vec<&str> = fixed.into_iter().chain(args.split_whitespace()).collect();
    let said = run(env!("CARGO_BIN_EXE_nbd-load"), &all);
    serde_json::from_str(&said).expect("nbd-load prints JSON")
}

#[test]
fn reads_of_every_shape_succeed() {
    let content = pattern(4 * MIB, 1);
    let image = TempImage::raw(&content);
    let mut daemon = Daemon::start();
    daemon.serve("disk", &image);
    for args in [
        "--bs 4k --qd 32",
        "--bs 4k --qd 1 --simple",
        "--bs 1M --qd 8 --order sequential",
        "--bs 4k --qd 16 --connections 4 --threads 2",
        "--bs 512 --stride 64k --order once",
        "--bs 256k --qd 4 --connections 3 --recv-buffer 4096",
    ] {
        let report = load(&daemon, args);
        assert_eq!(report["errors"], 0, "{args}: {report}");
        assert!(report["ops"].as_u64() > Some(0), "{args}: {report}");
        assert!(
            report["server_cpu_us_per_op"].is_number(),
            "{args}: {report}"
        );
    }
    daemon.stop();
    assert_same(&image.content(), &content, "after reads only");
}

#[test]
fn writing_once_reaches_every_block() {
    let image = TempImage::qcow2(4 * MIB as u64, "");
    let mut daemon = Daemon::start();
    daemon.serve("disk", &image);
    let report = load(
        &daemon,
        "--op write --bs 64k --qd 8 --order once --final-flush",
    );
    assert_eq!(
        (&report["ops"], &report["errors"]),
        (&64.into(), &0.into()),
        "{report}"
    );
    assert!(report["flush_ms"].is_number(), "{report}");
    daemon.stop();
    let content = image.content();
    for (number, block) in content.chunks(65536).enumerate() {
        assert!(
            block.iter().any(|byte| *byte != 0),
            "block {number} was not written"
        );
    }
}
