"""Step metrics on their way to MLflow, which may be away: training neither waits for them nor loses them.

Every point is a line of a spool file before anything else happens to it, with the time it was made. A
thread delivers the lines and empties the file. MLflow's key of a point includes that time, so a line that is
sent twice, because an answer was lost or a process died, is still one point.
"""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner.errors import Unavailable
from retuner.mlflow_rest import Denied, call, is_server, without_credentials
from retuner.runtime import Runtime
from retuner.tracking import CONTENTION, Run, mlflow_client, mlflow_said

if TYPE_CHECKING:
    from filelock import FileLock

POINTS_A_CALL = 1000
FLUSH_SECONDS = 2.0
PAUSE_SECONDS = 15.0
"""Between two tries while MLflow is away."""
CLOSE_SECONDS = 10.0

Point = dict[str, Any]
"""`run_id`, `key`, `value`, `timestamp` (ms), `step`."""


class MetricStream:
    """An observer that takes the metrics of a run's steps. Use as a context manager.

    What earlier runs could not deliver is delivered too.
    """

    def __init__(self, run: Run, say: Callable[[str], None]):
        self.run, self._say = run, say
        # A name of its own, so that whoever delivers what a killed process left never meets a live writer.
        self.spool = unsent_folder(run.runtime) / f"{run.run_id}-{uuid.uuid4().hex[:8]}.jsonl"
        self._owned = _spool_lock(self.spool)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._told_away = False
        self._thread = threading.Thread(target=self._deliver_until_closed, name="metrics", daemon=True)

    def __enter__(self) -> MetricStream:
        self.spool.parent.mkdir(parents=True, exist_ok=True)
        self._owned.acquire()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Take one step's numbers. Never waits for the network."""
        now_ms = time.time_ns() // 1_000_000
        lines = [
            json.dumps(
                {"run_id": self.run.run_id, "key": k, "value": float(v), "timestamp": now_ms, "step": step}
            )
            for k, v in values.items()
        ]
        with self._lock, self.spool.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def say(self, line: str) -> None:
        pass

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        pass

    def close(self) -> None:
        """Deliver what is left, for at most `CLOSE_SECONDS`; the rest waits for the next run."""
        self._closing.set()
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            _let_go(self._owned)
        if self.spool.exists():
            self._say(f"metrics: MLflow is away; its points wait in {self.spool} for the next run")

    def _deliver_until_closed(self) -> None:
        while True:
            closing = self._closing.is_set()
            delivered = self._deliver()
            if closing:
                return
            self._closing.wait(FLUSH_SECONDS if delivered else PAUSE_SECONDS)

    def _deliver(self) -> bool:
        try:
            _deliver_spool(self.run.runtime, self.spool, self._lock)
            deliver_unsent(self.run.runtime)
        except Unavailable as error:
            if not self._told_away:
                self._told_away = True
                self._say(f"metrics: {error.found}; training goes on and its points are kept in {self.spool}")
            return False
        return True


def unsent_folder(runtime: Runtime) -> Path:
    return runtime.home.absolute() / "unsent"


def deliver_unsent(runtime: Runtime) -> None:
    """Send what earlier runs could not deliver. Points that MLflow will never take, because their run was
    deleted, go to `<spool>.refused`. Errors: Unavailable when MLflow is away; nothing is lost."""
    from filelock import Timeout

    for spool in sorted(unsent_folder(runtime).glob("*.jsonl")):
        lock = _spool_lock(spool)
        try:
            lock.acquire()
        except Timeout:
            continue  # its writer lives, and delivers it
        try:
            _deliver_spool(runtime, spool, threading.Lock())
        finally:
            _let_go(lock)


def _spool_lock(spool: Path) -> FileLock:
    """Held by who empties the spool; the kernel lets go when a process dies."""
    from filelock import FileLock

    return FileLock(spool.with_suffix(".lock"), blocking=False, thread_local=False)


def _let_go(lock: FileLock) -> None:
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _deliver_spool(runtime: Runtime, spool: Path, lock: threading.Lock) -> None:
    sent_bytes = 0
    while True:
        with lock:
            points, end = _read(spool, sent_bytes)
            if end == sent_bytes:
                spool.unlink(missing_ok=True)
                return
        for run_id in dict.fromkeys(point["run_id"] for point in points):
            _send(runtime, run_id, [p for p in points if p["run_id"] == run_id], spool)
        sent_bytes = end


def _read(spool: Path, start: int) -> tuple[list[Point], int]:
    """Up to `POINTS_A_CALL` points from byte `start`, and the byte after them."""
    if not spool.exists():
        return [], start
    points, end = [], start
    with spool.open("rb") as file:
        file.seek(start)
        for line in file:
            end += len(line)
            try:
                points.append(json.loads(line))
            except ValueError:
                continue  # torn by a crash in the middle of a write
            if len(points) == POINTS_A_CALL:
                break
    return points, end


def _send(runtime: Runtime, run_id: str, points: list[Point], spool: Path) -> None:
    uri = runtime.mlflow_uri
    if is_server(uri):
        try:
            # mlflow's own client would try for minutes to reach a server that is gone.
            fields = {"run_id": run_id, "metrics": [_spelled(point) for point in points]}
            status, answer = call(uri, "POST", "runs/log-batch", fields, timeout_seconds=5.0)
            if status != 200:
                _refuse(spool, points, str(answer.get("message")), runtime)
            return
        except Denied:
            pass  # mlflow finds credentials in more places
    _send_by_client(runtime, run_id, points, spool)


def _send_by_client(runtime: Runtime, run_id: str, points: list[Point], spool: Path) -> None:
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    entries = [Metric(p["key"], p["value"], p["timestamp"], p["step"]) for p in points]
    try:
        with mlflow_said(runtime):
            mlflow_client(runtime).log_batch(run_id, metrics=entries)
    except MlflowException as error:
        _refuse(spool, points, str(error), runtime)


def _refuse(spool: Path, points: list[Point], reason: str, runtime: Runtime) -> None:
    if any(word in reason for word in CONTENTION):
        raise Unavailable(f"MLflow at {without_credentials(runtime.mlflow_uri)} is busy")
    with spool.with_name(f"{spool.name}.refused").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps({**point, "refused": reason}) + "\n" for point in points))


def _spelled(point: Point) -> Point:
    """JSON has no NaN or infinity; protobuf's JSON spells them as text."""
    value = point["value"]
    if not math.isfinite(value):
        value = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return {"key": point["key"], "value": value, "timestamp": point["timestamp"], "step": point["step"]}
