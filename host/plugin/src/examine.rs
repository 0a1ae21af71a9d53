//! What a component needs and offers, read from its type alone: nothing of it
//! runs. Shared by the registry (which refuses) and `inspect` (which explains).

use std::fmt;

use wasmtime::Engine;
use wasmtime::component::Component;

/// The package of the contract.
const PACKAGE: &str = "outport:plugin";

/// The contract's version that this host speaks.
pub const CONTRACT: &str = "0.1";

/// Interfaces that this host has.
const IMPORTS: [&str; 6] = ["log", "files", "txn", "health", "config-files", "node-view"];

/// Types only: components name them among their imports too.
const TYPES: [&str; 2] = ["types", "extents"];

/// What a plugin is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PluginKind {
    /// A read-only image format.
    FormatReader,
    /// An image format that can be written.
    Format,
    /// An image format that can be written and made.
    FormatFull,
    /// An authorization policy.
    Authz,
    /// A provider of NBD metadata contexts.
    MetadataContext,
}

impl PluginKind {
    /// The kind with this world.
    #[must_use]
    pub fn of_world(word: &str) -> Option<Self> {
        let all = [
            Self::FormatReader,
            Self::Format,
            Self::FormatFull,
            Self::Authz,
            Self::MetadataContext,
        ];
        all.into_iter().find(|kind| kind.word() == word)
    }

    /// Is it an image format?
    #[must_use]
    pub const fn is_format(self) -> bool {
        matches!(self, Self::FormatReader | Self::Format | Self::FormatFull)
    }

    /// The interfaces that a plugin of this kind may import.
    const fn imports(self) -> &'static [&'static str] {
        match self {
            Self::FormatReader | Self::Format | Self::FormatFull => {
                &["log", "files", "txn", "health"]
            }
            Self::Authz => &["log", "config-files"],
            Self::MetadataContext => &["log", "node-view"],
        }
    }

    /// The name of its world.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::FormatReader => "format-ro",
            Self::Format => "format",
            Self::FormatFull => "format-full",
            Self::Authz => "authz",
            Self::MetadataContext => "metadata-context",
        }
    }
}

impl fmt::Display for PluginKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The outside of a component.
#[derive(Clone, Debug, Default)]
pub(crate) struct Examined {
    pub(crate) imports: Vec<String>,
    pub(crate) exports: Vec<String>,
    pub(crate) kind: Option<PluginKind>,
    /// In words, most important first.
    pub(crate) problems: Vec<String>,
}

/// Read the type of `component`.
pub(crate) fn examine(engine: &Engine, component: &Component) -> Examined {
    let ty = component.component_type();
    let mut found = Examined {
        imports: ty
            .imports(engine)
            .map(|(name, _)| name.to_owned())
            .collect(),
        exports: ty
            .exports(engine)
            .map(|(name, _)| name.to_owned())
            .collect(),
        ..Examined::default()
    };
    for name in &found.imports {
        if let Some(problem) = import_problem(name) {
            found.problems.push(problem);
        }
    }
    let offered: Vec<_> = found
        .exports
        .iter()
        .filter_map(|name| Name::parse(name))
        .collect();
    let mut newer = false;
    for name in offered.iter().filter(|n| n.ours()) {
        if !name.spoken() {
            newer = true;
            found.problems.push(name.wrong_version("exports"));
        }
    }
    let exports = |interface| offered.iter().any(|n| n.ours() && n.interface == interface);
    found.kind = if exports("format-reader") {
        Some(match (exports("format-writer"), exports("format-create")) {
            (true, true) => PluginKind::FormatFull,
            (true, false) => PluginKind::Format,
            (false, _) => PluginKind::FormatReader,
        })
    } else if exports("authz-policy") {
        Some(PluginKind::Authz)
    } else if exports("context-provider") {
        Some(PluginKind::MetadataContext)
    } else {
        None
    };
    if let Some(kind) = found.kind {
        found.problems.extend(foreign_imports(kind, &found.imports));
    }
    if !newer {
        if found.kind.is_none() {
            found.problems.push(
                "It exports none of format-reader, authz-policy and context-provider of \
                 outport:plugin, so it is no plugin of any kind"
                    .into(),
            );
        } else if !exports("meta") {
            found
                .problems
                .push("It does not export outport:plugin/meta".into());
        }
    }
    found
}

/// Imports of another kind of plugin: this one has no business with them.
fn foreign_imports(kind: PluginKind, imports: &[String]) -> Vec<String> {
    let names = imports.iter().filter_map(|name| Name::parse(name));
    let foreign = names.filter(|name| {
        name.ours()
            && name.spoken()
            && IMPORTS.contains(&name.interface)
            && !kind.imports().contains(&name.interface)
    });
    foreign
        .map(|name| {
            let interface = name.interface;
            format!("It imports {PACKAGE}/{interface}, which plugins of kind {kind} do not have")
        })
        .collect()
}

/// "outport:plugin/files@0.1.0" taken apart.
struct Name<'a> {
    package: &'a str,
    interface: &'a str,
    version: &'a str,
}

impl<'a> Name<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        let (package, rest) = name.split_once('/')?;
        let (interface, version) = rest.split_once('@').unwrap_or((rest, ""));
        Some(Self {
            package,
            interface,
            version,
        })
    }

    fn ours(&self) -> bool {
        self.package == PACKAGE
    }

    /// The part of the version within which the contract only grows.
    fn track(&self) -> &'a str {
        let dots = self.version.match_indices('.').map(|(at, _)| at);
        let mut dots = dots.skip(if self.version.starts_with("0.") { 1 } else { 0 });
        &self.version[..dots.next().unwrap_or(self.version.len())]
    }

    fn spoken(&self) -> bool {
        self.track() == CONTRACT
    }

    fn wrong_version(&self, verb: &str) -> String {
        let (interface, version, track) = (self.interface, self.version, self.track());
        if version.is_empty() {
            return format!("It {verb} {PACKAGE}/{interface} without a version");
        }
        format!(
            "It {verb} {interface} of {PACKAGE} {version}: it needs {PACKAGE} {track}, this host \
             speaks {CONTRACT}"
        )
    }
}

/// What is wrong with an import, if anything.
fn import_problem(full: &str) -> Option<String> {
    let Some(name) = Name::parse(full) else {
        return Some(format!(
            "It imports '{full}', which is no interface of {PACKAGE}"
        ));
    };
    if full.starts_with("wasi:") {
        return Some(format!(
            "It imports {full}: plugins have no access to the system. Build for \
             wasm32-unknown-unknown (not wasm32-wasip1 or wasip2), and without code that reads \
             files, clocks, arguments or randomness"
        ));
    }
    if !name.ours() {
        return Some(format!(
            "It imports {full}: a plugin may import {PACKAGE} only"
        ));
    }
    if !name.spoken() {
        return Some(name.wrong_version("imports"));
    }
    let known = IMPORTS.contains(&name.interface) || TYPES.contains(&name.interface);
    (!known).then(|| {
        format!(
            "It imports {full}, which this host (contract {CONTRACT}) does not have: a newer \
                 host is needed"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_are_judged_in_words() {
        assert_eq!(import_problem("outport:plugin/files@0.1.0"), None);
        assert_eq!(import_problem("outport:plugin/files@0.1.7"), None);
        for (import, said) in [
            ("wasi:cli/environment@0.2.0", "no access to the system"),
            ("acme:secrets/keys@1.0.0", "may import outport:plugin only"),
            (
                "outport:plugin/files@0.2.0",
                "it needs outport:plugin 0.2, this host speaks 0.1",
            ),
            (
                "outport:plugin/files@1.4.0",
                "it needs outport:plugin 1, this host speaks 0.1",
            ),
            ("outport:plugin/teleport@0.1.3", "a newer host is needed"),
            ("env", "no interface"),
        ] {
            let problem = import_problem(import).unwrap();
            assert!(problem.contains(said), "{problem}");
        }
    }

    #[test]
    fn each_kind_has_its_own_imports() {
        let foreign = |kind, names: &[&str]| {
            let names: Vec<_> = names
                .iter()
                .map(|name| format!("outport:plugin/{name}@0.1.0"))
                .collect();
            foreign_imports(kind, &names)
        };
        let none: [&str; 0] = [];
        assert_eq!(
            foreign(PluginKind::Authz, &["types", "log", "config-files"]),
            none
        );
        assert_eq!(
            foreign(PluginKind::FormatReader, &["log", "files", "health"]),
            none
        );
        assert_eq!(
            foreign(PluginKind::MetadataContext, &["node-view", "files"]),
            ["It imports outport:plugin/files, which plugins of kind metadata-context do not have"]
        );
        assert_eq!(foreign(PluginKind::Authz, &["files", "txn"]).len(), 2);
        assert_eq!(foreign(PluginKind::Format, &["config-files"]).len(), 1);
    }
}
