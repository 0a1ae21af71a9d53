"""The images that are served: made once, warmed with 4k random reads, kept resident."""

import mmap
import os
import random
import shutil
import subprocess

PAGE = 4096


class Images:
    """Lazily made images in the scratch folder."""

    def __init__(self, folder, size):
        self.folder, self.size = folder, size
        self.made = {}
        self.notes = []

    def path(self, image):
        """The file that serves `image`, fresh for "sparse", made once for others."""
        if image == "null":
            return None
        if image == "sparse":
            path = os.path.join(self.folder, "sparse.qcow2")
            run("qemu-img", "create", "-q", "-f", "qcow2", path, str(self.size * 4))
            return path
        if image == "flat":
            return self.path("qcow2")
        if image not in self.made:
            self.made[image] = self._make(image)
        return self.made[image]

    def _make(self, image):
        path = os.path.join(self.folder, image + ".img")
        if image.startswith("qcow2"):
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.path("raw"), path)
        else:
            fill(path, self.size)
        sync(path)
        if image.startswith("direct"):
            drop(path)
        else:
            self._warm(path)
        return path

    def prepare(self, image):
        """Before a measurement: nothing dirty, everything resident (or, O_DIRECT, nothing)."""
        path = self.path(image)
        if path is None or image == "sparse":
            return path
        sync(path)
        if image.startswith("direct"):
            return path
        if not is_resident(path):
            self.notes.append(f"{image}: pages were evicted meanwhile, read again")
            self._read_all(path)
        return path

    def _warm(self, path):
        """4k random reads: sequential read-ahead would build large folios, which make 4k
        overwrites several times dearer."""
        drop(path)
        self._read_all(path)

    def _read_all(self, path):
        pages = list(range((os.path.getsize(path) + PAGE - 1) // PAGE))
        random.Random(1).shuffle(pages)
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            for _ in range(3):  # the kernel may evict idle pages behind our back
                for page in pages:
                    os.pread(fd, PAGE, page * PAGE)
                if is_resident(path):
                    return
        finally:
            os.close(fd)
        self.notes.append(f"{os.path.basename(path)}: does not stay in the page cache")


def o_direct_works(folder):
    """None, or the reason why O_DIRECT cannot be measured here."""
    path = os.path.join(folder, "direct.probe")
    fill(path, PAGE)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, PAGE) as page:
            os.preadv(fd, [page], 0)
        os.close(fd)
    except OSError as error:
        return f"O_DIRECT refused in {folder}: {error.strerror}"
    finally:
        os.unlink(path)
    return None


def fill(path, size):
    source = random.Random(2)
    with open(path, "wb") as file:
        while size > 0:
            file.write(source.randbytes(min(size, 1 << 20)))
            size -= 1 << 20


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def drop(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def resident(path):
    """Bytes of the file in the page cache; all of it when fincore is missing."""
    if not shutil.which("fincore"):
        return os.path.getsize(path)
    return int(run("fincore", "-b", "-n", "-o", "RES", path))


def is_resident(path):
    return resident(path) >= os.path.getsize(path) * 0.999


def run(*argv):
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
