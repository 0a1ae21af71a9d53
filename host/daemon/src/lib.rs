//! The daemon: everything of `outportd` but its `main`.
//!
//! ```text
//! args -- startup -> Daemon { graph, exports, objects, jobs, nbd, events } <- commands <- monitor
//!                        |  control plane: one thread, one tokio runtime, no locks
//!                        `--> iothreads (outport_block), NBD connections (outport_export)
//! ```
//!
//! The control plane is one thread: state lives in `RefCell`s that are never borrowed across an
//! `await`, so each command sees and leaves a consistent daemon. What may take long (opening and
//! closing nodes, compiling plugins) runs elsewhere and is awaited. `ARCHITECTURE-daemon.md` tells
//! the rest.

#![deny(unsafe_code)]

mod activity;
mod addresses;
mod args;
mod bitmaps;
mod blockdev;
mod chardev;
mod commands;
mod config;
mod contexts;
mod daemon;
mod daemonize;
mod descriptors;
mod ending;
mod events;
mod exports;
mod graph;
mod inherited;
mod jobs;
mod logging;
mod monitor;
mod nbd_server;
mod nodes;
mod objects;
mod pidfile;
mod plugin_check;
mod plugins;
mod policy;
mod signals;
mod startup;

pub use startup::run;

/// The program's name, in messages and in `query-version`.
pub(crate) const PROGRAM: &str = "outportd";
