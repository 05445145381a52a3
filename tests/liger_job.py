"""`python liger_job.py FOLDER`: Liger's kernels against torch on a processor, in Triton's interpreter.

FOLDER has the inputs of `training_job`. Prints one JSON object: what each test of `test_liger.py` looks at.

The interpreter lacks two things that Liger's kernels need and a compiler has: floats among the arguments that are
tensors, and libdevice's rsqrt. They are added here; the kernels themselves are as they were installed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Before Triton is imported.

import numpy as np
import pair_job
import torch
import triton
import triton.language as tl
from safetensors.torch import load_file
from training_job import params, random_rows, run
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.phi3 import modeling_phi3
from triton.language.extra import libdevice
from triton.runtime import interpreter

as_they_are = interpreter._implicit_cvt


def with_fractions(argument: Any) -> Any:
    if isinstance(argument, float):
        number = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(number, tl.float32)
    return as_they_are(argument)


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


interpreter._implicit_cvt = with_fractions
libdevice.rsqrt = rsqrt

from retuner.fused_kernels import fuse, has_fused_head, unfuse  # noqa: E402
from retuner.layer_probe import layer_cost  # noqa: E402
from retuner.lora import WEIGHTS, put_adapter_on  # noqa: E402
from retuner.packing import collate_end_to_end  # noqa: E402
from retuner.row_attention import attend_by_row  # noqa: E402
from retuner.row_trainer import supervised_loss  # noqa: E402
from retuner.skeleton import skeleton_of  # noqa: E402
from retuner.targets import choose_targets  # noqa: E402

ROWS = random_rows(4, longest=14, seed=3)
BASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a half of each head turns": {"partial_rotary_factor": 0.5},
    "heads share keys, and see 5 tokens": {"num_key_value_heads": 2, "sliding_window": 5},
}
ASKED: dict[str, dict[str, Any]] = {
    "dora": {"lora": {"dora": True}},
    "a norm that learns": {"lora": {"modules_to_save": ("norm",)}},
    "label smoothing": {"label_smoothing": 0.1},
    "checkpointed activations": {"gradient_checkpointing": True},
}


def adapted(folder: Path, asked: Any, config: dict[str, Any]) -> Any:
    """A model of random weights, its adapter too, that attends row by row."""
    shape = AutoConfig.from_pretrained(str(folder / "base"))
    for name, value in config.items():
        if name == "partial_rotary_factor":
            shape.rope_parameters = {**shape.rope_parameters, name: value}
        else:
            setattr(shape, name, value)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation="sdpa")
    assert attend_by_row(base)
    model = put_adapter_on(base, asked.lora, choose_targets(asked.lora, skeleton_of(base))).train()
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = 0.05 * torch.randn(weight.shape) + (weight.dim() == 1)
    if asked.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def outcome(model: Any, asked: Any) -> tuple[Any, dict[str, Any], set[str]]:
    """The loss, the gradients of what learns, and the names of Liger's functions that computed it."""
    sequence = {
        "input_ids": [token for ids, _ in ROWS for token in ids],
        "labels": [label for _, labels in ROWS for label in labels],
        "seq_lengths": [len(ids) for ids, _ in ROWS],
    }
    batch = collate_end_to_end([sequence])
    batch.pop("tokens")
    model.zero_grad()
    fused = has_fused_head(model, asked)
    loss = supervised_loss(model.get_base_model(), batch, 7, asked.label_smoothing, fused)
    used = ligers(loss)
    loss.backward()
    return loss.detach(), {n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad}, used


def of_a_blank(folder: Path) -> tuple[float, float]:
    """The loss and the largest gradient of a batch without a supervised token, which a process may get that has
    fewer sequences than others."""
    asked = params(kernels="liger")
    model = adapted(folder, asked, {})
    fuse(model)
    batch = collate_end_to_end([{"input_ids": [5, 6], "labels": [-100, -100], "seq_lengths": [2]}])
    batch.pop("tokens")
    loss = supervised_loss(model.get_base_model(), batch, 7, fused=has_fused_head(model, asked))
    loss.backward()
    return float(loss), max(float(w.grad.abs().max()) for w in model.parameters() if w.requires_grad)


def ligers(loss: Any) -> set[str]:
    found, waiting, seen = set(), [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Liger" in type(node).__name__:
            found.add(type(node).__name__.removeprefix("Liger").removesuffix("FunctionBackward"))
        waiting += [following for following, _ in node.next_functions]
    return found


def apart(one: Any, other: Any) -> float:
    """The largest difference, as a part of the largest number."""
    return float((one - other).abs().max() / other.abs().max())


def compared(folder: Path, changed: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    changed = {**changed, "lora": {"dropout": 0.0, **changed.get("lora", {})}}
    plain, asked = params(**changed), params(**changed, kernels="liger")
    model = adapted(folder, asked, config)
    by_torch = outcome(model, plain)
    counts = fuse(model)
    by_liger = outcome(model, asked)
    unfuse(model)
    again = outcome(model, plain)
    return {
        "counts": counts,
        "used": sorted(by_liger[2]),
        "loss apart": apart(by_liger[0], by_torch[0]),
        "gradients apart": {name: apart(by_liger[1][name], grad) for name, grad in by_torch[1].items()},
        "put back": not again[2] and all(torch.equal(again[1][n], grad) for n, grad in by_torch[1].items()),
    }


def trained(folder: Path) -> dict[str, Any]:
    """A whole training with these kernels and one without, in one process, and what transformers is afterwards."""
    short = {"max_steps": 3, "batch_size": 1, "checkpoint_every_steps": 2, "learning_rate": 1e-3}
    short["stop_early"] = {"every_steps": 2, "patience": 2, "min_improvement": 0.0}
    of_transformers = (modeling_phi3.apply_rotary_pos_emb, modeling_phi3.Phi3Attention.forward)
    story = {}
    for kernels in ("liger", "torch"):
        facts = run(folder, params(**short, kernels=kernels), out=f"out-{kernels}", work=f"work-{kernels}")
        story[kernels] = {"loss": facts.final_loss, "told": facts.effective.get("kernels")}
    one, other = (load_file(folder / f"out-{kernels}" / WEIGHTS) for kernels in ("liger", "torch"))
    story["weights apart"] = max(float((one[name] - weight).abs().max()) for name, weight in other.items())
    now = (modeling_phi3.apply_rotary_pos_emb, modeling_phi3.Phi3Attention.forward)
    return {**story, "transformers is as it was": now == of_transformers}


def preferring(folder: Path) -> dict[str, Any]:
    """The same from preference pairs, with TRL's copy of the adapter on the way."""
    pair_job.make_inputs(folder, pair_job.random_pairs(4))
    story = {}
    for kernels in ("liger", "torch"):
        asked = pair_job.params({"dropout": 0.0}, max_steps=2, gradient_accumulation=1, kernels=kernels)
        facts = pair_job.run(folder, asked, out=f"out-{kernels}", work=f"work-{kernels}")
        story[kernels] = {"loss": facts.final_loss, "told": facts.effective.get("kernels")}
    return story


def probed(folder: Path) -> dict[str, float]:
    """Bytes a token that a layer keeps, by kernels."""
    return {
        kernels: layer_cost(
            folder / "base", params(kernels=kernels), "cpu", 8, 4, end_to_end=True
        ).saved_bytes
        for kernels in ("torch", "liger")
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    inputs = Path(sys.argv[1])
    print(
        json.dumps(
            {
                "bases": {name: compared(inputs, {}, config) for name, config in BASES.items()},
                "asked": {name: compared(inputs, changed, {}) for name, changed in ASKED.items()},
                "blank": of_a_blank(inputs),
                "trained": trained(inputs),
                "preferring": preferring(inputs / "pairs"),
                "probed": probed(inputs),
            }
        )
    )
