//! Other people's NBD clients work: against raw and qcow2 exports, over every kind of listener.
//!
//! Both exports hold the same content, so that every test asks each client the same questions
//! twice and knows the answers.

mod listeners;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use outport_tests::{
    Builder, Daemon, Server, TempImage, assert_same, check_image, pattern, python, qemu_img,
    requires, requires_python_nbd, run,
};
use serde_json::Value;

const MIB: usize = 1 << 20;
const SIZE: usize = 8 * MIB;
const EXPORTS: [&str; 2] = ["raw", "qcow2"];

/// A daemon that serves one content as `raw` and as `qcow2`.
struct Served {
    daemon: Daemon,
    raw: TempImage,
    qcow2: TempImage,
    content: Vec<u8>,
}

impl Served {
    fn on_unix() -> Self {
        Self::on(Daemon::builder(Server::under_test()).nbd())
    }

    fn on(builder: Builder) -> Self {
        let mut content = pattern(SIZE, 1);
        content[2 * MIB..4 * MIB].fill(0);
        let raw = TempImage::raw(&content);
        let qcow2 = raw.converted("qcow2", &[]);
        let mut daemon = builder.start();
        daemon.serve("raw", &raw);
        daemon.serve("qcow2", &qcow2);
        Self {
            daemon,
            raw,
            qcow2,
            content,
        }
    }

    /// Stops the daemon; both images must then hold `wanted`, and the qcow2 one be clean.
    fn ends_with(self, wanted: &[u8]) {
        self.daemon.stop();
        check_image(self.qcow2.path(), "qcow2 export");
        assert_same(&self.raw.content(), wanted, "raw image after the client");
        assert_same(
            &self.qcow2.content(),
            wanted,
            "qcow2 image after the client",
        );
    }

    fn ends_unchanged(self) {
        let content = self.content.clone();
        self.ends_with(&content);
    }

    fn socket(&self) -> &str {
        self.daemon
            .nbd()
            .path()
            .to_str()
            .expect("temp paths are UTF-8")
    }
}

// === QEMU's clients ===

#[test]
fn qemu_img_reads_compares_and_writes() {
    if !requires("qemu-img") {
        return;
    }
    let served = Served::on_unix();
    let old = TempImage::raw(&served.content);
    let new = pattern(SIZE, 2);
    let source = TempImage::raw(&new);
    for export in EXPORTS {
        let uri = served.daemon.uri(export);
        let info: Value = serde_json::from_str(&qemu_img(&["info", "--output=json", &uri]))
            .expect("qemu-img prints JSON");
        assert_eq!(info["virtual-size"], SIZE, "{export}");
        qemu_img(&["compare", "-f", "raw", "-F", "raw", old.str(), &uri]);
        qemu_img(&[
            "convert",
            "-n",
            "-f",
            "raw",
            "-O",
            "raw",
            source.str(),
            &uri,
        ]);
        qemu_img(&["compare", "-f", "raw", "-F", "raw", source.str(), &uri]);
    }
    served.ends_with(&new);
}

#[test]
fn qemu_img_maps_the_hole() {
    if !requires("qemu-img") {
        return;
    }
    let served = Served::on_unix();
    for export in EXPORTS {
        let map = qemu_img(&[
            "map",
            "-f",
            "raw",
            "--output=json",
            &served.daemon.uri(export),
        ]);
        let map: Vec<Value> = serde_json::from_str(&map).expect("qemu-img prints JSON");
        let zero: u64 = map
            .iter()
            .filter(|extent| extent["zero"] == true)
            .map(|extent| extent["length"].as_u64().unwrap_or(0))
            .sum();
        // The raw file was written in full: there the hole is data.
        let wanted = if export == "qcow2" { 2 * MIB as u64 } else { 0 };
        assert_eq!(zero, wanted, "{export}: {map:?}");
    }
    served.ends_unchanged();
}

#[test]
fn qemu_io_writes_zeroes_discards_and_verifies() {
    if !requires("qemu-io") {
        return;
    }
    let served = Served::on_unix();
    for export in EXPORTS {
        let uri = served.daemon.uri(export);
        let mut args = vec!["-f", "raw"];
        for command in [
            "write -P 0xa5 64k 200k",
            "write -f -P 0x5a 1M 4k",
            "write -z 5M 300k",
            "write -z -u 6M 128k",
            "flush",
            "read -P 0xa5 64k 200k",
            "read -P 0x5a 1M 4k",
            "read -P 0 5M 300k",
            "read -P 0 6M 128k",
        ] {
            args.extend(["-c", command]);
        }
        args.push(&uri);
        let said = run("qemu-io", &args);
        assert!(!said.contains("failed"), "{export}: {said}");
    }
    let mut wanted = served.content.clone();
    wanted[64 << 10..264 << 10].fill(0xa5);
    wanted[MIB..MIB + 4096].fill(0x5a);
    wanted[5 * MIB..5 * MIB + (300 << 10)].fill(0);
    wanted[6 * MIB..6 * MIB + (128 << 10)].fill(0);
    served.ends_with(&wanted);
}

#[test]
fn qemu_nbd_lists_the_exports() {
    if !requires("qemu-nbd") {
        return;
    }
    let served = Served::on_unix();
    let list = run("qemu-nbd", &["--list", "-k", served.socket()]);
    for export in EXPORTS {
        assert!(list.contains(&format!("export: '{export}'")), "{list}");
    }
    assert!(list.contains("base:allocation"), "{list}");
    served.ends_unchanged();
}

#[test]
fn qemu_nbd_attaches_a_kernel_device() {
    if !requires("qemu-nbd") {
        return;
    }
    let device = "/dev/nbd15";
    if !Path::new(device).exists() {
        eprintln!("no kernel NBD device {device}; --list stands in for qemu-nbd");
        return;
    }
    let served = Served::on_unix();
    for export in EXPORTS {
        run(
            "qemu-nbd",
            &["-f", "raw", "--connect", device, &served.daemon.uri(export)],
        );
        let read = fs::read(device);
        run("qemu-nbd", &["--disconnect", device]);
        assert_same(&read.expect("the device reads"), &served.content, export);
    }
    served.ends_unchanged();
}

// === libnbd's clients ===

#[test]
fn nbdinfo_lists_describes_and_maps() {
    if !requires("nbdinfo") {
        return;
    }
    let served = Served::on_unix();
    let list = run("nbdinfo", &["--list", "--json", &served.daemon.uri("")]);
    let list: Value = serde_json::from_str(&list).expect("nbdinfo prints JSON");
    let names = list["exports"].as_array().map_or(0, Vec::len);
    assert_eq!(names, EXPORTS.len(), "{list}");
    for export in EXPORTS {
        let uri = served.daemon.uri(export);
        let info: Value =
            serde_json::from_str(&run("nbdinfo", &["--json", &uri])).expect("nbdinfo prints JSON");
        let about = &info["exports"][0];
        assert_eq!(info["structured"], true, "{info}");
        assert_eq!(about["export-size"], SIZE, "{info}");
        for can in [
            "can_flush",
            "can_fua",
            "can_trim",
            "can_zero",
            "can_multi_conn",
            "can_df",
        ] {
            assert_eq!(about[can], true, "{export} {can}: {info}");
        }
        assert_eq!(about["is_read_only"], false, "{info}");
        let map = run("nbdinfo", &["--map", "--totals", &uri]);
        assert!(map.contains("data"), "{map}");
        assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), SIZE.to_string());
    }
    served.ends_unchanged();
}

#[test]
fn nbdcopy_copies_out_and_in() {
    if !requires("nbdcopy") {
        return;
    }
    let served = Served::on_unix();
    let new = pattern(SIZE, 3);
    let source = TempImage::raw(&new);
    for export in EXPORTS {
        let uri = served.daemon.uri(export);
        let copy = served.daemon.path("copy.raw");
        let copy_str = copy.to_str().expect("temp paths are UTF-8");
        run("nbdcopy", &[&uri, copy_str]);
        let read = fs::read(&copy).expect("nbdcopy wrote it");
        assert_same(&read, &served.content, export);
        run("nbdcopy", &["--flush", source.str(), &uri]);
    }
    served.ends_with(&new);
}

#[test]
fn nbdcopy_copies_between_our_exports_with_four_connections() {
    if !requires("nbdcopy") {
        return;
    }
    let served = Served::on_unix();
    let new = pattern(SIZE, 4);
    let source = TempImage::raw(&new);
    run(
        "nbdcopy",
        &["--connections=4", source.str(), &served.daemon.uri("raw")],
    );
    let (from, to) = (served.daemon.uri("raw"), served.daemon.uri("qcow2"));
    run(
        "nbdcopy",
        &["--connections=4", "--requests=64", "--flush", &from, &to],
    );
    served.ends_with(&new);
}

#[test]
fn libnbd_in_python_does_every_command() {
    if !requires_python_nbd() {
        return;
    }
    let served = Served::on_unix();
    for export in EXPORTS {
        let script = format!(
            r#"
import nbd
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri("{uri}")
assert h.get_size() == {SIZE}
assert h.get_structured_replies_negotiated()
h.pwrite(b"\x11" * 65536, 65536)
h.pwrite(b"\x22" * 512, 512, nbd.CMD_FLAG_FUA)
h.zero(65536, 1 << 20)
h.zero(65536, 3 << 19, nbd.CMD_FLAG_NO_HOLE)
h.flush()
assert h.pread(65536, 65536) == b"\x11" * 65536
chunks = []
def got(data, offset, status, error):
    chunks.append((bytes(data), offset, status))
h.pread_structured(512, 512, got, nbd.CMD_FLAG_DF)
assert chunks == [(b"\x22" * 512, 512, nbd.READ_DATA)], chunks
assert h.pread(65536, 1 << 20) == bytes(65536)
h.cache(65536, 0)
h.trim(4096, 7 << 20)
extents = []
def add(context, offset, entries, error):
    assert context == "base:allocation" and error.value == 0
    extents.extend(entries[0::2])
h.block_status({SIZE}, 0, add)
assert sum(extents) <= {SIZE} and extents
h.pwrite(b"\x33" * 4096, 7 << 20)
try:
    h.pread(512, {SIZE})
    raise SystemExit("a read past the end succeeded")
except nbd.Error:
    pass
h.shutdown()
"#,
            uri = served.daemon.uri(export)
        );
        run(python(), &["-c", &script]);
    }
    let mut wanted = served.content.clone();
    wanted[65536..131_072].fill(0x11);
    wanted[512..1024].fill(0x22);
    wanted[MIB..MIB + 65536].fill(0);
    wanted[3 * MIB / 2..3 * MIB / 2 + 65536].fill(0);
    wanted[7 * MIB..7 * MIB + 4096].fill(0x33);
    served.ends_with(&wanted);
}

#[test]
fn nbdsh_connects_and_reads() {
    if !requires("nbdsh") || !requires_python_nbd() {
        return;
    }
    let served = Served::on_unix();
    for export in EXPORTS {
        let uri = served.daemon.uri(export);
        // nbdsh runs whichever python3 comes first: it must be the one with the module.
        let shell = ["PATH=/usr/bin:/bin", "nbdsh", "-u", &uri, "-c"];
        let said = run(
            "env",
            &[&shell[..], &["print(h.pread(15, 512).decode())"]].concat(),
        );
        assert!(said.starts_with("sector 1 seed 1"), "{export}: {said}");
    }
    served.ends_unchanged();
}

// === Others ===

#[test]
fn fio_writes_and_verifies() {
    if !requires("fio") {
        return;
    }
    if !run("fio", &["--enghelp"]).contains("nbd") {
        eprintln!("SKIPPED: this fio has no nbd engine");
        return;
    }
    let served = Served::on_unix();
    for export in EXPORTS {
        let uri = format!("--uri={}", served.daemon.uri(export));
        let size = format!("--size={SIZE}");
        let fixed = "--name=verify --ioengine=nbd --rw=randwrite --bs=4k --iodepth=16 --randseed=7 \
                     --verify=crc32c --verify_fatal=1 --verify_state_save=0";
        let args: Vec<&str> = fixed.split_whitespace().chain([&*uri, &*size]).collect();
        run("fio", &args);
    }
    let Served { daemon, qcow2, .. } = served;
    daemon.stop();
    check_image(qcow2.path(), "qcow2 export after fio");
}

#[test]
fn the_nbd_crate_reads_seeks_and_writes() {
    let served = Served::on_unix();
    for export in EXPORTS {
        let mut stream = UnixStream::connect(served.daemon.nbd().path()).expect("it listens");
        let told = nbd::client::handshake(&mut stream, export.as_bytes()).expect("it serves");
        assert_eq!(told.size, SIZE as u64);
        let mut client = nbd::client::NbdClient::new(&mut stream, &told);
        let mut read = vec![0; MIB];
        client
            .seek(SeekFrom::Start(MIB as u64 / 2))
            .expect("a seek is local");
        client.read_exact(&mut read).expect("it reads");
        assert_same(&read, &served.content[MIB / 2..MIB * 3 / 2], export);
        client
            .seek(SeekFrom::Start(7 * MIB as u64))
            .expect("a seek is local");
        client.write_all(&[0x77; 8192]).expect("it writes");
    }
    let mut wanted = served.content.clone();
    wanted[7 * MIB..7 * MIB + 8192].fill(0x77);
    served.ends_with(&wanted);
}
