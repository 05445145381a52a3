"""Rows on their way through `prepare`, moved in bulk and by way of the disk, so that memory does not grow with them.

A row is a head of fixed size, its words as 32-bit hashes, and its line of train.jsonl or held_out.jsonl. Words and
lines stay where they were put when they came; heads are what is ordered.
"""

import os
from collections.abc import Iterator, Sequence
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
        ("words", "<u4"),  # how many
        ("asked", "<u4"),  # how many of them before the first answer
        ("line", "<u4"),  # bytes of the line, its newline included
        ("words_at", "<u8"),  # how many stand before them in `Bodies`
        ("line_at", "<u8"),  # how many bytes of lines stand there before it
        ("bands", "<u4", (BANDS,)),  # the MinHash sketch, see retuner.sketch
    ]
)
LEAN = np.dtype(HEAD.descr[:-1])
"""A head without its sketch."""
PARTS = 256
WAITING_BYTES = 2 * 2**20
"""Of what is put aside before it is ordered by part."""
RUN_BYTES = 4 * 2**20
"""Of what is sorted in memory at once."""
CHUNK_ROWS = 2**15
CHUNK_WORDS = 2**18
CHUNK_LINE_BYTES = 2**23


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows; the words and the lines of all, one after the other."""

    heads: Any
    words: bytes | memoryview
    lines: bytes | memoryview


def portions(sizes: Any, most: int) -> Iterator[slice]:
    """Things that follow one another, in runs of at most so much, or of one."""
    ends = np.cumsum(sizes, dtype=np.int64)
    first = 0
    while first < len(ends):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + most, "right")))
        yield slice(first, last)
        first = last


def parts_at_once(size: int, most: int = RUN_BYTES) -> int:
    """How many parts, a power of two, may be in memory together when all have `size` bytes."""
    several = PARTS
    while several > 1 and size * several > most * PARTS:
        several //= 2
    return several


class Records:
    """Records of some columns in a file, to be read back by parts: those of one part come together."""

    def __init__(self, path: Path, columns: Sequence[Any]):
        """`columns`: the dtype of each."""
        self.file, self.columns = path.open("w+b"), [np.dtype(column) for column in columns]
        self.waiting: list[Sequence[Any]] = []
        self.bytes = 0
        self.runs: list[Any] = []  # where in a run its parts begin, in records
        self.count = 0

    def add(self, columns: Sequence[Any], parts: Any) -> None:
        """`parts`, which are below PARTS, say of which part each record is."""
        self.waiting.append((*columns, parts))
        self.count += len(parts)
        self.bytes += sum(column.nbytes for column in columns)
        if self.bytes >= WAITING_BYTES:
            self._write()

    def _write(self) -> None:
        """A run: its records are ordered by part."""
        *columns, parts = (np.concatenate(some) for some in zip(*self.waiting))
        self.waiting, self.bytes = [], 0
        order = np.argsort(parts, kind="stable")
        begins: Any = np.zeros(PARTS + 1, np.int64)
        np.cumsum(np.bincount(parts, minlength=PARTS), out=begins[1:])
        for column in columns:
            self.file.write(column[order].tobytes())
        self.file.flush()
        self.runs.append(begins)

    def part(self, part: int, parts: int = 1) -> list[Any]:
        """The columns of the records of a part, or of several from it on, in the order in which they came."""
        if self.waiting:
            self._write()
        pieces: list[list[bytes]] = [[] for _ in self.columns]
        at = 0
        for begins in self.runs:
            first, count = int(begins[part]), int(begins[part + parts] - begins[part])
            for column, some in zip(self.columns, pieces):
                if count:
                    some.append(_read(self.file, at + first * column.itemsize, count * column.itemsize))
                at += int(begins[-1]) * column.itemsize
        return [np.frombuffer(b"".join(some), column) for column, some in zip(self.columns, pieces)]

    def close(self) -> None:
        self.file.close()


class Numbers:
    """Numbers in a file, to be read back in stretches."""

    def __init__(self, path: Path, dtype: str):
        self.file, self.dtype = path.open("w+b"), np.dtype(dtype)
        self.count = 0

    def add(self, numbers: bytes | memoryview) -> int:
        """The place of the first of them."""
        first = self.count
        self.count += self.file.write(numbers) // self.dtype.itemsize
        return first

    def flush(self) -> None:
        """What was added can be read from now on."""
        self.file.flush()

    def at(self, places: Any, counts: Any) -> Any:
        """Those that begin at each of some places, one after the other."""
        begins = places * self.dtype.itemsize
        return np.frombuffer(_gathered(self.file, begins, begins + counts * self.dtype.itemsize), self.dtype)

    def close(self) -> None:
        self.file.close()


class Bodies:
    """Words and lines, as they came."""

    def __init__(self, folder: Path):
        self.words = Numbers(folder / "bodies.words", "<u4")
        self.lines_file = (folder / "bodies.lines").open("w+b")
        self.bytes_written = 0

    def add(self, batch: Batch) -> Any:
        """The heads, with the places of their words and lines."""
        heads = batch.heads.copy()
        for size, place, first in (
            ("words", "words_at", self.words.add(batch.words)),
            ("line", "line_at", self.bytes_written),
        ):
            heads[place] = first + np.cumsum(heads[size], dtype=np.int64) - heads[size]
        self.bytes_written += self.lines_file.write(batch.lines)
        return heads

    def finish(self) -> None:
        """After the last row: from now on rows are read."""
        self.words.flush()
        self.lines_file.flush()

    def lines(self, heads: Any) -> bytes:
        """The lines of some rows, one after the other."""
        begins = heads["line_at"].astype(np.int64)
        return _gathered(self.lines_file, begins, begins + heads["line"])

    def close(self) -> None:
        self.words.close()
        self.lines_file.close()


class Parted:
    """Heads in any order on their way to an order by group: the first byte of the group is the part."""

    def __init__(self, folder: Path):
        self.heads = Records(folder / "parted.heads", [HEAD])

    def add(self, heads: Any) -> None:
        # As numbers of four bytes: numpy takes long to pick out records, and to put them together.
        numbers = heads.view("<u4").reshape(len(heads), HEAD.itemsize // 4)
        self.heads.add([numbers], (heads["group"][:, 0] >> np.uint64(56)).astype(np.uint8))

    def parts(self) -> Iterator[Any]:
        """All heads of a part at once, the parts in order; of few rows those of several parts."""
        several = parts_at_once(self.heads.count * HEAD.itemsize)
        for part in range(0, PARTS, several):
            (heads,) = self.heads.part(part, several)
            if len(heads):
                yield heads

    def close(self) -> None:
        self.heads.close()


class Ordered:
    """Rows in their final order, numbered from 0: heads and sketches on disk, in memory 18 bytes a row.

    `sides` says for each row where it belongs: 0 is train, 1 held-out, more are held-out sets of earlier versions.
    """

    def __init__(self, folder: Path, bodies: Bodies):
        self.bodies = bodies
        self.heads_file = (folder / "ordered.heads").open("w+b")
        self.sketches_file = (folder / "ordered.sketches").open("w+b")
        self.bands_files = [(folder / f"ordered.band{band}").open("w+b", 2**16) for band in range(BANDS)]
        # Small arrays that outlive large ones would keep what the large ones had from being given back.
        self.sides_file = (folder / "ordered.sides").open("w+b")
        self.words_file = (folder / "ordered.words").open("w+b")
        self.counts_file = (folder / "ordered.counts").open("w+b")
        self.sides: Any = None
        self.words_at: Any = None
        self.word_counts: Any = None
        """How many words each row has."""
        self.as_they_lie: Any = None
        """The numbers of the rows in the order of their words on disk."""

    def add(self, heads: Any, sides: Any) -> None:
        lean = heads.view(np.uint8).reshape(len(heads), HEAD.itemsize)[:, : LEAN.itemsize]
        self.heads_file.write(lean.tobytes())
        self.sketches_file.write(heads["bands"].tobytes())
        for band, file in enumerate(self.bands_files):
            file.write(np.ascontiguousarray(heads["bands"][:, band]).tobytes())
        self.sides_file.write(sides.astype("<u2").tobytes())
        self.words_file.write(heads["words_at"].tobytes())
        self.counts_file.write(heads["words"].tobytes())

    def finish(self) -> None:
        """After the last row: from now on rows are read."""
        for file in self._files:
            file.flush()
        self.bodies.finish()
        self.words_at = np.fromfile(self.words_file.name, "<i8")
        self.as_they_lie = np.argsort(self.words_at).astype(np.int32)
        self.sides = np.fromfile(self.sides_file.name, "<u2")
        self.word_counts = np.fromfile(self.counts_file.name, "<u4")

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
        """(rows, BANDS) of the rows that are numbered, whose numbers rise. Read and not mapped: a page that is touched
        brings fifteen others along, and all of them would count as ours."""
        begins = np.asarray(rows, np.int64) * BANDS * 4
        return np.frombuffer(_gathered(self.sketches_file, begins, begins + BANDS * 4), "<u4").reshape(
            -1, BANDS
        )

    def words(self, rows: Any) -> tuple[Any, Any]:
        """The words of the rows that are numbered, and how many each has."""
        counts = self.word_counts[rows].astype(np.int64)
        return self.bodies.words.at(self.words_at[rows], counts), counts

    def all_words(self, which: Any) -> Iterator[tuple[Any, Any, Any]]:
        """Of the rows for which `which` is true some at a time, in no order that means anything: their numbers, their
        words, and how many each has."""
        for first in range(0, len(self), CHUNK_ROWS):
            numbers = self.as_they_lie[first : first + CHUNK_ROWS]
            numbers = numbers[which[numbers]]
            for some in portions(self.word_counts[numbers], CHUNK_WORDS):
                yield numbers[some], *self.words(numbers[some])

    def close(self) -> None:
        for file in self._files:
            file.close()

    @property
    def _files(self) -> list[BinaryIO]:
        several = (
            self.heads_file,
            self.sketches_file,
            self.sides_file,
            self.words_file,
            self.counts_file,
        )
        return [*several, *self.bands_files]


def _gathered(file: BinaryIO, begins: Any, ends: Any) -> bytes:
    """The stretches of a file one after the other. Those that adjoin are read at once."""
    if not len(begins):
        return b""
    breaks: Any = np.flatnonzero(begins[1:] != ends[:-1]) + 1
    starts, stops = begins[np.append(0, breaks)].tolist(), ends[np.append(breaks, len(begins)) - 1].tolist()
    number = file.fileno()
    return b"".join([os.pread(number, stop - start, start) for start, stop in zip(starts, stops)])


def _records(file: BinaryIO, first: int, count: int, size: int) -> bytes:
    return _read(file, first * size, count * size)


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, at)
