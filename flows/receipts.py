"""Answering a run that was answered before, in less time than most libraries take to import.

A receipt says which results one question ended in. The question is everything a run reads before it
looks into the store: the params file, the overrides, all of the project's code, the Python and the versions of
the libraries. The answer is only a list of fingerprints: the data is hashed again, every result
verified and the registry asked, just as on the long way. Whatever does not hold sends the run the long way.
"""

import hashlib
import json
import sys
from pathlib import Path
from time import monotonic
from typing import Any

from flows.summary import outcome, summarise
from retuner import held_out, registry_reads
from retuner.dataset import Dataset, is_still
from retuner.errors import Refused
from retuner.files import write_whole
from retuner.runtime import Runtime
from retuner.store import Store
from tasks.record import StageRecord

PROJECT = Path(__file__).parents[1]
PACKAGES = ("flows", "retuner", "tasks")


def answer_from_receipt(params: Path, overrides: tuple[str, ...], runtime: Runtime) -> dict[str, Any] | None:
    """The summary of a run that has nothing to do, or None when that is not certain."""
    try:
        receipt = json.loads(_place(params, overrides, runtime).read_bytes())
        dvc_file = Path(receipt["dvc_file"])
        if hashlib.sha256(dvc_file.read_bytes()).hexdigest() != receipt["dvc_sha256"]:
            return None
        data = Path(receipt["data"])
        if not is_still(receipt["data_md5"], data, dvc_file, runtime.home / "seen-data.json"):
            return None
    except (OSError, ValueError, KeyError, Refused):
        return None  # The long way says what is wrong.
    store, records = Store(runtime.store, shared_url=runtime.store_remote), []
    made: dict[str, Any] = {}
    prepared: dict[str, Any] = {}
    for name, fingerprint in receipt["stages"]:
        began = monotonic()
        manifest = store.verified_manifest(name, fingerprint)
        if manifest is None:
            return None
        records.append(StageRecord(name, "cached", monotonic() - began, fingerprint))
        made = manifest["facts"]
        prepared = manifest["identity"] if name == "prepare" else prepared
    here = (made["model_name"], made["model_version"], made["adapter_sha256"])
    if not registry_reads.still_registered(runtime, *here):
        return None
    try:
        if not held_out.still_same(runtime, made["model_name"], prepared):
            return None  # A version of another split was registered since, or a frozen set changed.
    except Refused:
        return None
    return summarise(store, records, runtime)


def keep_receipt(
    params: Path, overrides: tuple[str, ...], runtime: Runtime, dataset: Dataset, stages: dict[str, str]
) -> None:
    """Remember what a finished run ended in."""
    receipt = {
        "dvc_file": dataset.dvc_file,
        "dvc_sha256": hashlib.sha256(Path(dataset.dvc_file).read_bytes()).hexdigest(),
        "data": str(dataset.path),
        "data_md5": dataset.md5,
        "stages": list(stages.items()),
    }
    write_whole(_place(params, overrides, runtime), json.dumps(receipt).encode())


def show_nothing_to_do(summary: dict[str, Any]) -> None:
    print("nothing to do: every stage is cached")
    for stage in summary["stages"]:
        print(f"  {stage['name']:<11} cached  {stage['fingerprint'][:12]}")
    print(outcome(summary))


def _place(params: Path, overrides: tuple[str, ...], runtime: Runtime) -> Path:
    question = hashlib.sha256(params.read_bytes())
    question.update(json.dumps([overrides, sys.version, str(Path.cwd())]).encode())
    question.update(_installed().encode())
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            source = hashlib.sha256(path.read_bytes()).hexdigest()
            question.update(f"{path.relative_to(PROJECT)} {source}\n".encode())
    return runtime.home / "receipts" / f"{question.hexdigest()}.json"


def _installed() -> str:
    """Every installed distribution with its version: the names of their metadata folders."""
    folders = [folder for folder in map(Path, sys.path) if folder.is_dir()]
    return "\n".join(
        sorted(entry.name for folder in folders for entry in folder.iterdir() if entry.name.endswith("-info"))
    )
