//! Guests for tests: real components, made of a few lines of Wasm text each.
//!
//! A [`Guest`] starts as a well-behaved format whose functions return fixed
//! answers; a test replaces the body of one function and so makes a plugin that
//! traps, spins, hogs or lies. No Wasm toolchain is needed: the text becomes a
//! core module, and `wit-component` makes a component of it.

mod named;
mod template;

pub use named::*;
pub use template::{Guest, World, component_from_wat, wat};
