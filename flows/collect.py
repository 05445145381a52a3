"""Removing stored results that nothing reaches any more."""

import json
import shutil
from dataclasses import dataclass

from filelock import FileLock, Timeout

from retuner import registry
from retuner.errors import Refused
from retuner.runtime import Runtime
from retuner.store import Store


@dataclass(frozen=True)
class Collected:
    kept: int
    removed: tuple[str, ...]
    freed_bytes: int


def collect(runtime: Runtime, keep_versions: int, dry_run: bool) -> Collected:
    """Remove what no alias and none of the last `keep_versions` versions of a model was made from.

    Errors: Refused while a run is going on, whose results are not registered yet.
    """
    for lock in sorted((runtime.home / "running").glob("*.lock")):
        try:
            with FileLock(lock, blocking=False):
                pass
        except Timeout:
            raise Refused(
                "a run is going on", "no run while results are removed", "try again after it"
            ) from None
    reached = set()
    for model in registry.model_names(runtime):
        for tags in registry.tags_to_keep(runtime, model, keep_versions):
            reached |= set(json.loads(tags.get("stage_fingerprints", "{}")).values())
            reached.add(tags.get("held_out_splits"))
    store, removed, freed, kept = Store(runtime.store), [], 0, 0
    for folder in sorted((store.root / "objects").glob("*")):
        if folder.name in reached:
            kept += 1
            continue
        freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        removed.append(folder.name)
        if not dry_run:
            shutil.rmtree(folder)
            (store.root / "seen" / f"{folder.name}.json").unlink(missing_ok=True)
    return Collected(kept, tuple(removed), freed)
