"""What was computed from a piece of input before, kept outside of every identity: only a shortcut.

    <root>/<key>/<name>     pieces of bytes, then the sha256 of them all

The key stands for the code, the libraries and the settings that decide what is computed, the name for the bytes it
was computed from. An entry comes with one rename and is verified before it is used, so a process that is killed, or
two at a time, or a disk that loses what was not yet written, cost a recomputation and nothing else.
"""

import hashlib
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

KEPT_DAYS = 30
DAY = 86_400
KEPT_BYTES = 8 * 2**30
SHA_BYTES = 32
SIZE = struct.Struct("<Q")
READ_BYTES = 2**20


class Memo:
    def __init__(self, root: Path, key: str):
        self.root, self.key, self.folder = root, key, root / key

    def has(self, name: str) -> bool:
        """Whether there is an entry, damaged or not."""
        return (self.folder / name).exists()

    def read(self, name: str) -> Iterator[bytes] | None:
        """The pieces of an entry, all verified before the first is given; None when it is not there or damaged."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size - SHA_BYTES
                if size < 0 or _sha256(file, size) != file.read(SHA_BYTES):
                    path.unlink(missing_ok=True)
                    return None
            os.utime(path)  # used now, so pruned later
            return _pieces(path, size)
        except OSError:
            return None  # pruned by another process, or not to be read

    @contextmanager
    def write(self, name: str) -> Iterator[Callable[[bytes], None]]:
        """Gives a function that adds a piece. The entry is there when the block ends without an error."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft, digest = self.folder / f".{uuid.uuid4().hex}", hashlib.sha256()
        try:
            with draft.open("wb") as file:

                def add(piece: bytes) -> None:
                    for part in (SIZE.pack(len(piece)), piece):
                        digest.update(part)
                        file.write(part)

                yield add
                file.write(digest.digest())
            os.replace(draft, self.folder / name)
        finally:
            draft.unlink(missing_ok=True)

    def prune(self, kept_days: float = KEPT_DAYS, kept_bytes: int = KEPT_BYTES) -> None:
        """Remove, of all keys, what was not used for `kept_days`, and the longest unused beyond `kept_bytes`."""
        found = []
        for path in self.root.glob("*/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # another process was first
            found.append((stat.st_mtime, stat.st_size, path))
        oldest, abandoned, kept = time.time() - kept_days * DAY, time.time() - DAY, 0
        for used, size, path in sorted(found, reverse=True):
            kept += size
            if used < oldest or kept > kept_bytes or (path.name.startswith(".") and used < abandoned):
                path.unlink(missing_ok=True)
        for folder in self.root.glob("*"):
            try:
                folder.rmdir()
            except OSError:
                continue  # not empty


def _sha256(file: BinaryIO, size: int) -> bytes:
    digest = hashlib.sha256()
    while size and (block := file.read(min(size, READ_BYTES))):
        digest.update(block)
        size -= len(block)
    return digest.digest()


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while file.tell() < size:
            yield file.read(SIZE.unpack(file.read(SIZE.size))[0])
