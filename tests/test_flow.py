"""The flow on a real Prefect server: what is recorded, what a kill leaves, what a schedule does."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from projects import environment, make_project, retuner

from flows.pipeline import STAGES
from retuner import registry_reads, tracking
from retuner.runtime import Runtime

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "evaluate", "prefect", "mlflow")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("flow") / "project")


@pytest.fixture(scope="module")
def finished(made, prefect_api, tmp_path_factory):
    """A project that has run once, its home, and what the run printed."""
    place = tmp_path_factory.mktemp("finished")
    project = Path(shutil.copytree(made, place / "project"))
    began = time.monotonic()
    done = retuner(project, place / "home", "run", "params.yaml", "--json", PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    return project, place / "home", json.loads(done.stdout) | {"seconds": time.monotonic() - began}


def flow_runs(api: str) -> list[dict]:
    asked = {"sort": "START_TIME_DESC", "limit": 20}
    return httpx.post(f"{api}/flow_runs/filter", json=asked, headers=csrf(api)).raise_for_status().json()


def csrf(api: str) -> dict[str, str]:
    client = "tests"
    token = httpx.get(f"{api}/csrf-token", params={"client": client})
    return (
        {"Prefect-Csrf-Token": token.json()["token"], "Prefect-Csrf-Client": client}
        if token.is_success
        else {}
    )


def task_states(api: str, flow_run: dict) -> dict[str, str]:
    asked = {"flow_runs": {"id": {"any_": [flow_run["id"]]}}}
    found = httpx.post(f"{api}/task_runs/filter", json=asked, headers=csrf(api)).raise_for_status().json()
    return {task["name"]: task["state_name"] for task in found}


def test_a_run_says_what_it_made(finished):
    _, home, summary = finished
    assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
    assert {stage["state"] for stage in summary["stages"]} == {"computed"}
    assert set(summary["metrics"]) == {"base", "candidate"}
    assert (summary["model_name"], summary["model_version"]) == ("smoke", 1)
    tags = registry_reads.read_version(Runtime(home=home), "smoke", 1)
    assert tags["adapter_sha256"] == summary["adapter_sha256"]


def test_the_mlflow_run_shows_params_curves_data_answers_and_the_gate(finished):
    project, home, summary = finished
    client = tracking.mlflow_client(Runtime(home=home))
    run = client.get_run(summary["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lora.rank"] == "4"
    steps = [point.step for point in client.get_metric_history(summary["run_id"], "loss")]
    assert sorted(steps) == [1, 2, 3, 4]
    assert client.get_metric_history(summary["run_id"], "learning_rate")
    assert "candidate/loss" in run.data.metrics and "base/loss" in run.data.metrics
    digest = next(
        line.split()[-1] for line in (project / "data.dvc").read_text().splitlines() if "md5:" in line
    )
    assert run.inputs.dataset_inputs[0].dataset.digest == digest
    assert "Gate" in run.data.tags["mlflow.note.content"]
    assert run.data.tags["mlflow.user"] and run.data.tags["mlflow.source.name"] == "retuner run"
    kind = client.get_experiment(summary["experiment_id"]).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    artifacts = {Path(home, "mlflow", "artifacts", summary["run_id"], "artifacts", name) for name in (
        "answers.json", "data/report.html", "data/report.json", "evaluation/report.json", "lineage.json"
    )}  # fmt: skip
    assert all(path.stat().st_size for path in artifacts)


def test_the_second_run_is_recorded_with_six_cached_stages_and_as_nothing_to_do(finished, prefect_api):
    project, home, summary = finished
    done = retuner(project, home, "run", "params.yaml", "--json", PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    flow_run = flow_runs(prefect_api)[0]
    assert flow_run["state_name"] == "Nothing to do"
    assert task_states(prefect_api, flow_run) == dict.fromkeys(STAGES, "Cached")
    again = json.loads(done.stdout)
    assert [stage["state"] for stage in again["stages"]] == ["cached"] * 6
    assert again["adapter_sha256"] == summary["adapter_sha256"]
    assert again["run_id"] == summary["run_id"]


def test_the_flow_run_carries_a_summary_for_people(finished, prefect_api):
    asked = {"artifacts": {"key": {"any_": ["retrain-summary"]}}, "limit": 1}
    found = httpx.post(f"{prefect_api}/artifacts/filter", json=asked, headers=csrf(prefect_api)).json()
    assert "smoke version 1" in found[0]["data"] and "| candidate |" in found[0]["data"]


def test_without_a_server_a_cached_run_starts_none_and_imports_nothing_heavy(finished):
    project, home, _ = finished
    code = (
        "import sys\n"
        "from flows.cli import main\n"
        "sys.argv = ['retuner', 'run', 'params.yaml', '--json']\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        env=environment(home),
        capture_output=True,
        text=True,
        check=True,
    )
    told, loaded = done.stdout.splitlines()
    assert [stage["state"] for stage in json.loads(told)["stages"]] == ["cached"] * 6
    assert loaded == "[]"


@pytest.mark.parametrize("damage", ["store", "data", "registry", "code"])
def test_a_receipt_never_hides_that_something_changed(finished, tmp_path, prefect_api, damage):
    project = Path(shutil.copytree(finished[0], tmp_path / "project"))
    home = Path(shutil.copytree(finished[1], tmp_path / "home"))
    summary = finished[2]
    more = {"PREFECT_API_URL": prefect_api}
    if damage == "store":
        train = next(s["fingerprint"] for s in summary["stages"] if s["name"] == "train")
        (home / "store" / "objects" / train / "adapter_config.json").write_text("{}")
    elif damage == "data":
        with (project / "data" / "chats.jsonl").open("a") as file:
            file.write("{}\n")
        assert retuner(project, home, "run", "params.yaml").returncode == 2
        return
    elif damage == "registry":
        shutil.rmtree(home / "mlflow")
    else:
        assert retuner(project, home, "run", "params.yaml", "--set", "train.seed=5", **more).returncode == 0
        return
    done = retuner(project, home, "run", "params.yaml", "--json", **more)
    computed = [s["name"] for s in json.loads(done.stdout)["stages"] if s["state"] == "computed"]
    assert computed == [{"store": "train", "registry": "register"}[damage]]


def test_another_clone_under_another_hash_seed_makes_the_same_fingerprints_and_bytes(
    made, finished, tmp_path, prefect_api
):
    project = Path(shutil.copytree(made, tmp_path / "elsewhere" / "deeper" / "project"))
    done = retuner(
        project,
        tmp_path / "home",
        "run",
        "params.yaml",
        "--json",
        PREFECT_API_URL=prefect_api,
        PYTHONHASHSEED="7",
    )
    other, first = json.loads(done.stdout), finished[2]
    assert other["adapter_sha256"] == first["adapter_sha256"]
    prints = [{s["name"]: s["fingerprint"] for s in told["stages"]} for told in (other, first)]
    assert prints[0] == prints[1]


def test_two_of_the_same_run_at_once_compute_each_stage_once(made, tmp_path, prefect_api):
    project = Path(shutil.copytree(made, tmp_path / "project"))
    command = [sys.executable, "-m", "flows.cli", "run", "params.yaml", "--json"]
    env = environment(tmp_path / "home", PREFECT_API_URL=prefect_api)
    both = [
        subprocess.Popen(
            command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    told = [json.loads(process.communicate()[0]) for process in both]
    for place, stage in enumerate(STAGES):
        states = sorted(summary["stages"][place]["state"] for summary in told)
        assert states == ["cached", "computed"], stage
    assert told[0]["model_version"] == told[1]["model_version"] == 1


def kill_and_finish(
    project: Path, home: Path, api: str, kills: int, draw: random.Random, longest: float
) -> dict:
    """Kill the run's whole process group `kills` times at random instants, then let it end."""
    command = [sys.executable, "-m", "flows.cli", "run", "params.yaml", "--json"]
    env = environment(home, PREFECT_API_URL=api)
    for _ in range(kills):
        process = subprocess.Popen(
            command,
            cwd=project,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(draw.uniform(0.0, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    done = retuner(project, home, "run", "params.yaml", "--json", PREFECT_API_URL=api)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_nothing_left(home: Path, api: str) -> None:
    assert not list((home / "store" / "drafts").glob("*"))
    client = tracking.mlflow_client(Runtime(home=home))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [run.info.status for run in runs if run.info.status == "RUNNING"] == []
    assert len(client.search_model_versions("name = 'smoke'")) == 1
    assert [run["id"] for run in flow_runs(api) if run["state_type"] == "RUNNING"] == []


def killed(made, finished, tmp_path, api, seed: int) -> None:
    project = Path(shutil.copytree(made, tmp_path / f"project-{seed}"))
    home = tmp_path / f"home-{seed}"
    told = kill_and_finish(project, home, api, 1 + seed % 2, random.Random(seed), finished[2]["seconds"])
    assert told["adapter_sha256"] == finished[2]["adapter_sha256"]
    assert told["model_version"] == 1
    check_nothing_left(home, api)


def test_a_killed_run_ends_in_the_same_bytes_and_leaves_nothing_open(made, finished, tmp_path, prefect_api):
    killed(made, finished, tmp_path, prefect_api, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_twenty_kills_end_in_the_same_bytes(made, finished, tmp_path, prefect_api, seed):
    killed(made, finished, tmp_path, prefect_api, seed)


def test_a_schedule_creates_runs_and_one_executes_to_the_end(finished, prefect_api):
    project, home, _ = finished
    command = [sys.executable, "-m", "flows.cli", "schedule", "params.yaml", "--cron", "0 3 * * 1"]
    process = subprocess.Popen(
        command, cwd=project, env=environment(home, PREFECT_API_URL=prefect_api), start_new_session=True
    )
    try:
        deployment = wait_for(lambda: deployment_named(prefect_api, "retrain/params"))
        scheduled = wait_for(lambda: runs_of(prefect_api, deployment, "SCHEDULED"))
        assert len(scheduled) >= 2
        made = httpx.post(
            f"{prefect_api}/deployments/{deployment}/create_flow_run", json={}, headers=csrf(prefect_api)
        ).raise_for_status()
        run_id = made.json()["id"]
        ended = wait_for(lambda: final_state(prefect_api, run_id))
        assert ended == "Nothing to do"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_for(ask, seconds: float = 150.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.5)
    raise AssertionError(f"nothing within {seconds} s")


def deployment_named(api: str, name: str) -> str | None:
    found = httpx.get(f"{api}/deployments/name/{name}")
    return found.json()["id"] if found.is_success else None


def runs_of(api: str, deployment: str, state: str) -> list[dict]:
    asked = {
        "deployments": {"id": {"any_": [deployment]}},
        "flow_runs": {"state": {"type": {"any_": [state]}}},
    }
    return httpx.post(f"{api}/flow_runs/filter", json=asked, headers=csrf(api)).raise_for_status().json()


def final_state(api: str, run_id: str) -> str | None:
    state = httpx.get(f"{api}/flow_runs/{run_id}").raise_for_status().json()["state"]
    return state["name"] if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None
