"""The few questions that a fully cached run asks the model registry, answered in milliseconds.

MLflow's SQLite file is read as it is, an MLflow server through its REST API; mlflow is imported only for
other stores and for servers that want credentials we do not know of. A test pins the answers to mlflow's own.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from retuner.errors import Unavailable
from retuner.mlflow_rest import Denied, call, is_server
from retuner.runtime import Runtime

PRODUCTION, PREVIOUS, CANDIDATE = "production", "previous", "candidate"

DELETED = "Deleted_Internal"
"""The stage MLflow's SQL store gives a version when it is deleted; the row stays."""

PAGE = 1000
"""Versions that a server is asked for at once."""


class Incumbent(NamedTuple):
    version: int
    adapter_sha256: str


class HeldOut(NamedTuple):
    """What a version was scored on, as its tags tell."""

    version: int
    digest: str
    """sha256 of its held_out.jsonl."""
    rule: str
    """`retuner.held_out.split_rule` of its params."""
    splits: str
    """The fingerprint of the `prepare` result that has it, empty when it is not told."""


def read_alias(runtime: Runtime, model_name: str, alias: str) -> int | None:
    """The version an alias points to. Errors: Unavailable."""
    uri = runtime.mlflow_uri
    if path := sqlite_path(uri):
        rows = _query(
            path,
            "SELECT version FROM registered_model_aliases WHERE name = ? AND alias = ?",
            (model_name, alias),
        )
        return int(rows[0][0]) if rows else None
    if is_server(uri):
        try:
            found = _get(uri, "registered-models/alias", {"name": model_name, "alias": alias})
            return int(found["model_version"]["version"]) if found else None
        except Denied:
            pass  # mlflow reads credentials from more places, or says what is wrong with them
    from retuner import registry

    return registry.alias(runtime, model_name, alias)


def read_version(runtime: Runtime, model_name: str, version: int) -> dict[str, str] | None:
    """The tags of a version, None where there is no such version. Errors: Unavailable."""
    uri = runtime.mlflow_uri
    if path := sqlite_path(uri):
        alive = _query(
            path,
            "SELECT 1 FROM model_versions WHERE name = ? AND version = ? AND current_stage != ?",
            (model_name, version, DELETED),
        )
        if not alive:
            return None
        return dict(
            _query(
                path,
                "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?",
                (model_name, version),
            )
        )
    if is_server(uri):
        try:
            found = _get(uri, "model-versions/get", {"name": model_name, "version": version})
            return _tags(found["model_version"]) if found else None
        except Denied:
            pass
    from retuner import registry

    return registry.version_tags(runtime, model_name, version)


def find_version(runtime: Runtime, model_name: str, adapter_sha256: str) -> int | None:
    """The (lowest) version of this adapter. Errors: Unavailable."""
    uri = runtime.mlflow_uri
    if path := sqlite_path(uri):
        rows = _query(
            path,
            "SELECT v.version FROM model_versions v JOIN model_version_tags t"
            " ON t.name = v.name AND t.version = v.version"
            " WHERE v.name = ? AND v.current_stage != ? AND t.key = 'adapter_sha256' AND t.value = ?"
            " ORDER BY v.version",
            (model_name, DELETED, adapter_sha256),
        )
        return int(rows[0][0]) if rows else None
    if is_server(uri):
        try:
            asked = f"name = '{model_name}' AND tags.adapter_sha256 = '{adapter_sha256}'"
            found = _get(uri, "model-versions/search", {"filter": asked, "max_results": 1000})
            versions = [int(v["version"]) for v in (found or {}).get("model_versions", [])]
            return min(versions, default=None)
        except Denied:
            pass
    from retuner import registry

    return min(registry.versions_of(runtime, model_name, adapter_sha256), default=None)


def held_out_sets(runtime: Runtime, model_name: str) -> list[HeldOut]:
    """Of every version whose tags tell its held-out set, oldest first. Errors: Unavailable."""
    return [
        HeldOut(version, tags["held_out_digest"], tags["split_rule"], tags.get("held_out_splits", ""))
        for version, tags in sorted(_all_tags(runtime, model_name).items())
        if {"held_out_digest", "split_rule"} <= tags.keys()
    ]


def splits_of(tags: dict[str, str]) -> str:
    """The fingerprint of the `prepare` result that a version was made from, empty when its tags do not tell."""
    return json.loads(tags.get("stage_fingerprints", "{}")).get("prepare", "")


def _all_tags(runtime: Runtime, model_name: str) -> dict[int, dict[str, str]]:
    """Version to those of its tags that tell what it was scored on, or to all its tags."""
    uri = runtime.mlflow_uri
    if path := sqlite_path(uri):
        rows = _query(
            path,
            "SELECT v.version, t.key, t.value FROM model_versions v JOIN model_version_tags t"
            " ON t.name = v.name AND t.version = v.version WHERE v.name = ? AND v.current_stage != ?"
            " AND t.key IN ('held_out_digest', 'split_rule', 'held_out_splits')",
            (model_name, DELETED),
        )
        found: dict[int, dict[str, str]] = {}
        for version, key, value in rows:
            found.setdefault(int(version), {})[key] = value
        return found
    if is_server(uri):
        try:
            return _all_tags_of_server(uri, model_name)
        except Denied:
            pass
    from retuner import registry

    return registry.all_tags(runtime, model_name)


def _all_tags_of_server(uri: str, model_name: str) -> dict[int, dict[str, str]]:
    found, asked = {}, {"filter": f"name = '{model_name}'", "max_results": PAGE}
    while True:
        page = _get(uri, "model-versions/search", asked) or {}
        found.update({int(v["version"]): _tags(v) for v in page.get("model_versions", [])})
        if not page.get("next_page_token"):
            return found
        asked["page_token"] = page["next_page_token"]


def still_registered(runtime: Runtime, model_name: str, version: int, adapter_sha256: str) -> bool:
    """Whether this version is there and holds this adapter. Errors: Unavailable."""
    tags = read_version(runtime, model_name, version)
    return tags is not None and tags.get("adapter_sha256") == adapter_sha256


def incumbent(runtime: Runtime, model_name: str, adapter_sha256: str) -> Incumbent | None:
    """What an adapter is to be compared with; None when there is nothing.

    A new adapter is compared with production. One that is registered was compared already, and what with stands
    on its version: so its run stays cached after its promotion, or another's, and is not decided twice.
    """
    if known := find_version(runtime, model_name, adapter_sha256):
        tags = read_version(runtime, model_name, known) or {}
        if not tags.get("compared_with"):
            return None
        return Incumbent(int(tags["compared_with"]), tags["compared_with_sha256"])
    version = read_alias(runtime, model_name, PRODUCTION)
    tags = (read_version(runtime, model_name, version) if version else None) or {}
    if version is None or not tags.get("adapter_sha256"):
        return None
    return Incumbent(version, tags["adapter_sha256"])


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLAlchemy URI such as sqlite:////srv/mlflow.db; None for any other store."""
    scheme, separator, rest = uri.partition(":///")
    if not separator or scheme.partition("+")[0] != "sqlite":
        return None
    return Path(rest.partition("?")[0])


def _query(path: Path, sql: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Rows, none where the file or the table is not there yet. Never creates the file, nor changes it but for rolling
    back what a killed writer left half done: for that it is not opened read-only."""
    import sqlite3

    if not path.exists():
        return []
    try:
        address = f"{path.absolute().as_uri()}?mode=rw"
        with closing(sqlite3.connect(address, uri=True, timeout=5.0)) as connection:
            return connection.execute(sql, values).fetchall()
    except sqlite3.DatabaseError as error:
        if "no such table" in str(error):
            return []
        raise Unavailable(
            f"the MLflow database {path} cannot be read: {error}",
            "a SQLite file that MLflow 3 wrote",
            "wait until no one writes to it, or repair it",
        ) from None


def _get(uri: str, endpoint: str, fields: dict[str, Any]) -> dict[str, Any] | None:
    status, found = call(uri, "GET", endpoint, fields)
    if status == 200:
        return found
    # To MLflow a missing version or model is a missing resource, a missing alias an invalid parameter.
    absent = "INVALID_PARAMETER_VALUE" if endpoint.endswith("/alias") else "RESOURCE_DOES_NOT_EXIST"
    if found.get("error_code") in ("RESOURCE_DOES_NOT_EXIST", absent):
        return None
    raise Unavailable(
        f"MLflow answers {endpoint} with status {status}: {found.get('message') or found}",
        "an answer about a registered model",
        "check the tracking URI and the server's log",
    )


def _tags(version: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag.get("value", "") for tag in version.get("tags", [])}
