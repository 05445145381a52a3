"""Removing stored results that nothing reaches any more."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from retuner import registry
from retuner.errors import Refused
from retuner.mlflow_rest import without_credentials
from retuner.runtime import Runtime
from retuner.store import Store


@dataclass(frozen=True)
class Collected:
    kept: int
    removed: tuple[str, ...]
    freed_bytes: int


def collect(runtime: Runtime, keep_versions: int, dry_run: bool, forget: Iterable[str] = ()) -> Collected:
    """Remove what no alias and none of the last `keep_versions` versions of a model was made from.

    `forget` names models that are in no registry any more.

    Errors: Refused while a run is going on, whose results are not registered yet, and where the store has results of
    models that this registry does not know.
    """
    store = Store(runtime.store)
    with store.alone():
        manifests = {manifest["fingerprint"]: manifest for manifest in store.manifests()}
        models = registry.model_names(runtime)
        _refuse_another_registry(runtime, manifests.values(), {*models, *forget})
        reached = set()
        for model in models:
            for tags in registry.tags_to_keep(runtime, model, keep_versions):
                reached |= set(json.loads(tags.get("stage_fingerprints", "{}")).values())
                reached.add(tags.get("held_out_splits"))
        # The same result may stand under several fingerprints: after a change of code that was accepted, or that
        # altered nothing. A version names the first of them, and the next run asks for the last.
        results = {_result(manifests[name]) for name in reached & manifests.keys()}
        removed, freed, kept = [], 0, 0
        for folder in sorted((store.root / "objects").glob("*")):
            manifest = manifests.get(folder.name)
            if folder.name in reached or (manifest and _result(manifest) in results):
                kept += 1
                continue
            freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            removed.append(folder.name)
            if not dry_run:
                shutil.rmtree(folder)
                (store.root / "seen" / f"{folder.name}.json").unlink(missing_ok=True)
    return Collected(kept, tuple(removed), freed)


def _result(manifest: dict[str, Any]) -> tuple[str, str]:
    return manifest["stage"], manifest["digest"]


def _refuse_another_registry(runtime: Runtime, manifests: Iterable[dict[str, Any]], known: set[str]) -> None:
    made = {manifest["facts"]["model_name"] for manifest in manifests if manifest["stage"] == "register"}
    if unknown := sorted(made - known):
        raise Refused(
            f"the store has results of {', '.join(unknown)}, which the registry at "
            f"{without_credentials(runtime.mlflow_uri)} does not know",
            "the registry that their versions are in",
            "set RETUNER_TRACKING_URI or --tracking-uri to it; or, if they were deleted for good: "
            + " ".join(f"--forget {name}" for name in unknown),
        )
