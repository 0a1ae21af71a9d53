#!/usr/bin/env python3
"""Commands beside qemu-storage-daemon: what one costs when there are many nodes and exports.

    python3 tests/bench/control.py                     10, 1000 and 10,000 of each
    python3 tests/bench/control.py --sizes 10,2000     other populations
    python3 tests/bench/control.py --ours A --base B   two builds and the peer in one run

Each server gets a population of null nodes with an NBD export each, added over QMP. Then one
more node and one more export are added and removed SAMPLES times, and the queries are asked; the
median time of each command is printed, per population. `open`, `query` and `close` are the same
for IMAGES qcow2 images. Peers are interleaved by population; nothing else is asked of them
meanwhile. Memory is what the population added to the resident set of the process.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True  # no __pycache__ in the source tree

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
COMMANDS = ("blockdev-add", "block-export-add", "query-block-exports", "block-export-del",
            "query-jobs", "blockdev-del")


class Server:
    """A storage daemon with a monitor and an NBD server, and nothing else yet."""

    def __init__(self, name, program, folder):
        self.name = name
        path = os.path.join(folder, f"{name}-qmp")
        nbd = os.path.join(folder, f"{name}-nbd")
        argv = [program, "--chardev", f"socket,id=m,path={path},server=on,wait=off",
                "--monitor", "m", "--nbd-server", f"addr.type=unix,addr.path={nbd}"]
        self.log = open(os.path.join(folder, f"{name}-log"), "w")
        self.process = subprocess.Popen(argv, stdout=self.log, stderr=self.log)
        self.socket = connect(path, self.process)
        self.lines = self.socket.makefile("r", encoding="utf-8")
        self.lines.readline()
        self.command("qmp_capabilities")

    def command(self, name, **arguments):
        """The answer, and how long it took in milliseconds."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        message = {"execute": name}
        if arguments:
            message["arguments"] = arguments
        began = time.perf_counter()
        self.socket.sendall(json.dumps(message).encode() + b"\n")
        while True:
            answer = json.loads(self.lines.readline())
            if "event" in answer:
                continue
            took = (time.perf_counter() - began) * 1000
            if "error" in answer:
                raise RuntimeError(f"{self.name}: {name}: {answer['error']}")
            return answer["return"], took

    def resident_kib(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    def null(self, name):
        return self.command("blockdev-add", driver="null-co", node_name=name, size=1 << 20,
                            read_zeroes=True)[1]

    def export(self, name):
        return self.command("block-export-add", type="nbd", id=name, node_name=name)[1]

    def stop(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


def connect(path, process):
    for _ in range(500):
        try:
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            return client
        except OSError:
            client.close()
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            time.sleep(0.02)
    raise RuntimeError("the server did not open its monitor")


def one_of_many(server, size, samples):
    """Median milliseconds of each command beside `size` nodes and exports, and KiB for each."""
    before = server.resident_kib()
    for number in range(size):
        server.null(f"n{number}")
        server.export(f"n{number}")
    memory = (server.resident_kib() - before) / size
    times = {name: [] for name in COMMANDS}
    for number in range(samples):
        name = f"x{number}"
        times["blockdev-add"].append(server.null(name))
        times["block-export-add"].append(server.export(name))
        times["query-jobs"].append(server.command("query-jobs")[1])
        times["block-export-del"].append(server.command("block-export-del", id=name)[1])
        times["blockdev-del"].append(server.command("blockdev-del", node_name=name)[1])
    # Last, as a long answer leaves cold caches behind.
    for _ in range(max(samples // 20, 3)):
        times["query-block-exports"].append(server.command("query-block-exports")[1])
    return {name: statistics.median(some) for name, some in times.items()} | {"KiB": memory}


def images(server, folder, count):
    """Milliseconds per qcow2 image to open, to be listed and to close, and KiB for each."""
    before = server.resident_kib()
    took = {"open": 0.0, "query": 0.0, "close": 0.0}
    for number in range(count):
        file = {"driver": "file", "filename": os.path.join(folder, f"{number}.qcow2")}
        took["open"] += server.command("blockdev-add", driver="qcow2", node_name=f"q{number}",
                                       file=file)[1]
    memory = (server.resident_kib() - before) / count
    took["query"] = server.command("query-named-block-nodes", flat=True)[1]
    for number in range(count):
        took["close"] += server.command("blockdev-del", node_name=f"q{number}")[1]
    return {name: total / count for name, total in took.items()} | {"KiB": memory}


def make_images(folder, count):
    for number in range(count):
        path = os.path.join(folder, f"{number}.qcow2")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1G"], check=True)


def table(title, columns, rows):
    print(f"\n{title}")
    print(f"{'':<24}" + "".join(f"{column:>22}" for column in columns))
    for name, figures in rows:
        print(f"{name:<24}" + "".join(f"{figure:>22.3f}" for figure in figures))


def main():
    args = parse()
    # One processor for client and servers: what a wake-up costs is not what is measured.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    peers = [("ours", args.ours)]
    if args.base:
        peers.append(("base", args.base))
    peer = shutil.which(args.qsd)
    if peer:
        peers.append(("qsd", peer))
    else:
        print(f"{args.qsd} is not installed: no comparison")
    sizes = [int(size) for size in args.sizes.split(",")]
    results = {}
    with tempfile.TemporaryDirectory(prefix="outport-control-") as folder:
        for size in sizes:
            for name, program in peers:
                results[name, size] = measured(
                    name, program, folder, lambda it: one_of_many(it, size, args.samples))
        if args.images:
            make_images(folder, args.images)
            for name, program in peers:
                results[name, "images"] = measured(
                    name, program, folder, lambda it: images(it, folder, args.images))
    columns = [f"{name} {size}" for size in sizes for name, _ in peers]
    rows = [(command, [results[name, size][command] for size in sizes for name, _ in peers])
            for command in (*COMMANDS, "KiB")]
    table("median ms per command; KiB per node with its export", columns, rows)
    if args.images:
        rows = [(what, [results[name, "images"][what] for name, _ in peers])
                for what in ("open", "query", "close", "KiB")]
        table(f"ms per qcow2 image of {args.images}", [name for name, _ in peers], rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump([{"peer": peer, "population": size, **figures}
                       for (peer, size), figures in results.items()], file, indent=1)
    return 0


def measured(name, program, folder, measure):
    server = Server(name, program, folder)
    try:
        return measure(server)
    finally:
        server.stop()


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", default=f"{ROOT}/target/release/outportd")
    parser.add_argument("--base", help="another build, measured beside")
    parser.add_argument("--qsd", default="qemu-storage-daemon")
    parser.add_argument("--sizes", default="10,1000,10000")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
