"""MLflow's and Prefect's servers over the stores of this project, for one person on one machine.

Both listen on loopback, where every web page that is open in a browser can reach them too: they answer to
their own names and pages only. Servers for more than one person: docker/compose.yaml.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from retuner.errors import Unavailable
from retuner.files import write_whole
from retuner.registry_reads import sqlite_path
from retuner.runtime import QUIET, Runtime
from retuner.tracking import make_database

START_SECONDS = 120
"""A first start creates a database, which takes half a minute on a busy machine."""
STOP_SECONDS = 15
PORTS_TRIED = 50
PREFECT_HEALTH = "/api/health"
MLFLOW_HEALTH = "/health"


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    health: str
    """The path that answers 200 once the server works."""
    folder: Path
    """Of its log, its record and its database."""
    process: subprocess.Popen[bytes] | None = None
    """None when it ran already: then it is not ours to stop."""

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def wait_until_it_answers(self) -> None:
        """Errors: Unavailable when it ends or stays silent instead."""
        deadline = time.monotonic() + START_SECONDS
        while not _answers(self.url, self.health):
            self.check()
            if time.monotonic() > deadline:
                raise self._failed(f"did not answer within {START_SECONDS} seconds")
            time.sleep(0.2)

    def check(self) -> None:
        """Errors: Unavailable once a server of ours has ended by itself."""
        if self.process and self.process.poll() is not None:
            raise self._failed("ended by itself")

    def _failed(self, what: str) -> Unavailable:
        with self.log.open(errors="replace") as lines:
            last = "".join(f"    {line}" for line in deque(lines, 8)).rstrip()
        found = f"the {self.name} server {what}; the last it said:\n{last}"
        return Unavailable(found, "a server that answers", f"see {self.log}")


def prefect_environment(runtime: Runtime) -> dict[str, str]:
    """The settings of Prefect for every process of this project, as environment variables.

    Flow runs go to the server that PREFECT_API_URL names, else to ours if it runs (see `running_prefect`),
    else to one that Prefect starts for the run and stops after it.
    """
    settings = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Its default of 20 s fails on a loaded machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(START_SECONDS),
        # For the server of one run as well: by default any web page may write to it while the run lasts.
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "http://127.0.0.1",
        # The page shows what a run says. In the terminal flows/console.py does, and errors are one message
        # without a traceback; what Prefect adds there is for those who ask.
        "PREFECT_LOGGING_LEVEL": "DEBUG" if runtime.log_level == "DEBUG" else "INFO",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": (
            runtime.log_level if runtime.log_level in ("DEBUG", "INFO") else "CRITICAL"
        ),
        "PREFECT_SERVER_LOGGING_LEVEL": runtime.log_level,
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }
    chosen = {name: os.environ.get(name, value) for name, value in settings.items()}
    chosen["PREFECT_HOME"] = str(runtime.prefect_home)
    # Prefect makes the last folder of that path only, and without it its server never answers.
    runtime.prefect_home.mkdir(parents=True, exist_ok=True)
    # A profile chosen elsewhere does not exist in this home.
    chosen["PREFECT_PROFILE"] = "ephemeral"
    if url := os.environ.get("PREFECT_API_URL") or running_prefect(runtime):
        chosen["PREFECT_API_URL"] = url
    return chosen


def running_prefect(runtime: Runtime) -> str | None:
    """The API URL of our Prefect server when one runs and answers. Imports no Prefect."""
    server = _running("Prefect", PREFECT_HEALTH, runtime.prefect_home)
    return f"{server.url}/api" if server else None


@contextmanager
def prefect_server(runtime: Runtime, port: int = 4200) -> Iterator[Server]:
    """Prefect's server and page at `port` or the next free one, or the one of ours that runs already.

    Errors: Unavailable when it does not start.
    """
    with _prefect(runtime, port) as server:
        server.wait_until_it_answers()
        yield server


@contextmanager
def mlflow_server(runtime: Runtime, port: int = 5000) -> Iterator[Server]:
    """MLflow's server and page at `port` or the next free one, or the one of ours that runs already.

    Errors: Unavailable when it does not start.
    """
    with _mlflow(runtime, port) as server:
        server.wait_until_it_answers()
        yield server


def ui(
    runtime: Runtime,
    mlflow_port: int = 5000,
    prefect_port: int = 4200,
    say: Callable[[str], None] = lambda line: print(line, flush=True),
) -> None:
    """Both pages until Ctrl-C or SIGTERM. What runs elsewhere, by its own setting, is named and left alone.

    Errors: Unavailable when a server does not start, or ends by itself.
    """
    elsewhere = runtime.mlflow_uri if runtime.mlflow_uri.startswith(("http:", "https:")) else None
    wanted = [
        ("MLflow", _mlflow, mlflow_port, elsewhere),
        ("Prefect", _prefect, prefect_port, os.environ.get("PREFECT_API_URL")),
    ]
    with _terminated_like_interrupted(), suppress(KeyboardInterrupt), ExitStack() as running:
        servers = []
        for name, launch, port, url in wanted:
            if url:
                say(f"{name:<7} {_shown(url)} (by your setting)")
            else:
                servers.append((running.enter_context(launch(runtime, port)), port))
        if any(server.process for server, _ in servers):
            say("Starting; the first time takes up to a minute.")
        for server, port in servers:
            server.wait_until_it_answers()
            say(f"{server.name:<7} {server.url}{_note(server, port)}")
        ours = [server for server, _ in servers if server.process]
        if ours:
            say("Ctrl-C stops what was started here.")
        while ours:
            time.sleep(0.5)
            for server in ours:
                server.check()


def _note(server: Server, port: int) -> str:
    if server.process is None:
        return f" (ran already; to stop it: kill {_record(server.folder)['pid']})"
    return "" if urlsplit(server.url).port == port else f" (port {port} is taken)"


@contextmanager
def _prefect(runtime: Runtime, port: int) -> Iterator[Server]:
    port = _free_port(port)
    environment = prefect_environment(runtime) | {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # The page asks its API at 127.0.0.1 even when it was opened as localhost.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }
    command = ["prefect", "server", "start"]
    with _launched("Prefect", command, environment, port, PREFECT_HEALTH, runtime.prefect_home) as server:
        yield server


@contextmanager
def _mlflow(runtime: Runtime, port: int) -> Iterator[Server]:
    port = _free_port(port)
    runtime.mlflow_artifacts.mkdir(parents=True, exist_ok=True)
    if path := sqlite_path(runtime.mlflow_uri):
        make_database(path)
    names = f"127.0.0.1:{port},localhost:{port}"
    environment = {
        # Not among the arguments, where a database's password would be everyone's to read.
        "MLFLOW_BACKEND_STORE_URI": runtime.mlflow_uri,
        "MLFLOW_ARTIFACTS_DESTINATION": runtime.mlflow_artifacts.as_uri(),
        # By default `10.evil.com` passes for a private address, and the server runs jobs and unpickles.
        "MLFLOW_SERVER_ALLOWED_HOSTS": names,
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}" for name in names.split(",")),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    folder = runtime.mlflow_artifacts.parent
    with _launched("MLflow", command, environment, port, MLFLOW_HEALTH, folder) as server:
        yield server


@contextmanager
def _launched(
    name: str, command: list[str], environment: dict[str, str], port: int, health: str, folder: Path
) -> Iterator[Server]:
    """`python -m command`, not waited for, or the server that runs already. Its record lies in `folder`."""
    if server := _running(name, health, folder):
        yield server
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**QUIET, **os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own: Ctrl-C reaches us alone, and we stop it together with what it started.
            start_new_session=True,
        )
    record = folder / "server.json"
    try:
        url = f"http://127.0.0.1:{port}"
        told = {"url": url, "pid": process.pid, "started": psutil.Process(process.pid).create_time()}
        write_whole(record, (json.dumps(told, sort_keys=True) + "\n").encode())
        yield Server(name, url, health, folder, process)
    finally:
        _stop(process)
        record.unlink(missing_ok=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The process and whatever it started: asked, then made to; at once when Ctrl-C is pressed again."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _running(name: str, health: str, folder: Path) -> Server | None:
    """The server that left its record in `folder`, if that very process lives and answers."""
    try:
        told = _record(folder)
        # A record outlives a machine that went down; its process number may be another's by now.
        same = psutil.Process(told["pid"]).create_time() == told["started"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        return None
    return Server(name, told["url"], health, folder) if same and _answers(told["url"], health) else None


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "server.json").read_bytes())


def _answers(url: str, path: str) -> bool:
    # http.client, because urllib would ask a proxy that the environment names.
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=1)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port(first: int) -> int:
    for port in range(first, first + PORTS_TRIED):
        with socket.socket() as probe, suppress(OSError):
            # As servers do, so that a port whose last connections are fading still counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    taken = f"ports {first} to {first + PORTS_TRIED - 1} are all taken"
    raise Unavailable(taken, "a free one", "name another port")


def _shown(url: str) -> str:
    """Without the name and password that it may hold."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, which `kill` and service managers send, ends a `with` block as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
