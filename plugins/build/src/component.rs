//! From a plugin crate, or a workspace of them, to components.
//!
//! ```text
//! cargo build --target wasm32-unknown-unknown -> core module with a type section
//!     -> wit-component -> component -> + section `outport:contract`
//! ```
//!
//! Equal sources give equal bytes: paths are remapped, nothing is stamped.

use crate::toolchain::{TARGET, Toolchain};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};
use wit_component::{ComponentEncoder, DecodedWasm};

/// The custom section that says which contract a component was made for, e.g.
/// `0.1.0`: a host can read it before it compiles anything.
const CONTRACT_SECTION: &str = "outport:contract";

/// What the inner build may see of the environment: where cargo keeps its
/// downloads, and how it reaches the network.
const ENV_KEPT: [&str; 11] = [
    "HOME",
    "CARGO_HOME",
    "RUSTUP_HOME",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "http_proxy",
    "https_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "no_proxy",
    "NO_PROXY",
];
const ENV_KEPT_PREFIXES: [&str; 4] = [
    "CARGO_HTTP_",
    "CARGO_NET_",
    "CARGO_REGISTRIES_",
    "CARGO_SOURCE_",
];

/// A plugin crate that was built.
#[derive(Debug)]
pub(crate) struct Plugin {
    /// The name of its folder.
    pub(crate) name: String,
    /// Its folder.
    pub(crate) folder: PathBuf,
    /// The bytes of the component.
    pub(crate) component: Vec<u8>,
}

/// Build the crate or workspace in `folder`; sorted by name.
pub(crate) fn build(folder: &Path, target_dir: &Path) -> Result<Vec<Plugin>> {
    let folder = folder
        .canonicalize()
        .with_context(|| format!("Cannot find the plugin folder {}", folder.display()))?;
    let mut plugins = Vec::new();
    for (manifest, module) in compile(&folder, target_dir)? {
        let folder = manifest.parent().unwrap_or(&manifest).to_owned();
        let name = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let bytes =
            fs::read(&module).with_context(|| format!("Cannot read {}", module.display()))?;
        let component = componentize(&bytes)
            .with_context(|| format!("The plugin '{name}' does not make a component"))?;
        plugins.push(Plugin {
            name,
            folder,
            component,
        });
    }
    plugins.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(plugins)
}

/// Run cargo; the manifests and core modules of all `cdylib`s.
fn compile(folder: &Path, target_dir: &Path) -> Result<Vec<(PathBuf, PathBuf)>> {
    let toolchain = Toolchain::find()?;
    let mut cargo = Command::new(&toolchain.cargo);
    cargo
        .current_dir(folder)
        .args(["build", "--release", "--target", TARGET])
        .args(["--message-format", "json-render-diagnostics"])
        .env_clear()
        .envs(env::vars_os().filter(|(name, _)| is_kept(&name.to_string_lossy())))
        .env("PATH", toolchain.path())
        .env("RUSTC", &toolchain.rustc)
        .env("CARGO_TARGET_DIR", target_dir)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            rust_flags(&toolchain).join("\x1f"),
        )
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    if toolchain.build_std {
        cargo
            .arg("-Zbuild-std=std,panic_abort")
            .env("RUSTC_BOOTSTRAP", "1");
    }
    let output = cargo
        .output()
        .with_context(|| format!("Cannot run {}", toolchain.cargo.display()))?;
    if !output.status.success() {
        bail!("Compiling {} for {TARGET} went wrong", folder.display());
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    Ok(messages.lines().filter_map(core_module).collect())
}

fn is_kept(name: &str) -> bool {
    ENV_KEPT.contains(&name)
        || ENV_KEPT_PREFIXES
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

/// The manifest and the `.wasm` file of a "compiler-artifact" message.
fn core_module(message: &str) -> Option<(PathBuf, PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    let files = message.get("filenames")?.as_array()?;
    let module = files
        .iter()
        .filter_map(Value::as_str)
        .find(|file| file.ends_with(".wasm"))?;
    let manifest = message.get("manifest_path")?.as_str()?;
    Some((manifest.into(), module.into()))
}

/// No path of this machine gets into a component (panic messages have them).
/// The crates of the workspace itself are named by relative paths anyway. The
/// same flags for every plugin: others would compile the standard library anew.
fn rust_flags(toolchain: &Toolchain) -> Vec<String> {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(env::home_dir()?.join(".cargo")));
    let sources = toolchain.sysroot.join("lib/rustlib/src");
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    let remapped = [
        (repository, "outport"),
        (cargo_home.as_deref(), "cargo"),
        (Some(sources.as_path()), "rust"),
    ];
    // The last one that fits wins.
    let flag = |(from, to): (Option<&Path>, &str)| {
        Some(format!("--remap-path-prefix={}=/{to}", from?.display()))
    };
    remapped.into_iter().filter_map(flag).collect()
}

/// Make a component of a core module that says what it is: one that
/// `outport_sdk::export_*!` made, or `embed`.
pub(crate) fn componentize(module: &[u8]) -> Result<Vec<u8>> {
    let mut component = ComponentEncoder::default()
        .validate(true)
        .module(module)
        .context("It has no contract: does it call outport_sdk::export_format_ro! or a sibling?")?
        .encode()?;
    let contract = contract_version(&component)?;
    // A custom section: id 0, then length, then a name with its length. All
    // lengths are below 128, one byte each.
    let body = 1 + CONTRACT_SECTION.len() + contract.len();
    ensure!(body < 128, "The contract version '{contract}' is too long");
    component.extend([0, body as u8, CONTRACT_SECTION.len() as u8]);
    component.extend(CONTRACT_SECTION.bytes().chain(contract.bytes()));
    Ok(component)
}

/// The world that the component's exports make it.
pub(crate) fn kind(component: &[u8]) -> Result<&'static str> {
    let DecodedWasm::Component(resolve, world) = wit_component::decode(component)? else {
        bail!("This is a WIT package, not a component");
    };
    let exports = resolve.worlds[world].exports.keys();
    let exports: Vec<_> = exports.map(|key| resolve.name_world_key(key)).collect();
    let has = |interface: &str| {
        let name = format!("outport:plugin/{interface}@");
        exports.iter().any(|export| export.starts_with(&name))
    };
    Ok(match () {
        () if has("authz-policy") => "authz",
        () if has("context-provider") => "metadata-context",
        () if has("format-create") => "format-full",
        () if has("format-writer") => "format",
        () => "format-ro",
    })
}

/// The version of `outport:plugin` that the component's exports carry.
pub(crate) fn contract_version(component: &[u8]) -> Result<String> {
    let DecodedWasm::Component(resolve, world) = wit_component::decode(component)? else {
        bail!("This is a WIT package, not a component");
    };
    let exports = resolve.worlds[world].exports.keys();
    // "outport:plugin/meta@0.1.0"
    let mut contracts = exports.filter_map(|key| {
        let name = resolve.name_world_key(key);
        Some(
            name.strip_prefix("outport:plugin/")?
                .split_once('@')?
                .1
                .to_owned(),
        )
    });
    contracts
        .next_back()
        .context("It exports nothing of the contract outport:plugin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_without_a_contract_is_refused_with_words() {
        let refused = componentize(b"\0asm\x01\0\0\0").expect_err("it exports nothing");
        assert!(format!("{refused:#}").contains("contract"), "{refused:#}");
        assert!(componentize(b"#!/bin/sh").is_err());
    }

    #[test]
    fn the_environment_of_the_outer_build_stays_outside() {
        for outside in [
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_MANIFEST_DIR",
            "RUSTC",
        ] {
            assert!(!is_kept(outside), "{outside}");
        }
        assert!(is_kept("CARGO_NET_OFFLINE") && is_kept("HOME"));
    }
}
