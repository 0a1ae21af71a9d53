//! The qcow2 image format. An instance is one open image; it says where guest
//! bytes are and queues metadata, and never moves payload.

#![forbid(unsafe_code)]

mod alloc;
mod bitmaps;
mod check;
mod create;
mod discard;
mod facts;
mod format;
mod header;
mod image;
mod map;
mod options;
mod pages;
mod refcount;
mod regions;
mod release;
mod resize;
mod snapshot;
mod table;
#[cfg(test)]
mod tests;
mod write;

pub mod fuzzing;

pub use image::Qcow2;

#[cfg(target_arch = "wasm32")]
outport_sdk::export_format_full!(Qcow2, bitmaps);
