//! [`PluginRegistry`]: which plugins there are, by name.
//!
//! Owned by the daemon's control plane; no request ever comes here. The lock is
//! held for lookups and for loading embedded code, never while an operator's
//! plugin is read or compiled. Invariant: one name leads to one plugin,
//! an operator's pinned one before a bundled one.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use wasmtime::component::Component;

use crate::cache::{CompileCache, MachineCode, load_embedded};
use crate::compile::{compile, sha256_hex};
use crate::counters::Counters;
use crate::engine::PluginEngine;
use crate::error::PluginError;
use crate::examine::{PluginKind, examine};
use crate::factory::{FaultHook, WasmFormatFactory};
use crate::limits::{Limits, MEMORY_MAX_CEILING, MEMORY_MAX_FLOOR, PLUGINS_MAX, WASM_BYTES_MAX};
use crate::plugin::{About, Plugin};
use crate::policy::WasmPolicyFactory;
use crate::provider::WasmProviderFactory;
use crate::query::PluginInfo;

/// A plugin that is part of this program.
#[derive(Clone, Copy, Debug)]
pub struct Bundled {
    /// Its name: what `describe` answers.
    pub name: &'static str,
    /// What it is, so that nothing is loaded to find a format.
    pub kind: PluginKind,
    /// The component.
    pub wasm: &'static [u8],
    /// Output of [`precompile`](crate::precompile) for `wasm`; may be empty.
    pub compiled: MachineCode,
}

/// What the operator said (`object-add`, `qom-type: wasm-plugin`).
#[derive(Clone, Debug, Default)]
pub struct PluginSpec {
    /// Object id.
    pub id: String,
    /// The component file.
    pub filename: PathBuf,
    /// Its SHA-256 in hex.
    pub sha256: Option<String>,
    /// Take the file as it is.
    pub allow_unpinned: bool,
    /// Its limits.
    pub limits: Limits,
}

/// What a registry is made of.
#[derive(Clone, Default)]
pub struct RegistryConfig {
    /// Plugins of this program.
    pub bundled: Vec<Bundled>,
    /// Driver names that are the host's own (`raw`, `file`, ...).
    pub reserved: Vec<String>,
    /// Where compiled code is kept; none: compiled each time.
    pub cache: Option<CompileCache>,
    /// Told of every fault.
    pub on_fault: Option<FaultHook>,
}

pub(crate) struct Entry {
    /// Object id; the driver name for a bundled one.
    pub(crate) id: String,
    pub(crate) sha256: String,
    pub(crate) bundled: bool,
    pub(crate) pinned: bool,
    pub(crate) kind: PluginKind,
    pub(crate) factory: Factory,
}

impl Entry {
    fn name(&self) -> &str {
        &self.factory.card().about.name
    }
}

/// What makes instances of a plugin, by its kind.
#[derive(Clone)]
pub(crate) enum Factory {
    Format(Arc<WasmFormatFactory>),
    Policy(Arc<WasmPolicyFactory>),
    Provider(Arc<WasmProviderFactory>),
}

/// What plugins of all kinds have.
pub(crate) struct Card<'a> {
    pub(crate) about: &'a About,
    pub(crate) limits: Limits,
    pub(crate) counters: &'a Counters,
}

impl Factory {
    pub(crate) fn card(&self) -> Card<'_> {
        fn card<W>(plugin: &Plugin<W>) -> Card<'_> {
            Card {
                about: &plugin.about,
                limits: plugin.limits,
                counters: &plugin.counters,
            }
        }
        match self {
            Self::Format(factory) => card(factory.plugin()),
            Self::Policy(factory) => card(factory.plugin()),
            Self::Provider(factory) => card(factory.plugin()),
        }
    }

    /// Nodes, objects and exports that hold it.
    pub(crate) fn users(&self) -> usize {
        let count = match self {
            Self::Format(factory) => Arc::strong_count(factory),
            Self::Policy(factory) => Arc::strong_count(factory),
            Self::Provider(factory) => Arc::strong_count(factory),
        };
        count.saturating_sub(1)
    }
}

#[derive(Default)]
struct Entries {
    added: Vec<Entry>,
    /// Bundled ones that were asked for.
    loaded: Vec<Entry>,
}

/// All plugins of a process.
pub struct PluginRegistry {
    engine: Arc<PluginEngine>,
    config: RegistryConfig,
    entries: Mutex<Entries>,
}

impl PluginRegistry {
    /// Start the engine. Loads no plugin.
    ///
    /// # Errors
    /// The engine or its clock cannot start.
    pub fn new(config: RegistryConfig) -> Result<Self, PluginError> {
        let engine = PluginEngine::new().map_err(|e| PluginError::Engine(format!("{e:#}")))?;
        Ok(Self {
            engine,
            config,
            entries: Mutex::default(),
        })
    }

    /// Add an operator's plugin. Reads, hashes, compiles (or finds it compiled)
    /// and asks it who it is: a tenth of a second and more.
    ///
    /// # Errors
    /// In words, for the operator.
    pub fn add(&self, spec: &PluginSpec) -> Result<PluginInfo, PluginError> {
        if !(MEMORY_MAX_FLOOR..=MEMORY_MAX_CEILING).contains(&spec.limits.memory_max) {
            return Err(PluginError::MemoryMax);
        }
        self.room(&self.lock(), &spec.id)?;
        let wasm = read(spec)?;
        let sha256 = sha256_hex(&wasm);
        let pinned = pinned(spec, &sha256)?;
        let unfit = |problem| PluginError::Unfit {
            id: spec.id.clone(),
            problem,
        };
        let component = self.component(&wasm, &sha256).map_err(unfit)?;
        let (kind, factory) = self.describe(&component, spec.limits).map_err(unfit)?;

        let name = factory.card().about.name.to_string();
        let mut entries = self.lock();
        self.room(&entries, &spec.id)?;
        self.name_is_free(&entries, spec, &name, pinned)?;
        let entry = Entry {
            id: spec.id.clone(),
            sha256,
            bundled: false,
            pinned,
            kind,
            factory,
        };
        let info = PluginInfo::of(&entry);
        entries.added.push(entry);
        tracing::info!(
            plugin = name,
            id = spec.id,
            sha256 = info.sha256,
            "plugin added"
        );
        Ok(info)
    }

    /// [`PluginRegistry::add`] on a thread of its own: for the control plane,
    /// which must go on answering.
    ///
    /// # Errors
    /// Those of `add`.
    pub async fn add_in_background(
        self: &Arc<Self>,
        spec: PluginSpec,
    ) -> Result<PluginInfo, PluginError> {
        let (done, result) = tokio::sync::oneshot::channel();
        let registry = Arc::clone(self);
        std::thread::Builder::new()
            .name("plugin-compile".into())
            .spawn(move || drop(done.send(registry.add(&spec))))
            .map_err(|e| PluginError::Engine(e.to_string()))?;
        match result.await {
            Ok(result) => result,
            Err(_) => Err(PluginError::Engine(
                "the compiler's thread ended early".into(),
            )),
        }
    }

    /// Remove an operator's plugin that nothing uses.
    ///
    /// # Errors
    /// It is in use, or there is none.
    pub fn remove(&self, id: &str) -> Result<(), PluginError> {
        let mut entries = self.lock();
        let Some(at) = entries.added.iter().position(|e| e.id == id) else {
            return Err(PluginError::NotFound(id.into()));
        };
        // A node or an object keeps its factory as long as it lives.
        if entries.added[at].factory.users() > 0 {
            return Err(PluginError::InUse(id.into()));
        }
        entries.added.remove(at);
        Ok(())
    }

    /// The format with this driver name; a bundled one is loaded now if it was
    /// not yet.
    ///
    /// # Errors
    /// There is none, or the bundled one does not load.
    pub fn format(&self, name: &str) -> Result<Arc<WasmFormatFactory>, PluginError> {
        let named = |entry: &Entry| entry.name() == name;
        match self.find(name, PluginKind::is_format, named)? {
            Some(Factory::Format(factory)) => Ok(factory),
            _ => Err(PluginError::UnknownDriver(name.into())),
        }
    }

    /// The policy with this name, or of the plugin object with this id; a
    /// bundled one is loaded now if it was not yet.
    ///
    /// # Errors
    /// There is none, or the bundled one does not load.
    pub fn policy(&self, name: &str) -> Result<Arc<WasmPolicyFactory>, PluginError> {
        let named = |entry: &Entry| entry.id == name || entry.name() == name;
        match self.find(name, |kind| kind == PluginKind::Authz, named)? {
            Some(Factory::Policy(factory)) => Ok(factory),
            _ => Err(PluginError::UnknownPolicy(name.into())),
        }
    }

    /// The provider of metadata contexts with this name, or of the plugin object
    /// with this id; a bundled one is loaded now if it was not yet.
    ///
    /// # Errors
    /// There is none, or the bundled one does not load.
    pub fn provider(&self, name: &str) -> Result<Arc<WasmProviderFactory>, PluginError> {
        let named = |entry: &Entry| entry.id == name || entry.name() == name;
        match self.find(name, |kind| kind == PluginKind::MetadataContext, named)? {
            Some(Factory::Provider(factory)) => Ok(factory),
            _ => Err(PluginError::UnknownProvider(name.into())),
        }
    }

    fn find(
        &self,
        name: &str,
        wanted: impl Fn(PluginKind) -> bool,
        named: impl Fn(&Entry) -> bool,
    ) -> Result<Option<Factory>, PluginError> {
        let mut entries = self.lock();
        let Entries { added, loaded } = &*entries;
        let mut all = added.iter().chain(loaded);
        if let Some(entry) = all.find(|entry| wanted(entry.kind) && named(entry)) {
            return Ok(Some(entry.factory.clone()));
        }
        let mut bundled = self.config.bundled.iter();
        let Some(bundled) = bundled.find(|b| b.name == name && wanted(b.kind)) else {
            return Ok(None);
        };
        let entry = self.load_bundled(bundled)?;
        let factory = entry.factory.clone();
        entries.loaded.push(entry);
        Ok(Some(factory))
    }

    /// Driver names that [`PluginRegistry::format`] knows, sorted.
    #[must_use]
    pub fn format_names(&self) -> Vec<String> {
        let entries = self.lock();
        let bundled = self.config.bundled.iter().filter(|b| b.kind.is_format());
        let mut names: Vec<_> = bundled.map(|b| b.name.to_owned()).collect();
        let added = entries.added.iter().filter(|e| e.kind.is_format());
        names.extend(added.map(|e| e.name().to_owned()));
        names.sort_unstable();
        names.dedup();
        names
    }

    /// All plugins, with counters. Bundled ones are loaded for it: 1 ms each,
    /// once.
    #[must_use]
    pub fn query(&self) -> Vec<PluginInfo> {
        let mut entries = self.lock();
        for bundled in &self.config.bundled {
            if entries.loaded.iter().any(|e| e.id == bundled.name) {
                continue;
            }
            match self.load_bundled(bundled) {
                Ok(entry) => entries.loaded.push(entry),
                Err(e) => tracing::error!(error = %e, "bundled plugin does not load"),
            }
        }
        let Entries { added, loaded } = &*entries;
        let mut all: Vec<_> = added.iter().chain(loaded).map(PluginInfo::of).collect();
        for info in all.iter_mut().filter(|info| info.bundled) {
            info.overridden = added.iter().any(|e| e.name() == info.name);
        }
        all
    }

    /// The counters of what is loaded now: for a scrape, which loads nothing.
    #[must_use]
    pub fn scrape(&self) -> Vec<PluginInfo> {
        let entries = self.lock();
        entries
            .added
            .iter()
            .chain(&entries.loaded)
            .map(PluginInfo::of)
            .collect()
    }

    // === inside ===

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // The lists are never half changed.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn room(&self, entries: &Entries, id: &str) -> Result<(), PluginError> {
        if entries.added.iter().any(|e| e.id == id) {
            return Err(PluginError::Exists(id.into()));
        }
        if entries.added.len() >= PLUGINS_MAX {
            return Err(PluginError::TooMany);
        }
        Ok(())
    }

    fn name_is_free(
        &self,
        entries: &Entries,
        spec: &PluginSpec,
        name: &str,
        pinned: bool,
    ) -> Result<(), PluginError> {
        let taken = |by: String| {
            Err(PluginError::NameTaken {
                id: spec.id.clone(),
                name: name.into(),
                by,
            })
        };
        if self.config.reserved.iter().any(|r| r == name) {
            return taken("the host itself".into());
        }
        if let Some(other) = entries.added.iter().find(|e| e.name() == name) {
            return taken(format!("plugin '{}'", other.id));
        }
        if !pinned && self.config.bundled.iter().any(|b| b.name == name) {
            return Err(PluginError::OverrideUnpinned {
                id: spec.id.clone(),
                name: name.into(),
            });
        }
        Ok(())
    }

    /// From the cache, or from the compiler.
    fn component(&self, wasm: &[u8], sha256: &str) -> Result<Component, String> {
        let cache = self.config.cache.as_ref();
        if let Some(found) = cache.and_then(|c| c.load(&self.engine.engine, sha256)) {
            return Ok(found);
        }
        let component = compile(&self.engine, wasm).map_err(|e| e.to_string())?;
        if let Some(cache) = cache {
            cache.store(&self.engine.engine, sha256, &component);
        }
        Ok(component)
    }

    /// Judge a component from outside, then ask it who it is.
    fn describe(
        &self,
        component: &Component,
        limits: Limits,
    ) -> Result<(PluginKind, Factory), String> {
        let found = examine(&self.engine.engine, component);
        if let Some(problem) = found.problems.into_iter().next() {
            return Err(problem);
        }
        let kind = found
            .kind
            .ok_or_else(|| "It is no plugin of any kind".to_owned())?;
        let (engine, hook) = (&self.engine, self.config.on_fault.clone());
        let factory = match kind {
            PluginKind::FormatReader | PluginKind::Format | PluginKind::FormatFull => {
                Plugin::load(engine, component, limits)
                    .map(|plugin| Factory::Format(Arc::new(WasmFormatFactory::new(plugin, hook))))
            }
            PluginKind::Authz => Plugin::load(engine, component, limits)
                .map(|plugin| Factory::Policy(Arc::new(WasmPolicyFactory::new(plugin, hook)))),
            PluginKind::MetadataContext => Plugin::load(engine, component, limits)
                .map(|plugin| Factory::Provider(Arc::new(WasmProviderFactory::new(plugin, hook)))),
        };
        Ok((kind, factory.map_err(|e| e.to_string())?))
    }

    fn load_bundled(&self, bundled: &Bundled) -> Result<Entry, PluginError> {
        let unfit = |problem| PluginError::Unfit {
            id: bundled.name.into(),
            problem,
        };
        let sha256 = sha256_hex(bundled.wasm);
        let component = match load_embedded(&self.engine.engine, bundled.compiled) {
            Some(component) => component,
            None => {
                tracing::info!(
                    plugin = bundled.name,
                    "embedded code does not fit; compiling"
                );
                self.component(bundled.wasm, &sha256).map_err(unfit)?
            }
        };
        let (kind, factory) = self
            .describe(&component, Limits::default())
            .map_err(unfit)?;
        let name = factory.card().about.name.clone();
        if &*name != bundled.name {
            return Err(unfit(format!("it calls itself '{name}'")));
        }
        if kind != bundled.kind {
            return Err(unfit(format!("it is of kind {kind}")));
        }
        Ok(Entry {
            id: bundled.name.into(),
            sha256,
            bundled: true,
            pinned: true,
            kind,
            factory,
        })
    }
}

impl std::fmt::Debug for PluginRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PluginRegistry")
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

/// The bytes of the plugin's file, no more of them than allowed.
fn read(spec: &PluginSpec) -> Result<Vec<u8>, PluginError> {
    let path: &Path = &spec.filename;
    let failed = |source| PluginError::Read {
        id: spec.id.clone(),
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let mut bytes = Vec::new();
    if meta.is_file() {
        file.take(WASM_BYTES_MAX + 1)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
    }
    if !meta.is_file() || bytes.len() as u64 > WASM_BYTES_MAX {
        return Err(PluginError::Size {
            id: spec.id.clone(),
            path: path.to_owned(),
        });
    }
    Ok(bytes)
}

/// Is it the file that was meant? `Ok(false)`: nobody said which was.
fn pinned(spec: &PluginSpec, actual: &str) -> Result<bool, PluginError> {
    match &spec.sha256 {
        Some(wanted) if wanted.eq_ignore_ascii_case(actual) => Ok(true),
        Some(wanted) => Err(PluginError::Hash {
            id: spec.id.clone(),
            path: spec.filename.clone(),
            actual: actual.into(),
            wanted: wanted.clone(),
        }),
        None if spec.allow_unpinned => Ok(false),
        None => Err(PluginError::Unpinned {
            id: spec.id.clone(),
            actual: actual.into(),
        }),
    }
}
