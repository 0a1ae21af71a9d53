#!/usr/bin/env bash
# One would guess: a sparse VMDK with zeroed grains (header version 2, flag 4, grain table entry
# 1; `qemu-img create -o zeroed_grain=on`, VMware's thin disks after an unmap) either reads as
# zeroes there or is refused.
#
# What happens: libvmdk takes entry 1 for the sector number 1. Where the guest zeroed its disk,
# the reader gets the file's own bytes from sector 1 on, with success: the text of the VMDK
# descriptor. dissect.hypervisor and QEMU give zeroes.
#
# Why it matters to a block export daemon: an entry is a kind first and an address second; a
# VMDK plugin must look at the flag before it names an extent, and libvmdk cannot be the oracle
# for this case.
#
# Seen with libvmdk-python 20260714, dissect.hypervisor 3.21, QEMU 10.0.2.
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in qemu-img qemu-io python3; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir --disable-pip-version-check \
    libvmdk-python==20260714 dissect.hypervisor==3.21
qemu-img --version | sed -n 1p

qemu-img create -q -f vmdk -o zeroed_grain=on disk.vmdk 4M
qemu-io -f vmdk -c 'write -P 5 0 1M' -c 'write -z 128k 64k' disk.vmdk > io.log
cat > compare.py <<'PY'
import subprocess
from pathlib import Path
import pyvmdk
from dissect.hypervisor.disk.vmdk import VMDK

subprocess.run(["qemu-img", "convert", "-O", "raw", "disk.vmdk", "disk.raw"], check=True)
at, length = 128 << 10, 64 << 10
truth = Path("disk.raw").read_bytes()
print("QEMU:    zeroes:", truth[at : at + length] == bytes(length))

other = VMDK(Path("disk.vmdk"))
other.seek(at)
print("dissect: zeroes:", other.read(length) == bytes(length))

disk = pyvmdk.handle()
disk.open("disk.vmdk")
disk.open_extent_data_files()
seen = disk.read_buffer_at_offset(length, at)
print(f"libvmdk {pyvmdk.get_version()}: zeroes:", seen == bytes(length), "begins with", seen[:33])
rest = disk.read_buffer_at_offset(at, 0)
rest += disk.read_buffer_at_offset((4 << 20) - at - length, at + length)
print("libvmdk: the rest of the disk is right:", rest == truth[:at] + truth[at + length :])

assert truth[at : at + length] == bytes(length)
assert seen == Path("disk.vmdk").read_bytes()[512 : 512 + length], "changed"
assert rest == truth[:at] + truth[at + length :], "changed"
print("as recorded: the zeroed grain is the VMDK file from its sector 1 on")
PY
venv/bin/python compare.py
