"""What a registered version consists of, as files: the adapter, what it stands on, and every file's digest.

artifacts/adapter/         adapter_model.safetensors, adapter_config.json
artifacts/retuner.json     the base by digest, and how the evaluation ran it
artifacts/lineage.json     where the adapter came from
code/retuner/              the code that answered in the evaluation
mlflow_model.py, MLmodel   how MLflow loads it
retuner-manifest.json      relpath to sha256 of all of these; its own sha256 is a tag of the version
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner.errors import Refused
from retuner.files import sha256_file
from retuner.fingerprint import spell

if TYPE_CHECKING:  # a fully cached run ends before pydantic alone would have been imported
    from retuner.artifacts import Adapter, Base
    from retuner.params import Params

ADAPTER = "artifacts/adapter"
SETTINGS = "artifacts/retuner.json"
LINEAGE = "artifacts/lineage.json"
MANIFEST = "retuner-manifest.json"
WEIGHTS = "adapter_model.safetensors"


def stage_parts(folder: Path, adapter: Adapter, base: Base, params: Params, lineage: dict[str, Any]) -> None:
    """Write `artifacts/` and `code/` into an empty folder. Errors: Refused when the adapter changed."""
    target = folder / ADAPTER
    target.mkdir(parents=True)
    for path in sorted(adapter.path.glob("adapter_*")):
        shutil.copyfile(path, target / path.name)
    if sha256_file(target / WEIGHTS) != adapter.facts.sha256:
        raise Refused(f"{adapter.path / WEIGHTS} changed since it was trained", adapter.facts.sha256)
    source = params.base.model_dump(mode="json")
    source.pop("path", None)  # a folder of this machine means nothing on the one that serves
    settings = {
        "format": 1,
        "adapter_sha256": adapter.facts.sha256,
        "base": {
            "params": source,
            "source": base.facts.source,
            "weights_sha256": base.facts.weights_sha256,
            "tokenizer_sha256": base.facts.tokenizer_sha256,
            "template_sha256": base.facts.template_sha256,
        },
        "precision": params.train.precision,
        "attention": params.train.attention,
        "max_new_tokens": params.evaluate.max_new_tokens,
        "sampling": params.evaluate.model_dump(mode="json")["sampling"],
        "stop_token_ids": list(base.facts.stop_token_ids),
    }
    _write_json(folder / SETTINGS, settings)
    _write_json(folder / LINEAGE, lineage)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(__file__).parent, folder / "code" / "retuner", ignore=ignore)


def seal(folder: Path) -> str:
    """Write the manifest of everything in `folder`; its sha256 stands for the whole."""
    _write_json(folder / MANIFEST, _digests(folder))
    return sha256_file(folder / MANIFEST)


def check(folder: Path, manifest_sha256: str, adapter_sha256: str) -> None:
    """Errors: Refused when any byte, or any file more or less, is not what was registered.

    Where MLflow loads a version from a local folder it leaves a note and Python its caches. They are no part
    of the version, so this copy loses them.
    """
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)
    (folder / "registered_model_meta").unlink(missing_ok=True)
    wrong = []
    if not (folder / MANIFEST).is_file() or sha256_file(folder / MANIFEST) != manifest_sha256:
        wrong = [f"{MANIFEST} changed or is gone"]
    else:
        recorded, found = json.loads((folder / MANIFEST).read_bytes()), _digests(folder)
        wrong = [f"{n} is gone" for n in recorded.keys() - found.keys()]
        wrong += [f"{n} was added" for n in found.keys() - recorded.keys()]
        wrong += [
            f"the bytes of {n} changed" for n in recorded.keys() & found.keys() if recorded[n] != found[n]
        ]
    if not wrong and sha256_file(folder / ADAPTER / WEIGHTS) != adapter_sha256:
        wrong = ["the adapter is not the one the version names"]
    if wrong:
        raise Refused(
            f"the registered files are damaged: {'; '.join(sorted(wrong))}",
            "every byte as it was registered",
            "restore the artifact store from a backup, or delete the version and its logged model in MLflow "
            "and run its params again",
        )


def _digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(files)}


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(spell(value).encode()).hexdigest()
