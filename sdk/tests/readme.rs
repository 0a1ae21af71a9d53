//! `README.md` is a tutorial, and this test is its reader: it runs every shell
//! block, in order, in an empty folder.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

struct Block {
    /// What stands after "sh": `needs-outport`, `until-stopped`.
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

/// The folder of this build's programs.
fn programs(target: &Path) -> PathBuf {
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    target.join(profile)
}

#[test]
fn every_shell_block_of_the_readme_runs() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("it is in the target");
    let outport = programs(target).join("outport");
    let text = fs::read_to_string(here.join("README.md")).expect("the README is there");

    let mut script = String::from("set -eu\n");
    let mut runs = 0;
    for block in blocks(&text) {
        if block.marks.contains("needs-outport") && !outport.exists() {
            println!(
                "skipped, {} is not built: {}",
                outport.display(),
                block.script.trim()
            );
            continue;
        }
        runs += 1;
        if block.marks.contains("until-stopped") {
            // 124: it ran until timeout stopped it.
            script += &format!("timeout 2 {} || test $? = 124\n", block.script.trim());
        } else {
            script += &block.script;
        }
    }
    assert!(runs >= 5, "the README has lost its shell blocks");

    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = env::var("PATH").unwrap_or_default();
    let output = Command::new("sh")
        .args(["-c", &script])
        .current_dir(folder.path())
        .env("OUTPORT", here.parent().expect("the checkout"))
        .env("CARGO_TARGET_DIR", target)
        .env("PATH", format!("{}:{path}", programs(target).display()))
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
    assert!(said.contains("2 passed"), "{said}");
    let component = fs::read(folder.path().join("tiny/tiny.wasm")).expect("it was built");
    assert_eq!(component[..8], *b"\0asm\x0d\0\x01\0");
    println!(
        "{runs} blocks ran; the component has {} bytes",
        component.len()
    );
}
