//! The guests that misbehave, by name. Each is a format called after itself that
//! misbehaves in `resolve`, or a policy, unless it says otherwise.

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
    ("admits", admits),
    ("obeys", obeys),
    ("describes", describes),
    ("remembers", remembers),
    ("holds-until-write", holds_until_write),
    ("context-rules", context_rules),
    ("rules-lie", rules_lie),
    ("rules-trap", rules_trap),
    ("context-traps", context_traps),
    ("context-spins", context_spins),
    ("context-lies", context_lies),
    ("context-errs", context_errs),
    ("policy-traps", policy_traps),
    ("policy-spins", policy_spins),
    ("policy-hogs", policy_hogs),
    ("policy-errs", policy_errs),
    ("policy-lies", policy_lies),
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

/// A policy that admits everybody.
pub fn admits() -> Vec<u8> {
    policy("admits").component()
}

/// A policy that does what the first byte of the file `rules` says: `a`llow,
/// `r`ead-only, allow for a `t`enth of a second, `l`imit to 20 requests a
/// second, trap (`x`), else deny.
pub fn obeys() -> Vec<u8> {
    policy("obeys")
        .with(r#"(data (i32.const 4200) "rules") (data (i32.const 4300) "told to")"#)
        .body(
            "decide",
            "(local $byte i32)
             (call $config (i32.const 4200) (i32.const 5) (i32.const 4096))
             (if (i32.load8_u (i32.const 4096)) (then unreachable))
             (local.set $byte (i32.load8_u (i32.load (i32.const 4100))))
             (if (i32.eq (local.get $byte) (i32.const 120)) (then unreachable))
             (i32.store8 (i32.const 1032) (i32.const 0))
             (i64.store (i32.const 1040)
               (i64.extend_i32_u (i32.eq (local.get $byte) (i32.const 114))))
             (i64.store (i32.const 1048)
               (i64.extend_i32_u
                 (i32.mul (i32.eq (local.get $byte) (i32.const 116)) (i32.const 100))))
             (i32.store (i32.const 1056)
               (i32.mul (i32.eq (local.get $byte) (i32.const 108)) (i32.const 20)))
             (if (i32.eqz (i32.or
                   (i32.or (i32.eq (local.get $byte) (i32.const 97))
                           (i32.eq (local.get $byte) (i32.const 114)))
                   (i32.or (i32.eq (local.get $byte) (i32.const 116))
                           (i32.eq (local.get $byte) (i32.const 108)))))
               (then
                 (i32.store8 (i32.const 1032) (i32.const 1))
                 (i32.store (i32.const 1040) (i32.const 4300))
                 (i32.store (i32.const 1044) (i32.const 7))))
             (i32.const 1024)",
        )
        .component()
}

/// A policy that traps in both its questions.
pub fn policy_traps() -> Vec<u8> {
    decides("policy-traps", "unreachable")
}

/// A policy that never answers.
pub fn policy_spins() -> Vec<u8> {
    decides("policy-spins", "(loop $l (br $l)) unreachable")
}

/// A policy that takes memory until there is no more.
pub fn policy_hogs() -> Vec<u8> {
    decides(
        "policy-hogs",
        "(loop $l (br_if $l (i32.ne (memory.grow (i32.const 64)) (i32.const -1))))
         unreachable",
    )
}

/// A policy that answers with an error: `eperm`, "busy".
pub fn policy_errs() -> Vec<u8> {
    let error = |at: u32| {
        format!(
            "(i32.store8 (i32.const 4096) (i32.const 1))
             (i32.store8 (i32.const {at}) (i32.const 0))
             (i32.store (i32.const {}) (i32.const 4200))
             (i32.store (i32.const {}) (i32.const 4))
             (i32.store (i32.const 4200) (i32.const 0x79737562))
             (i32.const 4096)",
            at + 4,
            at + 8
        )
    };
    policy("policy-errs")
        .body("is-allowed", &error(4100))
        .body("decide", &error(4104))
        .component()
}

/// A policy whose decision is neither an allow nor a denial.
pub fn policy_lies() -> Vec<u8> {
    policy("policy-lies")
        .body(
            "decide",
            "(i32.store8 (i32.const 1032) (i32.const 7)) (i32.const 1024)",
        )
        .body(
            "is-allowed",
            "(i32.store8 (i32.const 544) (i32.const 9)) (i32.const 544)",
        )
        .component()
}

/// A provider that says 5 of everything.
pub fn describes() -> Vec<u8> {
    provider("describes").component()
}

/// A provider that says how often it was asked; its answers hold while its
/// generation is 7, which it stays.
pub fn remembers() -> Vec<u8> {
    provider("remembers")
        .body(
            "block-status",
            "(i64.store (i32.const 680) (i64.add (i64.load (i32.const 680)) (i64.const 1)))
             (i32.store8 (i32.const 656) (i32.const 2))
             (i64.store (i32.const 664) (i64.const 7))
             (i32.const 640)",
        )
        .component()
}

/// A provider that says how often it was asked; its answers hold until the node is written to.
pub fn holds_until_write() -> Vec<u8> {
    provider("holds-until-write")
        .body(
            "block-status",
            "(i64.store (i32.const 680) (i64.add (i64.load (i32.const 680)) (i64.const 1)))
             (i32.store8 (i32.const 656) (i32.const 1))
             (i32.const 640)",
        )
        .component()
}

/// A provider whose context is what is dirty in the bitmap `b`: status 3.
pub fn context_rules() -> Vec<u8> {
    Guest::new(World::ContextRules, "context-rules").component()
}

/// A provider whose rule has a status that its context cannot have.
pub fn rules_lie() -> Vec<u8> {
    let body = "(i64.store (i32.const 744) (i64.const 0x100000000)) (i32.const 704)";
    Guest::new(World::ContextRules, "rules-lie")
        .body("rule-of", body)
        .component()
}

/// A provider that traps when it is asked for a rule.
pub fn rules_trap() -> Vec<u8> {
    Guest::new(World::ContextRules, "rules-trap")
        .body("rule-of", "unreachable")
        .component()
}

/// A provider that traps when it is asked about a range.
pub fn context_traps() -> Vec<u8> {
    status("context-traps", "unreachable")
}

/// A provider that never answers.
pub fn context_spins() -> Vec<u8> {
    status("context-spins", "(loop $l (br $l)) unreachable")
}

/// A provider that answers with no span at all.
pub fn context_lies() -> Vec<u8> {
    status(
        "context-lies",
        "(i32.store (i32.const 652) (i32.const 0)) (i32.const 640)",
    )
}

/// A provider that answers with an error: `eperm`, no words.
pub fn context_errs() -> Vec<u8> {
    status(
        "context-errs",
        "(i32.store8 (i32.const 4096) (i32.const 1)) (i32.const 4096)",
    )
}

fn status(name: &str, body: &str) -> Vec<u8> {
    provider(name).body("block-status", body).component()
}

fn provider(name: &str) -> Guest {
    Guest::new(World::Context, name)
}

fn policy(name: &str) -> Guest {
    Guest::new(World::Authz, name)
}

fn decides(name: &str, body: &str) -> Vec<u8> {
    policy(name)
        .body("is-allowed", body)
        .body("decide", body)
        .component()
}

fn reader(name: &str) -> Guest {
    Guest::new(World::FormatRo, name)
}
