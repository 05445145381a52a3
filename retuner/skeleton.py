"""What a base is made of, from its config alone: nothing of its weights is read."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", "gate"),
    "up_proj": ("gate_up_proj", "up"),
}
"""Llama's names of the layers that Phi-3 has fused, and which rows of the fused ones they are. Left as they are,
they would silently adapt nothing."""


@dataclass(frozen=True)
class Skeleton:
    linear: dict[str, tuple[int, int]]
    """Path of each linear layer but the head to its inputs and outputs, in the order of the model."""
    embedding: str
    head: str
    tied: bool
    """Whether embedding and head are one matrix."""
    modules: tuple[str, ...]
    """Every module that holds weights."""
    biases: frozenset[str]
    """The modules that have a bias."""
    parts: dict[str, dict[str, range]]
    """Kind of a fused layer to the rows of its parts."""


def read_skeleton(base: Path) -> Skeleton:
    return skeleton_of(empty_model(base))


def empty_model(base: Path) -> Any:
    """The base's model without memory for its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def skeleton_of(model: Any) -> Skeleton:
    import torch

    names = {module: name for name, module in model.named_modules()}
    head = names[model.get_output_embeddings()]
    linear = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != head
    }
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads * width
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * width
    half = getattr(config, "intermediate_size", 0)
    expected = {
        "qkv_proj": {
            "q": range(queries),
            "k": range(queries, queries + keys),
            "v": range(queries + keys, queries + 2 * keys),
        },
        "gate_up_proj": {"gate": range(half), "up": range(half, 2 * half)},
    }
    return Skeleton(
        linear=linear,
        embedding=names[model.get_input_embeddings()],
        head=head,
        tied=bool(config.tie_word_embeddings),
        modules=tuple(name for name, module in model.named_modules() if name and [*module.parameters()]),
        biases=frozenset(name.rpartition(".")[0] for name, _ in model.named_parameters() if is_bias(name)),
        # Rows are only those of a part where together they are all rows.
        parts={
            kind: rows
            for kind, rows in expected.items()
            if (found := {linear[name][1] for name in linear if kind_of(name) == kind})
            and found == {max(part.stop for part in rows.values())}
        },
    )


def kind_of(path: str) -> str:
    """`qkv_proj` of `model.layers.0.self_attn.qkv_proj`."""
    return path.rpartition(".")[2]


def is_bias(name: str) -> bool:
    return kind_of(name) == "bias"


def named(name: str, paths: Iterable[str]) -> list[str]:
    """The paths that end in `name`, whole parts of a path only: PEFT's rule for a list of names."""
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def layer_index(path: str) -> int | None:
    """Of the first number in a path, which says the transformer layer; None outside of these."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found[1]) if found else None
