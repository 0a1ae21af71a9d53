#!/usr/bin/env bash
# One would guess: `tar -S` of a disk that nbdfuse shows as a file finds no holes, or the right
# ones, and archives the data; `cp --sparse=always` and `tar` without -S do.
#
# What happens: nbdfuse gives the file a size and 0 blocks. GNU tar takes a file without blocks
# for one hole: the archive holds the disk's length and not one byte of its data, the exit status
# is 0, and unpacking gives zeroes. --hole-detection=raw, which should read the data, changes
# nothing: the blocks are looked at first.
#
# Why it matters to a block export daemon: st_blocks of a file that a FUSE export shows is no
# decoration: 0 is a statement that there is no data, and backup scripts with -S believe it. An
# export whose node cannot tell how much is allocated (a remote or compressed one) must say the
# full size, never 0.
#
# Needs /dev/fuse; mounts in a namespace of its own. Seen with libnbd 1.14.2, GNU tar 1.34,
# coreutils 9.1, nbdkit 1.32.5 (Debian 12).
set -euo pipefail
for tool in nbdfuse nbdkit tar unshare; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
[ -r /dev/fuse ] && [ -w /dev/fuse ] || { echo "skipped: no use of /dev/fuse"; exit 77; }
if [ "${1:-}" != inside ]; then
    [ "$(id -u)" = 0 ] && space=-m || space=-Urm
    unshare $space true 2> /dev/null || { echo "skipped: no mount namespace"; exit 77; }
    exec unshare $space bash "$0" inside
fi
dir=$(mktemp -d) && cd "$dir"
finish() {
    umount mnt 2> umount.log || true
    kill $(cat server.pid) 2> kill.log || true
    wait
    rm -rf "$dir"
}
trap finish EXIT
nbdfuse --version; nbdkit --version; tar --version | sed -n 1p

truncate -s 4M disk.raw
head -c 128K /dev/urandom | dd of=disk.raw bs=64K seek=3 conv=notrunc status=none
nbdkit -P server.pid -U "$dir/socket" -r file disk.raw
mkdir mnt
nbdfuse -r mnt --unix "$dir/socket" &
for _ in $(seq 100); do [ -e mnt/nbd ] && break; sleep 0.1; done
[ -e mnt/nbd ] || { echo "skipped: nbdfuse could not mount"; exit 77; }
echo "size and blocks of the file: $(stat -c '%s %b' mnt/nbd)"

cp --sparse=always mnt/nbd copy.raw
cmp copy.raw disk.raw && echo "cp --sparse=always: right"
tar -C mnt -cf plain.tar nbd
tar -xOf plain.tar nbd | cmp - disk.raw && echo "tar: right"
for how in seek raw; do
    tar -C mnt --hole-detection=$how -cSf sparse.tar nbd
    echo "tar -S --hole-detection=$how: exit status $?, archive of $(stat -c %s sparse.tar) bytes"
    tar -xOf sparse.tar nbd | cmp - <(head -c 4M /dev/zero) || { echo "changed"; exit 1; }
done
[ "$(stat -c %b mnt/nbd)" = 0 ] || { echo "changed: the file has blocks"; exit 1; }
echo "as recorded: both archives unpack to 4 MiB of zeroes"
