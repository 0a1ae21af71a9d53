//! The text of a guest, and how it becomes a component.
//!
//! Memory of a guest: 0..4096 holds fixed answers, 4096..65536 is free for
//! bodies, from 65536 on `cabi_realloc` hands out memory; what it handed out is
//! taken back after each call (`cabi_post_*`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// The world that a guest implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum World {
    /// Read-only format.
    FormatRo,
    /// Writable format.
    Format,
    /// Writable format that makes images.
    FormatFull,
    /// Authorization policy.
    Authz,
    /// Provider of metadata contexts.
    Context,
    /// Provider that also says what its contexts mean.
    ContextRules,
}

impl World {
    const fn name(self) -> &'static str {
        match self {
            Self::FormatRo => "format-ro",
            Self::Format => "format",
            Self::FormatFull => "format-full",
            Self::Authz => "authz",
            Self::Context => "metadata-context",
            Self::ContextRules => "metadata-context-rules",
        }
    }
}

/// An exported function: interface, name, parameters, results, fixed answer.
struct Export {
    interface: &'static str,
    name: &'static str,
    signature: &'static str,
    answer: &'static str,
}

const fn export(
    interface: &'static str,
    name: &'static str,
    signature: &'static str,
    answer: &'static str,
) -> Export {
    Export {
        interface,
        name,
        signature,
        answer,
    }
}

const META: Export = export("meta", "describe", "(result i32)", "i32.const 0");

const READER: &[Export] = &[
    META,
    export(
        "format-reader",
        "probe",
        "(param i32 i32 i64) (result i32)",
        "i32.const 77",
    ),
    // No children.
    export(
        "format-reader",
        "open",
        "(param i32 i32 i32) (result i32)",
        "i32.const 128",
    ),
    export(
        "format-reader",
        "activate",
        "(param i32 i32) (result i32)",
        "i32.const 160",
    ),
    export(
        "format-reader",
        "resolve",
        "(param i64 i64) (result i32)",
        "i32.const 256",
    ),
    export(
        "format-reader",
        "read-special",
        "(param i64 i64 i64) (result i32)",
        "i32.const 208",
    ),
    export("format-reader", "info", "(result i32)", "i32.const 224"),
];

const WRITER: &[Export] = &[
    export(
        "format-writer",
        "prepare-write",
        "(param i32 i32) (result i32)",
        "i32.const 128",
    ),
    export(
        "format-writer",
        "commit-write",
        "(param i32 i32) (result i32)",
        "i32.const 256",
    ),
    export(
        "format-writer",
        "abort-write",
        "(param i32 i32) (result i32)",
        "i32.const 128",
    ),
    export(
        "format-writer",
        "discard",
        "(param i64 i64 i32) (result i32)",
        "i32.const 256",
    ),
    export(
        "format-writer",
        "reclaim",
        "(param i32 i32) (result i32)",
        "i32.const 128",
    ),
    export("format-writer", "flush", "(result i32)", "i32.const 128"),
    export(
        "format-writer",
        "resize",
        "(param i64) (result i32)",
        "i32.const 160",
    ),
    // All zero: an empty report, and no next slice.
    export(
        "format-writer",
        "check",
        "(param i32 i64) (result i32)",
        "i32.const 1024",
    ),
    export("format-writer", "close", "(result i32)", "i32.const 128"),
];

const CREATE: &[Export] = &[
    export(
        "format-create",
        "create-schema",
        "(result i32)",
        "i32.const 240",
    ),
    export(
        "format-create",
        "measure",
        "(param i32 i32) (result i32)",
        "i32.const 160",
    ),
    export(
        "format-create",
        "create",
        "(param i32 i32) (result i32)",
        "i32.const 128",
    ),
];

const POLICY: &[Export] = &[
    META,
    export(
        "authz-policy",
        "open",
        "(param i32 i32) (result i32)",
        "i32.const 128",
    ),
    // True.
    export(
        "authz-policy",
        "is-allowed",
        "(param i32 i32) (result i32)",
        "i32.const 544",
    ),
    // All zero: an allow that narrows nothing.
    export(
        "authz-policy",
        "decide",
        "(param i32) (result i32)",
        "i32.const 1024",
    ),
    export(
        "authz-policy",
        "reconfigure",
        "(param i32 i32) (result i32)",
        "i32.const 128",
    ),
];

const PROVIDER: &[Export] = &[
    META,
    export(
        "context-provider",
        "open",
        "(param i32 i32) (result i32)",
        "i32.const 128",
    ),
    export(
        "context-provider",
        "contexts",
        "(param i32 i32) (result i32)",
        "i32.const 576",
    ),
    export(
        "context-provider",
        "block-status",
        "(param i32 i32 i64 i64 i32) (result i32)",
        "i32.const 640",
    ),
    export(
        "context-provider",
        "generation",
        "(param i32 i32) (result i64)",
        "i64.const 7",
    ),
];

const RULES: &[Export] = &[export(
    "context-rules",
    "rule-of",
    "(param i32 i32) (result i32)",
    "i32.const 704",
)];

const LOG_IMPORT: &str = r#"
  (import "outport:plugin/log@0.1.0" "log" (func $log (param i32 i32 i32)))
"#;

const POLICY_IMPORTS: &str = r#"
  (import "outport:plugin/config-files@0.1.0" "read" (func $config (param i32 i32 i32)))
"#;

const IMPORTS: &str = r#"
  (import "outport:plugin/files@0.1.0" "size" (func $size (param i32 i32)))
  (import "outport:plugin/files@0.1.0" "read" (func $read (param i32 i64 i32 i32)))
  (import "outport:plugin/files@0.1.0" "next-data" (func $next-data (param i32 i64 i32)))
  (import "outport:plugin/health@0.1.0" "corrupt"
    (func $corrupt (param i32 i32 i32 i64 i32 i64 i32)))
"#;

const TXN_IMPORTS: &str = r#"
  (import "outport:plugin/txn@0.1.0" "write"
    (func $write (param i32 i32 i64 i32 i32 i32)))
  (import "outport:plugin/txn@0.1.0" "zero" (func $zero (param i32 i32 i64 i64 i32)))
  (import "outport:plugin/txn@0.1.0" "grow" (func $grow (param i32 i64 i32)))
  (import "outport:plugin/txn@0.1.0" "free" (func $free (param i32 i64 i64 i32)))
  (import "outport:plugin/txn@0.1.0" "truncate" (func $truncate (param i32 i64 i32)))
"#;

/// `cabi_realloc` moves a mark up and grows memory as needed.
const REALLOC: &str = r#"
  (global $top (mut i32) (i32.const 65536))
  (func $alloc (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
    (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $top) (i32.const 15)) (i32.const -16)))
    (global.set $top (i32.add (local.get $at) (local.get 3)))
    (block $enough
      (br_if $enough
        (i32.le_u (global.get $top) (i32.shl (memory.size) (i32.const 16))))
      (br_if $enough
        (i32.ne (i32.const -1)
          (memory.grow
            (i32.add (i32.const 1) (i32.shr_u (local.get 3) (i32.const 16))))))
      unreachable)
    (local.get $at))
"#;

/// A guest under construction.
#[derive(Clone, Debug)]
pub struct Guest {
    world: World,
    name: String,
    schema: String,
    bodies: BTreeMap<String, String>,
    extra: String,
    pages: u32,
}

impl Guest {
    /// A format called `name` that behaves: a size of 1 MiB, `resolve` answers
    /// four extents of 64 KiB each.
    pub fn new(world: World, name: &str) -> Self {
        let schema = r#"{"type":"object","properties":{"lazy":{"type":"boolean"}},"#.to_owned()
            + r#""additionalProperties":false}"#;
        let (bodies, extra) = (BTreeMap::new(), String::new());
        Self {
            world,
            name: name.into(),
            schema,
            bodies,
            extra,
            pages: 2,
        }
    }

    /// Replace what an exported function does: Wasm text that leaves the
    /// function's result on the stack. `$log`, `$read`, `$write` and the other
    /// imports can be called.
    #[must_use]
    pub fn body(mut self, function: &str, text: &str) -> Self {
        self.bodies.insert(function.into(), text.into());
        self
    }

    /// Further fields of the module (globals, functions, data).
    #[must_use]
    pub fn with(mut self, text: &str) -> Self {
        self.extra.push_str(text);
        self
    }

    /// Memory that the guest has from the start, in 64 KiB pages.
    #[must_use]
    pub fn pages(mut self, pages: u32) -> Self {
        self.pages = pages;
        self
    }

    /// Another options schema.
    #[must_use]
    pub fn schema(mut self, schema: &str) -> Self {
        self.schema = schema.into();
        self
    }

    /// The component.
    ///
    /// # Panics
    /// The text is not valid Wasm for its world: a mistake in a test.
    pub fn component(&self) -> Vec<u8> {
        component_from_wat(&self.text(), self.world.name())
    }

    fn text(&self) -> String {
        let (exports, imports): (&[&[Export]], &[&str]) = match self.world {
            World::FormatRo => (&[READER], &[IMPORTS]),
            World::Format => (&[READER, WRITER], &[IMPORTS, TXN_IMPORTS]),
            World::FormatFull => (&[READER, WRITER, CREATE], &[IMPORTS, TXN_IMPORTS]),
            World::Authz => (&[POLICY], &[POLICY_IMPORTS]),
            World::Context => (&[PROVIDER], &[]),
            World::ContextRules => (&[PROVIDER, RULES], &[]),
        };
        let exports: Vec<&Export> = exports.iter().copied().flatten().collect();
        let imports = [LOG_IMPORT]
            .iter()
            .chain(imports)
            .copied()
            .collect::<String>();
        for name in self.bodies.keys() {
            assert!(
                exports.iter().any(|e| e.name == name),
                "no function '{name}'"
            );
        }
        let mut text = format!(
            "(module {imports} (memory (export \"memory\") {}) {REALLOC} {}\n",
            self.pages, self.extra
        );
        for e in exports {
            let (interface, name) = (e.interface, e.name);
            let body = self.bodies.get(name).map_or(e.answer, String::as_str);
            let full = format!("outport:plugin/{interface}@0.1.0#{name}");
            let _ = writeln!(text, "(func (export \"{full}\") {} {body})", e.signature);
            if e.signature.ends_with("(result i32)") && name != "probe" {
                let post = "(param i32) (global.set $top (i32.const 65536))";
                let _ = writeln!(text, "(func (export \"cabi_post_{full}\") {post})");
            }
        }
        text.push_str(&self.data());
        text.push(')');
        text
    }

    /// The fixed answers.
    fn data(&self) -> String {
        let version = "1.2.3";
        let about = "A guest of the tests";
        let mut m = vec![0_u8; 4096];
        let mut texts = 2048;
        let mut string = |m: &mut Vec<u8>, at: usize, text: &str| {
            m[texts..texts + text.len()].copy_from_slice(text.as_bytes());
            put32(m, at, texts as u32);
            put32(m, at + 4, text.len() as u32);
            texts += text.len();
        };
        // 0: describe. 128: ok of nothing, or of an empty list.
        string(&mut m, 0, &self.name);
        string(&mut m, 8, version);
        string(&mut m, 16, about);
        string(&mut m, 24, &self.schema);
        // 160: ok(geometry), and ok(measurement) when read as one.
        put64(&mut m, 168, 1 << 20);
        put32(&mut m, 176, 65536);
        put32(&mut m, 180, 65536);
        put32(&mut m, 184, 65536);
        put32(&mut m, 188, 65536);
        // 208: ok of 512 bytes of zero (there are that many at 1024).
        put32(&mut m, 212, 1024);
        put32(&mut m, 216, 512);
        // 224: ok("{}"). 240: a schema for creation.
        string(&mut m, 228, "{}");
        string(&mut m, 240, r#"{"type":"object","required":["size"]}"#);
        // 256: ok of the four extents at 272, 64 bytes each.
        put32(&mut m, 260, 272);
        put32(&mut m, 264, 4);
        for i in 0..4_usize {
            let at = 272 + 64 * i;
            put64(&mut m, at, 65536 * i as u64);
            put64(&mut m, at + 8, 65536);
            put64(&mut m, at + 32, (1 << 20) + 65536 * i as u64);
            m[at + 40] = 1;
        }
        // 544: ok(true). 576: ok of the one context at 600, `x-test:all`.
        put32(&mut m, 548, 1);
        put32(&mut m, 580, 600);
        put32(&mut m, 584, 1);
        string(&mut m, 600, "x-test:all");
        // 640: ok of the one span at 672, which is long and has status 5; not to be kept.
        put32(&mut m, 648, 672);
        put32(&mut m, 652, 1);
        put64(&mut m, 672, 1 << 40);
        put64(&mut m, 680, 5);
        // 704: ok(some(bitmap)): of the bitmap `b`; clean is 0, dirty is 3.
        m[712] = 1;
        string(&mut m, 728, "b");
        put64(&mut m, 744, 3);
        let mut text = String::from("(data (i32.const 0) \"");
        for b in m {
            let _ = write!(text, "\\{b:02x}");
        }
        text.push_str("\")");
        text
    }
}

fn put32(m: &mut [u8], at: usize, v: u32) {
    m[at..at + 4].copy_from_slice(&v.to_le_bytes());
}

fn put64(m: &mut [u8], at: usize, v: u64) {
    m[at..at + 8].copy_from_slice(&v.to_le_bytes());
}

/// A component of the text of a core module and the name of a world in `wit/`.
///
/// # Panics
/// The text is not valid Wasm for that world: a mistake in a test.
pub fn component_from_wat(text: &str, world: &str) -> Vec<u8> {
    let mut module = wat::parse_str(text).unwrap_or_else(|e| panic!("{e}\n{text:.2000}"));
    let mut resolve = Resolve::default();
    let wit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wit");
    let (package, _) = resolve.push_dir(&wit).expect("wit/ parses");
    let world = resolve
        .select_world(&[package], Some(world))
        .expect("the world exists");
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).expect("metadata");
    ComponentEncoder::default()
        .module(&module)
        .and_then(|encoder| encoder.validate(true).encode())
        .unwrap_or_else(|e| panic!("{e:?}"))
}

/// Wasm text as bytes.
///
/// # Panics
/// The text is not valid: a mistake in a test.
pub fn wat(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap_or_else(|e| panic!("{e}"))
}
