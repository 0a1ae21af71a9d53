//! What the tests of this crate share: files in memory, and plugins made from
//! bytes.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses a part of it"
)]

mod host;

use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use outport_block::format::{Format, FormatError, FormatFactory, FormatFiles, Grant};
use outport_block::{ByteRange, Errno};
use outport_plugin::{
    Bundled, Limits, MachineCode, PluginKind, PluginRegistry, PluginSpec, RegistryConfig,
    WasmFormatFactory,
};
use outport_test_guests::{Guest, World};

#[allow(unused_imports, reason = "each test file uses a part of it")]
pub use host::Host;

/// Slot 0 in memory.
#[derive(Debug, Default)]
pub struct MemoryFiles {
    pub bytes: Vec<u8>,
    /// How often `read` is polled before it is ready; 0: `try_read` answers.
    pub waits: usize,
    pub reads: AtomicUsize,
    pub corruptions: Mutex<Vec<String>>,
}

impl MemoryFiles {
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes,
            ..Self::default()
        })
    }

    pub fn slow(bytes: Vec<u8>, waits: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes,
            waits,
            ..Self::default()
        })
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) {
        buf.fill(0);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(from) = self.bytes.get(offset..) {
            let len = from.len().min(buf.len());
            buf[..len].copy_from_slice(&from[..len]);
        }
    }
}

impl FormatFiles for MemoryFiles {
    fn size(&self, slot: u32) -> Result<u64, Errno> {
        if slot == 0 {
            Ok(self.bytes.len() as u64)
        } else {
            Err(Errno::Inval)
        }
    }

    fn try_read(&self, slot: u32, offset: u64, buf: &mut [u8]) -> Option<Result<(), Errno>> {
        if slot != 0 {
            return Some(Err(Errno::Inval));
        }
        if self.waits > 0 {
            return None;
        }
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.fill(offset, buf);
        Some(Ok(()))
    }

    fn read(
        &self,
        _slot: u32,
        offset: u64,
        len: usize,
    ) -> Pin<Box<dyn Future<Output = Result<Vec<u8>, Errno>> + Send + '_>> {
        Box::pin(async move {
            for _ in 0..self.waits {
                tokio::task::yield_now().await;
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
            let mut buf = vec![0; len];
            self.fill(offset, &mut buf);
            Ok(buf)
        })
    }

    fn next_data(&self, _slot: u32, offset: u64) -> Result<Option<ByteRange>, Errno> {
        Ok(Some(ByteRange::between(offset, self.bytes.len() as u64)))
    }

    fn corrupt(&self, message: &str, _offset: Option<u64>, _size: Option<u64>, fatal: bool) {
        self.corruptions
            .lock()
            .unwrap()
            .push(format!("{message} fatal={fatal}"));
    }

    fn node_name(&self) -> &str {
        "disk0"
    }
}

pub fn registry() -> Arc<PluginRegistry> {
    Arc::new(PluginRegistry::new(RegistryConfig::default()).unwrap())
}

pub fn spec(id: &str, path: &Path, limits: Limits) -> PluginSpec {
    PluginSpec {
        id: id.into(),
        filename: path.to_owned(),
        sha256: None,
        allow_unpinned: true,
        limits,
    }
}

/// Add `wasm` to `registry` under its own name.
pub fn add(registry: &PluginRegistry, wasm: &[u8], limits: Limits) -> Arc<WasmFormatFactory> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.wasm");
    std::fs::write(&path, wasm).unwrap();
    let id = format!("guest{}", registry.scrape().len());
    let info = registry.add(&spec(&id, &path, limits)).unwrap();
    registry.format(&info.name).unwrap()
}

/// A plugin of its own engine.
pub fn plugin(wasm: &[u8], limits: Limits) -> Arc<WasmFormatFactory> {
    add(&registry(), wasm, limits)
}

/// An open image over `files`.
pub async fn open(
    factory: &WasmFormatFactory,
    files: Arc<dyn FormatFiles>,
    writable: bool,
) -> Result<Box<dyn Format>, FormatError> {
    let mut format = factory.instantiate(files).await?;
    format.open("{}", writable).await?;
    format.activate(Vec::<Grant>::new()).await?;
    Ok(format)
}

/// Machine code that a test embeds.
#[allow(unsafe_code, reason = "tests hand over what a build script would")]
pub fn embedded(code: &'static [u8]) -> MachineCode {
    // SAFETY: tests give what `precompile` made, or bytes that the engine turns down at once,
    // since they are no code of it.
    unsafe { MachineCode::new(code) }
}

/// The qcow2 plugin of this build: the machine code that the daemon runs.
pub fn bundled() -> Arc<dyn FormatFactory> {
    static REGISTRY: LazyLock<PluginRegistry> = LazyLock::new(|| {
        let convert = |plugin: &outport_plugins::Bundled| Bundled {
            name: plugin.name,
            kind: PluginKind::of_world(plugin.kind).unwrap(),
            wasm: plugin.wasm,
            compiled: embedded(plugin.compiled),
        };
        let config = RegistryConfig {
            bundled: outport_plugins::bundled().iter().map(convert).collect(),
            ..RegistryConfig::default()
        };
        PluginRegistry::new(config).unwrap()
    });
    REGISTRY.format("qcow2").unwrap()
}

/// Run on a current-thread runtime, as an iothread does.
pub fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// A plugin whose `flush` queues a write, reads a part of it back, and writes what it read.
pub fn reads_its_own_writes() -> Vec<u8> {
    Guest::new(World::Format, "self-reader")
        .with(r#"(data (i32.const 5000) "ABCD")"#)
        .body(
            "flush",
            "(call $write (i32.const 0) (i32.const 0) (i64.const 10)
                          (i32.const 5000) (i32.const 4) (i32.const 4096))
             (call $read (i32.const 0) (i64.const 8) (i32.const 10) (i32.const 4096))
             (call $write (i32.const 0) (i32.const 1) (i64.const 100)
                          (i32.load (i32.const 4100)) (i32.load (i32.const 4104))
                          (i32.const 4096))
             (i32.const 4096)",
        )
        .component()
}

pub const UNIT: ByteRange = ByteRange::between(0, 65536);
