"""Helpers that tokenise ahead change how long templating takes, and nothing else, whatever becomes of them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from template_job import Project, rows, write_base

from retuner import templating, templating_ahead
from retuner.errors import Refused

MANY = 2500


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory, base) -> dict[str, str]:
    return run(Project(tmp_path_factory.mktemp("alone"), base))


def run(project: Project, first: int = 0) -> dict[str, str]:
    return project.run(rows(*range(first, MANY)), rows(*range(5000, 5040)))[0]


@pytest.fixture
def helpers(monkeypatch) -> list[subprocess.Popen]:
    """Two helpers start at once, and are told here. The reader leaves all that it can to them."""
    started = []

    class Told(templating_ahead._Helper):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self.process)

    def patient(batches):
        while batches and any(helper.poll() is None for helper in started):
            time.sleep(0.01)
        while batches:
            yield batches.popleft()

    monkeypatch.setattr(templating_ahead, "_Helper", Told)
    monkeypatch.setattr(templating_ahead, "WORTH_BYTES", 0)
    monkeypatch.setattr(templating_ahead, "usable_cores", lambda: 3)
    monkeypatch.setattr(templating, "_each", patient)
    return started


@pytest.fixture
def tokenised_here(monkeypatch) -> list[int]:
    """How many rows the reader tokenises itself, batch by batch."""
    counts: list[int] = []
    add = templating._add

    def counted(renderer, memo, side, numbers):
        counts.append(len(numbers))
        add(renderer, memo, side, numbers)

    monkeypatch.setattr(templating, "_add", counted)
    return counts


def test_helpers_tokenise_every_row_and_the_results_are_the_same(
    tmp_path, base, expected, helpers, tokenised_here
):
    assert run(Project(tmp_path, base)) == expected
    assert tokenised_here == [] and len(helpers) == 2
    assert all(helper.poll() is not None for helper in helpers)


def test_only_new_rows_are_given_to_helpers(tmp_path, base, expected, helpers, tokenised_here):
    project = Project(tmp_path, base)
    run(project, first=MANY // 2)
    before = sum(path.stat().st_size for path in project.memo.glob("*.rows"))
    assert run(project) == expected and tokenised_here == []
    assert sum(path.stat().st_size for path in project.memo.glob("*.rows")) < 2.5 * before


def test_without_its_helpers_the_reader_tokenises_itself(
    tmp_path, base, expected, helpers, tokenised_here, monkeypatch
):
    answer = templating_ahead._Helper._answer

    def killed_at_work(self):
        if self.is_ready:
            self.process.kill()
            self.process.wait()
        return answer(self)

    monkeypatch.setattr(templating_ahead._Helper, "_answer", killed_at_work)
    assert run(Project(tmp_path, base)) == expected
    assert sum(tokenised_here) == MANY + 40
    assert [helper.poll() for helper in helpers] == [-signal.SIGKILL] * 2


def test_a_chat_that_is_refused_is_named_by_the_reader(tmp_path, base, helpers):
    broken = rows(*range(MANY - 1))
    broken[700] = ("700", [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}])
    with pytest.raises(Refused, match=r"message 2 \(assistant\) has no text"):
        Project(tmp_path, base).run(broken, rows(5000))
    assert len(helpers) == 2 and all(helper.poll() is not None for helper in helpers)


READER = """
import sys
from collections import deque
from pathlib import Path

import numpy as np

from retuner import templating_ahead
from retuner.base import load_tokenizer
from retuner.chat_lines import ChatLines
from retuner.rendering import Renderer
from retuner.template_side import Side

base, path, memo = map(Path, sys.argv[1:])
templating_ahead.WORTH_BYTES = 0
side = Side("train", ChatLines(path))
renderer = Renderer(load_tokenizer(base))
with templating_ahead.TemplatingAhead(memo, missing_bytes=1, helpers=2) as ahead:
    batches = deque((side, each) for each in side.lines.batches(np.arange(len(side.lines))))
    with ahead.taking(renderer, batches) as helped:
        while not helped.rows:
            pass
        print("read", flush=True)
        sys.stdin.read()
"""


def test_no_helper_outlives_a_killed_reader(tmp_path, base):
    project = Project(tmp_path, base)
    project.run(rows(*range(MANY)), rows(5000))
    (path,) = tmp_path.glob("run-*/splits/train.jsonl")
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(base), str(path), str(tmp_path / "other")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert reader.stdout.readline() == b"read\n"
    helpers = psutil.Process(reader.pid).children()
    assert len(helpers) == 2
    reader.kill()
    reader.communicate()
    _, alive = psutil.wait_procs(helpers, timeout=60)
    assert not alive
