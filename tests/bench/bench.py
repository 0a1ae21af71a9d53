#!/usr/bin/env python3
"""The benchmark: outportd beside qemu-storage-daemon and nbdkit, in one run.

    python3 tests/bench/bench.py                  everything, 3 rounds (about 25 minutes)
    python3 tests/bench/bench.py --quick          smoke: one round of the main rows
    python3 tests/bench/bench.py --rows 'raw-*'   some rows
    python3 tests/bench/bench.py --list           their names

Peers are interleaved (round, then row, then peer), server and client are pinned, images are warm
and checked to be, and the server's CPU time per operation stands beside every rate. Needs
nbd-load and vhost-load of this package; names what it could not measure.
"""

import argparse
import fnmatch
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True  # no __pycache__ in the source tree

from images import Images, o_direct_works  # noqa: E402
from report import print_row, print_summary  # noqa: E402
from rows import NOT_HERE, ROWS  # noqa: E402
from servers import Running, Unavailable, find_peers  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def main():
    args = parse()
    rows = choose(args)
    if args.list:
        for row in rows:
            print(f"{row.id:<30} {row.title} ({row.pin})")
        return 0
    peers, missing = find_peers(args.ours, args.aio, args.peers.split(","))
    preflight(args, peers, missing)
    with tempfile.TemporaryDirectory(prefix="outport-bench-", dir=args.dir) as folder:
        run = Run(args, folder, peers, missing)
        print(describe(args, folder, peers), flush=True)
        for number in range(args.rounds):
            for row in rows:
                print(f"round {number + 1}/{args.rounds} {row.id}", file=sys.stderr, flush=True)
                run.measure(row)
    for row in rows:
        print_row(row, peers, run.results, run.reasons)
    missing += [f"{what}: {why}" for what, why in NOT_HERE] + sorted(set(run.images.notes))
    print_summary(rows, run.results, missing)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(run.as_json(rows, missing), file, indent=1)
    return 0


def parse():
    args = parser().parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    return settle(args)


def settle(args):
    args.seconds = args.seconds or (0.5 if args.quick else 2)
    args.size = (args.size or (128 if args.quick else 512)) << 20
    return args


def parser():
    """The options that this script shares with compare.py."""
    target = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
    release = os.path.join(target, "release")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round of the main rows")
    parser.add_argument("--rows", default="*", help="names or patterns, comma separated")
    parser.add_argument("--list", action="store_true", help="only list the rows")
    parser.add_argument("--rounds", type=int, help="default 3, quick 1")
    parser.add_argument("--seconds", type=float, help="of one measurement; default 2, quick 0.5")
    parser.add_argument("--size", type=int, help="of the images, MiB; default 512, quick 128")
    parser.add_argument("--dir", help="where images lie (a file system with O_DIRECT)",
                        default=os.environ.get("TMPDIR", "/var/tmp"))
    parser.add_argument("--ours", type=os.path.abspath, help="the server under test",
                        default=os.environ.get("OUTPORTD", os.path.join(release, "outportd")))
    parser.add_argument("--aio", default="io_uring", help="aio mode of the server under test")
    parser.add_argument("--peers", default="qsd-uring,qsd-threads,nbdkit")
    parser.add_argument("--load", type=os.path.abspath, help="nbd-load",
                        default=os.path.join(release, "nbd-load"))
    parser.add_argument("--vhost-load", type=os.path.abspath, help="vhost-load",
                        default=os.path.join(release, "vhost-load"))
    parser.add_argument("--json", help="write every figure to this file")
    return parser


def choose(args):
    patterns = args.rows.split(",")
    chosen = [row for row in ROWS if any(fnmatch.fnmatch(row.id, p) for p in patterns)]
    if not chosen:
        sys.exit(f"no row is named {args.rows}; see --list")
    return [row for row in chosen if row.quick or not args.quick or args.rows != "*"]


def preflight(args, peers, missing):
    for load in (args.load, args.vhost_load):
        if not os.access(load, os.X_OK):
            sys.exit(f"{load} is missing: cargo build --release -p outport-tests")
    for tool in ("taskset", "qemu-img"):
        if not shutil.which(tool):
            sys.exit(f"{tool} is missing")
    if not shutil.which(args.ours):
        sys.exit(f"{args.ours} is missing: cargo build --release -p outport-daemon, or --ours")
    if not shutil.which("fincore"):
        missing.append("residency of the images: fincore is not installed")
    if os.cpu_count() < 2:
        missing.append("a CPU each: this machine has only one")


def describe(args, folder, peers):
    lines = [f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs; "
             f"{args.rounds} rounds of {args.seconds} s, images of {args.size >> 20} MiB; "
             "structured replies, default socket buffers"]
    for peer in peers:
        said = subprocess.run([peer.program, "--version"], capture_output=True, text=True)
        lines.append(f"  {peer.title}: {(said.stdout or said.stderr).strip().splitlines()[:1]}")
    load = os.getloadavg()[0]
    if load > 0.5:
        lines.append(f"  WARNING: load average {load:.1f}: the machine is busy, figures are noise")
    return "\n".join(lines)


class Run:
    """All measurements so far: (row, peer) -> one sample per round."""

    def __init__(self, args, folder, peers, missing):
        self.args, self.folder, self.peers = args, folder, peers
        self.images = Images(folder, args.size)
        self.no_direct = o_direct_works(folder)
        if self.no_direct:
            missing.append(f"O_DIRECT rows: {self.no_direct}")
        self.results, self.reasons = {}, {}

    def measure(self, row):
        for peer in self.peers:
            key = (row.id, peer.id)
            if key in self.reasons:
                continue
            try:
                self.results.setdefault(key, []).append(self.sample(row, peer))
            except Unavailable as why:
                self.reasons[key] = str(why)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                words = (error.stderr or b"").decode(errors="replace").strip()
                self.reasons[key] = f"{error} {words}"
                print(f"  {peer.title}: {self.reasons[key]}", file=sys.stderr)

    def sample(self, row, peer):
        if row.image.startswith("direct") and self.no_direct:
            raise Unavailable(self.no_direct)
        if row.image == "flat" and not peer.outport:
            raise Unavailable("only for ours beside its qcow2")
        path = self.images.prepare(row.image)
        with Running(peer, row, path, self.args.size, self.folder) as server:
            measure = {"nbd-load": self.by_load, "vhost-load": self.by_vhost_load,
                       "nbdcopy": self.by_nbdcopy, "fio": self.by_fio, "start": self.start,
                       "authz": self.authz, "idle": self.idle,
                       "status": self.by_status}[row.client]
            return measure(row, server)

    def by_load(self, row, server):
        said = self.client(row, [self.args.load, *server.load_address(), "--export", "x",
                                 "--pid", str(server.pid), "--seconds", str(self.args.seconds),
                                 *row.load])
        sample = json.loads(said)
        sample["rate"] = sample["mb_per_s" if row.unit == "MB/s" else "iops"]
        sample["cpu"] = sample["server_cpu_us_per_op"]
        return sample

    def by_vhost_load(self, row, server):
        said = self.client(row, [self.args.vhost_load, "--unix", server.socket,
                                 "--pid", str(server.pid), "--seconds", str(self.args.seconds),
                                 *row.load])
        sample = json.loads(said)
        sample["rate"] = sample["mb_per_s" if row.unit == "MB/s" else "iops"]
        sample["cpu"] = sample["server_cpu_us_per_op"]
        return sample

    def by_nbdcopy(self, row, server):
        need("nbdcopy")
        before, start = server.cpu_seconds(), time.monotonic()
        self.client(row, ["nbdcopy", server.uri(), "null:"])
        elapsed = time.monotonic() - start
        cpu = (server.cpu_seconds() - before) * 1e6 / (self.args.size / (256 << 10))
        return {"rate": self.args.size / 1e6 / elapsed, "cpu": cpu}

    def by_fio(self, row, server):
        need("fio")
        engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True).stdout
        if "nbd" not in engines.split():
            raise Unavailable("this fio has no nbd engine")
        before = server.cpu_seconds()
        said = self.client(row, ["fio", "--name=x", "--ioengine=nbd", f"--uri={server.uri()}",
                                 "--rw=randread", "--bs=4k", "--iodepth=32", "--time_based",
                                 f"--runtime={max(1, round(self.args.seconds))}",
                                 f"--size={self.args.size}", "--output-format=json"])
        read = json.loads(said[said.index("{"):])["jobs"][0]["read"]
        cpu = (server.cpu_seconds() - before) * 1e6 / max(1, read["total_ios"])
        return {"rate": read["iops"], "cpu": cpu}

    def by_status(self, row, server):
        """Every second granule of the node is dirty; the map of all of it is asked for."""
        need("nbdinfo")
        self.client(row, [self.args.load, *server.load_address(), "--export", "x", "--pid",
                          str(server.pid), "--op", "write", "--bs", "512", "--stride", "1k",
                          "--qd", "64", "--order", "once"])
        export = {"type": "nbd", "id": "y", "node-name": "n", "name": "y", "writable": True}
        server.qmp("block-export-add", bitmaps=["b"], **export)
        before, start, maps = server.cpu_seconds(), time.monotonic(), 5
        for _ in range(maps):
            self.client(row, ["nbdinfo", "--map=qemu:dirty-bitmap:b", "--totals",
                              server.uri("y")])
        cpu = (server.cpu_seconds() - before) * 1e6 / maps
        return {"rate": maps / (time.monotonic() - start), "cpu": cpu}

    def start(self, _row, server):
        return {"rate": server.first_byte_ms}

    def authz(self, _row, server):
        for _ in range(2000):
            server.greet()
        policy = server.qmp("query-authz")[0]
        decisions = policy["allowed"] + policy["denied"]
        return {"rate": policy["total-time-ns"] / decisions / 1000}

    def idle(self, _row, server):
        time.sleep(0.5)
        return {"rate": server.resident_mib()}

    def client(self, row, argv):
        cpus = {"one": "0", "each": "1", "both": f"0-{os.cpu_count() - 1}"}[row.pin]
        if row.pin == "each" and os.cpu_count() < 2:
            raise Unavailable("this machine has one CPU")
        done = subprocess.run(["taskset", "-c", cpus] + argv, check=True, timeout=300,
                              stdin=subprocess.DEVNULL, capture_output=True, cwd=self.folder)
        return done.stdout.decode()

    def as_json(self, rows, missing):
        return {
            "machine": {"kernel": platform.release(), "cpus": os.cpu_count()},
            "peers": {peer.id: peer.title for peer in self.peers},
            "rows": [{"id": row.id, "title": row.title, "unit": row.unit, "pin": row.pin,
                      "samples": {peer.id: self.results.get((row.id, peer.id), [])
                                  for peer in self.peers}} for row in rows],
            "not_measured": missing + [f"{row} {peer}: {why}"
                                       for (row, peer), why in self.reasons.items()],
        }


def need(tool):
    if not shutil.which(tool):
        raise Unavailable(f"{tool} is not installed")


if __name__ == "__main__":
    sys.exit(main())
