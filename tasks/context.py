"""What every stage of one run shares: where things are, who listens, what happened so far."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

from retuner import held_out, registry_reads, tracking
from retuner.dataset import Dataset, open_dataset
from retuner.fingerprint import spell
from retuner.observe import Observer, Silent
from retuner.params import Params
from retuner.runtime import Runtime
from retuner.store import Store
from retuner.warm_start import Start
from tasks.record import StageRecord


class RunObserver(Observer, Protocol):
    """Also hears of whole stages."""

    def stage(self, name: str) -> None: ...

    def finished(self, record: StageRecord) -> None: ...


class Quiet(Silent):
    def stage(self, name: str) -> None:
        pass

    def finished(self, record: StageRecord) -> None:
        pass


@dataclass
class RunContext:
    params: Params
    runtime: Runtime
    dataset: Dataset
    observer: RunObserver = field(default_factory=Quiet)
    records: list[StageRecord] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    """Where this run is seen elsewhere, e.g. the Prefect flow run."""
    on_mlflow_run: Callable[[str], None] = lambda run_id: None
    """Told the id of the MLflow run when it is opened."""
    given_sets: held_out.HeldOutSets | None = None
    """The held-out sets that a replay was given; None: those of the project and the registry, as they are."""
    start: Start | None = None
    """The adapter that a warm start begins as; None for the one in production."""
    _mlflow_run: tracking.Run | None = None
    _incumbents: dict[str, registry_reads.Incumbent | None] = field(default_factory=dict)

    @cached_property
    def store(self) -> Store:
        store = Store(self.runtime.store, self.observer.say, self.runtime.store_remote)
        store.hold()
        return store

    @cached_property
    def held_out_sets(self) -> held_out.HeldOutSets:
        """Asked once, so that the version names what its rows were compared with."""
        if self.given_sets:
            return self.given_sets
        name, prepare = self.params.register_.model_name, self.params.prepare.model_dump(mode="json")
        return held_out.sets_of(self.runtime, name, prepare, self.observer.say)

    @property
    def code_notes(self) -> Path:
        return self.runtime.home / "code.json"

    def mlflow_run(self, train_fingerprint: str) -> tracking.Run:
        """The MLflow run of these params, data and training, opened when first needed.

        A run that was killed, or whose later stages are made anew, is the same MLflow run again.
        """
        if self._mlflow_run is None:
            spelled = self.params.spelled()
            key = hashlib.sha256(spell([spelled, self.dataset.md5, train_fingerprint]).encode()).hexdigest()
            train = self.params.train
            self._mlflow_run = tracking.open_run(
                self.runtime,
                key=key,
                experiment=self.params.register_.model_name,
                run_name=f"r{train.lora.rank} lr{train.learning_rate:g} {self.dataset.md5[:6]} {train_fingerprint[:6]}",
                params=spelled,
                tags={f"retuner.{name}": value for name, value in self.links.items()},
                dataset=self.dataset,
            )
            self.on_mlflow_run(self._mlflow_run.run_id)
        return self._mlflow_run

    def incumbent(self, adapter_sha256: str) -> registry_reads.Incumbent | None:
        """What the new adapter is compared with: asked once, so that the version names what its report saw."""
        if adapter_sha256 not in self._incumbents:
            name = self.params.register_.model_name
            self._incumbents[adapter_sha256] = registry_reads.incumbent(self.runtime, name, adapter_sha256)
        return self._incumbents[adapter_sha256]

    def close_run(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End the MLflow run, if one was opened, as FINISHED, FAILED or KILLED."""
        if self._mlflow_run:
            tracking.end_run(self._mlflow_run, status)


def open_context(params: Params, runtime: Runtime, observer: RunObserver | None = None) -> RunContext:
    """Verifies the data, byte for byte, against the .dvc file that names it."""
    dataset = open_dataset(Path(params.data), runtime.home / "seen-data.json")
    return RunContext(params, runtime, dataset, observer or Quiet())
