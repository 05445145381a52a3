"""Rows of token ids, several to a sequence, none of which sees another.

Within a packed sequence the position ids begin at 0 with every row. With no attention mask and no cache, a token
then attends to its own row alone, exactly: by `retuner.row_attention`, which is told where rows end, and by
transformers' own sdpa and eager attention (tests/test_row_attention.py and tests/test_training.py compare logits and
gradients with those of the rows one by one).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retuner.row_attention import ROW_ATTENTION

NO_LOSS = -100
PAD_ID = 0
"""Fills sequences up. It is never attended to and carries no loss, so any id of the vocabulary will do."""
PACKS_AT_ONCE = 500


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


def lay_out(rows: Any, packs: Path, cache: Path) -> tuple[Any, int]:
    """The sequences that packs.arrow plans, and of how many tokens they may be; `seq_lengths` says where each row
    of one ends. Written to `cache` and mapped from there."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset

    columns = [[_flat(chunk) for chunk in rows.data.column(name).chunks] for name in ("input_ids", "labels")]
    begins = np.cumsum([0, *(len(offsets) - 1 for offsets, _ in columns[0])])
    tokens = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": tokens, "labels": tokens, "seq_lengths": tokens})
    with (
        pa.memory_map(str(packs)) as source,
        pa.ipc.open_stream(source) as plan,
        pa.OSFile(str(cache), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as stream,
    ):
        pack_tokens = int(plan.schema.metadata[b"pack_tokens"])
        for batch in plan:
            for first in range(0, batch.num_rows, PACKS_AT_ONCE):
                ends, members = _flat(batch.column("rows").slice(first, PACKS_AT_ONCE))
                members = members[ends[0] : ends[-1]]
                chunks: Any = np.searchsorted(begins, members, side="right") - 1
                places = list(zip(chunks.tolist(), (members - begins[chunks]).tolist(), strict=True))
                laid = []
                for column in columns:
                    parts = [
                        column[chunk][1][slice(*column[chunk][0][row : row + 2])] for chunk, row in places
                    ]
                    laid.append(np.concatenate(parts))
                row_ends = np.cumsum([0, *map(len, parts)])
                bounds = ends - ends[0]
                arrays = [_listed(values, row_ends[bounds]) for values in laid]
                arrays.append(_listed(np.diff(row_ends), bounds))
                stream.write_batch(pa.record_batch(arrays, schema=schema))
    return Dataset.from_file(str(cache)), pack_tokens


def _flat(lists: Any) -> tuple[Any, Any]:
    """Offsets and values of an Arrow array of lists of int32, as they lie there."""
    import numpy as np

    _, offsets, _, values = lists.buffers()
    ends = np.frombuffer(offsets, np.int32)[lists.offset : lists.offset + len(lists) + 1]
    return ends, np.frombuffer(values, np.int32) if values else np.zeros(0, np.int32)


def _listed(values: Any, ends: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    flat = np.ascontiguousarray(values, np.int32)
    items = pa.Array.from_buffers(pa.int32(), len(flat), [None, pa.py_buffer(flat)])
    offsets = pa.py_buffer(np.ascontiguousarray(ends, np.int32))
    return pa.Array.from_buffers(pa.list_(pa.int32()), len(ends) - 1, [None, offsets], children=[items])


def collate_packed(sequences: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of packed sequences, one beside the other (B, longest of the batch): `input_ids`, `labels`,
    `position_ids`, and `tokens`, how many are not padding.

    Laid end to end, attention by a mask would cost B times as much.
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
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "tokens": _count_tokens(sequences),
    }


def collate_end_to_end(sequences: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of packed sequences as one, without padding (1, T): `input_ids`, `labels`, `position_ids`, where rows end
    as `cu_seq_lens_q` (R + 1,), their greatest length as `max_length_q`, and `tokens` as there."""
    import torch

    lengths = torch.tensor([length for sequence in sequences for length in sequence["seq_lengths"]])
    input_ids, labels = (
        torch.cat([torch.tensor(sequence[name]) for sequence in sequences])
        for name in ("input_ids", "labels")
    )
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    position_ids = torch.arange(len(input_ids)) - ends[:-1].repeat_interleave(lengths)
    labels[ends[:-1]] = NO_LOSS  # As in collate_packed.
    return {
        "input_ids": input_ids[None],
        "labels": labels[None],
        "position_ids": position_ids[None],
        "cu_seq_lens_q": ends.int(),
        "max_length_q": int(lengths.max()),
        "tokens": _count_tokens(sequences),
    }


def collator(packed: bool, attention: str) -> Any:
    """What makes a batch of rows or packed sequences for a model whose attention has that name in transformers."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    if packed and attention == ROW_ATTENTION:
        return collate_end_to_end
    if packed and attention != "flash_attention_2":
        return collate_packed
    return DataCollatorForLanguageModeling(pad_token_id=PAD_ID, padding_free=packed)


def _count_tokens(sequences: list[dict[str, Any]]) -> int:
    """Of a sequence of one token, which fills up the last batch of several processes, nothing is learned."""
    return sum(len(sequence["input_ids"]) for sequence in sequences if len(sequence["input_ids"]) > 1)


def take_token_count(batch: dict[str, Any]) -> int:
    """How many tokens of a batch are not padding; what only says so is taken out."""
    if "tokens" in batch:
        return batch.pop("tokens")
    if (mask := batch.get("attention_mask")) is None:
        return batch["input_ids"].numel()
    return int(mask[(batch["labels"] != NO_LOSS).any(dim=1)].sum())
