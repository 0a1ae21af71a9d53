#!/usr/bin/env bash
# One would guess: an NBD server answers NBD_OPT_INFO and NBD_OPT_GO for one export alike, as the
# protocol document demands when nothing lies between them.
#
# What happens: nbd-server answers INFO with size 0 (it does not open the file yet) and GO with
# the true size. `nbdinfo` asks by INFO and prints "export-size: 0" and "content: empty" for a
# healthy export; `nbdinfo --size`, nbdcopy and qemu-img ask by GO and are right.
#
# Why it matters to a block export daemon: its NBD client must take size and flags from GO alone
# (a probe by INFO may only tell that a name exists), and a health check that runs nbdinfo calls
# a good server empty.
#
# Seen with nbd-server 3.24, libnbd 1.14.2 (Debian 12).
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap '[ -s pid ] && kill $(cat pid); rm -rf "$dir"' EXIT
for tool in nbdinfo nbdcopy apt-get dpkg; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
apt-get download -q nbd-server > apt.log 2>&1 ||
    { echo "skipped: apt-get cannot download nbd-server"; exit 77; }
dpkg -x nbd-server_*.deb root
server=$(find root -name nbd-server -type f -perm -u+x -path '*bin*')
! ldd "$server" | grep 'not found' || { echo "skipped: libraries are missing"; exit 77; }
"$server" -V; nbdinfo --version | sed -n 1p

head -c 1000000 /dev/urandom > disk.raw
cat > config <<CONFIG
[generic]
 unixsock = $dir/socket
 user = $(id -un)
 group = $(id -gn)
[disk]
 exportname = $dir/disk.raw
 readonly = true
CONFIG
"$server" -C "$dir/config" -p "$dir/pid"
for _ in $(seq 50); do [ -S socket ] && break; sleep 0.1; done
uri="nbd+unix:///disk?socket=$dir/socket"

by_info=$(nbdinfo "$uri" | sed -n 's/.*export-size: \([0-9]*\).*/\1/p')
by_go=$(nbdinfo --size "$uri")
nbdcopy "$uri" copy.raw
cmp copy.raw disk.raw && echo "nbdcopy: the whole disk"
echo "nbdinfo (INFO): $by_info bytes; nbdinfo --size (GO): $by_go bytes"
[ "$by_info $by_go" = "0 1000000" ] || { echo "changed"; exit 1; }
echo "as recorded"
