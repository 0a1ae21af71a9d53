#!/usr/bin/env bash
# One would guess: a reader that goes by the "sector_size" of a LUKS2 segment decrypts a volume
# with 4096-byte sectors (which cryptsetup picks by itself for disks that have them and for plain
# files) as well as one with 512.
#
# What happens: the crate luks2 numbers the XTS tweaks by sectors of the segment: 0, 1, 2. What
# cryptsetup itself writes is numbered in units of 512 bytes whatever the sector size: 0, 8, 16.
# So the first 4096 bytes come out right, which is enough for a glance at the boot sector, and
# everything behind them is noise, with success. With 512-byte sectors the crate is right.
#
# cryptsetup is made to write the data here without device-mapper and without root: `cryptsetup
# reencrypt --encrypt` of a plain file. That is also a way to get filled LUKS2 test images.
#
# Why it matters to a block export daemon: a LUKS2 node has to count tweaks in 512 bytes unless
# the segment asks for large ones, and a test must read beyond the first 4096 bytes.
#
# Seen with luks2 0.5.0, cryptsetup 2.6.1 (Debian 12).
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in python3 cargo apt-get dpkg; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
apt-get download -q cryptsetup-bin libcryptsetup12 libpopt0 > apt.log 2>&1 ||
    { echo "skipped: apt-get cannot download cryptsetup-bin"; exit 77; }
for package in *.deb; do dpkg -x "$package" root; done
cryptsetup() {
    LD_LIBRARY_PATH=$(echo root/usr/lib/*-linux-gnu):$(echo root/lib/*-linux-gnu) \
        "$(find root -name cryptsetup -type f -perm -u+x | sed -n 1p)" "$@"
}
cryptsetup --version
mkdir src
cat > Cargo.toml <<'TOML'
[package]
name = "decrypt"
version = "0.1.0"
edition = "2021"
[dependencies]
luks2 = "=0.5.0"
[profile.dev]
debug = 0
opt-level = 1
TOML
cat > src/main.rs <<'RS'
use std::io::Read;
fn main() {
    let mut names = std::env::args().skip(1);
    let image = std::fs::File::open(names.next().unwrap()).unwrap();
    let mut disk = luks2::LuksDevice::from_device(image, b"pass", 512).unwrap();
    let (mut data, mut at) = (vec![0; 1 << 20], 0);
    while at < data.len() {
        match disk.read(&mut data[at..]).unwrap() {
            0 => break,
            read => at += read,
        }
    }
    std::fs::write(names.next().unwrap(), &data[..at]).unwrap();
}
RS
CARGO_TARGET_DIR=$dir/target cargo build -q 2> cargo.log || { tail cargo.log; exit 1; }

printf pass > key
python3 -c "
for sector in range(48 << 11):
    print(('sector %d ' % sector).ljust(511, '.'))" > plain.raw
for size in 512 4096; do
    cp plain.raw image
    cryptsetup reencrypt --encrypt --type luks2 --sector-size $size --reduce-device-size 32M \
        --pbkdf pbkdf2 --pbkdf-force-iterations 1000 -q --key-file key image
    target/debug/decrypt image seen-$size
done
cat > compare.py <<'PY'
truth = open("plain.raw", "rb").read()[: 1 << 20]
for size, recorded in ((512, 2048), (4096, 8)):
    seen = open(f"seen-{size}", "rb").read()
    assert len(seen) == len(truth), "changed: not as many bytes"
    cut = [slice(at, at + 512) for at in range(0, len(truth), 512)]
    right = [piece.start // 512 for piece in cut if seen[piece] == truth[piece]]
    print(f"sector_size {size}: {len(right)} of {len(cut)} pieces of 512 bytes are right",
          f"(0 to {right[-1]})")
    assert right == list(range(recorded)), "changed"
print("as recorded")
PY
python3 compare.py
