"""What train shares word for word with held-out rows: conversations, prompts, runs of 13 and of 8 words.

Runs of words as for GPT-3 (Brown et al., "Language models are few-shot learners", 2020, appendix C): what user and
assistant say, in small letters and without punctuation. There a run that stands in more than ten documents does not
count. Here params say in how many train rows it is a stock phrase, and rows that share nothing else are told of.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retuner.near import SHOWN, Found
from retuner.rows import PARTS, Ordered, Records, parts_at_once

SHORT, LONG = 8, 13
RUN = ("<u8", "<u4")
"""A run: its hash, and the number of the row."""
RUN_BYTES = 12
MATCHED_BYTES = 2**19
"""Of runs that are matched at once: few enough for the processor's caches."""
NOBODY = np.iinfo(np.int32).max
FILTER_BITS = 16
MOST_FILTER_BITS = 2**28
_FACTOR = 0x9E3779B97F4A7C15
_ONE, _SIX = np.uint64(1), np.uint64(63)


def same_talk(rows: Ordered, usable: Any) -> Found:
    """Train rows that are a held-out conversation but for case, white space and system prompt."""
    found = Found(np.zeros(len(rows), bool))
    found.add(*_same(rows, "talk", usable)[:2])
    return found


def same_prompt(rows: Ordered, usable: Any, most: int | None) -> Found:
    """Train rows whose prompt is that of a held-out row, but for case, white space and system prompt.

    A prompt of fewer than SHORT words under more than `most` system prompts of train is a greeting or the like, and a
    stock phrase, unless the system prompt is the same too.
    """
    found, stock = (Found(np.zeros(len(rows), bool)) for _ in range(2))
    train, held_out, value, group, is_short, has_group = _same(rows, "prompt", usable)
    is_stock: Any = np.zeros(len(train), bool)
    if most is not None:
        pairs = np.unique(np.stack([value, group]), axis=1)
        common, counts = np.unique(pairs[0], return_counts=True)
        is_stock = np.isin(value, common[counts > most]) & is_short & ~has_group
    found.add(train[~is_stock], held_out[~is_stock])
    stock.add(train[is_stock], held_out[is_stock])
    found.stock_phrases = stock
    return found


def _same(rows: Ordered, field: str, usable: Any) -> list[Any]:
    """For the usable train rows whose `prompt` or `talk` is that of a held-out row columns of: their numbers, those of
    such a held-out row, the value of the field, their group, whether their prompt is short, and whether a held-out row
    has the group too."""
    held = [
        np.stack([heads[field], heads["group"][:, 0], np.arange(first, first + len(heads), dtype=np.uint64)])[
            :, at
        ]
        for first, heads in rows.heads()
        if len(at := np.flatnonzero(rows.sides[first : first + len(heads)] > 0))
    ]
    if not held:
        return [np.zeros(0, np.int64)] * 6
    values, groups, numbers = np.concatenate(held, axis=1)
    order = np.argsort(values, kind="stable")
    values, numbers, groups = values[order], numbers[order], np.sort(groups)
    matches = []
    for first, heads in rows.heads():
        last = first + len(heads)
        place = np.minimum(np.searchsorted(values, heads[field]), len(values) - 1)
        at = np.flatnonzero(
            (values[place] == heads[field]) & usable[first:last] & (rows.sides[first:last] == 0)
        )
        train: Any = at + first
        held_out = numbers[place[at]].astype(np.int64)
        is_short = heads["asked"][at] < SHORT
        matches.append((train, held_out, heads[field][at], heads["group"][at, 0], is_short))
    *columns, group, is_short = (np.concatenate(column) for column in zip(*matches))
    return [*columns, group, is_short, np.isin(group, groups)]


@dataclass(frozen=True)
class Sharing:
    """Of every train row the least held-out row that shares a run of words with it; NOBODY where there is none."""

    least: Any
    least_stock: Any
    """Likewise of runs that are stock phrases."""

    def of(self, usable: Any) -> Found:
        """The usable train rows among them."""
        found = _first_of(self.least, usable)
        found.stock_phrases = _first_of(self.least_stock, usable & ~found.flags)
        return found


def _first_of(least: Any, usable: Any) -> Found:
    flags = (least != NOBODY) & usable
    first = np.flatnonzero(flags)[:SHOWN]
    return Found(flags, list(zip(first.tolist(), least[first].tolist())))


class Runs:
    """The runs of words of the held-out side, and those of train that may be among them, on disk by their hashes.

    Stock phrases are what stands in more than `most` train rows, those not counted that `usable` leaves out.
    """

    def __init__(self, rows: Ordered, usable: Any, most: int | None, folder: Path):
        self.count, self.most = len(rows), len(rows) if most is None else most
        self.held_out = {size: Records(folder / f"held_out.runs{size}", RUN) for size in (SHORT, LONG)}
        self.train = {size: Records(folder / f"train.runs{size}", RUN) for size in (SHORT, LONG)}
        words = int(rows.word_counts[rows.sides > 0].sum(dtype=np.int64))
        bits = min(MOST_FILTER_BITS, 1 << max(16, (words * FILTER_BITS).bit_length()))
        self.shift = np.uint64(64 - (bits // 64).bit_length() + 1)
        self.filter: Any = np.zeros(bits // 64, np.uint64)
        for numbers, words_, counts in rows.all_words(rows.sides > 0):
            self._add(self.held_out, self._let_pass, numbers, words_, counts)
        for numbers, words_, counts in rows.all_words((rows.sides == 0) & usable):
            self._add(self.train, self._passes, numbers, words_, counts)

    def sharing(self, size: int) -> Sharing:
        """For runs of SHORT or LONG words."""
        least: Any = np.full(self.count, NOBODY, np.int32)
        least_stock = least.copy()
        held_out, train = self.held_out[size], self.train[size]
        several = parts_at_once((held_out.count + train.count) * RUN_BYTES, MATCHED_BYTES)
        for part in range(0, PARTS, several):
            (known, known_in), (hashes, rows) = held_out.part(part, several), train.part(part, several)
            if not len(known) or not len(hashes):
                continue
            order = np.lexsort((known_in, known))
            order = order[np.diff(known[order], prepend=known[order[0]] - _ONE) > 0]
            known, known_in = known[order], known_in[order]
            place = _places(known, hashes, part, several)
            at = np.flatnonzero(known[place] == hashes)
            # A run may stand in a row several times.
            pairs = (place[at] << 32) | rows[at]
            pairs.sort()  # and not np.unique, which hashes: that takes several times as long
            pairs = pairs[np.diff(pairs, prepend=-1) > 0]
            run, row = pairs >> 32, pairs & (2**32 - 1)
            rare = (np.bincount(run, minlength=len(known)) <= self.most)[run]
            for found, some in ((least, rare), (least_stock, ~rare)):
                np.minimum.at(found, row[some], known_in[run[some]].astype(np.int32))
        return Sharing(least, least_stock)

    def close(self) -> None:
        for records in (*self.held_out.values(), *self.train.values()):
            records.close()

    def _add(
        self, side: dict[int, Records], chosen: Callable[[Any], Any], rows: Any, words: Any, counts: Any
    ) -> None:
        """`chosen` says for hashes of runs of eight which of them to keep; it is asked about those that reach into the
        next row too."""
        if len(words) < SHORT:
            return
        # Sums of words times powers of an odd number, modulo 2^64: of 2 words, of 4, of 8.
        sums = [words.astype(np.uint64)]
        for reach in (1, 2, 4):
            left, right = sums[-1][:-reach], sums[-1][reach:]
            sums.append(left * _times(reach) + right)
        ends = np.cumsum(counts)
        short = _mixed(sums[3])
        whole: Any = np.ones(len(words), bool)
        whole[_behind(ends, SHORT)] = False
        at = np.flatnonzero(chosen(short) & whole[: len(short)])
        row: Any = np.repeat(np.arange(len(counts)), counts)[at]
        self._write(side[SHORT], short[at], rows[row])
        longer = at + LONG <= ends[row]
        at, row = at[longer], row[longer]
        long = (sums[3][at] * _times(4) + sums[2][at + 8]) * _times(1) + sums[0][at + 12]
        self._write(side[LONG], _mixed(long), rows[row])

    def _write(self, records: Records, hashes: Any, rows: Any) -> None:
        records.add([hashes, rows.astype("<u4")], (hashes >> np.uint64(56)).astype(np.uint8))

    # A Bloom filter (Bloom, 1970) whose two bits are in one word (Putze, Sanders and Singler, 2007).

    def _bits(self, hashes: Any) -> tuple[Any, Any]:
        """The word of each hash, and which two bits of it."""
        low, high = hashes & _SIX, (hashes >> np.uint64(6)) & _SIX
        return (hashes >> self.shift).view(np.int64), (_ONE << low) | (_ONE << high)

    def _let_pass(self, hashes: Any) -> Any:
        """From now on; and of the held-out side's own all are kept."""
        words, bits = self._bits(hashes)
        np.bitwise_or.at(self.filter, words, bits)
        return np.ones(len(hashes), bool)

    def _passes(self, hashes: Any) -> Any:
        words, bits = self._bits(hashes)
        return self.filter.take(words) & bits == bits


def longest_shared(one: Sequence[bytes], other: Sequence[bytes], size: int) -> Sequence[bytes]:
    """Of the runs of `size` words and more that stand in both the longest; where the second text repeats its beginning,
    as far as it goes at the first place."""
    places = {tuple(other[at : at + size]): at for at in reversed(range(len(other) - size + 1))}
    best: Sequence[bytes] = []
    at = 0
    while at <= len(one) - size:
        place = places.get(tuple(one[at : at + size]))
        if place is None:
            at += 1
            continue
        length = size
        while other[place + length : place + length + 1] == one[at + length : at + length + 1] != []:
            length += 1
        best = max(best, one[at : at + length], key=len)
        at += length - size + 1
    return best


def _places(known: Any, hashes: Any, part: int, parts: int) -> Any:
    """Where in `known`, which rises, each of some hashes would be put, but never behind the last; all of them are of
    `parts` parts from `part` on. What np.searchsorted finds, by way of a table of where known ones with the same first
    bits begin, which takes a sixth of the time for hashes in no order."""
    bits = (4 * len(known)).bit_length()
    low, shift = np.uint64(part << 56), np.uint64(56 + parts.bit_length() - 1 - bits)
    first = ((known - low) >> shift).view(np.int64)
    begins = np.cumsum(np.bincount(first + 1, minlength=(1 << bits) + 1)[: 1 << bits])
    last = len(known) - 1
    places = np.minimum(begins.take(((hashes - low) >> shift).view(np.int64)), last)
    behind = np.flatnonzero(known.take(places) < hashes)
    while len(behind):
        places[behind] += 1
        behind = behind[places[behind] <= last]
        behind = behind[known[places[behind]] < hashes[behind]]
    return np.minimum(places, last)


def _times(words: int) -> Any:
    """What a sum is multiplied by when so many words follow it."""
    return np.uint64(pow(_FACTOR, words, 2**64))


def _mixed(sums: Any) -> Any:
    mixed = (sums ^ (sums >> np.uint64(32))) * np.uint64(_FACTOR)
    return mixed ^ (mixed >> np.uint64(29))


def _behind(ends: Any, size: int) -> Any:
    """The places from which fewer than `size` words are left of a row, by where rows end."""
    places = ends[:, None] - np.arange(1, size)
    return places[places >= 0]
