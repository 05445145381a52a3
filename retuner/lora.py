"""The adapter: which layers it sits on, how it is written, and whether what was written is whole."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from retuner.errors import Refused, RetunerError
from retuner.params import LoraParams

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Llama's names of the layers that Phi-3 has fused. Left as they are, they would silently adapt nothing."""


def linear_layers(base: Path) -> list[str]:
    """Paths of the base's linear layers, the output head left out, from its config alone.

    An adapter on the head would never be trained: TRL computes the loss from the head's weight directly.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def choose_targets(
    asked: str | Sequence[str], layers: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The layer names to adapt, sorted, and those of Llama that were translated.

    Errors: Refused when a name matches no layer, whatever the other names do.
    """
    kinds = sorted({_kind(layer) for layer in layers})
    if isinstance(asked, str):
        return tuple(kinds), {}
    translated = {
        name: FUSED[name]
        for name in asked
        if not _matches(name, layers) and name in FUSED and _matches(FUSED[name], layers)
    }
    targets = {translated.get(name, name) for name in asked}
    if unknown := sorted(name for name in targets if not _matches(name, layers)):
        raise Refused(
            f"train.lora.targets names {', '.join(unknown)}, and this base has no linear layer of that name",
            f"all-linear, or some of {', '.join(kinds)}",
            "correct train.lora.targets",
        )
    return tuple(sorted(targets)), translated


def put_adapter_on(model: Any, params: LoraParams, targets: Sequence[str]) -> Any:
    """The PeftModel. Draws A from torch's generator: seed it first. Its weights and what the optimizer
    keeps of them are float32, whatever the base is in."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=list(targets),
        bias=params.bias,
        use_rslora=params.rslora,
        use_dora=params.dora,
    )
    adapted = get_peft_model(model, config)
    # Without a name PEFT has nothing to ask the hub about when a checkpoint is saved.
    config.base_model_name_or_path = None
    return adapted


def count_adapted(adapted: Any) -> dict[str, int]:
    """Kind of layer to how many of them carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = Counter(
        _kind(name) for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)
    )
    return dict(sorted(found.items()))


def refuse_not_finite(adapted: Any, step: int) -> None:
    """Errors: RetunerError when a trainable weight holds a NaN or an infinity after `step`."""
    weights = adapted.named_parameters()
    if wrong := [name for name, weight in weights if weight.requires_grad and not _finite(weight)]:
        raise RetunerError(
            f"after step {step} {len(wrong)} of the adapter's weights are not finite, {wrong[0]} first",
            "finite weights",
            "lower train.learning_rate",
        )


def write_adapter(out: Path, adapted: Any, source: str) -> None:
    """adapter_model.safetensors and adapter_config.json, the same bytes for the same weights and params.

    `source` names the base in the configuration, where PEFT would put a path of this machine.
    Errors: RetunerError when what lies on the disk afterwards is not what was trained.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    weights = {
        name: weight.detach().cpu().contiguous()
        # "auto" would ask the hub whether the vocabulary grew.
        for name, weight in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    config = {
        **adapted.peft_config["default"].to_dict(),
        "base_model_name_or_path": source,
        "inference_mode": True,
    }
    text = json.dumps(_sorted_sets(config), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (out / CONFIG).write_text(text + "\n", encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        (out / name).chmod(0o644)  # safetensors writes 0600

    written = load_file(out / WEIGHTS)
    if written.keys() != weights.keys():
        raise RetunerError(
            f"{WEIGHTS} was written without {', '.join(sorted(weights.keys() ^ written.keys()))}"
        )
    if wrong := [name for name in written if not _finite(written[name])]:
        raise RetunerError(f"the trained adapter holds numbers that are not finite, in {wrong[0]}")
    if wrong := [name for name in written if not written[name].equal(weights[name])]:
        raise RetunerError(f"{WEIGHTS} was written with other numbers than were trained, in {wrong[0]}")


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]


def _matches(target: str, layers: Iterable[str]) -> bool:
    """PEFT's rule for a list of names."""
    return any(layer == target or layer.endswith(f".{target}") for layer in layers)


def _finite(weight: Any) -> bool:
    return bool(weight.isfinite().all())


def _sorted_sets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted_sets(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value
