"""The adapter on its model: what learns, how it is written, and whether what was written is whole."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retuner.errors import RetunerError
from retuner.lora_layer import without_extra_passes
from retuner.skeleton import kind_of
from retuner.targets import Targets, pattern
from retuner.train_params import LoraParams

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

PEFT_INIT: dict[str, Any] = {
    "default": True,
    "pissa": "pissa",
    # Four iterations of a randomised SVD: seconds where the whole one takes minutes.
    "pissa_fast": "pissa_niter_4",
    "olora": "olora",
}


def put_adapter_on(model: Any, params: LoraParams, targets: Targets) -> Any:
    """The PeftModel. Draws A from torch's generator: seed it first. What learns, and what the optimizer
    keeps of it, is float32, whatever the base is in."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=list(targets.names),
        rank_pattern=pattern(targets.ranks, params.rank),
        alpha_pattern=pattern(targets.alphas, params.alpha),
        modules_to_save=list(targets.saved) or None,
        bias=params.bias,
        use_rslora=params.rslora,
        use_dora=params.dora,
        init_lora_weights=PEFT_INIT[params.init],
    )
    adapted = get_peft_model(model, config)
    # Without a name PEFT has nothing to ask the hub about when a checkpoint is saved.
    config.base_model_name_or_path = None
    _learn_in_float32(adapted)
    without_extra_passes(adapted)
    for path in targets.parts:
        weight = adapted.get_base_model().get_submodule(path).lora_B["default"].weight
        _hold_at_zero(weight, silent_rows(targets, path, weight.shape))
    return adapted


def begin_weights(adapted: Any, params: LoraParams) -> dict[str, Any]:
    """A and B as they are now, by their names in the file, where the base was changed to make room for them."""
    if params.init == "default":
        return {}
    return {
        name: weight.detach().cpu().clone()
        for name, weight in adapter_weights(adapted).items()
        if is_a(name) or is_b(name)
    }


def adapter_weights(adapted: Any) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    # "auto" would ask the hub whether the vocabulary grew.
    return get_peft_model_state_dict(adapted, save_embedding_layers=False)


def count_adapted(adapted: Any) -> dict[str, int]:
    """Kind of layer to how many of them carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = Counter(
        kind_of(name) for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)
    )
    return dict(sorted(found.items()))


def count_trainable(adapted: Any, targets: Targets) -> dict[str, int]:
    """Kind of module to how many of its numbers learn; those that are held at zero do not."""
    found: Counter[str] = Counter()
    for path, count in _trainable_by_path(adapted, targets).items():
        found[kind_of(path)] += count
    return dict(sorted(found.items()))


def describe_trainable(adapted: Any, targets: Targets) -> str:
    """For a person: `2 o_proj (1,024), 2 qkv_proj (1,536)`."""
    modules = Counter(map(kind_of, _trainable_by_path(adapted, targets)))
    counts = count_trainable(adapted, targets)
    return ", ".join(f"{modules[kind]} {kind} ({count:,})" for kind, count in counts.items())


def refuse_not_finite(adapted: Any, step: int) -> None:
    """Errors: RetunerError when a trainable weight holds a NaN or an infinity after `step`."""
    weights = adapted.named_parameters()
    if wrong := [name for name, weight in weights if weight.requires_grad and not _finite(weight)]:
        raise RetunerError(
            f"after step {step} {len(wrong)} of the adapter's weights are not finite, {wrong[0]} first",
            "finite weights",
            "lower train.learning_rate",
        )


def write_adapter(out: Path, adapted: Any, source: str, begun: Mapping[str, Any]) -> None:
    """adapter_model.safetensors and adapter_config.json, the same bytes for the same weights and params.

    `source` names the base in the configuration, where PEFT would put a path of this machine. `begun` are the
    weights of `begin_weights`: what is written is plain LoRA for the unchanged base (`on_unchanged_base`).
    Errors: RetunerError when what lies on the disk afterwards is not what was trained.
    """
    from safetensors.torch import load_file, save_file

    weights = {name: weight.detach().cpu().contiguous() for name, weight in adapter_weights(adapted).items()}
    config = adapted.peft_config["default"].to_dict()
    if begun:
        weights, config = on_unchanged_base(weights, config, begun)
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    config |= {"base_model_name_or_path": source, "inference_mode": True}
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


def on_unchanged_base(
    weights: Mapping[str, Any], config: Mapping[str, Any], begun: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """PiSSA and OLoRA trained on W - sB₀A₀. For W itself: sBA - sB₀A₀, a plain LoRA of twice the rank.

    So nothing has to find the same B₀A₀ again where the adapter is loaded. In float32 it is the same
    model to rounding; in bfloat16 the base was rounded once more while training.
    """
    import torch

    twice = dict(weights)
    for name, first in begun.items():
        pair = (weights[name], first if is_a(name) else -first)
        twice[name] = torch.cat(pair, dim=0 if is_a(name) else 1).contiguous()
    # The scale, alpha / rank or alpha / √rank, stays as it was.
    alpha = math.sqrt(2) if config["use_rslora"] else 2
    return twice, {
        **config,
        "r": 2 * config["r"],
        "lora_alpha": alpha * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in config["rank_pattern"].items()},
        "alpha_pattern": {name: alpha * each for name, each in config["alpha_pattern"].items()},
        "init_lora_weights": True,
    }


def load_weights(adapted: Any, weights: Mapping[str, Any]) -> None:
    """Put weights, by their names in the file, in the place of the adapter's own. The names must be its own."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(adapted, dict(weights))


def silent_rows(targets: Targets, path: str, shape: tuple[int, int]) -> Any:
    """Of B of a layer of which only parts learn: True where it stays zero."""
    import torch

    parts = targets.parts[path]
    mask = torch.ones(shape, dtype=torch.bool)
    rank = shape[1] // len(parts)
    for at, rows in enumerate(parts):
        mask[rows.start : rows.stop, at * rank : (at + 1) * rank] = False
    return mask


def is_a(name: str) -> bool:
    return ".lora_A." in name


def is_b(name: str) -> bool:
    return ".lora_B." in name


def _learn_in_float32(adapted: Any) -> None:
    """PEFT does so for A and B; here also biases and what learns in full, whose output stays the base's type."""
    from peft.utils import ModulesToSaveWrapper

    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            copy = module.modules_to_save["default"]
            copy.register_forward_hook(_back_to(next(copy.parameters()).dtype))
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def _back_to(dtype: Any) -> Any:
    return lambda module, inputs, output: output.to(dtype) if hasattr(output, "to") else output


def _trainable_by_path(adapted: Any, targets: Targets) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            # base_model.model.PATH.lora_A.default.weight, .modules_to_save.default.weight or .base_layer.bias
            path = name.split(".lora_")[0].split(".modules_to_save")[0]
            path = path.removesuffix(".bias").removesuffix(".base_layer").removeprefix("base_model.model.")
            found[path] += weight.numel()
    for path, parts in targets.parts.items():
        outputs = adapted.get_base_model().get_submodule(path).out_features
        rank = targets.ranks[path] // len(parts)
        found[path] -= rank * sum(outputs - len(rows) for rows in parts)
    return found


def _hold_at_zero(weight: Any, silent: Any) -> None:
    """What is zero and never has a gradient stays zero under every optimizer, weight decay or not."""
    silent = silent.to(weight.device)
    weight.register_hook(lambda gradient: gradient.masked_fill(silent, 0.0))


def _finite(weight: Any) -> bool:
    return bool(weight.isfinite().all())


def _sorted_sets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted_sets(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value
