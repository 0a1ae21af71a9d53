//! Images on storage that is full, or fails: what cannot be done is refused, nothing else is
//! touched, and the image stays whole.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bitmaps;
mod full;
mod place;
#[path = "../support/mod.rs"]
mod support;
