"""What a person sees in the terminal while a run works, and the table at its end. All of it on stderr,
but for the table."""

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from flows.stdout import visible_lines
from flows.summary import next_commands, outcome
from retuner.artifacts import GateVerdict
from retuner.run_page import verdict_line
from tasks.record import StageRecord

QUIET_SECONDS = 15.0
"""Between two progress lines where there is no terminal to draw a bar on."""


class Terminal:
    """Listens to a run and shows it: bars on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._bars: Progress | None = None
        self._bar_of: dict[str, TaskID] = {}
        self._said_at = 0.0

    def stage(self, name: str) -> None:
        self.console.print(f"[bold]{name}[/]")

    def finished(self, record: StageRecord) -> None:
        self._clear()
        mark = "[cyan]cached[/]  " if record.state == "cached" else "[green]computed[/]"
        self.console.print(f"  {mark} {record.name:<11} {record.seconds:7.1f} s")

    def say(self, line: str) -> None:
        self.console.print(f"  {visible_lines(line)}", markup=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        if not self.console.is_terminal:
            if done >= total or time.monotonic() - self._said_at >= QUIET_SECONDS:
                self._said_at = time.monotonic()
                self.say(f"{what} {done}/{total} {note}".rstrip())
            return
        if self._bars is None:
            self._bars = Progress(
                TextColumn("  {task.description:<10}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        if what not in self._bar_of:
            self._bar_of[what] = self._bars.add_task(what, total=total, note=note)
        self._bars.update(self._bar_of[what], completed=done, total=total, note=note)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass  # The bar's note shows the newest; MLflow keeps them all.

    def close(self) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._bars:
            self._bars.stop()
        self._bars, self._bar_of = None, {}


def show_summary(summary: dict[str, Any], params: str) -> None:
    """The one table at the end of a run, on stdout."""
    console = Console(highlight=False)
    scores: dict[str, dict[str, float]] = summary["metrics"]
    table = Table(title=f"{summary['model_name']} version {summary['model_version']}", title_justify="left")
    table.add_column("held-out")
    for model in scores:
        table.add_column(model, justify="right")
    for metric in next(iter(scores.values()), {}):
        table.add_row(metric, *(_number(scores[model].get(metric)) for model in scores))
    stages = Table(title="stages", title_justify="left")
    stages.add_column("stage")
    stages.add_column("state")
    stages.add_column("seconds", justify="right")
    stages.add_column("fingerprint")
    for record in summary["stages"]:
        style = "cyan" if record["state"] == "cached" else "green"
        state = f"[{style}]{record['state']}[/]"
        stages.add_row(record["name"], state, f"{record['seconds']:.1f}", record["fingerprint"][:12])
    console.print(stages)
    console.print(table)
    for verdict in summary["gate"]["verdicts"]:
        console.print(f"gate {verdict_line(GateVerdict(**verdict))}", markup=False, soft_wrap=True)
    for warning in summary["gate"].get("notes", ()):
        console.print(f"beware: {warning}", markup=False, soft_wrap=True)
    console.print(outcome(summary), soft_wrap=True)
    console.print("next:")
    commands = next_commands(summary, params)
    width = max(len(command) for command, _ in commands)
    for command, does in commands:
        console.print(Text.assemble("  ", (command.ljust(width), "bold"), f"  # {does}"), soft_wrap=True)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
