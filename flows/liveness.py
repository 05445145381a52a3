"""Runs whose process died are closed by the next one: nothing stays RUNNING for ever.

While a run lives it holds the kernel's lock on a note that names its Prefect and MLflow runs. A note
whose lock can be had belongs to a dead process.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from retuner import tracking
from retuner.files import write_whole
from retuner.runtime import Runtime

DIED = "its process died; run the same command again to go on from what is finished"


class Note:
    """What the current run left open, kept up to date while it goes."""

    def __init__(self, path: Path):
        self.path = path
        self.open: dict[str, Any] = {}

    def opened(self, **names: str) -> None:
        self.open.update(names)
        write_whole(self.path, json.dumps(self.open).encode())


@contextmanager
def alive(runtime: Runtime, flow_run_id: str) -> Iterator[Note]:
    """Close what dead runs left open, then hold this run's own note."""
    folder = runtime.home / "running"
    folder.mkdir(parents=True, exist_ok=True)
    _close_dead(runtime, folder)
    lock = FileLock(folder / f"{flow_run_id}.lock")
    note = Note(folder / f"{flow_run_id}.json")
    with lock:
        note.opened(flow_run=flow_run_id)
        try:
            yield note
        finally:
            note.path.unlink(missing_ok=True)
    (folder / f"{flow_run_id}.lock").unlink(missing_ok=True)


def _close_dead(runtime: Runtime, folder: Path) -> None:
    for note in sorted(folder.glob("*.json")):
        lock = FileLock(note.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        try:
            left = json.loads(note.read_bytes())
            _crash_flow_run(left["flow_run"])
            if "mlflow_run" in left:
                tracking.kill_if_running(runtime, left["mlflow_run"])
            note.unlink()
        finally:
            lock.release()
        note.with_suffix(".lock").unlink(missing_ok=True)


def _crash_flow_run(flow_run_id: str) -> None:
    with get_client(sync_client=True) as client:
        only = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(flow_run_id)]))
        for task_run in client.read_task_runs(flow_run_filter=only):
            if task_run.state and not task_run.state.is_final():
                client.set_task_run_state(task_run.id, Crashed(message=DIED), force=True)
        try:
            flow_run = client.read_flow_run(UUID(flow_run_id))
        except ObjectNotFound:
            return  # It was recorded by another server.
        if flow_run.state and not flow_run.state.is_final():
            client.set_flow_run_state(flow_run.id, Crashed(message=DIED), force=True)
