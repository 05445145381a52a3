"""How many tokens a step of a training computes, of rows and of preference pairs, padding included."""

from dataclasses import dataclass
from typing import Any

from retuner.artifacts import Chats
from retuner.dpo import count_pairs, longer_conversations
from retuner.packing import RowCounts, count_rows, read_rows
from retuner.train_params import DpoParams, SftParams


@dataclass(frozen=True)
class StepLoad:
    counts: RowCounts
    sequences: int
    """What a batch is made of: packs, rows, or pairs."""
    batch_tokens: int
    """The most that a batch has."""
    row_tokens: int
    """How many tokens attend to one another: those of a row, or, where there is a mask, of what it is as wide as."""
    fill: float
    """Of sequences as long as any may be, how much is not padding."""
    padded: float
    """Tokens computed for each that is not padding."""
    end_to_end: bool
    """Rows lie one after another, without padding and without a mask."""


def step_load(chats: Chats, params: SftParams | DpoParams, at_once: int, by_row: bool) -> StepLoad:
    """`at_once` is how many sequences a process takes at a time, `by_row` whether the attention to be used is told
    where rows of a pack end."""
    if isinstance(params, DpoParams):
        counts = count_pairs(chats.path)
        return (
            _padded_load(counts, longer_conversations(chats.path), at_once, 2)
            if counts.rows
            else _none(counts)
        )
    rows = read_rows(chats.path / "train.arrow")
    counts, packs = count_rows(rows), chats.facts.packs
    if not counts.rows:
        return _none(counts)
    if not packs:
        return _padded_load(counts, _row_lengths(rows), at_once, 1)
    pack_tokens = round(counts.tokens / packs.count / packs.fill)
    return StepLoad(
        counts=counts,
        sequences=packs.count,
        batch_tokens=min(at_once, packs.count) * pack_tokens,
        row_tokens=max(1, round(counts.tokens / counts.rows)) if by_row else pack_tokens,
        fill=packs.fill,
        padded=1.0 if by_row else 1 / packs.fill,
        end_to_end=by_row,
    )


def _none(counts: RowCounts) -> StepLoad:
    return StepLoad(counts, 0, 0, 0, fill=0.0, padded=1.0, end_to_end=False)


def _padded_load(counts: RowCounts, lengths: Any, at_once: int, conversations: int) -> StepLoad:
    """Of sequences of `conversations` each, that are filled up to the longest of their batch."""
    at_once = min(at_once, counts.rows)
    longest = conversations * counts.longest_tokens
    return StepLoad(
        counts=counts,
        sequences=counts.rows,
        batch_tokens=at_once * longest,
        row_tokens=counts.longest_tokens,
        fill=counts.tokens / (counts.rows * longest),
        padded=conversations * _expected_longest(lengths, at_once) * counts.rows / counts.tokens,
        end_to_end=False,
    )


def _expected_longest(lengths: Any, at_once: int) -> float:
    """Mean of the greatest of `at_once` lengths that are drawn at random."""
    import numpy as np

    at_most = (np.arange(len(lengths) + 1) / len(lengths)) ** at_once
    return float((np.sort(lengths) * np.diff(at_most)).sum())


def _row_lengths(rows: Any) -> Any:
    import pyarrow.compute as pc

    return pc.list_value_length(rows.data.column("input_ids")).to_numpy()
