"""What of a text is compared with others: its words as hashes, and a MinHash sketch of its pairs of words.

Two texts resemble each other by the Jaccard index of their sets of pairs of neighbouring words (Broder, "On the
resemblance and containment of documents", 1997). Pairs, because with one word in twelve changed they still share
0.6 of the set or more, longer shingles far less, while texts that merely have a subject in common share next to
none. Each pair is hashed once and falls into one of 128 bins, which keeps its least hash (Li, Owen and Zhang, "One
permutation hashing", 2012); a bin without pairs takes the hash of another one, the first with pairs in an order of its
own (Shrivastava, "Optimal densification for fast and accurate minwise hashing", 2017). Two texts agree in a bin as
often as they resemble each other. Of each bin a sketch holds one byte (b-bit minwise hashing: Li and König,
2010): four bytes are a band, and texts that agree in a whole band are worth comparing (Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", chapter 3.4). Of pairs that resemble each other by s that is 1 - (1 - s^4)^32:
0.87 at 0.5, 0.99 at 0.6, 0.9997 at 0.7, and 0.003 at 0.1.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np

from retuner.rows import BANDS

BINS = BANDS * 4
# What is no letter, digit or underscore becomes a space; other bytes of UTF-8 stay, and the NUL between texts.
_SPACED = bytes(
    byte if byte in b"\0_" or byte > 127 or chr(byte).isalnum() else ord(" ") for byte in range(256)
)
# Scripts without spaces between words: each character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Japanese, Chinese
)
# Vowel signs, accents and the like, which \w does not know: they belong to the character before them. Of the first
# plane, that of nearly all living scripts: a class with others takes several times as long.
_MARKS = "".join(mark for mark in map(chr, range(0x300, 0x10000)) if unicodedata.category(mark)[0] == "M")
UNSPACED_WORD = rf"[{_UNSPACED}][{_MARKS}]*"
SPACED_WORD = rf"(?:[^\W{_UNSPACED}]+[{_MARKS}]*)+"
_WORD = re.compile(f"{UNSPACED_WORD}|{SPACED_WORD}")
_NOT_ASCII = re.compile(rb"(?<![^ ])[^ \x80-\xff]*+[\x80-\xff][^ ]*+")
_NOTHING = np.uint32(0xFFFFFFFF)
_ROW_AT, _PAIR = np.uint64(44), np.uint64(2**44 - 1)
_FIRST_BYTES = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)
MOST_EIGHTS = 4
"""Longer words are rare, and hashed one by one."""


def _mixed(values: Any) -> Any:
    """The finaliser of splitmix64: every bit of the value decides every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _drawn(count: int) -> Any:
    return _mixed(np.arange(count, dtype=np.uint64) + np.uint64(1997))


_TIMES = (_drawn(BINS) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
_TURNS: Any = np.argsort(_drawn(BINS * BINS).reshape(BINS, BINS), axis=1, kind="stable")
"""(BINS, BINS): for each bin the order in which it looks for another one with pairs."""


def words_in(texts: Sequence[bytes]) -> list[bytes]:
    """The words of each of some folded texts, see `retuner.naming`, with spaces between them."""
    spaced = b"\0".join(texts).translate(_SPACED).split(b"\0") if texts else []
    return [text if text.isascii() else _NOT_ASCII.sub(_words_with_others, text) for text in spaced]


def _words_with_others(found: re.Match[bytes]) -> bytes:
    return " ".join(_WORD.findall(found[0].decode())).encode()


def word_hashes(texts: Sequence[bytes]) -> tuple[Any, Any]:
    """One uint32 a word of the texts, which are as `words_in` gives them, the same on every machine; and how many words
    each text has."""
    padded = b"".join([b" ", b" ".join(texts), b" " * 8 * MOST_EIGHTS])
    letters = np.frombuffer(padded, np.uint8)
    is_space = letters == ord(" ")
    borders: Any = np.flatnonzero(is_space[1:] != is_space[:-1]) + 1
    starts, ends = borders[::2], borders[1::2]
    lengths = ends - starts
    hashes = lengths.astype(np.uint64)
    # At every byte the eight from there on, as a number.
    eights: Any = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))
    some: Any = np.arange(len(starts))
    for eight in range(MOST_EIGHTS):
        bytes_ = eights[starts[some] + 8 * eight]
        rest = lengths[some] - 8 * eight
        hashes[some] = _mixed(hashes[some] ^ (bytes_ & _FIRST_BYTES[np.minimum(rest, 8)]))
        some = some[rest > 8]
        if not len(some):
            break
    for word in some.tolist():
        hashes[word] ^= np.uint64(crc32(padded[starts[word] : ends[word]]) << 32)
    text_ends = np.cumsum([1, *[len(text) + 1 for text in texts]])
    return (hashes >> np.uint64(32)).astype(np.uint32), np.diff(np.searchsorted(starts, text_ends))


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
    rows: Any = np.repeat(np.arange(len(sizes)), sizes)
    least: Any = np.full((len(sizes), BINS), _NOTHING, np.uint32)
    bins = (pairs >> np.uint64(57)).astype(np.int64)
    np.minimum.at(least.reshape(-1), rows * BINS + bins, (pairs >> np.uint64(25)).astype(np.uint32))
    _fill(least, sizes > 0)
    # The least of many is small, so its high bits say nothing: mix, in each bin in another way, as bins that took the
    # hash of one and the same should not agree with others together. Then keep one byte.
    kept = ((least * _TIMES) >> np.uint32(24)).astype(np.uint8)
    return kept.view("<u4")


def _fill(least: Any, has_pairs: Any) -> None:
    """Give every bin without a hash that of the first in its order that has one of its own."""
    own = least.copy()
    rows, bins = np.nonzero((own == _NOTHING) & has_pairs[:, None])
    for turn in range(BINS):
        found = own[rows, _TURNS[bins, turn]]
        has = found != _NOTHING
        least[rows[has], bins[has]] = found[has]
        rows, bins = rows[~has], bins[~has]
        if not len(rows):
            break


def distinct_pairs(words: Any, counts: Any) -> tuple[Any, Any]:
    """Of each row the different pairs of neighbouring words as 44-bit hashes, rising; and how many each row has. Fewer
    than 2^20 rows."""
    pairs, sizes = pair_hashes(words, counts)
    rows: Any = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    # 44 bits of the hash, so that one sort orders rows and, in them, pairs: repeated pairs then stand together.
    pairs = (rows << _ROW_AT) | (pairs >> np.uint64(20))
    pairs.sort()
    pairs = pairs[np.concatenate([[True], pairs[1:] != pairs[:-1]])] if len(pairs) else pairs
    sizes = np.bincount((pairs >> _ROW_AT).astype(np.int64), minlength=len(sizes))
    return pairs & _PAIR, sizes


def resemblances(pairs: Any, sizes: Any, left: Any, right: Any) -> Any:
    """The Jaccard index of each two of rows, whose pairs of words are as `distinct_pairs` gives them; `left` and
    `right` number rows."""
    begins = np.cumsum(sizes) - sizes
    found: Any = np.zeros(len(left), np.int64)
    step = 2**14
    for first in range(0, len(left), step):
        some = slice(first, first + step)
        merged = np.concatenate([_spread(pairs, begins, sizes, rows) for rows in (left[some], right[some])])
        merged.sort(kind="stable")  # which merges the two halves: each is in order
        twice = merged[1:][merged[1:] == merged[:-1]] >> _ROW_AT
        found[some] = np.bincount(twice.astype(np.int64), minlength=len(left[some]))
    either = sizes[left] + sizes[right] - found
    return found / np.maximum(either, 1)


def _spread(pairs: Any, begins: Any, sizes: Any, rows: Any) -> Any:
    """The hashes of each of `rows`, one after the other, each under the number of its place in `rows`."""
    counts = sizes[rows]
    starts = np.cumsum(counts) - counts
    places = np.arange(int(counts.sum())) + np.repeat(begins[rows] - starts, counts)
    return pairs[places] | (np.repeat(np.arange(len(rows), dtype=np.uint64), counts) << _ROW_AT)
