"""A training that one machine began another finishes, from what both can see."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from projects import make_project
from training_job import STEPS, Heard, make_inputs, run

from flows.pipeline import pipeline
from retuner import checkpoint_sharing
from retuner.checkpoint_sharing import CheckpointSharing
from retuner.params_file import load
from retuner.runtime import load_runtime
from retuner.shared_store import SharedStore, work_of
from tasks.context import Quiet, open_context
from tasks.step import carry_out


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/srv"


def train_shared(folder, url, observer, out="out"):
    """As the train stage does it."""
    (folder / "work").mkdir(exist_ok=True)
    with CheckpointSharing(SharedStore(url), folder / "work", observer.say):
        return run(folder, observer=observer, out=out)


@pytest.fixture
def begun(tmp_path, url):
    """One machine died after step 9. What it shared."""
    with pytest.raises(KeyboardInterrupt):
        train_shared(make_inputs(tmp_path / "first"), url, Heard(die_after=9))
    return tmp_path / "srv" / work_of("work")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(make_inputs(tmp_path_factory.mktemp("undisturbed")))


def test_another_machine_goes_on_from_the_newest_shared_checkpoint(begun, undisturbed, tmp_path, url):
    assert sorted(path.name for path in begun.iterdir()) == ["step-6", "step-8"]
    heard = Heard()
    facts = train_shared(make_inputs(tmp_path / "second"), url, heard)
    assert "train: the checkpoint step-8 was brought from the shared store" in heard.lines
    assert heard.steps == list(range(9, STEPS + 1))
    assert facts.sha256 == undisturbed.sha256


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])


@pytest.mark.parametrize(
    "name,harm", [("optimizer.pt", cut), ("rng_state.pth", os.unlink), ("manifest.json", flip)]
)
def test_a_damaged_copy_is_not_used_and_the_one_before_it_is(begun, undisturbed, tmp_path, url, name, harm):
    harm(begun / "step-8" / name)
    heard = Heard()
    facts = train_shared(make_inputs(tmp_path / "second"), url, heard)
    assert any("going on after step-6" in line for line in heard.lines)
    assert any("step-8" in line and "not used" in line for line in heard.lines)
    assert facts.sha256 == undisturbed.sha256


def test_what_is_older_than_what_is_here_is_not_brought(begun, tmp_path, url):
    heard = Heard()
    train_shared(tmp_path / "first", url, heard, out="again")
    assert not any("brought" in line for line in heard.lines)
    assert any("going on after step-8" in line for line in heard.lines)


def test_a_place_that_cannot_be_written_is_said_once_and_training_goes_on(undisturbed, tmp_path):
    (tmp_path / "file").write_text("no folder")
    heard = Heard()
    facts = train_shared(make_inputs(tmp_path / "first"), f"file://{tmp_path}/file/srv", heard)
    assert facts.sha256 == undisturbed.sha256
    assert sum("its checkpoints are not shared" in line for line in heard.lines) == 1
    assert sum("without the checkpoints of other machines" in line for line in heard.lines) == 1


def test_what_is_let_go_of_stays_shared_until_what_replaces_it_is(tmp_path, url, monkeypatch):
    """Of early stopping: step 30 needs the best so far, which was 5 and is 40 now."""
    monkeypatch.setattr(checkpoint_sharing, "LOOK_SECONDS", 0.02)
    heard, work = Heard(), tmp_path / "work"
    there = tmp_path / "srv" / work_of("work")

    def seal(step):
        (tmp_path / "draft").mkdir()
        (tmp_path / "draft" / "manifest.json").write_text("{}")
        (work / "sealed").mkdir(parents=True, exist_ok=True)
        os.rename(tmp_path / "draft", work / "sealed" / f"step-{step}")

    def shared():
        return {path.parent.name for path in there.glob("*/manifest.json")}

    def wait_until(ask):
        deadline = time.monotonic() + 60
        while not ask():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with CheckpointSharing(SharedStore(url), work, heard.say):
        seal(5)
        seal(30)
        wait_until(lambda: shared() == {"step-5", "step-30"})
        (there / "step-40").write_text("in the way")
        seal(40)
        shutil.rmtree(work / "sealed" / "step-5")
        wait_until(lambda: any("not shared" in line for line in heard.lines))
        time.sleep(0.2)  # And tried some times more.
        assert shared() == {"step-5", "step-30"}
        (there / "step-40").unlink()
        wait_until(lambda: shared() == {"step-30", "step-40"})


class Dying(Quiet):
    def __init__(self, after=None):
        self.after, self.lines = after, []

    def say(self, line):
        self.lines.append(line)

    def progress(self, what, done, total, note=""):
        if what == "train" and done == self.after:
            raise KeyboardInterrupt


def pipeline_on(machine, url, observer):
    settings = replace(load_runtime(), home=machine, store_remote=url)
    context = open_context(load(Path("params.yaml")), settings, observer)
    pipeline(context, lambda step: carry_out(context, step)[0])
    return context


def test_a_run_goes_on_on_another_machine_and_leaves_no_checkpoint_behind(tmp_path, url, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    with pytest.raises(KeyboardInterrupt):
        pipeline_on(tmp_path / "first", url, Dying(after=3))
    assert len(list((tmp_path / "srv" / "work").glob("*/step-2"))) == 1
    shutil.rmtree(tmp_path / "first")
    second = Dying()
    pipeline_on(tmp_path / "second", url, second)
    assert any("going on after step-2 of 4" in line for line in second.lines)
    assert list((tmp_path / "srv" / "work").glob("*/*")) == []
