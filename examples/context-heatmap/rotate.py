#!/usr/bin/python3
"""Gives a node a new dirty bitmap each minute and forgets the oldest: what the heatmap is made of.

    rotate.py QMP-SOCKET NODE [--minutes N] [--every SECONDS] [--once]
"""

import argparse
import json
import socket
import time

PREFIX = "heat-"
GRANULARITY = 65536


class Qmp:
    def __init__(self, path):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(path)
        self.lines = sock.makefile("rw")
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        message = {"execute": command, "arguments": arguments}
        self.lines.write(json.dumps(message) + "\n")
        self.lines.flush()
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise SystemExit(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


def numbers(qmp, node):
    """The numbers of the node's bitmaps, oldest first."""
    nodes = qmp("query-named-block-nodes")
    bitmaps = next(n for n in nodes if n["node-name"] == node).get("dirty-bitmaps", [])
    names = [b["name"] for b in bitmaps if b["name"].startswith(PREFIX)]
    return sorted(int(name[len(PREFIX):]) for name in names)


def rotate(qmp, node, keep):
    old = numbers(qmp, node)
    newest = old[-1] + 1 if old else 0
    actions = [("add", {"node": node, "name": f"{PREFIX}{newest}", "granularity": GRANULARITY})]
    if old:
        actions.append(("disable", {"node": node, "name": f"{PREFIX}{old[-1]}"}))
    # Between the two no write is lost: both happen at once.
    qmp("transaction", actions=[{"type": f"block-dirty-bitmap-{what}", "data": data}
                                for what, data in actions])
    for number in old[:max(0, len(old) + 1 - keep)]:
        qmp("block-dirty-bitmap-remove", node=node, name=f"{PREFIX}{number}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("socket")
    parser.add_argument("node")
    parser.add_argument("--minutes", type=int, default=10, help="bitmaps that are kept")
    parser.add_argument("--every", type=float, default=60, help="seconds")
    parser.add_argument("--once", action="store_true", help="rotate once, for cron or a test")
    args = parser.parse_args()
    while True:
        rotate(Qmp(args.socket), args.node, args.minutes)
        if args.once:
            return
        time.sleep(args.every)


if __name__ == "__main__":
    main()
