"""Model versions in MLflow's registry: one for each adapter, carrying where it came from.

MLflow never asks whether a version is there already, and a client that loses an answer asks again. So a
version is looked for by its adapter's digest first, and surplus ones are removed after: whoever comes
last, exactly one is left.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retuner import bundle
from retuner.errors import Refused
from retuner.files import disk_full_said, sha256_file
from retuner.fingerprint import library_versions
from retuner.registry_reads import (
    CANDIDATE,
    PREVIOUS,
    PRODUCTION,
    Incumbent,
    read_version,
    sqlite_path,
)
from retuner.runtime import Runtime
from retuner.tracking import Run, again, mlflow_client, mlflow_said

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

    from retuner.artifacts import Adapter, Base, Decision
    from retuner.params import Params

REQUIREMENTS = ("filelock", "gguf", "jinja2", "mlflow", "peft", "pydantic", "torch", "transformers")
"""What a process needs to load a version; stated, so that MLflow does not load the model to guess."""

FIRST = {"split_rule", "held_out_digest", "held_out_splits"}
"""Tags of the first run that made an adapter: another split can end in the same bytes."""

REPORT = "evaluation"
"""Where in a run's artifacts `report.json`, `answers.jsonl` and `losses.jsonl` lie."""


def register_version(
    run: Run,
    model_name: str,
    adapter: Adapter,
    base: Base,
    params: Params,
    decision: Decision,
    compared_with: Incumbent | None,
    tags: dict[str, str],
    lineage: dict[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """The one version of this adapter, with its decision and `tags`, as the `candidate`.

    Registering it again (a retry, or another decision on the same adapter) returns the same number.
    Errors: Unavailable; Refused when the adapter's bytes changed since training.
    """
    client = mlflow_client(run.runtime)
    with mlflow_said(run.runtime):
        _ensure_model(client, model_name)
        known = {
            **tags,
            "adapter_sha256": adapter.facts.sha256,
            "run_id": run.run_id,
            "base": base.facts.source,
            "base_weights_sha256": base.facts.weights_sha256,
            "params_sha256": bundle.digest_of(params.spelled()),
            "gate_passed": json.dumps(decision.passed),
            "decision": decision.model_dump_json(),
            "compared_with": str(compared_with.version) if compared_with else "",
            "compared_with_sha256": compared_with.adapter_sha256 if compared_with else "",
        }
        if not _versions(client, model_name, adapter.facts.sha256):
            model = _logged_model(client, run, model_name, adapter, base, params, lineage)
            known["logged_model"] = model.model_id
            known["bundle_sha256"] = model.tags["bundle_sha256"]
            # Not `models:/<id>` as the source: MLflow would look that up at its global URI.
            again(
                client.create_model_version,
                model_name,
                model.artifact_location,
                run_id=run.run_id,
                tags=known,
                model_id=model.model_id,
            )
        version = _reconcile(client, model_name, adapter.facts.sha256, say)
        if (made := known.get("logged_model")) and made == version.tags["logged_model"]:
            # By this MLflow's page of the model shows its version.
            shown = json.dumps([{"name": model_name, "version": str(version.version)}])
            again(client.set_logged_model_tags, made, {"mlflow.modelVersions": shown})
        _update_tags(client, model_name, version, known)
        again(client.set_registered_model_alias, model_name, CANDIDATE, str(version.version))
    return int(version.version)


def fetch_adapter(
    runtime: Runtime, model_name: str, version: int, into: Path, base: Base | None = None
) -> Path:
    """Download the adapter of a version into the folder `into`, which is replaced.

    Errors: Unavailable; Refused when there is no such version, when its bytes are not those that were
    registered, or when it was trained on another base than `base`.
    """
    tags = tags_of(runtime, model_name, version)
    if base and tags["base_weights_sha256"] != base.facts.weights_sha256:
        raise Refused(
            f"{model_name} version {version} was trained on another base, {tags['base']}",
            f"the base of this run, {base.facts.source}: both are scored in one process on one base",
            "register adapters of another base under another register.model_name",
        )
    _download_version(runtime, model_name, version, bundle.ADAPTER, into)
    found = sha256_file(into / bundle.WEIGHTS) if (into / bundle.WEIGHTS).is_file() else "nothing"
    if found != tags["adapter_sha256"]:
        raise Refused(
            f"the adapter of {model_name} version {version} is damaged: its sha256 is {found}",
            tags["adapter_sha256"],
            "restore the artifact store from a backup, or promote another version",
        )
    return into


def fetch_bundle(runtime: Runtime, model_name: str, version: int, into: Path) -> Path:
    """Download all of a version into the folder `into`, which is replaced; every byte is checked.

    See `retuner.bundle` for what lies where. Errors: Unavailable; Refused when there is no such version or
    a byte differs from what was registered.
    """
    tags = tags_of(runtime, model_name, version)
    _download_version(runtime, model_name, version, "", into)
    bundle.check(into, tags["bundle_sha256"], tags["adapter_sha256"])
    return into


def fetch_lineage(runtime: Runtime, model_name: str, version: int) -> dict[str, Any]:
    """Where a version came from, as it was registered. Errors: as `fetch_bundle`."""
    with tempfile.TemporaryDirectory() as folder:
        whole = fetch_bundle(runtime, model_name, version, Path(folder, "bundle"))
        return json.loads((whole / bundle.LINEAGE).read_bytes())


def fetch_report(runtime: Runtime, model_name: str, version: int, into: Path) -> Path:
    """Download the report that decided about a version (`retuner.artifacts.ReportFacts`) into a new folder.

    Errors: Unavailable; Refused when there is no such version or a byte differs from what decided.
    """
    tags = tags_of(runtime, model_name, version)
    client = mlflow_client(runtime)
    place = f"{client.get_run(tags['run_id']).info.artifact_uri}/{REPORT}"
    _download(runtime, place, into, f"the report of {model_name} version {version}")
    # A stored result's digest is spelled from its files in the same way.
    found = {path.name: sha256_file(path) for path in into.iterdir()}
    if bundle.digest_of(found) != tags.get("report_digest"):
        raise Refused(
            f"the report of {model_name} version {version} is not the one that decided about it",
            f"the report with digest {tags.get('report_digest', 'unknown')}",
            "run its params again: the report is made anew",
        )
    return into


def model_names(runtime: Runtime) -> list[str]:
    """The registered models. Errors: Unavailable."""
    path = sqlite_path(runtime.mlflow_uri)
    if path and not path.exists():
        return []
    with mlflow_said(runtime):
        return sorted(found.name for found in _all(mlflow_client(runtime).search_registered_models))


def tags_to_keep(runtime: Runtime, model_name: str, last: int) -> list[dict[str, str]]:
    """The tags of the `last` newest versions of a model, and of every version that an alias points to."""
    found = all_tags(runtime, model_name)
    with mlflow_said(runtime):
        aliases = mlflow_client(runtime).get_registered_model(model_name).aliases
    kept = {*sorted(found, reverse=True)[:last], *map(int, aliases.values())}
    return [tags for version, tags in found.items() if version in kept]


def all_tags(runtime: Runtime, model_name: str) -> dict[int, dict[str, str]]:
    """The tags of every version, through mlflow."""
    with mlflow_said(runtime):
        found = list(_all(mlflow_client(runtime).search_model_versions, f"name = '{model_name}'"))
    return {int(version.version): dict(version.tags) for version in found}


def tags_of(runtime: Runtime, model_name: str, version: int) -> dict[str, str]:
    """The tags of a version that we registered. Errors: Unavailable; Refused when there is none."""
    tags = read_version(runtime, model_name, version)
    if tags is None or not {"adapter_sha256", "bundle_sha256"} <= tags.keys():
        what = "is not one that retuner registered" if tags is not None else "does not exist"
        raise Refused(
            f"{model_name} version {version} {what}",
            "a version that `retuner run` registered",
            "see the versions in the MLflow UI, or `retuner history`",
        )
    return tags


def set_alias(runtime: Runtime, model_name: str, alias: str, version: int | None) -> None:
    """Point an alias at a version, or at nothing. Errors: Unavailable."""
    client = mlflow_client(runtime)
    with mlflow_said(runtime):
        if version is None:
            again(client.delete_registered_model_alias, model_name, alias)
        else:
            again(client.set_registered_model_alias, model_name, alias, str(version))


def alias(runtime: Runtime, model_name: str, name: str) -> int | None:
    """As `registry_reads.read_alias`, through mlflow."""
    from mlflow.exceptions import MlflowException

    with mlflow_said(runtime):
        try:
            return int(mlflow_client(runtime).get_model_version_by_alias(model_name, name).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def version_tags(runtime: Runtime, model_name: str, version: int) -> dict[str, str] | None:
    """As `registry_reads.read_version`, through mlflow."""
    return all_tags(runtime, model_name).get(version)


def versions_of(runtime: Runtime, model_name: str, adapter_sha256: str) -> list[int]:
    """The versions of an adapter, through mlflow: one, but while several processes register it."""
    found = sorted(all_tags(runtime, model_name).items())
    return [version for version, tags in found if tags.get("adapter_sha256") == adapter_sha256]


def version_of_run(runtime: Runtime, model_name: str, run_id: str) -> int | None:
    """The version that an MLflow run registered or was the last to decide about, None where there is none."""
    search = mlflow_client(runtime).search_model_versions
    with mlflow_said(runtime):
        for of_run in (f"run_id = '{run_id}'", f"tags.run_id = '{run_id}'"):
            if found := [int(each.version) for each in _all(search, f"name = '{model_name}' AND {of_run}")]:
                return min(found)
    return None


def _all(search: Callable[..., Any], *asked: str) -> Iterator[Any]:
    """What MLflow finds, page by page."""
    token = None
    while True:
        page = search(*asked, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _ensure_model(client: MlflowClient, model_name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(client: MlflowClient, model_name: str, adapter_sha256: str) -> list[Any]:
    asked = f"name = '{model_name}' AND tags.adapter_sha256 = '{adapter_sha256}'"
    return sorted(client.search_model_versions(asked), key=lambda found: int(found.version))


def _reconcile(client: MlflowClient, model_name: str, adapter_sha256: str, say: Callable[[str], None]) -> Any:
    """Leave one version of the adapter: one that is or was in production, else the first."""
    from mlflow.exceptions import MlflowException

    found = _versions(client, model_name, adapter_sha256)
    aliases = client.get_registered_model(model_name).aliases
    serving = {int(aliases[name]) for name in (PRODUCTION, PREVIOUS) if name in aliases}
    keep = next((v for v in found if int(v.version) in serving), found[0])
    for surplus in found:
        if surplus is keep:
            continue
        say(f"{model_name} version {surplus.version} holds the adapter of version {keep.version}: removed")
        try:
            again(client.delete_model_version, model_name, surplus.version)
            model_id = surplus.tags.get("logged_model")
            if model_id and model_id != keep.tags.get("logged_model"):
                again(client.delete_logged_model, model_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # another process was faster
                raise
    return keep


def _update_tags(client: MlflowClient, model_name: str, version: Any, tags: dict[str, str]) -> None:
    kept = {"logged_model", "bundle_sha256", *(FIRST & version.tags.keys())}
    for key, value in tags.items():
        if key not in kept and version.tags.get(key) != value:
            again(client.set_model_version_tag, model_name, version.version, key, value)


def _logged_model(
    client: MlflowClient,
    run: Run,
    model_name: str,
    adapter: Adapter,
    base: Base,
    params: Params,
    lineage: dict[str, Any],
) -> LoggedModel:
    """The adapter as a model in the experiment: what an earlier attempt finished, else a new one."""
    from mlflow.entities import LoggedModelOutput

    asked = f"tags.adapter_sha256 = '{adapter.facts.sha256}'"
    for model in client.search_logged_models([run.experiment_id], filter_string=asked):
        if model.status == "READY" and "bundle_sha256" in model.tags:
            return model
    model = again(
        client.create_logged_model,
        run.experiment_id,
        name=model_name,
        source_run_id=run.run_id,
        tags={"adapter_sha256": adapter.facts.sha256},
        model_type="lora-adapter",
    )
    try:
        with tempfile.TemporaryDirectory() as folder, disk_full_said(Path(folder)):
            whole = _build_bundle(Path(folder), run, model, adapter, base, params, lineage)
            sealed = bundle.seal(whole)
            client.log_model_artifacts(model.model_id, str(whole))
        again(client.set_logged_model_tags, model.model_id, {"bundle_sha256": sealed})
        again(client.log_outputs, run.run_id, [LoggedModelOutput(model.model_id, 0)])
    except BaseException:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    again(client.finalize_logged_model, model.model_id, "READY")
    return client.get_logged_model(model.model_id)


def _build_bundle(
    folder: Path,
    run: Run,
    model: LoggedModel,
    adapter: Adapter,
    base: Base,
    params: Params,
    lineage: dict[str, Any],
) -> Path:
    """Write the model folder, as MLflow loads it, below `folder`."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types.schema import AnyType, ColSpec, Schema

    staged, whole = folder / "staged", folder / "model"
    staged.mkdir()
    bundle.stage_parts(staged, adapter, base, params, lineage)
    # `any`, because messages may come as a list or, from CSV and the command line, as its JSON.
    columns = [ColSpec(AnyType(), "messages", required=False), ColSpec("string", "prompt", required=False)]
    with warnings.catch_warnings():
        # It suggests type hints and an input example, which would load the base to try it.
        warnings.simplefilter("ignore", UserWarning)
        save_model(
            path=str(whole),
            python_model=str(Path(__file__).with_name("mlflow_model.py")),
            artifacts={
                "adapter": str(staged / bundle.ADAPTER),
                "settings": str(staged / bundle.SETTINGS),
                "lineage": str(staged / bundle.LINEAGE),
            },
            code_paths=[str(staged / "code" / "retuner")],
            pip_requirements=[f"{name}=={v}" for name, v in library_versions(REQUIREMENTS).items()],
            signature=ModelSignature(inputs=Schema(columns), outputs=Schema([ColSpec("string")])),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                run_id=run.run_id,
                model_id=model.model_id,
            ),
        )
    for cache in whole.rglob("__pycache__"):
        shutil.rmtree(cache)
    # MLflow notes where each part lay on this machine.
    described = (whole / "MLmodel").read_text()
    for place in (staged, Path(__file__).parent):
        described = described.replace(f"{place}/", "")
    (whole / "MLmodel").write_text(described)
    return whole


def _download_version(runtime: Runtime, model_name: str, version: int, part: str, into: Path) -> None:
    with mlflow_said(runtime):
        place = mlflow_client(runtime).get_model_version_download_uri(model_name, str(version))
    _download(runtime, f"{place.rstrip('/')}/{part}".rstrip("/"), into, f"{model_name} version {version}")


def _download(runtime: Runtime, place: str, into: Path, what: str) -> None:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    shutil.rmtree(into, ignore_errors=True)
    into.parent.mkdir(parents=True, exist_ok=True)
    with mlflow_said(runtime), tempfile.TemporaryDirectory(dir=into.parent) as landing, disk_full_said(into):
        try:
            found = download_artifacts(place, dst_path=landing, tracking_uri=runtime.mlflow_uri)
        except (OSError, MlflowException) as error:
            if isinstance(error, MlflowException) and error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise Refused(
                f"the files of {what} are gone: {error}",
                f"its registered files at {place}",
                "restore the artifact store from a backup, or use another version",
            ) from None
        shutil.move(found, into)
