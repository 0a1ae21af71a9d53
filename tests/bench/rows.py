"""The rows of the benchmark: what is measured, and what the design asks for.

A target is (measure, peer, bound): ours must reach at least `bound` times the peer's rate, or at
most `bound` times its CPU time per operation. The peer "raw" means our own figure of another row.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Target:
    measure: str  # "rate" (at least) or "cpu" (at most)
    peer: str  # "qsd-uring", "nbdkit", or the id of a row of our own
    bound: float


@dataclass(frozen=True)
class Row:
    id: str
    title: str
    image: str  # null, raw, direct, qcow2, flat (its file as raw), write, qcow2-write, sparse
    load: tuple = ()  # arguments of nbd-load
    pin: str = "each"  # one: both on CPU 0; each: server 0, client 1; both: unpinned
    transport: str = "unix"
    client: str = "nbd-load"  # nbd-load, vhost-load, nbdcopy, fio, start, authz, idle, status
    bitmap: int = 0  # granularity of a dirty bitmap that records from the start; 0: none
    unit: str = "iops"  # iops, MB/s, ms, us, MiB
    tls: bool = False
    iothreads: int = 0
    targets: tuple = field(default_factory=tuple)
    quick: bool = False


PINS = {
    "one": "server and client on CPU 0",
    "each": "server on CPU 0, client on CPU 1",
    "both": "server and client on both CPUs",
}


def rate(peer, bound):
    return Target("rate", peer, bound)


def cpu(peer, bound):
    return Target("cpu", peer, bound)


def names(image, transport, tls):
    """Of a row: the beginning of its id, and what people call it."""
    if tls:
        return f"tls-{image}", f"{image} over TLS"
    if transport == "tcp":
        return "tcp", f"{image} over TCP loopback"
    return image, image


def random_4k(image, op, depth, pin, *targets, connections=1, transport="unix", tls=False,
              quick=False):
    load = ["--op", op, "--bs", "4k", "--qd", str(depth), "--connections", str(connections)]
    deep = f"{connections}x{depth}" if connections > 1 else f"qd{depth}"
    prefix, noun = names(image, transport, tls)
    if pin == "both":
        load += ["--threads", "2"]
    return Row(
        id=f"{prefix}-4k-{op}-{deep}-{pin}",
        title=f"{noun}: 4k random {op}, {deep}",
        image=image,
        load=tuple(load),
        pin=pin,
        transport=transport,
        tls=tls,
        iothreads=2 if connections > 1 else 0,
        targets=targets,
        quick=quick,
    )


def sequential(image, op, size, pin, *targets, transport="unix", tls=False, quick=False):
    prefix, noun = names(image, transport, tls)
    return Row(
        id=f"{prefix}-{size}-{op}-{pin}",
        title=f"{noun}: {size} sequential {op}, qd8",
        image=image,
        load=("--op", op, "--bs", size, "--qd", "8", "--order", "sequential"),
        pin=pin,
        transport=transport,
        tls=tls,
        unit="MB/s",
        targets=targets,
        quick=quick,
    )


def allocating(stride, title, *targets, quick=False):
    load = ("--op", "write", "--bs", "4k", "--qd", "32", "--order", "once", "--final-flush")
    return Row(
        id=f"sparse-4k-write-{stride}-each",
        title=f"qcow2 sparse: {title}, qd32",
        image="sparse",
        load=load + ("--stride", stride),
        targets=targets,
        quick=quick,
    )


def vhost(image, op, depth, *targets, queues=1, size="4k", quick=False):
    order = "random" if size == "4k" else "sequential"
    load = ("--op", op, "--bs", size, "--qd", str(depth), "--queues", str(queues),
            "--order", order)
    deep = f"{queues}x{depth}" if queues > 1 else f"qd{depth}"
    return Row(
        id=f"vhost-{image}-{size}-{op}-{deep}",
        title=f"vhost-user-blk, {image}: {size} {order} {op}, {deep}",
        image=image,
        load=load,
        pin="both" if queues > 1 else "each",
        transport="vhost-user",
        client="vhost-load",
        unit="iops" if size == "4k" else "MB/s",
        iothreads=min(queues, 2),
        targets=targets,
        quick=quick,
    )


QSD, KIT = "qsd-uring", "nbdkit"


def vhost_reads():
    """Every kind of image at every depth; several queues; large requests."""
    for image in ["null", "raw", "direct", "qcow2"]:
        for depth in [1, 32, 128]:
            met = (image, depth) == ("raw", 32)
            targets = (rate(QSD, 1.5), cpu(QSD, 0.6)) if met else ()
            yield vhost(image, "read", depth, *targets, quick=depth == 32 and image != "direct")
        for queues in [2, 3, 4] if image == "raw" else [4]:
            yield vhost(image, "read", 32, queues=queues)
        yield vhost(image, "read", 8, size="128k")


def vhost_writes():
    yield vhost("null", "write", 32)
    for image in ["write", "direct-write", "qcow2-write"]:
        for depth in [1, 32, 128]:
            # At depth 1 a request is two wake-ups, and they cost everybody the same.
            deep = image == "qcow2-write" and depth > 1
            targets = (cpu(QSD, 0.5),) if deep else ()
            yield vhost(image, "write", depth, *targets,
                        quick=depth == 32 and image != "direct-write")
        yield vhost(image, "write", 32, queues=2)
        yield vhost(image, "write", 8, size="128k")


ROWS = [
    # Reads: nothing here changes a file.
    random_4k("null", "read", 32, "one", quick=True),
    random_4k("null", "read", 32, "each"),
    sequential("null", "read", "256k", "each"),
    random_4k("raw", "read", 1, "one"),
    random_4k("raw", "read", 1, "each"),
    random_4k("raw", "read", 32, "one", rate(QSD, 4.5), rate(KIT, 2.2), quick=True),
    random_4k("raw", "read", 32, "each", rate(QSD, 2), rate(KIT, 1.4), cpu(QSD, 0.4), quick=True),
    random_4k("raw", "read", 32, "each", connections=4),
    random_4k("raw", "read", 32, "both", rate(QSD, 5), rate(KIT, 1.5), connections=4, quick=True),
    sequential("raw", "read", "256k", "one"),
    sequential("raw", "read", "256k", "each", rate(QSD, 2), rate(KIT, 1.2), cpu(QSD, 0.3),
               quick=True),
    sequential("raw", "read", "1M", "one"),
    sequential("raw", "read", "1M", "each", rate(QSD, 2), rate(KIT, 1.2), cpu(QSD, 0.3)),
    random_4k("raw", "read", 32, "one", transport="tcp"),
    random_4k("raw", "read", 32, "each", rate(QSD, 1.5), rate(KIT, 1.05), transport="tcp",
              quick=True),
    sequential("raw", "read", "256k", "each", transport="tcp"),
    random_4k("raw", "read", 32, "one", tls=True),
    random_4k("raw", "read", 32, "each", rate(QSD, 2.5), rate(KIT, 1.4), cpu(QSD, 0.4),
              cpu(KIT, 0.7), tls=True, quick=True),
    sequential("raw", "read", "256k", "each", rate(QSD, 1.5), rate(KIT, 1.1), tls=True),
    sequential("raw", "read", "1M", "each", rate(QSD, 1.5), rate(KIT, 1.1), cpu(QSD, 0.7),
               cpu(KIT, 0.9), tls=True, quick=True),
    random_4k("direct", "read", 1, "each"),
    random_4k("direct", "read", 32, "each", rate(QSD, 1.2), cpu(QSD, 0.4), quick=True),
    sequential("direct", "read", "1M", "each"),
    random_4k("qcow2", "read", 1, "each"),
    # Where pages lie in memory is worth 15 %: what the plugin costs is seen on the same pages.
    random_4k("flat", "read", 32, "one"),
    random_4k("qcow2", "read", 32, "one", rate("flat-4k-read-qd32-one", 0.95)),
    random_4k("flat", "read", 32, "each", quick=True),
    random_4k("qcow2", "read", 32, "each", rate("flat-4k-read-qd32-each", 0.95), quick=True),
    random_4k("qcow2", "read", 32, "both", connections=4),
    sequential("qcow2", "read", "256k", "each"),
    sequential("qcow2", "read", "1M", "each"),
    *vhost_reads(),
    Row("nbdcopy-raw", "raw: whole image by nbdcopy", "raw", client="nbdcopy", unit="MB/s",
        quick=True),
    Row("nbdcopy-qcow2", "qcow2: whole image by nbdcopy", "qcow2", client="nbdcopy", unit="MB/s"),
    Row("fio-4k-read-qd32-each", "raw: 4k random read, qd32, fio's nbd engine", "raw",
        client="fio"),
    Row("start-qcow2", "start to first byte served, qcow2", "qcow2", client="start", unit="ms",
        pin="both", quick=True, targets=(Target("below", "", 100),)),
    Row("authz-decision", "one decision of a policy (the bundled authz-list), by its own clock",
        "null", client="authz", unit="us", pin="both", quick=True, targets=(Target("below", "", 20),)),
    Row("idle-qcow2", "resident memory, one idle qcow2 export", "qcow2", client="idle", unit="MiB",
        pin="both", quick=True, targets=(Target("below", "", 40),)),
    # Writes: last, and to files of their own.
    random_4k("write", "write", 1, "each"),
    random_4k("write", "write", 32, "one"),
    random_4k("write", "write", 32, "each", rate(QSD, 1.6), quick=True),
    replace(random_4k("write", "write", 32, "each", rate("write-4k-write-qd32-each", 0.97)),
            id="write-4k-write-tracked", bitmap=64 << 10,
            title="write: 4k random write, qd32, with a dirty bitmap"),
    random_4k("write", "write", 32, "both", connections=4),
    Row("bitmap-status", "dirty bitmap of a million extents, asked for whole", "null",
        client="status", unit="maps/s", bitmap=512, targets=(rate(QSD, 1), cpu(QSD, 0.2))),
    random_4k("write", "write", 32, "each", rate(QSD, 1), tls=True),
    sequential("write", "write", "1M", "each", rate(QSD, 1), tls=True),
    sequential("write", "write", "256k", "each", rate(QSD, 1.7), quick=True),
    sequential("write", "write", "1M", "each"),
    random_4k("direct-write", "write", 32, "each"),
    random_4k("qcow2-write", "write", 32, "each"),
    *vhost_writes(),
    allocating("4k", "4k writes, each block once", rate(QSD, 1.5)),
    allocating("64k", "4k writes, each to a new cluster", rate(QSD, 1.5), quick=True),
    Row("sparse-1M-write-each", "qcow2 sparse: 1M writes, each block once", "sparse", unit="MB/s",
        load=("--op", "write", "--bs", "1M", "--qd", "8", "--order", "once", "--final-flush")),
]

# Rows of the design that this script cannot measure, and why.
NOT_HERE = [
    ("FUSE", "has a script of its own, fuse.py: the client is fio on a mounted file"),
]
