//! The qcow2 image format. An instance is one open image; it says where guest
//! bytes are and queues metadata, and never moves payload.

#![forbid(unsafe_code)]

#[allow(dead_code, reason = "the modules that use it follow")]
mod header;
#[allow(dead_code, reason = "the modules that use it follow")]
mod refcount;
#[allow(dead_code, reason = "the modules that use it follow")]
mod table;
