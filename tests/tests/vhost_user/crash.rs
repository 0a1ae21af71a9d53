//! The daemon is killed under load and started again, as often as it takes.
//!
//! The driver goes on with the rings that it has: whatever it offered is answered once, by the
//! daemon that took it or by a later one, and all that was answered is in the image.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use outport_tests::vhost_user::{Blk, FrontEnd, Guest, Packed, Split, blk, features, request};
use outport_tests::{Daemon, Rng, Server, TempImage, eventually};

const ROUNDS: u32 = 50;
const SECTORS: u64 = 2048;
const DEPTH: u16 = 40;
const SIZE: u16 = 128;

enum Ring {
    Split(Split),
    Packed(Packed),
}

impl Ring {
    fn split(&self) -> &Split {
        match self {
            Self::Split(ring) => ring,
            Self::Packed(ring) => &ring.split,
        }
    }

    fn split_mut(&mut self) -> &mut Split {
        match self {
            Self::Split(ring) => ring,
            Self::Packed(ring) => &mut ring.split,
        }
    }

    fn offer(&mut self, guest: &Guest, id: u16, chain: &[(u64, u32, bool)]) {
        match self {
            Self::Split(ring) => {
                ring.put_chain(guest, id * 3, chain);
                ring.offer(guest, id * 3);
            }
            Self::Packed(ring) => ring.offer(guest, id, chain),
        }
    }

    fn take(&mut self, guest: &Guest) -> Option<u16> {
        match self {
            Self::Split(ring) => ring.take(guest).map(|(head, _)| {
                assert_eq!(head % 3, 0, "{head} is not a head");
                (head / 3) as u16
            }),
            Self::Packed(ring) => ring.take(guest).map(|(id, _)| id),
        }
    }

    /// What QEMU says of a ring whose back-end was lost.
    fn base(&self, guest: &Guest) -> u32 {
        match self {
            Self::Split(ring) => guest.read16(ring.used_ring() + 2).into(),
            Self::Packed(_) => 0x8000_8000,
        }
    }
}

struct Driver {
    guest: Guest,
    ring: Ring,
    inflight: Option<(Vec<u8>, OwnedFd)>,
    /// A cache of the host is between: small writes are answered at once, flushes take a while.
    cached: bool,
    /// What each buffer that is with the device writes: sector and content. `None`: it flushes.
    outstanding: BTreeMap<u16, Option<(u64, u64)>>,
    /// What was written and answered.
    content: BTreeMap<u64, u64>,
    rng: Rng,
    answered: u64,
}

impl Driver {
    fn new(packed: bool, cached: bool) -> Self {
        let ring = if packed {
            Ring::Packed(Packed::new(0, SIZE))
        } else {
            Ring::Split(Split::new(0, SIZE))
        };
        Self {
            guest: Guest::new(Blk::memory(1)),
            ring,
            inflight: None,
            cached,
            outstanding: BTreeMap::new(),
            content: BTreeMap::new(),
            rng: Rng::new(11),
            answered: 0,
        }
    }

    fn connect(&mut self, path: &Path) -> FrontEnd {
        let packed = matches!(self.ring, Ring::Packed(_));
        let features = if packed { features::PACKED } else { 0 };
        let wanted = features | features::FLUSH | features::EVENT_IDX;
        let mut front_end = FrontEnd::negotiated(path, wanted);
        front_end.add_memory(&self.guest);
        if let Some((payload, fd)) = &self.inflight {
            front_end.ok(request::SET_INFLIGHT_FD, payload, &[fd.as_fd()]);
        } else {
            let counts = 1_u64 | u64::from(SIZE) << 16;
            let wanted = [0, 0, counts].map(u64::to_ne_bytes).concat();
            let reply = front_end.call(request::GET_INFLIGHT_FD, &wanted, &[]);
            let mut reply = reply.unwrap();
            self.inflight = Some((reply.payload, reply.fds.remove(0)));
        }
        let base = self.ring.base(&self.guest);
        front_end.start(self.ring.split(), base);
        front_end
    }

    /// Room of one buffer: a page, its header at the end.
    fn room(id: u16) -> u64 {
        Guest::BASE + 0x20_0000 + u64::from(id) * 4096
    }

    fn offer(&mut self, id: u16) {
        if self.cached && self.rng.one_in(4) {
            self.offer_flush(id);
        } else {
            self.offer_write(id);
        }
    }

    fn offer_flush(&mut self, id: u16) {
        let header = Self::room(id) + 0x800;
        self.guest.write(header, &Blk::header(blk::FLUSH, 0));
        self.guest.write(header + 16, &[0xee]);
        let chain = [(header, 16, false), (header + 16, 1, true)];
        self.ring.offer(&self.guest, id, &chain);
        self.outstanding.insert(id, None);
    }

    fn offer_write(&mut self, id: u16) {
        let writes = self.outstanding.values().flatten();
        let taken: Vec<_> = writes.map(|it| it.0).collect();
        let sector = loop {
            let sector = self.rng.below(SECTORS / 4) * 4;
            if !taken.contains(&sector) {
                break sector;
            }
        };
        let content = self.rng.next_u64();
        let room = Self::room(id);
        self.guest.write(room, &content.to_le_bytes().repeat(256));
        self.guest
            .write(room + 0x800, &Blk::header(blk::OUT, sector));
        self.guest.write(room + 0x810, &[0xee]);
        let chain = [
            (room + 0x800, 16, false),
            (room, 2048, false),
            (room + 0x810, 1, true),
        ];
        self.ring.offer(&self.guest, id, &chain);
        self.outstanding.insert(id, Some((sector, content)));
    }

    fn take_all(&mut self) {
        while let Some(id) = self.ring.take(&self.guest) {
            let write = self.outstanding.remove(&id).expect("answered once");
            assert_eq!(self.guest.read(Self::room(id) + 0x810, 1), [blk::OK]);
            self.content.extend(write);
            self.answered += 1;
        }
    }

    fn load(&mut self, answers: u64) {
        let goal = self.answered + answers;
        eventually("requests are answered", || {
            for _ in 0..10_000 {
                self.take_all();
                for id in 0..DEPTH {
                    if !self.outstanding.contains_key(&id) {
                        self.offer(id);
                    }
                }
                self.ring.split().kick();
                if self.answered >= goal {
                    return Some(());
                }
            }
            None
        });
    }
}

fn start(image: &TempImage, socket: &Path, cached: bool) -> Daemon {
    let direct = if cached { "off" } else { "on" };
    let file = format!(
        "driver=file,node-name=disk,filename={},cache.direct={direct},aio=io_uring",
        image.str()
    );
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path={}",
        socket.display()
    );
    let builder = Daemon::builder(Server::Outport).option("--blockdev", file);
    builder.option("--export", export).start()
}

fn killed_under_load(packed: bool, cached: bool) {
    let image = TempImage::zeroes(SECTORS * 512);
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("blk.sock");
    let mut driver = Driver::new(packed, cached);
    let mut undone = 0;
    for _ in 0..ROUNDS {
        let daemon = start(&image, &socket, cached);
        let front_end = driver.connect(&socket);
        let answers = 20 + driver.rng.below(400);
        driver.load(answers);
        // Killed, as dropping does.
        drop(daemon);
        driver.take_all();
        undone += driver.outstanding.len();
        drop(front_end);
    }
    assert!(
        undone > 0,
        "nothing was ever in flight when the daemon was killed"
    );
    let daemon = start(&image, &socket, cached);
    let _front_end = driver.connect(&socket);
    eventually("what is left is answered", || {
        driver.take_all();
        driver.outstanding.is_empty().then_some(())
    });
    daemon.stop();
    // The kernel may still hold locks of daemons that were killed: no tool is asked.
    let content = std::fs::read(image.path()).unwrap();
    for (sector, value) in driver.content {
        let at = sector as usize * 512;
        assert_eq!(
            content[at..at + 2048],
            value.to_le_bytes().repeat(256),
            "sector {sector}"
        );
    }
}

#[test]
fn a_split_ring_survives_a_killed_daemon() {
    killed_under_load(false, false);
}

#[test]
fn a_packed_ring_survives_a_killed_daemon() {
    killed_under_load(true, false);
}

/// Requests that are answered at once meet others that wait, in one turn of the data thread.
#[test]
fn a_split_ring_survives_with_answers_out_of_order() {
    killed_under_load(false, true);
}

#[test]
fn a_packed_ring_survives_with_answers_out_of_order() {
    killed_under_load(true, true);
}

/// The state that a daemon leaves which is killed after it published a used buffer and before it
/// rang for it: the buffer is in the ring, and no call has reached the driver. Neither of two
/// descriptors tells which of the two came first, so the driver gets a new one for the call that
/// did come.
fn called_for_what_a_killed_daemon_published(packed: bool) {
    let image = TempImage::zeroes(SECTORS * 512);
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("blk.sock");
    let mut driver = Driver::new(packed, true);
    let daemon = start(&image, &socket, true);
    let front_end = driver.connect(&socket);
    driver.offer_write(0);
    driver.ring.split().kick();
    // Published, since it rang.
    assert!(driver.ring.split().is_called(), "the device never called");
    drop(daemon);
    drop(front_end);
    driver.ring.split_mut().lose_calls();
    let daemon = start(&image, &socket, true);
    let _front_end = driver.connect(&socket);
    // A driver that sleeps until it is called offers nothing.
    assert!(
        driver.ring.split().is_called(),
        "the driver sleeps for ever"
    );
    driver.take_all();
    assert!(driver.outstanding.is_empty());
    daemon.stop();
}

#[test]
fn a_split_ring_is_called_for_what_a_killed_daemon_published() {
    called_for_what_a_killed_daemon_published(false);
}

#[test]
fn a_packed_ring_is_called_for_what_a_killed_daemon_published() {
    called_for_what_a_killed_daemon_published(true);
}
