"""What a training says of its steps while it runs, and the record that is left of them.

The record lives in the Trainer's own log, so a checkpoint carries it and a resumed run has all of it.
"""

import math
import resource
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from retuner.errors import RetunerError
from retuner.observe import Observer

Point = tuple[int, dict[str, float]]
"""A step, and its numbers."""


class StepLog:
    """`tokens` counts those of the step under way; whoever feeds the model adds to it."""

    def __init__(self, every: int, steps: int, observer: Observer, also: Sequence[str] = ()):
        """`also` are more of the Trainer's numbers whose means belong to a point."""
        self.every, self.steps, self.observer, self.also = every, steps, observer, also
        self.tokens = 0
        self.entries: list[dict[str, float]] = []
        """One a step: `step`, `loss`, `learning_rate`, `grad_norm`, `tokens`, `seconds`, `memory_mb`."""
        self._since = time.monotonic()

    def begin(self, history: list[dict[str, Any]]) -> None:
        """`history` is the Trainer's log as it was when the checkpoint was made."""
        self.entries = [entry for entry in history if "loss" in entry]
        self._since = time.monotonic()

    def take(self, entry: dict[str, float]) -> None:
        """One finished step, as the Trainer logged it; what is added to it is kept with the checkpoint.

        Errors: RetunerError when a number is not finite.
        """
        step, now = int(entry["step"]), time.monotonic()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(entry[name]):
                raise RetunerError(
                    f"training diverged: at step {step} of {self.steps} the {name} is {entry[name]}",
                    "finite numbers",
                    "lower train.learning_rate, or raise train.warmup_fraction; nothing of this run is kept",
                )
        entry |= {"tokens": self.tokens, "seconds": now - self._since, "memory_mb": _memory_mb()}
        self.entries.append(entry)
        self.tokens, self._since = 0, now
        speed = entry["tokens"] / entry["seconds"]
        self.observer.progress("train", step, self.steps, f"loss {entry['loss']:.4f}, {speed:,.0f} tokens/s")
        if self._is_point(step):
            self.observer.metrics(*self._point(step))

    def end(self, step: int) -> None:
        """The last step is this one, earlier than planned."""
        planned, self.steps = self.steps, step
        if step % self.every and step != planned:
            self.observer.metrics(*self._point(step))

    def points(self) -> list[Point]:
        """Every `every` steps and after the last."""
        return [self._point(step) for step in range(1, self.steps + 1) if self._is_point(step)]

    def _is_point(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def _point(self, step: int) -> Point:
        """Of the steps since the point before: mean loss and speed. The rest is the newest step's."""
        window = self.entries[(step - 1) // self.every * self.every : step]
        newest = window[-1]
        return step, {
            **{name: fmean(entry[name] for entry in window) for name in ("loss", *self.also)},
            "learning_rate": newest["learning_rate"],
            "grad_norm": newest["grad_norm"],
            "tokens_per_second": sum(e["tokens"] for e in window) / sum(e["seconds"] for e in window),
            "memory_mb": newest["memory_mb"],
        }


def _memory_mb() -> float:
    """The most this process has held: of the GPU where there is one, else of the machine."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
