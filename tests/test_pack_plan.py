"""Rows share sequences as tightly as best fit decreasing packs them, whole, and the same way every time."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retuner.pack_plan import plan_packs, write_packs

CASES = st.integers(8, 60).flatmap(
    lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), min_size=1, max_size=80))
)


def rooms_left(lengths: list[int], pack_tokens: int) -> list[int]:
    """Best fit decreasing, a row at a time."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, pack) for pack, room in enumerate(left) if room >= length]
        if fitting:
            left[min(fitting)[1]] -= length
        else:
            left.append(pack_tokens - length)
    return sorted(left)


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_many_rows_at_a_time_is_best_fit_decreasing_one_at_a_time(case):
    pack_tokens, lengths = case
    pack_of = plan_packs(np.array(lengths), pack_tokens)
    filled = np.bincount(pack_of, weights=lengths).astype(int)
    assert sorted((pack_tokens - filled).tolist()) == rooms_left(lengths, pack_tokens)


@pytest.mark.parametrize(("mean", "pack_tokens"), [(40, 512), (300, 512), (300, 2048), (2000, 2048)])
def test_packs_are_at_least_as_full_as_trl_packs_them(mean, pack_tokens):
    from datasets import Dataset
    from trl import pack_dataset

    draw = np.random.default_rng(mean)
    lengths = draw.lognormal(np.log(mean), 0.7, 800).astype(int).clip(1, pack_tokens)
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    theirs = pack_dataset(rows, pack_tokens, "bfd", {"batch_size": len(lengths)})
    assert plan_packs(lengths, pack_tokens).max() + 1 <= len(theirs)


def test_the_plan_lists_every_row_once_in_order_and_names_the_room(tmp_path):
    lengths = np.array([5, 8, 3, 8, 2, 1, 4])
    path = tmp_path / "packs.arrow"
    assert write_packs(path, plan_packs(lengths, 8), 8) == 4
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
    assert table.column("rows").to_pylist() == [[1], [3], [0, 2], [4, 5, 6]]
    assert table.schema.metadata == {b"pack_tokens": b"8"}


def test_a_hundred_thousand_rows_of_a_long_context_are_planned_from_their_lengths():
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 100_000).astype(int).clip(1, 4096)
    pack_of = plan_packs(lengths, 131_072)
    filled = np.bincount(pack_of, weights=lengths)
    assert filled.max() <= 131_072
    assert filled.sum() / (len(filled) * 131_072) > 0.99
    assert (plan_packs(lengths, 131_072) == pack_of).all()
