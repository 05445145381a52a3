"""What train shares word for word with held-out rows: conversations, prompts, runs of 13 and of 8 words.

Runs of words as for GPT-3 (Brown et al., "Language models are few-shot learners", 2020, appendix C): what user and
assistant say, in small letters and without punctuation; a run that stands in more than ten train rows is boilerplate
and does not count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retuner.near import SHOWN, Found
from retuner.rows import PARTS, Ordered, Records, parts_at_once

BOILERPLATE = 10
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


def same(rows: Ordered, field: str, usable: Any) -> Found:
    """Train rows whose `prompt` or whose `talk` is that of a held-out row.

    What stands in more than ten train groups is a greeting or the like and does not count, unless the system prompt is
    the same too.
    """
    found = Found(np.zeros(len(rows), bool))
    held = [
        np.stack([heads[field], heads["group"][:, 0], np.arange(first, first + len(heads), dtype=np.uint64)])[
            :, at
        ]
        for first, heads in rows.heads()
        if len(at := np.flatnonzero(rows.sides[first : first + len(heads)] > 0))
    ]
    if not held:
        return found
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
        matches.append(
            np.stack(
                [heads[field][at], heads["group"][at, 0], (at + first).astype(np.uint64), numbers[place[at]]]
            )
        )
    value, group, train, held_out = np.concatenate(matches, axis=1)
    pairs = np.unique(np.stack([value, group]), axis=1)
    common, counts = np.unique(pairs[0], return_counts=True)
    boilerplate = np.isin(value, common[counts > BOILERPLATE]) & ~np.isin(group, groups)
    found.add(train[~boilerplate].astype(np.int64), held_out[~boilerplate].astype(np.int64))
    return found


@dataclass(frozen=True)
class Sharing:
    """Of every train row the least held-out row that shares a run of words with it; NOBODY where there is none."""

    least: Any

    def of(self, usable: Any) -> Found:
        """The usable train rows among them."""
        found = Found((self.least != NOBODY) & usable)
        first = np.flatnonzero(found.flags)[:SHOWN]
        found.examples = list(zip(first.tolist(), self.least[first].tolist()))
        return found


class Runs:
    """The runs of words of the held-out side, and those of train that may be among them, on disk by their hashes.

    Boilerplate is what stands in too many train rows, those not counted that `usable` leaves out.
    """

    def __init__(self, rows: Ordered, usable: Any, folder: Path):
        self.count = len(rows)
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
            rare = (np.bincount(run, minlength=len(known)) <= BOILERPLATE)[run]
            np.minimum.at(least, row[rare], known_in[run[rare]].astype(np.int32))
        return Sharing(least)

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
