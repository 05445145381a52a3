"""An adapter merged into its base: a model folder that needs no PEFT."""

import json
import shutil
from pathlib import Path

from retuner.base import load_model
from retuner.generation import put_on
from retuner.lora import WEIGHTS
from retuner.lora_file import PREFIX
from retuner.parity import untie
from retuner.tiny_phi3 import write_json

SHARD = "4GB"


def write_merged(out: Path, base: Path, adapter: Path) -> str:
    """W + s·B·A computed in float32, rounded once to the base's dtype, which is returned; the tokenizer, the chat
    template and everything else of the base beside it. On the CPU, so that the bytes are the same everywhere.

    Errors: Refused when the adapter does not fit, or when a merged weight is not finite.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(str(base), local_files_only=True, trust_remote_code=False).dtype
    model = load_model(base, "float32", "sdpa", "cpu")
    with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
        untied = untie(model, [name.removeprefix(PREFIX) for name in tensors.keys()])  # noqa: SIM118
    merged = put_on(model, adapter).merge_and_unload(safe_merge=True)
    dtype = dtype or torch.float32
    merged.to(dtype).save_pretrained(out, max_shard_size=SHARD)
    for file in base.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(file, out / file.name)
    if untied:
        said = json.loads((out / "config.json").read_bytes())
        write_json(out / "config.json", {**said, "tie_word_embeddings": False})
    for file in out.iterdir():
        file.chmod(0o644)
    return str(dtype).removeprefix("torch.")
