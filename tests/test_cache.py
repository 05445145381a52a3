"""What changes rerun what: each row of the README's table."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from projects import (
    add_to_dvc,
    chats,
    copy_code,
    environment,
    make_project,
    retrain,
    retuner,
    states,
    write_chats,
)

from flows.pipeline import STAGES
from flows.receipts import is_still_asked, question_of
from retuner.errors import Refused
from retuner.registry import fetch_lineage
from retuner.runtime import Runtime
from retuner.store import Store

ALL_CACHED = dict.fromkeys(STAGES, "cached")


def from_(stage: str) -> dict[str, str]:
    first = STAGES.index(stage)
    return {name: "cached" if place < first else "computed" for place, name in enumerate(STAGES)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose run has finished, and its home. Copied for every test."""
    place = tmp_path_factory.mktemp("finished")
    project, home = make_project(place / "project"), place / "home"
    before = Path.cwd()
    os.chdir(project)
    try:
        context = retrain(home=home)
    finally:
        os.chdir(before)
    assert set(states(context).values()) == {"computed"}
    return place


@pytest.fixture
def home(finished, tmp_path, monkeypatch):
    """The finished project as the current folder, and its home, both fresh copies."""
    shutil.copytree(finished, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy" / "project")
    return tmp_path / "copy" / "home"


def test_nothing_changed_runs_nothing_even_at_another_store_path(home):
    assert states(retrain(home=home)) == ALL_CACHED


@pytest.mark.parametrize("circumstance", [{"log_level": "DEBUG"}, {"device": "cpu"}])
def test_circumstance_runs_nothing(home, circumstance):
    assert states(retrain(home=home, **circumstance)) == ALL_CACHED


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("train.lora.rank=8", "train"),
        ("train.seed=1", "train"),
        ("evaluate.metrics=[exact_match, rouge_l]", "evaluate"),
        ("evaluate.max_new_tokens=6", "evaluate"),
        ("register.gate.resamples=300", "register"),
        ("template.max_tokens=120", None),
        ("prepare.split_salt=another", "prepare"),
    ],
)
def test_a_changed_setting_runs_its_stage_and_what_follows(home, override, first):
    told = states(retrain((override,), home=home))
    if first is None:
        # The rows are all shorter, so template makes the same bytes, and what follows is served.
        assert told == {**ALL_CACHED, "template": "computed"}
    else:
        assert told == from_(first)


def test_one_more_row_runs_from_prepare_onward(home):
    write_chats(Path("data"), chats(49))
    add_to_dvc(Path.cwd())
    assert states(retrain(home=home)) == from_("prepare")


def test_rows_in_another_order_are_the_same_splits(home):
    write_chats(Path("data"), chats()[::-1])
    add_to_dvc(Path.cwd())
    assert states(retrain(home=home)) == {**ALL_CACHED, "prepare": "computed"}


@pytest.mark.parametrize("stage", STAGES[:-1])
def test_a_flipped_bit_in_the_store_remakes_that_stage_alone_and_quarantines_the_copy(home, stage):
    before = {record.name: record.fingerprint for record in retrain(home=home).records}
    folder = home / "store" / "objects" / before[stage]
    victim = max(
        (p for p in folder.iterdir() if p.is_file() and p.name != "manifest.json"),
        key=lambda p: p.stat().st_size,
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    told = retrain(home=home)
    assert states(told) == {**ALL_CACHED, stage: "computed"}
    assert [p.name.split("-")[0] for p in (home / "store" / "quarantine").iterdir()] == [before[stage]]
    assert {record.name: record.fingerprint for record in told.records} == before


def test_a_deleted_adapter_is_remade_byte_for_byte(home):
    fingerprint = {record.name: record.fingerprint for record in retrain(home=home).records}["train"]
    adapter = home / "store" / "objects" / fingerprint / "adapter_model.safetensors"
    before = adapter.read_bytes()
    adapter.unlink()
    assert states(retrain(home=home)) == {**ALL_CACHED, "train": "computed"}
    assert adapter.read_bytes() == before


def test_a_registry_that_lost_the_version_is_given_it_again_and_nothing_is_trained(home):
    retrain(home=home)
    shutil.rmtree(home / "mlflow")
    assert states(retrain(home=home)) == from_("register")
    assert states(retrain(home=home)) == ALL_CACHED


def why(code: Path, home: Path) -> dict[str, str]:
    done = retuner(Path.cwd(), home, "why", "params.yaml", "--json", PYTHONPATH=str(code))
    assert done.returncode == 0, done.stderr
    return {stage["stage"]: stage["state"] for stage in json.loads(done.stdout)["stages"]}


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_comments_and_code_that_no_stage_reaches_run_nothing(home, tmp_path):
    code = copy_code(tmp_path / "code")
    for file in code.rglob("*.py"):
        file.write_text("# a comment\n" + file.read_text() + "\n\ndef unreached():\n    return 1\n")
    assert set(why(code, home).values()) == {"cached"}


@pytest.mark.parametrize(
    ("stage", "file", "before", "after"),
    [
        ("prepare", "naming.py", "< limit_of(", "<= limit_of("),
        ("template", "rendering.py", "class Renderer:", "class Renderer:\n    edited = True\n"),
        ("register", "gate.py", "holds=low >= required", "holds=low > required"),
    ],
)
def test_an_edited_helper_runs_the_stage_that_reaches_it(home, tmp_path, stage, file, before, after):
    code = copy_code(tmp_path / "code")
    edit(code / "retuner" / file, before, after)
    told = why(code, home)
    place = STAGES.index(stage)
    expected = {"fetch_base": "cached"} | dict.fromkeys(STAGES[1:place], "cached")
    if file == "rendering.py":
        # The base is examined with the renderer too; its bytes would stay the same.
        expected = {"fetch_base": "changed"}
        assert told["fetch_base"] == "changed"
        return
    assert {name: told[name] for name in expected} == expected
    assert told[stage] == "changed"
    assert all(told[name] == "follows" for name in STAGES[place + 1 :])


@pytest.mark.slow
def test_an_accepted_code_change_serves_the_old_result_and_later_versions_tell_of_it(home, tmp_path):
    code = copy_code(tmp_path / "code")
    edit(code / "retuner" / "naming.py", "< limit_of(", "<= limit_of(")
    because = ("--stage", "prepare", "--because", "equality never happens")
    done = retuner(Path.cwd(), home, "accept", "params.yaml", *because, PYTHONPATH=str(code))
    assert done.returncode == 0, done.stderr
    assert set(why(code, home).values()) == {"cached"}
    again = retuner(Path.cwd(), home, "run", "params.yaml", "--set", "train.seed=1", PYTHONPATH=str(code))
    assert again.returncode == 0, again.stderr
    lineage = fetch_lineage(Runtime(home=home), "smoke", 2)
    assert lineage["stages"]["prepare"]["accepted"]["because"] == "equality never happens"


def test_a_base_with_less_room_is_refused_though_the_rows_are_cached(home, tmp_path):
    fetched = {record.name: record.fingerprint for record in retrain(home=home).records}["fetch_base"]
    shutil.copytree(home / "store" / "objects" / fetched, tmp_path / "base")
    edit(
        tmp_path / "base" / "config.json", '"max_position_embeddings": 4096', '"max_position_embeddings": 64'
    )
    local = f"base={{source: local, path: {tmp_path / 'base'}}}"
    with pytest.raises(Refused, match=r"template.max_tokens is 128, but the base takes 64"):
        retrain((local,), home=home)


def test_why_says_that_a_result_is_damaged(home):
    (reason,) = [each for each in retrain(home=home).records if each.name == "train"]
    (home / "store" / "objects" / reason.fingerprint / "adapter_config.json").write_text("{}")
    told = why(Path(__file__).parents[1], home)
    assert told["train"] == "damaged" and told["evaluate"] == "follows"


@pytest.mark.slow
def test_params_that_are_edited_while_a_run_goes_on_are_not_answered_by_it(home):
    asked = ("run", "params.yaml", "--set", "evaluate.max_new_tokens=6", "--json")
    running = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *asked],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    while not list((home / "running").glob("*.json")):
        assert running.poll() is None
        time.sleep(0.01)
    edit(Path("params.yaml"), "resamples: 200", "resamples: 201")
    running.communicate()
    assert running.returncode == 0
    again = retuner(Path.cwd(), home, *asked)
    told = {stage["name"]: stage["state"] for stage in json.loads(again.stdout)["stages"]}
    assert told == from_("register")


def test_a_question_whose_params_are_gone_is_no_longer_asked(home):
    question = question_of(Path("params.yaml"), ())
    assert is_still_asked(question, Path("params.yaml"), ())
    Path("params.yaml").unlink()
    assert not is_still_asked(question, Path("params.yaml"), ())


# --- removing what nothing reaches


def collected(home: Path, *arguments: str, code: int = 0, **more: str) -> dict[str, Any]:
    done = retuner(Path.cwd(), home, "gc", "--json", *arguments, **more)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_what_the_last_versions_and_aliases_were_made_from_stays_and_the_rest_goes(home):
    retrain(("train.seed=1",), home=home)
    retrain(("train.seed=2",), home=home)
    assert collected(home, "--keep", "9")["removed"] == []
    # Version 1 is in no alias, and not among the last two.
    would = collected(home, "--keep", "2", "--dry-run")["removed"]
    assert len(would) == 3 and collected(home, "--keep", "2")["removed"] == would
    assert states(retrain(("train.seed=2",), home=home)) == ALL_CACHED
    assert states(retrain(home=home)) == from_("train")


def test_a_result_stays_whichever_code_it_is_asked_for_by(home, tmp_path):
    code = copy_code(tmp_path / "code")
    edit(code / "retuner" / "naming.py", "< limit_of(", "<= limit_of(")
    because = ("--stage", "prepare", "--because", "equality never happens")
    assert retuner(Path.cwd(), home, "accept", "params.yaml", *because, PYTHONPATH=str(code)).returncode == 0
    collected(home, PYTHONPATH=str(code))
    assert set(why(code, home).values()) == {"cached"}


def test_with_another_registry_nothing_is_removed(home, tmp_path):
    elsewhere = {"RETUNER_TRACKING_URI": f"sqlite:///{tmp_path}/other.db"}
    told = collected(home, code=2, **elsewhere)["error"]
    assert "results of smoke, which the registry" in told["found"] and "--forget smoke" in told["do"]
    assert states(retrain(home=home)) == ALL_CACHED
    assert len(collected(home, "--forget", "smoke", **elsewhere)["removed"]) == len(STAGES)


def test_nothing_is_removed_while_a_run_goes_on(home):
    running = Store(home / "store")
    running.hold()
    assert collected(home, code=2)["error"]["found"] == "a run is going on"
    del running
    collected(home)


def test_why_names_the_setting_that_changed(home):
    done = retuner(Path.cwd(), home, "why", "params.yaml", "--set", "train.lora.rank=16")
    assert "params.lora.rank: 4 -> 16" in done.stdout
    assert "depends on train" in done.stdout
