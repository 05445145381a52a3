"""The same training by peers whose pins conflict with ours: each in a child process, in an environment of its own.

A peer gets the rows as token ids and labels, the shared recipe, and a base; it takes its own best settings. What it
made is scored here, as the other sides are.
"""

import json
import math
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.training_rows import Work
from benchmarks.training_sides import (
    ALPHA,
    DROPOUT,
    LEARNING_RATE,
    RANK,
    Trained,
    has_bfloat16,
    held_out_loss,
    ours_params,
)
from retuner.errors import Refused

DRIVERS = {"LLaMA-Factory": "train_llamafactory.py", "Unsloth": "train_unsloth.py"}
"""By peer, its script in benchmarks/peers."""


class PeerFailed(Exception):
    """Says in one line why a peer has no result."""


@dataclass(frozen=True)
class PeerTrained(Trained):
    how: str
    """Its versions, and what it chose of its own settings."""


def peer(
    name: str,
    python: str,
    work: Work,
    base: Path,
    folder: Path,
    device: str,
    pack_tokens: int,
    batch_size: int,
) -> PeerTrained:
    """One epoch by the peer that is installed for the interpreter `python`.

    Errors: PeerFailed when it did not come to its end, or left out or repeated tokens.
    """
    folder.mkdir(parents=True)
    with (folder / "rows.jsonl").open("w") as file:
        for row in work.train:
            print(json.dumps({"input_ids": row.input_ids, "labels": row.labels}), file=file)
    settings = {
        "base": str(base),
        "device": device,
        "pack_tokens": pack_tokens,
        "batch_size": batch_size,
        "bfloat16": has_bfloat16(device),
        "rank": RANK,
        "alpha": ALPHA,
        "dropout": DROPOUT,
        "targets": linear_layers(base),
        "learning_rate": LEARNING_RATE,
        "optimizer": ours_params(batch_size, device).optimizer,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    _run(python, Path(__file__).parent / "peers" / DRIVERS[name], folder, device)
    result = json.loads((folder / "result.json").read_text())
    if sum(result["tokens"]) != work.tokens:
        raise PeerFailed(f"it trained on {sum(result['tokens']):,} tokens, not on all {work.tokens:,}")
    numbers = {key: tuple(value) if isinstance(value, list) else value for key, value in result.items()}
    return PeerTrained(**numbers, held_out_loss=_held_out_loss(name, base, folder / "adapter", work, device))


def linear_layers(base: Path) -> list[str]:
    """The last names of all linear layers but the head."""
    import torch

    from retuner.skeleton import empty_model

    model = empty_model(base)
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
    )


def write_split_base(base: Path, out: Path, device: str) -> None:
    """`base`, a Phi-3, as the Llama of the same function with q, k, v and gate, up apart."""
    from retuner.base import load_model
    from retuner.split_projections import unfused

    precision = (
        "bfloat16" if json.loads((base / "config.json").read_text())["dtype"] == "bfloat16" else "float32"
    )
    model = load_model(base, precision, "sdpa", device, use_cache=False)
    unfused(model).to(model.dtype).save_pretrained(str(out))
    for file in base.glob("*token*"):
        shutil.copy(file, out)


def _run(python: str, driver: Path, folder: Path, device: str) -> None:
    # One GPU at most, and nothing of our environment's modules.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if device == "cuda" else ""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, "CUDA_VISIBLE_DEVICES": visible, "HF_HUB_OFFLINE": "1"}
    found = shutil.which(python)
    if found is None:
        raise PeerFailed(f"there is no program {python}")
    done = subprocess.run(
        [str(Path(found).absolute()), str(driver), str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode} and said nothing"]
        raise PeerFailed(said[-1])


def _held_out_loss(name: str, base: Path, adapter: Path, work: Work, device: str) -> float:
    """NaN where the adapter cannot be loaded, and that is said."""
    from retuner.base import load_model
    from retuner.generation import adapter_on

    precision: Any = "bfloat16" if has_bfloat16(device) else "float32"
    model = load_model(base, precision, "sdpa", device, use_cache=False)
    try:
        with adapter_on(model, adapter):
            return held_out_loss(model, work)
    except Refused as error:
        print(f"{name}: its adapter cannot be loaded here: {error}")
        return math.nan
