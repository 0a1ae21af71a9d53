//! The black-box harness: what a test of outport needs besides outport.

pub mod nbd;
pub mod rng;

pub use rng::Rng;
