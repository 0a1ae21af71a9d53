//! `README.md` is a tutorial, and this test is its reader: it runs every shell
//! block, in order, in an empty folder. The programs are those of this build, so
//! `make build` has nothing to do.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// The plugins that the page makes, and what their tests say.
const PLUGINS: [(&str, &str); 3] = [
    ("tiny", "refuses_what_it_does_not_know ... ok"),
    ("curfew", "nobody_writes_at_night ... ok"),
    ("stripes", "the_disks_take_turns ... ok"),
];

struct Block {
    /// What stands after "sh": `until-stopped`.
    marks: String,
    script: String,
}

fn blocks(text: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut open: Option<Block> = None;
    for line in text.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(language)) => {
                let (script, marks) = (String::new(), language.to_owned());
                open = Some(Block { marks, script });
            }
            (Some(_), Some(_)) => found.extend(open.take()),
            (Some(block), None) => block.script.extend([line, "\n"]),
            (None, None) => {}
        }
    }
    found.retain(|block| block.marks.split(' ').next() == Some("sh"));
    found
}

#[test]
fn every_shell_block_of_the_readme_runs() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("it is in the target");
    let text = fs::read_to_string(here.join("README.md")).expect("the README is there");

    let mut script = String::from("set -eu\n");
    let mut runs = 0;
    for block in blocks(&text) {
        runs += 1;
        if block.marks.contains("until-stopped") {
            // 124: it ran until timeout stopped it.
            script += &format!("timeout 1 {} || test $? = 124\n", block.script.trim());
        } else {
            script += &block.script;
        }
    }
    assert!(runs >= 5, "the README has lost its shell blocks");

    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let output = Command::new("sh")
        .args(["-c", &script])
        .current_dir(folder.path())
        .env("OUTPORT", here.parent().expect("the checkout"))
        .env("CARGO_TARGET_DIR", target)
        .output()
        .expect("there is a shell");
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    if said.contains("No compiler for wasm32-unknown-unknown") && env::var_os("CI").is_none() {
        println!("skipped after the native tests: no compiler for Wasm");
        return;
    }
    assert!(output.status.success(), "{said}");
    for (plugin, passed) in PLUGINS {
        assert!(said.contains(passed), "{plugin}: {said}");
        let file = folder.path().join(format!("{plugin}/{plugin}.wasm"));
        let component = fs::read(file).expect("it was built");
        assert_eq!(component[..8], *b"\0asm\x0d\0\x01\0");
        println!("{plugin}: {} bytes", component.len());
    }
    println!("{runs} blocks ran");
}
