#!/usr/bin/env bash
# One would guess: a reader that reads an E01 of whole chunks and one with compressed chunks
# reads one of a disk whose size is no multiple of the chunk (32 KiB): most disks.
#
# What happens: where the last, shorter chunk is stored raw (ewfacquire without compression, or
# data that does not shrink), the crate ewf expects a whole chunk there and fails: "short read
# for chunk ...". The same disk compressed, and a disk of whole chunks, are right; libewf reads
# all of them.
#
# Why it matters to a block export daemon: the length of a raw chunk is told by nothing but the
# disk's size (the table has offsets only), so a plugin computes the last one; test images must
# not be round, and must be stored both ways.
#
# Seen with ewf 0.4.10, libewf-python 20260924, ewf-tools 20140813 (Debian 12).
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in python3 cargo apt-get dpkg; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
apt-get download -q ewf-tools libewf2 libbfio1 > apt.log 2>&1 ||
    { echo "skipped: apt-get cannot download ewf-tools"; exit 77; }
for package in *.deb; do dpkg -x "$package" root; done
ewfacquire() {
    LD_LIBRARY_PATH=$(echo root/usr/lib/*-linux-gnu) root/usr/bin/ewfacquire "$@"
}
ewfacquire -V | sed -n 1p
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir --disable-pip-version-check libewf-python==20260924
mkdir src
cat > Cargo.toml <<'TOML'
[package]
name = "read"
version = "0.1.0"
edition = "2021"
[dependencies]
ewf = "=0.4.10"
[profile.dev]
debug = 0
TOML
cat > src/main.rs <<'RS'
use std::io::Read;
fn main() {
    let mut disk = ewf::EwfReader::open(std::env::args().nth(1).unwrap()).unwrap();
    let mut data = Vec::new();
    match disk.read_to_end(&mut data) {
        Ok(read) => println!("{read} bytes"),
        Err(error) => println!("error: {error}"),
    }
    std::fs::write("rust.raw", data).unwrap();
}
RS
CARGO_TARGET_DIR=$dir/target cargo build -q 2> cargo.log || { tail cargo.log; exit 1; }
cat > libewf.py <<'PY'
import sys, pyewf
disk = pyewf.handle()
disk.open(pyewf.glob(sys.argv[1]))
open("libewf.raw", "wb").write(disk.read_buffer_at_offset(disk.get_media_size(), 0))
PY

changed=0
for size in 1048576 1049088; do
    head -c $size /dev/urandom > disk.raw
    for how in none fast; do
        # What does not shrink is stored raw by "fast" too, so let that disk shrink.
        [ $how = none ] || head -c $size < <(yes 'a disk that shrinks') > disk.raw || true
        rm -f image.*
        ewfacquire -u -q -t image -f encase6 -c $how disk.raw > acquire.log 2>&1
        venv/bin/python libewf.py image.E01
        cmp libewf.raw disk.raw
        answer=$(target/debug/read image.E01)
        case "$answer" in error*) seen=fails ;; *) cmp rust.raw disk.raw; seen=right ;; esac
        echo "$size bytes, compression $how: libewf right, crate ewf: $answer"
        [ $size-$how = 1049088-none ] && recorded=fails || recorded=right
        [ $seen = $recorded ] || { echo "changed"; changed=1; }
    done
done
[ $changed = 0 ] && echo "as recorded"
exit $changed
