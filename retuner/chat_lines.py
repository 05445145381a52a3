"""The lines of train.jsonl and held_out.jsonl: found without parsing, read one by one or in runs.

`prepare` begins every line with `{"group": "<32 hex digits>", "id": "<32 hex digits>", "messages": ` and orders
lines by group, then id.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from retuner.errors import RetunerError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Chat = dict[str, Any]
"""A line: `group`, `id`, `messages`."""

HEAD = b'{"group": "' + b"-" * 32 + b'", "id": "' + b"-" * 32 + b'", "messages": '
"""How a line begins, with - where a hex digit stands."""
GROUP_AT, ID_AT = 11, 53
SCANNED_BYTES = 8 << 20
BATCH_ROWS = 1000
BATCH_BYTES = 16 << 20
"""Lines are read in batches of so many rows, or fewer when they are long."""


class ChatLines:
    """Where the rows of one file stand, in some 40 bytes a row."""

    def __init__(self, path: Path):
        """Errors: RetunerError when these are not the lines of `prepare`."""
        import numpy as np

        self.path = path
        ids, groups = [], []
        ends: list[Any] = [np.zeros(1, np.int64)]
        for line_ends, heads in _scan(path):
            ids.append(_from_hex(heads[:, ID_AT : ID_AT + 32]))
            groups.append(_from_hex(heads[:, GROUP_AT : GROUP_AT + 32]))
            ends.append(line_ends)
        nothing: Any = np.zeros((0, 16), np.uint8)
        self.ids: NDArray[Any] = np.concatenate([nothing, *ids])
        """(rows, 16) bytes"""
        self.groups: NDArray[Any] = np.concatenate([nothing, *groups])
        self.bounds: NDArray[Any] = np.concatenate(ends)
        """(rows + 1,): where each line begins, and where the last one ends"""
        keys = np.concatenate([self.groups, self.ids], axis=1).view("S32").ravel()
        if (keys[1:] < keys[:-1]).any():
            raise _not_ours(path, "its lines are not in the order of group and id")

    def __len__(self) -> int:
        return len(self.ids)

    def forget_groups(self) -> None:
        """They take 16 bytes a row, and are not asked for any more."""
        self.groups = self.groups[:0].copy()

    def batches(self, rows: "NDArray[Any]") -> "Iterator[NDArray[Any]]":
        """Some rows, given by their numbers in rising order, in batches that fit into memory."""
        import numpy as np

        sizes = self.bounds[rows + 1] - self.bounds[rows]
        first = 0
        while first < len(rows):
            sums = np.cumsum(sizes[first : first + BATCH_ROWS])
            count = max(1, int(np.searchsorted(sums, BATCH_BYTES, side="right")))
            yield rows[first : first + count]
            first += count

    def runs(self, rows: "NDArray[Any]") -> list[tuple[int, int]]:
        """Where rows, given by their numbers in rising order, begin and end in the file; what lies together is one."""
        import numpy as np

        breaks: Any = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = [run for run in np.split(rows, breaks) if len(run)]
        return [(int(self.bounds[run[0]]), int(self.bounds[run[-1] + 1])) for run in runs]

    def read(self, rows: "NDArray[Any]") -> list[Chat]:
        """Some rows, given by their numbers in rising order."""
        return read_runs(self.path, self.runs(rows))


def read_runs(path: Path, runs: Iterable[tuple[int, int]]) -> list[Chat]:
    """The lines from each place to another, see `ChatLines.runs`."""
    chats = []
    with path.open("rb") as file:
        for start, end in runs:
            lines = os.pread(file.fileno(), end - start, start).split(b"\n")
            try:
                chats += [from_json(line) for line in lines if line]
            except ValueError as error:
                raise _not_ours(path, f"a line is not JSON ({error})") from None
    return chats


def hex_strings(digests: "NDArray[Any]") -> Any:
    """(rows, 16) bytes as an Arrow array of strings of 32 hex digits."""
    import numpy as np
    import pyarrow as pa

    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    letters = np.stack([digits[digests >> 4], digits[digests & 15]], axis=2)
    ends: Any = np.arange(len(digests) + 1, dtype=np.int32) * 32
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(letters))]
    return pa.Array.from_buffers(pa.string(), len(digests), buffers)


def _scan(path: Path) -> Iterator[tuple["NDArray[Any]", "NDArray[Any]"]]:
    """For each block of whole lines: where its lines end in the file, and their heads (rows, len(HEAD))."""
    import numpy as np

    pattern = np.frombuffer(HEAD, np.uint8)
    fixed = pattern != ord("-")
    rest, begins = b"", 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(SCANNED_BYTES):
            block = rest + block
            data = np.frombuffer(block, np.uint8)
            ends: Any = np.flatnonzero(data == ord("\n")) + 1
            if not len(ends):
                rest = block
                continue
            starts = np.concatenate([[0], ends[:-1]])
            if (ends - starts <= len(HEAD)).any():
                raise _not_ours(path, "a line is too short")
            heads = data[starts[:, None] + np.arange(len(HEAD))]
            if not (heads[:, fixed] == pattern[fixed]).all():
                raise _not_ours(path, "a line begins in another way")
            yield begins + ends, heads
            rest, begins = block[ends[-1] :], begins + int(ends[-1])
    if rest:
        raise _not_ours(path, "its last line has no end")


def _from_hex(digits: "NDArray[Any]") -> "NDArray[Any]":
    import numpy as np

    values: Any = np.zeros(256, np.uint8)
    values[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)
    halves = values[digits]
    return halves[:, 0::2] << 4 | halves[:, 1::2]


def _not_ours(path: Path, reason: str) -> RetunerError:
    return RetunerError(
        f"{path} is not what the prepare stage writes: {reason}", "one chat a line, its group and id first"
    )
