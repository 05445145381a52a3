"""Rows of token ids, several to a sequence, none of which sees another.

Within a packed sequence the position ids begin at 0 with every row. With no attention mask and no cache,
transformers then lets a token attend to its own row alone, exactly, under sdpa and eager attention
(tests/test_training.py compares logits and gradients with those of the rows one by one).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_LOSS = -100
PAD_ID = 0
"""Fills sequences up. It is never attended to and carries no loss, so any id of the vocabulary will do."""
ROWS_PACKED_AT_ONCE = 10_000
"""Rows meet only rows of the same ten thousand in a sequence: memory stays bounded, and packing as tight."""


@dataclass(frozen=True)
class RowCounts:
    rows: int
    tokens: int
    supervised_tokens: int
    longest_tokens: int


def read_rows(path: Path) -> Any:
    """`input_ids` and `labels` of an Arrow stream as a datasets.Dataset, mapped, not read."""
    from datasets import Dataset

    return Dataset.from_file(str(path)).select_columns(["input_ids", "labels"])


def count_rows(rows: Any) -> RowCounts:
    import pyarrow.compute as pc

    if not len(rows):
        return RowCounts(0, 0, 0, 0)
    lengths = pc.list_value_length(rows.data.column("input_ids"))
    labels = pc.list_flatten(rows.data.column("labels"))
    supervised = pc.sum(pc.not_equal(labels, NO_LOSS)).as_py() or 0
    return RowCounts(len(rows), pc.sum(lengths).as_py(), supervised, pc.max(lengths).as_py())


def pack(rows: Any, pack_tokens: int, cache: Path) -> Any:
    """Whole rows, best fit decreasing, in sequences of at most `pack_tokens`; `seq_lengths` says where each
    row ends. No row may be longer than that: it would be cut. Written to `cache` and mapped from there."""
    from trl import pack_dataset

    settings = {
        "batch_size": ROWS_PACKED_AT_ONCE,
        "cache_file_name": str(cache),
        "load_from_cache_file": False,
    }
    return pack_dataset(rows, pack_tokens, "bfd", settings)


def collate_packed(sequences: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of packed sequences, one beside the other (B, longest of the batch): `input_ids`, `labels`,
    `position_ids`, and `tokens`, how many are not padding.

    TRL lays the batch end to end instead, where attention costs B times as much.
    """
    import torch

    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), PAD_ID)
    labels = torch.full_like(input_ids, NO_LOSS)
    # Padding counts from 0 like a row of its own, so that no token sees it.
    position_ids = torch.zeros_like(input_ids)
    for line, sequence in enumerate(sequences):
        length = len(sequence["input_ids"])
        input_ids[line, :length] = torch.tensor(sequence["input_ids"])
        labels[line, :length] = torch.tensor(sequence["labels"])
        spans = [*sequence["seq_lengths"], longest - length]
        position_ids[line] = torch.cat([torch.arange(span) for span in spans])
    # The first token of a row has nothing before it to be predicted from but another row.
    labels[position_ids == 0] = NO_LOSS
    tokens = sum(len(sequence["input_ids"]) for sequence in sequences)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "tokens": tokens}


def collator(packing: bool, attention: str) -> Any:
    """What makes a batch of rows or packed sequences. Flash attention knows rows apart only end to end."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    if packing and attention != "flash_attention_2":
        return collate_packed
    return DataCollatorForLanguageModeling(pad_token_id=PAD_ID, padding_free=packing)


def take_token_count(batch: dict[str, Any]) -> int:
    """How many tokens of a batch are not padding; what only says so is taken out."""
    if "tokens" in batch:
        return batch.pop("tokens")
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
