"""Making a registered version again from what it says of itself, and comparing the bytes."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flows.cached import differences
from retuner import held_out, registry
from retuner.dataset import open_dataset
from retuner.errors import Refused, Unavailable
from retuner.files import sha256_file
from retuner.held_out import EarlierSet, HeldOutSets
from retuner.params_file import check
from retuner.runtime import Runtime
from retuner.store import Store
from retuner.warm_start import registered_start
from tasks.context import RunContext, RunObserver
from tasks.fetch_base import fetch_base
from tasks.prepare import prepare
from tasks.step import Step, carry_out
from tasks.template import template
from tasks.train import train


@dataclass(frozen=True)
class Replay:
    registered_sha256: str
    replayed_sha256: str
    differences: tuple[str, ...]
    """What differs between the identities of then and now, stage by stage: why the bytes may differ."""

    @property
    def same(self) -> bool:
        return self.registered_sha256 == self.replayed_sha256


def replay(runtime: Runtime, model: str, version: int, observer: RunObserver) -> Replay:
    """Data by its DVC digest, base by its pin, params as stored: everything up to the adapter, in a new store.

    Errors: Refused when the version carries no lineage; Unavailable when its data or base cannot be had.
    """
    lineage = registry.fetch_lineage(runtime, model, version)
    params = check(lineage["params"], f"the lineage of {model} version {version}")
    if params.base.source == "local":
        raise Refused(
            f"{model} version {version} stands on a local base, which only its digest names",
            "a base from the hub or the package registry",
            f"put a folder with that digest at {params.base.path} and use `retuner run`",
        )
    runtime.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runtime.home, prefix="replay-") as place:
        # Nothing may come from where the version's own results lie, or its bytes would be compared with themselves.
        apart = replace(
            runtime, home=Path(place, "home"), tracking_uri=f"sqlite:///{place}/mlflow.db", store_remote=None
        )
        sets = _sets_of(runtime, apart, model, lineage, Path(place), observer)
        dataset = open_dataset(_data_of(lineage["data"], Path(place, "project")))
        run = RunContext(params, apart, dataset, observer, given_sets=sets)
        if began := lineage["stages"]["train"]["identity"]["inputs"].get("warm_start"):
            run.start = registered_start(runtime, model, began)
        told: list[str] = []

        def do(step: Step[Any]) -> Any:
            then = lineage["stages"][step.stage]["identity"]
            told.extend(f"{step.stage}: {line}" for line in differences(then, step.identity(run)))
            return carry_out(run, step)[0]

        base = do(fetch_base(run, params.base))
        splits = do(prepare(run, dataset, params.prepare))
        chats = do(template(run, splits, base, params.template))
        adapter = do(train(run, chats, base, params.train))
        registered = registry.tags_of(runtime, model, version)["adapter_sha256"]
        return Replay(registered, adapter.facts.sha256, tuple(told))


def _sets_of(
    runtime: Runtime, apart: Runtime, model: str, lineage: dict[str, Any], place: Path, observer: RunObserver
) -> HeldOutSets:
    """The held-out sets that the version was prepared with."""
    told = lineage.get("held_out", {"frozen": None, "earlier": []})
    earlier = []
    for each in told["earlier"]:
        path = held_out.stored(Store(runtime.store), each["splits"], each["digest"])
        path = path or _held_out_again(runtime, apart, model, each["name"], place, observer)
        if sha256_file(path) != each["digest"]:
            raise Unavailable(
                f"the held-out set of {each['name']} is not in the store, and made again it is another",
                "the set that train was compared with",
                "bring back the store, or the code of that version",
            )
        earlier.append(EarlierSet(each["name"], each["digest"], path))
    return HeldOutSets(held_out.frozen_again(told["frozen"]), tuple(earlier))


def _held_out_again(
    runtime: Runtime, apart: Runtime, model: str, name: str, place: Path, observer: RunObserver
) -> Path:
    """What an earlier version was scored on, from its own data and rule; sets before it do not matter to that."""
    version = int(name.rpartition(" ")[2])
    lineage = registry.fetch_lineage(runtime, model, version)
    sets = HeldOutSets(held_out.frozen_again(lineage.get("held_out", {}).get("frozen")), ())
    dataset = open_dataset(_data_of(lineage["data"], place / f"version-{version}"))
    params = check(lineage["params"], f"the lineage of {name}")
    run = RunContext(params, apart, dataset, observer, given_sets=sets)
    return carry_out(run, prepare(run, dataset, params.prepare))[0].path / "held_out.jsonl"


def _data_of(data: dict[str, str], project: Path) -> Path:
    """A .dvc file that names just this data, in a DVC repository that shares our cache and remotes."""
    from dvc.repo import Repo

    with Repo() as here:
        cache = here.cache.local_cache_dir
        remotes = here.config["remote"]
        default = here.config["core"].get("remote")
    project.mkdir(parents=True)
    with Repo.init(str(project), no_scm=True) as apart, apart.config.edit() as config:
        config["cache"] = {"dir": cache}
        config["remote"] = {name: dict(remote) for name, remote in remotes.items()}
        if default:
            config["core"]["remote"] = default
    (project / "data.dvc").write_text(f"outs:\n- md5: {data['md5']}\n  hash: md5\n  path: {data['path']}\n")
    return project / "data.dvc"
