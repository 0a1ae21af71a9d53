//! The black-box harness: what a test of outport needs besides outport.
//!
//! ```text
//! Daemon::builder(Server::under_test())   a daemon in a folder of its own, gone with the test
//!     .nbd()                              its NBD listener
//!     .start()
//! daemon.qmp.ok("block-export-add", ..)   control, over its QMP socket
//! nbd::Haggle / nbd::Client               data, byte by byte
//! vhost_user::FrontEnd, Blk               the same for a guest's disk
//! TempImage, checksum, Rng                what is served, and what it must read as
//! qemu_img, run, requires                 other people's tools, as oracles
//! load                                    what the load generators share
//! proc_stats, eventually                  what the process costs, and waiting without sleeping
//! ```
//! Environment: `OUTPORTD` names the daemon's binary (default: beside the test executable's
//! profile folder, then `target/release`); `OUTPORT_TEST_SERVER=qsd` runs the same tests against
//! `qemu-storage-daemon`; `CI=true` turns a missing tool into a failure.

mod daemon;
mod image;
pub mod load;
pub mod nbd;
mod process;
mod qmp;
mod rng;
mod tools;
pub mod vhost_user;
mod wait;

pub use daemon::{Builder, Daemon, Server};
pub use image::{TempImage, assert_same, checksum, checksum_file, pattern};
pub use process::{ProcStats, proc_stats};
pub use qmp::{Qmp, QmpError};
pub use rng::Rng;
pub use tools::{
    Output, can_mount, check_image, python, python_package, qemu_img, requires,
    requires_python_nbd, run, try_run,
};
pub use wait::{DEADLINE, eventually};
