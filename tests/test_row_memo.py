"""What was tokenised before is not tokenised again, and the result never depends on it."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from projects import ROOT
from template_job import Project, rows, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("tiny"))


def files_of(project: Project) -> list[Path]:
    return sorted(project.memo.glob("*")) if project.memo else []


def test_the_same_bytes_come_from_every_history(tmp_path, base):
    train, held_out = rows(*range(300)), rows(*range(1000, 1040))
    fresh, new = Project(tmp_path / "fresh", base, memo=False).run(train, held_out)
    assert new == 340
    assert fresh.keys() == {"train.arrow", "held_out.arrow", "prompts.jsonl", "packs.arrow", "report.html"}

    grown = Project(tmp_path / "grown", base)
    assert grown.run(train[100:200], held_out[::2])[1] == 120
    assert grown.run(train[::-1][50:], held_out[:5])[1] == 150 + 2
    assert grown.run(train, held_out)[0] == fresh
    assert grown.run(train, held_out) == (fresh, 0)


def test_new_rows_cost_themselves_and_removed_rows_nothing(tmp_path, base):
    project = Project(tmp_path, base)
    held_out = rows(1000, 1001)
    assert project.run(rows(*range(100)), held_out)[1] == 102
    assert project.run(rows(*range(103)), held_out)[1] == 3
    assert project.run(rows(*range(50, 103)), held_out)[1] == 0
    assert project.run(rows(*range(50, 103)), held_out, too_long="leave_out")[1] == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "rename", "remove"])
def test_a_damaged_memo_costs_tokenising_and_nothing_else(tmp_path, base, damage):
    project = Project(tmp_path, base)
    train, held_out = rows(*range(40)), rows(1000, 1001)
    first, _ = project.run(train, held_out)
    (path,) = files_of(project)
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        )
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "rename":
        path.rename(path.with_name("0" * 64 + ".rows"))
    else:
        path.unlink()
    assert project.run(train, held_out) == (first, 42)
    assert project.run(train, held_out) == (first, 0)


def test_rows_of_which_only_the_memo_was_checked_before_are_checked_again(tmp_path, base):
    """A template that looks into the text: the odd row is not among the first in one run and is in the next."""
    from retuner.errors import Refused

    settings = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    sly = tmp_path / "sly"
    sly.mkdir()
    for file in base.iterdir():
        (sly / file.name).write_bytes(file.read_bytes())
    settings["chat_template"] = settings["chat_template"].replace(
        "message['content']", "message['content'].replace('zebra', 'dog')"
    )
    (sly / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    odd = [{"role": "user", "content": "A zebra?"}, {"role": "assistant", "content": "No."}]
    project = Project(tmp_path, sly)
    held_out = rows(1000)
    project.run([*rows(*range(1, 200)), ("zebra", odd)], held_out)
    for each in (project, Project(tmp_path / "fresh", sly, memo=False)):
        with pytest.raises(Refused, match="zebra.*piece by piece"):
            each.run([*rows(1, 2), ("zebra", odd)], held_out)


def test_rows_in_many_small_files_or_long_out_of_use_are_put_together(tmp_path, base, monkeypatch):
    monkeypatch.setattr("retuner.row_memo.MOST_SPARE_FILES", 3)
    project = Project(tmp_path, base)
    held_out = rows(1000)
    for count in range(10, 70, 10):
        project.run(rows(*range(count)), held_out)
        assert len(files_of(project)) <= 4
    whole = sum(path.stat().st_size for path in files_of(project))
    assert project.run(rows(1, 2, 3), held_out)[1] == 0
    assert sum(path.stat().st_size for path in files_of(project)) < whole / 4
    fresh = Project(tmp_path / "fresh", base, memo=False).run(rows(*range(60)), held_out)[0]
    assert project.run(rows(*range(60)), held_out) == (fresh, 57)


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_stage_killed_at_any_moment_ends_in_the_same_bytes(tmp_path, base, kills):
    job = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("template_job.py"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(name: str, killed_after: float | None = None) -> dict:
        """In a fork of the job; what it tells, nothing when it was killed."""
        job.stdin.write(json.dumps([str(base), str(tmp_path / name), killed_after]) + "\n")
        job.stdin.flush()
        return json.loads(job.stdout.readline())

    undisturbed = run("undisturbed")
    took = undisturbed["seconds"]
    draw = random.Random(time.time_ns())
    ended = [run("killed", draw.uniform(0, took)) for _ in range(kills)]
    assert {} in ended, "none was killed"
    again = run("killed")
    assert again["digests"] == undisturbed["digests"]
    job.stdin.close()
    job.wait(30)
