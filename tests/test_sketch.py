"""Sketches agree as often as texts resemble each other, however long the texts are."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retuner.rows import BANDS
from retuner.sketch import distinct_pairs, resemblances, sketches, word_hashes

TEXTS = 400


def texts(size: int, changed: float, seed: int) -> tuple[list[list[bytes]], list[list[bytes]]]:
    """Texts of `size` words, and copies in which a share of the words is another."""
    draw = random.Random(seed)
    first = [[b"w%d" % draw.randrange(10**9) for _ in range(size)] for _ in range(TEXTS)]
    step = round(1 / changed)
    other = [[b"x%d" % n if n % step == 1 else word for n, word in enumerate(text)] for text in first]
    return first, other


def sketched(all_texts: list[list[bytes]]):
    words, counts = word_hashes([b" ".join(text) for text in all_texts])
    return words, counts, sketches(words, counts)


@pytest.mark.parametrize("size", [6, 13, 25, 60, 130, 400])
def test_the_share_of_equal_bytes_is_the_resemblance(size):
    first, other = texts(size, 1 / 12, size)
    words, counts, made = sketched(first + other)
    left, right = np.arange(TEXTS), np.arange(TEXTS, 2 * TEXTS)
    true = resemblances(*distinct_pairs(words, counts), left, right)
    as_bytes = made.view(np.uint8)
    equal = ((as_bytes[left] == as_bytes[right]).mean(1) - 1 / 256) / (255 / 256)
    assert abs(equal.mean() - true.mean()) < 0.02
    # Nearly as exact as 128 independent permutations, less so where few pairs share bins.
    assert (equal - true).std() < 1.4 * np.sqrt(true.mean() * (1 - true.mean()) / 128)
    in_a_band = (made[left] == made[right]).any(1)
    assert abs(in_a_band.mean() - (1 - (1 - true.mean() ** 4) ** BANDS)) < 0.06


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_texts_without_a_common_pair_share_no_band(size):
    first, other = texts(size, 1.0, size)
    other = [[word[::-1] + b"y" for word in text] for text in first]
    _, _, made = sketched(first + other)
    assert made.shape == (2 * TEXTS, BANDS)
    # Any two of 800 texts, in any of 32 bands: 10^7 chances of one in 2^32.
    for band in range(BANDS):
        assert len(np.unique(made[:, band])) > 2 * TEXTS - 2


@given(
    st.lists(st.lists(st.binary(min_size=1, max_size=40).filter(lambda word: b" " not in word), max_size=6))
)
def test_equal_words_have_equal_hashes_wherever_they_stand_and_other_words_others(texts):
    hashes, counts = word_hashes([b" ".join(words) for words in texts])
    assert counts.tolist() == [len(words) for words in texts]
    of_word: dict[bytes, int] = {}
    for word, hashed in zip([word for words in texts for word in words], hashes.tolist(), strict=True):
        assert of_word.setdefault(word, hashed) == hashed == word_hashes([b"  " + word])[0][0]
    assert len(set(of_word.values())) == len(of_word)


def test_a_text_without_words_changes_no_other():
    first, _ = texts(9, 1 / 12, 3)
    _, _, alone = sketched(first)
    _, _, among = sketched([[], *first, []])
    assert (among[1:-1] == alone).all()
