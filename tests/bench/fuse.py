#!/usr/bin/env python3
"""The benchmark of FUSE exports: fio on the file that each server shows, in one run.

    python3 tests/bench/fuse.py                   everything, 3 rounds (about 10 minutes)
    python3 tests/bench/fuse.py --quick           smoke: one short round of the main rows
    python3 tests/bench/fuse.py --rows 'raw-*'    some rows

Needs root and /dev/fuse. Peers are interleaved, server and client have a CPU each, images are warm.
Clients use O_DIRECT, so that each request reaches the server; where there is none (the image
itself, passthrough) they go through the page cache, as O_DIRECT would measure the disk.
"""

import argparse
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace

sys.dont_write_bytecode = True  # no __pycache__ in the source tree

from report import print_row, print_summary  # noqa: E402
from rows import rate  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclass(frozen=True)
class Row:
    id: str
    title: str
    image: str
    fio: tuple
    unit: str = "iops"
    pin: str = "each"
    targets: tuple = ()
    quick: bool = False


def random_4k(image, op, depth, *targets, quick=False):
    fio = (f"--rw=rand{op}", "--bs=4k", f"--iodepth={depth}")
    return Row(f"{image}-4k-{op}-qd{depth}", f"{image}: 4k random {op}, qd{depth}", image, fio,
               targets=targets, quick=quick)


def sequential(image, op, *targets, quick=False):
    fio = (f"--rw={op}", "--bs=1M", "--iodepth=8")
    return Row(f"{image}-1M-{op}", f"{image}: 1M sequential {op}, qd8", image, fio, unit="MB/s",
               targets=targets, quick=quick)


FIXED, GROWABLE = "qsd-fixed", "qsd-growable"

ROWS = [
    random_4k("raw", "read", 1),
    random_4k("raw", "read", 32, rate(GROWABLE, 1.5), rate(FIXED, 15), quick=True),
    sequential("raw", "read", quick=True),
    random_4k("qcow2", "read", 1),
    random_4k("qcow2", "read", 32, quick=True),
    sequential("qcow2", "read"),
    random_4k("raw", "write", 1),
    random_4k("raw", "write", 32, quick=True),
    sequential("raw", "write", quick=True),
    random_4k("qcow2", "write", 32, quick=True),
    sequential("qcow2", "write"),
]


class Unavailable(Exception):
    """This peer cannot serve this row; the text says why."""


@dataclass(frozen=True)
class Peer:
    id: str
    title: str
    program: str
    options: str = ""
    buffered: bool = False


def find_peers(ours):
    qsd = os.environ.get("QSD") or shutil.which("qemu-storage-daemon")
    nbdfuse = shutil.which("nbdfuse") if shutil.which("nbdkit") else None
    peers = [
        Peer("ours", "ours", ours),
        Peer("passthrough", "ours, passthrough", ours, ",passthrough=on", buffered=True),
        Peer(FIXED, "QSD fixed", qsd),
        Peer(GROWABLE, "QSD growable", qsd, ",growable=on"),
        Peer("nbdfuse", "nbdfuse on nbdkit", nbdfuse),
        Peer("image", "the image itself", "fio", buffered=True),
    ]
    missing = [f"{peer.title}: not installed" for peer in peers if not peer.program]
    return [peer for peer in peers if peer.program], missing


class Served:
    """A server that shows an image as a file; it ends with the `with` block."""

    def __init__(self, peer, row, image, folder):
        self.peer, self.file = peer, os.path.join(folder, "mounted")
        writes = "write" in row.id
        if peer.id == "image":
            if row.image != "raw":
                raise Unavailable("it is no raw image")
            self.file, argv = image, None
        elif peer.id == "nbdfuse":
            if row.image != "raw":
                raise Unavailable("nbdkit has no qcow2 in this version")
            argv = ["nbdfuse", self.file, "--command", "nbdkit", "-s", "file", image]
        else:
            if peer.id == "passthrough" and (writes or row.image != "raw"):
                raise Unavailable("passthrough is for reading raw images")
            node = f"driver=file,filename={image},aio=io_uring"
            if row.image == "qcow2":
                dotted = ",".join(f"file.{option}" for option in node.split(","))
                node = f"driver=qcow2,{dotted}"
            export = f"fuse,id=e,node-name=n,mountpoint={self.file},writable=" \
                f"{'on' if writes else 'off'}{peer.options}"
            argv = [peer.program, "--blockdev", f"{node},node-name=n", "--export", export]
        self.process = None
        if argv:
            open(self.file, "w").close()
            before = os.stat(self.file).st_dev
            self.process = subprocess.Popen(["taskset", "-c", "0"] + argv,
                                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.PIPE)
            self._wait(before)

    def _wait(self, before):
        for _ in range(4000):
            if self.process.poll() is not None:
                said = self.process.stderr.read().decode(errors="replace").strip()
                raise Unavailable(f"it did not start: {said.splitlines()[-1:]}")
            if os.stat(self.file).st_dev != before:
                return
            time.sleep(0.005)
        raise Unavailable("it did not mount within 20 s")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            subprocess.run(["umount", "-l", self.file], stderr=subprocess.DEVNULL)
            self.process.stderr.close()

    def cpu_seconds(self):
        """CPU time of all threads (the kernel's CPU clock of a process)."""
        if not self.process or self.peer.id == "nbdfuse":
            return None
        return time.clock_gettime_ns((~self.process.pid << 3) | 2) / 1e9

    def measure(self, row, seconds):
        argv = ["taskset", "-c", "1", "fio", "--name=x", f"--filename={self.file}",
                "--ioengine=io_uring", f"--direct={0 if self.peer.buffered else 1}",
                f"--runtime={seconds}", "--time_based", "--output-format=json",
                "--norandommap", "--invalidate=0", *row.fio]
        if "write" in row.id:
            argv.append("--overwrite=1")
        cpu = self.cpu_seconds()
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"fio: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
        text = done.stdout[done.stdout.index("{"):]
        job = json.loads(text)["jobs"][0]["write" if "write" in row.id else "read"]
        value = job["iops"] if row.unit == "iops" else job["bw_bytes"] / 1e6
        used = self.cpu_seconds()
        per_op = (used - cpu) * 1e6 / max(job["total_ios"], 1) if used is not None else None
        return {"rate": value, "cpu": per_op}


def qsd_major(peers):
    for peer in peers:
        if peer.id == FIXED:
            said = subprocess.run([peer.program, "--version"], capture_output=True, text=True)
            return int(said.stdout.split("version ")[1].split(".")[0])
    return 0


def make_images(folder, size):
    raw, qcow2 = os.path.join(folder, "raw"), os.path.join(folder, "qcow2")
    with open(raw, "wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    return {"raw": raw, "qcow2": qcow2}


def warm(path):
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


def main():
    release = os.path.join(os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target")),
                           "release")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round of the main rows")
    parser.add_argument("--rows", default="*", help="names or patterns, comma separated")
    parser.add_argument("--rounds", type=int, help="default 3, quick 1")
    parser.add_argument("--seconds", type=float, help="of one measurement; default 3, quick 1")
    parser.add_argument("--size", type=int, help="of the images, MiB; default 512, quick 128")
    parser.add_argument("--dir", default=os.environ.get("TMPDIR", "/var/tmp"))
    parser.add_argument("--ours", type=os.path.abspath, help="the server under test",
                        default=os.environ.get("OUTPORTD", os.path.join(release, "outportd")))
    args = parser.parse_args()
    rounds = args.rounds or (1 if args.quick else 3)
    seconds = args.seconds or (1 if args.quick else 3)
    size = (args.size or (128 if args.quick else 512)) << 20
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row.id, p) for p in args.rows.split(","))]
    rows = [row for row in rows if row.quick or not args.quick or args.rows != "*"]
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        print("FUSE rows: not measured, they need root and /dev/fuse")
        return 0
    for tool in ("fio", "taskset", "qemu-img"):
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing")
    peers, missing = find_peers(args.ours)
    if qsd_major(peers) < 11:
        # Its fixed exports became slow later.
        rows = [replace(row, targets=tuple(it for it in row.targets if it.peer != FIXED))
                for row in rows]
        missing.append("15 times QSD's fixed exports: those of this version are as the others")
    results, reasons = {}, {}
    with tempfile.TemporaryDirectory(prefix="outport-fuse-", dir=args.dir) as folder:
        images = make_images(folder, size)
        print(f"FUSE: {rounds} rounds of {seconds} s, images of {size >> 20} MiB", flush=True)
        for number in range(rounds):
            for row in rows:
                print(f"round {number + 1}/{rounds} {row.id}", file=sys.stderr, flush=True)
                for peer in peers:
                    warm(images[row.image])
                    try:
                        with Served(peer, row, images[row.image], folder) as served:
                            sample = served.measure(row, seconds)
                            results.setdefault((row.id, peer.id), []).append(sample)
                    except Unavailable as why:
                        reasons[row.id, peer.id] = str(why)
    for row in rows:
        print_row(row, peers, results, reasons)
    print_summary(rows, results, missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
