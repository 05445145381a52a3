"""Rows that were tokenised before, outside of every identity: only a shortcut.

    <memo>/<key>/<sha256 of its bytes>.rows     an Arrow file of rows by their ids, never changed

The key stands for the tokenizer, the template, the code and the libraries that decide what a row becomes. A file comes
with one rename, carries its checksum as its name and is verified before it is used; so a process that is killed, or
two at a time, or damage, cost a row's tokenising and nothing else. `retuner.memo` prunes keys that are no longer used.
"""

import mmap
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner.files import sha256_file
from retuner.token_rows import TokenRows

if TYPE_CHECKING:
    from numpy.typing import NDArray

FULL_BYTES = 32 << 20
"""A file is written when its rows have so many bytes of tokens."""
MOST_SPARE_FILES = 32
"""Rows are written anew, together, when they lie in so many more files than they would fill,"""
MOST_UNUSED = 4
"""or when the memo holds this many times what is in use."""
FOUND_AT_ONCE = 2**16
"""Ids that are looked for together."""
DRAFT_SECONDS = 3600
"""A draft this old is nobody's."""
MISSING = -1


@dataclass(frozen=True)
class Places:
    """Where rows stand: the number of the file, or MISSING, and the number of the row in it."""

    file: "NDArray[Any]"
    row: "NDArray[Any]"

    def __getitem__(self, rows: Any) -> "Places":
        return Places(self.file[rows], self.row[rows])

    @staticmethod
    def joined(parts: "Sequence[Places]") -> "Places":
        import numpy as np

        return Places(
            np.concatenate([part.file for part in parts]), np.concatenate([part.row for part in parts])
        )


class RowMemo:
    """The rows of one key. Without a damaged or missing file ever being an error."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for draft in folder.glob(".*.draft"):
            if time.time() - _age_of(draft) > DRAFT_SECONDS:
                draft.unlink(missing_ok=True)
        found = sorted(folder.glob("*.rows"))
        self.files = [file for path in found if (file := _open_verified(path))]
        self._writer = RowWriter(folder)

    def find(self, ids: "NDArray[Any]") -> Places:
        """The places of rows by their ids, (rows, 16) bytes."""
        import numpy as np

        places = Places(np.full(len(ids), MISSING, np.int32), np.zeros(len(ids), np.int32))
        if not self.files or not len(ids):
            return places
        # Ids are digests, so eight of their bytes are enough to find one, and all sixteen to know it.
        keys = np.concatenate([_keys(file.ids) for file in self.files])
        order = np.argsort(keys).astype(np.int32)
        keys = keys[order]
        begins: Any = np.cumsum([0, *(len(file.ids) for file in self.files)])
        for first in range(0, len(ids), FOUND_AT_ONCE):
            asked = ids[first : first + FOUND_AT_ONCE]
            at: Any = order[np.searchsorted(keys, _keys(asked)).clip(max=len(keys) - 1)]
            file: Any = np.searchsorted(begins, at, side="right") - 1
            row = at - begins[file]
            for number in np.unique(file).tolist():
                here = np.flatnonzero(file == number)
                here = here[(self.files[number].ids[row[here]] == asked[here]).all(axis=1)]
                places.file[first + here], places.row[first + here] = number, row[here]
        return places

    def add(
        self, ids: "NDArray[Any]", rows: TokenRows, roles: Sequence[str], plain: Sequence[bool]
    ) -> Places:
        """New rows. They are there, here and for others, when `flush` was called."""
        import numpy as np

        first = self._writer.add(ids, rows, roles, plain)
        places: Any = (
            np.full(len(rows), len(self.files), np.int32),
            np.arange(first, first + len(rows), dtype=np.int32),
        )
        if self._writer.is_full:
            self.flush()
        return Places(*places)

    def flush(self) -> None:
        """Write what was added."""
        self.files += self._writer.flush()

    def take_in(self, names: Sequence[str]) -> None:
        """Files that others have written, after `flush`."""
        self.files += [file for name in names if (file := _open_verified(self.folder / name))]

    def column(self, name: str, places: Places) -> "NDArray[Any]":
        """One number a row: `tokens`, `stripped` or `plain`. All rows must be there."""
        import numpy as np

        values: Any = np.zeros(len(places.file), np.int32)
        for file, here in self._parts(places):
            values[here] = getattr(file, name)[places.row[here]]
        return values

    def supervised(self, places: Places, at_most: int) -> "NDArray[Any]":
        """Tokens of each row that carry loss, in spans that end within its first `at_most` tokens."""
        import numpy as np

        values: Any = np.zeros(len(places.file), np.int32)
        for file, here in self._parts(places):
            lengths = np.where(file.spans[:, 1] <= at_most, file.spans[:, 1] - file.spans[:, 0], 0)
            sums = np.concatenate([[0], np.cumsum(lengths)])[file.span_offsets()]
            values[here] = np.diff(sums)[places.row[here]]
        return values

    def roles(self, places: Places) -> "tuple[NDArray[Any], list[str]]":
        """The sequence of roles of each row, as a number, and what the numbers mean."""
        import numpy as np

        values: Any = np.zeros(len(places.file), np.int32)
        names: dict[str, int] = {}
        for file, here in self._parts(places):
            meant = np.array([names.setdefault(name, len(names)) for name in file.role_names], np.int32)
            values[here] = meant[file.roles[places.row[here]]]
        return values, list(names)

    def _parts(self, places: Places) -> "Iterator[tuple[RowFile, NDArray[Any]]]":
        """Each file that has some of the rows, and which."""
        import numpy as np

        for number in np.unique(places.file).tolist():
            yield self.files[number], places.file == number

    def rows(self, places: Places, at_most: int | None) -> TokenRows:
        """Some rows, at least one, each cut to `at_most` tokens; of a cut row the spans that are whole."""
        import numpy as np

        full = self.column("tokens", places)
        at_most = at_most or int(full.max())
        lengths = np.minimum(full, at_most)
        # Rows that follow one another in a file are copied at one go.
        follows = (np.diff(places.file) == 0) & (np.diff(places.row) == 1) & (full == lengths)[:-1]
        first = np.flatnonzero(np.concatenate([[True], ~follows]))
        last = np.concatenate([first[1:], [len(lengths)]]) - 1
        ids, spans, counts = [], [], []
        for a, b in zip(first.tolist(), last.tolist(), strict=True):
            file, start, end = self.files[places.file[a]], places.row[a], places.row[b]
            ids.append(file.input_ids[file.offsets[start] : file.offsets[end] + lengths[b]])
            of_rows = file.span_offsets(start, end + 1)
            spans.append(file.spans[of_rows[0] : of_rows[-1]])
            counts.append(np.diff(of_rows))
        flat_spans, row_spans = np.concatenate(spans), np.concatenate(counts)
        row: Any = np.repeat(np.arange(len(lengths)), row_spans)
        if (whole := flat_spans[:, 1] <= at_most).all():
            kept = row_spans
        else:
            flat_spans, kept = flat_spans[whole], np.bincount(row[whole], minlength=len(lengths))
        return TokenRows(
            input_ids=np.concatenate(ids),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            spans=flat_spans,
            span_offsets=np.concatenate([[0], np.cumsum(kept)]),
            stripped_chars=self.column("stripped", places).astype(np.int32),
        )

    def let_go(self) -> None:
        """Memory of mapped files counts as ours as long as it is held; it comes back when it is touched."""
        for file in self.files:
            file.map.madvise(mmap.MADV_DONTNEED)

    def compact(self, used: Places) -> None:
        """Keep the rows in use, together, when much else is here or they lie in many small files."""
        import numpy as np

        tokens = sum(len(file.input_ids) for file in self.files)
        used_tokens = int(self.column("tokens", used).sum())
        needed_files = 1 + 4 * used_tokens // FULL_BYTES
        if tokens <= MOST_UNUSED * used_tokens and len(self.files) <= needed_files + MOST_SPARE_FILES:
            return
        order = np.lexsort((used.row, used.file))
        before, kept = list(self.files), set[Path]()
        for part in np.array_split(order, needed_files):
            places = used[part]
            roles, names = self.roles(places)
            ids = np.concatenate([file.ids[places.row[here]] for file, here in self._parts(places)])
            rows = self.rows(places, None)
            plain = self.column("plain", places)
            written = _publish(self.folder, [(ids, rows, [names[role] for role in roles], plain)])
            kept.add(written.path)
            self.let_go()
        for file in before:
            if file.path not in kept:
                file.path.unlink(missing_ok=True)


class RowFile:
    """One file, mapped."""

    def __init__(self, path: Path):
        import numpy as np
        import pyarrow as pa

        self.path = path
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        batch = pa.ipc.open_file(pa.py_buffer(self.map)).get_batch(0)
        rows = batch.num_rows

        def numbers(buffer: Any, kind: Any) -> "NDArray[Any]":
            return np.frombuffer(buffer, kind) if buffer else np.zeros(0, kind)

        def listed(name: str) -> "tuple[NDArray[Any], NDArray[Any]]":
            _, offsets, _, values = batch.column(name).buffers()
            ends = numbers(offsets, np.int32)[: rows + 1]
            return ends, numbers(values, np.int32)[: ends[-1]]

        self.ids = numbers(batch.column("id").buffers()[1], np.uint8)[: 16 * rows].reshape(-1, 16)
        self.offsets, self.input_ids = listed("input_ids")
        self._span_bounds, flat = listed("spans")
        self.spans = flat.reshape(-1, 2)
        self.stripped = numbers(batch.column("stripped").buffers()[1], np.int32)[:rows]
        self.plain = numbers(batch.column("plain").buffers()[1], np.int8)[:rows]
        roles = batch.column("roles")
        self.roles = numbers(roles.indices.buffers()[1], np.int32)[:rows]
        self.role_names = [str(name) for name in roles.dictionary]

    # Made anew each time, so that a file that is open takes no memory but what is mapped.

    @property
    def tokens(self) -> "NDArray[Any]":
        import numpy as np

        return np.diff(self.offsets)

    def span_offsets(self, first: int = 0, last: int | None = None) -> "NDArray[Any]":
        """Where in `spans` those of rows `first` to `last` begin, and where the last ones end. Without `last` of all
        rows from `first` on."""
        return self._span_bounds[first : None if last is None else last + 1] // 2


class RowWriter:
    """Adds files of rows to the folder of a memo."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._waiting: list[tuple[Any, ...]] = []
        self._rows = self._bytes = 0

    @property
    def is_full(self) -> bool:
        """There is enough for a file."""
        return self._bytes >= FULL_BYTES

    def add(self, ids: "NDArray[Any]", rows: TokenRows, roles: Sequence[str], plain: Sequence[bool]) -> int:
        """The number of the first of the new rows in the file that is written next. `ids` are (rows, 16) bytes."""
        first = self._rows
        self._waiting.append((ids, rows, roles, plain))
        self._rows += len(rows)
        self._bytes += rows.input_ids.nbytes
        return first

    def flush(self) -> list[RowFile]:
        """The file that what was added is in now; none when nothing was."""
        if not self._waiting:
            return []
        waiting, self._waiting, self._rows, self._bytes = self._waiting, [], 0, 0
        return [_publish(self.folder, waiting)]


def _keys(ids: "NDArray[Any]") -> "NDArray[Any]":
    import numpy as np

    return np.ascontiguousarray(ids[:, :8]).view(np.uint64).ravel()


def _publish(folder: Path, parts: Sequence[tuple[Any, ...]]) -> RowFile:
    """Write rows as one file; each part is ids, TokenRows, roles, plain."""
    import pyarrow as pa

    batch = _as_batch(parts)
    draft = folder / f".{uuid.uuid4().hex}.draft"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        # Not fsynced: what the disk loses has another checksum.
        path = folder / f"{sha256_file(draft)}.rows"
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return RowFile(path)


def _open_verified(path: Path) -> RowFile | None:
    """None, and the file is gone, when its bytes are not those that its name says."""
    try:
        if f"{sha256_file(path)}.rows" != path.name:
            path.unlink(missing_ok=True)
            return None
        os.utime(path)  # used now, so pruned later
        return RowFile(path)
    except OSError:
        return None  # pruned by another process, or not to be read


def _age_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _as_batch(parts: Sequence[tuple[Any, ...]]) -> Any:
    """Rows as an Arrow record batch; each part is ids, TokenRows, roles, plain."""
    import numpy as np
    import pyarrow as pa

    def flat(kind: Any, arrays: Sequence[Any], dtype: Any) -> Any:
        values = np.ascontiguousarray(np.concatenate(arrays), dtype)
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])

    def listed(arrays: Sequence[Any], offsets: Sequence[Any]) -> Any:
        lengths = np.concatenate([np.diff(ends) for ends in offsets])
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        values = flat(pa.int32(), arrays, np.int32)
        buffers = [None, pa.py_buffer(ends)]
        return pa.Array.from_buffers(pa.list_(pa.int32()), len(lengths), buffers, children=[values])

    def strings(values: Sequence[str]) -> Any:
        # Not pa.array: it imports pandas, which takes longer than many rows do.
        letters = [value.encode() for value in values]
        ends = np.cumsum([0, *map(len, letters)], dtype=np.int32)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(letters))]
        return pa.Array.from_buffers(pa.string(), len(values), buffers)

    rows = [part[1] for part in parts]
    ids = np.concatenate([part[0] for part in parts])
    names: dict[str, int] = {}
    roles = np.array([names.setdefault(role, len(names)) for part in parts for role in part[2]], np.int32)
    columns = {
        "id": pa.Array.from_buffers(pa.binary(16), len(ids), [None, pa.py_buffer(np.ascontiguousarray(ids))]),
        "input_ids": listed([part.input_ids for part in rows], [part.offsets for part in rows]),
        "spans": listed([part.spans.ravel() for part in rows], [2 * part.span_offsets for part in rows]),
        "stripped": flat(pa.int32(), [part.stripped_chars for part in rows], np.int32),
        "plain": flat(pa.int8(), [np.array(part[3], np.int8) for part in parts], np.int8),
        "roles": pa.DictionaryArray.from_arrays(flat(pa.int32(), [roles], np.int32), strings(list(names))),
    }
    return pa.record_batch(list(columns.values()), names=list(columns))
