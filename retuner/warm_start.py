"""Learning on from the adapter in production: which one that is, and whether it fits what is to be trained."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retuner import registry_reads
from retuner.bundle import digest_of
from retuner.errors import Refused
from retuner.lora import CONFIG, WEIGHTS, adapter_weights, is_b, put_adapter_on, silent_rows
from retuner.runtime import Runtime
from retuner.skeleton import empty_model
from retuner.targets import Targets
from retuner.train_params import LoraParams

WARM_START, TRAIN_REQUEST = "warm_start", "train_request"
"""Tags of a version: the adapter it began as (sha256, empty for none), and what it was asked to be trained as."""


@dataclass(frozen=True)
class Start:
    """A registered adapter to begin with."""

    runtime: Runtime
    model_name: str
    version: int
    sha256: str


def train_request(params: dict[str, Any], chats: str, base: str) -> str:
    """A digest of what is to be trained; libraries and code, which may change meanwhile, are no part of it."""
    return digest_of([params, chats, base])


def production_start(runtime: Runtime, model_name: str, request: str) -> Start | None:
    """The adapter in production, None when there is none.

    When it is itself what `request` ended in, it is the one that it began as: so the same request is the same
    training before and after its adapter is promoted, and never an endless chain. Errors: Unavailable; Refused
    when that one is no longer registered.
    """
    version = registry_reads.read_alias(runtime, model_name, registry_reads.PRODUCTION)
    tags = (registry_reads.read_version(runtime, model_name, version) if version else None) or {}
    sha256 = tags.get("adapter_sha256")
    if version is None or not sha256:
        return None
    if tags.get(TRAIN_REQUEST) != request:
        return Start(runtime, model_name, version, sha256)
    return registered_start(runtime, model_name, tags[WARM_START]) if tags.get(WARM_START) else None


def registered_start(runtime: Runtime, model_name: str, sha256: str) -> Start:
    """Errors: Unavailable; Refused when no version holds this adapter."""
    version = registry_reads.find_version(runtime, model_name, sha256)
    if version is None:
        raise Refused(
            f"the adapter that {model_name} began as, {sha256[:12]}, is no longer registered",
            "every adapter that a later one was trained on from",
            "restore that version, or set train.warm_start: none",
        )
    return Start(runtime, model_name, version, sha256)


def read_start(folder: Path, base: Path, params: LoraParams, targets: Targets) -> dict[str, Any]:
    """The weights of an adapter that these params could have begun as.

    Errors: Refused when they ask for another rank, scale, kind or set of layers, or a weight is not finite.
    """
    from safetensors.torch import load_file

    adapted = put_adapter_on(empty_model(base), params, targets)
    config = json.loads((folder / CONFIG).read_bytes())
    asked = adapted.peft_config["default"].to_dict()
    settings = {
        "r": "rank",
        "rank_pattern": "rank_pattern",
        "use_dora": "dora",
        "use_rslora": "rslora",
        "lora_alpha": "alpha",
        "alpha_pattern": "alpha_pattern",
        "bias": "bias",
    }
    for key, setting in settings.items():
        if config[key] != asked[key]:
            raise Refused(
                f"train.warm_start is production, whose adapter has {setting} {_plain(config[key])}, and "
                f"these params come to {_plain(asked[key])}",
                "an adapter of the same shape and scale to learn on from",
                "ask for what production has (parts of a fused layer count each), or set train.warm_start: none",
            )
    found, expected = load_file(folder / WEIGHTS), adapter_weights(adapted)
    wrong = [
        *(f"lacks {name}" for name in sorted(expected.keys() - found.keys())),
        *(f"also has {name}" for name in sorted(found.keys() - expected.keys())),
        *(
            f"has {tuple(found[name].shape)} for {name}, not {tuple(expected[name].shape)}"
            for name in sorted(found.keys() & expected.keys())
            if found[name].shape != expected[name].shape
        ),
        *(f"is not finite in {name}" for name in sorted(found) if not found[name].isfinite().all()),
        *_loud(found, targets),
    ]
    if wrong:
        raise Refused(
            f"train.warm_start is production, whose adapter {wrong[0]}"
            + (f", and {len(wrong) - 1} more" if wrong[1:] else ""),
            "exactly the weights that train.lora asks for",
            "set train.lora as it was for production, or set train.warm_start: none",
        )
    return found


def _loud(weights: Mapping[str, Any], targets: Targets) -> list[str]:
    """Weights that are not zero where only parts of a layer may learn."""
    found = []
    for path in targets.parts:
        for name in weights:
            if is_b(name) and f".{path}." in name:
                shape = tuple(weights[name].shape)
                if weights[name][silent_rows(targets, path, shape)].any():
                    found.append(f"adapts other rows of {path} than train.lora.targets names")
    return found


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
