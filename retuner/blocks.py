"""Files in pieces that stay the same while rows are added elsewhere."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from zlib import crc32

from retuner.chats import BadRow, Chat, _read_file
from retuner.dataset import DataFile
from retuner.files import sha256_file

LEAST_BYTES = 2**17
MOST_BYTES = 2**20
CUT_ONE_IN = 256


@dataclass(frozen=True, slots=True)
class Block:
    file: DataFile
    line: int
    """Of the file, at which the block begins."""
    sha256: str
    data: bytes | None
    """None: the block is the whole file."""


def blocks(file: DataFile) -> Iterator[Block]:
    """Whole lines of a .jsonl file, cut where the lines themselves say so; any other file is one block."""
    if not file.relpath.endswith(".jsonl"):
        yield Block(file, 1, sha256_file(file.path), None)
        return
    lines: list[bytes] = []
    first, size = 1, 0
    with file.path.open("rb") as stream:
        for line in stream:
            lines.append(line)
            size += len(line)
            if size >= MOST_BYTES or (size >= LEAST_BYTES and crc32(line) % CUT_ONE_IN == 0):
                yield _block(file, first, lines)
                first, size, lines = first + len(lines), 0, []
    if lines:
        yield _block(file, first, lines)


def _block(file: DataFile, first: int, lines: list[bytes]) -> Block:
    data = b"".join(lines)
    return Block(file, first, hashlib.sha256(data).hexdigest(), data)


def read_block(
    block: Block, format: str, columns: dict[str, str] | None, found: str | None
) -> Iterator[Chat | BadRow]:
    """The rows of a block, their lines counted from its first. `found` is the format of the file's first row."""
    if block.data is not None:
        yield from _read_file(block.file.relpath, BytesIO(block.data), found or format)
        return
    with block.file.path.open("rb") as stream:
        yield from _read_file(block.file.relpath, stream, found or format)
