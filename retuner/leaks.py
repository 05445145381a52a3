"""What train shares word for word with held-out rows: conversations, prompts, runs of 13 and of 8 words.

Runs of words as for GPT-3 (Brown et al., "Language models are few-shot learners", 2020, appendix C): what user and
assistant say, in small letters and without punctuation; a run that stands in more than ten train rows is boilerplate
and does not count.
"""

from pathlib import Path
from typing import Any

import numpy as np

from retuner.near import Found
from retuner.rows import PARTS, Ordered, Records, parts_at_once

BOILERPLATE = 10
SHORT, LONG = 8, 13
GRAM = np.dtype([("hash", "<u8"), ("row", "<u4")])
FILTER_BITS = 16
MOST_FILTER_BITS = 2**28
_TIMES = np.uint64(0x9E3779B97F4A7C15)
_STEP, _OTHER = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


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


class Runs:
    """The runs of words of the held-out side, and those of train that may be among them, on disk by their hashes."""

    def __init__(self, rows: Ordered, usable: Any, folder: Path):
        self.rows, self.usable = rows, usable
        self.held_out = {size: Records(folder / f"held_out.runs{size}", GRAM) for size in (SHORT, LONG)}
        self.train = {size: Records(folder / f"train.runs{size}", GRAM) for size in (SHORT, LONG)}
        words = int(rows.word_counts(np.flatnonzero(rows.sides > 0)).sum())
        bits = min(MOST_FILTER_BITS, 1 << max(16, (words * FILTER_BITS).bit_length()))
        self.shift = np.uint32(32 - bits.bit_length() + 1)
        self.filter: Any = np.zeros(bits // 8, np.uint8)
        for is_train, side in ((False, self.held_out), (True, self.train)):
            for first, words_, counts in rows.all_words():
                self._add(side, is_train, first, words_, counts)

    def found(self, size: int, usable: Any) -> Found:
        """Train rows that share a run of `size` words with a held-out row."""
        found = Found(np.zeros(len(self.rows), bool))
        held_out, train = self.held_out[size], self.train[size]
        several = parts_at_once((held_out.count + train.count) * GRAM.itemsize)
        for part in range(0, PARTS, several):
            held, runs = held_out.part(part, several), train.part(part, several)
            if not len(held) or not len(runs):
                continue
            hashes, first = np.unique(held["hash"], return_index=True)
            numbers = held["row"][first].astype(np.int64)
            runs = runs[usable[runs["row"]]]
            place = np.minimum(np.searchsorted(hashes, runs["hash"]), len(hashes) - 1)
            shared = hashes[place] == runs["hash"]
            # A run may stand in a row several times.
            pairs = (place[shared] << 32) | runs["row"][shared]
            pairs.sort()  # and not np.unique, which hashes: that takes several times as long
            pairs = pairs[np.diff(pairs, prepend=-1) > 0]
            run, row = pairs >> 32, pairs & (2**32 - 1)
            rare = (np.bincount(run, minlength=len(hashes)) <= BOILERPLATE)[run]
            found.add(row[rare], numbers[run[rare]])
        return found

    def close(self) -> None:
        for records in (*self.held_out.values(), *self.train.values()):
            records.close()

    def _add(self, side: dict[int, Records], is_train: bool, first: int, words: Any, counts: Any) -> None:
        last = first + len(counts)
        wanted = (self.rows.sides[first:last] == 0) == is_train
        if is_train:
            wanted &= self.usable[first:last]
        ends = np.cumsum(counts)
        rest = np.repeat(np.where(wanted, ends, 0), counts) - np.arange(len(words))
        if is_train:
            at = np.flatnonzero(self._passes(words))
            at = at[rest[at] >= SHORT]
        else:
            at = np.flatnonzero(rest >= SHORT)
            self._let_pass(words, at)
        hashes = np.full(len(at), _TIMES)
        for place in range(LONG):
            if place == SHORT:
                self._write(side[SHORT], hashes, at, first, ends)
                longer = rest[at] >= LONG
                hashes, at = hashes[longer], at[longer]
            hashes = (hashes ^ words[at + place]) * _TIMES
            hashes ^= hashes >> np.uint64(29)
        self._write(side[LONG], hashes, at, first, ends)

    def _write(self, records: Records, hashes: Any, at: Any, first: int, ends: Any) -> None:
        runs: Any = np.empty(len(at), GRAM)
        runs["hash"] = hashes
        runs["row"] = first + np.searchsorted(ends, at, "right")
        records.add(runs, (hashes >> np.uint64(56)).astype(np.uint8))

    def _keys(self, words: Any) -> tuple[Any, Any]:
        """Two places in the filter for the run of eight that begins at each word (Bloom, 1970), but the last seven."""
        made = words.copy()
        for reach in (1, 2, 4):  # 2, 4, then 8 words
            times = np.uint32(pow(int(_STEP), reach, 2**32))
            made = made[:-reach] * times + made[reach:] if len(made) > reach else made[:0]
        made ^= made >> np.uint32(15)
        return (made * _STEP) >> self.shift, (made * _OTHER) >> self.shift

    def _let_pass(self, words: Any, at: Any) -> None:
        for keys in self._keys(words):
            keys = keys[at]
            np.bitwise_or.at(
                self.filter, keys >> np.uint32(3), np.uint8(1) << (keys & np.uint32(7)).astype(np.uint8)
            )

    def _passes(self, words: Any) -> Any:
        one, other = self._keys(words)
        passes = self._is_set(one)
        at = np.flatnonzero(passes)
        passes[at] = self._is_set(other[at])
        return passes

    def _is_set(self, keys: Any) -> Any:
        return (self.filter[keys >> np.uint32(3)] >> (keys & np.uint32(7)).astype(np.uint8)) & np.uint8(
            1
        ) == 1
