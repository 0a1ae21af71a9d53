#!/usr/bin/env bash
# One would guess: nbdkit's gzip filter serves the same disk that `gzip -dc` writes. A gzip file
# may have several members (two files joined with `cat`, bgzip, parallel compressors, appended
# backups); the xz filter beside it joins several streams.
#
# What happens: the gzip filter ends at the first member's end: the export is as long as the
# first member, without an error or a warning. The xz filter serves all streams.
#
# Why it matters to a block export daemon: a gzip layer has to go on after a member's trailer,
# and its tests need a file of several members; a shorter disk is not noticed by a client.
#
# Seen with nbdkit 1.32.5, libnbd 1.14.2, gzip 1.12, xz 5.4.1 (Debian 12).
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in nbdkit nbdinfo nbdcopy gzip xz; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
nbdkit --version

head -c 1M /dev/urandom > disk.raw
for codec in gzip xz; do
    { head -c 512K disk.raw | $codec; tail -c 512K disk.raw | $codec; } > disk.$codec
    $codec -dc < disk.$codec | cmp - disk.raw && echo "$codec -dc: the whole disk"
    size=$(nbdkit -U - -r file disk.$codec --filter=$codec --run 'nbdinfo --size "$uri"')
    nbdkit -U - -r file disk.$codec --filter=$codec --run 'nbdcopy "$uri" copy.raw'
    echo "nbdkit --filter=$codec: $size bytes of $(stat -c %s disk.raw)"
    cmp copy.raw <(head -c "$size" disk.raw)
    case $codec in gzip) recorded=524288 ;; *) recorded=1048576 ;; esac
    [ "$size" = $recorded ] || { echo "changed: recorded was $recorded"; exit 1; }
done
echo "as recorded"
