"""A small training that tests repeat: a tiny base and chats of random ids, in this process or in one to be killed.

`python training_job.py` reads folders from stdin and trains in each in a fork of itself, as its asked.json says; it
says the fork's process id and then how the fork ended. So the libraries are imported once, however often a training
is killed. While it trains, the fork keeps in the folder's `inside` which step it has finished.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from projects import ROOT

from retuner.artifacts import AdapterFacts, Base, BaseFacts, Chats, ChatsFacts
from retuner.observe import Observer, Silent
from retuner.pack_plan import plan_packs, write_packs
from retuner.tiny_phi3 import write_tiny_phi3
from retuner.train_params import DpoParams, SftParams
from retuner.training import train

STEPS, CHECKPOINT_STEPS, PACK_TOKENS = 12, 2, 64
PARAMS: dict[str, Any] = {
    "recipe": "sft",
    "seed": 1,
    "precision": "float32",
    "attention": "sdpa",
    "kernels": "torch",
    "max_steps": STEPS,
    "epochs": None,
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


def params(lora: dict[str, Any] | None = None, **changed: Any) -> SftParams:
    return SftParams(**{**PARAMS, **changed, "lora": {**LORA, **(lora or {})}})


def random_rows(count: int = 30, longest: int = 40, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Ids and labels; the first third of a row or so carries no loss."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [draw.randrange(440) for _ in range(draw.randint(6, longest))]
        prompt = draw.randint(1, len(ids) // 2)
        rows.append((ids, [-100] * prompt + ids[prompt:]))
    return rows


def make_inputs(
    folder: Path, rows: list[tuple[list[int], list[int]]] | None = None, pack_tokens: int | None = PACK_TOKENS
) -> Path:
    """A tiny base and chats below `folder`, which is handed back."""
    for name in ("base", "chats"):
        (folder / name).mkdir(parents=True)
    write_tiny_phi3(folder / "base", seed=0)
    rows = random_rows() if rows is None else rows
    _write_rows(folder / "chats" / "train.arrow", rows)
    _write_rows(folder / "chats" / "held_out.arrow", random_rows(6, seed=1))
    if pack_tokens and rows:
        lengths = np.array([len(ids) for ids, _ in rows])
        write_packs(folder / "chats" / "packs.arrow", plan_packs(lengths, pack_tokens), pack_tokens)
    return folder


def _write_rows(path: Path, rows: list[tuple[list[int], list[int]]]) -> None:
    numbers, ids = [str(number) for number in range(len(rows))], pa.list_(pa.int32())
    columns = {
        "id": pa.array(numbers, pa.string()),
        "group": pa.array(numbers, pa.string()),
        "input_ids": pa.array([row[0] for row in rows], ids),
        "labels": pa.array([row[1] for row in rows], ids),
    }
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


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


def base_of(folder: Path) -> Base:
    name = "0" * 64
    facts = BaseFacts(
        source="tiny",
        architecture="Phi3ForCausalLM",
        parameters=1,
        weights_sha256=name,
        tokenizer_sha256=name,
        template_sha256=name,
        stop_token_ids=(1,),
    )
    return Base(stage="fetch_base", fingerprint=name, digest=name, path=folder / "base", facts=facts)


def chats_of(folder: Path) -> Chats:
    name = "0" * 64
    facts = ChatsFacts(
        train_rows=1,
        held_out_rows=1,
        held_out_prompts=1,
        train_tokens=1,
        supervised_tokens=1,
        longest_row_tokens=1,
        left_out={},
        packs=None,
    )
    return Chats(stage="template", fingerprint=name, digest=name, path=folder / "chats", facts=facts)


def run(
    folder: Path,
    asked: SftParams | None = None,
    observer: Observer | None = None,
    out: str = "out",
    work: str = "work",
    device: str = "cpu",
    start: Path | None = None,
) -> AdapterFacts:
    """Train on the inputs below `folder`, into its empty new folder `out`."""
    (folder / out).mkdir()
    (folder / work).mkdir(exist_ok=True)
    return train(
        folder / out,
        folder / work,
        chats_of(folder),
        base_of(folder),
        asked or params(),
        device,
        observer or Heard(),
        start,
    )


class Inside(Heard):
    """Keeps the step in a file, too, for whoever kills this process."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = file
        file.write_text("0")

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        super().progress(what, done, total, note)
        self.file.write_text(str(done))


@dataclass
class Fork:
    """A training in a fork of the job."""

    pid: int
    process: subprocess.Popen[str]

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return int(self.process.stdout.readline())


@contextmanager
def trainings() -> Iterator[Callable[..., Fork]]:
    """Starts trainings in another process, with another order of sets.

    One `to_be_killed` that comes to its end waits there for it, so that the kill never comes too late.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "77"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=pipe, stdout=pipe, text=True
    )

    def start(folder: Path, to_be_killed: bool = False) -> Fork:
        process.stdin.write(json.dumps([str(folder), to_be_killed]) + "\n")
        process.stdin.flush()
        return Fork(int(process.stdout.readline()), process)

    yield start
    process.stdin.close()
    process.wait(60)


def killed_thrice(folder: Path, start: Callable[..., Fork], at_least: tuple[int, int, int]) -> dict[str, Any]:
    """What a training says that is killed some time after it has sealed each of these steps, and then is not."""
    draw = random.Random(time.time_ns())
    for step in at_least:
        training = start(folder, to_be_killed=True)
        _wait_for_checkpoint(folder / "work" / "sealed", step)
        time.sleep(draw.uniform(0, 0.3))
        training.kill()
        assert training.wait() == -signal.SIGKILL
    assert start(folder).wait() == 0
    return json.loads((folder / "done.json").read_text())


def _wait_for_checkpoint(sealed: Path, at_least: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(int(path.name.removeprefix("step-")) >= at_least for path in sealed.glob("step-*")):
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {at_least} came")


def main() -> None:
    import peft  # Slow to import; the forks inherit them.
    import trl

    assert peft.LoraConfig and trl.SFTTrainer and trl.SFTConfig and trl.DPOTrainer
    for number, line in enumerate(sys.stdin):
        asked_folder, to_be_killed = json.loads(line)
        folder, child = Path(asked_folder), os.fork()
        if not child:
            heard, asked, carry_out = Inside(folder / "inside"), params(), run
            if (folder / "asked.json").exists():
                written = (folder / "asked.json").read_bytes()
                if json.loads(written)["recipe"] == "dpo":
                    import pair_job

                    asked, carry_out = DpoParams.model_validate_json(written), pair_job.run
                else:
                    asked = SftParams.model_validate_json(written)
            facts = carry_out(folder, asked, heard, out=f"out-{number}")
            heard.file.unlink()
            while to_be_killed:
                signal.pause()
            done = {"sha256": facts.sha256, "lines": heard.lines}
            (folder / "done.json").write_text(json.dumps(done))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
