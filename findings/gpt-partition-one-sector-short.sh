#!/usr/bin/env bash
# One would guess: every reader of a GPT gives a partition the length last - first + 1 sectors,
# as both numbers are inclusive.
#
# What happens: dissect.volume gives last - first: each partition of a GPT disk is one sector
# shorter than in sfdisk and in nbdkit's partition filter, which agree. Partitions of an MBR
# disk, where the table holds a length, are right. The last sector is where NTFS keeps the copy
# of its boot sector.
#
# Why it matters to a block export daemon: an export of a partition (raw with offset and size)
# that is compared with this library, or whose numbers come from it, lacks its last sector.
#
# Seen with dissect.volume 3.18, nbdkit 1.32.5, util-linux 2.38.1.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
dir=$(mktemp -d) && cd "$dir"
trap 'rm -rf "$dir"' EXIT
for tool in sfdisk nbdkit nbdinfo python3; do
    [ -n "$(command -v $tool)" ] || { echo "skipped: no $tool"; exit 77; }
done
python3 -m venv venv
venv/bin/pip install -q --no-cache-dir --disable-pip-version-check dissect.volume==3.18
sfdisk --version; nbdkit --version

cat > lengths.py <<'PY'
import sys
from dissect.volume.disk import Disk
print(*(part.size // 512 for part in Disk(open(sys.argv[1], "rb")).partitions))
PY
for label in gpt dos; do
    truncate -s 16M $label.raw
    printf 'label: %s\nsize=4M, type=L\nsize=10M, type=L\n' $label | sfdisk -q $label.raw
    table=$(sfdisk -d $label.raw | sed -n 's/.*size= *\([0-9]*\),.*/\1/p' | xargs)
    served=$(for number in 1 2; do
        nbdkit -U - -r file $label.raw --filter=partition partition=$number \
            --run 'nbdinfo --size "$uri"'
    done | awk '{print $1 / 512}' | xargs)
    read=$(venv/bin/python lengths.py $label.raw)
    echo "$label, sectors: sfdisk $table; nbdkit $served; dissect.volume $read"
    case $label in gpt) recorded="8191 20479" ;; *) recorded="8192 20480" ;; esac
    [ "$table;$served" = "8192 20480;8192 20480" ] && [ "$read" = "$recorded" ] ||
        { echo "changed"; exit 1; }
done
echo "as recorded"
