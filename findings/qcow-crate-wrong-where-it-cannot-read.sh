#!/usr/bin/env bash
# One would guess: a qcow2 reader refuses an image with an incompatible feature that it does not
# know (the header says so in bits made for this), and either reads through a backing file or
# refuses an image that has one.
#
# What happens: the crate qcow opens and reads all of these with success:
#   external data file: the guest's data is taken from the qcow2 file itself;
#   extended L2 entries (subclusters): wrong clusters;
#   an overlay: read through its backing file while nothing was written to it; after the first
#     write whatever is in the backing file reads as zeroes, in the 512 MiB around that write
#     (one table: a missing table is looked up below, an empty entry of a table is not).
# Plain and compressed images (zlib and zstd) are right.
#
# Why it matters to a block export daemon: "it opened" says nothing about a reader. The set of
# known feature bits is a constant that everything else is refused by, and a test of an overlay
# needs both kinds of "not here": no table, and a table without the entry.
#
# Seen with qcow 1.2.0, QEMU 10.0.2.
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in qemu-img qemu-io cargo python3 cc; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
# The crate builds zlib-ng, which asks for cmake.
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir --disable-pip-version-check cmake==4.1.0
mkdir src
cat > Cargo.toml <<'TOML'
[package]
name = "read"
version = "0.1.0"
edition = "2021"
[dependencies]
qcow = "=1.2.0"
[profile.dev]
debug = 0
TOML
cat > src/main.rs <<'RS'
use std::{fs::File, io::Read};
fn main() {
    let name = std::env::args().nth(1).unwrap();
    let answer = (|| {
        let image = qcow::open(&name).map_err(|error| error.to_string())?.unwrap_qcow2();
        let mut data = vec![0xee; image.header.size as usize];
        let mut file = File::open(&name).unwrap();
        let read = image.reader(&mut file).read_exact(&mut data);
        read.map_err(|error| error.to_string())?;
        Ok::<_, String>(data)
    })();
    match answer {
        Ok(data) => std::fs::write("seen.raw", data).unwrap(),
        Err(error) => println!("error: {error}"),
    }
}
RS
PATH=$dir/venv/bin:$PATH CARGO_TARGET_DIR=$dir/target cargo build -q 2> cargo.log ||
    { tail cargo.log; exit 1; }
qemu-img --version | sed -n 1p

qemu-img create -q -f qcow2 base.qcow2 4M
qemu-io -f qcow2 -c 'write -P 1 0 4M' base.qcow2 > io.log
create() { # NAME OPTIONS
    qemu-img create -q -f qcow2 $2 "$1.qcow2" 4M
    qemu-io -f qcow2 -c 'write -P 2 0 100k' -c 'write -P 3 1M 10k' "$1.qcow2" > io.log
}
create plain ""
create data-file "-o data_file=guest.data"
create subclusters "-o extended_l2=on,cluster_size=128k"
create overlay "-b base.qcow2 -F qcow2"
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 empty-overlay.qcow2 4M
for codec in zlib zstd; do
    qemu-img convert -c -O qcow2 -o compression_type=$codec plain.qcow2 compressed-$codec.qcow2
done
changed=0
while read -r name recorded; do
    qemu-img convert -O raw "$name.qcow2" truth.raw
    rm -f seen.raw
    answer=$(target/debug/read "$name.qcow2")
    if [ -e seen.raw ]; then
        cmp -s seen.raw truth.raw && answer=right || answer=wrong
    fi
    echo "$name: $answer"
    case "$answer" in "$recorded"*) ;; *) echo "changed: recorded was $recorded"; changed=1 ;; esac
done <<LIST
plain right
compressed-zlib right
compressed-zstd right
data-file wrong
subclusters wrong
overlay wrong
empty-overlay right
LIST
[ $changed = 0 ] && echo "as recorded"
exit $changed
