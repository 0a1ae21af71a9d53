//! Other people's programs: oracles and clients.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// Whether a program is installed. In CI a missing one fails the test; elsewhere the test says
/// loudly that it skips: `if !requires("nbdinfo") { return }`.
#[track_caller]
pub fn requires(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(tool).is_file());
    found || absent(tool)
}

/// Whether the system's Python has libnbd's module.
#[track_caller]
pub fn requires_python_nbd() -> bool {
    let works = |program| {
        let mut command = Command::new(program);
        command.args(["-c", "import nbd"]).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    works(python()) || absent("python3 with the nbd module (libnbd)")
}

/// The folder of a package from PyPI, for `PYTHONPATH`; put there by pip when it is first asked
/// for, in the build's target folder. Nothing where there is neither it nor a network.
#[track_caller]
pub fn python_package(name: &str, version: &str) -> Option<PathBuf> {
    let test = std::env::current_exe().expect("a test knows where it is");
    let target = test
        .ancestors()
        .nth(3)
        .expect("a test lies in target/PROFILE/deps");
    let folder = target.join(format!("python/{name}-{version}"));
    if folder.is_dir() {
        return Some(folder);
    }
    // Two tests may ask at the same time: whoever is done first wins.
    let mine = target.join(format!("python/{name}-{version}.{}", std::process::id()));
    let mine_text = mine.to_str().expect("the target folder's path is UTF-8");
    let wanted = format!("{name}=={version}");
    let args = ["-m", "pip", "install", "-q", "--target", mine_text, &wanted];
    let done = try_run(python(), &args);
    if done.code == Some(0) {
        let _ = std::fs::rename(&mine, &folder);
    }
    let _ = std::fs::remove_dir_all(&mine);
    let what = format!(
        "{wanted} (pip said: {})",
        done.err.lines().last().unwrap_or("")
    );
    (folder.is_dir() || absent(&what)).then_some(folder)
}

/// Whether this process can mount FUSE exports.
#[track_caller]
pub fn can_mount() -> bool {
    let able = rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists();
    able || absent("/dev/fuse, or root to mount with it,")
}

#[track_caller]
fn absent(what: &str) -> bool {
    assert!(
        std::env::var_os("CI").is_none(),
        "{what} is not installed, and CI must have it"
    );
    let thread = std::thread::current();
    eprintln!(
        "SKIPPED: {}: {what} is not installed",
        thread.name().unwrap_or("?")
    );
    false
}

/// The distribution's Python, which sees the distribution's modules.
pub fn python() -> &'static str {
    if Path::new("/usr/bin/python3").exists() {
        "/usr/bin/python3"
    } else {
        "python3"
    }
}

/// How a program ended and what it said.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

/// Runs a program that must succeed; its standard output.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    let output = try_run(program, args);
    assert!(
        output.code == Some(0),
        "{program} {:?} ended with {:?}\n{}{}",
        args.iter().map(AsRef::as_ref).collect::<Vec<_>>(),
        output.code,
        output.out,
        output.err
    );
    output.out
}

/// Runs a program to its end, however that is.
#[track_caller]
pub fn try_run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Output {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    let done = command
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    Output {
        code: done.status.code(),
        out: String::from_utf8_lossy(&done.stdout).into_owned(),
        err: String::from_utf8_lossy(&done.stderr).into_owned(),
    }
}

/// Runs qemu-img, which must succeed.
#[track_caller]
pub fn qemu_img<S: AsRef<OsStr>>(args: &[S]) -> String {
    run("qemu-img", args)
}

/// Asserts that `qemu-img check` finds no error, no corruption and no leak in a qcow2 image.
#[track_caller]
pub fn check_image(path: &Path, what: &str) {
    let path = path.to_str().expect("temp paths are UTF-8");
    let output = try_run("qemu-img", &["check", "-f", "qcow2", "--output=json", path]);
    let report: Value = serde_json::from_str(&output.out).unwrap_or(Value::Null);
    let clean = ["check-errors", "corruptions", "leaks"]
        .iter()
        .all(|key| report[key].as_u64().unwrap_or(0) == 0);
    assert!(
        output.code == Some(0) && report.is_object() && clean,
        "{what}: qemu-img check ended with {:?}\n{}{}",
        output.code,
        output.out,
        output.err
    );
}
