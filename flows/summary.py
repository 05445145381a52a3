"""What a finished run says of itself, read from the sealed results alone."""

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from retuner import registry_reads
from retuner.mlflow_rest import is_server, without_credentials
from retuner.runtime import Runtime
from retuner.store import Store
from tasks.record import StageRecord


def summarise(store: Store, records: Sequence[StageRecord], runtime: Runtime) -> dict[str, Any]:
    """The object that `retuner run --json` prints."""
    facts = {r.name: (store.manifest(r.fingerprint) or {})["facts"] for r in records}
    version, report = facts["register"], facts["evaluate"]
    production = registry_reads.read_alias(runtime, version["model_name"], "production")
    return {
        "run_id": version["run_id"],
        "experiment_id": version["experiment_id"],
        "model_name": version["model_name"],
        "model_version": version["model_version"],
        "adapter_sha256": version["adapter_sha256"],
        "metrics": report["scores"],
        "gate": version["decision"],
        "production_version": production,
        "stages": [record.spelled() for record in records],
    }


def outcome(summary: dict[str, Any]) -> str:
    """One sentence: what became of the version, and what to do if something is to be done."""
    name, number = summary["model_name"], summary["model_version"]
    production = summary["production_version"]
    if production == number:
        return f"{name} version {number} is in production."
    instead = f"version {production} is" if production else "nothing is"
    if not summary["gate"]["passed"]:
        return (
            f"{name} version {number} did not pass its gate: it is a candidate, and {instead} in production."
        )
    return f"{name} version {number} passed its gate and is a candidate; {instead} in production."


def mlflow_page(summary: dict[str, Any], runtime: Runtime) -> str:
    """Where the run is in MLflow's page; on loopback, as `retuner ui` serves it, when MLflow is a file."""
    uri = runtime.mlflow_uri
    server = without_credentials(uri).rstrip("/") if is_server(uri) else "http://127.0.0.1:5000"
    return f"{server}/#/experiments/{summary['experiment_id']}/runs/{summary['run_id']}"


def next_commands(summary: dict[str, Any], params: str) -> list[tuple[str, str]]:
    """What a person may want to type now, and what it does."""
    name, number, production = (summary[k] for k in ("model_name", "model_version", "production_version"))
    retuner = _program()
    commands = [(f"{retuner} run {params}", "again: every stage cached")]
    if production == number:
        commands.append((f"{retuner} serve --model {name}", "chat with it on loopback"))
    elif summary["gate"]["passed"]:
        commands.append((f"{retuner} promote {number} --model {name}", "put it into production"))
    if production and production != number:
        commands.append((f"{retuner} compare {production} {number} --model {name}", "side by side"))
    return [*commands, (f"{retuner} ui", "MLflow and Prefect in the browser")]


def _program() -> str:
    """How to call the command line from here: by its name where the shell finds it, else by its path."""
    if shutil.which("retuner"):
        return "retuner"
    return os.path.relpath(sys.argv[0])
