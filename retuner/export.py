"""A registered adapter in other shapes, each published only with a certificate that it still does the same.

The export is written aside, loaded from there as its users would, held against base and adapter, and renamed into place
with `certificate.json` in it; an export that fails is never seen.
"""

import json
import os
import platform
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from retuner.errors import Refused
from retuner.export_source import Source
from retuner.exported_model import Shape, base_and_adapter, exported
from retuner.files import disk_full_said, fsync_folder, fsync_tree, sha256_file
from retuner.fingerprint import library_versions
from retuner.gguf_adapter import write_gguf
from retuner.lora import WEIGHTS
from retuner.lora_file import read_lora
from retuner.loralib_file import write_state
from retuner.loralib_format import to_loralib
from retuner.merged import write_merged
from retuner.observe import Observer
from retuner.parity import compare
from retuner.skeleton import empty_model
from retuner.split_projections import write_split

SHAPES: tuple[Shape, ...] = get_args(Shape)
CERTIFICATE = "certificate.json"
LIBRARIES = ("gguf", "peft", "safetensors", "torch", "transformers")


def export(
    source: Source,
    shape: Shape,
    out: Path,
    device: str,
    observer: Observer,
    enable_lora: Mapping[str, tuple[bool, ...]] | None = None,
) -> dict[str, Any]:
    """Write the new folder `out`; returns what its certificate says.

    Errors: Refused when `out` is there already, when the shape cannot hold the adapter, and when what was written
    does not do what base and adapter do.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    with disk_full_said(out.parent):
        try:
            draft.mkdir()
            stored_as = _write(draft, source, shape, enable_lora or {}, observer)
            observer.say(f"export: written as {shape}; holding it against base and adapter")
            reference, asked = base_and_adapter(source, device)
            parity = compare(reference, exported(draft, source, shape, asked, reference, device), stored_as)
            certificate = {
                "format": 1,
                "shape": shape,
                "source": {
                    "name": source.name,
                    "adapter_sha256": sha256_file(source.adapter / WEIGHTS),
                    "base": source.base_facts,
                },
                "parity": {
                    **asdict(parity),
                    "computed_in": "float32",
                    "stored_as": stored_as,
                    "prompts_from": source.prompts_from,
                    "new_tokens_at_most": asked.max_new_tokens,
                },
                "files": _digests(draft),
                "versions": {"python": platform.python_version(), **library_versions(LIBRARIES)},
            }
            text = json.dumps(certificate, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
            (draft / CERTIFICATE).write_text(text + "\n", encoding="utf-8")
            publish(draft, out)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return certificate


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise Refused(
            f"{out} is there already",
            "a folder that does not exist: nothing is overwritten",
            "remove it, or name another one",
        )


def publish(draft: Path, out: Path) -> None:
    """Make the finished folder `draft` to `out`: whole or absent. Errors: Refused when `out` is there."""
    fsync_tree(draft)
    refuse_existing(out)
    try:
        os.rename(draft, out)
    except OSError:
        refuse_existing(out)  # someone was faster
        raise
    fsync_folder(out.parent)


def _write(
    draft: Path, source: Source, shape: Shape, enable_lora: Mapping[str, tuple[bool, ...]], observer: Observer
) -> str:
    """The files of the export. Returns the dtype whose precision they have."""
    lora = read_lora(source.adapter)
    match shape:
        case "merged":
            return write_merged(draft, source.base, source.adapter)
        case "split":
            write_split(draft, source.base, source.adapter)
        case "loralib":
            if lora.config["use_rslora"]:
                observer.say(
                    "export: loralib has no rsLoRA; its alpha is alpha·√rank, which gives the same scale"
                )
            write_state(draft, *to_loralib(lora, empty_model(source.base), enable_lora))
        case "gguf":
            write_gguf(draft, source.base, source.adapter, source.name)
    return "float32"


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
