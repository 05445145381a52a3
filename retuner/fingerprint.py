"""A stage's name for its own result: sha256 over everything the result depends on, spelled one way.

The spelling is canonical JSON, and what has no stable spelling is refused instead of guessed.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from retuner.errors import RetunerError, Unavailable


def spell(value: Any, where: str = "identity") -> str:
    """Canonical JSON: sorted keys, no white space, shortest floats, UTF-8.

    Errors: RetunerError for anything but null, booleans, whole numbers, finite floats, text, and
    lists and string-keyed mappings of these.
    """
    _refuse_unstable(value, where)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """64 hex digits that change exactly when the identity does."""
    return hashlib.sha256(spell(identity).encode()).hexdigest()


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed versions of distributions, without importing them. A local build tag such as
    `+cpu` is left out: it names the machine, not the release."""
    try:
        return {name: version(name).partition("+")[0] for name in sorted(names)}
    except PackageNotFoundError as error:
        raise Unavailable(
            f"the package {error.name} is not installed", "what the lock pins", "run `make -B setup`"
        ) from None


def _refuse_unstable(value: Any, where: str) -> None:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return
    if kind is float and math.isfinite(value):
        return
    if kind in (list, tuple):
        for position, item in enumerate(value):
            _refuse_unstable(item, f"{where}[{position}]")
        return
    if kind is dict and all(type(key) is str for key in value):
        for key, item in value.items():
            _refuse_unstable(item, f"{where}.{key}")
        return
    raise RetunerError(
        f"{where} is {value!r}, which cannot be part of a run's identity: it has no stable spelling",
        "null, true, false, numbers, text, and lists and mappings of these",
        "put it in Runtime if it does not change the result, else spell it as text",
    )
