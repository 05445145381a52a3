"""A run that gets SIGTERM while it trains leaves nothing open, says how it goes on, and does."""

import json
import signal
import subprocess
import sys
import time

import httpx
import pytest
from projects import environment, make_project, retuner

from retuner import tracking
from retuner.runtime import Runtime

STEPS = 120


def command(*flags):
    return [
        *("run", "params.yaml", "--json", "--set", f"train.max_steps={STEPS}"),
        *("--set", f"train.checkpoint_every_steps={STEPS // 2}", *flags),
    ]


@pytest.fixture(scope="module")
def ended(prefect_api, tmp_path_factory):
    """The project, its home, and the process that ended by SIGTERM some steps after training began."""
    place = tmp_path_factory.mktemp("sigterm")
    project, home = make_project(place / "project"), place / "home"
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *command()],
        cwd=project,
        env=environment(home, PREFECT_API_URL=prefect_api),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_training(process, home)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    return project, home, subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for_training(process, home):
    """Until the run's first metrics are spooled: it has done a step, and has many before it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.stat().st_size for path in (home / "unsent").glob("*.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no training came: {process.communicate()}")


def test_it_says_after_which_step_it_stopped_and_ends_with_a_code_of_its_own(ended):
    _, home, done = ended
    (checkpoint,) = (home / "store" / "work").glob("*/sealed/step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert 0 < step < STEPS // 2
    assert f"train: stopped by SIGTERM after step {step} of {STEPS}; run again to go on" in done.stderr
    assert done.returncode == 143
    assert json.loads(done.stdout)["exit_code"] == 143
    assert "Traceback" not in done.stderr


def test_no_run_stays_open_and_nothing_is_registered(ended, prefect_api):
    _, home, _ = ended
    client = tracking.mlflow_client(Runtime(home=home))
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [run.info.status for run in runs] == ["KILLED"]
    assert client.search_model_versions("name = 'smoke'") == []
    asked = {"sort": "START_TIME_DESC", "limit": 1}
    token = httpx.get(f"{prefect_api}/csrf-token", params={"client": "tests"}).json()["token"]
    headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "tests"}
    newest = httpx.post(f"{prefect_api}/flow_runs/filter", json=asked, headers=headers).json()[0]
    assert newest["state_type"] == "CRASHED"


def test_run_again_it_goes_on_from_that_step(ended, prefect_api):
    project, home, _ = ended
    (checkpoint,) = (home / "store" / "work").glob("*/sealed/step-*")
    done = retuner(project, home, *command(), PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert f"going on after {checkpoint.name} of {STEPS}" in done.stderr
    client = tracking.mlflow_client(Runtime(home=home))
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]
