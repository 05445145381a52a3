"""The production alias: who may move it, from what to what, and how to move it back.

MLflow's aliases are last-write-wins and keep no history. Here a change names what it expects to replace,
checks every byte of what it puts in place, and writes its intent and its outcome to the audit log. A
crash in between is settled from the alias itself, by the next call.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retuner import audit, registry
from retuner.errors import GateSaidNo, Refused
from retuner.mlflow_rest import without_credentials
from retuner.registry_reads import PREVIOUS, PRODUCTION, read_alias
from retuner.runtime import Runtime


@dataclass(frozen=True)
class Promotion:
    model_name: str
    version: int
    replaced: int | None
    """What was in production before; the version itself when it was there already."""
    adapter_sha256: str
    notes: tuple[str, ...]
    """What else was found: changes made outside this tool, an earlier call that was cut off."""

    @property
    def already(self) -> bool:
        return self.version == self.replaced


@dataclass(frozen=True)
class History:
    entries: tuple[audit.Entry, ...]
    production: int | None
    previous: int | None
    notes: tuple[str, ...]


def promote(
    runtime: Runtime,
    model_name: str,
    version: int,
    expect_current: int | Literal["any"] | None,
    reason: str,
    actor: str,
    force: bool = False,
) -> Promotion:
    """Put a version into production. What is in production already stays there, and that is said.

    Errors: Refused when production is not `expect_current` (None: nothing), when there is no such version
    or a byte of it differs; GateSaidNo when its gate did not pass, unless `force` with a reason.
    """
    with _alone(runtime):
        notes = _settle(runtime, model_name)
        current = read_alias(runtime, model_name, PRODUCTION)
        tags = registry.tags_of(runtime, model_name, version)
        if current == version:
            return Promotion(model_name, version, version, tags["adapter_sha256"], notes)
        _expect(model_name, current, expect_current)
        if tags.get("gate_passed") != "true" and not (force and reason.strip()):
            raise GateSaidNo(
                f"{model_name} version {version} did not pass its gate",
                "a version that passed, or a forced promotion with a reason",
                f"see the decision of version {version} in the MLflow UI; "
                'if you know better: --force --because "..."',
            )
        forced = tags.get("gate_passed") != "true"
        change = {"action": "promote", "forced": forced, "reason": reason, "actor": actor}
        return _move(runtime, model_name, current, version, tags, change, notes)


def rollback(
    runtime: Runtime,
    model_name: str,
    reason: str,
    actor: str,
    expect_current: int | Literal["any"] | None = "any",
) -> Promotion:
    """Put `previous` back into production; what was there becomes `previous`.

    Errors: Refused when there is no previous version, production is not `expect_current`, or a byte differs.
    """
    with _alone(runtime):
        notes = _settle(runtime, model_name)
        current = read_alias(runtime, model_name, PRODUCTION)
        _expect(model_name, current, expect_current)
        version = read_alias(runtime, model_name, PREVIOUS)
        if version is None or version == current:
            raise Refused(
                f"{model_name} has no version to roll back to",
                f"an alias `{PREVIOUS}`, as a promotion over another version leaves it",
                "promote the version that you want",
            )
        tags = registry.tags_of(runtime, model_name, version)
        change = {"action": "rollback", "reason": reason, "actor": actor}
        return _move(runtime, model_name, current, version, tags, change, notes)


def history(runtime: Runtime, model_name: str) -> History:
    """Every recorded change of this model, oldest first, and whether the registry is where they lead.

    Changes nothing. Errors: Refused when the log was tampered with.
    """
    entries = _entries(runtime, model_name)
    production = read_alias(runtime, model_name, PRODUCTION)
    notes = []
    if unfinished := _unfinished(entries):
        notes.append(_cut_off(unfinished, production))
    elif outside := _outside(entries, production):
        notes.append(outside)
    return History(tuple(entries), production, read_alias(runtime, model_name, PREVIOUS), tuple(notes))


@contextmanager
def _alone(runtime: Runtime) -> Iterator[None]:
    from filelock import FileLock

    runtime.home.mkdir(parents=True, exist_ok=True)
    with FileLock(runtime.home / "promotion.lock"):
        yield


def _expect(model_name: str, current: int | None, expected: int | Literal["any"] | None) -> None:
    if expected != "any" and current != expected:
        raise Refused(
            f"{_named(current)} of {model_name} is in production",
            f"{_named(expected)}, as this call expects",
            "look at what changed (retuner history), then name what you mean to replace",
        )


def _move(
    runtime: Runtime,
    model_name: str,
    current: int | None,
    version: int,
    tags: dict[str, str],
    change: dict[str, Any],
    notes: tuple[str, ...],
) -> Promotion:
    with tempfile.TemporaryDirectory(dir=runtime.home) as folder:
        registry.fetch_bundle(runtime, model_name, version, Path(folder, "bundle"))
    change = {
        **change,
        **_scope(runtime, model_name),
        "id": uuid.uuid4().hex,
        "from": current,
        "to": version,
        "adapter_sha256": tags["adapter_sha256"],
        "bundle_sha256": tags["bundle_sha256"],
        "previous_before": read_alias(runtime, model_name, PREVIOUS),
    }
    write = _writer(runtime, change)
    write("intent")
    # Verifying took a while, and MLflow itself has no compare-and-set.
    if (meanwhile := read_alias(runtime, model_name, PRODUCTION)) != current:
        write("abandoned")
        _expect(model_name, meanwhile, current)
    registry.set_alias(runtime, model_name, PREVIOUS, current)
    registry.set_alias(runtime, model_name, PRODUCTION, version)
    write("done")
    return Promotion(model_name, version, current, tags["adapter_sha256"], notes)


def _settle(runtime: Runtime, model_name: str) -> tuple[str, ...]:
    """Finish the record of a call that was cut off, and record what happened outside; say both."""
    entries = _entries(runtime, model_name)
    production = read_alias(runtime, model_name, PRODUCTION)
    notes = []
    if unfinished := _unfinished(entries):
        notes.append(_cut_off(unfinished, production))
        write = _writer(runtime, {k: v for k, v in unfinished.items() if k not in ("event", *audit.CHAIN)})
        if production == unfinished["to"]:
            write("done", settled="by the next call")
        else:
            if read_alias(runtime, model_name, PREVIOUS) == unfinished["from"]:
                registry.set_alias(runtime, model_name, PREVIOUS, unfinished["previous_before"])
            write("abandoned", settled="by the next call")
        entries = _entries(runtime, model_name)
    if outside := _outside(entries, production):
        notes.append(outside)
        write = _writer(runtime, _scope(runtime, model_name))
        write("outside", found=production, expected=_last(entries))
    return tuple(notes)


def _entries(runtime: Runtime, model_name: str) -> list[audit.Entry]:
    scope = _scope(runtime, model_name)
    return [e for e in audit.verified(runtime.audit_log) if all(e[key] == scope[key] for key in scope)]


def _scope(runtime: Runtime, model_name: str) -> dict[str, Any]:
    return {"registry": without_credentials(runtime.mlflow_uri), "model_name": model_name}


def _writer(runtime: Runtime, facts: audit.Entry) -> Callable[..., None]:
    def write(event: str, **more: Any) -> None:
        audit.append(runtime.audit_log, {**facts, "event": event, **more})

    return write


def _unfinished(entries: list[audit.Entry]) -> audit.Entry | None:
    """The last intent, when nothing says what became of it."""
    settled = {entry["id"] for entry in entries if entry["event"] in ("done", "abandoned")}
    intents = [entry for entry in entries if entry["event"] == "intent"]
    return intents[-1] if intents and intents[-1]["id"] not in settled else None


def _last(entries: list[audit.Entry]) -> int | None:
    """What is in production according to the log."""
    for entry in reversed(entries):
        if entry["event"] == "done":
            return entry["to"]
        if entry["event"] == "outside":
            return entry["found"]
    return None


def _outside(entries: list[audit.Entry], production: int | None) -> str | None:
    if production == _last(entries):
        return None
    return (
        f"production is {_named(production)}, but the audit log ends with {_named(_last(entries))}: "
        "it was changed outside retuner, or from another RETUNER_HOME"
    )


def _cut_off(intent: audit.Entry, production: int | None) -> str:
    took = "took effect" if production == intent["to"] else "did not take effect"
    return f"a {intent['action']} to version {intent['to']} at {intent['at']} was cut off; it {took}"


def _named(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"
