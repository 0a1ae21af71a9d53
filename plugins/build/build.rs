//! Makes the bundled plugins: compiles the workspace `plugins/` for wasm32,
//! turns every member into a component, and writes the table that `lib.rs`
//! includes.

use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

#[path = "src/component.rs"]
mod component;
#[path = "src/toolchain.rs"]
mod toolchain;

/// What the bundled components depend on, seen from this folder.
const SOURCES: [&str; 6] = [
    "../Cargo.toml",
    "../Cargo.lock",
    "../../wit",
    "../../sdk/Cargo.toml",
    "../../sdk/src",
    "src",
];

fn main() -> Result<()> {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("cargo names the crate")?);
    let out = PathBuf::from(env::var_os("OUT_DIR").context("cargo names OUT_DIR")?);
    let target_dir = shared_target_dir(&out);
    println!(
        "cargo::rustc-env=OUTPORT_PLUGIN_TARGET_DIR={}",
        target_dir.display()
    );

    let mut watched: Vec<PathBuf> = SOURCES.iter().map(|path| here.join(path)).collect();
    let mut table = String::from("&[\n");
    let plugins = match cfg!(feature = "bundled") {
        true => component::build(&here.join(".."), &target_dir)?,
        false => Vec::new(),
    };
    for plugin in plugins {
        let file = out.join(format!("{}.wasm", plugin.name));
        fs::write(&file, &plugin.component)
            .with_context(|| format!("Cannot write {}", file.display()))?;
        let compiled = out.join(format!("{}.compiled", plugin.name));
        fs::write(&compiled, precompile(&plugin.component)?)
            .with_context(|| format!("Cannot write {}", compiled.display()))?;
        writeln!(
            table,
            "    Bundled {{ name: {:?}, kind: {:?}, wasm: include_bytes!({file:?}), \
             compiled: include_bytes!({compiled:?}) }},",
            plugin.name,
            component::kind(&plugin.component)?
        )?;
        watched.push(plugin.folder.join("Cargo.toml"));
        watched.push(plugin.folder.join("src"));
    }
    table.push_str("]\n");
    fs::write(out.join("bundled.rs"), table).context("Cannot write bundled.rs")?;
    for path in watched {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    Ok(())
}

/// Machine code for `component`, made by the wasmtime that the daemon links.
#[cfg(feature = "bundled")]
fn precompile(component: &[u8]) -> Result<Vec<u8>> {
    Ok(outport_plugin::precompile(component)?)
}

/// Never called: without the feature, nothing is bundled.
#[cfg(not(feature = "bundled"))]
fn precompile(_component: &[u8]) -> Result<Vec<u8>> {
    Ok(Vec::new())
}

/// `target/plugins`, shared by all profiles: the inner build has only one, and
/// its standard library takes a minute.
fn shared_target_dir(out: &Path) -> PathBuf {
    let marked = out
        .ancestors()
        .find(|dir| dir.join("CACHEDIR.TAG").exists());
    // target/PROFILE/build/PACKAGE/out, where cargo found the folder and left no mark.
    let target = marked.or_else(|| out.ancestors().nth(4));
    target.unwrap_or(out).join("plugins")
}
