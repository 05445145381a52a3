"""Conversations as tokens, many at a time: flat arrays, as Arrow has them, and no Python list a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORE = -100
"""The label of a token without loss, as torch's cross_entropy has it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation as tokens."""

    input_ids: list[int]
    labels: list[int]
    """As long as `input_ids`: the same id where there is loss, IGNORE elsewhere."""
    stripped_chars: int
    """White space at the edges of messages that the tokenizer drops beside control tokens."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """R rows of T tokens in all, with S spans of tokens that carry loss."""

    input_ids: "NDArray[Any]"
    """(T,) int32"""
    offsets: "NDArray[Any]"
    """(R + 1,): where each row begins in `input_ids`, and T"""
    spans: "NDArray[Any]"
    """(S, 2) int32: first token of a span and the one behind its last, counted from the beginning of its row; in
    order, and never empty"""
    span_offsets: "NDArray[Any]"
    """(R + 1,): where the spans of each row begin, and S"""
    stripped_chars: "NDArray[Any]"
    """(R,) int32"""

    def __len__(self) -> int:
        return len(self.stripped_chars)

    def __iter__(self) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, row: int) -> Row:
        ids = self.input_ids[self.offsets[row] : self.offsets[row + 1]].tolist()
        labels = [IGNORE] * len(ids)
        for start, end in self.spans[self.span_offsets[row] : self.span_offsets[row + 1]].tolist():
            labels[start:end] = ids[start:end]
        return Row(ids, labels, int(self.stripped_chars[row]))

    def labels(self) -> "NDArray[Any]":
        """(T,) int32: the ids that carry loss, IGNORE elsewhere."""
        import numpy as np

        begins: Any = np.repeat(self.offsets[:-1], np.diff(self.span_offsets))
        steps: Any = np.zeros(len(self.input_ids) + 1, np.int8)
        steps[begins + self.spans[:, 0]] += 1
        steps[begins + self.spans[:, 1]] -= 1
        supervised = np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_)
        return np.where(supervised, self.input_ids, np.int32(IGNORE))
