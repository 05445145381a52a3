"""The pipeline without Prefect: is everything there already, and if not, why not."""

from dataclasses import dataclass
from typing import Any

from flows.pipeline import STAGES, pipeline
from retuner.artifacts import Artifact, ModelVersion
from retuner.errors import Refused
from retuner.fingerprint import fingerprint
from tasks.context import RunContext
from tasks.step import Step, look_up


class NotCached(Exception):
    def __init__(self, step: Step[Any]):
        self.step = step


def cached_version(run: RunContext) -> ModelVersion | None:
    """The version this run would end in, when every stage can be served as it is."""
    try:
        return pipeline(run, lambda step: _serve(run, step))
    except NotCached:
        run.records.clear()
        return None


@dataclass(frozen=True)
class Reason:
    stage: str
    state: str
    """`cached`, `changed`, `new`, `damaged`, `gone` or `follows`."""
    fingerprint: str | None
    changes: tuple[str, ...] = ()


def reasons(run: RunContext) -> list[Reason]:
    """For each stage whether it would be served and, if not, what changed since the nearest earlier result."""
    told: list[Reason] = []

    def tell(step: Step[Any]) -> Artifact[Any]:
        was_there = run.store.folder(fingerprint(step.identity(run))).exists()
        if found := look_up(run, step):
            told.append(Reason(step.stage, "cached", found.fingerprint))
            return found
        told.append(_reason(run, step, was_there))
        raise NotCached(step)

    try:
        pipeline(run, tell)
    except NotCached as miss:
        later = STAGES[STAGES.index(miss.step.stage) + 1 :]
        told += [Reason(stage, "follows", None, (f"depends on {miss.step.stage}",)) for stage in later]
    return told


def _reason(run: RunContext, step: Step[Any], was_there: bool) -> Reason:
    identity = step.identity(run)
    name = fingerprint(identity)
    if run.store.manifest(name):
        return Reason(step.stage, "gone", name, ("the registry no longer holds the version",))
    if was_there:
        return Reason(
            step.stage, "damaged", name, ("its bytes are not what they were; the copy is set aside",)
        )
    earlier = [m for m in run.store.manifests() if m["stage"] == step.stage]
    if not earlier:
        return Reason(step.stage, "new", name, ("never computed in this store",))
    # The result that differs least, the newest of these, is the one a person means by "before".
    newest_first = sorted(earlier, key=lambda m: m["made"]["at"], reverse=True)
    changes = min((differences(m["identity"], identity) for m in newest_first), key=len)
    return Reason(step.stage, "changed", name, tuple(changes))


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """`path: before -> now` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted(before.keys() | now.keys()):
            inner = f"{where}.{key}" if where else key
            found += differences(before.get(key), now.get(key), inner)
        return found
    return [] if before == now else [f"{where}: {_short(before)} -> {_short(now)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def accept_code_change(run: RunContext, stage: str, because: str) -> str:
    """Serve the earlier result of a stage under its changed code. Returns the fingerprint it was made under.

    Errors: Refused when the stage is cached anyway, comes after one that is not, or has no earlier result.
    """
    try:
        pipeline(run, lambda step: _serve(run, step))
    except NotCached as miss:
        if miss.step.stage == stage:
            return run.store.accept(stage, miss.step.identity(run), because)
        raise Refused(
            f"{miss.step.stage} comes before {stage} and is not cached",
            "every stage before it cached",
            f"accept or compute {miss.step.stage} first",
        ) from None
    raise Refused(
        f"{stage} is cached", f"one of {', '.join(STAGES)} whose code changed", "nothing is to be done"
    )


def _serve(run: RunContext, step: Step[Any]) -> Artifact[Any]:
    if found := look_up(run, step):
        return found
    raise NotCached(step)
