"""When to stop: the held-out loss, measured every so many steps, and the step at which it was lowest.

All that is known stands in the Trainer's log, so a checkpoint carries it and a resumed run decides alike.
"""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from retuner.errors import RetunerError
from retuner.evaluation import read_held_out, row_losses
from retuner.observe import Observer
from retuner.train_params import StopEarlyParams

HELD_OUT_LOSS = "held_out_loss"
ROWS_AT_ONCE = 8


class Stopping:
    """Errors: Refused when there are no rows to measure on."""

    def __init__(self, params: StopEarlyParams, held_out: Path, steps: int, observer: Observer):
        self.params, self.steps, self.observer = params, steps, observer
        self.rows = read_held_out(held_out)
        self.measured: list[dict[str, float]] = []
        """`step` and `held_out_loss`, in the order of the steps."""

    def begin(self, history: list[dict[str, Any]]) -> None:
        """`history` is the Trainer's log as it was when the checkpoint was made."""
        self.measured = measurements(history)

    def is_due(self, step: int) -> bool:
        return step % self.params.every_steps == 0 or step == self.steps

    def measure(
        self, model: Any, step: int, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> dict[str, float]:
        """The entry for the Trainer's log. The mean is that of the report: over supervised tokens.

        The generators are not touched. Errors: RetunerError when the loss is not finite.
        """
        model.eval()
        with autocast():
            losses = row_losses(model, self.rows, ROWS_AT_ONCE, lambda done, total: None)
        model.train()
        tokens = [row["tokens"] for row in self.rows]
        loss = math.fsum(map(math.prod, zip(losses, tokens))) / sum(tokens)
        if not math.isfinite(loss):
            raise RetunerError(
                f"training diverged: after step {step} the held-out loss is {loss}",
                "finite numbers",
                "lower train.learning_rate; nothing of this run is kept",
            )
        entry = {"step": step, HELD_OUT_LOSS: loss}
        self.measured.append(entry)
        self.observer.metrics(step, {HELD_OUT_LOSS: loss})
        return entry

    @property
    def best_step(self) -> int:
        """The first step with the lowest loss so far."""
        return best_step(self.measured) or 0

    @property
    def is_time(self) -> bool:
        """Whether the last `patience` measurements brought no improvement each."""
        lowest, since = math.inf, 0
        for entry in self.measured:
            since = 0 if entry[HELD_OUT_LOSS] < lowest - self.params.min_improvement else since + 1
            lowest = min(lowest, entry[HELD_OUT_LOSS])
        return since >= self.params.patience

    def story(self, finished: int) -> str:
        lowest = min(entry[HELD_OUT_LOSS] for entry in self.measured)
        return (
            f"step {self.best_step} of {finished} done and {self.steps} planned: the lowest loss of "
            f"{len(self.rows)} held-out rows, {lowest:.4f}; their scores are better than new rows' would be"
        )


def measurements(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [entry for entry in history if HELD_OUT_LOSS in entry]


def best_step(measured: list[dict[str, float]]) -> int | None:
    """The first step with the lowest loss; None before the first measurement."""
    if not measured:
        return None
    return int(min(measured, key=lambda entry: entry[HELD_OUT_LOSS])["step"])


def needed_by(checkpoint: Path) -> int | None:
    """The step whose checkpoint a run that goes on after this one may still need: the best so far."""
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    return best_step(measurements(state["log_history"]))
