"""Liger's fused kernels for the model that trains: RMSNorm, RoPE, SwiGLU, and the head with its loss in one.

Only modules of that one model are given other `forward`s, and they are taken back once it has learned; transformers
is left as it is. So what evaluates or serves, in the same process too, computes as ever.

What has been run (tests/liger_job.py): these kernels in Triton's interpreter, on a processor and in float32, where a
training with them learns what one without learns. What has not: a GPU, and bfloat16, in which the interpreter
computes nonsense.
"""

import json
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from retuner.errors import Refused, Unavailable
from retuner.train_params import TrainParams

VERSION = "0.8.5"
"""Of liger-kernel. Up to 0.8.4 its RoPE is silently wrong where a base turns only a part of each head."""
OTHER_KERNELS = ("LIGER_KERNEL_IMPL", "LIGER_RMS_DW_REDUCTION")
"""Variables of the environment by which Liger computes otherwise."""
MODEL_TYPES = ("phi3",)


def uses_liger(params: TrainParams) -> bool:
    return params.kernels == "liger"


def require_liger(params: TrainParams) -> None:
    """Errors: Unavailable when these params need it and it is not installed."""
    if not uses_liger(params):
        return
    missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    if missing:
        found = f"needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
    elif (installed := version("liger-kernel")) != VERSION:
        found = f"needs liger-kernel {VERSION}, and {installed} is installed"
    else:
        return
    raise Unavailable(
        f"train.kernels liger {found}",
        "the extra liger, and torch's build for CUDA, which brings triton",
        "run `make setup EXTRAS=liger` (with -B where .venv is set up already) or set train.kernels to torch",
    )


def refuse_what_cannot_be_fused(base: Path, params: TrainParams, device: str) -> None:
    """`base` is the folder of a model. Errors: Refused or Unavailable."""
    if not uses_liger(params):
        return
    # Triton's way to try kernels without a GPU, many times slower. By itself it runs half of Liger's: see the tests.
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Refused(
            f"train.kernels is liger, and training runs on {device}",
            "a CUDA device",
            "set train.kernels to torch",
        )
    require_liger(params)
    if chosen := [name for name in OTHER_KERNELS if os.environ.get(name)]:
        raise Refused(
            f"{' and '.join(chosen)} would have other kernels of Liger compute, which a result does not tell of",
            "Liger's own choice",
            f"unset {' and '.join(chosen)}",
        )
    config = json.loads((base / "config.json").read_bytes())
    kind, activation = config["model_type"], config.get("hidden_act", "silu")
    if kind not in MODEL_TYPES or activation != "silu":
        raise Refused(
            f"train.kernels is liger, and the base is a {kind} with {activation}",
            f"one of {', '.join(MODEL_TYPES)} with silu",
            "set train.kernels to torch",
        )


def fuse(model: Any) -> dict[str, int]:
    """Let a model, its adapter on it, compute with Liger's kernels. Returns how many modules do, by kernel."""
    from transformers.models.phi3 import modeling_phi3

    kernels = (
        ("RMSNorm", modeling_phi3.Phi3RMSNorm, _normed),
        ("RoPE", modeling_phi3.Phi3Attention, _turning(modeling_phi3.Phi3Attention.forward)),
        ("SwiGLU", modeling_phi3.Phi3MLP, _gated),
    )
    counts = {}
    for name, kind, forward in kernels:
        modules = [module for module in model.modules() if isinstance(module, kind)]
        for module in modules:
            module.forward = MethodType(forward, module)
        counts[name] = len(modules)
    return counts


def unfuse(model: Any) -> None:
    """Take back what `fuse` did."""
    from transformers.models.phi3 import modeling_phi3

    changed = (modeling_phi3.Phi3RMSNorm, modeling_phi3.Phi3Attention, modeling_phi3.Phi3MLP)
    for module in model.modules():
        if isinstance(module, changed):
            vars(module).pop("forward", None)


def has_fused_head(model: Any, params: TrainParams) -> bool:
    """Whether the head can be one kernel with its loss: its weights are as the base has them, and do not learn."""
    import torch

    head = model.get_output_embeddings()
    return (
        uses_liger(params)
        and type(head) is torch.nn.Linear
        and not any(weight.requires_grad for weight in head.parameters())
    )


def head_nats(head: Any, hidden: Any, targets: Any, label_smoothing: float) -> Any:
    """Cross-entropy summed over the tokens of hidden (S, width) and targets (S,). Logits are made for some tokens at
    a time, and turned into their gradients where they lie."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden, head.weight, targets, head.bias, label_smoothing=label_smoothing, reduction="sum"
    )


def _normed(norm: Any, hidden: Any) -> Any:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(hidden, norm.weight, norm.variance_epsilon)


def _gated(mlp: Any, hidden: Any) -> Any:
    from liger_kernel.transformers.functional import liger_swiglu

    gate, up = mlp.gate_up_proj(hidden).chunk(2, dim=-1)
    return mlp.down_proj(liger_swiglu(gate, up))


def _turned(query: Any, key: Any, cos: Any, sin: Any) -> Any:
    """What cos and sin are not wide enough for is left as it is."""
    from liger_kernel.transformers.functional import liger_rope

    return liger_rope(query, key, cos, sin)


def _turning(attention: Any) -> FunctionType:
    """transformers' attention, for which alone the global name of its rotation means Liger's."""
    names = {**attention.__globals__, "apply_rotary_pos_emb": _turned}
    return FunctionType(attention.__code__, names, argdefs=attention.__defaults__)
