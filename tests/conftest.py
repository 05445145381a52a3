"""Every test runs in a home of its own, with no way to the network but loopback, and one thread."""

import os
import sys
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from retuner.runtime import QUIET

os.environ.update(QUIET)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    """No test sees the developer's settings or writes into the project's .retuner."""
    for name in list(os.environ):
        if name.startswith("RETUNER_") or name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RETUNER_HOME", str(tmp_path_factory.mktemp("retuner-home")))
    # Loading a model, mlflow leaves an object there that is no module; hypothesis looks at every module.
    if not isinstance(sys.modules.get("dbutils"), ModuleType):
        sys.modules.pop("dbutils", None)


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory):
    """A real Prefect server for the whole session; ports apart where several sessions test side by side."""
    from flows.servers import prefect_server
    from retuner.runtime import Runtime

    port = 4300 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    with prefect_server(Runtime(home=tmp_path_factory.mktemp("prefect-server")), port=port) as server:
        yield f"{server.url}/api"
