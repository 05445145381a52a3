"""A small training that tests repeat: a tiny base and chats of random ids, in this process or in one to be killed.

`python training_job.py` reads folders from stdin and trains in each in a fork of itself; it says the fork's process id
and then how the fork ended. So the libraries are imported once, however often a training is killed.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from retuner.artifacts import AdapterFacts, Base, BaseFacts, Chats, ChatsFacts
from retuner.observe import Observer, Silent
from retuner.params import TrainParams
from retuner.tiny_phi3 import write_tiny_phi3
from retuner.training import train

STEPS, CHECKPOINT_STEPS = 12, 2
PARAMS: dict[str, Any] = {
    "seed": 1,
    "precision": "float32",
    "attention": "sdpa",
    "max_steps": STEPS,
    "epochs": None,
    "packing": True,
    "pack_tokens": 64,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup_fraction": 0.1,
    "optimizer": "adamw_torch",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "label_smoothing": 0.0,
    "noise_alpha": None,
    "stop_early": None,
    "warm_start": "none",
    "quantization": None,
    "gradient_checkpointing": False,
    "checkpoint_every_steps": CHECKPOINT_STEPS,
    "log_every_steps": 5,
}
LORA: dict[str, Any] = {
    "rank": 4,
    "alpha": 8.0,
    "dropout": 0.1,
    "targets": "all-linear",
    "layers": "all",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": (),
    "bias": "none",
    "rslora": False,
    "dora": False,
    "init": "default",
    "learning_rate_ratio": None,
}


def params(lora: dict[str, Any] | None = None, **changed: Any) -> TrainParams:
    return TrainParams(**{**PARAMS, **changed, "lora": {**LORA, **(lora or {})}})


def random_rows(count: int = 30, longest: int = 40) -> list[tuple[list[int], list[int]]]:
    """Ids and labels; the first third of a row or so carries no loss."""
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(440) for _ in range(draw.randint(6, longest))]
        prompt = draw.randint(1, len(ids) // 2)
        rows.append((ids, [-100] * prompt + ids[prompt:]))
    return rows


def make_inputs(folder: Path, rows: list[tuple[list[int], list[int]]] | None = None) -> Path:
    """A tiny base and chats below `folder`, which is handed back."""
    for name in ("base", "chats"):
        (folder / name).mkdir(parents=True)
    write_tiny_phi3(folder / "base", seed=0)
    rows = random_rows() if rows is None else rows
    numbers, ids = [str(number) for number in range(len(rows))], pa.list_(pa.int32())
    columns = {
        "id": pa.array(numbers, pa.string()),
        "group": pa.array(numbers, pa.string()),
        "input_ids": pa.array([row[0] for row in rows], ids),
        "labels": pa.array([row[1] for row in rows], ids),
    }
    table = pa.table(columns)
    with (
        pa.OSFile(str(folder / "chats" / "train.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as stream,
    ):
        stream.write_table(table)
    return folder


class Heard(Silent):
    """Keeps what is said, and dies where a test wants the training to die."""

    def __init__(self, die_after: int | None = None):
        self.lines: list[str] = []
        self.steps: list[int] = []
        self.points: list[tuple[int, dict[str, float]]] = []
        self.die_after = die_after

    def say(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        self.steps.append(done)
        if done == self.die_after:
            raise KeyboardInterrupt

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.points.append((step, values))


def run(
    folder: Path,
    asked: TrainParams | None = None,
    observer: Observer | None = None,
    out: str = "out",
    work: str = "work",
    device: str = "cpu",
) -> AdapterFacts:
    """Train on the inputs below `folder`, into its empty new folder `out`."""
    (folder / out).mkdir()
    (folder / work).mkdir(exist_ok=True)
    name = "0" * 64
    base = BaseFacts(
        source="tiny",
        architecture="Phi3ForCausalLM",
        parameters=1,
        weights_sha256=name,
        tokenizer_sha256=name,
        template_sha256=name,
        stop_token_ids=(1,),
    )
    chats = ChatsFacts(
        train_rows=1,
        held_out_rows=1,
        held_out_prompts=1,
        train_tokens=1,
        supervised_tokens=1,
        longest_row_tokens=1,
        left_out={},
    )
    return train(
        folder / out,
        folder / work,
        Chats(stage="template", fingerprint=name, digest=name, path=folder / "chats", facts=chats),
        Base(stage="fetch_base", fingerprint=name, digest=name, path=folder / "base", facts=base),
        asked or params(),
        device,
        observer or Heard(),
    )


def main() -> None:
    import peft  # Slow to import; the forks inherit them.
    import trl

    assert peft.LoraConfig and trl.SFTTrainer and trl.SFTConfig
    for number, line in enumerate(sys.stdin):
        folder, child = Path(line.rstrip("\n")), os.fork()
        if not child:
            heard = Heard()
            facts = run(folder, observer=heard, out=f"out-{number}")
            done = {"sha256": facts.sha256, "lines": heard.lines}
            (folder / "done.json").write_text(json.dumps(done))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
