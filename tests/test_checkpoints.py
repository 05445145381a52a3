"""A checkpoint is whole, or it is not used."""

import json
import os
import shutil

import pytest
from training_job import STEPS, Heard, make_inputs, run

from retuner.checkpoints import MANIFEST, NEEDED, clear_staging, newest_whole, seal
from retuner.stopping import needed_by


def staged(work, step, lacking=()):
    folder = clear_staging(work) / f"checkpoint-{step}"
    folder.mkdir()
    for name in NEEDED - set(lacking):
        (folder / name).write_bytes(f"{name} of step {step}".encode())
    return folder


@pytest.fixture
def work(tmp_path):
    """Two sealed checkpoints, of steps 9 and 10."""
    for step in (9, 10):
        seal(tmp_path, staged(tmp_path, step), step)
    return tmp_path


def test_the_newest_checkpoint_is_the_one_of_the_highest_step_not_the_last_by_name(work):
    said = []
    assert newest_whole(work, said.append) == work / "sealed" / "step-10"
    assert said == []


def test_only_the_newest_two_checkpoints_are_kept(work):
    seal(work, staged(work, 11), 11)
    assert {path.name for path in (work / "sealed").iterdir()} == {"step-10", "step-11"}
    assert list((work / "staging").iterdir()) == []


@pytest.mark.parametrize("name", sorted({*NEEDED, "manifest.json"}))
@pytest.mark.parametrize("harm", ["removed", "truncated", "a bit flipped", "lengthened"])
def test_a_checkpoint_with_a_damaged_file_is_set_aside_and_the_one_before_it_is_used(work, name, harm):
    file = work / "sealed" / "step-10" / name
    data = file.read_bytes()
    if harm == "removed":
        file.unlink()
    else:
        flipped = bytes([data[0] ^ 1]) + data[1:]
        file.write_bytes({"truncated": data[:-1], "a bit flipped": flipped, "lengthened": data + b"!"}[harm])
    said = []
    assert newest_whole(work, said.append) == work / "sealed" / "step-9"
    assert len(said) == 1
    assert "step-10 is not used" in said[0]
    assert ("manifest" if name == "manifest.json" else name) in said[0]
    assert [path.name.rpartition("-")[0] for path in work.glob("broken-*")] == ["broken-step-10"]
    assert newest_whole(work, said.append) == work / "sealed" / "step-9"
    assert len(said) == 1


def test_when_no_checkpoint_is_whole_there_is_none(work):
    for step in (9, 10):
        (work / "sealed" / f"step-{step}" / "optimizer.pt").unlink()
    assert newest_whole(work, lambda line: None) is None


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_checkpoint_sealed_without_what_a_resume_needs_is_not_used(work, name):
    seal(work, staged(work, 11, lacking=[name]), 11)
    assert newest_whole(work, lambda line: None) == work / "sealed" / "step-10"


def test_a_checkpoint_with_a_file_more_than_was_sealed_is_not_used(work):
    (work / "sealed" / "step-10" / "scaler.pt").write_bytes(b"?")
    assert newest_whole(work, lambda line: None) == work / "sealed" / "step-9"


def test_a_checkpoint_under_the_name_of_another_step_is_not_used(work):
    (work / "sealed" / "step-10").rename(work / "sealed" / "step-12")
    assert newest_whole(work, lambda line: None) == work / "sealed" / "step-9"


def test_a_step_that_is_to_be_kept_is_kept_however_old(work):
    for step in (11, 12, 13):
        seal(work, staged(work, step), step, keep=10)
    assert {path.name for path in (work / "sealed").iterdir()} == {"step-10", "step-12", "step-13"}


@pytest.mark.parametrize("harm", ["gone", "a bit flipped"])
def test_a_checkpoint_is_not_used_without_the_other_one_that_it_needs(work, harm):
    seal(work, staged(work, 11), 11, keep=9)
    file = work / "sealed" / "step-10" / "optimizer.pt"
    file.unlink() if harm == "gone" else file.write_bytes(b"?" + file.read_bytes()[1:])
    needs = {"step-11": 10, "step-10": None, "step-9": None}
    said = []
    assert newest_whole(work, said.append, lambda path: needs[path.name]) == work / "sealed" / "step-9"
    assert "step-11 is not used, because step-10, which it needs" in said[0]
    assert "optimizer.pt" in said[0]


def test_what_was_being_written_when_the_process_died_is_thrown_away(work):
    staged(work, 11)
    clear_staging(work)
    assert list((work / "staging").iterdir()) == []
    assert newest_whole(work, lambda line: None) == work / "sealed" / "step-10"


def test_the_manifest_is_written_after_everything_it_names(work, monkeypatch):
    from retuner import checkpoints

    def dies(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_whole", dies)
    with pytest.raises(KeyboardInterrupt):
        seal(work, staged(work, 11), 11)
    assert newest_whole(work, lambda line: None) == work / "sealed" / "step-10"
    recorded = json.loads((work / "sealed" / "step-10" / "manifest.json").read_text())
    assert recorded["step"] == 10
    assert set(recorded["files"]) == NEEDED


# --- checkpoints as training makes them

FILES = sorted({*NEEDED, "README.md", "training_args.bin", MANIFEST})


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


HARMS = {"truncated": truncate, "a bit flipped": flip_a_bit, "removed": os.unlink}
every_file = pytest.mark.parametrize("name", FILES)
every_harm = pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)


@pytest.fixture(scope="module")
def died(tmp_path_factory):
    """A training that died after step 9, with the checkpoints of steps 6 and 8."""
    folder = make_inputs(tmp_path_factory.mktemp("died"))
    with pytest.raises(KeyboardInterrupt):
        run(folder, observer=Heard(die_after=9), out="died")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(make_inputs(tmp_path_factory.mktemp("undisturbed")))


def test_these_are_the_files_of_a_checkpoint(died):
    assert sorted(path.name for path in (died / "work" / "sealed" / "step-8").iterdir()) == FILES


@every_harm
@every_file
def test_a_real_checkpoint_with_a_damaged_file_is_told_and_not_used(died, tmp_path, name, harm):
    work = shutil.copytree(died / "work", tmp_path / "work")
    harm(work / "sealed" / "step-8" / name)
    said = []
    assert newest_whole(work, said.append, needed_by) == work / "sealed" / "step-6"
    (line,) = said
    assert "step-8 is not used" in line
    assert ("manifest" if name == MANIFEST else name) in line


@pytest.mark.slow
@every_harm
@every_file
def test_training_goes_on_from_the_checkpoint_before_the_damaged_one_to_the_same_bytes(
    died, undisturbed, tmp_path, name, harm
):
    folder = shutil.copytree(died, tmp_path / "harmed")
    harm(folder / "work" / "sealed" / "step-8" / name)
    heard = Heard()
    assert run(folder, observer=heard).sha256 == undisturbed.sha256
    assert any("step-8 is not used" in line for line in heard.lines)
    assert any("going on after step-6" in line for line in heard.lines)
    assert heard.steps == list(range(7, STEPS + 1))
