"""What one layer of a base takes to train, measured on layers of its shape with random weights.

A base repeats one layer, so a model of one layer and one of two tell what a layer costs; the real weights are not
needed for it. Uses torch's generators.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import sub
from pathlib import Path
from statistics import median
from typing import Any

from retuner.errors import Refused
from retuner.float8 import hold_in_float8, uses_float8
from retuner.fused_kernels import fuse, uses_liger
from retuner.lora import put_adapter_on
from retuner.row_attention import attend_by_row
from retuner.skeleton import skeleton_of
from retuner.targets import choose_targets
from retuner.train_params import SftParams

FEWEST_TRIES, MOST_TRIES, ENOUGH_SECONDS = 5, 40, 3.0
VOCABULARY = 64


@dataclass(frozen=True)
class LayerCost:
    """Of one layer and one token, in training with an adapter."""

    saved_bytes: float
    """What the forward pass keeps for the backward pass, weights aside."""
    forward_seconds: float
    seconds: float
    """Forward and backward."""


@lru_cache(maxsize=8)
def layer_cost(base: Path, params: str, device: str, row_tokens: int, rows: int) -> LayerCost:
    """`params` is an SftParams as JSON; of its adapter's layers and patterns nothing counts here. Rows lie end to
    end."""
    asked = SftParams.model_validate_json(params)
    lora = asked.lora.model_copy(
        update={
            "layers": "all",
            "rank_pattern": {},
            "alpha_pattern": {},
            "modules_to_save": (),
            "init": "default",
        }
    )
    asked = asked.model_copy(update={"lora": lora})
    while (found := _cost(base, asked, device, row_tokens, rows)) is None:
        rows //= 2
    return found


def _cost(base: Path, params: SftParams, device: str, row_tokens: int, rows: int) -> LayerCost | None:
    """None where so many rows are more than a GPU holds: what trains in it may checkpoint what a probe does not."""
    import torch

    try:
        one, two = (_passes(base, layers, params, device, row_tokens, rows) for layers in (1, 2))
        kept = one.kept_bytes, two.kept_bytes
        forward, both = _differences(one, two, device)
    except torch.OutOfMemoryError:
        if rows == 1:
            raise
        return None
    finally:
        if device != "cpu":
            one = two = None  # type: ignore[assignment]
            gc.collect()  # with other kernels a model and its methods point at each other
            torch.cuda.empty_cache()
    tokens = row_tokens * rows
    return LayerCost((kept[1] - kept[0]) / tokens, forward / tokens, both / tokens)


@dataclass(frozen=True)
class _Passes:
    """Of one small model and one batch."""

    kept_bytes: int
    forward: Callable[[], Any]
    both: Callable[[], Any]


def _differences(one: _Passes, two: _Passes, device: str) -> tuple[float, float]:
    """By how many seconds `two` takes longer, forward and in both passes: the median of many tries.

    A machine that others use too is now faster, now slower. Both models are tried in turns, so that it is so for both;
    and the median, not the least, because a training meets the slow times as well.
    """
    tries: list[list[float]] = []
    began = time.perf_counter()
    while len(tries) < FEWEST_TRIES or (
        len(tries) < MOST_TRIES and time.perf_counter() - began < ENOUGH_SECONDS
    ):
        tries.append([_timed(work, device) for work in (one.forward, two.forward, one.both, two.both)])
    one_forward, two_forward, one_both, two_both = zip(*tries, strict=True)
    # Noise can make two layers look cheaper than one; a layer costs at least a third of a model of one.
    return tuple(  # type: ignore[return-value]
        max(median(map(sub, second, first)), median(first) / 3)
        for first, second in ((one_forward, two_forward), (one_both, two_both))
    )


def head_seconds(hidden: int, vocabulary: int, precision: str, device: str, tokens: int) -> float:
    """Of one supervised token: its logits, their loss, and back."""
    import torch

    dtype = getattr(torch, precision)
    states = torch.full((tokens, hidden), 0.01, dtype=dtype, device=device, requires_grad=True)
    head = torch.full((vocabulary, hidden), 0.01, dtype=dtype, device=device)
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)

    def once() -> None:
        logits = torch.nn.functional.linear(states, head).float()
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()

    return median(_timed(once, device) for _ in range(FEWEST_TRIES)) / tokens


def _passes(base: Path, layers: int, params: SftParams, device: str, row_tokens: int, rows: int) -> _Passes:
    import torch

    model, by_row = _small_model(base, layers, params, device)
    batch = _batch(row_tokens, rows, by_row, device)
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def forward() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=params.precision == "bfloat16"):
            return model.get_base_model().base_model(**batch, use_cache=False).last_hidden_state

    def both() -> None:
        forward().float().sum().backward()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = forward()
    del hidden
    return _Passes(sum(kept.values()), forward, both)


def _small_model(base: Path, layers: int, params: SftParams, device: str) -> tuple[Any, bool]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
    config.num_hidden_layers = layers
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:layers]
    config.vocab_size = VOCABULARY
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    small = AutoModelForCausalLM.from_config(
        config,
        dtype=getattr(torch, params.precision),
        attn_implementation=params.attention,
        trust_remote_code=False,
    ).to(device)
    by_row = params.attention == "sdpa" and attend_by_row(small)
    lora = params.lora
    try:
        targets = choose_targets(lora, skeleton_of(small))
    except Refused:  # names of single layers, which there are none of here
        lora = lora.model_copy(update={"targets": "all-linear"})
        targets = choose_targets(lora, skeleton_of(small))
    model = put_adapter_on(small, lora, targets).train()
    if uses_float8(params):
        hold_in_float8(model)
    if uses_liger(params):
        fuse(model)
    return model, by_row


def _batch(row_tokens: int, rows: int, by_row: bool, device: str) -> dict[str, Any]:
    import torch

    if not by_row:
        return {"input_ids": torch.ones(rows, row_tokens, dtype=torch.int64, device=device)}
    ends = torch.arange(rows + 1, dtype=torch.int32, device=device) * row_tokens
    return {
        "input_ids": torch.ones(1, rows * row_tokens, dtype=torch.int64, device=device),
        "position_ids": torch.arange(row_tokens, device=device).repeat(rows)[None],
        "cu_seq_lens_q": ends,
        "max_length_q": row_tokens,
    }


def _timed(work: Any, device: str) -> float:
    import torch

    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
