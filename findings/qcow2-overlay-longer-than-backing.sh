#!/usr/bin/env bash
# One would guess: an overlay that is longer than its backing file (every cloud image that was
# grown for its machine) reads as zeroes behind the backing file's end, as the qcow2 document
# says, and a sequential read gives as many bytes as the disk has.
#
# What happens, for a disk of 4 MiB over a backing file of 1 MiB, with 64 KiB written at 3 MiB:
#   dissect.hypervisor: says 4 MiB, but one read of the disk returns 1 MiB and 64 KiB: the bytes
#     of the gap are left out and what was written at 3 MiB follows at 1 MiB, without an error;
#     copying in pieces ends at 1 MiB.
#   libqcow: raises an error for what lies behind the backing file's end.
#   QEMU: zeroes.
#
# Why it matters to a block export daemon: a backing child answers short or "past the end", and
# every reader of a chain has to turn exactly this into zeroes of the right length. Neither
# library can be the oracle for grown overlays.
#
# Seen with dissect.hypervisor 3.21, libqcow-python 20260703, QEMU 10.0.2.
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in qemu-img qemu-io python3; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir --disable-pip-version-check \
    libqcow-python==20260703 dissect.hypervisor==3.21
qemu-img --version | sed -n 1p

qemu-img create -q -f qcow2 base.qcow2 1M
qemu-io -f qcow2 -c 'write -P 1 0 1M' base.qcow2 > io.log
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 disk.qcow2 4M
qemu-io -f qcow2 -c 'write -P 2 3M 64k' disk.qcow2 > io.log
qemu-img convert -O raw disk.qcow2 disk.raw
cat > compare.py <<'PY'
import io, shutil
from pathlib import Path
import pyqcow
from dissect.hypervisor.disk.qcow2 import QCow2

MIB = 1 << 20
truth = Path("disk.raw").read_bytes()
print("QEMU:", len(truth), "bytes, zeroes at 2 MiB:", truth[2 * MIB : 3 * MIB] == bytes(MIB))

disk = QCow2(Path("disk.qcow2")).open()
whole = disk.read(4 * MIB)
disk.seek(0)
copy = io.BytesIO()
shutil.copyfileobj(disk, copy, 64 << 10)
print("dissect: size", disk.size, "one read gives", len(whole), "a copy in pieces", copy.tell())
moved = whole[MIB:] == truth[3 * MIB :][: 64 << 10]
print("dissect: what stands at 3 MiB follows at 1 MiB:", moved)

lower, upper = pyqcow.file(), pyqcow.file()
lower.open("base.qcow2")
upper.open("disk.qcow2")
upper.set_parent(lower)
try:
    upper.read_buffer_at_offset(4096, 2 * MIB)
    answer = "data"
except OSError as error:
    answer = "error: " + str(error).splitlines()[0].split(". ")[0]
print("libqcow", pyqcow.get_version() + ": at 2 MiB:", answer)

assert len(truth) == 4 * MIB
assert disk.size == 4 * MIB and len(whole) == MIB + (64 << 10) and moved, "changed"
assert copy.tell() == MIB, "changed"
assert answer.startswith("error"), "changed"
print("as recorded")
PY
venv/bin/python compare.py
