//! With the cache off every completed write is durable: by the record of a disk below the export,
//! an NBD server that knows what a power cut would leave.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use outport_tests::nbd::wire::{cmd, cmd_flag};
use outport_tests::vhost_user::{blk, features};
use outport_tests::{Rng, TempImage, assert_same, qemu_img, run};
use serde_json::{Value, json};

use super::{Vm, daemon, export};

/// `NBD_FLAG_HAS_FLAGS`, flush, trim, zeroes; and FUA.
const FLAGS: u16 = 0x65;
const FUA: u16 = 8;

/// A disk with a cache.
#[derive(Clone)]
struct Disk {
    now: Vec<u8>,
    /// What the power cut leaves.
    durable: Vec<u8>,
}

/// It, and the way to it.
struct Peer {
    disk: Arc<Mutex<Disk>>,
    address: Value,
}

impl Peer {
    fn start(socket: &Path, content: Vec<u8>, flags: u16) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let durable = content.clone();
        let disk = Arc::new(Mutex::new(Disk {
            now: content,
            durable,
        }));
        let kept = disk.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // The client hangs up when it has seen enough.
                let _ = stream.and_then(|stream| serve(stream, flags, &kept));
            }
        });
        let address = json!({"type": "unix", "path": socket});
        Self { disk, address }
    }

    fn durable(&self) -> Vec<u8> {
        self.disk.lock().unwrap().durable.clone()
    }
}

fn serve(mut stream: UnixStream, flags: u16, disk: &Mutex<Disk>) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        stream.read_exact(&mut vec![0; word(12) as usize])?;
        let mut reply = |kind: u32, data: &[u8]| {
            let words = [word(8), kind, data.len() as u32].map(u32::to_be_bytes);
            let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
            stream.write_all(&[&magic[..], &words.concat(), data].concat())
        };
        // GO, or something that this server does not have.
        if word(8) == 7 {
            let size = disk.lock().unwrap().now.len() as u64;
            let info = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()];
            reply(3, &info.concat())?;
            reply(1, b"")?;
            break;
        }
        reply(0x8000_0001, b"")?;
    }
    loop {
        let mut request = [0; 28];
        stream.read_exact(&mut request)?;
        let answer = answer(&request, &mut stream, disk)?;
        let magic = 0x6744_6698_u32.to_be_bytes();
        stream.write_all(&[&magic[..], &[0; 4], &request[8..16], &answer].concat())?;
    }
}

fn answer(
    request: &[u8; 28],
    stream: &mut UnixStream,
    disk: &Mutex<Disk>,
) -> std::io::Result<Vec<u8>> {
    let short = |at: usize| u16::from_be_bytes([request[at], request[at + 1]]);
    let from = u64::from_be_bytes(request[16..24].try_into().unwrap()) as usize;
    let len = u32::from_be_bytes(request[24..28].try_into().unwrap()) as usize;
    let mut data = vec![0; len];
    let kind = short(6);
    if kind == cmd::WRITE {
        stream.read_exact(&mut data)?;
    }
    let mut disk = disk.lock().unwrap();
    if kind == cmd::READ {
        return Ok(disk.now[from..from + len].to_vec());
    }
    if kind == cmd::FLUSH {
        disk.durable = disk.now.clone();
    }
    if kind == cmd::WRITE || kind == cmd::WRITE_ZEROES {
        disk.now[from..from + len].copy_from_slice(&data);
        if short(4) & cmd_flag::FUA != 0 {
            disk.durable[from..from + len].copy_from_slice(&data);
        }
    }
    Ok(Vec::new())
}

/// A request that writes, at random; what it makes of its sectors.
fn write(vm: &mut Vm, rng: &mut Rng, sectors: u64) -> (usize, Vec<u8>) {
    let count = 1 + rng.below(64);
    let sector = rng.below(sectors - count);
    let len = count as usize * 512;
    let data = if rng.one_in(4) {
        let mut segment = sector.to_le_bytes().to_vec();
        segment.extend_from_slice(&(count as u32).to_le_bytes());
        segment.extend_from_slice(&(rng.below(2) as u32).to_le_bytes());
        assert_eq!(vm.run(blk::WRITE_ZEROES, 0, &segment, 0), (blk::OK, 1));
        vec![0; len]
    } else {
        let data = rng.bytes(len);
        vm.write(sector, &data);
        data
    };
    (sector as usize * 512, data)
}

const WANTED: u64 = features::FLUSH | features::CONFIG_WCE | features::WRITE_ZEROES;

#[test]
fn a_completed_write_is_durable_with_the_cache_off() {
    for flags in [FLAGS, FLAGS | FUA] {
        let mut daemon = daemon();
        let peer = Peer::start(&daemon.path("peer.sock"), vec![0xaa; 1 << 20], flags);
        let node = json!({"driver": "nbd", "node-name": "disk", "server": peer.address});
        daemon.qmp.ok("blockdev-add", node);
        let path = export(&mut daemon, "disk", json!({}));
        let mut vm = Vm::start(&path, WANTED);
        let mut rng = Rng::new(flags.into());
        vm.front_end.set_writeback(false);
        for _ in 0..100 {
            let (at, data) = write(&mut vm, &mut rng, 2048);
            assert_same(&peer.durable()[at..at + data.len()], &data, "it is durable");
        }
        // With the cache on it is not, until it was flushed.
        vm.front_end.set_writeback(true);
        vm.write(0, &[0x55; 512]);
        assert_ne!(peer.durable()[..512], [0x55; 512]);
        assert_eq!(vm.run(blk::FLUSH, 0, &[], 0), (blk::OK, 1));
        assert_eq!(peer.durable()[..512], [0x55; 512]);
        // A driver that cannot flush has it off.
        drop(vm);
        let mut vm = Vm::start(&path, 0);
        vm.write(8, &[0x77; 512]);
        assert_eq!(peer.durable()[4096..4608], [0x77; 512]);
        // The driver after it can, and chooses for itself: firmware, then a kernel.
        assert_eq!(vm.front_end.config(32, 1), [0]);
        vm.front_end.negotiate(WANTED);
        assert_eq!(vm.front_end.config(32, 1), [1]);
        vm.write(16, &[0x99; 512]);
        assert_ne!(peer.durable()[8192..8704], [0x99; 512]);
        vm.front_end.set_writeback(false);
        vm.front_end.negotiate(WANTED | features::LOG_ALL);
        assert_eq!(vm.front_end.config(32, 1), [0], "its choice stays");
        vm.write(24, &[0x99; 512]);
        assert_eq!(peer.durable()[12288..12800], [0x99; 512]);
        drop(vm);
        daemon.stop();
    }
}

/// What has to be durable is more than the data: the way to it, too.
#[test]
fn a_completed_write_to_an_image_is_found_after_a_power_cut() {
    const SIZE: u64 = 4 << 20;
    // Space that is free, in a file that cannot grow.
    let options = "cluster_size=4k,preallocation=falloc";
    let image = TempImage::qcow2(SIZE, options);
    let discard = format!("discard 0 {SIZE}");
    run(
        "qemu-io",
        &["-f", "qcow2", "-d", "unmap", "-c", &discard, image.str()],
    );
    let mut daemon = daemon();
    let content = std::fs::read(image.path()).unwrap();
    let peer = Peer::start(&daemon.path("peer.sock"), content, FLAGS | FUA);
    let file = json!({"driver": "nbd", "server": peer.address});
    let node = json!({"driver": "qcow2", "node-name": "disk", "file": file});
    daemon.qmp.ok("blockdev-add", node);
    let path = export(&mut daemon, "disk", json!({"writethrough": true}));
    let mut vm = Vm::start(&path, WANTED);
    let mut rng = Rng::new(5);
    let mut expected = vec![0; SIZE as usize];
    for round in 0..60 {
        let (at, data) = write(&mut vm, &mut rng, SIZE / 512);
        expected[at..at + data.len()].copy_from_slice(&data);
        if round % 10 == 9 {
            std::fs::write(image.path(), peer.durable()).unwrap();
            let what = format!("after {round} writes");
            assert_same(&image.content(), &expected, &what);
        }
    }
    let mapped = qemu_img(&["map", "-f", "qcow2", "--output=json", image.str()]);
    assert!(mapped.contains("\"data\": true"), "{mapped}");
    drop(vm);
    daemon.stop();
}
