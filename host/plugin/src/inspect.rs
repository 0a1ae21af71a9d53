//! `outport plugin check x.wasm`: a plugin judged in words, with no file
//! granted and nothing left behind.

use std::fmt;
use std::sync::Arc;

use outport_block::format::FormatError;
use wasmtime::component::Component;

use crate::compile::{compile, sha256_hex};
use crate::engine::PluginEngine;
use crate::error::PluginError;
use crate::examine::{CONTRACT, PluginKind, examine};
use crate::limits::Limits;
use crate::plugin::{About, Plugin};
use crate::world::{Formats, Policies, Providers, World};

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Bytes of the file.
    pub size: u64,
    /// SHA-256 of the file, in hex: what `sha256` in `object-add` wants.
    pub sha256: String,
    /// What it is, if anything.
    pub kind: Option<PluginKind>,
    /// Driver name.
    pub name: Option<String>,
    /// Its own version.
    pub version: Option<String>,
    /// One sentence.
    pub description: Option<String>,
    /// Names of its options.
    pub options: Vec<String>,
    /// Everything that it imports.
    pub imports: Vec<String>,
    /// What is wrong, most important first. Empty: this host can run it.
    pub problems: Vec<String>,
}

impl Report {
    /// Can this host run it?
    #[must_use]
    pub fn is_fit(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Judge the bytes of a `.wasm` file.
///
/// # Errors
/// Only when this host cannot run any plugin.
pub fn check(wasm: &[u8]) -> Result<Report, PluginError> {
    let engine = PluginEngine::new().map_err(|e| PluginError::Engine(format!("{e:#}")))?;
    let mut report = Report {
        size: wasm.len() as u64,
        sha256: sha256_hex(wasm),
        ..Report::default()
    };
    let component = match compile(&engine, wasm) {
        Ok(component) => component,
        Err(e) => {
            report.problems.push(e.to_string());
            return Ok(report);
        }
    };
    let found = examine(&engine.engine, &component);
    report.kind = found.kind;
    report.imports = found.imports;
    report.problems = found.problems;
    let Some(kind) = found.kind.filter(|_| report.problems.is_empty()) else {
        return Ok(report);
    };
    let about = match kind {
        PluginKind::FormatReader | PluginKind::Format | PluginKind::FormatFull => {
            about::<Formats>(&engine, &component)
        }
        PluginKind::Authz => about::<Policies>(&engine, &component),
        PluginKind::MetadataContext => about::<Providers>(&engine, &component),
    };
    match about {
        Ok(about) => {
            report.name = Some(about.name.to_string());
            report.version = Some(about.version);
            report.description = Some(about.description);
            let properties = about.schema.json().get("properties");
            let names = properties.and_then(|p| p.as_object());
            report.options = names.into_iter().flat_map(|p| p.keys().cloned()).collect();
        }
        Err(e) => report.problems.push(e.to_string()),
    }
    Ok(report)
}

fn about<W: World>(
    engine: &Arc<PluginEngine>,
    component: &Component,
) -> Result<About, FormatError> {
    let plugin = Plugin::<W>::load(engine, component, Limits::default())?;
    Ok(plugin.about.clone())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = || "unknown".to_owned();
        let text = |s: &Option<String>| s.clone().unwrap_or_else(unknown);
        let list = |l: &[String]| {
            if l.is_empty() {
                "none".into()
            } else {
                l.join(", ")
            }
        };
        writeln!(f, "name:        {}", text(&self.name))?;
        writeln!(f, "version:     {}", text(&self.version))?;
        writeln!(f, "description: {}", text(&self.description))?;
        writeln!(
            f,
            "kind:        {}",
            self.kind.map_or_else(unknown, |k| k.to_string())
        )?;
        writeln!(f, "options:     {}", list(&self.options))?;
        writeln!(f, "imports:     {}", list(&self.imports))?;
        writeln!(f, "size:        {} bytes", self.size)?;
        writeln!(f, "sha256:      {}", self.sha256)?;
        if self.is_fit() {
            return writeln!(f, "This host (contract {CONTRACT}) can run it.");
        }
        writeln!(f, "This host (contract {CONTRACT}) cannot run it:")?;
        self.problems
            .iter()
            .try_for_each(|p| writeln!(f, "  - {p}."))
    }
}
