"""The local servers: they start, they schedule, they answer to their own pages only, and they stop."""

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from flows.servers import mlflow_server, prefect_environment, running_prefect, ui
from retuner.errors import Unavailable
from retuner.runtime import QUIET, Runtime, load_runtime

ROOT = Path(__file__).parents[1]
EVIL = "http://evil.example"
UI = "from flows.servers import ui; from retuner.runtime import load_runtime; ui(load_runtime(), {}, {})"


@dataclass
class Pages:
    """`retuner ui` in a process of its own, from the moment it has said that all runs."""

    runtime: Runtime
    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def url(self, name: str) -> str:
        return next(line.split()[1] for line in self.said if line.startswith(name))


def environment(runtime: Runtime, **more: str) -> dict[str, str]:
    return {**os.environ, **QUIET, "RETUNER_HOME": str(runtime.home), "PYTHONPATH": str(ROOT), **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.fixture(scope="module")
def pages(tmp_path_factory, taken_port) -> Iterator[Pages]:
    runtime = Runtime(home=tmp_path_factory.mktemp("home"))
    process = subprocess.Popen(
        [sys.executable, "-c", UI.format(taken_port, free_port())],
        env=environment(runtime),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    pages = Pages(runtime, process)
    for line in process.stdout:
        pages.said.append(line.rstrip())
        if "Ctrl-C" in line:
            break
    assert process.poll() is None, pages.said
    yield pages
    process.terminate()
    process.wait(60)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(url: str, data: object = None, **headers: str) -> Answer:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return Answer(reply.status, dict(reply.headers), reply.read())
    except urllib.error.HTTPError as refusal:
        return Answer(refusal.code, dict(refusal.headers), refusal.read())


PROGRAM = """
import json, time
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

@flow
def trivial():
    return 1

if __name__ == "__main__":
    state = trivial(return_state=True)
    deployment = trivial.to_deployment("nightly", cron="0 3 * * *").apply()
    only = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="retuner", type="process"))
        run = client.read_flow_run(state.state_details.flow_run_id)
        for _ in range(90):
            if scheduled := client.read_flow_runs(deployment_filter=only):
                break
            time.sleep(1)
    told = {"api": str(client.api_url), "state": run.state_name}
    print(json.dumps({**told, "scheduled": [run.state_name for run in scheduled]}))
"""


def with_our_settings(pages: Pages, *command: str) -> str:
    """What a program prints that has the settings every process of the project gets."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(pages.runtime, **prefect_environment(pages.runtime)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def told_by_prefect(pages, tmp_path_factory) -> dict:
    """A trivial flow, run once and deployed with a cron schedule, by a client with our settings."""
    program = tmp_path_factory.mktemp("flows") / "trivial.py"
    program.write_text(PROGRAM)
    return json.loads(with_our_settings(pages, str(program)).splitlines()[-1])


def test_a_prefect_server_starts_with_the_locked_versions(pages):
    answer = ask(f"{pages.url('Prefect')}/api/admin/version")
    assert json.loads(answer.body) == importlib.metadata.version("prefect")


def test_runs_find_the_server_that_runs_and_its_page_answers(pages):
    assert running_prefect(pages.runtime) == f"{pages.url('Prefect')}/api"
    assert prefect_environment(pages.runtime)["PREFECT_API_URL"] == f"{pages.url('Prefect')}/api"
    assert ask(pages.url("Prefect")).status == 200


def test_a_port_that_is_taken_is_passed_over_and_said(pages, taken_port):
    assert any(f"(port {taken_port} is taken)" in line for line in pages.said)
    assert ask(f"{pages.url('MLflow')}/health").status == 200


def test_a_second_start_finds_the_servers_and_leaves_them_alone(pages):
    said = []
    ui(pages.runtime, free_port(), free_port(), said.append)
    assert [line.split()[1] for line in said] == [pages.url("MLflow"), pages.url("Prefect")]
    assert all("ran already" in line for line in said)
    assert ask(f"{pages.url('Prefect')}/api/health").status == 200


def test_a_flow_run_reports_to_the_running_server_through_its_protection(pages, told_by_prefect):
    assert told_by_prefect["api"].rstrip("/") == f"{pages.url('Prefect')}/api"
    assert told_by_prefect["state"] == "Completed"


def test_a_cron_deployment_yields_scheduled_runs(told_by_prefect):
    # With versions that resolve but do not fit, the server never creates them and says nothing.
    assert len(told_by_prefect["scheduled"]) >= 3
    assert set(told_by_prefect["scheduled"]) == {"Scheduled"}


def test_the_projects_own_deployment_is_accepted_as_it_is_written(pages, told_by_prefect):
    with_our_settings(pages, "-m", "prefect", "--no-prompt", "deploy", "--all")
    answer = ask(f"{pages.url('Prefect')}/api/deployments/name/retrain/weekly")
    deployment = json.loads(answer.body)
    assert deployment["entrypoint"] == "flows/retrain.py:retrain"
    assert deployment["work_pool_name"] == "retuner"
    assert [schedule["schedule"]["cron"] for schedule in deployment["schedules"]] == ["0 3 * * 1"]
    assert (ROOT / deployment["parameters"]["params"]).is_file()
    assert not Path(deployment["parameters"]["params"]).is_absolute()
    assert set(deployment["parameter_openapi_schema"]["properties"]) == {"params", "overrides"}


@pytest.mark.parametrize("headers", [{"Origin": EVIL}, {"Origin": EVIL, "Content-Type": "text/plain"}, {}])
def test_a_web_page_elsewhere_cannot_create_anything_in_prefect(pages, headers):
    answer = ask(f"{pages.url('Prefect')}/api/flows/", {"name": "evil"}, **headers)
    assert answer.status == 403


def test_a_web_page_elsewhere_may_not_read_the_token_that_writing_needs(pages):
    token = f"{pages.url('Prefect')}/api/csrf-token?client=evil"
    assert "access-control-allow-origin" not in ask(token, Origin=EVIL).headers
    own = pages.url("Prefect").replace("127.0.0.1", "localhost")
    assert ask(token, Origin=own).headers["access-control-allow-origin"] == own


def test_mlflow_refuses_a_name_that_only_looks_private(pages):
    search = f"{pages.url('MLflow')}/api/2.0/mlflow/experiments/search?max_results=1"
    assert ask(search).status == 200
    assert ask(search, Host="10.evil.com").status == 403


def test_a_web_page_elsewhere_cannot_create_anything_in_mlflow(pages):
    create = f"{pages.url('MLflow')}/api/2.0/mlflow/experiments/create"
    assert ask(create, {"name": "evil"}, Origin=EVIL).status == 403
    assert ask(create, {"name": "own"}, Origin=pages.url("MLflow")).status == 200


def test_artifacts_that_a_run_left_as_files_are_seen_on_the_page(pages):
    files = pages.runtime.mlflow_artifacts / "experiment"
    client = MlflowClient(pages.runtime.mlflow_uri)
    experiment = client.create_experiment("files", artifact_location=files.as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_text(run, "as it is", "notes/readme.txt")
    listed = ask(f"{pages.url('MLflow')}/ajax-api/2.0/mlflow/artifacts/list?run_id={run}&path=notes")
    assert [file["path"] for file in json.loads(listed.body)["files"]] == ["notes/readme.txt"]
    shown = ask(f"{pages.url('MLflow')}/get-artifact?run_uuid={run}&path=notes/readme.txt")
    assert shown.body == b"as it is"


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    """Some other server that calls itself healthy."""
    server = HTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def leave_record(runtime: Runtime, **told: object) -> None:
    runtime.prefect_home.mkdir(parents=True)
    (runtime.prefect_home / "server.json").write_text(json.dumps(told))


def test_the_record_of_a_live_server_is_believed(stranger):
    runtime = load_runtime()
    me = psutil.Process()
    leave_record(runtime, url=stranger, pid=me.pid, started=me.create_time())
    assert running_prefect(runtime) == f"{stranger}/api"


@pytest.mark.parametrize("started_ago", [1.0, 1e6])
def test_a_record_whose_process_number_is_anothers_by_now_is_not_believed(stranger, started_ago):
    runtime = load_runtime()
    me = psutil.Process()
    leave_record(runtime, url=stranger, pid=me.pid, started=me.create_time() - started_ago)
    assert running_prefect(runtime) is None


@pytest.mark.parametrize("record", ["", "{", "[]", "{}"])
def test_a_torn_record_is_no_server(record):
    runtime = load_runtime()
    runtime.prefect_home.mkdir(parents=True)
    (runtime.prefect_home / "server.json").write_text(record)
    assert running_prefect(runtime) is None


def test_the_settings_name_a_home_that_is_there():
    # Prefect makes no parents: its server would wait out its time and fail.
    assert Path(prefect_environment(load_runtime())["PREFECT_HOME"]).is_dir()


def test_a_server_of_your_own_is_used_instead_of_ours(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "https://name:secret@prefect.example/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    said = []
    ui(load_runtime(), say=said.append)
    assert prefect_environment(load_runtime())["PREFECT_API_URL"] == os.environ["PREFECT_API_URL"]
    assert "https://prefect.example/api" in said[1]
    assert "secret" not in "".join(said)


def test_a_place_where_no_database_can_be_made_is_named():
    runtime = load_runtime(tracking_uri="sqlite:////dev/null/nowhere.db")
    with pytest.raises(Unavailable, match="the folder /dev/null"), mlflow_server(runtime, free_port()):
        pass


def test_a_server_that_cannot_start_says_why_and_where_its_log_is(tmp_path):
    (tmp_path / "mlflow.db").write_text("something else")
    runtime = load_runtime(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(Unavailable) as refusal, mlflow_server(runtime, free_port()):
        pass
    assert "file is not a database" in refusal.value.found
    assert str(runtime.mlflow_artifacts.parent / "server.log") in refusal.value.do
    assert not (runtime.mlflow_artifacts.parent / "server.json").exists()


def test_sigterm_stops_both_servers_and_leaves_nothing_behind(pages):
    """The last of this file: it ends the servers of the others."""
    folders = (pages.runtime.prefect_home, pages.runtime.mlflow_artifacts.parent)
    left = [psutil.Process(json.loads((folder / "server.json").read_bytes())["pid"]) for folder in folders]
    left += [child for process in left for child in process.children(recursive=True)]
    pages.process.send_signal(signal.SIGTERM)
    assert pages.process.wait(60) == 0
    assert not [process for process in left if process.is_running()]
    assert not any((folder / "server.json").exists() for folder in folders)
    assert running_prefect(pages.runtime) is None
