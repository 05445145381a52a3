"""Adapters of every kind are evaluated, registered and served like any other; and one may begin as the last."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from dvc.repo import Repo
from projects import make_project, retrain, states

from flows.receipts import answer_from_receipt, keep_receipt, question_of
from flows.replay import replay
from retuner import registry, registry_reads
from retuner.errors import Refused
from retuner.files import sha256_file
from retuner.generation import Answerer
from retuner.lora import WEIGHTS
from retuner.runtime import load_runtime
from tasks.context import Quiet
from tasks.record import StageRecord

KINDS = {
    "dora": ("train.lora.dora=true",),
    "q and v": ("train.lora.targets=[q_proj, v_proj]",),
    "stopped early": (
        "train.stop_early={every_steps: 1, patience: 1, min_improvement: 0.0}",
        "train.learning_rate=0.3",
        "train.max_steps=30",
    ),
}


class Heard(Quiet):
    def __init__(self) -> None:
        self.states: set[str] = set()

    def finished(self, record: StageRecord) -> None:
        self.states.add(record.state)


ON = ("register.promote=when_gate_passes", "train.warm_start=production")


@pytest.fixture
def home(tmp_path, monkeypatch):
    project = make_project(tmp_path / "project")
    monkeypatch.chdir(project)
    return tmp_path / "home"


def fingerprints(context):
    return {record.name: record.fingerprint for record in context.records}


def result(context, stage):
    """The folder and manifest of a stage's result."""
    name = fingerprints(context)[stage]
    return context.store.folder(name), context.store.manifest(name)


def test_every_kind_that_is_registered_answers_as_it_was_evaluated(home):
    for version, (kind, overrides) in enumerate(KINDS.items(), start=1):
        context = retrain(overrides, home=home)
        fetched = registry.fetch_adapter(context.runtime, "smoke", version, home / "fetched")
        facts = result(context, "train")[1]["facts"]
        assert sha256_file(fetched / WEIGHTS) == facts["sha256"], kind

        lines = (result(context, "evaluate")[0] / "answers.jsonl").read_text().splitlines()
        answerer = Answerer(result(context, "fetch_base")[0], fetched, "float32", "sdpa", "cpu")
        for line in map(json.loads, lines[:2]):
            assert answerer.answer(line["prompt"], 8) == line["answers"]["candidate"], kind
        if kind == "stopped early":
            assert facts["trained_steps"] < 30
            loss = result(context, "evaluate")[1]["facts"]["scores"]["candidate"]["loss"]
            assert f"held-out rows, {loss:.4f}"[:-1] in facts["effective"]["chosen"]
        assert set(states(retrain(overrides, home=home)).values()) == {"cached"}, kind


def test_a_warm_start_begins_as_production_and_its_own_promotion_changes_nothing(home):
    first = retrain(ON, home=home)
    assert result(first, "train")[1]["identity"]["inputs"]["warm_start"] is None
    assert registry_reads.read_alias(first.runtime, "smoke", "production") == 1
    assert set(states(retrain(ON, home=home)).values()) == {"cached"}

    question = question_of(Path("params.yaml"), ON)
    keep_receipt(question, first.runtime, first.dataset, fingerprints(first))
    assert answer_from_receipt(Path("params.yaml"), ON, first.runtime)

    shared = f"file://{home.with_name('shared')}"
    second = retrain((*ON, "train.seed=1"), home=home, store_remote=shared)
    begun = result(first, "train")[1]["facts"]["sha256"]
    assert result(second, "train")[1]["identity"]["inputs"]["warm_start"] == begun
    assert registry_reads.read_alias(first.runtime, "smoke", "production") == 2
    # Another adapter is in production: what the receipt says is no longer what a run would do.
    assert answer_from_receipt(Path("params.yaml"), ON, first.runtime) is None
    assert set(states(retrain((*ON, "train.seed=1"), home=home)).values()) == {"cached"}

    with pytest.raises(Refused, match="rank 4, and these params come to 8"):
        retrain((*ON, "train.lora.rank=8"), home=home)

    with Repo() as repo:
        with repo.config.edit() as config:
            config["remote"]["store"] = {"url": str(home.with_name("dvcstore"))}
            config["core"]["remote"] = "store"
        repo.push()
    heard = Heard()
    again = replay(replace(load_runtime(), home=home, store_remote=shared), "smoke", 2, heard)
    assert again.same
    assert again.differences == ()
    # The bytes are made again, and not brought from where the version's own results lie.
    assert heard.states == {"computed"}
