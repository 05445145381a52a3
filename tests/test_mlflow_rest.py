"""What MLflow's server is told of who we are, and who else is."""

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from retuner.mlflow_rest import call
from retuner.runtime import load_runtime

BASIC = "Basic " + base64.b64encode(b"ann:pass").decode()


@contextmanager
def server(moved_to: str | None = None) -> Iterator[tuple[str, list[str | None]]]:
    """A server that answers everything, or has moved; its address, and what came as Authorization."""
    heard: list[str | None] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.headers.get("Authorization"))
            self.send_response(302 if moved_to else 200)
            if moved_to:
                self.send_header("Location", moved_to + self.path)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as host:
        thread = Thread(target=host.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{host.server_port}", heard
        host.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    for name in ("USERNAME", "PASSWORD", "TOKEN", "URI"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    monkeypatch.delenv("RETUNER_TRACKING_URI", raising=False)


def test_credentials_do_not_follow_a_server_that_moved_to_another_host(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass")
    with server() as (new, there), server(moved_to=new) as (old, here):
        assert call(old, "GET", "runs/get", {}) == (200, {})
        assert here == [BASIC] and there == [None]


def test_user_and_password_come_before_the_token_as_for_mlflow(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "tok")
    with server() as (uri, heard):
        call(uri, "GET", "runs/get", {})
        call(uri.replace("//", "//ann:pass@"), "GET", "runs/get", {})
    assert heard == ["Bearer tok", BASIC]


def test_a_password_in_the_address_goes_where_no_message_can_tell_it(tmp_path):
    runtime = load_runtime(home=tmp_path, tracking_uri="http://ann:p%40ss@127.0.0.1:9/sub")
    assert runtime.mlflow_uri == "http://127.0.0.1:9/sub"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("ann", "p@ss")
