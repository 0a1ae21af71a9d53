//! Ten thousand clients come and go, politely and not, and leave nothing behind: no descriptor,
//! no thread, no memory; and the daemon serves on.
//!
//! Descriptors and threads are counted exactly. Memory is bounded, after a warm-up of the same
//! load: allocators keep what they once had, but must not go on taking.

use std::io::{Read, Write};
use std::net::Shutdown;

use outport_tests::nbd::wire::{cmd, opt};
use outport_tests::nbd::{Address, Client, Haggle, Request};
use outport_tests::{Daemon, ProcStats, Rng, Server, TempImage, assert_same, eventually, pattern};
use serde_json::json;

const MIB: usize = 1 << 20;

/// A storm may add this much: a leak of one small buffer per client would be more.
const GROWTH_KIB_MAX: u64 = 4096;

/// QEMU's worker threads and their stacks come and go with load: the oracle gets more room.
const QSD_GROWTH_KIB_MAX: u64 = 64 << 10;

struct Disk {
    daemon: Daemon,
    _image: TempImage,
    content: Vec<u8>,
}

impl Disk {
    fn new() -> Self {
        let content = pattern(4 * MIB, 1);
        let image = TempImage::raw(&content);
        let mut daemon = Daemon::builder(Server::under_test()).nbd().start();
        daemon.serve("disk", &image);
        Self {
            daemon,
            _image: image,
            content,
        }
    }

    fn address(&self) -> &Address {
        self.daemon.nbd()
    }

    /// A new client reads the right bytes.
    fn serves(&self) {
        let mut client = self.daemon.client("disk");
        let read = client
            .read(0, MIB as u32)
            .expect("it answers")
            .expect("it reads");
        assert_same(&read, &self.content[..MIB], "a read between storms");
        client.disconnect().expect("a goodbye is heard");
    }

    /// The figures once every connection is gone.
    fn settled(&self, fds: Option<usize>) -> ProcStats {
        self.serves();
        eventually("every connection's descriptor is closed", || {
            // In this order: who leaves in between is not in the figures.
            let stats = self.no_clients().then(|| self.daemon.stats());
            stats.filter(|stats| fds.is_none_or(|fds| stats.fds == fds))
        })
    }

    /// Nobody is attached: no unix stream of the listener's path is in state 03, connected.
    fn no_clients(&self) -> bool {
        let path = self.address().path().to_string_lossy().into_owned();
        let table = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
        !table
            .lines()
            .filter(|line| line.ends_with(&path))
            .any(|line| line.split_whitespace().nth(5) == Some("03"))
    }

    /// Runs a storm three times: what the last adds is a leak. Before that, the allocator takes
    /// what it keeps for the next time.
    fn endures(self, mut storm: impl FnMut(&Self)) {
        let idle = self.settled(None);
        storm(&self);
        self.settled(Some(idle.fds));
        storm(&self);
        let warm = self.settled(Some(idle.fds));
        storm(&self);
        let after = self.settled(Some(idle.fds));
        self.no_leak(idle, warm, after);
        self.daemon.stop();
    }

    fn no_leak(&self, idle: ProcStats, warm: ProcStats, after: ProcStats) {
        eprintln!("idle {idle:?}\nwarm {warm:?}\nafter {after:?}");
        let is_qsd = self.daemon.server.is_qsd();
        let room = if is_qsd {
            QSD_GROWTH_KIB_MAX
        } else {
            GROWTH_KIB_MAX
        };
        let (first, second) = (warm.anon_kib, after.anon_kib);
        assert!(
            second <= first + room,
            "memory grows: {first} KiB, then {second} KiB"
        );
        if !is_qsd {
            // A thread that blocking work was given to stays for some seconds.
            eventually("no thread is left over", || {
                (self.daemon.stats().threads <= warm.threads).then_some(())
            });
        }
    }
}

#[test]
fn ten_thousand_clients_come_read_and_go() {
    Disk::new().endures(|disk| {
        for round in 0..5000u64 {
            let mut client = disk.daemon.simple_client("disk");
            let offset = round % 1024 * 4096;
            let read = client
                .read(offset, 512)
                .expect("it answers")
                .expect("it reads");
            assert_same(
                &read,
                &disk.content[offset as usize..][..512],
                "one of many",
            );
            if round % 2 == 0 {
                client.disconnect().expect("a goodbye is heard");
            }
        }
    });
}

#[test]
fn ten_thousand_connections_end_at_every_stage_of_the_handshake() {
    Disk::new().endures(|disk| {
        for round in 0..5000 {
            match round % 6 {
                0 => drop(disk.address().connect().expect("it accepts")),
                1 => drop(Haggle::greeted(disk.address()).expect("it greets")),
                2 => drop(disk.daemon.haggle()),
                3 => {
                    let mut haggle = disk.daemon.haggle();
                    haggle.raw(b"IHAVEOPT\0\0\0\x07\0\0").expect("it listens");
                }
                4 => {
                    let mut haggle = disk.daemon.haggle();
                    haggle.structured_replies().expect("they are offered");
                    let set = ["base:allocation"];
                    haggle
                        .meta_contexts(opt::SET_META_CONTEXT, "disk", &set)
                        .expect("it answers");
                }
                _ => {
                    let mut haggle = disk.daemon.haggle();
                    haggle.send(opt::GO, &[0xff; 6]).expect("it listens");
                }
            }
        }
    });
}

#[test]
fn clients_die_in_the_middle_of_requests() {
    Disk::new().endures(|disk| {
        let mut rng = Rng::new(11);
        for _ in 0..1000 {
            let mut client = disk.daemon.simple_client("disk");
            die(&mut client, &mut rng);
        }
    });
}

/// Some requests, some of a payload, some of a reply; then gone without a word.
fn die(client: &mut Client, rng: &mut Rng) {
    for cookie in 0..rng.between(1, 12) {
        let len = 4096 << rng.below(8);
        let request = Request {
            cookie,
            len,
            kind: cmd::READ,
            ..Request::default()
        };
        client
            .send(&request, &[])
            .expect("requests fit into the socket");
    }
    match rng.below(4) {
        0 => {
            // Rewrites what is there, and stops half-way.
            let request = Request {
                kind: cmd::WRITE,
                offset: 2 * MIB as u64,
                len: 65536,
                cookie: 99,
                flags: 0,
            };
            // The server may have stopped reading for want of a reader: then this blocks.
            client
                .socket()
                .set_nonblocking(true)
                .expect("a socket can be");
            let _ = client.socket().write(&request.bytes());
            let _ = client.socket().write(&[0; 1000]);
        }
        1 => {
            let mut some = vec![0; 5000];
            client.socket().read_exact(&mut some).expect("replies come");
        }
        2 => client
            .socket()
            .shutdown(Shutdown::Write)
            .expect("a socket can be"),
        _ => {}
    }
}

#[test]
fn clients_that_never_read_cost_a_bounded_amount_and_leave_nothing() {
    Disk::new().endures(|disk| {
        let mut mutes: Vec<Client> = (0..50).map(|_| disk.daemon.simple_client("disk")).collect();
        for client in &mut mutes {
            client
                .socket()
                .set_nonblocking(true)
                .expect("a socket can be");
            for cookie in 0..200 {
                let request = Request {
                    cookie,
                    len: MIB as u32,
                    ..Request::default()
                };
                // Full is as good as sent.
                let _ = client.socket().write(&request.bytes());
            }
        }
        disk.serves();
        let stats = disk.daemon.stats();
        // Ten thousand mebibytes were asked for; 32 MiB each is one request of the largest size.
        let bound = 50 * 32 * 1024;
        assert!(
            stats.anon_kib < bound,
            "{} KiB for mute clients",
            stats.anon_kib
        );
    });
}

#[test]
fn exports_come_and_go_under_load() {
    let mut disk = Disk::new();
    let images: Vec<TempImage> = (0..4).map(|seed| TempImage::random(MIB, seed)).collect();
    let cycle = |disk: &mut Disk| {
        for round in 0..250 {
            let name = format!("x{}", round % 4);
            disk.daemon.serve(&name, &images[round % 4]);
            let mut client = disk.daemon.client(&name);
            client
                .read(0, 65536)
                .expect("it answers")
                .expect("it reads");
            disk.daemon
                .qmp
                .ok("block-export-del", json!({"id": name, "mode": "hard"}));
            disk.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED");
            disk.daemon
                .qmp
                .ok("blockdev-del", json!({"node-name": name}));
        }
    };
    let idle = disk.settled(None);
    cycle(&mut disk);
    let warm = disk.settled(Some(idle.fds));
    cycle(&mut disk);
    let after = disk.settled(Some(idle.fds));
    disk.no_leak(idle, warm, after);
    disk.daemon.stop();
}
