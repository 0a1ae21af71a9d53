//! The command line: order, abbreviations, and QSD's sentences, compared with QSD where it is
//! installed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::process::{Command, Stdio};

use support::*;

/// Standard error without the program's name, and whether it succeeded.
fn complaint(program: &str, arguments: &[&str]) -> (String, bool) {
    let output = Command::new("timeout")
        .args(["-k", "1", "60", program])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let name = program.rsplit('/').next().unwrap();
    (
        text.replace(&format!("{name}: "), ""),
        output.status.success(),
    )
}

/// Command lines that fail, each in its own way.
const MISTAKES: &[&[&str]] = &[
    &["--nosuch"],
    &["--bl"],
    &["-x"],
    &["pos"],
    &["--help=5"],
    &["--daemonize=1"],
    &["--blockdev", "nosuch"],
    &["--blockdev", "driver=null-co"],
    &["--blockdev", "null-co,node-name=n,size=1G"],
    &["--blockdev", "null-co,node-name=1x"],
    &["--blockdev", "null-co,node-name=n,read-zeroes"],
    &["--blockdev", "null-co,node-name=n,size=5,nosuch=1"],
    &["--blockdev", "file,node-name=n,filename=/nonexistent/f"],
    &["--blockdev", "raw,node-name=n,file=zz"],
    &[
        "--blockdev",
        "qcow2,node-name=n,file.driver=file,file.filename=/dev/null",
    ],
    &[
        "--blockdev",
        "null-co,node-name=n",
        "--blockdev",
        "null-co,node-name=n",
    ],
    &["--export", "nbd,id=e,node-name=r"],
    &["--export=nbd,id=e,node-name=r"],
    &["--export", "help"],
    &[
        "--blockdev",
        "null-co,node-name=n",
        "--export",
        "nbd,id=e,node-name=n",
    ],
    &[
        "--blockdev",
        "null-co,node-name=n",
        "--export",
        "nbd,id=1,node-name=n",
    ],
    &["--nbd-server", "addr.type=unix,addr.path=/nonexistent/s"],
    &["--nbd-server", "path=/x"],
    &["--nbd-server", "addr.type=fd,addr.str=9"],
    &["--monitor", "zz"],
    &["--monitor", "zz,mode=readline"],
    &["--monitor", "chardev=zz,pretty=maybe"],
    &["--monitor", ""],
    &["--chardev", "socket,path=/nonexistent/x,id=c"],
    &[
        "--chardev",
        "socket,id=c,path=/nonexistent/x,server=on,wait=off",
    ],
    &["--chardev", "nosuch,id=c"],
    &["--chardev", "socket,path=/x"],
    &["--chardev", "socket,id=c,host=localhost"],
    &["--chardev", "stdio,id=c", "--chardev", "stdio,id=d"],
    &["--chardev", "stdio,id=c,foo=1"],
    &[
        "--chardev",
        "stdio,id=c",
        "--monitor",
        "c",
        "--monitor",
        "c",
    ],
    &["--daemonize", "--chardev", "stdio,id=c"],
    &["--object", "nosuch,id=1"],
    &["--object", "iothread"],
    &["--object", "iothread,id=i", "--object", "iothread,id=i"],
    &["--object", "iothread,id=i,poll-max-ns=-1"],
    &["--pidfile", "/nonexistent/p"],
    // What was right so far does not help: order counts, and the first mistake is told.
    &[
        "--export",
        "nbd,id=e,node-name=n",
        "--blockdev",
        "null-co,node-name=n",
    ],
    &["--blockdev", "nosuch", "--nosuch"],
];

#[test]
fn mistakes_are_told_as_qsd_tells_them() {
    let compare = has(QSD);
    for arguments in MISTAKES {
        let (ours, success) = complaint(OUTPORTD, arguments);
        assert!(!success && !ours.is_empty(), "{arguments:?}");
        if compare {
            // Which drivers there are, QSD does not say.
            let ours = match ours.split_once("\nDrivers: ") {
                Some((sentence, _)) => format!("{sentence}\n"),
                None => ours,
            };
            assert_eq!((ours, success), complaint(QSD, arguments), "{arguments:?}");
        }
    }
}

#[test]
fn questions_are_answered_whatever_follows() {
    for arguments in [
        &["-V", "--nosuch"][..],
        &["--vers"],
        &["-h", "pos"],
        &["--object", "help"],
    ] {
        let output = Command::new(OUTPORTD).args(arguments).output().unwrap();
        assert!(
            output.status.success() && !output.stdout.is_empty(),
            "{arguments:?}"
        );
    }
}

#[test]
fn drivers_are_listed_and_explained() {
    let node = "driver=vmdk,node-name=n";
    let (unknown, _) = complaint(OUTPORTD, &["--blockdev", node]);
    let sentence = "Parameter 'driver' does not accept value 'vmdk'";
    let want = format!("--blockdev {node}: {sentence}\nDrivers: blkdebug, ");
    assert!(unknown.starts_with(&want), "{unknown}");
    for name in ["qcow2", "raw", "throttle", "nbd"] {
        assert!(unknown.contains(name), "{name}: {unknown}");
    }
    for (question, word) in [
        ("help", "qcow2"),
        ("driver=qcow2,help", "lazy-refcounts=on|off"),
        ("file,help", "filename=<str>"),
    ] {
        let arguments = ["--blockdev", question];
        let output = Command::new(OUTPORTD).args(arguments).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && said.contains(word),
            "{question}: {said}"
        );
    }
}

#[test]
fn json_and_keyval_mean_the_same() {
    let daemon = Daemon::start(&[
        "--blockdev",
        r#"{"driver": "null-co", "node-name": "a", "size": 1048576}"#,
        "--blockdev",
        "driver=null-co,node-name=b,size=1048576",
    ]);
    let nodes = daemon
        .qmp()
        .ok("query-named-block-nodes", serde_json::json!({}));
    let size = |at: usize| nodes[at]["image"]["virtual-size"].as_u64();
    assert_eq!((size(0), size(1)), (Some(1 << 20), Some(1 << 20)));
}

#[test]
fn a_pidfile_lives_as_long_as_the_daemon() {
    let mut daemon = Daemon::start(&["--pidfile", "{}/pid"]);
    let mut qmp = daemon.qmp();
    let pid = std::fs::read_to_string(daemon.path("pid")).unwrap();
    assert_eq!(pid.trim(), daemon.pid().to_string());
    let path = daemon.text("pid");
    let (second, _) = complaint(OUTPORTD, &["--pidfile", &path]);
    let want = "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n";
    assert_eq!(second, want);
    qmp.ok("quit", serde_json::json!({}));
    assert!(daemon.wait().success());
    assert!(!daemon.path("pid").exists());
}

#[test]
fn daemonize_returns_when_the_daemon_serves() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let status = Command::new(OUTPORTD)
        .args(["--daemonize", "--pidfile", &path("pid"), "--monitor", "m"])
        .status();
    assert!(!status.unwrap().success(), "a failed startup is told");
    let chardev = format!("socket,id=m,path={},server=on,wait=off", path("qmp"));
    let status = Command::new(OUTPORTD)
        .args([
            "--daemonize",
            "--pidfile",
            &path("pid"),
            "--chardev",
            &chardev,
            "--monitor",
            "m",
        ])
        .status();
    assert!(status.unwrap().success());
    let pid: u32 = std::fs::read_to_string(path("pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let mut qmp = Qmp::negotiated(&folder.path().join("qmp"));
    let cwd = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    assert_eq!(cwd.to_str(), Some("/"));
    qmp.ok("quit", serde_json::json!({}));
    assert_eq!(qmp.answer(), None);
    eventually("it is gone", || {
        !std::path::Path::new(&path("pid")).exists()
    });
}

#[test]
fn signals_end_it_even_while_it_waits_for_a_client() {
    for signal in ["TERM", "INT", "HUP"] {
        let mut daemon = Daemon::start(&["--chardev", "socket,id=w,path={}/w,server=on"]);
        eventually("it waits", || daemon.path("w").exists());
        daemon.signal(signal);
        assert!(daemon.wait().success(), "{signal}");
        assert!(!daemon.path("w").exists() && !daemon.path("qmp").exists());
    }
}
