//! Clients of one export: an NBD client, a guest's driver on a vhost-user socket, a program that
//! writes the file of a FUSE export. One request at a time, in one thread.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use outport_tests::nbd::Client;
use outport_tests::nbd::wire::cmd;
use outport_tests::vhost_user::{Blk, FrontEnd, Guest, blk, features};
use outport_tests::{Daemon, eventually};
use rustix::fs::FallocateFlags;
use serde_json::json;

use super::storage::{is_mounted, text};

/// `ENOSPC`, on Linux and in the NBD protocol.
const ENOSPC: u32 = 28;

/// Bytes of the longest request.
pub(crate) const STEP: u64 = 1 << 20;

/// How the disk is exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Front {
    Nbd,
    VhostUser,
    Fuse,
}

/// How a request ended that was not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There is no room. virtio-blk has one word for every error: its errors count as this.
    NoSpace,
    /// Another error of the system, or of the protocol.
    Other(u32),
}

type Done = Result<(), Refusal>;

/// A client.
pub(crate) enum Writer {
    Nbd(Client),
    VhostUser(Box<(FrontEnd, Guest, Blk)>),
    Fuse(File),
}

impl Writer {
    /// Exports node `disk` and connects. `mountpoint` is a file for a FUSE export.
    pub(crate) fn attach(front: Front, daemon: &mut Daemon, mountpoint: &Path) -> Self {
        let mut export = json!({"id": "e", "node-name": "disk", "writable": true});
        let more = match front {
            Front::Nbd => json!({"type": "nbd", "name": "e"}),
            Front::VhostUser => json!({"type": "vhost-user-blk",
                "addr": {"type": "unix", "path": daemon.path("blk.sock")}}),
            Front::Fuse => json!({"type": "fuse", "mountpoint": mountpoint}),
        };
        let members = export.as_object_mut().expect("it is one");
        members.extend(more.as_object().expect("it is one").clone());
        daemon.qmp.ok("block-export-add", export);
        match front {
            Front::Nbd => Self::Nbd(daemon.client("e")),
            Front::VhostUser => {
                let path = daemon.path("blk.sock");
                let wanted = features::FLUSH | features::DISCARD | features::WRITE_ZEROES;
                let mut front_end = FrontEnd::negotiated(&path, wanted);
                let (guest, disk) = (Guest::new(Blk::memory(1)), Blk::new(0, 128));
                front_end.add_memory(&guest);
                front_end.start(&disk.queue, 0);
                Self::VhostUser(Box::new((front_end, guest, disk)))
            }
            Front::Fuse => {
                eventually("the export is mounted", || {
                    is_mounted(mountpoint).then_some(())
                });
                let file = OpenOptions::new().read(true).write(true).open(mountpoint);
                Self::Fuse(file.unwrap_or_else(|e| panic!("{}: {e}", text(mountpoint))))
            }
        }
    }

    pub(crate) fn write(&mut self, at: u64, data: &[u8]) -> Done {
        match self {
            Self::Nbd(client) => nbd(client.write(at, data)),
            Self::VhostUser(vm) => guest(vm, blk::OUT, at, data),
            Self::Fuse(file) => system(file.write_all_at(data, at)),
        }
    }

    pub(crate) fn flush(&mut self) -> Done {
        match self {
            Self::Nbd(client) => nbd(client.flush()),
            Self::VhostUser(vm) => guest(vm, blk::FLUSH, 0, &[]),
            Self::Fuse(file) => system(file.sync_all()),
        }
    }

    pub(crate) fn zero(&mut self, at: u64, len: u64) -> Done {
        match self {
            Self::Nbd(client) => nbd(client.command(0, cmd::WRITE_ZEROES, at, len as u32, &[])),
            Self::VhostUser(vm) => range(vm, blk::WRITE_ZEROES, at, len),
            Self::Fuse(file) => system(fallocate(file, FallocateFlags::ZERO_RANGE, at, len)),
        }
    }

    pub(crate) fn trim(&mut self, at: u64, len: u64) -> Done {
        match self {
            Self::Nbd(client) => nbd(client.command(0, cmd::TRIM, at, len as u32, &[])),
            Self::VhostUser(vm) => range(vm, blk::DISCARD, at, len),
            Self::Fuse(file) => system(fallocate(file, FallocateFlags::PUNCH_HOLE, at, len)),
        }
    }

    /// The whole disk of `len` bytes.
    pub(crate) fn read(&mut self, len: u64) -> Vec<u8> {
        let mut content = Vec::new();
        for at in (0..len).step_by(STEP as usize) {
            match self {
                Self::Nbd(client) => {
                    let read = client.read(at, STEP as u32).expect("the server answers");
                    content.extend(read.unwrap_or_else(|errno| panic!("READ of {at}: {errno}")));
                }
                Self::VhostUser(vm) => {
                    let (_, guest, disk) = &mut **vm;
                    content.extend(disk.read(guest, at / 512, STEP as u32));
                }
                Self::Fuse(file) => {
                    let mut piece = vec![0; STEP as usize];
                    let read = file.read_exact_at(&mut piece, at);
                    read.unwrap_or_else(|error| panic!("read of {at}: {error}"));
                    content.extend(piece);
                }
            }
        }
        content
    }

    /// Sends a write and waits for no answer; `false` where the client cannot.
    pub(crate) fn send(&mut self, at: u64, data: &[u8]) -> bool {
        let Self::Nbd(client) = self else {
            return false;
        };
        let request = client.request(0, cmd::WRITE, at, data.len() as u32);
        client
            .send(&request, data)
            .expect("the server takes requests");
        true
    }
}

fn nbd(answer: io::Result<Result<(), u32>>) -> Done {
    match answer.expect("the server answers") {
        Err(ENOSPC) => Err(Refusal::NoSpace),
        other => other.map_err(Refusal::Other),
    }
}

fn system(done: io::Result<()>) -> Done {
    done.map_err(|error| match error.raw_os_error() {
        Some(28) => Refusal::NoSpace,
        other => Refusal::Other(other.unwrap_or(0) as u32),
    })
}

fn guest(vm: &mut (FrontEnd, Guest, Blk), kind: u32, at: u64, data: &[u8]) -> Done {
    let (_, guest, disk) = vm;
    match disk.run(guest, kind, at / 512, data, 0).0 {
        blk::OK => Ok(()),
        blk::IOERR => Err(Refusal::NoSpace),
        other => Err(Refusal::Other(other.into())),
    }
}

/// DISCARD and WRITE_ZEROES: a segment of sector, sectors, flags (virtio 1.3, 5.2.6).
fn range(vm: &mut (FrontEnd, Guest, Blk), kind: u32, at: u64, len: u64) -> Done {
    let mut segment = (at / 512).to_le_bytes().to_vec();
    segment.extend_from_slice(&((len / 512) as u32).to_le_bytes());
    segment.extend_from_slice(&[0; 4]);
    guest(vm, kind, 0, &segment)
}

fn fallocate(file: &File, mode: FallocateFlags, at: u64, len: u64) -> io::Result<()> {
    rustix::fs::fallocate(file, mode | FallocateFlags::KEEP_SIZE, at, len)?;
    Ok(())
}
