#!/usr/bin/env bash
# One would guess: a VMDK whose disk is a multiple of 512 bytes is read to its end by every
# reader; sizes are counted in sectors everywhere in the format.
#
# What happens: dissect.hypervisor reads VMDKs in pieces of 8 KiB, and where the disk ends inside
# such a piece every read that touches it fails with "IndexError: list index out of range": the
# last sectors of a disk of 1 MiB + 512 bytes (also the GPT's second header, which lies there)
# cannot be had, and a copy of the whole disk fails. All five kinds that QEMU writes do this.
# libvmdk reads them to the end.
#
# Why it matters to a block export daemon: OVAs and disks converted from physical machines have
# such sizes. The capacity need not be a multiple of the grain or of anything but 512; a plugin
# and its tests need an odd size, and this library is no oracle for the tail.
#
# Seen with dissect.hypervisor 3.21, libvmdk-python 20260714, QEMU 10.0.2.
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in qemu-img python3; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir --disable-pip-version-check \
    libvmdk-python==20260714 dissect.hypervisor==3.21
qemu-img --version | sed -n 1p
cat > read.py <<'PY'
import os, subprocess
from pathlib import Path
import pyvmdk
from dissect.hypervisor.disk.vmdk import VMDK

kinds = "monolithicSparse monolithicFlat twoGbMaxExtentSparse twoGbMaxExtentFlat streamOptimized"
for size in (1 << 20, (1 << 20) + 512):
    disk = os.urandom(size)
    Path("disk.raw").write_bytes(disk)
    for kind in kinds.split():
        image = f"{kind}-{size}.vmdk"
        convert = f"qemu-img convert -f raw -O vmdk -o subformat={kind} disk.raw {image}"
        subprocess.run(convert.split(), check=True)
        other = pyvmdk.handle()
        other.open(image)
        other.open_extent_data_files()
        assert other.read_buffer_at_offset(size, 0) == disk, "libvmdk changed"
        reader = VMDK(Path(image))
        assert reader.size == size
        answers = []
        for at, length in ((0, size), (size - 512, 512), (0, size // 8192 * 8192)):
            reader.seek(at)
            try:
                answers.append("right" if reader.read(length) == disk[at:][:length] else "wrong")
            except IndexError as error:
                answers.append(f"IndexError: {error}")
        print(f"{kind} {size}: whole {answers[0]}; last sector {answers[1]}; before {answers[2]}")
        fails = [answer.startswith("IndexError") for answer in answers]
        assert fails == [size % 8192 != 0] * 2 + [False], "changed"
        assert "wrong" not in answers
print("as recorded; libvmdk reads all ten")
PY
venv/bin/python read.py
