"""Attention among the tokens of each row alone, for rows that lie end to end in one sequence.

transformers' sdpa keeps packed rows apart by a mask of all tokens by all tokens, which costs more than the rest of
a small model and rules out the fast kernels. Here a CPU takes the rows one after another, and a GPU with half
precision all of them at once in torch's varlen kernel. Nothing is computed between two rows.
"""

import json
from pathlib import Path
from typing import Any

ROW_ATTENTION = "sdpa_by_row"
"""Its name in transformers' AttentionInterface."""
MODEL_TYPES = ("phi3",)
"""Models whose attention is the softmax of scaled products, causal or within a sliding window, and nothing else."""


def attend_by_row(model: Any) -> bool:
    """Let `model`, loaded with sdpa, attend row by row. False, and nothing is changed, where that is not known to fit.

    Its batches must then come as `retuner.packing.collate_end_to_end` makes them, or with an attention mask.
    """
    if model.config.model_type not in MODEL_TYPES:
        return False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ROW_ATTENTION, attend)
    AttentionMaskInterface.register(ROW_ATTENTION, padding_mask)
    model.set_attn_implementation(ROW_ATTENTION)
    return True


def attends_by_row(base: Path, attention: str) -> bool:
    """Whether a model in the folder `base` is told where the rows of a pack end, in training with `attention`."""
    if attention == "sdpa":
        return json.loads((base / "config.json").read_bytes())["model_type"] in MODEL_TYPES
    return attention == "flash_attention_2"


def padding_mask(*, attention_mask: Any, **about: Any) -> Any:
    """sdpa's mask for rows that come with one, whether or not there is padding; rows that lie end to end need none."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **{**about, "allow_is_causal_skip": False})


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Any = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Any, None]:
    """query (1, heads, T, width), key and value (1, key heads, T, width) of rows that end where `cu_seq_lens_q`
    (R + 1,) says, the longest of `max_length_q` tokens. Returns (1, T, heads, width)."""
    import torch

    if attention_mask is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("rows without an attention mask must say where they end, in cu_seq_lens_q")
    windowed = sliding_window is not None and max_length_q > sliding_window
    if has_varlen_kernel(query, dropout):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (states.transpose(1, 2).squeeze(0) for states in (query, key, value))
        ends = cu_seq_lens_q.to(torch.int32)
        # How many tokens before its own one sees.
        before = sliding_window - 1 if windowed and sliding_window else -1
        output = varlen_attn(
            *(q, k, v, ends, ends, max_length_q, max_length_q),
            scale=scaling,
            window_size=(before, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return output.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = [_attend_within(q, k, v, sliding_window, scaling, dropout) for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def has_varlen_kernel(query: Any, dropout: float) -> bool:
    """Whether torch's varlen kernel, flash attention, takes these."""
    import torch

    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and not dropout
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_within(
    query: Any, key: Any, value: Any, window: int | None, scaling: float, dropout: float
) -> Any:
    """One row: (1, heads, L, width) to (1, L, heads, width)."""
    import torch

    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        places = torch.arange(length, device=query.device)
        back = places[:, None] - places
        mask = (back >= 0) & (back < window)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value,
        attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2)
