"""A stage about to happen: everything its result depends on, and how to make it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from retuner.artifacts import Artifact, Facts
from retuner.code_digest import code_digest
from retuner.fingerprint import fingerprint, library_versions
from tasks.context import RunContext
from tasks.record import StageRecord

F = TypeVar("F", bound=Facts)


@dataclass(frozen=True, kw_only=True)
class Step(Generic[F]):
    stage: str
    code: tuple[str, ...]
    """`module:function`, the roots of the code that decides the result."""
    version: int = 1
    """Raised by hand when the result changes for a reason that the code does not show."""
    libraries: tuple[str, ...] = ()
    params: dict[str, Any]
    inputs: dict[str, Any]
    """Digests of what comes in."""
    uses: tuple[Artifact[Any], ...] = ()
    """Stored inputs; every byte of them is hashed before the work begins."""
    facts: type[F]
    build: Callable[[Path, Path], F]
    still_stands: Callable[[Artifact[F]], bool] = lambda artifact: True
    """Whether what a stored result speaks of, outside the store, is still there."""

    def identity(self, context: RunContext) -> dict[str, Any]:
        roots = (*self.code, f"{self.facts.__module__}:{self.facts.__name__}")
        return {
            "stage": self.stage,
            "version": self.version,
            "params": self.params,
            "inputs": self.inputs,
            "code": [code_digest(root, context.code_notes) for root in roots],
            "libraries": library_versions(self.libraries),
        }


def look_up(context: RunContext, step: Step[F]) -> Artifact[F] | None:
    """The stored result, if it can be served. Computes nothing, takes no lock."""
    began = time.monotonic()
    name = fingerprint(step.identity(context))
    found = context.store.find(step.stage, name, step.facts)
    if found is None or not step.still_stands(found):
        return None
    context.records.append(StageRecord(step.stage, "cached", time.monotonic() - began, name))
    return found


def carry_out(context: RunContext, step: Step[F]) -> tuple[Artifact[F], bool]:
    """The result, and whether it was there already. One process at a time for one fingerprint."""
    began = time.monotonic()
    identity = step.identity(context)
    name = fingerprint(identity)
    with context.store.lock(name, step.stage):
        found = context.store.find(step.stage, name, step.facts)
        if cached := found is not None and step.still_stands(found):
            made = found
        else:
            if found:
                context.store.forget(name)
            for artifact in step.uses:
                context.store.verify(artifact)
            context.observer.stage(step.stage)
            made = context.store.make(step.stage, identity, step.facts, step.build)
    record = StageRecord(step.stage, "cached" if cached else "computed", time.monotonic() - began, name)
    context.records.append(record)
    context.observer.finished(record)
    return made, cached
