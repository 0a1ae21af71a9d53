#!/usr/bin/env bash
# One would guess: nbdkit's ext2 filter, which serves one file out of an ext4 image, tells no map
# of that file (all data) or the file's own.
#
# What happens: base:allocation is the map of the *image* at the same offsets. Where the file
# has data and the image happens to have a hole, a client is told "hole, zero", and nbdcopy and
# qemu-img leave the data out, with success. A plain read at that offset gives the data. With
# the filter noextents on top the copy is right.
#
# Why it matters to a block export daemon: a layer that moves bytes must move the map with them
# or drop it; a filter that inherits "block status" unchanged loses data only in clients that
# ask for it. Each layer needs the test "copy by map = copy by read".
#
# Seen with nbdkit 1.32.5, libnbd 1.14.2, e2fsprogs 1.47.0, QEMU 10.0.2 (Debian 12).
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in nbdkit nbdinfo nbdcopy mke2fs qemu-img; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
nbdkit --version; qemu-img --version | sed -n 1p

mkdir files
truncate -s 3M files/disk
printf 'the data' | dd of=files/disk bs=1 seek=1500000 conv=notrunc status=none
truncate -s 16M image
mke2fs -q -F -t ext4 -d files image
serve() { nbdkit -U - -r "${filter[@]}" --filter=ext2 file image ext2file=/disk --run "$1"; }

filter=()
echo "map of /disk as nbdkit tells it, and of the image:"
serve 'nbdinfo --map "$uri"'
nbdkit -U - -r file image --run 'nbdinfo --map "$uri"'
serve 'nbdcopy "$uri" copy.raw; qemu-img convert -f raw -O raw "$uri" convert.raw;
    nbdcopy --no-extents "$uri" read.raw'
filter=(--filter=noextents)
serve 'nbdcopy "$uri" noextents.raw'
for copy in copy convert noextents read; do
    cmp -s $copy.raw files/disk && echo "$copy: right" || echo "$copy: the data is missing"
done | tee seen
[ "$(tr '\n' ';' < seen)" = \
    "copy: the data is missing;convert: the data is missing;noextents: right;read: right;" ] ||
    { echo "changed"; exit 1; }
echo "as recorded"
