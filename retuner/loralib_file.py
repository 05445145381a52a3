"""`lora_state_dict` files: read without running what is in them, written as safetensors with their settings beside."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retuner.errors import Refused
from retuner.lora_file import refuse_not_finite
from retuner.loralib_format import LoralibSettings

STATE, SETTINGS = "lora_state_dict.safetensors", "loralib.yaml"
ADVICE = (
    "What the file beside this one does not say of itself. Load that with strict=False before eval(), and look at\n"
    "the unexpected keys that load_state_dict returns: after eval() loralib has merged its layers, ignores what is\n"
    "loaded, and takes the new B*A off the weight at the next train().\n"
)


def read_state(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, or of one by torch.save, of which only tensors are ever unpickled.

    Errors: Refused.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            head = file.read(9)
        safe = head[8:9] == b"{"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Refused(
            f"{path} cannot be read: {error.strerror}", "a file by loralib.lora_state_dict"
        ) from None
    except SafetensorError as error:
        raise Refused(f"{path} is not whole: {error}", "whole safetensors", "copy it again") from None
    except Exception as error:  # the unpickler raises whatever it stumbles over
        raise Refused(
            f"{path} is not a file of tensors alone: {' '.join(str(error).split())[:160]}",
            "torch.save(loralib.lora_state_dict(model), FILE), or safetensors; other pickles could run code",
            "save the state again, best with safetensors.torch.save_file",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise Refused(f"{path} holds something else than tensors by name", "loralib.lora_state_dict(model)")
    state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    refuse_not_finite(state, str(path))
    return state


def write_state(out: Path, state: dict[str, Any], settings: LoralibSettings) -> None:
    """The bytes that safetensors.torch.save_file gives the same state, and loralib.yaml."""
    from ruamel.yaml import YAML
    from safetensors.torch import save_file

    save_file(state, out / STATE)
    (out / STATE).chmod(0o644)  # safetensors writes 0600
    with (out / SETTINGS).open("w", encoding="utf-8", newline="\n") as file:
        file.write("".join(f"# {line}\n" for line in ADVICE.splitlines()))
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.dump(settings.model_dump(mode="json"), file)


def read_settings(path: Path) -> LoralibSettings:
    """Errors: Refused, naming everything that is wrong."""
    from ruamel.yaml import YAML, YAMLError

    try:
        given = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise Refused(
            f"{path} cannot be read: {' '.join(str(error).split())}", "a YAML file of settings"
        ) from None
    return check_settings(given, str(path))


def check_settings(given: Any, name: str) -> LoralibSettings:
    """Errors: Refused, naming everything that is wrong."""
    try:
        return LoralibSettings.model_validate_json(json.dumps(given, default=str))
    except ValidationError as error:
        lines = [
            f"  - {'.'.join(map(str, detail['loc']))}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"
            for detail in error.errors(include_url=False)
        ]
        raise Refused(
            f"{name} does not say how the layers were made:\n" + "\n".join(lines),
            "alpha, alpha_pattern, rank, enable_lora and bias, as an export to loralib writes them",
        ) from None
