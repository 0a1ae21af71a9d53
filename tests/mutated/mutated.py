#!/usr/bin/env python3
"""Damaged qcow2 images, as many as asked for, opened by one outportd that must outlive them.

    python3 tests/mutated/mutated.py --count 1000000             the long form: some hours
    python3 tests/mutated/mutated.py --count 1 --seed 4711       one image again

A seed names one image: one of the base images, made by qemu-img, with one to four mutations in
its header, tables, refcounts, bitmaps or snapshots. It is added as a node, exported, read, mapped
and written over NBD, and closed. An error is a right answer. Wrong are: a daemon that ended, an
answer that never comes, memory above the bound, a sound node beside it that reads differently.
The seed of a failure is printed; the exit status is then 1. Needs qemu-img and libnbd's Python.
"""

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import nbd

KIB, MIB = 1 << 10, 1 << 20
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Nothing is slower on a loaded machine; only what never ends waits for it.
PATIENCE = 60

# Resident bytes of the daemon that tell a limit which does not hold: it needs 40 MiB when idle,
# and the caches of one open image may have 64 MiB.
RESIDENT_MAX = 512 * MIB

# Bytes of a disk that are looked at, however large a damaged header says that it is.
LOOKED_AT = 2 * MIB

BASES = ["cluster_size=512", "cluster_size=4k", "cluster_size=64k", "compat=0.10",
         "cluster_size=16k,extended_l2=on", "refcount_bits=1", "lazy_refcounts=on",
         "refcount_bits=64,cluster_size=4k"]


def make_bases(folder):
    """The images that are mutated: with data, a compressed cluster, a snapshot and a bitmap."""
    images = []
    for number, options in enumerate(BASES):
        path = os.path.join(folder, f"base{number}")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M")
        run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 100k", "-c", "write -q -z 300k 64k",
            "-c", "write -q -P 9 700k 20k", "-c", "write -q -c -P 5 512k 64k", path)
        if "refcount_bits=1" not in options:
            run("qemu-img", "snapshot", "-c", "s", path)
        if "compat" not in options:
            run("qemu-img", "bitmap", "--add", path, "b")
        with open(path, "rb") as file:
            images.append(bytearray(file.read()))
    return images


def run(*argv):
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def structures(image):
    """(offset, length) of what a reader of the image parses, by its header."""
    def word(at, size):
        return int.from_bytes(image[at:at + size], "big")
    cluster = 1 << word(20, 4)
    found = [(0, 112), (0, 112), (word(40, 8), word(36, 4) * 8), (word(48, 8), cluster)]
    for at in range(word(40, 8), word(40, 8) + word(36, 4) * 8, 8):
        table = word(at, 8) & 0x00ff_ffff_ffff_fe00
        if table:
            found.append((table, cluster))
    block = word(word(48, 8), 8)
    if word(60, 4):
        found.append((word(64, 8), 80))
    found += [(block, cluster), (104, 200)]
    return [(at, size) for at, size in found if at + 8 < len(image)]


def mutate(image, rng):
    image = bytearray(image)
    places = structures(image)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.choice(places)
        at = min(at + rng.randrange(size), len(image) - 8)
        kind = rng.randrange(5)
        if kind == 0:
            image[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            image[at] = rng.choice((0, 1, 0x7f, 0x80, 0xff))
        elif kind == 2:
            value = rng.choice((0, 1, 511, 512, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1,
                                len(image), len(image) - 512)) | rng.choice((0, 1 << 63))
            image[at & ~7:(at & ~7) + 8] = value.to_bytes(8, "big")
        elif kind == 3:
            source = rng.randrange(len(image) - 8) & ~7
            image[at & ~7:(at & ~7) + 8] = image[source:source + 8]
        elif len(image) > 1024:
            del image[rng.randrange(512, len(image)):]
            places = [it for it in places if sum(it) < len(image)] or [(0, 104)]
    return image


class Daemon:
    """outportd with one sound node, `good`, that nothing may change."""

    def __init__(self, program, folder, good):
        self.nbd, monitor = os.path.join(folder, "nbd.sock"), os.path.join(folder, "qmp.sock")
        self.log = open(os.path.join(folder, "log"), "w+")
        self.process = subprocess.Popen(
            [program, "--chardev", f"socket,id=m,path={monitor},server=on,wait=off",
             "--monitor", "chardev=m", "--nbd-server", f"addr.type=unix,addr.path={self.nbd}",
             "--blockdev", f"qcow2,node-name=good,file.driver=file,file.filename={good}",
             "--export", "nbd,id=good,node-name=good,name=good,writable=on"],
            stdin=subprocess.DEVNULL, stderr=self.log)
        self.monitor = socket.socket(socket.AF_UNIX)
        self.monitor.settimeout(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.monitor.connect(monitor)
                break
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.01)
        self.lines = self.monitor.makefile("rw")
        self.lines.readline()
        self.qmp("qmp_capabilities")

    def qmp(self, command, **arguments):
        """True if the command succeeded."""
        self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.lines.flush()
        while True:
            answer = json.loads(self.lines.readline())
            if "return" in answer or "error" in answer:
                return "return" in answer

    def resident(self):
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def client(self, export):
        handle = nbd.NBD()
        handle.add_meta_context("base:allocation")
        handle.set_export_name(export)
        handle.connect_unix(self.nbd)
        return handle


def attempt(what, *arguments):
    """An answer, or None for an error of the server."""
    try:
        return what(*arguments)
    except nbd.Error:
        return None


def use(daemon, rng):
    """Reads, maps and writes the damaged export; False if the daemon left."""
    client = attempt(daemon.client, "bad")
    if client is None:
        return
    size = min(client.get_size(), LOOKED_AT)
    for at in range(0, size, 128 * KIB):
        attempt(client.pread, min(128 * KIB, size - at), at)
    attempt(client.block_status, max(1, min(client.get_size(), 1 << 30)), 0, lambda *_: 0)
    for _ in range(4):
        at = rng.randrange(max(1, size // 512)) * 512
        attempt(client.pwrite, b"\x5a" * min(4096, max(0, size - at)), at)
    attempt(client.zero, min(size, 64 * KIB), 0)
    attempt(client.trim, min(size, 64 * KIB), size // 2)
    attempt(client.flush)
    attempt(client.shutdown)


def one(daemon, bases, folder, seed):
    """True if the image could be opened."""
    rng = random.Random(seed)
    path = os.path.join(folder, "bad.qcow2")
    with open(path, "wb") as file:
        file.write(mutate(rng.choice(bases), rng))
    opened = daemon.qmp("blockdev-add", **{"driver": "qcow2", "node-name": "bad",
                        "file": {"driver": "file", "filename": path}})
    if opened:
        export = {"type": "nbd", "id": "bad", "node-name": "bad", "name": "bad"}
        if not daemon.qmp("block-export-add", writable=True, **export):
            daemon.qmp("block-export-add", writable=False, **export)
        use(daemon, rng)
        # A removal that was asked for goes on after the answer; a node is free when it is done.
        daemon.qmp("block-export-del", id="bad", mode="hard")
        deadline = time.monotonic() + PATIENCE
        while not daemon.qmp("blockdev-del", **{"node-name": "bad"}):
            if time.monotonic() > deadline:
                raise AssertionError("the damaged node cannot be removed")
            time.sleep(0.001)
    os.unlink(path)
    return opened


def judge(daemon, good):
    if daemon.process.poll() is not None:
        raise AssertionError(f"the daemon ended with {daemon.process.returncode}")
    if daemon.resident() > RESIDENT_MAX:
        raise AssertionError(f"the daemon has {daemon.resident() // MIB} MiB")
    client = daemon.client("good")
    if bytes(client.pread(1 * MIB, 0)) != good:
        raise AssertionError("the sound node reads differently")
    client.shutdown()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most so long")
    parser.add_argument("--ours", type=os.path.abspath, default=os.environ.get(
        "OUTPORTD", os.path.join(ROOT, "target/release/outportd")))
    args = parser.parse_args()
    began, opened, done, seed = time.monotonic(), 0, 0, args.seed
    with tempfile.TemporaryDirectory(prefix="outport-mutated-") as folder:
        bases = make_bases(folder)
        path, raw = os.path.join(folder, "good"), os.path.join(folder, "raw")
        shutil.copy(os.path.join(folder, "base2"), path)
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
        with open(raw, "rb") as file:
            good = file.read()
        daemon = Daemon(args.ours, folder, path)
        try:
            for seed in range(args.seed, args.seed + args.count):
                if time.monotonic() - began > args.seconds:
                    break
                opened += one(daemon, bases, folder, seed)
                done += 1
                if done % 64 == 0:
                    judge(daemon, good)
            judge(daemon, good)
        except (AssertionError, OSError, ValueError, nbd.Error) as error:
            daemon.log.seek(0)
            print(f"seed {seed}: {error!r}\n{daemon.log.read()[-2000:]}")
            return 1
        finally:
            print(f"{done} images, {opened} of them could be opened, "
                  f"{time.monotonic() - began:.0f} s, {daemon.resident() // MIB} MiB at the end"
                  if daemon.process.poll() is None else f"{done} images, then the daemon ended")
            daemon.process.kill()
            daemon.process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
