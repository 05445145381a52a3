"""Which layers an adapter sits on: what `train.lora` asks for, held against what the base has.

Everything that would match nothing, or do something else than its name says, is refused here, before a
weight is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retuner.errors import Refused
from retuner.skeleton import FUSED, Skeleton, kind_of, layer_index, named
from retuner.train_params import LoraParams


@dataclass(frozen=True)
class Targets:
    layers: tuple[str, ...]
    """Paths of the layers that get A and B, in the order of the model."""
    names: tuple[str, ...]
    """The same, as short as PEFT understands them."""
    ranks: dict[str, int]
    alphas: dict[str, float]
    """By path, as the adapter's file has them. A layer of which E parts learn has E times the rank: each part
    has A and B of its own, side by side, as in loralib's MergedLinear."""
    parts: dict[str, tuple[range, ...]]
    """By path, for layers of which only these rows learn."""
    saved: tuple[str, ...]
    """Modules that learn in full, as PEFT's `modules_to_save` names them."""
    told: tuple[str, ...]
    """What a person should know, because a name was asked for that the base has otherwise."""


def choose_targets(params: LoraParams, base: Skeleton, quantized: bool = False) -> Targets:
    """Errors: Refused for the first thing that cannot be, whatever the rest of it is."""
    whole, parts, told = _matches(params, base)
    _refuse_what_parts_exclude(params, parts)
    _refuse_bias(params, base, (*whole, *parts))
    if params.init != "default" and base.embedding in whole:
        raise Refused(
            f"train.lora.init is {params.init} and train.lora.targets has {kind_of(base.embedding)}",
            "linear layers: an embedding starts at zero",
            "train.lora.init default",
        )
    order = [*base.linear, base.embedding]
    layers = tuple(path for path in order if path in whole or path in parts)
    ranks = _by_path(params.rank_pattern, params.rank, layers, "rank_pattern")
    alphas = _by_path(params.alpha_pattern, params.alpha, layers, "alpha_pattern")
    for path, rows in parts.items():
        ranks[path] *= len(rows)
        # So that the scale stays that of a part: alpha / rank, or alpha / √rank with rslora.
        alphas[path] *= math.sqrt(len(rows)) if params.rslora else len(rows)
    if params.init != "default":
        _refuse_ranks_without_directions(ranks, base, params)
    saved = _saved(params, base, layers, quantized)
    return Targets(layers, _names(layers, base), ranks, alphas, parts, saved, told)


def pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Values by path as PEFT's patterns say them, shortest: by kind where all layers of a kind agree."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(map(kind_of, values)):
        same = {path: value for path, value in values.items() if kind_of(path) == kind}
        if len(set(same.values())) > 1:
            found |= {path: value for path, value in same.items() if value != default}
        elif (value := next(iter(same.values()))) != default:
            found[kind] = value
    return found


def layer_numbers(params: LoraParams, base: Skeleton) -> frozenset[int] | None:
    """The layers that may learn, None for all. Errors: Refused for one that is not there."""
    if params.layers == "all":
        return None
    if isinstance(params.layers, str):
        first, last = map(int, params.layers.split("-"))
        asked = frozenset(range(first, last + 1))
    else:
        asked = frozenset(params.layers)
    there = {number for path in base.linear if (number := layer_index(path)) is not None}
    if not asked or not asked <= there:
        raise Refused(
            f"train.lora.layers is {params.layers if isinstance(params.layers, str) else sorted(asked)}",
            f"layers from {min(there)} to {max(there)}, as a range such as {min(there)}-{max(there)} or a list",
            "correct train.lora.layers",
        )
    return asked


def _matches(
    params: LoraParams, base: Skeleton
) -> tuple[set[str], dict[str, tuple[range, ...]], tuple[str, ...]]:
    """Paths adapted as a whole; paths of which only some rows are; and what was translated."""
    numbers = layer_numbers(params, base)

    def kept(paths: list[str]) -> list[str]:
        return [
            path
            for path in paths
            if numbers is None or layer_index(path) is None or layer_index(path) in numbers
        ]

    if isinstance(params.targets, str):
        return set(kept(list(base.linear))), {}, ()
    whole: set[str] = set()
    some: dict[str, set[str]] = {}
    translated: dict[str, str] = {}
    for name in params.targets:
        if found := named(name, [*base.linear, base.embedding]):
            whole |= set(chosen := kept(found))
        else:
            owners, part = _part(name, base)
            if name in FUSED and owners:
                translated[name] = FUSED[name][0]
            chosen = kept(owners)
            for path in chosen:
                some.setdefault(path, set()).add(part)
            if not owners:
                _refuse_name(name, base)
        if not chosen:
            raise Refused(
                f"train.lora.targets names {name}, which is in none of train.lora.layers",
                "a name that the chosen layers have",
                "correct one of the two",
            )
        if base.embedding in whole and base.tied:
            _refuse_tied(base, "targets")
    parts: dict[str, tuple[range, ...]] = {}
    for path, asked in some.items():
        rows = base.parts[kind_of(path)]
        if asked == rows.keys():
            whole.add(path)
        elif path not in whole:
            parts[path] = tuple(rows[part] for part in rows if part in asked)
    told = [f"{name} is in {kind}" for name, kind in translated.items()]
    for kind in dict.fromkeys(map(kind_of, parts)):
        asked = next(some[path] for path in parts if kind_of(path) == kind)
        told.append(f"of {kind} only {' and '.join(p for p in base.parts[kind] if p in asked)} learn")
    return whole, parts, tuple(told)


def _part(name: str, base: Skeleton) -> tuple[list[str], str]:
    """The fused layers of which `name` is a part, and which part: qkv_proj.q, or q_proj."""
    owner, _, part = name.rpartition(".")
    if name in FUSED:
        owner, part = FUSED[name]
    return [path for path in named(owner, base.linear) if part in base.parts.get(kind_of(path), {})], part


def _refuse_name(name: str, base: Skeleton) -> None:
    if named(name, [base.head]):
        raise Refused(
            f"train.lora.targets names {name}, the output head",
            "another layer: the loss is computed from the head's own weight (TRL does so), and an adapter on it "
            "would never be trained",
            f"to train the head in full, name it in train.lora.modules_to_save: [{name}]",
        )
    parts = [f"{kind}.{part}" for kind, rows in base.parts.items() for part in rows]
    raise Refused(
        f"train.lora.targets names {name}, and this base has no layer of that name",
        f"all-linear, or some of {', '.join(_kinds(base))}"
        + (f", or parts of them: {', '.join(parts)}" if parts else ""),
        "correct train.lora.targets",
    )


def _refuse_tied(base: Skeleton, where: str) -> None:
    raise Refused(
        f"train.lora.{where} has {kind_of(base.embedding)} or {kind_of(base.head)}, which in this base are one matrix",
        "a base with two: merged into one matrix, what only one of them learned would change both",
        f"leave them out of train.lora.{where}",
    )


def _refuse_what_parts_exclude(params: LoraParams, parts: Mapping[str, Any]) -> None:
    if not parts:
        return
    kind = kind_of(next(iter(parts)))
    if params.dora:
        raise Refused(
            f"train.lora.dora is true and train.lora.targets has parts of {kind}",
            "whole layers: DoRA's magnitudes are those of all rows, so the other parts would change too",
            f"target {kind}, or set train.lora.dora: false",
        )
    if params.init != "default":
        raise Refused(
            f"train.lora.init is {params.init} and train.lora.targets has parts of {kind}",
            "whole layers: the main directions are those of all rows, and the other parts are to stay as they are",
            f"target {kind}, or set train.lora.init: default",
        )


def _refuse_bias(params: LoraParams, base: Skeleton, layers: tuple[str, ...]) -> None:
    if params.bias == "none":
        return
    there = base.biases if params.bias == "all" else base.biases & set(layers)
    if not there:
        raise Refused(
            f"train.lora.bias is {params.bias}, and {'this base has' if params.bias == 'all' else 'its targets have'} "
            "no biases",
            "biases that could learn; Phi-3 has none",
            "set train.lora.bias: none",
        )
    if params.bias == "all" and params.layers != "all":
        raise Refused(
            "train.lora.bias is all, and train.lora.layers leaves some out",
            "lora_only, which trains the biases of the adapted layers alone",
            "correct one of the two",
        )


def _refuse_ranks_without_directions(ranks: Mapping[str, int], base: Skeleton, params: LoraParams) -> None:
    for path, rank in ranks.items():
        if rank > min(base.linear[path]):
            raise Refused(
                f"train.lora.init is {params.init} and {path} has rank {rank}",
                f"at most {min(base.linear[path])}, as many directions as its weight has",
                "lower train.lora.rank",
            )


def _by_path(asked: Mapping[str, Any], default: Any, layers: tuple[str, ...], where: str) -> dict[str, Any]:
    if unknown := sorted(name for name in asked if not named(name, layers)):
        raise Refused(
            f"train.lora.{where} names {', '.join(unknown)}, and no adapted layer has that name",
            f"some of {', '.join(sorted({kind_of(path) for path in layers}))}, or ends of their paths",
            f"correct train.lora.{where}",
        )
    return {
        path: asked[max(names, key=len)] if (names := [n for n in asked if named(n, [path])]) else default
        for path in layers
    }


def _saved(params: LoraParams, base: Skeleton, layers: tuple[str, ...], quantized: bool) -> tuple[str, ...]:
    numbers = layer_numbers(params, base)
    found: list[str] = []
    for name in params.modules_to_save:
        paths = [
            path
            for path in named(name, base.modules)
            if numbers is None or layer_index(path) is None or layer_index(path) in numbers
        ]
        if not paths:
            kinds = sorted({kind_of(path) for path in base.modules} - {"layers", "model"})
            raise Refused(
                f"train.lora.modules_to_save names {name}, and "
                + (
                    "none of train.lora.layers has it"
                    if named(name, base.modules)
                    else "this base has no such module"
                ),
                f"some of {', '.join(kind for kind in kinds if not kind.isdigit())}",
                "correct train.lora.modules_to_save",
            )
        if base.tied and {base.embedding, base.head} & set(paths):
            _refuse_tied(base, "modules_to_save")
        if inside := [
            p for p in paths if any(_contains(p, layer) or _contains(layer, p) for layer in layers)
        ]:
            raise Refused(
                f"train.lora.modules_to_save has {inside[0]}, which is or holds a layer that gets an adapter",
                "a module that learns in full or one that gets an adapter",
                f"leave {name} out of train.lora.modules_to_save, or out of the targets",
            )
        if quantized and (packed := [p for p in paths if any(_contains(p, layer) for layer in base.linear)]):
            raise Refused(
                f"train.lora.modules_to_save has {packed[0]}, which train.quantization rounds",
                "embeddings, norms or the head, which keep their precision",
                "adapt it as a target instead",
            )
        # PEFT takes every path that ends in these letters: `norm` would be input_layernorm too.
        plain = sum(path.endswith(name) for path in base.modules) == len(paths)
        found += [name] if plain else paths
    return tuple(dict.fromkeys(found))


def _names(layers: tuple[str, ...], base: Skeleton) -> tuple[str, ...]:
    every = [*base.linear, base.embedding]
    names: list[str] = []
    for kind in dict.fromkeys(map(kind_of, layers)):
        mine = [path for path in layers if kind_of(path) == kind]
        names += [kind] if named(kind, every) == mine else mine
    return tuple(sorted(names))


def _kinds(base: Skeleton) -> list[str]:
    return sorted({*map(kind_of, base.linear), kind_of(base.embedding)})


def _contains(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")
