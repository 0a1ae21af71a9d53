#!/usr/bin/env bash
# One would guess: nbdkit's tar filter, which needs GNU tar and asks it for the member's place,
# either serves a member that GNU tar stored with -S (sparse) as the file that it is, or refuses.
#
# What happens: it takes the member's true size from the listing and serves that many bytes from
# the place where the condensed data begins: first the sparse map, then the pieces without the
# holes, then whatever follows in the archive, here the next member, with success. The size is
# right, so no client notices.
#
# Why it matters to a block export daemon: disks in tar files (OVA, container images of virtual
# machines) are sparse files; a tar layer has to know the four ways in which a sparse member is
# written (old GNU 'S', PAX 0.0, 0.1, 1.0), map them or refuse them.
#
# Seen with nbdkit 1.32.5, libnbd 1.14.2, GNU tar 1.34 (Debian 12).
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in nbdkit nbdinfo nbdcopy tar; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
nbdkit --version; tar --version | sed -n 1p

letters() { head -c "$2" /dev/zero | tr '\0' "$1"; }
truncate -s 4M disk.raw
letters A 4096 | dd of=disk.raw bs=4096 seek=100 conv=notrunc status=none
letters Z 6M > other
for format in gnu pax; do
    tar --format=$format -cSf disk.tar disk.raw other
    tar -xOf disk.tar disk.raw | cmp - disk.raw && echo "$format: tar unpacks the disk"
    nbdkit -U - -r file disk.tar --filter=tar tar-entry=disk.raw \
        --run 'nbdinfo --size "$uri" > size; nbdcopy "$uri" copy.raw'
    foreign=$(tr -dc Z < copy.raw | wc -c)
    echo "$format: nbdkit serves $(cat size) bytes, $foreign of them from the next member"
    [ "$(cat size)" = 4194304 ] && [ "$foreign" -gt 4000000 ] || { echo "changed"; exit 1; }
done
echo "as recorded"
