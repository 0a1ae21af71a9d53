//! The guests that misbehave, by name. Each is a format called after itself,
//! and misbehaves in `resolve` unless it says otherwise.

use crate::{Guest, World};

/// A guest by name: the function that makes its component.
pub type Named = (&'static str, fn() -> Vec<u8>);

/// All of them, with the name of each: a test asserts that each has its test.
pub const ALL: &[Named] = &[
    ("well-behaved", well_behaved),
    ("traps", traps),
    ("panics", panics),
    ("spins", spins),
    ("hogs", hogs),
    ("lies-about-extents", lies_about_extents),
    ("huge-list", huge_list),
    ("list-out-of-memory-bounds", list_out_of_bounds),
    ("floods-the-log", floods_the_log),
    ("floods-the-transaction", floods_the_transaction),
    ("reads-out-of-bounds", reads_out_of_bounds),
    ("recurses", recurses),
];

/// Behaves: all functions of `format-full` answer.
pub fn well_behaved() -> Vec<u8> {
    Guest::new(World::FormatFull, "well-behaved").component()
}

/// Traps at once.
pub fn traps() -> Vec<u8> {
    reader("traps").body("resolve", "unreachable").component()
}

/// Says why, then traps: what a Rust panic does.
pub fn panics() -> Vec<u8> {
    reader("panics")
        .with(r#"(data (i32.const 4096) "panicked at header.rs:7: no L1 table")"#)
        .body(
            "resolve",
            "(call $log (i32.const 3) (i32.const 4096) (i32.const 36)) unreachable",
        )
        .component()
}

/// Never returns.
pub fn spins() -> Vec<u8> {
    reader("spins")
        .body("resolve", "(loop $l (br $l)) unreachable")
        .component()
}

/// Takes memory until there is no more, then gives up as an allocator would.
pub fn hogs() -> Vec<u8> {
    reader("hogs")
        .body(
            "resolve",
            "(loop $l (br_if $l (i32.ne (memory.grow (i32.const 64)) (i32.const -1))))
             unreachable",
        )
        .component()
}

/// Answers with an extent whose end overflows.
pub fn lies_about_extents() -> Vec<u8> {
    reader("lies-about-extents")
        .body(
            "resolve",
            "(i64.store (i32.const 304) (i64.const 0x7ffffffffffffff0)) (i32.const 256)",
        )
        .component()
}

/// Answers with more extents than anybody may.
pub fn huge_list() -> Vec<u8> {
    reader("huge-list")
        .pages(64)
        .body(
            "resolve",
            "(i32.store (i32.const 260) (i32.const 131072))
             (i32.store (i32.const 264) (i32.const 20000)) (i32.const 256)",
        )
        .component()
}

/// Answers with a list that ends past its memory.
pub fn list_out_of_bounds() -> Vec<u8> {
    reader("list-out-of-memory-bounds")
        .body(
            "resolve",
            "(i32.store (i32.const 260) (i32.const 0x7fffff00)) (i32.const 256)",
        )
        .component()
}

/// Logs a thousand lines per call, then answers.
pub fn floods_the_log() -> Vec<u8> {
    reader("floods-the-log")
        .body(
            "resolve",
            "(local $i i32)
             (loop $l
               (call $log (i32.const 2) (i32.const 8192) (i32.const 50000))
               (local.set $i (i32.add (local.get $i) (i32.const 1)))
               (br_if $l (i32.lt_u (local.get $i) (i32.const 1000))))
             (i32.const 256)",
        )
        .component()
}

/// `flush` queues writes until one is refused, and passes the refusal on.
pub fn floods_the_transaction() -> Vec<u8> {
    Guest::new(World::Format, "floods-the-transaction")
        .body(
            "flush",
            "(loop $l
               (call $write (i32.const 0) (i32.const 0) (i64.const 0)
                            (i32.const 0) (i32.const 512) (i32.const 4096))
               (br_if $l (i32.eqz (i32.load8_u (i32.const 4096)))))
             (i32.const 4096)",
        )
        .component()
}

/// Reads far past every range that there can be, and passes the refusal on.
pub fn reads_out_of_bounds() -> Vec<u8> {
    reader("reads-out-of-bounds")
        .body(
            "resolve",
            "(call $read (i32.const 0) (i64.const -4096) (i32.const 512) (i32.const 4096))
             (i32.const 4096)",
        )
        .component()
}

/// Overflows its stack.
pub fn recurses() -> Vec<u8> {
    reader("recurses")
        .with("(func $deep (call $deep))")
        .body("resolve", "(call $deep) unreachable")
        .component()
}

fn reader(name: &str) -> Guest {
    Guest::new(World::FormatRo, name)
}
