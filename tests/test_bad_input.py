"""Each thing that can be wrong gives its exit code and one message, and loses nothing that was there."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from projects import add_to_dvc, chats, environment, make_project, retuner, write_chats

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("bad") / "project")


@pytest.fixture
def project(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "project"))


def new_data(project: Path, rows) -> None:
    write_chats(project / "data", rows)
    add_to_dvc(project)


def fails(project: Path, code: int, *said: str, arguments=("run", "params.yaml"), **more: str) -> str:
    done = retuner(project, project / "home", *arguments, **more)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for part in said:
        assert part in done.stderr
    return done.stderr


def test_params_that_are_not_there(project):
    fails(project, 2, "there is no nothing.yaml", arguments=("run", "nothing.yaml"))


def test_debug_adds_a_traceback_and_changes_nothing_else(project):
    done = retuner(project, project / "home", "run", "nothing.yaml", "--json", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 2


def test_params_that_are_broken_as_json_too(project):
    arguments = ("run", "params.yaml", "--set", "train.lora.rnk=3", "--json")
    done = retuner(project, project / "home", *arguments)
    assert done.returncode == 2
    assert "did you mean rank?" in json.loads(done.stdout)["error"]["found"]


def test_an_unknown_option_is_refused_input(project):
    fails(project, 2, "--nonsense", arguments=("run", "params.yaml", "--nonsense"))


def test_an_unknown_device(project):
    fails(project, 2, "tpu", "auto, cpu, cuda", arguments=("--device", "tpu", "run", "params.yaml"))


@pytest.mark.parametrize(
    ("home", "verb"),
    [("params.yaml/home", ("run",)), ("/proc/none/home", ("why",)), ("/dev/null/home", ("data", "stats"))],
)
def test_a_home_that_cannot_be_made(project, home, verb):
    fails(project, 4, f"the home {home} cannot", "--home", arguments=("--home", home, *verb, "params.yaml"))


def check_data(project: Path, *arguments: str, params: str = "params.yaml", **more: Any) -> tuple[int, str]:
    """The exit code and what stands on stderr, with more to say of the process than `retuner` takes."""
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "data", "check", params, *arguments],
        cwd=project,
        env=environment(project / "home", PYTHONDONTWRITEBYTECODE="1"),
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )
    return done.returncode, done.stderr


def test_a_full_disk_is_no_defect(project):
    def limit() -> None:  # a file of more bytes is refused as it is on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    code, said = check_data(project, stdout=subprocess.DEVNULL, preexec_fn=limit)
    assert code == 4, said
    assert "no room to write" in said and "free some space" in said


ANSWERS = [(), ("--json",), ("--help",), ("--nonsense", "--json")]


@pytest.mark.parametrize("arguments", ANSWERS)
def test_a_stdout_without_room_is_said_on_stderr(project, arguments):
    with Path("/dev/full").open("w") as full:
        code, said = check_data(project, *arguments, stdout=full)
    assert code == 4, said
    assert "stdout cannot be written to" in said and "Traceback" not in said and "ignored" not in said
    assert ("--nonsense" in said) == ("--nonsense" in arguments)


@pytest.mark.parametrize("arguments", ANSWERS[:3])
def test_a_reader_that_leaves_ends_it_quietly(project, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    assert check_data(project, *arguments, stdout=writer) == (141, "")
    os.close(writer)


def test_without_a_stdout_the_work_is_done(project):
    assert check_data(project, preexec_fn=lambda: os.close(1)) == (0, "")
    code, said = check_data(project, "--json", params="none.yaml", preexec_fn=lambda: os.close(1))
    assert code == 2 and said.startswith("there is no none.yaml")


def test_what_stdout_cannot_spell_is_escaped_and_json_stays_json(project):
    name = "naïve-😀-→"
    (project / "data" / "chats.jsonl").rename(project / "data" / f"{name}.jsonl")
    add_to_dvc(project)
    verb = ("data", "check", "params.yaml")
    done = retuner(project, project / "home", *verb, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"na\u00efve-\ud83d\ude00-\u2192.jsonl: 48 rows" in done.stdout
    nothing = ("--json", "--set", f"prepare.files={name}.csv")
    done = retuner(project, project / "home", *verb, *nothing, PYTHONIOENCODING="ascii")
    assert done.returncode == 2, done.stderr
    assert name in json.loads(done.stdout)["error"]["found"]


@pytest.mark.parametrize("page", [".", "pipe", "params.yaml/page.html", "/proc/none/page.html"])
def test_a_page_that_cannot_be_written_is_refused_before_any_data_is_read(project, page):
    (project / "data.dvc").unlink()
    os.mkfifo(project / "pipe")
    fails(project, 2, f"--html {page}", arguments=("data", "stats", "params.yaml", "--html", page))


def test_data_that_is_not_what_data_dvc_names(project):
    write_chats(project / "data", chats(5))
    fails(project, 2, "data.dvc", "dvc add data", "dvc checkout data")


def test_no_data_dvc(project):
    (project / "data.dvc").unlink()
    fails(project, 2, "there is no data.dvc")


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows(project, prefect_api, rows):
    new_data(project, chats(rows))
    fails(project, 2, "usable row", PREFECT_API_URL=prefect_api)


def test_rows_that_are_all_too_long(project, prefect_api):
    more = ("--set", "template.max_tokens=8")
    fails(
        project,
        2,
        "template.max_tokens",
        arguments=("run", "params.yaml", *more),
        PREFECT_API_URL=prefect_api,
    )


def test_a_base_that_is_not_there(project, prefect_api):
    text = (project / "params.yaml").read_text()
    local = text.replace("  source: tiny\n  seed: 0", "  source: local\n  path: no-such-folder")
    assert local != text
    (project / "params.yaml").write_text(local)
    fails(project, 4, "no-such-folder", PREFECT_API_URL=prefect_api)


def test_a_hub_that_cannot_be_reached(project, prefect_api):
    text = (project / "params.yaml").read_text()
    hub = text.replace("  source: tiny\n  seed: 0", f"  source: hub\n  repo: a/b\n  commit: {'ab' * 20}")
    (project / "params.yaml").write_text(hub)
    fails(project, 4, "a/b", PREFECT_API_URL=prefect_api, HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="0")


def test_an_mlflow_that_cannot_be_reached_is_said_before_anything_is_computed(project):
    fails(project, 4, NOWHERE, RETUNER_TRACKING_URI=NOWHERE)
    assert not (project / "home" / "store" / "objects").exists()


def test_a_prefect_that_cannot_be_reached_is_said_before_anything_is_computed(project):
    fails(project, 4, "Prefect", NOWHERE, "unset PREFECT_API_URL", PREFECT_API_URL=f"{NOWHERE}/api")
    assert not (project / "home" / "store" / "objects").exists()


def test_a_refused_run_loses_nothing_that_was_there(project, prefect_api):
    assert (
        retuner(project, project / "home", "run", "params.yaml", PREFECT_API_URL=prefect_api).returncode == 0
    )
    before = sorted(str(p) for p in (project / "home" / "store" / "objects").rglob("*"))
    arguments = ("run", "params.yaml", "--set", "prepare.files=*.csv")
    fails(project, 2, "*.csv", arguments=arguments, PREFECT_API_URL=prefect_api)
    assert sorted(str(p) for p in (project / "home" / "store" / "objects").rglob("*")) == before
    done = retuner(project, project / "home", "run", "params.yaml", "--json")
    assert {stage["state"] for stage in json.loads(done.stdout)["stages"]} == {"cached"}
