"""What one layer of a base takes to train, measured on layers of its shape with random weights.

A base repeats one layer, so a model of one layer and one of two tell what a layer costs; the real weights are not
needed for it. Uses torch's generators.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
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
from retuner.train_params import TrainParams

FEWEST_TRIES, MOST_TRIES, ENOUGH_SECONDS = 5, 20, 3.0
VOCABULARY = 64
CACHE_BYTES = 128 * 2**20
"""More than the last cache of most processors and of any GPU."""


@dataclass(frozen=True)
class LayerCost:
    """Of one layer and one token, in training with an adapter."""

    saved_bytes: float
    """What the forward pass keeps for the backward pass, weights aside."""
    forward_seconds: float
    seconds: float
    """Forward and backward."""


def layer_cost(
    base: Path, params: TrainParams, device: str, row_tokens: int, rows: int, end_to_end: bool
) -> LayerCost:
    """Of a batch of so many rows, of which one is padded where they do not lie end to end. Of the adapter's layers and
    patterns nothing counts here."""
    plain = {
        "layers": "all",
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": (),
        "init": "default",
    }
    asked = TrainParams(
        **{
            **{name: getattr(params, name) for name in TrainParams.model_fields},
            "lora": params.lora.model_copy(update=plain),
        }
    )
    return _measured(base, asked.model_dump_json(), device, row_tokens, rows, end_to_end)


@lru_cache(maxsize=8)
def _measured(
    base: Path, params: str, device: str, row_tokens: int, rows: int, end_to_end: bool
) -> LayerCost:
    asked = TrainParams.model_validate_json(params)
    while (found := _cost(base, asked, device, row_tokens, rows, end_to_end)) is None:
        rows //= 2
    return found


def _cost(
    base: Path, params: TrainParams, device: str, row_tokens: int, rows: int, end_to_end: bool
) -> LayerCost | None:
    """None where so many rows are more than a GPU holds: what trains in it may checkpoint what a probe does not."""
    import torch

    try:
        one, two = (_passes(base, layers, params, device, row_tokens, rows, end_to_end) for layers in (1, 2))
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
    """Returns what `backward` takes."""
    backward: Callable[[Any], None]


def _differences(one: _Passes, two: _Passes, device: str) -> tuple[float, float]:
    """By how many seconds `two` takes longer, forward and in both passes: the median of many tries.

    A machine that others use too is now faster, now slower. Both models are tried in turns, so that it is so for both;
    and the median, not the least, because a training meets the slow times as well. Where a layer's pass begins, the
    others of a whole model have been there since its last one, and its weights are in no cache: so it is here.
    """
    import torch

    elsewhere = torch.zeros(CACHE_BYTES, dtype=torch.uint8, device=device)

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        elsewhere.add_(1)
        return _timed(work, device)

    tries: list[tuple[float, ...]] = []
    began = time.perf_counter()
    while len(tries) < FEWEST_TRIES or (
        len(tries) < MOST_TRIES and time.perf_counter() - began < ENOUGH_SECONDS
    ):
        seconds: list[float] = []
        for each in (one, two):
            forward, hidden = timed(each.forward)
            backward, _ = timed(partial(each.backward, hidden))
            seconds += (forward, forward + backward)
        tries.append(tuple(seconds))
    one_forward, one_both, two_forward, two_both = zip(*tries, strict=True)
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

    return median(_timed(once, device)[0] for _ in range(FEWEST_TRIES)) / tokens


def _passes(
    base: Path,
    layers: int,
    params: TrainParams,
    device: str,
    row_tokens: int,
    rows: int,
    end_to_end: bool,
) -> _Passes:
    import torch

    model = _small_model(base, layers, params, device)
    by_row = end_to_end and params.attention == "sdpa" and attend_by_row(model.get_base_model())
    batch = _batch(row_tokens, rows, by_row, device) if end_to_end else _padded(row_tokens, rows, device)
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

    def backward(hidden: Any) -> None:
        hidden.float().sum().backward()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = forward()
    del hidden
    return _Passes(sum(kept.values()), forward, backward)


def _small_model(base: Path, layers: int, params: TrainParams, device: str) -> Any:
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
    return model


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


def _padded(row_tokens: int, rows: int, device: str) -> dict[str, Any]:
    """The last row lacks its last token; without any padding there would be no mask."""
    import torch

    input_ids = torch.ones(rows, row_tokens, dtype=torch.int64, device=device)
    mask = torch.ones_like(input_ids)
    if row_tokens > 1:
        mask[-1, -1] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def _timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    import torch

    finish = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
    finish()
    began = time.perf_counter()
    made = work()
    finish()
    return time.perf_counter() - began, made
