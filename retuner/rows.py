"""Rows on their way through `prepare`, moved in bulk and by way of the disk, so that memory does not grow with them.

A row is a head of fixed size and a body: its words as 32-bit hashes, then its line of train.jsonl or held_out.jsonl.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BANDS = 32
HEAD = np.dtype(
    [
        ("group", "<u8", (2,)),
        ("id", "<u8", (2,)),
        ("key", "<u8", (2,)),  # of the conversation but for case and white space
        ("draw", "<u8"),  # the first half of what the group drew, see retuner.naming
        ("prompt", "<u8"),  # of all before the first answer but for case, white space and the system's text
        ("talk", "<u8"),  # of the conversation likewise
        ("words", "<u4"),
        ("line", "<u4"),  # bytes of the line, its newline included
        ("place", "<u8"),  # where the line begins in the file of its side
        ("bands", "<u4", (BANDS,)),  # the MinHash sketch, see retuner.sketch
    ]
)
LEAN = np.dtype(HEAD.descr[:-1])
"""A head without its sketch."""
PARTS = 256
RUN_BYTES = 16 * 2**20
"""Of what is sorted in memory at once."""
CHUNK_ROWS = 2**15
CHUNK_WORDS = 2**18
PAGE_ROWS = 2**13
GAP_BYTES = 2**13


@dataclass(frozen=True, slots=True)
class Batch:
    heads: Any
    bodies: bytes
    """Of all rows, one after the other."""

    def take(self, order: Any) -> "Batch":
        """The rows that `order` numbers, in that order."""
        sizes = body_sizes(self.heads)
        ends = np.cumsum(sizes)
        return Batch(self.heads[order], _joined(self.bodies, (ends - sizes)[order], ends[order]))

    def lines(self, which: Any) -> bytes:
        """The lines of the rows for which `which` is true."""
        ends = np.cumsum(body_sizes(self.heads))
        return _joined(self.bodies, (ends - self.heads["line"])[which], ends[which])


def body_sizes(heads: Any) -> Any:
    return heads["words"].astype(np.int64) * 4 + heads["line"]


def _joined(data: bytes, begins: Any, ends: Any) -> bytes:
    view = memoryview(data)
    return b"".join([view[begin:end] for begin, end in zip(begins.tolist(), ends.tolist())])


def concatenated(batches: list[Batch]) -> Batch:
    # Through bytes: numpy takes long to put records together.
    heads = np.frombuffer(b"".join([batch.heads.tobytes() for batch in batches]), HEAD)
    return Batch(heads, b"".join([batch.bodies for batch in batches]))


def parts_at_once(size: int) -> int:
    """How many parts, a power of two, may be in memory together when all have `size` bytes."""
    several = PARTS
    while several > 1 and size * several > RUN_BYTES * PARTS:
        several //= 2
    return several


class Records:
    """Fixed-size records in a file, to be read back by parts: those of one part come together."""

    def __init__(self, path: Path, dtype: Any):
        self.file, self.dtype = path.open("w+b"), dtype
        self.runs: list[tuple[int, Any]] = []  # where a run begins, in records; where its parts begin in it
        self.count = 0

    def add(self, records: Any, parts: Any) -> Any:
        """A run: its records are ordered by part, and the order is returned. `parts` are below PARTS."""
        order = np.argsort(parts, kind="stable")
        begins: Any = np.zeros(PARTS + 1, np.int64)
        np.cumsum(np.bincount(parts, minlength=PARTS), out=begins[1:])
        self.file.write(records[order].tobytes())
        self.file.flush()
        self.runs.append((self.count, begins))
        self.count += len(records)
        return order

    def part(self, part: int, parts: int = 1) -> Any:
        """The records of a part, or of several from it on; those of an earlier run first."""
        size, pieces = self.dtype.itemsize, []
        for begin, begins in self.runs:
            first, last = begin + int(begins[part]), begin + int(begins[part + parts])
            if first < last:
                pieces.append(_read(self.file, first * size, (last - first) * size))
        return np.frombuffer(b"".join(pieces), self.dtype)

    def close(self) -> None:
        self.file.close()


class Parted:
    """Batches in any order on their way to an order by group: the first byte of the group is the part."""

    def __init__(self, folder: Path):
        self.heads = Records(folder / "parted.heads", HEAD)
        self.bodies = (folder / "parted.bodies").open("w+b")
        self.waiting: list[Batch] = []
        self.bytes = 0
        self.written = 0

    def add(self, batch: Batch) -> None:
        self.waiting.append(batch)
        self.bytes += batch.heads.nbytes + len(batch.bodies)
        if self.bytes >= RUN_BYTES:
            self._write()

    def parts(self) -> Iterator[Batch]:
        """All rows of a part at once, the parts in order; of few rows those of several parts."""
        if self.waiting:
            self._write()
        several = parts_at_once(self.heads.count * HEAD.itemsize + self.written)
        for part in range(0, PARTS, several):
            heads = self.heads.part(part, several)
            if len(heads):
                yield Batch(heads, self._bodies(heads))

    def close(self) -> None:
        self.heads.close()
        self.bodies.close()

    def _write(self) -> None:
        batch = concatenated(self.waiting)
        self.waiting, self.bytes = [], 0
        parts = (batch.heads["group"][:, 0] >> np.uint64(56)).astype(np.uint8)
        batch = batch.take(np.argsort(parts, kind="stable"))
        sizes = body_sizes(batch.heads)
        # The bodies lie in the order of the heads, so those of a part are one stretch of the file.
        batch.heads["place"] = self.written + np.cumsum(sizes) - sizes
        self.heads.add(batch.heads, np.sort(parts))
        self.bodies.write(batch.bodies)
        self.bodies.flush()
        self.written += len(batch.bodies)

    def _bodies(self, heads: Any) -> bytes:
        """The bodies of the heads of a part: one stretch of the file for each run."""
        sizes = body_sizes(heads)
        ends = heads["place"].astype(np.int64) + sizes
        begins = np.flatnonzero(np.concatenate([[True], heads["place"][1:] != ends[:-1]]))
        lasts: Any = np.append(begins[1:], len(heads)) - 1
        spans = zip(heads["place"][begins].tolist(), ends[lasts].tolist())
        return b"".join([_read(self.bodies, begin, end - begin) for begin, end in spans])


class Ordered:
    """Rows in their final order, numbered from 0: heads, sketches and words on disk, in memory 10 bytes a row.

    `sides` says for each row where it belongs: 0 is train, 1 held-out, more are held-out sets of earlier versions.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.heads_file = (folder / "ordered.heads").open("w+b")
        self.words_file = (folder / "ordered.words").open("w+b")
        self.sketches_file = (folder / "ordered.sketches").open("w+b")
        self.bands_files = [(folder / f"ordered.band{band}").open("w+b", 2**16) for band in range(BANDS)]
        # Small arrays that outlive large ones would keep what the large ones had from being given back.
        self.sides_file = (folder / "ordered.sides").open("w+b")
        self.counts_file = (folder / "ordered.counts").open("w+b")
        self.sides: Any = None
        self.word_ends: Any = None

    def add(self, batch: Batch, sides: Any) -> None:
        """The words are kept; the lines are not."""
        heads = batch.heads
        lean = heads.view(np.uint8).reshape(len(heads), HEAD.itemsize)[:, : LEAN.itemsize]
        self.heads_file.write(lean.tobytes())
        self.sketches_file.write(heads["bands"].tobytes())
        for band, file in enumerate(self.bands_files):
            file.write(np.ascontiguousarray(heads["bands"][:, band]).tobytes())
        ends = np.cumsum(body_sizes(heads)) - heads["line"]
        begins = ends - heads["words"].astype(np.int64) * 4
        self.words_file.write(_joined(batch.bodies, begins, ends))
        self.sides_file.write(sides.astype("<u2").tobytes())
        self.counts_file.write(heads["words"].tobytes())

    def finish(self) -> None:
        """After the last row: from now on rows are read."""
        for file in self._files:
            file.flush()
        self.sides = np.fromfile(self.sides_file.name, "<u2")
        self.word_ends = np.cumsum(np.fromfile(self.counts_file.name, "<u4"), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sides)

    def heads(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, Any]]:
        """The number of a first row, and the heads of it and of some after it."""
        last = len(self) if last is None else last
        for row in range(first, last, CHUNK_ROWS):
            count = min(CHUNK_ROWS, last - row)
            yield row, np.frombuffer(_records(self.heads_file, row, count, LEAN.itemsize), LEAN)

    def head(self, row: int) -> Any:
        return next(self.heads(row, row + 1))[1][0]

    def band(self, band: int) -> Iterator[tuple[int, Any]]:
        """The number of a first row, and one band of the sketches of it and of some after it."""
        for row in range(0, len(self), CHUNK_ROWS):
            count = min(CHUNK_ROWS, len(self) - row)
            yield row, np.frombuffer(_records(self.bands_files[band], row, count, 4), "<u4")

    def sketches(self, rows: Any) -> Any:
        """(rows, BANDS) of the rows that are numbered, in ascending order."""
        size, pieces = BANDS * 4, []
        for first in range(0, len(self), PAGE_ROWS):
            low, high = _bounds(rows, first, PAGE_ROWS)
            wanted = rows[low:high]
            if len(wanted) > PAGE_ROWS // 64:
                count = min(PAGE_ROWS, len(self) - first)
                page = np.frombuffer(_records(self.sketches_file, first, count, size), "<u4")
                pieces.append(page.reshape(count, BANDS)[wanted - first])
            elif len(wanted):
                found = _gathered(self.sketches_file, wanted * size, (wanted + 1) * size)
                pieces.append(np.frombuffer(found, "<u4").reshape(len(wanted), BANDS))
        return np.concatenate([*pieces, np.zeros((0, BANDS), "<u4")])

    def word_counts(self, rows: Any) -> Any:
        return self.word_ends[rows] - self._word_begins(rows)

    def words(self, rows: Any) -> tuple[Any, Any]:
        """The words of the rows that are numbered, in ascending order, and how many each has."""
        begins, ends = self._word_begins(rows), self.word_ends[rows]
        return np.frombuffer(_gathered(self.words_file, begins * 4, ends * 4), "<u4"), ends - begins

    def all_words(self) -> Iterator[tuple[int, Any, Any]]:
        """Stretches of rows: the number of the first, their words, and how many each has."""
        row = 0
        while row < len(self):
            begin = int(self.word_ends[row - 1]) if row else 0
            last = max(row + 1, int(np.searchsorted(self.word_ends, begin + CHUNK_WORDS, "right")))
            ends = self.word_ends[row:last]
            words = _records(self.words_file, begin, int(ends[-1]) - begin, 4)
            yield row, np.frombuffer(words, "<u4"), np.diff(ends, prepend=begin)
            row = last

    def _word_begins(self, rows: Any) -> Any:
        return np.where(rows > 0, self.word_ends[np.maximum(rows, 1) - 1], 0)

    def close(self) -> None:
        for file in self._files:
            file.close()

    @property
    def _files(self) -> list[BinaryIO]:
        several = (self.heads_file, self.words_file, self.sketches_file, self.sides_file, self.counts_file)
        return [*several, *self.bands_files]


def _gathered(file: BinaryIO, begins: Any, ends: Any) -> bytes:
    """The stretches of a file, in ascending order, one after the other. What lies close together is read at once."""
    if not len(begins):
        return b""
    first = np.concatenate([[0], np.flatnonzero(begins[1:] - ends[:-1] > GAP_BYTES) + 1])
    spans: Any = zip(first.tolist(), np.append(first[1:], len(begins)).tolist())
    pieces = []
    for low, high in spans:
        at = int(begins[low])
        data = _read(file, at, int(ends[high - 1]) - at)
        pieces.append(data if high - low == 1 else _joined(data, begins[low:high] - at, ends[low:high] - at))
    return b"".join(pieces)


def _bounds(rows: Any, first: int, count: int) -> tuple[int, int]:
    """Where, in ascending numbers, those of `count` rows from `first` on begin and end."""
    return int(np.searchsorted(rows, first)), int(np.searchsorted(rows, first + count))


def _records(file: BinaryIO, first: int, count: int, size: int) -> bytes:
    return _read(file, first * size, count * size)


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, at)
