//! The thread that answers commands makes no system call that a network may keep waiting.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::Write;
use std::process::{Command, Stdio};

use support::*;

const COMMANDS: &[u8] = br#"{"execute": "qmp_capabilities"}
{"execute": "query-named-block-nodes"}
{"execute": "quit"}
"#;

/// Commands on standard input, with these options: lines `THREAD call(...)`.
fn trace(options: &[&str]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    file(&folder.path().join("disk"), 1 << 20);
    let mut daemon = Command::new("strace")
        .args(["-f", "-y", "-qq", "-o", "trace", "-e"])
        .arg("trace=?open,openat,?fstat,?newfstatat,statx")
        .arg(env!("CARGO_BIN_EXE_outportd"))
        .args(["--chardev", "stdio,id=m", "--monitor", "m"])
        .args(options)
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut input = daemon.stdin.take().unwrap();
    input.write_all(COMMANDS).unwrap();
    assert!(daemon.wait().unwrap().success());
    let trace = std::fs::read_to_string(folder.path().join("trace")).unwrap();
    trace.lines().map(str::to_owned).collect()
}

/// Whether the line is a call of the thread that made the first one.
fn is_control(trace: &[String], line: &str) -> bool {
    let thread = |line: &str| line.split_once(' ').unwrap().0.to_owned();
    thread(line) == thread(&trace[0])
}

#[test]
fn names_of_hosts_are_looked_up_elsewhere() {
    if !has("strace") {
        return;
    }
    let server = "addr.type=inet,addr.host=localhost,addr.port=0";
    let trace = trace(&["--nbd-server", server]);
    let mut asked = trace.iter().filter(|line| line.contains("/etc/hosts"));
    let asked = asked.next().unwrap_or_else(|| panic!("nowhere: {trace:?}"));
    assert!(!is_control(&trace, asked), "{asked}");
}

#[test]
fn nodes_are_told_without_asking_the_server_of_a_file_system() {
    if !has("strace") {
        return;
    }
    let disk = "driver=file,node-name=f,filename=disk";
    let trace = trace(&["--blockdev", disk]);
    let asked = trace
        .iter()
        .filter(|line| is_control(&trace, line) && line.contains("/disk>"));
    let asked: Vec<_> = asked.collect();
    assert!(!asked.is_empty(), "nothing was asked: {trace:?}");
    for line in asked {
        assert!(line.contains("AT_STATX_DONT_SYNC"), "{line}");
    }
}
