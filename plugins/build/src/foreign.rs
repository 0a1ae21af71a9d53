//! Components of core modules that other languages' compilers made: what the
//! SDK's macros say of a Rust plugin is said here for them.

use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use wit_component::{StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

use crate::component::{Plugin, componentize};

/// The component of the module in `file`, which implements this world of `wit/`.
pub(crate) fn build(file: &Path, world: &str) -> Result<Plugin> {
    let mut module = fs::read(file).with_context(|| format!("Cannot read {}", file.display()))?;
    let mut resolve = Resolve::default();
    let contract = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wit");
    let (package, _) = resolve
        .push_dir(&contract)
        .with_context(|| format!("Cannot read the contract in {}", contract.display()))?;
    let id = resolve
        .select_world(&[package], Some(world))
        .with_context(|| format!("There is no world '{world}' in the contract"))?;
    embed_component_metadata(&mut module, &resolve, id, StringEncoding::UTF8)
        .context("This is no core module")?;
    let component = componentize(&module)
        .with_context(|| format!("{} does not implement the world '{world}'", file.display()))?;
    Ok(Plugin {
        name: file
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        folder: file.to_owned(),
        component,
    })
}
