//! `outport` as its users meet it: a program, its output and its exit codes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use outport_tests::{TempImage, can_mount, check_image, checksum_file, eventually, requires, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const OUTPORT: &str = env!("CARGO_BIN_EXE_outport");

fn outport(args: &[&str]) -> Output {
    let mut command = Command::new(OUTPORT);
    command.args(args).stdin(Stdio::null()).output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// `outport serve ... --json`, ready.
struct Served {
    process: Child,
    facts: Value,
}

impl Served {
    #[track_caller]
    fn start(args: &[&str]) -> Self {
        Self::start_as("serve", args)
    }

    #[track_caller]
    fn start_as(what: &str, args: &[&str]) -> Self {
        let mut command = Command::new(OUTPORT);
        command.arg(what).args(args).arg("--json");
        let mut process = command
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = process.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert!(
            !line.is_empty(),
            "outport {what} {args:?} ended: {:?}",
            process.wait()
        );
        Self {
            process,
            facts: serde_json::from_str(&line).unwrap(),
        }
    }

    fn fact(&self, name: &str) -> &str {
        self.facts[name].as_str().unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// How it ends after a signal.
    #[track_caller]
    fn stop(mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        let status = eventually("outport ends", || self.process.try_wait().unwrap());
        let daemon = self.facts["pid"].as_u64().unwrap();
        assert!(
            !Path::new(&format!("/proc/{daemon}")).exists(),
            "the daemon is still there"
        );
        status
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // Its end stops the daemon too; it may have ended already.
        if let Ok(None) = self.process.try_wait() {
            self.signal(Signal::TERM);
            let _ = self.process.wait();
        }
    }
}

#[test]
fn an_image_is_served_and_reads_back() {
    if !requires("nbdcopy") || !requires("nbdinfo") || !requires("qemu-img") {
        return;
    }
    let raw = TempImage::random(8 << 20, 1);
    let image = raw.converted("qcow2", &[]);
    let served = Served::start(&[image.str(), "--read-only"]);
    assert_eq!(served.fact("format"), "qcow2");
    let copy = TempImage::zeroes(0);
    run("nbdcopy", &[served.fact("uri"), copy.str()]);
    assert_eq!(checksum_file(copy.path()), checksum_file(raw.path()));
    let info: Value =
        serde_json::from_str(&run("nbdinfo", &["--json", served.fact("uri")])).unwrap();
    assert_eq!(info["exports"][0]["is_read_only"], true);
    assert_eq!(info["exports"][0]["export-size"], 8 << 20);

    let socket = served.fact("socket").to_owned();
    assert!(served.stop(Signal::INT).success());
    assert!(!Path::new(&socket).exists(), "{socket} is left behind");
    check_image(image.path(), "after Ctrl-C");
}

#[test]
fn an_image_is_mounted_as_a_file_until_somebody_unmounts_it() {
    if !can_mount() || !requires("qemu-img") {
        return;
    }
    let raw = TempImage::random(8 << 20, 1);
    let image = raw.converted("qcow2", &[]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a disk.raw");
    let mut mounted = Served::start_as("mount", &[image.str(), file.to_str().unwrap()]);
    assert_eq!(mounted.fact("format"), "qcow2");
    assert_eq!(checksum_file(&file), checksum_file(raw.path()));
    let write = std::fs::OpenOptions::new().write(true).open(&file);
    assert!(write.is_err(), "nobody asked for --rw");
    run("umount", &[file.to_str().unwrap()]);
    let status = eventually("outport ends", || mounted.process.try_wait().unwrap());
    assert!(status.success());
    assert!(!file.exists(), "it was made for the mount");
}

#[test]
fn what_is_written_to_a_mounted_file_is_in_the_image() {
    if !can_mount() || !requires("qemu-img") {
        return;
    }
    let image = TempImage::qcow2(64 << 20, "");
    let file = TempImage::zeroes(0);
    let mounted = Served::start_as("mount", &[image.str(), file.str(), "--rw"]);
    let data = vec![7; 3 << 20];
    let target = std::fs::OpenOptions::new().write(true).open(file.path());
    std::os::unix::fs::FileExt::write_all_at(&target.unwrap(), &data, 1 << 20).unwrap();
    assert!(mounted.stop(Signal::INT).success());
    check_image(image.path(), "after Ctrl-C");
    assert!(file.path().exists(), "it was there before");
    let (from, to) = (image.str(), file.str());
    run(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", from, to],
    );
    let content = std::fs::read(file.path()).unwrap();
    assert_eq!(content[1 << 20..4 << 20], data);
}

#[test]
fn what_was_written_is_there_after_sigterm() {
    if !requires("qemu-io") || !requires("qemu-img") {
        return;
    }
    let image = TempImage::qcow2(64 << 20, "");
    let served = Served::start(&[image.str(), "--export", "a disk"]);
    run(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 7 1M 3M", served.fact("uri")],
    );
    assert!(served.stop(Signal::TERM).success());
    check_image(image.path(), "after SIGTERM");
    let read = run(
        "qemu-io",
        &["-f", "qcow2", "-c", "read -P 7 1M 3M", image.str()],
    );
    assert!(!read.contains("Pattern verification failed"), "{read}");
}

/// Writes over NBD, and is killed before it flushes.
fn write_and_vanish(uri: &str) {
    let client = Command::new("qemu-io")
        .args([
            "-f",
            "raw",
            "-c",
            "write -P 7 0 32M",
            "-c",
            "sigraise 9",
            uri,
        ])
        .output()
        .unwrap();
    assert!(!client.status.success());
}

fn assert_written(image: &TempImage, what: &str) {
    check_image(image.path(), what);
    let content = image.converted("raw", &[]).content();
    assert!(content[..32 << 20].iter().all(|byte| *byte == 7), "{what}");
}

#[test]
fn however_serve_ends_nothing_is_lost() {
    if !requires("qemu-img") || !requires("qemu-io") || !requires("timeout") {
        return;
    }
    for signals in [
        &[Signal::TERM, Signal::TERM][..],
        &[Signal::INT, Signal::INT, Signal::INT],
        &[Signal::HUP, Signal::QUIT],
        &[Signal::KILL],
        &[Signal::USR1],
    ] {
        let what = format!("{signals:?}");
        let image = TempImage::qcow2(64 << 20, "");
        let mut served = Served::start(&[image.str()]);
        write_and_vanish(served.fact("uri"));
        let daemon = served.facts["pid"].as_u64().unwrap();
        for signal in signals {
            served.signal(*signal);
        }
        let status = served.process.wait().unwrap();
        let told = !matches!(signals[0], Signal::KILL | Signal::USR1);
        assert_eq!(status.success(), told, "{what}");
        eventually("the daemon has ended", || {
            (!Path::new(&format!("/proc/{daemon}")).exists()).then_some(())
        });
        assert_written(&image, &what);
    }
}

#[test]
fn however_a_mount_ends_none_is_left() {
    if !can_mount() || !requires("qemu-img") {
        return;
    }
    for (signals, of_the_daemon) in [
        (&[Signal::TERM, Signal::TERM][..], false),
        (&[Signal::KILL], false),
        (&[Signal::KILL], true),
    ] {
        let image = TempImage::qcow2(64 << 20, "");
        let file = TempImage::raw(&[]);
        let mut mounted = Served::start_as("mount", &[image.str(), file.str(), "--rw"]);
        let daemon = mounted.facts["pid"].as_u64().unwrap();
        for signal in signals {
            match of_the_daemon {
                true => {
                    let pid = Pid::from_raw(i32::try_from(daemon).unwrap()).unwrap();
                    kill_process(pid, *signal).unwrap();
                }
                false => mounted.signal(*signal),
            }
        }
        mounted.process.wait().unwrap();
        eventually("the daemon has ended", || {
            (!Path::new(&format!("/proc/{daemon}")).exists()).then_some(())
        });
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(file.str()), "{signals:?} {of_the_daemon}");
        if !of_the_daemon {
            check_image(image.path(), "mounted");
        }
    }
}

#[test]
fn a_daemon_that_ends_ends_serve() {
    let image = TempImage::zeroes(1 << 20);
    let mut served = Served::start(&[image.str()]);
    let answer = outport(&["qmp", served.fact("qmp"), "quit"]);
    assert!(answer.status.success(), "{}", err(&answer));
    let status = eventually("outport ends", || served.process.try_wait().unwrap());
    assert!(status.success(), "{status}");
}

#[test]
fn one_shot_commands_answer_and_refuse() {
    let image = TempImage::zeroes(1 << 20);
    let served = Served::start(&[image.str(), "--read-only"]);
    let qmp = served.fact("qmp");

    let version = outport(&["qmp", qmp, "query-version"]);
    assert!(serde_json::from_str::<Value>(&out(&version)).unwrap()["qemu"]["major"].is_u64());

    // Text that the schema says are a number and a boolean.
    let added = outport(&["qmp", qmp, "object-add", "qom-type=iothread", "id=io0"]);
    assert!(
        added.status.success() && out(&added).is_empty(),
        "{}",
        err(&added)
    );
    let export = [
        "type=nbd",
        "id=e1",
        "node-name=image0",
        "name=7",
        "writable=off",
    ];
    let args = [&["qmp", qmp, "block-export-add"][..], &export].concat();
    let added = outport(&args);
    assert!(added.status.success(), "{}", err(&added));

    let refused = outport(&["qmp", qmp, "block-export-del", r#"{"id": "nosuch"}"#]);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(err(&refused), "outport: Export 'nosuch' is not found\n");
    let raw = outport(&["qmp", "--json", qmp, "block-export-del", "id=nosuch"]);
    assert_eq!(raw.status.code(), Some(1));
    let message: Value = serde_json::from_str(&out(&raw)).unwrap();
    assert_eq!(message["error"]["class"], "GenericError");

    let table = out(&outport(&["exports", qmp]));
    assert!(table.starts_with("ID"), "{table}");
    assert!(table.contains("e1") && table.contains("active"), "{table}");
    let nodes = out(&outport(&["nodes", qmp]));
    assert!(nodes.contains("image0") && nodes.contains("raw"), "{nodes}");
    let json = out(&outport(&["exports", "--json", qmp]));
    assert_eq!(
        serde_json::from_str::<Value>(&json)
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        2
    );
}

#[test]
fn lines_are_read_and_events_are_printed() {
    let image = TempImage::zeroes(1 << 20);
    let served = Served::start(&[image.str()]);
    let mut session = Command::new(OUTPORT)
        .args(["qmp", served.fact("qmp")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = "# first\nblock-export-del id=export0 mode=hard\nnosuch\n\
        {\"execute\": \"query-block-exports\"}\n";
    session
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    let done = session.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(1), "one command was refused");
    assert!(
        out(&done).contains("event BLOCK_EXPORT_DELETED"),
        "{}",
        out(&done)
    );
    assert!(out(&done).contains("[]"), "{}", out(&done));
    assert!(err(&done).contains("nosuch"), "{}", err(&done));
}

#[test]
fn the_format_is_never_guessed() {
    let image = TempImage::qcow2(1 << 20, "");
    let other = image.path().with_extension("disk");
    std::fs::rename(image.path(), &other).unwrap();
    let refused = outport(&["serve", other.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(err(&refused).contains("--format"), "{}", err(&refused));
}

#[test]
fn errors_name_the_thing() {
    let cases: [(&[&str], &str); 6] = [
        (&["serve", "nosuch.raw"], "'nosuch.raw'"),
        (
            &["exports", "/nonexistent/qmp.sock"],
            "'/nonexistent/qmp.sock'",
        ),
        (&["serve", ".", "--format", "raw"], "directory"),
        (&["mount", "nosuch.raw", "m"], "'nosuch.raw'"),
        (
            &["mount", "Cargo.toml", ".", "--format", "raw"],
            "give a file",
        ),
        (&["plugin", "check", "nosuch.wasm"], "'nosuch.wasm'"),
    ];
    for (args, word) in cases {
        let output = outport(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(err(&output).contains(word), "{args:?}: {}", err(&output));
    }
    assert_eq!(outport(&["serve"]).status.code(), Some(2));
    assert_eq!(outport(&["nosuch"]).status.code(), Some(2));
}

#[test]
fn a_daemon_that_cannot_start_is_an_error() {
    let image = TempImage::zeroes(1 << 20);
    let output = outport(&["serve", image.str(), "--format", "nosuch"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("nosuch"), "{}", err(&output));
}

#[test]
fn refusals_are_in_the_words_of_the_tool() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for name in ["disk.qcow2", "disk.raw"] {
        std::fs::write(folder.path().join(name), [0; 4096]).unwrap();
    }
    let (qcow2, raw, far) = (path("disk.qcow2"), path("disk.raw"), path("no/s"));
    let mounted = path("disk");
    let no_wasm = [
        "serve", &raw, "-f", "x", "--plugin", &qcow2, "--socket", &far,
    ];
    for (args, want) in [
        (
            &["serve", &qcow2, "-f", "qcow2"][..],
            format!("{qcow2}: Image is not in qcow2"),
        ),
        (
            &["mount", &qcow2, &mounted, "-f", "qcow2"],
            format!("{qcow2}: Image is not in"),
        ),
        (
            &["serve", &raw, "-f", "raw", "--socket", &far],
            format!("--socket {far}: Failed to"),
        ),
        (&no_wasm, format!("--plugin {qcow2}: ")),
    ] {
        let refused = outport(args);
        assert!(!refused.status.success());
        let said = err(&refused);
        let start = format!("outport: {want}");
        assert!(said.starts_with(&start), "{said}");
        assert!(
            !said.contains("outportd") && !said.contains("--blockdev"),
            "{said}"
        );
    }
}

#[test]
fn completions_and_manuals_come_from_the_program() {
    for shell in ["bash", "zsh", "fish"] {
        let script = out(&outport(&["completions", shell]));
        assert!(script.contains("read-only"), "{shell}: {script}");
    }
    let folder = TempImage::zeroes(0);
    let folder = folder.path().parent().unwrap();
    let made = outport(&["man", folder.to_str().unwrap()]);
    assert!(made.status.success(), "{}", err(&made));
    for page in ["man1/outport.1", "man1/outport-serve.1", "man8/outportd.8"] {
        let text = std::fs::read_to_string(folder.join(page)).unwrap();
        assert!(text.contains(".SH"), "{page}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut process = Command::new(OUTPORT)
        .args(["completions", "bash"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 1];
    process
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    assert!(process.wait().unwrap().success());
}
