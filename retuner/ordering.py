"""Rows in their final order, without duplicates, each on its side; and the lines of those that are kept."""

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retuner.naming import is_held_out, limit_of
from retuner.rows import CHUNK_LINE_BYTES, Ordered, Parted, portions

HeldOut = Callable[[Any], Any]
"""For heads, one a group, a bool each."""


@dataclass
class Duplicates:
    exact: int = 0
    """The same roles and texts, byte for byte."""
    folded: int = 0
    """The same but for case and white space."""


def order(parted: Parted, rows: Ordered, held_out: HeldOut) -> Duplicates:
    """By group, then id. Of duplicates the one with the least id stays.

    Duplicates share a group, so they meet in their part, and no order of reading matters.
    """
    dropped = Duplicates()
    for heads in parted.parts():
        heads = _without_duplicates(heads, dropped)
        rows.add(heads, _sides(heads, held_out))
    return dropped


def write_lines(rows: Ordered, removed: Any, out: Path) -> None:
    """train.jsonl, without the train rows that are flagged, and held_out.jsonl."""
    with (out / "train.jsonl").open("wb") as train, (out / "held_out.jsonl").open("wb") as held_out:
        for first, heads in rows.heads():
            last = first + len(heads)
            for side, file in enumerate((train, held_out)):
                mine = heads[(rows.sides[first:last] == side) & ~removed[first:last]]
                for some in portions(mine["line"], CHUNK_LINE_BYTES):
                    file.write(rows.bodies.lines(mine[some]))


def groups(rows: Ordered, which: Any) -> int:
    """How many different groups the flagged rows have."""
    count, before = 0, None
    for first, heads in rows.heads():
        group = heads["group"][which[first : first + len(heads)]]
        if not len(group):
            continue
        count += int((group[1:] != group[:-1]).any(1).sum()) + int(
            before is None or (group[0] != before).any()
        )
        before = group[-1].copy()
    return count


def _without_duplicates(heads: Any, dropped: Duplicates) -> Any:
    id, key = heads["id"], heads["key"]
    by_key = _in_order(*key.T, *id.T)
    again = (key[by_key][1:] == key[by_key][:-1]).all(1)
    same = again & (id[by_key][1:] == id[by_key][:-1]).all(1)
    dropped.exact += int(same.sum())
    dropped.folded += int(again.sum() - same.sum())
    kept = by_key[np.concatenate([[True], ~again])]
    return heads[kept[_in_order(*heads["group"][kept].T, *id[kept].T)]]


def _in_order(first: Any, *others: Any) -> Any:
    """By the first column, where that is equal by the next, and so on: np.lexsort, for a first column with few equal
    values."""
    order = np.argsort(first)
    equal = np.flatnonzero(np.diff(first[order]) == 0)
    tied = np.union1d(equal, equal + 1)
    rows = order[tied]
    order[tied] = rows[np.lexsort([column[rows] for column in (*others[::-1], first)])]
    return order


def _sides(heads: Any, held_out: HeldOut) -> Any:
    """1 for the rows that are held out, else 0."""
    group = heads["group"]
    begins = np.flatnonzero(np.concatenate([[True], (group[1:] != group[:-1]).any(1)]))
    sides = held_out(heads[begins])
    return np.repeat(sides.astype(np.uint16), np.diff(begins, append=len(group)))


def by_draw(salt: str, held_out_fraction: float) -> HeldOut:
    """`is_held_out` of groups whose draws were made with this salt."""
    limit = limit_of(held_out_fraction)
    high = np.uint64(limit >> 64)

    def held_out(heads: Any) -> Any:
        sides = heads["draw"] < high
        for place in np.flatnonzero(heads["draw"] == high):  # the other half of the draw decides
            sides[place] = is_held_out(_spelled(heads[place : place + 1])[0], salt, held_out_fraction)
        return sides

    return held_out


def by_name(groups: Container[str]) -> HeldOut:
    """Whether a frozen set has the group."""
    return lambda heads: np.array([group in groups for group in _spelled(heads)], bool)


def _spelled(heads: Any) -> list[str]:
    spelled = heads["group"].astype(">u8").tobytes().hex()
    return [spelled[at : at + 32] for at in range(0, len(spelled), 32)]
