"""`prepare` in processes of its own: killed at any instant, or two at a time, it ends in the same bytes."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from projects import add_to_dvc, environment, make_project, write_chats

from retuner.memo import Memo

# The timer counts the process's own work, so that it strikes at the same places however busy the machine is.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from retuner.params_file import load
from retuner.runtime import load_runtime
from tasks.context import open_context
from tasks.prepare import prepare
from tasks.step import carry_out

context = open_context(load(Path("params.yaml"), ("prepare.leaks.near=remove",)), load_runtime())
step = prepare(context, context.dataset, context.params.prepare)
if seconds := float(sys.argv[1]):
    signal.signal(signal.SIGVTALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
before = os.times().user
made, cached = carry_out(context, step)
signal.setitimer(signal.ITIMER_VIRTUAL, 0)
print(made.digest, "cached" if cached else "computed", os.times().user - before)
"""


def some_chats(count: int) -> list[dict]:
    numbers = random.Random(count)
    texts = [" ".join(f"w{numbers.randrange(5000)}" for _ in range(40)) for _ in range(count)]
    asked = texts + [f"{text} again" for text in texts[:300]]
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]}
        for text in asked
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = make_project(tmp_path_factory.mktemp("project"))
    write_chats(folder / "data", some_chats(4000))
    add_to_dvc(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory) -> tuple[str, float]:
    """The digest, and how much work it takes."""
    done = start(project, tmp_path_factory.mktemp("home"))
    digest, state, seconds = told(done)
    assert state == "computed"
    return digest, float(seconds)


def start(project: Path, home: Path, kill_after: float = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(kill_after)],
        cwd=project,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.split()


def check_kills(project: Path, home: Path, undisturbed: tuple[str, float], seed: int, kills: int) -> None:
    digest, work = undisturbed
    numbers = random.Random(seed)
    for _ in range(kills):
        process = start(project, home, kill_after=max(0.001, numbers.uniform(0, 0.9) * work))
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
        for folder in (home / "store" / "memo").glob("*"):
            for path in folder.glob("[!.]*"):
                assert Memo(folder.parent, folder.name).read(path.name) is not None
    assert told(start(project, home))[0] == digest
    manifests = list((home / "store" / "objects").glob("*/manifest.json"))
    assert len(manifests) == 1 and json.loads(manifests[0].read_text())["digest"] == digest
    assert list((home / "store" / "drafts").iterdir()) == []


def test_killed_at_random_instants_the_rerun_ends_in_the_same_bytes(project, tmp_path, undisturbed):
    check_kills(project, tmp_path, undisturbed, seed=0, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_killed_once_at_any_instant_the_rerun_ends_in_the_same_bytes(project, tmp_path, undisturbed, seed):
    check_kills(project, tmp_path, undisturbed, seed, kills=1)


def test_two_at_a_time_compute_once(project, tmp_path, undisturbed):
    both = [told(process) for process in [start(project, tmp_path), start(project, tmp_path)]]
    assert sorted(state for _, state, _ in both) == ["cached", "computed"]
    assert {digest for digest, _, _ in both} == {undisturbed[0]}
