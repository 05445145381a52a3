"""Whole runs whose split rule changed: what they are compared with, what they warn of, and how they are replayed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from projects import make_project, retrain, states

from flows.cli import main
from flows.pipeline import STAGES
from flows.receipts import answer_from_receipt, keep_receipt, question_of
from flows.replay import replay
from retuner import registry, registry_reads
from retuner.held_out import freeze, frozen, groups_in
from retuner.runtime import Runtime
from tasks.context import Quiet, RunContext

PARAMS, OTHER_SPLIT = Path("params.yaml"), ("prepare.split_salt=other",)


def prints(context: RunContext) -> dict[str, str]:
    return {record.name: record.fingerprint for record in context.records}


def remember(context: RunContext, overrides: tuple[str, ...] = ()) -> None:
    keep_receipt(question_of(PARAMS, overrides), context.runtime, context.dataset, prints(context))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Version 1 in production, then version 2 by another split, each with its receipt."""
    place = tmp_path_factory.mktemp("finished")
    make_project(place / "project")
    before = Path.cwd()
    os.chdir(place / "project")
    try:
        first = retrain(home=place / "home")
        remember(first)
        assert answer_from_receipt(PARAMS, (), first.runtime)
        registry.set_alias(first.runtime, "smoke", "production", 1)
        second = retrain(OTHER_SPLIT, home=place / "home")
        remember(second, OTHER_SPLIT)
    finally:
        os.chdir(before)
    return place, prints(first), prints(second)


@pytest.fixture
def home(finished, monkeypatch):
    monkeypatch.chdir(finished[0] / "project")
    return finished[0] / "home"


def test_versions_tell_what_they_were_scored_on_and_by_which_rule(finished, home):
    one, two = registry_reads.held_out_sets(Runtime(home=home), "smoke")
    assert (one.version, one.rule, two.version, two.rule) == (1, "1 0.2 ", 2, "other 0.2 ")
    assert (one.splits, two.splits) == (finished[1]["prepare"], finished[2]["prepare"])
    assert one.digest != two.digest


def test_a_run_of_another_rule_is_given_the_earlier_set_and_its_lineage_tells_so(finished, home):
    runtime = Runtime(home=home)
    one = registry_reads.held_out_sets(runtime, "smoke")[0]
    lineage = registry.fetch_lineage(runtime, "smoke", 2)
    told = {"name": "smoke version 1", "digest": one.digest, "splits": one.splits}
    assert lineage["held_out"] == {"frozen": None, "earlier": [told]}
    assert lineage["stages"]["prepare"]["identity"]["inputs"]["earlier"] == [one.digest]
    assert registry.fetch_lineage(runtime, "smoke", 1)["held_out"]["earlier"] == []


def test_a_decision_warns_that_production_was_trained_on_rows_held_out_now(finished, home):
    objects = home / "store" / "objects"
    trained = groups_in(objects / finished[1]["prepare"] / "train.jsonl")
    held_out = groups_in(objects / finished[2]["prepare"] / "held_out.jsonl")
    seen = len(trained & held_out)
    assert 0 < seen < len(held_out)
    tags = registry_reads.read_version(Runtime(home=home), "smoke", 2)
    [note] = json.loads(tags["decision"])["notes"]
    assert "smoke version 1 was split by another rule (1 0.2, now other 0.2)" in note
    assert f"trained on {seen} of the {len(held_out)} prompts held out now" in note
    first = registry_reads.read_version(Runtime(home=home), "smoke", 1)
    assert json.loads(first["decision"])["notes"] == []


def test_a_receipt_does_not_answer_when_a_version_of_another_split_came_since(home):
    runtime = Runtime(home=home)
    assert answer_from_receipt(PARAMS, OTHER_SPLIT, runtime)
    assert answer_from_receipt(PARAMS, (), runtime) is None


def test_a_version_is_replayed_though_the_set_it_was_compared_with_left_the_store(finished, home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    shutil.rmtree(tmp_path / "home" / "store")
    made = replay(Runtime(home=tmp_path / "home"), "smoke", 2, Quiet())
    assert made.differences == ()
    assert made.same


def test_going_back_to_a_rule_prepares_once_more_and_then_nothing(finished, home, tmp_path):
    """Without both sets train is what version 2 learned from, so the adapter is version 2's, by its first rule."""
    shutil.copytree(home, tmp_path / "home")
    again = retrain(home=tmp_path / "home")
    assert states(again)["prepare"] == "computed", "it has an earlier set to look at now"
    remember(again)
    assert set(states(retrain(home=tmp_path / "home")).values()) == {"cached"}
    assert answer_from_receipt(PARAMS, (), Runtime(home=tmp_path / "home"))
    assert [record.name for record in again.records] == list(STAGES)
    told = registry_reads.held_out_sets(Runtime(home=tmp_path / "home"), "smoke")
    assert [(version.version, version.rule) for version in told] == [(1, "1 0.2 "), (2, "other 0.2 ")]


def test_the_held_out_set_of_a_version_can_be_frozen_by_name(finished, home, monkeypatch, capsys):
    monkeypatch.setenv("RETUNER_HOME", str(home))
    arguments = ["data", "freeze", "first", "params.yaml", "--from", "1", "--json"]
    monkeypatch.setattr("sys.argv", ["retuner", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["file"]) == ("first", "params/held_out/first.txt")
    held_out = groups_in(home / "store" / "objects" / finished[1]["prepare"] / "held_out.jsonl")
    assert frozen("first").groups == held_out
    assert "smoke version 1; split rule: 1 0.2" in Path(told["file"]).read_text().splitlines()[0]


@pytest.mark.slow
def test_a_version_of_a_frozen_set_is_replayed_without_its_file(finished, home, tmp_path, monkeypatch):
    held_out = groups_in(home / "store" / "objects" / finished[1]["prepare"] / "held_out.jsonl")
    shutil.copytree(home, tmp_path / "home")
    shutil.copytree(home.parent / "project", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    freeze("kept", held_out, "1 0.2 ", "a test")
    run = retrain(("prepare.held_out_set=kept", "prepare.split_salt=third"), home=tmp_path / "home")
    rows = tmp_path / "home" / "store" / "objects" / prints(run)["prepare"] / "held_out.jsonl"
    assert groups_in(rows) == held_out
    Path("params/held_out/kept.txt").unlink()
    version = max(v.version for v in registry_reads.held_out_sets(run.runtime, "smoke"))
    made = replay(run.runtime, "smoke", version, Quiet())
    assert (made.same, made.differences) == (True, ())
