"""What a peer's driver reads and writes. It runs in the peer's environment, so it imports nothing of retuner.

The job is a folder: settings.json, rows.jsonl (token ids and labels, a row a line). The driver leaves result.json and
adapter/ in it.
"""

import json
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


def read_rows(job: Path) -> dict[str, list[list[int]]]:
    rows = [json.loads(line) for line in (job / "rows.jsonl").read_text().splitlines()]
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}


class Steps(TrainerCallback):
    """Notes each step at the moment its loss is logged. The driver appends to `tokens` how many of each batch are no
    padding; the collator may be a batch ahead."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []
        self.logs: list[dict[str, float]] = []
        self.marks: list[tuple[float, float]] = []
        self.peak_bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self._mark()
            self.logs.append(logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()

    def _mark(self) -> None:
        self.marks.append((time.monotonic(), time.process_time()))

    def write(self, job: Path, packages: tuple[str, ...], how: str) -> None:
        """`how`: what the peer chose of its own settings, for the report."""
        spent = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(self.marks)]
        result = {
            "tokens": [int(count) for count in self.tokens[: len(self.logs)]],
            "seconds": [seconds for seconds, _ in spent],
            "processor_seconds": [seconds for _, seconds in spent],
            "losses": [float(log["loss"]) for log in self.logs],
            "grad_norms": [float(log["grad_norm"]) for log in self.logs],
            "peak_bytes": self.peak_bytes,
            "how": ", ".join([*(f"{name} {version(name)}" for name in packages), how]),
        }
        (job / "result.json").write_text(json.dumps(result))
