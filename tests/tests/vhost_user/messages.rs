//! Messages that no front-end should send. Each gets the answer that the architecture page
//! promises, and neither the daemon nor another export takes notice.

use std::os::fd::{AsFd, OwnedFd};

use outport_tests::vhost_user::{Blk, FrontEnd, Guest, Refusal, features, request};
use outport_tests::{Daemon, eventually};
use serde_json::json;

use super::{Vm, add_null, daemon, export};

/// A message, and what is wrong with it.
struct Kind {
    what: &'static str,
    /// In front of it, a guest with a running ring is set up.
    running: bool,
    send: fn(&mut Target<'_>) -> Result<(), Refusal>,
    refusal: Refusal,
}

struct Target<'a> {
    front_end: &'a mut FrontEnd,
    guest: &'a Guest,
}

const ANSWER: Refusal = Refusal::Answer(1);

impl Target<'_> {
    fn set(&mut self, request: u32, payload: &[u8], fds: usize) -> Result<(), Refusal> {
        let files: Vec<OwnedFd> = (0..fds).map(|_| memfd(4096)).collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.front_end.set(request, payload, &fds)
    }

    fn words(&mut self, request: u32, words: &[u32], fds: usize) -> Result<(), Refusal> {
        let payload: Vec<u8> = words.iter().flat_map(|it| it.to_ne_bytes()).collect();
        self.set(request, &payload, fds)
    }

    fn longs(&mut self, request: u32, words: &[u64], fds: usize) -> Result<(), Refusal> {
        let payload: Vec<u8> = words.iter().flat_map(|it| it.to_ne_bytes()).collect();
        self.set(request, &payload, fds)
    }

    /// A ring's addresses, then the message that starts it.
    fn start(&mut self, size: u32, addresses: [u64; 3]) -> Result<(), Refusal> {
        self.words(request::SET_VRING_NUM, &[0, size], 0)?;
        let [descriptors, used, available] = addresses;
        let longs = [0, descriptors, used, available, 0];
        self.longs(request::SET_VRING_ADDR, &longs, 0)?;
        self.words(request::SET_VRING_ENABLE, &[0, 1], 0)?;
        let kick = Blk::new(0, 64).queue.kick;
        let number = 0_u64.to_ne_bytes();
        self.front_end
            .set(request::SET_VRING_KICK, &number, &[kick.as_fd()])
    }

    fn raw(&mut self, words: [u32; 3]) -> Result<(), Refusal> {
        let bytes: Vec<u8> = words.iter().flat_map(|it| it.to_ne_bytes()).collect();
        let sent = self.front_end.send_bytes(&bytes, &[]);
        match sent.and_then(|()| self.front_end.receive()) {
            Ok(_) => Ok(()),
            Err(_) => Err(Refusal::End),
        }
    }

    fn region(&mut self, region: [u64; 4]) -> Result<(), Refusal> {
        let [guest, size, user, offset] = region;
        let payload = Guest::region_of(guest, size, user, offset);
        self.set(request::ADD_MEM_REG, &payload, 1)
    }

    fn config(&mut self, words: &[u32], extra: usize) -> Result<(), Refusal> {
        let mut payload: Vec<u8> = words.iter().flat_map(|it| it.to_ne_bytes()).collect();
        payload.resize(payload.len() + extra, 0);
        self.set(request::SET_CONFIG, &payload, 0)
    }

    fn inflight(&mut self, size: u64, queues: u16, queue_size: u16) -> Result<(), Refusal> {
        let counts = u64::from(queues) | u64::from(queue_size) << 16;
        self.longs(request::SET_INFLIGHT_FD, &[size, 0, counts], 1)
    }
}

fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

macro_rules! kinds {
    ($($what:literal, $running:literal, $refusal:expr, |$t:ident| $send:expr;)*) => {
        &[$(Kind {
            what: $what,
            running: $running,
            send: |$t| $send,
            refusal: $refusal,
        }),*]
    };
}

const BASE: u64 = Guest::BASE;

const KINDS: &[Kind] = kinds! {
    "version 0", false, Refusal::End, |t| t.raw([1, 0, 0]);
    "version 2", false, Refusal::End, |t| t.raw([1, 2, 0]);
    "a reply", false, Refusal::End, |t| t.raw([1, 5, 0]);
    "a payload of 4097 bytes", false, Refusal::End, |t| t.raw([2, 1, 4097]);
    "a payload of 4 GiB", false, Refusal::End, |t| t.raw([2, 1, u32::MAX]);
    "a refusal that nobody asked for", false, Refusal::End, |t| t.raw([0, 1, 0]);
    "33 descriptors", false, Refusal::End, |t| t.set(request::SET_OWNER, &[], 33);
    "request 0", false, ANSWER, |t| t.set(0, &[], 0);
    "request 45", false, ANSWER, |t| t.set(45, &[], 0);
    "request 2^32-1", false, ANSWER, |t| t.set(u32::MAX, &[], 0);
    "a request of network cards", false, ANSWER, |t| t.longs(20, &[1500], 0);
    "postcopy", false, ANSWER, |t| t.set(28, &[], 0);
    "IOTLB", false, ANSWER, |t| t.set(22, &[0; 32], 0);
    "SET_OWNER with a payload", false, ANSWER, |t| t.set(request::SET_OWNER, &[0], 0);
    "SET_OWNER with a descriptor", false, ANSWER, |t| t.set(request::SET_OWNER, &[], 1);
    "SET_FEATURES of 7 bytes", false, ANSWER, |t| t.set(request::SET_FEATURES, &[0; 7], 0);
    "SET_FEATURES of 9 bytes", false, ANSWER, |t| t.set(request::SET_FEATURES, &[0; 9], 0);
    "features that are not offered", false, ANSWER,
        |t| t.longs(request::SET_FEATURES, &[1 << 33], 0);
    "all features", false, ANSWER, |t| t.longs(request::SET_FEATURES, &[u64::MAX], 0);
    "protocol features that are not offered", false, ANSWER,
        |t| t.longs(request::SET_PROTOCOL_FEATURES, &[1 << 63], 0);
    "a table of 33 regions", false, ANSWER, |t| t.words(request::SET_MEM_TABLE, &[33, 0], 0);
    "a table of 2^32-1 regions", false, ANSWER,
        |t| t.words(request::SET_MEM_TABLE, &[u32::MAX, 0], 0);
    "a table without its descriptor", false, ANSWER,
        |t| t.longs(request::SET_MEM_TABLE, &[1, BASE, 4096, BASE, 0], 0);
    "a table with a descriptor too many", false, ANSWER,
        |t| t.longs(request::SET_MEM_TABLE, &[1, BASE, 4096, BASE, 0], 2);
    "a table of regions that overlap", false, ANSWER,
        |t| t.longs(request::SET_MEM_TABLE, &[2, BASE, 4096, BASE, 0, BASE, 4096, BASE, 0], 2);
    "a region of no bytes", false, ANSWER, |t| t.region([0, 0, 0, 0]);
    "a region past the end of its file", false, ANSWER, |t| t.region([0, 4097, 0, 0]);
    "a region that begins past its file", false, ANSWER, |t| t.region([0, 4096, 0, 8192]);
    "a region of 2^64-1 bytes", false, ANSWER, |t| t.region([0, u64::MAX, 0, 0]);
    "a region whose guest addresses wrap", false, ANSWER,
        |t| t.region([u64::MAX - 10, 4096, 0, 0]);
    "a region whose user addresses wrap", false, ANSWER,
        |t| t.region([0, 4096, u64::MAX - 10, 0]);
    "a region whose offset wraps", false, ANSWER, |t| t.region([0, 4096, 0, u64::MAX - 10]);
    "a region over another", true, ANSWER, |t| t.region([BASE + 4096, 4096, 0, 0]);
    "a region without a descriptor", false, ANSWER,
        |t| t.set(request::ADD_MEM_REG, &Guest::region_of(0, 4096, 0, 0), 0);
    "a region with two descriptors", false, ANSWER,
        |t| t.set(request::ADD_MEM_REG, &Guest::region_of(0, 4096, 0, 0), 2);
    "a region that is not memory", false, ANSWER, |t| {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let region = Guest::region_of(0, 4096, 0, 0);
        t.front_end.set(request::ADD_MEM_REG, &region, &[socket.as_fd()])
    };
    "removal of a region that is not there", false, ANSWER,
        |t| t.set(request::REM_MEM_REG, &Guest::region_of(0, 4096, 0, 0), 0);
    "size of a queue that does not exist", false, ANSWER,
        |t| t.words(request::SET_VRING_NUM, &[4, 64], 0);
    "size of queue 2^32-1", false, ANSWER,
        |t| t.words(request::SET_VRING_NUM, &[u32::MAX, 64], 0);
    "a ring of no entries", false, ANSWER, |t| t.words(request::SET_VRING_NUM, &[0, 0], 0);
    "a ring of 65536 entries", false, ANSWER, |t| t.words(request::SET_VRING_NUM, &[0, 65536], 0);
    "a ring larger than queue-size", false, ANSWER,
        |t| t.words(request::SET_VRING_NUM, &[0, 512], 0);
    "another size for a ring that runs", true, ANSWER,
        |t| t.words(request::SET_VRING_NUM, &[0, 32], 0);
    "another base for a ring that runs", true, ANSWER,
        |t| t.words(request::SET_VRING_BASE, &[0, 7], 0);
    "base of a queue that does not exist", false, ANSWER,
        |t| t.words(request::SET_VRING_BASE, &[9, 0], 0);
    "the base of a queue that does not exist", false, ANSWER,
        |t| t.words(request::GET_VRING_BASE, &[9, 0], 0);
    "a base of 4 bytes", false, ANSWER, |t| t.words(request::GET_VRING_BASE, &[0], 0);
    "addresses of a queue that does not exist", false, ANSWER,
        |t| t.longs(request::SET_VRING_ADDR, &[77, BASE, BASE, BASE, 0], 0);
    "addresses of 39 bytes", false, ANSWER, |t| t.set(request::SET_VRING_ADDR, &[0; 39], 0);
    "a ring that runs moves out of memory", true, ANSWER,
        |t| t.longs(request::SET_VRING_ADDR, &[0, 8, 8, 8, 0], 0);
    "a kick without size and addresses", false, ANSWER, |t| {
        t.words(request::SET_VRING_ENABLE, &[1, 1], 0)?;
        t.longs(request::SET_VRING_KICK, &[1], 1)
    };
    "a ring of 48 entries", false, ANSWER, |t| t.start(48, [BASE, BASE, BASE]);
    "a ring at address 0", false, ANSWER, |t| t.start(64, [0, BASE, BASE]);
    "an available ring outside of memory", false, ANSWER,
        |t| t.start(64, [BASE, BASE, BASE - 4096]);
    "a used ring that ends outside of memory", false, ANSWER, |t| {
        let end = BASE + t.guest.len();
        t.start(64, [BASE, end - 64, BASE])
    };
    "rings at the end of all addresses", false, ANSWER, |t| t.start(64, [!15, !3, !1]);
    "a table of descriptors at an odd address", false, ANSWER,
        |t| t.start(64, [BASE + 1, BASE, BASE]);
    "an available ring at an odd address", false, ANSWER,
        |t| t.start(64, [BASE, BASE, BASE + 1]);
    "a used ring at an odd address", false, ANSWER, |t| t.start(64, [BASE, BASE + 2, BASE]);
    "a kick that is a file", true, ANSWER, |t| t.longs(request::SET_VRING_KICK, &[0], 1);
    "a kick with two descriptors", false, ANSWER, |t| t.longs(request::SET_VRING_KICK, &[0], 2);
    "a kick without the descriptor that it has", false, ANSWER,
        |t| t.longs(request::SET_VRING_KICK, &[0], 0);
    "a kick with the descriptor that it has not", false, ANSWER,
        |t| t.longs(request::SET_VRING_KICK, &[0x100], 1);
    "a kick of queue 1000", false, ANSWER, |t| t.longs(request::SET_VRING_KICK, &[0x300], 1);
    "a call of a queue that does not exist", false, ANSWER,
        |t| t.longs(request::SET_VRING_CALL, &[200], 1);
    "an error of a queue that does not exist", false, ANSWER,
        |t| t.longs(request::SET_VRING_ERR, &[200], 1);
    "a queue enabled twice over", false, ANSWER,
        |t| t.words(request::SET_VRING_ENABLE, &[0, 2], 0);
    "a queue that does not exist, enabled", false, ANSWER,
        |t| t.words(request::SET_VRING_ENABLE, &[4, 1], 0);
    "a configuration longer than it says", false, ANSWER, |t| t.config(&[32, 1, 0], 2);
    "the capacity, written", false, ANSWER, |t| t.config(&[0, 8, 0], 8);
    "a cache mode of two bytes", false, ANSWER, |t| t.config(&[32, 2, 0], 2);
    "a configuration written past its end", false, ANSWER, |t| t.config(&[u32::MAX, 1, 0], 1);
    "a channel without a socket", false, ANSWER, |t| t.set(request::SET_BACKEND_REQ_FD, &[], 0);
    "a log of no bytes", false, ANSWER, |t| t.longs(request::SET_LOG_BASE, &[0, 0], 1);
    "a log longer than its file", false, ANSWER, |t| t.longs(request::SET_LOG_BASE, &[8192, 0], 1);
    "a log of 2^63 bytes", false, ANSWER, |t| t.longs(request::SET_LOG_BASE, &[1 << 63, 0], 1);
    "a log without a descriptor", false, ANSWER, |t| t.longs(request::SET_LOG_BASE, &[4096, 0], 0);
    "an inflight region of no queues", false, ANSWER,
        |t| t.longs(request::GET_INFLIGHT_FD, &[0, 0, 64 << 16], 0);
    "an inflight region of queues of no entries", false, ANSWER,
        |t| t.longs(request::GET_INFLIGHT_FD, &[0, 0, 4], 0);
    "an inflight region of 65535 queues", false, ANSWER,
        |t| t.longs(request::GET_INFLIGHT_FD, &[0, 0, 0xffff_ffff], 0);
    "an inflight region shorter than it must be", false, ANSWER, |t| t.inflight(64, 4, 64);
    "an inflight region longer than its file", false, ANSWER, |t| t.inflight(8192, 1, 64);
    "an inflight region at an odd offset", false, ANSWER,
        |t| t.longs(request::SET_INFLIGHT_FD, &[2048, 4, 64 << 16 | 1], 1);
    "an inflight region without room for a queue", false, ANSWER, |t| {
        t.inflight(4096, 1, 16)?;
        t.start(64, [BASE, BASE + 0xa000, BASE + 0x8000])
    };
};

#[track_caller]
fn victim(daemon: &mut Daemon) -> Vm {
    let path = export(daemon, "victim", json!({}));
    let mut vm = Vm::start(&path, 0);
    vm.read(0, 512);
    vm
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

#[test]
fn every_malformed_message_gets_its_answer() {
    assert!(KINDS.len() >= 60, "{} kinds", KINDS.len());
    let mut daemon = daemon();
    add_null(&mut daemon, "victim");
    add_null(&mut daemon, "disk");
    let mut victim = victim(&mut daemon);
    let path = export(
        &mut daemon,
        "disk",
        json!({"num-queues": 4, "queue-size": 256}),
    );
    let before = descriptors(daemon.pid());
    for kind in KINDS {
        let mut vm = if kind.running {
            Vm::start(&path, features::MQ)
        } else {
            let mut front_end = FrontEnd::negotiated(&path, features::MQ);
            let guest = Guest::new(Blk::memory(1));
            front_end.add_memory(&guest);
            let disk = Blk::new(0, 128);
            Vm {
                front_end,
                guest,
                disk,
            }
        };
        let refused = (kind.send)(&mut Target {
            front_end: &mut vm.front_end,
            guest: &vm.guest,
        });
        assert_eq!(refused, Err(kind.refusal), "{}", kind.what);
        if kind.refusal == ANSWER {
            assert_eq!(vm.front_end.get(request::GET_QUEUE_NUM), 4, "{}", kind.what);
        }
        if kind.running {
            vm.read(0, 512);
        }
        victim.read(0, 512);
    }
    eventually("no descriptor is left over", || {
        (descriptors(daemon.pid()) <= before).then_some(())
    });
    drop(victim);
    daemon.stop();
}

/// What is cut off in the middle ends that connection and nothing else.
#[test]
fn messages_that_end_midway_end_the_connection() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let path = export(&mut daemon, "disk", json!({}));
    let whole = [2_u32, 9, 8, 0, 0].map(u32::to_ne_bytes).concat();
    for len in 1..whole.len() {
        let mut front_end = FrontEnd::connect(&path).unwrap();
        front_end.send_bytes(&whole[..len], &[]).unwrap();
        front_end
            .socket()
            .shutdown(std::net::Shutdown::Write)
            .unwrap();
        front_end.receive().unwrap_err();
    }
    Vm::start(&path, 0).read(0, 512);
}

/// A refused message that asked for no answer must not look as if it had worked.
#[test]
fn a_silent_refusal_ends_the_connection() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let path = export(&mut daemon, "disk", json!({}));
    let mut front_end = FrontEnd::negotiated(&path, 0);
    let payload = u64::MAX.to_ne_bytes();
    front_end
        .send(request::SET_FEATURES, 1, &payload, &[])
        .unwrap();
    front_end.receive().unwrap_err();
}

#[test]
fn a_configuration_read_outside_is_answered_without_payload() {
    let mut daemon = daemon();
    add_null(&mut daemon, "disk");
    let path = export(&mut daemon, "disk", json!({}));
    let mut front_end = FrontEnd::negotiated(&path, 0);
    assert_eq!(front_end.config(0, 256).len(), 256);
    for (offset, size) in [(0, 257), (256, 1), (u32::MAX, 1), (u32::MAX, 255)] {
        assert!(front_end.config(offset, size).is_empty());
    }
    assert_eq!(front_end.capacity(), 1 << 20);
}
