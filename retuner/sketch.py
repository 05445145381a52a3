"""What of a text is compared with others: its words as hashes, and a MinHash sketch of its pairs of words.

Two texts resemble each other by the Jaccard index of their sets of pairs of neighbouring words (Broder, "On the
resemblance and containment of documents", 1997). Pairs, because with one word in twelve changed they still share
0.6 of the set or more, longer shingles far less, while texts that merely have a subject in common share next to
none. A sketch holds, for each of 128 permutations, one byte of the least hash (b-bit minwise hashing: Li and König,
2010): four bytes are a band, and texts that agree in a whole band are worth comparing (Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3.4). Of pairs that resemble each other by s that is 1 - (1 - s^4)^32:
0.87 at 0.5, 0.99 at 0.6, 0.9997 at 0.7, and 0.003 at 0.1.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

import numpy as np

from retuner.rows import BANDS

PERMUTATIONS = BANDS * 4
# Capitals become small, what is no letter, digit or underscore becomes a space.
_ASCII_WORDS = bytes(
    ord(chr(byte).lower()) if chr(byte).isalnum() or byte == ord("_") else ord(" ") for byte in range(128)
) + bytes(128)
# Scripts without spaces between words: each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese, Chinese
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_NOTHING = np.uint32(0xFFFFFFFF)


def _mixed(values: Any) -> Any:
    """The finaliser of splitmix64: every bit of the value decides every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_DRAWN = (_mixed(np.arange(2 * PERMUTATIONS, dtype=np.uint64) + np.uint64(1997)) >> np.uint64(32)).astype(
    np.uint32
)
_XOR, _TIMES = _DRAWN[:PERMUTATIONS], _DRAWN[PERMUTATIONS:] | np.uint32(1)


def words_of(messages: Iterable[dict[str, str]]) -> list[bytes]:
    """What user and assistant say, word by word, in small letters. A system prompt is shared by many rows: left out."""
    said = " ".join([turn["content"] for turn in messages if turn["role"] != "system"])
    if said.isascii():
        return said.encode().translate(_ASCII_WORDS).split()
    return " ".join(_WORD.findall(said.casefold())).encode().split()


def word_hashes(words: Sequence[bytes]) -> Any:
    """One uint32 a word, the same on every machine."""
    # Words of up to four bytes never collide, others about once in 2^32 pairs.
    return np.fromiter(map(crc32, words), np.uint32, len(words))


def pair_hashes(words: Any, counts: Any) -> tuple[Any, Any]:
    """64-bit hashes of the pairs of neighbouring words of each row, and how many each row has: words less one.

    A row of one word has that word as its only pair, one of none has none.
    """
    counts = np.asarray(counts, np.int64)
    ends = np.cumsum(counts)
    pairs = words.astype(np.uint64)
    pairs[:-1] |= pairs[1:] << np.uint64(32)
    kept: Any = np.ones(len(words), bool)
    kept[ends[counts > 1] - 1] = False
    lone = ends[counts == 1] - 1
    pairs[lone] = words[lone]
    return _mixed(pairs[kept]), np.where(counts > 1, counts - 1, counts)


def sketches(words: Any, counts: Any) -> Any:
    """(rows, BANDS) uint32. Rows without words get a sketch too, which means nothing."""
    pairs, sizes = pair_hashes(words, counts)
    least: Any = np.full((PERMUTATIONS, len(sizes)), _NOTHING, np.uint32)
    filled = sizes > 0
    if len(pairs):
        hashes = (pairs >> np.uint64(32)).astype(np.uint32)
        begins = (np.cumsum(sizes) - sizes)[filled]
        drawn = np.empty_like(hashes)
        for number in range(PERMUTATIONS):
            np.bitwise_xor(hashes, _XOR[number], out=drawn)
            np.multiply(drawn, _TIMES[number], out=drawn)
            least[number, filled] = np.minimum.reduceat(drawn, begins)
    # The least of many is small, so its high bits say nothing: mix, then keep one byte.
    kept = ((least * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8)
    return np.ascontiguousarray(kept.T).view("<u4")


def resemblances(words: Any, counts: Any, left: Any, right: Any) -> Any:
    """The Jaccard index of each pair of rows; `left` and `right` number rows of `words`, fewer than 2^20 of them."""
    pairs, sizes = pair_hashes(words, counts)
    rows: Any = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    # 44 bits of the hash, so that one sort orders rows and, in them, pairs: repeated pairs then stand together.
    cut = (rows << np.uint64(44)) | (pairs >> np.uint64(20))
    cut.sort()
    cut = cut[np.concatenate([[True], cut[1:] != cut[:-1]])] if len(cut) else cut
    sizes = np.bincount((cut >> np.uint64(44)).astype(np.int64), minlength=len(sizes))
    begins = np.cumsum(sizes) - sizes
    cut &= np.uint64(2**44 - 1)
    found: Any = np.zeros(len(left), np.int64)
    step = 2**14
    for first in range(0, len(left), step):
        some = slice(first, first + step)
        merged = np.concatenate([_spread(cut, begins, sizes, rows) for rows in (left[some], right[some])])
        merged.sort()
        twice = merged[1:][merged[1:] == merged[:-1]] >> np.uint64(44)
        found[some] = np.bincount(twice.astype(np.int64), minlength=len(left[some]))
    either = sizes[left] + sizes[right] - found
    return found / np.maximum(either, 1)


def _spread(cut: Any, begins: Any, sizes: Any, rows: Any) -> Any:
    """The hashes of each of `rows`, one after the other, each under the number of its place in `rows`."""
    counts = sizes[rows]
    starts = np.cumsum(counts) - counts
    places = np.arange(int(counts.sum())) + np.repeat(begins[rows] - starts, counts)
    return cut[places] | (np.repeat(np.arange(len(rows), dtype=np.uint64), counts) << np.uint64(44))
