"""Runs in MLflow: their params, data, metrics, files and how they ended.

Everything goes through a client with an explicit URI; MLflow's active run and its global URI are never
used, because neither is seen by other threads and both can belong to the caller's own code.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from retuner.errors import Refused, Unavailable
from retuner.files import disk_full_said, fsync_folder, fsync_tree
from retuner.mlflow_rest import check_health, is_server, without_credentials
from retuner.registry_reads import sqlite_path
from retuner.run_page import flat
from retuner.runtime import Runtime, person

if TYPE_CHECKING:  # neither is needed by a fully cached run
    from mlflow import MlflowClient

    from retuner.dataset import Dataset

T = TypeVar("T")

KEY_TAG = "retuner.key"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""So that MLflow's page opens on training runs; left to itself it takes tables of answers for an agent's."""
DATABASE_DRAFT = ".new-database-"
BATCH = 100
"""Params or tags that MLflow takes in one call."""

CONTENTION = (
    "IntegrityError",
    "database is locked",
    "UniqueViolation",
    "deadlock detected",
    "serialize access",
)
"""How databases say that two writers met; MLflow hands these on as they are."""

UNREACHABLE = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED"}


@dataclass(frozen=True)
class Run:
    """A run that exists in MLflow."""

    runtime: Runtime
    run_id: str
    experiment_id: str
    name: str

    @property
    def url(self) -> str | None:
        """Where a browser finds it; None when MLflow is a file."""
        uri = self.runtime.mlflow_uri
        if not is_server(uri):
            return None
        return f"{without_credentials(uri).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{self.run_id}"


def check_reachable(runtime: Runtime) -> None:
    """Errors: Unavailable when runs could not be recorded, said before anything expensive begins."""
    uri = runtime.mlflow_uri
    if is_server(uri):
        check_health(uri)
    elif path := sqlite_path(uri):
        _check_writable(path)


def _check_writable(path: Path) -> None:
    do = "make it writable, or set RETUNER_HOME or RETUNER_TRACKING_URI to another place"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        begins = b""
        if path.exists():
            with path.open("rb") as file:
                begins = file.read(15)
    except OSError as error:
        raise Unavailable(f"MLflow's file {path} cannot be used: {error}", "a writable folder", do) from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Unavailable(
            f"MLflow's file {path} cannot be written", "a writable file in a writable folder", do
        )
    if begins not in (b"", b"SQLite format 3"):
        raise Unavailable(f"{path} is not a SQLite file", "the database that MLflow keeps its runs in", do)


def open_run(
    runtime: Runtime,
    key: str,
    experiment: str,
    run_name: str,
    params: dict[str, Any],
    tags: dict[str, str],
    dataset: Dataset | None,
) -> Run:
    """The run of this key, RUNNING: the one an earlier attempt opened, however it ended, or a new one.

    `params` is nested and is logged flat (`train.lora.rank`). Errors: Unavailable; Refused when the run of
    this key was opened with other params.
    """
    with mlflow_said(runtime):
        client = mlflow_client(runtime)
        experiment_id = _experiment(client, runtime, experiment)
        tags = {**tags, KEY_TAG: key, "mlflow.user": person(), "mlflow.source.name": "retuner run"}
        found = _run_of_key(client, experiment_id, key)
        if found is None:
            made = again(client.create_run, experiment_id, tags=tags, run_name=run_name)
            found = _run_of_key(client, experiment_id, key) or made
            if found.info.run_id != made.info.run_id:
                # The answer to an earlier try of the same call was lost, or another process was faster.
                client.delete_run(made.info.run_id)
        run = Run(runtime, found.info.run_id, experiment_id, found.info.run_name)
        again(client.update_run, run.run_id, status="RUNNING")
        _log_params(client, found, params)
        _log_tags(client, run.run_id, tags)
        if dataset:
            _log_dataset(client, run.run_id, dataset)
    return run


def end_run(run: Run, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Say how the run ended. Errors: Unavailable."""
    with mlflow_said(run.runtime):
        again(mlflow_client(run.runtime).set_terminated, run.run_id, status)


def kill_if_running(runtime: Runtime, run_id: str) -> None:
    """For a run whose process died: KILLED, unless it ended or is gone. Errors: Unavailable."""
    from mlflow.exceptions import MlflowException

    with mlflow_said(runtime):
        client = mlflow_client(runtime)
        try:
            info = client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return
            raise
        if info.status == "RUNNING" and info.lifecycle_stage == "active":
            again(client.set_terminated, run_id, "KILLED")


def has_metric(run: Run, key: str) -> bool:
    """Whether the run has a point of this metric. Errors: Unavailable."""
    with mlflow_said(run.runtime):
        return key in mlflow_client(run.runtime).get_run(run.run_id).data.metrics


def publish(
    run: Run,
    files: dict[str, Path],
    tables: dict[str, dict[str, list[Any]]],
    metrics: dict[str, float],
    tags: dict[str, str],
    note: str,
) -> None:
    """Everything a person looks for in the run's page; doing it twice is doing it once.

    `files`: artifact path to file or folder. `tables`: artifact path ending in .json to columns; the UI's
    evaluation view compares these across runs. `note`: markdown, the run's description. Errors: Unavailable.
    """
    from mlflow.entities import Metric

    with mlflow_said(run.runtime), tempfile.TemporaryDirectory() as staged, disk_full_said(Path(staged)):
        client = mlflow_client(run.runtime)
        for name, path in files.items():
            target = Path(staged, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target)
            else:
                shutil.copyfile(path, target)
        for name, columns in tables.items():
            _write_table(Path(staged, name), columns)
        if files or tables:
            client.log_artifacts(run.run_id, staged)
        logged = client.get_run(run.run_id).data
        now_ms = time.time_ns() // 1_000_000
        fresh = [Metric(k, v, now_ms, 0) for k, v in metrics.items() if logged.metrics.get(k) != v]
        for start in range(0, len(fresh), 1000):
            again(client.log_batch, run.run_id, metrics=fresh[start : start + 1000])
        listed = json.loads(logged.tags.get("mlflow.loggedArtifacts", "[]"))
        listed += [entry for name in tables if (entry := {"path": name, "type": "table"}) not in listed]
        known = {"mlflow.note.content": note, "mlflow.loggedArtifacts": json.dumps(listed)}
        _log_tags(client, run.run_id, {**tags, **known})


@cache
def _client_of(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if path := sqlite_path(uri):
        make_database(path)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def make_database(path: Path) -> None:
    """MLflow's SQLite file, whole, where there is none. MLflow itself makes it table by table, and one that was killed
    half-way would never open again.

    Errors: Unavailable when nothing can be made there.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(
            f"the folder {path.parent} of MLflow's database cannot be made: {error.strerror}",
            "a folder that this user may make",
            "set RETUNER_TRACKING_URI or RETUNER_HOME to another place",
        ) from None
    with disk_full_said(path.parent), FileLock(path.with_name(f"{path.name}.lock")):
        if path.exists():
            return
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=DATABASE_DRAFT) as folder:
            for left in path.parent.glob(f"{DATABASE_DRAFT}*"):
                if left != Path(folder):
                    shutil.rmtree(left)
            draft = Path(folder, path.name)
            client = MlflowClient(tracking_uri=f"sqlite:///{draft}", registry_uri=f"sqlite:///{draft}")
            client.search_experiments(max_results=1)
            client.search_registered_models(max_results=1)
            fsync_tree(Path(folder))
            os.replace(draft, path)
            fsync_folder(path.parent)


def mlflow_client(runtime: Runtime) -> MlflowClient:
    """The client of this runtime's MLflow; a database that is not there yet is made."""
    return _client_of(runtime.mlflow_uri)


def again(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call, and call again a few times while other writers are in the way."""
    for wait_seconds in (0.05, 0.2, 0.8, 2.0):
        try:
            return call(*arguments, **options)
        except Exception as error:
            if not any(word in str(error) for word in CONTENTION):
                raise
            time.sleep(wait_seconds * (0.5 + random.random()))
    return call(*arguments, **options)


@contextmanager
def mlflow_said(runtime: Runtime) -> Iterator[None]:
    """Turn an MLflow that cannot be used now into Unavailable; anything else is a defect of ours."""
    try:
        yield
    except Exception as error:
        where = without_credentials(runtime.mlflow_uri)
        if not (_is_unreachable(error) or any(word in str(error) for word in CONTENTION)):
            raise
        raise Unavailable(
            f"MLflow at {where} failed: {(str(error).splitlines() or [type(error).__name__])[0][:300]}",
            "an MLflow that answers and accepts our credentials",
            "see that it runs and that MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD are set if it wants "
            "them, then run the same command again: what is finished is not done twice",
        ) from error


def _is_unreachable(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    return isinstance(error, RequestException) or (
        isinstance(error, MlflowException) and error.error_code in UNREACHABLE
    )


def _experiment(client: MlflowClient, runtime: Runtime, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        # A server decides where artifacts go; without one MLflow would take the current folder.
        place = None if is_server(runtime.mlflow_uri) else runtime.mlflow_artifacts.as_uri()
        try:
            return client.create_experiment(name, artifact_location=place, tags=EXPERIMENT_TAGS)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise error  # not a race with another run that made it first
    if found.lifecycle_stage == "deleted":
        raise Refused(
            f"the MLflow experiment {name!r} was deleted",
            "one that runs can be added to",
            f"restore it: mlflow experiments restore --experiment-id {found.experiment_id}",
        )
    return found.experiment_id


def _run_of_key(client: MlflowClient, experiment_id: str, key: str) -> Any:
    found = client.search_runs(
        [experiment_id], f"tags.`{KEY_TAG}` = '{key}'", order_by=["attributes.start_time ASC"], max_results=50
    )
    return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def _log_params(client: MlflowClient, run: Any, params: dict[str, Any]) -> None:
    from mlflow.entities import Param

    logged, wanted = run.data.params, flat(params)
    other = [f"{k}: {logged[k]} -> {v}" for k, v in wanted.items() if k in logged and logged[k] != v]
    if other:
        raise Refused(
            f"the MLflow run {run.info.run_id} was opened with other params:\n  " + "\n  ".join(other),
            "one run for one set of params: MLflow never changes a param that was logged",
            "delete that run in the MLflow UI, or restore the params",
        )
    fresh = [Param(k, v) for k, v in wanted.items() if k not in logged]
    for start in range(0, len(fresh), BATCH):
        again(client.log_batch, run.info.run_id, params=fresh[start : start + BATCH])


def _log_tags(client: MlflowClient, run_id: str, tags: dict[str, str]) -> None:
    from mlflow.entities import RunTag

    entries = [RunTag(k, v[:8000]) for k, v in tags.items()]
    for start in range(0, len(entries), BATCH):
        again(client.log_batch, run_id, tags=entries[start : start + BATCH])


def _log_dataset(client: MlflowClient, run_id: str, dataset: Dataset) -> None:
    from mlflow.entities import Dataset as MlflowDataset
    from mlflow.entities import DatasetInput, InputTag

    described = MlflowDataset(
        name=dataset.dvc_file,
        digest=dataset.md5,  # `<32 hex>.dir` is exactly the 36 characters MLflow keeps
        source_type="local",
        source=json.dumps({"uri": dataset.dvc_file}),
        profile=json.dumps({"files": len(dataset.files), "bytes": sum(f.size for f in dataset.files)}),
    )
    context = InputTag("mlflow.data.context", "training")
    again(client.log_inputs, run_id, [DatasetInput(described, [context])])


def _write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """As `log_table` writes it, which appends to what is there and so would double a table on a retry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    path.write_text(
        json.dumps({"columns": list(columns), "data": rows}, ensure_ascii=False), encoding="utf-8"
    )
