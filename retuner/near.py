"""Near duplicates within train, and train rows that resemble a held-out one: MinHash LSH, then the exact index.

Lee et al., "Deduplicating training data makes language models better" (2022), do the same on documents. One band of
the sketches is sorted at a time, in slices, so memory stays where it is while rows grow.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retuner.rows import BANDS, Numbers, Ordered, portions
from retuner.sketch import BINS, distinct_pairs, resemblances

SLICE_ROWS = 2**18
WINDOW = 8
"""How many others of its bucket a row is compared with, a band. Larger buckets are crowded, with rows made from one
pattern: there the order differs from band to band, so what is missed in one is met in another."""
PORTION, PORTION_WORDS = 2**15, 2**19
SHOWN = 5
LOW = np.uint64(2**32 - 1)

Compare = Callable[[Any, Any], tuple[Any, Any]]
"""For the left and the right of pairs of rows, those of the pairs that are alike."""


@dataclass
class Found:
    """Train rows that share something with held-out ones; the first few with one of these."""

    flags: Any
    """A bool for every row."""
    examples: list[tuple[int, int]] = field(default_factory=list)
    stock_phrases: "Found | None" = None
    """Those that share nothing but stock phrases and do not count; None for kinds in which nothing is one."""

    def add(self, train: Any, held_out: Any) -> None:
        if not len(train):
            return
        self.flags[train] = True
        order = np.lexsort((held_out, train))
        first = order[np.unique(train[order], return_index=True)[1][:SHOWN]]
        least = dict(zip(train[first].tolist(), held_out[first].tolist()))
        for row, other in self.examples:
            least[row] = min(other, least.get(row, other))
        self.examples = sorted(least.items())[:SHOWN]


@dataclass(frozen=True)
class Near:
    clusters: Any
    """Of every train row the least row of its cluster, itself where it has none."""
    leaks: Found


def find_near(rows: Ordered, similarity: float, usable: Any, folder: Path) -> Near:
    """Looks at usable rows with words. Which pairs are met depends on the rows, not on their order. `folder` is
    for files on the way."""
    with closing(_Pairs(rows, folder)) as pairs:
        return _find_near(rows, similarity, usable & (rows.word_counts > 0), pairs)


def _find_near(rows: Ordered, similarity: float, usable: Any, pairs: "_Pairs") -> Near:
    parents: Any = np.arange(len(rows), dtype=np.int32)
    leaks = Found(np.zeros(len(rows), bool))
    crowded: Any = np.zeros(len(rows), np.uint32)  # a bit for each band
    for band in range(BANDS):
        for keys, members in _buckets(rows, band, usable):
            train = rows.sides[members] == 0
            compare = partial(_alike, rows, pairs, band, similarity, crowded)
            _join_train(compare, keys[train], members[train], parents)
            _mark_leaks(compare, keys, members, train, leaks)
            sizes = np.searchsorted(keys, keys, "right") - np.searchsorted(keys, keys)
            crowded[members[sizes > WINDOW]] |= np.uint32(1 << band)
    for some in _portions(len(rows)):
        parents[some] = _roots(parents, np.arange(some.start, min(some.stop, len(rows))))
    return Near(parents, leaks)


def _buckets(rows: Ordered, band: int, usable: Any) -> Iterator[tuple[Any, Any]]:
    """Keys in order, and the rows that have them; only keys that several have."""
    slices = 1 + len(rows) // SLICE_ROWS
    # Within a bucket the order is another one in each band: row times an odd number, modulo 2^32.
    odd = (0x9E3779B1 * (2 * band + 1)) % 2**32
    back = np.uint64(pow(odd, -1, 2**32))
    for number in range(slices):
        some = []
        for first, keys in rows.band(band):
            keys = keys.astype(np.uint64)
            mine = usable[first : first + len(keys)].copy()
            if slices > 1:
                mine &= (keys * np.uint64(slices)) >> np.uint64(32) == number
            at = np.flatnonzero(mine)
            some.append((keys[at] << np.uint64(32)) | ((at + first).astype(np.uint64) * np.uint64(odd) & LOW))
        entries = np.concatenate(some) if some else np.zeros(0, np.uint64)
        entries.sort()
        keys = entries >> np.uint64(32)
        same = keys[1:] == keys[:-1]
        shared: Any = np.zeros(len(keys), bool)
        shared[1:] |= same
        shared[:-1] |= same
        yield keys[shared], ((entries[shared] & LOW) * back & LOW).astype(np.int64)


def _join_train(compare: Compare, keys: Any, members: Any, parents: Any) -> None:
    # Neighbours first: of what they bring together, most other pairs need not be looked at.
    for distances in (range(1, 2), range(2, WINDOW + 1)):
        places = [np.flatnonzero(keys[:-distance] == keys[distance:]) for distance in distances]
        at = np.concatenate(places)
        behind = at + np.repeat(distances, [len(some) for some in places])
        order = np.argsort(at, kind="stable")  # pairs of one bucket are compared together
        left, right = members[at[order]], members[behind[order]]
        for some in _portions(len(left)):
            one, other = left[some], right[some]
            apart = _roots(parents, one) != _roots(parents, other)
            one, other = compare(one[apart], other[apart])
            _join(parents, one, other)


def _mark_leaks(compare: Compare, keys: Any, members: Any, train: Any, leaks: Found) -> None:
    others, held_out = keys[~train], members[~train]
    if not len(others):
        return
    for distances in (range(1), range(1, WINDOW)):
        at = np.flatnonzero(train & ~leaks.flags[members])
        low: Any = np.searchsorted(others, keys[at])
        high: Any = np.searchsorted(others, keys[at], "right")
        for some in _portions(len(at)):
            for distance in distances:
                more = (high[some] - low[some] > distance) & ~leaks.flags[members[at[some]]]
                row, begin, end = members[at[some]][more], low[some][more], high[some][more]
                other = held_out[begin + (row + distance) % (end - begin)]
                leaks.add(*compare(row, other))


def _alike(
    rows: Ordered, pairs: "_Pairs", band: int, similarity: float, crowded: Any, left: Any, right: Any
) -> tuple[Any, Any]:
    """Those of the pairs that reach the similarity, without those that an earlier band has compared already: where a
    bucket is crowded, it may not have. `crowded` has a bit for each band in which a row's bucket was.

    The sketches are looked at first, so that the words of few pairs have to be.
    """
    numbers, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    one, other = np.split(places, 2)
    sketches = rows.sketches(numbers)
    earlier: Any = np.arange(band, dtype=np.uint32)
    was_crowded = (crowded[left, None] >> earlier) & np.uint32(1) == 1
    new = ~((sketches[one, :band] == sketches[other, :band]) & ~was_crowded).any(1)
    one, other, left, right = one[new], other[new], left[new], right[new]
    as_bytes = sketches.view(np.uint8)
    # Different pairs of words agree in a byte once in 256; two standard deviations of the estimate, which are larger
    # than those of independent draws by a third at most, are let pass.
    agree = (as_bytes[one] == as_bytes[other]).mean(1) * (256 / 255) - 1 / 255
    deviation = 1.35 * (similarity * (1 - similarity) / BINS) ** 0.5
    likely = agree > similarity - 2 * deviation - 1 / BINS
    left, right = left[likely], right[likely]
    words = rows.word_counts[left] + rows.word_counts[right]
    found = [pairs.resemblances(left[some], right[some]) for some in portions(words, PORTION_WORDS)]
    alike = np.concatenate([*found, np.zeros(0)]) >= similarity
    return left[alike], right[alike]


class _Pairs:
    """The pairs of words of rows that are looked at, made once and kept on disk: most are looked at in many bands."""

    def __init__(self, rows: Ordered, folder: Path):
        self.rows = rows
        self.kept = Numbers(folder / "near.pairs", "<u8")
        self.places: Any = np.full(len(rows), -1, np.int64)
        self.sizes: Any = np.zeros(len(rows), np.uint32)

    def resemblances(self, left: Any, right: Any) -> Any:
        numbers, places = np.unique(np.concatenate([left, right]), return_inverse=True)
        new = numbers[self.places[numbers] < 0]
        if len(new):
            pairs, sizes = distinct_pairs(*self.rows.words(new))
            self.places[new] = self.kept.add(pairs.tobytes()) + np.cumsum(sizes) - sizes
            self.sizes[new] = sizes
            self.kept.flush()
        sizes = self.sizes[numbers].astype(np.int64)
        return resemblances(self.kept.at(self.places[numbers], sizes), sizes, *np.split(places, 2))

    def close(self) -> None:
        self.kept.close()


def _portions(count: int) -> Iterator[slice]:
    return (slice(first, first + PORTION) for first in range(0, count, PORTION))


def _roots(parents: Any, rows: Any) -> Any:
    found = parents[rows]
    while True:
        above = parents[found]
        if (above == found).all():
            return found
        found = above


def _join(parents: Any, left: Any, right: Any) -> None:
    """Union-find on arrays: a root hangs under a lesser one until each pair has the same."""
    while True:
        one, other = _roots(parents, left), _roots(parents, right)
        apart = one != other
        if not apart.any():
            parents[left], parents[right] = one, one
            return
        np.minimum.at(parents, np.maximum(one, other)[apart], np.minimum(one, other)[apart])
