"""A LoRA adapter as it lies in a folder, for those who write it in another shape.

LoRA (Hu et al. 2021) adds s·B·A to a frozen weight W, with s = alpha / rank; rsLoRA (Kalajdzievski 2023) has
s = alpha / √rank, which is the same as LoRA with alpha·√rank.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retuner.errors import Refused
from retuner.lora import CONFIG, WEIGHTS

PREFIX = "base_model.model."
_PAIRED = re.compile(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_BIAS = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.bias")


@dataclass(frozen=True)
class Layer:
    """A and B of one layer, as PEFT shapes them."""

    a: Any
    """(rank, inputs); of a convolution (rank, inputs, k, k); of an embedding (rank, rows)."""
    b: Any
    """(outputs, rank); of a convolution (outputs, rank, 1, 1); of an embedding (width, rank)."""
    alpha: float
    """So that B·A is multiplied by alpha / rank, whether or not this was rsLoRA."""

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoraFile:
    config: dict[str, Any]
    layers: dict[str, Layer]
    """By the path of the base's layer."""
    biases: dict[str, Any]
    """What the base's biases became, by the path of their layer."""
    others: tuple[str, ...]
    """Names of the tensors that are neither: magnitudes of DoRA, whole modules."""


def read_lora(folder: Path) -> LoraFile:
    """Errors: Refused for what is no whole LoRA adapter of finite numbers."""
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / WEIGHTS)
        if json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"] != "LORA":
            raise ValueError("its peft_type is not LORA")
        # Through PEFT, which fills in what older versions of it did not write.
        config = LoraConfig.from_pretrained(str(folder)).to_dict()
        if type(config["r"]) is not int or not config["target_modules"]:
            raise ValueError("its r is no whole number, or its target_modules are missing")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise Refused(
            f"the adapter in {folder.name}/ cannot be read: {error!r:.160}",
            f"{WEIGHTS} and {CONFIG}, as PEFT saves them",
            "use a folder that `train`, `import` or PEFT's save_pretrained wrote",
        ) from None
    refuse_not_finite(tensors, f"the adapter in {folder.name}/")
    pairs: dict[str, dict[str, Any]] = {}
    biases, others = {}, []
    for name, tensor in tensors.items():
        if found := _PAIRED.fullmatch(name):
            pairs.setdefault(found[1], {})[found[3]] = tensor
        elif config["bias"] != "none" and (found := _BIAS.fullmatch(name)) and ".lora_" not in name:
            biases[found[1]] = tensor
        else:
            others.append(name)
    layers = {}
    for path, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise Refused(f"the adapter in {folder.name}/ has only one of A and B for {path}", "both")
        rank = pair["A"].shape[0]
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns, path), config["lora_alpha"])
        layers[path] = Layer(pair["A"], pair["B"], alpha * math.sqrt(rank) if config["use_rslora"] else alpha)
    if not layers:
        raise Refused(f"the adapter in {folder.name}/ has no LoRA layers", "A and B of at least one layer")
    return LoraFile(config, layers, biases, tuple(others))


def refuse_beyond_lora(lora: LoraFile, shape: str, biases: bool = False) -> None:
    """Errors: Refused when the adapter holds more than A, B (and `biases`), for which `shape` has no place."""
    beyond = []
    if lora.config.get("use_dora"):
        beyond.append("DoRA's magnitudes")
    if saved := lora.config.get("modules_to_save"):
        beyond.append(f"whole modules ({', '.join(saved)})")
    if lora.biases and not biases:
        beyond.append("trained biases")
    if lora.others and not beyond:
        beyond.append(lora.others[0])
    if beyond:
        raise Refused(
            f"the adapter has {' and '.join(beyond)}, and {shape} has no place for that",
            "an adapter of A and B" + (" and biases" if biases else "") + " alone",
            "export it --to merged, which holds everything",
        )


def write_lora(out: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """The two files of an adapter folder, the same bytes for the same adapter."""
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        out / WEIGHTS,
        metadata={"format": "pt"},
    )
    # PEFT keeps names in sets, whose order changes from process to process.
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False, default=sorted)
    (out / CONFIG).write_text(text + "\n", encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        (out / name).chmod(0o644)  # safetensors writes 0600


def target_names(adapted: Iterable[str], layers: Iterable[str]) -> list[str] | str:
    """What makes PEFT adapt exactly these of the base's layers: kinds such as qkv_proj, else one expression."""
    adapted, layers = set(adapted), set(layers)
    kinds = sorted({path.rpartition(".")[2] for path in adapted})
    if {path for path in layers if path.rpartition(".")[2] in kinds} == adapted:
        return kinds
    return "|".join(re.escape(path) for path in sorted(adapted))


def exactly(path: str) -> str:
    """A key of PEFT's rank_pattern or alpha_pattern that fits this layer and no other."""
    return f"^{re.escape(path)}"


def refuse_not_finite(tensors: Mapping[str, Any], what: str) -> None:
    if wrong := sorted(name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())):
        raise Refused(
            f"{what} holds numbers that are not finite, in {wrong[0]}"
            + (f" and {len(wrong) - 1} more" if wrong[1:] else ""),
            "finite numbers",
            "use another checkpoint: the training had broken down when this one was saved",
        )
