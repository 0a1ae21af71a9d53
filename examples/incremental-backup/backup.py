#!/usr/bin/env python3
"""Full and incremental backups of a node over NBD.

    backup.py QMP-SOCKET NBD-SOCKET NODE FOLDER [--with libnbd|qemu] [--restrict]

The first run copies everything to FOLDER/0.qcow2; run N copies what was written since the run
before to FOLDER/N.qcow2, an overlay of that one: the newest file is the whole disk.

What makes it safe: one transaction ends the old bitmap and begins the next one, so that every write
is in one of the two; the old bitmap is given up only when its backup is complete, and otherwise
merged into the next one, which is then tried again.

Reads are as of when they happen. Writers should be quiet between the checkpoint and the end of the
pull, or the node should be one that does not change: a snapshot's, or a virtual machine's that is
paused.
"""

import argparse
import json
import os
import socket
import subprocess
import sys

NAME = "backup"  # of the export, and of the bitmaps with a number behind it


class Qmp:
    """One monitor connection; a failed command ends the program, with the daemon's words."""

    def __init__(self, path):
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.connect(path)
        self.lines = self.stream.makefile("rw")
        self.lines.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.lines.flush()
        while True:
            answer = json.loads(self.lines.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise SystemExit(f"{command}: {answer['error']['desc']}")


def bitmap(action, **data):
    return {"type": f"block-dirty-bitmap-{action}", "data": data}


class Backup:
    def __init__(self, args):
        self.args, self.qmp = args, Qmp(args.qmp)
        self.number = len([it for it in os.listdir(args.folder) if it.endswith(".qcow2")])
        self.target = os.path.join(args.folder, f"{self.number}.qcow2")
        self.partial = self.target + ".partial"

    def run(self):
        node = self.args.node
        before, after = f"{NAME}{self.number - 1}", f"{NAME}{self.number}"
        actions = [bitmap("add", node=node, name=after)]
        if self.number:
            actions.insert(0, bitmap("disable", node=node, name=before))
        self.qmp("transaction", actions=actions)
        try:
            self.pull(before)
            os.rename(self.partial, self.target)
        except BaseException:
            # The next attempt is this one and what was written meanwhile.
            undo = [bitmap("remove", node=node, name=after)]
            if self.number:
                undo = [bitmap("enable", node=node, name=before),
                        bitmap("merge", node=node, target=before, bitmaps=[after])] + undo
            self.qmp("transaction", actions=undo)
            raise
        if self.number:
            self.qmp("block-dirty-bitmap-remove", node=node, name=before)
        print(self.target)

    def pull(self, changed):
        export = {"type": "nbd", "id": NAME, "name": NAME, "node_name": self.args.node}
        if self.number:
            # Nothing but what changed can be asked for: a wrong client is told, not served.
            export |= {"bitmaps": [changed], "restrict_reads": self.args.restrict}
            if not self.args.restrict:
                del export["restrict_reads"]
        self.qmp("block-export-add", **export)
        try:
            if not self.number:
                self.full()
            elif self.args.tool == "qemu":
                self.changes_by_qemu(f"qemu:dirty-bitmap:{changed}")
            else:
                self.changes_by_libnbd(f"qemu:dirty-bitmap:{changed}")
        finally:
            self.qmp("block-export-del", id=NAME, mode="hard")

    def uri(self):
        return f"nbd+unix:///{NAME}?socket={self.args.nbd}"

    def full(self):
        if self.args.tool == "qemu":
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.uri(), self.partial)
        else:
            size = run("nbdinfo", "--size", self.uri()).strip()
            run("qemu-img", "create", "-q", "-f", "qcow2", self.partial, size)
            # nbdcopy speaks NBD on both sides.
            run("nbdcopy", self.uri(), "--", "[", "qemu-nbd", "-f", "qcow2", self.partial, "]")

    def changes_by_libnbd(self, context):
        import nbd

        self.overlay()
        source, target = nbd.NBD(), nbd.NBD()
        source.add_meta_context(context)
        source.connect_uri(self.uri())
        target.connect_systemd_socket_activation(["qemu-nbd", "-f", "qcow2", self.partial])
        at, piece = 0, 4 << 20
        while at < source.get_size():
            runs = []
            ask = min(source.get_size() - at, 1 << 30)
            source.block_status(ask, at, lambda name, _at, entries, _err: runs.extend(entries)
                                if name == context else None)
            for length, dirty in zip(runs[::2], runs[1::2]):
                for part in range(at, at + length, piece) if dirty else ():
                    count = min(piece, at + length - part)
                    target.pwrite(source.pread(count, part), part)
                at += length
        target.flush()
        target.shutdown()
        source.shutdown()

    def changes_by_qemu(self, context):
        where = f"driver=nbd,server.type=unix,server.path={self.args.nbd},export={NAME}"
        listed = run("qemu-img", "map", "--output=json", "--image-opts",
                     f"{where},x-dirty-bitmap={context}")
        # With x-dirty-bitmap qemu-img shows dirty ranges as those without data.
        dirty = [it for it in json.loads(listed) if not it["data"]]
        size = run("nbdinfo", "--size", self.uri()).strip()
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.uri(),
            self.partial, size)
        reads = [arg for it in dirty for arg in ("-c", f"read {it['start']} {it['length']}")]
        if reads:
            # Reading with copy-on-read fills the overlay.
            run("qemu-io", "-C", "-f", "qcow2", *reads, self.partial)
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2",
            "-b", f"{self.number - 1}.qcow2", self.partial)

    def overlay(self):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2",
            "-b", f"{self.number - 1}.qcow2", self.partial)


def run(*argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description="Full and incremental backups over NBD.")
    parser.add_argument("qmp")
    parser.add_argument("nbd")
    parser.add_argument("node")
    parser.add_argument("folder")
    parser.add_argument("--with", dest="tool", choices=["libnbd", "qemu"], default="libnbd")
    parser.add_argument("--restrict", action="store_true",
                        help="let the export refuse reads of what did not change (outport)")
    Backup(parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
