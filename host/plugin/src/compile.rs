//! From `.wasm` to machine code.
//!
//! [`precompile`] is what `plugins/build` calls at build time; the registry
//! compiles other plugins at run time through [`compile`], on a thread of its
//! own. Both use the settings of `engine`, so that the code is interchangeable.

use std::panic::{AssertUnwindSafe, catch_unwind};

use sha2::{Digest as _, Sha256};
use wasmtime::component::Component;
use wasmtime::{Engine, Precompiled};

use crate::engine::{PluginEngine, config};
use crate::limits::WASM_BYTES_MAX;

/// Why a file is no component that can be compiled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CompileError(pub(crate) String);

/// Compile a component for embedding into a program that links this crate.
///
/// # Errors
/// `wasm` is no component, or not a valid one.
pub fn precompile(wasm: &[u8]) -> Result<Vec<u8>, CompileError> {
    acceptable(wasm)?;
    let said = |e: wasmtime::Error| CompileError(format!("{e:#}"));
    let engine = Engine::new(&config().map_err(said)?).map_err(said)?;
    engine.precompile_component(wasm).map_err(said)
}

/// Compile for this process. Takes 0.1 s for an ordinary plugin: not on a
/// thread that serves anybody.
pub(crate) fn compile(engine: &PluginEngine, wasm: &[u8]) -> Result<Component, CompileError> {
    acceptable(wasm)?;
    // It is a hundred thousand lines that read a stranger's file: should one of
    // them panic, that file is not for us, and the daemon goes on.
    let compiled = catch_unwind(AssertUnwindSafe(|| {
        Component::from_binary(&engine.engine, wasm)
    }));
    match compiled {
        Ok(compiled) => compiled.map_err(|e| CompileError(format!("{e:#}"))),
        Err(_panic) => Err(CompileError("The compiler gave up on this file".into())),
    }
}

/// A binary component, by its first bytes. The words of the compiler for
/// anything else would not help.
fn acceptable(wasm: &[u8]) -> Result<(), CompileError> {
    let no = |text: &str| Err(CompileError(text.into()));
    if wasm.len() as u64 > WASM_BYTES_MAX {
        return no("The file is larger than 64 MiB");
    }
    if Engine::detect_precompiled(wasm) == Some(Precompiled::Component)
        || wasm.starts_with(b"\x7fELF")
    {
        return no(
            "This is compiled code (.cwasm), which cannot be checked and is never \
                   accepted. Give the .wasm component that it was made from",
        );
    }
    match (wasm.get(..4), wasm.get(4..8)) {
        (Some(b"\0asm"), Some([1, 0, 0, 0])) => no(
            "This is a core Wasm module, not a component. Componentize it: cargo build \
                with plugins/build does, and so does 'wasm-tools component new'",
        ),
        (Some(b"\0asm"), Some([_, _, 1, 0])) => Ok(()),
        (Some(b"\0asm"), _) => no("This is Wasm of a version that this host does not know"),
        _ => no("This is no Wasm file"),
    }
}

/// The identity of a plugin: the SHA-256 of its `.wasm`, in hex.
#[must_use]
pub fn sha256_hex(wasm: &[u8]) -> String {
    hex(&Sha256::digest(wasm))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for b in bytes {
        let _ = write!(text, "{b:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_component_is_named() {
        for (bytes, said) in [
            (&b"\0asm\x01\0\0\0"[..], "core Wasm module"),
            (b"\x7fELF....", "compiled code"),
            (b"\0asm\x07\0\x02\0", "a version"),
            (b"#!/bin/sh", "no Wasm file"),
            (b"", "no Wasm file"),
        ] {
            let e = precompile(bytes).unwrap_err();
            assert!(e.to_string().contains(said), "{e}");
        }
        assert!(
            precompile(b"\0asm\x0d\0\x01\0").is_ok(),
            "the empty component"
        );
    }
}
