"""An adapter on Phi-3's fused projections as one on q, k, v and gate, up, the names by which vLLM loads it.

[q; k; v] = (W + s·B·A)·x, so each of the three has the same A and its own rows of B (vllm#4715, #4915). vLLM scales
every layer by the one alpha / r of the configuration and reads no rank_pattern or alpha_pattern, so where layers differ
they are given one rank, with zeros, and B takes up what is left of their scales.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from retuner.errors import Refused
from retuner.lora_file import (
    PREFIX,
    Layer,
    LoraFile,
    read_lora,
    refuse_beyond_lora,
    target_names,
    write_lora,
)
from retuner.skeleton import empty_model

SHARED_BY = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Settings that mean the same in a Phi3Config and a LlamaConfig."""


def write_split(out: Path, base: Path, adapter: Path) -> None:
    """Errors: Refused for a base that is no Phi-3, and for an adapter that is more than LoRA."""
    import torch

    lora, fused = read_lora(adapter), empty_model(base)
    refuse_beyond_lora(lora, "vLLM's LoRA")
    with torch.device("meta"):
        llama = unfused(fused, weights=False)
    layers = {}
    for path, layer in with_one_scale(lora).items():
        for name, rows in split_rows(path, fused.config).items():
            layers[name] = layer if rows is None else replace(layer, b=layer.b[rows])
    tensors = {}
    for path, layer in layers.items():
        # What is no embedding is linear here: Phi-3 has nothing else.
        kind = "embedding_{}" if path.endswith("embed_tokens") else "{}.weight"
        tensors[f"{PREFIX}{path}.lora_{kind.format('A')}"] = layer.a.clone()
        tensors[f"{PREFIX}{path}.lora_{kind.format('B')}"] = layer.b.clone()
    candidates = [
        name
        for name, module in llama.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    one = next(iter(layers.values()))
    config = {
        **lora.config,
        "r": one.rank,
        "lora_alpha": one.alpha,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": target_names(layers, candidates),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }
    write_lora(out, tensors, config)


def with_one_scale(lora: LoraFile) -> dict[str, Layer]:
    """Layers of one rank and one alpha, which compute what they computed."""
    import torch

    layers = lora.layers
    if len({(layer.rank, layer.alpha) for layer in layers.values()}) == 1:
        return dict(layers)
    rank = max(layer.rank for layer in layers.values())
    alike = {}
    for path, layer in layers.items():
        missing = rank - layer.rank
        a = torch.cat([layer.a, layer.a.new_zeros(missing, layer.a.shape[1])])
        b = torch.cat(
            [layer.b.float() * layer.scale, layer.b.new_zeros(layer.b.shape[0], missing).float()], 1
        )
        alike[path] = Layer(a.float(), b, alpha=float(rank))
    return alike


def split_rows(path: str, config: Any) -> dict[str, slice | None]:
    """The unfused layers of one of Phi-3's, and which of its rows they are; None for all."""
    where, _, kind = path.rpartition(".")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
    half = config.intermediate_size
    if kind == "qkv_proj":
        starts = {"q_proj": 0, "k_proj": queries, "v_proj": queries + keys, "": queries + 2 * keys}
    elif kind == "gate_up_proj":
        starts = {"gate_proj": 0, "up_proj": half, "": 2 * half}
    else:
        return {path: None}
    names = list(starts)
    return {f"{where}.{name}": slice(starts[name], starts[after]) for name, after in pairwise(names)}


def unfused(model: Any, weights: bool = True) -> Any:
    """A Phi3ForCausalLM as the LlamaForCausalLM of the same function, over a copy of its weights.

    Errors: Refused for another architecture, and for what a Llama has no word for.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    if config.model_type != "phi3":
        raise Refused(
            f"the base is of the type {config.model_type}, whose projections are not Phi-3's fused ones",
            "a base of the type phi3",
            "use the adapter as it is: `retuner export` is not needed for vLLM",
        )
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        raise Refused(
            "the base turns only a part of each head (partial_rotary_factor)",
            "whole heads: no Llama could show that the split adapter computes the same",
            "export it --to merged",
        )
    llama = LlamaForCausalLM(
        LlamaConfig(**{name: getattr(config, name) for name in SHARED_BY}, attn_implementation="sdpa")
    )
    if weights:
        state = {}
        for name, weight in model.state_dict().items():
            path, _, last = name.rpartition(".")
            for part, rows in split_rows(path, config).items():
                state[f"{part}.{last}"] = weight if rows is None else weight[rows]
        llama.load_state_dict(state)
    return llama.to(model.device).eval()


def longest_prompt_tokens(config: Any) -> float:
    """Up to where a Llama, which has no sliding window, sees what a Phi-3 sees."""
    return getattr(config, "sliding_window", None) or float("inf")
