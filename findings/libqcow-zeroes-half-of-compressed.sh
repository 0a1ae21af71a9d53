#!/usr/bin/env bash
# One would guess: a compressed qcow2 image as `qemu-img convert -c` writes it (zlib, cluster
# after cluster) is read alike by every qcow2 reader; one that cannot inflate a cluster says so.
#
# What happens: libqcow gives zeroes, with success, for each compressed cluster whose offset in
# the file is odd: about half of them. Compressed clusters begin at any byte, so bit 0 of the
# table entry belongs to the offset; in entries of plain clusters the same bit means "reads as
# zeroes" since version 3, and libqcow goes by it in both. The same image as version 2
# (compat=0.10) is read right.
#
# Why it matters to a block export daemon: libqcow is no oracle for compressed images; a user
# who compares an export with it sees "holes" that are not there; a plugin that parses entries
# must look at bit 62 first, and a test image needs compressed clusters at odd offsets.
#
# Seen with libqcow-python 20260703, QEMU 10.0.2.
set -euo pipefail
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in qemu-img python3; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir --disable-pip-version-check libqcow-python==20260703
qemu-img --version | sed -n 1p

cat > compare.py <<'PY'
import random, subprocess, struct, pyqcow

CLUSTER, COUNT = 65536, 64
random.seed(7)
# Each cluster compresses well and is not zero.
pieces = (bytes([random.randrange(1, 256)]) * random.randrange(60000, 65000) for _ in range(COUNT))
disk = b"".join(pieces)
disk = disk[: CLUSTER * (COUNT - 8)]
open("disk.raw", "wb").write(disk)

for compat in ("1.1", "0.10"):
    convert = "qemu-img convert -c -f raw -O qcow2 -o compat=" + compat + " disk.raw disk.qcow2"
    subprocess.run(convert.split(), check=True)
    subprocess.run(["qemu-img", "compare", "-q", "disk.raw", "disk.qcow2"], check=True)
    image = open("disk.qcow2", "rb").read()
    table = struct.unpack_from(">Q", image, struct.unpack_from(">Q", image, 40)[0])[0]
    table &= (1 << 56) - 512
    reader = pyqcow.file()
    reader.open("disk.qcow2")
    counts = {"even": [0, 0], "odd": [0, 0]}
    for at in range(0, len(disk), CLUSTER):
        entry = struct.unpack_from(">Q", image, table + 8 * (at // CLUSTER))[0]
        assert entry >> 62 & 1, "not a compressed cluster"
        seen = reader.read_buffer_at_offset(CLUSTER, at)
        kind = "odd" if entry & 1 else "even"
        right = seen == disk[at : at + CLUSTER]
        assert right or seen == bytes(CLUSTER), "neither the data nor zeroes"
        counts[kind][0 if right else 1] += 1
    print(f"compat {compat}, libqcow {pyqcow.get_version()}:")
    for kind, (right, zero) in counts.items():
        print(f"  at {kind} offsets: {right} clusters right, {zero} read as zeroes")
    assert counts["even"][0] > 9 and counts["even"][1] == 0, "changed"
    wrong = counts["odd"][1] if compat == "1.1" else counts["odd"][0]
    assert wrong > 9 and wrong == sum(counts["odd"]), "changed"
print("as recorded; qemu-img compare finds the image identical to its source")
PY
venv/bin/python compare.py
