#!/bin/bash
# make demo: a qcow2 image with known data, served by outportd through its sandboxed plugin, read
# back by an independent client, compared. Exits 0 only if every comparison held.
set -euo pipefail
cd "$(dirname "$0")/.."

bin=${BIN:-$PWD/target/release}
mib=256
seconds=1
progress=()
[ ! -t 2 ] || progress=(--progress)

say() { printf '\n--- %s\n' "$*"; }
fail() { printf 'demo: %s\n' "$*" >&2; exit 1; }

folder=
children=()
cleanup() {
    local pid
    for pid in "${children[@]}"; do
        kill "$pid" 2> /dev/null || true
    done
    for pid in "${children[@]}"; do
        wait "$pid" 2> /dev/null || true
    done
    [ -z "$folder" ] || rm -rf "$folder"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "tools"
.ci/tools demo

say "build (wasmtime takes most of the first one)"
"${CARGO:-cargo}" build --release --locked --workspace --bins

folder=$(mktemp -d)
raw=$folder/disk.raw image=$folder/disk.qcow2
qmp=$folder/qmp.sock socket=$folder/nbd.sock
uri="nbd+unix:///demo?socket=$socket"

# serve PROGRAM QMP NBD: starts it in the background and waits until it listens.
serve() {
    "$1" --chardev "socket,id=qmp,path=$2,server=on,wait=off" --monitor chardev=qmp \
        --blockdev "driver=file,node-name=file0,filename=$image,read-only=on" \
        --blockdev "driver=qcow2,node-name=disk0,file=file0,read-only=on" \
        --nbd-server "addr.type=unix,addr.path=$3" \
        --export "type=nbd,id=demo,node-name=disk0,name=demo,writable=off" &
    children+=($!)
    for _ in $(seq 200); do
        [ -S "$3" ] && return
        kill -0 $! 2> /dev/null || fail "$1 ended at once"
        sleep 0.05
    done
    fail "$1 does not listen"
}

checksum() { sha256sum "$1" | cut -d ' ' -f 1; }

say "image: $mib MiB, data in every other 16 MiB and in some small places, holes between"
truncate -s ${mib}M "$raw"
for at in $(seq 0 32 $((mib - 1))); do
    dd if=/dev/urandom of="$raw" bs=1M count=16 seek="$at" conv=notrunc status=none
done
for at in 17 49 113 200; do
    dd if=/dev/urandom of="$raw" bs=4k count=3 seek=$((at * 256 + 7)) conv=notrunc status=none
done
qemu-img convert -f raw -O qcow2 "$raw" "$image"
qemu-img info "$image" | grep -E '^(file format|virtual size|disk size)'

say "outportd serves it, the format in a sandbox"
serve "$bin/outportd" "$qmp" "$socket"
echo "$uri"
nbdinfo "$uri" | grep -E '^(protocol|export=|.*export-size|.*contexts|.*base:allocation)' || true

say "nbdcopy reads it back"
nbdcopy ${progress[@]+"${progress[@]}"} "$uri" "$folder/back.raw"
want=$(checksum "$raw") got=$(checksum "$folder/back.raw")
printf 'what was written  %s\nwhat was read     %s\n' "$want" "$got"
[ "$want" = "$got" ] || fail "the data differ"

say "what a client can know about holes: nbdinfo --map"
nbdinfo --map --totals "$uri"
nbdinfo --map "$uri" > "$folder/map"
head -n 6 "$folder/map"
qemu-img compare -f raw -F raw "$raw" "$uri" || fail "qemu-img finds a difference"

say "the plugin that knew where the bytes were"
"$bin/outport" plugins "$qmp"

if command -v qemu-storage-daemon > /dev/null; then
    say "4 KiB random reads, 32 in flight, the same image, taking turns with $(
        qemu-storage-daemon --version | head -n 1)"
    serve qemu-storage-daemon "$folder/qsd.qmp" "$folder/qsd.sock"
    rate() {
        "$bin/nbd-load" --unix "$1" --export demo --bs 4k --qd 32 --seconds $seconds \
            | tr ',{}' '\n' | awk -F': *' '/"iops"/ { print int($2) }'
    }
    ours=0 theirs=0
    for round in 1 2 3; do
        a=$(rate "$socket") b=$(rate "$folder/qsd.sock")
        printf 'round %s: outportd %s, qemu-storage-daemon %s reads per second\n' \
            "$round" "$a" "$b"
        ours=$((ours + a)) theirs=$((theirs + b))
    done
    awk -v a=$ours -v b=$theirs 'BEGIN {
        printf "outportd reads at %.1f times the rate of qemu-storage-daemon\n", a / b }'
else
    say "qemu-storage-daemon is not installed: nothing to compare the speed with"
fi

say "everything compared equal"
