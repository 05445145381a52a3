"""Which names a `lora_state_dict` has for which layers of a base.

`strict=False`, with which loralib says to load its files, skips a name that the model does not have without a
word. So every name is held against the base here, and what is amiss is said.
"""

from collections.abc import Mapping
from typing import Any

from retuner.errors import Refused


def kind_of_layer(module: Any) -> str:
    """Linear, Conv1D (transformers', with its weight the other way round), Embedding, Conv2d, or nothing."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for kind in (torch.nn.Linear, Conv1D, torch.nn.Embedding, torch.nn.Conv2d):
        if isinstance(module, kind):
            return kind.__name__
    return ""


def layer_pairs(state: Mapping[str, Any], modules: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """A and B by the path of their layer. Errors: Refused for names that are not the base's."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        if last in ("lora_A", "lora_B"):
            found.setdefault(path, {})[last] = tensor
    if not found:
        raise Refused(
            "the file holds no lora_A and lora_B",
            "what loralib.lora_state_dict(model) gives",
            "save that; a PEFT adapter needs no import",
        )
    if unknown := sorted(path for path in found if not kind_of_layer(modules.get(path))):
        raise Refused(
            f"the base has no layer {unknown[0]}"
            + (f", and {len(unknown) - 1} more are missing" if unknown[1:] else ""),
            "the base's own names: load_state_dict(strict=False), which loralib recommends, would skip the others "
            "without a word",
            _renaming(unknown[0], modules),
        )
    if alone := sorted(path for path, pair in found.items() if len(pair) == 1):
        raise Refused(f"{alone[0]} has only one of lora_A and lora_B", "both", "save the whole state again")
    for path, pair in found.items():
        for name, tensor in pair.items():
            if tensor.dim() != 2 or not tensor.is_floating_point():
                raise Refused(
                    f"{path}.{name} is {tuple(tensor.shape)} of {tensor.dtype}", "a matrix of floats"
                )
    return {path: (pair["lora_A"], pair["lora_B"]) for path, pair in found.items()}


def _renaming(path: str, modules: Mapping[str, Any]) -> str:
    """How a name would have to change to be one of the base's."""
    words = path.split(".")
    for dropped in range(len(words)):
        rest = ".".join(words[dropped:])
        if dropped and kind_of_layer(modules.get(rest)):
            return f"take {'.'.join(words[:dropped])!r} off the names, as a wrapper such as DDP put it there"
        if longer := [name for name in modules if name.endswith(f".{rest}") and kind_of_layer(modules[name])]:
            return f"the base has {longer[0]}: name its layers so, or give the base the file was trained on"
    return "give the base that the file was trained on"


def bias_names(modules: Mapping[str, Any], adapted: Mapping[str, Any], mode: str) -> dict[str, str]:
    """The names of the biases that loralib saves in this mode, and the layers they are of. Errors: Refused."""
    biased = [path for path, module in modules.items() if getattr(module, "bias", None) is not None]
    if mode == "none":
        return {}
    names = {}
    for path in biased:
        inside = (
            path in adapted and kind_of_layer(modules[path]) == "Conv2d"
        )  # loralib's has the real one as .conv
        if mode == "lora_only" and path not in adapted:
            continue
        if mode == "lora_only" and inside:
            raise Refused(
                f"bias is lora_only, and {path} is a Conv2d with a bias",
                "bias none or all: loralib's lora_only neither trains nor saves a convolution's bias",
                "set bias: all",
            )
        names[f"{path}.conv.bias" if inside else f"{path}.bias"] = path
    return names


def biases_in(
    state: Mapping[str, Any], modules: Mapping[str, Any], pairs: Mapping[str, Any], mode: str
) -> dict[str, Any]:
    """The biases by the path of their layer. Errors: Refused for tensors more or less than the mode has."""
    names = bias_names(modules, pairs, mode)
    rest = {name for name in state if name.rpartition(".")[2] not in ("lora_A", "lora_B")}
    if merged := sorted(name for name in rest if name.rpartition(".")[2] == "weight"):
        raise Refused(
            f"the file holds weights of the base, {merged[0]} first: a whole state_dict, not a lora_state_dict. "
            "Saved after eval(), loralib's weights have B·A added to them already, and would get it twice",
            "lora_A, lora_B and biases alone",
            "save loralib.lora_state_dict(model), after model.train()",
        )
    if odd := sorted(rest ^ names.keys()):
        biases = all(name.endswith("bias") for name in odd)
        raise Refused(
            f"the file {'has' if odd[0] in rest else 'lacks'} {odd[0]}, against bias {mode}"
            + (f", and {len(odd) - 1} more" if odd[1:] else ""),
            f"with bias {mode} on this base: {', '.join(sorted(names)[:3]) or 'no biases'}",
            "give the bias mode it was saved with" if biases else "save loralib.lora_state_dict(model)",
        )
    for name, path in names.items():
        if state[name].shape != modules[path].bias.shape:
            raise Refused(
                f"{name} is {tuple(state[name].shape)}", f"{tuple(modules[path].bias.shape)}, as in the base"
            )
    return {path: state[name] for name, path in names.items()}


def ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def longest_fit(named: Mapping[str, Any], path: str) -> Any:
    """The value of the longest name that the path ends in, or None."""
    fitting = [name for name in named if ends_in(path, name)]
    return named[max(fitting, key=len)] if fitting else None
