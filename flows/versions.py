"""Which version a person means, and what its report was."""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

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
    """A number, or what an alias such as `candidate` points to. Errors: Refused."""
    if re.fullmatch(r"[0-9]{1,9}", version):
        return int(version)
    if number := read_alias(runtime, model, version):
        return number
    raise Refused(
        f"{model} has no version {version!r}",
        "a version's number, or one of the aliases candidate, production, previous",
        f"retuner history --model {model}",
    )


def compare_versions(runtime: Runtime, model: str, a: int, b: int) -> Comparison:
    """The two reports side by side. Errors: Refused when there is no such version or nothing is shared."""
    with TemporaryDirectory() as folder:
        report_a = registry.fetch_report(runtime, model, a, Path(folder, "a"))
        return compare(report_a, registry.fetch_report(runtime, model, b, Path(folder, "b")))


def history_lines(entries: tuple[dict[str, object], ...]) -> list[str]:
    """A line for each change of production, oldest first."""
    lines = []
    for entry in entries:
        if entry["event"] not in ("done", "outside"):
            continue
        told = {k: v for k, v in entry.items() if k in ("from", "to", "found", "reason", "actor")}
        lines.append(f"{entry['at']}  {entry['event']:<8} {json.dumps(told, ensure_ascii=False)}")
    return lines
