//! vhost-user-blk: a guest's disk over a Unix socket and shared memory.
//!
//! `ARCHITECTURE-vhost-user.md` has the picture. Pure and fuzzed: [`wire`], [`config`],
//! [`request`], [`ring`]. Control: [`server`], [`session`], [`connection`]. Data plane:
//! [`worker`], [`serve`]. All `unsafe` is in [`memory`].

mod config;
mod connection;
mod dirty;
pub mod fuzzing;
pub mod limits;
mod memory;
mod request;
mod ring;
mod serve;
mod server;
mod session;
mod wire;
mod worker;

pub use server::{Options, start};
