"""The retrain flow: the pipeline's sentence, said to Prefect."""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from prefect.logging.loggers import PrefectLogAdapter
from prefect.states import Completed, State

from flows.console import Terminal
from flows.liveness import alive
from flows.pipeline import pipeline
from flows.summary import mlflow_page, outcome, summarise
from retuner.artifacts import GateVerdict
from retuner.errors import RetunerError
from retuner.observe import Tee
from retuner.params_file import load
from retuner.run_page import verdict_line
from retuner.runtime import load_runtime
from tasks.context import open_context
from tasks.record import StageRecord
from tasks.running import run_task


@flow(name="retrain", flow_run_name="{params}", persist_result=False, retries=0)
def retrain(params: str, overrides: list[str] = []) -> State[dict[str, Any]]:
    """Retrain from a params file: data in, registered adapter out. Cached stages show as Cached."""
    runtime = load_runtime()
    terminal = Terminal()
    prefect = PrefectListener()
    listener = RunTee(terminal, prefect)
    try:
        context = open_context(load(Path(params), tuple(overrides)), runtime, listener)
        with alive(runtime, prefect.flow_run_id) as note:
            context.on_mlflow_run = lambda run_id: note.opened(mlflow_run=run_id)
            context.links["prefect"] = prefect.flow_run_id
            try:
                pipeline(context, lambda step: run_task(context, step))
            except BaseException as error:
                # Ctrl-C, and Prefect's own exception for SIGTERM, are no errors of the run.
                context.close_run("FAILED" if isinstance(error, Exception) else "KILLED")
                raise
            context.close_run("FINISHED")
    finally:
        terminal.close()
    summary = summarise(context.store, context.records, runtime)
    create_markdown_artifact(_markdown(summary, mlflow_page(summary, runtime)), key="retrain-summary")
    if all(stage["state"] == "cached" for stage in summary["stages"]):
        return Completed(name="Nothing to do", message="every stage was cached", data=summary)
    if not summary["gate"]["passed"]:
        return Completed(name="Gate said no", message=outcome(summary), data=summary)
    return Completed(message=outcome(summary), data=summary)


BARS = ("train", "evaluate")
"""Work that is long enough to be watched in Prefect."""


class PrefectListener:
    """Says into the flow run's log, and shows progress as Prefect's progress artifacts."""

    def __init__(self) -> None:
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            raise RetunerError("the Prefect listener was made outside a flow run")
        self.flow_run_id = str(context.flow_run.id)
        self._log: PrefectLogAdapter = get_run_logger()  # type: ignore[assignment]
        self._bars: dict[str, tuple[Any, int]] = {}

    def stage(self, name: str) -> None:
        self._log.info("%s begins", name)

    def finished(self, record: StageRecord) -> None:
        self._log.info(
            "%s %s in %.1f s, fingerprint %s", record.name, record.state, record.seconds, record.fingerprint
        )

    def say(self, line: str) -> None:
        self._log.info(line)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in BARS:
            return
        percent = int(100 * done / max(total, 1))
        if what not in self._bars:
            made = create_progress_artifact(progress=float(percent), key=f"progress-{what}", description=note)
            self._bars[what] = (made, percent)
        artifact, shown = self._bars[what]
        # Ten updates a bar: each is a round trip to the server.
        if percent >= shown + 10 or (done >= total and shown < 100):
            update_progress_artifact(artifact_id=artifact, progress=float(percent), description=note)
            self._bars[what] = (artifact, percent)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass  # MLflow keeps these.


class RunTee(Tee):
    listeners: tuple[Terminal | PrefectListener, ...]

    def stage(self, name: str) -> None:
        for listener in self.listeners:
            listener.stage(name)

    def finished(self, record: StageRecord) -> None:
        for listener in self.listeners:
            listener.finished(record)


def _markdown(summary: dict[str, Any], page: str) -> str:
    scores = summary["metrics"]
    metrics = list(next(iter(scores.values()), {}))
    lines = [
        f"## {summary['model_name']} version {summary['model_version']}",
        "",
        outcome(summary),
        "",
        "| held-out | " + " | ".join(scores) + " |",
        "|---" * (len(scores) + 1) + "|",
        *(f"| {m} | " + " | ".join(f"{scores[model][m]:.4f}" for model in scores) + " |" for m in metrics),
        "",
        "### Gate",
        *(f"- {verdict_line(GateVerdict(**verdict))}" for verdict in summary["gate"]["verdicts"]),
        *(f"- beware: {warning}" for warning in summary["gate"].get("notes", ())),
        "",
        "### Stages",
        "| stage | state | seconds | fingerprint |",
        "|---|---|---:|---|",
        *(
            f"| {s['name']} | {s['state']} | {s['seconds']:.1f} | `{s['fingerprint'][:12]}` |"
            for s in summary["stages"]
        ),
        "",
        f"[Curves, answers and the decision in MLflow]({page})",
    ]
    return "\n".join(lines)
