"""Checkpoints that are whole or do not count.

    work/staging/          where the Trainer writes; whatever is left there is thrown away at the start
    work/sealed/step-N/    a checkpoint, its files on the disk before their manifest, both before this name
    work/broken-step-N*/   a sealed checkpoint whose bytes changed, kept for whoever wants to know why

The Trainer itself would resume from the highest number, valid or not, and without an optimizer, scheduler or
generator state it goes on silently with another one.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retuner.errors import RetunerError
from retuner.files import fsync_folder, fsync_tree, sha256_file, write_whole

MANIFEST = "manifest.json"
NEEDED = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
}
"""Without any one of these a resumed run is another run. Of several processes each has a state of its generators:
rng_state_0.pth and so on."""
KEPT = 2


class Broken(Exception):
    """Why a checkpoint may not be resumed from."""


def clear_staging(work: Path) -> Path:
    """An empty folder for the Trainer to write into."""
    shutil.rmtree(work / "staging", ignore_errors=True)
    (work / "staging").mkdir(parents=True)
    return work / "staging"


def seal(work: Path, staged: Path, step: int, keep: int | None = None) -> Path:
    """Publish a checkpoint that the Trainer has written, and let go of all but the newest `KEPT` and that of
    the step `keep`.

    A process that is killed in between leaves the older checkpoints as they were.
    """
    fsync_tree(staged)
    body = {"step": step, "files": _files(staged)}
    write_whole(staged / MANIFEST, json.dumps(body, sort_keys=True).encode())
    made = sealed(work, step)
    made.parent.mkdir(exist_ok=True)
    os.rename(staged, made)
    fsync_folder(made.parent)
    for old in _newest_first(work)[KEPT:]:
        if _step(old) == keep:
            continue
        # Out of the way in one go, so that a half-deleted checkpoint is never met.
        os.rename(old, staged)
        shutil.rmtree(staged)
    return made


def newest_whole(
    work: Path, say: Callable[[str], None], needs: Callable[[Path], int | None] = lambda checkpoint: None
) -> Path | None:
    """The newest checkpoint of which every byte is what its manifest says, or None.

    `needs` names the step of another one, without which a whole one is of no use either. Those that cannot be
    used are moved aside, and said.
    """
    for checkpoint in _newest_first(work):
        try:
            _check(checkpoint)
            if (other := needs(checkpoint)) is not None:
                _check_other(work, other)
            return checkpoint
        except Broken as reason:
            aside = work / f"broken-{checkpoint.name}-{time.time_ns()}"
            os.rename(checkpoint, aside)
            say(f"train: the checkpoint {checkpoint.name} is not used, {reason}; it is set aside in {aside}")
    return None


def sealed(work: Path, step: int) -> Path:
    return work / "sealed" / f"step-{step}"


def steps(work: Path) -> list[int]:
    """Of which there is a sealed checkpoint, newest first."""
    return [step_of(checkpoint.name) for checkpoint in _newest_first(work)]


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def why_broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None when every byte of it is what its manifest says."""
    try:
        _check(checkpoint)
    except Broken as reason:
        return str(reason)
    return None


def processes(checkpoint: Path) -> int:
    """How many trained together when it was made."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def read_weights(work: Path, step: int) -> dict[str, Any]:
    """The adapter in the checkpoint of a step. Errors: RetunerError when a byte of it is not what was sealed."""
    from safetensors.torch import load_file

    try:
        _check(sealed(work, step))
    except Broken as reason:
        raise RetunerError(
            f"the checkpoint {sealed(work, step).name} cannot be used, {reason}",
            "the adapter that was the best, as it was sealed",
            "run again: training goes on from what is whole",
        ) from None
    return load_file(sealed(work, step) / "adapter_model.safetensors")


def _newest_first(work: Path) -> list[Path]:
    return sorted((work / "sealed").glob("step-*"), key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return step_of(checkpoint.name)


def _check(checkpoint: Path) -> None:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        step, recorded = manifest["step"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Broken(f"its manifest cannot be read ({error})") from None
    if step != _step(checkpoint):
        raise Broken(f"its manifest is that of step {step}")
    generators = {"rng_state.pth"} if "rng_state_0.pth" in recorded else set()
    if lacking := sorted(NEEDED - generators - recorded.keys()):
        raise Broken(f"it was sealed without {', '.join(lacking)}")
    found = _files(checkpoint)
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            raise Broken(f"{name} is gone")
        if name not in recorded:
            raise Broken(f"{name} does not belong to it")
        if found[name] != recorded[name]:
            raise Broken(f"the bytes of {name} changed")


def _check_other(work: Path, step: int) -> None:
    try:
        _check(sealed(work, step))
    except Broken as reason:
        raise Broken(f"because step-{step}, which it needs, cannot be: {reason}") from None


def _files(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Every file but the manifest: sha256 and size."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    return {
        path.relative_to(checkpoint).as_posix(): {"sha256": sha256_file(path), "size": path.stat().st_size}
        for path in files
        if path.name != MANIFEST
    }
