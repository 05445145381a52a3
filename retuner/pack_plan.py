"""Which rows share a sequence: best fit decreasing, over lengths alone.

The plan is `packs.arrow`, an Arrow stream of `rows: list<int32>`, the numbers of a pack's rows in train.arrow, with
`pack_tokens` in the metadata of its schema.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH_PACKS = 10_000


def plan_packs(lengths: "NDArray[Any]", pack_tokens: int) -> "NDArray[Any]":
    """The number of the pack of every row. Packs have at most `pack_tokens` tokens, rows from 1 to as many.

    Rows are taken from the longest to the shortest, in their order where they are as long, and each goes into the
    pack where it leaves the least room. As the rows of one length come one after the other, they are placed many at
    a time: a pack with room r, the least that suffices, takes r // length of them before another pack is looked at.
    Memory is a few numbers a row.
    """
    import numpy as np

    order = np.argsort(-lengths, kind="stable")
    pack_of: Any = np.empty(len(lengths), np.int32)
    room: dict[int, list[Any]] = {}
    """Room left to the packs that have so much, in the order in which they came to it."""
    rooms = 0
    """Bit r is set when there are packs with room r: the least that suffices is found by shifting."""
    packs = done = 0
    by_length = lengths[order]
    bounds = np.flatnonzero(np.diff(by_length, prepend=-1, append=-1))
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        length = int(by_length[start])
        done = start
        while done < end:
            if enough := rooms >> length:
                left = (enough & -enough).bit_length() - 1 + length
                free = np.concatenate(room.pop(left))
                rooms ^= 1 << left
            else:
                left = pack_tokens
                free = np.arange(packs, packs + -(-(end - done) // (left // length)), dtype=np.int32)
                packs += len(free)
            each = left // length
            full = min(len(free), (end - done) // each)
            more = min(end - done - full * each, each) if full < len(free) else 0
            rows = order[done : done + full * each + more]
            pack_of[rows] = np.repeat(free[: full + 1], each)[: len(rows)]
            done += len(rows)
            for packs_now, room_now in (
                (free[:full], left - each * length),
                (free[full : full + (more > 0)], left - more * length),
                (free[full + (more > 0) :], left),
            ):
                if len(packs_now) and room_now:
                    room.setdefault(room_now, []).append(packs_now)
                    rooms |= 1 << room_now
    return pack_of


def write_packs(path: Path, pack_of: "NDArray[Any]", pack_tokens: int) -> int:
    """Returns how many packs there are."""
    import numpy as np
    import pyarrow as pa

    rows = np.argsort(pack_of, kind="stable").astype(np.int32)
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of))])
    schema = pa.schema({"rows": pa.list_(pa.int32())}, metadata={"pack_tokens": str(pack_tokens)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for first in range(0, len(bounds) - 1, BATCH_PACKS):
            ends = bounds[first : first + BATCH_PACKS + 1]
            members = rows[ends[0] : ends[-1]]
            values = pa.Array.from_buffers(pa.int32(), len(members), [None, pa.py_buffer(members)])
            offsets = pa.py_buffer((ends - ends[0]).astype(np.int32))
            packs = pa.Array.from_buffers(
                schema.field("rows").type, len(ends) - 1, [None, offsets], children=[values]
            )
            stream.write_batch(pa.record_batch([packs], schema=schema))
    return len(bounds) - 1
