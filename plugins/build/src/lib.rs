//! The plugins that come with outport, as bytes.
//!
//! `build.rs` makes them from the workspace `plugins/`; the module `component`
//! does the work and is shared with the tool `outport-plugin-build`, which
//! makes a component of any plugin crate.

/// One bundled plugin.
#[derive(Clone, Copy, Debug)]
pub struct Bundled {
    /// The name of its folder, e.g. `"qcow2"`.
    pub name: &'static str,
    /// What it is: the name of its world, e.g. `"format-full"`.
    pub kind: &'static str,
    /// The component.
    pub wasm: &'static [u8],
    /// Native code for it, made by the wasmtime of this build; empty: compile
    /// `wasm` when it is loaded.
    pub compiled: &'static [u8],
}

/// All bundled plugins, sorted by name.
pub fn bundled() -> &'static [Bundled] {
    include!(concat!(env!("OUT_DIR"), "/bundled.rs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bundled_plugin_is_a_component() {
        for plugin in bundled() {
            // A component is layer 1 of the binary format, a module layer 0.
            assert_eq!(plugin.wasm[..8], *b"\0asm\x0d\0\x01\0", "{}", plugin.name);
        }
    }
}
