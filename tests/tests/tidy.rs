//! The house rules, as tests: what the compiler and clippy cannot say about this repository.
//!
//! Only tracked files count. A rule that stands in the way is changed here, with its reason, in
//! the same commit.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use outport_tests::requires;
use serde_json::Value;

/// A longer file holds more than one noun.
const FILE_LINES_MAX: usize = 800;

/// What rustfmt leaves alone (strings, comments) keeps to its width too.
const LINE_CHARS_MAX: usize = 100;

/// What lies at the top. Dot files and the tools' own configuration come on top of it.
const TOP_LEVEL: [&str; 16] = [
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "Makefile",
    "README.md",
    "clippy.toml",
    "deny.toml",
    "examples",
    "findings",
    "host",
    "plugins",
    "rustfmt.toml",
    "sdk",
    "tests",
    "wit",
];

/// Which of our crates a crate may depend on. An arrow not listed is forbidden.
const ARROWS: [(&str, &[&str]); 9] = [
    ("outport-block", &[]),
    ("outport-qmp", &[]),
    ("outport-sdk", &[]),
    // For machine code: made once, by the daemon's own settings.
    ("outport-plugins", &["outport-plugin"]),
    ("outport-export", &["outport-block"]),
    ("outport-plugin", &["outport-block"]),
    (
        "outport-daemon",
        &[
            "outport-block",
            "outport-export",
            "outport-plugin",
            "outport-plugins",
            "outport-qmp",
        ],
    ),
    ("outport-cli", &["outport-qmp"]),
    // Every public face, never private modules.
    (
        "outport-tests",
        &["outport-export", "outport-qmp", "outport-sdk"],
    ),
];

/// What only tests of a crate use, beside the arrows above.
const TEST_ARROWS: [(&str, &[&str]); 5] = [
    ("outport-cli", &["outport-tests"]),
    ("outport-daemon", &["outport-tests"]),
    (
        "outport-plugin",
        &["outport-plugins", "outport-test-guests", "outport-tests"],
    ),
    ("outport-sdk", &["outport-sdk"]),
    ("outport-tests", &["outport-test-guests"]),
];

/// Crates that only the named ones may use: what they stand for stays in one room.
const KEPT_IN: [(&str, &[&str]); 4] = [
    ("wasmtime", &["outport-plugin"]),
    ("wit-bindgen", &["outport-sdk"]),
    (
        "rustls",
        &["outport-export", "outport-daemon", "outport-tests"],
    ),
    ("io-uring", &["outport-block", "outport-export"]),
];

/// `block` knows no JSON, `qmp` nothing but serde.
const ONLY: [(&str, &[&str]); 1] = [("outport-qmp", &["serde", "serde_json", "thiserror"])];
const NEVER: [(&str, &[&str]); 2] = [
    ("outport-block", &["serde", "serde_json"]),
    ("outport-export", &["serde_json"]),
];

/// Where `unsafe` may stand, each for what safe code cannot say. A folder's name ends in '/'.
const UNSAFE_FILES: [(&str, &str); 13] = [
    (
        "host/block/src/engine/",
        "io_uring submissions and the buffers they own",
    ),
    (
        "host/daemon/src/inherited.rs",
        "descriptors that the parent left open for us",
    ),
    (
        "host/daemon/src/plugins.rs",
        "machine code of this build's plugins",
    ),
    (
        "host/plugin/tests/support/mod.rs",
        "machine code that tests embed",
    ),
    ("tests/loom/src/models.rs", "a cell that loom watches"),
    (
        "host/export/src/fuse/sys.rs",
        "mounting, and the ioctls of /dev/fuse",
    ),
    (
        "host/export/src/tls/openssl.rs",
        "the system's OpenSSL, loaded at run time",
    ),
    (
        "host/export/src/vhost_user/memory.rs",
        "memory that guests share with us",
    ),
    (
        "host/plugin/src/cache.rs",
        "native code from the daemon's own build and cache",
    ),
    (
        "tests/tests/fuse_exerciser/map.rs",
        "memory of a mapped file",
    ),
    (
        "tests/src/bin/nbd-load/poll.rs",
        "the system's calls for polling",
    ),
    (
        "tests/src/bin/vhost-load/disk.rs",
        "buffers that the server fills",
    ),
    ("tests/src/load/cpu.rs", "CPU clocks of another process"),
];

/// A module is named after what it holds.
const EMPTY_NAMES: [&str; 6] = ["util", "utils", "helper", "helpers", "manager", "common"];

// === the rules ===

#[test]
fn crates_depend_downward_only() {
    let mut wrong = Vec::new();
    let allowed = BTreeMap::from(ARROWS);
    let in_tests = BTreeMap::from(TEST_ARROWS);
    let (only, never) = (BTreeMap::from(ONLY), BTreeMap::from(NEVER));
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        let Some(arrows) = allowed.get(name) else {
            wrong.push(format!(
                "{name} is not in the list of crates: say what it may depend on"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap() {
            let on = dependency["name"].as_str().unwrap();
            let test = dependency["kind"] == "dev";
            let for_tests = in_tests
                .get(name)
                .is_some_and(|names| test && names.contains(&on));
            if on.starts_with("outport-") && !arrows.contains(&on) && !for_tests {
                wrong.push(format!("{name} depends on {on}"));
            }
            let kept = KEPT_IN.iter().find(|(kept, _)| *kept == on);
            if kept.is_some_and(|(_, rooms)| !rooms.contains(&name)) && !test {
                wrong.push(format!(
                    "{name} depends on {on}, which is kept in {:?}",
                    kept.unwrap().1
                ));
            }
            let stranger = only.get(name).is_some_and(|names| !names.contains(&on));
            if !test && (stranger || never.get(name).is_some_and(|names| names.contains(&on))) {
                wrong.push(format!("{name} depends on {on}"));
            }
        }
    }
    assert_none(&wrong, "dependencies that the design forbids");
}

#[test]
fn nothing_that_ships_has_a_feature_for_tests() {
    // With resolver 1, what a test asks of a crate reaches the programs too: `make build` would
    // ship it. Doubles and recorders are compiled always and used by tests only, or live in a
    // crate that no program links.
    let packages = packages();
    let find = |name: &str| packages.iter().find(|package| package["name"] == name);
    let mut ships = BTreeSet::from(["outport-daemon".to_owned(), "outport-cli".to_owned()]);
    let mut open: Vec<String> = ships.iter().cloned().collect();
    while let Some(package) = open.pop().and_then(|name| find(&name)) {
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        for on in dependencies.filter(|on| on["kind"] != "dev") {
            let on = on["name"].as_str().unwrap().to_owned();
            if find(&on).is_some() && ships.insert(on.clone()) {
                open.push(on);
            }
        }
    }
    let mut found = Vec::new();
    for package in ships.iter().filter_map(|name| find(name)) {
        for feature in package["features"].as_object().unwrap().keys() {
            if ["test", "fuzz", "mock"]
                .iter()
                .any(|word| feature.contains(word))
            {
                found.push(format!("{} has the feature {feature}", package["name"]));
            }
        }
    }
    assert!(ships.len() > 4, "{ships:?}");
    assert_none(
        &found,
        "features for tests that a program would be built with",
    );
}

#[test]
fn the_top_level_is_as_mandated() {
    let tops: BTreeSet<_> = tracked().iter().map(|file| top(file)).collect();
    let stray: Vec<_> = tops
        .iter()
        .filter(|name| !name.starts_with('.') && !TOP_LEVEL.contains(&name.as_str()))
        .collect();
    assert_none(&stray, "strangers at the top level");
    let files = tracked();
    let lost: Vec<_> = TOP_LEVEL
        .iter()
        .filter(|name| !tops.contains(**name))
        .collect();
    assert!(
        lost.is_empty() || files.is_empty(),
        "missing at the top level: {lost:?}"
    );
}

#[test]
fn files_are_short() {
    let long: Vec<_> = sources()
        .map(|(file, text)| (file, text.lines().count()))
        .filter(|(_, lines)| *lines > FILE_LINES_MAX)
        .collect();
    assert_none(
        &long,
        &format!("files with more than {FILE_LINES_MAX} lines"),
    );
}

#[test]
fn lines_are_short() {
    // A literal that stands alone is data.
    let data = |line: &str| {
        ["\"", "r\"", "r#\""]
            .iter()
            .any(|it| line.trim().starts_with(it))
    };
    let long = offending_lines(sources(), |line| {
        line.chars().count() > LINE_CHARS_MAX && !data(line)
    });
    assert_none(
        &long,
        &format!("lines with more than {LINE_CHARS_MAX} characters"),
    );
}

#[test]
fn sources_are_ascii() {
    // Drawings in comments may use lines and arrows; what compiles may not even look like
    // something else.
    let drawing = |c: char| matches!(c, '\u{2500}'..='\u{257f}' | '\u{25b2}'..='\u{25c4}');
    let odd = offending_lines(sources(), |line| {
        let comment = line.trim_start().starts_with("//");
        let mut beyond = line.chars().filter(|c| !c.is_ascii());
        beyond.any(|c| !comment || !drawing(c))
    });
    assert_none(&odd, "lines with characters beyond ASCII");
}

#[test]
fn nothing_is_left_over() {
    // Put together here, so that this file does not name them.
    let words = [
        concat!("to", "do!("),
        concat!("unimple", "mented!("),
        concat!("db", "g!("),
        concat!("FIX", "ME"),
        concat!("TO", "DO"),
        concat!("XX", "X:"),
        concat!("HA", "CK"),
    ];
    let left = offending_lines(texts(), |line| words.iter().any(|word| line.contains(word)));
    assert_none(&left, "notes to self");
}

#[test]
fn unsafe_stays_where_it_is_named() {
    let word = concat!("un", "safe");
    let forms = [" {", " fn ", " impl ", " extern ", "("].map(|after| format!("{word}{after}"));
    let mut seen = BTreeMap::<String, usize>::new();
    for (file, text) in sources() {
        let code = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        let found = code
            .filter(|line| forms.iter().any(|form| line.contains(form)))
            .count();
        // The lint's name in an attribute is no use of it.
        if found > 0 {
            seen.insert(file, found);
        }
    }
    println!("files with {word}:");
    for (file, count) in &seen {
        println!("  {file} ({count})");
    }
    let holds = |place: &str, file: &str| {
        file == place || (place.ends_with('/') && file.starts_with(place))
    };
    let named = |file: &str| UNSAFE_FILES.iter().any(|(place, _)| holds(place, file));
    let strays: Vec<_> = seen.keys().filter(|file| !named(file)).collect();
    assert_none(
        &strays,
        &format!("files with {word} that UNSAFE_FILES does not name"),
    );
    let used = |place: &str| seen.keys().any(|file| holds(place, file));
    let idle: Vec<_> = UNSAFE_FILES
        .iter()
        .filter(|(place, _)| !used(place))
        .collect();
    assert_none(&idle, "entries of UNSAFE_FILES without any");
}

#[test]
fn published_contracts_are_frozen() {
    // wit/since-X.Y holds what was published as X.Y. While that is the current version, the
    // contract equals it, but for words that became clearer; a change needs a new version.
    let current = contract_version();
    let (major_minor, _) = current.rsplit_once('.').unwrap();
    let frozen = format!("wit/since-{major_minor}/");
    let mut wrong = Vec::new();
    let copies: Vec<_> = tracked()
        .into_iter()
        .filter(|file| file.starts_with(&frozen))
        .collect();
    for copy in &copies {
        let name = copy.strip_prefix(&frozen).unwrap();
        let now = fs::read_to_string(root().join("wit").join(name)).unwrap_or_default();
        if interface(&now) != interface(&read(copy)) {
            wrong.push(format!(
                "wit/{name} differs from {copy}: raise the package's version"
            ));
        }
    }
    for file in tracked().iter().filter(|file| is_contract(file)) {
        let copy = format!("{frozen}{}", file.strip_prefix("wit/").unwrap());
        if !copies.is_empty() && !copies.contains(&copy) {
            wrong.push(format!(
                "{file} is not in {frozen}: raise the package's version"
            ));
        }
    }
    assert_none(&wrong, "changes to a published contract");
}

#[test]
fn links_in_documents_resolve() {
    let mut broken = Vec::new();
    for file in tracked().into_iter().filter(|file| file.ends_with(".md")) {
        let folder = root().join(&file).parent().unwrap().to_owned();
        for target in links(&read(&file)) {
            let path = target.split('#').next().unwrap();
            let outside = target.contains("://") || target.starts_with("mailto:");
            if !outside && !path.is_empty() && !folder.join(path).exists() {
                broken.push(format!("{file}: {target}"));
            }
        }
    }
    assert_none(&broken, "links to nothing");
}

#[test]
fn no_file_names_a_machine() {
    let places = [
        concat!("/ho", "me/"),
        concat!("/ro", "ot/"),
        concat!("/wo", "rk/"),
    ];
    let named = offending_lines(texts(), |line| {
        places.iter().any(|place| line.contains(place))
    });
    assert_none(&named, "paths of one machine");
}

#[test]
fn modules_are_named_after_what_they_hold() {
    let empty: Vec<_> = tracked()
        .into_iter()
        .filter(|file| file.ends_with(".rs"))
        .filter(|file| {
            let path = Path::new(file).with_extension("");
            path.iter()
                .any(|part| EMPTY_NAMES.iter().any(|name| part == *name))
        })
        .collect();
    assert_none(&empty, "module names that say nothing");
}

#[test]
fn crates_share_version_licence_and_lints() {
    let mut wrong = Vec::new();
    for package in packages() {
        let manifest = fs::read_to_string(package["manifest_path"].as_str().unwrap()).unwrap();
        for line in [
            "version.workspace = true",
            "license.workspace = true",
            "[lints]",
        ] {
            if !manifest.contains(line) {
                wrong.push(format!("{}: no {line}", package["name"]));
            }
        }
    }
    assert_none(&wrong, "crates that go their own way");
}

/// Wasmtime takes minutes. The daemon links it and a build script uses it; cargo shares the two
/// only while every crate below has the same features and settings on both sides.
#[test]
fn wasmtime_is_compiled_once() {
    for targets in ["--all-targets", "--bins"] {
        let cargo = Command::new(env!("CARGO"))
            .args(["build", "--release", "--workspace", targets, "--offline"])
            // What would be built, without building it; the stable cargo has it behind this key.
            .args(["--unit-graph", "-Z", "unstable-options"])
            .env("RUSTC_BOOTSTRAP", "1")
            .current_dir(root())
            .output()
            .unwrap();
        assert!(
            cargo.status.success(),
            "{}",
            String::from_utf8_lossy(&cargo.stderr)
        );
        let graph: Value = serde_json::from_slice(&cargo.stdout).unwrap();
        let mut libraries = BTreeMap::<&str, Vec<[String; 2]>>::new();
        for unit in graph["units"].as_array().unwrap() {
            if unit["mode"] == "build" && unit["target"]["kind"][0] == "lib" {
                let id = unit["pkg_id"].as_str().unwrap();
                let name = id.rsplit(['/', '#']).next().unwrap();
                let variant = ["features", "profile"].map(|key| unit[key].to_string());
                libraries.entry(name).or_default().push(variant);
            }
        }
        // Those that differ themselves; the others only depend on one of them.
        let mut causes = Vec::new();
        for (name, variants) in &libraries {
            let [one, .., other] = &variants[..] else {
                continue;
            };
            if one[0] != other[0] {
                causes.push(format!("{name}: features {} and {}", one[0], other[0]));
            } else if one[1] != other[1] && causes.is_empty() {
                causes.push("profile.release and its build-override".to_owned());
            }
        }
        let twice = ["wasmtime@", "cranelift-codegen@"].iter().any(|id| {
            let mut all = libraries.iter();
            all.any(|(name, it)| name.starts_with(id) && it.len() > 1)
        });
        if twice {
            assert_none(
                &causes,
                &format!("{targets}: wasmtime is compiled twice, because of"),
            );
        }
    }
}

// === what they look at ===

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// All tracked files that exist, relative to the root; none where git is missing.
fn tracked() -> Vec<String> {
    if !requires("git") {
        return Vec::new();
    }
    // The one who tests need not be the one who owns the files.
    let git = Command::new("git")
        .args(["-c", "safe.directory=*", "ls-files", "-z"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        git.status.success(),
        "{}",
        String::from_utf8_lossy(&git.stderr)
    );
    let names = String::from_utf8(git.stdout).unwrap();
    let exists = |name: &&str| !name.is_empty() && root().join(name).is_file();
    names
        .split('\0')
        .filter(exists)
        .map(str::to_owned)
        .collect()
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_default()
}

/// Rust sources with their text.
fn sources() -> impl Iterator<Item = (String, String)> {
    let rust = tracked().into_iter().filter(|file| file.ends_with(".rs"));
    rust.map(|file| (read(&file), file))
        .map(|(text, file)| (file, text))
}

/// All files that are text.
fn texts() -> impl Iterator<Item = (String, String)> {
    let read = |file: String| Some((fs::read_to_string(root().join(&file)).ok()?, file));
    tracked()
        .into_iter()
        .filter_map(read)
        .map(|(text, file)| (file, text))
}

fn offending_lines(
    files: impl Iterator<Item = (String, String)>,
    offends: impl Fn(&str) -> bool,
) -> Vec<String> {
    let mut found = Vec::new();
    for (file, text) in files {
        let lines = text.lines().enumerate().filter(|(_, line)| offends(line));
        found.extend(lines.map(|(at, line)| format!("{file}:{}: {}", at + 1, line.trim())));
    }
    found
}

fn top(file: &str) -> String {
    file.split('/').next().unwrap().to_owned()
}

/// The members of the root workspace, but for the guests: they live apart, see there.
fn packages() -> Vec<Value> {
    let cargo = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        cargo.status.success(),
        "{}",
        String::from_utf8_lossy(&cargo.stderr)
    );
    let mut metadata: Value = serde_json::from_slice(&cargo.stdout).unwrap();
    match metadata["packages"].take() {
        Value::Array(mut packages) => {
            packages.retain(|package| package["name"] != "outport-test-guests");
            packages
        }
        other => panic!("cargo metadata: {other}"),
    }
}

fn is_contract(file: &str) -> bool {
    let name = file.strip_prefix("wit/");
    name.is_some_and(|name| name.ends_with(".wit") && !name.contains('/'))
}

/// A contract without its comments.
fn interface(text: &str) -> Vec<&str> {
    let code = |line: &str| line.split("//").next().unwrap_or_default().len();
    let lines = text.lines().map(|line| line[..code(line)].trim());
    lines.filter(|line| !line.is_empty()).collect()
}

/// `0.1.0` of `package outport:plugin@0.1.0;`, which all files agree on.
fn contract_version() -> String {
    let files: Vec<_> = tracked()
        .into_iter()
        .filter(|file| is_contract(file))
        .collect();
    let mut versions = BTreeSet::new();
    for file in &files {
        let text = read(file);
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("package outport:plugin@"));
        versions.extend(line.map(|rest| rest.trim_end_matches(';').to_owned()));
    }
    assert!(
        versions.len() <= 1,
        "the contract's files disagree: {versions:?}"
    );
    versions.pop_first().unwrap_or_else(|| "0.0.0".to_owned())
}

/// The targets of `[text](target)` outside of code.
fn links(document: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut code = false;
    for line in document.lines() {
        code ^= line.trim_start().starts_with("```");
        // Odd pieces between backticks are code.
        let prose = line.split('`').step_by(2).collect::<Vec<_>>().join("_");
        for piece in prose.split("](").skip(1).filter(|_| !code) {
            found.extend(piece.split(')').next().map(str::to_owned));
        }
    }
    found
}

#[track_caller]
fn assert_none<T: std::fmt::Debug>(found: &[T], what: &str) {
    let list: Vec<_> = found.iter().map(|one| format!("  {one:?}")).collect();
    assert!(found.is_empty(), "{what}:\n{}", list.join("\n"));
}
