#!/usr/bin/env bash
# One would guess: base:allocation of an nbdkit filter describes the disk that the filter serves,
# or says "all data" where the filter cannot know. For partition, offset, truncate, tar, cow,
# luks, xz and gzip that holds.
#
# What happens with two others, which pass the map of the layer below on as it is:
#   ext2 (one file out of an ext4 image): the map is the image's, at the same offsets. Data of
#     the file that meets a hole of the image is told as "hole, zero".
#   cache (in its default writeback mode): what was written and still lies in the cache alone is
#     told as the hole that it is below, until a flush.
# A plain read gives the data in both cases; nbdcopy and qemu-img convert go by the map and leave
# it out, with success.
#
# Why it matters to a block export daemon: a layer that moves bytes, or holds newer ones, must
# move the map with them or drop it. Each layer needs the test "copy by map = copy by read",
# also after writes and before a flush.
#
# Seen with nbdkit 1.32.5, libnbd 1.14.2, e2fsprogs 1.47.0, QEMU 10.0.2 (Debian 12).
set -euo pipefail
PATH=/usr/bin:$PATH:/usr/sbin:/sbin
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in nbdkit nbdinfo nbdcopy nbdsh mke2fs qemu-img; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
nbdkit --version; qemu-img --version | sed -n 1p

copies='nbdcopy "$uri" nbdcopy.raw; qemu-img convert -f raw -O raw "$uri" convert.raw;
    nbdcopy --no-extents "$uri" read.raw'
changed=0
judge() { # FILTER EXPECTED-CONTENT
    for copy in nbdcopy convert read; do
        cmp -s $copy.raw "$2" && answer=right || answer="the data is missing"
        echo "$1, $copy: $answer"
        [ $copy = read ] && recorded=right || recorded="the data is missing"
        [ "$answer" = "$recorded" ] || { echo "changed"; changed=1; }
    done
    rm -f ./*.raw
}

mkdir files
truncate -s 3M files/disk
printf 'the data' | dd of=files/disk bs=1 seek=1500000 conv=notrunc status=none
truncate -s 16M image
mke2fs -q -F -t ext4 -d files image
nbdkit -U - -r --filter=ext2 file image ext2file=/disk --run "nbdinfo --map \"\$uri\"; $copies"
judge ext2 files/disk

truncate -s 3M disk
nbdkit -U - --filter=cache file disk --run \
    "nbdsh -u \"\$uri\" -c 'h.pwrite(b\"the data\", 1500000)'; nbdinfo --map \"\$uri\"; $copies"
judge cache files/disk

# The same write and a flush: now the map tells it.
truncate -s 0 disk; truncate -s 3M disk
nbdkit -U - --filter=cache file disk --run \
    "nbdsh -u \"\$uri\" -c 'h.pwrite(b\"the data\", 1500000); h.flush()'; nbdcopy \"\$uri\" copy"
cmp copy files/disk && echo "cache after a flush, nbdcopy: right"
[ $changed = 0 ] && echo "as recorded"
exit $changed
