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
        receipt = json.loads(_place(question_of(params, overrides), runtime).read_bytes())
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
    inputs: dict[str, Any] = {}
    for name, fingerprint in receipt["stages"]:
        began = monotonic()
        manifest = store.verified_manifest(name, fingerprint)
        if manifest is None:
            return None
        records.append(StageRecord(name, "cached", monotonic() - began, fingerprint))
        made = manifest["facts"]
        prepared = manifest["identity"] if name == "prepare" else prepared
        if name == "train":
            inputs = manifest["identity"]["inputs"]
    here = (made["model_name"], made["model_version"], made["adapter_sha256"])
    if not registry_reads.still_registered(runtime, *here) or not _would_start_alike(inputs, made, runtime):
        return None
    try:
        if not held_out.still_same(runtime, made["model_name"], prepared):
            return None  # A version of another split was registered since, or a frozen set changed.
    except Refused:
        return None
    return summarise(store, records, runtime)


def _would_start_alike(inputs: dict[str, Any], made: dict[str, Any], runtime: Runtime) -> bool:
    """Whether a warm start would still begin as it did: from what was in production, or is its own now."""
    if "warm_start" not in inputs:
        return True
    name = made["model_name"]
    version = registry_reads.read_alias(runtime, name, registry_reads.PRODUCTION)
    tags = (registry_reads.read_version(runtime, name, version) if version else None) or {}
    return tags.get("adapter_sha256") in (inputs["warm_start"], made["adapter_sha256"])


def keep_receipt(question: str, runtime: Runtime, dataset: Dataset, stages: dict[str, str]) -> None:
    """Remember what a finished run of this question ended in."""
    receipt = {
        "dvc_file": dataset.dvc_file,
        "dvc_sha256": hashlib.sha256(Path(dataset.dvc_file).read_bytes()).hexdigest(),
        "data": str(dataset.path),
        "data_md5": dataset.md5,
        "stages": list(stages.items()),
    }
    write_whole(_place(question, runtime), json.dumps(receipt).encode())


def show_nothing_to_do(summary: dict[str, Any]) -> None:
    print("nothing to do: every stage is cached")
    for stage in summary["stages"]:
        print(f"  {stage['name']:<11} cached  {stage['fingerprint'][:12]}")
    print(outcome(summary))


def question_of(params: Path, overrides: tuple[str, ...]) -> str:
    """A digest of everything a run reads before it looks into the store, as it is now. Errors: OSError."""
    question = hashlib.sha256(params.read_bytes())
    question.update(json.dumps([overrides, sys.version, str(Path.cwd())]).encode())
    question.update(_installed().encode())
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            source = hashlib.sha256(path.read_bytes()).hexdigest()
            question.update(f"{path.relative_to(PROJECT)} {source}\n".encode())
    return question.hexdigest()


def is_still_asked(question: str, params: Path, overrides: tuple[str, ...]) -> bool:
    """Whether nothing that the question is made of was edited, or is gone."""
    try:
        return question_of(params, overrides) == question
    except FileNotFoundError:
        return False


def _place(question: str, runtime: Runtime) -> Path:
    return runtime.home / "receipts" / f"{question}.json"


def _installed() -> str:
    """Every installed distribution with its version: the names of their metadata folders."""
    folders = [folder for folder in map(Path, sys.path) if folder.is_dir()]
    return "\n".join(
        sorted(entry.name for folder in folders for entry in folder.iterdir() if entry.name.endswith("-info"))
    )
