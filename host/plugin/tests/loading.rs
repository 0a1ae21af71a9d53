//! Which plugins are taken, which are refused, and in which words.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use outport_block::format::FormatFactory as _;
use outport_plugin::{
    Bundled, CompileCache, Limits, PluginKind, PluginRegistry, PluginSpec, RegistryConfig, inspect,
    precompile, sha256_hex,
};
use outport_test_guests::{self as guests, Guest, World};
use support::{embedded, registry, run, spec};

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

fn pinned(id: &str, path: &Path, sha256: &str) -> PluginSpec {
    PluginSpec {
        sha256: Some(sha256.into()),
        allow_unpinned: false,
        ..spec(id, path, Limits::default())
    }
}

/// What adding says.
fn refusal(registry: &PluginRegistry, spec: &PluginSpec) -> String {
    registry.add(spec).unwrap_err().to_string()
}

#[test]
fn a_plugin_is_pinned_by_its_hash() {
    let dir = Dir::new();
    let wasm = guests::well_behaved();
    let path = dir.write("w.wasm", &wasm);
    let sha = sha256_hex(&wasm);
    let registry = registry();

    let mut bare = spec("w", &path, Limits::default());
    bare.allow_unpinned = false;
    let said = refusal(&registry, &bare);
    assert!(
        said.contains("parameter 'sha256' is missing") && said.contains(&sha),
        "{said}"
    );

    let wrong = "0".repeat(64);
    let said = refusal(&registry, &pinned("w", &path, &wrong));
    assert!(said.contains(&sha) && said.contains(&wrong), "{said}");

    let info = registry
        .add(&pinned("w", &path, &sha.to_uppercase()))
        .unwrap();
    assert_eq!(
        (info.name.as_str(), info.kind),
        ("well-behaved", PluginKind::FormatFull)
    );
    assert_eq!((info.version.as_str(), info.pinned), ("1.2.3", true));
    assert_eq!(info.options_schema["properties"]["lazy"]["type"], "boolean");
}

#[test]
fn what_is_no_plugin_is_refused_in_words() {
    let dir = Dir::new();
    let registry = registry();
    let core = b"\0asm\x01\0\0\0".to_vec();
    let compiled = precompile(&guests::well_behaved()).unwrap();
    let nameless = Guest::new(World::FormatRo, "No Name").component();
    let schemaless = Guest::new(World::FormatRo, "x").schema("[1]").component();
    let mute = Guest::new(World::FormatRo, "mute")
        .body("describe", "unreachable")
        .component();
    let nothing = b"\0asm\x0d\0\x01\0".to_vec();
    for (bytes, said) in [
        (core, "core Wasm module"),
        (compiled, "compiled code (.cwasm)"),
        (b"#!/bin/sh".to_vec(), "no Wasm file"),
        (nothing, "no plugin of any kind"),
        (nameless, "The name 'No Name' is not a letter"),
        (
            schemaless,
            "The options schema: it must be an object schema",
        ),
        (mute, "describe trapped"),
    ] {
        let path = dir.write("x.wasm", &bytes);
        let text = refusal(&registry, &spec("x", &path, Limits::default()));
        assert!(
            text.starts_with("Plugin 'x': ") && text.contains(said),
            "{text}"
        );
    }
    let missing = spec("x", &dir.0.path().join("missing"), Limits::default());
    assert!(refusal(&registry, &missing).contains("cannot read"));
    let directory = spec("x", dir.0.path(), Limits::default());
    assert!(refusal(&registry, &directory).contains("no regular file"));
    let small = Limits {
        memory_max: 4096,
        ..Limits::default()
    };
    let path = dir.write("x.wasm", &guests::well_behaved());
    let said = refusal(&registry, &spec("x", &path, small));
    assert!(said.starts_with("Parameter 'memory-max' expects"), "{said}");
    assert!(registry.query().is_empty());
}

/// A component that imports one empty instance.
fn importing(name: &str) -> Vec<u8> {
    guests::wat(&format!("(component (import \"{name}\" (instance)))"))
}

#[test]
fn foreign_imports_and_newer_contracts_are_named() {
    let dir = Dir::new();
    let registry = registry();
    for (import, said) in [
        (
            "wasi:cli/environment@0.2.0",
            "It imports wasi:cli/environment@0.2.0: plugins have no",
        ),
        (
            "outport:plugin/files@0.2.0",
            "it needs outport:plugin 0.2, this host speaks 0.1",
        ),
        (
            "acme:db/query@1.0.0",
            "a plugin may import outport:plugin only",
        ),
    ] {
        let wasm = importing(import);
        let path = dir.write("x.wasm", &wasm);
        let text = refusal(&registry, &spec("x", &path, Limits::default()));
        assert!(text.contains(said), "{text}");
        let report = inspect::check(&wasm).unwrap();
        assert!(
            !report.is_fit() && report.problems[0].contains(said),
            "{report}"
        );
    }
}

#[test]
fn inspection_says_what_a_plugin_is() {
    let wasm = guests::well_behaved();
    let report = inspect::check(&wasm).unwrap();
    assert!(report.is_fit(), "{report}");
    assert_eq!(report.name.as_deref(), Some("well-behaved"));
    assert_eq!(report.options, ["lazy"]);
    let text = report.to_string();
    assert!(text.contains("kind:        format-full\n"), "{text}");
    assert!(
        text.ends_with("This host (contract 0.1) can run it.\n"),
        "{text}"
    );
    let report = inspect::check(b"MZ").unwrap();
    assert!(
        report
            .to_string()
            .ends_with("cannot run it:\n  - This is no Wasm file.\n")
    );
}

fn bundle(name: &'static str) -> Bundled {
    let wasm = Guest::new(World::FormatRo, name).component();
    let compiled = precompile(&wasm).unwrap();
    Bundled {
        name,
        kind: PluginKind::FormatReader,
        wasm: wasm.leak(),
        compiled: embedded(compiled.leak()),
    }
}

fn with_bundle(bundled: Vec<Bundled>) -> PluginRegistry {
    let reserved = vec!["raw".into()];
    PluginRegistry::new(RegistryConfig {
        bundled,
        reserved,
        ..RegistryConfig::default()
    })
    .unwrap()
}

#[test]
fn bundled_plugins_load_on_first_use() {
    let registry = with_bundle(vec![bundle("simg")]);
    assert!(registry.scrape().is_empty());
    assert_eq!(registry.format_names(), ["simg"]);
    let first = registry.format("simg").unwrap();
    assert!(Arc::ptr_eq(&first, &registry.format("simg").unwrap()));
    assert!(registry.query()[0].bundled);
    let unknown = registry.format("vmdk").unwrap_err();
    assert_eq!(unknown.to_string(), "Unknown driver 'vmdk'");
}

#[test]
fn code_for_another_build_is_compiled_anew() {
    for compiled in [&b""[..], b"\x7fELF of another world"] {
        let registry = with_bundle(vec![Bundled {
            compiled: embedded(compiled),
            ..bundle("simg")
        }]);
        assert_eq!(registry.format("simg").unwrap().name(), "simg");
    }
}

#[test]
fn a_bundled_name_can_be_overridden_by_a_pinned_plugin_only() {
    let dir = Dir::new();
    let registry = with_bundle(vec![bundle("simg")]);
    let wasm = Guest::new(World::Format, "simg").component();
    let path = dir.write("simg.wasm", &wasm);
    let said = refusal(&registry, &spec("mine", &path, Limits::default()));
    assert!(
        said.contains("only a plugin pinned with sha256 may replace it"),
        "{said}"
    );
    registry
        .add(&pinned("mine", &path, &sha256_hex(&wasm)))
        .unwrap();
    assert!(
        registry.format("simg").unwrap().writable(),
        "the operator's one"
    );
    assert!(registry.query().iter().any(|i| i.bundled && i.overridden));
    registry.remove("mine").unwrap();
    assert!(
        !registry.format("simg").unwrap().writable(),
        "the bundled one again"
    );
}

#[test]
fn names_are_given_once_and_removal_waits_for_users() {
    let dir = Dir::new();
    let registry = with_bundle(Vec::new());
    let path = dir.write("a.wasm", &guests::traps());
    registry.add(&spec("a", &path, Limits::default())).unwrap();
    let said = refusal(&registry, &spec("a", &path, Limits::default()));
    assert_eq!(said, "Plugin 'a' already exists");
    let said = refusal(&registry, &spec("b", &path, Limits::default()));
    assert_eq!(
        said,
        "Plugin 'b': driver 'traps' is already provided by plugin 'a'"
    );
    let raw = dir.write("raw.wasm", &Guest::new(World::FormatRo, "raw").component());
    let said = refusal(&registry, &spec("raw", &raw, Limits::default()));
    assert_eq!(
        said,
        "Plugin 'raw': driver 'raw' is already provided by the host itself"
    );

    let user = registry.format("traps").unwrap();
    assert_eq!(
        registry.remove("a").unwrap_err().to_string(),
        "Plugin 'a' is in use"
    );
    drop(user);
    registry.remove("a").unwrap();
    assert_eq!(
        registry.remove("a").unwrap_err().to_string(),
        "Plugin 'a' not found"
    );
}

#[test]
fn compiled_code_is_kept_and_found_again() {
    let dir = Dir::new();
    let path = dir.write("w.wasm", &guests::well_behaved());
    let cache_dir = dir.0.path().join("cache");
    for _ in 0..2 {
        let cache = CompileCache::open(&cache_dir).unwrap();
        let config = RegistryConfig {
            cache: Some(cache),
            ..RegistryConfig::default()
        };
        let registry = Arc::new(PluginRegistry::new(config).unwrap());
        let added = registry.add_in_background(spec("w", &path, Limits::default()));
        assert_eq!(run(added).unwrap().name, "well-behaved");
    }
    assert_eq!(
        fs::read_dir(&cache_dir).unwrap().count(),
        1,
        "one entry, no leftovers"
    );
}
