"""Which version a person means, and what its report was."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from retuner import registry
from retuner.compare import Comparison, compare
from retuner.errors import Refused
from retuner.registry_reads import read_alias
from retuner.runtime import Runtime


def model_named(runtime: Runtime, model: str | None) -> str:
    """The registered model: the named one, or the only one. Errors: Refused."""
    names = registry.model_names(runtime)
    if model in names or (model is None and len(names) == 1):
        return model or names[0]
    expected = f"one of {', '.join(names)}" if names else "at least one registered model"
    found = f"there is no registered model {model!r}" if model else f"{len(names)} models are registered"
    raise Refused(found, expected, "name it with --model" if names else "`retuner run PARAMS` registers one")


def version_named(runtime: Runtime, model: str, version: str) -> int:
    """A number, what an alias such as `candidate` points to, or what an MLflow run registered.

    Errors: Refused.
    """
    if re.fullmatch(r"[0-9]{1,9}", version):
        return int(version)
    if re.fullmatch(r"[0-9a-f]{32}", version):
        number = registry.version_of_run(runtime, model, version)
    else:
        number = read_alias(runtime, model, version)
    if number:
        return number
    raise Refused(
        f"{model} has no version {version!r}",
        "a version's number, one of the aliases candidate, production, previous, or the id of its MLflow run",
        f"retuner history --model {model}",
    )


def compare_versions(runtime: Runtime, model: str, a: int, b: int) -> Comparison:
    """The two reports side by side. Errors: Refused when there is no such version or nothing is shared."""
    with TemporaryDirectory() as folder:
        report_a = registry.fetch_report(runtime, model, a, Path(folder, "a"))
        return compare(report_a, registry.fetch_report(runtime, model, b, Path(folder, "b")))


def history_lines(entries: tuple[dict[str, Any], ...]) -> list[str]:
    """A sentence for each change of production, oldest first."""
    return [f"{e['at']}  {_sentence(e)}" for e in entries if e["event"] in ("done", "outside")]


def _sentence(entry: dict[str, Any]) -> str:
    if entry["event"] == "outside":
        found, expected = (_named(entry[key]) for key in ("found", "expected"))
        return f"{found} found in production instead of {expected}: changed outside retuner"
    verb = "rolled back to" if entry["action"] == "rollback" else "promoted"
    forced = ", although its gate said no" if entry.get("forced") else ""
    because = f": {entry['reason']}" if entry["reason"] else ""
    return f"{verb} {_named(entry['to'])} over {_named(entry['from'])}{forced}, by {entry['actor']}{because}"


def _named(version: int | None) -> str:
    return "nothing" if version is None else f"version {version}"
