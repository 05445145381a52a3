"""A run that gets SIGTERM while it trains leaves nothing open, says how it goes on, and does."""

import json
import os
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
    # Other tests have runs on this server, which a schedule may have planned for later.
    found = post(prefect_api, "flow_runs/filter", {"sort": "START_TIME_ASC"})
    mine = [each for each in found if f"train.max_steps={STEPS}" in json.dumps(each["parameters"])]
    assert mine[0]["state_type"] == "CRASHED"


@pytest.mark.slow
def test_run_again_it_goes_on_from_that_step(ended, prefect_api):
    project, home, _ = ended
    (checkpoint,) = (home / "store" / "work").glob("*/sealed/step-*")
    done = retuner(project, home, *command(), PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert f"going on after {checkpoint.name} of {STEPS}" in done.stderr
    client = tracking.mlflow_client(Runtime(home=home))
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED"]


@pytest.mark.slow
def test_a_run_that_prefect_cancels_seals_its_step_and_is_cancelled(prefect_api, tmp_path):
    """Prefect's runner sends SIGTERM, waits half a minute, and then says how the run ended."""
    project, home = make_project(tmp_path / "project"), tmp_path / "home"
    wanted = command("--cron", "0 3 1 1 *")
    wanted = ["schedule", *(each for each in wanted[1:] if each != "--json")]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *wanted],
        cwd=project,
        env=environment(home, PREFECT_API_URL=prefect_api),
        start_new_session=True,
    )
    try:
        deployment = wait_for(
            lambda: httpx.get(f"{prefect_api}/deployments/name/retrain/params").json().get("id")
        )
        run = post(prefect_api, f"deployments/{deployment}/create_flow_run", {})["id"]
        wait_for_training(process, home)
        post(prefect_api, f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
        # Until the runner says so it counts as crashed, which is how it looks from within.
        wait_for(lambda: state_of(prefect_api, run) == "CANCELLED")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    (checkpoint,) = (home / "store" / "work").glob("*/sealed/step-*")
    assert 0 < int(checkpoint.name.removeprefix("step-")) < STEPS // 2
    client = tracking.mlflow_client(Runtime(home=home))
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [each.info.status for each in runs] == ["KILLED"]


def post(api, path, asked):
    token = httpx.get(f"{api}/csrf-token", params={"client": "tests"}).json()["token"]
    headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "tests"}
    return httpx.post(f"{api}/{path}", json=asked, headers=headers).raise_for_status().json()


def state_of(api, run):
    return httpx.get(f"{api}/flow_runs/{run}").json()["state_type"]


def wait_for(ask, seconds=150):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.5)
    raise AssertionError(f"nothing within {seconds} s")
