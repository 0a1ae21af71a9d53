"""The servers that are compared: how each is started for an image and a transport."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time


class Unavailable(Exception):
    """This server cannot serve this row; the text says why."""


class Peer:
    """A server program in one configuration."""

    def __init__(self, id, title, program, aio=None):
        self.id, self.title, self.program, self.aio = id, title, program, aio
        self.outport = id in ("ours", "base")  # base: another build of ours, see compare.py

    def argv(self, image, path, size, transport, address, iothreads, monitor=None,
             certificates=None):
        """With a monitor (a path), a policy is asked about each client; with certificates (a
        folder) there is TLS."""
        if monitor and not self.outport:
            raise Unavailable("it asks nobody when a client names an export")
        if self.id == "nbdkit":
            return self._nbdkit(image, path, size, transport, address, certificates)
        argv = self._storage_daemon(image, path, size, transport, address, iothreads,
                                    certificates)
        if monitor:
            argv[-1] += ",authz=az"
            argv[1:1] = ["--chardev", f"socket,id=m,path={monitor},server=on,wait=off",
                         "--monitor", "m", "--object", "authz-list,id=az,policy=allow"]
        return argv

    def _storage_daemon(self, image, path, size, transport, address, iothreads, certificates):
        quoted = str(path).replace(",", ",,")
        file = f"filename={quoted},aio={self.aio}"
        if image == "null":
            node = f"null-co,node-name=n,size={size},read-zeroes=on"
        elif image.startswith("direct"):
            node = f"file,node-name=n,{file},cache.direct=on"
        elif image.startswith(("qcow2", "sparse")):
            dotted = ",".join(f"file.{option}" for option in file.split(",", 1))
            node = f"qcow2,node-name=n,file.driver=file,{dotted},discard=unmap"
        else:
            node = f"file,node-name=n,{file}"
        if transport == "vhost-user":
            return [self.program, *self._iothreads(iothreads), "--blockdev", node, "--export",
                    f"vhost-user-blk,id=e,node-name=n,writable=on,num-queues=4,"
                    f"addr.type=unix,addr.path={address}{self._export_threads(iothreads)}"]
        if transport == "unix":
            listen = f"addr.type=unix,addr.path={address}"
        else:
            listen = f"addr.type=inet,addr.host=127.0.0.1,addr.port={address}"
        argv = [self.program]
        if certificates:
            argv += ["--object", f"tls-creds-x509,id=tls,endpoint=server,verify-peer=off,"
                     f"sanity-check=off,dir={certificates}"]
            listen += ",tls-creds=tls"
        export = "nbd,id=e,node-name=n,name=x,writable=on"
        if self.outport and iothreads:
            # QSD and nbdkit have no such thing for one NBD export.
            for number in range(iothreads):
                argv += ["--object", f"iothread,id=io{number}"]
                export += f",iothread.{number}=io{number}"
        return argv + ["--blockdev", node, "--nbd-server", listen, "--export", export]

    def _iothreads(self, count):
        return [word for number in range(count)
                for word in ("--object", f"iothread,id=io{number}")]

    def _export_threads(self, count):
        if count == 0:
            return ""
        if self.outport:
            return "".join(f",iothread.{number}=io{number}" for number in range(count))
        # QSD serves all queues of a device on one.
        return ",iothread=io0"

    def _nbdkit(self, image, path, size, transport, address, certificates):
        if transport == "vhost-user":
            raise Unavailable("it has no vhost-user-blk")
        if image.startswith("direct"):
            raise Unavailable("its file plugin has no O_DIRECT")
        if image.startswith(("qcow2", "sparse")):
            raise Unavailable("it has no qcow2 in this version")
        where = ["-U", str(address)] if transport == "unix" else \
            ["-i", "127.0.0.1", "-p", str(address)]
        plugin = ["null", f"size={size}"] if image == "null" else ["file", str(path)]
        tls = ["--tls=require", f"--tls-certificates={certificates}"] if certificates else []
        return [self.program, "-f", "--exit-with-parent", "-e", "x"] + where + tls + plugin


def find_peers(ours, aio, wanted):
    """The peers that are installed, ours first; and what is missing, in words."""
    qsd = os.environ.get("QSD") or shutil.which("qemu-storage-daemon")
    kit = os.environ.get("NBDKIT") or shutil.which("nbdkit")
    candidates = [
        Peer("ours", f"ours aio={aio}", ours, aio),
        Peer("qsd-uring", "QSD aio=io_uring", qsd, "io_uring"),
        Peer("qsd-threads", "QSD aio=threads", qsd, "threads"),
        Peer("nbdkit", "nbdkit", kit),
    ]
    chosen = [peer for peer in candidates if peer.id == "ours" or peer.id in wanted]
    missing = [f"{peer.title}: not installed" for peer in chosen if not peer.program]
    return [peer for peer in chosen if peer.program], missing


class Running:
    """A started server; it ends with the `with` block."""

    def __init__(self, peer, row, path, size, scratch):
        self.socket = os.path.join(scratch, "s.sock")
        self.port = free_port() if row.transport == "tcp" else None
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        self.transport = row.transport
        address = self.port or self.socket
        self.monitor = os.path.join(scratch, "q.sock") if row.client == "authz" else None
        if row.bitmap and peer.id == "nbdkit":
            raise Unavailable("it has no dirty bitmaps")
        self.bitmap = row.bitmap
        self.certificates = make_certificates(scratch) if row.tls else None
        argv = peer.argv(row.image, path, size, row.transport, address, row.iothreads,
                         self.monitor, self.certificates)
        if row.bitmap:
            self.monitor = os.path.join(scratch, "q.sock")
            if os.path.exists(self.monitor):
                os.unlink(self.monitor)
            argv += ["--chardev", f"socket,id=m,path={self.monitor},server=on,wait=off",
                     "--monitor", "m"]
        cpus = range(os.cpu_count()) if row.pin == "both" else [0]
        self.started = time.monotonic()
        self.errors = open(os.path.join(scratch, "server.err"), "w+b")
        self.process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cpus))] + argv,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.errors)
        self.pid = self.process.pid

    def __enter__(self):
        try:
            self.first_byte_ms = self._first_byte()
            if self.bitmap:
                self.qmp("block-dirty-bitmap-add", node="n", name="b", granularity=self.bitmap)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(sign)
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    pass
        self.errors.close()

    def uri(self, name="x"):
        if self.port:
            return f"nbd://127.0.0.1:{self.port}/{name}"
        return f"nbd+unix:///{name}?socket={self.socket}"

    def load_address(self):
        where = ["--tcp", f"127.0.0.1:{self.port}"] if self.port else ["--unix", self.socket]
        authority = ["--tls-ca", f"{self.certificates}/ca-cert.pem"] if self.certificates else []
        return where + authority

    def cpu_seconds(self):
        """CPU time of all threads, ended ones too (the kernel's CPU clock of a process)."""
        return time.clock_gettime_ns((~self.pid << 3) | 2) / 1e9

    def resident_mib(self):
        with open(f"/proc/{self.pid}/status") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) / 1024
        raise Unavailable("no VmRSS in /proc")

    def _first_byte(self):
        """Milliseconds from exec until 512 bytes were served; waits for the server."""
        while True:
            if self.process.poll() is not None:
                self.errors.seek(0)
                text = self.errors.read().decode(errors="replace").strip()
                raise Unavailable(f"it did not start: {text.splitlines()[-1:] or 'no word'}")
            if time.monotonic() - self.started > 20:
                raise Unavailable("it did not listen within 20 s")
            try:
                self._read_512()
                return (time.monotonic() - self.started) * 1000
            except (ConnectionError, FileNotFoundError):
                time.sleep(0.0005)

    def greet(self):
        """One client that enters the export and leaves."""
        self._read_512()

    def qmp(self, command, **arguments):
        """One command over a monitor connection of its own; what it returns."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect(self.monitor)
            lines = sock.makefile("rw")
            lines.readline()
            for name, values in (("qmp_capabilities", {}), (command, arguments)):
                lines.write(json.dumps({"execute": name, "arguments": values}) + "\n")
                lines.flush()
                while "return" not in (answer := json.loads(lines.readline())):
                    if "error" in answer:
                        raise RuntimeError(f"{name}: {answer['error']['desc']}")
            return answer["return"]

    def _read_512(self):
        if self.transport == "vhost-user":
            # Connecting is enough: the export listens when it is ready.
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(self.socket)
            return
        family = socket.AF_INET if self.port else socket.AF_UNIX
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(10)
            sock.connect(("127.0.0.1", self.port) if self.port else self.socket)
            receive(sock, 18)
            if self.certificates:
                return  # The load shakes hands; this says that it listens.
            sock.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 1) + b"x")
            receive(sock, 10)
            sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 512))
            receive(sock, 16 + 512)
            sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 8, 0, 0))


def receive(sock, count):
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError("closed")
        data += more
    return data


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def make_certificates(scratch):
    """A directory with an authority and a server called localhost, made once."""
    folder = os.path.join(scratch, "tls")
    if os.path.isdir(folder):
        return folder
    os.mkdir(folder)
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650"]
    ca = ["-keyout", f"{folder}/ca-key.pem", "-out", f"{folder}/ca-cert.pem"]
    server = ["-keyout", f"{folder}/server-key.pem", "-out", f"{folder}/server-cert.pem"]
    for arguments in (
            key + ca + ["-subj", "/CN=authority",
                        "-addext", "keyUsage=critical,keyCertSign,cRLSign"],
            key + server + ["-subj", "/CN=localhost", "-CA", f"{folder}/ca-cert.pem",
                            "-CAkey", f"{folder}/ca-key.pem",
                            "-addext", "subjectAltName=DNS:localhost",
                            "-addext", "basicConstraints=critical,CA:FALSE"]):
        made = subprocess.run(["openssl", "req", "-x509", *arguments], capture_output=True)
        if made.returncode:
            shutil.rmtree(folder)
            raise Unavailable(f"no certificates: {made.stderr.decode(errors='replace').strip()}")
    return folder
